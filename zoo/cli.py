"""The command line `zoo`: the words of the Python interface, with tables. Commands import what they need on use."""

import contextlib
import importlib
import os
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
# Files and pipes get whole lines. Of the processes that torchrun starts, the first one speaks.
console = Console(width=None if sys.stdout.isatty() else 200, quiet=os.environ.get('RANK', '0') != '0')


def _fail(error: Exception) -> None:
    rank = os.environ.get('RANK')
    where = '' if rank is None else f' (rank {rank})'
    loud = Console(width=console.width)  # whichever process it is
    loud.print(f'[bold red]Error{where}:[/] {escape(str(error))}', highlight=False, soft_wrap=True)
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
    preflight: Annotated[bool, typer.Option(help='Compare first what the run would do with its config.')] = True,
    strict: Annotated[bool, typer.Option('--strict', help='What the preflight warns of is an error.')] = False,
    cfg_options: Annotated[list[str] | None, typer.Option(help='key=value, overrides the config; repeatable.')] = None,
) -> None:
    """Train by an mmengine config."""
    from zoo.train.run import train

    try:
        train(
            config,
            work_dir=work_dir,
            resume=resume,
            cfg_options=_options(cfg_options),
            preflight=preflight,
            strict=strict,
        )
    except _failures() as error:
        _fail(error)


@app.command('measure')
def measure_(
    config: Annotated[str, typer.Argument(help='The config that trained the weights: a file, or a shipped one.')],
    checkpoint: Annotated[Path, typer.Argument(help='iter_<n>.pth, best.pth or model.safetensors of its run.')],
    work_dir: Annotated[Path | None, typer.Option(help='Folder for measures.json.')] = None,
    cfg_options: Annotated[list[str] | None, typer.Option(help='key=value, overrides the config; repeatable.')] = None,
) -> None:
    """Measure a run's weights on its config's validation data: top-1, AP or mIoU; torchrun shares it."""
    from zoo.train.measuring import measure

    try:
        measures = measure(config, checkpoint, work_dir=work_dir, cfg_options=_options(cfg_options))
    except _failures() as error:
        _fail(error)
    table = Table('measure', 'value', title=str(checkpoint))
    for name, value in measures.items():
        table.add_row(name, f'{value:.2f}')
    console.print(table)


def _options(given: list[str] | None) -> dict[str, str]:
    if any('=' not in option for option in given or ()):
        raise ValueError(f'--cfg-options takes key=value, got {given}.')
    return dict(option.split('=', 1) for option in given or ())


@app.command('preflight')
def preflight_(
    config: Annotated[str, typer.Argument(help='A config file, or a shipped one such as quickstart/biformer_digits.')],
    depth: Annotated[str, typer.Option(help='quick, or full: also with copies of the model that learn.')] = 'quick',
    strict: Annotated[bool, typer.Option('--strict', help='Warnings are errors.')] = False,
    silence: Annotated[list[str] | None, typer.Option(help='A check to leave out; repeatable.')] = None,
    world_size: Annotated[int | None, typer.Option(help='Processes that the run is planned for.')] = None,
    json: Annotated[Path | None, typer.Option(help='Write the findings there too.')] = None,
    cfg_options: Annotated[list[str] | None, typer.Option(help='key=value, overrides the config; repeatable.')] = None,
) -> None:
    """What a run would really do, beside what its config says; nothing is trained."""
    from zoo.train.checkpoints import write_atomically
    from zoo.train.config import load_config
    from zoo.train.distributed import process_group
    from zoo.train.preflight import preflight
    from zoo.train.validation import validate

    try:
        cfg = load_config(config, _options(cfg_options))
        validate(cfg, world_size=world_size)
        with process_group(), console.status(f'preflight of {config} …'):
            report = preflight(cfg, depth=depth, strict=strict, silence=silence or (), world_size=world_size)
        if json is not None and not console.quiet:
            write_atomically(json, lambda temporary: temporary.write_text(report.to_json() + '\n'))
    except _failures() as error:
        _fail(error)
    console.print(report.render())
    if not report.passed:
        raise typer.Exit(1)


