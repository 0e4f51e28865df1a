"""Aggregated attention (TransNeXt, arXiv 2311.17132): each query attends to its window and to pooled tokens at once.

Beside it, the MLP that makes biases of relative positions.
"""

import math

import torch
from torch import Tensor

from .. import checks, flops
from ..dispatch import Operator, Problem, Verdict, chosen, possible
from . import fused, reference, tiled, triton

__all__ = ['aggregated_attention', 'position_bias']

NAME = 'aggregated_attention'
OPERATOR = Operator(NAME)
POSITION_BIAS = Operator('position_bias')


def _judge_fused(problem: Problem) -> Verdict:
    if problem.compiling and problem.device == 'cpu':
        return chosen('torch.compile fuses all but the softmax, which is computed in strips that stay in cache')
    return possible('made for torch.compile')


def _judge_tiled(problem: Problem) -> Verdict:
    return chosen('it never holds windows of keys, and keeps nothing for the backward')


def _judge_reference(problem: Problem) -> Verdict:
    return possible('the definition, in plain operations')


def _judge_chunks(problem: Problem) -> Verdict:
    return chosen('it never holds the hidden units of all positions, nor keeps any for the backward')


def _products(query: tuple, pooled_key: tuple, window_size: int) -> int:
    """With the learnable tokens, a third product over the window."""
    return math.prod(query) * (2 * pooled_key[1] + 3 * window_size**2)


def _products_of_pooled(scaled: tuple, pooled_key: tuple) -> int:
    return 2 * math.prod(scaled) * pooled_key[2]


def _products_of_bias(rows: tuple, columns: tuple, weight: tuple) -> int:
    return rows[0] * columns[0] * math.prod(weight)


OPERATOR.register('triton', triton.aggregated_attention, triton.judge)
OPERATOR.register('fused', fused.aggregated_attention, _judge_fused)
OPERATOR.register('tiled', tiled.aggregated_attention, _judge_tiled)
OPERATOR.register('reference', reference.aggregated_attention, _judge_reference)
POSITION_BIAS.register('tiled', tiled.position_bias, _judge_chunks)
POSITION_BIAS.register('reference', reference.position_bias, _judge_reference)
for _operator in ('aggregated_attention', 'aggregated_attention_triton'):
    flops.register(_operator, _products)
flops.register('joint_softmax', _products_of_pooled)
flops.register('position_bias', _products_of_bias)


