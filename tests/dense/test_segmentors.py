"""Segmentors: heads on any levels, losses of what counts, and the views of a test."""

import numpy as np
import parity_rule as rule
import pytest
import torch
from timm.models import FeatureInfo
from torch import nn
from torch.nn import functional as F
from torchvision import tv_tensors

from zoo.backbones.checkpoints import CheckpointError
from zoo.train.dense.features import Features, levels
from zoo.train.dense.segmentation_heads import (
    CCHead,
    CrissCrossAttention,
    FCNHead,
    SegFormerHead,
    SemanticFPNHead,
    UPerHead,
)
from zoo.train.dense.segmentors import Segmentor, Views, cross_entropy, ohem_cross_entropy
from zoo.train.registry import FUNCTIONS, MODELS

CLASSES = 5
BACKBONES = {
    '4 to 32': dict(name='van_b0', dims=(16, 32, 32, 48), depths=(1, 1, 1, 1)),
    '16 to 64': dict(name='shvit_s1'),
}
HEADS = {
    'FCNHead': dict(channels=16),
    'SemanticFPNHead': dict(channels=16),
    'UPerHead': dict(channels=16),
    'SegFormerHead': dict(channels=16),
    'CCHead': dict(channels=32),
}


def segmentor(head='SegFormerHead', backbone='4 to 32', num_classes=CLASSES, seed=0, **kwargs):
    torch.manual_seed(seed)
    head = {'type': head, 'num_classes': num_classes, **HEADS[head]}
    return Segmentor(BACKBONES[backbone], head, **kwargs)


