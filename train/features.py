"""Features of many images in one file, on all processes; killed and started again, it goes on where it was."""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import barrier, get_dist_info
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from .checkpoints import write_atomically
from .distributed import on_first, process_group
from .images import ImageError, find_images, write_broken
from .inference import Images, LoadedModel, batches, load_model

__all__ = ['Features', 'extract_features']

FORMATS = ('.npy', '.parquet', '.safetensors')


@dataclass
class Features:
    """What an extraction has left.

    Attributes:
        path: of the features, float32 (images, channels).
        names: the table of the images' names, in the order of the rows: columns row, name. In a .parquet file they
            are a column, and this is None.
        record: what the features were computed with, JSON.
        images: number of rows.
        channels: of each.
        broken: images that can't be read, which have no rows: (name, reason).
        broken_list: file of them, or None.
    """

    path: Path
    names: Path | None
    record: Path
    images: int
    channels: int
    broken: list[tuple[str, str]]
    broken_list: Path | None


def extract_features(
    model: Path | str | LoadedModel,
    images: Sequence[Path | str],
    out: Path | str,
    layer: str | int | None = None,
    *,
    batch_size: int = 64,
    part_size: int = 4096,
    workers: int = 0,
    on_error: str = 'raise',
    overwrite: bool = False,
    progress: bool = False,
    **loading,
) -> Features:
    """Write the features of images, a row each, in the order of `find_images`.

    The images are computed in parts of `part_size`, written to a folder beside `out` and shared among the processes of
    a run under torchrun, which must all see that folder. After a kill, the same call computes the parts that are
    missing. Each part has the same batches whoever computes it, so that the result is the same to the bit on the same
    kind of hardware. A call whose result is complete returns at once.

    Args:
        model: a model loaded by `load_model`, or what that takes.
        images: files, folders, tar files such as WebDataset's shards, or wildcards.
        out: file to write: .npy, .safetensors (both with a table of the names beside) or .parquet (needs pyarrow).
        layer: None for the features that the classifier sees; or a level of `model.feature_info` by its number (-1 is
            the last) or name ('stages.2'), whose map is averaged over its places.
        batch_size: images at a time.
        part_size: images a part; rounded up to whole batches.
        workers: processes that read images.
        on_error: what an image that can't be decoded does: 'raise', or 'skip' (it has no row, and is listed).
        overwrite: discard an earlier result, whole or in parts.
        progress: show a bar.
        loading: other arguments of `load_model`.

    Raises:
        FileExistsError: there is a result, or parts of one, of other images or another model.
        ImageError: an image can't be decoded, and on_error is 'raise'.
        ImportError: a .parquet file is asked for, and pyarrow is missing.
        FileNotFoundError, ValueError: of `find_images` and `load_model`; an unknown format or layer.
    """
    out = Path(out).expanduser()
    _check_format(out)
    for name, value in (('batch_size', batch_size), ('part_size', part_size)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}.')
    files = find_images(images)
    with process_group():
        loaded = model if isinstance(model, LoadedModel) else load_model(model, classifies=False, **loading)
        features = _pooled(loaded.model, layer)
        part_size = -(-part_size // batch_size) * batch_size
        parts = [range(start, min(start + part_size, len(files))) for start in range(0, len(files), part_size)]
        names = hashlib.sha256('\n'.join(file.name for file in files).encode()).hexdigest()
        description = {
            **loaded.describe(),
            'layer': str(layer),
            'images': str(len(files)),
            'names': names,
            'batch_size': str(batch_size),
            'part_size': str(part_size),
        }
        folder = out.with_name(out.name + '.parts')
        missing = on_first(_begin, out, folder, description, len(parts), overwrite)
        if missing is not None:
            rank, world_size = get_dist_info()
            dataset = Images(files, loaded.transform, loaded.image_mode)
            own = {index: parts[index] for index in missing[rank::world_size]}
            for index, arrays, broken in _compute(
                loaded, features, dataset, own, batch_size, workers, on_error, progress
            ):
                metadata = {'broken': json.dumps(broken)}
                write_atomically(_part(folder, index), partial(save_file, arrays, metadata=metadata))
            barrier()
            on_first(_finish, out, folder, len(parts), [file.name for file in files], description, on_error)
        result = on_first(_result, out)
    _check_broken(result.broken, on_error)
    return result


def _check_format(out: Path) -> None:
    if out.suffix not in FORMATS:
        raise ValueError(f'Features are written to {", ".join(FORMATS)}, got {out.name}.')
    if out.suffix == '.parquet':
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "A .parquet file needs pyarrow: pip install 'attention-zoo[parquet]', or choose .npy or .safetensors."
            ) from error


