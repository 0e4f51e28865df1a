"""ContMix, the dynamic convolution of OverLoCK (arXiv 2502.20087), whose kernels are mixed from the whole map."""

import torch
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from ..kernels.neighborhood.reference import neighbors
from .large_kernel import GlobalResponseNorm, conv_norm, large_conv, squeeze_excite

__all__ = ['ContextMixing', 'aggregate']


def aggregate(weights: torch.Tensor, value: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Weighted sums of the values in each pixel's window: the second product of neighborhood attention.

    The taps of a row of a window are spread over the whole row of the map, so that the sums of a row of pixels are one
    matrix product: some zeros are multiplied, but no window is gathered. Memory grows with H * W * W.

    Args:
        weights: (B, heads, H, W, kernel_size, kernel_size), rows first.
        value: (B, heads, H, W, head_dim).
        columns, rows: of the map, that each column (W, kernel_size) and row (H, kernel_size) of windows holds.

    Returns:
        (B, heads, H, W, head_dim).
    """
    spread = weights.new_zeros(*weights.shape[:5], value.shape[3])
    spread = spread.scatter(-1, columns[:, None, :].expand_as(weights), weights)  # (B, heads, H, W, kernel_size, W)
    return spread.flatten(4) @ value[:, :, rows].flatten(3, 4)


@register_notrace_module
class ContextMixing(nn.Module):
    """Dynamic convolution by kernels made for each pixel from its affinity to the guide (the paper's ContMix).

    Kernels are shifted inward at borders, not padded. (B, dim + guide_dim, H, W) -> same.

    Args:
        dim, guide_dim: channels of the map, and of the guide behind them.
        num_heads: half of the heads of each kernel.
        kernel_sizes: of the two halves of the heads; the second, the larger, is also that of the convolution beside.
        pooled_size: side of the map that the guide's keys are pooled to.
        inference_mode: have that convolution merged from the start (see `large_conv`).
    """

    def __init__(
        self,
        dim: int,
        guide_dim: int,
        num_heads: int,
        kernel_sizes: tuple[int, int],
        pooled_size: int,
        inference_mode: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        width = dim + guide_dim
        self.split = [dim, guide_dim]
        self.num_heads = 2 * num_heads  # of each kernel
        self.head_dim = dim // (2 * self.num_heads)
        self.scale = (dim // self.num_heads) ** -0.5  # as the authors have it, for half of the channels
        self.kernel_sizes = kernel_sizes
        self.pooled_size = pooled_size
        self.fusion = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, **dd),
            nn.BatchNorm2d(width, **dd),
            nn.GELU(),
            nn.Conv2d(width, dim, 1, **dd),
            GlobalResponseNorm(dim, **dd),
        )
        self.gate = nn.Sequential(*conv_norm(dim, dim, **dd), nn.SiLU())
        self.lepe = nn.Sequential(large_conv(dim, kernel_sizes[1], inference_mode, **dd), nn.BatchNorm2d(dim, **dd))
        self.weight_query = conv_norm(dim, dim // 2, **dd)
        self.weight_key = conv_norm(guide_dim, dim // 2, **dd)
        self.weight_proj = nn.Conv2d(pooled_size**2, sum(size**2 for size in kernel_sizes), 1, **dd)
        self.rpb1, self.rpb2 = (
            nn.Parameter(torch.empty(self.num_heads, 2 * size - 1, 2 * size - 1, **dd)) for size in kernel_sizes
        )
        self.dyconv_proj = conv_norm(dim, dim, **dd)
        self.se_layer = squeeze_excite(dim, **dd)
        self.proj = nn.Sequential(nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, width, 1, **dd))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.rpb1)
        nn.init.zeros_(self.rpb2)

    def forward(self, x):
        value = self.fusion(x)
        gate, local = self.gate(value), self.lepe(value)
        size, short, kernel = x.shape[2:], min(x.shape[2:]), self.kernel_sizes[1]
        if short < kernel:
            larger = [int(kernel / short * side) for side in size]
            value, x = (F.interpolate(each, larger, mode='bilinear') for each in (value, x))
        mixed = self.mix(value, x)
        if short < kernel:
            mixed = F.adaptive_avg_pool2d(mixed, size)
        return self.proj(gate * self.se_layer(self.dyconv_proj(mixed) + local))

    def mix(self, value, x):
        """The dynamic convolution of (B, dim, H, W) by kernels from (B, dim + guide_dim, H, W)."""
        _, _, H, W = value.shape
        x, guide = x.split(self.split, dim=1)
        query = self.heads(self.weight_query(x) * self.scale)
        key = self.heads(self.weight_key(F.adaptive_avg_pool2d(guide, self.pooled_size)))
        # The authors project affinities, query @ key.mT, to taps: the keys projected give the same and are much fewer.
        taps = self.weight_proj.weight.flatten(1) @ key  # (B, heads, taps, head_dim)
        squares = [size**2 for size in self.kernel_sizes]
        parts = zip(
            self.kernel_sizes,
            taps.split(squares, dim=2),
            self.weight_proj.bias.split(squares),
            (self.rpb1, self.rpb2),
            self.heads(value).chunk(2, dim=1),
            strict=True,
        )
        mixed = []
        for size, taps, bias, table, values in parts:
            rows, row_offsets = neighbors(H, size, 1, x.device)
            columns, column_offsets = neighbors(W, size, 1, x.device)
            bias = table[:, row_offsets[:, None, :, None], column_offsets[:, None, :]] + bias.view(size, size)
            scores = query @ taps.mT + bias.flatten(3).flatten(1, 2)  # (B, heads, H * W, size^2)
            weights = scores.softmax(-1).unflatten(-1, (size, size)).unflatten(2, (H, W))
            mixed.append(aggregate(weights, values.unflatten(2, (H, W)), columns, rows))
        return torch.cat(mixed, dim=1).permute(0, 1, 4, 2, 3).flatten(1, 2)

    def heads(self, x):
        """(B, C, H, W) -> (B, heads, H * W, head_dim)."""
        return x.flatten(2).unflatten(1, (-1, self.head_dim)).mT

    def extra_repr(self):
        return f'num_heads={self.num_heads}, kernel_sizes={self.kernel_sizes}'
