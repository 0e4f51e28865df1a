"""Models side by side: speed, memory and MACs, forward and training step, eager and compiled.

    python -m benchmarks.models biformer_tiny nat_mini                    # 224x224, batch 8, about a minute a model
    python -m benchmarks.models biformer_tiny biformer_tiny:official --compile
    python -m benchmarks.models swin_tiny_patch4_window7_224 swin_tiny_patch4_window7_224:accelerated --plot models.png

Any name that timm knows works. With ':official' behind it the model's attention runs in the formulation of its authors'
code, or in the one that anybody would write where that can't be installed (see the modules of the operators, and
formulations/ for the families whose mixers are more than an operator); with
':accelerated' the model has gone through `zoo.accelerate`. resnet50, of which figures are multiples, and
vit_small_patch16_224 are in every run; with --compile all are measured under torch.compile too, and compared with the
compiled resnet50.

On the CPU: float32, one thread, thread CPU time, interleaved (see timing.py). On a GPU: bfloat16 by autocast, channels
last, CUDA events. `forward` is in torch.inference_mode and eval mode; a training step is forward, cross-entropy and
backward in train mode, without an optimizer. `memory` is how far memory rises above what holds model and images, at the
peak of a training step: activations, their gradients and those of the parameters; on the CPU in a fresh process. MACs
are of one image, products of matrices and convolutions, counted by torch's counter. Writes
results/models_SIZE_BATCH.json beside this file (models_cuda_… on a GPU, models_compiled_… with --compile,
models_accelerated_… with such models), or the file that --json names; --csv and --plot write a table and a picture too.
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.benchmarks.formulations import formulate
from zoo.benchmarks.kernels import BENCHMARKS
from zoo.benchmarks.timing import interleaved, machine, peak_memory
from zoo.kernels import use

BASELINE = 'resnet50'
ALWAYS = ('vit_small_patch16_224',)
OFFICIAL, ACCELERATED = ':official', ':accelerated'
COMPILED = ', compiled'
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


class Autocast(torch.nn.Module):
    """A model as it runs on a GPU: in bfloat16 where autocast says so."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.model(x)


def timm_name(row: str) -> str:
    """Of the model of a row."""
    return row.removesuffix(COMPILED).removesuffix(OFFICIAL).removesuffix(ACCELERATED)


def build(name: str, size: int, device: str = 'cpu') -> torch.nn.Module:
    """The model of a row: a timm name for images of `size`, with what stands behind it."""
    torch.manual_seed(0)
    is_compiled, is_official, is_accelerated = (part in name for part in (COMPILED, OFFICIAL, ACCELERATED))
    name = timm_name(name)
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    model = timm.create_model(name, **({'img_size': size} if fixed else {})).to(device)
    if is_accelerated:
        zoo.accelerate(model)
    if is_official:
        formulate(model, torch.randn(1, 3, size, size, device=device))
    if device == 'cuda':
        model = Autocast(model.to(memory_format=torch.channels_last))
    if is_compiled:
        # The code of a class has one cache, whatever its instances: as many entries as there are models and modes.
        torch._dynamo.config.recompile_limit = 256
        model = torch.compile(model, dynamic=False)
    return Formulated(model) if is_official else model


def images_of(batch: int, size: int, device: str) -> torch.Tensor:
    images = torch.randn(batch, 3, size, size, device=device)
    return images.to(memory_format=torch.channels_last) if device == 'cuda' else images


def macs(name: str, size: int) -> int:
    """Multiply-accumulates of the products of matrices and convolutions for one image, by torch's counter."""
    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build(timm_name(name), size, 'meta').eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops() // 2


def forward(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def run():
        model.eval()(images)

    return run


def training_step(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], None]:
    labels = torch.arange(len(images), device=images.device)

    def run():
        model.train().zero_grad()
        F.cross_entropy(model(images), labels).backward()

    return run


def peak_of_training_step(name: str, size: int, batch: int, device: str) -> int:
    """Bytes; on the CPU for a process of its own, whose heap holds nothing that a step could use again."""
    torch.set_num_threads(1)
    step = training_step(build(name, size, device), images_of(batch, size, device))
    if name.endswith(COMPILED) or device == 'cuda':
        step()  # compiles, tunes
    return peak_memory(step, device)


