"""What varied-size window attention computes, held against its definition, and what is ViTAEv2-VSA's own."""

import math

import pytest
import torch
from conftest import tiny
from torch.export import Dim
from torch.nn import functional as F

import zoo
from zoo.backbones.checkpoints import unwrap
from zoo.backbones.vsa import DILATIONS, KERNEL_SIZES, STRIDES, StridedConv2d, VariedSizeWindowAttention


def definition(module, x):
    """Varied-size window attention, a window, a head and a query at a time (section 3.2). (1, H, W, C) -> (H, W, C)."""
    side, heads = module.window_size, module.num_heads
    _, H, W, _ = x.shape
    Hp, Wp = -(-H // side) * side, -(-W // side) * side
    padded = F.pad(x[0], (0, 0, 0, Wp - W, 0, Hp - H))
    qkv = F.pad(module.qkv(x[0]), (0, 0, 0, Wp - W, 0, Hp - H)).view(Hp, Wp, 3, heads, -1)
    out = torch.zeros(Hp, Wp, heads, qkv.shape[-1], dtype=x.dtype)

    def value_at(part, head, row, column):
        total = 0
        for i in (math.floor(row), math.floor(row) + 1):
            for j in (math.floor(column), math.floor(column) + 1):
                if 0 <= i < Hp and 0 <= j < Wp:
                    total = total + (1 - abs(row - i)) * (1 - abs(column - j)) * qkv[i, j, part, head]
        return total

    pixels = [(i, j) for i in range(side) for j in range(side)]
    for top in range(0, Hp, side):
        for left in range(0, Wp, side):
            mean = F.leaky_relu(padded[top : top + side, left : left + side].mean((0, 1)))
            offsets = module.sampling_offsets(mean).view(heads, 2).tolist()
            scales = module.sampling_scales(mean).view(heads, 2).tolist()
            for head in range(heads):
                middle = (side - 1) / 2
                x_shift = offsets[head][0] / max(1, W // side) * (Wp - 1) / 2
                y_shift = offsets[head][1] / max(1, H // side) * (Hp - 1) / 2
                rows = [top + middle + (i - middle) * (1 + scales[head][1]) + y_shift for i in range(side)]
                columns = [left + middle + (j - middle) * (1 + scales[head][0]) + x_shift for j in range(side)]
                places = [(row, column) for row in rows for column in columns]
                keys, values = (torch.stack([value_at(part, head, *place) for place in places]) for part in (1, 2))
                for i, j in pixels:
                    index = [(i - k + side - 1) * (2 * side - 1) + j - m + side - 1 for k, m in pixels]
                    bias = module.relative_position_bias_table[index, head]
                    scores = keys @ qkv[top + i, left + j, 0, head] * module.scale + bias
                    out[top + i, left + j, head] = scores.softmax(0) @ values
    return module.proj(out[:H, :W].flatten(2))


@pytest.mark.parametrize('size', [(6, 9), (7, 5), (2, 4), (1, 1)])
@torch.no_grad()
def test_attention_is_its_definition_on_maps_that_windows_do_not_divide(size):
    module = VariedSizeWindowAttention(6, 4, 2, 3, dtype=torch.float64)
    torch.nn.init.normal_(module.relative_position_bias_table)
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x), torch.stack([definition(module, each[None]) for each in x]))


@pytest.mark.parametrize('stage', range(4))
@pytest.mark.parametrize('size', [(32, 33), (34, 35), (1, 2), (8, 3)])
def test_reduction_loses_no_row_or_column(stage, size):
    stride = STRIDES[stage]
    for dilation in DILATIONS[stage]:
        conv = StridedConv2d(2, 3, KERNEL_SIZES[stage], stride, dilation=dilation)
        assert conv(torch.randn(1, 2, *size)).shape[2:] == tuple(math.ceil(side / stride) for side in size)


def test_rates_of_stochastic_depth_are_the_authors():
    model = tiny('vitaev2_vsa_s', depths=(2, 2, 4, 2), drop_path_rate=0.9)
    rates = [[getattr(cell.drop_path, 'drop_prob', 0) for cell in stage.blocks] for stage in model.stages]
    assert rates == [
        pytest.approx(want) for want in ([0, 0.1], [0.2, 0.3], [0.2, 0.3, 0.4, 0.5], [0.4, 0.5])
    ]  # not rising over all cells


def test_averaged_weights_are_taken_where_a_file_has_them():
    both = {'state_dict': {'a': torch.zeros(1)}, 'state_dict_ema': {'a': torch.ones(1)}}
    assert unwrap(both, 'vitaev2_vsa_s') == both['state_dict_ema']
    assert unwrap({'state_dict': both['state_dict']}, 'vitaev2_vsa_s') == both['state_dict']


def test_windows_of_a_pixel_are_refused():
    with pytest.raises(ValueError, match='window_size must be at least 2, got 1'):
        tiny('vitaev2_vsa_s', window_size=1)


def test_norms_are_merged_for_inference():
    model = tiny('vitaev2_vsa_s').eval()
    assert not zoo.fuse(model).fusion.left


def test_exports_with_free_batch():
    model = tiny('vitaev2_vsa_s', dtype=torch.float64).eval()
    example = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim('batch', min=1, max=64)},))
    x = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-10, atol=1e-10)
