"""The shipped recipes of detection and segmentation build what their sources state.

FAMILIES and DROP_PATHS are transcribed from the sources, not from the configs; docs/dense.md names the sources.
"""

from types import SimpleNamespace

import pytest
import torch
from timm.layers import DropPath

from zoo.train.batches import effective_batch, fit
from zoo.train.config import config_names, find_config, load_config
from zoo.train.data import build_transform
from zoo.train.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS
from zoo.train.validation import validate

COCO_IMAGES, ADE_IMAGES = 117_266, 20_210  # of the training sets, the former without empty images
GPUS = 8
SLOW = pytest.mark.slow

ONE = {'batch': 16, 'lr': 1e-4, 'decay': 0.05, 'epochs': 12, 'steps': (8, 11), 'exempt': (), 'precision': 'float32'}
THREE = {**ONE, 'epochs': 36, 'steps': (27, 33), 'exempt': ('rpb', 'norm'), 'precision': 'float16'}
UPERNET = {'batch': 16, 'lr': 6e-5, 'decay': 0.01, 'length': 160_000, 'exempt': ('norm',), 'precision': 'float32'}
FPN = {'batch': 32, 'lr': 2e-4, 'decay': 1e-4, 'length': 80_000, 'exempt': (), 'precision': 'float32', 'power': 0.9}
MAXVIT = {
    **{'batch': 256, 'lr': 3e-3, 'decay': 0.05, 'length': 90_000, 'exempt': (), 'precision': 'float32'},
    **{'power': None, 'warmup': (6000, 0.0)},
}
TRANSNEXT = ('query_embedding', 'relative_pos_bias_local', 'cpb', 'temperature', 'norm')
FAMILIES = {  # by the beginning of a config's name: of two that fit, the longer one
    'coco/biformer/mask_rcnn': {**ONE, 'exempt': ('norm',), 'precision': 'float16'},
    'coco/biformer/retinanet': {**ONE, 'decay': 1e-4, 'precision': 'float16'},
    'coco/nat/': THREE,
    'coco/dinat/': THREE,
    'coco/dinat/cascade_mask_rcnn_dinat_base': {**THREE, 'lr': 7.5e-5},
    'coco/dinat/cascade_mask_rcnn_dinat_large': {**THREE, 'lr': 7.5e-5, 'precision': 'float32'},
    'coco/dinat_s/': THREE,
    'coco/dinat_s/cascade_mask_rcnn_dinat_s_base': {**THREE, 'lr': 7.5e-5},
    'coco/dinat_s/cascade_mask_rcnn_dinat_s_large': {**THREE, 'lr': 5e-5},
    'coco/crossformer/': {**ONE, 'decay': 1e-4},
    'coco/transnext/': {**ONE, 'exempt': TRANSNEXT},
    'coco/transnext/mask_rcnn_transnext_base': {**ONE, 'exempt': TRANSNEXT, 'precision': 'float16'},
    'coco/shvit/': ONE,
    'coco/maxvit/': MAXVIT,
    'ade20k/biformer/semantic_fpn': {**FPN, 'power': None, 'warmup': (1000, 0.1), 'precision': 'float16'},
    'ade20k/biformer/upernet': {**UPERNET, 'precision': 'float16'},
    'ade20k/van/semantic_fpn': {**FPN, 'length': 40_000},
    'ade20k/van/upernet': UPERNET,
    **{f'ade20k/van/upernet_van_b{i}': {**UPERNET, 'batch': 32} for i in (4, 5, 6)},
    'ade20k/nat/': {**UPERNET, 'exempt': ('rpb', 'norm'), 'precision': 'float16'},
    'ade20k/dinat/': {**UPERNET, 'exempt': ('rpb', 'norm'), 'precision': 'float16'},
    'ade20k/dinat/upernet_dinat_large': {**UPERNET, 'exempt': ('rpb', 'norm')},
    'ade20k/dinat_s/': {**UPERNET, 'exempt': ('rpb', 'norm'), 'precision': 'float16'},
    'ade20k/crossformer/semantic_fpn': {**FPN, 'batch': 16, 'lr': 1e-4},
    'ade20k/crossformer/upernet': UPERNET,
    'ade20k/transnext/': {**UPERNET, 'decay': 0.05, 'exempt': TRANSNEXT},
}
DROP_PATHS = {
    'coco/biformer': {'mask_rcnn': (0.2, 0.3), 'retinanet': (0.2, 0.3), 'of': ('small', 'base')},
    'coco/nat': {
        'mask_rcnn': (0.2, 0.2, 0.35),
        'cascade_mask_rcnn': (0.2, 0.3, 0.3, 0.5),
        'of': ('mini', 'tiny', 'small', 'base'),
    },
    'coco/dinat': {
        'mask_rcnn': (0.2, 0.2, 0.35),
        'cascade_mask_rcnn': (0.2, 0.3, 0.5, 0.6, 0.6),
        'of': ('mini', 'tiny', 'small', 'base', 'large'),
    },
    'coco/dinat_s': {
        'mask_rcnn': (0.2, 0.35),
        'cascade_mask_rcnn': (0.3, 0.5, 0.6, 0.6),
        'of': ('tiny', 'small', 'base', 'large'),
    },
    'coco/crossformer': {
        'mask_rcnn': (0.2, 0.3, 0.2),
        'retinanet': (0.2, 0.3, 0.2),
        'of': ('small', 'base', 'pp_small'),
    },
    'coco/transnext': {'mask_rcnn': (0.4, 0.6, 0.7), 'of': ('tiny', 'small', 'base')},
    'coco/shvit': {'mask_rcnn': (0.0,), 'retinanet': (0.0,), 'of': ('s4',)},
    'coco/maxvit': {'cascade_mask_rcnn': (0.5,), 'of': ('small',)},
    'ade20k/biformer': {'semantic_fpn': (0.15, 0.3), 'upernet': (0.3, 0.4), 'of': ('small', 'base')},
    'ade20k/van': {
        'semantic_fpn': (0.2, 0.2, 0.2, 0.3, 0.4),
        'upernet': (0.1, 0.1, 0.1, 0.3, 0.4, 0.4, 0.4, 0.5),
        'of': ('b0', 'b1', 'b2', 'b3', 'b4', 'b4_in22k', 'b5_in22k', 'b6_in22k'),
    },
    'ade20k/nat': {'upernet': (0.2, 0.3, 0.5, 0.5), 'of': ('mini', 'tiny', 'small', 'base')},
    'ade20k/dinat': {'upernet': (0.2, 0.3, 0.5, 0.5, 0.3), 'of': ('mini', 'tiny', 'small', 'base', 'large')},
    'ade20k/dinat_s': {'upernet': (0.3, 0.3, 0.3, 0.3), 'of': ('tiny', 'small', 'base', 'large')},
    'ade20k/crossformer': {
        'semantic_fpn': (0.2, 0.3, 0.5, 0.2),
        'upernet': (0.2, 0.3, 0.5, 0.2),
        'of': ('small', 'base', 'large', 'pp_small'),
    },
    'ade20k/transnext': {'upernet': (0.4, 0.6, 0.7), 'of': ('tiny', 'small', 'base')},
}
RECIPES = {
    f'{folder}/{head}_{folder.partition("/")[2]}_{variant}': rate
    for folder, heads in DROP_PATHS.items()
    for head, rates in heads.items()
    if head != 'of'
    for variant, rate in zip(heads['of'], rates, strict=False)
}
QUICK = (
    'coco/biformer/mask_rcnn_biformer_small',
    'coco/dinat/cascade_mask_rcnn_dinat_mini',
    'coco/shvit/retinanet_shvit_s4',
    'coco/maxvit/cascade_mask_rcnn_maxvit_small',
    'ade20k/biformer/semantic_fpn_biformer_small',
    'ade20k/transnext/upernet_transnext_tiny',
    'ade20k/van/upernet_van_b4_in22k',
)


