"""DiNAT_s: neighborhood attention, dilated in every second block, in the layout of Swin (arXiv 2209.15001).

Original code: SHI-Labs/Neighborhood-Attention-Transformer (MIT).
"""

import torch
from timm.layers import calculate_drop_path_rates
from torch import nn

from .checkpoints import SWIN_KEYS, checkpoint_filter_fn
from .layers import PaddedConv2d, PatchEmbed, pad_bottom_right
from .nat import Block, block_dilations
from .pyramid import Pyramid
from .registration import variants

__all__ = ['DiNATS', 'checkpoint_filter_fn']

MLP_RATIO = 4


class PatchMerging(nn.Module):
    """Concatenate each 2x2 pixels, norm, and project them. (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x):
        _, H, W, _ = x.shape
        x = pad_bottom_right(x, H + H % 2, W + W % 2)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
        return self.reduction(self.norm(x))


class DiNATS(Pyramid):
    """DiNAT_s.

    Args:
        dim: channels of the first stage; each stage doubles them.
        depths, num_heads: blocks and heads of each stage.
        kernel_size: side of the neighborhood, odd.
        dilations: for each stage the dilation of its every second block, or a list with one a block.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    output_fmt = 'NHWC'
    first_conv = 'stages.0.downsample.proj'
    official_keys = [*SWIN_KEYS]

    def __init__(
        self,
        dim: int = 96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        kernel_size: int = 7,
        dilations=(8, 4, 2, 1),
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        patches = PaddedConv2d(self.in_chans, dim, 4, 4, **dd)
        for i, heads in enumerate(num_heads):
            width = dim * 2**i
            self.add_stage(
                PatchMerging(width // 2, **dd) if i else PatchEmbed(patches, dim, **dd),
                [
                    Block(width, heads, kernel_size, dilation, MLP_RATIO, rate, **dd)
                    for dilation, rate in zip(block_dilations(dilations[i], depths[i]), rates[i], strict=True)
                ],
                num_chs=width,
                stride=2 if i else 4,
            )
        self.finish(nn.LayerNorm(width, **dd))


variants(
    DiNATS,
    dinat_s_tiny=dict(drop_path_rate=0.2),
    dinat_s_small=dict(depths=(2, 2, 18, 2), drop_path_rate=0.3),
    dinat_s_base=dict(dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
    dinat_s_large=dict(dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), drop_path_rate=0.35),
)
