"""What a run shows of itself: its losses and measures, its speed, the progress line, TensorBoard.

`Curve` and `Speed` write the files. A hook that wants to follow a run has `after_record(runner, record)`, called with
each line of curve.jsonl, or `after_speed(runner, record)`, with each line of speed.jsonl, on the main process.
"""

import json
import math
import os
import time
from pathlib import Path

import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process, master_only
from mmengine.hooks import Hook, RuntimeInfoHook
from mmengine.model import is_model_wrapper
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from torch.distributed.tensor import DTensor

from . import checkpoints, pictures
from .environment import environment, peak_memory, started_by
from .registry import HOOKS

__all__ = ['Curve', 'ProgressBar', 'RuntimeInfo', 'Speed', 'TensorBoard', 'duration', 'read_curve']


@HOOKS.register_module()
class RuntimeInfo(RuntimeInfoHook):
    """mmengine's, without its history of every iteration's loss and learning rate.

    That fetches each from the GPU, which then waits, and copies the whole history each time: 9.5 ms an iteration after
    the 375,000 of 300 epochs of ImageNet, measured on an AMD EPYC. `Curve` has them.
    """

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        runner.message_hub.update_info('iter', runner.iter)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Nothing."""


@HOOKS.register_module()
class Curve(Hook):
    """Record the run in curve.jsonl and draw it as curve.png at the end.

    A line is {iter, epoch, loss, ..., lr}, means over the iterations since the last such line and over the processes,
    or {iter, epoch, top1, ...} of a validation; epochs are fractions. With the loss goes what else the model returns,
    and the gradients' norm if the optimizer wrapper has it as `grad_norm`; lr is the greatest of the groups'.

    The file depends on the run alone: a resumed run drops the lines past its checkpoint, which holds what was not yet
    in a line, and ends with the same lines as one without interruption.

    Args:
        interval: iterations from one line to the next. Losses stay on their device until then.
    """

    def __init__(self, interval: int = 10):
        if interval < 1:
            raise ValueError(f'interval must be at least 1, got {interval}.')
        self.interval = interval
        self.on_device: list[tuple[tuple[str, ...], torch.Tensor]] = []  # names and values, one pair an iteration
        self.pending: dict[str, list[float]] = {}
        self.norm = None

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        self.pending = {name: list(values) for name, values in checkpoint.get('curve', {}).items()}

    def before_train(self, runner) -> None:
        if not runner.iter:
            self.pending = {}  # of a checkpoint that gave only its weights
        if is_main_process():
            self.path = Path(runner.work_dir, 'curve.jsonl')
            records = read_curve(self.path) if runner.iter and self.path.exists() else []
            # Of the checkpoint's own iteration, the validation is repeated.
            kept = [record for record in records if record['iter'] < runner.iter + ('loss' in record)]
            text = ''.join(json.dumps(record) + '\n' for record in kept)
            checkpoints.write_atomically(self.path, lambda temporary: temporary.write_text(text))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        values = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        norm = getattr(runner.optim_wrapper, 'grad_norm', None)
        if norm is not self.norm:  # of a step that was made in this iteration
            self.norm = norm
            values['grad_norm'] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        vector = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        if get_world_size() > 1:
            all_reduce(vector, 'mean')
        done = batch_idx + 1
        if is_main_process():
            self.on_device.append((tuple(values), vector))
            if done % self.interval == 0 or done == runner.max_iters:
                self._fetch()
                means = {name: sum(each) / len(each) for name, each in self.pending.items()}
                self.pending = {}
                lr = max(group['lr'] for group in runner.optim_wrapper.param_groups)
                self._append(runner, done, **means, lr=lr)

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        if is_main_process():
            self._fetch()
            checkpoint['curve'] = {name: list(values) for name, values in self.pending.items()}
            with self.path.open('ab') as file:
                os.fsync(file.fileno())  # the file is not to lag behind the checkpoint if the machine stops

    @master_only
    def after_val_epoch(self, runner, metrics=None) -> None:
        measured = {name: value for name, value in metrics.items() if not math.isnan(value)}  # which is not JSON
        self._append(runner, runner.iter, **measured)

    @master_only
    def after_train(self, runner) -> None:
        pictures.training_curve(read_curve(self.path), Path(runner.work_dir, 'curve.png'))

    def _fetch(self) -> None:
        """Bring the values from the device, all at once."""
        if self.on_device:
            values = iter(torch.cat([vector for _, vector in self.on_device]).tolist())
            for names, _ in self.on_device:
                for name in names:
                    self.pending.setdefault(name, []).append(next(values))
            self.on_device = []

    def _append(self, runner, iteration: int, **values) -> None:
        record = {'iter': iteration, 'epoch': iteration / runner.train_loop.epoch_length, **values}
        _append_line(self.path, record)
        runner.call_hook('after_record', record=record)


def read_curve(path: Path | str) -> list[dict]:
    """The records of a curve.jsonl or speed.jsonl, without a last line that a killed run may have left unfinished."""
    lines = Path(path).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith('\n')]


def _append_line(path: Path, record: dict) -> None:
    with path.open('a') as file:
        file.write(json.dumps(record) + '\n')


@HOOKS.register_module()
class Speed(Hook):
    """Record in speed.jsonl what depends on the machine and the hour, all starts of a run one after the other.

    Each line has `event`, `iter` and `time` (seconds since 1970), and by its event

    - start: what starts here: command, processes, nodes, batch (images an iteration on all processes), parameters,
      epoch_length, max_iters, seed, config (the file that mmengine wrote) and the environment;
    - train, with each line of losses: images, the `seconds` that training on them took, the part of these that the loop
      waited for data, images_per_second of all processes, peak_memory in bytes of the first;
    - validation, checkpoint: `seconds`;
    - end: the run has reached its last iteration.

    Times are those that the loop sees: where a GPU lags behind, its work is in the iteration that waits for it. As that
    happens at each line of losses, sums and means are right.
    """

    priority = 'LOWEST'  # hooks that write files come before

    @master_only
    def before_train(self, runner) -> None:
        self.path = Path(runner.work_dir, 'speed.jsonl')
        _complete_last_line(self.path)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        parameters = list(model.parameters())
        self.device = parameters[0].device
        self.batch = runner.train_dataloader.batch_size * get_world_size()
        self._write(
            runner,
            'start',
            runner.iter,
            command=started_by(),
            config=Path(runner.cfg.filename).name if runner.cfg.filename else f'{runner.timestamp}.py',
            processes=get_world_size(),
            nodes=get_world_size() // int(os.environ.get('LOCAL_WORLD_SIZE', get_world_size())),
            batch=self.batch,
            parameters=sum(each.numel() for each in parameters),
            trainable=sum(each.numel() for each in parameters if each.requires_grad),
            epoch_length=runner.train_loop.epoch_length,
            max_iters=runner.max_iters,
            seed=runner.seed,
            environment=environment(),
        )
        self.interval_start = self.iteration_end = time.perf_counter()
        self.first = runner.iter
        self.waited = self.paused = 0.0
        self.save_start = None

    @master_only
    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.waited += time.perf_counter() - self.iteration_end

    @master_only
    def after_record(self, runner, record) -> None:
        if 'loss' not in record:
            return
        now = time.perf_counter()
        seconds = now - self.interval_start - self.paused
        images = (record['iter'] - self.first) * self.batch
        self._write(
            runner,
            'train',
            record['iter'],
            images=images,
            seconds=round(seconds, 6),
            data_seconds=round(self.waited, 6),
            images_per_second=round(images / seconds, 3),
            peak_memory=peak_memory(self.device),
        )
        self.interval_start, self.first, self.waited, self.paused = now, record['iter'], 0.0, 0.0

    @master_only
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self._end_saving(runner, batch_idx + 1)
        self.iteration_end = time.perf_counter()

    @master_only
    def before_save_checkpoint(self, runner, checkpoint) -> None:
        if self.save_start is None:
            self.save_start = time.perf_counter()

    @master_only
    def before_val(self, runner) -> None:
        self.validation_start = time.perf_counter()

    @master_only
    def after_val_epoch(self, runner, metrics=None) -> None:
        seconds = time.perf_counter() - self.validation_start
        if self.save_start is not None:  # the best so far has been saved
            seconds -= time.perf_counter() - self.save_start
        self._write(runner, 'validation', runner.iter, seconds=round(seconds, 6))
        self.paused += seconds
        self._end_saving(runner, runner.iter)
        self.iteration_end = time.perf_counter()

    @master_only
    def after_train(self, runner) -> None:
        self._write(runner, 'end', runner.iter)

    def _end_saving(self, runner, iteration: int) -> None:
        if self.save_start is not None:
            seconds = time.perf_counter() - self.save_start
            self._write(runner, 'checkpoint', iteration, seconds=round(seconds, 6))
            self.paused += seconds
            self.save_start = None

    def _write(self, runner, event: str, iteration: int, **values) -> None:
        record = {'event': event, 'iter': iteration, 'time': round(time.time(), 3), **values}
        _append_line(self.path, record)
        runner.call_hook('after_speed', record=record)


def _complete_last_line(path: Path) -> None:
    """Drop a last line that a kill left unfinished, so that the next one is a line of its own."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b'\n'):
        with path.open('r+b') as file:
            file.truncate(text.rfind(b'\n') + 1)


