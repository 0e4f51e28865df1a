"""Stopping when the machine is wanted back: SIGTERM and SIGUSR1 ask for a checkpoint and an exit of a known status."""

import os
import signal
import threading

import torch
from mmengine.dist import get_world_size
from torch import distributed

__all__ = ['PREEMPTED', 'Preempted', 'StopSignals']

PREEMPTED = 75  # the exit status: EX_TEMPFAIL of sysexits.h, "try again later"
WORKER_GRACE = 60  # seconds that a loader's worker outlives the first SIGTERM, so that the last batches still come


class Preempted(SystemExit):
    """A run that a signal has stopped, with its checkpoint written. Uncaught, the process exits with PREEMPTED."""

    def __init__(self, message: str):
        super().__init__(PREEMPTED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """While it is entered, SIGTERM and SIGUSR1 don't kill but are noted, and `agreed` says when all processes stop.

    Only Python's main thread can take signals; entered in another one, it leaves them as they are. Processes forked
    meanwhile, a loader's workers, ignore SIGUSR1 and, for WORKER_GRACE seconds, SIGTERM: torchrun and SLURM may send
    both to a whole process group.
    """

    def __init__(self):
        self.received: int | None = None
        self.process = os.getpid()
        self.previous = {}
        self.group = None
        self.vote = None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for name in ('SIGTERM', 'SIGUSR1'):
                number = getattr(signal, name, None)  # Windows has no SIGUSR1
                if number is not None:
                    self.previous[number] = signal.signal(number, self._note)
        if get_world_size() > 1:
            # Votes go by the CPU, in a group of their own, in no order with the gradients.
            self.group = distributed.new_group(backend='gloo')
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.vote is not None and kind is None:
            self.vote[0].wait()

    def agreed(self) -> bool:
        """Whether all processes stop now; every process asks once an iteration.

        With several, a process learns what they all knew at its last question, so that nothing waits for an answer.
        """
        if self.group is None:
            return self.received is not None
        stop = False
        if self.vote is not None:
            work, flag = self.vote
            work.wait()
            stop = bool(flag.item())
        flag = torch.tensor([int(self.received is not None)])
        work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.group, async_op=True)
        self.vote = work, flag
        return stop

    def _note(self, number: int, frame) -> None:
        if os.getpid() == self.process:
            self.received = number
        elif number == signal.SIGTERM:
            # The second SIGTERM is of a parent that ends its workers, and so is the alarm's end.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.alarm(WORKER_GRACE)