def sample(height, width, seed=1, num_classes=CLASSES):
    """An image, and a target with a row of pixels that don't count."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
    mask = torch.randint(num_classes, (height, width), generator=generator)
    mask[0] = 255
    return image, {'name': f'{seed}.png', 'mask': tv_tensors.Mask(mask)}


def batch(*sizes):
    images, targets = zip(*(sample(*size, seed=i) for i, size in enumerate(sizes)), strict=True)
    return list(images), list(targets)


def relative_error(x, summary):
    want = torch.tensor(summary['samples'], dtype=torch.float64)
    return ((rule.samples(x, 64) - want).norm() / want.norm()).item()


# Heads


@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('head', HEADS)
def test_every_head_learns_on_any_strides_from_images_of_any_sizes(head, backbone):
    task = segmentor(head, backbone, auxiliary=[dict(type='FCNHead', level=-2, channels=8)]).train()
    losses = task(*batch((70, 95), (65, 33)), mode='loss')
    assert set(losses) == {'loss_segmentation', 'loss_auxiliary', 'accuracy'}
    (losses['loss_segmentation'] + losses['loss_auxiliary']).backward()
    for name, parameter in task.named_parameters():
        is_used = head not in ('FCNHead', 'CCHead') or name.startswith(('head', 'auxiliary'))
        if is_used:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    images, _ = batch((70, 95), (65, 33))
    for image, prediction in zip(images, task.eval()(images), strict=True):
        assert prediction['mask'].shape == image.shape[1:]
        assert prediction['mask'].dtype == torch.int64
        assert prediction['mask'].max() < CLASSES


@pytest.mark.parametrize(('head', 'stride'), [('SemanticFPNHead', 4), ('UPerHead', 4), ('SegFormerHead', 4)])
def test_heads_of_all_levels_give_logits_at_the_finest(head, stride):
    info = levels((8, 16, 24, 32), (4, 8, 16, 32))
    maps = [
        torch.randn(2, c, -(-70 // s), -(-101 // s)) for c, s in zip(info.channels(), info.reduction(), strict=True)
    ]
    made = MODELS.build(dict(type=head, feature_info=info, num_classes=CLASSES, channels=8))
    assert made(maps).shape == (2, CLASSES, 18, 26)
    for i in range(4):  # all of them count
        changed = [x + (i == j) for j, x in enumerate(maps)]
        assert not torch.allclose(made.eval()(changed), made(maps))


@pytest.mark.parametrize('head', ['FCNHead', 'CCHead'])
def test_heads_of_one_level_take_it_alone(head):
    info = levels((8, 32, 16), (4, 8, 16))
    maps = [torch.randn(2, c, 32 // s, 64 // s) for c, s in zip(info.channels(), info.reduction(), strict=True)]
    made = MODELS.build(dict(type=head, feature_info=info, num_classes=CLASSES, channels=8, level=1)).eval()
    logits = made(maps)
    assert logits.shape == (2, CLASSES, 4, 8)
    assert torch.equal(made([maps[0] + 1, maps[1], maps[2] + 1]), logits)


@pytest.mark.parametrize('strides', [(4, 8, 16, 32), (4, 16), (16, 32, 64), (4, 8, 8, 8), (8,), (4, 8, 16, 32, 64)])
def test_semantic_fpn_has_a_convolution_for_every_doubling(strides):
    head = SemanticFPNHead(levels([8] * len(strides), strides), CLASSES, channels=8)
    expected = [max((stride // strides[0]).bit_length() - 1, 1) for stride in strides]
    assert [len(convs) for convs in head.levels] == expected
    sizes = []
    for convs in head.levels:
        convs[0].register_forward_hook(lambda _, inputs, x: sizes.append(x.shape[-2:]))
        convs[-1].register_forward_hook(lambda _, inputs, x: sizes.append(x.shape[-2:]))
    maps = [torch.randn(2, 8, -(-70 // s), -(-101 // s)) for s in strides]
    assert head(maps).shape[-2:] == maps[0].shape[-2:]
    # A level's first convolution is of its own size, the last of twice the finest's stride, or of the finest's.
    for (first, last), x, stride in zip(zip(sizes[::2], sizes[1::2], strict=True), maps, strides, strict=True):
        assert first == x.shape[-2:]
        side = min(stride, 2 * strides[0])
        assert last == (-(-70 // side), -(-101 // side))


def test_semantic_fpn_is_the_sum_of_its_levels_upsampled():
    """By factors, as the paper writes, where sizes divide."""
    info = levels((8, 8, 8), (4, 8, 16))
    head = SemanticFPNHead(info, CLASSES, channels=8).eval()
    maps = [torch.randn(1, 8, 64 // s, 96 // s) for s in (4, 8, 16)]

    def up(x):
        return F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)

    (a,), (b,), (c, d) = head.levels
    expected = head.classifier(a(maps[0]) + up(b(maps[1])) + up(d(up(c(maps[2])))))
    torch.testing.assert_close(head(maps), expected)


def test_upernet_is_pooling_a_top_down_path_and_a_fusion():
    info = levels((8, 12, 16), (4, 8, 16))
    head = UPerHead(info, CLASSES, channels=8).eval()
    maps = [torch.randn(1, c, 64 // s, 96 // s) for c, s in zip((8, 12, 16), (4, 8, 16), strict=True)]

    def to(x, like):
        return F.interpolate(x, like.shape[-2:], mode='bilinear', align_corners=False)

    pooled = [
        to(conv(nn.AdaptiveAvgPool2d(side)(maps[2])), maps[2])
        for side, conv in zip((1, 2, 3, 6), head.pooled, strict=True)
    ]
    p3 = head.bottleneck(torch.cat([maps[2], *pooled], 1))
    p2 = head.laterals[1](maps[1]) + to(p3, maps[1])
    p1 = head.laterals[0](maps[0]) + to(p2, maps[0])
    outputs = head.outputs[0](p1), to(head.outputs[1](p2), p1), to(p3, p1)
    torch.testing.assert_close(head(maps), head.classifier(head.fuse(torch.cat(outputs, 1))))


def test_segformers_head_has_the_papers_parameters():
    """0.4M of SegFormer-B0's 3.8M are its head's (table 1a): of ADE20K's 150 classes."""
    head = SegFormerHead(levels((32, 64, 160, 256), (4, 8, 16, 32)), 150)
    linear = sum(256 * (width + 1) for width in (32, 64, 160, 256))
    assert sum(p.numel() for p in head.parameters()) == linear + 4 * 256 * 256 + 2 * 256 + 150 * 257


