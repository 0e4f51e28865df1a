"""Configs by path or by name."""

import ast
import difflib
from importlib import resources
from pathlib import Path

from mmengine.config import Config

__all__ = ['config_names', 'find_config', 'load_config']

REQUIRED = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')


def _shipped() -> Path:
    return Path(str(resources.files('zoo.configs')))


def config_names() -> list[str]:
    """Names of the configs that come with the zoo, such as 'quickstart/biformer_digits'."""
    names = (path.relative_to(_shipped()).with_suffix('').as_posix() for path in _shipped().rglob('*.py'))
    return sorted(name for name in names if '/' in name and not name.startswith('_'))


def find_config(config: Path | str) -> Path:
    """The file of a config given by path, or by name among those that come with the zoo.

    Raises:
        FileNotFoundError: there is neither; says which names are near.
    """
    path = Path(config).expanduser()
    if path.is_file():
        return path
    name = str(config).removesuffix('.py')
    if name in config_names():
        return _shipped() / f'{name}.py'
    near = difflib.get_close_matches(name, config_names(), n=5, cutoff=0.4) or config_names()
    raise FileNotFoundError(f'There is no config {str(config)!r}, as a file or by name. Names: {", ".join(near)}.')


def load_config(config: Path | str, options: dict | None = None) -> Config:
    """Read a config, with `options` ({'train_cfg.max_epochs': 3, ...}) in place of its own values.

    An option that is text, as from a command line, is taken as the Python value that it spells, if it spells one.
    Its `work_dir`, unless given, is work_dirs/<name>.

    Raises:
        FileNotFoundError: no such config.
        ValueError: it lacks a part that training needs.
    """
    path = find_config(config)
    loaded = Config.fromfile(path)
    loaded.merge_from_dict({key: _value(option) for key, option in (options or {}).items()})
    missing = [key for key in REQUIRED if key not in loaded]
    if missing:
        raise ValueError(f'{path} has no {", ".join(missing)}.')
    if loaded.get('work_dir') is None:
        shipped = path.resolve().is_relative_to(_shipped().resolve())
        name = path.resolve().relative_to(_shipped().resolve()).with_suffix('') if shipped else path.stem
        loaded.work_dir = str(Path('work_dirs', name))
    return loaded


def _value(option):
    try:
        return ast.literal_eval(option) if isinstance(option, str) else option
    except (SyntaxError, ValueError):
        return option
