"""Necks: levels as feature_info tells at any image size, the papers' arithmetic, and errors that say what is wrong."""

import inspect
import math
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from zoo.train.dense.features import levels
from zoo.train.dense.necks import FPN, HRFPN, PAFPN, BiFPN, BiFPNLayer, ChannelMapper, SimpleFPN
from zoo.train.dense.task import DenseTask
from zoo.train.registry import MODELS

NECKS = {
    'FPN': FPN,
    'PAFPN': PAFPN,
    'BiFPN': BiFPN,
    'ChannelMapper': ChannelMapper,
    'SimpleFPN': SimpleFPN,
    'HRFPN': HRFPN,
}
PAGE = Path(__file__).parents[2] / 'docs' / 'necks.md'
CHANNELS, STRIDES = (6, 10, 14), (8, 16, 32)
INFO = levels(CHANNELS, STRIDES)


@pytest.fixture(scope='module')
def backbones():
    models = {name: timm.create_model(name, features_only=True) for name in ('van_b0', 'shvit_s1', 'resnet18')}
    models['vit'] = timm.create_model(
        'vit_tiny_patch16_224',
        features_only=True,
        depth=2,
        out_indices=(1,),
        dynamic_img_size=True,
        dynamic_img_pad=True,
    )
    return {name: model.eval() for name, model in models.items()}


def maps_of(height, width, channels=CHANNELS, strides=STRIDES, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]
    return [torch.randn(batch, c, *size, generator=generator) for c, size in zip(channels, sizes, strict=True)]


@torch.no_grad()
def make_centred(conv, weight):
    """The convolution is multiplication by a number then, at every stride."""
    conv.weight.zero_()
    middle = conv.kernel_size[0] // 2
    conv.weight[:, :, middle, middle] = weight * torch.eye(conv.out_channels)
    conv.bias.zero_()


LEVELS = [
    ('van_b0', FPN, {}),
    ('van_b0', FPN, {'in_levels': (1, 2, 3), 'extra_levels': 2, 'extra': 'conv_on_input', 'relu_before_extra': True}),
    ('van_b0', FPN, {'strides': (8, 16, 32, 64, 128), 'extra': 'conv_on_output', 'norm': 'bn'}),
    ('van_b0', FPN, {'strides': (4, 16)}),
    ('van_b0', PAFPN, {'extra_levels': 1, 'norm': 'gn'}),
    ('van_b0', BiFPN, {'strides': (8, 16, 32, 64, 128)}),
    ('van_b0', ChannelMapper, {'extra_levels': 1}),
    ('van_b0', HRFPN, {}),
    ('van_b0', HRFPN, {'strides': (4, 8, 16, 32, 64), 'pool': 'max', 'norm': 'ln'}),
    ('shvit_s1', FPN, {'extra_levels': 2}),
    ('shvit_s1', PAFPN, {'strides': (16, 32, 64, 128), 'extra': 'conv_on_input'}),
    ('shvit_s1', BiFPN, {'extra_levels': 1}),
    ('shvit_s1', HRFPN, {'strides': (16, 64)}),
    ('resnet18', FPN, {'strides': (4, 8, 16, 32, 64)}),
    ('resnet18', PAFPN, {'in_levels': (-3, -2, -1)}),
    ('resnet18', BiFPN, {}),
    ('resnet18', ChannelMapper, {'strides': (8, 16, 32, 64), 'norm': None}),
    ('resnet18', HRFPN, {'in_levels': (1, 2, 3, 4), 'strides': (8,)}),
    ('vit', SimpleFPN, {'strides': (16, 32, 64, 128)}),
]


def check_levels(neck, maps, height, width):
    info = neck.feature_info
    assert [x.shape[1] for x in maps] == info.channels()
    sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in info.reduction()]
    assert [tuple(x.shape[2:]) for x in maps] == sizes


