"""How an operator is measured: beside what else there is, forward and with the backward.

On the CPU: float32, one thread, thread CPU time, interleaved (see timing.py); `memory` is how far a process rises at
the peak of forward and backward, and below some 20 MiB it is noise. On a GPU: bfloat16, medians of CUDA events,
interleaved, with the cache emptied before each call; `memory` is what torch allocates at the peak.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from zoo.benchmarks.timing import bounds, interleaved, machine, peak_memory
from zoo.kernels.dispatch import OPERATORS, possible

# Relative, of the norm: sums in other orders; gradients of parameters are sums over a whole batch.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 5e-2)}
DTYPES = {'cpu': torch.float32, 'cuda': torch.bfloat16}


class Unavailable(Exception):
    """A contender that refuses the problem or the machine: it has no figures, and the others are measured."""


class Calls(NamedTuple):
    """A forward pass, and one with its backward, which returns the gradients; None where there is no backward."""

    forward: Callable[[], Tensor]
    train: Callable[[], tuple[Tensor, ...]] | None
    is_alike: bool = True  # whether it computes what the baseline does; not so what can do only a part of it


class Cost(NamedTuple):
    """What a forward pass cannot do without: bytes read and written, and floating-point operations."""

    bytes: int
    operations: int


class Setting(NamedTuple):
    """Where a case is measured."""

    device: str
    dtype: torch.dtype

    def randn(self, *shape: int, seed: int) -> Tensor:
        """Random numbers, the same at each call; drawn on the device, where a CPU takes seconds for a billion."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)


