"""Window attention: a map is cut into windows, contiguous or dilated, each of which attends to itself."""

import torch
from torch import Tensor

from .. import checks, flops
from ..dispatch import Operator, Problem, Verdict, chosen, possible
from . import reference, tiled

__all__ = ['window_attention']

NAME = 'window_attention'
OPERATOR = Operator(NAME)


def _judge_tiled(problem: Problem) -> Verdict:
    return chosen('it computes windows in chunks that stay in cache, and keeps nothing larger than its inputs')


def _judge_reference(problem: Problem) -> Verdict:
    return possible('the definition, made of plain operations')


def _products(query: tuple, window_size: list[int], dilation: list[int], offset: list[int]) -> int:
    """Windows that the border cuts have fewer keys."""
    batch, *size, heads, head_dim = query
    pairs = 1
    for length, side, step, first in zip(size, window_size, dilation, offset, strict=True):
        first = min(first, length)
        blocks, rest = divmod(length - first, side * step)
        pixels, longer = divmod(rest, step)
        pairs *= first**2 + blocks * step * side**2 + longer * (pixels + 1) ** 2 + (step - longer) * pixels**2
    return 2 * batch * heads * head_dim * pairs


OPERATOR.register('tiled', tiled.window_attention, _judge_tiled)
OPERATOR.register('reference', reference.window_attention, _judge_reference)
flops.register('window_attention', _products)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    offset: int | tuple[int, int] = 0,
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
    With an offset the windows begin before the map, and the first of an axis has `offset` pixels of it: Swin's shifted
    windows, without a roll and without a mask.

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
        offset: (rows, columns) of the map that the first windows have, each less than a window's, or one int for both;
            0 means that they begin with the map. A window that begins before it has the last rows and columns of the
            bias. Only with dilation 1.
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
    offset = _checked_offset(offset, window_size, dilation)
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
    return run(query, key, value, window_size, dilation, bias, key_mask, scale, offset)


def _checked_offset(offset, window_size: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    offsets = tuple(offset) if isinstance(offset, (tuple, list)) else (offset, offset)
    if len(offsets) != 2:
        raise ValueError(f'{NAME}: offset must be an int or 2 ints, got {offset}')
    for first, side, step in zip(offsets, window_size, dilation, strict=True):
        if not isinstance(first, (int, torch.SymInt)) or isinstance(first, bool):
            raise TypeError(f'{NAME}: offset must be an int or 2 ints, got {offset!r}')
        if first == 0:
            continue
        if not 0 < first < side:
            raise ValueError(f'{NAME}: offset must be 0 or more and less than window_size {window_size}, got {offset}')
        if step != 1:
            raise ValueError(
                f'{NAME}: windows with an offset must have dilation 1, got offset {offset}, dilation {dilation}'
            )
    return offsets
