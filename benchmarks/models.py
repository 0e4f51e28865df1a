"""CPU cost of models as multiples of timm's resnet50, measured in the same interleaved run.

    python -m benchmarks.models biformer_tiny nat_mini                    # 224x224, batch 8, about a minute a model
    python -m benchmarks.models biformer_tiny --size 512 --batch 1

    python -m benchmarks.models transnext_micro transnext_micro:official

Any name that timm knows works; with ':official' behind it the model's attention runs in the formulation of its authors'
code, or in the one that anybody would write where that can't be installed (see the modules of the operators). Float32,
eager, one thread, and thread CPU time (see timing.py). `forward` is in torch.inference_mode and eval mode; a training
step is forward, cross-entropy and backward in train mode, without an optimizer. `memory` is how far a fresh process
rises above what it holds, model and images included, at the peak of its first training step: activations, their
gradients and those of the parameters. Writes results/models_SIZE_BATCH.json beside this file, or the file that --json
names.
"""

import argparse
import contextlib
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn import functional as F

from zoo.benchmarks.kernels import BENCHMARKS
from zoo.benchmarks.timing import interleaved, machine, peak_memory
from zoo.kernels import use

BASELINE = 'resnet50'
OFFICIAL = ':official'
RESULTS = Path(__file__).parent / 'results'
MEASURES = {'forward': 1e3, 'train': 1e3, 'memory': 2**-20}  # to the units of the table: ms, ms, MiB


class Formulated(torch.nn.Module):
    """A model whose attention runs in the formulation of its authors' code."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        with contextlib.ExitStack() as stack:
            for benchmark in BENCHMARKS.values():
                stack.enter_context(use('official', operator=f'{benchmark.name}_attention'))
            return self.model(x)


def build(name: str, size: int) -> torch.nn.Module:
    """A model of a timm name for images of `size`; models of one size only are told it."""
    torch.manual_seed(0)
    is_official = name.endswith(OFFICIAL)
    name = name.removesuffix(OFFICIAL)
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    model = timm.create_model(name, **({'img_size': size} if fixed else {}))
    return Formulated(model) if is_official else model


def forward(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def run():
        model.eval()(images)

    return run


def training_step(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], None]:
    labels = torch.arange(len(images))

    def run():
        model.train().zero_grad()
        F.cross_entropy(model(images), labels).backward()

    return run


def peak_of_training_step(name: str, size: int, batch: int) -> int:
    """Bytes; for a process of its own, whose heap holds nothing that a step could use again."""
    torch.set_num_threads(1)
    return peak_memory(training_step(build(name, size), torch.randn(batch, 3, size, size)))


def measure(
    names: list[str], size: int = 224, batch: int = 8, rounds: int = 9, progress: Progress | None = None
) -> dict:
    """Seconds and bytes of the baseline and of each model, and the multiples of the baseline.

    Returns:
        {'machine', 'setting', 'models': {name: {'forward', 'train', 'memory', 'parameters', 'relative': {...}}}}.
    """
    names = list(dict.fromkeys([BASELINE, *names]))
    progress = progress or Progress(disable=True)
    images = torch.randn(batch, 3, size, size)
    models = {name: build(name, size) for name in names}
    found = {name: {'parameters': sum(p.numel() for p in model.parameters())} for name, model in models.items()}
    for measure, case in (('forward', forward), ('train', training_step)):
        task = progress.add_task(f'{measure}, {rounds} rounds', total=(rounds + 1) * len(names))

        def advancing(run, task=task):
            def call():
                run()
                progress.advance(task)

            return call

        cases = {name: advancing(case(model, images)) for name, model in models.items()}
        for name, seconds in interleaved(cases, rounds, warmup=1).items():
            found[name][measure] = seconds
    del models
    fresh = multiprocessing.get_context('spawn')
    for name in progress.track(names, description='memory'):
        with fresh.Pool(1) as pool:
            found[name]['memory'] = pool.apply(peak_of_training_step, (name, size, batch))
    for figures in found.values():
        figures['relative'] = {measure: figures[measure] / found[BASELINE][measure] for measure in MEASURES}
    setting = {'size': size, 'batch': batch, 'rounds': rounds, 'dtype': 'float32', 'threads': 1, 'baseline': BASELINE}
    return {'machine': machine(), 'setting': setting, 'models': found}


def table(report: dict) -> Table:
    setting = report['setting']
    title = f'{setting["size"]}x{setting["size"]}, batch {setting["batch"]}: one CPU thread, multiples of {BASELINE}'
    result = Table('model', 'M parameters', 'forward ms', 'train ms', 'memory MiB', title=title)
    for name, figures in report['models'].items():
        cells = (f'{figures[key] * unit:,.0f} ({figures["relative"][key]:.2f})' for key, unit in MEASURES.items())
        result.add_row(name, f'{figures["parameters"] / 1e6:.1f}', *cells)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='+', metavar='NAME')
    parser.add_argument('--size', type=int, default=224, help='height and width of the images')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--json', type=Path, help='file to write the report to')
    args = parser.parse_args(arguments)
    known = set(timm.list_models())
    if unknown := [name for name in args.names if name.removesuffix(OFFICIAL).split('.')[0] not in known]:
        parser.error(f'timm knows no model called {", ".join(unknown)}')
    with Progress() as progress:
        report = measure(args.names, args.size, args.batch, args.rounds, progress)
    path = args.json or RESULTS / f'models_{args.size}_{args.batch}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + '\n')
    console = Console()
    console.print(table(report))
    console.print(f'written to {path}')


if __name__ == '__main__':
    main()
