"""The order of the training data, addressable by position."""

from collections.abc import Iterator

import torch
from mmengine.dist import get_dist_info
from torch.utils.data import Sampler

from .registry import DATA_SAMPLERS

__all__ = ['ShuffledStream']


@DATA_SAMPLERS.register_module()
class ShuffledStream(Sampler):
    """An endless stream of seeded permutations, from which process r of R takes the draws r, r + R, r + 2R, ...

    It yields (index, (seed, draw)), so that the dataset can augment each draw by a key of its own, and begins at
    `start`, a count of this process's draws, so that a resumed run goes on where it was.

    Args:
        dataset: what is drawn from; only its length matters.
        seed: of the permutations.
    """

    def __init__(self, dataset, seed: int = 0):
        self.size = len(dataset)
        self.seed = seed
        self.start = 0
        self.rank, self.world_size = get_dist_info()

    def __iter__(self) -> Iterator[tuple[int, tuple[int, int]]]:
        draw = self.start * self.world_size + self.rank
        epoch = None
        while True:
            if draw // self.size != epoch:
                epoch = draw // self.size
                # int64 takes no more than 63 bits; the seed takes the upper ones
                generator = torch.Generator().manual_seed((self.seed << 31) + epoch)
                permutation = torch.randperm(self.size, generator=generator).tolist()
            yield permutation[draw % self.size], (self.seed, draw)
            draw += self.world_size

    def __len__(self) -> int:
        """Draws of this process in an epoch, rounded down."""
        return self.size // self.world_size
