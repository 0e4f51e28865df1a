"""Window attention by its definition (contiguous: Swin, arXiv 2103.14030; dilated: CrossFormer, arXiv 2108.00154).

Plain differentiable PyTorch for any dtype and device, meta included.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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
    _, H, W, _, _ = query.shape
    (rows, columns), (row_step, column_step) = window_size, dilation
    top, left = -offset[0] % rows, -offset[1] % columns  # without an offset none: it comes with dilation 1 alone
    bottom, right = -(top + H) % (rows * row_step), -(left + W) % (columns * column_step)
    dtype = torch.promote_types(query.dtype, torch.float32)

    def windows(x):
        """(B, H, W, heads, d) -> (B, block row, residue, block column, residue, heads, pixels, d), padded."""
        x = F.pad(x, (0, 0, 0, 0, left, right, top, bottom))
        x = x.unflatten(2, (-1, columns, column_step)).unflatten(1, (-1, rows, row_step))
        return x.permute(0, 1, 3, 4, 6, 7, 2, 5, 8).flatten(6, 7)

    if key_mask is None:
        key_mask = torch.ones(1, H, W, dtype=torch.bool, device=query.device)
    is_key = windows(key_mask[..., None, None]).mT  # (B or 1, ..., 1, 1, keys)
    q, k, v = (windows(x).to(dtype) for x in (query, key, value))
    scores = q * scale @ k.mT  # (B, ..., heads, queries, keys)
    if bias is not None:
        scores = scores + bias.to(dtype)
    # A finite fill keeps the softmax of a window without keys, and its gradient, finite.
    scores = scores.masked_fill(~is_key, torch.finfo(dtype).min)
    out = scores.softmax(-1).masked_fill(~is_key, 0) @ v
    out = out.unflatten(6, (rows, columns)).permute(0, 1, 6, 2, 3, 7, 4, 5, 8)
    out = out.flatten(4, 6).flatten(1, 3)[:, top : top + H, left : left + W]
    return out.to(query.dtype).contiguous()
