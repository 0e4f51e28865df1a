"""Faults that the field has made, planted one by one, and healthy runs, at which preflight must be silent."""

import contextlib
import copy
import io
import json
import os
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from timm.models import register_model
from torch import nn
from torch.nn import functional as F

from zoo.train import checkpoints
from zoo.train.config import config_names, load_config
from zoo.train.data import LabelledImages, build_transform
from zoo.train.ema import EMA
from zoo.train.optim import AutocastOptimWrapper, OptimWrapper, TimmParamGroups, param_groups
from zoo.train.preflight import Finding, PreflightError, Report, check_names, preflight
from zoo.train.registry import (
    DATA_SAMPLERS,
    DATASETS,
    FUNCTIONS,
    HOOKS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
)
from zoo.train.run import train
from zoo.train.samplers import ShuffledStream
from zoo.train.tasks import ImageClassifier

CONFIG = 'quickstart/biformer_digits'
CLASSES = ('ape', 'bee', 'cat')
HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}  # the test models'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An image folder of noise in a colour for each class: 24 training and 8 validation images of each."""
    root = tmp_path_factory.mktemp('noise')
    rng = np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 8)):
        for channel, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 128, (40, 36, 3))
                pixels[..., channel] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f'{split}{number}.png')
    return root


@pytest.fixture
def healthy(folder):
    """Options that make the digits' config a tiny run with nothing wrong."""

    def dataset(split, *steps):
        transform = [*steps, {'type': 'PILToTensor'}]
        return {'type': 'LabelledImages', 'root': str(folder), 'split': split, 'transform': transform, '_delete_': True}

    return {
        'model.backbone': {'name': 'test_resnet', 'num_classes': 3, 'drop_path_rate': 0.2, '_delete_': True},
        'train_cfg.max_epochs': 4,
        'custom_hooks': [],
        'val_evaluator.k': (1, 2),
        'train_dataloader.batch_size': 8,
        'train_dataloader.dataset': dataset(
            'train', {'type': 'RandomResizedCrop', 'size': 32}, {'type': 'RandomHorizontalFlip'}
        ),
        'val_dataloader.dataset': dataset('val', {'type': 'Resize', 'size': 32}, {'type': 'CenterCrop', 'size': 32}),
    }


def look(options, **arguments):
    return preflight(load_config(CONFIG, copy.deepcopy(options)), **arguments)


def problems(report):
    return {finding.name for finding in report.problems}


# What a broken run registers


@register_model
def resnet_without_drop_path(pretrained=False, drop_path_rate=0.0, **kwargs):
    return timm.create_model('test_resnet', pretrained=pretrained, **kwargs)


@DATASETS.register_module()
class OffByOne(LabelledImages):
    def __getitem__(self, draw):
        image, label = super().__getitem__(draw)
        return image, (label + 1) % 3


@DATASETS.register_module()
class CountsFromOne(LabelledImages):
    def __getitem__(self, draw):
        image, label = super().__getitem__(draw)
        return image, label + 1


@DATASETS.register_module()
class ReversedClasses(LabelledImages):
    @property
    def metainfo(self):
        return {'classes': super().metainfo['classes'][::-1]}

    def __getitem__(self, draw):
        image, label = super().__getitem__(draw)
        return image, 2 - label


@DATASETS.register_module()
class BlueFirst(LabelledImages):
    def read(self, index):
        image, label = super().read(index)
        return Image.merge('RGB', image.split()[::-1]), label


@DATASETS.register_module()
class ConstantSeed(LabelledImages):
    def __getitem__(self, draw):
        return super().__getitem__((draw[0], (0, 0)))


@DATA_SAMPLERS.register_module()
class InOrder(ShuffledStream):
    def __iter__(self):
        for draw, (_, key) in enumerate(super().__iter__()):
            yield draw % self.size, key


@MODELS.register_module()
class MixesInEvaluation(ImageClassifier):
    def predict(self, images):
        mixed = images.flip(0) * 0.3 + images * 0.7
        return super().predict(mixed)


@MODELS.register_module()
class MixesNothing(ImageClassifier):
    def augment(self, images, labels):
        return images, labels


