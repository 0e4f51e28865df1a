"""How the learning rate goes."""

import math

from mmengine.optim import _ParamScheduler

from .registry import PARAM_SCHEDULERS

__all__ = ['WarmupCosineLR']


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """A linear rise to each parameter group's learning rate, then half a cosine down to zero at `end`.

    One schedule in closed form, so that runs shorter than their warm-up work too. Lengths are in iterations, or in
    epochs with convert_to_iter_based=True.

    Args:
        optimizer: wrapper or optimizer whose groups' rates are set.
        warmup: length of the rise.
        end: length of the run; the runner gives it.
        start: fraction of the rate that the rise begins at.
    """

    def __init__(self, optimizer, warmup: int, end: int, start: float = 0.01):
        self.warmup = warmup
        self.start = start
        super().__init__(optimizer, 'lr', end=end, by_epoch=False)

    @classmethod
    def build_iter_from_epoch(
        cls, optimizer, warmup: int, end: int, epoch_length: int, by_epoch: bool = True, **kwargs
    ):
        """The schedule of lengths in epochs."""
        return cls(optimizer, warmup * epoch_length, end * epoch_length, **kwargs)

    def _get_value(self) -> list[float]:
        if self.last_step < self.warmup:
            factor = self.start + (1 - self.start) * self.last_step / self.warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (self.last_step - self.warmup) / (self.end - self.warmup)))
        return [base * factor for base in self.base_values]
