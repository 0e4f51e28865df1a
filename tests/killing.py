"""Runs in processes of their own, and a hook that kills them at chosen moments."""

import io
import itertools
import multiprocessing
import os
import resource
import signal
import socket
from pathlib import Path

import torch
from mmengine.hooks import Hook

from zoo.train import records
from zoo.train.distributed import restarts
from zoo.train.registry import HOOKS
from zoo.train.tasks import ImageClassifier

CONFIG = 'quickstart/biformer_digits'
DEADLINE = 240  # seconds for a run of a second or two

CONTEXT = multiprocessing.get_context('forkserver')  # imports once, and forks from a process without threads
CONTEXT.set_forkserver_preload(['zoo.train.run', 'zoo.train.tasks'])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half_of_it(write, sink, *rest) -> None:
    """What a write leaves that is killed half-way."""
    whole = io.BytesIO()
    write(*rest, whole)
    sink.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    sink.flush()
    die()


def _half_a_line(path: Path, record: dict) -> None:
    with path.open('a') as file:
        file.write(str(record)[:10])
    die()


# Moment -> (owner, function's name, what is done in the place of the call; None: nothing, and 'after': the call first)
MOMENTS = {
    'forward': (ImageClassifier, 'loss', None),
    'step': (torch.optim.AdamW, 'step', None),
    'after step': (torch.optim.AdamW, 'step', 'after'),
    'validation': (ImageClassifier, 'predict', None),
    'record': (records, '_append_line', _half_a_line),
    'write': (torch, 'save', lambda checkpoint, file: _half_of_it(torch_save, file, checkpoint)),
    'rename': (os, 'replace', None),
    'after rename': (os, 'replace', 'after'),
    'removal': (Path, 'unlink', None),
}
torch_save = torch.save


@HOOKS.register_module()
class Killer(Hook):
    """Kill this process, if it is the one of `rank`, at the call of that number of a moment's function.

    With another `signal` than SIGKILL, send it and go on. After a restart by torchrun it does nothing.
    """

    priority = 'VERY_LOW'

    def __init__(self, moment: str, number: int, rank: int = 0, signal: str = 'SIGKILL'):
        self.signal = signal
        self.moment = moment
        self.number = number
        self.rank = rank

    def before_train(self, runner) -> None:
        if runner.rank != self.rank or restarts():
            return
        owner, name, instead = MOMENTS[self.moment]
        original = getattr(owner, name)
        calls = itertools.count(1)

        def counted(*args, **kwargs):
            if next(calls) != self.number:
                return original(*args, **kwargs)
            if self.signal != 'SIGKILL':
                os.kill(os.getpid(), getattr(signal, self.signal))
                return original(*args, **kwargs)
            if callable(instead):
                instead(*args)
            if instead == 'after':
                original(*args, **kwargs)
            return die()

        setattr(owner, name, counted)


@HOOKS.register_module()
class FullDisk(Hook):
    """From an iteration on, let this process write no file of more than `size` bytes."""

    def __init__(self, iteration: int, size: int = 20_000):
        self.iteration = iteration
        self.size = size

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if batch_idx == self.iteration:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@HOOKS.register_module()
class Failure(Hook):
    """An error of one process before the iteration of that number."""

    def __init__(self, iteration: int, rank: int):
        self.iteration = iteration
        self.rank = rank

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if batch_idx == self.iteration and runner.rank == self.rank:
            raise ArithmeticError('a planted failure')


def _work(function, rank, port, world, arguments) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR='localhost',
            MASTER_PORT=str(port),
        )
    function(*arguments)


def launch(function, *arguments, world: int = 1) -> list[int]:
    """Call a function in `world` processes and give their exit codes."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=_work, args=(function, rank, port, world, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes]


def run(folder, options: dict, resume: bool = False) -> None:
    """Train in this process."""
    from zoo.train.run import train

    try:
        train(CONFIG, folder, resume, options, preflight=False)
    except Exception as error:
        rank = os.environ.get('RANK', 0)
        folder.with_name(f'error{rank}.txt').write_text(f'{type(error).__name__}: {error}')
        raise


def same(a, b) -> bool:
    """Whether nested values agree in every bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