@HOOKS.register_module()
class ProgressBar(Hook):
    """Show how far the run is, its loss, learning rate, speed, memory and time left, and a line for each validation.

    In a terminal a bar; in a file or a scheduler's log whole lines every so often. Figures are those of the last lines
    of `Curve` and `Speed`: nothing is fetched from a GPU for the bar.

    Args:
        seconds: from one line to the next, where the output is not a terminal.
        console: rich's console to show it on; standard output if None.
    """

    REFRESH = 0.5  # seconds; by the loop itself: a thread would contend with it, and be copied into forked workers

    def __init__(self, seconds: float = 60, console: Console | None = None):
        self.seconds = seconds
        self.console = console
        self.bar = None

    @master_only
    def before_train(self, runner) -> None:
        self.console = self.console or Console()
        self.first = self.first_time = None  # the iteration and time that the time left is reckoned from
        self.record, self.speed = {}, {}
        self.next_time = 0.0
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn('{task.description}'),
                BarColumn(10),
                MofNCompleteColumn(),
                TextColumn('{task.fields[state]}', table_column=Column(ratio=1, no_wrap=True)),
                console=self.console,
                auto_refresh=False,
                expand=True,
            )
            self.task = self.bar.add_task('training', total=runner.max_iters, completed=runner.iter, state='')
            self.bar.start()

    @master_only
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.first_time = batch_idx + 1, now
        if now < self.next_time:
            return
        if self.bar is not None:
            self.next_time = now + self.REFRESH
            self._refresh(completed=batch_idx + 1, state=self._state(runner, batch_idx + 1, now))
        elif self.record:
            self.next_time = now + self.seconds
            state = self._state(runner, batch_idx + 1, now)
            self._print(f'iteration {batch_idx + 1}/{runner.max_iters}  {state}')

    @master_only
    def after_record(self, runner, record) -> None:
        if 'loss' in record:
            self.record = record
        else:
            measures = '  '.join(
                f'{name} {value:.2f}' for name, value in record.items() if name not in ('iter', 'epoch')
            )
            self._print(f'epoch {runner.epoch}/{runner.max_epochs}  {measures}')

    @master_only
    def after_speed(self, runner, record) -> None:
        if record['event'] == 'train':
            self.speed = record

    @master_only
    def before_val(self, runner) -> None:
        self._refresh(description='validating')

    @master_only
    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        now = time.monotonic()
        if self.bar is not None and now >= self.next_time:
            self.next_time = now + self.REFRESH
            self._refresh(description=f'validating {batch_idx + 1}/{len(runner.val_dataloader)}')

    @master_only
    def after_val(self, runner) -> None:
        self._refresh(description='training')

    @master_only
    def after_train(self, runner) -> None:
        self._refresh(completed=runner.iter)
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.bar is not None:
            self.bar.stop()

    def _refresh(self, **fields) -> None:
        if self.bar is not None:
            self.bar.update(self.task, **fields)
            self.bar.refresh()

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def _state(self, runner, done: int, now: float) -> str:
        # What matters most comes first: a narrow terminal cuts the rest off.
        parts = [f'epoch {done / runner.train_loop.epoch_length:.2f}']
        if done > self.first:  # the first iteration compiles, fills caches and starts workers
            left = (now - self.first_time) / (done - self.first) * (runner.max_iters - done)
            parts.append(f'{duration(left)} left')
        if self.record:
            parts.append(f'loss {self.record["loss"]:.4f}')
        if self.speed:
            parts.append(f'{self.speed["images_per_second"]:,.0f} images/s')
            waiting = self.speed['data_seconds'] / self.speed['seconds']
            if waiting >= 0.1:
                parts.append(f'waiting for data {waiting:.0%}')
        if self.record:
            parts.append(f'lr {self.record["lr"]:.2e}')
        if self.speed and self.speed['peak_memory'] is not None:
            parts.append(f'{self.speed["peak_memory"] / 2**30:.1f} GiB')
        return '  '.join(parts)


