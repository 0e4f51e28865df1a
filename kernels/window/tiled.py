"""Window attention in chunks that stay in cache, on any device, with an explicit backward.

Along an axis there are classes of windows of one extent: whole ones, and those that the map's borders cut. The windows
of a row class and a column class are dense problems of one size, without padding, of which as many as a cache holds are
copied together and computed at a time. Of small windows the probabilities are kept for the backward; those of others it
computes again, so that nothing is kept but the inputs. README.md explains more.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import is_exporting

CPU_CHUNK = 2**17  # numbers of one input, or scores, that are worked on at a time: 512 KiB of float32
CHUNK = 2**26  # elsewhere, where calls must be few


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: tuple[int, int],
    dilation: tuple[int, int],
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    offset: tuple[int, int],
) -> Tensor:
    """(batch, height, width, heads, head_dim) -> same, contiguous; key_mask (batch or 1, height, width)."""
    is_trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, bias))
    keeps = is_trained and not is_exporting() and keeps_probabilities(query, window_size)
    return forward(query, key, value, bias, key_mask, window_size, dilation, scale, offset, keeps)[0]


def keeps_probabilities(query: Tensor, window_size: Sequence[int]) -> bool:
    """Whether the backward is to have them: where they take no more memory than queries and keys do.

    On the CPU alone, where it was measured (README.md).
    """
    bytes_of_probabilities = window_size[0] * window_size[1] * compute_dtype(query).itemsize
    return query.device.type == 'cpu' and bytes_of_probabilities <= 2 * query.shape[-1] * query.dtype.itemsize


@torch.library.custom_op('zoo::window_attention', mutates_args=())
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    window_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    offset: Sequence[int],
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """Output, and the probabilities of all chunks where the backward is to have them, else without members."""
    output, probabilities = empty_results(query, window_size, keeps)
    kept = Kept(probabilities)
    with torch.autocast(query.device.type, enabled=False):
        for windows in classes(query, window_size, dilation, offset):
            q_map, k_map, v_map, o_map = (windows.view(x) for x in (query, key, value, output))
            table = windows.table(bias)
            if key_mask is None and not keeps:
                for chunk in windows.chunks():
                    q, k, v = (windows.load_heads_last(x[chunk]) for x in (q_map, k_map, v_map))
                    mask = None if table is None else table[None]
                    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
                    windows.store_heads_last(o_map[chunk], o)
                continue
            is_key = None if key_mask is None else windows.view_of_mask(key_mask)
            for chunk in windows.chunks_of_heads():
                q, k, v = (windows.load(x[chunk]) for x in (q_map, k_map, v_map))
                o = torch.empty_like(q)
                for rows in windows.strips():
                    out = kept.take((len(q), q[:, rows].shape[1], windows.pixels)) if keeps else None
                    p = windows.probabilities(q, k, table, is_key, scale, chunk, rows, out)
                    torch.bmm(p, v, out=o[:, rows])
                windows.store(o_map[chunk], o)
    kept.rest.zero_()
    return output, probabilities


@torch.library.custom_op('zoo::window_attention_backward', mutates_args=())
def backward(
    grad_output: Tensor,
    probabilities: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    window_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    offset: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; the last is empty where there is no bias."""
    grads = empty_gradients(query, bias)
    kept = Kept(probabilities) if probabilities.numel() else None
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=compute_dtype(query))
    with torch.autocast(query.device.type, enabled=False):
        for windows in classes(query, window_size, dilation, offset):
            maps = [windows.view(x) for x in (grad_output, query, key, value)]
            grad_maps = [windows.view(x) for x in grads[:3]]
            table = windows.table(bias)
            grad_table = None if table is None else torch.zeros_like(table)
            is_key = None if key_mask is None else windows.view_of_mask(key_mask)
            for chunk in windows.chunks_of_heads():
                g, q, k, v = (windows.load(x[chunk]) for x in maps)
                dq, dk, dv = (torch.empty_like(q) for _ in grad_maps)
                for i, rows in enumerate(windows.strips()):
                    keep = min(i, 1)  # the first strip finds nothing to add to
                    g_rows, q_rows, dq_rows = (x[:, rows] for x in (g, q, dq))
                    if kept:
                        p = kept.take((len(q), q_rows.shape[1], windows.pixels))
                    else:
                        p = windows.probabilities(q, k, table, is_key, scale, chunk, rows)
                    dv.baddbmm_(p.mT, g_rows, beta=keep)
                    dp = torch.bmm(g_rows, v.mT)
                    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                    if grad_table is not None:
                        total = grad_table[heads_of(chunk), rows]
                        total.add_(ds.view(-1, *total.shape).sum(0))
                    torch.baddbmm(dq_rows, ds, k, beta=0, alpha=scale, out=dq_rows)
                    dk.baddbmm_(ds.mT, q_rows, beta=keep, alpha=scale)
                for grad_map, x in zip(grad_maps, (dq, dk, dv), strict=True):
                    windows.store(grad_map[chunk], x)
            if grad_table is not None:
                part = windows.part_of_bias(grad_bias)
                part.add_(grad_table.view(part.shape))
        if grad_bias is not None:
            grads[3].copy_(grad_bias)
    return grads


