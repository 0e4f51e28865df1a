import copy
import os
import pickle
import re
import subprocess
import sys

import pytest

from zoo.train.config import ConfigError, config_names, find_config, load_config
from zoo.train.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from zoo.train.run import train

CONFIG = 'quickstart/biformer_digits'
IMAGENET = [name for name in config_names() if name != CONFIG]


def test_a_config_is_found_by_name_and_by_path():
    path = find_config(CONFIG)
    assert path.is_file()
    assert find_config(path) == find_config(f'{CONFIG}.py') == path
    assert CONFIG in config_names()


def test_parts_of_configs_are_no_configs():
    assert not [name for name in config_names() if '/_' in name or name.startswith('_')]


def test_options_replace_values_also_as_typed_text():
    cfg = load_config(
        CONFIG, {'train_cfg.max_epochs': '3', 'model.backbone.topks': '(1, 1, 1, -2)', 'work_dir': 'here'}
    )
    assert cfg.train_cfg.max_epochs == 3
    assert tuple(cfg.model.backbone.topks) == (1, 1, 1, -2)
    assert cfg.work_dir == 'here'
    assert load_config(CONFIG).work_dir == f'work_dirs/{CONFIG}'


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('0.5', 0.5),
        ('1e-3', 1e-3),
        ('-2', -2),
        ('None', None),
        ('True', True),
        ('false', False),
        ('bicubic', 'bicubic'),
        ("'None'", 'None'),
        ('rand-m9-mstd0.5-inc1', 'rand-m9-mstd0.5-inc1'),
        ('[1, [2, "x"]]', [1, [2, 'x']]),
        ("{'mixup_alpha': 0.8, 'cutmix_minmax': (0.2, 0.8)}", {'mixup_alpha': 0.8, 'cutmix_minmax': (0.2, 0.8)}),
        ('/data/[old]', '/data/[old]'),
    ],
)
def test_typed_text_is_the_python_value_that_it_spells(text, value):
    assert load_config(CONFIG, {'model.mixup': text}).model.mixup == value


def test_options_reach_into_lists_through_none_and_take_the_place_of_dicts():
    plain = load_config(CONFIG)
    options = {
        'custom_hooks.0.momentum': '0.5',
        'train_dataloader.dataset.transform.1.translate.0': '0.25',  # in a tuple, in a list
        'model.mixup.mixup_alpha': '0.8',  # there is no mixup
        'default_hooks.timer.type': 'IterTimerHook',  # which is None
        'model.loss': {'label_smoothing': 0.2},
        'model.backbone': {'name': 'van_b0', '_delete_': True},
        'val_evaluator': "[{'type': 'TopK'}]",  # a list for a dict
    }
    given = copy.deepcopy(options)
    cfg = load_config(CONFIG, options)
    assert cfg.custom_hooks == [{'type': 'EMAHook', 'momentum': 0.5}]
    assert list(cfg.train_dataloader.dataset.transform[1].translate) == [0.25, 0.125]
    assert cfg.val_dataloader == plain.val_dataloader
    assert cfg.model.mixup == {'mixup_alpha': 0.8}
    assert cfg.default_hooks.timer == {'type': 'IterTimerHook'}
    assert cfg.model.loss == {'type': 'cross_entropy', 'label_smoothing': 0.2}
    assert cfg.model.backbone == {'name': 'van_b0'}
    assert cfg.val_evaluator == [{'type': 'TopK'}]
    assert options == given


