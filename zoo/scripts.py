"""Scripts, timm's own or yours, run unmodified with the zoo's models registered: `python -m zoo train.py ...`."""

import difflib
import multiprocessing
import runpy
import sys
from pathlib import Path

__all__ = ['find_script', 'run_script']


class _Registration:
    """Travels to the processes that a script starts. To unpickle it, they import this module, and with it the zoo."""


def find_script(script: str) -> Path:
    """The file of that name. FileNotFoundError if there is none, with those near it."""
    path = Path(script)
    if path.is_file():
        return path
    others = [other.name for other in path.parent.glob('*.py')] if path.parent.is_dir() else []
    near = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, others, n=3)]
    hint = f' Did you mean {", ".join(near)}?' if near else ''
    raise FileNotFoundError(f'There is no script {script!r} (in {Path.cwd()}).{hint}')


def run_script(path: Path, arguments: list[str]) -> None:
    """Run a Python file as `python FILE ARGUMENTS` does, in this process, with the zoo imported before it.

    It is `__main__`, its folder is the first of sys.path, and SystemExit, KeyboardInterrupt and other errors leave it
    as they are. Processes that it starts by multiprocessing (workers of a data loader, ranks) have the zoo too, by
    every start method; commands that it runs are on their own.
    """
    sys.argv = [str(path), *arguments]
    if not getattr(sys.flags, 'safe_path', False):  # since Python 3.11: -P, which puts no folder first
        sys.path[0] = str(path.resolve().parent)  # was that of `python -m zoo`: where it was typed
    # What processes inherit from the one that starts them, pickled unless they are forked: a fresh interpreter runs the
    # script as __mp_main__, without this module, and could not create our models.
    multiprocessing.current_process()._config['zoo'] = _Registration()
    runpy.run_path(str(path), run_name='__main__')
