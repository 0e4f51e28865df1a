"""Aggregated attention in bands of rows that stay in cache: lean PyTorch, mainly for the CPU.

A band's queries meet the cells of their windows as shifted maps, one product of maps a cell, and the pooled keys as one
small dense attention, whose bias is made for the band and shared by images. Both are joined through the logarithms of
their sums. The backward computes the weights again: kept are the arguments, the output, and a number a query and head.
README.md has the derivation.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from .reference import log_length, window

CPU_CHUNK = 2**19  # numbers held at a time: 2 MiB of float32
CHUNK = 2**26  # elsewhere, where calls must be few
EPS = 1e-12  # least norm of a query or key, as in torch.nn.functional.normalize


def _limit(x: Tensor) -> int:
    return CPU_CHUNK if x.device.type == 'cpu' else CHUNK


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=EPS)


def _of_unnormalised(gradient: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Gradient of what gave x when it was divided by its norm, from that of x; the argument is used up."""
    along = (gradient * x).sum(-1, keepdim=True)
    return gradient.addcmul_(x, along, value=-1).div_(norm)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(query @ key.T + bias) @ value of planes (images, heads, n, d), and the logarithm of the sum."""
    if query.device.type == 'cpu':
        bias = bias.expand(len(query), -1, -1, -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, scale=1.0)
    scores = query @ key.mT + bias
    log_sum = scores.logsumexp(-1)
    return scores.sub_(log_sum[..., None]).exp_() @ value, log_sum


def check_indices(pooled_bias: Tensor, row_index: Tensor, column_index: Tensor) -> None:
    """IndexError, on the CPU, for an index that is not in the table."""
    indices = {'row_index': row_index, 'column_index': column_index}
    for (name, index), size in zip(indices.items(), pooled_bias.shape[1:], strict=True):
        if index.device.type == 'cpu' and index.numel() and not 0 <= index.min() <= index.max() < size:
            found = f'{index.min()}..{index.max()}'
            raise IndexError(f'aggregated_attention: {name} must be in 0..{size - 1}, got {found}')


class _Problem:
    """The inputs of a call, of at least float32, and how it is cut."""

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
        self.dtype = dtype = torch.promote_types(query.dtype, torch.float32)
        self.query, self.key, self.value, self.window_size = query, key, value, window_size
        self.batch, self.height, self.width, self.heads, self.head_dim = query.shape
        self.embedding, self.tokens, self.token_bias, self.local_bias = (
            x.to(dtype) for x in (query_embedding, learnable_tokens, learnable_bias, local_bias)
        )
        pooled_key, pooled_value = (x.to(dtype).transpose(1, 2) for x in (pooled_key, pooled_value))
        self.pooled = pooled_key.shape[2]
        self.pooled_norm = _norm(pooled_key)
        # PyTorch's fused attention on the CPU takes a head's numbers for neighbours in memory, without asking.
        self.pooled_key, self.pooled_value = (pooled_key / self.pooled_norm).contiguous(), pooled_value.contiguous()

        inside = (window(length, window_size, query.device)[1] for length in (self.height, self.width))
        self.length = log_length(*inside, self.pooled).to(dtype)[..., None, None]  # (H, W, 1, 1)
        self.temperature = temperature.to(dtype)[:, None]
        check_indices(pooled_bias, row_index, column_index)
        self.row_index, self.column_index = row_index, column_index
        self.storage: dict[str, Tensor] = {}
        self.bias_rows: slice | None = None
        # Biases of the columns of the map and of pooled keys, (heads, rows of the table, W, pooled columns).
        table = pooled_bias.to(dtype).flatten(0, 1).index_select(1, column_index.flatten())
        self.table = table.view(*pooled_bias.shape[:2], *column_index.shape)

    def bands(self) -> Iterator['_Band']:
        row = self.heads * self.width * self.head_dim
        rows = max(1, min(self.height, _limit(self.query) // row))
        images = max(1, min(self.batch, _limit(self.query) // (row * rows)))
        for first in range(0, self.height, rows):
            for image in range(0, self.batch, images):
                last_row, last_image = min(first + rows, self.height), min(image + images, self.batch)
                yield _Band(self, slice(first, last_row), slice(image, last_image))

    def strips(self, rows: slice) -> Iterator[slice]:
        """Fewer rows at a time, for scores of pooled keys."""
        step = max(1, _limit(self.query) // (self.heads * self.width * self.pooled))
        return (slice(first, min(first + step, rows.stop)) for first in range(rows.start, rows.stop, step))

    def take(self, name: str, *shape: int) -> Tensor:
        """Storage that bands share, by name, not initialised: the system takes its time to give new memory."""
        size = torch.Size(shape).numel()
        if name not in self.storage or self.storage[name].numel() < size:
            self.storage[name] = self.table.new_empty(size)
        return self.storage[name][:size].view(shape)

    def bias(self, rows: slice) -> Tensor:
        """Biases of pooled keys, (heads, pixels of some rows, pooled); they are kept until they are asked of others."""
        index = self.row_index[rows]
        bias = self.take('bias', self.heads, len(index), self.width, index.shape[1], self.column_index.shape[1])
        if self.bias_rows != rows:
            by_row = self.take('bias by row', self.heads, index.numel(), *self.column_index.shape)
            torch.index_select(self.table, 1, index.flatten(), out=by_row)
            bias.copy_(by_row.view(self.heads, *index.shape, *self.column_index.shape).transpose(2, 3))
            self.bias_rows = rows
        return bias.view(self.heads, -1, self.pooled)

    def add_bias_gradient(self, d_table: Tensor, gradient: Tensor, rows: slice) -> None:
        """Add the gradient of `bias(rows)` to that of the table."""
        pooled = self.row_index.shape[1], self.column_index.shape[1]
        gradient = gradient.view(self.heads, -1, self.width, *pooled).transpose(2, 3).flatten(1, 2)
        d_table.index_add_(1, self.row_index[rows].flatten(), gradient)


class _Band:
    """Rows of some images: their queries, and the keys that their windows reach, as (images, rows, W, heads, d).

    What there is of the cells of windows is (cells, images, rows, W, heads).
    """

    def __init__(self, problem: _Problem, rows: slice, images: slice):
        self.problem, self.images, self.rows = problem, images, rows
        radius = problem.window_size // 2
        self.key_rows = slice(max(0, rows.start - radius), min(problem.height, rows.stop + radius))
        query, key = self.of_queries(problem.query), self.of_keys(problem.key)
        self.query_norm, self.key_norm = _norm(query), _norm(key)
        self.query, self.key = query / self.query_norm, key / self.key_norm
        self.value = self.of_keys(problem.value)
        self.scale = problem.length[rows] * problem.temperature
        self.scaled = (self.query + problem.embedding).mul_(self.scale)
        self.workspace = torch.empty_like(self.query)
        self.ones = self.query.new_ones(problem.head_dim)

    def part(self, rows: slice) -> tuple[slice, slice]:
        """Where some rows of the map are in the band's."""
        return slice(None), slice(rows.start - self.rows.start, rows.stop - self.rows.start)

    def of_queries(self, maps: Tensor) -> Tensor:
        return maps[self.images, self.rows].to(self.problem.dtype).contiguous()

    def of_keys(self, maps: Tensor) -> Tensor:
        return maps[self.images, self.key_rows].to(self.problem.dtype).contiguous()

    def cells(self) -> Iterator[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        """Of each cell of a window: its number, the queries for which it is inside of the map, and its keys."""
        problem, radius = self.problem, self.problem.window_size // 2
        for cell, (down, right) in enumerate(product(range(-radius, radius + 1), repeat=2)):
            top, bottom = max(self.rows.start, -down), min(self.rows.stop, problem.height - down)
            left, end = max(0, -right), min(problem.width, problem.width - right)
            if top < bottom and left < end:
                first, first_key = self.rows.start, self.key_rows.start - down
                queries = slice(None), slice(top - first, bottom - first), slice(left, end)
                keys = slice(None), slice(top - first_key, bottom - first_key), slice(left + right, end + right)
                yield cell, queries, keys

    def products(self, queries: Tensor, keys: Tensor, outside: float = 0.0) -> Tensor:
        """Of each query with the keys of its window's cells."""
        cells = self.problem.window_size**2
        result = queries.new_full((cells, *queries.shape[:-1]), outside)
        for cell, of_queries, of_keys in self.cells():
            part = queries[of_queries]
            out = self.workspace.view(-1)[: part.numel()].view(part.shape)
            torch.mul(part, keys[of_keys], out=out)
            result[cell][of_queries] = out.view(-1, part.shape[-1]).mv(self.ones).view(part.shape[:-1])
        return result

    def add_sums(self, out: Tensor, weights: Tensor, keys: Tensor) -> None:
        """Add, for each query, the sum of its cells' keys by weights."""
        for cell, of_queries, of_keys in self.cells():
            out[of_queries].addcmul_(weights[cell][of_queries][..., None], keys[of_keys])

    def add_sums_of_keys(self, out: Tensor, weights: Tensor, queries: Tensor) -> None:
        """Add to maps, for each key of the band, the sum of the queries by the weights that it has in their windows."""
        out = out[self.images, self.key_rows]
        for cell, of_queries, of_keys in self.cells():
            out[of_keys].addcmul_(weights[cell][of_queries][..., None], queries[of_queries])

    def token_weights(self) -> Tensor:
        """What the learnable tokens add to the weights of cells."""
        flat = self.query.flatten(0, 2).transpose(0, 1)  # (heads, queries, d)
        weights = torch.baddbmm(self.problem.token_bias[:, None], flat, self.problem.tokens)
        return weights.permute(2, 1, 0).unflatten(1, self.query.shape[:3])

    def local_scores(self) -> Tensor:
        scores = self.products(self.scaled, self.key, -torch.inf)
        return scores.add_(self.problem.local_bias.T[:, None, None, None])


def _by_plane(x: Tensor) -> Tensor:
    """(..., rows, W, heads, d) as (..., heads, pixels, d), a view."""
    return x.flatten(-4, -3).transpose(-3, -2)


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
) -> tuple[Tensor, Tensor]:
    """Output, and the logarithm of the sum of each query's weights, (batch, height, width, heads)."""
    inputs = query, key, value, pooled_key, pooled_value, query_embedding, temperature, local_bias, pooled_bias
    output, log_sums = _empty_results(query)
    with torch.autocast(query.device.type, enabled=False):
        problem = _Problem(*inputs, row_index, column_index, learnable_tokens, learnable_bias, window_size)
        for band in problem.bands():
            weights = band.local_scores()
            total, out = weights.logsumexp(0), torch.empty_like(band.query)
            pooled_sums = torch.empty_like(total)
            for rows in problem.strips(band.rows):
                part = band.part(rows)
                pooled = problem.pooled_key[band.images], problem.pooled_value[band.images]
                sums, log_sum = _attend(_by_plane(band.scaled[part]), *pooled, problem.bias(rows))
                out[part], pooled_sums[part] = (
                    x.transpose(1, 2).unflatten(1, (-1, problem.width)) for x in (sums, log_sum)
                )
            total = torch.logaddexp(total, pooled_sums)
            weights = weights.sub_(total).exp_().add_(band.token_weights())
            out.mul_(pooled_sums.sub_(total).exp_()[..., None])
            band.add_sums(out, weights, band.value)
            output[band.images, band.rows] = out
            log_sums[band.images, band.rows] = total
    return output, log_sums


