"""What PyTorch's counter is told of the operators, against enumerations of the products."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import crisscross_attention, neighborhood_attention, routing_attention, window_attention
from zoo.kernels.aggregated import position_bias

from .harness import packed, random
from .test_aggregated import attention as aggregated_attention
from .test_aggregated import inputs as aggregated_inputs


def counted(function, *tensors) -> tuple[int, int]:
    """FLOPs of the forward, and of the backward to all tensors."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    with FlopCounterMode(display=False) as forward:
        output = function(*tensors)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(output.sum(), tensors)
    return forward.get_total_flops(), backward.get_total_flops()


B, H, W, HEADS, D = 2, 9, 11, 2, 8
PIXELS = B * H * W * HEADS


def test_neighborhood_attention_has_two_products_with_all_keys_of_a_window():
    products = 2 * 2 * PIXELS * D * 5 * 3
    found = counted(lambda *qkv: neighborhood_attention(*qkv, (5, 3), (1, 2)), *packed(B, H, W, HEADS, D))
    assert found == (products, products * 5 // 2)


def test_routing_attention_has_two_products_with_all_pixels_of_the_listed_regions():
    index = torch.arange(9).expand(B, 9, 9)[..., :2]
    products = 2 * 2 * PIXELS * D * 2 * (3 * 4)
    found = counted(lambda *qkv: routing_attention(*qkv, index, (3, 4)), *packed(B, H, W, HEADS, D))
    assert found == (products, products * 5 // 2)


def test_aggregated_attention_has_a_third_product_over_the_window():
    tensors = aggregated_inputs(B, H, W, HEADS, D, pooled=(2, 3))
    products = 2 * PIXELS * D * (2 * 6 + 3 * 9)
    function = aggregated_attention((H, W), (2, 3), 3, 'tiled')
    found = counted(lambda *values: function(**dict(zip(tensors, values, strict=True))), *tensors.values())
    assert found == (products, products * 5 // 2)


@pytest.mark.parametrize(
    ('window_size', 'dilation', 'offset'),
    [
        ((4, 4), (1, 1), (0, 0)),
        ((3, 2), (2, 3), (0, 0)),
        ((20, 3), (1, 1), (0, 0)),
        ((4, 4), (1, 1), (1, 2)),
        ((20, 3), (1, 1), (13, 0)),
    ],
)
def test_window_attention_has_two_products_with_the_pixels_that_a_window_has(window_size, dilation, offset):
    def window(position, size, step):
        return position // (size * step), position % step

    def pairs(length, size, step, first):
        places = [window(position + -first % size, size, step) for position in range(length)]
        return sum(a == b for a, b in itertools.product(places, places))

    products = 2 * 2 * B * HEADS * D
    for length, size, step, first in zip((H, W), window_size, dilation, offset, strict=True):
        products *= pairs(length, size, step, first)
    found = counted(
        lambda *qkv: window_attention(*qkv, window_size, dilation, offset=offset), *packed(B, H, W, HEADS, D)
    )
    assert found == (products, products * 5 // 2)


def test_crisscross_attention_has_two_products_with_all_pixels_of_a_row_and_a_column():
    query, key, value = random(B, H, W, HEADS, D), random(B, H, W, HEADS, D), random(B, H, W, HEADS, 5)
    pairs = PIXELS * (H + W - 1)
    found = counted(crisscross_attention, query, key, value)
    assert found == (2 * pairs * (D + 5), 2 * pairs * (3 * D + 2 * 5))


def test_a_position_bias_has_a_product_with_all_hidden_units_of_a_pair():
    rows, columns, weight, bias = random(5, 16), random(7, 16), random(3, 16), random(3)
    assert counted(position_bias, rows, columns, weight, bias)[0] == 2 * 5 * 7 * 16 * 3
