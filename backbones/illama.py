"""iLLaMA: Adapting LLaMA Decoder to Vision Transformer (arXiv 2404.06773).

A decoder of language, made for images: patches see those before them only, and the class token, which follows them all,
sees all. Rotary positions are added to learned ones; perceptrons are gated.

Original code: techmonsterwang/iLLaMA (without a licence).
"""

from functools import partial

import torch
from timm.layers import RmsNorm, SwiGLU, apply_rot_embed_cat
from timm.models import register_notrace_module
from torch import nn

from .checkpoints import checkpoint_filter_fn
from .columnar import Columnar
from .layers import PreNormBlock
from .registration import variants

__all__ = ['ILLaMA', 'checkpoint_filter_fn']

GLU_MULTIPLE = 256  # of the width of the perceptrons, as in LLaMA
BASE_ARGUMENTS = {
    *('img_size', 'patch_size', 'in_chans', 'num_classes', 'global_pool', 'drop_rate', 'pos_drop_rate'),
    *('dynamic_img_size', 'dynamic_img_pad', 'device', 'dtype'),
}
BASE = 10000  # of the wavelengths of the rotary positions

Norm = partial(RmsNorm, eps=1e-6)


def rotary_embedding(length: int, head_dim: int, device=None) -> torch.Tensor:
    """Sines and cosines (length, 2 * head_dim) of the positions, in float32 as the authors' table."""
    frequency = 1 / BASE ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency).repeat_interleave(2, dim=1)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def rotated(tokens: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Pairs of channels of tokens (..., N, C) turned by angles whose sines and cosines are (N, 2 C), in its dtype."""
    if torch.compiler.is_compiling():  # or exporting: Inductor generates no code for complex numbers
        return apply_rot_embed_cat(tokens.to(rotation.dtype), rotation)
    sine, cosine = (table[:, ::2].contiguous() for table in rotation.chunk(2, dim=-1))
    pairs = torch.view_as_complex(tokens.to(rotation.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cosine, sine)).flatten(-2)


@register_notrace_module
class CausalAttention(nn.Module):
    """Attention whose weights of later tokens are dropped after the softmax. (B, 1 + N, C) -> same.

    The class token stands first here, as in timm; it is the last in the order.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.soft_mask_rate = 0.0  # share of the weights of later tokens that is kept
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x):
        length = x.shape[1]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, heads, 1 + N, head_dim)
        rotation = rotary_embedding(length, query.shape[-1], x.device).roll(1, dims=0)
        rotation = rotation.to(torch.promote_types(x.dtype, torch.float32))
        query, key = rotated(query, rotation * query.shape[-1] ** -0.5), rotated(key, rotation)
        weights = (query.to(value.dtype) @ key.to(value.dtype).mT).softmax(-1)
        mask = self.mask(length, x.device, value.dtype)
        weights = weights * mask if torch.is_grad_enabled() else weights.mul_(mask)
        return self.proj((weights.to(value.dtype) @ value).transpose(1, 2).flatten(2))

    def mask(self, length: int, device, dtype) -> torch.Tensor:
        """Factors (1 + N, 1 + N) of the weights of keys, a row a query."""
        order = torch.arange(length, device=device).roll(1)  # N, 0, 1, ... N - 1
        causal = (order[:, None] >= order).to(dtype)
        return causal + self.soft_mask_rate * (1 - causal) if self.soft_mask_rate else causal

    def extra_repr(self):
        return f'num_heads={self.num_heads}'


class Block(PreNormBlock):
    """Pre-norm block of a decoder. (B, 1 + N, C) -> same."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0, device=None, dtype=None, **_):
        dd = {'device': device, 'dtype': dtype}
        hidden_dim = -(-int(2 * 4 * dim / 3) // GLU_MULTIPLE) * GLU_MULTIPLE
        attn = CausalAttention(dim, num_heads, **dd)
        mlp = SwiGLU(dim, hidden_dim, bias=False, **dd)
        super().__init__(dim, attn, mlp, drop_path, Norm, **dd)


class ILLaMA(Columnar):
    """LLaMA's decoder on patches of an image. At other sizes than `img_size`, the rotary positions go on.

    Args:
        embed_dim, depth, num_heads: channels, blocks, heads.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: img_size, patch_size, in_chans, num_classes, global_pool, drop_rate and pos_drop_rate, as for timm's ViT.
    """

    official_keys = [(r'\.mlp\.fc1\.', '.mlp.fc1_g.'), (r'\.mlp\.fc3\.', '.mlp.fc1_x.')]

    def __init__(self, embed_dim: int = 192, depth: int = 12, num_heads: int = 3, drop_path_rate: float = 0.0, **base):
        unknown = sorted(set(base) - BASE_ARGUMENTS)  # ViT hands its others to the blocks, which have no use for them
        if unknown:
            raise TypeError(f'ILLaMA does not take {", ".join(unknown)}. It takes {", ".join(sorted(BASE_ARGUMENTS))}.')
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path_rate=drop_path_rate,
            norm_layer=Norm,
            block_fn=Block,
            **base,
        )

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """As timm's, and the class token as the positions."""
        super().init_weights(mode, needs_reset)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    @torch.jit.ignore
    def set_soft_mask(self, rate: float) -> None:
        """Keep this share of the weights of later tokens: in training, from some rate to 0 (section 3.5)."""
        if not 0 <= rate <= 1:
            raise ValueError(f'rate must be from 0 to 1, got {rate}.')
        for block in self.blocks:
            block.attn.soft_mask_rate = rate

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under our keys, the class token's position first; ours passes through."""
        if 'pos_embed' in state_dict and any(key.endswith('.mlp.fc3.weight') for key in state_dict):
            state_dict = {**state_dict, 'pos_embed': state_dict['pos_embed'].roll(1, dims=1)}
        return super().map_official(state_dict)


base = dict(embed_dim=768, num_heads=12, drop_path_rate=0.4)

variants(
    ILLaMA,
    illama_tiny={},
    illama_small=dict(embed_dim=384, num_heads=6, drop_path_rate=0.1),
    illama_base=base,
    illama_base_384=dict(base, img_size=384),
    illama_large=dict(embed_dim=1024, depth=24, num_heads=16),
)
