"""The training loop: counted in epochs or optimizer steps, exact to the iteration."""

import math

from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop

from .data import check_classes
from .distributed import BufferBroadcast
from .registry import LOOPS
from .signals import Preempted, StopSignals

__all__ = ['TrainLoop']


@LOOPS.register_module()
class TrainLoop(BaseLoop):
    """Train for a number of epochs or steps and validate every few, on a dataloader with a ShuffledStream as sampler.

    A resumed run sets the sampler to its position instead of reading all past batches again, and repeats a
    validation that was due at the checkpoint, as the checkpoint was written before it. To hooks, the whole training
    is one epoch, so that a stop can't fall between the end of an epoch and what they do then.

    SIGTERM and SIGUSR1 end the run with `Preempted` after the first iteration that has updated the weights, on which
    all processes agree; a validation is not interrupted.

    Args:
        max_epochs: how long to train.
        max_steps: the same in optimizer steps, instead: however many batches are accumulated for one.
        val_interval: epochs, or steps with max_steps, from one validation to the next; the end is always validated.

    Raises:
        ValueError: neither or both of max_epochs and max_steps are given, or the data doesn't fill a batch.
    """

    def __init__(
        self, runner, dataloader, max_epochs: int | None = None, val_interval: int = 1, max_steps: int | None = None
    ):
        if (max_epochs is None) == (max_steps is None):
            raise ValueError(f'Give one of max_epochs and max_steps, got {max_epochs} and {max_steps}.')
        super().__init__(runner, runner.build_dataloader(dataloader, seed=runner.seed))
        self.epoch_length = len(self.dataloader)
        if not self.epoch_length:
            raise ValueError(f'{len(self.dataloader.dataset)} training images do not fill a batch on every process.')
        # The optimizer's wrapper isn't built yet.
        accumulated = runner.cfg.optim_wrapper.get('accumulative_counts', 1)
        unit = self.epoch_length if max_steps is None else accumulated
        self.max_iters = (max_epochs or max_steps) * unit
        self.max_epochs = math.ceil(self.max_iters / self.epoch_length)
        self.val_interval = val_interval * unit
        self.stop_training = False  # set by mmengine's EarlyStoppingHook
        self.is_stopping = False  # a signal has asked for it
        self._iter = 0  # set, as _epoch is, by the runner's resume

    @property
    def iter(self) -> int:
        return self._iter

    @property
    def epoch(self) -> int:
        return self._iter // self.epoch_length

    @property
    def is_updated(self) -> bool:
        """Whether the last iteration has updated the weights, rather than only gathered gradients."""
        return self.runner.optim_wrapper.should_update()

    def run(self):
        self._check()
        self.dataloader.sampler.start = self._iter * self.dataloader.batch_size
        self.share_buffers = BufferBroadcast(self._model)
        with StopSignals() as self.signals:
            self.runner.call_hook('before_train')
            self.runner.call_hook('before_train_epoch')
            self._train()
            self.runner.call_hook('after_train_epoch')
            self.runner.call_hook('after_train')
        return self.runner.model

    def _train(self) -> None:
        if self._iter:
            self._validate_if_due()
        batches = iter(self.dataloader)
        self.runner.model.train()
        while self._iter < self.max_iters and not self.stop_training:
            self.run_iter(next(batches))
            if self.is_stopping and self.is_updated:
                raise Preempted(f'Stopped by a signal after iteration {self._iter}; --resume goes on from there.')
            self._validate_if_due()

    def run_iter(self, data_batch) -> None:
        """One iteration on a batch of (images, labels)."""
        hook_arguments = {'batch_idx': self._iter, 'data_batch': data_batch}
        self.runner.call_hook('before_train_iter', **hook_arguments)
        outputs = self.runner.model.train_step(data_batch, optim_wrapper=self.runner.optim_wrapper)
        self.share_buffers()
        self.is_stopping = self.signals.agreed() or self.is_stopping
        self.runner.call_hook('after_train_iter', **hook_arguments, outputs=outputs)
        self._iter += 1

    @property
    def _model(self):
        model = self.runner.model
        return model.module if is_model_wrapper(model) else model

    def _check(self) -> None:
        if any(scheduler.by_epoch for scheduler in self.runner.param_schedulers or ()):
            raise ValueError(
                'Schedulers step by iteration here: give each convert_to_iter_based=True or by_epoch=False.'
            )
        if self.runner.val_loop is not None:
            check_classes(self.dataloader.dataset, self.runner.val_dataloader.dataset, self._model.num_classes)

    def _validate_if_due(self) -> None:
        is_due = self._iter % self.val_interval == 0 or self._iter == self.max_iters
        if is_due and self.runner.val_loop is not None:
            self.runner.val_loop.run()
            self.runner.model.train()
