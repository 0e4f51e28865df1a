"""How an operator is measured: beside what else there is, forward and with the backward, on the CPU.

Float32, one thread, thread CPU time, interleaved (see timing.py). `memory` is how far a process rises at the peak of
forward and backward; below some 20 MiB it is noise.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from zoo.benchmarks.timing import interleaved, machine, peak_memory
from zoo.kernels.dispatch import OPERATORS, possible

FORWARD_TOLERANCE = dict(rtol=1e-4, atol=1e-5)
GRADIENT_TOLERANCE = dict(rtol=1e-3, atol=1e-3)  # gradients of parameters are sums over a whole batch


class Calls(NamedTuple):
    """A forward pass, and one with its backward, which returns the gradients; None where there is no backward."""

    forward: Callable[[], Tensor]
    train: Callable[[], tuple[Tensor, ...]] | None


def calls(function: Callable[..., Tensor], inputs: list[Tensor], has_backward: bool = True, seed: int = 1) -> Calls:
    """`function` of all inputs, floating or not, with gradients of the floating ones and a random one of its result."""
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in inputs if x.requires_grad]
    with torch.no_grad():
        grad = torch.randn(function(*inputs).shape, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def forward():
        return function(*inputs)

    def train():
        return torch.autograd.grad(function(*inputs), wanted, grad)

    return Calls(forward, train if has_backward else None)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What an operator is measured on and beside.

    Attributes:
        name: of the operator.
        cases: name -> a NamedTuple that says what the inputs are.
        contenders: case -> name -> `Calls`, the baseline first. They run on the same inputs, and must agree with the
            baseline before they are measured.
        official: the formulation of the authors' code, or where that can't be installed the one that anybody would
            write, with the arguments of an implementation of the operator.
    """

    name: str
    cases: dict[str, NamedTuple]
    contenders: Callable[[NamedTuple], dict[str, Calls]]
    official: Callable[..., Tensor]

    def __post_init__(self):
        """Make the formulation known as an implementation that runs where it is asked for by name."""
        judge = possible('the formulation of the original code, to be measured beside')
        OPERATORS[f'{self.name}_attention'].register('official', self.official, lambda problem: judge)

    @property
    def results(self) -> Path:
        """The file that figures are kept in."""
        return Path(__file__).parent / 'results' / f'{self.name}.json'

    def measure(self, rounds: int = 9, progress: Progress | None = None) -> dict:
        """{'machine', 'cases': {name: {'case', 'functions': {name: {'forward', 'train', 'memory'}}}}}.

        Seconds and bytes; `train` and `memory` are None for what has no backward.
        """
        progress = progress or Progress(disable=True)
        found = {}
        for name, case in progress.track(self.cases.items(), description=f'{self.name} attention'):
            torch.compiler.reset()  # one case does not count as a recompilation of another
            each = self.contenders(case)
            baseline = next(iter(each.values()))
            output, gradients = baseline.forward(), baseline.train()
            for forward, train in each.values():
                torch.testing.assert_close(forward(), output, **FORWARD_TOLERANCE)
                if train is not None:
                    torch.testing.assert_close(train(), gradients, **GRADIENT_TOLERANCE)
            del output, gradients
            forwards = interleaved({key: call.forward for key, call in each.items()}, rounds)
            trains = interleaved({key: call.train for key, call in each.items() if call.train}, rounds)
            functions = {
                key: {
                    'forward': forwards[key],
                    'train': trains.get(key),
                    'memory': peak_memory(call.train) if call.train else None,
                }
                for key, call in each.items()
            }
            found[name] = {'case': case._asdict(), 'functions': functions}
        return {'machine': machine(), 'cases': found}

    def table(self, report: dict) -> Table:
        """A row for each contender of each case, with how many times faster than the case's baseline it is."""
        result = Table('case', 'function', 'forward ms', 'ratio', 'and backward ms', 'ratio', 'memory MiB')
        result.title = f'{self.name} attention (ratio: times faster than the first of the case)'
        for name, entry in report['cases'].items():
            baseline = next(iter(entry['functions'].values()))
            for key, figures in entry['functions'].items():
                cells = []
                for measured in ('forward', 'train'):
                    seconds = figures[measured]
                    ratio = '' if seconds is None else f'{baseline[measured] / seconds:.1f}'
                    cells += ['' if seconds is None else f'{seconds * 1e3:.2f}', ratio]
                memory = '' if figures['memory'] is None else f'{figures["memory"] / 2**20:.0f}'
                result.add_row(name, key, *cells, memory)
        return result
