"""Checkpoint files: tensors and plain Python values, written whole or not at all, and checked before being read."""

import os
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = [
    'CheckpointWriteError',
    'clean',
    'damage',
    'export_weights',
    'latest',
    'load',
    'newest_whole',
    'numbered',
    'save',
    'write_atomically',
]

BACKBONE = 'backbone.'
TEMPORARY = '.tmp'


class CheckpointWriteError(OSError):
    """A file could not be written: a full disk, a folder that can't be written to. What was there before is still."""


def write_atomically(path: Path | str, write: Callable[[Path], None]) -> None:
    """Have `write(temporary path)` make the file, then put it in place: whoever looks finds the old file or the new.

    The file and its folder's entry are on the disk when this returns. Nothing of a failed write is left; what a killed
    one leaves, `clean` removes.

    Raises:
        CheckpointWriteError: the system refused.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(temporary)
        _to_disk(temporary)
        os.replace(temporary, path)
        if os.name != 'nt':  # where a folder can't be opened
            _to_disk(path.parent)
    except BaseException as error:
        _remove(temporary)
        # torch raises a RuntimeError of its own where the system refuses; the system's is in its context.
        refusal = error if isinstance(error, OSError) else error.__context__
        if isinstance(refusal, OSError):
            raise CheckpointWriteError(_explanation(path, refusal)) from error
        raise


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a folder that is gone, or can't be written to: there is a better error on its way
        return


def _explanation(path: Path, refusal: OSError) -> str:
    try:
        room = f' ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free there)'
    except OSError:
        room = ''
    kept = latest(path.parent)
    last = f' The last checkpoint there is {kept.name}; --resume goes on from it.' if kept else ''
    return f'Cannot write {path}: {refusal.strerror or refusal}{room}.{last}'


def save(checkpoint: dict, path: Path | str) -> None:
    """Write a checkpoint of tensors and plain values. CheckpointWriteError: the system refused."""

    def write(temporary: Path) -> None:
        with open(temporary, 'wb') as file:  # given a path, torch would not say why it can't be written
            torch.save(checkpoint, file)

    write_atomically(path, write)


def load(path: Path | str) -> dict:
    """Read a checkpoint onto the CPU. It can hold no code."""
    return torch.load(path, map_location='cpu', weights_only=True)


def damage(path: Path | str) -> str | None:
    """What is wrong with a checkpoint file by its own checksums, or None if it is whole. Reads it all."""
    try:
        with zipfile.ZipFile(path) as file:
            member = file.testzip()
    except PermissionError:  # says nothing of the file
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return f'bad checksum of {member}' if member else None


def numbered(folder: Path | str) -> list[Path]:
    """The checkpoints `iter_<number>.pth` of a folder, in the order of their numbers."""
    found = [path for path in Path(folder).glob('iter_*.pth') if re.fullmatch(r'iter_\d+', path.stem)]
    return sorted(found, key=iteration)


def iteration(path: Path) -> int:
    """The number of `iter_<number>.pth`."""
    return int(path.stem.removeprefix('iter_'))


def latest(folder: Path | str) -> Path | None:
    """The last of them, or None."""
    return next(reversed(numbered(folder)), None)


def newest_whole(folder: Path | str) -> Path | None:
    """The last checkpoint that is whole, or None if the folder has none. Torn ones are named in a warning, and stay.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    torn = {}
    for path in reversed(numbered(folder)):
        reason = damage(path)
        if reason is None:
            break
        torn[path] = reason
    else:
        path = None
    named = '; '.join(f'{path.name} ({reason})' for path, reason in torn.items())
    if torn and path is None:
        raise ValueError(f'No checkpoint in {folder} is whole: {named}. Move them away to begin anew.')
    if torn:
        warnings.warn(f'Torn checkpoints in {folder} are passed over for {path.name}: {named}.', stacklevel=2)
    return path


def clean(folder: Path | str) -> None:
    """Remove what killed runs left half-written in a run's folder."""
    for pattern in (f'*.pth{TEMPORARY}', f'*.safetensors{TEMPORARY}'):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)


def export_weights(checkpoint: Path | str, path: Path | str, prefix: str = BACKBONE) -> None:
    """Write a checkpoint's weights as safetensors: those whose names begin with `prefix`, without it.

    A classifier's backbone is loaded by `timm.create_model(name, checkpoint_path=path)`. Averaged weights, if the run
    kept an average: that is what the checkpoint has under `state_dict`.
    """
    weights = {
        key.removeprefix(prefix): value.contiguous()
        for key, value in load(checkpoint)['state_dict'].items()
        if key.startswith(prefix)
    }
    write_atomically(path, lambda temporary: save_file(weights, temporary, metadata={'format': 'pt'}))
