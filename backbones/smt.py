"""SMT: Scale-Aware Modulation Meet Transformer (arXiv 2307.08579).

Early stages gate tokens by convolutions of several sizes, whose maps are mixed across the sizes; the last stage attends
globally; the third alternates between the two.

Original code: AFeng-x/SMT (MIT).
"""

from functools import partial

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from .checkpoints import PVT_KEYS, checkpoint_filter_fn
from .layers import ConvMlp, Downsample, PaddedConv2d, PreNormBlock, apply_nchw
from .pyramid import Pyramid, init_conv_and_linear
from .registration import variants

__all__ = ['SMT', 'checkpoint_filter_fn']

KERNEL_SIZES = (3, 5, 7, 9)  # section 3.1: one for each head of the modulation
EXPANSION = 2  # of the channels where the scales are mixed

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # outside the patch embeddings


@register_notrace_module
class ScaleAwareModulation(nn.Module):
    """Gate the tokens by a mixture of convolutions of four sizes (section 3.1). (B, H, W, C) -> same."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        head_dim = dim // len(KERNEL_SIZES)
        self.v = nn.Linear(dim, dim, **dd)
        self.s = nn.Linear(dim, dim, **dd)
        self.local_convs = nn.ModuleList(
            nn.Conv2d(head_dim, head_dim, size, padding=size // 2, groups=head_dim, **dd) for size in KERNEL_SIZES
        )
        # Scale-aware aggregation: a group holds one channel of each head.
        self.proj0 = nn.Conv2d(dim, EXPANSION * dim, 1, groups=head_dim, **dd)
        self.bn = nn.BatchNorm2d(EXPANSION * dim, **dd)
        self.act = nn.GELU()
        self.proj1 = nn.Conv2d(EXPANSION * dim, dim, 1, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x):
        heads = self.s(x).permute(0, 3, 1, 2).chunk(len(self.local_convs), dim=1)
        scales = torch.stack([conv(head) for conv, head in zip(self.local_convs, heads, strict=True)], dim=2)
        modulator = self.proj1(self.act(self.bn(self.proj0(scales.flatten(1, 2)))))  # (B, C, H, W)
        return self.proj(modulator.permute(0, 2, 3, 1) * self.v(x))


@register_notrace_module
class Attention(nn.Module):
    """Global multi-head attention, with a depthwise convolution of the values added. (B, H, W, C) -> same."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.local_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x):
        _, H, W, _ = x.shape
        query, (key, value) = self.q(x), self.kv(x).chunk(2, dim=-1)
        local = apply_nchw(self.local_conv, value)
        query, key, value = (
            tokens.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for tokens in (query, key, value)
        )  # (B, heads, H * W, head_dim)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).flatten(2).unflatten(1, (H, W)) + local)


class Block(PreNormBlock):
    """Pre-norm block of modulation, or of attention with `num_heads` heads. (B, H, W, C) -> same."""

    def __init__(
        self,
        dim: int,
        num_heads: int | None,
        mlp_ratio: float,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        attn = Attention(dim, num_heads, **dd) if num_heads else ScaleAwareModulation(dim, **dd)
        mlp = ConvMlp(dim, int(dim * mlp_ratio), residual=True, **dd)
        super().__init__(dim, attn, mlp, drop_path, LayerNorm, layer_scale, **dd)


class Stem(nn.Module):
    """Two strided convolutions. (B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), C)."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(in_chans, dim, kernel_size, 2, kernel_size // 2, bias=False, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.act = nn.ReLU()
        self.conv2 = PaddedConv2d(dim, dim, 2, 2, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x):
        x = self.conv2(self.act(self.bn(self.conv1(x))))
        return self.norm(x.permute(0, 2, 3, 1))


class SMT(Pyramid):
    """Scale-Aware Modulation Meet Transformer.

    Args:
        dims, depths, mlp_ratios: channels, blocks and expansion of each stage.
        num_heads: of the attention in each stage; a stage of modulation alone has 0.
        alternating: the stages that begin with modulation and alternate between it and attention.
        stem_kernel_size: of the first convolution.
        layer_scale: initial value of the scales of the residual branches; none if None.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    output_fmt = 'NHWC'
    first_conv = 'stages.0.downsample.conv1'
    init_module = staticmethod(init_conv_and_linear)
    official_keys = [
        (r'^patch_embed1\.conv\.0\.', 'stages.0.downsample.conv1.'),
        (r'^patch_embed1\.conv\.1\.', 'stages.0.downsample.bn.'),
        (r'^patch_embed1\.conv\.3\.', 'stages.0.downsample.conv2.'),
        *PVT_KEYS,
        (r'\.local_conv_(\d)\.', lambda m: f'.local_convs.{int(m[1]) - 1}.'),
        (r'\.gamma_(\d)$', r'.ls\1.gamma'),
    ]

    def __init__(
        self,
        dims=(64, 128, 256, 512),
        depths=(2, 2, 8, 1),
        num_heads=(0, 0, 8, 16),
        alternating=(2,),
        mlp_ratios=(4, 4, 4, 2),
        stem_kernel_size: int = 3,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        for i, dim in enumerate(dims):
            attends = [num_heads[i] > 0 and not (i in alternating and j % 2 == 0) for j in range(depths[i])]
            self.add_stage(
                Downsample(nn.Conv2d(dims[i - 1], dim, 3, 2, 1, **dd), dim, **dd)
                if i
                else Stem(self.in_chans, dim, stem_kernel_size, **dd),
                [
                    Block(dim, num_heads[i] if attends[j] else None, mlp_ratios[i], layer_scale, rates[i][j], **dd)
                    for j in range(depths[i])
                ],
                num_chs=dim,
                stride=2 if i else 4,
                norm=LayerNorm(dim, **dd),
            )
        self.finish()


variants(
    SMT,
    smt_t={},
    smt_s=dict(depths=(3, 4, 18, 2)),
    smt_b=dict(depths=(4, 6, 28, 2), mlp_ratios=(8, 6, 4, 2), stem_kernel_size=7),
    smt_l=dict(
        dims=(96, 192, 384, 768),
        depths=(4, 6, 28, 4),
        mlp_ratios=(8, 6, 4, 2),
        stem_kernel_size=7,
        layer_scale=1e-4,
    ),
)