def _pooled(model: nn.Module, layer: str | int | None) -> Callable[[Tensor], Tensor]:
    if layer is None:
        return partial(_before_classifier, model)
    levels = [level['module'] for level in getattr(model, 'feature_info', ())]
    number = int(layer) if str(layer).removeprefix('-').isdigit() else None
    if number is None and layer in levels:
        number = levels.index(layer)
    if number is None or not -len(levels) <= number < len(levels):
        raise ValueError(f'There is no layer {layer!r}. Layers: {", ".join(levels) or "none"}, or their numbers.')
    number %= len(levels)

    def pool(images: Tensor) -> Tensor:
        maps = model.forward_intermediates(
            images, indices=[number], stop_early=True, output_fmt='NCHW', intermediates_only=True
        )
        return maps[-1].float().mean(dim=(2, 3))

    return pool


def _before_classifier(model: nn.Module, images: Tensor) -> Tensor:
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    if pooled.ndim != 2:
        raise ValueError(f'{type(model).__name__} does not pool its features: {tuple(pooled.shape)}. Choose a layer.')
    return pooled


def _part(folder: Path, index: int) -> Path:
    return folder / f'{index:06}.safetensors'


def _record(out: Path) -> Path:
    return out.with_name(out.name + '.json')


def _names(out: Path) -> Path:
    return out.with_name(out.name + '.names.csv')


def _broken(out: Path) -> Path:
    return out.with_name(out.name + '.broken_images.txt')


def _begin(out: Path, folder: Path, description: dict, count: int, overwrite: bool) -> list[int] | None:
    """The parts that are missing, once the folder is there with the result's description; None if it is whole."""
    begun = folder / 'description.json'
    if overwrite:
        for path in (_record(out), out, _names(out), _broken(out)):  # the record first: it says that the rest is whole
            path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    for path, what in ((_record(out), 'a result'), (begun, 'parts of a result')):
        if path.exists():
            other = json.loads(path.read_text())
            differing = [key for key, value in description.items() if other.get(key) != value]
            if differing:
                shown = '; '.join(f'{key}: {other.get(key)} there, {description[key]} now' for key in differing)
                raise FileExistsError(
                    f'{path.parent if path == begun else out} has {what} of another call ({shown}). '
                    'Choose another file, or --overwrite it.'
                )
    if _record(out).exists() and out.exists():
        shutil.rmtree(folder, ignore_errors=True)  # what a kill has left of the clearing up
        return None
    if out.exists() and not begun.exists():
        raise FileExistsError(f'{out} exists, and is of no extraction. Choose another file, or --overwrite it.')
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(begun, lambda path: path.write_text(json.dumps(description, indent=1)))
    return [index for index in range(count) if not _part(folder, index).exists()]


def _compute(
    loaded: LoadedModel,
    features: Callable[[Tensor], Tensor],
    dataset: Images,
    parts: dict[int, range],
    batch_size: int,
    workers: int,
    on_error: str,
    progress: bool,
) -> Iterator[tuple[int, dict[str, np.ndarray], list]]:
    """Number, arrays and broken images of each of the parts, as soon as it is whole."""
    slices = [
        (index, part[start : start + batch_size])
        for index, part in parts.items()
        for start in range(0, len(part), batch_size)
    ]
    found, positions, broken = [], [], []
    indices = [positions for _, positions in slices]
    for (index, own), batch in zip(
        slices, batches(dataset, indices, workers, on_error, 'features', progress), strict=True
    ):
        broken += batch.broken
        positions += batch.positions
        if batch.images is not None:
            found.append(loaded.apply(features, batch.images).cpu())
        if own[-1] == parts[index][-1]:
            rows = torch.cat(found).numpy() if found else np.empty((0, 0), np.float32)
            yield index, {'features': rows, 'positions': np.array(positions, np.int64)}, broken
            found, positions, broken = [], [], []


