"""Random numbers that depend on the place in a run, not on its past."""

import random

import numpy as np
import torch

__all__ = ['seed_everything']


def seed_everything(*key: int) -> None:
    """Seed Python's, numpy's and torch's generators by a key of non-negative integers, such as (seed, iteration)."""
    first, second = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(first))
    np.random.seed(first)
    torch.manual_seed(int(second))
