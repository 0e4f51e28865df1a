"""Neighborhood attention: every query attends to the kernel_size nearest keys per axis (NAT, DiNAT)."""

import math

from torch import Tensor

from .. import checks, flops
from ..dispatch import Operator, Problem, Verdict, chosen, possible
from . import reference, tiled, triton

OPERATOR = Operator('neighborhood_attention')


def _judge_tiled(problem: Problem) -> Verdict:
    if problem.compiling and problem.options.get('dilation', 1) not in (1, (1,), (1, 1)):
        return chosen('measured faster than the fused definition where it is dilated')
    if problem.compiling:
        return possible('one operator that the compiler does not look into')
    return chosen('the leanest in plain PyTorch')


def _judge_reference(problem: Problem) -> Verdict:
    if problem.compiling:
        return chosen('torch.compile fuses the definition into one loop')
    return possible('the definition, in plain operations')


def _products(query: tuple, kernel_size: list[int]) -> int:
    return 2 * math.prod(query) * math.prod(kernel_size)


OPERATOR.register('triton', triton.neighborhood_attention, triton.judge)
OPERATOR.register('tiled', tiled.neighborhood_attention, _judge_tiled)
OPERATOR.register('reference', reference.neighborhood_attention, _judge_reference)
for _operator in ('neighborhood_attention_tiled', 'neighborhood_attention_triton'):
    flops.register(_operator, _products)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention of every query to the keys of its window (arXiv 2204.07143; dilated: arXiv 2209.15001).

    The window is centred on the query as far as the border allows and shifts inward there: it always holds
    kernel_size keys per axis. Under dilation it lies in the query's residue class of positions modulo the dilation.
    Same windows and bias as NATTEN.

    Args:
        query, key, value: (batch, height, width, heads, head_dim), or (batch, length, heads, head_dim) for one axis,
            of one floating dtype; views of a packed qkv are taken as they are. Under autocast they are cast.
        kernel_size: odd, an int or one per axis.
        dilation: an int or one per axis; kernel_size * dilation may not exceed the axis.
        bias: relative position bias (heads, 2 * kh - 1, 2 * kw - 1), or (heads, 2 * k - 1), of any floating dtype,
            added to the scaled scores. Index kernel_size - 1 is the query's own position and a greater index a key
            further down or right, counted in steps of the dilation.
        scale: of the query; None means head_dim ** -0.5.
        implementation: name of the one to use; None leaves it to the dispatch (see `zoo.kernels.explain`).

    Returns:
        Same shape and dtype as query, contiguous. Differentiable with regard to query, key, value and bias.

    Raises:
        ValueError: shapes, sizes, devices or the implementation do not fit.
        TypeError: dtypes do not fit.
    """
    name = OPERATOR.name
    checks.same_kind(name, query=query, key=key, value=value)
    axes = query.ndim - 3
    if axes not in (1, 2):
        raise ValueError(
            f'{name}: query must be (batch, length, heads, head_dim) or (batch, height, width, heads, head_dim), '
            f'got shape {tuple(query.shape)}'
        )
    if key.shape != query.shape or value.shape != query.shape:
        shapes = ', '.join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f'{name}: query, key and value must have one shape, got {shapes}')
    kernel_size = checks.per_axis(name, 'kernel_size', kernel_size, axes)
    dilation = checks.per_axis(name, 'dilation', dilation, axes)
    for size, kernel, step in zip(query.shape[1:-2], kernel_size, dilation, strict=True):
        if kernel % 2 == 0:
            raise ValueError(f'{name}: kernel_size must be odd, got {kernel}')
        if kernel * step > size:
            raise ValueError(
                f'{name}: kernel_size * dilation = {kernel} * {step} exceeds the size {size} of its axis; pad the map'
            )
    if bias is not None:
        expected = (query.shape[-2], *(2 * kernel - 1 for kernel in kernel_size))
        checks.same_kind(name, bias=bias)
        checks.same_device(name, query=query, bias=bias)
        if bias.shape != expected:
            raise ValueError(f'{name}: bias must have shape {tuple(expected)}, got {tuple(bias.shape)}')
    if scale is None:
        scale = query.shape[-1] ** -0.5

    query, key, value = checks.autocast(query, key, value)
    run = OPERATOR.select(query, implementation, kernel_size=kernel_size, dilation=dilation)
    if axes == 2:
        return run(query, key, value, bias, kernel_size, dilation, float(scale))
    query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    bias = None if bias is None else bias.unsqueeze(1)
    return run(query, key, value, bias, (1, *kernel_size), (1, *dilation), float(scale)).squeeze(1)
