"""What happens around iterations: seeding and checkpoints."""

from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook

from . import checkpoints
from .registry import HOOKS
from .seeding import seed_everything

__all__ = ['Checkpoints', 'IterationSeed']


@HOOKS.register_module()
class IterationSeed(Hook):
    """Seed each iteration's random numbers (stochastic depth, mixup) by run, iteration and process."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        seed_everything(runner.seed, batch_idx, runner.rank)


@HOOKS.register_module()
class Checkpoints(Hook):
    """Write iter_<finished iterations>.pth every so often and at the end, and best.pth after the best validation.

    Args:
        interval: epochs from one checkpoint to the next.
        interval_iters: the same in iterations, instead.
        keep: number of the latest ones to keep, two at least.
        best: the measure whose greatest value makes a validation the best.
    """

    priority = 'VERY_LOW'  # after the hooks that change what is saved

    def __init__(self, interval: int = 1, interval_iters: int | None = None, keep: int = 2, best: str = 'top1'):
        if keep < 2:
            raise ValueError(f'keep must be at least 2, got {keep}.')
        self.interval = interval
        self.interval_iters = interval_iters
        self.keep = keep
        self.best = best
        self.best_score = float('-inf')

    def before_train(self, runner) -> None:
        path = Path(runner.work_dir, 'best.pth')
        if runner.iter and path.exists():
            self.best_score = checkpoints.load(path)['meta']['score']

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        done = batch_idx + 1
        interval = self.interval_iters or self.interval * runner.train_loop.epoch_length
        if done % interval and done != runner.max_iters:
            return
        self._save(runner, f'iter_{done}.pth', done)
        self._remove_old(runner.work_dir)

    def after_val_epoch(self, runner, metrics=None) -> None:
        score = metrics[self.best]
        if score > self.best_score:
            self.best_score = score
            self._save(runner, 'best.pth', runner.iter, score=score)

    @staticmethod
    def _save(runner, filename: str, done: int, **meta) -> None:
        meta.update(iter=done, epoch=done // runner.train_loop.epoch_length)
        runner.save_checkpoint(runner.work_dir, filename, meta=meta)

    @master_only
    def _remove_old(self, folder) -> None:
        for path in checkpoints.numbered(folder)[: -self.keep]:
            path.unlink()
