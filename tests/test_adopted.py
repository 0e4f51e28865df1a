"""Families that timm owns: official checkpoints of them, and what the zoo adds to their classes."""

import math
import re

import parity_rule as rule
import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models.byobnet import ByoBlockCfg
from torch.nn import functional as F

import zoo
from zoo.backbones import DistilledSHViT, HaloNet, catalogue
from zoo.backbones.halonet import HaloAttention

SIZES = ((32, 32), (33, 47), (97, 75))
EXACT = dict(rtol=0, atol=0)
ROUNDING = dict(rtol=1e-10, atol=1e-10)


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, dtype=torch.float64)


def created(name, **kwargs):
    return timm.create_model(name, dtype=torch.float64, **kwargs).eval()


def save(tmp_path, state_dict, wrapper=None):
    path = tmp_path / 'weights.pth'
    torch.save({wrapper: state_dict, 'epoch': 300} if wrapper else state_dict, path)
    return path


# --- official checkpoints


@pytest.fixture(scope='module')
def shvit_s1():
    return rule.checkpoint(rule.load_record('shvit__shvit_s1'))


def distilled(state_dict):
    """The state dict with a second classifier, as the authors' code names it when it distils."""
    more = {
        key: rule.tensor_for(f'head_dist.{key}', value.shape) for key, value in state_dict.items() if 'head.' in key
    }
    renamed = {key.replace('head.', 'head_dist.'): value for key, value in more.items()}
    return {**state_dict, **renamed}


def timms_to_official(name, rules):
    """The state dict of timm's model under the authors' keys, by rules written from timm's names."""
    state_dict = timm.create_model(name).state_dict()
    official = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        official[key] = value
    assert len(official) == len(state_dict)
    return state_dict, official


EFFICIENTVIT_RULES = [
    (r'^patch_embed\.conv(\d)\.', lambda m: f'patch_embed.{2 * int(m[1]) - 2}.'),
    (r'^stages\.0\.blocks\.', 'blocks1.'),
    (r'^stages\.(\d)\.blocks\.(\d+)', lambda m: f'blocks{int(m[1]) + 1}.{int(m[2]) + 3}'),
    (r'^stages\.(\d)\.downsample\.res1\.', lambda m: f'blocks{int(m[1]) + 1}.0.'),
    (r'^stages\.(\d)\.downsample\.patchmerge\.', lambda m: f'blocks{int(m[1]) + 1}.1.'),
    (r'^stages\.(\d)\.downsample\.res2\.', lambda m: f'blocks{int(m[1]) + 1}.2.'),
    (r'\.conv\.', '.c.'),
    (r'^head\.linear\.', 'head.l.'),
]
DAVIT_RULES = [
    (r'^stem\.conv\.', 'patch_embeds.0.proj.'),
    (r'^stem\.norm\.', 'patch_embeds.0.norm.'),
    (r'^stages\.(\d)\.downsample\.conv\.', r'patch_embeds.\1.proj.'),
    (r'^stages\.(\d)\.downsample\.', r'patch_embeds.\1.'),
    (r'^stages\.(\d)\.blocks\.', r'main_blocks.\1.'),
    (r'^head\.fc\.', 'head.'),
    (r'^head\.norm\.', 'norms.'),
    (r'\.cpe1\.', '.cpe.0.'),
    (r'\.cpe2\.', '.cpe.1.'),
]
MAMBAOUT_RULES = [
    (r'^stem\.', 'downsample_layers.0.'),
    (r'^stages\.(\d)\.downsample\.', r'downsample_layers.\1.'),
    (r'^stages\.(\d)\.blocks\.', r'stages.\1.'),
    (r'^head\.norm\.', 'norm.'),
    (r'^head\.pre_logits\.fc\.', 'head.fc1.'),
    (r'^head\.pre_logits\.norm\.', 'head.norm.'),
    (r'^head\.fc\.', 'head.fc2.'),
]
OFFICIAL = {
    'efficientvit_m0': EFFICIENTVIT_RULES,
    'efficientvit_m5': EFFICIENTVIT_RULES,
    'crossvit_tiny_240': [(r'^(pos_embed|cls_token)_', r'\1.')],
    'crossvit_9_dagger_240': [(r'^(pos_embed|cls_token)_', r'\1.')],
    'davit_tiny': DAVIT_RULES,
    'mambaout_femto': MAMBAOUT_RULES,
}


