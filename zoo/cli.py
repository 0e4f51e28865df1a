"""The command line `zoo`: the words of the Python interface, with tables. Commands import what they need on use."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(help='Attention-centred vision backbones for timm.', no_args_is_help=True, add_completion=False)
bench = typer.Typer(help='Side-by-side measurements.', no_args_is_help=True)
app.add_typer(bench, name='bench')
console = Console(width=None if sys.stdout.isatty() else 200)  # files and pipes get whole lines


def _fail(error: Exception) -> None:
    console.print(f'[bold red]Error:[/] {error}', highlight=False, soft_wrap=True)
    raise typer.Exit(1)


@app.command('list')
def list_(
    pattern: Annotated[str, typer.Argument(help="A wildcard, such as 'nat_*'.")] = '*',
    family: Annotated[str | None, typer.Option(help='One family only.')] = None,
    pretrained: Annotated[bool, typer.Option('--pretrained', help='Only what pretrained=True downloads.')] = False,
    origin: Annotated[str | None, typer.Option(help="Only 'zoo', 'timm' or 'timm, extended'.")] = None,
) -> None:
    """The models, with their published facts."""
    import zoo

    try:
        names = zoo.list_models(pattern, family=family, pretrained=pretrained, origin=origin)
    except ValueError as error:
        _fail(error)
    table = Table(title=f'{len(names)} models')
    for column, justify in _COLUMNS:
        table.add_column(column, justify=justify)
    catalogue = zoo.backbones.catalogue
    for name in names:
        facts = catalogue.info(name)
        weights = facts['weights'][0] if facts['weights'] else {}
        table.add_row(
            name,
            facts['title'],
            facts['origin'],
            f'{facts["params"] / 1e6:.1f}',
            str(facts.get('gmacs', '')),
            str(weights.get('top1', '')),
            'download' if catalogue.is_downloadable(weights) else 'by hand' if 'page' in weights else 'none',
            facts['license'],
            facts['paper_id'].removeprefix('arxiv:'),
        )
    console.print(table)


_COLUMNS = (
    ('model', 'left'),
    ('family', 'left'),
    ('origin', 'left'),
    ('params (M)', 'right'),
    ('GMACs', 'right'),
    ('top-1 (%)', 'right'),
    ('weights', 'left'),
    ('licence', 'left'),
    ('arXiv', 'left'),
)


@app.command('info')
def info_(name: Annotated[str, typer.Argument(help='A model, such as biformer_tiny.')]) -> None:
    """All that is known of one model, with sources."""
    import zoo

    try:
        facts = zoo.info(name)
    except ValueError as error:
        _fail(error)
    table = Table(show_header=False, title=name)
    weights = facts.pop('weights')
    notes = facts.pop('notes')
    for key, value in facts.items():
        table.add_row(key, f'{value:,}' if key == 'params' else str(value))
    for entry in weights:
        table.add_row('weights', ', '.join(f'{key}: {value}' for key, value in entry.items()))
    for note in notes:
        table.add_row('note', note)
    console.print(table)


@app.command()
def kernels(
    device: Annotated[str, typer.Option(help='cpu, cuda, ...')] = 'cpu',
    dtype: Annotated[str, typer.Option(help='float32, float16, bfloat16 or float64.')] = 'float32',
    shape: Annotated[str, typer.Option(help='batch,height,width,heads,head_dim')] = '1,56,56,2,32',
    compiled: Annotated[bool, typer.Option('--compiled', help='Under torch.compile.')] = False,
) -> None:
    """Which implementation of each operator runs for a device, dtype and shape, and why."""
    import torch

    from zoo import kernels

    table = Table(title=f'{device}, {dtype}, {shape}' + (', under torch.compile' if compiled else ''))
    for column in ('operator', 'implementation', 'why'):
        table.add_column(column)
    try:
        sizes = tuple(int(size) for size in shape.split(','))
        for operator in kernels.OPERATORS:
            choice = kernels.explain(
                operator, device=device, dtype=getattr(torch, dtype), shape=sizes, compiling=compiled
            )
            passed_over = [f'not {name}: {verdict.reason}' for name, verdict in choice.passed_over.items()]
            table.add_row(operator, choice.implementation, '; '.join((choice.reason, *passed_over)))
    except (AttributeError, ValueError, RuntimeError) as error:
        _fail(error)
    console.print(table)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help='A config file, or a shipped one such as quickstart/biformer_digits.')],
    work_dir: Annotated[Path | None, typer.Option(help='Where checkpoints and logs go.')] = None,
    resume: Annotated[bool, typer.Option('--resume', help='Go on from the last checkpoint in the work dir.')] = False,
    cfg_options: Annotated[list[str] | None, typer.Option(help='key=value, overrides the config; repeatable.')] = None,
) -> None:
    """Train by an mmengine config."""
    from zoo.train.run import train

    try:
        options = dict(option.split('=', 1) for option in cfg_options or ())
    except ValueError:
        _fail(ValueError(f'--cfg-options takes key=value, got {cfg_options}.'))
    try:
        train(config, work_dir=work_dir, resume=resume, cfg_options=options)
    except (OSError, ValueError, KeyError) as error:
        _fail(error)


@app.command()
def check(
    name: Annotated[str, typer.Argument(help='A model of the zoo or of timm, such as van_b0.')],
    checkpoint: Annotated[Path | None, typer.Option(help='Weights to check it with; random ones without.')] = None,
) -> None:
    """Whether a model keeps what the zoo promises: sizes, batches, gradients, checkpoints, features."""
    import zoo

    try:
        with console.status('') as status:
            report = zoo.check(name, checkpoint, advance=lambda title: status.update(f'{name}: {title} …'))
    except (OSError, ValueError, zoo.CheckpointError) as error:
        _fail(error)
    table = Table('check', '', 'found', title=name)
    for result in report.results:
        table.add_row(result.title, '[green]ok' if result.passed else '[bold red]FAILED', escape(result.detail))
    console.print(table)
    if not report.passed:
        raise typer.Exit(1)


_ANY_ARGUMENTS = {'allow_extra_args': True, 'ignore_unknown_options': True, 'help_option_names': []}


@bench.command('kernels', context_settings=_ANY_ARGUMENTS)
def bench_kernels(context: typer.Context) -> None:
    """The operators against what else there is: python -m benchmarks.kernels."""
    from zoo.benchmarks.kernels import main

    main(context.args)


@bench.command('models', context_settings=_ANY_ARGUMENTS)
def bench_models(context: typer.Context) -> None:
    """Models as multiples of resnet50: python -m benchmarks.models."""
    from zoo.benchmarks.models import main

    main(context.args)


@bench.command('report', context_settings=_ANY_ARGUMENTS)
def bench_report(context: typer.Context) -> None:
    """All recorded results as tables: python -m benchmarks.report."""
    from zoo.benchmarks.report import main

    main(context.args)


@app.command()
def version() -> None:
    """Versions of the zoo and of what it stands on."""
    import timm
    import torch

    import zoo

    python = sys.version.split()[0]
    console.print(f'zoo {zoo.__version__}, timm {timm.__version__}, torch {torch.__version__}, Python {python}')
