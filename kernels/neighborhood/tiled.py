"""Neighborhood attention in strips and column tiles: lean PyTorch made of batched matrix products, for the CPU.

A map is laid out once as column tiles, each with the columns that its queries' windows reach, row after row. The keys
of a strip of query rows are then consecutive in memory, so that a strip is one batch of small dense attentions over
all images, heads and tiles. Windows and bias are one additive table that strips share, and in the backward the matrix
products themselves accumulate where strips overlap. A dilated problem is one such problem per residue class.
README.md has the derivation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20  # of the queries that are worked on at a time: keys, values and scores then stay in the caches


class Run(NamedTuple):
    """Tiles `first` to `last` (excluded), each of `width` columns; their starts are one tile apart from `start` on."""

    first: int
    last: int
    start: int
    width: int


class Strip(NamedTuple):
    """Rows of queries, the rows of keys (first, last + 1) that they reach, and what the table of a strip depends on."""

    rows: int  # of queries
    keys: tuple[int, int]
    kind: tuple[int, ...]  # key rows, first key row from the first query row, start of each query row's window in them


@dataclass(frozen=True, eq=False)  # a key by identity: a look-up need not hash its contents
class Plan:
    """How a problem of dilation 1 is cut. The last tile can reach over the map's edge with its queries."""

    width: int  # of the map
    kernel: tuple[int, int]
    tile: int  # query columns of a tile
    span: int  # key columns of a tile
    key_starts: tuple[int, ...]  # first key column of each tile
    query_runs: tuple[Run, ...]
    key_runs: tuple[Run, ...]
    strips: tuple[Strip, ...]

    @property
    def whole(self) -> bool:
        """One tile in one strip: a dense attention."""
        return len(self.key_starts) == len(self.strips) == 1

    def cost(self) -> int:
        """Estimated time in scores: products of few queries run slower, calls and copies of keys take time as well.

        The weights are from measurements at head_dim 32.
        """
        tiles, cost = len(self.key_starts), 0
        for strip in self.strips:
            cost += tiles * strip.kind[0] * self.span * (strip.rows * self.tile + 4)
            cost += 8 * tiles * strip.rows * self.span + 2000
        return cost