@pytest.mark.parametrize('norm', ['bn', 'syncbn'])
def test_norms_have_their_kind(norm):
    head = UPerHead(levels((8, 16), (4, 8)), CLASSES, channels=8, norm=norm)
    kind = {'bn': nn.BatchNorm2d, 'syncbn': nn.SyncBatchNorm}[norm]
    assert sum(isinstance(module, kind) for module in head.modules()) == 4 + 1 + 1 + 1 + 1


def test_a_pooled_map_of_one_image_is_normalized_by_stored_statistics():
    task = segmentor('UPerHead').train()
    task(*batch((64, 64)), mode='loss')['loss_segmentation'].backward()
    norm = task.head.pooled[0][1]
    assert norm.running_var.eq(1).all()  # has learnt nothing from it
    assert not task.head.pooled[1][1].running_var.eq(1).all()


@pytest.mark.parametrize('name', ['FCNHead', 'SemanticFPNHead', 'UPerHead', 'SegFormerHead', 'CCHead'])
def test_heads_are_for_a_positive_number_of_classes_and_norms_that_there_are(name):
    info = levels((8, 16), (4, 8))
    with pytest.raises(ValueError, match='num_classes must be a positive integer, got 0'):
        MODELS.build(dict(type=name, feature_info=info, num_classes=0))
    with pytest.raises(ValueError, match="norm must be one of 'bn', 'syncbn', got 'gn'"):
        MODELS.build(dict(type=name, feature_info=info, num_classes=2, norm='gn'))


def test_a_level_that_is_not_there_is_named():
    info = levels((8, 16), (4, 8))
    for head in (FCNHead, CCHead):
        with pytest.raises(ValueError, match='level 2 is not one of the 2 levels'):
            head(info, 2, level=2)
    with pytest.raises(ValueError, match='recurrence must be an integer of 0 or more, got -1'):
        CCHead(info, 2, recurrence=-1)


# CCNet

RECORD = rule.load_record('modules/ccnet__crisscross')


@pytest.mark.parametrize('case', RECORD['cases'], ids=lambda case: case['name'])
def test_ccnet_equals_the_authors(case):
    x = torch.from_numpy(np.random.RandomState(case['input']['seed']).standard_normal(case['input']['shape']))
    width = x.shape[1]
    if 'recurrence' in case:
        module = CCHead(levels((width,), (8,)), 19, recurrence=case['recurrence'])
        run = lambda: module([x])  # noqa: E731
    else:
        module = CrissCrossAttention(width)
        run = lambda: module(x)  # noqa: E731
    module.double().eval().load_state_dict(rule.checkpoint(case))
    assert sum(p.numel() for p in module.parameters()) == case['params']
    with torch.inference_mode():
        out = run()
    assert list(out.shape) == case['output']['shape']
    assert relative_error(out, case['output']) < 1e-9
    assert out.norm().item() == pytest.approx(case['output']['norm'], rel=1e-9)
    assert out.sum().item() == pytest.approx(case['output']['sum'], rel=1e-9)


def test_the_authors_checkpoints_load_with_the_scales_that_their_norms_used(tmp_path):
    """Those of the whole network, whose InPlace-ABN takes absolute values and counts no batches."""
    info = levels((64, 256), (8, 8))
    (case,) = (case for case in RECORD['cases'] if case['name'] == 'rcca_256_R2')
    plain = {key: x.float() for key, x in rule.checkpoint(case).items() if not key.endswith('num_batches_tracked')}
    official = {f'module.head.{key}': -x if key.endswith('.1.weight') else x for key, x in plain.items()}
    official['module.dsn.0.bias'] = torch.zeros(512)
    path = tmp_path / 'CS_scenes_60000.pth'
    torch.save({'model': official}, path)
    head = CCHead(info, 19, checkpoint=str(path))
    loaded = head.state_dict()
    assert all(torch.equal(loaded[key], x) for key, x in plain.items())

    with torch.no_grad():
        head.conva[1].weight[0] = -0.5  # a plain norm's
    torch.save(head.state_dict(), path)
    again = CCHead(info, 19, checkpoint=str(path)).state_dict()
    assert all(torch.equal(again[key], x) for key, x in head.state_dict().items())

    with pytest.raises(CheckpointError, match=r'2 misshaped \(bottleneck\.3\.weight'):
        CCHead(info, 7, checkpoint=str(path))


