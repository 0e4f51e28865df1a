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
    seed = int(second)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed formats the stack for each idle kind of device
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            device.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
