"""Neighborhood attention beside the formulations there are, forward and with the backward.

    python -m benchmarks.kernels neighborhood                             # some minutes, most of them compiling
    python -m benchmarks.kernels neighborhood --device cuda

7x7 windows and head_dim 32 at the stages of nat_mini and dinat_mini. Inputs are views of a packed projection, and every
formulation pays for its own layout. FlexAttention and masked attention run without the bias; on the CPU FlexAttention
has no backward and is measured undilated, on a GPU with each block size that may be its best. natten, which has dropped
the bias, is measured where it is installed, on a GPU with each of its backends that runs.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.benchmarks.operators import Benchmark, Calls, Cost, Setting, Unavailable, calls
from zoo.kernels import neighborhood_attention
from zoo.kernels.neighborhood.reference import neighbors

KERNEL_SIZE = 7
DENSE_SCORES = 2**30  # a head's; beyond, masked attention takes seconds a call
NATTEN_BACKENDS = ('blackwell-fna', 'hopper-fna', 'cutlass-fna', 'flex-fna')


class Case(NamedTuple):
    batch: int
    size: int  # height and width of the map
    heads: int
    dilation: int = 1
    bias: bool = True
    head_dim: int = 32


CPU = {
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
CUDA = {
    f'{side}, batch {batch}, stage {stage}{", dilated" if dilated else ""}': Case(
        batch, side // 4 // 2**i, 2 * 2**i, dilation=side // 4 // 2**i // KERNEL_SIZE if dilated else 1
    )
    for side in (224, 512, 1024)
    for batch in (128, 1)
    for i, stage in enumerate((1, 2, 3))
    for dilated in (False, True)
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
    return torch.einsum('bxyhn,bxynhd->bxyhd', scores.softmax(-1).to(values.dtype), values)


def named(implementation: str, query, key, value, bias, case: Case) -> Tensor:
    return neighborhood_attention(query, key, value, KERNEL_SIZE, case.dilation, bias, implementation=implementation)


def dense(query, key, value, bias, case: Case) -> Tensor:
    """Fused attention over the whole map, masked to the windows; Unavailable for a map whose mask takes gigabytes."""
    if case.size**4 > DENSE_SCORES:
        raise Unavailable(f'masked attention of {case.size}x{case.size} positions has {case.size**4} scores a head')
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    index, _ = neighbors(case.size, KERNEL_SIZE, case.dilation, query.device)
    near = torch.zeros(case.size, case.size, dtype=torch.bool, device=query.device).scatter_(1, index, True)
    mask = (near[:, None, :, None] & near[:, None]).flatten(2).flatten(0, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(query.shape)


def flex(case: Case, device: str, block_size: int) -> Callable:
    """Compiled FlexAttention with the clamped window as its block mask, made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    radius, size, dilation = KERNEL_SIZE // 2, case.size, case.dilation

    def near(query, key):
        length = (size - query % dilation + dilation - 1) // dilation  # of the dilation group
        centre = torch.minimum((query // dilation).clamp(min=radius), length - 1 - radius)
        return (query % dilation == key % dilation) & ((centre - key // dilation).abs() <= radius)

    def inside(batch, head, query, key):
        return near(query // size, key // size) & near(query % size, key % size)

    create = create_block_mask
    if size**4 > DENSE_SCORES:
        create = torch.compile(create_block_mask)  # else all pairs of positions are in memory, at 18 bytes each
    mask = create(inside, None, None, size**2, size**2, device=device, BLOCK_SIZE=block_size)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query, key, value, bias, case):
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        return compiled(q, k, v, block_mask=mask).transpose(1, 2).reshape(query.shape)

    return attend


def natten(backend: str | None, query, key, value, bias, case) -> Tensor:
    """Unavailable where the backend refuses the problem or the machine."""
    from natten import na2d

    try:
        return na2d(query, key, value, KERNEL_SIZE, dilation=case.dilation, backend=backend)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise Unavailable(f'natten, {backend}: {error}') from error


def contenders(case: Case, setting: Setting) -> dict[str, Calls]:
    is_gpu = setting.device == 'cuda'
    ours = {'triton': 'triton'} if is_gpu else {'tiled': 'tiled'}
    functions = {'gather': partial(named, 'official')}
    functions |= {name: partial(named, implementation) for name, implementation in ours.items()}
    functions['reference, compiled'] = torch.compile(partial(named, 'reference'), dynamic=False, fullgraph=True)
    unbiased = {}
    if is_gpu:
        unbiased['SDPA, masked'] = dense
        unbiased |= {f'flex {size}, compiled': flex(case, 'cuda', size) for size in (64, 128)}
    elif not case.bias and case.dilation == 1:
        unbiased['flex, compiled'] = flex(case, 'cpu', 64)
    if importlib.util.find_spec('natten'):
        backends = NATTEN_BACKENDS if is_gpu else (None,)
        unbiased |= {f'natten {backend or ""}'.strip(): partial(natten, backend) for backend in backends}

    qkv = setting.randn(case.batch, case.size, case.size, 3, case.heads, case.head_dim, seed=0)
    side = 2 * KERNEL_SIZE - 1
    bias = [setting._replace(dtype=torch.float32).randn(case.heads, side, side, seed=1)] if case.bias else []

    def unpacked(function):
        def attend(qkv, bias=None):
            return function(*qkv.unbind(3), bias, case)

        return attend

    found = {name: calls(unpacked(function), [qkv, *bias]) for name, function in functions.items()}
    for name, function in unbiased.items():
        found[name] = calls(unpacked(function), [qkv], has_backward=is_gpu, is_alike=not case.bias)
    return found


def cost(case: Case, itemsize: int) -> Cost:
    numbers = case.batch * case.size**2 * case.heads * case.head_dim
    return Cost(4 * numbers * itemsize, 4 * numbers * KERNEL_SIZE**2)


BENCHMARK = Benchmark('neighborhood', {'cpu': CPU, 'cuda': CUDA}, contenders, gather, cost)
