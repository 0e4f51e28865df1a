"""Which keyword arguments a class or function takes, those that it passes on by **kwargs included."""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ['Arguments', 'arguments_of']

READERS = {'pop', 'get', 'setdefault'}  # methods of kwargs whose first argument is a name that is taken
DEPTH = 8  # of functions that pass their kwargs on


@dataclass(frozen=True)
class Arguments:
    """Keyword arguments of a callable.

    Attributes:
        names: those known, in the order of the signature.
        required: those without a default.
        is_open: whether there may be others: it takes **kwargs, and where they go can't be told.
    """

    names: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    is_open: bool = False


OPEN = Arguments(is_open=True)


def arguments_of(target: Callable) -> Arguments:
    """The arguments that one can give by name. Nothing is called; **kwargs are followed in the source code."""
    if isinstance(target, type):
        return _of_class(target, target.__mro__, DEPTH)
    return _of_function(target, (), DEPTH)


def _of_class(cls: type, mro: tuple[type, ...], depth: int) -> Arguments:
    for position, owner in enumerate(mro):
        if '__init__' in vars(owner):
            if owner is object:
                return Arguments()
            return _of_function(vars(owner)['__init__'], (cls, mro[position + 1 :]), depth, bound=True)
    return OPEN


def _of_function(function: Callable, above: tuple, depth: int, bound: bool = False) -> Arguments:
    try:
        parameters = list(inspect.signature(function).parameters.values())[bound:]
    except (TypeError, ValueError):  # of a builtin
        return OPEN
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    required = frozenset(p.name for p in named if p.default is p.empty)
    catch_all = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if catch_all is None:
        return Arguments(tuple(names), required)
    passed_on = _passed_on(inspect.unwrap(function), catch_all, above, depth)
    more = [name for name in passed_on.names if name not in names]
    return Arguments((*names, *more), required | (passed_on.required - set(names)), passed_on.is_open)


def _passed_on(function: Callable, catch_all: str, above: tuple, depth: int) -> Arguments:
    """What becomes of **catch_all in a function's body."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return OPEN
    read, calls = [], []
    for node in ast.walk(tree):
        match node:
            case ast.Call(keywords=words) if any(w.arg is None and _is_name(w.value, catch_all) for w in words):
                calls.append(node)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method), args=[ast.Constant(value=key), *_]):
                read += [key] if name == catch_all and method in READERS else []
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=key)) if name == catch_all:
                read.append(key)
            case ast.Assign(value=ast.Name(id=name)) | ast.Return(value=ast.Name(id=name)) if name == catch_all:
                return OPEN
            case ast.Dict(keys=keys, values=values):
                spread = [value for key, value in zip(keys, values, strict=True) if key is None]
                if any(_is_name(value, catch_all) for value in spread):
                    return OPEN
    if not calls or depth == 0:
        return OPEN
    names, required = dict.fromkeys(read), set()
    for call in calls:
        target = _arguments_of_called(call, function, above, depth - 1)
        if target is None or target.is_open:
            return OPEN
        positional = list(itertools.takewhile(lambda argument: not isinstance(argument, ast.Starred), call.args))
        given = {word.arg for word in call.keywords if word.arg} | set(target.names[: len(positional)])
        names.update(dict.fromkeys(name for name in target.names if name not in given))
        required |= target.required - given - set(read)
    return Arguments(tuple(names), frozenset(required))


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _arguments_of_called(call: ast.Call, function: Callable, above: tuple, depth: int) -> Arguments | None:
    if above and ast.unparse(call.func) == 'super().__init__':
        return _of_class(*above, depth)
    *parents, last = ast.unparse(call.func).split('.')
    found = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    for name in (*parents, last):
        found = found.get(name) if isinstance(found, dict) else getattr(found, name, None)
    if isinstance(found, type):
        return _of_class(found, found.__mro__, depth)
    return _of_function(found, (), depth) if inspect.isfunction(found) else None