@pytest.mark.parametrize('name', OFFICIAL)
@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict'])
def test_the_authors_and_timms_keys_load_into_timms_model(name, wrapper, tmp_path):
    timms, official = timms_to_official(name, OFFICIAL[name])
    assert set(timms) != set(official)
    for state_dict in (timms, official):
        model = zoo.create_model(name, checkpoint=save(tmp_path, state_dict, wrapper))
        assert type(model).__module__.startswith('timm.')
        for key, value in model.state_dict().items():
            assert torch.equal(value, timms[key]), key


def test_buffers_that_efficientvit_computes_are_dropped(tmp_path):
    timms, official = timms_to_official('efficientvit_m0', EFFICIENTVIT_RULES)
    official['blocks1.0.mixer.m.attn.attention_bias_idxs'] = torch.zeros(49, 49, dtype=torch.long)
    model = zoo.create_model('efficientvit_m0', checkpoint=save(tmp_path, official, 'model'))
    assert torch.equal(model.head.linear.weight, timms['head.linear.weight'])


@pytest.mark.parametrize('side', [384, 512])
def test_the_large_shvit_takes_the_sizes_it_was_fine_tuned_at(side):
    model = timm.create_model('shvit_s4').eval()
    with torch.inference_mode():
        final, maps = model.forward_intermediates(torch.randn(1, 3, side, side))
    assert [x.shape[2:] for x in maps] == [(side // stride,) * 2 for stride in (16, 32, 64)]
    assert model.forward_head(final).shape == (1, 1000)


@pytest.mark.parametrize('name', ['shvit_s1', 'davit_tiny', 'efficientvit_m0', 'mambaout_femto'])
@pytest.mark.parametrize('size', SIZES)
def test_features_of_timms_models_are_a_pyramid_at_any_size(name, size):
    model = zoo.create_model(name, features_only=True).eval()
    with torch.inference_mode():
        maps = model(torch.randn(2, 3, *size))
    assert [x.shape[1] for x in maps] == model.feature_info.channels()
    for x, stride in zip(maps, model.feature_info.reduction(), strict=True):
        assert x.shape[2:] == tuple(math.ceil(side / stride) for side in size)


def test_another_number_of_classes_keeps_the_trunk(shvit_s1, tmp_path):
    path = save(tmp_path, shvit_s1, 'model')
    model, whole = (zoo.create_model('shvit_s1', checkpoint=path, num_classes=n).eval() for n in (7, 1000))
    x = torch.randn(1, 3, 64, 64)
    assert model(x).shape == (1, 7)
    assert torch.equal(model.forward_features(x), whole.forward_features(x))
    maps = zoo.create_model('shvit_s1', checkpoint=path, features_only=True).eval()(x)
    torch.testing.assert_close(maps[-1], whole.forward_features(x))


def test_what_does_not_fit_timms_model_is_listed_under_its_keys(shvit_s1, tmp_path):
    broken = {key: value for key, value in shvit_s1.items() if not key.startswith('blocks3.4.')}
    broken['blocks3.99.extra'] = torch.zeros(1)
    broken['blocks1.0.conv.m.bn.weight'] = torch.zeros(5)
    for classes in (1000, 10):
        with pytest.raises(zoo.CheckpointError) as error:
            zoo.create_model('shvit_s1', checkpoint=save(tmp_path, broken, 'model'), num_classes=classes)
        assert 'weights.pth: The checkpoint does not fit shvit_s1: ' in str(error.value)
        assert 'missing (stages.2.blocks.1.' in str(error.value)
        assert '1 unexpected (stages.2.blocks.96.extra)' in str(error.value)
        assert '1 misshaped (stages.0.blocks.0.conv.m.bn.weight (5,) instead of (128,))' in str(error.value)


def test_a_wrong_classifier_is_told_by_its_shape(shvit_s1, tmp_path):
    few = {**shvit_s1, 'head.l.weight': torch.zeros(7, 320), 'head.l.bias': torch.zeros(7)}
    with pytest.raises(zoo.CheckpointError, match=r'head\.l\.weight \(7, 320\) instead of \(10, 320\)'):
        zoo.create_model('shvit_s1', checkpoint=save(tmp_path, few), num_classes=10)


@pytest.mark.parametrize('other', ['shvit_s2', 'davit_tiny', 'davit_base_fl', 'nat_mini', 'resnet18'])
def test_an_official_file_for_another_model_is_told_what_it_looks_like(shvit_s1, other, tmp_path):
    with pytest.raises(zoo.CheckpointError, match=rf"does not fit {other}: .*It looks like SHViT: try 'shvit_s1'"):
        zoo.create_model(other, checkpoint=save(tmp_path, shvit_s1, 'model'))


def test_florence2s_tower_may_lack_the_heads_norm_and_nothing_else(tmp_path):
    arguments = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), num_heads=(1, 2, 2, 2), pretrained_strict=False)
    state_dict = timm.create_model('davit_base_fl', num_classes=0, **arguments).state_dict()
    tower = {key: value for key, value in state_dict.items() if not key.startswith('head.')}
    model = zoo.create_model('davit_base_fl', checkpoint=save(tmp_path, tower), **arguments)
    assert torch.equal(model.stem.conv.weight, tower['stem.conv.weight'])
    del tower['stem.conv.bias']
    with pytest.raises(zoo.CheckpointError, match=r'1 missing \(stages\.3.*|does not fit'):
        zoo.create_model('davit_base_fl', checkpoint=save(tmp_path, {**tower, 'extra': torch.zeros(1)}), **arguments)


