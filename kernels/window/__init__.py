"""Window attention: a map is cut into windows, contiguous or dilated, each of which attends to itself."""

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Operator, Problem, Verdict, chosen, possible
from . import reference, tiled

__all__ = ['window_attention']

NAME = 'window_attention'
OPERATOR = Operator(NAME)


def _judge_tiled(problem: Problem) -> Verdict:
    return chosen('it computes windows in chunks that stay in cache, and keeps nothing for the backward')


def _judge_reference(problem: Problem) -> Verdict:
    return possible('the definition, made of plain operations')


OPERATOR.register('tiled', tiled.window_attention, _judge_tiled)
OPERATOR.register('reference', reference.window_attention, _judge_reference)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Softmax attention of the pixels of each window of a map to each other.

    The map is cut, from its top left corner, into blocks of window_size * dilation pixels a side. The pixels of a block
    whose rows and columns have the same remainders modulo the dilation are a window: window_size rows x columns of
    them, row by row. So
      - dilation 1 makes contiguous windows (Swin, MaxViT's block attention, CrossFormer's short distance attention);
      - dilation I samples every I-th pixel of the block (CrossFormer's long distance attention, section 3.2);
      - dilation (ceil(height / rows), ceil(width / columns)) makes the map one block (MaxViT's grid attention).
    The blocks need not divide the map: positions beyond it are no keys, and their outputs are not computed or dropped.

    Args:
        query, key, value: (batch, height, width, heads, head_dim), of one floating dtype; views of a packed qkv are
            taken as they are. In an autocast region they are cast to its dtype.
        window_size: (rows, columns) of pixels of a window, or one int for both.
        dilation: (rows, columns) from a pixel of a window to the next, or one int for both.
        bias: (heads, N, N) of any floating dtype, with N = rows * columns, added to the scaled scores of every window;
            bias[h, i, j] is for query i and key j.
        key_mask: bool (height, width) or (batch, height, width), True where a pixel is a key. A query whose window has
            no key gives zeros.
        scale: of the scores; None means head_dim ** -0.5.
        implementation: name of the one to use; None leaves it to the dispatch (see `zoo.kernels.explain`).

    Returns:
        The shape and dtype of query, contiguous. Differentiable with regard to query, key, value and bias.

    Raises:
        TypeError, ValueError: arguments of other kinds, shapes, dtypes, devices or sizes; an implementation that
            cannot run.
    """
    checks.same_kind(NAME, query=query, key=key, value=value)
    if query.ndim != 5:
        raise ValueError(
            f'{NAME}: query must be (batch, height, width, heads, head_dim), got shape {tuple(query.shape)}'
        )
    for name, x in (('key', key), ('value', value)):
        if x.shape != query.shape:
            raise ValueError(f'{NAME}: {name} must have the shape of query, {tuple(query.shape)}, got {tuple(x.shape)}')
    batch, height, width, heads, head_dim = query.shape
    window_size = checks.per_axis(NAME, 'window_size', window_size, 2)
    dilation = checks.per_axis(NAME, 'dilation', dilation, 2)
    if bias is not None:
        checks.same_kind(NAME, bias=bias)
        checks.same_device(NAME, query=query, bias=bias)
        pixels = window_size[0] * window_size[1]
        if bias.shape != (heads, pixels, pixels):
            raise ValueError(f'{NAME}: bias must have shape {(heads, pixels, pixels)}, got {tuple(bias.shape)}')
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            found = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
            raise TypeError(f'{NAME}: key_mask must be a bool tensor, got {found}')
        checks.same_device(NAME, query=query, key_mask=key_mask)
        if key_mask.shape not in ((height, width), (batch, height, width)):
            raise ValueError(
                f'{NAME}: key_mask must have shape {(height, width)} or {(batch, height, width)}, '
                f'got {tuple(key_mask.shape)}'
            )
        key_mask = key_mask if key_mask.ndim == 3 else key_mask[None]
    scale = head_dim**-0.5 if scale is None else float(scale)
    query, key, value = checks.autocast(query, key, value)
    run = OPERATOR.select(query, implementation)
    return run(query, key, value, window_size, dilation, bias, key_mask, scale)
