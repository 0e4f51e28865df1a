"""Side-by-side measurement: interleaved rounds in thread CPU time, peak memory, and the record of the machine.

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
import statistics
import time
from collections.abc import Callable

import torch


def interleaved(cases: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 2) -> dict[str, float]:
    """Median seconds of thread CPU time per call of each case, over `rounds` rounds that run every case in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in cases.values():
            for _ in range(warmup):
                case()
        times = {name: [] for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                start = time.thread_time()
                case()
                times[name].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(samples) for name, samples in times.items()}


def peak_memory(case: Callable[[], object]) -> int:
    """Bytes by which the resident memory of the process rises at most while it runs `case` once (Linux with glibc).

    Free heap is given back to the system before, so that what the process holds counts for nothing. Figures below some
    20 MB are noise.
    """
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
