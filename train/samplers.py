"""The order of the training data, addressable by position."""

from collections.abc import Iterator

import torch
from mmengine.dist import get_dist_info
from torch.utils.data import Sampler

from .registry import DATA_SAMPLERS

__all__ = ['ShuffledStream']

ROUND = 256  # DeiT and timm cut an epoch of repeated augmentation to a multiple of this many draws


@DATA_SAMPLERS.register_module()
class ShuffledStream(Sampler):
    """An endless stream of seeded permutations, from which process r of R takes the draws r, r + R, r + 2R, ...

    It yields (index, (seed, draw)), so that the dataset can augment each draw by a key of its own, and begins at
    `start`, a count of this process's draws, so that a resumed run goes on where it was.

    With `repeats`, a permutation gives each of its images that many times in a row, so to different processes, and
    ends when as many were drawn as the dataset has: an epoch is as long as ever and sees 1/repeats of the images
    (repeated augmentation, as DeiT's and timm's RepeatAugSampler).

    Args:
        dataset: what is drawn from; only its length matters.
        seed: of the permutations.
        repeats: draws of an image in a row.
        multiple: the length of an epoch is rounded down to a multiple of this many draws of this process.

    Raises:
        ValueError: `repeats` or `multiple` is not a positive integer.
    """

    def __init__(self, dataset, seed: int = 0, repeats: int = 1, multiple: int = 1):
        for name, value in (('repeats', repeats), ('multiple', multiple)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be a positive integer, got {value!r}.')
        self.size = len(dataset)
        self.seed = seed
        self.repeats = repeats
        self.multiple = multiple
        self.start = 0
        self.rank, self.world_size = get_dist_info()

    @property
    def period(self) -> int:
        """Draws, of all processes, from one permutation."""
        return self.size // ROUND * ROUND if self.repeats > 1 and self.size >= ROUND else self.size

    def __iter__(self) -> Iterator[tuple[int, tuple[int, int]]]:
        draw = self.start * self.world_size + self.rank
        epoch = None
        while True:
            if draw // self.period != epoch:
                epoch = draw // self.period
                # int64 takes no more than 63 bits; the seed takes the upper ones
                generator = torch.Generator().manual_seed((self.seed << 31) + epoch)
                permutation = torch.randperm(self.size, generator=generator).tolist()
            yield permutation[draw % self.period // self.repeats], (self.seed, draw)
            draw += self.world_size

    def __len__(self) -> int:
        """Draws of this process in an epoch, rounded down."""
        return self.period // self.world_size // self.multiple * self.multiple
