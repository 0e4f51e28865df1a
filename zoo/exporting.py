"""`zoo.export`: a backbone as a file for other runtimes, written whole and only if it computes what the model does.

    zoo.export('van_b0', 'van_b0.onnx', pretrained=True)                       # maps of the pyramid, any batch and size
    zoo.export('nat_mini', 'nat_mini.pt2', outputs='logits', dynamic=False)    # one graph for one shape

A graph serves many image sizes where one and the same sequence of operations computes them all. Which sizes these are
is the family's: `FREE_SIDES`, and docs/export.md.
"""

import contextlib
import copy
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors
import timm
import torch
from safetensors.torch import save
from timm.data import resolve_model_data_config
from timm.models import FeatureInfo
from torch import Tensor, nn

from . import kernels
from .backbones import catalogue
from .backbones.checkpoints import CheckpointError
from .fusion import fuse as fuse_model
from .models import create_model

__all__ = ['FORMATS', 'Export', 'ExportError', 'Output', 'Sides', 'export']

FORMATS = ('onnx', 'pt2', 'safetensors')
OUTPUTS = ('features', 'logits')
TOLERANCE = 1e-4  # relative, float32: the same sums in another order differ by about 1e-6
MAX_BATCH, MAX_SIDE = 1024, 4096
EXTERNAL_DATA = 2**31 - 2**26  # bytes of weights from which an ONNX file has them beside it: protobuf ends at 2 GiB
SYMBOL = re.compile(r'\bs\d+\b')  # of torch.export, for a size


class Sides(NamedTuple):
    """Heights and widths that one graph takes: multiples of `step` from `least`."""

    step: int
    least: int

    def fits(self, side: int) -> bool:
        return self.least <= side <= MAX_SIDE and side % self.step == 0

    def __str__(self) -> str:
        return f'any side from {self.least}' if self.step == 1 else f'multiples of {self.step} from {self.least}'


# Sizes below would need another graph: the largest level has one pixel, one window or one region a side there.
FREE_SIDES = {
    'biformer': lambda model: Sides(32 * _n_win(model), 32 * _n_win(model)),  # n_win regions a side of every map
    'crossformer': Sides(32, 256),  # more than a group of every map, and patches merge two by two
    'crossformer_pp': Sides(32, 256),
    'dinat': Sides(1, 224),  # the window fits into the last map
    'dinat_s': Sides(32, 224),
    'maxvit': None,  # its grids' dilation depends on the size, which torch.export takes minutes to reason about
    'nat': Sides(1, 224),
    'shvit': Sides(1, 65),  # the last stride is 64
    'smt': Sides(32, 64),
    'stvit': Sides(32, 256),
    'transnext': Sides(32, 64),  # pooled tokens of equal sizes
    'van': Sides(1, 33),
}
WITH_OPERATORS = {**FREE_SIDES, 'maxvit': Sides(1, 33)}
TRIED = (Sides(1, 65), Sides(32, 64), Sides(32, 256))  # in turn, for the other families


class ExportError(RuntimeError):
    """A model that can't be written as was asked, or a file that computes something else than the model."""


@dataclass(frozen=True)
class Output:
    """One of a graph's outputs: its shape, free sizes by name, and its largest relative difference from the model's."""

    name: str
    shape: tuple[int | str, ...]
    difference: float


@dataclass(frozen=True)
class Export:
    """What was written, and what it was checked by.

    Attributes:
        path: the file.
        format: one of `FORMATS`.
        image_shape: of the input `images`, free sizes by name; None of safetensors.
        sides: image sides that the graph takes; None where they are fixed.
        outputs: of the graph; none of safetensors.
        checked: shapes of the images for which file and model were compared.
        bytes: size of the file, with that of the weights beside it if there are any.
        beside: a second file that goes with it: the weights of an ONNX model of 2 GiB and more.
    """

    path: Path
    format: str
    image_shape: tuple[int | str, ...] | None
    sides: Sides | None
    outputs: tuple[Output, ...]
    checked: tuple[tuple[int, ...], ...]
    bytes: int
    beside: Path | None = None