_Model = Annotated[
    str,
    typer.Argument(help='A model of timm or the zoo; or a config of a run, or its folder, for what it has trained.'),
]
_Images = Annotated[list[str], typer.Argument(help='Files, folders, tar files, wildcards.')]
_Checkpoint = Annotated[
    Path | None, typer.Option(help='Weights; the pretrained ones without. Of a run: best.pth, in place of its last.')
]
_NumClasses = Annotated[int | None, typer.Option(help="The checkpoint's, if they can't be read off it.")]
_Names = Annotated[Path | None, typer.Option(help='A file of the names of the classes, a line each.')]
_ImgSize = Annotated[int | None, typer.Option(help="In place of the size of the model's preprocessing.")]
_TestSize = Annotated[bool, typer.Option('--test-size', help="The size that the model's cfg gives for tests.")]
_CropPct = Annotated[float | None, typer.Option(help='Share of the resized image that the crop is.')]
_CropMode = Annotated[str | None, typer.Option(help='center, squash or border.')]
_Interpolation = Annotated[str | None, typer.Option(help='bicubic, bilinear, ...')]
_BatchSize = Annotated[int, typer.Option(help='Images at a time.')]
_Workers = Annotated[int, typer.Option(help='Processes that read images.')]
_WORKERS = min(4, os.cpu_count() or 1)
_Device = Annotated[str | None, typer.Option(help='cuda, cpu, ...; the best that there is, without.')]
_Amp = Annotated[str, typer.Option(help='none, bf16 or fp16.')]
_OnError = Annotated[str, typer.Option(help='What an image that can not be decoded does: raise or skip.')]


def _failures() -> tuple[type[Exception], ...]:
    """What users are told in a line."""
    import zoo

    return OSError, ValueError, KeyError, ImportError, zoo.CheckpointError


@app.command('eval')
def eval_(
    model: _Model,
    data: Annotated[str, typer.Argument(help='A folder with a folder of images for each class, or a tar file.')],
    checkpoint: _Checkpoint = None,
    split: Annotated[str, typer.Option(help='Subfolder of the data, or the name of the part for its reader.')] = '',
    reader: Annotated[str, typer.Option(help="timm's name of another reader, such as hfds/NAME.")] = '',
    class_map: Annotated[
        Path | None, typer.Option(help="JSON or text: which of the model's classes each folder is of.")
    ] = None,
    real_labels: Annotated[
        str | None, typer.Option(help="ImageNet's reassessed labels (real.json), or 'timm' for timm's copy.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; eval/ in the run's folder or work_dirs/eval/MODEL without.")
    ] = None,
    num_classes: _NumClasses = None,
    names: _Names = None,
    img_size: _ImgSize = None,
    test_size: _TestSize = False,
    crop_pct: _CropPct = None,
    crop_mode: _CropMode = None,
    interpolation: _Interpolation = None,
    batch_size: _BatchSize = 64,
    workers: _Workers = _WORKERS,
    device: _Device = None,
    amp: _Amp = 'none',
    on_error: _OnError = 'raise',
) -> None:
    """Accuracy on labelled images, with a table of the classes and a picture of the confusions; torchrun shares it."""
    from zoo.train.evaluation import evaluate
    from zoo.train.inference import run_folder

    try:
        folder = run_folder(model)
        result = evaluate(
            model,
            data,
            checkpoint=checkpoint,
            split=split,
            reader=reader,
            class_map=class_map,
            real_labels=real_labels,
            out=out or (folder / 'eval' if folder else Path('work_dirs', 'eval', model)),
            num_classes=num_classes,
            names=names,
            img_size=img_size,
            test_size=test_size,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            interpolation=interpolation,
            batch_size=batch_size,
            workers=workers,
            device=device,
            amp=amp,
            on_error=on_error,
            progress=True,
        )
    except _failures() as error:
        _fail(error)
    table = Table(title=f'{model} on {data}', show_header=False)
    among = f'among the {result.num_classes} classes of the data'
    for name, value in result.metrics.items():
        what = 'among all classes' if name.endswith('_of_all') else among
        if name.startswith('real_'):
            what = f'by the real labels of {result.real_images:,} images'
        table.add_row(name, f'{value:.3f} %', what)
    table.add_row('images', f'{result.images:,}', f'in {result.seconds:.1f} s; classes matched {result.matched}')
    if result.not_numbers:
        table.add_row(
            '[bold red]not numbers', f'{result.not_numbers:,}', 'images whose logits are NaN, counted as wrong'
        )
    if result.broken:
        table.add_row('[bold red]broken', f'{len(result.broken):,}', 'images that can not be read, which do not count')
    for what, path in result.files.items():
        table.add_row(what, '', str(path))
    console.print(table)