# Losses


def test_the_loss_is_the_mean_over_pixels_that_count():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, CLASSES, 7, 9), torch.randint(CLASSES, (2, 7, 9))
    masks[0, :3] = 255
    expected = F.cross_entropy(logits, masks, ignore_index=255)
    torch.testing.assert_close(cross_entropy(logits, masks), expected)
    weight = [0.5, 1.0, 2.0, 0.0, 1.5]
    expected = F.cross_entropy(logits, masks, torch.tensor(weight), ignore_index=255)
    torch.testing.assert_close(cross_entropy(logits, masks, class_weight=weight), expected)
    with pytest.raises(ValueError, match='a number for each of 5 classes'):
        cross_entropy(logits, masks, class_weight=[1.0])


@pytest.mark.parametrize('loss', ['cross_entropy', 'ohem_cross_entropy'])
def test_an_image_of_which_nothing_counts_has_no_loss_and_zero_gradients(loss):
    task = segmentor(auxiliary=[dict(type='FCNHead', channels=8)], loss=dict(type=loss)).train()
    image, target = sample(64, 64)
    target['mask'] = torch.full_like(target['mask'], 255)
    losses = task([image, image], [target, target], mode='loss')
    assert losses['loss_segmentation'] == losses['loss_auxiliary'] == losses['accuracy'] == 0
    (losses['loss_segmentation'] + losses['loss_auxiliary']).backward()
    assert all(p.grad.eq(0).all() for p in task.parameters())


def test_hard_examples_are_those_below_the_threshold_and_never_too_few():
    torch.manual_seed(0)
    logits, masks = 3 * torch.randn(2, CLASSES, 7, 9), torch.randint(CLASSES, (2, 7, 9))
    masks[0, :3] = 255
    losses = F.cross_entropy(logits, masks, ignore_index=255, reduction='none')[masks != 255]
    below = losses[losses > -torch.tensor(0.2).log()]
    torch.testing.assert_close(ohem_cross_entropy(logits, masks, threshold=0.2, min_kept=1), below.mean())
    many = (len(below) + 20) // 2
    expected = losses.sort(descending=True).values[: 2 * many].mean()
    torch.testing.assert_close(ohem_cross_entropy(logits, masks, threshold=0.2, min_kept=many), expected)
    torch.testing.assert_close(ohem_cross_entropy(logits, masks), losses.mean())  # there are fewer than 100,000


def test_padding_does_not_count_and_accuracy_is_of_what_does():
    task = segmentor(size_divisor=32).eval()
    images, targets = batch((64, 64), (40, 50))
    masks = task.batch_masks(images, targets, (64, 64))
    assert torch.equal(masks[0], targets[0]['mask'])
    assert torch.equal(masks[1, :40, :50], targets[1]['mask'])
    assert (masks[1] == 255).sum() == 64 * 64 - 39 * 50
    losses = task(images, targets, mode='loss')
    logits = F.interpolate(task.head(task.extract(task.batch(images))), (64, 64), mode='bilinear')
    torch.testing.assert_close(losses['loss_segmentation'], F.cross_entropy(logits, masks, ignore_index=255))
    right = (logits.argmax(1) == masks).sum() / (masks != 255).sum()
    torch.testing.assert_close(losses['accuracy'], 100 * right)