def export(
    model: str | nn.Module,
    path: str | os.PathLike,
    format: str | None = None,
    *,
    outputs: str | None = None,
    checkpoint: str | os.PathLike | None = None,
    pretrained: bool = False,
    image_size: int | Sequence[int] | None = None,
    dynamic: bool | str = True,
    operators: bool = False,
    fuse: bool = False,
    opset: int | None = None,
    **kwargs,
) -> Export:
    """Write a model as ONNX, as a graph of torch.export, or its weights as safetensors; in float32, for evaluation.

    A graph takes normalized images (batch, channels, height, width) as `images`. The file is read back and compared
    with the model, at the image size and, where sizes are free, at others, before it is put in its place.

    Args:
        model: a name of the zoo or of timm; or a module that is called with images and gives a tensor or a list of
            them. A module stays as it is.
        path: where to; what is there is replaced, when all is well.
        format: 'onnx' (plain operations of the ONNX standard; needs onnx, onnxscript and onnxruntime), 'pt2'
            (torch.export.load) or 'safetensors' (the state dict, with metadata); by the path's suffix if None.
        outputs: 'features' (the maps of `features_only`, the default) or 'logits'; of a name, and of graphs.
        checkpoint, pretrained, kwargs: of `zoo.create_model`, for a name.
        image_size: side, or (height, width), to check at, and to write the graph for where it isn't free; that of the
            model's preprocessing if None.
        dynamic: True leaves batch, height and width free, 'batch' only the batch, False nothing (a batch of one).
        operators: keep the zoo's operators as nodes of a pt2 graph: faster and leaner, but whoever loads it has to
            `import zoo` before. Otherwise they are written as plain operations.
        fuse: `zoo.fuse` the model before.
        opset: of ONNX; PyTorch's default if None.

    Raises:
        ValueError: an argument that isn't one of these, or doesn't apply.
        FileNotFoundError, CheckpointError: of `zoo.create_model`; or there is no such folder.
        ImportError: what the format needs isn't installed.
        ExportError: no such graph of the model can be made, or the file differs from the model. Nothing is written.
    """
    path = Path(path)
    format = _format(path, format)
    named = isinstance(model, str)
    if not path.parent.is_dir():
        raise FileNotFoundError(f'There is no folder {path.parent} to write {path.name} to.')
    if not isinstance(dynamic, bool) and dynamic != 'batch':
        raise ValueError(f"dynamic must be True, False or 'batch', got {dynamic!r}.")
    if outputs not in (None, *OUTPUTS):
        raise ValueError(f'outputs must be one of {", ".join(OUTPUTS)}, got {outputs!r}.')
    if not named and (outputs or checkpoint or pretrained or kwargs):
        given = {'outputs': outputs, 'checkpoint': checkpoint, 'pretrained': pretrained, **kwargs}
        given = ', '.join(key for key, value in given.items() if value)
        raise ValueError(f'{given} can be given with a name; a module gives what it gives.')
    if operators and format != 'pt2':
        raise ValueError(f"operators are kept by the format pt2; {format} doesn't know them.")
    if opset is not None and format != 'onnx':
        raise ValueError(f"opset is of ONNX; {format} doesn't have one.")
    if format == 'safetensors' and (outputs or fuse or image_size is not None):
        raise ValueError('safetensors has the weights of the model as it is: no outputs, image size or fusion.')
    if format == 'onnx':
        _require_onnx()
    if named:
        if not timm.is_model(model):
            raise ValueError(f'There is no model {model!r}; `zoo list` shows the names.')
        feature_args = {'features_only': True} if format != 'safetensors' and outputs != 'logits' else {}
        try:
            module = create_model(model, pretrained, checkpoint, **feature_args, **kwargs)
        except CheckpointError:
            raise
        except (AssertionError, RuntimeError, TypeError) as error:  # a model without maps, an argument it doesn't take
            raise ValueError(f'{model} could not be made with {feature_args | kwargs}: {error}') from error
    else:
        module = model
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        raise ValueError('A model on the meta device has no weights to write.')
    module = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    if format == 'safetensors':
        return _write_weights(module, path)
    if fuse:
        module = fuse_model(module)
    return _write_graph(module, path, format, image_size, dynamic, operators, opset, kwargs.get('in_chans'))


