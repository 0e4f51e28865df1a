"""NAT: Neighborhood Attention Transformer (arXiv 2204.07143), and DiNAT, which dilates every second block (2209.15001).

Every pixel attends to the kernel_size x kernel_size pixels around it, with a learned bias for each relative position.
Original code: SHI-Labs/Neighborhood-Attention-Transformer (MIT).
"""

import torch
from timm.layers import Mlp, calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import nn

from ..kernels import neighborhood_attention
from .checkpoints import checkpoint_filter_fn
from .layers import PatchEmbed, PreNormBlock, apply_nchw, pad_bottom_right
from .pyramid import Pyramid
from .registration import variants

__all__ = ['NAT', 'Block', 'NeighborhoodAttention', 'block_dilations', 'checkpoint_filter_fn']


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Multi-head self-attention of each pixel over its neighborhood. (B, H, W, C) -> same.

    Maps smaller than the dilated window are zero-padded, and the padding takes part unmasked, as in the natten 0.14
    that the checkpoints were trained with.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int = 1, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x):
        _, H, W, _ = x.shape
        window = self.kernel_size * self.dilation
        if window > H or window > W:
            x = pad_bottom_right(x, max(H, window), max(W, window))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)  # (B, H, W, heads, head_dim)
        x = neighborhood_attention(q, k, v, self.kernel_size, self.dilation, bias=self.rpb)
        return self.proj(x[:, :H, :W].flatten(-2))

    def extra_repr(self):
        return f'num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}'


class Block(PreNormBlock):
    """Pre-norm transformer block of neighborhood attention. (B, H, W, C) -> same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        attn = NeighborhoodAttention(dim, num_heads, kernel_size, dilation, **dd)
        mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        super().__init__(dim, attn, mlp, drop_path, layer_scale=layer_scale, **dd)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 that doubles the channels, and a norm, on (B, H, W, C) maps."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x):
        return self.norm(apply_nchw(self.reduction, x))


def block_dilations(dilation, depth: int) -> list[int]:
    """Dilations of a stage's blocks: given one a block, or alternating 1, dilation, 1, ... (DiNAT, section 3.3)."""
    if isinstance(dilation, int):
        return [dilation if j % 2 else 1 for j in range(depth)]
    if len(dilation) != depth:
        raise ValueError(f'Expected a dilation for each of the {depth} blocks of the stage, got {dilation}.')
    return list(dilation)


class NAT(Pyramid):
    """Neighborhood Attention Transformer.

    Args:
        dim: channels of the first stage; each stage doubles them.
        depths, num_heads: blocks and heads of each stage.
        mlp_ratio: expansion of the MLPs.
        kernel_size: side of the neighborhood, odd.
        dilations: for each stage the dilation of its every second block, or a list with one a block.
        layer_scale: initial value of the layer scales; none if None.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    output_fmt = 'NHWC'
    first_conv = 'stages.0.downsample.proj.0'
    official_keys = [
        (r'^patch_embed\.', 'stages.0.downsample.'),
        (r'^levels\.(\d)\.downsample\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.'),
        (r'^levels\.', 'stages.'),
        (r'\.gamma(\d)$', r'.ls\1.gamma'),
    ]

    def __init__(
        self,
        dim: int = 64,
        depths=(3, 4, 6, 5),
        num_heads=(2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations=(1, 1, 1, 1),
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        convolutions = nn.Sequential(
            nn.Conv2d(self.in_chans, dim // 2, 3, 2, 1, **dd),
            nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
        )
        for i, heads in enumerate(num_heads):
            width = dim * 2**i
            self.add_stage(
                Downsample(width // 2, **dd) if i else PatchEmbed(convolutions, dim, **dd),
                [
                    Block(width, heads, kernel_size, dilation, mlp_ratio, rate, layer_scale, **dd)
                    for dilation, rate in zip(block_dilations(dilations[i], depths[i]), rates[i], strict=True)
                ],
                num_chs=width,
                stride=2 if i else 4,
            )
        self.finish(nn.LayerNorm(width, **dd))


mini = dict(depths=(3, 4, 6, 5), drop_path_rate=0.2)
tiny = dict(depths=(3, 4, 18, 5), drop_path_rate=0.2)
small = dict(dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0, drop_path_rate=0.3)
base = dict(
    dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2.0, layer_scale=1e-5, drop_path_rate=0.5
)
large = dict(dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2.0, drop_path_rate=0.35)
dilated = dict(dilations=(8, 4, 2, 1))  # a 7x7 window then spans a whole stage map at 224 pixels

variants(
    NAT,
    nat_mini=mini,
    nat_tiny=tiny,
    nat_small=dict(small, layer_scale=1e-5),
    nat_base=base,
    dinat_mini=dict(mini, **dilated),
    dinat_tiny=dict(tiny, **dilated),
    dinat_small=dict(small, **dilated),
    dinat_base=dict(base, **dilated),
    dinat_large=dict(large, **dilated),
)
