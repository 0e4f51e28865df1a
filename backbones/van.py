"""VAN: Visual Attention Network (arXiv 2202.09741).

Convolutions stand in for attention: a map is gated by a large-kernel convolution of itself, decomposed into a
depthwise, a dilated depthwise and a pointwise one.

Original code: Visual-Attention-Network/VAN-Classification (Apache-2.0).
"""

import torch
from timm.layers import LayerNorm2d, LayerScale2d, calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from .checkpoints import PVT_KEYS, checkpoint_filter_fn
from .layers import PreNormBlock, pad_to_stride
from .pyramid import Pyramid, init_conv_and_linear
from .registration import variants

__all__ = ['VAN', 'checkpoint_filter_fn']

LAYER_SCALE = 1e-2  # section 3.3: initial value of the layer scales


@register_notrace_module
class DilatedDepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of odd size that dilation spreads, and padding keeps in shape. (B, C, H, W) -> same.

    Eager CPU convolutions are slow when dilated. There each phase of the map (the pixels whose coordinates have one
    remainder modulo the dilation) is convolved on its own, without dilation, which gives the same sums.
    """

    def __init__(self, dim: int, kernel_size: int, dilation: int, device=None, dtype=None):
        reach = dilation * (kernel_size // 2)
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, dim, kernel_size, padding=reach, groups=dim, dilation=dilation, **dd)

    def forward(self, x):
        if torch.jit.is_scripting() or x.device.type != 'cpu' or torch.compiler.is_compiling():
            return self._conv_forward(x, self.weight, self.bias)
        B, C, H, W = x.shape
        d = self.dilation[0]
        x = pad_to_stride(x, (d, d)).permute(0, 2, 3, 1)
        h, w = x.shape[1] // d, x.shape[2] // d
        x = x.reshape(B, h, d, w, d, C).permute(0, 2, 4, 1, 3, 5).reshape(B * d * d, h, w, C)
        x = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=self.kernel_size[0] // 2, groups=C)
        x = x.permute(0, 2, 3, 1).reshape(B, d, d, h, w, C).permute(0, 3, 1, 4, 2, 5).reshape(B, h * d, w * d, C)
        return x[:, :H, :W].permute(0, 3, 1, 2)


class LargeKernelAttention(nn.Module):
    """Gate a map by a 5x5, a dilated 7x7 and a 1x1 convolution of itself (section 3.2). (B, C, H, W) -> same."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.conv_spatial = DilatedDepthwiseConv2d(dim, kernel_size=7, dilation=3, **dd)
        self.conv1 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x):
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class Attention(nn.Module):
    """Large-kernel attention between two pointwise convolutions, with a shortcut of its own. (B, C, H, W) -> same."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.proj_1 = nn.Conv2d(dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.spatial_gating_unit = LargeKernelAttention(dim, **dd)
        self.proj_2 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x):
        return x + self.proj_2(self.spatial_gating_unit(self.act(self.proj_1(x))))


class ConvMlp(nn.Module):
    """Pointwise expansion, depthwise 3x3, GELU, pointwise projection. (B, C, H, W) -> same."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)

    def forward(self, x):
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class Block(PreNormBlock):
    """Pre-norm block of large-kernel attention. (B, C, H, W) -> same."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float = 0.0, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        attn, mlp = Attention(dim, **dd), ConvMlp(dim, int(dim * mlp_ratio), **dd)
        super().__init__(dim, attn, mlp, drop_path, nn.BatchNorm2d, LAYER_SCALE, LayerScale2d, **dd)


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution and a norm. (B, in, H, W) -> (B, out, ceil(H/s), ceil(W/s))."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x):
        # Depthwise and pointwise convolutions run faster channels-last, in which layout all that follow stay.
        return self.norm(self.proj(x.contiguous(memory_format=torch.channels_last)))


class VAN(Pyramid):
    """Visual Attention Network.

    Args:
        dims, depths, mlp_ratios: channels, blocks and expansion of each stage.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    first_conv = 'stages.0.downsample.proj'
    init_module = staticmethod(init_conv_and_linear)
    official_keys = [*PVT_KEYS, (r'\.layer_scale_(\d)$', r'.ls\1.gamma')]

    def __init__(
        self,
        dims=(64, 128, 320, 512),
        depths=(3, 3, 12, 3),
        mlp_ratios=(8, 8, 4, 4),
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        for i, dim in enumerate(dims):
            stride = 2 if i else 4
            self.add_stage(
                PatchEmbed(dims[i - 1] if i else self.in_chans, dim, 3 if i else 7, stride, **dd),
                [Block(dim, mlp_ratios[i], rate, **dd) for rate in rates[i]],
                num_chs=dim,
                stride=stride,
                norm=LayerNorm2d(dim, eps=1e-6, **dd),
            )
        self.finish()


variants(
    VAN,
    van_b0=dict(dims=(32, 64, 160, 256), depths=(3, 3, 5, 2)),
    van_b1=dict(dims=(64, 128, 320, 512), depths=(2, 2, 4, 2)),
    van_b2=dict(dims=(64, 128, 320, 512), depths=(3, 3, 12, 3)),
    van_b3=dict(dims=(64, 128, 320, 512), depths=(3, 5, 27, 3)),
    van_b4=dict(dims=(64, 128, 320, 512), depths=(3, 6, 40, 3)),
    van_b5=dict(dims=(96, 192, 480, 768), depths=(3, 3, 24, 3)),
    van_b6=dict(dims=(96, 192, 384, 768), depths=(6, 6, 90, 6)),
)
