"""The checks: what each compares, in the order of a report."""

from collections.abc import Callable
from dataclasses import dataclass

from .findings import Finding
from .rehearsal import NotChecked, Rehearsal

__all__ = ['CHECKS', 'Check', 'check', 'error', 'names', 'number', 'ok', 'require', 'stated', 'warning']


@dataclass(frozen=True)
class Check:
    """One check: `look(rehearsal)` gives a Finding, or raises NotChecked.

    Attributes:
        needs: 'data' (loaders and model) or 'start' (what is built when training starts).
        of: 'all' tasks, or those of 'labels' alone, whose batches are images (B, C, H, W) and labels.
    """

    name: str
    look: Callable[[Rehearsal], Finding]
    depth: str
    needs: str
    of: str


CHECKS: dict[str, Check] = {}


def check(depth: str = 'quick', needs: str = 'start', of: str = 'all'):
    """Makes a function a check of its name, done in preflights of that depth and in deeper ones."""

    def add(function):
        CHECKS[function.__name__] = Check(function.__name__, function, depth, needs, of)
        return function

    return add


def ok(found: str, expected: str = '') -> Finding:
    return Finding('', 'ok', expected, found)


def warning(found: str, expected: str, cause: str) -> Finding:
    return Finding('', 'warning', expected, found, cause)


def error(found: str, expected: str, cause: str) -> Finding:
    return Finding('', 'error', expected, found, cause)


def require(condition, reason: str) -> None:
    """NotChecked if the condition is false."""
    if not condition:
        raise NotChecked(reason)


def stated(run: Rehearsal, key: str, otherwise=None, source: str = 'config') -> tuple[object, str]:
    """What the recipe says of a key, or else `otherwise`, and who says so."""
    if key in run.recipe:
        return run.recipe[key], 'recipe'
    return otherwise, source


def names(items, most: int = 3) -> str:
    """The first of some names."""
    items = list(items)
    more = f' and {len(items) - most} more' if len(items) > most else ''
    return ', '.join(map(str, items[:most])) + more


def number(value) -> str:
    """A number in four digits; anything else as it is."""
    return f'{value:.4g}' if isinstance(value, float) else str(value)
