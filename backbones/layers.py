"""Layers that several families share: blocks, patches, convolutions and norms of channels-last maps, padding."""

from collections.abc import Callable

import torch
from timm.layers import DropPath, LayerScale
from timm.models import register_notrace_function, register_notrace_module
from torch import nn
from torch.nn import functional as F

__all__ = [
    'BatchNorm',
    'ConvMlp',
    'Downsample',
    'PaddedConv2d',
    'PatchEmbed',
    'PointwiseConv',
    'PreNormBlock',
    'SameConv2d',
    'Stem',
    'apply_nchw',
    'biased_attention',
    'by_images',
    'pad_bottom_right',
    'pad_to_stride',
    'pairs',
]

# Pixels of images that CPU inference takes at a time through what is wide inside, so that this stays in cache.
TOKENS = 1568


def apply_nchw(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run a module for (B, C, H, W) maps on a (B, H, W, C) map, without copies where it keeps channels last."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def by_images(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function` of maps (B, H, W, C), each of which it takes by itself; for modules that torch.fx does not trace.

    Eager inference on a CPU takes some images at a time: what the function holds in between stays in cache then, and
    no large memory is asked of the system, which takes as long as computing in it.
    """
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    images = max(1, TOKENS // max(1, x.shape[1] * x.shape[2]))
    if graph or torch.is_grad_enabled() or x.device.type != 'cpu' or images >= len(x):
        return function(x)
    return torch.cat([function(some) for some in x.split(images)])


@register_notrace_function
def pad_bottom_right(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Append zero rows and columns to a (B, H, W, C) map to make it height x width, which must not be less."""
    rows, columns = height - x.shape[1], width - x.shape[2]
    return F.pad(x, (0, 0, 0, columns, 0, rows)) if rows or columns else x


@register_notrace_function
def pad_to_stride(x: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
    """Append zero rows and columns to a (B, C, H, W) map until the stride divides its sides."""
    rows, columns = -x.shape[2] % stride[0], -x.shape[3] % stride[1]
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x


def pairs(table: torch.Tensor, row_index: torch.Tensor, column_index: torch.Tensor) -> torch.Tensor:
    """The bias of each pixel for each key, (heads, H, W, key rows, key columns).

    Args:
        table: biases (heads, rows, columns) by where keys lie from pixels.
        row_index, column_index: in it, of each pair along an axis: (H, key rows), (W, key columns).
    """
    index = row_index[:, None, :, None] * table.shape[2] + column_index[:, None]
    return table.flatten(1).index_select(1, index.flatten()).unflatten(1, index.shape)


@register_notrace_function
def biased_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale * query key^T + bias) value, of a learned bias that all images share.

    Args:
        query: (B, heads, N, head_dim).
        key, value: (B, heads, M, head_dim).
        bias: (heads, N, M), of the others' dtype.
        scale: of the products; head_dim**-0.5 unless given.

    Returns:
        (B, heads, N, head_dim).
    """
    if torch.compiler.is_exporting():  # four axes choose a kernel that ONNX has not, and another's strides
        return F.scaled_dot_product_attention(query, key, value, bias, scale=scale)
    if query.device.type != 'cpu' or not (bias.requires_grad and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(query, key, value, bias[None], scale=scale)  # three axes: no fused kernel
    # On CPUs no fused kernel computes the gradient of a bias, and what stands in for it is slower than this.
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (query * scale @ key.mT + bias).softmax(-1).to(value.dtype) @ value


class PreNormBlock(nn.Module):
    """The residual block of transformers: x + attn(norm1(x)), and then the same with the perceptron. Any map -> same.

    Args:
        dim: channels.
        attn: the token mixer, whatever it mixes by.
        mlp: the perceptron.
        drop_path: rate of stochastic depth, of both.
        norm_layer: what makes a norm of `dim` channels.
        layer_scale: initial value of the scales of the two residual branches; no scales if None.
        scale_layer: what makes a scale of `dim` channels and an initial value: LayerScale2d for (B, C, H, W) maps.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        layer_scale: float | None = None,
        scale_layer: Callable[..., nn.Module] = LayerScale,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.ls1 = scale_layer(dim, layer_scale, **dd) if layer_scale else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp
        self.ls2 = scale_layer(dim, layer_scale, **dd) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Stem(nn.Sequential):
    """Convolutions and norms of images. (B, in_chans, H, W) -> (B, rows, columns, C)."""

    def forward(self, x):
        return super().forward(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """A strided convolution (or several), `proj`, and a norm. (B, in_chans, H, W) -> (B, rows, columns, dim)."""

    def __init__(self, proj: nn.Module, dim: int, device=None, dtype=None):
        super().__init__()
        self.proj = proj
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(PatchEmbed):
    """The same between stages, of maps (B, H, W, C)."""

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2))


class ConvMlp(nn.Module):
    """A perceptron whose hidden layer passes, or has added to it, a depthwise 3x3 convolution. (B, H, W, C) -> same."""

    def __init__(self, dim: int, hidden_dim: int, residual: bool = False, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.residual = residual
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x):
        x = self.fc1(x)
        near = apply_nchw(self.dwconv, x)
        return self.fc2(self.act(x + near if self.residual else near))


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of channels-last maps or tokens, as a product of matrices. (..., in) -> (..., out)."""

    def forward(self, x):
        return F.linear(x, self.weight.flatten(1), self.bias)


class PaddedConv2d(nn.Conv2d):
    """A convolution into patches of its stride that loses no row or column: n -> ceil(n / stride)."""

    def forward(self, x):
        return super().forward(pad_to_stride(x, self.stride))


@register_notrace_module
class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's 'SAME': n -> ceil(n / stride), and the odd row or column is at the end.

    `kernel_size` is square and at least `stride`, which is one number for both axes.
    """

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int = 1, **kwargs):
        super().__init__(in_chans, dim, kernel_size, stride, padding='same' if stride == 1 else 0, **kwargs)

    def forward(self, x):
        step, size = self.stride[0], self.kernel_size[0]
        if step > 1:
            rows, columns = ((side - 1) // step * step + size - side for side in x.shape[2:])
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


@register_notrace_module
class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d of (B, H, W, C) maps."""

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