@MODELS.register_module()
class Freezes(ImageClassifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.backbone.layer1.requires_grad_(False)


@MODELS.register_module()
class ForgetsWeights(ImageClassifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.backbone.layer2.apply(lambda m: hasattr(m, 'reset_parameters') and m.reset_parameters())


@MODELS.register_module()
class HasMore(ImageClassifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.backbone.auxiliary = nn.Linear(3, 3)


@MODELS.register_module()
class SumsTheLoss(ImageClassifier):
    def loss(self, images, labels):
        return {'loss': super().loss(images, labels)['loss'] * len(images)}


@MODELS.register_module()
class TrainsTheTeacher(ImageClassifier):
    def loss(self, images, labels):
        for module in self.teacher.modules():
            module.training = True
        return super().loss(images, labels)


@FUNCTIONS.register_module()
def smoothed_by_itself(logits, targets):
    return F.cross_entropy(logits, targets, label_smoothing=0.1)


@HOOKS.register_module()
class LeavesInEval(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        runner.model.backbone.layer3.eval()


@HOOKS.register_module()
class ValidatesInTrain(Hook):
    def before_val_iter(self, runner, batch_idx, data_batch=None):
        runner.model.train()


@HOOKS.register_module()
class NeverAverages(EMA):
    def update(self, module, step):
        pass


@OPTIM_WRAPPERS.register_module()
class NeverDivides(OptimWrapper):
    def scale_loss(self, loss):
        return loss


@OPTIM_WRAPPERS.register_module()
class NeverCasts(AutocastOptimWrapper):
    @contextlib.contextmanager
    def optim_context(self, model):
        yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OfAnotherModel(TimmParamGroups):
    def __call__(self, model):
        return super().__call__(copy.deepcopy(model))


class Regrouped(TimmParamGroups):
    def __call__(self, model):
        groups = param_groups(model.backbone, self.optimizer['lr'], self.optimizer['weight_decay'], **self.arguments)
        self.change(groups)
        optimizer = OPTIMIZERS.build({**self.optimizer, 'params': groups})
        return OPTIM_WRAPPERS.build({'type': 'OptimWrapper', **self.wrapper, 'optimizer': optimizer})


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class NeverDecays(Regrouped):
    def change(self, groups):
        for group in groups:
            group['weight_decay'] = 0.0


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ReversesLayers(Regrouped):
    def change(self, groups):
        rates = [group['lr'] for group in groups]
        low, high = min(rates), max(rates)
        for group in groups:
            group['lr'] = low * high / group['lr']


FAULTS = {
    # Optimization
    'a learning rate not scaled with the batch': ('learning_rate', {'recipe': {'lr': 4e-3, 'total_batch': 8}}),
    'another batch than the recipe': ('effective_batch', {'recipe': {'total_batch': 64}}),
    'a missing warm-up': (
        'learning_rate',
        {
            'recipe': {'lr': 5e-4, 'warmup_lr': 1e-6, 'min_lr': 1e-6},
            'param_scheduler': {'type': 'TimmLR', 'convert_to_iter_based': True, 'min_lr': 1e-6, '_delete_': True},
        },
    ),
    'a warm-up longer than the run': ('learning_rate', {'param_scheduler.warmup': 40}),
    'a scheduler stepped twice': ('scheduler_steps', {'custom_hooks': [{'type': 'ParamSchedulerHook'}]}),
    'a scheduler never stepped': ('scheduler_steps', {'default_hooks.param_scheduler': None}),
    'fewer epochs than the recipe': ('run_length', {'recipe': {'epochs': 310}}),
    'decay on biases': ('weight_decay', {'optim_wrapper.constructor': 'DefaultOptimWrapperConstructor'}),
    'no decay anywhere': ('weight_decay', {'optim_wrapper.constructor': 'NeverDecays'}),
    'layer decay reversed': (
        'layer_decay',
        {'optim_wrapper.constructor': 'ReversesLayers', 'optim_wrapper.paramwise_cfg': {'layer_decay': 0.5}},
    ),
    "an optimizer of another model's parameters": (
        'parameter_groups',
        {'optim_wrapper.constructor': 'OfAnotherModel'},
    ),
    'clipping that kills the gradient': ('gradient_clipping', {'optim_wrapper.clip_grad.max_norm': 1e-4}),
    'accumulation that never divides': (
        'accumulation',
        {'optim_wrapper.type': 'NeverDivides', 'optim_wrapper.accumulative_counts': 2},
    ),
    'a loss summed over the batch': ('accumulation', {'model.type': 'SumsTheLoss'}),
    'unused parameters': ('unused_parameters', {'model.type': 'HasMore'}),
    'a frozen backbone': ('frozen_parameters', {'model.type': 'Freezes'}),
    # The model
    'a drop path that never reaches the model': (
        'drop_path',
        {'model.backbone.name': 'resnet_without_drop_path'},
    ),
    'wrong mean and std': ('normalization', {'model.mean': (0.3, 0.3, 0.3), 'model.std': (0.5, 0.5, 0.5)}),
    'pretrained weights loaded in part': (
        'weights_loaded',
        {'model.type': 'ForgetsWeights', 'model.backbone.checkpoint': 'weights.safetensors'},
    ),
    'autocast that is not active': ('precision', {'optim_wrapper.type': 'NeverCasts'}),
    'an average never updated': ('ema', {'custom_hooks': [{'type': 'NeverAverages', 'decay': 0.9}]}),
    'an average of decay 0': ('ema', {'custom_hooks': [{'type': 'EMA', 'decay': 0.0}]}),
    'an average longer than the run': ('ema', {'custom_hooks': [{'type': 'EMA', 'decay': 0.9999}]}),
    'BatchNorm left in eval mode': ('training_mode', {'custom_hooks': [{'type': 'LeavesInEval'}]}),
    'dropout active in evaluation': ('evaluation_mode', {'custom_hooks': [{'type': 'ValidatesInTrain'}]}),
    'mixup left on in evaluation': ('evaluation_alone', {'model.type': 'MixesInEvaluation'}),
    'mixup that is never called': ('mixup', {'model.type': 'MixesNothing', 'model.mixup': {'mixup_alpha': 0.8}}),
    'label smoothing applied twice': (
        'label_smoothing',
        {
            'model.loss': {'type': 'smoothed_by_itself', '_delete_': True},
            'model.mixup': {'mixup_alpha': 0.8, 'label_smoothing': 0.1},
        },
    ),
    'a teacher in train mode': (
        'teacher',
        {'model.type': 'TrainsTheTeacher', 'model.teacher': {'name': 'test_resnet', 'pretrained': False}},
    ),
    # The data
    'labels off by one': ('labels', {'train_dataloader.dataset.type': 'OffByOne'}),
    'labels that count from 1': ('labels', {'train_dataloader.dataset.type': 'CountsFromOne'}),
    'another order of classes in validation': ('classes', {'val_dataloader.dataset.type': 'ReversedClasses'}),
    'a head of the wrong class count': ('classes', {'model.backbone.num_classes': 4}),
    'red and blue swapped': ('channel_order', {'train_dataloader.dataset.type': 'BlueFirst'}),
    'red and blue swapped in validation': ('channel_order', {'val_dataloader.dataset.type': 'BlueFirst'}),
    'unshuffled training data': ('order', {'train_dataloader.sampler.type': 'InOrder'}),
    'one augmentation for all': ('augmentation', {'train_dataloader.dataset.type': 'ConstantSeed'}),
    'validation on training images': ('overlap', {'val_dataloader.dataset.split': 'train'}),
    "a test crop that isn't the recipe's": ('test_crop', {'recipe': {'crop_pct': 0.875}}),
    "a size that isn't the recipe's": ('image_size', {'recipe': {'image_size': 64}}),
}


def planted(options, fault):
    """Options of a run with the fault; of nested ones that are replaced whole, the parts."""
    merged = copy.deepcopy(options)
    for key, value in fault.items():
        owner = next((known for known in options if key.startswith(f'{known}.')), None)
        if owner is None:
            merged[key] = value
        else:
            merged[owner][key.removeprefix(f'{owner}.')] = value
    return merged


@pytest.mark.parametrize('fault', FAULTS)
def test_a_planted_fault_is_found_by_its_name(healthy, fault, tmp_path, monkeypatch):
    name, options = FAULTS[fault]
    if name == 'weights_loaded':
        weights = timm.create_model('test_resnet', num_classes=3).state_dict()
        monkeypatch.chdir(tmp_path)
        save_file(weights, 'weights.safetensors')
    if name == 'teacher':
        options['model.teacher']['num_classes'] = 3
    depth = 'full' if fault == 'a loss summed over the batch' else 'quick'  # nothing is accumulated there
    report = look(planted(healthy, options), depth=depth, silence=['overfit'])
    assert name in problems(report), [(each.name, each.found) for each in report.problems]


@pytest.mark.parametrize('value', ['twice', 'as 0..1'])
def test_pixels_of_the_wrong_range_are_found(healthy, value):
    """Two faults of a transform: it normalizes, which the task does again; or it scales to 0..1, the task's 0..255."""
    steps = [{'type': 'ToDtype', 'dtype': torch.float32, 'scale': True}]
    if value == 'twice':
        steps += [{'type': 'Normalize', **HALF}]
    cfg = load_config(CONFIG, copy.deepcopy(healthy))
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.transform += steps
    report = preflight(cfg)
    assert 'normalization' in problems(report)


VARIANTS = {
    'plain': {},
    'mixup, average, bfloat16': {
        'model.mixup': {'mixup_alpha': 0.8, 'cutmix_alpha': 1.0},
        'custom_hooks': [{'type': 'EMA', 'decay': 0.9}],
        'optim_wrapper.type': 'AutocastOptimWrapper',
    },
    'layer decay, accumulation, crop': {
        'optim_wrapper.paramwise_cfg': {'layer_decay': 0.7},
        'optim_wrapper.accumulative_counts': 2,
        'recipe': {'total_batch': 16, 'lr': 5e-4, 'image_size': 32, 'crop_pct': 1.0, **HALF},
    },
    "mmengine's average, timm's schedule": {
        'custom_hooks': [{'type': 'EMAHook', 'momentum': 0.1}],
        'param_scheduler': {
            'type': 'TimmLR',
            'convert_to_iter_based': True,
            'warmup_epochs': 1,
            'warmup_lr': 1e-6,
            '_delete_': True,
        },
        'optim_wrapper.optimizer': {'type': 'timm/lamb', 'lr': 1e-3, 'weight_decay': 0.02, '_delete_': True},
    },
}


def assert_healthy(report):
    assert [(each.name, each.found) for each in report.problems] == []
    assert {name: reason for name, reason in report.not_checked.items() if 'failed' in reason} == {}
    assert len(report.findings) >= 28


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_healthy_run_raises_no_alarm(healthy, variant):
    assert_healthy(look(planted(healthy, VARIANTS[variant]), depth='full'))


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('seed', range(1, 20))
def test_healthy_runs_of_other_seeds_raise_no_alarm(healthy, variant, seed):
    assert_healthy(look(planted(healthy, {**VARIANTS[variant], 'randomness.seed': seed}), depth='full'))


class ImageNetReader:
    """In the place of timm's reader: as many images as ImageNet, all from eight that are in memory."""

    def __init__(self, split, classes):
        count = {'train': 1_281_167, 'val': 50_000}[split]
        self.class_to_idx = {f'n{label:08}': label for label in range(classes)}
        self.classes = list(self.class_to_idx)
        samples = [(f'{name}/{split}.JPEG', label) for name, label in self.class_to_idx.items()]
        self.samples = (samples * (count // classes + 1))[:count]
        rng = np.random.default_rng(split == 'val')
        self.files = []
        for _ in range(8):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((160, 120)).save(file, 'JPEG')
            self.files.append(file.getvalue())

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return io.BytesIO(self.files[index % 8]), self.samples[index][1]

    def filename(self, index, *_, **__):
        return self.samples[index][0]


@DATASETS.register_module()
class FakeImageNet(LabelledImages):
    """The images of a reader in memory, through the transforms of the config."""

    def __init__(self, split, transform, classes=1000, **kwargs):
        self.reader = ImageNetReader(split, classes)
        self.transform = build_transform(transform)
        self.image_mode, self.on_error = 'RGB', 'raise'


RECIPES = [name for name in config_names() if name.startswith('imagenet/')]


def fake_imagenet(name, tmp_path):
    """A shipped config on made images, and the number of processes that need no accumulation.

    Its backbone has one block a stage where the variant's other arguments allow that, as most of the time is the
    model's. Weights that it begins from are random ones, from a file.
    """
    cfg = load_config(name)
    backbone = cfg.model.backbone
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.update(
            type='FakeImageNet',
            classes=backbone.get('num_classes', 1000),
            split=loader.dataset.split.replace('test', 'val'),
        )
    begins_from_weights = backbone.pop('checkpoint', None) or backbone.pop('pretrained', False)
    arguments = {key: value for key, value in backbone.items() if key != 'name'}
    try:
        timm.create_model(backbone.name, **arguments, depths=(1, 1, 1, 1), device='meta')
    except (TypeError, ValueError, IndexError, AssertionError):
        pass
    else:
        backbone.depths = (1, 1, 1, 1)
        arguments['depths'] = (1, 1, 1, 1)
    if begins_from_weights:
        backbone.name = backbone.name.split('.')[0]
        backbone.checkpoint = str(tmp_path / 'weights.safetensors')
        save_file(timm.create_model(backbone.name, **arguments).state_dict(), backbone.checkpoint)
    return cfg, cfg.total_batch // cfg.train_dataloader.batch_size


@pytest.mark.slow
@pytest.mark.parametrize('name', RECIPES)
def test_a_shipped_recipe_raises_no_alarm(name, tmp_path):
    """At its own size; the model sees two images of each batch."""
    cfg, processes = fake_imagenet(name, tmp_path)
    assert_healthy(preflight(cfg, world_size=processes, images=2, seconds=600))


@pytest.mark.slow
def test_the_quickstart_raises_no_alarm(tmp_path):
    assert_healthy(look({'train_dataloader.dataset.root': str(tmp_path / 'digits')}, depth='full', seconds=300))


def test_a_preflight_leaves_no_trace(healthy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(CONFIG, planted(healthy, VARIANTS['mixup, average, bfloat16']))
    text = cfg.pretty_text
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    variables, instances = dict(os.environ), set(MessageHub._instance_dict)
    preflight(cfg, depth='full')
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert (variables, instances) == (dict(os.environ), set(MessageHub._instance_dict))
    assert cfg.pretty_text == text
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_the_same_with_and_without_a_preflight(healthy, tmp_path):
    options = planted(healthy, {**VARIANTS['mixup, average, bfloat16'], 'train_cfg.max_epochs': 1})
    runs = [train(CONFIG, tmp_path / str(with_it), cfg_options=options, preflight=with_it) for with_it in (True, False)]
    first, second = (checkpoints.load(run.checkpoint)['state_dict'] for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert json.loads((tmp_path / 'True' / 'preflight.json').read_text())['passed']
    assert not (tmp_path / 'False' / 'preflight.json').exists()


def test_strictness_makes_warnings_errors_and_silence_leaves_checks_out(healthy):
    options = planted(healthy, {'recipe': {'epochs': 310}})
    report = look(options)
    assert problems(report) == {'run_length'}
    assert report.passed
    report.require()
    strict = look(options, strict=True)
    assert [each.level for each in strict.problems] == ['error']
    with pytest.raises(PreflightError, match=r'run_length: 4 epochs.*max_epochs=310'):
        strict.require()
    silenced = look({**options, 'preflight': {'strict': True, 'silence': ['run_length']}})
    assert silenced.problems == []
    assert silenced.not_checked['run_length'] == 'silenced'
    with pytest.raises(ValueError, match=r'named run_lenght. Checks: .*run_length'):
        look(options, silence=['run_lenght'])
    with pytest.raises(ValueError, match="quick, full, got 'deep'"):
        look(options, depth='deep')


def test_a_run_that_can_not_start_is_an_error(healthy):
    report = look(planted(healthy, {'model.backbone.windows': 3}))
    assert not report.passed
    assert [each.name for each in report.problems] == ['rehearsal']
    assert 'windows' in report.problems[0].found
    assert report.not_checked['drop_path'] == 'the run does not start'


def test_processes_that_do_not_divide_the_batch_are_an_error(healthy):
    report = look({**healthy, 'total_batch': 16}, world_size=3)
    assert [(each.name, each.level) for each in report.findings] == [('rehearsal', 'error')]
    assert '3 processes do not divide total_batch=16' in report.problems[0].found


def test_more_processes_make_a_greater_batch_and_shorter_epochs(healthy):
    report = look(healthy, world_size=3)
    found = {each.name: each.found for each in report.findings}
    assert found['effective_batch'] == '3 processes x 8 images x 1 batches = 24'
    assert found['run_length'].startswith('4 epochs x 3 iterations')


def test_a_report_reads_as_a_table_and_as_json():
    findings = [Finding('drop_path', 'ok', '0.1', '0.1'), Finding('ema', 'warning', '0.9', '[0]', 'Because.')]
    report = Report('a run', 'quick', findings, {'teacher': 'there is no teacher'}, 1.25)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.render())
    text = console.export_text()
    for part in (
        'drop_path',
        '[0]',
        'Because.',
        'teacher (there is no teacher)',
        '2 checks in 1.2 s, 1 ok',
    ):
        assert part in text
    console.print(report.render(only_problems=True))
    assert 'drop_path' not in console.export_text()
    loaded = json.loads(report.to_json())
    assert loaded['passed'] is True
    assert loaded['findings'][1] == {
        'name': 'ema',
        'level': 'warning',
        'expected': '0.9',
        'found': '[0]',
        'cause': 'Because.',
    }


def test_the_documentation_names_every_check():
    text = (Path(__file__).parents[2] / 'docs' / 'preflight.md').read_text()
    assert [name for name in check_names() if f'`{name}`' not in text] == []


def worker(rank, port, folder, options):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')
    report = look(options)
    torch.distributed.barrier()
    (folder / f'{rank}.json').write_text(report.to_json())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='needs gloo')
def test_two_processes_have_the_report_of_the_first(healthy, tmp_path):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.start_processes(worker, (port, tmp_path, healthy), nprocs=2, start_method='spawn')
    first, second = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2))
    assert first == second
    assert [each['name'] for each in first['findings'] if each['level'] != 'ok'] == []
    found = {each['name']: each['found'] for each in first['findings']}
    assert found['effective_batch'] == '2 processes x 8 images x 1 batches = 16'
