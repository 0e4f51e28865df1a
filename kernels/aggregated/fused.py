"""Aggregated attention for torch.compile: the softmax over all keys is an operator, all around it the compiler fuses.

The operator has the scores of pooled keys a few rows of the map at a time, in one softmax with those of the windows,
which it is given. Its backward computes the probabilities again. README.md has the derivation.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import log_length, window
from .tiled import check_indices

CPU_CHUNK = 2**18  # scores that are held at a time: 1 MiB of float32
CHUNK = 2**26  # elsewhere, where calls must be few
ALIGNMENT = 16  # a query has a multiple of it of scores, whole vectors; the last of them are of no keys


def aggregated_attention(
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
    """The arguments and the result of `reference.aggregated_attention`. Half precision is computed in float32.

    Not for eager mode, where it keeps a map for each cell of the windows.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype).permute(0, 3, 1, 2, 4) for x in (query, key, value))  # (B, heads, H, W, d)
    pooled_k, pooled_v = (x.to(dtype).transpose(1, 2) for x in (pooled_key, pooled_value))
    embedding, temperature, tokens = (x.to(dtype) for x in (query_embedding, temperature, learnable_tokens))
    local_bias, pooled_bias, token_bias = (x.to(dtype) for x in (local_bias, pooled_bias, learnable_bias))
    q, k, pooled_k = (F.normalize(x, dim=-1) for x in (q, k, pooled_k))

    height, width = query.shape[1:3]
    rows, columns = (window(length, window_size, query.device)[1] for length in (height, width))
    inside = (rows[:, None, :, None] & columns[:, None]).flatten(2)  # (H, W, cells)
    length = log_length(rows, columns, pooled_key.shape[1]).to(dtype)[..., None]
    scaled = (q + embedding[:, None, None]) * (temperature[:, None, None, None] * length)

    margin = window_size // 2
    keys, values = (F.pad(x, (0, 0, margin, margin, margin, margin)) for x in (k, v))
    shifts = list(product(range(window_size), repeat=2))
    keys, values = (
        [x[:, :, down : down + height, right : right + width] for down, right in shifts] for x in (keys, values)
    )
    local = torch.stack([(scaled * of_cell).sum(-1) for of_cell in keys], -1)  # (B, heads, H, W, cells)
    local = (local + local_bias[:, None, None]).masked_fill(~inside, -torch.inf)
    maps_and_pooled = (x.contiguous() for x in (scaled, local, pooled_k, pooled_v))
    out, weights = joint_softmax(*maps_and_pooled, pooled_bias, row_index, column_index)
    weights = weights + (q.flatten(2, 3) @ tokens).unflatten(2, (height, width)) + token_bias[:, None, None]
    out = out + sum(weight[..., None] * of_cell for weight, of_cell in zip(weights.unbind(-1), values, strict=True))
    return out.permute(0, 2, 3, 1, 4).to(query.dtype).contiguous()