class Kept:
    """Probabilities one after the other, in the order in which chunks and strips are computed."""

    def __init__(self, probabilities: Tensor):
        self.rest = probabilities

    def take(self, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        first, self.rest = self.rest[:size], self.rest[size:]
        return first.view(shape)


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def empty_results(query: Tensor, window_size: Sequence[int], keeps: bool) -> tuple[Tensor, Tensor]:
    """The output, and storage of the probabilities: there are fewer of windows that a border cuts."""
    batch, height, width, heads, _ = query.shape
    size = batch * height * width * heads * window_size[0] * window_size[1] if keeps else 0
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return output, torch.empty(size, dtype=compute_dtype(query), device=query.device)


def empty_gradients(query: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous, of query, key, value and bias; the last without members where there is no bias."""

    def empty(shape, like):
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    of_bias = empty(0, query) if bias is None else empty(bias.shape, bias)
    return *(empty(query.shape, query) for _ in range(3)), of_bias


class Axis(NamedTuple):
    """A class of windows along an axis: `pixels` each, `step` apart; one for each of `residues` of each of `blocks`."""

    start: int
    blocks: int
    residues: int
    pixels: int
    window: int  # pixels of a whole window
    step: int
    first: int = 0  # position in a whole window of the first pixel

    def strides(self, stride: int) -> tuple[int, int, int]:
        """Of blocks, residues and pixels along an axis of `stride`."""
        return stride * self.window * self.step, stride, stride * self.step


def axis_classes(length: int, window: int, step: int, offset: int) -> Iterator[Axis]:
    cut = min(offset, length)  # of one window, before all others
    blocks, rest = divmod(length - cut, window * step)
    start = length - rest
    pixels, longer = divmod(rest, step)
    found = (
        Axis(0, 1, 1, cut, window, step, window - offset),
        Axis(cut, blocks, step, window, window, step),
        Axis(start, 1, longer, pixels + 1, window, step),
        Axis(start + longer, 1, step - longer, pixels, window, step),
    )
    return (axis for axis in found if axis.blocks and axis.residues and axis.pixels)


def classes(
    query: Tensor, window_size: Sequence[int], dilation: Sequence[int], offset: Sequence[int]
) -> Iterator['Windows']:
    """All windows of the map, those of one extent together."""
    if not query.numel():
        return
    for rows in axis_classes(query.shape[1], window_size[0], dilation[0], offset[0]):
        for columns in axis_classes(query.shape[2], window_size[1], dilation[1], offset[1]):
            yield Windows(query, rows, columns)


HEADS = 5  # the dimension of a view of windows that counts heads, after those that count windows


class Windows:
    """The windows of a class of rows and a class of columns.

    A view of a map by windows is (images, row blocks, row residues, column blocks, column residues, heads, rows,
    columns, head_dim). Chunks are indices of its first dimensions.
    """

    def __init__(self, query: Tensor, rows: Axis, columns: Axis):
        batch, _, _, heads, head_dim = query.shape
        self.rows, self.columns = rows, columns
        self.dtype = compute_dtype(query)
        self.pixels = rows.pixels * columns.pixels
        self.head_dim = head_dim
        self.shape = batch, rows.blocks, rows.residues, columns.blocks, columns.residues, heads
        self.limit = CPU_CHUNK if query.device.type == 'cpu' else CHUNK

    def view(self, x: Tensor) -> Tensor:
        x = x[:, self.rows.start :, self.columns.start :]
        image, row, column, head, inner = x.stride()
        row_block, row_residue, row = self.rows.strides(row)
        column_block, column_residue, column = self.columns.strides(column)
        strides = image, row_block, row_residue, column_block, column_residue, head, row, column, inner
        return x.as_strided((*self.shape, self.rows.pixels, self.columns.pixels, x.shape[-1]), strides)

    def view_of_mask(self, key_mask: Tensor) -> Tensor:
        """The same of a (batch or 1, height, width) mask, for all heads."""
        key_mask = key_mask[..., None, None].expand(self.shape[0], -1, -1, self.shape[HEADS], -1)
        return self.view(key_mask)

    def chunks(self) -> Iterator[tuple[slice, ...]]:
        """Of windows with all of their heads."""
        return boxes(self.shape[:HEADS], self.limit // max(1, self.shape[HEADS] * self.pixels * self.head_dim))

    def chunks_of_heads(self) -> Iterator[tuple[slice, ...]]:
        """Of windows and heads, whose scores are few enough too."""
        return boxes(self.shape, self.limit // max(1, self.pixels * max(self.head_dim, self.pixels)))

    def strips(self) -> Iterator[slice]:
        """Of the queries of a window, where its scores are many."""
        step = max(1, self.limit // self.pixels)
        return (slice(start, start + step) for start in range(0, self.pixels, step))

    def load_heads_last(self, x: Tensor) -> Tensor:
        """(windows, heads, pixels, head_dim), where the heads of a pixel lie together; copied only if it must be."""
        x = x.movedim(HEADS, -2)
        return x.reshape(-1, self.pixels, *x.shape[-2:]).to(self.dtype).transpose(1, 2)

    def store_heads_last(self, out: Tensor, x: Tensor) -> None:
        out = out.movedim(HEADS, -2)
        out.copy_(x.transpose(1, 2).reshape(out.shape))

    def load(self, x: Tensor) -> Tensor:
        """Contiguous (windows and heads, pixels, head_dim)."""
        out = torch.empty(x.shape, dtype=self.dtype, device=x.device).copy_(x)
        return out.view(-1, self.pixels, self.head_dim)

    def store(self, out: Tensor, x: Tensor) -> None:
        out.copy_(x.view(out.shape))

    def part_of_bias(self, bias: Tensor) -> Tensor:
        """A view (heads, rows, columns, rows, columns) of what there is of these windows in the bias."""
        size = self.rows.window, self.columns.window
        rows, columns = (slice(axis.first, axis.first + axis.pixels) for axis in (self.rows, self.columns))
        return bias.view(-1, *size, *size)[:, rows, columns, rows, columns]

    def table(self, bias: Tensor | None) -> Tensor | None:
        """Bias (heads, pixels, pixels) of these windows."""
        if bias is None:
            return None
        # Detached, since scaled_dot_product_attention takes its slow path for a mask that requires a gradient.
        bias = self.part_of_bias(bias.detach().contiguous())
        return bias.to(self.dtype).reshape(-1, self.pixels, self.pixels)

    def probabilities(
        self,
        q: Tensor,
        k: Tensor,
        table: Tensor | None,
        is_key: Tensor | None,
        scale: float,
        chunk: tuple[slice, ...],
        rows: slice,
        out: Tensor | None = None,
    ) -> Tensor:
        """(windows and heads, queries of a strip, keys) of a chunk; zeros where there are no keys."""
        q = q[:, rows]
        scores = q.new_empty(len(q), q.shape[1], self.pixels)
        if table is not None:
            table = table[heads_of(chunk), rows]
            scores.view(-1, *table.shape).copy_(table)
        scores.baddbmm_(q, k.mT, beta=0 if table is None else 1, alpha=scale)
        if is_key is None:
            return torch.softmax(scores, -1, out=out)
        is_no_key = ~is_key[chunk].reshape(-1, 1, self.pixels)
        scores.masked_fill_(is_no_key, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1, out=out).masked_fill_(is_no_key, 0)


def boxes(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Indices that cut an array of `shape` into boxes of at most `limit` members, or of one.

    Dimensions that a box takes whole are left out at its end.
    """
    if math.prod(shape) <= limit or not shape:
        yield ()
        return
    step = max(1, limit // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        for rest in boxes(shape[1:], limit) if step == 1 else [()]:
            yield slice(start, start + step), *rest


def heads_of(chunk: tuple[slice, ...]) -> slice:
    return chunk[HEADS] if len(chunk) > HEADS else slice(None)


@forward.register_fake
def _(query, key, value, bias, key_mask, window_size, dilation, scale, offset, keeps):
    return empty_results(query, window_size, keeps)


@backward.register_fake
def _(grad_output, probabilities, query, key, value, bias, key_mask, window_size, dilation, scale, offset):
    return empty_gradients(query, bias)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window_size, ctx.dilation, ctx.scale, ctx.offset, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, grad_output, _):
    tensors = ctx.saved_tensors  # read once, as checkpointing demands
    arguments = ctx.window_size, ctx.dilation, ctx.scale, ctx.offset
    *grads, grad_bias = backward(grad_output, *tensors, *arguments)
    has_bias = tensors[4] is not None
    return *grads, grad_bias if has_bias else None, None, None, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)
