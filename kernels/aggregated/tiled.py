"""Aggregated attention in column tiles and strips: lean PyTorch made of batched matrix products, for the CPU.

Maps are laid out once as column tiles, each with the columns that its queries' windows reach, row after row, so that
the keys of a strip of query rows are consecutive in memory and a strip is one small dense product. Of its scores only
the band of the windows counts, which is a strided view; it is joined with the scores of the pooled tokens for one
softmax. The backward computes the weights again: nothing is kept but the inputs. README.md has the derivation.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import log_length

CPU_CHUNK = 2**19  # scores held at a time: 2 MiB of float32
CHUNK = 2**26  # elsewhere, where calls must be few
EPS = 1e-12  # least norm of a query or key, as in torch.nn.functional.normalize


class Tile(NamedTuple):
    """Rows and columns of the queries of one product."""

    rows: int
    columns: int


@lru_cache(maxsize=256)
def _tile(height: int, width: int, radius: int) -> Tile:
    """The cheapest of some tiles, by the queries and scores that they compute for nothing; the weights are measured."""

    def cost(tile: Tile) -> int:
        queries = -(-(height + radius) // tile.rows) * -(-width // tile.columns) * tile.rows * tile.columns
        return queries * (120 + (tile.rows + 2 * radius) * (tile.columns + 2 * radius))

    rows = (max(2 * radius, side) for side in (2, 3, 4, 5))  # a strip's keys reach into one other strip
    return min((Tile(*sides) for sides in product(rows, (4, 5, 7, 8))), key=cost)


class Chunk(NamedTuple):
    """Work of one turn, a consecutive part of the column tiles of all heads and images; a plane is an image's head."""

    heads: slice
    images: int
    planes: slice
    columns: slice  # column tiles of each plane
    tiles: slice  # the same among those of all planes

    def planes_of(self, x: Tensor) -> Tensor:
        """Part of (planes, ...)."""
        return x[self.planes]

    def rows_of(self, x: Tensor) -> Tensor:
        """Part of tiles (heads, images, column tiles, rows, columns, d) as (planes, rows, d)."""
        return x.view(-1, *x.shape[3:])[self.tiles].view(self.planes.stop - self.planes.start, -1, x.shape[-1])

    def by_head(self, x: Tensor) -> Tensor:
        """(planes, ...) as (heads, images, ...)."""
        return x.view(-1, self.images, *x.shape[1:])

    def per_head(self, x: Tensor) -> Tensor:
        """Part of a parameter (heads, ...), which images share, as (planes, ...)."""
        x = x[self.heads, None]
        return x.expand(-1, self.images, *x.shape[2:]).flatten(0, 1)


