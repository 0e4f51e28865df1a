"""Side-by-side measurement: interleaved rounds, peak memory, and the record of the machine.

Thread CPU time counts what the calling thread computes, whoever else uses the machine meanwhile; wall time does not
hold on a shared machine. It is only the whole cost with one thread, which `interleaved` therefore sets. A backward
pass on the CPU runs in the calling thread too.
"""

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch


def interleaved(
    cases: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 2, device: str = 'cpu'
) -> dict[str, float]:
    """Median seconds per call of each case, over `rounds` rounds that run every case in turn, each in another order.

    Else a case would always find the memory that the same other one has left, and its pages mapped or not.

    On the CPU thread CPU time with one thread; on a GPU the time between two events, with the cache emptied before.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == 'cpu' else threads)  # another number would have all compiled again
    seconds = _seconds_on_gpu if device == 'cuda' else _seconds_of_thread
    try:
        for case in cases.values():
            for _ in range(warmup):
                case()
        times = {name: [] for name in cases}
        shuffled = random.Random(0)
        for _ in range(rounds):
            for name in shuffled.sample(list(cases), len(cases)):
                times[name].append(seconds(cases[name]))
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(samples) for name, samples in times.items()}


def _seconds_of_thread(case: Callable[[], object]) -> float:
    start = time.thread_time()
    case()
    return time.thread_time() - start


def _seconds_on_gpu(case: Callable[[], object]) -> float:
    cache = torch.empty(2**26, dtype=torch.int32, device='cuda')  # 256 MiB: more than any cache
    for _ in range(16):  # the GPU is busy while the call's first kernels are launched: launching is not timed
        cache.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    case()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def bounds() -> dict[str, float]:
    """What a GPU can do: bytes per second of a copy (read and write) and operations per second of bfloat16 products."""
    source = torch.empty(2**28, dtype=torch.float32, device='cuda')
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device='cuda') for _ in range(2))
    seconds = interleaved({'copy': lambda: target.copy_(source), 'product': lambda: a @ b}, device='cuda')
    return {'copy': 2 * source.nbytes / seconds['copy'], 'product': 2 * 8192**3 / seconds['product']}


def peak_memory(case: Callable[[], object], device: str = 'cpu') -> int:
    """Bytes by which memory rises at most while `case` runs once.

    On the CPU the resident memory of the process (Linux with glibc). Free heap is given back to the system before, so
    that what the process holds counts for nothing; figures below some 20 MB are noise. On a GPU what torch allocates.
    """
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')  # resets VmHWM
        before = _status_kib('VmRSS')
        case()
        return max(0, (_status_kib('VmHWM') - before) * 1024)
    finally:
        torch.set_num_threads(threads)


def _status_kib(key: str) -> int:
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ':'))


def machine() -> dict[str, object]:
    """What a figure depends on: processor, memory, accelerator, versions, date."""
    versions = {}
    for package in ('torch', 'triton', 'timm', 'natten', 'numpy'):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'processor': _processor(),
        'capability': torch.backends.cpu.get_cpu_capability(),
        'cores': os.cpu_count(),
        'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1),
        'accelerator': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'system': platform.platform(),
        'python': platform.python_version(),
        'versions': versions,
    }


def _processor() -> str:
    try:
        with open('/proc/cpuinfo') as file:
            return next(line.split(':', 1)[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
