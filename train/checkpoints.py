"""Checkpoint files: tensors and plain Python values only, written whole or not at all."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ['export_backbone', 'latest', 'load', 'numbered', 'save', 'write_atomically']

BACKBONE = 'backbone.'


def write_atomically(path: Path | str, write: Callable[[Path], None]) -> None:
    """Have `write(temporary path)` make the file, then put it in place: whoever looks finds the old file or the new.

    A temporary file of an interrupted write is overwritten by the next.
    """
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    write(temporary)
    with open(temporary, 'rb') as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(checkpoint: dict, path: Path | str) -> None:
    """Write a checkpoint of tensors and plain values."""
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def load(path: Path | str) -> dict:
    """Read a checkpoint onto the CPU. It can hold no code."""
    return torch.load(path, map_location='cpu', weights_only=True)


def numbered(folder: Path | str) -> list[Path]:
    """The checkpoints `iter_<number>.pth` of a folder, in the order of their numbers."""
    found = [path for path in Path(folder).glob('iter_*.pth') if re.fullmatch(r'iter_\d+', path.stem)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix('iter_')))


def latest(folder: Path | str) -> Path | None:
    """The last of them, or None."""
    return next(reversed(numbered(folder)), None)


def export_backbone(checkpoint: Path | str, path: Path | str) -> None:
    """Write the backbone's weights as safetensors that `timm.create_model(name, checkpoint_path=path)` loads.

    Averaged weights, if the run kept an average: that is what the checkpoint has under `state_dict`.
    """
    weights = {
        key.removeprefix(BACKBONE): value.contiguous()
        for key, value in load(checkpoint)['state_dict'].items()
        if key.startswith(BACKBONE)
    }
    write_atomically(path, lambda temporary: save_file(weights, temporary, metadata={'format': 'pt'}))