def shipped():
    return {name for name in config_names() if name.startswith(('coco/', 'ade20k/'))}


@pytest.fixture(
    scope='module', params=[pytest.param(name, marks=() if name in QUICK else SLOW) for name in sorted(RECIPES)]
)
def run(request):
    """What a config builds on eight GPUs, without memory."""
    name = request.param
    cfg = fit(load_config(name), GPUS)
    model = cfg.model.to_dict()
    model['backbone'] = {**model['backbone'], 'device': 'meta'}
    with torch.device('meta'):
        task = MODELS.build(model)
    wrapper = cfg.optim_wrapper.to_dict()
    constructor = {
        'type': wrapper.pop('constructor'),
        'paramwise_cfg': wrapper.pop('paramwise_cfg', None),
        'optim_wrapper_cfg': wrapper,
    }
    wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(constructor)(task)
    images = COCO_IMAGES if name.startswith('coco') else ADE_IMAGES
    length = images // GPUS // cfg.train_dataloader.batch_size
    loop = cfg.train_cfg
    end = loop.max_epochs * length if loop.get('max_epochs') else loop.max_steps * wrapper.accumulative_counts
    defaults = {'optimizer': wrapper, 'epoch_length': length, 'end': end}
    schedule = PARAM_SCHEDULERS.build(dict(cfg.param_scheduler), default_args=defaults)
    expected = FAMILIES[max((key for key in FAMILIES if name.startswith(key)), key=len)]
    return SimpleNamespace(
        name=name, cfg=cfg, task=task, wrapper=wrapper, schedule=schedule, end=end, expected=expected
    )


