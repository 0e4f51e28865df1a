"""What the pyramid promises of every family, beyond what `zoo.check` and timm's own tests look at."""

import copy
import math
import re
from unittest import mock

import pytest
import timm
import torch
from conftest import TINY, tiny
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2

import zoo
from zoo.backbones import catalogue, pyramid, registration
from zoo.backbones.van import VAN

SIZES = ((32, 32), (250, 66))  # beside those of zoo.check
PYRAMIDS = [name for name in TINY if isinstance(tiny(name, device='meta'), pyramid.Pyramid)]


@pytest.mark.parametrize('name', TINY)
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('batch', [1, 3])
def test_any_size_gives_logits_and_a_pyramid(name, size, batch):
    x = torch.randn(batch, 3, *size)
    assert tiny(name, num_classes=11).eval()(x).shape == (batch, 11)
    model = tiny(name, features_only=True).eval()
    info = model.feature_info
    for y, channels, stride in zip(model(x), info.channels(), info.reduction(), strict=True):
        assert y.shape == (batch, channels, *(math.ceil(side / stride) for side in size))


@pytest.mark.parametrize('name', PYRAMIDS)
def test_levels_come_in_any_layout_and_normed(name):
    model = tiny(name).eval()
    x = torch.randn(1, 3, 64, 64)
    final, maps = model.forward_intermediates(x)
    nhwc = model.forward_intermediates(x, output_fmt='NHWC', intermediates_only=True)
    assert torch.equal(nhwc[2].permute(0, 3, 1, 2), maps[2])
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True, output_fmt=model.output_fmt)
    torch.testing.assert_close(normed[-1], final)


@pytest.mark.parametrize('name', PYRAMIDS)
def test_gradient_checkpointing_recomputes_every_stage(name):
    model = tiny(name)
    model.set_grad_checkpointing()
    with mock.patch.object(pyramid, 'checkpoint_seq', wraps=pyramid.checkpoint_seq) as calls:
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert calls.call_count == len(model.stages)


@pytest.mark.parametrize('name', TINY)
def test_bf16_autocast_is_near_float32_and_trains(name):
    model = tiny(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    want = model(x)
    assert (y.float() - want).norm() < 0.05 * want.norm()  # 8 bits of mantissa through about 20 layers
    with torch.autocast('cpu', dtype=torch.bfloat16):
        model.train()(x).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', TINY)
def test_copies_and_saved_models_compute_the_same(name, tmp_path):
    model = tiny(name, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    timm.models.save_for_hf(model, tmp_path / 'saved', model_args=TINY[name])
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize('name', PYRAMIDS)
def test_layers_for_learning_rate_decay_follow_the_depth(name):
    model = tiny(name)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    head = [key for key, _ in model.named_parameters() if key.startswith('head')]
    deepest = max(layers.values())
    assert all(layers[key] == deepest for key in head)
    assert not any(layers[key] == deepest for key in layers if not key.startswith('head'))
    assert {layers[key] for key in layers if re.match(pyramid.STEM, key)} == {0}
    blocks = [layers[key] for key in layers if '.blocks.' in key]
    assert blocks == sorted(blocks)
    assert len({*layers.values()}) == 1 + sum(TINY[name]['depths']) + 1
    create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.8)


def test_auto_pad_changes_nothing_where_regions_divide_and_off_refuses_the_rest():
    model = tiny('biformer_tiny', n_win=4, dtype=torch.float64).eval()
    strict = tiny('biformer_tiny', n_win=4, auto_pad=False, dtype=torch.float64).eval()
    strict.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 128, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x), strict(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match='18x16 does not divide into 4x4 regions'):
        strict(torch.randn(1, 3, 72, 64, dtype=torch.float64))


def test_routes_are_regions_of_the_padded_map():
    routes = tiny('biformer_tiny').eval().routes(torch.randn(2, 3, 64, 80))
    assert [route['module'] for route in routes] == [
        'stages.0.blocks.0.attn',
        'stages.1.blocks.0.attn',
        'stages.2.blocks.0.attn',
        'stages.2.blocks.1.attn',
    ]
    for route, topk in zip(routes, (1, 4, 16, 16), strict=True):
        assert route['regions'] == (7, 7)
        assert route['index'].shape == (2, 49, topk)
        assert route['index'].min() >= 0
        assert route['index'].max() < 49


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [(dict(layout='nchw'), "got 'nchw'"), (dict(topks=(1, 4, 0, -2)), r'got \(1, 4, 0, -2\)')],
)
def test_impossible_biformers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('biformer_tiny', **arguments)


def test_dilations_must_match_the_blocks():
    with pytest.raises(ValueError, match='each of the 3 blocks'):
        timm.create_model('nat_mini', dilations=([1, 2], 1, 1, 1))


def test_no_name_shadows_one_of_timm():
    assert not zoo.shadowed()
    for name in catalogue.variant_names(registered_by_zoo=True):
        assert timm.models._registry._model_entrypoints[name].__module__.startswith('zoo.backbones.')


def test_a_name_that_timm_has_stays_timms(monkeypatch):
    taken = timm.models._registry._model_entrypoints['resnet18']
    cfg = {'input_size': (3, 224, 224)}
    monkeypatch.setattr(registration.catalogue, 'default_cfg', lambda name: {f'{name}.in1k': cfg})
    monkeypatch.setattr(registration, '_shadowed', {})
    module = __import__('sys').modules[VAN.__module__]
    cfgs = module.default_cfgs
    try:
        registration.variants(VAN, resnet18={})
        assert timm.models._registry._model_entrypoints['resnet18'] is taken
        assert registration.shadowed() == {'resnet18': VAN}
    finally:
        module.default_cfgs = cfgs
        del module.resnet18


def test_arguments_of_a_vit_that_a_decoder_has_no_use_for_are_refused():
    with pytest.raises(TypeError, match='does not take mlp_ratio, qk_norm'):
        tiny('illama_tiny', mlp_ratio=2, qk_norm=True)
