"""Neighborhood attention beside the formulations there are, forward and with the backward, on the CPU.

    python -m benchmarks.kernels neighborhood                             # some minutes, most of them compiling

Float32, one thread, thread CPU time, interleaved; 7x7 windows and head_dim 32 at the stages of nat_mini and dinat_mini.
Inputs are views of a packed projection, and every formulation pays for its own layout. `memory` is how far a process
rises at the peak of forward and backward (below some 20 MiB: noise). FlexAttention has no backward on the CPU and is
measured without a bias, undilated; natten is measured in the same cases where it is installed, forward only too.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from zoo.benchmarks.timing import interleaved, machine, peak_memory
from zoo.kernels import neighborhood_attention
from zoo.kernels.neighborhood.reference import neighbors

RESULTS = Path(__file__).parent / 'results' / 'neighborhood.json'
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


def gather(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    """The neighbors gathered, then dense products: what one writes first in PyTorch."""
    index, offset = neighbors(case.size, KERNEL_SIZE, case.dilation, query.device)
    rows, columns = index[:, None, :, None], index[None, :, None, :]
    keys, values = (x[:, rows, columns].flatten(3, 4) for x in (key, value))
    scores = torch.einsum('bxyhd,bxynhd->bxyhn', query * case.head_dim**-0.5, keys)
    if bias is not None:
        scores = scores + bias[:, offset[:, None, :, None], offset[None, :, None, :]].flatten(3).permute(1, 2, 0, 3)
    return torch.einsum('bxyhn,bxynhd->bxyhd', scores.softmax(-1), values)


def ours(query, key, value, bias, case, implementation=None) -> Tensor:
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


def contenders(case: Case) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Functions of (query, key, value, bias, case): those with a backward, and those without one on the CPU."""
    torch.compiler.reset()  # one case does not count as a recompilation of another
    reference = partial(ours, implementation='reference')
    differentiable = {
        'gather': gather,
        'tiled': partial(ours, implementation='tiled'),
        'reference, compiled': torch.compile(reference, dynamic=False, fullgraph=True),
    }
    forward_only = {}
    if not case.bias and case.dilation == 1:
        forward_only['flex, compiled'] = flex(case)
        if importlib.util.find_spec('natten'):
            forward_only['natten'] = natten
    return differentiable, forward_only


def calls(function: Callable, case: Case, seed: int = 0) -> tuple[Callable, Callable]:
    """Forward, and forward and backward, of `function` on inputs of the case."""
    generator = torch.Generator().manual_seed(seed)
    shape = case.batch, case.size, case.size, 3, case.heads, case.head_dim
    qkv = torch.randn(shape, generator=generator, requires_grad=True)
    table = torch.randn(case.heads, 2 * KERNEL_SIZE - 1, 2 * KERNEL_SIZE - 1, generator=generator)
    bias = table.requires_grad_() if case.bias else None
    grad = torch.randn(case.batch, case.size, case.size, case.heads, case.head_dim, generator=generator)

    def forward():
        return function(*qkv.detach().unbind(3), None if bias is None else bias.detach(), case)

    def train():
        return torch.autograd.grad(function(*qkv.unbind(3), bias, case), (qkv, bias) if case.bias else qkv, grad)

    return forward, train


def measure(cases: dict[str, Case] = CASES, rounds: int = 9, progress: Progress | None = None) -> dict:
    """{'machine', 'cases': {name: {'case', 'functions': {name: {'forward', 'train', 'memory'}}}}}, seconds and bytes.

    `train` and `memory` are None for what has no backward.
    """
    progress = progress or Progress(disable=True)
    found = {}
    for name, case in progress.track(cases.items(), description='neighborhood attention'):
        differentiable, forward_only = contenders(case)
        each = {key: calls(function, case) for key, function in (differentiable | forward_only).items()}
        for key, (forward, train) in each.items():
            torch.testing.assert_close(forward(), each['gather'][0](), rtol=1e-4, atol=1e-5)
            if key in differentiable:
                torch.testing.assert_close(train(), each['gather'][1](), rtol=1e-3, atol=1e-3)
        forwards = interleaved({key: call[0] for key, call in each.items()}, rounds)
        trains = interleaved({key: each[key][1] for key in differentiable}, rounds)
        functions = {
            key: {
                'forward': forwards[key],
                'train': trains.get(key),
                'memory': peak_memory(each[key][1]) if key in trains else None,
            }
            for key in each
        }
        found[name] = {'case': case._asdict(), 'functions': functions}
    return {'machine': machine(), 'cases': found}


def table(report: dict) -> Table:
    result = Table('case', 'function', 'forward ms', 'ratio', 'and backward ms', 'ratio', 'memory MiB')
    result.title = 'neighborhood attention (ratio: times faster than gather)'
    for name, entry in report['cases'].items():
        baseline = entry['functions']['gather']
        for key, figures in entry['functions'].items():
            cells = []
            for measured in ('forward', 'train'):
                seconds = figures[measured]
                cells += (
                    ['', ''] if seconds is None else [f'{seconds * 1e3:.2f}', f'{baseline[measured] / seconds:.1f}']
                )
            memory = '' if figures['memory'] is None else f'{figures["memory"] / 2**20:.0f}'
            result.add_row(name, key, *cells, memory)
    return result