def duration(seconds: float) -> str:
    """Such as '1 d 02:03:04', or '03:04' below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f'{hour:02d}:{minute:02d}:{second:02d}' if hours else f'{minute:02d}:{second:02d}'
    return f'{days} d {clock}' if days else clock


@HOOKS.register_module()
class TensorBoard(Hook):
    """Write the lines of `Curve` and `Speed` for TensorBoard too, as train/<name>, val/<name> and speed/<name>.

    A resumed run hides what an earlier start wrote past its checkpoint.

    Args:
        folder: of the event files; relative paths are in the run's folder.

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    SPEEDS = ('images_per_second', 'data_seconds', 'peak_memory')

    def __init__(self, folder: Path | str = 'tensorboard'):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "The TensorBoard hook needs a package: pip install 'attention-zoo[tensorboard]'."
            ) from error
        self.folder = folder
        self.create_writer = SummaryWriter
        self.writer = None

    @master_only
    def before_train(self, runner) -> None:
        path = Path(runner.work_dir, self.folder)
        self.writer = self.create_writer(path, purge_step=runner.iter + 1 if runner.iter else None)

    @master_only
    def after_record(self, runner, record) -> None:
        self._add('train' if 'loss' in record else 'val', record)

    @master_only
    def after_speed(self, runner, record) -> None:
        if record['event'] == 'train':
            self._add('speed', {name: record[name] for name in ('iter', *self.SPEEDS)})

    @master_only
    def before_save_checkpoint(self, runner, checkpoint) -> None:
        self.writer.flush()

    @master_only
    def after_train(self, runner) -> None:
        self.writer.close()

    def _add(self, group: str, record: dict) -> None:
        for name, value in record.items():
            if name not in ('iter', 'epoch') and value is not None:
                self.writer.add_scalar(f'{group}/{name}', value, record['iter'])
