"""What happens around iterations: seeding, checkpoints, the record of the run, the progress bar."""

import json
from pathlib import Path

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import checkpoints, pictures
from .registry import HOOKS
from .seeding import seed_everything

__all__ = ['Checkpoints', 'Curve', 'IterationSeed', 'ProgressBar', 'read_curve']


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


@HOOKS.register_module()
class Curve(Hook):
    """Record the run in curve.jsonl and draw it as curve.png at the end.

    A line is {iter, epoch, loss, lr}, the loss being the mean since the last such line, or {iter, epoch, top1, ...}
    of a validation; epochs are fractions. A resumed run drops the lines past its checkpoint.

    Args:
        interval: iterations from one line to the next.
    """

    def __init__(self, interval: int = 10):
        self.interval = interval
        self.losses = []

    @master_only
    def before_train(self, runner) -> None:
        self.path = Path(runner.work_dir, 'curve.jsonl')
        records = read_curve(self.path) if runner.iter and self.path.exists() else []
        # Of the checkpoint's own iteration, the validation is repeated.
        kept = [record for record in records if record['iter'] < runner.iter + ('loss' in record)]
        self.path.write_text(''.join(json.dumps(record) + '\n' for record in kept))

    @master_only
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.losses.append(outputs['loss'].item())
        if (batch_idx + 1) % self.interval == 0:
            lr = max(group['lr'] for group in runner.optim_wrapper.param_groups)
            self._append(runner, batch_idx + 1, loss=sum(self.losses) / len(self.losses), lr=lr)
            self.losses.clear()

    @master_only
    def after_val_epoch(self, runner, metrics=None) -> None:
        self._append(runner, runner.iter, **metrics)

    @master_only
    def after_train(self, runner) -> None:
        pictures.training_curve(read_curve(self.path), Path(runner.work_dir, 'curve.png'))

    def _append(self, runner, iteration: int, **values) -> None:
        record = {'iter': iteration, 'epoch': iteration / runner.train_loop.epoch_length, **values}
        with self.path.open('a') as file:
            file.write(json.dumps(record) + '\n')


def read_curve(path: Path | str) -> list[dict]:
    """The records of a curve.jsonl, without a last line that a killed run may have left unfinished."""
    lines = Path(path).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith('\n')]


@HOOKS.register_module()
class ProgressBar(Hook):
    """Show iterations, loss, learning rate and time left, and print a line for each validation."""

    def __init__(self):
        self.bar = None

    def before_train(self, runner) -> None:
        self.bar = Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('loss {task.fields[loss]:.4f}  lr {task.fields[lr]:.2e}'),
            TimeRemainingColumn(),
            disable=not is_main_process(),
        )
        self.task = self.bar.add_task(
            'training', total=runner.max_iters, completed=runner.iter, loss=float('nan'), lr=float('nan')
        )
        self.bar.start()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        lr = max(group['lr'] for group in runner.optim_wrapper.param_groups)
        self.bar.update(self.task, completed=batch_idx + 1, loss=outputs['loss'].item(), lr=lr)

    def before_val(self, runner) -> None:
        self.bar.update(self.task, description='validating')

    def after_val_epoch(self, runner, metrics=None) -> None:
        measures = '  '.join(f'{name} {value:.2f}' for name, value in metrics.items())
        if is_main_process():
            self.bar.console.print(f'epoch {runner.epoch}/{runner.max_epochs}  {measures}', highlight=False)
        self.bar.update(self.task, description='training')

    def after_train(self, runner) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.bar is not None:
            self.bar.stop()
