"""Training on mmengine: configs, registries and runner are its own; what it gets wrong is put right in these files."""

import contextlib
import os
import tempfile
from pathlib import Path

from filelock import FileLock


def _import_yapf() -> None:
    """Import what mmengine imports and cannot import at once: yapf writes a cache without a lock at its first import.

    Of the ranks of a machine, or the workers of a test run, one reads half a file then, and dies of an EOFError.
    """
    user = getattr(os, 'getuid', int)()  # Windows has none, and no folder that users share
    lock = FileLock(Path(tempfile.gettempdir(), f'zoo-{user}-yapf.lock'))
    with lock, contextlib.suppress(ImportError):  # of an mmengine without it
        import yapf  # noqa: F401


_import_yapf()