@app.command('predict')
def predict_(
    model: _Model,
    images: _Images,
    checkpoint: _Checkpoint = None,
    k: Annotated[int, typer.Option('-k', help='Classes shown of each image.')] = 5,
    csv: Annotated[Path | None, typer.Option(help='Write the predictions there: file, rank, class, ...')] = None,
    jsonl: Annotated[Path | None, typer.Option(help='The same as JSON, a line an image.')] = None,
    picture: Annotated[Path | None, typer.Option(help='Draw the first 100 images with their classes: a PNG.')] = None,
    broken: Annotated[Path, typer.Option(help='List of the images that can not be read, if any.')] = Path(
        'broken_images.txt'
    ),
    num_classes: _NumClasses = None,
    names: _Names = None,
    img_size: _ImgSize = None,
    test_size: _TestSize = False,
    crop_pct: _CropPct = None,
    crop_mode: _CropMode = None,
    interpolation: _Interpolation = None,
    batch_size: _BatchSize = 64,
    workers: _Workers = 0,
    device: _Device = None,
    amp: _Amp = 'none',
    on_error: _OnError = 'skip',
) -> None:
    """The most probable classes of images."""
    from zoo.train import prediction_files
    from zoo.train.distributed import process_group
    from zoo.train.inference import load_model, predict

    try:
        with process_group():
            loaded = load_model(
                model,
                checkpoint,
                num_classes=num_classes,
                names=names,
                img_size=img_size,
                test_size=test_size,
                crop_pct=crop_pct,
                crop_mode=crop_mode,
                interpolation=interpolation,
                device=device,
                amp=amp,
            )
            found = predict(loaded, images, k, batch_size=batch_size, workers=workers, on_error=on_error, progress=True)
            if console.quiet:
                return
            for path, write in (
                (csv, prediction_files.write_csv),
                (jsonl, prediction_files.write_jsonl),
                (picture, prediction_files.draw),
                (broken if any(each.error for each in found) else None, prediction_files.write_unreadable),
            ):
                if path is not None:
                    write(found, path)
    except _failures() as error:
        _fail(error)
    table = Table(title=f'{model}; class names: {loaded.classes_from}')
    for column, justify in (('file', 'left'), ('class', 'left'), ('index', 'right'), ('probability (%)', 'right')):
        table.add_column(column, justify=justify)
    for each in found:
        if each.error is not None:
            table.add_row(escape(each.name), f'[bold red]{escape(each.error)}', '', '')
        for rank, (name, index, probability) in enumerate(
            zip(each.classes, each.indices, each.probabilities, strict=True)
        ):
            file = '' if rank else escape(each.name)
            table.add_row(
                file, escape(name), str(index), f'{100 * probability:.2f}', end_section=rank == len(each.classes) - 1
            )
    console.print(table)
    unreadable = sum(each.error is not None for each in found)
    if unreadable:
        console.print(f'[bold red]Images that can not be read: {unreadable} of {len(found)}[/]; see {broken}.')


@app.command('features')
def features_(
    model: _Model,
    images: _Images,
    out: Annotated[Path, typer.Option(help='.npy, .parquet or .safetensors.')],
    checkpoint: _Checkpoint = None,
    layer: Annotated[
        str | None,
        typer.Option(help="A level by number or name, averaged over its places; the classifier's input without."),
    ] = None,
    overwrite: Annotated[bool, typer.Option('--overwrite', help='Discard an earlier result.')] = False,
    num_classes: _NumClasses = None,
    img_size: _ImgSize = None,
    test_size: _TestSize = False,
    crop_pct: _CropPct = None,
    crop_mode: _CropMode = None,
    interpolation: _Interpolation = None,
    batch_size: _BatchSize = 64,
    part_size: Annotated[
        int, typer.Option(help='Images between two writes, each of which a restart goes on from.')
    ] = 4096,
    workers: _Workers = _WORKERS,
    device: _Device = None,
    amp: _Amp = 'none',
    on_error: _OnError = 'raise',
) -> None:
    """Features of images in one file; torchrun shares the work, and the same command again goes on after a kill."""
    from zoo.train.features import extract_features

    try:
        result = extract_features(
            model,
            images,
            out,
            layer,
            checkpoint=checkpoint,
            overwrite=overwrite,
            num_classes=num_classes,
            img_size=img_size,
            test_size=test_size,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            interpolation=interpolation,
            batch_size=batch_size,
            part_size=part_size,
            workers=workers,
            device=device,
            amp=amp,
            on_error=on_error,
            progress=True,
        )
    except _failures() as error:
        _fail(error)
    beside = f', names in {result.names}' if result.names else ''
    console.print(f'{result.path}: {result.images:,} images x {result.channels} float32{beside}.', highlight=False)
    if result.broken:
        console.print(f'[bold red]Images that can not be read: {len(result.broken)}[/]; see {result.broken_list}.')


