"""The rule that makes a checkpoint and an image for a parity record, and the values of a tensor that a record keeps.

A record `parity/FAMILY__VARIANT.json` says what the authors' code computed, in float64 and eval mode, from these.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

RECORDS = Path(__file__).parent / 'parity'


def record_names() -> list[str]:
    return sorted(path.stem for path in RECORDS.glob('*.json'))


def load_record(name: str) -> dict:
    return json.loads((RECORDS / f'{name}.json').read_text())


def tensor_for(key: str, shape) -> torch.Tensor:
    """Value of the parameter or BatchNorm statistic `key` of `shape`."""
    x = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
    leaf = key.rsplit('.', 1)[-1]
    if leaf == 'running_var':
        x = 1 + 0.1 * np.abs(x)
    elif leaf == 'running_mean':
        x = 0.1 * x
    elif len(shape) <= 1:  # norm scales are called weight; biases and layer scales are not
        x = 1 + 0.1 * x if leaf == 'weight' else 0.1 * x
    else:
        x = x / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(x, dtype=np.float64).reshape(tuple(shape)))


def checkpoint(record: dict) -> dict[str, torch.Tensor]:
    """The official state dict, rule-made; constants are zero, since a loader must not trust a checkpoint's copy."""
    return {
        key: torch.zeros(shape) if kind == 'const' else tensor_for(key, shape)
        for key, (kind, shape) in record['state'].items()
    }


def image(size: int, in_chans: int = 3) -> torch.Tensor:
    """A record's input, (1, in_chans, size, size)."""
    return torch.from_numpy(np.random.RandomState(size).standard_normal((1, in_chans, size, size)))


def samples(x: torch.Tensor, n: int) -> torch.Tensor:
    """n evenly spaced values of x."""
    x = x.detach().double().flatten()
    return x[torch.linspace(0, x.numel() - 1, min(n, x.numel())).round().long()]