class _Scores:
    """The scores of the queries of some rows of some images, and the storage that these strips share.

    Maps are (B, heads, H, W, d), and of cells of windows (B, heads, H, W, cells). A query has scores of the pooled
    keys, then of its cells, then of no keys.
    """

    def __init__(
        self,
        scaled: Tensor,
        local: Tensor,
        pooled_key: Tensor,
        pooled_bias: Tensor,
        row_index: Tensor,
        column_index: Tensor,
    ):
        self.scaled, self.local, self.pooled_key = scaled, local, pooled_key
        self.pooled = pooled_key.shape[2]
        self.cells = slice(self.pooled, self.pooled + local.shape[-1])
        self.columns = -(-self.cells.stop // ALIGNMENT) * ALIGNMENT
        check_indices(pooled_bias, row_index, column_index)
        self.row_index, self.column_index = row_index, column_index
        # Biases of the columns of the map and of pooled keys, (heads, rows of the table, W, pooled columns).
        table = pooled_bias.flatten(0, 1).index_select(1, column_index.flatten())
        self.table = table.view(*pooled_bias.shape[:2], *column_index.shape)
        self.storage: dict[str, Tensor] = {}

    def strips(self) -> Iterator[tuple[slice, slice, slice]]:
        """Indices of maps: images, all heads, rows."""
        batch, heads, height, width, _ = self.scaled.shape
        limit = (CPU_CHUNK if self.scaled.device.type == 'cpu' else CHUNK) // (heads * width * self.columns)
        rows = max(1, min(height, limit))
        images = max(1, min(batch, limit // rows))
        for row, image in product(range(0, height, rows), range(0, batch, images)):
            yield slice(image, image + images), slice(None), slice(row, min(row + rows, height))

    def take(self, name: str, *shape: int) -> Tensor:
        """Storage by name, not initialised: the system takes its time to give new memory."""
        size = torch.Size(shape).numel()
        if name not in self.storage or self.storage[name].numel() < size:
            self.storage[name] = self.table.new_empty(size)
        return self.storage[name][:size].view(shape)

    def by_row(self, index: Tensor) -> Tensor:
        """Storage for biases in the order of the table: (heads, rows, pooled rows, W, pooled columns)."""
        return self.take('by row', len(self.table), *index.shape, *self.column_index.shape)

    def probabilities(self, strip: tuple[slice, ...]) -> Tensor:
        """(images, heads, rows, W, columns), in storage of that name; that of 'scores' is free again."""
        local, index = self.local[strip], self.row_index[strip[2]]
        bias = self.by_row(index)
        torch.index_select(self.table, 1, index.flatten(), out=bias.flatten(1, 2))
        bias = bias.transpose(2, 3)
        scores = self.take('scores', *local.shape[:-1], self.columns)
        scores[..., : self.pooled].unflatten(-1, bias.shape[3:]).copy_(bias)
        scores[..., self.cells] = local
        scores[..., self.cells.stop :] = -torch.inf
        of_pooled = planes(scores)[..., : self.pooled]
        of_pooled.baddbmm_(planes(self.scaled[strip]), self.pooled_key[strip[0]].flatten(0, 1).mT)
        return torch.softmax(scores, -1, out=self.take('probabilities', *scores.shape))

    def add_bias_gradient(self, d_table: Tensor, d_scores: Tensor, strip: tuple[slice, ...]) -> None:
        index = self.row_index[strip[2]]
        d_bias = d_scores[..., : self.pooled].unflatten(-1, (index.shape[1], -1)).transpose(3, 4)
        by_row = self.by_row(index).copy_(d_bias[0])
        for of_image in d_bias[1:]:
            by_row.add_(of_image)
        d_table.index_add_(1, index.flatten(), by_row.flatten(1, 2))


def planes(x: Tensor) -> Tensor:
    """(images, heads, rows, W, d) as (images * heads, pixels, d): of a strip of a contiguous map a view."""
    return x.flatten(2, 3).flatten(0, 1)


@torch.library.custom_op('zoo::joint_softmax', mutates_args=())
def joint_softmax(
    scaled: Tensor,
    local: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    pooled_bias: Tensor,
    row_index: Tensor,
    column_index: Tensor,
) -> tuple[Tensor, Tensor]:
    """One softmax of the scores `local` (B, heads, H, W, cells) and those of pooled keys.

    scaled (B, heads, H, W, d) are the queries of pooled keys and values (B, heads, pooled, d), all contiguous.

    Returns:
        The sum of the pooled values by their probabilities, of the shape of scaled, and the probabilities of `local`.
    """
    scores = _Scores(scaled, local, pooled_key, pooled_bias, row_index, column_index)
    out, probabilities = torch.empty_like(scaled), torch.empty_like(local)
    for strip in scores.strips():
        p = scores.probabilities(strip)
        value = pooled_value[strip[0]].flatten(0, 1)
        torch.bmm(planes(p)[..., : scores.pooled], value, out=planes(out[strip]))
        probabilities[strip] = p[..., scores.cells]
    return out, probabilities


@torch.library.custom_op('zoo::joint_softmax_backward', mutates_args=())
def backward(
    grad_out: Tensor,
    grad_probabilities: Tensor,
    scaled: Tensor,
    local: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    pooled_bias: Tensor,
    row_index: Tensor,
    column_index: Tensor,
) -> list[Tensor]:
    """Gradients of the floating inputs, in order."""
    scores = _Scores(scaled, local, pooled_key, pooled_bias, row_index, column_index)
    pooled, cells = scores.pooled, scores.cells
    d_scaled, d_local = torch.empty_like(scaled), torch.empty_like(local)
    d_key, d_value, d_table = (torch.zeros_like(x) for x in (pooled_key, pooled_value, scores.table))
    for strip in scores.strips():
        images = strip[0]
        q, g = planes(scaled[strip]), planes(grad_out[strip])
        p = scores.probabilities(strip)
        dp, ds = (scores.take(name, *p.shape) for name in ('d_probabilities', 'scores'))
        p_pooled, dp_pooled, ds_pooled = (planes(x)[..., :pooled] for x in (p, dp, ds))
        torch.bmm(g, pooled_value[images].flatten(0, 1).mT, out=dp_pooled)
        dp[..., cells] = grad_probabilities[strip]
        dp[..., cells.stop :] = 0
        torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=ds)
        torch.bmm(ds_pooled, pooled_key[images].flatten(0, 1), out=planes(d_scaled[strip]))
        d_local[strip] = ds[..., cells]
        d_key[images].flatten(0, 1).baddbmm_(ds_pooled.mT, q)
        d_value[images].flatten(0, 1).baddbmm_(p_pooled.mT, g)
        scores.add_bias_gradient(d_table, ds, strip)
    d_bias = torch.zeros_like(pooled_bias, memory_format=torch.contiguous_format)
    d_bias.flatten(0, 1).index_add_(1, column_index.flatten(), d_table.flatten(2).flatten(0, 1))
    return [d_scaled, d_local, d_key, d_value, d_bias]


@joint_softmax.register_fake
def _(scaled, local, *arguments):
    return torch.empty_like(scaled), torch.empty_like(local)


@backward.register_fake
def _(grad_out, grad_probabilities, *arguments):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments[:5]]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_out, grad_probabilities):
    return *backward(grad_out, grad_probabilities, *ctx.saved_tensors), None, None


joint_softmax.register_autograd(_differentiate, setup_context=_save)
