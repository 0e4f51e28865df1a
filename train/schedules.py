"""How the learning rate goes."""

import inspect
import math
from collections.abc import Sequence
from types import SimpleNamespace

from mmengine.optim import _ParamScheduler
from timm.scheduler import create_scheduler_v2

from .registry import PARAM_SCHEDULERS

__all__ = ['DenseLR', 'TimmLR', 'WarmupCosineLR']

KINDS = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant')
# What TimmLR decides itself.
OWN = {'optimizer', 'sched', 'num_epochs', 'step_on_epochs', 'updates_per_epoch', 'patience_epochs', 'plateau_mode'}


@PARAM_SCHEDULERS.register_module()
class TimmLR(_ParamScheduler):
    """A schedule of timm's, by the name and the arguments of `timm.scheduler.create_scheduler_v2`.

    The run's epochs are the whole of it: of `max_epochs` = 310 with cooldown_epochs=10, the cosine takes 300 and the
    last 10 stay at min_lr. A warm-up is part of the cosine's epochs, or comes before them with warmup_prefix=True.
    Rates depend on the position alone: epochs, or optimizer steps, whatever number of batches makes one. In a config it
    needs convert_to_iter_based=True.

    Args:
        optimizer: wrapper or optimizer whose groups' rates are set; a group's `lr_scale` multiplies whatever timm's
            schedule gives, minimum and warm-up rate too.
        epoch_length: batches of an epoch; the runner gives it.
        end: epochs of the run; the runner gives it.
        sched: 'cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt' or 'constant'.
        per_step: whether the rate changes with each optimizer step, rather than each epoch.
        warmup_steps: length of the warm-up in optimizer steps, instead of warmup_epochs; needs per_step.
        kwargs: further arguments of create_scheduler_v2: warmup_epochs, warmup_lr, min_lr, cooldown_epochs, ...

    Raises:
        ValueError: an unknown schedule or argument, or a schedule that doesn't last `end` epochs.
    """

    def __init__(
        self,
        optimizer,
        epoch_length: int,
        end: int,
        sched: str = 'cosine',
        per_step: bool = False,
        warmup_steps: int | None = None,
        **kwargs,
    ):
        if sched not in KINDS:
            raise ValueError(f'sched must be one of {", ".join(KINDS)}, got {sched!r}.')
        known = set(inspect.signature(create_scheduler_v2).parameters) - OWN
        if not known.issuperset(kwargs):
            unknown = ', '.join(sorted(set(kwargs) - known))
            raise ValueError(f'TimmLR does not take {unknown}. It takes {", ".join(sorted(known))}.')
        accumulated = getattr(optimizer, 'accumulative_counts', 1)
        steps = math.ceil(epoch_length / accumulated)  # of an epoch
        if warmup_steps is not None:
            if not per_step or 'warmup_epochs' in kwargs:
                raise ValueError('warmup_steps needs per_step=True, and excludes warmup_epochs.')
            kwargs['warmup_epochs'] = warmup_steps / steps
        self.divisor = accumulated if per_step else epoch_length  # batches to one step of the schedule
        before = kwargs.get('warmup_epochs', 0) if kwargs.get('warmup_prefix') and sched not in ('wsd', 'rsqrt') else 0
        length = end - before - kwargs.get('cooldown_epochs', 0)
        if length <= 0:
            raise ValueError(f'Of {end} epochs, warm-up and cooldown leave {length} to the {sched} schedule.')
        groups = optimizer.param_groups
        self.scales = [group.get('lr_scale', 1.0) for group in groups]
        # timm's schedule has stand-ins of the groups at their unscaled rates, and only computes.
        rates = [group.get('initial_lr', group['lr']) for group in groups]
        bases = [{'lr': rate / scale} for rate, scale in zip(rates, self.scales, strict=True)]
        self.schedule, lasts = create_scheduler_v2(
            SimpleNamespace(param_groups=bases),
            sched,
            num_epochs=length,
            step_on_epochs=not per_step,
            updates_per_epoch=steps,
            **kwargs,
        )
        if kwargs.get('cycle_limit', 1) != 1 and lasts != end:
            raise ValueError(f'The {sched} schedule with its cycles lasts {lasts} epochs, but the run {end}.')
        super().__init__(optimizer, 'lr', by_epoch=False)
        self.optimizer._global_step = 0  # mmengine warns otherwise, as the first batches of a step don't step

    @classmethod
    def build_iter_from_epoch(cls, optimizer, epoch_length: int, end: int, by_epoch: bool = True, **kwargs):
        """The schedule of a config: mmengine tells the length of an epoch to those with convert_to_iter_based=True."""
        return cls(optimizer, epoch_length, end, **kwargs)

    def _get_value(self) -> list[float]:
        time = self.last_step // self.divisor
        values = self.schedule._add_noise(self.schedule._get_lr(time), time)
        return [value * scale for value, scale in zip(values, self.scales, strict=True)]

    def state_dict(self) -> dict:
        """The position: the rest is the config's."""
        return {'last_step': self.last_step, '_global_step': self._global_step}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for group, value in zip(self.optimizer.param_groups, self._get_value(), strict=True):
            group['lr'] = value
        self._last_value = [group['lr'] for group in self.optimizer.param_groups]


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """A linear rise to each parameter group's learning rate, then half a cosine down to zero at `end`.

    One schedule in closed form, so that runs shorter than their warm-up work too. Lengths are in iterations, or in
    epochs with convert_to_iter_based=True. timm's cosine (`TimmLR`) begins with the warm-up; this one begins after it.

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


@PARAM_SCHEDULERS.register_module()
class DenseLR(_ParamScheduler):
    """The schedules of mmdetection and mmsegmentation: a linear warm-up times steps, a polynomial or a cosine.

    Positions are optimizer steps, however many batches are accumulated for one. In a config it needs by_epoch=False.
    The rate at step t of T is f(t / T) times a group's rate, and for t < `warmup_steps` also 1 - (1 - t /
    warmup_steps)(1 - warmup_start), as in mmcv 1 (`runner/hooks/lr_updater.py`), where the first steps warm up what the
    schedule gives rather than come before it.

    Args:
        optimizer: wrapper or optimizer whose groups' rates are set.
        end: length of the run in iterations; the runner gives it.
        sched: 'step' (f falls by `gamma` at each of the milestones), 'poly' (from 1 to min_ratio as (1 - x)^power)
            or 'cosine' (from 1 to min_ratio).
        milestones: of 'step', as fractions of the run: (8 / 12, 11 / 12) of the 1x schedule's epochs.
        gamma: of 'step'.
        power: of 'poly'.
        min_ratio: f at the end of 'poly' and 'cosine'.
        warmup_steps: length of the warm-up.
        warmup_start: what the warm-up begins at.

    Raises:
        ValueError: an unknown schedule, milestones that are no rising fractions, or a warm-up longer than the run.
    """

    def __init__(
        self,
        optimizer,
        end: int,
        sched: str,
        milestones: Sequence[float] = (),
        gamma: float = 0.1,
        power: float = 1.0,
        min_ratio: float = 0.0,
        warmup_steps: int = 0,
        warmup_start: float = 1e-3,
        by_epoch: bool = False,
    ):
        if by_epoch:
            raise ValueError('DenseLR counts optimizer steps: give by_epoch=False.')
        if sched not in ('step', 'poly', 'cosine'):
            raise ValueError(f"sched must be 'step', 'poly' or 'cosine', got {sched!r}.")
        if list(milestones) != sorted(set(milestones)) or not all(0 < place < 1 for place in milestones):
            raise ValueError(f'milestones must be rising fractions of the run, got {milestones!r}.')
        self.accumulated = getattr(optimizer, 'accumulative_counts', 1)
        self.steps = math.ceil(end / self.accumulated)
        if not 0 <= warmup_steps <= self.steps:
            raise ValueError(f'warmup_steps must be from 0 to the {self.steps} of the run, got {warmup_steps!r}.')
        self.sched, self.gamma, self.power, self.min_ratio = sched, gamma, power, min_ratio
        self.milestones = [round(place * self.steps) for place in milestones]
        self.warmup_steps, self.warmup_start = warmup_steps, warmup_start
        super().__init__(optimizer, 'lr', by_epoch=False)
        self.optimizer._global_step = 0  # mmengine warns otherwise, as the first batches of a step don't step

    def _get_value(self) -> list[float]:
        step = min(self.last_step // self.accumulated, self.steps)
        if self.sched == 'step':
            factor = self.gamma ** sum(step >= place for place in self.milestones)
        elif self.sched == 'poly':
            factor = self.min_ratio + (1 - self.min_ratio) * (1 - step / self.steps) ** self.power
        else:
            factor = self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        if step < self.warmup_steps:
            factor *= 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_start)
        return [base * factor for base in self.base_values]