@pytest.mark.parametrize(
    ('option', 'value', 'says'),
    [
        ('train_cfg..max_epochs', 3, "'train_cfg..max_epochs' is no key"),
        ('', 3, "'' is no key"),
        ('train_cfg[max_epochs]', 3, 'is no key'),
        ('custom_hooks.1.momentum', 3, "custom_hooks is a list of 1: expected a position from 0 to 0, got '1'"),
        ('custom_hooks.first', 3, "expected a position from 0 to 0, got 'first'"),
        ('train_cfg.max_epochs.all', 3, "train_cfg.max_epochs is 9, which has nothing named 'all'"),
        ('model.mean', '[0.5, 0.5', 'is no Python value'),
        ('optim_wraper.type', 'x', "nothing reads 'optim_wraper'. Did you mean optim_wrapper"),
        ('resize.size', 32, 'resize is a variable of the config file, and has been used'),
    ],
)
def test_an_option_that_can_not_be_set_is_explained(option, value, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_config(CONFIG, {option: value})


def test_all_options_that_can_not_be_set_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(CONFIG, {'train_config.x': 1, 'train_cfg.max_epochs': 3, 'custom_hooks.4': {}})
    assert len(error.value.problems) == 2
    assert pickle.loads(pickle.dumps(error.value)).problems == error.value.problems


@pytest.mark.parametrize('text', ['model = dict(', 'model = undefined', 'value = 1 / 0'])
def test_a_config_that_is_no_program_is_named(tmp_path, text):
    path = tmp_path / 'mine.py'
    path.write_text(text)
    with pytest.raises(ConfigError, match=f'{path}: can not be read: '):
        load_config(path)


@pytest.mark.parametrize('name', [CONFIG, *(pytest.param(n, marks=pytest.mark.slow) for n in IMAGENET)])
def test_every_shipped_config_gives_all_parameters_to_its_optimizer(name):
    cfg = load_config(name)
    for key in ('pretrained', 'checkpoint', 'checkpoint_path'):
        cfg.model.backbone.pop(key, None)
    cfg.model.backbone.device = 'meta'
    cfg.model.pop('teacher', None)
    cfg.model.pop('distillation', None)
    model = MODELS.build(cfg.model)
    wrapper = cfg.optim_wrapper.copy()
    wrapper.optimizer.pop('fused', None)  # not for the meta device
    constructor = {
        'type': wrapper.pop('constructor'),
        'paramwise_cfg': wrapper.pop('paramwise_cfg', None),
        'optim_wrapper_cfg': wrapper,
    }
    optimizer = OPTIM_WRAPPER_CONSTRUCTORS.build(constructor)(model).optimizer
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group['params']}
    assert grouped == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize('name', config_names())
def test_a_shipped_config_says_how_to_run_it_in_a_screenful(name):
    lines = find_config(name).read_text().splitlines()
    assert len(lines) <= 25
    assert any(f'zoo train {name}' in line for line in lines[:5])


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(FileNotFoundError, match=f'quickstart/biformer_digit.*{CONFIG}'):
        train('quickstart/biformer_digit')


def test_a_config_without_a_part_is_refused(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text("model = {'type': 'ImageClassifier'}\ntrain_cfg = {}\n")
    with pytest.raises(ValueError, match='no train_dataloader, optim_wrapper'):
        train(path)


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        ({'model.backbone.name': 'biformer_tinny'}, "no model 'biformer_tinny'.*biformer_tiny"),
        ({'model.backbone.windows': 4}, 'windows'),
        ({'model.los': {}}, 'los'),
        ({'model.loss.type': 'crossentropy'}, "no loss 'crossentropy'.*cross_entropy"),
    ],
)
def test_a_wrong_entry_of_the_model_is_named(tmp_path, options, says):
    with pytest.raises((ValueError, TypeError), match=says):
        train(CONFIG, tmp_path, cfg_options=options)


def test_processes_that_start_at_once_share_caches_in_peace(tmp_path):
    """yapf's, which mmengine imports, is not there yet."""
    command = [sys.executable, '-c', 'import zoo.train.config']
    environment = os.environ | {'XDG_CACHE_HOME': str(tmp_path)}
    ranks = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [rank.communicate()[1] for rank in ranks if rank.wait()] == []
    assert list(tmp_path.rglob('*.pickle'))
