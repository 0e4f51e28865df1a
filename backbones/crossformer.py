"""CrossFormer (arXiv 2108.00154) and CrossFormer++ (arXiv 2303.06908): attention across scales, at two distances.

Patches of several sizes are embedded side by side. Each block attends within groups of pixels: of neighbors (short
distance), or of pixels sampled at an interval (long distance), by turns, with a position bias that a small network
computes. CrossFormer++ lets the groups grow with the stages and cools the amplitude of some blocks. Original code:
cheerss/CrossFormer (MIT).
"""

import torch
from timm.layers import Mlp, calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from ..kernels import window_attention
from .checkpoints import SWIN_KEYS, checkpoint_filter_fn
from .layers import PreNormBlock, apply_nchw, pad_to_stride, pairs
from .pyramid import Pyramid
from .registration import variants

__all__ = ['CrossFormer', 'DynamicPositionBias', 'GroupAttention', 'checkpoint_filter_fn']

SCALES = (4, 8, 16, 32)  # pixels a side of the patches that are embedded
PATCH = 4  # pixels from one of them to the next
COOLING_INTERVAL = 3  # blocks to an amplitude cooling layer, in CrossFormer++


class PatchConv2d(nn.Conv2d):
    """A convolution of stride 4 of an image, computed as one of stride 1 of its 4x4 patches.

    On the CPU the gradient of a large kernel over three channels takes PyTorch four times as long otherwise.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, device=None, dtype=None):
        padding = (kernel_size - PATCH) // 2
        super().__init__(in_channels, out_channels, kernel_size, PATCH, padding, device=device, dtype=dtype)

    def forward(self, patches):
        """(B, in_channels * 16, H, W) -> (B, out_channels, H, W)."""
        padding = -(-self.padding[0] // PATCH)  # patches that the kernel reaches to either side, in parts perhaps
        missing = padding * PATCH - self.padding[0]
        weight = as_patches(F.pad(self.weight, (missing,) * 4))
        return F.conv2d(patches, weight, self.bias, padding=padding)


def as_patches(x):
    """(B, C, H, W) -> (B, C * 16, H / 4, W / 4), channels last in memory."""
    x = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).permute(0, 3, 1, 2)


class CrossScaleEmbedding(nn.Module):
    """Patches of four sizes around each 4x4 pixels, the larger with fewer channels (section 3.1).

    (B, in_chans, H, W) -> (B, ceil(H/4), ceil(W/4), dim)
    """

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        widths = (dim // 2, dim // 4, dim // 8, dim // 8)
        self.projs = nn.ModuleList(
            PatchConv2d(in_chans, width, size, **dd) for size, width in zip(SCALES, widths, strict=True)
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x):
        patches = as_patches(pad_to_stride(x, (PATCH, PATCH)))
        return self.norm(torch.cat([proj(patches) for proj in self.projs], dim=1).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """A norm, then patches of two sizes. (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.reductions = nn.ModuleList(
            nn.Conv2d(dim, dim, size, stride=2, padding=(size - 2) // 2, **dd) for size in (2, 4)
        )

    def forward(self, x):
        x = pad_to_stride(self.norm(x).permute(0, 3, 1, 2), (2, 2))
        return torch.cat([reduction(x) for reduction in self.reductions], dim=1).permute(0, 2, 3, 1)


class DynamicPositionBias(nn.Module):
    """A network that makes a bias for each head of the offset of a query from a key in a group (section 3.2.2)."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}

        def layer(in_features, out_features):
            return nn.Sequential(nn.LayerNorm(in_features, **dd), nn.ReLU(), nn.Linear(in_features, out_features, **dd))

        width = dim // 16
        self.pos_proj = nn.Linear(2, width, **dd)
        self.pos1 = layer(width, width)
        self.pos2 = layer(width, width)
        self.pos3 = layer(width, num_heads)

    def forward(self, height: int, width: int):
        """The bias (heads, N, N) of a group of height x width = N pixels."""
        device, dtype = self.pos_proj.weight.device, self.pos_proj.weight.dtype
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        offsets = torch.cartesian_prod(
            torch.arange(1 - height, height, device=device), torch.arange(1 - width, width, device=device)
        )
        biases = self.pos3(self.pos2(self.pos1(self.pos_proj(offsets.to(dtype)))))  # (offsets, heads)
        row = rows[:, None] - rows + height - 1  # (queries, keys)
        column = columns[:, None] - columns + width - 1
        table = biases.T.unflatten(1, (2 * height - 1, 2 * width - 1))
        return pairs(table, row, column).flatten(3).flatten(1, 2)


@register_notrace_module
class GroupAttention(nn.Module):
    """Multi-head self-attention within groups of pixels (section 3.2.1). (B, H, W, C) -> same.

    A group is `group_size` x `group_size` pixels, `interval` apart: neighbors if it is 1, the short distance attention,
    else those of a block of group_size * interval pixels a side whose coordinates have the same remainders, the long
    distance attention. Groups at the border are smaller, as in the original, which masks what it pads.

    A map whose shorter side is at most `group_size` is one group. This is the rule of the original detection and
    segmentation code; the classification code, which takes square images only, has the same one for them (its
    group_size becomes the shorter side). It is decided at each call: the original dense code makes a block that has
    once seen such a map a short distance block for good.
    """

    def __init__(self, dim: int, num_heads: int, group_size: int, interval: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.group_size = group_size
        self.interval = interval
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.pos = DynamicPositionBias(dim, num_heads, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x):
        _, H, W, _ = x.shape
        is_one_group = min(H, W) <= self.group_size
        group = (H, W) if is_one_group else (self.group_size, self.group_size)
        interval = 1 if is_one_group else self.interval
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)  # (B, H, W, heads, head_dim)
        x = window_attention(q, k, v, group, interval, bias=self.pos(*group))
        return self.proj(x.flatten(-2))

    def extra_repr(self):
        return f'num_heads={self.num_heads}, group_size={self.group_size}, interval={self.interval}'


class CooledBlock(PreNormBlock):
    """A block and an amplitude cooling layer, which nothing bypasses (CrossFormer++)."""

    def __init__(self, dim: int, *args, device=None, dtype=None, **kwargs):
        super().__init__(dim, *args, device=device, dtype=dtype, **kwargs)
        dd = {'device': device, 'dtype': dtype}
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.ex_ln = nn.LayerNorm(dim, **dd)

    def forward(self, x):
        return self.ex_ln(apply_nchw(self.ex_conv, super().forward(x)))


class CrossFormer(Pyramid):
    """CrossFormer and CrossFormer++.

    Args:
        dim: channels of the first stage; each stage doubles them.
        depths, num_heads: blocks and heads of each stage.
        group_sizes: for each stage, pixels along a side of a group.
        intervals: for each stage, from a pixel to the next of a group of the long distance attention, which is that of
            every second block.
        mlp_ratio: expansion of the MLPs.
        cooling: whether every third block of a stage, the last excepted, has an amplitude cooling layer.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    output_fmt = 'NHWC'
    first_conv = tuple(f'stages.0.downsample.projs.{i}' for i in range(len(SCALES)))
    official_keys = [*SWIN_KEYS]
    # Buffers of one image size, which the first release stored.
    constants = ('.attn.biases', '.attn.relative_position_index', '.attn_mask')

    def __init__(
        self,
        dim: int = 64,
        depths=(1, 1, 8, 6),
        num_heads=(2, 4, 8, 16),
        group_sizes=(7, 7, 7, 7),
        intervals=(8, 4, 2, 1),
        mlp_ratio: float = 4.0,
        cooling: bool = False,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        def block(i, j):
            width = dim * 2**i
            attn = GroupAttention(width, num_heads[i], group_sizes[i], intervals[i] if j % 2 else 1, **dd)
            mlp = Mlp(width, int(width * mlp_ratio), **dd)
            is_cooled = cooling and (j + 1) % COOLING_INTERVAL == 0 and j + 1 < depths[i]
            return (CooledBlock if is_cooled else PreNormBlock)(width, attn, mlp, rates[i][j], **dd)

        for i, depth in enumerate(depths):
            width = dim * 2**i
            self.add_stage(
                PatchMerging(width // 2, **dd) if i else CrossScaleEmbedding(self.in_chans, dim, **dd),
                [block(i, j) for j in range(depth)],
                num_chs=width,
                stride=2 if i else 4,
            )
        self.finish(nn.LayerNorm(width, **dd))


plus = dict(group_sizes=(4, 4, 14, 7), intervals=(4, 2, 1, 1), cooling=True)
heads = {64: (2, 4, 8, 16), 96: (3, 6, 12, 24), 128: (4, 8, 16, 32)}  # of 32 channels each

variants(
    CrossFormer,
    crossformer_tiny=dict(drop_path_rate=0.1),
    crossformer_small=dict(dim=96, depths=(2, 2, 6, 2), num_heads=heads[96], drop_path_rate=0.2),
    crossformer_base=dict(dim=96, depths=(2, 2, 18, 2), num_heads=heads[96], drop_path_rate=0.3),
    crossformer_large=dict(dim=128, depths=(2, 2, 18, 2), num_heads=heads[128], drop_path_rate=0.5),
    crossformer_pp_small=dict(plus, dim=64, depths=(2, 2, 18, 2), num_heads=heads[64], drop_path_rate=0.2),
    crossformer_pp_base=dict(plus, dim=96, depths=(2, 2, 18, 2), num_heads=heads[96], drop_path_rate=0.3),
    crossformer_pp_large=dict(plus, dim=128, depths=(2, 2, 18, 2), num_heads=heads[128], drop_path_rate=0.5),
    crossformer_pp_huge=dict(plus, dim=128, depths=(6, 6, 18, 2), num_heads=heads[128], drop_path_rate=0.5),
)
