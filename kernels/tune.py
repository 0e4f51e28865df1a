"""Find how a GPU that is here is best used: time ways to cut an operator's kernels, and write them into its table.

    python -m zoo.kernels.tune neighborhood                  # into the shipped table, for GPUs of this kind
    python -m zoo.kernels.tune neighborhood --only 'bfloat16 57x57 kernel 7x7 head_dim 32' --json my.json

Each kernel of each row is tuned by itself, one property after the other, from what the row says now: some 80 ways a
row, most of whose time is compiling. A row is written when it is done.
"""

import argparse
import fnmatch
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from . import configs, launch
from .aggregated import triton as aggregated
from .launch import Block, Launch
from .neighborhood import triton as neighborhood
from .routing import triton as routing

OPERATORS: dict[str, ModuleType] = {'neighborhood': neighborhood, 'routing': routing, 'aggregated': aggregated}
STEPS, WARPS, STAGES = (16, 32, 64, 128), (2, 4, 8), (1, 2, 3)


def milliseconds(launches: list[Launch]) -> float:
    """Time of launches, one after the other; infinite where they do not fit onto the GPU."""
    from triton.errors import TritonError
    from triton.testing import do_bench

    try:
        return do_bench(lambda: [each.run() for each in launches])
    except (TritonError, RuntimeError):
        return math.inf


def tune_row(
    module: ModuleType, row: dict, measure: Callable[[list[Launch]], float] = milliseconds, **problem: object
) -> dict:
    """`row` with the fastest blocks that were found for the first of its problems; `problem` goes to launches()."""
    _, first = next(module.problems(row))
    blocks = configs.blocks(row)
    for name in blocks:
        times: dict[Block, float] = {}

        def time(block: Block, name=name, times=times) -> float:
            if block not in times:
                times[block] = measure(module.launches({**blocks, name: block}, **first | problem)[name])
            return times[block]

        for field, values in (
            ('tile', module.tiles(row)),
            ('step', STEPS),
            ('num_warps', WARPS),
            ('num_stages', STAGES),
        ):
            candidates = [blocks[name], *(blocks[name]._replace(**{field: value}) for value in values)]
            blocks[name] = min(candidates, key=time)
    return {**row, 'blocks': {name: block._asdict() for name, block in blocks.items()}}


def rows_to_tune(module: ModuleType, only: str = '*') -> list[dict]:
    """Rows of an operator's table for any GPU whose first problem is of the pattern `only`; ValueError if none is."""
    rows = [row for row in configs.load(module.CONFIGS) if 'targets' not in row]
    names = [next(module.problems(row))[0] for row in rows]
    if found := [row for row, name in zip(rows, names, strict=True) if fnmatch.fnmatch(name, only)]:
        return found
    raise ValueError(f'no problem is of the pattern {only!r}; there are {", ".join(map(repr, names))}')


def merge(rows: tuple[dict, ...], tuned: list[dict]) -> list[dict]:
    """`tuned` before `rows`, in the place of those for the same problems and targets."""
    keys = [(row['match'], row.get('targets')) for row in tuned]
    return [*tuned, *(row for row in rows if (row['match'], row.get('targets')) not in keys)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('operator', choices=OPERATORS)
    parser.add_argument('--json', type=Path, help="table to write; the operator's own without it")
    parser.add_argument('--only', default='*', help="pattern of problems, such as 'bfloat16*head_dim 32'")
    parser.add_argument('--batch', type=int, default=64)
    args = parser.parse_args(arguments)
    target = launch.target(torch.device('cuda'))
    if target is None:
        parser.error('there is no CUDA GPU here')
    module = OPERATORS[args.operator]
    rows, tuned = configs.load(module.CONFIGS), []
    try:
        chosen = rows_to_tune(module, args.only)
    except ValueError as error:
        parser.error(str(error))
    for row in chosen:
        found = tune_row(module, row, device='cuda', batch=args.batch)
        tuned.append({'match': row['match'], 'targets': [target], 'blocks': found['blocks']})
        print(row['match'], found['blocks'])
        configs.save(args.json or module.CONFIGS, merge(rows, tuned))


if __name__ == '__main__':
    main()