def _format(path: Path, format: str | None) -> str:
    suffix = path.suffix.removeprefix('.')
    if format not in (None, *FORMATS) or (format is None and suffix not in FORMATS):
        raise ValueError(f'format must be one of {", ".join(FORMATS)}, got {format or path.name!r}.')
    if format is not None and suffix != format:
        raise ValueError(f'A file of format {format} is called *.{format}, got {path.name!r}.')
    return suffix


def _require_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX needs {error.name}: pip install 'attention-zoo[onnx]'.") from error


class _Graph(nn.Module):
    """A model with one input `images`, and a tuple of outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images)
        return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)


def _n_win(model: nn.Module) -> int:
    return math.lcm(*(module.n_win for module in model.modules() if isinstance(getattr(module, 'n_win', None), int)))


def _cfg(model: nn.Module) -> dict:
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return cfg if isinstance(cfg, dict) else cfg.to_dict()


def _candidates(model: nn.Module, operators: bool) -> tuple[Sides, ...]:
    """What to try, in this order."""
    try:
        family = catalogue.family_of(_cfg(model)['architecture'])
        sides = (WITH_OPERATORS if operators else FREE_SIDES)[family]
    except KeyError:
        return TRIED
    sides = sides(model) if callable(sides) else sides
    return (sides,) if sides else ()


def _feature_info(model: nn.Module) -> FeatureInfo | None:
    info = getattr(model, 'feature_info', None)
    return info if isinstance(info, FeatureInfo) else None  # a list, of models that give no maps


def _metadata(model: nn.Module) -> dict[str, str]:
    """What an application needs beside the weights: the name, the number of classes, and the preprocessing."""
    data = resolve_model_data_config(model)
    found = {
        'name': _cfg(model).get('architecture'),
        'num_classes': getattr(model, 'num_classes', None),
        'mean': list(data['mean']),
        'std': list(data['std']),
        'input_size': list(data['input_size']),
        'interpolation': data['interpolation'],
        'crop_pct': data['crop_pct'],
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items() if value}


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A path of the same name to write to, whose file (with those beside it) is put in place if the body ends well."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as folder:
        yield Path(folder) / path.name
        written = sorted(Path(folder).iterdir(), key=lambda each: each.name == path.name)  # the file itself is the last
        for each in written:
            with open(each, 'rb+') as file:
                os.fsync(file.fileno())
        for each in written:
            os.replace(each, path.parent / each.name)


def _write_weights(model: nn.Module, path: Path) -> Export:
    state_dict = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    with _staged(path) as staged:
        staged.write_bytes(save(state_dict, _metadata(model)))  # save_file would keep it from other users
        with safetensors.safe_open(staged, 'pt') as file:
            wrong = set(file.keys()) ^ set(state_dict)
            wrong |= {key for key in set(state_dict) - wrong if not torch.equal(file.get_tensor(key), state_dict[key])}
        if wrong:
            raise ExportError(f'{path.name} does not hold what was written: {", ".join(sorted(wrong)[:5])}.')
    return Export(path, 'safetensors', None, None, (), (), path.stat().st_size)


def _write_graph(model, path, format, image_size, dynamic, operators, opset, in_chans) -> Export:
    graph = _Graph(model)
    channels = in_chans or resolve_model_data_config(model)['input_size'][0]
    program, sides, size = _trace(graph, channels, image_size, dynamic, operators)
    shapes = [(1, channels, *size)]
    if dynamic:
        shapes.append((2, channels, *size))
    if sides:
        jump = 13 if sides.step == 1 else sides.step  # not a multiple of any stride, if it need not be
        shapes += [
            (2, channels, sides.least, sides.least + jump),
            (3, channels, sides.least + 2 * jump, sides.least),
        ]
    (returned,) = (node.args[0] for node in program.graph.nodes if node.op == 'output')
    values = [node.meta['val'] for node in returned]
    names = _output_names(model, len(values))
    image_shape, output_shapes, symbols = _shapes(program, values, _feature_info(model), sides)
    with _staged(path) as staged:
        if format == 'pt2':
            _save_pt2(program, staged, _metadata(model))
            run = torch.export.load(staged).module()
        else:
            _save_onnx(program, staged, _metadata(model), opset, image_shape, names, output_shapes, symbols)
            run = _onnx_runner(staged)
        differences = _compare(graph, run, shapes, names, path)
        beside = next((each.name for each in staged.parent.iterdir() if each != staged), None)
        size = sum(each.stat().st_size for each in staged.parent.iterdir())
    found = tuple(map(Output, names, output_shapes, differences))
    beside = path.parent / beside if beside else None
    return Export(path, format, image_shape, sides, found, tuple(shapes), size, beside)


def _trace(graph: nn.Module, channels: int, image_size, dynamic, operators: bool):
    """The graph as torch.export has it, the sides that it takes, and the size to check it at."""
    own = resolve_model_data_config(graph.model)['input_size'][1:]
    size = _size(image_size, own)
    if dynamic is not True:
        images = torch.zeros(2 if dynamic else 1, channels, *size)
        free = {0: torch.export.Dim('batch', min=1, max=MAX_BATCH)} if dynamic else None
        try:
            return _program(graph, images, free, operators), None, size
        except Exception as error:  # whatever tracing raises, of torch or of the model
            way = 'With dynamic=False (--static) nothing is free.' if dynamic else ''
            raise ExportError(f'No graph for images of {size[0]}x{size[1]}: {_reason(error)} {way}'.strip()) from error
    reasons = []
    for sides in _candidates(graph.model, operators):
        if image_size is not None and not all(map(sides.fits, size)):
            reasons.append(f'{sides}: {size[0]}x{size[1]} is none of them')
            continue
        images = torch.zeros(2, channels, 2 * sides.least, 3 * sides.least)  # sizes of 1 would be taken for constants
        free = {0: torch.export.Dim('batch', min=1, max=MAX_BATCH), **_dims(sides)}
        try:
            program = _program(graph, images, free, operators)
        except Exception as error:  # whatever tracing raises, of torch or of the model
            reasons.append(f'{sides}: {_reason(error)}')
            continue
        fitting = (max(sides.least, math.ceil(side / sides.step) * sides.step) for side in size)
        return program, sides, tuple(fitting)
    why = '; '.join(reasons) or 'the family has none in plain operations'
    raise ExportError(
        f'One graph for free image sizes is not possible: {why}. '
        "With dynamic='batch' (--fixed-size) the batch alone is free, with dynamic=False (--static) nothing."
    )


def _size(image_size, own: Sequence[int]) -> tuple[int, int]:
    if image_size is None:
        return tuple(own)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f'image_size must be a positive int or (height, width), got {image_size!r}.')
    return size


def _dims(sides: Sides) -> dict:
    step, least = sides
    if step == 1:
        return {axis: torch.export.Dim(name, min=least, max=MAX_SIDE) for axis, name in ((2, 'height'), (3, 'width'))}
    return {
        axis: step * torch.export.Dim(f'{name}_in_{step}s', min=least // step, max=MAX_SIDE // step)
        for axis, name in ((2, 'height'), (3, 'width'))
    }


def _program(graph: nn.Module, images: Tensor, free: dict | None, operators: bool) -> torch.export.ExportedProgram:
    plain = contextlib.nullcontext() if operators else kernels.use('reference')
    with plain, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.export.export(graph, (images,), dynamic_shapes={'images': free} if free else None)


def _reason(error: Exception) -> str:
    """The lines of an error that say what is wrong, without the advice that is for whoever calls torch.export."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line.startswith('- ')] or [line for line in lines if line][:1]
    return f'{type(error).__name__}: {" ".join(told)[:300]}' if told else type(error).__name__