def _window(position: int, length: int, kernel: int) -> int:
    """First key of the window of a query."""
    return min(max(position - kernel // 2, 0), length - kernel)


def _runs(starts: Sequence[int], width: int, tile: int, length: int) -> tuple[Run, ...]:
    runs = []
    for i, start in enumerate(starts):
        inside = min(width, length - start)
        if runs and runs[-1].width == inside and start == starts[i - 1] + tile:
            runs[-1] = runs[-1]._replace(last=i + 1)
        else:
            runs.append(Run(i, i + 1, start, inside))
    return tuple(runs)


def _cut(height: int, width: int, kernel: tuple[int, int], rows: int, columns: int) -> Plan:
    """Plan of tiles of `columns` queries in strips of `rows`."""
    starts = range(0, width, columns)
    reach = [[_window(x, width, kernel[1]) for x in (start, min(start + columns, width) - 1)] for start in starts]
    span = max(last - first for first, last in reach) + kernel[1]
    key_starts = tuple(min(first, width - span) for first, _ in reach)
    strips = []
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        windows = [_window(y, height, kernel[0]) for y in range(top, bottom)]
        keys = windows[0], windows[-1] + kernel[0]
        kind = keys[1] - keys[0], keys[0] - top, *(start - keys[0] for start in windows)
        strips.append(Strip(bottom - top, keys, kind))
    query_runs, key_runs = _runs(starts, columns, columns, width), _runs(key_starts, span, columns, width)
    return Plan(width, kernel, columns, span, key_starts, query_runs, key_runs, tuple(strips))


@lru_cache(maxsize=256)
def _plan(height: int, width: int, kernel: tuple[int, int]) -> Plan:
    """The cheapest of some cuts."""
    rows, columns = (
        sorted({min(n, size) for n in (max(4, k // 2 + 1), 7, k, 16)})
        for size, k in zip((height, width), kernel, strict=True)
    )
    return min((_cut(height, width, kernel, r, c) for r in rows for c in columns), key=Plan.cost)


@lru_cache(maxsize=64)
def _table_index(plan: Plan, kind: tuple[int, ...], device: torch.device) -> tuple[Tensor, bool]:
    """Flat relative position of every (tile, query, key) of a strip, one past the last outside of the window.

    Second, whether any key lies outside of a window.
    """
    (kh, kw), (rows, shift, *starts) = plan.kernel, kind
    y = torch.arange(len(starts), device=device)[:, None]
    key = torch.arange(rows, device=device)
    start = torch.tensor(starts, device=device)[:, None]
    row, row_outside = key + shift - y + kh - 1, (key < start) | (key >= start + kh)  # (query rows, key rows)
    x = torch.arange(len(plan.key_starts) * plan.tile, device=device).clamp(max=plan.width - 1).view(-1, plan.tile, 1)
    key = torch.tensor(plan.key_starts, device=device)[:, None, None] + torch.arange(plan.span, device=device)
    start = (x - kw // 2).clamp(0, plan.width - kw)
    column, column_outside = key - x + kw - 1, (key < start) | (key >= start + kw)  # (tiles, columns, key columns)
    index = row[:, None, :, None] * (2 * kw - 1) + column[:, None, :, None, :]
    outside = row_outside[:, None, :, None] | column_outside[:, None, :, None, :]
    return index.masked_fill(outside, (2 * kh - 1) * (2 * kw - 1)).flatten(), bool(outside.any())


class _Tables:
    """Additive tables (heads or 1, tiles, queries, keys) of strips: the bias inside of the windows, -inf outside."""

    def __init__(self, bias: Tensor | None, kernel: Sequence[int], like: Tensor, dtype: torch.dtype):
        entries = (2 * kernel[0] - 1) * (2 * kernel[1] - 1)
        self.biased = bias is not None
        self.values = like.new_zeros(bias.shape[0] if self.biased else 1, entries + 1, dtype=dtype)
        if self.biased:
            self.values[:, :-1] = bias.flatten(1)
        self.values[:, -1] = -torch.inf
        self.tables, self.gradients = {}, {}

    def table(self, plan: Plan, strip: Strip) -> Tensor | None:
        """None where there is nothing to add."""
        key = plan, strip.kind
        if key not in self.tables:
            index, outside = _table_index(plan, strip.kind, self.values.device)
            shape = len(plan.key_starts), (len(strip.kind) - 2) * plan.tile, strip.kind[0] * plan.span
            needed = self.biased or outside
            self.tables[key] = self.values.index_select(1, index).view(-1, *shape) if needed else None
        return self.tables[key]

    def add_gradient(self, plan: Plan, strip: Strip, scores: Tensor) -> None:
        """Add the gradient of a strip's scores, (batch and heads and tiles, queries, keys)."""
        key = plan, strip.kind
        gradient = scores.view(-1, *self.tables[key].shape)
        gradient = gradient.sum(0) if len(gradient) > 1 else gradient[0]
        if key in self.gradients:
            self.gradients[key].add_(gradient)
        else:
            self.gradients[key] = gradient.clone()

    def bias_gradient(self) -> Tensor:
        """(heads, entries); on the CPU in a fixed order of summation."""
        total = torch.zeros_like(self.values)
        for (plan, kind), gradient in self.gradients.items():
            index, _ = _table_index(plan, kind, total.device)
            total.scatter_add_(1, index.expand(len(total), -1), gradient.view(len(total), -1))
        return total[:, :-1]


class _Workspace:
    """Storage that the chunks of one call share, by name."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.like, self.dtype, self.storage, self.taken = like, dtype, {}, {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor, in the place of the former one of this name."""
        if (name, shape) not in self.taken:
            size = math.prod(shape)
            if name not in self.storage or self.storage[name].numel() < size:
                self.storage[name] = self.like.new_empty(size, dtype=self.dtype)
            self.taken[name, shape] = self.storage[name][:size].view(shape)
        return self.taken[name, shape]


def _views(
    planes: Tensor, tiles: Tensor, tile: int, runs: Sequence[Run], piece: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of one shape of planes (..., height, width, d) and of tiles (..., tiles, height, columns, d).

    They take `piece` columns of each tile at a time: no view of the planes overlaps itself if piece <= tile. Columns
    and head_dim are one axis in them, since copies of long rows are faster.
    """
    d = planes.shape[-1]
    planes, tiles = planes.flatten(-2), tiles.flatten(-2)
    for run in runs:
        for offset in range(0, run.width, piece):
            width = min(piece, run.width - offset) * d
            start = (run.start + offset) * d
            end = start + (run.last - run.first - 1) * tile * d + width
            columns = planes[..., start:end].unfold(-1, width, tile * d).transpose(-2, -3)
            yield columns, tiles[..., run.first : run.last, :, offset * d : offset * d + width]


class _Maps:
    """Maps (images, row classes, column classes, height, width, heads, d) on their way to tiles or back.

    Between them stand planes (..., heads, height, width, d): each of the two copies then moves long rows.
    """

    def __init__(self, maps: Tensor, plan: Plan, workspace: _Workspace):
        self.plan, self.workspace = plan, workspace
        self.maps = maps.movedim(-2, 3)

    def planes(self) -> Tensor:
        return self.workspace.take('planes', *self.maps.shape)


class _Queries(_Maps):
    """Maps as strips of column tiles.

    `strips` holds for each strip a batch (images and classes and heads and tiles) of (queries, head_dim) matrices.
    """

    def __init__(self, maps: Tensor, plan: Plan, workspace: _Workspace, name: str):
        super().__init__(maps, plan, workspace)
        *outer, height, _, head_dim = self.maps.shape
        self.parts, self.strips = [], []
        full = height - height % plan.strips[0].rows
        for first, last, rows in ((0, full, plan.strips[0].rows), (full, height, plan.strips[-1].rows)):
            if first < last:
                shape = (last - first) // rows, *outer, len(plan.key_starts), rows, plan.tile, head_dim
                tiles = workspace.take(f'{name} {rows}', *shape)
                self.parts.append((slice(first, last), rows, tiles))
                self.strips += tiles.view(shape[0], -1, rows * plan.tile, head_dim).unbind()

    def _views(self, planes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for part, rows, tiles in self.parts:
            strips = planes[..., part, :, :].unflatten(-3, (-1, rows)).movedim(-4, 0)
            yield from _views(strips, tiles, self.plan.tile, self.plan.query_runs, self.plan.tile)

    def load(self) -> '_Queries':
        if self.plan.whole:
            self.strips[0].view(self.maps.shape).copy_(self.maps)
            return self
        if self.plan.query_runs[-1].width < self.plan.tile:  # nothing over the edge may be NaN
            for _, _, tiles in self.parts:
                tiles.zero_()
        for planes, tiles in self._views(self.planes().copy_(self.maps)):
            tiles.copy_(planes)
        return self

    def store(self) -> None:
        if self.plan.whole:
            self.maps.copy_(self.strips[0].view(self.maps.shape))
            return
        stored = self.planes()
        for planes, tiles in self._views(stored):
            planes.copy_(tiles)
        self.maps.copy_(stored)


class _Keys(_Maps):
    """Maps as overlapping column tiles.

    `strips` holds for each strip a batch (images and classes and heads and tiles) of (keys, head_dim) matrices: views
    of what strips share.
    """

    def __init__(self, maps: Tensor, plan: Plan, workspace: _Workspace, name: str):
        super().__init__(maps, plan, workspace)
        *outer, height, _, head_dim = self.maps.shape
        self.tiles = workspace.take(name, *outer, len(plan.key_starts), height, plan.span, head_dim)
        matrices = self.tiles.view(-1, height * plan.span, head_dim)
        self.strips = [matrices[:, strip.keys[0] * plan.span : strip.keys[1] * plan.span] for strip in plan.strips]

    def load(self) -> '_Keys':
        if self.plan.whole:
            self.tiles.view(self.maps.shape).copy_(self.maps)
            return self
        loaded = self.planes().copy_(self.maps)
        for planes, tiles in _views(loaded, self.tiles, self.plan.tile, self.plan.key_runs, self.plan.span):
            tiles.copy_(planes)
        return self

    def zero(self) -> '_Keys':
        self.tiles.zero_()
        return self

    def fold(self) -> None:
        """Store the sum of what overlaps."""
        if self.plan.whole:
            self.maps.copy_(self.tiles.view(self.maps.shape))
            return
        total = self.planes().zero_()
        for planes, tiles in _views(total, self.tiles, self.plan.tile, self.plan.key_runs, self.plan.tile):
            planes.add_(tiles)
        self.maps.copy_(total)


def _classes(length: int, dilation: int) -> list[tuple[int, int, int]]:
    """(first residue, residues, members of each) of the residue classes of an axis, those of one size together."""
    members, longer = divmod(length, dilation)
    classes = [(0, longer, members + 1), (longer, dilation - longer, members)]
    return classes if longer else classes[1:]


def _problems(
    tensors: Sequence[Tensor], kernel: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[Plan, list[Tensor]]]:
    """Problems of dilation 1: views (images, row classes, column classes, height, width, heads, d) of tensors."""
    batch, height, width, heads, head_dim = tensors[0].shape
    for row, row_classes, rows in _classes(height, dilation[0]):
        for column, column_classes, columns in _classes(width, dilation[1]):
            plan = _plan(rows, columns, tuple(kernel))
            image_bytes = 4 * row_classes * rows * column_classes * columns * heads * head_dim
            images = max(1, CHUNK_BYTES // max(1, image_bytes))
            for image in range(0, batch, images):
                views = []
                for x in tensors:
                    x = x[image : image + images, row:, column:]
                    b, h, w, n, d = x.stride()
                    shape = x.shape[0], row_classes, column_classes, rows, columns, heads, head_dim
                    views.append(x.as_strided(shape, (b, h, w, h * dilation[0], w * dilation[1], n, d)))
                yield plan, views


def _probabilities(query: Tensor, key: Tensor, table: Tensor | None, scale: float, workspace: _Workspace) -> Tensor:
    """Softmax of the scores of a batch of (queries, head_dim) and (keys, head_dim) matrices."""
    scores = workspace.take('scores', query.shape[0], query.shape[1], key.shape[1])
    if table is not None:
        scores.view(-1, *table.shape).copy_(table)
    torch.baddbmm(scores, query, key.mT, beta=0 if table is None else 1, alpha=scale, out=scores)
    return torch.softmax(scores, -1, out=workspace.take('probabilities', *scores.shape))


def _product(a: Tensor, b: Tensor, workspace: _Workspace, name: str, scale: float = 1.0) -> Tensor:
    out = workspace.take(name, a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _no_autocast(x: Tensor):
    """The bodies compute in the dtype that they choose: an open autocast region would cast their products."""
    return torch.autocast(x.device.type, enabled=False)


@torch.library.custom_op('zoo::neighborhood_attention_tiled', mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> Tensor:
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with _no_autocast(query):
        workspace = _Workspace(query, dtype)
        tables = _Tables(bias, kernel_size, query, dtype)
        for plan, (q, k, v, o) in _problems((query, key, value, output), kernel_size, dilation):
            q = _Queries(q, plan, workspace, 'query').load()
            k = _Keys(k, plan, workspace, 'key').load()
            v = _Keys(v, plan, workspace, 'value').load()
            o = _Queries(o, plan, workspace, 'output')
            for strip, q_, k_, v_, o_ in zip(plan.strips, q.strips, k.strips, v.strips, o.strips, strict=True):
                p = _probabilities(q_, k_, tables.table(plan, strip), scale, workspace)
                torch.bmm(p, v_, out=o_)
            o.store()
    return output


@_forward.register_fake
def _(query, key, value, bias, kernel_size, dilation, scale):
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@torch.library.custom_op('zoo::neighborhood_attention_tiled_backward', mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias; empty where not `needed`. The probabilities are computed again."""
    d_query, d_key, d_value, d_bias = _empty_gradients(query, bias, needed)
    of_query, of_key, of_value, of_bias = needed
    dtype = torch.promote_types(query.dtype, torch.float32)
    with _no_autocast(query):
        workspace = _Workspace(query, dtype)
        tables = _Tables(bias, kernel_size, query, dtype)
        maps = grad, query, key, value, *(d if d.ndim == 5 else query for d in (d_query, d_key, d_value))
        for plan, (g, q, k, v, dq, dk, dv) in _problems(maps, kernel_size, dilation):
            g = _Queries(g, plan, workspace, 'grad').load()
            q = _Queries(q, plan, workspace, 'query').load()
            k = _Keys(k, plan, workspace, 'key').load()
            v = _Keys(v, plan, workspace, 'value').load()
            dq = _Queries(dq, plan, workspace, 'd_query')
            dk = _Keys(dk, plan, workspace, 'd_key').zero()
            dv = _Keys(dv, plan, workspace, 'd_value').zero()
            for i, strip in enumerate(plan.strips):
                p = _probabilities(q.strips[i], k.strips[i], tables.table(plan, strip), scale, workspace)
                if of_value:
                    dv.strips[i].add_(_product(p.mT, g.strips[i], workspace, 'product'))
                if not (of_query or of_key or of_bias):
                    continue
                dp = torch.bmm(g.strips[i], v.strips[i].mT, out=workspace.take('scores', *p.shape))
                ds = workspace.take('d_scores', *p.shape)
                torch.ops.aten._softmax_backward_data.out(dp, p, -1, dtype, grad_input=ds)
                if of_bias:
                    tables.add_gradient(plan, strip, ds)
                if of_key:
                    dk.strips[i].add_(_product(ds.mT, q.strips[i], workspace, 'product', scale))
                if of_query:
                    dq_ = dq.strips[i]
                    torch.baddbmm(dq_, ds, k.strips[i], beta=0, alpha=scale, out=dq_)
            if of_query:
                dq.store()
            if of_key:
                dk.fold()
            if of_value:
                dv.fold()
        if of_bias:
            d_bias.copy_(tables.bias_gradient().view(d_bias.shape))
    return d_query, d_key, d_value, d_bias


@_backward.register_fake
def _(grad, query, key, value, bias, kernel_size, dilation, scale, needed):
    return _empty_gradients(query, bias, needed)


def _empty_gradients(query: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(like.shape if need else 0, dtype=like.dtype, device=like.device)
        for like, need in zip((query, query, query, query if bias is None else bias), needed, strict=True)
    )


def _save(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.dilation, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    needed = list(ctx.needs_input_grad[:4])
    gradients = _backward(grad, *ctx.saved_tensors, ctx.kernel_size, ctx.dilation, ctx.scale, needed)
    return *(d if need else None for d, need in zip(gradients, needed, strict=True)), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Tensor:
    """(batch, height, width, heads, head_dim) -> same, contiguous; bias (heads, 2 * kh - 1, 2 * kw - 1).

    One custom operator, with a backward of its own that recomputes the probabilities: only the arguments are kept.
    Half precision is computed in float32.
    """
    return _forward(query, key, value, bias, kernel_size, dilation, scale)
