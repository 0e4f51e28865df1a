"""OverLoCK's own: merged kernels, dynamic convolution, the second classifier."""

import pytest
import timm
import torch
from conftest import tiny
from torch import nn

import zoo
from zoo.backbones.contmix import ContextMixing, aggregate
from zoo.backbones.large_kernel import DILATED, DilatedReparamConv
from zoo.kernels.neighborhood.reference import neighbors


def with_statistics(model):
    """BatchNorms, relative positions and response norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if name.endswith(('gamma', 'beta', 'rpb1', 'rpb2')):
            nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize('size', DILATED)
def test_merged_kernels_are_the_sum_of_the_branches(size):
    conv = with_statistics(DilatedReparamConv(3, size, dtype=torch.float64))
    x = torch.randn(2, 3, 19, 11, dtype=torch.float64)
    want = sum(norm(branch(x)) for branch, norm in conv.branches())
    torch.testing.assert_close(conv(x), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conv.reparameterize()(x), want, rtol=1e-12, atol=1e-12)


def test_a_merged_model_has_the_state_of_one_that_is_made_merged():
    model = with_statistics(tiny('overlock_xt', dtype=torch.float64))
    merged = tiny('overlock_xt', dtype=torch.float64, inference_mode=True).eval()
    state_dict = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, DilatedReparamConv):
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(f'{name}.')}
            state_dict |= {f'{name}.{key}': value for key, value in module.reparameterize().state_dict().items()}
    merged.load_state_dict(state_dict)
    x = torch.randn(2, 3, 70, 99, dtype=torch.float64)
    want = model(x)
    torch.testing.assert_close(merged(x), want, rtol=1e-11, atol=1e-11)
    fused = zoo.fuse(model)
    assert not fused.fusion.left
    torch.testing.assert_close(fused(x), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(('height', 'width', 'size'), [(5, 9, 5), (13, 17, 7), (30, 6, 5)])
def test_values_are_summed_over_the_clamped_window(height, width, size):
    weights = torch.randn(2, 3, height, width, size, size, dtype=torch.float64)
    value = torch.randn(2, 3, height, width, 4, dtype=torch.float64)
    rows, columns = (neighbors(side, size, 1, value.device)[0] for side in (height, width))
    got = aggregate(weights, value, columns, rows)
    for y in range(height):
        for x in range(width):
            window = value[:, :, rows[y]][:, :, :, columns[x]]
            torch.testing.assert_close(got[:, :, y, x], torch.einsum('bhrc,bhrcd->bhd', weights[:, :, y, x], window))


@pytest.mark.parametrize('side', [(14, 15), (4, 9)])  # (4, 9) is enlarged to the kernel
def test_kernels_are_those_of_projected_affinities(side):
    """The authors' order of the products: affinities to the guide's keys first, then their projection to taps."""
    mixer = with_statistics(ContextMixing(16, 8, 2, (5, 7), 7, dtype=torch.float64))
    seen = {}
    mixer.weight_query.register_forward_hook(lambda _, args, out: seen.update(query=out))
    mixer.weight_key.register_forward_hook(lambda _, args, out: seen.update(key=out))
    mixer.dyconv_proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    mixer.fusion.register_forward_hook(lambda _, args, out: seen.update(value=out))
    mixer(torch.randn(2, 24, *side, dtype=torch.float64))
    enlarged = min(side) < 7
    height, width = seen['query'].shape[2:]
    query = seen['query'].flatten(2).unflatten(1, (4, -1)) * mixer.scale
    key = seen['key'].flatten(2).unflatten(1, (4, -1))
    value = seen['value']
    if enlarged:
        value = nn.functional.interpolate(value, (height, width), mode='bilinear')
    affinities = torch.einsum('bgcn,bgcl->blgn', query, key)
    taps = mixer.weight_proj(affinities)
    mixed = []
    parts = zip((5, 7), taps.split((25, 49), 1), (mixer.rpb1, mixer.rpb2), value.chunk(2, 1), strict=True)
    for size, scores, table, values in parts:
        scores = scores.permute(0, 2, 3, 1).unflatten(2, (height, width))
        (rows, to_y), (columns, to_x) = (neighbors(side, size, 1, None) for side in (height, width))
        weights = (scores + table[:, to_y[:, None, :, None], to_x[:, None]].flatten(3)).softmax(-1)
        window = values.unflatten(1, (4, -1))[:, :, :, rows[:, None, :, None], columns[:, None]].flatten(5)
        mixed.append(torch.einsum('bghwt,bgchwt->bgchw', weights, window).flatten(1, 2))
    want = torch.cat(mixed, 1)
    if enlarged:
        want = nn.functional.adaptive_avg_pool2d(want, side)
    torch.testing.assert_close(seen['mixed'], want, rtol=1e-12, atol=1e-12)


def test_the_second_classifier_speaks_in_training_and_follows_the_first():
    model = tiny('overlock_xt', aux_head=True, num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    assert [logits.shape for logits in model(x)] == [(2, 5), (2, 5)]
    sum(logits.square().sum() for logits in model(x)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.reset_classifier(7)
    assert [logits.shape for logits in model(x)] == [(2, 7), (2, 7)]
    assert model.eval()(x).shape == (2, 7)


def test_impossible_models_are_refused():
    with pytest.raises(ValueError, match=r'got \(17, 15, 12, 7\)'):
        timm.create_model('overlock_xt', kernel_sizes=(17, 15, 12, 7))
    with pytest.raises(ValueError, match=r'got \(3, 6\)'):
        timm.create_model('overlock_xt', num_heads=(3, 6))
