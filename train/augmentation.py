"""What timm's augmentation needs to run on every Pillow."""

import itertools

from PIL import Image
from timm.data import auto_augment

__all__ = ['keep_no_bits']


def keep_no_bits(transform):
    """Have a transform of timm's posterize to no bits, in place, and return it.

    At the top of its range ('rand-m9-mstd0.5-inc1' draws magnitudes up to 10) timm's PosterizeIncreasing keeps 0 bits
    of a pixel: black, as Pillow made it until version 13 made it an error.
    """
    for step in getattr(transform, 'transforms', ()):
        policy = itertools.chain.from_iterable(getattr(step, 'policy', ()))
        for operation in (*getattr(step, 'ops', ()), *policy):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    return auto_augment.posterize(image, bits, **kwargs) if bits else Image.new(image.mode, image.size)
