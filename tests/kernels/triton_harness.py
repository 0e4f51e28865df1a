"""What the tests of every operator's Triton kernels share.

Triton decides when it is imported whether it interprets, so that tests marked `interpreted` run in a process of their
own, which one test of a file starts by `run_interpreted(__file__)`; `compiled` ones never run there. The interpreter
computes what the kernels say, one program after the other: it knows no races.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .harness import output_and_gradients

interpreted = pytest.mark.interpreted
compiled = pytest.mark.compiled


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split('.')[:2])


def run_interpreted(file: str) -> None:
    """Run the tests of a file that are marked `interpreted`, in a process that interprets."""
    if _version('triton') < (3, 7) and _version('numpy') >= (2, 4):
        pytest.skip('the interpreter of Triton 3.6 needs numpy 2.3 or older')
    environment = {name: value for name, value in os.environ.items() if not name.startswith('PYTEST')}
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-m', 'interpreted']
    result = subprocess.run(
        [*command, file],
        env=environment | {'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]


def inside_nans(x: Tensor) -> Tensor:
    """`x` as a contiguous view of memory that is NaN before and after it."""
    memory = torch.full((x.shape[0] + 2, *x.shape[1:]), torch.nan, dtype=x.dtype)
    memory[1:-1] = x
    return memory[1:-1]


def moved(tensors: dict[str, Tensor | None], device: str) -> dict[str, Tensor | None]:
    """Tensors on `device`, views of the same memory still, with what lies around them."""
    memory = {}

    def move(x: Tensor | None) -> Tensor | None:
        if x is None or device == 'cpu':
            return x
        whole = x if x._base is None else x._base
        if id(whole) not in memory:
            memory[id(whole)] = whole.to(device)
        return memory[id(whole)].as_strided(x.shape, x.stride(), x.storage_offset())

    return {name: move(x) for name, x in tensors.items()}


def assert_deterministic(function, tensors: dict[str, Tensor | None], grad_output: Tensor) -> None:
    """Two runs in PyTorch's deterministic mode give the same bits, the output's and every gradient's."""
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (output_and_gradients(function, tensors, grad_output) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in first[1].items())