class _Layout:
    """Where queries and keys lie, and how the work is cut.

    Rows of queries are padded to whole strips; there are at least `radius` rows more than the map has, so that keys
    below a column tile are the zeros above the next one, and all strips of all tiles are one batch of equal strides.
    """

    def __init__(self, query: Tensor, pooled: int, window_size: int):
        self.batch, self.height, self.width, self.heads, self.head_dim = query.shape
        self.query, self.pooled, self.window_size = query, pooled, window_size
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.radius = window_size // 2
        self.tile = _tile(self.height, self.width, self.radius)
        self.strips = -(-(self.height + self.radius) // self.tile.rows)  # of a column tile
        self.columns = -(-self.width // self.tile.columns)  # column tiles
        self.rows = self.strips * self.tile.rows  # of a column tile, padding included
        self.span = self.tile.columns + 2 * self.radius  # key columns of a tile
        self.queries = self.tile.rows * self.tile.columns  # of a strip
        self.keys = (self.tile.rows + 2 * self.radius) * self.span  # of a strip
        self.local = window_size**2
        self.scores = self.local + pooled  # of a query
        self.workspace: dict[str, Tensor] = {}

    # --- maps <-> tiles

    def _runs(self, radius: int) -> Iterator[tuple[int, int, int, int]]:
        """(first tile, last + 1, first column, last + 1): consecutive tiles with the same columns inside of the map.

        Tiles reach `radius` columns over their own.
        """
        step, span = self.tile.columns, self.tile.columns + 2 * radius

        def inside(tile):
            return max(0, radius - tile * step), min(span, self.width + radius - tile * step)

        first = 0
        for i in range(1, self.columns + 1):
            if i == self.columns or inside(i) != inside(first):
                yield first, i, *inside(first)
                first = i

    def _on_maps(self, maps: Tensor, radius: int, first: int, last: int, left: int, right: int) -> Tensor:
        """Columns `left` to `right` of tiles on maps (B, H, W, heads, d): (heads, B, tiles, H, columns, d), a view."""
        step = self.tile.columns
        column = first * step - radius + left
        part = maps[:, :, column : column + (last - first - 1) * step + right - left]
        return part.unfold(2, right - left, step).permute(3, 0, 2, 1, 5, 4)

    def _load(self, tiles: Tensor, radius: int, maps: Tensor, divisor: Tensor | None) -> None:
        """Fill tiles (heads, B, column tiles, rows, columns, d) from maps, with zeros outside of them."""
        tiles[:, :, :, :radius].zero_()
        tiles[:, :, :, radius + self.height :].zero_()
        tiles = tiles[:, :, :, radius : radius + self.height]
        for first, last, left, right in self._runs(radius):
            tiles[:, :, first:last, ..., :left, :].zero_()
            tiles[:, :, first:last, ..., right:, :].zero_()
            out = tiles[:, :, first:last, ..., left:right, :]
            part = self._on_maps(maps, radius, first, last, left, right)
            if divisor is None:
                out.copy_(part)
            else:
                torch.div(part, self._on_maps(divisor, radius, first, last, left, right), out=out)

    def new_queries(self) -> Tensor:
        """(heads, batch, column tiles, rows, columns, d), not initialised."""
        shape = self.heads, self.batch, self.columns, self.rows, self.tile.columns, self.head_dim
        return self.query.new_empty(shape, dtype=self.dtype)

    def queries_of(self, maps: Tensor, divisor: Tensor | None = None) -> Tensor:
        """Maps, divided by `divisor`, by tile, and zeros where the map has no pixels."""
        tiles = self.new_queries()
        self._load(tiles, 0, maps, divisor)
        return tiles

    def query_maps(self, tiles: Tensor, divisor: Tensor | None = None) -> Tensor:
        """Tiles of queries as maps of the query's dtype, divided by `divisor`."""
        maps = torch.empty(self.query.shape, dtype=self.query.dtype, device=self.query.device)
        for first, last, left, right in self._runs(0):
            part = self._on_maps(maps, 0, first, last, left, right)
            tile = tiles[:, :, first:last, : self.height, left:right]
            if divisor is None:
                part.copy_(tile)
            else:
                torch.div(tile, self._on_maps(divisor, 0, first, last, left, right), out=part)
        return maps

    def new_keys(self) -> tuple[Tensor, Tensor]:
        """Rows of keys of all column tiles, (rows, columns, d), and the same as (heads, batch, column tiles, ...).

        Not initialised. Strips reach into the rows of the next tile, which are zeros there, or after the last.
        """
        shape = self.heads, self.batch, self.columns, self.rows, self.span, self.head_dim
        count = torch.Size(shape[:4]).numel()
        rows = self.query.new_empty(count + 2 * self.radius, *shape[4:], dtype=self.dtype)
        rows[count:].zero_()
        return rows, rows[:count].view(shape)

    def keys_of(self, maps: Tensor, divisor: Tensor | None = None) -> Tensor:
        """Maps, divided by `divisor`, by tile with all that its windows reach and zeros around, for `strips_of`."""
        rows, tiles = self.new_keys()
        self._load(tiles, self.radius, maps, divisor)
        return rows

    def key_maps(self, tiles: Tensor) -> Tensor:
        """The transpose of `keys_of`: what tiles share is added."""
        maps = torch.zeros(self.query.shape, dtype=self.dtype, device=self.query.device)
        tiles = tiles[:, :, :, self.radius : self.radius + self.height]
        for first, last, start, stop in self._runs(self.radius):
            for left in range(start, stop, self.tile.columns):  # pieces that do not overlap
                right = min(left + self.tile.columns, stop)
                part = self._on_maps(maps, self.radius, first, last, left, right)
                part.add_(tiles[:, :, first:last, :, left:right])
        return maps

    # --- strips of a chunk

    def chunks(self) -> Iterator[Chunk]:
        """All work, in an order in which heads, and images of a head, can share what they have in common."""
        limit = CPU_CHUNK if self.query.device.type == 'cpu' else CHUNK
        column = self.rows * self.tile.columns * self.scores
        columns = min(self.columns, max(1, limit // column))
        images = heads = 1
        if columns == self.columns:
            images = max(1, min(self.batch, limit // (columns * column)))
            if images == self.batch:
                heads = min(self.heads, limit // (images * columns * column) or 1)
        for column in range(0, self.columns, columns):
            last_column = min(column + columns, self.columns)
            for head in range(0, self.heads, heads):
                last_head = min(head + heads, self.heads)
                for image in range(0, self.batch, images):
                    last_image = min(image + images, self.batch)
                    first, last = head * self.batch + image, (last_head - 1) * self.batch + last_image
                    yield Chunk(
                        slice(head, last_head),
                        last_image - image,
                        slice(first, last),
                        slice(column, last_column),
                        slice(first * self.columns + column, (last - 1) * self.columns + last_column),
                    )

    def strips_of(self, rows: Tensor, chunk: Chunk) -> Tensor:
        """Keys of the strips of a chunk, (strips, keys, d): a view in which strips overlap."""
        size = self.tile.rows * self.span * self.head_dim  # of a strip without what it shares with the next
        count = (chunk.tiles.stop - chunk.tiles.start) * self.strips
        shape, strides = (count, self.keys, self.head_dim), (size, self.head_dim, 1)
        return rows.as_strided(shape, strides, chunk.tiles.start * self.strips * size)

    def fold_strips(self, rows: Tensor, chunk: Chunk, strips: Tensor) -> None:
        """Write the sum of `strips`, as of `strips_of`, to `rows`."""
        own = self.tile.rows * self.span
        rows = rows[chunk.tiles.start * self.rows : chunk.tiles.stop * self.rows].view(-1, own, self.head_dim)
        rows.copy_(strips[:, :own])
        rows[1:, : self.keys - own].add_(strips[:-1, own:])

    def band(self, scores: Tensor) -> Tensor:
        """The windows' scores in those of strips: a view (strips, tile rows, tile columns, window, window)."""
        columns, size = self.tile.columns, self.window_size
        shape = len(scores), self.tile.rows, columns, size, size
        strides = self.queries * self.keys, columns * self.keys + self.span, self.keys + 1, self.span, 1
        return scores.as_strided(shape, strides)

    def by_strip(self, rows: Tensor) -> Tensor:
        """(planes, rows, d) as (strips, queries, d)."""
        return rows.view(-1, self.queries, rows.shape[-1])

    def windows(self, x: Tensor) -> Tensor:
        """(planes, rows, local) in the shape of `band`: a view."""
        return x.view(-1, self.tile.rows, self.tile.columns, self.window_size, self.window_size)

    def take(self, name: str, *shape: int, zero: bool = False) -> Tensor:
        """Storage that chunks share, by name: zero at first, or not initialised."""
        size = torch.Size(shape).numel()
        if name not in self.workspace or self.workspace[name].numel() < size:
            make = self.query.new_zeros if zero else self.query.new_empty
            self.workspace[name] = make(size, dtype=self.dtype)
        return self.workspace[name][:size].view(shape)


class _Problem:
    """The inputs of a call in their layouts, and the weights of a chunk."""

    def __init__(
        self,
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
    ):
        self.layout = layout = _Layout(query, pooled_key.shape[1], window_size)
        dtype, device = layout.dtype, query.device
        self.query_norm, self.key_norm = _norm(query, dtype), _norm(key, dtype)  # (B, H, W, heads, 1)
        self.query = layout.queries_of(query, self.query_norm)
        self.key = layout.keys_of(key, self.key_norm)
        self.value = layout.keys_of(value)
        # (planes, scores, d): zero rows stand for the windows, so that products make whole rows of scores.
        shape = layout.heads, layout.batch, layout.scores, layout.head_dim
        pooled_maps = [query.new_zeros(shape, dtype=dtype) for _ in range(2)]
        self.pooled_norm = _norm(pooled_key, dtype)
        pooled_maps[0][:, :, layout.local :] = (pooled_key / self.pooled_norm).permute(2, 0, 1, 3)
        pooled_maps[1][:, :, layout.local :] = pooled_value.permute(2, 0, 1, 3)
        self.pooled_key, self.pooled_value = (x.flatten(0, 1) for x in pooled_maps)
        self.embedding, self.temperature, self.tokens, self.token_bias = (
            x.to(dtype) for x in (query_embedding, temperature, learnable_tokens, learnable_bias)
        )

        offsets = torch.arange(window_size, device=device) - layout.radius
        y = torch.arange(layout.rows, device=device)  # beyond the map too, as x
        x = torch.arange(layout.columns * layout.tile.columns, device=device)
        key_y, key_x = y[:, None] + offsets, x[:, None] + offsets
        rows, columns = (key_y >= 0) & (key_y < layout.height), (key_x >= 0) & (key_x < layout.width)
        length = self._by_tile(log_length(rows, columns, layout.pooled).to(dtype).T).mT.flatten(1)
        self.length = length  # (column tiles, rows)
        inside = (rows[:, None, :, None] & self._by_tile(columns)[:, None, :, None]).flatten(-2).flatten(1, 2)
        bias = local_bias.to(dtype)[:, None, None]
        self.local_bias = bias.where(inside, -torch.inf)  # (heads, column tiles, rows, local)
        self.pooled_bias = pooled_bias.to(dtype).flatten(1)
        self.row_index = row_index[y.clamp(max=layout.height - 1)] * pooled_bias.shape[2]
        self.column_index = self._by_tile(column_index[x.clamp(max=layout.width - 1)])
        self.shared: dict[str, tuple[tuple, Tensor]] = {}

    def _by_tile(self, x: Tensor) -> Tensor:
        """(columns, ...) as (column tiles, columns of a tile, ...)."""
        return x.unflatten(0, (self.layout.columns, self.layout.tile.columns))

    def bias_index(self, chunk: Chunk) -> Tensor:
        """Flat places in the table of biases of the scores of pooled tokens, (rows * pooled), shared by heads."""
        if self.shared.get('index', (None,))[0] != chunk.columns:
            rows, columns = self.row_index[:, None, :, None], self.column_index[chunk.columns][:, None, :, None]
            self.shared['index'] = chunk.columns, (rows + columns).flatten()
        return self.shared['index'][1]

    def pooled_biases(self, chunk: Chunk) -> Tensor:
        """Biases of the scores of pooled tokens, (heads, 1, rows, pooled), shared by images."""
        if self.shared.get('bias', (None,))[0] != (chunk.heads, chunk.columns):
            index = self.bias_index(chunk)
            bias = self.layout.take('bias', chunk.heads.stop - chunk.heads.start, len(index))
            for table, out in zip(self.pooled_bias[chunk.heads], bias, strict=True):
                torch.index_select(table, 0, index, out=out)
            self.shared['bias'] = (chunk.heads, chunk.columns), bias.view(len(bias), 1, -1, self.layout.pooled)
        return self.shared['bias'][1]

    def scale(self, chunk: Chunk) -> Tensor:
        """Length scale of the queries, (rows)."""
        return self.length[chunk.columns].flatten()

    def embedded_query(self, chunk: Chunk) -> Tensor:
        """(planes, rows, d), not scaled."""
        q = chunk.rows_of(self.query)
        return torch.add(q, chunk.per_head(self.embedding)[:, None], out=self.layout.take('embedded', *q.shape))

    def scaled(self, x: Tensor, chunk: Chunk, name: str) -> Tensor:
        """x (planes, rows, d) by length scale and temperature."""
        scale = chunk.per_head(self.temperature)[:, None, None] * self.scale(chunk)[:, None]
        return torch.mul(x, scale, out=self.layout.take(name, *x.shape))

    def probabilities(self, chunk: Chunk, query: Tensor) -> Tensor:
        """(planes, rows, scores)"""
        local = self.layout.local
        scores, windows = self.products('scores', chunk, query, self.key, self.pooled_key)
        by_head = chunk.by_head(scores)
        local_bias = self.local_bias[chunk.heads, None, chunk.columns].flatten(2, 3)
        torch.add(chunk.by_head(windows), local_bias, out=by_head[..., :local])
        by_head[..., local:].add_(self.pooled_biases(chunk))
        return torch.softmax(scores, -1, out=self.layout.take('probabilities', *scores.shape))

    def products(self, name: str, chunk: Chunk, queries: Tensor, keys: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Products of each query with the pooled keys and with the keys of its window.

        The former are (planes, rows, scores), in which there is place for the others, (planes, rows, local).
        """
        layout = self.layout
        out = layout.take(name, *queries.shape[:2], layout.scores)
        torch.bmm(queries, chunk.planes_of(pooled).mT, out=out)
        strips = layout.by_strip(queries)
        products = layout.take('products', len(strips), layout.queries, layout.keys)
        torch.bmm(strips, layout.strips_of(keys, chunk).mT, out=products)
        windows = layout.take('windows', *queries.shape[:2], layout.local)
        layout.windows(windows).copy_(layout.band(products))
        return out, windows

    def banded(self, windows: Tensor) -> Tensor:
        """(planes, rows, local) as matrices (strips, queries, keys), zero outside of the windows."""
        layout = self.layout
        strips = windows.shape[0] * windows.shape[1] // layout.queries
        out = layout.take('banded', strips, layout.queries, layout.keys, zero=True)
        layout.band(out).copy_(layout.windows(windows))
        return out

    def sums(self, chunk: Chunk, banded: Tensor, rows: Tensor, keys: Tensor, pooled: Tensor, out: Tensor) -> Tensor:
        """Write to out (planes, rows, d): sums of keys weighted by `banded`, and of pooled ones by `rows`."""
        torch.bmm(rows, chunk.planes_of(pooled), out=out)
        self.layout.by_strip(out).baddbmm_(banded, self.layout.strips_of(keys, chunk))
        return out

    def local_weights(self, chunk: Chunk, probabilities: Tensor) -> Tensor:
        """(planes, rows, local): probabilities and what the learnable tokens add to them."""
        q = chunk.rows_of(self.query)
        weights = self.layout.take('weights', *q.shape[:2], self.layout.local)
        torch.baddbmm(chunk.per_head(self.token_bias)[:, None], q, chunk.per_head(self.tokens), out=weights)
        return weights.add_(probabilities[..., : self.layout.local])


def _norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).clamp_(min=EPS)


def _of_unnormalised(gradient: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Gradient of x from that of x / norm."""
    x = x.to(gradient.dtype)
    along = (gradient * x).sum(-1, keepdim=True) / norm**2
    return gradient.addcmul(x, along, value=-1).div_(norm)


@torch.library.custom_op('zoo::aggregated_attention', mutates_args=())
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pooled_bias: Tensor,
    row_index: Tensor,
    column_index: Tensor,
    learnable_tokens: Tensor,
    learnable_bias: Tensor,
    window_size: int,
) -> Tensor:
    inputs = query, key, value, pooled_key, pooled_value, query_embedding, temperature, local_bias, pooled_bias
    with torch.autocast(query.device.type, enabled=False):
        problem = _Problem(*inputs, row_index, column_index, learnable_tokens, learnable_bias, window_size)
        output = problem.layout.new_queries()
        for chunk in problem.layout.chunks():
            q = problem.scaled(problem.embedded_query(chunk), chunk, 'query')
            p = problem.probabilities(chunk, q)
            weights = problem.banded(problem.local_weights(chunk, p))
            problem.sums(chunk, weights, p, problem.value, problem.pooled_value, chunk.rows_of(output))
        return problem.layout.query_maps(output)


@torch.library.custom_op('zoo::aggregated_attention_backward', mutates_args=())
def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pooled_bias: Tensor,
    row_index: Tensor,
    column_index: Tensor,
    learnable_tokens: Tensor,
    learnable_bias: Tensor,
    window_size: int,
) -> list[Tensor]:
    """Gradients of the floating inputs, in order."""
    inputs = query, key, value, pooled_key, pooled_value, query_embedding, temperature, local_bias, pooled_bias
    with torch.autocast(query.device.type, enabled=False):
        problem = _Problem(*inputs, row_index, column_index, learnable_tokens, learnable_bias, window_size)
        layout = problem.layout
        local, d_query = layout.local, layout.new_queries()
        grads = layout.queries_of(grad_output)
        (d_keys, d_key), (d_values, d_value) = layout.new_keys(), layout.new_keys()
        d_pooled_key, d_pooled_value = torch.zeros_like(problem.pooled_key), torch.zeros_like(problem.pooled_value)
        d_embedding, d_temperature = torch.zeros_like(problem.embedding), torch.zeros_like(problem.temperature)
        d_tokens, d_token_bias = torch.zeros_like(problem.tokens), torch.zeros_like(problem.token_bias)
        d_local_bias, d_pooled_bias = torch.zeros_like(problem.token_bias), torch.zeros_like(problem.pooled_bias)
        for chunk in layout.chunks():
            heads = chunk.heads
            g, q_hat, dq = (chunk.rows_of(x) for x in (grads, problem.query, d_query))
            embedded = problem.embedded_query(chunk)
            q = problem.scaled(embedded, chunk, 'query')
            p = problem.probabilities(chunk, q)

            weights = problem.banded(problem.local_weights(chunk, p))
            strips = layout.take('strips', len(weights), layout.keys, layout.head_dim)
            layout.fold_strips(d_values, chunk, torch.bmm(weights.mT, layout.by_strip(g), out=strips))
            chunk.planes_of(d_pooled_value).baddbmm_(p.mT, g)

            dp, dw = problem.products('gradients', chunk, g, problem.value, problem.pooled_value)
            dp[..., :local] = dw
            d_tokens[heads] += chunk.by_head(torch.bmm(q_hat.mT, dw)).sum(1)
            d_token_bias[heads] += chunk.by_head(dw).sum((1, 2))

            ds = layout.take('scores', *p.shape)
            torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=ds)
            shared = chunk.by_head(ds)
            shared = shared.sum(1) if chunk.images > 1 else shared[:, 0]  # (heads, rows, scores)
            d_local_bias[heads] += shared[..., :local].sum(1)
            index = problem.bias_index(chunk)
            for table, part in zip(d_pooled_bias[heads], shared[..., local:], strict=True):
                table.index_add_(0, index, part.flatten())
            chunk.planes_of(d_pooled_key).baddbmm_(ds.mT, q)
            weights = problem.banded(layout.take('weights', *dw.shape).copy_(ds[..., :local]))
            layout.fold_strips(d_keys, chunk, torch.bmm(weights.mT, layout.by_strip(q), out=strips))

            problem.sums(chunk, weights, ds, problem.key, problem.pooled_key, dq)
            by_row = chunk.by_head(torch.mul(dq, embedded, out=embedded)).sum((1, 3))  # (heads, rows)
            d_temperature[heads] += by_row @ problem.scale(chunk)
            dq.copy_(problem.scaled(dq, chunk, 'query'))
            d_embedding[heads] += chunk.by_head(dq).sum((1, 2))
            dq.baddbmm_(dw, chunk.per_head(problem.tokens).mT)
            along = torch.mul(dq, q_hat, out=embedded).sum(-1, keepdim=True)
            dq.addcmul_(q_hat, along, value=-1)

        by_plane = layout.heads, layout.batch
        d_pooled_key, d_pooled_value = (x.unflatten(0, by_plane) for x in (d_pooled_key, d_pooled_value))
        d_pooled_key, d_pooled_value = (x[:, :, local:].permute(1, 2, 0, 3) for x in (d_pooled_key, d_pooled_value))
        gradients = (
            layout.query_maps(d_query, problem.query_norm),
            _of_unnormalised(layout.key_maps(d_key), key, problem.key_norm),
            layout.key_maps(d_value),
            _of_unnormalised(d_pooled_key, pooled_key, problem.pooled_norm),
            d_pooled_value,
            d_embedding,
            d_temperature,
            d_local_bias,
            d_pooled_bias.view(pooled_bias.shape),
            d_tokens,
            d_token_bias,
        )
        likes = *inputs, learnable_tokens, learnable_bias
        return [x.to(like.dtype).contiguous() for x, like in zip(gradients, likes, strict=True)]


@forward.register_fake
def _(query, *arguments):
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@backward.register_fake
def _(grad_output, *arguments):
    *floating, _, _, tokens, bias, _ = arguments
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (*floating, tokens, bias)]


def _save(ctx, inputs, output):
    *tensors, ctx.window_size = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_output):
    *floating, tokens, bias = backward(grad_output, *ctx.saved_tensors, ctx.window_size)
    return *floating, None, None, tokens, bias, None


forward.register_autograd(_differentiate, setup_context=_save)


def aggregated_attention(*arguments) -> Tensor:
    """The arguments and the result of `reference.aggregated_attention`.

    One custom operator with a backward of its own: only the arguments are kept. Half precision is computed in float32.
    """
    return forward(*arguments)


# --- position bias


def _by_rows(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and the hidden units of these rows and all columns, of at least float32."""
    limit = CPU_CHUNK if rows.device.type == 'cpu' else CHUNK
    step = max(1, limit // max(1, columns.numel()))
    dtype = torch.promote_types(rows.dtype, torch.float32)
    columns = columns.to(dtype)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        yield part, (rows[part, None] + columns).relu_()


@torch.library.custom_op('zoo::position_bias', mutates_args=())
def position_bias_forward(rows: Tensor, columns: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = rows.new_empty(len(weight), len(rows), len(columns))
    with torch.autocast(rows.device.type, enabled=False):
        for part, hidden in _by_rows(rows, columns):
            product = weight.to(hidden.dtype) @ hidden.flatten(0, 1).mT
            torch.add(product, bias[:, None], out=out[:, part].flatten(1))
    return out


@torch.library.custom_op('zoo::position_bias_backward', mutates_args=())
def position_bias_backward(
    grad_output: Tensor, rows: Tensor, columns: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    d_rows, d_columns, d_weight = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (rows, columns, weight))
    with torch.autocast(rows.device.type, enabled=False):
        for part, hidden in _by_rows(rows, columns):
            grad = grad_output[:, part].flatten(1).to(dtype)  # (heads, rows * columns)
            d_weight.addmm_(grad, hidden.flatten(0, 1))
            d_hidden = (grad.mT @ weight.to(dtype)).view(hidden.shape)
            d_hidden = torch.ops.aten.threshold_backward(d_hidden, hidden, 0)
            d_rows[part] = d_hidden.sum(1)
            d_columns += d_hidden.sum(0)
    d_bias = grad_output.sum((1, 2), dtype=dtype)
    return d_rows.to(rows.dtype), d_columns.to(rows.dtype), d_weight.to(rows.dtype), d_bias.to(rows.dtype)


@position_bias_forward.register_fake
def _(rows, columns, weight, bias):
    return rows.new_empty(weight.shape[0], rows.shape[0], columns.shape[0])


@position_bias_backward.register_fake
def _(grad_output, rows, columns, weight):
    return *(x.new_empty(x.shape) for x in (rows, columns, weight)), weight.new_empty(weight.shape[0])


def _save_for_position_bias(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _differentiate_position_bias(ctx, grad_output):
    return position_bias_backward(grad_output, *ctx.saved_tensors)


position_bias_forward.register_autograd(_differentiate_position_bias, setup_context=_save_for_position_bias)


def position_bias(rows: Tensor, columns: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`reference.position_bias` in chunks that stay in cache; the backward computes the hidden units again."""
    return position_bias_forward(rows, columns, weight, bias)
