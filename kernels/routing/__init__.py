"""Bi-level routing attention (BiFormer, arXiv 2303.08810): a region attends to the regions it is routed to."""

import math

import torch
from torch import Tensor

from zoo.kernels import checks, flops
from zoo.kernels.dispatch import Operator, Problem, Verdict, chosen, possible
from zoo.kernels.routing import reference, tiled, triton

__all__ = ['routing_attention']

NAME = 'routing_attention'
OPERATOR = Operator(NAME)


def _judge_tiled(problem: Problem) -> Verdict:
    if problem.compiling:
        return chosen('it is as fast as the definition fused by torch.compile, and keeps nothing for the backward')
    return chosen('it gathers whole regions in chunks that stay in cache, and keeps nothing for the backward')


def _judge_reference(problem: Problem) -> Verdict:
    return possible('the definition, made of plain operations')


def _products(query: tuple, region_index: tuple, region_size: tuple[int, int]) -> int:
    return 2 * math.prod(query) * region_index[-1] * math.prod(region_size)


def _products_of_tiled(query: tuple, region_index: tuple, rows: int, columns: int) -> int:
    return _products(query, region_index, (rows, columns))


OPERATOR.register('triton', triton.routing_attention, triton.judge)
OPERATOR.register('tiled', tiled.routing_attention, _judge_tiled)
OPERATOR.register('reference', reference.routing_attention, _judge_reference)
flops.register('routing_attention', _products_of_tiled)
flops.register('routing_attention_triton', _products)


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_index: Tensor,
    region_size: int | tuple[int, int],
    scale: float | None = None,
    mask_padding: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Softmax attention of the pixels of each region of a map to all pixels of the regions listed for it.

    The map is cut into a row-major grid of regions. Where region_size does not divide the map, query, key and value
    are padded with zeros at the right and the bottom, and the output is cropped. As in the official code the padding
    is not masked unless `mask_padding` says so: its keys take part with logit 0 and its values with 0.

    Args:
        query, key, value: (batch, height, width, heads, head_dim), of one floating dtype, usually views of a packed
            projection. In an autocast region they are cast to its dtype.
        region_index: int64 (batch, regions, topk), shared by the heads, or (batch, heads, regions, topk): the regions
            that the queries of each region attend to. One that is listed twice counts twice. Has no gradient.
        region_size: (rows, columns) of pixels of a region, or one int for both.
        scale: of the logits; head_dim ** -0.5 if None. BiFormer passes its full width ** -0.5.
        mask_padding: whether keys of the padding are left out, for weights trained so. It makes no difference where
            region_size divides the map.
        implementation: name of the implementation to run; None leaves the choice to `zoo.kernels.dispatch`.

    Returns:
        The shape and dtype of query, contiguous.

    Raises:
        TypeError, ValueError: arguments of other kinds, shapes, dtypes, devices or ranges; an implementation that
            cannot run.
        IndexError: an index that is not a region's, on the CPU. On a GPU `triton` takes it for a region of padding.
    """
    checks.same_kind(NAME, query=query, key=key, value=value)
    if not isinstance(region_index, Tensor):
        raise TypeError(f'{NAME}: region_index must be a tensor, got {type(region_index).__name__}')
    if region_index.dtype != torch.int64:
        raise TypeError(f'{NAME}: region_index must be int64, got {region_index.dtype}')
    checks.same_device(NAME, query=query, region_index=region_index)
    rows, columns = region_size = checks.per_axis(NAME, 'region_size', region_size, 2)
    if query.ndim != 5:
        raise ValueError(
            f'{NAME}: query must be (batch, height, width, heads, head_dim), got shape {tuple(query.shape)}'
        )
    for name, x in (('key', key), ('value', value)):
        if x.shape != query.shape:
            raise ValueError(f'{NAME}: {name} must have the shape of query, {tuple(query.shape)}, got {tuple(x.shape)}')
    batch, height, width, heads, head_dim = query.shape
    regions = -(-height // rows) * -(-width // columns)
    shared = region_index.ndim == 3
    expected = (batch, regions) if shared else (batch, heads, regions)
    if region_index.ndim not in (3, 4) or region_index.shape[:-1] != expected:
        raise ValueError(
            f'{NAME}: a {height}x{width} map has {regions} regions of {rows}x{columns}, so region_index must be '
            f'({batch}, {regions}, topk) or ({batch}, {heads}, {regions}, topk), got {tuple(region_index.shape)}'
        )
    topk = region_index.shape[-1]
    if topk < 1 or topk > regions:
        raise ValueError(f'{NAME}: topk, the last size of region_index, must be 1..{regions}, got {topk}')
    query, key, value = checks.autocast(query, key, value)
    scale = head_dim**-0.5 if scale is None else scale
    region_index = region_index[:, None] if shared else region_index
    return OPERATOR.select(query, implementation)(query, key, value, region_index, region_size, scale, mask_padding)
