"""Routing attention beside the official formulation and its definition, forward and with the backward.

    python -m benchmarks.kernels routing                                  # a few minutes
    python -m benchmarks.kernels routing --device cuda

The shapes of biformer_tiny's stages at 512 and at 224 pixels, on a GPU at larger batches, where the plain formulations
are measured compiled too. Inputs are views of a packed projection, and every formulation pays for its own layout.
"""

from functools import partial
from typing import NamedTuple

import torch

from zoo.benchmarks.operators import Benchmark, Calls, Cost, Setting, calls
from zoo.kernels import routing_attention


class Case(NamedTuple):
    batch: int
    size: int  # height and width of the map
    heads: int
    region_size: int
    topk: int
    head_dim: int = 32


CPU = {
    '512, stage 1': Case(1, 128, 2, 16, 1),
    '512, stage 2': Case(1, 64, 4, 8, 4),
    '512, stage 3': Case(1, 32, 8, 4, 16),
    '224, stage 1': Case(8, 56, 2, 8, 1),
    '224, stage 2': Case(8, 28, 4, 4, 4),
    '224, stage 3': Case(8, 14, 8, 2, 16),
}
CUDA = {
    f'{side}, batch {batch}, stage {stage}': Case(batch, side // 4 // 2**i, 2 * 2**i, side // 4 // 2**i // n_win, 4**i)
    for side, batch, n_win in ((224, 128, 7), (512, 16, 8))
    for i, stage in enumerate((1, 2, 3))
}


def official(query, key, value, region_index, region_size, scale, mask_padding):
    """As rayleizhu/BiFormer's bra_legacy.py: keys and values gathered out of a map expanded over the regions.

    Routes are shared by the heads, region_index (batch, 1, regions, topk), and regions divide the map: no padding.
    """
    B, H, W, heads, d = query.shape
    rows, columns = region_size
    grid, pixels = (H // rows, W // columns), rows * columns
    count, topk = region_index.shape[2:]

    def regions(x):
        x = x.reshape(B, grid[0], rows, grid[1], columns, heads * d).transpose(2, 3)
        return x.reshape(B, count, pixels, heads * d)

    kv = torch.cat([regions(key), regions(value)], -1)
    expanded = kv[:, None].expand(-1, count, -1, -1, -1)
    index = region_index[:, 0, :, :, None, None].expand(-1, -1, -1, pixels, kv.shape[-1])
    k, v = expanded.gather(2, index).chunk(2, -1)
    k, v = (x.reshape(B * count, topk * pixels, heads, d).transpose(1, 2) for x in (k, v))
    q = regions(query).reshape(B * count, pixels, heads, d).transpose(1, 2)
    out = ((q * scale) @ k.mT).softmax(-1) @ v
    out = out.transpose(1, 2).reshape(B, *grid, rows, columns, heads, d)
    return out.transpose(2, 3).reshape(B, H, W, heads, d)


def contenders(case: Case, setting: Setting) -> dict[str, Calls]:
    qkv = setting.randn(case.batch, case.size, case.size, 3, case.heads, case.head_dim, seed=0)
    regions = (case.size // case.region_size) ** 2
    generator = torch.Generator().manual_seed(1)
    region_index = torch.rand(case.batch, regions, regions, generator=generator).topk(case.topk).indices
    region_index = region_index.to(setting.device)

    def attend(implementation, qkv, region_index):
        scale = (case.heads * case.head_dim) ** -0.5
        return routing_attention(*qkv.unbind(3), region_index, case.region_size, scale, implementation=implementation)

    functions = {'official': partial(attend, 'official'), 'reference': partial(attend, 'reference')}
    if setting.device == 'cuda':
        compiled = partial(torch.compile, dynamic=False, fullgraph=True)
        functions |= {f'{name}, compiled': compiled(function) for name, function in functions.items()}
        functions['tiled'] = partial(attend, 'tiled')
    functions['ours'] = partial(attend, None)
    return {name: calls(function, [qkv, region_index]) for name, function in functions.items()}


def cost(case: Case, itemsize: int) -> Cost:
    numbers = case.batch * case.size**2 * case.heads * case.head_dim
    return Cost(4 * numbers * itemsize, 4 * numbers * case.topk * case.region_size**2)


BENCHMARK = Benchmark('routing', {'cpu': CPU, 'cuda': CUDA}, contenders, official, cost)
