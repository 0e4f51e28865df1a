"""Problems of a config, planted one by one, and no alarm without one."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoo.train.config import READ, ConfigError, config_names, find_config, load_config
from zoo.train.registry import HOOKS, LOOPS, MODELS, PARAM_SCHEDULERS, TRANSFORMS
from zoo.train.signatures import arguments_of
from zoo.train.validation import validate

CONFIG = 'quickstart/biformer_digits'
IMAGENET = [name for name in config_names() if name.startswith('imagenet/')]
FIRST = {name.rpartition('/')[0]: name for name in reversed(IMAGENET)}  # a config of each family
CROP = {'type': 'timm_transform', 'input_size': 64, 'is_training': True, 'auto_augment': 'rand-m9-mstd0.5'}
VIT = {'name': 'test_vit', 'num_classes': 3, '_delete_': True}  # takes 160x160 alone
MIB = 2**20
MIXUP = {'mixup_alpha': 0.8}
SQUARE = {f'{part}_dataloader.dataset.transform.0.size': (64, 64) for part in ('train', 'val')}


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor with memory behind it that an operator returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != 'meta':
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.fixture
def problems(tiny):
    """The problems that validation finds in the tiny run with some options."""

    def find(options, world_size=1, data=True):
        cfg = load_config(CONFIG, {**tiny, **options})
        try:
            validate(cfg, world_size=world_size, data=data)
        except ConfigError as error:
            return list(error.problems)
        return []

    return find


@pytest.mark.parametrize(
    'name',
    [CONFIG, *FIRST.values(), *(pytest.param(n, marks=pytest.mark.slow) for n in IMAGENET if n not in FIRST.values())],
)
def test_a_shipped_config_is_without_problem_and_checked_without_a_weight_in_memory(name):
    cfg = load_config(name)
    with LargestTensor() as largest:
        validate(cfg, data=False)
    assert largest.bytes < MIB  # at most a picture, of 150 kB


@pytest.mark.parametrize('name', ['van_b0', 'shvit_s1'])
def test_a_built_model_has_a_larger_tensor_than_validation_may_have(name):
    with LargestTensor() as largest:
        timm.create_model(name)
    assert largest.bytes > MIB


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'model.mixup': MIXUP, 'train_dataloader.batch_size': 6},
        {'model.backbone': {**VIT, 'img_size': 64}, **SQUARE},
        {'model.teacher': {'name': 'test_convnext', 'checkpoint': __file__}},  # of a file that isn't read
        {'model.backbone.pretrained': True},
        {
            'model.teacher': {'name': 'test_resnet', 'num_classes': 3, 'pretrained': False},
            'model.distillation': {'kind': 'soft', 'tau': 3.0},
        },
        {'model.random_erasing': {'probability': 0.25, 'mode': 'pixel'}, 'model.compile': True},
        {'model.loss': {'type': 'binary_cross_entropy', '_delete_': True, 'sum_classes': True}},
        {'train_dataloader.dataset.transform': [CROP], 'train_dataloader.num_workers': 2},
        {'optim_wrapper.optimizer': {'type': 'timm/lamb', 'lr': 1e-3, '_delete_': True}},
        {'optim_wrapper.paramwise_cfg.layer_decay': 0.8, 'optim_wrapper.type': 'AutocastOptimWrapper'},
        {
            'optim_wrapper.accumulative_counts': 4,
            'optim_wrapper.clip_grad': {'type': 'agc', 'clip_factor': 0.02, '_delete_': True},
        },
        {'param_scheduler': {'type': 'CosineAnnealingLR', 'T_max': 2, 'convert_to_iter_based': True, '_delete_': True}},
        {'param_scheduler': {'type': 'LinearLR', 'by_epoch': False, 'start_factor': 0.1, '_delete_': True}},
        {
            'custom_hooks': [
                {'type': 'EMAHook', 'momentum': 0.1, 'priority': 'LOW'},
                {'type': 'EarlyStoppingHook', 'monitor': 'top1'},
            ]
        },
        {'val_dataloader': None, 'val_cfg': None, 'val_evaluator': None, 'default_hooks.checkpoint.best': 'loss'},
        {'val_evaluator': [{'type': 'TopK', 'k': (1,)}, {'type': 'TopK', 'k': (2,), 'prefix': 'two'}]},
        {'visualizer.vis_backends': [{'type': 'LocalVisBackend'}], 'env_cfg': {'cudnn_benchmark': True}},
        {'compile': {'mode': 'default'}, 'sync_bn': 'torch', 'find_unused_parameters': True, 'strategy': 'fsdp2'},
    ],
    ids=str,
)
def test_what_can_be_trained_raises_no_alarm(problems, options):
    assert problems(options) == []


# What is planted, the key that must be named, and what must be said of it.
PLANTED = [
    # keys
    ({'train_cfg.max_epoch': 3}, 'train_cfg.max_epoch', 'Did you mean max_epochs'),
    ({'train_dataloader.batchsize': 4}, 'train_dataloader.batchsize', 'batch_size'),
    ({'train_dataloader.dataset.spilt': 'x'}, 'train_dataloader.dataset.spilt', 'split'),
    ({'train_dataloader.dataset.transform.0.sise': 3}, 'train_dataloader.dataset.transform.0.sise', 'size'),
    ({'train_dataloader.sampler.repeat': 3}, 'train_dataloader.sampler.repeat', 'repeats'),
    ({'model.mixups': MIXUP}, 'model.mixups', 'mixup'),
    ({'model.mixup.mixup_alfa': 0.8}, 'model.mixup.mixup_alfa', 'mixup_alpha'),
    ({'model.random_erasing.propability': 0.2}, 'model.random_erasing.propability', 'probability'),
    ({'model.loss.smoothing': 0.1}, 'model.loss.smoothing', 'label_smoothing'),
    ({'model.backbone.drop_path': 0.1}, 'model.backbone.drop_path', 'test_resnet does not take it.*drop_path_rate'),
    (
        {'model.teacher': {'name': 'test_convnext', 'checkpoint': __file__, 'num_clases': 3}},
        'model.teacher.num_clases',
        'num_classes',
    ),
    ({'optim_wrapper.accumulate': 2}, 'optim_wrapper.accumulate', 'accumulative_counts'),
    ({'optim_wrapper.optimiser.lr': 2}, 'optim_wrapper.optimiser', 'does not take it'),
    ({'optim_wrapper.optimizer.decay': 0.1}, 'optim_wrapper.optimizer.decay', 'weight_decay'),
    (
        {'optim_wrapper.optimizer': {'type': 'timm/lamb', 'lr': 1e-3, 'decay': 0, '_delete_': True}},
        'optim_wrapper.optimizer',
        'decay',
    ),
    (
        {'optim_wrapper.paramwise_cfg.layer_decay_rate': 0.7},
        'optim_wrapper.paramwise_cfg.layer_decay_rate',
        'layer_decay',
    ),
    ({'optim_wrapper.clip_grad.norm': 5}, 'optim_wrapper.clip_grad.norm', 'max_norm|norm_type'),
    ({'param_scheduler.warm_up': 5}, 'param_scheduler.warm_up', 'warmup'),
    ({'default_hooks.checkpoint.intervall': 2}, 'default_hooks.checkpoint.intervall', 'interval'),
    ({'custom_hooks': [{'type': 'EMAHook', 'momentun': 0.1}]}, 'custom_hooks.0.momentun', 'momentum'),
    ({'custom_hooks': [{'type': 'EMA', 'decai': 0.1}]}, 'custom_hooks.0.decai', 'decay'),
    ({'val_evaluator.ks': (1,)}, 'val_evaluator.ks', 'k'),
    ({'randomness.sead': 1}, 'randomness.sead', 'seed'),
    ({'env_cfg.cudnn_bench': True}, 'env_cfg.cudnn_bench', 'cudnn_benchmark'),
    # types and names
    ({'model.type': 'ImageClasifier'}, 'model.type', "no model 'ImageClasifier'.*ImageClassifier"),
    ({'model.backbone.name': 'biformer_tinny'}, 'model.backbone.name', "no model 'biformer_tinny'.*biformer_tiny"),
    ({'model.teacher': {'name': 'resnet500'}}, 'model.teacher.name', "no model 'resnet500'"),
    ({'model.loss.type': 'crossentropy'}, 'model.loss.type', "no loss 'crossentropy'.*cross_entropy"),
    ({'train_dataloader.dataset.type': 'LabeledImages'}, 'train_dataloader.dataset.type', 'LabelledImages'),
    ({'train_dataloader.dataset.transform.0.type': 'resize'}, 'train_dataloader.dataset.transform.0.type', 'Resize'),
    ({'train_dataloader.sampler.type': 'ShufledStream'}, 'train_dataloader.sampler.type', 'ShuffledStream'),
    ({'train_dataloader.collate_fn.type': 'default_colate'}, 'train_dataloader.collate_fn.type', 'default_collate'),
    ({'optim_wrapper.optimizer.type': 'adamw'}, 'optim_wrapper.optimizer.type', 'AdamW'),
    ({'optim_wrapper.type': 'AmpWrapper'}, 'optim_wrapper.type', 'AmpOptimWrapper'),
    ({'optim_wrapper.constructor': 'TimmGroups'}, 'optim_wrapper.constructor', 'TimmParamGroups'),
    ({'param_scheduler.type': 'CosineLR'}, 'param_scheduler.type', 'WarmupCosineLR|CosineRestartLR'),
    ({'train_cfg.type': 'TrainLop'}, 'train_cfg.type', 'TrainLoop'),
    ({'val_evaluator.type': 'TopN'}, 'val_evaluator.type', 'TopK'),
    ({'custom_hooks': [{'type': 'EMAHok'}]}, 'custom_hooks.0.type', "no hook 'EMAHok'.*EMAHook"),
    ({'custom_hooks': [{'momentum': 1}]}, 'custom_hooks.0', 'has no type'),
    ({'visualizer.type': 'Visualiser'}, 'visualizer.type', 'Visualizer'),
    # parts and values
    ({'val_evaluator': None}, 'val_dataloader', 'needs val_evaluator too'),
    ({'train_dataloader.sampler': None}, 'train_dataloader', 'needs sampler too'),
    (
        {'train_dataloader.sampler.type': 'DefaultSampler'},
        'train_dataloader.sampler',
        'ShuffledStream, got DefaultSampler',
    ),
    ({'val_dataloader.sampler': {'type': 'ShuffledStream', '_delete_': True}}, 'val_dataloader.sampler', 'never ends'),
    ({'val_dataloader.collate_fn': None}, 'val_dataloader', 'default_collate'),
    ({'train_cfg': {'type': 'TrainLoop', '_delete_': True}}, 'train_cfg', 'needs max_epochs or max_steps'),
    ({'train_cfg.max_steps': 5}, 'train_cfg', 'needs max_epochs or max_steps, one of them'),
    ({'train_cfg.max_epochs': 1.5}, 'train_cfg.max_epochs', 'positive integer, got 1.5'),
    ({'train_dataloader.batch_size': 0}, 'train_dataloader', 'batch_size=0'),
    ({'train_dataloader.persistent_workers': True}, 'train_dataloader', 'num_workers > 0'),
    ({'optim_wrapper.optimizer.lr': -1.0}, 'optim_wrapper.optimizer', '-1.0'),
    ({'optim_wrapper.accumulative_counts': 0}, 'optim_wrapper', 'positive integer, got 0'),
    ({'optim_wrapper.paramwise_cfg.no_decay': ('*.rpb',)}, 'optim_wrapper.paramwise_cfg', r'\*\.rpb'),
    (
        {'model.backbone.pretrained': True, 'model.backbone.name': 'crossformer_tiny'},
        'model.backbone.pretrained',
        'no weights',
    ),
    ({'strategy': 'fsdp'}, 'strategy', "ddp or fsdp2, got 'fsdp'"),
    ({'default_hooks.checkpoint.best': 'top5'}, 'default_hooks.checkpoint.best', "'top5' is not measured.*top1, top2"),
    (
        {'param_scheduler': {'type': 'CosineAnnealingLR', 'T_max': 2, '_delete_': True}},
        'param_scheduler',
        'convert_to_iter_based',
    ),
    # images against the model
    (
        {'model.backbone': VIT},
        'train_dataloader.dataset.transform',
        '3x65x63.*test_vit refuses.*model.backbone.img_size',
    ),
    (
        {'train_dataloader.dataset.transform': [{**CROP, 'input_size': 16}], 'model.backbone.name': 'van_b0'},
        'train_dataloader.dataset.transform',
        '3x16x16.*van_b0 refuses',
    ),
    ({'train_dataloader.dataset.image_mode': 'L'}, 'train_dataloader.dataset.transform', 'takes 3 channels'),
    (
        {'val_dataloader.dataset.transform': [{'type': 'Resize', 'size': (64, 64)}]},
        'val_dataloader.dataset.transform',
        'PILToTensor',
    ),
    (
        {'val_dataloader.dataset.transform': [{'type': 'Resize', 'size': (64, 64)}, {'type': 'ToTensor'}]},
        'val_dataloader.dataset.transform',
        'float32, expected uint8',
    ),
    (
        {'model.teacher': {'name': 'test_vit', 'checkpoint': __file__}},
        'train_dataloader.dataset.transform',
        'model.teacher',
    ),
    # batches
    ({'model.mixup': MIXUP}, 'train_dataloader.batch_size', '7 is odd, but mixup'),
    ({'train_dataloader.batch_size': 61}, 'train_dataloader.batch_size', '60 training images.*a batch of 61'),
    ({'optim_wrapper.accumulative_counts': 9}, 'train_dataloader.batch_size', '9 batches of 7'),
    ({'total_batch': 31, 'train_dataloader.batch_size': 7}, 'total_batch', 'no batch near'),
    # data
    ({'model.backbone.num_classes': 10}, 'model.backbone.num_classes', '10, but the training data has 3 classes'),
    ({'train_dataloader.dataset.split': 'training'}, 'train_dataloader.dataset', 'no image folder.*has test, train'),
    ({'model.backbone.checkpoint': 'no/such.pth'}, 'model.backbone.checkpoint', 'no file no/such.pth'),
    ({'load_from': 'no/such.pth'}, 'load_from', 'no file no/such.pth'),
]


@pytest.mark.parametrize(
    ('options', 'key', 'says'), PLANTED, ids=[f'{key}-{i}' for i, (_, key, _) in enumerate(PLANTED)]
)
def test_a_planted_problem_is_named_by_its_key(problems, options, key, says):
    found = problems(options)
    assert [problem for problem in found if problem.startswith(f'{key}: ')], found
    assert any(re.search(says, problem) for problem in found), found


def test_all_problems_are_told_at_once(problems, tiny):
    options = {
        'train_cfg.max_epoch': 3,
        'model.backbone': {'name': 'test_vit', 'num_classes': 4, 'windows': 7, 'drop_paths': 0.1, '_delete_': True},
        'optim_wrapper.optimizer.type': 'AdamV',
        'train_dataloader.batch_size': 64,
    }
    keys = [problem.partition(':')[0] for problem in problems(options)]
    assert sorted(keys) == [
        'model.backbone.drop_paths',
        'model.backbone.num_classes',
        'model.backbone.windows',
        'optim_wrapper.optimizer.type',
        'train_cfg.max_epoch',
        'train_dataloader.batch_size',
        'train_dataloader.dataset.transform',
        'val_dataloader.dataset.transform',
    ]
    with pytest.raises(ConfigError) as error:
        validate(load_config(CONFIG, {**tiny, **options}))
    lines = str(error.value).splitlines()
    assert lines[0].endswith('biformer_digits.py: 8 problems.')
    assert len(lines) == 9


def test_ranks_share_an_epoch(problems):
    options = {'train_dataloader.batch_size': 20}
    assert problems(options, world_size=3) == []
    (problem,) = problems(options, world_size=4)
    assert '60 training images on 4 process(es) leave 15 to each' in problem
    (problem,) = problems({'total_batch': 32}, world_size=3)
    assert problem.startswith('total_batch: 3 processes do not divide total_batch=32')


def test_without_data_no_folder_or_file_is_looked_for(problems):
    options = {'train_dataloader.dataset.root': '/no/such', 'load_from': 'no/such.pth'}
    assert len(problems(options)) == 2
    assert problems(options, data=False) == []


def test_folders_that_are_no_classes_are_named(problems, colours, tmp_path):
    copy = shutil.copytree(colours, tmp_path / 'copy')
    options = {'train_dataloader.dataset.root': str(copy)}
    assert problems(options) == []
    (copy / 'train' / 'violet' / 'dark').mkdir(parents=True)
    assert 'class folders without images: violet' in problems(options)[0]
    shutil.copy(copy / 'train' / 'red' / '0.png', copy / 'train' / 'violet' / 'dark')
    # timm names a class by the innermost folder
    (problem,) = [text for text in problems(options) if text.startswith('val_dataloader')]
    assert problem.endswith(
        'classes in only one of it and the training data: dark.'
    )  # timm names a class by the innermost folder
    options['val_dataloader.dataset.root'] = str(copy)
    (copy / 'train' / 'violet').rename(copy / 'train' / 'red' / 'violet')
    shutil.copytree(copy / 'train' / 'red' / 'violet', copy / 'test' / 'violet')
    assert problems({**options, 'model.backbone.num_classes': 4}) == []  # one of them below another
    shutil.copy(copy / 'train' / 'red' / '0.png', copy / 'train')
    assert 'has images outside of class folders' in problems(options)[0]


def random_numbers():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_nothing_is_read_downloaded_or_drawn(tiny, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError('used')

    teacher = {'name': 'test_convnext', 'checkpoint': __file__}
    cfg = load_config(CONFIG, {**tiny, 'model.backbone.pretrained': True, 'model.teacher': teacher})
    monkeypatch.setattr(Image, 'open', forbidden)
    monkeypatch.setattr(timm.models._builder, 'load_pretrained', forbidden)
    text, before = cfg.pretty_text, random_numbers()
    validate(cfg)
    assert random_numbers() == before
    assert cfg.pretty_text == text


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a config on top of the digits', and modules that it can import."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text, name='mine.py'):
        path = tmp_path / name
        base = f'_base_ = [{str(find_config(CONFIG))!r}]\n' if name == 'mine.py' else ''
        path.write_text(base + text)
        return path

    return write


def problems_of(path):
    try:
        validate(load_config(path), data=False)
    except ConfigError as error:
        return sorted(error.problems)
    return []


def test_keys_of_the_top_level_that_nothing_reads_are_named(write):
    path = write('optim_wraper = dict(clip_grad=None)\nlr_config = dict(policy="step")\nimage_width = 333\n')
    assert problems_of(path) == [
        'image_width: nothing reads it.',
        'lr_config: nothing reads it.',
        'optim_wraper: nothing reads it. Did you mean optim_wrapper?',
    ]


def test_variables_of_a_config_are_no_problem_nor_are_they_in_its_dump(write, tmp_path):
    path = write(
        'epochs = 7\nsmooth = dict(label_smoothing=0.2)\n'
        'model = dict(loss=smooth)\ntrain_cfg = dict(max_epochs=epochs)\n'
    )
    assert problems_of(path) == []
    load_config(path).dump(tmp_path / 'dumped.py')
    assert problems_of(tmp_path / 'dumped.py') == []


MODULE = """
import timm
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class MineOfValidation(Hook):
    def __init__(self, often):
        self.often = often

    def before_run(self, runner):
        print(runner.cfg.settings_of_mine)

