"""`zoo.fuse` merges every BatchNorm that it safely can, says which, and changes no result."""

import copy
import pickle

import pytest
import timm
import torch
from conftest import TINY, tiny
from torch import nn
from torch.nn import functional as F

import zoo
from zoo.backbones.layers import BatchNorm, PaddedConv2d

TOLERANCE = 1e-12  # relative, float64
SIZES = ((64, 64), (70, 99))


def with_statistics(model):
    """The model in eval mode, with BatchNorms that do something: as trained, no mean is 0 and no variance 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return model.eval()


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)]


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


def require_same(fused, model, *sizes, in_chans=3, tolerance=TOLERANCE):
    dtype = next(model.parameters()).dtype
    for size in sizes:
        x = torch.randn(2, in_chans, *size, dtype=dtype)
        with torch.inference_mode():
            assert relative_error(fused(x), model(x)) < tolerance
            if hasattr(model, 'forward_intermediates'):
                maps = fused.forward_intermediates(x, intermediates_only=True)
                for got, want in zip(maps, model.forward_intermediates(x, intermediates_only=True), strict=True):
                    assert relative_error(got, want) < tolerance


@pytest.mark.parametrize('name', TINY)
def test_every_family_is_merged_and_computes_the_same(name):
    model = with_statistics(tiny(name, dtype=torch.float64))
    before = copy.deepcopy(model.state_dict())
    fused = zoo.fuse(model)
    require_same(fused, model, *SIZES)
    merged, left = [merge.norm for merge in fused.fusion.merged], list(fused.fusion.left)
    assert sorted([*merged, *left]) == sorted(norms(model))
    assert norms(fused) == left
    assert not fused.training
    assert fused.fusion.difference < TOLERANCE
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ('name', 'before', 'after', 'merges'),
    [('shvit_s1', 471, 174, 74), ('shvit_s2', 471, 174, 74), ('shvit_s3', 521, 192, 82), ('shvit_s4', 635, 234, 100)],
)
def test_shvit_is_merged_whole(name, before, after, merges):
    model = with_statistics(timm.create_model(name, dtype=torch.float64))
    fused = zoo.fuse(model)
    assert (len(model.state_dict()), len(fused.state_dict())) == (before, after)
    assert len(fused.fusion.merged) == merges == len(norms(model))
    assert not fused.fusion.left
    require_same(fused, model, *SIZES)
    assert isinstance(fused.stages[0].blocks[0].conv, nn.Conv2d)  # its shortcut is in the kernel
    assert isinstance(fused.head, nn.Linear)


@pytest.mark.parametrize(
    'name',
    [
        'efficientvit_m0',  # its own fuse() makes float32 layers
        'shvit_s1_distilled',
        'halonet26t_dynamic',
        'resnet18',
        'mobilenetv3_small_100',
        'repvgg_a0',  # branches
        'levit_128s',  # BatchNorm of tokens
        'maxvit_pico_rw_256',  # BatchNorm before a convolution too; takes images of its own size only
    ],
)
def test_models_of_timm_compute_the_same(name):
    model = with_statistics(timm.create_model(name, dtype=torch.float64))
    fused = zoo.fuse(model)
    assert len(fused.fusion.merged) >= 20
    sizes = [model.pretrained_cfg['input_size'][1:]] if name in ('levit_128s', 'maxvit_pico_rw_256') else SIZES
    require_same(fused, model, *sizes)


@pytest.mark.parametrize('name', ['davit_tiny', 'crossvit_tiny_240', 'mambaout_femto'])
def test_where_nothing_can_be_merged_the_report_says_so(name):
    model = timm.create_model(name)
    fused = zoo.fuse(model)
    assert str(fused.fusion) == 'Nothing to merge: the model has no BatchNorm.'
    for (key, got), (same, want) in zip(fused.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == same
        assert torch.equal(got, want)


@pytest.mark.parametrize('name', ['shvit_s1', 'van_b0', 'biformer_tiny'])
def test_features_are_the_same(name):
    arguments = TINY.get(name, {})
    model = with_statistics(timm.create_model(name, features_only=True, dtype=torch.float64, **arguments))
    fused = zoo.fuse(model)
    assert fused.fusion.merged
    x = torch.randn(2, 3, 70, 99, dtype=torch.float64)
    for got, want in zip(fused(x), model(x), strict=True):
        assert relative_error(got, want) < TOLERANCE


def test_float32_and_bfloat16_models_stay_what_they_are():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        model = with_statistics(timm.create_model('shvit_s1')).to(dtype)
        fused = zoo.fuse(model)
        assert {p.dtype for p in fused.parameters()} == {dtype}
        require_same(fused, model, (64, 64), tolerance=tolerance)


def test_one_channel_and_no_classifier_are_merged_too():
    model = with_statistics(tiny('van_b0', in_chans=1, num_classes=0, dtype=torch.float64))
    require_same(zoo.fuse(model), model, *SIZES, in_chans=1)


def test_a_model_that_has_kept_biases_of_its_last_run_is_copied():
    model = timm.create_model('efficientvit_m0').eval()
    x = torch.randn(1, 3, 224, 224)
    want = model(x)  # with gradients: what EfficientViT keeps then can't be deep-copied
    assert relative_error(zoo.fuse(model)(x), want) < 1e-4


class Plain(nn.Module):
    """Layers a to d with a rule of how they are run."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(*arguments, **more):
    return nn.Conv2d(*arguments, **more)


