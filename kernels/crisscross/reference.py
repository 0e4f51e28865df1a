"""Criss-cross attention by its definition (CCNet, arXiv 1811.11721, section 3.2).

Plain differentiable PyTorch for any dtype and device, meta included.
"""

import torch
from torch import Tensor


def crisscross_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(batch, height, width, heads, head_dim) -> (batch, height, width, heads, head_dim of value), contiguous."""
    H = query.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (query, key, value))
    column = torch.einsum('byxhd,bzxhd->byxhz', q * scale, k)  # (B, H, W, heads, H)
    row = torch.einsum('byxhd,byzhd->byxhz', q * scale, k)  # (B, H, W, heads, W)
    is_self = torch.eye(H, dtype=torch.bool, device=query.device)[:, None, None]  # a key once: in its row
    weights = torch.cat((column.masked_fill(is_self, -torch.inf), row), dim=-1).softmax(-1)
    out = torch.einsum('byxhz,bzxhd->byxhd', weights[..., :H], v)
    out = out + torch.einsum('byxhz,byzhd->byxhd', weights[..., H:], v)
    return out.to(query.dtype).contiguous()