def test_auxiliary_losses_have_their_weights_and_see_the_backbone_itself():
    """A neck of one channel can't be what an auxiliary head is made for."""
    head = dict(type='FCNHead', num_classes=CLASSES, channels=8)
    auxiliary = [dict(type='FCNHead', level=2, channels=8, weight=0.3), dict(type='FCNHead', level=1, channels=8)]
    torch.manual_seed(0)
    neck = dict(type='FPN', out_channels=8)
    task = Segmentor(BACKBONES['4 to 32'], head, neck, auxiliary).eval()
    assert [head.convs[0][0].in_channels for head in (task.head, *task.auxiliary)] == [8, 32, 32]
    images, targets = batch((64, 64), (40, 50))
    maps = task.backbone(task.batch(images))
    masks = task.batch_masks(images, targets, (64, 64))
    own = [
        F.cross_entropy(F.interpolate(head(maps), (64, 64), mode='bilinear'), masks, ignore_index=255)
        for head in task.auxiliary
    ]
    losses = task(images, targets, mode='loss')
    torch.testing.assert_close(losses['loss_auxiliary'], 0.3 * own[0] + 0.4 * own[1])
    assert 'loss_auxiliary' not in segmentor()(images, targets, mode='loss')


def test_a_registered_loss_can_be_named():
    images, targets = batch((64, 64))
    seen = []

    def focal(logits, masks, gamma):
        seen.append((logits.shape, masks.shape, gamma))
        return logits.sum() * 0

    FUNCTIONS.register_module(name='focal', module=focal)
    try:
        segmentor(loss=dict(type='focal', gamma=2))(images, targets, mode='loss')
    finally:
        FUNCTIONS.module_dict.pop('focal')
    assert seen == [((1, CLASSES, 64, 64), (1, 64, 64), 2)]
    with pytest.raises(ValueError, match=r"no loss 'focal' of pixels\. Losses: cross_entropy, ohem_cross_entropy"):
        segmentor(loss=dict(type='focal'))


# Views of a test


@pytest.mark.parametrize(
    ('arguments', 'size', 'expected'),
    [
        ({}, (70, 95), [(70, 95)]),
        ({'resize': (2048, 512)}, (300, 400), [(512, 683)]),  # the short side rules
        ({'resize': (2048, 512)}, (3000, 300), [(2048, 205)]),  # the long one
        ({'resize': (512, 2048)}, (400, 300), [(683, 512)]),
        ({'resize': (2048, 512), 'divisor': 32}, (300, 400), [(512, 704)]),
        ({'divisor': 32}, (64, 65), [(64, 96)]),
        ({'scales': (0.5, 1.0, 1.75)}, (100, 61), [(50, 31), (100, 61), (175, 107)]),
        ({'scales': (0.5,), 'resize': (80, 40), 'divisor': 16}, (200, 100), [(48, 32)]),
        ({'scales': (0.01,)}, (20, 30), [(1, 1)]),
    ],
)
def test_sizes_of_views(arguments, size, expected):
    assert list(Views(**arguments).sizes(*size)) == expected


@pytest.mark.parametrize(
    ('size', 'crop', 'stride', 'rows', 'columns'),
    [
        ((512, 683), (512, 512), (341, 341), [0], [0, 171]),
        ((1024, 2048), (768, 768), (512, 512), [0, 256], [0, 512, 1024, 1280]),
        ((10, 10), (10, 10), (3, 3), [0], [0]),
        ((16, 11), (10, 10), (3, 3), [0, 3, 6], [0, 1]),
        ((9, 7), (3, 2), (3, 2), [0, 3, 6], [0, 2, 4, 5]),
    ],
)
def test_windows_cover_the_image_and_the_last_end_at_its_border(size, crop, stride, rows, columns):
    windows = Views(mode='slide', crop=crop, stride=stride).windows(*size)
    assert [(y.start, x.start) for y, x in windows] == [(y, x) for y in rows for x in columns]
    count = torch.zeros(size)
    for y, x in windows:
        assert count[y, x].shape == crop
        count[y, x] += 1
    assert count.min() >= 1


