import os
import subprocess
import sys

import pytest

from zoo.train.config import config_names, find_config, load_config
from zoo.train.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from zoo.train.run import train

CONFIG = 'quickstart/biformer_digits'


def test_a_config_is_found_by_name_and_by_path():
    path = find_config(CONFIG)
    assert path.is_file()
    assert find_config(path) == find_config(f'{CONFIG}.py') == path
    assert CONFIG in config_names()


def test_options_replace_values_also_as_typed_text():
    cfg = load_config(
        CONFIG, {'train_cfg.max_epochs': '3', 'model.backbone.topks': '(1, 1, 1, -2)', 'work_dir': 'here'}
    )
    assert cfg.train_cfg.max_epochs == 3
    assert tuple(cfg.model.backbone.topks) == (1, 1, 1, -2)
    assert cfg.work_dir == 'here'
    assert load_config(CONFIG).work_dir == f'work_dirs/{CONFIG}'


@pytest.mark.parametrize('name', config_names())
def test_every_shipped_config_builds_its_model_and_optimizer(name):
    cfg = load_config(name)
    model = MODELS.build(cfg.model)
    wrapper = cfg.optim_wrapper.copy()
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