# --- SHViT with a distillation head


def test_a_distilled_shvit_predicts_the_mean_of_its_classifiers(shvit_s1, tmp_path):
    state_dict = distilled(shvit_s1)
    path = save(tmp_path, state_dict, 'model')
    model = zoo.create_model('shvit_s1', checkpoint=path, dtype=torch.float64).eval()
    assert isinstance(model, DistilledSHViT)
    assert model.pretrained_cfg['architecture'] == 'shvit_s1_distilled'
    x = rule.image(64)
    pooled = model.forward_features(x).mean((2, 3))

    def classifier(head):
        norm = [state_dict[f'{head}.bn.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias')]
        return F.linear(F.batch_norm(pooled, *norm), state_dict[f'{head}.l.weight'], state_dict[f'{head}.l.bias'])

    torch.testing.assert_close(model(x), (classifier('head') + classifier('head_dist')) / 2, rtol=1e-12, atol=1e-9)
    again = zoo.create_model('shvit_s1_distilled', checkpoint=save(tmp_path, model.state_dict()), dtype=torch.float64)
    assert torch.equal(again.eval()(x), model(x))


def test_a_distilled_shvit_in_training_gives_the_logits_of_each_classifier():
    model = timm.create_model('shvit_s1_distilled', num_classes=5).train()
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 5)
    model.set_distilled_training()
    labels, teacher = model(x)
    assert labels.shape == teacher.shape == (2, 5)
    assert not torch.equal(labels, teacher)
    assert model.eval()(x).shape == (2, 5)


def test_a_distilled_shvit_resets_both_classifiers(shvit_s1, tmp_path):
    path = save(tmp_path, distilled(shvit_s1), 'model')
    model = zoo.create_model('shvit_s1', checkpoint=path, num_classes=3).eval()
    assert [head.out_features for head in model.get_classifier()] == [3, 3]
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 320)


# --- HaloNet


@pytest.mark.parametrize(
    ('block', 'halo', 'stride', 'size'),
    [(8, 3, 1, (16, 24)), (8, 3, 2, (16, 24)), (5, 2, 2, (20, 10)), (4, 0, 1, (8, 4))],
)
@pytest.mark.parametrize('scaled', [False, True])
def test_halo_attention_is_timms_where_blocks_divide_the_map(block, halo, stride, size, scaled):
    arguments = dict(
        dim_out=24, stride=stride, num_heads=3, dim_head=4, block_size=block, halo_size=halo, qkv_bias=True
    )
    timms = HaloAttn(16, **arguments, scale_pos_embed=scaled, dtype=torch.float64)
    ours = HaloAttention(16, **arguments, scale_pos_embed=scaled, dtype=torch.float64)
    ours.load_state_dict(timms.state_dict())
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    results = []
    for attention in (timms, ours):
        inputs = x.clone().requires_grad_()
        y = attention(inputs)
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        results.append((y, inputs.grad, *(p.grad for p in attention.parameters())))
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, **ROUNDING)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(9, 7), (16, 1), (15, 8)])
def test_beyond_a_map_that_blocks_do_not_divide_keys_and_values_are_zero(stride, size):
    arguments = dict(stride=stride, num_heads=2, block_size=8, halo_size=3, dtype=torch.float64)
    ours, timms = HaloAttention(16, **arguments), HaloAttn(16, **arguments)  # no biases: zeros have keys of zero
    timms.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    padded = F.pad(x, (0, -size[1] % 8, 0, -size[0] % 8))
    height, width = (math.ceil(side / stride) for side in size)
    torch.testing.assert_close(ours(x), timms(padded)[..., :height, :width], **ROUNDING)