def merged_names(run, **layers):
    model = with_statistics(Plain(run, **layers).double())
    fused = zoo.fuse(model)
    for size in (*SIZES, (33, 47)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert relative_error(fused(x), model(x)) < TOLERANCE
    return [(merge.norm, merge.into) for merge in fused.fusion.merged], fused.fusion.left


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('affine', [False, True])
def test_a_norm_is_merged_into_the_convolution_before_it(bias, groups, affine):
    a = nn.Sequential(conv(3, 4, 1), conv(4, 6, 3, 2, 1, groups=groups, bias=bias), nn.BatchNorm2d(6, affine=affine))
    assert merged_names(lambda m, x: m.a(x), a=a)[0] == [('a.2', 'a.1')]


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('kernel', [1, 3])
def test_a_norm_is_merged_into_an_unpadded_convolution_after_it(bias, groups, kernel):
    b = conv(3, 6, kernel, groups=groups, bias=bias)
    assert merged_names(lambda m, x: m.b(m.a(x)), a=nn.BatchNorm2d(3), b=b)[0] == [('a', 'b')]


def test_norms_on_both_sides_of_a_convolution_are_merged_into_it():
    layers = dict(a=nn.BatchNorm2d(3), b=conv(3, 5, 1), c=nn.BatchNorm2d(5), d=nn.BatchNorm2d(5))
    assert merged_names(lambda m, x: m.d(m.c(m.b(m.a(x)))), **layers)[0] == [('a', 'b'), ('c', 'b'), ('d', 'b')]


def test_a_norm_before_padding_is_left():
    for b in (conv(3, 4, 3, padding=1), conv(3, 4, 3, padding='same'), PaddedConv2d(3, 4, 2, 2)):
        merged, left = merged_names(lambda m, x: m.b(m.a(x)), a=nn.BatchNorm2d(3), b=b)
        assert not merged
        assert 'pads' in left['a']


def test_a_norm_behind_padding_of_the_map_at_some_sizes_is_left():
    def run(m, x):
        x = m.a(x)
        return m.b(F.pad(x, (0, x.shape[3] % 2)) if x.shape[3] % 2 else x)

    assert not merged_names(run, a=nn.BatchNorm2d(3), b=conv(3, 4, 1))[0]


def test_what_another_path_uses_is_left():
    layers = dict(a=conv(3, 3, 1), b=nn.BatchNorm2d(3), c=conv(3, 3, 1))
    for run in (
        lambda m, x: (y := m.a(x)) + m.b(y),
        lambda m, x: m.b((y := m.a(x)).relu_()) + y,
        lambda m, x: m.b(m.a(x)) * m.a(x + 1),
        lambda m, x: m.b(m.a(x)) + m.b(x),
        lambda m, x: m.b(m.a(x).sin()) + (m.c(x)),
        lambda m, x: (y := m.b(x)) + m.c(y),
    ):
        assert not merged_names(run, **copy.deepcopy(layers))[0]


def test_what_is_handed_out_is_left():
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 4, 1), nn.BatchNorm2d(4)

        def forward_intermediates(self, x):
            return [self.a(x)]

        def forward(self, x):
            return self.b(self.a(x))

    model = with_statistics(Tapped())
    fused = zoo.fuse(model)
    assert not fused.fusion.merged
    assert list(fused.fusion.left) == ['b']


