"""Neighborhood attention beside the formulations there are, forward and with the backward, on the CPU.

    python -m benchmarks.kernels neighborhood                             # some minutes, most of them compiling

7x7 windows and head_dim 32 at the stages of nat_mini and dinat_mini. Inputs are views of a packed projection, and every
formulation pays for its own layout. FlexAttention has no backward on the CPU and is measured without a bias, undilated;
natten is measured in the same cases where it is installed, forward only too.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.benchmarks.operators import Benchmark, Calls, calls
from zoo.kernels import neighborhood_attention
from zoo.kernels.neighborhood.reference import neighbors

KERNEL_SIZE = 7


class Case(NamedTuple):
    batch: int
    size: int  # height and width of the map
    heads: int
    dilation: int = 1
    bias: bool = True
    head_dim: int = 32


CASES = {
    '56x56, one image, no bias': Case(1, 56, 2, bias=False),
    '28x28, one image, no bias': Case(1, 28, 4, bias=False),
    'NAT, stage 1': Case(8, 56, 2),
    'NAT, stage 2': Case(8, 28, 4),
    'NAT, stage 3': Case(8, 14, 8),
    'NAT, stage 4': Case(8, 7, 16),
    'DiNAT, stage 1': Case(8, 56, 2, dilation=8),
    'DiNAT, stage 2': Case(8, 28, 4, dilation=4),
    'DiNAT, stage 3': Case(8, 14, 8, dilation=2),
}


def gather(query, key, value, bias, kernel_size, dilation, scale) -> Tensor:
    """The neighbors gathered, then dense products: what one writes first in PyTorch."""
    rows, row_offset = neighbors(query.shape[1], kernel_size[0], dilation[0], query.device)
    columns, column_offset = neighbors(query.shape[2], kernel_size[1], dilation[1], query.device)
    window = slice(None), rows[:, None, :, None], columns[None, :, None, :]
    keys, values = (x[window].flatten(3, 4) for x in (key, value))
    scores = torch.einsum('bxyhd,bxynhd->bxyhn', query * scale, keys)
    if bias is not None:
        bias = bias[:, row_offset[:, None, :, None], column_offset[None, :, None, :]]
        scores = scores + bias.flatten(3).permute(1, 2, 0, 3)
    return torch.einsum('bxyhn,bxynhd->bxyhd', scores.softmax(-1), values)


def named(implementation: str, query, key, value, bias, case: Case) -> Tensor:
    return neighborhood_attention(query, key, value, KERNEL_SIZE, case.dilation, bias, implementation=implementation)


def flex(case: Case) -> Callable:
    """Compiled FlexAttention with the clamped window as its block mask, made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    radius, size = KERNEL_SIZE // 2, case.size

    def inside(batch, head, query, key):
        rows = ((query // size).clamp(radius, size - 1 - radius) - key // size).abs() <= radius
        return rows & (((query % size).clamp(radius, size - 1 - radius) - key % size).abs() <= radius)

    mask = create_block_mask(inside, None, None, size**2, size**2, device='cpu', BLOCK_SIZE=64)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query, key, value, bias, case):
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        return compiled(q, k, v, block_mask=mask).transpose(1, 2).reshape(query.shape)

    return attend


def natten(query, key, value, bias, case) -> Tensor:
    from natten import na2d

    return na2d(query, key, value, KERNEL_SIZE, dilation=case.dilation)


def contenders(case: Case) -> dict[str, Calls]:
    functions = {
        'gather': partial(named, 'official'),
        'tiled': partial(named, 'tiled'),
        'reference, compiled': torch.compile(partial(named, 'reference'), dynamic=False, fullgraph=True),
    }
    forward_only = {}
    if not case.bias and case.dilation == 1:
        forward_only['flex, compiled'] = flex(case)
        if importlib.util.find_spec('natten'):
            forward_only['natten'] = natten

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(case.batch, case.size, case.size, 3, case.heads, case.head_dim, generator=generator)]
    if case.bias:
        inputs.append(torch.randn(case.heads, 2 * KERNEL_SIZE - 1, 2 * KERNEL_SIZE - 1, generator=generator))

    def unpacked(function):
        def attend(qkv, bias=None):
            return function(*qkv.unbind(3), bias, case)

        return attend

    return {
        name: calls(unpacked(function), inputs, has_backward=name in functions)
        for name, function in (functions | forward_only).items()
    }


BENCHMARK = Benchmark('neighborhood', CASES, contenders, gather)
