"""Every shipped configuration of the Triton kernels, compiled for GPUs that needn't be here.

    python -m benchmarks.compile_proof                                   # all operators, all targets
    python -m benchmarks.compile_proof neighborhood --targets 80,90 --only 'bfloat16*head_dim 32' --jobs 2

It shows that ptxas takes the kernels, that they fit into shared memory, spill no registers outside of SPILLS, and use
tensor cores wherever the arithmetic allows. It shows nothing of speed, nor that results are right. Without --json a
run of all of an operator goes to results/compile_proof_OPERATOR.json.
"""

import argparse
import fnmatch
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from zoo.benchmarks.timing import machine
from zoo.kernels import configs
from zoo.kernels.launch import INTERPRETED, Launch
from zoo.kernels.targets import SHARED_KIB, Compiled, compile_for
from zoo.kernels.tune import OPERATORS

RESULTS = Path(__file__).parent / 'results'
# Patterns of 'operator problem kernel' -> bytes of stack that they may take. Neighborhood and aggregated attention keep
# tables in registers for a loop over tiles or images, and routing goes through heads: what lies in memory instead is
# made once before.
SPILLS = {
    '*': 16,  # a register or four, which ptxas gives up where one more program fits for it
    'aggregated *float16 * window 3x3 * forward': 320,
    'aggregated *float16 * window 3x3 * query_gradient': 580,
    'aggregated *float16 * window 3x3 * key_gradient': 580,
    'aggregated tf32 * window 3x3 * query_gradient': 160,
    'aggregated tf32 * window 3x3 * key_gradient': 760,
    'aggregated * window 7x7 *_gradient': 48,  # heads of 96 and 128 numbers, which no model has
    'aggregated tf32 * window 7x7 * query_gradient': 200,
    'aggregated ieee * window 3x3 * forward': 56,
    'aggregated ieee * window 7x7 *': 550,
    'routing *float16 regions 8x8 head_dim 96 *key_gradient': 240,
    'routing *float16 regions 8x8 head_dim 128 *key_gradient': 240,
    'neighborhood *float16 * head_dim [23]? *': 380,
    'neighborhood *float16 * head_dim [46]? *': 650,
    'neighborhood *float16 * head_dim 96 *': 1000,
    'neighborhood *float16 * head_dim 128 *': 1000,
    'neighborhood tf32 *': 240,
    'neighborhood ieee *': 660,  # products of float32 without tensor cores hold both factors
}
# Patterns -> share of the instructions of the longest loop, in which a kernel is nearly all of the time, that may load
# what was spilled.
RELOADS = {
    '*': 0.05,
    'aggregated *float16 * window 3x3 * query_gradient': 0.055,
    'aggregated *float16 * window 3x3 * key_gradient': 0.11,
    'aggregated tf32 * window 3x3 * key_gradient': 0.1,
    'neighborhood *float16 * head_dim 24 bias_gradient': 0.1,
    'neighborhood *float16 * head_dim [46]? forward': 0.065,
    'neighborhood *float16 * head_dim [46]? key_gradient': 0.055,
    'neighborhood *float16 1x57 * query_gradient': 0.08,
    'neighborhood *float16 8x8 * query_gradient': 0.08,
    'neighborhood *float16 8x8 * forward': 0.08,
    'neighborhood ieee * head_dim 128 *': 0.07,
}
# Kernels without products of matrices, and products that tensor cores do not compute.
NO_TENSOR_CORES = ('*_gradient_sum', '* ieee *', '* measure')


class Task(NamedTuple):
    operator: str
    problem: str
    kernel: str
    index: int  # among the operator's examples
    target: int

    @property
    def title(self) -> str:
        return f'{self.operator} {self.problem} {self.kernel}'


def _examples(operator: str) -> Iterator[tuple[str, Launch, list[int]]]:
    """(problem, launch, targets that take it) of every kernel for every row of an operator's table."""
    module = OPERATORS[operator]
    rows = configs.load(module.CONFIGS)
    for index, row in enumerate(rows):
        before = [each for each in rows[:index] if each['match'] == row['match']]
        taken = {target for each in before for target in each.get('targets', SHARED_KIB)}
        targets = [target for target in row.get('targets', SHARED_KIB) if target not in taken]
        for name, problem in module.problems(row):
            for launches in module.launches(configs.blocks(row), **problem).values():
                yield from ((name, launch, targets) for launch in launches)


def tasks(operators: list[str], targets: list[int], only: str = '*') -> list[Task]:
    """What there is to compile; `only` is a pattern of problems."""
    return [
        Task(operator, problem, launch.kernel.__name__, index, target)
        for operator in operators
        for index, (problem, launch, takers) in enumerate(_examples(operator))
        if fnmatch.fnmatch(problem, only)
        for target in targets
        if target in takers
    ]


def compile_one(task: Task) -> Compiled:
    _, launch, _ = next(itertools.islice(_examples(task.operator), task.index, None))
    return compile_for(launch, task.target)


def _set_cache(folder: str) -> None:
    os.environ['TRITON_CACHE_DIR'] = folder


def _matches(task: Task, patterns: Iterable[str]) -> list[str]:
    return [pattern for pattern in patterns if fnmatch.fnmatch(task.title, pattern)]