def test_a_small_halonet_is_timms():
    blocks = tuple(
        ByoBlockCfg(type='self_attn', d=depth, c=dim, s=1 if i == 0 else 2, gs=0, br=1.0)
        for i, (dim, depth) in enumerate(zip((16, 32, 64, 128), (1, 1, 2, 1), strict=True))
    )
    timms = created('halonet_h1', blocks=blocks, stem_chs=16)
    ours = HaloNet(
        dims=(16, 32, 64, 128), depths=(1, 1, 2, 1), num_heads=(8, 8, 8, 8), block_ratio=1, dtype=torch.float64
    ).eval()
    with torch.no_grad():
        for parameter in timms.parameters():  # some are zero at first
            parameter.normal_(std=0.2)
    ours.load_state_dict(ours.map_official(timms.state_dict()))
    x = images(256, 256, batch=1)
    torch.testing.assert_close(ours(x), timms(x), **ROUNDING)
    want = timms.forward_intermediates(x, intermediates_only=True)
    for got, level in zip(ours.forward_intermediates(x, intermediates_only=True), want, strict=True):
        torch.testing.assert_close(got, level, **ROUNDING)


def test_parameter_counts_of_the_paper():
    published = {'h0': 5_502_248, 'h2': 9_405_608, 'h3': 11_842_792, 'h4': 19_103_464}
    for name, count in published.items():
        assert catalogue.info(f'halonet_{name}')['params'] == count
    rounded = {'h5': 30.7, 'h6': 43.4, 'h7': 67.4}  # millions, as the table of the paper's reimplementation has them
    for name, millions in rounded.items():
        assert math.floor(catalogue.info(f'halonet_{name}')['params'] / 1e5) / 10 == millions
    h1 = timm.create_model('halonet_h0', depths=(3, 3, 10, 3), block_ratio=1, device='meta')
    assert sum(p.numel() for p in h1.parameters()) == 8_101_352


@pytest.mark.parametrize('name', ['halonet_h5', 'halonet_h6', 'halonet_h7'])
def test_the_large_halonets_take_their_own_size(name):
    facts = zoo.info(name)
    side = facts['input_size'][1]
    model = timm.create_model(name, depths=(1, 1, 1, 1), device='meta', features_only=True)
    maps = model(torch.empty(1, 3, side, side, device='meta'))
    assert facts['strides'] == [2, 4, 8, 16, 32]
    assert [x.shape[-1] for x in maps] == [math.ceil(side / stride) for stride in facts['strides']]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(block_size=0), 'got 0 and 3'),
        (dict(halo_size=-1), 'got 8 and -1'),
        (dict(num_heads=(5, 8, 8, 8)), r'5 heads of stage 0 must divide queries \(64\)'),
    ],
)
def test_impossible_halonets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('halonet_h0', **arguments)


@pytest.mark.parametrize('name', zoo.list_models('*halo*_dynamic'))
def test_dynamic_halonets_are_timms_where_timms_run(name):
    timms, ours = created(name.removesuffix('_dynamic')), created(name)
    ours.load_state_dict(timms.state_dict())
    side = 224 if name == 'haloregnetz_b_dynamic' else 256  # maps divide into its blocks of 7, or the others' of 8
    size = (side, 2 * side) if name == 'halonet26t_dynamic' else (side, side)
    x = images(*size, batch=1)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), timms(x), **ROUNDING)
        with pytest.raises(AssertionError):
            timms(images(97, 75))
        for size in SIZES:
            maps = ours.forward_intermediates(images(*size), intermediates_only=True)
            for x, level in zip(maps, ours.feature_info, strict=True):
                assert x.shape[1:] == (level['num_chs'], *(math.ceil(side / level['reduction']) for side in size))


# --- CrossViT


@pytest.mark.parametrize('name', zoo.list_models('crossvit_*_dynamic'))
def test_dynamic_crossvits_are_timms_at_their_own_size(name):
    timms = timm.create_model(name.removesuffix('_dynamic')).eval()
    ours = timm.create_model(name).eval()
    ours.load_state_dict(timms.state_dict())
    side = timms.img_size[0]
    x = torch.randn(1, 3, side, side)
    with torch.inference_mode():
        want, want_maps = timms.forward_intermediates(x)
        got, maps = ours.forward_intermediates(x)
        torch.testing.assert_close(ours.forward_head(got), timms.forward_head(want), **EXACT)
        for y, level in zip(maps, want_maps, strict=True):
            torch.testing.assert_close(y, level, **EXACT)
        assert ours.pretrained_cfg['first_conv'] == timms.pretrained_cfg['first_conv']


