"""Aggregated attention by its definition (TransNeXt, arXiv 2311.17132, sections 3.1 to 3.3).

Plain differentiable PyTorch for any dtype and device, meta included.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def window(length: int, window_size: int, device) -> tuple[Tensor, Tensor]:
    """Of each query of an axis: its keys' positions on the axis with a margin, and whether they lie on the axis itself.

    Both (length, window_size). The margin is window_size // 2 wide.
    """
    position = torch.arange(length, device=device)[:, None] + torch.arange(window_size, device=device)
    key = position - window_size // 2
    return position, (key >= 0) & (key < length)


def log_length(rows: Tensor, columns: Tensor, pooled: int) -> Tensor:
    """Logarithm of the number of keys of each query, (height, width), in float32 as in the official tables.

    rows, columns: which keys of the windows are inside, of each axis.
    """
    return (rows.sum(1)[:, None] * columns.sum(1) + pooled).float().log()


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
    """(batch, height, width, heads, head_dim) -> same, contiguous; see the public function for the others."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v, pooled_k, pooled_v = (x.to(dtype) for x in (query, key, value, pooled_key, pooled_value))
    embedding, temperature, tokens = (x.to(dtype) for x in (query_embedding, temperature, learnable_tokens))
    local_bias, pooled_bias, token_bias = (x.to(dtype) for x in (local_bias, pooled_bias, learnable_bias))
    q, k, pooled_k = (F.normalize(x, dim=-1) for x in (q, k, pooled_k))
    rows, rows_inside = window(query.shape[1], window_size, query.device)
    columns, columns_inside = window(query.shape[2], window_size, query.device)
    inside = (rows_inside[:, None, :, None] & columns_inside[:, None]).flatten(2)[:, :, None]  # (H, W, 1, k * k)
    cells = slice(None), rows[:, None, :, None], columns[None, :, None, :]
    margin = window_size // 2
    keys, values = (
        F.pad(x, (0, 0, 0, 0, margin, margin, margin, margin))[cells].flatten(3, 4).transpose(3, 4) for x in (k, v)
    )  # (B, H, W, heads, k * k, d)

    length = log_length(rows_inside, columns_inside, pooled_key.shape[1])[..., None, None].to(dtype)
    scaled = (q + embedding) * temperature[:, None] * length
    local = (scaled[..., None, :] * keys).sum(-1) + local_bias
    local = local.masked_fill(~inside, -torch.inf)  # (B, H, W, heads, k * k)
    bias = pooled_bias[:, row_index[:, None, :, None], column_index[None, :, None, :]].flatten(3)  # (heads, H, W, P)
    pooled = torch.einsum('byxhd,bphd->byxhp', scaled, pooled_k) + bias.permute(1, 2, 0, 3)
    weights = torch.cat([local, pooled], -1).softmax(-1)
    local, pooled = weights.split([window_size**2, pooled_key.shape[1]], -1)
    local = local + torch.einsum('byxhd,hdw->byxhw', q, tokens) + token_bias
    out = (local[..., None] * values).sum(-2) + torch.einsum('byxhp,bphd->byxhd', pooled, pooled_v)
    return out.to(query.dtype).contiguous()


def position_bias(rows: Tensor, columns: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(rows, hidden), (columns, hidden), (heads, hidden), (heads,) -> (heads, rows, columns)."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    hidden = F.relu(rows[:, None].to(dtype) + columns)
    return F.linear(hidden, weight.to(dtype), bias.to(dtype)).permute(2, 0, 1).to(rows.dtype).contiguous()
