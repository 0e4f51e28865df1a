"""Configs by path or by name."""

import ast
import copy
import difflib
import inspect
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import mmengine.runner
from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

__all__ = ['READ', 'ConfigError', 'config_names', 'find_config', 'load_config', 'near']

REQUIRED = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
# Keys that something reads: arguments of mmengine's runner, what it and its config read beside them, and ours.
READ = frozenset(
    {
        *(set(inspect.signature(mmengine.runner.Runner).parameters) - {'cfg'}),
        *('compile', 'custom_imports', 'env', 'find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'sync_bn'),
        *('activation_checkpointing', 'efficient_conv_bn_eval'),
        *('preflight', 'recipe', 'scale_lr', 'strategy', 'total_batch'),
    }
)


class ConfigError(ValueError):
    """What is wrong with a config: all of it.

    Attributes:
        problems: a line each, which begins with the key.
        of: the config's file or name, '' if it has none.
    """

    def __init__(self, problems: Iterable[str], of: str = ''):
        self.problems = tuple(problems)
        self.of = str(of)
        super().__init__(self.problems, self.of)

    def __str__(self) -> str:
        of = f'{self.of}: ' if self.of else ''
        if len(self.problems) == 1:
            return of + self.problems[0]
        return f'{of}{len(self.problems)} problems.' + ''.join(f'\n  {problem}' for problem in self.problems)


def near(name: str, names: Iterable[str], count: int = 3, cutoff: float = 0.6) -> list[str]:
    """Those of `names` that are most like `name`, whatever their case."""
    by_lower = {other.lower(): other for other in names}
    found = difflib.get_close_matches(str(name).lower(), by_lower, n=count, cutoff=cutoff)
    return [by_lower[other] for other in found]


def _shipped() -> Path:
    return Path(str(resources.files('zoo.configs')))


def config_names() -> list[str]:
    """Names of the configs that come with the zoo, such as 'quickstart/biformer_digits'; of parts (`_name`), none."""
    names = (path.relative_to(_shipped()).with_suffix('').as_posix() for path in _shipped().rglob('*.py'))
    return sorted(name for name in names if '/' in name and not any(part.startswith('_') for part in name.split('/')))


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
    close = difflib.get_close_matches(name, config_names(), n=5, cutoff=0.4) or config_names()
    raise FileNotFoundError(f'There is no config {str(config)!r}, as a file or by name. Names: {", ".join(close)}.')


def load_config(config: Path | str, options: dict | None = None) -> Config:
    """Read a config, with `options` ({'train_cfg.max_epochs': 3, ...}) in place of its own values.

    A key is dotted, with the positions of lists: 'custom_hooks.0.decay'. An option that is text, as from a command
    line, is taken as the Python value that it spells ('true', 'false' and 'None' too), if it spells one. A dict changes
    what it names in the dict that is there, unless it has `_delete_`: True, and takes its place.
    The config's `work_dir`, unless given, is work_dirs/<name>.

    Raises:
        FileNotFoundError: no such config.
        ConfigError: it can't be read, an option can't be set or nothing would read it, or a part that training needs
            is missing.
    """
    path = find_config(config)
    try:
        loaded = Config.fromfile(path)
    except OSError:
        raise  # of a base that isn't there
    except Exception as error:  # anything, as a config is a program
        raise ConfigError([f'can not be read: {type(error).__name__}: {error}'], path) from error
    problems = [problem for key, option in (options or {}).items() if (problem := _set(loaded, key, option))]
    if 'custom_imports' in (options or {}):
        try:
            import_modules_from_strings(**loaded.custom_imports)
        except Exception as error:
            problems.append(f'The option custom_imports: {type(error).__name__}: {error}')
    missing = [key for key in REQUIRED if key not in loaded]
    if missing:
        problems.append(f'has no {", ".join(missing)}.')
    if problems:
        raise ConfigError(problems, path)
    if loaded.get('work_dir') is None:
        shipped = path.resolve().is_relative_to(_shipped().resolve())
        name = path.resolve().relative_to(_shipped().resolve()).with_suffix('') if shipped else path.stem
        loaded.work_dir = str(Path('work_dirs', name))
    return loaded


def _set(cfg: Config, key: str, option) -> str | None:
    """Put an option into a config, or say why not."""
    if not isinstance(key, str) or not all(re.fullmatch(r'\w+', part) for part in key.split('.')):
        return f'The option {key!r} is no key: expected names and positions with dots between, as train_cfg.max_epochs.'
    *parents, last = key.split('.')
    if key.partition('.')[0] not in READ:
        return _unread(cfg, key)
    try:
        value = _value(option)
    except (SyntaxError, ValueError) as error:
        return f'The option {key}={option} is no Python value: {error}.'
    node, walked = cfg._cfg_dict, ''
    for part in parents:
        problem = _missing(node, part, walked)
        if problem:
            return f'The option {key}: {problem}'
        place = int(part) if isinstance(node, list | tuple) else part
        if isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        elif isinstance(node[place], tuple):
            node[place] = list(node[place])
        node, walked = node[place], f'{walked}.{part}'.lstrip('.')
    problem = _missing(node, last, walked)
    if problem:
        return f'The option {key}: {problem}'
    place = int(last) if isinstance(node, list) else last
    if isinstance(node, dict) and not isinstance(node.get(place), dict):
        node.pop(place, None)  # which a dict could not be merged with
    if isinstance(value, dict) and isinstance(node, dict):
        node.merge({place: value})
    elif isinstance(value, dict) and isinstance(node[place], dict):
        node[place].merge(value)
    else:
        node[place] = value
    return None


def _missing(node, part: str, walked: str) -> str | None:
    if isinstance(node, dict):
        return None
    if not isinstance(node, list | tuple):
        return f'{walked} is {node!r}, which has nothing named {part!r}.'
    if part.isdigit() and int(part) < len(node):
        return None
    return f'{walked} is a list of {len(node)}: expected a position from 0 to {len(node) - 1}, got {part!r}.'


def _unread(cfg: Config, key: str) -> str:
    name = key.partition('.')[0]
    if name in cfg:
        return (
            f'The option {key}: {name} is a variable of the config file, and has been used where the file uses it. '
            'Set the keys that have its value.'
        )
    close = near(name, READ)
    return f'The option {key}: nothing reads {name!r}.' + (f' Did you mean {" or ".join(close)}?' if close else '')


def _value(option):
    """The Python value that text spells, or the text; a copy of what isn't text."""
    if not isinstance(option, str):
        return copy.deepcopy(option)
    if option.lower() in ('true', 'false'):
        return option.lower() == 'true'
    try:
        return ast.literal_eval(option)
    except (SyntaxError, ValueError):
        if option.lstrip()[:1] in ('[', '(', '{', '"', "'"):
            raise
        return option
