"""Tables of how kernels are cut, one JSON file an operator, by the problem and the GPU.

    {"rows": [{"match": {"arithmetic": "half", "head_dim": 32, "kernel_size": 7}, "targets": [80, 86],
               "blocks": {"forward": {"tile": [6, 10], "step": 64, "num_warps": 4, "num_stages": 2}, ...}}, ...]}

The first row that matches counts. A number in `match` is the greatest that the row takes, a string the only one; what
is not named is not asked for. A row without `targets` is for every GPU.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

from .launch import Block


@functools.cache
def load(path: Path) -> tuple[dict, ...]:
    """Rows of a table."""
    return tuple(json.loads(path.read_text())['rows'])


def save(path: Path, rows: Iterable[dict]) -> None:
    """Write a table, a block a line."""
    written = []
    for row in rows:
        head = ''.join(f'"{name}": {json.dumps(value)},\n   ' for name, value in row.items() if name != 'blocks')
        lines = ',\n'.join(f'    "{name}": {json.dumps(block)}' for name, block in row['blocks'].items())
        written.append(f'  {{{head}"blocks": {{\n{lines}\n  }}}}')
    path.write_text('{"rows": [\n' + ',\n'.join(written) + '\n]}\n')
    load.cache_clear()


def matches(row: dict, target: int | None, problem: dict[str, object]) -> bool:
    if 'targets' in row and target not in row['targets']:
        return False
    for name, limit in row['match'].items():
        value = problem[name]
        if value != limit if isinstance(limit, str) else value > limit:
            return False
    return True


def find(path: Path, target: int | None, **problem: object) -> dict[str, Block]:
    """{kernel: Block} for a GPU (as in sm_90; None if unknown) and a problem; ValueError if no row matches."""
    for row in load(path):
        if matches(row, target, problem):
            return blocks(row)
    raise ValueError(f'{path.name}: no row for {problem} on {target}')


def blocks(row: dict) -> dict[str, Block]:
    return {
        name: Block(tuple(block['tile']), block['step'], block['num_warps'], block['num_stages'])
        for name, block in row['blocks'].items()
    }