@torch.library.custom_op('zoo::aggregated_attention_backward', mutates_args=())
def backward(
    grad_output: Tensor,
    log_sums: Tensor,
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
        d_query, d_key, d_value = (x.new_zeros(x.shape, dtype=problem.dtype) for x in inputs[:3])
        d_pooled_key, d_pooled_value = torch.zeros_like(problem.pooled_key), torch.zeros_like(problem.pooled_value)
        d_embedding, d_temperature = torch.zeros_like(problem.embedding), torch.zeros_like(problem.temperature)
        d_tokens, d_token_bias = torch.zeros_like(problem.tokens), torch.zeros_like(problem.token_bias)
        d_local_bias, d_table = torch.zeros_like(problem.local_bias), torch.zeros_like(problem.table)
        for band in problem.bands():
            grad, log_sum = band.of_queries(grad_output), log_sums[band.images, band.rows]
            d_weights = band.products(grad, band.value)
            weights = band.local_scores().sub_(log_sum).exp_()
            # Sums of each query's weights, one but for what `_attend` rounds, and of their products with gradients.
            total, delta = weights.sum(0), (weights * d_weights).sum(0)
            d_scaled = torch.empty_like(band.query)
            for rows in problem.strips(band.rows):
                bias = problem.bias(rows)
                for image in range(len(grad)):
                    at, part = band.images.start + image, (image, *band.part(rows)[1:])
                    q, g = _by_plane(band.scaled[part]), _by_plane(grad[part])
                    log_sum_, total_, delta_ = (x[part].flatten(0, 1).T for x in (log_sum, total, delta))
                    p = torch.baddbmm(bias, q, problem.pooled_key[at].mT, out=problem.take('p', *bias.shape))
                    p.sub_(log_sum_[..., None]).exp_()
                    d_pooled_value[at].baddbmm_(p.mT, g)
                    dp = torch.bmm(g, problem.pooled_value[at].mT, out=problem.take('dp', *bias.shape))
                    ds = torch.mul(p, dp, out=problem.take('ds' if image else 'ds of images', *bias.shape))
                    delta_.add_(ds.sum(-1)).div_(total_ + p.sum(-1))
                    torch.mul(dp.sub_(delta_[..., None]), p, out=ds)
                    d_pooled_key[at].baddbmm_(ds.mT, q)
                    _by_plane(d_scaled[part]).copy_(torch.bmm(ds, problem.pooled_key[at]))
                    if image:
                        problem.take('ds of images', *bias.shape).add_(ds)
                problem.add_bias_gradient(d_table, problem.take('ds of images', *bias.shape), rows)

            d_scores = weights * (d_weights - delta)
            band.add_sums(d_scaled, d_scores, band.key)
            band.add_sums_of_keys(d_key, d_scores, band.scaled)
            band.add_sums_of_keys(d_value, weights.add_(band.token_weights()), grad)
            d_local_bias += d_scores.sum((1, 2, 3)).T
            d_token_bias += d_weights.sum((1, 2, 3)).T
            flat, of_cells = (x.flatten(0, 2).transpose(0, 1) for x in (band.query, d_weights.permute(1, 2, 3, 4, 0)))
            d_tokens.baddbmm_(flat.mT, of_cells)
            embedded = band.query + problem.embedding
            along = (d_scaled * embedded).sum(-1, keepdim=True).mul_(problem.length[band.rows])
            d_temperature += along.sum((0, 1, 2))
            d_scaled.mul_(band.scale)
            d_embedding += d_scaled.sum((0, 1, 2))
            d_scaled.flatten(0, 2).transpose(0, 1).baddbmm_(of_cells, problem.tokens.mT)
            d_query[band.images, band.rows] = _of_unnormalised(d_scaled, band.query, band.query_norm)
        key_norm = _norm(key.to(problem.dtype))
        d_key = _of_unnormalised(d_key, key / key_norm, key_norm)
        d_pooled_key = _of_unnormalised(d_pooled_key, problem.pooled_key, problem.pooled_norm)
        d_pooled_bias = pooled_bias.new_zeros(pooled_bias.shape, dtype=problem.dtype)
        d_pooled_bias.flatten(0, 1).index_add_(1, column_index.flatten(), d_table.flatten(2).flatten(0, 1))
        gradients = (
            d_query,
            d_key,
            d_value,
            d_pooled_key.transpose(1, 2),
            d_pooled_value.transpose(1, 2),
            d_embedding,
            d_temperature[:, 0],
            d_local_bias,
            d_pooled_bias,
            d_tokens,
            d_token_bias,
        )
        likes = *inputs, learnable_tokens, learnable_bias
        return [x.to(like.dtype).contiguous() for x, like in zip(gradients, likes, strict=True)]


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(query.shape[:-1], dtype=dtype, device=query.device),
    )


@forward.register_fake
def _(query, *arguments):
    return _empty_results(query)


@backward.register_fake
def _(grad_output, log_sums, *arguments):
    *floating, _, _, tokens, bias, _ = arguments
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (*floating, tokens, bias)]


def _save(ctx, inputs, output):
    *tensors, ctx.window_size = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _differentiate(ctx, grad_output, _):
    *floating, tokens, bias = backward(grad_output, *ctx.saved_tensors, ctx.window_size)
    return *floating, None, None, tokens, bias, None


forward.register_autograd(_differentiate, setup_context=_save)


def aggregated_attention(*arguments) -> Tensor:
    """The arguments and the result of `reference.aggregated_attention`.

    One custom operator with a backward of its own. Half precision is computed in float32.
    """
    return forward(*arguments)[0]


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