def measure(
    names: list[str],
    size: int = 224,
    batch: int = 8,
    rounds: int = 9,
    progress: Progress | None = None,
    device: str = 'cpu',
    compiled: bool = False,
    together: int | None = None,
) -> dict:
    """Seconds, bytes and MACs of the baseline and of each model, and the multiples of the baseline.

    Args:
        names: of the models, besides those that are always measured.
        size, batch, rounds, device: see the module.
        progress: where to show it.
        compiled: measure all under torch.compile too.
        together: how many models to hold in memory, and to measure in turn; all of them unless given. The baseline is
            measured anew with each such group, and what a model is a multiple of is its own group's.

    Returns:
        {'machine', 'setting', 'models': {name: {'forward', 'train', 'memory', 'parameters', 'macs', 'relative'}}}.
    """
    names = [name for name in dict.fromkeys([*ALWAYS, *names]) if name != BASELINE]
    progress = progress or Progress(disable=True)
    found: dict[str, dict] = {}
    for group in groups(names, together):
        group = [BASELINE, *group]
        if compiled:
            group = [name + mode for mode in ('', COMPILED) for name in group]
        figures = side_by_side(group, size, batch, rounds, progress, device)
        found |= {name: own for name, own in figures.items() if name not in found}
    setting = {
        'size': size,
        'batch': batch,
        'rounds': rounds,
        'device': device,
        'dtype': 'bfloat16' if device == 'cuda' else 'float32',
        'threads': 1,
        'baseline': BASELINE,
        **({'together': together} if together else {}),
    }
    return {'machine': machine(), 'setting': setting, 'models': found}


def groups(names: Sequence[str], together: int | None) -> list[list[str]]:
    """The names, at most so many in a group; forms of one model that follow each other are in the same."""
    result: list[list[str]] = [[]]
    for _, forms in groupby(names, timm_name):
        forms = list(forms)
        if result[-1] and together is not None and len(result[-1]) + len(forms) > together:
            result.append([])
        result[-1] += forms
    return result


def side_by_side(names: Sequence[str], size: int, batch: int, rounds: int, progress: Progress, device: str) -> dict:
    """Figures of models that are measured in turn, the baseline among them."""
    images = images_of(batch, size, device)
    models = {name: build(name, size, device) for name in names}
    found = {
        name: {'parameters': sum(p.numel() for p in model.parameters()), 'macs': macs(name, size)}
        for name, model in models.items()
    }
    for measure, case in (('forward', forward), ('train', training_step)):
        task = progress.add_task(f'{measure}, {rounds} rounds', total=(rounds + 1) * len(names))

        def advancing(run, task=task):
            def call():
                run()
                progress.advance(task)

            return call

        cases = {name: advancing(case(model, images)) for name, model in models.items()}
        for name, seconds in interleaved(cases, rounds, warmup=1, device=device).items():
            found[name][measure] = seconds
    del models, cases
    fresh = multiprocessing.get_context('spawn')
    for name in progress.track(names, description='memory'):
        with fresh.Pool(1) as pool:
            found[name]['memory'] = pool.apply(peak_of_training_step, (name, size, batch, device))
    for name, figures in found.items():
        baseline = found[BASELINE + (COMPILED if name.endswith(COMPILED) else '')]
        figures['relative'] = {measure: figures[measure] / baseline[measure] for measure in MEASURES}
    return found


def rows(report: dict) -> list[dict[str, object]]:
    """Of each model what a table shows, by column."""
    batch = report['setting']['batch']
    return [
        {
            'model': name,
            'M parameters': figures['parameters'] / 1e6,
            'GMACs': figures['macs'] / 1e9,
            **{
                f'{title} {what}': value
                for title, key in (('forward', 'forward'), ('training step', 'train'))
                for what, value in (
                    ('images/s', batch / figures[key]),
                    ('TMAC/s', batch * figures['macs'] / figures[key] / 1e12),
                    ('relative', figures['relative'][key]),
                )
            },
            'memory MiB': figures['memory'] / 2**20,
            'memory relative': figures['relative']['memory'],
        }
        for name, figures in report['models'].items()
    ]


