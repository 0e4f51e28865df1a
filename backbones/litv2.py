"""LITv2: Fast Vision Transformers with HiLo Attention (arXiv 2205.13213).

Some heads attend within small windows, to high frequencies; the others from every pixel to an average-pooled map, to
low ones. The first two stages have no attention, and patches are merged by deformable convolutions.

Original code: ziplab/LITv2 (Apache-2.0).
"""

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from ..kernels import window_attention
from .checkpoints import SWIN_KEYS, checkpoint_filter_fn
from .layers import ConvMlp, PaddedConv2d, pad_bottom_right, pad_to_stride
from .pyramid import Pyramid, init_conv
from .registration import variants

__all__ = ['LITv2', 'checkpoint_filter_fn']

MERGED = 2  # pixels along each side of what is merged into one


@register_notrace_module
class HiLo(nn.Module):
    """Attention in windows by some heads, to a pooled map by the others (section 3.2). (B, H, W, C) -> same.

    Args:
        dim, num_heads: channels and heads.
        window_size: side of the windows, and of what is pooled; 1 for attention of all heads to the whole map.
        alpha: share of the heads that attend to the pooled map.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, alpha: float, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        head_dim = dim // num_heads
        self.window_size = window_size
        self.l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        if self.l_heads:
            l_dim = self.l_heads * head_dim
            self.l_q = nn.Linear(dim, l_dim, **dd)
            self.l_kv = nn.Linear(dim, 2 * l_dim, **dd)
            self.l_proj = nn.Linear(l_dim, l_dim, **dd)
        if self.h_heads:
            h_dim = self.h_heads * head_dim
            self.h_qkv = nn.Linear(dim, 3 * h_dim, **dd)
            self.h_proj = nn.Linear(h_dim, h_dim, **dd)

    def high(self, x):
        """Each window attends to itself."""
        query, key, value = self.h_qkv(x).unflatten(-1, (3, self.h_heads, -1)).unbind(-3)
        return self.h_proj(window_attention(query, key, value, self.window_size).flatten(-2))

    def low(self, x):
        """Every pixel attends to the windows' means."""
        size = x.shape[1:3]
        pooled = (
            x if self.window_size == 1 else F.avg_pool2d(x.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        )
        query = self.l_q(x).flatten(1, 2).unflatten(-1, (self.l_heads, -1)).transpose(1, 2)
        key, value = self.l_kv(pooled).flatten(1, 2).unflatten(-1, (2, self.l_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)  # (B, heads, H * W, head_dim)
        return self.l_proj(out.transpose(1, 2).flatten(2).unflatten(1, size))

    def forward(self, x):
        _, H, W, _ = x.shape
        side = self.window_size
        x = pad_bottom_right(x, -(-H // side) * side, -(-W // side) * side)  # zeros, which take part
        parts = [self.high(x)] if self.h_heads else []
        parts += [self.low(x)] if self.l_heads else []
        return torch.cat(parts, dim=-1)[:, :H, :W]

    def extra_repr(self):
        return f'l_heads={self.l_heads}, h_heads={self.h_heads}, window_size={self.window_size}'


class Block(nn.Module):
    """Pre-norm block, of a perceptron alone if `attn` is None. (B, H, W, C) -> same."""

    def __init__(self, dim: int, attn: nn.Module | None, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = nn.LayerNorm(dim, **dd) if attn else None
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = ConvMlp(dim, 4 * dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Patches of 4x4 pixels. (B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), C)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.proj = PaddedConv2d(in_chans, dim, 4, 4, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class DeformableConv2d(nn.Conv2d):
    """A 2x2 convolution with stride 2 that another one tells where to look (deformable convolution, version 1)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_chans, dim, MERGED, MERGED, **dd)
        self.conv_offset = nn.Conv2d(in_chans, 2 * MERGED**2, MERGED, MERGED, **dd)

    def forward(self, x):
        # torchvision computes it in single and double precision everywhere, in half precision on some devices only.
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        tensors = (x, self.conv_offset(x), self.weight, self.bias)
        return deform_conv2d(*(tensor.to(dtype) for tensor in tensors), stride=self.stride).to(x.dtype)


@register_notrace_module
class DeformableMerging(nn.Module):
    """Merge patches from where the content says (section 3.3): (B, H, W, in) -> (B, ceil(H / 2), ceil(W / 2), out)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dconv = DeformableConv2d(in_dim, dim, **dd)
        self.norm_layer = nn.BatchNorm2d(dim, **dd)
        self.act_layer = nn.GELU()

    def forward(self, x):
        x = pad_to_stride(x.permute(0, 3, 1, 2), (MERGED, MERGED))
        return self.act_layer(self.norm_layer(self.dconv(x))).permute(0, 2, 3, 1)


class LITv2(Pyramid):
    """Less attention vIsion Transformer, version 2.

    Args:
        dim: channels of the first stage; each later one has twice those of the one before.
        depths, num_heads: blocks and heads of each stage.
        window_sizes: of `HiLo` in each stage; 0 for blocks without attention.
        alpha: share of the heads that attend to low frequencies.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    output_fmt = 'NHWC'
    first_conv = 'stages.0.downsample.proj'
    official_keys = [*SWIN_KEYS, (r'\.dwconv\.dwconv\.', '.dwconv.')]

    def __init__(
        self,
        dim: int = 96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_sizes=(0, 0, 2, 1),
        alpha: float = 0.9,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        if not 0 <= alpha <= 1:
            raise ValueError(f'alpha must be from 0 to 1, got {alpha}.')
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        for i, (heads, window_size) in enumerate(zip(num_heads, window_sizes, strict=True)):
            width = dim * 2**i

            def attention(width=width, heads=heads, window_size=window_size):
                return HiLo(width, heads, window_size, alpha, **dd) if window_size else None

            self.add_stage(
                DeformableMerging(width // 2, width, **dd) if i else PatchEmbed(self.in_chans, dim, **dd),
                [Block(width, attention(), rate, **dd) for rate in rates[i]],
                num_chs=width,
                stride=2 if i else 4,
            )
        self.finish(nn.LayerNorm(width, **dd))

    @staticmethod
    def init_module(module):
        """Depthwise convolutions by their fan-out, linears as every family's; patches are not moved at first."""
        if isinstance(module, ConvMlp):
            init_conv(module.dwconv)
        elif isinstance(module, DeformableConv2d):
            nn.init.zeros_(module.conv_offset.weight)
            nn.init.zeros_(module.conv_offset.bias)
        Pyramid.init_module(module)


variants(
    LITv2,
    litv2_s=dict(drop_path_rate=0.2),
    litv2_m=dict(depths=(2, 2, 18, 2), drop_path_rate=0.3),
    litv2_b=dict(dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
)
