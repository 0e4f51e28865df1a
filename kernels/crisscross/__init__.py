"""Criss-cross attention (CCNet, arXiv 1811.11721): each pixel attends to its row and its column."""

import math

from torch import Tensor

from .. import checks, flops
from ..dispatch import Operator, Problem, Verdict, chosen, possible
from . import reference, tiled

__all__ = ['crisscross_attention']

NAME = 'crisscross_attention'
OPERATOR = Operator(NAME)


def _judge_tiled(problem: Problem) -> Verdict:
    return chosen('it computes some rows or columns at a time, and keeps nothing of the size of the scores')


def _judge_reference(problem: Problem) -> Verdict:
    return possible('the definition, made of plain operations')


def _pairs(query: tuple) -> int:
    return math.prod(query[:4]) * (query[1] + query[2] - 1)


def _products(query: tuple, value: tuple) -> int:
    return _pairs(query) * (query[4] + value[4])


def _products_of_backward(query: tuple, value: tuple) -> int:
    """The scores again, and the gradients of weights, queries, keys and values."""
    return _pairs(query) * (3 * query[4] + 2 * value[4])


OPERATOR.register('tiled', tiled.crisscross_attention, _judge_tiled)
OPERATOR.register('reference', reference.crisscross_attention, _judge_reference)
flops.register(NAME, _products, _products_of_backward)


def crisscross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Softmax attention of each pixel of a map to the height + width - 1 pixels of its row and its column.

    Applied twice in turn, every pixel hears of every other: CCNet's recurrence.

    Args:
        query, key: (batch, height, width, heads, head_dim), of one floating dtype; any strides. In an autocast region
            they are cast to its dtype.
        value: the same, with a head_dim of its own maybe: CCNet's is eight times that of queries.
        scale: of the scores; None means head_dim ** -0.5. CCNet's is 1.
        implementation: name of the one to use; None leaves it to the dispatch (see `zoo.kernels.explain`).

    Returns:
        The shape of value and dtype of query, contiguous. Differentiable with regard to query, key and value.

    Raises:
        TypeError, ValueError: arguments of other kinds, shapes, dtypes or devices; an implementation that cannot run.
    """
    checks.same_kind(NAME, query=query, key=key, value=value)
    if query.ndim != 5:
        raise ValueError(
            f'{NAME}: query must be (batch, height, width, heads, head_dim), got shape {tuple(query.shape)}'
        )
    if key.shape != query.shape:
        raise ValueError(f'{NAME}: key must have the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}')
    if value.ndim != 5 or value.shape[:4] != query.shape[:4]:
        raise ValueError(
            f'{NAME}: value must be {(*query.shape[:4], "any head_dim")} as query is, got {tuple(value.shape)}'
        )
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key, value = checks.autocast(query, key, value)
    return OPERATOR.select(query, implementation)(query, key, value, scale)
