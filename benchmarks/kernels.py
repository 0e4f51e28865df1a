"""The operators beside what else there is, in one interleaved run each.

    python -m benchmarks.kernels                                   # all
    python -m benchmarks.kernels neighborhood --rounds 5
    python -m benchmarks.kernels --device cuda --minutes 7         # again, to go on where the time was up

The module of an operator (neighborhood.py, routing.py, ...) has its cases and what it is measured beside; operators.py
says how. Without --json the figures go to results/OPERATOR.json, or on a GPU to results/cuda_DATE.json.
"""

import argparse
import datetime
import functools
import json
import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from zoo.benchmarks import aggregated, neighborhood, routing, window
from zoo.benchmarks.operators import DTYPES

BENCHMARKS = {each.BENCHMARK.name: each.BENCHMARK for each in (neighborhood, routing, aggregated, window)}
RESULTS = Path(__file__).parent / 'results'


def results(operator: str, device: str) -> Path:
    """The file of figures, as {operator: report}: of one operator on the CPU, of all on a GPU in a day."""
    return RESULTS / (f'{operator}.json' if device == 'cpu' else f'{device}_{datetime.date.today()}.json')


def update(path: Path, name: str, done: dict, report: dict) -> None:
    """Put a report into a file of {operator: report}, its cases after those that were done before."""
    reports = json.loads(path.read_text()) if path.exists() else {}
    reports[name] = report | {'cases': done | report['cases']}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    part.write_text(json.dumps(reports, indent=2) + '\n')
    part.replace(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('operator', nargs='?', choices=[*BENCHMARKS, 'all'], default='all')
    parser.add_argument('--device', choices=DTYPES, default='cpu')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--minutes', type=float, default=math.inf, help='begin no case after; keeps those in the file')
    parser.add_argument('--json', type=Path, help='file for {operator: report}')
    args = parser.parse_args(arguments)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('there is no CUDA device')
    deadline = time.monotonic() + 60 * args.minutes
    files, console = {}, Console()
    with Progress() as progress:
        for name in BENCHMARKS if args.operator == 'all' else [args.operator]:
            path = args.json or results(name, args.device)
            goes_on = math.isfinite(args.minutes) and path.exists()
            done = json.loads(path.read_text()).get(name, {}).get('cases', {}) if goes_on else {}
            keep = functools.partial(update, path, name, done)
            report = BENCHMARKS[name].measure(args.rounds, progress, args.device, deadline, done, keep)
            files[path] = None
            progress.console.print(BENCHMARKS[name].table(report))
    console.print('written to', *map(str, files))


if __name__ == '__main__':
    main()