class Mine(timm.models.VisionTransformer):
    def __init__(self, num_classes=10, width=64):
        super().__init__(img_size=32, patch_size=8, embed_dim=width, depth=1, num_heads=2, num_classes=num_classes)

@timm.models.register_model
def mine_of_validation(pretrained=False, cache_dir=None, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs):
    return Mine(**kwargs)
"""


def test_what_custom_imports_register_is_known_and_checked(write):
    write(MODULE, 'module_of_validation.py')
    text = """
custom_imports = dict(imports=['module_of_validation'])
settings_of_mine = 3
model = dict(backbone=dict(_delete_=True, name='mine_of_validation', {width}=32))
custom_hooks = [dict(type='MineOfValidation', {often}=2)]
"""
    assert problems_of(write(text.format(width='width', often='often'))) == []
    assert problems_of(write(text.format(width='widht', often='oftn'))) == [
        'custom_hooks.0.oftn: MineOfValidation does not take it. Did you mean often?',
        'custom_hooks.0: MineOfValidation needs often too.',
        'model.backbone.widht: mine_of_validation does not take it. Did you mean width?',
    ]
    with pytest.raises(ConfigError, match='no_such_module'):
        load_config(write('custom_imports = dict(imports=["no_such_module"])\n'))


CLASSIFIER = {'type': 'ImageClassifier', 'backbone': 3, 'loss': 3, 'mixup': 3, 'teacher': 3, 'random_erasing': True}
DATASET = {'type': 'LabelledImages', 'root': 3, 'split': 3, 'transform': 3}
OPTIMIZER = {'optimizer': {'type': 'AdamW', 'lr': 'high'}, 'accumulative_counts': 'x'}
HOOKS_OF_NONE = {'default_hooks': {'a': 1}, 'custom_hooks': [2, {}, {'type': 3}]}


@pytest.mark.parametrize(
    ('config', 'count'),
    [
        ({}, 1),
        (dict.fromkeys(sorted(READ - {'work_dir'}), 3), 20),
        ({key: {'type': 3} for key in sorted(READ - {'custom_imports'})}, 15),
        ({'model': CLASSIFIER}, 5),
        ({'train_dataloader': {'dataset': DATASET, 'sampler': {'type': 4}, 'batch_size': 'x'}}, 6),
        ({'optim_wrapper': OPTIMIZER, **HOOKS_OF_NONE}, 6),
        ({'train_cfg': {'max_epochs': 'x'}, 'param_scheduler': [{'type': 'TimmLR', 'sched': 'cos'}, 'x']}, 2),
    ],
    ids=['empty', 'numbers', 'no types', 'model', 'data', 'optimizer', 'schedule'],
)
def test_nonsense_is_told_as_such(config, count):
    with pytest.raises(ConfigError) as error:
        validate(Config(config))
    assert len(error.value.problems) >= count, error.value


def test_shards_are_looked_for_and_counted(problems, tmp_path):
    dataset = {f'train_dataloader.dataset.{key}': value for key, value in (('reader', 'wds/'), ('root', str(tmp_path)))}
    (problem,) = problems(dataset)
    assert problem.startswith('train_dataloader.dataset: ')
    assert "no subfolder 'train'" in problem
    (tmp_path / '0.tar').touch()
    split = {'name': 'train', 'num_samples': 6, 'filenames': ['0.tar'], 'shard_lengths': [6]}
    (tmp_path / '_info.json').write_text(json.dumps({'splits': {'train': split}}))
    (problem,) = problems(dataset)
    assert '6 training images on 1 process(es)' in problem
    assert problems({**dataset, 'train_dataloader.batch_size': 3}) == []
    (problem,) = problems({'train_dataloader.dataset.reader': 'tfds/images'})
    assert "'tfds/images' only streams" in problem


def takes(a, b=2, *, c=3):
    pass


def passes_on(d, **kwargs):
    return takes(1, c=kwargs.pop('c_of_mine', 3), **kwargs)


class Above:
    def __init__(self, e, f=1):
        pass


class Below(Above):
    def __init__(self, g, **kwargs):
        super().__init__(g, **kwargs)


class Stores:
    def __init__(self, **kwargs):
        self.kwargs = kwargs


class SpreadsInADict:
    def __init__(self, **kwargs):
        takes(**{'b': 3, **kwargs})


def test_arguments_that_are_passed_on_are_followed_to_where_they_are_taken():
    assert arguments_of(takes).names == ('a', 'b', 'c')
    assert arguments_of(takes).required == {'a'}
    assert set(arguments_of(passes_on).names) == {'d', 'b', 'c_of_mine'}
    assert set(arguments_of(Below).names) == {'g', 'f'}
    assert arguments_of(Below).required == {'g'}
    assert not arguments_of(passes_on).is_open
    assert arguments_of(Stores).is_open
    assert arguments_of(SpreadsInADict).is_open
    assert arguments_of(print).is_open is False
    assert arguments_of(PARAM_SCHEDULERS.get('CosineAnnealingLR')).names[:3] == ('optimizer', 'T_max', 'eta_min')
    assert 'auto_augment' in arguments_of(TRANSFORMS.get('timm_transform')).names
    assert 'normalize' not in arguments_of(TRANSFORMS.get('timm_transform')).names
    assert arguments_of(LOOPS.get('TrainLoop')).required == {'runner', 'dataloader'}
    assert arguments_of(HOOKS.get('CheckpointHook')).is_open
    assert 'backbone' in arguments_of(MODELS.get('ImageClassifier')).required
