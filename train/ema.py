"""The moving average of a model's weights."""

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from .registry import HOOKS

__all__ = ['EMA']

OTHER = {'average': 'raw_state_dict', 'raw': 'average_state_dict'}  # where a checkpoint has what isn't validated


@HOOKS.register_module()
class EMA(Hook):
    """Average the weights over the optimizer's steps: average = decay * average + (1 - decay) * weights.

    As in timm's ModelEmaV3, parameters and the floating-point buffers of the state dict are averaged, here in float32
    at least, and integer buffers copied. The average begins as the weights after the first step.

    A checkpoint's `state_dict`, and what is exported, are the weights that are validated; the others are its
    `raw_state_dict` or `average_state_dict`, and a resumed run goes on from both.

    Args:
        decay: of the average.
        warmup: whether the decay rises to it as 1 - (1 + step)^(-2/3), timm's use_warmup.
        validate: 'average' or 'raw': the weights to validate, and that are the model's.
        interval: steps from one update to the next.
        buffers: 'average', as timm, or 'copy' the last values of floating-point buffers.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        decay: float = 0.9999,
        warmup: bool = False,
        validate: str = 'average',
        interval: int = 1,
        buffers: str = 'average',
    ):
        if not 0 <= decay < 1:
            raise ValueError(f'decay must be in [0, 1), got {decay!r}. It is the weight of the past: 0.9999, say.')
        if validate not in OTHER:
            raise ValueError(f"validate must be 'average' or 'raw', got {validate!r}.")
        if buffers not in ('average', 'copy'):
            raise ValueError(f"buffers must be 'average' or 'copy', got {buffers!r}.")
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be a positive integer, got {interval!r}.')
        self.decay = decay
        self.warmup = warmup
        self.validate = validate
        self.interval = interval
        self.buffers = buffers
        self.average: dict[str, Tensor] | None = None
        self._raw: dict[str, Tensor] | None = None  # the model's weights while it has the average

    def decay_at(self, step: int) -> float:
        """Decay of the update after optimizer step number `step`, from 1."""
        step -= 1
        if step <= 0:
            return 0.0
        return min(self.decay, 1 - (1 + step) ** (-2 / 3)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights of a module after optimizer step number `step`, from 1."""
        weights = module.state_dict()
        if self.average is None:
            self.average = {name: _copy(value) for name, value in weights.items()}
        copied = set() if self.buffers == 'average' else {name for name, _ in module.named_buffers()}
        averages, values = [], []
        for name, value in weights.items():
            if value.is_floating_point() and name not in copied:
                averages.append(self.average[name])
                values.append(value.to(self.average[name].dtype))
            else:
                self.average[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - self.decay_at(step))

    def before_train(self, runner) -> None:
        weights = _module(runner).state_dict()
        average = weights if self.average is None else self.average
        self.average = {name: _copy(average[name].to(value.device)) for name, value in weights.items()}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        accumulated = runner.optim_wrapper.accumulative_counts
        step, rest = divmod(batch_idx + 1, accumulated)
        if batch_idx + 1 == runner.max_iters and rest:
            step, rest = step + 1, 0
        if not rest and step % self.interval == 0:
            self.update(_module(runner), step)

    def before_val_epoch(self, runner) -> None:
        if self.validate == 'average' and self.average is not None:
            module = _module(runner)
            self._raw = {name: value.clone() for name, value in module.state_dict().items()}
            module.load_state_dict(self.average)

    def after_val_epoch(self, runner, metrics=None) -> None:
        if self._raw is not None:
            _module(runner).load_state_dict(self._raw)
            self._raw = None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        if self.average is None:
            return
        raw = self._raw or checkpoint['state_dict']
        chosen, other = (self.average, raw) if self.validate == 'average' else (raw, self.average)
        checkpoint['state_dict'], checkpoint[OTHER[self.validate]] = chosen, other

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        other = checkpoint.get(OTHER[self.validate])
        if other is None:
            return
        average, raw = checkpoint['state_dict'], other
        if self.validate == 'raw':
            average, raw = raw, average
        self.average = {name: _copy(value) for name, value in average.items()}
        checkpoint['state_dict'] = raw


def _module(runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _copy(value: Tensor) -> Tensor:
    half = value.is_floating_point() and value.element_size() < 4
    return value.detach().to(torch.float32 if half else value.dtype, copy=True)
