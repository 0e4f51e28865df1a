"""Made images that show what a dataset and a task do to pixels."""

import copy
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

__all__ = ['COLOURS', 'coordinates', 'covered', 'edge', 'interpolation_of', 'side_covered', 'solid', 'with_images']

BLUE = 128.0
SOLID = 64
SIDE = 400  # pixels of a probe: more than most crops, so that these shrink it
COLOURS = {  # bytes of red, green and blue
    'black': (0, 0, 0),
    'white': (255, 255, 255),
    'red': (255, 0, 0),
    'green': (0, 255, 0),
    'blue': (0, 0, 255),
}


class _Reader:
    """In the place of timm's reader: made images, each with label 0."""

    def __init__(self, reader, images: Sequence[Image.Image]):
        self._reader = reader
        self._files = []
        for image in images:
            file = io.BytesIO()
            image.save(file, 'PNG')
            self._files.append(file.getvalue())

    def __getattr__(self, name):
        return getattr(self._reader, name)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        return io.BytesIO(self._files[index]), 0

    def __len__(self) -> int:
        return len(self._files)

    def filename(self, index: int, *_, **__) -> str:
        return f'probe {index}'


def with_images(dataset, images: Sequence[Image.Image]):
    """A dataset that reads and transforms these images as `dataset` does its own; None if it has no reader."""
    reader = getattr(dataset, 'reader', None)
    if reader is None:
        return None
    probe = copy.copy(dataset)
    probe.reader = _Reader(reader, images)
    return probe


def solid(name: str) -> Image.Image:
    """An image of one colour of COLOURS."""
    return Image.new('RGB', (SOLID, SOLID), COLOURS[name])


def coordinates() -> Image.Image:
    """An image whose red grows from left to right and whose green from top to bottom, both from 0 to 255."""
    ramp = np.linspace(0, 255, SIDE)
    pixels = np.full((SIDE, SIDE, 3), BLUE)
    pixels[..., 0] = ramp[None, :]
    pixels[..., 1] = ramp[:, None]
    return Image.fromarray(pixels.round().astype(np.uint8))


def covered(pixels: np.ndarray) -> tuple[float, float]:
    """Shares of `coordinates` that an output of it shows, (3, H, W) in 0..255: of the width and of the height.

    The width's is negative if the image is flipped from left to right. Pixels that were filled in don't count.
    """
    shown = np.abs(pixels[2].astype(float) - BLUE) < 48
    if shown.sum() < 16:
        return 0.0, 0.0
    width, height = (np.ptp(np.quantile(pixels[channel][shown], (0.002, 0.998))) / 255 for channel in (0, 1))
    columns = np.nonzero(shown)[1]
    is_flipped = np.cov(columns, pixels[0][shown])[0, 1] < 0
    return -float(width) if is_flipped else float(width), float(height)


def side_covered(pixels: np.ndarray) -> tuple[float, float]:
    """The same of an output that is a plain, unflipped crop, exactly."""
    width = np.median(pixels[0, :, -1]) - np.median(pixels[0, :, 0])
    height = np.median(pixels[1, -1, :]) - np.median(pixels[1, 0, :])
    # The values are those of the pixels' middles.
    inner = (SIDE - 1) / SIDE / 255
    columns, rows = pixels.shape[2], pixels.shape[1]
    return float(width * inner * columns / (columns - 1)), float(height * inner * rows / (rows - 1))


def edge() -> Image.Image:
    """An image whose left half is dark and whose right half is light, neither of which is the end of the scale."""
    pixels = np.full((SIDE, SIDE, 3), 64, dtype=np.uint8)
    pixels[:, SIDE // 2 :] = 192
    return Image.fromarray(pixels)


def interpolation_of(pixels: np.ndarray) -> str:
    """How an output of `edge` was resized: 'nearest', 'bilinear' or 'bicubic', which with 'lanczos' overshoots."""
    row = pixels[0, pixels.shape[1] // 2].astype(int)
    if row.min() < 64 or row.max() > 192:
        return 'bicubic'
    return 'bilinear' if ((row > 64) & (row < 192)).any() else 'nearest'
