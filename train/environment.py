"""What a run stood on: machine, accelerators, versions, code, and the command that started it."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import zoo

__all__ = ['environment', 'peak_memory', 'started_by']

# Prefixes of environment variables that change a run.
VARIABLES = ('CUDA_', 'MKL_', 'NCCL_', 'OMP_', 'PYTORCH_', 'SLURM_JOB_ID', 'SLURM_JOB_NODELIST', 'TORCH_')


def environment() -> dict:
    """Machine, accelerators, versions, commits and variables, as plain values; of this process and its machine."""
    roots = {'working directory': Path.cwd(), 'zoo': Path(zoo.__file__).resolve().parents[1]}
    roots = {root: name for name, root in roots.items()}  # one, where they are the same
    return {
        'host': platform.node(),
        'system': platform.platform(),
        'processor': _processor(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'threads': torch.get_num_threads(),
        'accelerators': _accelerators(),
        'cuda': torch.version.cuda if torch.cuda.is_available() else None,
        'cudnn': torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        'float32_matmul_precision': torch.get_float32_matmul_precision(),
        'python': platform.python_version(),
        'commits': {name: commit for root, name in roots.items() if (commit := _commit(root))},
        'variables': {key: value for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)},
        'packages': _packages(),
    }


def started_by() -> str:
    """The command line of this process, as one would type it."""
    return shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])


def peak_memory(device: torch.device | str) -> int | None:
    """The most bytes that this process has held so far: of a GPU what torch allocated, otherwise resident memory.

    None where the system doesn't say.
    """
    if torch.device(device).type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        with open('/proc/self/status') as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith('VmHWM:'))
    except (OSError, StopIteration):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def _processor() -> str:
    try:
        with open('/proc/cpuinfo') as file:
            return next(line.split(':', 1)[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [str(torch.accelerator.current_accelerator())] if torch.accelerator.is_available() else []


def _commit(folder: Path) -> str | None:
    """The commit of the git checkout whose root is the folder, with '-dirty' if files differ from it."""
    if not (folder / '.git').exists():
        return None
    command = ['git', '-C', str(folder), 'describe', '--always', '--abbrev=40', '--dirty', '--exclude=*']
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _packages() -> dict[str, str]:
    found = {}
    for each in importlib.metadata.distributions():  # in the order of sys.path: a later one of a name is not imported
        found.setdefault(each.metadata['Name'], each.version)
    return {name: found[name] for name in sorted(filter(None, found), key=str.lower)}