def test_a_weight_that_another_layer_shares_stays_its_own():
    def run(m, x):
        return m.b(m.a(x)) + m.c(x)

    a, c = conv(3, 4, 1), conv(3, 4, 1)
    c.weight = a.weight
    assert merged_names(run, a=a, b=nn.BatchNorm2d(4), c=c)[0] == [('b', 'a')]


def test_norms_that_are_not_of_the_channels_are_left():
    tokens = dict(a=nn.Linear(3, 4), b=nn.BatchNorm1d(64 * 64))
    model = with_statistics(Plain(lambda m, x: m.b(m.a(x.flatten(2).mT)), **tokens))
    fused = zoo.fuse(model, images=torch.randn(2, 3, 64, 64))
    assert 'axis' in fused.fusion.left['b']
    own = merged_names(lambda m, x: m.b(m.a(x)), a=conv(3, 4, 1), b=nn.BatchNorm2d(4, track_running_stats=False))
    assert own == ([], {'b': "it normalises by the images' own statistics"})


def test_a_channels_last_norm_is_merged_into_a_linear():
    def run(m, x):
        return m.d(m.c(m.b(m.a(x.permute(0, 2, 3, 1))).relu()))

    layers = dict(a=nn.Linear(3, 4), b=BatchNorm(4), c=BatchNorm(4), d=nn.Linear(4, 2))
    assert merged_names(run, **layers)[0] == [('b', 'a'), ('c', 'd')]


def test_dropout_between_is_nothing_in_evaluation():
    layers = dict(a=conv(3, 4, 1), b=nn.Dropout(0.5), c=nn.BatchNorm2d(4))
    assert merged_names(lambda m, x: m.c(m.b(m.a(x))), **layers)[0] == [('c', 'a')]


def test_the_report_prints_as_a_table_and_goes_with_the_model(tmp_path):
    model = with_statistics(timm.create_model('shvit_s1'))
    fused = zoo.fuse(model)
    lines = str(fused.fusion).splitlines()
    assert lines[0].startswith('74 BatchNorms merged, 0 left; outputs differ by ')
    assert any('patch_embed.0.bn ' in line and 'into patch_embed.0 (Conv2dNorm.fuse)' in line for line in lines)
    again = pickle.loads(pickle.dumps(fused))
    assert again.fusion == fused.fusion
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), fused(x))
    compiled = torch.compile(fused, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), fused(x), rtol=1e-4, atol=1e-4)


def test_a_merge_that_changes_results_is_refused():
    class Wrong(nn.Sequential):
        def fuse(self):
            return self[0]  # forgets the norm

    with pytest.raises(RuntimeError, match='The merged Plain differs from the original by'):
        zoo.fuse(with_statistics(Plain(lambda m, x: m.a(x), a=Wrong(conv(3, 4, 1), nn.BatchNorm2d(4)))))
    assert torch.get_default_dtype() == torch.float32


def test_models_without_weights_or_that_refuse_images_are_refused():
    with pytest.raises(ValueError, match='meta device'):
        zoo.fuse(timm.create_model('shvit_s1', device='meta'))
    with pytest.raises(ValueError, match=r'Linear refuses random images; pass images='):
        zoo.fuse(nn.Linear(5, 5))
    odd = nn.Sequential(conv(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 48 * 40, 2))
    with pytest.raises(ValueError, match='Sequential refuses random images'):
        zoo.fuse(odd)
    assert len(zoo.fuse(odd, images=torch.randn(1, 3, 48, 40)).fusion.merged) == 1
