"""TransNeXt's position biases, pooling and sizes are those of the paper and of the authors' dense code."""

import pytest
import torch
from conftest import tiny
from torch.nn import functional as F

from zoo.backbones.transnext import (
    AggregatedAttention,
    Attention,
    ContinuousPositionBias,
    adaptive_avg_pool,
    pairs,
    relative_positions,
)

EXACT = dict(rtol=1e-12, atol=1e-12)  # float64, sums in another order
FLOAT32 = dict(rtol=1e-6, atol=1e-6)  # coordinates are float32, and exact only in another order


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def cell_centres(length, pooled):
    """Of an axis, as the authors find them."""
    return F.adaptive_avg_pool1d(torch.arange(float(length))[None], pooled)[0]


def bias_of_every_pair(cpb, size, pooled):
    """(heads, H, W, pooled H, pooled W): the MLP of each pair's coordinates, one by one."""
    rows, columns = (torch.arange(float(n))[:, None] - cell_centres(n, p) for n, p in zip(size, pooled, strict=True))
    rows, columns = torch.broadcast_tensors(rows[:, None, :, None], columns[None, :, None, :])
    d = torch.stack([rows, columns], -1) / (cpb.trained_side - 1) * 8
    coordinates = d.sign() * d.abs().add(1).log2() / 3
    return cpb.fc2(F.relu(cpb.fc1(coordinates.to(cpb.fc1.weight.dtype)))).permute(4, 0, 1, 2, 3)


@pytest.mark.parametrize(('length', 'pooled'), [(56, 7), (7, 7), (1, 1), (57, 7), (13, 5), (9, 2), (5, 4), (30, 1)])
def test_relative_positions_are_those_to_the_centres_of_cells(length, pooled):
    distances, index = relative_positions(length, pooled)
    want = torch.arange(float(length))[:, None] - cell_centres(length, pooled)
    torch.testing.assert_close(distances[index], want, rtol=0, atol=1e-5)
    assert index.min() == 0
    assert index.max() == len(distances) - 1


@pytest.mark.parametrize(('size', 'pooled'), [((8, 12), (4, 3)), ((9, 7), (4, 2)), ((3, 5), (3, 5)), ((1, 6), (1, 1))])
def test_pooling_is_adaptive_average_pooling(size, pooled):
    x = images(2, *size, 3)
    want = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), pooled).permute(0, 2, 3, 1)
    torch.testing.assert_close(adaptive_avg_pool(x, pooled), want, **EXACT)


@pytest.mark.parametrize('size', [(14, 14), (13, 9), (1, 4)])
def test_the_bias_of_a_pair_is_the_mlp_of_its_coordinates(size):
    cpb = ContinuousPositionBias(3, trained_side=7, dtype=torch.float64)

    def pool(size):
        return tuple(max(1, side // 2) for side in size)

    torch.testing.assert_close(pairs(*cpb(size, pool)), bias_of_every_pair(cpb, size, pool(size)), **FLOAT32)


@pytest.mark.parametrize('size', [(10, 10), (13, 9), (3, 20)])
def test_interpolated_biases_are_resized_over_the_keys_and_then_over_the_queries(size):
    cpb = ContinuousPositionBias(2, trained_side=7, made_at=8, dtype=torch.float64)

    def pool(size):
        return tuple(max(1, side // 2) for side in size)

    (H, W), (h, w) = size, pool(size)
    table = bias_of_every_pair(cpb, (8, 8), (4, 4)).reshape(2, 64, 4, 4)
    table = F.interpolate(table, (h, w), mode='bilinear', align_corners=False)
    table = table.reshape(2, 8, 8, h * w).permute(0, 3, 1, 2)
    table = F.interpolate(table, (H, W), mode='bilinear', align_corners=False)
    want = table.permute(0, 2, 3, 1).reshape(2, H, W, h, w)
    torch.testing.assert_close(pairs(*cpb(size, pool)), want, **FLOAT32)


def test_both_modes_are_the_classifier_at_the_size_that_biases_are_made_for():
    extrapolating = tiny('transnext_micro', pretrain_size=64, dtype=torch.float64).eval()
    interpolating = tiny('transnext_micro', pretrain_size=64, interpolation_size=96, dtype=torch.float64).eval()
    interpolating.load_state_dict(extrapolating.state_dict())
    with torch.inference_mode():
        same, other = images(1, 3, 96, 96), images(1, 3, 128, 80)
        torch.testing.assert_close(interpolating(same), extrapolating(same), rtol=0, atol=0)
        assert (interpolating(other) - extrapolating(other)).abs().max() > 1e-6


def test_the_result_depends_on_nothing_that_ran_before():
    model = tiny('transnext_micro', dtype=torch.float64).eval()
    x = images(1, 3, 64, 97)
    with torch.inference_mode():
        before = model(x)
        model(images(1, 3, 160, 33))
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_a_fixed_pool_makes_the_cost_linear_and_is_never_more_than_the_map():
    attn = AggregatedAttention(48, 2, 3, 4, fixed_pool_size=5, trained_side=14)
    assert attn.pooled_size((80, 7)) == (5, 5)
    assert attn.pooled_size((3, 64)) == (3, 5)
    model = tiny('transnext_micro', fixed_pool_size=4, dtype=torch.float64).eval()
    for size in ((32, 32), (64, 200)):
        assert model(images(1, 3, *size)).isfinite().all()


def test_pooled_tokens_are_at_least_one():
    attn = AggregatedAttention(48, 2, 3, 8, trained_side=56)
    assert attn.pooled_size((7, 20)) == (1, 2)


def test_attention_over_the_whole_map_is_cosine_attention_scaled_by_the_number_of_keys():
    attn = Attention(48, 2, trained_side=7, dtype=torch.float64)
    x = images(2, 3, 5, 48)
    q, k, v = attn.qkv(x).flatten(1, 2).view(2, 15, 3, 2, 24).permute(2, 0, 3, 1, 4)
    scale = F.softplus(attn.temperature) * torch.tensor(15.0, dtype=torch.float64).log()
    scores = (F.normalize(q, dim=-1) + attn.query_embedding) * scale @ F.normalize(k, dim=-1).mT
    bias = bias_of_every_pair(attn.cpb, (3, 5), (3, 5)).reshape(2, 15, 15)
    want = attn.proj(((scores + bias).softmax(-1) @ v).transpose(1, 2).reshape(2, 3, 5, 48))
    torch.testing.assert_close(attn(x), want, **FLOAT32)


def test_weight_decay_spares_what_the_paper_spares():
    exempt = tiny('transnext_micro').no_weight_decay()
    assert 'stages.0.blocks.0.attn.temperature' in exempt
    assert 'stages.0.blocks.0.attn.cpb.fc1.weight' in exempt
    assert 'stages.0.blocks.0.attn.learnable_tokens' not in exempt


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(pretrain_size=32), 'pretrain_size must be at least 64, got 32'),
        (dict(interpolation_size=16), 'interpolation_size must be at least 32, got 16'),
        (dict(fixed_pool_size=0), 'fixed_pool_size must be at least 1, got 0'),
        (dict(window_size=4), 'window_size must be odd and positive, got 4'),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny('transnext_micro', **arguments)