@pytest.mark.parametrize(('backbone', 'kind', 'arguments'), LEVELS)
@torch.no_grad()
def test_levels_are_as_feature_info_tells_at_odd_sizes(backbones, backbone, kind, arguments):
    model = backbones[backbone]
    neck = kind(model.feature_info, out_channels=32, **arguments).eval()
    for height, width in ((67, 97), (129, 33)):
        check_levels(neck, neck(model(torch.rand(1, 3, height, width))), height, width)
    assert neck.feature_info.channels() == [32] * len(neck.feature_info)
    if 'strides' in arguments:
        assert neck.feature_info.reduction() == list(arguments['strides'])


@pytest.mark.parametrize(
    ('backbone', 'kind', 'arguments'),
    [
        ('shvit_s1', FPN, {'strides': (4, 8, 16, 32, 64)}),
        ('shvit_s1', FPN, {'strides': (8, 16, 32, 64, 128), 'extra': 'conv_on_input'}),
        ('shvit_s1', PAFPN, {'strides': (4, 8, 16, 32)}),
        ('shvit_s1', BiFPN, {'strides': (8, 16, 32, 64, 128)}),
        ('shvit_s1', ChannelMapper, {'strides': (8, 16, 32, 64)}),
        ('shvit_s1', HRFPN, {'strides': (4, 8, 16)}),
        ('vit', SimpleFPN, {}),
        ('vit', SimpleFPN, {'strides': (8, 16, 32, 64)}),
    ],
)
@torch.no_grad()
def test_finer_levels_are_added(backbones, backbone, kind, arguments):
    model = backbones[backbone]
    neck = kind(model.feature_info, out_channels=32, **arguments).eval()
    check_levels(neck, neck(model(torch.rand(1, 3, 80, 112))), 80, 112)  # the stride of 16 divides these
    assert neck.feature_info.reduction() == list(arguments.get('strides', (4, 8, 16, 32)))
    covering = neck(model(torch.rand(1, 3, 67, 97)))  # finer levels end where the map of 5 x 7 does
    finer = [stride for stride in neck.feature_info.reduction() if stride < 16]
    for stride, x in zip(finer, covering, strict=False):
        assert x.shape[2:] == (5 * 16 // stride, 7 * 16 // stride)


def test_one_config_serves_backbones_of_other_strides(backbones):
    detector = {
        name: MODELS.build({'type': 'FPN', 'strides': (8, 16, 32, 64, 128), 'feature_info': model.feature_info})
        for name, model in backbones.items()
        if name != 'vit'
    }
    assert {tuple(neck.feature_info.reduction()) for neck in detector.values()} == {(8, 16, 32, 64, 128)}
    assert {name: (neck.finer, neck.in_strides, neck.coarser) for name, neck in detector.items()} == {
        'van_b0': (0, (8, 16, 32), 2),
        'shvit_s1': (1, (16, 32, 64), 1),
        'resnet18': (0, (8, 16, 32), 2),
    }


ARGUMENTS = [
    (FPN, {'strides': (2, 4, 8, 16, 32, 64), 'extra': 'pool'}),
    (FPN, {'extra_levels': 2, 'extra': 'conv_on_input', 'norm': 'bn', 'relu_before_extra': True}),
    (FPN, {'extra_levels': 2, 'extra': 'conv_on_output', 'norm': 'gn'}),
    (PAFPN, {'strides': (4, 8, 16, 32, 64), 'extra': 'conv_on_input', 'norm': 'ln'}),
    (BiFPN, {'strides': (4, 8, 16, 32, 64)}),
    (BiFPN, {'in_levels': (1, 2), 'repeats': 1}),
    (ChannelMapper, {'strides': (4, 8, 16, 32, 64, 128)}),
    (SimpleFPN, {'strides': (8, 16, 32, 64, 128)}),
    (HRFPN, {'strides': (8, 16), 'norm': 'bn'}),
]


@pytest.mark.parametrize(('kind', 'arguments'), ARGUMENTS)
def test_gradients_reach_every_parameter_and_map(kind, arguments):
    torch.manual_seed(0)
    channels = (8, 8, 16)
    neck = kind(levels(channels, STRIDES), out_channels=32, **arguments)
    maps = [x.requires_grad_() for x in maps_of(131, 163, channels)]
    generator = torch.Generator().manual_seed(1)
    sum((x * torch.randn(x.shape, generator=generator)).sum() for x in neck(maps)).backward()
    assert [name for name, p in neck.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert [level for level, x in enumerate(maps) if x.grad is not None] == list(neck.in_levels)


@pytest.mark.parametrize(('height', 'width'), [(128, 192), (131, 67)])
@pytest.mark.parametrize('extra', ['pool', 'conv_on_input', 'conv_on_output'])
def test_fpn_is_torchvisions(height, width, extra):
    torch.manual_seed(0)
    count = 1 if extra == 'pool' else 2
    channels = (6, 10, 12 if extra == 'conv_on_output' else 14)  # torchvision's P6 is of P5 where widths are equal
    ours = FPN(levels(channels, STRIDES), 12, extra_levels=count, extra=extra, relu_before_extra=extra != 'pool')
    blocks = LastLevelMaxPool() if extra == 'pool' else LastLevelP6P7(channels[-1], 12)
    theirs = FeaturePyramidNetwork(list(channels), 12, blocks)
    for i in range(3):
        theirs.inner_blocks[i][0].load_state_dict(ours.laterals.convs[i].state_dict())
        theirs.layer_blocks[i][0].load_state_dict(ours.smooth[i].state_dict())
    if extra != 'pool':
        blocks.p6.load_state_dict(ours.extra.convs[0].state_dict())
        blocks.p7.load_state_dict(ours.extra.convs[1].state_dict())
    maps = maps_of(height, width, channels)
    expected = theirs(OrderedDict((str(i), x) for i, x in enumerate(maps))).values()
    for a, b in zip(ours(maps), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_further_extra_convolutions_come_after_a_relu_if_asked_for():
    torch.manual_seed(0)
    neck = FPN(INFO, 8, extra_levels=2, extra='conv_on_input')
    same = FPN(INFO, 8, extra_levels=2, extra='conv_on_input', relu_before_extra=True)
    same.load_state_dict(neck.state_dict())
    maps = maps_of(256, 256)
    (*_, p6, p7), (*_, p6_too, p7_too) = neck(maps), same(maps)
    torch.testing.assert_close(p6, neck.extra.convs[0](maps[-1]))
    torch.testing.assert_close(p6, p6_too)
    torch.testing.assert_close(p7, neck.extra.convs[1](p6))
    torch.testing.assert_close(p7_too, neck.extra.convs[1](p6.relu()))


@torch.no_grad()
def test_finer_levels_of_fpn_are_transposed_convolutions_of_the_finest_map():
    neck = FPN(levels((4,), (16,)), 4, strides=(4, 8, 16))
    for conv in (*neck.laterals.convs, *neck.smooth):
        make_centred(conv, 1.0)
    taps = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for layer in neck.laterals.finer:
        layer.weight.copy_(torch.eye(4)[..., None, None] * taps)
    (x,) = maps_of(48, 80, (4,), (16,))
    twice = torch.kron(x, taps)
    expected = [torch.kron(twice, taps), twice, x]
    for i in (1, 0):
        expected[i] = expected[i] + torch.kron(expected[i + 1], torch.ones(2, 2))  # from the coarser level
    for a, b in zip(neck([x]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_pafpn_goes_up_again_as_in_the_paper():
    neck = PAFPN(levels((3, 3, 3), STRIDES), 3)
    for conv in (*neck.laterals.convs, *neck.smooth):
        make_centred(conv, 1.0)
    for down, fuse in zip(neck.down, neck.fuse, strict=True):
        make_centred(down, -0.5)
        make_centred(fuse, 3.0)
    c3, c4, c5 = maps_of(67, 97, (3, 3, 3))  # 9 x 13, 5 x 7, 3 x 4
    p5 = c5
    p4 = c4 + p5.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :5, :7]
    p3 = c3 + p4.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :9, :13]
    n3 = p3
    n4 = (3 * (p4 + (-0.5 * n3[:, :, ::2, ::2]).relu())).relu()
    n5 = (3 * (p5 + (-0.5 * n4[:, :, ::2, ::2]).relu())).relu()
    for a, b in zip(neck([c3, c4, c5]), (n3, n4, n5), strict=True):
        torch.testing.assert_close(a, b)


def test_bifpn_layer_is_that_of_the_paper():
    torch.manual_seed(0)
    layer = BiFPNLayer(8, (2, 2, 2)).eval()
    for fuse in (*layer.down, *layer.up):
        nn.init.uniform_(fuse.weight, -0.5, 1.5)
    maps = maps_of(67, 97, (8,) * 4, (8, 16, 32, 64))

    def fused(fuse, *inputs):
        w = fuse.weight.clamp(min=0)
        x = sum(w[i] * x for i, x in enumerate(inputs)) / (w.sum() + 0.0001)
        depthwise, (pointwise, norm) = fuse.conv
        assert depthwise.groups == 8
        assert depthwise.bias is None
        assert (norm.eps, norm.momentum) == (1e-3, 0.01)
        return norm(pointwise(depthwise(x * x.sigmoid())))

    def up(x, like):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : like.shape[2], : like.shape[3]]

    def down(x):
        return F.max_pool2d(x, 3, stride=2, padding=1)

    p3, p4, p5, p6 = maps
    p5_td = fused(layer.down[2], p5, up(p6, p5))
    p4_td = fused(layer.down[1], p4, up(p5_td, p4))
    p3_out = fused(layer.down[0], p3, up(p4_td, p3))
    p4_out = fused(layer.up[0], p4, p4_td, down(p3_out))
    p5_out = fused(layer.up[1], p5, p5_td, down(p4_out))
    p6_out = fused(layer.up[2], p6, down(p5_out))
    for a, b in zip(layer(maps), (p3_out, p4_out, p5_out, p6_out), strict=True):
        torch.testing.assert_close(a, b)


def test_fusion_weights_are_shares():
    neck = BiFPN(INFO, 16, repeats=2)
    layers = [fuse for layer in neck.layers for fuse in (*layer.down, *layer.up)]
    assert [len(fuse.weight) for fuse in layers] == [2, 2, 3, 2] * 2
    for fuse in layers:
        assert torch.allclose(fuse.weights(), torch.full_like(fuse.weight, 1 / len(fuse.weight)), atol=1e-4)
    with torch.no_grad():
        layers[2].weight.copy_(torch.tensor([3.0, -2.0, 1.0]))
    torch.testing.assert_close(layers[2].weights(), torch.tensor([0.75, 0.0, 0.25]), atol=1e-4, rtol=0)
    assert 1 - 1e-4 < layers[2].weights().sum() < 1


def test_bifpns_coarser_levels_are_pooled_from_the_last_map():
    neck = BiFPN(INFO, 16, extra_levels=2).eval()
    neck.layers = nn.Identity()
    maps = maps_of(255, 255)
    *_, p5, p6, p7 = neck(maps)
    conv, norm = neck.laterals.convs[-1]
    assert isinstance(norm, nn.BatchNorm2d)
    torch.testing.assert_close(p5, norm(conv(maps[-1])))
    torch.testing.assert_close(p6, F.max_pool2d(p5, 3, 2, 1))
    torch.testing.assert_close(p7, F.max_pool2d(p6, 3, 2, 1))


@pytest.mark.parametrize('kind', [FPN, PAFPN, BiFPN])
def test_levels_need_not_double(kind):
    neck = kind(levels((4, 4, 4, 4), (4, 16, 16, 48)), 8).eval()  # 4 and 3 times as coarse, and the same again
    maps = maps_of(131, 67, (4,) * 4, (4, 16, 16, 48))
    check_levels(neck, neck(maps), 131, 67)


@pytest.mark.parametrize('kind', [PAFPN, BiFPN])
def test_backbones_that_drop_odd_rows_are_served(kind):
    neck = kind(INFO, 8).eval()
    maps = [torch.randn(1, c, *size) for c, size in zip(CHANNELS, ((9, 13), (4, 6), (2, 3)), strict=True)]
    assert [x.shape[2:] for x in neck(maps)] == [x.shape[2:] for x in maps]
    with pytest.raises(ValueError, match=r'A level has 6 x 8 pixels, where the finer one leads to \(5, 7\)'):
        neck([maps[0], torch.randn(1, 10, 6, 8), maps[2]])


def test_channel_mapper_takes_each_map_by_itself():
    torch.manual_seed(0)
    neck = ChannelMapper(INFO, 32, extra_levels=2)
    maps = maps_of(67, 97)
    outputs = neck(maps)
    for x, (conv, norm), output in zip(maps, neck.laterals.convs, outputs, strict=False):
        assert isinstance(norm, nn.GroupNorm)
        assert norm.num_groups == 32
        torch.testing.assert_close(output, norm(torch.einsum('bchw,oc->bohw', x, conv.weight[:, :, 0, 0])))
    torch.testing.assert_close(outputs[3], neck.extra.convs[0](maps[-1]))
    torch.testing.assert_close(outputs[4], neck.extra.convs[1](outputs[3]))
    changed = neck([maps[0] + 1, *maps[1:]])
    assert [torch.equal(a, b) for a, b in zip(outputs, changed, strict=True)] == [False, True, True, True, True]


def test_simple_fpn_is_vitdets():
    torch.manual_seed(0)
    width, out = 16, 8
    neck = SimpleFPN(levels((width, width), (16, 16)), out, strides=(4, 8, 16, 32, 64))
    first, last = maps_of(80, 112, (width, width), (16, 16))
    weights = neck.state_dict()

    def layer_norm(x, key):
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weights[f'{key}.weight'], weights[f'{key}.bias'], 1e-6)
        return x.permute(0, 3, 1, 2)

    def twice(x, key):
        return F.conv_transpose2d(x, weights[f'{key}.weight'], weights[f'{key}.bias'], stride=2)

    def projected(x, level):
        x = layer_norm(F.conv2d(x, weights[f'project.{level}.0.0.weight']), f'project.{level}.0.1')
        return layer_norm(F.conv2d(x, weights[f'project.{level}.1.0.weight'], padding=1), f'project.{level}.1.1')

    p2 = twice(last, 'resample.0.0')
    p2 = twice(F.gelu(layer_norm(p2, 'resample.0.1')), 'resample.0.3')
    p3 = twice(last, 'resample.1.0')
    p5 = F.max_pool2d(F.pad(last, (0, 1, 0, 1), value=-math.inf), 2, 2)[:, :, :3, :4]
    expected = [projected(x, level) for level, x in enumerate((p2, p3, last, p5))]
    expected.append(expected[-1][:, :, ::2, ::2])
    for a, b in zip(neck([first, last]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_simple_fpn_of_vit_b_has_as_many_parameters_as_vitdets():
    dim, out = 768, 256
    up = (dim * dim // 2 * 4 + dim // 2) * 2 + dim + (dim // 2 * dim // 4 * 4 + dim // 4)  # two of the first, its norm
    project = sum(width * out for width in (dim // 4, dim // 2, dim, dim)) + 4 * (9 * out * out + 4 * out)
    assert sum(p.numel() for p in SimpleFPN(levels((dim,), (16,)), out).parameters()) == up + project


@pytest.mark.parametrize('pool', ['avg', 'max'])
def test_hrfpn_mixes_all_maps_at_the_finest_and_pools(pool):
    torch.manual_seed(0)
    neck = HRFPN(INFO, 4, strides=(8, 16, 32), pool=pool)
    for conv in neck.smooth:
        make_centred(conv, 1.0)
    maps = maps_of(67, 97)
    same = [F.interpolate(x, size=(9, 13), mode='bilinear', align_corners=False) for x in maps]
    mixed = torch.einsum('bchw,oc->bohw', torch.cat(same, 1), neck.mix.weight[:, :, 0, 0])
    outputs = neck(maps)
    torch.testing.assert_close(outputs[0], mixed)
    reduce = {'avg': lambda x: x.mean((2, 3)), 'max': lambda x: x.amax((2, 3))}[pool]
    for output, factor in zip(outputs[1:], (2, 4), strict=True):
        for row in range(output.shape[2]):
            for column in range(output.shape[3]):
                window = mixed[:, :, row * factor :, column * factor :][:, :, :factor, :factor]
                torch.testing.assert_close(output[:, :, row, column], reduce(window))


@pytest.mark.parametrize(('norm', 'kind'), [('bn', nn.BatchNorm2d), ('gn', nn.GroupNorm), ('ln', LayerNorm2d)])
def test_norms_take_the_place_of_biases(norm, kind):
    for neck in (FPN, PAFPN, ChannelMapper, SimpleFPN, HRFPN):
        modules = [*neck(levels((32,), (16,)), 32, norm=norm, strides=(16,)).modules()]
        convs = [module for module in modules if isinstance(module, nn.Conv2d)]
        assert len(convs) == sum(isinstance(module, kind) for module in modules)
        assert not any(conv.bias is not None for conv in convs)


def test_weights_begin_by_xaviers_uniform_distribution():
    torch.manual_seed(0)
    neck = FPN(levels((64,), (16,)), 32, strides=(8, 16))
    for conv, inputs_and_outputs in (
        (neck.laterals.convs[0], 64 + 32),
        (neck.laterals.finer[0], 64 + 32),  # each pixel is made by one of the four taps
        (neck.smooth[0], 9 * (32 + 32)),
    ):
        bound = math.sqrt(6 / inputs_and_outputs)  # which thousands of weights come near
        assert 0.99 * bound < conv.weight.abs().max() <= bound
        assert conv.bias.abs().max() == 0
    exactly = torch.empty_like(neck.smooth[0].weight)
    torch.manual_seed(1)
    nn.init.xavier_uniform_(exactly)
    assert exactly.abs().max() <= bound < 1.01 * exactly.abs().max()
    depthwise = BiFPNLayer(512, (2,)).down[0].conv[0]
    assert 0.99 * math.sqrt(6 / 18) < depthwise.weight.abs().max() <= math.sqrt(6 / 18)


def test_a_task_hands_its_backbones_levels_to_its_necks():
    necks = [
        {'type': 'ChannelMapper', 'out_channels': 32, 'strides': (4, 8, 16, 32)},
        {'type': 'HRFPN', 'out_channels': 8},
    ]
    task = DenseTask({'name': 'van_b0'}, necks)
    assert (task.feature_info.channels(), task.feature_info.reduction()) == ([8], [4])
    (x,) = task.extract(torch.rand(1, 3, 64, 96))
    assert x.shape == (1, 8, 16, 24)


@pytest.mark.parametrize('name', NECKS)
def test_every_neck_is_built_from_the_registry(name):
    neck = MODELS.build({'type': name, 'feature_info': levels((64,) * 2, (8, 16)), 'out_channels': 32})
    assert type(neck) is NECKS[name]
    assert set(neck.feature_info.channels()) == {32}


@pytest.mark.parametrize(
    ('kind', 'arguments', 'message'),
    [
        (FPN, {'strides': (4, 8, 12)}, r'\(4, 8, 12\) can not be had from maps of strides \(8,\): .* 8\*2, 8\*4'),
        (FPN, {'strides': (2, 8, 16)}, r'levels to add are 8/2, 8/4, .* without a gap'),
        (FPN, {'strides': (64, 128)}, r"none of the maps' strides, which are \[8, 16, 32\]"),
        (FPN, {'strides': (16, 8)}, r'strides must be rising integers from 1 on, got \(16, 8\)'),
        (FPN, {'strides': ()}, r'strides must be rising integers from 1 on, got \(\)'),
        (FPN, {'strides': (8, 16), 'extra_levels': 1}, 'leave out extra_levels, got 1'),
        (FPN, {'strides': (16, 32), 'in_levels': (0, 1, 2)}, r'\(16, 32\) can not be had .* \(8, 16, 32\)'),
        (FPN, {'in_levels': (0, 3)}, r'some of the 3 of the backbone, by number, got \(0, 3\)'),
        (FPN, {'in_levels': (1, 0)}, r'in_levels must be rising'),
        (FPN, {'in_levels': ()}, r'in_levels must be rising'),
        (FPN, {'in_levels': (0, '1')}, r"in_levels must be some of .* got \(0, '1'\)"),
        (FPN, {'in_levels': 1}, 'in_levels must be some of .* got 1'),
        (FPN, {'extra_levels': -1}, 'extra_levels must be an integer of at least 0, got -1'),
        (FPN, {'extra_levels': 1, 'extra': 'on_input'}, "extra must be one of 'pool', .* got 'on_input'"),
        (FPN, {'extra_levels': 2, 'relu_before_extra': True}, 'relu_before_extra needs convolutions'),
        (FPN, {'norm': 'batch'}, "norm must be None or one of 'bn', 'gn', 'ln', got 'batch'"),
        (FPN, {'norm': 'gn', 'out_channels': 100}, 'divisible'),
        (FPN, {'out_channels': 0}, 'out_channels must be an integer of at least 1, got 0'),
        (FPN, {'out_channels': 64.0}, r'out_channels must be an integer of at least 1, got 64\.0'),
        (BiFPN, {'in_levels': (1,)}, 'needs at least two levels, got one, of stride 16'),
        (BiFPN, {'repeats': 0}, 'repeats must be an integer of at least 1, got 0'),
        (SimpleFPN, {'strides': (4, 16, 32)}, r'\(4, 16, 32\) can not be had from maps of strides \(32,\)'),
        (SimpleFPN, {'strides': (8, 16, 32)}, 'A map of 14 channels can not be halved 2 times'),
        (HRFPN, {'strides': (8, 20)}, r'\(8, 20\) must be multiples of 8'),
        (HRFPN, {'strides': (0, 8)}, r'strides must be rising integers from 1 on, got \(0, 8\)'),
        (HRFPN, {'strides': (3, 6)}, r'the first one, or a multiple of it, be 8'),
        (HRFPN, {'pool': 'sum'}, "pool must be 'avg' or 'max', got 'sum'"),
    ],
)
def test_what_can_not_be_had_is_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(INFO, **arguments)


def test_strides_that_do_not_divide_each_other_are_refused():
    for kind in (PAFPN, BiFPN):
        with pytest.raises(ValueError, match=r'Each stride must be a multiple of the one before, got \(8, 12\)'):
            kind(levels((4, 4), (8, 12)))


def test_feature_info_must_be_of_maps(backbones):
    model = timm.create_model('resnet18')
    with pytest.raises(TypeError, match='features_only=True, or of a neck, got list'):
        FPN(model.feature_info)


@pytest.mark.parametrize('kind', NECKS.values())
def test_maps_must_be_those_that_feature_info_told_of(kind):
    neck = kind(levels((8, 16, 32), STRIDES), 32, strides=(16, 32))
    good = maps_of(64, 64, (8, 16, 32))
    neck(good)
    expected = rf'{kind.__name__} expects maps \(B, C, H, W\) of 8, 16, 32 channels, got '
    for maps, got in (
        (good[1:], r'\(2, 16, 4, 4\), \(2, 32, 2, 2\)'),
        ([], 'none'),
        ([x.permute(0, 2, 3, 1) for x in good], r'\(2, 8, 8, 8\), \(2, 4, 4, 16\)'),
        ([x[0] for x in good], r'\(8, 8, 8\)'),
    ):
        with pytest.raises(ValueError, match=expected + got):
            neck(maps)


def test_the_documentations_example_runs():
    (code,) = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
    exec(compile(code, PAGE.name, 'exec'), {})


@pytest.mark.parametrize('name', NECKS)
def test_the_documentation_names_every_neck_and_argument(name):
    (row,) = re.findall(rf'^\| `{name}` \|.*$', PAGE.read_text(), re.MULTILINE)
    arguments = {*inspect.signature(NECKS[name]).parameters} - {'feature_info', 'out_channels', 'norm', 'kwargs'}
    if 'those of `FPN`' not in row:
        assert [argument for argument in arguments if f'`{argument}`' not in row] == []