def test_the_default_stride_is_two_thirds_of_the_crop():
    assert Views(crop=(512, 768)).steps == (341, 512)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'mode': 'windows'}, "mode must be 'whole' or 'slide', got 'windows'"),
        ({'crop': 512}, 'crop must be two positive integers, got 512'),
        ({'crop': (512, 0)}, r'crop must be two positive integers, got \(512, 0\)'),
        ({'crop': None}, 'crop must be two positive integers, got None'),
        ({'resize': (512,)}, r'resize must be two positive integers, got \(512,\)'),
        ({'stride': (400.0, 400)}, r'stride must be two positive integers, got \(400\.0, 400\)'),
        ({'crop': (64, 64), 'stride': (64, 65)}, r'stride must be crop \(64, 64\) at most.*got \(64, 65\)'),
        ({'divisor': 0}, 'divisor must be a positive integer or None, got 0'),
        ({'scales': ()}, r'scales must be one positive number or more, got \(\)'),
        ({'scales': (1.0, -1)}, r'scales must be one positive number or more'),
        ({'scale': 2}, r'test could not be understood.*scale'),
    ],
)
def test_wrong_views_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        segmentor(test=arguments)


def test_one_window_that_covers_the_image_is_the_whole():
    image, _ = sample(70, 95)
    slide = segmentor(test=dict(mode='slide', crop=(70, 95))).eval()
    assert torch.equal(slide.probabilities(image), segmentor().eval().probabilities(image))


def test_windows_are_averaged_where_they_overlap():
    image, _ = sample(64, 100)
    task = segmentor(test=dict(mode='slide', crop=(64, 64), stride=(64, 32))).eval()
    whole = segmentor().eval()
    x = task.normalize(image[None])
    left, middle, right = (whole.logits(x[..., start : start + 64]) for start in (0, 32, 36))
    found = task.logits(x)
    torch.testing.assert_close(found[..., :32], left[..., :32])
    torch.testing.assert_close(found[..., 32:36], (left[..., 32:36] + middle[..., :4]) / 2)
    torch.testing.assert_close(found[..., 36:64], (left[..., 36:] + middle[..., 4:32] + right[..., :28]) / 3)
    torch.testing.assert_close(found[..., 96:], right[..., 60:])


def test_an_image_smaller_than_a_window_is_padded_with_its_mean():
    image, _ = sample(50, 90)
    task = segmentor(test=dict(mode='slide', crop=(64, 64), stride=(64, 64))).eval()
    x = task.normalize(image[None])
    found = task.logits(x)
    assert found.shape == (1, CLASSES, 50, 90)
    torch.testing.assert_close(found, task.logits(F.pad(x, (0, 0, 0, 14)))[..., :50, :])


@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_views_are_averaged_as_probabilities_of_the_images_pixels(mode):
    image, _ = sample(70, 95)
    window = dict(mode=mode, crop=(64, 64), stride=(50, 50))
    task = segmentor(test=dict(**window, resize=(190, 140), scales=(0.25, 0.5), flip=True, divisor=8)).eval()
    plain = segmentor(test=window).eval()
    total = 0
    for size in ((40, 48), (72, 96)):
        resized = F.interpolate(image[None].float(), size, mode='bilinear', antialias=True)
        for flips in (False, True):
            logits = plain.logits(plain.normalize(resized.flip(-1) if flips else resized))
            logits = logits.flip(-1) if flips else logits
            total = total + F.interpolate(logits, (70, 95), mode='bilinear').softmax(1)[0]
    found = task.probabilities(image)
    assert found.shape == (CLASSES, 70, 95)
    torch.testing.assert_close(found, total / 4)
    torch.testing.assert_close(found.sum(0), torch.ones(70, 95))
    assert torch.equal(task([image])[0]['mask'], found.argmax(0))


def test_a_mirrored_image_has_the_mirrored_classes_with_flips():
    image, _ = sample(64, 96)
    task = segmentor(test=dict(flip=True)).eval()
    mirrored = task.probabilities(image.flip(-1)).flip(-1)
    torch.testing.assert_close(mirrored, task.probabilities(image))


def test_predictions_do_not_depend_on_the_other_images():
    images, _ = batch((70, 95), (64, 33))
    task = segmentor().eval()
    together = task(images)
    for image, prediction in zip(images, together, strict=True):
        assert torch.equal(task([image])[0]['mask'], prediction['mask'])