def table(report: dict) -> Table:
    setting = report['setting']
    place = 'one CPU thread' if setting['device'] == 'cpu' else report['machine']['accelerator']
    title = f'{setting["size"]}x{setting["size"]}, batch {setting["batch"]}: {place}; x: time of {setting["baseline"]}'
    result = Table(
        'model', 'M parameters', 'GMACs', 'forward img/s', 'TMAC/s', 'x', 'train img/s', 'x', 'MiB', 'x', title=title
    )
    for row in rows(report):
        result.add_row(
            row['model'],
            f'{row["M parameters"]:.1f}',
            f'{row["GMACs"]:.2f}',
            f'{row["forward images/s"]:,.1f}',
            f'{row["forward TMAC/s"]:.3f}',
            f'{row["forward relative"]:.2f}',
            f'{row["training step images/s"]:,.1f}',
            f'{row["training step relative"]:.2f}',
            f'{row["memory MiB"]:,.0f}',
            f'{row["memory relative"]:.2f}',
        )
    return result


def write_csv(report: dict, path: Path) -> None:
    found = rows(report)
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)


def plot(report: dict, path: Path) -> None:
    """Forward throughput over parameters, one colour a family, compiled models hollow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout='constrained')
    axes = figure.subplots()
    colours: dict[str, str] = {}
    for row in rows(report):
        family = timm_name(row['model']).split('_')[0]
        colour = colours.setdefault(family, f'C{len(colours) % 10}')
        face = 'none' if row['model'].endswith(COMPILED) else colour
        at = row['M parameters'], row['forward images/s']
        axes.scatter(*at, edgecolors=colour, facecolors=face)
        axes.annotate(row['model'], at, xytext=(4, 4), textcoords='offset points', fontsize=7, color=colour)
    setting = report['setting']
    axes.set(xscale='log', yscale='log', xlabel='parameters, millions', ylabel='forward, images per second')
    place = report['machine']['accelerator'] or f'{report["machine"]["processor"]}, one thread'
    axes.set_title(f'{setting["size"]}x{setting["size"]}, batch {setting["batch"]}, {setting["dtype"]}: {place}')
    axes.grid(alpha=0.3, which='both')
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='+', metavar='NAME')
    parser.add_argument('--size', type=int, default=224, help='height and width of the images')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--compile', action='store_true', help='measure all under torch.compile too')
    parser.add_argument('--together', type=int, help='models to hold in memory and measure in turn (default: all)')
    parser.add_argument('--json', type=Path, help='file to write the report to')
    parser.add_argument('--csv', type=Path, help='file for the table')
    parser.add_argument('--plot', type=Path, help='file for a picture, such as models.png')
    args = parser.parse_args(arguments)
    known = set(timm.list_models())
    if unknown := [name for name in args.names if timm_name(name).split('.')[0] not in known]:
        parser.error(f'timm knows no model called {", ".join(unknown)}')
    if args.together is not None and args.together < 1:
        parser.error(f'--together must be 1 or more, got {args.together}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('there is no CUDA GPU here')
    with Progress() as progress:
        report = measure(
            args.names, args.size, args.batch, args.rounds, progress, args.device, args.compile, args.together
        )
    kinds = {
        'cuda': args.device == 'cuda',
        'compiled': args.compile,
        'accelerated': any(name.endswith(ACCELERATED) for name in args.names),
    }
    kind = '_'.join(['models', *(name for name, holds in kinds.items() if holds)])
    path = args.json or RESULTS / f'{kind}_{args.size}_{args.batch}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + '\n')
    console = Console()
    console.print(table(report))
    if args.csv:
        write_csv(report, args.csv)
    if args.plot:
        plot(report, args.plot)
    console.print('written to', *(str(each) for each in (path, args.csv, args.plot) if each))


if __name__ == '__main__':
    main()