def calls(
    function: Callable[..., Tensor], inputs: list[Tensor], has_backward: bool = True, is_alike: bool = True
) -> Calls:
    """`function` of all inputs, floating or not, with gradients of the floating ones and a random one of its result."""
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in inputs if x.requires_grad]
    detached = [x.detach() for x in inputs]
    grads = []

    @torch.no_grad()
    def forward():
        return function(*detached)

    def train():
        output = function(*inputs)
        if not grads:
            grads.append(Setting(output.device.type, output.dtype).randn(*output.shape, seed=99))
        return torch.autograd.grad(output, wanted, grads[0])

    return Calls(forward, train if has_backward else None, is_alike)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What an operator is measured on and beside.

    Attributes:
        name: of the operator.
        cases: of each device type, name -> a NamedTuple that says what the inputs are.
        contenders: case, setting -> name -> `Calls`, the baseline first. They run on the same inputs, and must agree
            with the first that runs before they are measured.
        official: the formulation of the authors' code, or where that can't be installed the one that anybody would
            write, with the arguments of an implementation of the operator.
        cost: case, bytes of a number -> of a forward pass.
        tolerances: dtype -> by how much contenders may differ from the first, outputs and gradients.
    """

    name: str
    cases: dict[str, dict[str, NamedTuple]]
    contenders: Callable[[NamedTuple, Setting], dict[str, Calls]]
    official: Callable[..., Tensor]
    cost: Callable[[NamedTuple, int], Cost] | None = None
    tolerances: dict[torch.dtype, tuple[float, float]] = dataclasses.field(default_factory=TOLERANCES.copy)

    def __post_init__(self):
        """Make the formulation known as an implementation that runs where it is asked for by name."""
        judge = possible('the formulation of the original code, to be measured beside')
        OPERATORS[f'{self.name}_attention'].register('official', self.official, lambda problem: judge)

    def measure(
        self,
        rounds: int = 9,
        progress: Progress | None = None,
        device: str = 'cpu',
        deadline: float = math.inf,
        done: Collection[str] = (),
        keep: Callable[[dict], None] = lambda report: None,
    ) -> dict:
        """Figures of every case on a type of device that is not `done`, begun before `deadline` (time.monotonic).

        `keep` gets the report after each case: a run that is stopped has lost one case at most. A case that fails is
        left out, and RuntimeError raised at the end.

        Returns:
            {'machine', 'setting', 'cases': {name: {'case', 'cost', 'functions': {name: {'forward', 'train',
            'memory'}}}}}, in seconds and bytes. `train` and `memory` are None for what has no backward, and all are
            for what runs out of memory. 'bounds' has the rates of copies and of matrix products on a GPU.
        """
        progress = progress or Progress(disable=True)
        setting = Setting(device, DTYPES[device])
        report = {'machine': machine(), 'setting': {'device': device, 'dtype': str(setting.dtype)}}
        report |= {'bounds': bounds() if device == 'cuda' else None, 'cases': {}}
        cases = {name: case for name, case in self.cases[device].items() if name not in done}
        failed = []
        for name, case in progress.track(cases.items(), description=f'{self.name} attention'):
            if time.monotonic() > deadline:
                break
            start = time.monotonic()
            torch.compiler.reset()  # one case does not count as a recompilation of another
            try:
                each = self.contenders(case, setting)
                agreed = self._agreeing(each, setting)
            except RuntimeError as error:
                failed.append(f'{self.name}, {name}: {error}')
                continue
            forwards = interleaved({key: each[key].forward for key in agreed}, rounds, device=device)
            trains = interleaved({key: each[key].train for key in agreed if each[key].train}, rounds, device=device)
            functions = {
                key: {
                    'forward': forwards.get(key),
                    'train': trains.get(key),
                    'memory': peak_memory(call.train, device) if key in trains else None,
                }
                for key, call in each.items()
            }
            cost = self.cost(case, setting.dtype.itemsize)._asdict() if self.cost else None
            report['cases'][name] = {'case': case._asdict(), 'cost': cost, 'functions': functions}
            keep(report)
            progress.console.print(f'{self.name}, {name}: measured in {time.monotonic() - start:.0f} s')
        if failed:
            raise RuntimeError('\n'.join(failed))
        return report

    def _agreeing(self, each: dict[str, Calls], setting: Setting) -> list[str]:
        """Names of what runs, within the memory there is; RuntimeError if one of them computes something else."""
        agreed, output, gradients = [], None, None
        for name, (forward, train, is_alike) in each.items():
            try:
                got, got_gradients = forward(), train() if train else None
            except (torch.OutOfMemoryError, Unavailable):
                continue
            agreed.append(name)
            if not is_alike:
                continue
            output = got if output is None else output
            gradients = got_gradients if gradients is None else gradients
            tolerance = self.tolerances[setting.dtype]
            errors = [(_difference(got, output), tolerance[0])]
            if got_gradients is not None:
                errors += [(_difference(a, b), tolerance[1]) for a, b in zip(got_gradients, gradients, strict=True)]
            if any(not error <= limit for error, limit in errors):
                raise RuntimeError(f'{name!r} differs from {agreed[0]!r}: {errors}')
        return agreed

    def table(self, report: dict) -> Table:
        """A row for each contender of each case, with how many times faster than the case's baseline it is."""
        result = Table('case', 'function', 'forward ms', 'ratio', 'and backward ms', 'ratio', 'memory MiB')
        result.title = f'{self.name} attention (ratio: times faster than the first of the case)'
        for name, entry in report['cases'].items():
            for key, cells in rows(entry):
                result.add_row(name, key, *cells)
        return result


def rows(entry: dict) -> list[tuple[str, list[str]]]:
    """Of one case of a report: (contender, [forward ms, ratio, with the backward ms, ratio, memory MiB])."""
    functions = entry['functions']
    baseline = {
        measured: next((each[measured] for each in functions.values() if each[measured]), None)
        for measured in ('forward', 'train')
    }
    found = []
    for name, figures in functions.items():
        cells = []
        for measured in ('forward', 'train'):
            seconds = figures[measured]
            cells += [_milliseconds(seconds), f'{baseline[measured] / seconds:.1f}'] if seconds else ['', '']
        cells.append('' if figures['memory'] is None else f'{figures["memory"] / 2**20:.0f}')
        found.append((name, cells))
    return found


def _milliseconds(seconds: float) -> str:
    return f'{seconds * 1e3:.0f}' if seconds >= 0.1 else f'{seconds * 1e3:.3g}'


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