def aggregated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    *,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pooled_bias: Tensor,
    row_index: Tensor,
    column_index: Tensor,
    learnable_tokens: Tensor,
    learnable_bias: Tensor,
    window_size: int = 3,
    implementation: str | None = None,
) -> Tensor:
    """Attention of every query to the window around it and to tokens pooled from the whole map, in one softmax.

    The whole of TransNeXt's aggregated attention between its projections (sections 3.1 to 3.3): with q, k and p for
    the query, a key and a pooled key, each divided by its Euclidean norm, the scores are

        temperature * log(number of keys of the query) * (q + query_embedding) . k + bias

    over the keys of the window that lie inside of the map and all pooled keys. The softmax over both is applied to the
    values, after `q . learnable_tokens + learnable_bias` has been added to the weights of the window. Positions
    outside of the map are no keys, and their values are zero.

    Args:
        query, key, value: (batch, height, width, heads, head_dim), of one floating dtype, usually views of a packed
            projection, not normalised. In an autocast region they and the pooled ones are cast to its dtype.
        pooled_key, pooled_value: (batch, pooled_height * pooled_width, heads, head_dim), row by row, of that dtype.
        query_embedding: (heads, head_dim), added to the normalised query. This and the following are of any floating
            dtypes.
        temperature: (heads,), factor of the scores; positive in the paper.
        local_bias: (heads, window_size ** 2), of the cells of a window row by row.
        pooled_bias: table (heads, rows, columns) of the biases of pooled keys: the bias of the query at (y, x) for the
            pooled key at (i, j) is at row_index[y, i], column_index[x, j]. Relative positions are such a table; any
            bias is one with as many rows as height * pooled_height, and columns alike.
        row_index, column_index: int64 (height, pooled_height) and (width, pooled_width), not negative.
        learnable_tokens, learnable_bias: (heads, head_dim, window_size ** 2) and (heads, window_size ** 2).
        window_size: odd; rows and columns of the window, which is centred on the query.
        implementation: name of the implementation to run; None leaves the choice to `zoo.kernels.dispatch`.

    Returns:
        The shape and dtype of query, contiguous. Differentiable with regard to every floating argument.

    Raises:
        TypeError, ValueError: arguments of other kinds, shapes, dtypes, devices or ranges; an implementation that
            cannot run.
        IndexError: an index that is not in the table, on the CPU.
    """
    maps = {'query': query, 'key': key, 'value': value}
    pooled = {'pooled_key': pooled_key, 'pooled_value': pooled_value}
    parameters = {
        'query_embedding': query_embedding,
        'temperature': temperature,
        'local_bias': local_bias,
        'pooled_bias': pooled_bias,
        'learnable_tokens': learnable_tokens,
        'learnable_bias': learnable_bias,
    }
    indices = {'row_index': row_index, 'column_index': column_index}
    checks.same_kind(NAME, **maps, **pooled)
    for name, x in parameters.items():
        checks.same_kind(NAME, **{name: x})
    for name, x in indices.items():
        if not isinstance(x, Tensor) or x.dtype != torch.int64:
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f'{NAME}: {name} must be an int64 tensor, got {found}')
    checks.same_device(NAME, **maps, **pooled, **parameters, **indices)
    (window_size,) = checks.per_axis(NAME, 'window_size', window_size, 1)
    if window_size % 2 == 0:
        raise ValueError(f'{NAME}: window_size must be odd, got {window_size}')
    if query.ndim != 5 or query.shape[1] < 1 or query.shape[2] < 1:
        raise ValueError(
            f'{NAME}: query must be (batch, height, width, heads, head_dim), got shape {tuple(query.shape)}'
        )
    batch, height, width, heads, head_dim = query.shape
    if row_index.ndim != 2 or column_index.ndim != 2 or pooled_bias.ndim != 3:
        shapes = ', '.join(str(tuple(x.shape)) for x in (row_index, column_index, pooled_bias))
        raise ValueError(f'{NAME}: row_index, column_index and pooled_bias must have 2, 2 and 3 axes, got {shapes}')
    tokens = row_index.shape[1] * column_index.shape[1]
    cells = window_size**2
    expected = {
        'key': query.shape,
        'value': query.shape,
        'row_index': (height, row_index.shape[1]),
        'column_index': (width, column_index.shape[1]),
        'pooled_key': (batch, tokens, heads, head_dim),
        'pooled_value': (batch, tokens, heads, head_dim),
        'query_embedding': (heads, head_dim),
        'temperature': (heads,),
        'local_bias': (heads, cells),
        'pooled_bias': (heads, *pooled_bias.shape[1:]),
        'learnable_tokens': (heads, head_dim, cells),
        'learnable_bias': (heads, cells),
    }
    for name, x in {**maps, **pooled, **parameters, **indices}.items():
        if name in expected and x.shape != expected[name]:
            raise ValueError(f'{NAME}: {name} must have shape {tuple(expected[name])}, got {tuple(x.shape)}')
    if tokens < 1:
        raise ValueError(f'{NAME}: there must be pooled keys, got none')
    query, key, value, pooled_key, pooled_value = checks.autocast(query, key, value, pooled_key, pooled_value)
    return OPERATOR.select(query, implementation, window_size=window_size)(
        query,
        key,
        value,
        pooled_key,
        pooled_value,
        query_embedding,
        temperature,
        local_bias,
        pooled_bias,
        row_index,
        column_index,
        learnable_tokens,
        learnable_bias,
        window_size,
    )


def position_bias(
    rows: Tensor, columns: Tensor, weight: Tensor, bias: Tensor, implementation: str | None = None
) -> Tensor:
    """Table of biases of relative positions, by an MLP of two coordinates with one hidden layer and ReLU.

    The first layer of a pair of coordinates is the sum of a term of each, so that hidden units are made of those of
    rows and those of columns: relu(rows[i] + columns[j]) @ weight.T + bias.

    Args:
        rows, columns: (rows, hidden) and (columns, hidden), the terms of the first layer, its bias in one of them.
        weight, bias: (heads, hidden) and (heads,), the second layer. All are of one floating dtype.
        implementation: name of the implementation to run; None leaves the choice to `zoo.kernels.dispatch`.

    Returns:
        (heads, rows, columns), contiguous. Differentiable with regard to every argument.

    Raises:
        TypeError, ValueError: arguments of other kinds, shapes, dtypes or devices; an implementation that cannot run.
    """
    name = POSITION_BIAS.name
    checks.same_kind(name, rows=rows, columns=columns, weight=weight, bias=bias)
    if {x.ndim for x in (rows, columns, weight)} != {2} or len({x.shape[1] for x in (rows, columns, weight)}) > 1:
        shapes = ', '.join(str(tuple(x.shape)) for x in (rows, columns, weight))
        raise ValueError(f'{name}: rows, columns and weight must be (..., hidden), got {shapes}')
    if bias.shape != weight.shape[:1]:
        raise ValueError(f'{name}: bias must have shape {(weight.shape[0],)}, got {tuple(bias.shape)}')
    return POSITION_BIAS.select(rows, implementation)(rows, columns, weight, bias)
