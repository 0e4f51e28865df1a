"""Routing attention beside the official formulation and its definition, forward and with the backward, on the CPU.

    python -m benchmarks.kernels routing                                  # a few minutes

Float32, eager, one thread, thread CPU time, interleaved; the shapes of biformer_tiny's stages at 512 and at 224 pixels.
Inputs are views of a packed projection, and every formulation pays for its own layout. `memory` is how far a process
rises at the peak of forward and backward (below some 20 MiB: noise).
"""

from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from rich.table import Table

from zoo.benchmarks.timing import interleaved, machine, peak_memory
from zoo.kernels import routing_attention

RESULTS = Path(__file__).parent / 'results' / 'routing.json'


class Case(NamedTuple):
    batch: int
    size: int  # height and width of the map
    heads: int
    region_size: int
    topk: int
    head_dim: int = 32


CASES = {
    '512, stage 1': Case(1, 128, 2, 16, 1),
    '512, stage 2': Case(1, 64, 4, 8, 4),
    '512, stage 3': Case(1, 32, 8, 4, 16),
    '224, stage 1': Case(8, 56, 2, 8, 1),
    '224, stage 2': Case(8, 28, 4, 4, 4),
    '224, stage 3': Case(8, 14, 8, 2, 16),
}


def official(query, key, value, region_index, region_size, scale):
    """As rayleizhu/BiFormer's bra_legacy.py: keys and values gathered out of a map expanded over the regions."""
    B, H, W, heads, d = query.shape
    grid, pixels, topk = H // region_size, region_size**2, region_index.shape[-1]

    def regions(x):
        x = x.reshape(B, grid, region_size, grid, region_size, heads * d).transpose(2, 3)
        return x.reshape(B, grid**2, pixels, heads * d)

    kv = torch.cat([regions(key), regions(value)], -1)
    expanded = kv[:, None].expand(-1, grid**2, -1, -1, -1)
    k, v = expanded.gather(2, region_index[..., None, None].expand(-1, -1, -1, pixels, kv.shape[-1])).chunk(2, -1)
    k, v = (x.reshape(B * grid**2, topk * pixels, heads, d).transpose(1, 2) for x in (k, v))
    q = regions(query).reshape(B * grid**2, pixels, heads, d).transpose(1, 2)
    out = ((q * scale) @ k.mT).softmax(-1) @ v
    out = out.transpose(1, 2).reshape(B, grid, grid, region_size, region_size, heads, d)
    return out.transpose(2, 3).reshape(B, H, W, heads, d)


def reference(*arguments):
    return routing_attention(*arguments, implementation='reference')


FUNCTIONS = {'official': official, 'reference': reference, 'ours': routing_attention}


def calls(function, case: Case, seed: int = 0):
    """Forward, and forward and backward, of `function` on inputs of the case."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.size, case.size, 3, case.heads, case.head_dim)
    qkv = torch.randn(shape, generator=generator, requires_grad=True)
    regions = (case.size // case.region_size) ** 2
    region_index = torch.rand(case.batch, regions, regions, generator=generator).topk(case.topk).indices
    arguments = region_index, case.region_size, (case.heads * case.head_dim) ** -0.5

    @torch.inference_mode()
    def forward():
        return function(*qkv.unbind(3), *arguments)

    def train():
        qkv.grad = None
        function(*qkv.unbind(3), *arguments).square().sum().backward()
        return qkv.grad

    return forward, train


def measure(cases: dict[str, Case] = CASES, rounds: int = 9, progress: Progress | None = None) -> dict:
    """{'machine', 'cases': {name: {'case', 'functions': {name: {'forward', 'train', 'memory'}}}}}: seconds, bytes."""
    progress = progress or Progress(disable=True)
    found = {}
    for name, case in progress.track(cases.items(), description='routing attention'):
        each = {key: calls(function, case) for key, function in FUNCTIONS.items()}
        for forward, train in each.values():
            torch.testing.assert_close(forward(), each['ours'][0]())
            torch.testing.assert_close(train(), each['ours'][1]())
        forwards = interleaved({key: call[0] for key, call in each.items()}, rounds)
        trains = interleaved({key: call[1] for key, call in each.items()}, rounds)
        functions = {
            key: {'forward': forwards[key], 'train': trains[key], 'memory': peak_memory(calls(FUNCTIONS[key], case)[1])}
            for key in each
        }
        found[name] = {'case': case._asdict(), 'functions': functions}
    return {'machine': machine(), 'cases': found}


def table(report: dict) -> Table:
    result = Table('case', 'function', 'forward ms', 'forward and backward ms', 'memory MiB', title='routing attention')
    for name, entry in report['cases'].items():
        for key, figures in entry['functions'].items():
            times = (f'{figures[measure] * 1e3:.1f}' for measure in ('forward', 'train'))
            result.add_row(name, key, *times, f'{figures["memory"] / 2**20:.0f}')
    return result