def _output_names(model: nn.Module, count: int) -> list[str]:
    if _feature_info(model) is not None:
        return [f'features_{index}' for index in model.feature_info.out_indices]
    if count == 1:
        return ['logits' if getattr(model, 'num_classes', 0) else 'output']
    return [f'output_{i}' for i in range(count)]


def _shapes(program, values: Sequence[Tensor], info: FeatureInfo | None, sides: Sides | None):
    """Shapes of the input and the outputs with names for free sizes, and what torch.export's symbols stand for."""
    (images,) = (node.meta['val'] for node in program.graph.nodes if node.name == 'images')
    image_shape, symbols = [], {}
    for length, name in zip(images.shape, ('batch', 'channels', 'height', 'width'), strict=True):
        if isinstance(length, int):
            image_shape.append(length)
            continue
        (symbol,) = SYMBOL.findall(str(length))
        whole = str(length) == symbol
        symbols[symbol] = name if whole else f'({name}/{sides.step})'
        image_shape.append(name)

    def named(length, reduction: int | None) -> int | str:
        if isinstance(length, int):
            return length
        (symbol, *others) = set(SYMBOL.findall(str(length)))
        name = symbols[symbol].strip('()').partition('/')[0]
        if reduction and not others and name in ('height', 'width'):
            return f'{name}/{reduction}' if sides.step % reduction == 0 else f'ceil({name}/{reduction})'
        return _renamed(str(length), symbols)

    reductions = info.reduction() if info else [None] * len(values)
    outputs = [
        tuple(named(length, reduction) for length in value.shape)
        for value, reduction in zip(values, reductions, strict=True)
    ]
    return tuple(image_shape), outputs, symbols


