"""What a run shows of itself: the record of its losses and measures, and the progress bar."""

import json
from pathlib import Path

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import pictures
from .registry import HOOKS

__all__ = ['Curve', 'ProgressBar', 'read_curve']


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
