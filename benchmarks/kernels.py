"""The operators beside what else there is, in one interleaved run each.

    python -m benchmarks.kernels                          # all
    python -m benchmarks.kernels neighborhood --rounds 5
    python -m benchmarks.kernels --device cuda

The module of an operator (neighborhood.py, routing.py, ...) has its cases and what it is measured beside; operators.py
says how. Without --json the figures go to results/OPERATOR.json, or results/OPERATOR_cuda.json.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from zoo.benchmarks import aggregated, neighborhood, routing, window
from zoo.benchmarks.operators import DTYPES

BENCHMARKS = {each.BENCHMARK.name: each.BENCHMARK for each in (neighborhood, routing, aggregated, window)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('operator', nargs='?', choices=[*BENCHMARKS, 'all'], default='all')
    parser.add_argument('--device', choices=DTYPES, default='cpu')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--json', type=Path, help='file for {operator: report}; results/OPERATOR.json without it')
    args = parser.parse_args(arguments)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('there is no CUDA device')
    reports = {}
    with Progress() as progress:
        for name in BENCHMARKS if args.operator == 'all' else [args.operator]:
            reports[name] = BENCHMARKS[name].measure(args.rounds, progress, args.device)
    files = (
        {args.json: reports}
        if args.json
        else {BENCHMARKS[name].results(args.device): reports[name] for name in reports}
    )
    console = Console()
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + '\n')
    for name, report in reports.items():
        console.print(BENCHMARKS[name].table(report))
    console.print('written to', *map(str, files))


if __name__ == '__main__':
    main()
