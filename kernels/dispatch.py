"""Which implementation of an operator runs, and why.

Every operator's folder makes one `Operator` and registers its implementations in the order in which they are
considered, each with a function from a `Problem` to a `Verdict`. The first implementation whose verdict is `chosen`
runs. A choice that a caller forces, by `implementation=` or by `use`, is kept or is an error: never a silent fallback.

    OPERATOR = Operator('neighborhood_attention')
    OPERATOR.register('tiled', tiled, judge)         # judge(problem) -> Verdict
    OPERATOR.select(query, implementation)(query, ...)
"""

import itertools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .checks import autocasts


class Problem(NamedTuple):
    """What a choice may depend on. Sizes can be symbolic while a graph is traced: a comparison then specialises it."""

    device: str  # device type: 'cpu', 'cuda', 'meta', ...
    dtype: torch.dtype
    shape: tuple | None  # of the query; None when it is not known
    compiling: bool = False  # under torch.compile
    exporting: bool = False  # under torch.export, which torch.onnx.export uses
    capability: tuple[int, int] | None = None  # of a CUDA device; None where there is none to ask
    options: dict[str, object] = {}  # what else the operator's choice depends on, by name


class Verdict(NamedTuple):
    """What an implementation says of a problem: `chosen` implies `runs`; `reason` completes "because ..."."""

    runs: bool
    chosen: bool
    reason: str


def chosen(reason: str) -> Verdict:
    """It runs, and is the one to take unless an earlier one was taken."""
    return Verdict(True, True, reason)


def possible(reason: str) -> Verdict:
    """It runs where it is asked for by name."""
    return Verdict(True, False, reason)


def impossible(reason: str) -> Verdict:
    """It cannot run."""
    return Verdict(False, False, reason)


@dataclass(frozen=True)
class Explanation:
    """The implementation that runs, the reason, and what every implementation says of the problem."""

    operator: str
    implementation: str
    reason: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def passed_over(self) -> dict[str, Verdict]:
        """What was considered before the implementation that runs, and was not taken."""
        considered = itertools.takewhile(lambda name: name != self.implementation, self.verdicts)
        return {name: self.verdicts[name] for name in considered}


class Operator:
    """An operator and its implementations, in the order in which they are considered."""

    def __init__(self, name: str):
        self.name = name
        self.forced: str | None = None
        self.functions: dict[str, Callable] = {}
        self.judges: dict[str, Callable[[Problem], Verdict]] = {}
        OPERATORS[name] = self

    def register(self, implementation: str, function: Callable, judge: Callable[[Problem], Verdict]) -> None:
        self.functions[implementation] = function
        self.judges[implementation] = judge

    def select(self, query: torch.Tensor, implementation: str | None = None, **options: object) -> Callable:
        """The function to call for `query`; ValueError if `implementation`, or the one forced by `use`, cannot run.

        It computes outside of an autocast region that is open here: implementations choose their dtypes themselves.
        """
        exporting = is_exporting()
        compiling = torch.compiler.is_compiling() and not exporting
        device = query.device
        capability = _capability(device.index) if device.type == 'cuda' else None
        problem = Problem(device.type, query.dtype, query.shape, compiling, exporting, capability, options)
        function = self.functions[self.choose(problem, implementation)[0]]
        return _without_autocast(function, problem.device) if autocasts(problem.device) else function

    def choose(self, problem: Problem, implementation: str | None = None) -> tuple[str, str]:
        """Name of the implementation for `problem` and the reason; ValueError if there is none."""
        name = implementation or self.forced
        if name is not None:
            self.check_name(name)
            verdict = self.judges[name](problem)
            if not verdict.runs:
                raise ValueError(f'{self.name}: implementation {name!r} cannot run: {verdict.reason}')
            return name, 'asked for by name'
        for name, judge in self.judges.items():
            verdict = judge(problem)
            if verdict.chosen:
                return name, verdict.reason
        raise ValueError(f'{self.name}: no implementation for {problem.dtype} on device {problem.device!r}')

    def check_name(self, implementation: str) -> None:
        if implementation not in self.functions:
            raise ValueError(
                f'{self.name}: unknown implementation {implementation!r}, expected one of {", ".join(self.functions)}'
            )


OPERATORS: dict[str, Operator] = {}


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None where there is no such device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.cuda.get_device_capability(index) if (index or 0) < count else None


def is_exporting() -> bool:
    """Whether torch.export traces what calls this."""
    # Dynamo of torch 2.11 takes torch.compiler.is_exporting() for true in all that it traces, but not the flag behind.
    flag = getattr(torch.compiler, '_is_exporting_flag', None)
    return torch.compiler.is_exporting() if flag is None else flag


def _without_autocast(function: Callable, device: str) -> Callable:
    def run(*arguments):
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


def find(operator: str) -> Operator:
    """The operator called `operator`; ValueError with the names there are."""
    if operator not in OPERATORS:
        raise ValueError(f'unknown operator {operator!r}, expected one of {", ".join(OPERATORS)}')
    return OPERATORS[operator]


@contextmanager
def use(implementation: str, operator: str | None = None):
    """Force an implementation of every operator, or of one, in the whole process while the context is open.

    `use('reference')` around torch.onnx.export or torch.export.export writes plain PyTorch operations into the graph,
    which ONNX can express. Open it outside of a compiled function, not inside. An `implementation=` argument goes
    before it. ValueError if an operator concerned has no implementation of that name.
    """
    operators = list(OPERATORS.values()) if operator is None else [find(operator)]
    for each in operators:
        each.check_name(implementation)
    before = [each.forced for each in operators]
    for each in operators:
        each.forced = implementation
    try:
        yield
    finally:
        for each, forced in zip(operators, before, strict=True):
            each.forced = forced


def explain(
    operator: str,
    device: str | torch.device = 'cpu',
    dtype: torch.dtype = torch.float32,
    shape: tuple | None = None,
    compiling: bool = False,
    exporting: bool = False,
    **options: object,
) -> Explanation:
    """Say which implementation of `operator` runs for such a query, and why; ValueError if none can.

    Options are arguments of the operator on which its choice depends, as `dilation=2`.
    """
    found = find(operator)
    device = torch.device(device)
    capability = _capability(device.index) if device.type == 'cuda' else None
    problem = Problem(device.type, dtype, shape, compiling, exporting, capability, options)
    name, reason = found.choose(problem)
    return Explanation(operator, name, reason, {each: judge(problem) for each, judge in found.judges.items()})