def test_the_tables_have_every_shipped_recipe_and_no_other():
    assert shipped() == set(RECIPES)


def test_leaves_are_short_and_say_their_command():
    for name in shipped():
        text = find_config(name).read_text()
        assert len(text.splitlines()) <= 25, name
        assert f'zoo train {name} ' in text, name
        assert 'published' in text.splitlines()[0], name


def test_the_batch_is_the_sources_on_eight_gpus_and_on_one(run):
    assert effective_batch(run.cfg, GPUS) == run.expected['batch']
    assert effective_batch(fit(load_config(run.name), 1), 1) == run.expected['batch']


def test_the_optimizer_decays_what_the_source_decays(run):
    optimizer = run.wrapper.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults['betas'], optimizer.defaults['eps']) == ((0.9, 0.999), 1e-8)
    found = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    parameters = dict(run.task.named_parameters())
    assert len(found) == len(parameters)
    for name, parameter in parameters.items():
        exempt = any(part in name for part in run.expected['exempt'])
        assert found[id(parameter)] == (0.0 if exempt else run.expected['decay']), name
    assert {group['initial_lr'] for group in optimizer.param_groups} == {run.expected['lr']}
    assert str(getattr(run.wrapper, 'dtype', torch.float32)) == f'torch.{run.expected["precision"]}'
    assert not run.wrapper.clip_grad_kwargs


def test_the_rate_goes_as_the_source_says(run):
    expected, lr = run.expected, run.expected['lr']
    steps = run.end / run.wrapper.accumulative_counts
    if 'length' in expected:
        assert steps == expected['length']
    else:
        assert run.cfg.train_cfg.max_epochs == expected['epochs']

    def rate(place):
        run.schedule.last_step = int(place * steps) * run.wrapper.accumulative_counts
        return run.schedule._get_value()[0]

    if 'epochs' in expected:
        first, second = (place / expected['epochs'] for place in expected['steps'])
        assert rate(0) == pytest.approx(1e-3 * lr)
        assert rate(250 / steps) == pytest.approx(lr * (1 - 0.5 * (1 - 1e-3)), rel=1e-2)
        found = [rate(place) for place in (0.1, first - 1e-3, first + 1e-3, second - 1e-3, second + 1e-3, 0.999)]
        assert found == pytest.approx([lr, lr, 0.1 * lr, 0.1 * lr, 0.01 * lr, 0.01 * lr])
        return
    power = expected.get('power', 1.0)
    warmup, start = expected.get('warmup', (1500, 1e-6) if 'upernet' in run.name else (0, 1.0))
    assert rate(0) == pytest.approx(start * lr)
    assert rate(warmup / steps) == pytest.approx(lr, rel=2e-2)
    half = 0.5 if power is None else 0.5**power
    assert rate(0.5) == pytest.approx(lr * half)
    assert rate(1 - 1 / steps) < 1e-3 * lr


def test_the_drop_path_reaches_the_backbone(run):
    rates = [module.drop_prob for module in run.task.backbone.modules() if isinstance(module, DropPath)]
    assert max(rates, default=0.0) == pytest.approx(RECIPES[run.name])
    assert run.cfg.recipe.drop_path == RECIPES[run.name]


