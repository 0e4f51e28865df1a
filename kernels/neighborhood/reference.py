"""Neighborhood attention by its definition (NAT, arXiv 2204.07143, section 3; dilation: DiNAT, arXiv 2209.15001).

Plain differentiable PyTorch for any dtype and device, meta included. The products are written as multiply and sum,
which torch.compile fuses with the gather into one loop that stores neither neighbors nor scores.
"""

import torch
from torch import Tensor


def neighbors(length: int, kernel_size: int, dilation: int, device) -> tuple[Tensor, Tensor]:
    """Of each query of an axis: positions of its keys and their relative position index, both (length, kernel_size)."""
    position = torch.arange(length, device=device)
    group, index = position % dilation, position // dilation
    group_length = (length - group + dilation - 1) // dilation
    start = torch.minimum((index - kernel_size // 2).clamp(min=0), group_length - kernel_size)
    key = start[:, None] + torch.arange(kernel_size, device=device)
    return key * dilation + group[:, None], key - index[:, None] + kernel_size - 1


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Tensor:
    """(batch, height, width, heads, head_dim) -> same, contiguous; bias (heads, 2 * kh - 1, 2 * kw - 1)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows, row_offsets = neighbors(query.shape[1], kernel_size[0], dilation[0], query.device)
    columns, column_offsets = neighbors(query.shape[2], kernel_size[1], dilation[1], query.device)
    window = slice(None), rows[:, None, :, None], columns[None, :, None, :]
    keys, values = key[window].to(dtype), value[window].to(dtype)  # (B, H, W, kh, kw, heads, d)
    scores = (query[:, :, :, None, None].to(dtype) * scale * keys).sum(-1)  # (B, H, W, kh, kw, heads)
    if bias is not None:
        bias = bias.to(dtype)[:, row_offsets[:, None, :, None], column_offsets[None, :, None, :]]
        scores = scores + bias.permute(1, 2, 3, 4, 0)
    probabilities = scores.flatten(3, 4).softmax(3).view_as(scores)
    return (probabilities[..., None] * values).sum((3, 4)).to(query.dtype)
