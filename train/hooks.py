"""What happens around iterations: seeding and checkpoints."""

from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook

from . import checkpoints
from .distributed import on_first
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

    While gradients accumulate nothing is written: a checkpoint that falls due then comes after the next update. One
    comes too when the run is to stop early. Old ones are removed once the new one is in place.

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
        self.is_due = False
        self.whole = []

    def before_train(self, runner) -> None:
        if runner.iter:
            folder = Path(runner.work_dir)
            self.best_score = on_first(_score, folder / 'best.pth')
            # Torn ones that the run has passed over have higher numbers: they are left alone, and don't count.
            self.whole = [path for path in checkpoints.numbered(folder) if checkpoints.iteration(path) <= runner.iter]
            self._remove_old()  # as a killed run may not have come to

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        done = batch_idx + 1
        interval = self.interval_iters or self.interval * runner.train_loop.epoch_length
        stops = runner.train_loop.is_stopping or done == runner.max_iters
        self.is_due = self.is_due or stops or done % interval == 0
        if self.is_due and runner.train_loop.is_updated:
            path = Path(runner.work_dir, f'iter_{done}.pth')
            self._save(runner, path, done)
            self.whole.append(path)
            self._remove_old()
            self.is_due = False

    def after_train_epoch(self, runner) -> None:
        """Of a run that a hook has ended early."""
        path = Path(runner.work_dir, f'iter_{runner.iter}.pth')
        if path not in self.whole:
            self._save(runner, path, runner.iter)

    def after_val_epoch(self, runner, metrics=None) -> None:
        score = metrics[self.best]
        if score > self.best_score:
            self.best_score = score
            self._save(runner, Path(runner.work_dir, 'best.pth'), runner.iter, score=score)

    @staticmethod
    def _save(runner, path: Path, done: int, **meta) -> None:
        meta.update(iter=done, epoch=done // runner.train_loop.epoch_length)
        runner.save_checkpoint(path.parent, path.name, meta=meta)

    @master_only
    def _remove_old(self) -> None:
        while len(self.whole) > self.keep:
            self.whole.pop(0).unlink(missing_ok=True)


def _score(best: Path) -> float:
    """What the best validation so far has reached; a torn file is no best one."""
    if not best.exists() or checkpoints.damage(best) is not None:
        return float('-inf')
    return checkpoints.load(best)['meta']['score']
