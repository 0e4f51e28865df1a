"""The training loop: counted in epochs, exact to the iteration."""

from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop

from .data import check_classes
from .registry import LOOPS

__all__ = ['TrainLoop']


@LOOPS.register_module()
class TrainLoop(BaseLoop):
    """Train for a number of epochs and validate every few, on a dataloader whose sampler is a ShuffledStream.

    A resumed run sets the sampler to its position instead of reading all past batches again, and repeats a
    validation that was due at the checkpoint, as the checkpoint was written before it. To hooks, the whole training
    is one epoch, so that a stop can't fall between the end of an epoch and what they do then.

    Args:
        max_epochs: how long to train.
        val_interval: epochs from one validation to the next; the last epoch is always validated.
    """

    def __init__(self, runner, dataloader, max_epochs: int, val_interval: int = 1):
        super().__init__(runner, runner.build_dataloader(dataloader, seed=runner.seed))
        self.epoch_length = len(self.dataloader)
        if not self.epoch_length:
            raise ValueError(f'{len(self.dataloader.dataset)} training images do not fill a batch on every process.')
        self.max_epochs = max_epochs
        self.max_iters = max_epochs * self.epoch_length
        self.val_interval = val_interval * self.epoch_length
        self.stop_training = False  # set by mmengine's EarlyStoppingHook
        self._iter = 0  # set, as _epoch is, by the runner's resume

    @property
    def iter(self) -> int:
        return self._iter

    @property
    def epoch(self) -> int:
        return self._iter // self.epoch_length

    def run(self):
        self._check()
        self.dataloader.sampler.start = self._iter * self.dataloader.batch_size
        batches = iter(self.dataloader)
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        if self._iter:
            self._validate_if_due()
        while self._iter < self.max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(batches))
            self._validate_if_due()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_iter(self, data_batch) -> None:
        """One iteration on a batch of (images, labels)."""
        hook_arguments = {'batch_idx': self._iter, 'data_batch': data_batch}
        self.runner.call_hook('before_train_iter', **hook_arguments)
        outputs = self.runner.model.train_step(data_batch, optim_wrapper=self.runner.optim_wrapper)
        self.runner.call_hook('after_train_iter', **hook_arguments, outputs=outputs)
        self._iter += 1

    def _check(self) -> None:
        if any(scheduler.by_epoch for scheduler in self.runner.param_schedulers or ()):
            raise ValueError(
                'Schedulers step by iteration here: give each convert_to_iter_based=True or by_epoch=False.'
            )
        if self.runner.val_loop is not None:
            model = self.runner.model.module if is_model_wrapper(self.runner.model) else self.runner.model
            check_classes(self.dataloader.dataset, self.runner.val_dataloader.dataset, model.num_classes)

    def _validate_if_due(self) -> None:
        is_due = self._iter % self.val_interval == 0 or self._iter == self.max_iters
        if is_due and self.runner.val_loop is not None:
            self.runner.val_loop.run()
