"""Bi-level routing attention by its definition (BiFormer, arXiv 2303.08810, section 3.2).

Plain differentiable PyTorch for any dtype and device, meta included.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_index: Tensor,
    region_size: tuple[int, int],
    scale: float,
    mask_padding: bool,
) -> Tensor:
    """(batch, height, width, heads, head_dim) -> same, contiguous; region_index (batch, 1 or heads, regions, topk)."""
    B, H, W, heads, _ = query.shape
    rows, columns = region_size
    dtype = torch.promote_types(query.dtype, torch.float32)

    def regions(x):
        """(B, heads, regions, pixels, d); the map is padded with zeros at the right and the bottom."""
        x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, -W % columns, 0, -H % rows))
        x = x.unflatten(2, (-(-W // columns), columns)).unflatten(1, (-(-H // rows), rows))
        return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)

    image = torch.arange(B, device=query.device)[:, None, None, None]
    head = torch.arange(heads, device=query.device)[:, None, None]
    keys, values = (regions(x)[image, head, region_index].flatten(3, 4) for x in (key, value))
    scores = regions(query) * scale @ keys.mT  # (B, heads, regions, pixels, topk * pixels)
    if mask_padding:
        inside = regions(query.new_ones(1, H, W, 1, 1))[0, 0, :, :, 0].bool()  # (regions, pixels)
        scores = scores.masked_fill(~inside[region_index].flatten(3)[..., None, :], -torch.inf)
    out = scores.softmax(-1) @ values
    out = out.unflatten(2, (-(-H // rows), -(-W // columns))).unflatten(4, (rows, columns))
    out = out.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)[:, :H, :W]
    return out.to(query.dtype).contiguous()