def test_heads_and_levels_are_the_published_ones(run):
    head, name = run.task.head, run.name
    strides = run.task.feature_info.reduction()
    if '/retinanet' in name:
        assert strides == [8, 16, 32, 64, 128]
    elif name.startswith('coco'):
        assert strides == ([8, 16, 32, 64, 128] if 'maxvit' in name else [4, 8, 16, 32, 64])
        assert head.has_masks
        assert len(head.stages) == (3 if 'cascade' in name else 1)
    else:
        assert strides == [4, 8, 16, 32]
    assert run.task.num_classes == (80 if name.startswith('coco') else 150)
    norms = 'biformer' in name or 'nat_' in name
    assert len(run.task.backbone.norms) == (len(run.task.backbone.feature_info.channels()) if norms else 0)
    assert run.task.frozen_norms == (name.startswith(('coco/biformer', 'coco/shvit')))
    if 'upernet' in name:
        assert [auxiliary.level for auxiliary in run.task.auxiliary] == [2]
        assert run.task.views.mode == ('slide' if 'transnext' in name else 'whole')


def test_maxvits_windows_are_the_images_and_its_anchors_three_strides():
    config = load_config('coco/maxvit/cascade_mask_rcnn_maxvit_small').model.to_dict()
    with torch.device('meta'):
        task = MODELS.build({**config, 'backbone': {**config['backbone'], 'device': 'meta'}})
    model = task.backbone.model.model
    assert (model.window_size, model.table_window_size) == ((28, 28), (7, 7))
    generator, rpn = task.head.rpn.anchor_generator, task.head.rpn.head
    assert generator.sizes == tuple((3.0 * stride,) for stride in (8, 16, 32, 64, 128))
    assert len(rpn.conv) == 2
    assert task.size_divisor == 896


@pytest.mark.parametrize(
    ('name', 'rows'),
    [
        ('coco/dinat/mask_rcnn_dinat_mini', [(1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1)]),
        ('ade20k/dinat/upernet_dinat_mini', [(1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2, 1, 2, 1)]),
        ('coco/dinat_s/mask_rcnn_dinat_s_tiny', [(1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)]),
    ],
)
def test_dilations_are_those_of_the_sources_image_size(name, rows):
    backbone = {**load_config(name).model.backbone, 'device': 'meta'}
    with torch.device('meta'):
        task = MODELS.build({'type': 'Detector', 'backbone': backbone, 'neck': {'type': 'FPN'}, 'head': HEAD})
    stages = task.backbone.model.model.stages
    assert [tuple(block.attn.dilation for block in stage.blocks) for stage in stages] == rows


HEAD = {'type': 'FasterRCNN', 'num_classes': 2}


@pytest.mark.parametrize('name', ['coco/nat/mask_rcnn_nat_mini', 'ade20k/van/upernet_van_b0'])
def test_training_images_are_made_as_the_source_does(name):
    from torchvision import tv_tensors

    transform = build_transform(load_config(name).train_dataloader.dataset.transform)
    image = tv_tensors.Image(torch.randint(256, (3, 480, 640), dtype=torch.uint8))
    target = {'mask': tv_tensors.Mask(torch.randint(150, (480, 640)))}
    if name.startswith('coco'):
        boxes = tv_tensors.BoundingBoxes([[30.0, 20, 300, 400]], format='XYXY', canvas_size=(480, 640))
        target = {'boxes': boxes, 'labels': torch.tensor([3]), 'masks': tv_tensors.Mask(torch.ones(1, 480, 640))}
    torch.manual_seed(0)
    sizes = {tuple(transform(image, dict(target))[0].shape[-2:]) for _ in range(12)}
    if name.startswith('coco'):
        assert len(sizes) > 5
        assert all(480 <= min(size) <= 800 and max(size) <= 1333 for size in sizes)
    else:
        assert sizes == {(512, 512)}


@pytest.mark.parametrize('name', [pytest.param(n, marks=() if n in QUICK else SLOW) for n in sorted(RECIPES)])
def test_recipes_are_valid(name):
    validate(load_config(name), data=False, world_size=GPUS)