def _check_broken(broken: list[tuple[str, str]], on_error: str) -> None:
    """ImageError for what an earlier call with on_error='skip' has left out, if this one isn't to."""
    if broken and on_error == 'raise':
        name, reason = broken[0]
        raise ImageError(f'Cannot read the image {name}: {reason}', name, reason)


def _finish(out: Path, folder: Path, count: int, names: list[str], description: dict, on_error: str) -> None:
    """Make one file of the parts; then its record, which says that it is whole; then remove them."""
    shapes, positions, broken = [], [], []
    for index in range(count):
        with safe_open(_part(folder, index), 'np') as part:
            shapes.append(part.get_slice('features').get_shape())
            positions += part.get_tensor('positions').tolist()
            broken += json.loads(part.metadata()['broken'])
    if sorted([*positions, *(position for position, *_ in broken)]) != list(range(len(names))):
        raise RuntimeError(f'The parts in {folder} are not those of the images. Remove the folder and start again.')
    broken = [(name, reason) for _, name, reason in broken]
    _check_broken(broken, on_error)
    channels = {width for rows, width in shapes if rows}
    if not channels:
        raise ValueError(f'None of the {len(names)} images can be read.')
    shape = (len(positions), channels.pop())

    def rows() -> Iterator[np.ndarray]:
        for index, (size, _) in enumerate(shapes):
            if size:
                with safe_open(_part(folder, index), 'np') as part:
                    yield part.get_tensor('features')

    kept = [names[position] for position in positions]
    if out.suffix != '.parquet':
        write_atomically(_names(out), lambda path: _write_names(path, kept))
    if broken:
        write_broken(_broken(out), broken)
    write = {'.npy': _write_npy, '.safetensors': _write_safetensors, '.parquet': _write_parquet}[out.suffix]
    write_atomically(out, lambda path: write(path, rows(), shape, kept))
    record = {**description, 'shape': shape, 'broken': broken}
    write_atomically(_record(out), lambda path: path.write_text(json.dumps(record, indent=1)))
    shutil.rmtree(folder)


def _write_names(path: Path, names: list[str]) -> None:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([('row', 'name'), *enumerate(names)])


def _write_npy(path: Path, rows: Iterator[np.ndarray], shape: tuple[int, int], names: list[str]) -> None:
    array = np.lib.format.open_memmap(path, 'w+', np.float32, shape)
    start = 0
    for part in rows:
        array[start : start + len(part)] = part
        start += len(part)
    array.flush()


def _write_safetensors(path: Path, rows: Iterator[np.ndarray], shape: tuple[int, int], names: list[str]) -> None:
    save_file({'features': np.concatenate(list(rows))}, path)  # which holds all of them in memory


def _write_parquet(path: Path, rows: Iterator[np.ndarray], shape: tuple[int, int], names: list[str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([('name', pa.string()), ('features', pa.list_(pa.float32(), shape[1]))])
    start = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for part in rows:
            values = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), shape[1])
            writer.write_table(pa.table([pa.array(names[start : start + len(part)]), values], schema))
            start += len(part)


def _result(out: Path) -> Features:
    record = json.loads(_record(out).read_text())
    return Features(
        path=out,
        names=_names(out) if _names(out).exists() else None,
        record=_record(out),
        images=record['shape'][0],
        channels=record['shape'][1],
        broken=[tuple(item) for item in record['broken']],
        broken_list=_broken(out) if record['broken'] else None,
    )
