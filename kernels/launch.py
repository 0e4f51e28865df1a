"""Launching Triton kernels: what can run where, and a launch as data, to be run or compiled for a GPU that isn't here.

Nothing here imports triton.
"""

import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import Problem, Verdict, chosen, impossible, possible

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (8, 0)  # compute capability: Triton has no tensor-core path for those before
HEAD_DIM = 128  # the greatest


INSTALLED = importlib.util.find_spec('triton') is not None
# Triton decides when it is imported, by this variable, whether it interprets kernels on the CPU.
INTERPRETED = os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'yes', 'on', 'y')


def judge(problem: Problem) -> Verdict:
    """What every operator's Triton implementation says of a device, dtype and head_dim."""
    fused = 'fused kernels, forward and backward'
    if not INSTALLED:
        return impossible('triton is not installed')
    if problem.dtype not in DTYPES:
        return impossible(f'it computes in float32 at most, not {str(problem.dtype).removeprefix("torch.")}')
    if problem.shape is not None and problem.shape[-1] > HEAD_DIM:
        return impossible(f'it takes head_dim up to {HEAD_DIM}, not {problem.shape[-1]}')
    if INTERPRETED and problem.device in ('cpu', 'cuda'):
        return possible('Triton interprets it, which is for tests')
    if problem.device != 'cuda':
        return impossible(f'it needs CUDA or ROCm, not {problem.device}')
    if torch.version.hip:
        return chosen(fused)
    if problem.capability is None:
        return chosen(f'{fused}; no such device is here, one of compute capability {_dotted(OLDEST)} is assumed')
    if problem.capability < OLDEST:
        return impossible(f'it needs compute capability {_dotted(OLDEST)}, not {_dotted(problem.capability)}')
    return chosen(fused)


def _dotted(capability: tuple[int, int]) -> str:
    return '.'.join(map(str, capability))


def arithmetic(dtype: torch.dtype) -> str:
    """How products are computed: 'half', and those of float32 in 'tf32' where the user lets PyTorch's be, or 'ieee'."""
    if dtype != torch.float32:
        return 'half'
    return 'tf32' if torch.backends.cuda.matmul.fp32_precision == 'tf32' and not torch.version.hip else 'ieee'


def target(device: torch.device) -> int | None:
    """Compute capability of a device as in sm_90; None where there is none."""
    if device.type != 'cuda' or not torch.cuda.is_available() or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def programs(device: torch.device) -> int:
    """How many programs keep a device busy."""
    if device.type != 'cuda' or not torch.cuda.is_available():
        return 8
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def strides(axes: str, **tensors: Tensor) -> dict[str, int]:
    """Strides as arguments of kernels: those of `key` along axes 'byxhd' are key_b, key_y, key_x, key_h and key_d."""
    return {f'{name}_{axis}': n for name, x in tensors.items() for axis, n in zip(axes, x.stride(), strict=True)}


def empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Output for queries (batch, height, width, heads, head_dim), and log-sum-exps (batch, heads, height, width)."""
    batch, height, width, heads, _ = query.shape
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(batch, heads, height, width, dtype=torch.float32, device=query.device),
    )


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Block(NamedTuple):
    """How a kernel cuts its problem: its own tile (rows, columns), and how many tokens it meets in a step."""

    tile: tuple[int, int]
    step: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """A call of a jit function: `arguments` by name, constants in capitals among them, in any order."""

    kernel: Callable
    programs: int
    arguments: dict[str, object]
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, kernel: Callable, programs: int, block: Block, given: dict[str, object]) -> 'Launch':
        """A launch cut by `block`, whose arguments are taken by name out of `given`, which may have more."""
        arguments = {name: given[name] for name in kernel.arg_names}
        return cls(kernel, programs, arguments, block.num_warps, block.num_stages)

    @property
    def options(self) -> dict[str, object]:
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)

    def run(self) -> None:
        """Nothing happens where there are no programs: an empty batch."""
        if not self.programs:
            return
        device = next(x.device for x in self.arguments.values() if isinstance(x, Tensor))
        with torch.cuda.device(device) if device.type == 'cuda' else nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.options)