def failures(task: Task, result: Compiled | str) -> list[str]:
    """What a configuration does wrong; `result` is an error's message where it did not compile."""
    if isinstance(result, str):
        return [result]
    found = []
    if result.stack > max(SPILLS[pattern] for pattern in _matches(task, SPILLS)):
        found.append(f'{result.stack} bytes of stack')
    if result.reloads > result.loop * max(RELOADS[pattern] for pattern in _matches(task, RELOADS)):
        found.append(f'{result.reloads} of {result.loop} instructions of a loop for spilled registers')
    if result.shared > SHARED_KIB[task.target] * 1024:
        found.append(f'{result.shared} bytes of shared memory, of {SHARED_KIB[task.target]} KiB')
    if not result.instructions and not _matches(task, NO_TENSOR_CORES):
        found.append('no tensor-core instruction')
    return found


def prove(found: list[Task], jobs: int = 1, progress: Progress | None = None) -> dict[Task, Compiled | str]:
    """Compile tasks, each in a process of a pool, with a cache of their own."""
    progress = progress or Progress(disable=True)
    bar = progress.add_task('compiling', total=len(found))
    results: dict[Task, Compiled | str] = {}
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, get_context('spawn'), _set_cache, (cache,)) as pool,
    ):
        futures: dict[Future, Task] = {pool.submit(compile_one, task): task for task in found}
        for future in as_completed(futures):
            task, error = futures[future], future.exception()
            results[task] = f'{type(error).__name__}: {error}' if error else future.result()
            progress.advance(bar)
    return {task: results[task] for task in found}


def _of(limits: dict[str, float], operators: Iterable[str]) -> dict[str, float]:
    return {pattern: limit for pattern, limit in limits.items() if pattern.split()[0] in ('*', *operators)}


def report(results: dict[Task, Compiled | str]) -> dict:
    """{'machine', ..., 'failures', 'operators': {operator: {problem: {kernel: {target: figures}}}}}."""
    operators: dict = {}
    for task, result in results.items():
        kernels = operators.setdefault(task.operator, {}).setdefault(task.problem, {})
        kernels.setdefault(task.kernel, {})[f'sm_{task.target}'] = (
            result if isinstance(result, str) else [*result[:-1], ' '.join(result.instructions)]
        )
    wrong = {f'{task.title} sm_{task.target}': failures(task, result) for task, result in results.items()}
    return {
        'machine': machine(),
        'figures': list(Compiled._fields),
        'compiled': len(results),
        'allowed stack': _of(SPILLS, operators),
        'allowed reloads': _of(RELOADS, operators),
        'failures': {title: reasons for title, reasons in wrong.items() if reasons},
        'operators': operators,
    }


def table(results: dict[Task, Compiled | str]) -> Table:
    """A row for each operator, kernel and target: the greatest figures over all problems."""
    groups: dict[tuple, list[Task]] = {}
    for task in results:
        groups.setdefault((task.operator, task.kernel, task.target), []).append(task)
    shown = Table(
        'operator',
        'kernel',
        'target',
        'problems',
        'registers',
        'stack',
        'loop',
        'reloads',
        'shared KiB',
        'instructions',
        'failed',
    )
    for (operator, kernel, target), group in groups.items():
        compiled = [results[task] for task in group if not isinstance(results[task], str)]
        figures = [
            str(max((getattr(each, name) for each in compiled), default=''))
            for name in ('registers', 'stack', 'loop', 'reloads')
        ]
        shared = f'{max((each.shared for each in compiled), default=0) / 1024:.0f}'
        instructions = ' '.join(sorted({name for each in compiled for name in each.instructions}))
        failed = sum(bool(failures(task, results[task])) for task in group)
        shown.add_row(
            operator, kernel, f'sm_{target}', str(len(group)), *figures, shared, instructions, str(failed or '')
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('operator', nargs='?', choices=[*OPERATORS, 'all'], default='all')
    parser.add_argument('--targets', default=','.join(map(str, SHARED_KIB)), help='compute capabilities: 80,90')
    parser.add_argument('--only', default='*', help="pattern of problems, such as 'bfloat16*head_dim 32'")
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--json', type=Path, help='file for the report of one operator')
    args = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error('kernels are not compiled under TRITON_INTERPRET')
    targets = [int(target) for target in args.targets.split(',')]
    if unknown := set(targets) - set(SHARED_KIB):
        parser.error(f'unknown targets {sorted(unknown)}, expected some of {", ".join(map(str, SHARED_KIB))}')
    operators = list(OPERATORS) if args.operator == 'all' else [args.operator]
    if args.json and len(operators) > 1:
        parser.error('--json is for the report of one operator')
    console, failed = Console(), False
    for operator in operators:
        with Progress() as progress:
            results = prove(tasks([operator], targets, args.only), args.jobs, progress)
        content = report(results)
        console.print(table(results))
        whole = targets == list(SHARED_KIB) and args.only == '*'
        if file := args.json or (RESULTS / f'compile_proof_{operator}.json' if whole else None):
            text = json.dumps(content, indent=1)
            text = re.sub(r'\[[^][{}]*\]', lambda found: ' '.join(found[0].split()), text)  # a list a line
            file.write_text(text + '\n')
            console.print('written to', str(file))
        for title, reasons in content['failures'].items():
            console.print(f'[bold red]{title}:[/] {"; ".join(reasons)}', soft_wrap=True)
            failed = True
    if failed:
        raise SystemExit(1)


if __name__ == '__main__':
    main()
