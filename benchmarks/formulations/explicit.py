"""What the formulations share: attention by a softmax of scores that are a tensor, and heads of tokens."""

from torch import Tensor

__all__ = ['attend', 'merged', 'split']


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """(..., queries, head_dim), (..., keys, head_dim) twice, bias added to the scores -> (..., queries, head_dim)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1) @ value


def split(x: Tensor, parts: int, num_heads: int) -> Tensor:
    """Tokens (B, N, parts * heads * head_dim) -> (parts, B, heads, N, head_dim)."""
    B, N, _ = x.shape
    return x.reshape(B, N, parts, num_heads, -1).permute(2, 0, 3, 1, 4)


def merged(x: Tensor) -> Tensor:
    """Heads (B, heads, N, head_dim) -> tokens (B, N, heads * head_dim)."""
    B, _, N, _ = x.shape
    return x.transpose(1, 2).reshape(B, N, -1)