@app.command('export')
def export_(
    name: Annotated[str, typer.Argument(help='A model of the zoo or of timm, such as nat_mini.')],
    format: Annotated[str, typer.Option(help='onnx, pt2 (torch.export) or safetensors.')] = 'onnx',
    output: Annotated[Path | None, typer.Option(help='The file to write; NAME.FORMAT without.')] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights: the authors', timm's or of a run.")] = None,
    pretrained: Annotated[bool, typer.Option('--pretrained', help='Download the weights.')] = False,
    features: Annotated[
        bool | None, typer.Option('--features/--logits', help='Maps of the pyramid (the default), or logits.')
    ] = None,
    image_size: Annotated[
        tuple[int, int] | None, typer.Option(help="Height and width, in place of the model's own.", metavar='H W')
    ] = None,
    dynamic: Annotated[
        bool, typer.Option('--dynamic/--static', help='Free batch and image size, or one shape with a batch of 1.')
    ] = True,
    fixed_size: Annotated[bool, typer.Option('--fixed-size', help='Of these the batch alone is free.')] = False,
    operators: Annotated[
        bool, typer.Option('--operators', help="Keep the zoo's operators in a pt2, for programs that import zoo.")
    ] = False,
    fuse: Annotated[bool, typer.Option('--fuse', help='Merge BatchNorms before.')] = False,
    opset: Annotated[int | None, typer.Option(help="Of ONNX; PyTorch's default without.")] = None,
    num_classes: _NumClasses = None,
    model_kwargs: Annotated[list[str] | None, typer.Option(help='key=value of the model; repeatable.')] = None,
) -> None:
    """A model as a file for other runtimes, written only if it computes what the model does."""
    import zoo

    try:
        kwargs = _values(model_kwargs)
        if num_classes is None and checkpoint is not None:
            num_classes = _classes_in(checkpoint, name)
        if num_classes is not None:
            kwargs['num_classes'] = num_classes
        with console.status(f'{name} as {format} …'):
            written = zoo.export(
                name,
                output or Path(f'{name}.{format}'),
                format,
                outputs=None if features is None else 'features' if features else 'logits',
                checkpoint=checkpoint,
                pretrained=pretrained,
                image_size=image_size,
                dynamic='batch' if dynamic and fixed_size else dynamic,
                operators=operators,
                fuse=fuse,
                opset=opset,
                **kwargs,
            )
    except (*_failures(), zoo.ExportError) as error:
        _fail(error)
    table = Table('', 'shape', 'differs by', title=str(written.path))
    if written.image_shape:
        table.add_row('images', _shape(written.image_shape), '', end_section=True)
    for output in written.outputs:
        table.add_row(output.name, _shape(output.shape), f'{output.difference:.0e}')
    if written.sides:
        table.add_section()
        table.add_row('height, width', f'{written.sides}', '')
    if written.checked:
        table.add_row('compared on', ', '.join(map(_shape, written.checked)), '', end_section=True)
    beside = f', with {written.beside.name}' if written.beside else ''
    table.add_row('size', f'{written.bytes / 1e6:,.1f} MB{beside}', '')
    console.print(table)
    if not pretrained and checkpoint is None:
        console.print('The weights are random: --checkpoint FILE or --pretrained takes trained ones.')


def _shape(shape: tuple) -> str:
    return ' x '.join(map(str, shape))


def _values(given: list[str] | None) -> dict:
    """Python's literals of key=value; what is none is text."""
    from ast import literal_eval

    if any('=' not in option for option in given or ()):
        raise ValueError(f'--model-kwargs takes key=value, got {given}.')
    found = dict(option.split('=', 1) for option in given or ())
    for key, text in found.items():
        with contextlib.suppress(ValueError, SyntaxError):
            found[key] = literal_eval(text)
    return found


def _classes_in(checkpoint: Path, name: str) -> int | None:
    """Number of classes of a checkpoint, if it can be told."""
    from zoo.backbones import adopted
    from zoo.backbones.checkpoints import rename, unwrap
    from zoo.models import read_checkpoint
    from zoo.train.tasks import stored_classes

    return stored_classes(rename(unwrap(read_checkpoint(checkpoint), name), adopted.official_keys(name)), name)


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


def _bench(name: str, about: str) -> None:
    """A command that hands its arguments to the benchmark of its name."""

    def run(context: typer.Context) -> None:
        importlib.import_module(f'zoo.benchmarks.{name}').main(context.args)

    any_arguments = {'allow_extra_args': True, 'ignore_unknown_options': True, 'help_option_names': []}
    bench.command(name, help=f'{about}: python -m benchmarks.{name}.', context_settings=any_arguments)(run)


_bench('kernels', 'The operators against what else there is')
_bench('models', 'Models as multiples of resnet50')
_bench('loader', 'Loader, model and both, images a second')
_bench('training', 'The training loop beside a bare one')
_bench('dense', 'Data and post-processing of detectors and segmentors, their memory by backbone')
_bench('report', 'All recorded results as tables')


@app.command()
def version() -> None:
    """Versions of the zoo and of what it stands on."""
    import timm
    import torch

    import zoo

    python = sys.version.split()[0]
    console.print(f'zoo {zoo.__version__}, timm {timm.__version__}, torch {torch.__version__}, Python {python}')
