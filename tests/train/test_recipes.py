"""The shipped ImageNet recipes build what their sources state.

FAMILIES and VARIANTS are transcribed from the sources, not from the configs; see docs/recipes.md for the sources.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from zoo.train import checkpoints
from zoo.train.augmentation import keep_no_bits
from zoo.train.batches import effective_batch, fit
from zoo.train.config import find_config, load_config
from zoo.train.data import build_transform
from zoo.train.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS
from zoo.train.run import train
from zoo.train.samplers import ShuffledStream
from zoo.train.seeding import seed_everything

IMAGES = 1281167  # of ImageNet-1k's training set
GPUS = 8
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

# What DeiT's script and most of these have.
DEIT = {
    'batch': 1024,
    'lr': 1e-3,
    'warmup': (5, 1e-6),  # epochs, first rate
    'min_lr': 1e-5,
    'cosine': 300,  # epochs
    'cooldown': 0,
    'by': 'epoch',
    'decay': 0.05,
    'exempt': (),  # parts of names, beyond vectors and biases
    'smoothing': 0.1,
    'mix': (0.8, 1.0, 0.5, 1.0),  # mixup, CutMix, switch, probability
    'augment': (2, 9, 0.5),  # RandAugment's operations, magnitude and its deviation
    'erase': (0.25, 'pixel', 1),
    'repeats': 1,
    'ema': None,
    'evaluates': 'raw',
    'clip': {},
    'precision': 'float32',
    'size': 224,
    'interpolation': 'bicubic',
    'resize': (256, 'short'),  # of a test image before the crop
    'normalize': IMAGENET,
    'classifier': None,
    'classes': 1000,
}
BIFORMER = {**DEIT, 'repeats': 3, 'ema': 0.99996, 'precision': 'float16'}
VAN = {
    **DEIT,
    'min_lr': 1e-6,
    'cooldown': 10,
    'interpolation': 'random',
    'resize': (248, 'short'),  # floor(224 / 0.9)
    'normalize': HALF,
}
VAN_22K = {**DEIT, 'batch': 8192, 'lr': 4e-3, 'min_lr': 1e-6, 'cosine': 90, 'classes': 21841, 'drop_path': 0.1}
VAN_FT = {
    **DEIT,
    'batch': 512,
    'lr': 5e-5,
    'warmup': None,
    'min_lr': 1e-6,
    'cosine': 30,
    'decay': 1e-8,
    'mix': None,
    'classifier': 0.001,
}
VAN_FT_384 = {**VAN_FT, 'size': 384, 'resize': (384, 'squash')}
NAT = {
    **DEIT,
    'warmup': (20, 1e-6),
    'min_lr': 5e-6,
    'cooldown': 10,
    'by': 'step',
    'clip': {'max_norm': 5.0},
    'precision': 'float16',
    'interpolation': 'random',
}
NAT_FT = {
    **NAT,
    'batch': 512,
    'lr': 5e-5,
    'warmup': None,
    'min_lr': 5e-5,
    'cosine': 30,
    'cooldown': 0,
    'decay': 1e-4,
    'mix': None,
    'precision': 'float32',
    'drop_path': 0.35,
}
NAT_FT_384 = {**NAT_FT, 'size': 384, 'resize': (384, 'short')}
CROSSFORMER = {**DEIT, 'warmup': (20, 1e-6), 'by': 'step', 'clip': {'max_norm': 5.0}, 'precision': 'float16'}
TRANSNEXT = {
    **DEIT,
    'repeats': 3,
    'clip': {'max_norm': 1.0},
    'precision': 'float16',
    'exempt': ('query_embedding', 'relative_pos_bias_local', 'cpb', 'temperature'),
}
TRANSNEXT_FT = {
    **TRANSNEXT,
    'lr': 1e-5,
    'warmup': None,
    'min_lr': 1e-5,
    'cosine': 5,
    'mix': (0.8, 0.0, 0.5, 1.0),
    'size': 384,
    'resize': (384, 'squash'),
}
SHVIT = {
    **DEIT,
    'batch': 2048,
    'lr': 4e-3,
    'repeats': 3,
    'ema': 0.99996,
    'clip': {'type': 'agc', 'clip_factor': 0.02},
    'drop_path': 0,
}
MAXVIT = {
    **DEIT,
    'batch': 4096,
    'lr': 3e-3,
    'warmup': (10_000 / (IMAGES // 4096), 0.0),
    'by': 'step',
    'exempt': ('relative_position_bias_table',),
    'mix': (0.8, 0.0, 0.5, 1.0),
    'augment': (2, 15, 0.0),
    'erase': None,
    'ema': 0.9999,
    'evaluates': 'average',
    'clip': {'max_norm': 1.0},
    'precision': 'bfloat16',
}
MAXVIT_FT = {
    **MAXVIT,
    'batch': 512,
    'lr': 5e-5,
    'warmup': None,
    'min_lr': 5e-5,
    'cosine': 30,
    'decay': 1e-8,
    'drop_path': 0.2,
    'classifier': 'new',
}

# folder, family, and the rows: name -> top-1, then what differs.
ROWS = [
    (
        'biformer',
        BIFORMER,
        {
            'biformer_tiny': (81.4, {'drop_path': 0.1}),
            'biformer_small': (83.8, {'drop_path': 0.15}),
            'biformer_base': (84.3, {'drop_path': None}),  # not stated
            'biformer_stl': (82.7, {'drop_path': None}),
            'biformer_stl_nchw': (82.7, {'drop_path': None}),
        },
    ),
    (
        'van',
        VAN,
        {
            'van_b0': (75.4, {'drop_path': 0.1}),
            'van_b1': (81.1, {'drop_path': 0.1}),
            'van_b2': (82.8, {'drop_path': 0.1}),
            'van_b3': (83.9, {'drop_path': 0.2}),
        },
    ),
    ('van', VAN_22K, {f'van_b{i}_in22k': (None, {}) for i in (4, 5, 6)}),
    (
        'van',
        VAN_FT,
        {f'van_b{i}_in22k_ft_224': (None, {'drop_path': rate}) for i, rate in ((4, 0.2), (5, 0.2), (6, 0.3))},
    ),
    (
        'van',
        VAN_FT_384,
        {f'van_b{i}_in22k_ft_384': (None, {'drop_path': rate}) for i, rate in ((4, 0.2), (5, 0.2), (6, 0.3))},
    ),
    (
        'nat',
        NAT,
        {
            'nat_mini': (81.8, {'drop_path': 0.2}),
            'nat_tiny': (83.2, {'drop_path': 0.2}),
            'nat_small': (83.7, {'drop_path': 0.3}),
            'nat_base': (84.3, {'drop_path': 0.5}),
        },
    ),
    (
        'dinat',
        NAT,
        {
            'dinat_mini': (81.8, {'drop_path': 0.2}),
            'dinat_tiny': (82.7, {'drop_path': 0.2}),
            'dinat_small': (83.8, {'drop_path': 0.3}),
            'dinat_base': (84.4, {'drop_path': 0.5}),
        },
    ),
    ('dinat', NAT_FT, {'dinat_large_ft_224': (86.6, {})}),
    ('dinat', NAT_FT_384, {'dinat_large_ft_384': (87.4, {'decay': 1e-10})}),
    (
        'dinat_s',
        NAT,
        {
            'dinat_s_tiny': (81.8, {'drop_path': 0.2}),
            'dinat_s_small': (83.5, {'drop_path': 0.3}),
            'dinat_s_base': (83.8, {'drop_path': 0.5}),
        },
    ),
    ('dinat_s', NAT_FT, {'dinat_s_large_ft_224': (86.5, {})}),
    ('dinat_s', NAT_FT_384, {'dinat_s_large_ft_384': (87.4, {'decay': 1e-5})}),
    (
        'crossformer',
        CROSSFORMER,
        {
            'crossformer_tiny': (81.5, {'drop_path': 0.1}),
            'crossformer_small': (82.5, {'drop_path': 0.2}),
            'crossformer_base': (83.4, {'drop_path': 0.3}),
            'crossformer_large': (84.0, {'drop_path': 0.5}),
            'crossformer_pp_small': (83.2, {'drop_path': 0.2}),
            'crossformer_pp_base': (84.2, {'drop_path': 0.3}),
            'crossformer_pp_large': (84.7, {'drop_path': 0.5}),
            'crossformer_pp_huge': (84.9, {'drop_path': 0.5}),
        },
    ),
    (
        'transnext',
        TRANSNEXT,
        {
            'transnext_micro': (82.5, {'drop_path': 0.15}),
            'transnext_tiny': (84.0, {'drop_path': 0.25}),
            'transnext_small': (84.7, {'drop_path': 0.45}),
            'transnext_base': (84.8, {'drop_path': 0.6}),
            'transnext_micro_aaaa': (82.6, {'drop_path': 0.15, 'size': 256, 'resize': (292, 'short')}),
        },
    ),
    (
        'transnext',
        TRANSNEXT_FT,
        {
            'transnext_small_ft_384': (86.0, {'drop_path': 0.7}),
            'transnext_base_ft_384': (86.2, {'drop_path': 0.8}),
        },
    ),
    (
        'shvit',
        SHVIT,
        {
            'shvit_s1': (72.8, {'decay': 0.025}),
            'shvit_s2': (75.2, {'decay': 0.032}),
            'shvit_s3': (77.4, {'decay': 0.035}),
            'shvit_s4': (79.4, {'decay': 0.03, 'size': 256, 'resize': (292, 'short')}),
        },
    ),
    (
        'maxvit',
        MAXVIT,
        {
            'maxvit_tiny': (83.62, {'drop_path': 0.2}),
            'maxvit_small': (84.45, {'drop_path': 0.3}),
            'maxvit_base': (84.95, {'drop_path': 0.4}),
            'maxvit_large': (85.17, {'drop_path': 0.6}),
        },
    ),
    (
        'maxvit',
        MAXVIT_FT,
        {
            'maxvit_tiny_ft_384': (85.24, {'size': 384, 'resize': (416, 'short')}),
            'maxvit_tiny_ft_512': (85.72, {'size': 512, 'resize': (544, 'short')}),
        },
    ),
]
VARIANTS = {
    f'imagenet/{folder}/{name}': {**family, **differs, 'top1': top1}
    for folder, family, rows in ROWS
    for name, (top1, differs) in rows.items()
}


@pytest.fixture(scope='module', params=VARIANTS)
def run(request):
    """What a run of GPUS processes builds, on the meta device and without the weights that it begins from."""
    written = load_config(request.param)
    cfg = fit(written, GPUS)
    model = cfg.model.to_dict()
    model['backbone'] = {**model['backbone'], 'pretrained': False, 'device': 'meta'}
    model['backbone'].pop('checkpoint', None)
    task = MODELS.build(model)
    wrapper = cfg.optim_wrapper.to_dict()
    constructor = {
        'type': wrapper.pop('constructor'),
        'paramwise_cfg': wrapper.pop('paramwise_cfg', None),
        'optim_wrapper_cfg': wrapper,
    }
    wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(constructor)(task)
    sampler = dict(cfg.train_dataloader.sampler)
    assert sampler.pop('type') == 'ShuffledStream'
    sampler = ShuffledStream(range(IMAGES), **sampler)
    sampler.world_size = GPUS
    epoch_length = len(sampler) // cfg.train_dataloader.batch_size
    defaults = {'optimizer': wrapper, 'epoch_length': epoch_length, 'end': cfg.train_cfg.max_epochs}
    schedule = PARAM_SCHEDULERS.build(dict(cfg.param_scheduler), default_args=defaults)
    return SimpleNamespace(
        name=request.param,
        expected=VARIANTS[request.param],
        written=written,
        cfg=cfg,
        task=task,
        wrapper=wrapper,
        sampler=sampler,
        schedule=schedule,
        epoch_length=epoch_length,
    )


def test_the_table_has_every_shipped_recipe_and_no_other():
    folder = find_config('imagenet/van/van_b0').parents[1]
    shipped = {path.relative_to(folder.parent).with_suffix('').as_posix() for path in folder.rglob('[!_]*.py')}
    assert shipped == set(VARIANTS)


def test_the_batch_is_the_sources_on_eight_gpus_and_on_one(run):
    expected = run.expected
    assert effective_batch(run.cfg, GPUS) == expected['batch']
    assert run.wrapper.accumulative_counts == run.cfg.optim_wrapper.accumulative_counts
    assert effective_batch(fit(run.written, 1), 1) == expected['batch']
    assert run.sampler.repeats == expected['repeats']
    steps = run.epoch_length / run.wrapper.accumulative_counts
    assert steps == int(steps) == IMAGES // expected['batch']


def test_the_optimizer_decays_what_the_source_decays(run):
    expected = run.expected
    optimizer = run.wrapper.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults['betas'], optimizer.defaults['eps']) == ((0.9, 0.999), 1e-8)
    decays = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    parameters = dict(run.task.named_parameters())
    assert len(decays) == len(parameters)
    for parameter_name, parameter in parameters.items():
        exempt = parameter.ndim <= 1 or parameter_name.endswith('.bias')
        exempt |= any(part in parameter_name for part in expected['exempt'])
        assert decays[id(parameter)] == (0.0 if exempt else expected['decay']), parameter_name
    assert {group['initial_lr'] for group in optimizer.param_groups} == {expected['lr']}
    if 'nat' in run.name:
        assert any(parameter_name.endswith('.rpb') for parameter_name in parameters)


def test_gradients_are_clipped_and_computed_as_the_source_does(run):
    expected = run.expected
    clip = {key: value for key, value in expected['clip'].items() if key != 'type'}
    assert run.wrapper.clip_grad_kwargs == clip
    clipper = {'agc': 'adaptive_clip_grad', 'norm': 'clip_grad_norm_'}[expected['clip'].get('type', 'norm')]
    assert run.wrapper.clip_func.__name__ == clipper
    assert str(getattr(run.wrapper, 'dtype', torch.float32)) == f'torch.{expected["precision"]}'


def test_the_rate_rises_and_falls_as_the_source_says(run):
    expected = run.expected
    epochs, cooldown = expected['cosine'], expected['cooldown']
    assert run.cfg.train_cfg.max_epochs == epochs + cooldown
    peak, low = expected['lr'], expected['min_lr']
    warmup, first = expected['warmup'] or (0, None)
    for epoch in (0, 1, 4, 5, 12.5, 20, 100, epochs / 2, epochs - 1, epochs, epochs + cooldown - 0.5):
        if epoch > epochs + cooldown:
            continue
        steps = math.floor(epoch * run.epoch_length / run.wrapper.accumulative_counts)
        time = math.floor(epoch) if expected['by'] == 'epoch' else steps / (IMAGES // expected['batch'])
        if time < warmup:
            rate = first + (peak - first) * time / warmup
        elif time < epochs:
            rate = low + (peak - low) * (1 + math.cos(math.pi * time / epochs)) / 2
        else:
            rate = low
        run.schedule.last_step = steps * run.wrapper.accumulative_counts
        assert run.schedule._get_value() == pytest.approx([rate] * len(run.wrapper.param_groups), rel=1e-9), epoch


def test_the_drop_path_reaches_the_model(run):
    expected = run.expected
    rates = [module.drop_prob for module in run.task.backbone.modules() if type(module).__name__ == 'DropPath']
    assert max(rates, default=0) == pytest.approx(expected['drop_path'] or 0)
    assert rates == sorted(rates)
    if expected['drop_path'] is None:
        assert 'model.backbone.drop_path_rate' in run.cfg.recipe.unknown
        assert 'drop_path_rate' not in run.cfg.model.backbone


def test_batches_are_mixed_erased_and_smoothed_as_the_source_does(run):
    expected = run.expected
    task, mixup = run.task, run.task.mixup
    assert (mixup and (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.switch_prob, mixup.mix_prob)) == expected['mix']
    assert not mixup or (mixup.label_smoothing, mixup.mode) == (0.0, 'batch')
    assert task._loss is torch.nn.functional.cross_entropy
    assert task._loss_arguments == {'label_smoothing': expected['smoothing']}
    erasing = task.random_erasing
    if expected['erase']:
        assert (erasing.probability, erasing.mode, erasing.max_count) == expected['erase']
        assert (erasing.min_area, erasing.max_area) == (0.02, 1 / 3)
    else:
        assert erasing is None
    assert task.teacher is None


def test_images_are_prepared_as_the_source_does(run):
    expected = run.expected
    train = build_transform(run.cfg.train_dataloader.dataset.transform).transforms[0].transforms
    crop, flip, augment, _ = train
    assert isinstance(crop, RandomResizedCropAndInterpolation)
    assert (crop.size, crop.scale) == ((expected['size'],) * 2, (0.08, 1.0))
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3))
    modes = crop.interpolation if isinstance(crop.interpolation, tuple | list) else [crop.interpolation]
    names = {mode.value for mode in modes}
    assert names == ({'bilinear', 'bicubic'} if expected['interpolation'] == 'random' else {'bicubic'})
    assert isinstance(flip, transforms.RandomHorizontalFlip)
    assert flip.p == 0.5
    layers, magnitude, deviation = expected['augment']
    assert isinstance(augment, auto_augment.RandAugment)
    assert augment.num_layers == layers
    fill = tuple(min(255, round(255 * value)) for value in expected['normalize'][0])
    for operation in augment.ops:
        assert min(operation.magnitude, operation.magnitude_max or 10) == magnitude  # timm's bound is 10
        assert operation.magnitude_std == deviation
        assert operation.kwargs['fillcolor'] == fill

    resize, centre, _ = build_transform(run.cfg.val_dataloader.dataset.transform).transforms[0].transforms
    side, mode = expected['resize']
    assert resize.size == (side if mode == 'short' else (side, side)) or resize.size == [side]
    assert resize.interpolation.value == 'bicubic'
    assert tuple(centre.size) == (expected['size'],) * 2
    for buffer, value in zip((run.task.mean, run.task.std), expected['normalize'], strict=True):
        torch.testing.assert_close(buffer.flatten() / 255, torch.tensor(value))


def test_the_average_and_the_classifier_are_the_sources(run):
    expected = run.expected
    hooks = [HOOKS.build(hook) for hook in run.cfg.get('custom_hooks', ())]
    assert [hook.decay for hook in hooks] == ([expected['ema']] if expected['ema'] else [])
    assert all((hook.validate, hook.warmup, hook.interval) == (expected['evaluates'], False, 1) for hook in hooks)
    assert run.task.num_classes == expected['classes']
    assert run.cfg.model.get('new_classifier', False) == (expected['classifier'] == 'new')
    scale = expected['classifier'] if isinstance(expected['classifier'], float) else None
    assert run.cfg.model.get('classifier_scale') == scale


def test_the_recipe_states_what_the_table_does(run):
    expected, recipe = run.expected, run.cfg.recipe.to_dict()
    mean, std = expected['normalize']
    side, mode = expected['resize']
    assert {key: value for key, value in recipe.items() if key not in ('unknown', 'crop_pct')} == {
        'total_batch': expected['batch'],
        'lr': expected['lr'],
        'warmup_lr': expected['warmup'] and expected['warmup'][1],
        'min_lr': expected['min_lr'],
        'epochs': expected['cosine'] + expected['cooldown'],
        'weight_decay': expected['decay'],
        'drop_path': expected['drop_path'],
        'clip_grad': expected['clip'],
        'ema': expected['ema'],
        'evaluates': expected['evaluates'],
        'precision': expected['precision'],
        'image_size': expected['size'],
        'mean': mean,
        'std': std,
        'top1': expected['top1'],
    }
    assert math.floor(expected['size'] / recipe['crop_pct']) == side
    assert (recipe['crop_pct'] == 1) >= (mode == 'squash')


def test_what_a_fine_tuning_begins_from_is_named(run):
    backbone = run.written.model.backbone
    begins = 'checkpoint' in backbone or backbone.get('pretrained', False)
    assert begins == ('_ft_' in run.name)


@pytest.mark.parametrize('policy', ['rand-m10-n9-p1-inc1', 'original', 'augmix-m10'])
def test_every_magnitude_of_the_augmentation_runs(policy):
    """At 10, timm keeps no bits of a pixel, which Pillow 13 refuses."""
    image = Image.new('RGB', (40, 30), (10, 200, 90))
    transform = build_transform(
        {'type': 'timm_transform', 'input_size': 32, 'is_training': True, 'auto_augment': policy}
    )
    for seed in range(40):
        seed_everything(seed)
        assert transform(image).dtype == torch.uint8
    black = auto_augment.AugmentOp('PosterizeIncreasing', prob=1.0, magnitude=10)
    step = SimpleNamespace(transforms=[SimpleNamespace(ops=[black])])
    assert keep_no_bits(step) is step
    assert black(image).getextrema() == ((0, 0),) * 3


@HOOKS.register_module()
class StopBefore(Hook):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == self.iteration:
            raise InterruptedError


def test_a_recipe_trains_and_resumes_to_the_bit(colours, tmp_path):
    """BiFormer's with a tiny model: float16, repeated augmentation, mixing, an average that isn't validated, and
    three accumulated batches a step."""
    options = {
        'model.backbone': {'name': 'test_vit', 'img_size': 32, 'num_classes': 3, '_delete_': True},
        'total_batch': None,
        'scale_lr': None,
        'train_dataloader.batch_size': 4,
        'train_dataloader.sampler.multiple': 12,
        'optim_wrapper.accumulative_counts': 3,
        'train_cfg.max_epochs': 2,
        'param_scheduler.warmup_epochs': 1,
        'val_evaluator.k': (1,),
        'default_hooks.checkpoint.interval_iters': 6,
    }
    for loader, split in (('train_dataloader', 'train'), ('val_dataloader', 'test')):
        options |= {
            f'{loader}.dataset.root': str(colours),
            f'{loader}.dataset.split': split,
            f'{loader}.dataset.transform.input_size': 32,
            f'{loader}.num_workers': 0,
            f'{loader}.pin_memory': False,
        }
    name = 'imagenet/biformer/biformer_tiny'
    whole = train(name, tmp_path / 'whole', preflight=False, cfg_options=options)
    hooks = [{'type': 'EMA', 'decay': 0.99996, 'validate': 'raw'}, {'type': 'StopBefore', 'iteration': 16}]
    with pytest.raises(InterruptedError):
        train(name, tmp_path / 'parts', preflight=False, cfg_options={**options, 'custom_hooks': hooks})
    resumed = train(name, tmp_path / 'parts', resume=True, preflight=False, cfg_options=options)
    one, other = (checkpoints.load(result.checkpoint) for result in (whole, resumed))
    assert one['meta']['iter'] == 30
    assert one['optimizer']['loss_scaler'] == other['optimizer']['loss_scaler']
    assert one['optimizer']['param_groups'] == other['optimizer']['param_groups']
    for key in ('state_dict', 'average_state_dict'):
        assert all(torch.equal(value, other[key][part]) for part, value in one[key].items())
    assert resumed.metrics == whole.metrics