@pytest.mark.parametrize('name', ['crossvit_tiny_240_dynamic', 'crossvit_9_dagger_240_dynamic'])
@pytest.mark.parametrize('size', [*SIZES, (256, 310)])
def test_dynamic_crossvits_have_a_patch_for_every_12_and_16_pixels(name, size):
    model = timm.create_model(name, features_only=True).eval()
    assert model.feature_info.reduction() == [12, pytest.approx(16 * 240 / 224)]
    with torch.inference_mode():
        small, large = model(torch.randn(2, 3, *size))
    assert small.shape[2:] == tuple(math.ceil(side / 12) for side in size)
    assert large.shape[2:] == tuple(-(-side * 14 // (15 * 16)) for side in size)
    assert large.shape[2:] == tuple(math.ceil(side / model.feature_info.reduction()[1]) for side in size)


def test_ceil_of_the_reduction_is_exact_at_every_size():
    reduction = timm.create_model('crossvit_tiny_240_dynamic', device='meta').feature_info[-1]['reduction']
    for side in range(32, 2049):
        assert math.ceil(side / reduction) == -(-side * 14 // 240)


def test_a_larger_image_is_not_resized():
    """A picture beside blackness: timm sees both shrunk, the dynamic model the same patches as before."""
    model = created('crossvit_tiny_240_dynamic')
    x = images(240, 240, batch=1)
    model.pos_embed_0.data.zero_()  # positions are resampled to the larger grid
    larger = F.pad(x, (0, 240))
    small, wide = (model._embed(each)[0][:, 1:].unflatten(1, (20, -1)) for each in (x, larger))
    torch.testing.assert_close(wide[:, :, :20], small, **ROUNDING)


def test_positions_are_resampled_to_the_grid_and_not_to_the_image():
    model = created('crossvit_tiny_240_dynamic', num_classes=2)
    model.pos_embed_0.data[:, 1:] = torch.arange(20.0).repeat_interleave(20)[None, :, None]  # its row
    x = torch.zeros(1, 3, 120, 360, dtype=torch.float64)
    got = (model._embed(x)[0][:, 1:] - model.patch_embed[0].proj.bias).unflatten(1, (10, 30))
    assert (got[0, :, :, 0].diff(dim=0) > 1).all()  # half the rows: each is two of the table's
    torch.testing.assert_close(got[0, :, :1].expand(-1, 30, -1), got[0], rtol=1e-5, atol=1e-5)


def test_crossvit_recomputes_its_blocks_for_gradient_checkpointing():
    model = created('crossvit_tiny_240_dynamic')
    x = images(97, 75)
    model(x).sum().backward()
    want = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    runs = []
    for block in model.blocks:
        # Before, since a checkpoint leaves a block as soon as it has what it needs.
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    model(x).sum().backward()
    assert len(runs) == 2 * len(model.blocks)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[key], **ROUNDING)


@pytest.mark.parametrize('name', ['crossvit_tiny_240_dynamic', 'halonet26t_dynamic', 'shvit_s1_distilled'])
def test_extended_models_compile_whole_and_are_saved_as_themselves(name, tmp_path):
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, 65, 96)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    timm.models.save_for_hf(model, tmp_path / 'saved')
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert type(again) is type(model)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize('name', ['crossvit_tiny_240_dynamic', 'halonet26t_dynamic', 'shvit_s1_distilled'])
@pytest.mark.parametrize('shape', [(3, 64, 64), (1, 4, 64, 64), (1, 3, 31, 64)])
def test_extended_models_refuse_bad_images(name, shape):
    model = timm.create_model(name).eval()
    for method in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=r'Expected images .*got'):
            method(torch.randn(shape))


@pytest.mark.parametrize('name', ['crossvit_tiny_240_dynamic', 'halonet26t_dynamic'])
def test_timms_checkpoints_load_into_the_dynamic_models(name, tmp_path):
    timms = timm.create_model(name.removesuffix('_dynamic'))
    ours = zoo.create_model(name, checkpoint=save(tmp_path, timms.state_dict()))
    for key, value in ours.state_dict().items():
        assert torch.equal(value, timms.state_dict()[key])


# --- MambaOut


def test_mambaouts_features_are_channels_first_by_the_zoo_as_by_no_one_else(tmp_path):
    x = torch.randn(1, 3, 65, 97)
    whole = timm.create_model('mambaout_femto').eval()
    path = save(tmp_path, whole.state_dict())
    want = whole.forward_intermediates(x, intermediates_only=True)
    maps = zoo.create_model('mambaout_femto', checkpoint=path, features_only=True, out_indices=(1, 3)).eval()(x)
    assert [y.shape for y in maps] == [(1, 96, 9, 13), (1, 288, 3, 4)]
    torch.testing.assert_close(maps[1], want[3])
    chosen = zoo.create_model('mambaout_femto', features_only=True, feature_cls='list')
    assert chosen(x)[0].shape == (1, 17, 25, 48)