def test_images_may_be_floats_and_are_left_as_they_are():
    image, _ = sample(64, 64)
    task = segmentor(test=dict(scales=(0.5,))).eval()
    before = image.clone()
    assert torch.equal(task.probabilities(image), task.probabilities(image.float()))
    assert torch.equal(image, before)
    with pytest.raises(ValueError, match=r'Expected images \(3, H, W\)'):
        task.probabilities(image[:1])


# The whole


def test_bfloat16_autocast():
    task = segmentor('UPerHead', auxiliary=[dict(type='FCNHead', channels=8)]).train()
    images, targets = batch((64, 64), (40, 50))
    with torch.autocast('cpu', torch.bfloat16):
        losses = task(images, targets, mode='loss')
        (losses['loss_segmentation'] + losses['loss_auxiliary']).backward()
        probabilities = task.eval().probabilities(images[0])
    assert {losses[name].dtype for name in losses} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in task.parameters())
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, task.probabilities(images[0]), rtol=0.1, atol=0.02)


def test_channels_last_gives_the_same():
    images, targets = batch((64, 64), (40, 50))
    plain, last = (segmentor('UPerHead', channels_last=flag) for flag in (False, True))
    assert last.head.fuse[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images, targets, mode='loss'), plain(images, targets, mode='loss'))
    torch.testing.assert_close(last.eval().probabilities(images[0]), plain.eval().probabilities(images[0]))


def test_a_segmentor_is_built_from_a_config_without_memory():
    config = dict(
        type='Segmentor',
        backbone={**BACKBONES['4 to 32'], 'device': 'meta'},
        neck=dict(type='FPN', out_channels=8),
        head=dict(type='SemanticFPNHead', num_classes=CLASSES),
        auxiliary=[dict(type='FCNHead', level=2)],
        test=dict(resize=[2048, 512]),
    )
    with torch.device('meta'):
        task = MODELS.build(config)
    assert isinstance(task, Segmentor)
    assert {p.device.type for p in task.parameters()} == {'meta'}


def test_wrong_parts_are_named():
    images, targets = batch((64, 64))
    targets[0]['mask'] = targets[0]['mask'][:, :50]
    with pytest.raises(ValueError, match=r'mask of 0\.png must be \(64, 64\), got \(64, 50\)'):
        segmentor()(images, targets, mode='loss')
    with pytest.raises(ValueError, match='The head has 5 classes, an auxiliary one 4'):
        segmentor(auxiliary=[dict(type='FCNHead', num_classes=4)])


def test_the_levels_of_a_backbone_are_what_a_head_is_made_for():
    info = Features(**BACKBONES['16 to 64']).feature_info
    assert isinstance(info, FeatureInfo)
    assert SegFormerHead(info, 2, channels=8).projections[0].in_channels == info.channels()[0]


def test_a_segmentor_learns_an_image_by_heart():
    torch.manual_seed(0)
    head = dict(type='UPerHead', num_classes=3, channels=32)
    task = Segmentor(dict(name='van_b0'), head, auxiliary=[dict(type='FCNHead', level=2, channels=16)])
    image = torch.full((3, 64, 64), 90, dtype=torch.uint8)
    mask = torch.zeros(64, 64, dtype=torch.int64)
    image[:, 8:40, 12:36], mask[8:40, 12:36] = 200, 1
    image[1, 32:60, 40:60], mask[32:60, 40:60] = 10, 2
    mask[:2] = 255
    optimizer = torch.optim.AdamW(task.parameters(), 2e-3)
    for _ in range(40):
        losses = task.train()([image], [{'mask': mask}], mode='loss')
        optimizer.zero_grad()
        (losses['loss_segmentation'] + losses['loss_auxiliary']).backward()
        optimizer.step()
    assert losses['accuracy'] > 97
    right = (task.eval()([image])[0]['mask'] == mask)[mask != 255]
    assert right.float().mean() > 0.9