def _renamed(expression: str, symbols: dict[str, str]) -> str:
    return SYMBOL.sub(lambda match: symbols.get(match[0], match[0]), expression)


def _known_by(length, symbols: dict[str, str]):
    """A length of an ONNX shape: a number, or None as it is, since runtimes take equal names for equal lengths."""
    known = isinstance(length, int) or length.value is None
    return length if known else _renamed(str(length.value), symbols)


def _save_pt2(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.export.save(program, path, extra_files={'metadata.json': json.dumps(metadata)})


def _save_onnx(program, path, metadata, opset, image_shape, names, output_shapes, symbols) -> None:
    import onnxscript.ir as ir

    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            exported = torch.onnx.export(
                program,
                input_names=['images'],
                output_names=names,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch's, of an operation or an opset that it can't write
        raise ExportError(f'The graph can not be written as ONNX: {_reason(error)}') from error
    onnx_graph = exported.model.graph
    for node in onnx_graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_known_by(length, symbols) for length in value.shape])
    onnx_graph.inputs[0].shape = ir.Shape(image_shape)
    for value, shape in zip(onnx_graph.outputs, output_shapes, strict=True):
        value.shape = ir.Shape(shape)
    exported.model.metadata_props.update(metadata)
    large = sum(value.numel() * value.element_size() for value in program.state_dict.values()) > EXTERNAL_DATA
    exported.save(path, external_data=large)


def _onnx_runner(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # it warns of constants that it folds
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: [torch.from_numpy(each) for each in session.run(None, {'images': images.numpy()})]


def _compare(graph: nn.Module, run, shapes, names: Sequence[str], path: Path) -> list[float]:
    """The largest relative difference of each output. ExportError if one is too large."""
    random = torch.Generator().manual_seed(0)
    largest = [0.0] * len(names)
    for shape in shapes:
        images = torch.randn(shape, generator=random)
        with torch.inference_mode():
            expected = graph(images)
            images = images.clone()
        try:
            with torch.no_grad():
                found = run(images)
        except Exception as error:  # the runtime's own
            raise ExportError(f'{path.name} does not run on images {list(shape)}: {_reason(error)}') from error
        for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            if mine.shape != theirs.shape:
                raise ExportError(
                    f'{path.name} gives {names[i]} as {list(mine.shape)} of images {list(shape)}, '
                    f'the model as {list(theirs.shape)}.'
                )
            difference = float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=torch.finfo().tiny))
            if not difference <= TOLERANCE:
                raise ExportError(
                    f'{path.name} differs from the model on images {list(shape)}: {names[i]} by {difference:.1e} of '
                    f'its largest value, where at most {TOLERANCE:.0e} was expected.'
                )
            largest[i] = max(largest[i], difference)
    return largest
