"""OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels (arXiv 2502.20087).

A base net encodes the image, an overview net takes a coarse look at it, and a focus net looks closely: it works on the
base net's map, and its kernels are made for each pixel from how this relates to what the overview found.

Original code: LMMMEng/OverLoCK (Apache-2.0).
"""

import torch
from timm.layers import (
    DropPath,
    LayerNorm2d,
    SqueezeExcite,
    calculate_drop_path_rates,
    get_device_dtype,
)
from timm.models import register_notrace_function, register_notrace_module
from torch import nn
from torch.nn import functional as F

from ..kernels.neighborhood.reference import neighbors
from .checkpoints import checkpoint_filter_fn, rename
from .pyramid import Pyramid
from .registration import variants

__all__ = ['OverLoCK', 'checkpoint_filter_fn']

# (size, dilation) of the convolutions that are trained beside a large one, by its size; together they fit into it.
DILATED = {
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
SMALL_KERNEL = 5  # of the dynamic convolution of half of the heads
POOLED = 7  # side of the map that the guide's keys are pooled to
MLP_RATIO, FOCUS_MLP_RATIO = 4, 3
PROJECTION = 1024  # channels of what is pooled for the classifier
MLP_KEYS = {'0': 'fc1', '2': 'dwconv', '3': 'grn', '4': 'fc2'}  # the authors' of modules in a sequence, and ours
BLOCK_KEYS = {
    **{'0': 'norm', '1': 'conv', '2': 'bn', r'3\.proj\.1': 'se.fc1', r'3\.proj\.3': 'se.fc2'},
    **{'4': 'mlp.fc1', '6': 'mlp.dwconv', '7': 'mlp.grn', '8': 'mlp.fc2'},
}


class Scale(nn.Module):
    """Scale and shift each channel: the authors' layer scale, a depthwise 1x1 convolution. (B, C, H, W) -> same."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.weight = nn.Parameter(torch.empty(dim, 1, 1, 1, **dd))
        self.bias = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, 0])


class ResidualConv2d(nn.Conv2d):
    """A depthwise 3x3 convolution added to its input. (B, C, H, W) -> same."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x):
        return x + super().forward(x)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The convolution whose kernel holds the shortcut too."""
        dim, like = self.in_channels, self.weight
        conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=like.device, dtype=like.dtype)
        conv.load_state_dict(self.state_dict())
        conv.weight[:, :, 1, 1] += 1
        return conv


@register_notrace_module
class DilatedReparamConv(nn.Module):
    """A large depthwise convolution, trained as a sum of itself and dilated smaller ones (UniRepLKNet, 2311.15599).

    In evaluation they are one convolution: their kernels are merged on each call, or for good by `reparameterize`, as
    `zoo.fuse` does. (B, C, H, W) -> same.
    """

    def __init__(self, dim: int, kernel_size: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.kernel_size = kernel_size
        self.lk_origin = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False, **dd)
        self.origin_bn = nn.BatchNorm2d(dim, **dd)
        self.dil_convs, self.dil_bns = nn.ModuleDict(), nn.ModuleDict()
        for size, dilation in DILATED[kernel_size]:
            name = f'k{size}_{dilation}'
            padding = dilation * (size // 2)
            self.dil_convs[name] = nn.Conv2d(dim, dim, size, 1, padding, dilation, groups=dim, bias=False, **dd)
            self.dil_bns[name] = nn.BatchNorm2d(dim, **dd)

    def branches(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [
            (self.lk_origin, self.origin_bn),
            *((conv, self.dil_bns[name]) for name, conv in self.dil_convs.items()),
        ]

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Kernel (C, 1, size, size) and bias (C) of the one convolution."""
        kernel = torch.zeros_like(self.lk_origin.weight)
        bias = torch.zeros_like(self.origin_bn.bias)
        for conv, norm in self.branches():
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            margin = self.kernel_size // 2 - conv.padding[0]
            taps = slice(margin, self.kernel_size - margin, conv.dilation[0])
            kernel[:, :, taps, taps] += conv.weight * scale[:, None, None, None]
            bias = bias + norm.bias - norm.running_mean * scale
        return kernel, bias

    def forward(self, x):
        if self.training:
            return sum(norm(conv(x)) for conv, norm in self.branches())
        kernel, bias = self.merged()
        return F.conv2d(x, kernel, bias, padding=self.kernel_size // 2, groups=len(kernel))

    def reparameterize(self) -> nn.Conv2d:
        kernel, bias = self.merged()
        conv = large_conv(len(kernel), self.kernel_size, True, device=kernel.device, dtype=kernel.dtype)
        conv.load_state_dict({'weight': kernel, 'bias': bias})
        return conv


def large_conv(dim: int, kernel_size: int, inference_mode: bool, device=None, dtype=None) -> nn.Module:
    """A large depthwise convolution, in the form to train or, in `inference_mode`, already merged."""
    dd = {'device': device, 'dtype': dtype}
    if inference_mode:
        return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
    return DilatedReparamConv(dim, kernel_size, **dd)


def squeeze_excite(dim: int, device=None, dtype=None) -> SqueezeExcite:
    return SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU, device=device, dtype=dtype)


class GlobalResponseNorm(nn.Module):
    """Scale channels by their norms over the map, relative to each other (arXiv 2301.00808). (B, C, H, W) -> same."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        scale = self.gamma * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + 1
        return torch.addcmul(self.beta, x, scale)


class ConvMlp(nn.Module):
    """A perceptron with a residual convolution and a norm in its hidden layer. (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act = nn.GELU()
        self.dwconv = ResidualConv2d(hidden_dim, **dd)
        self.grn = GlobalResponseNorm(hidden_dim, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)

    def forward(self, x):
        return self.fc2(self.grn(self.dwconv(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Large-kernel block of the base net and the overview net. (B, C, H, W) -> same."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        layer_scale: bool,
        inference_mode: bool = False,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dwconv = ResidualConv2d(dim, **dd)
        self.norm = LayerNorm2d(dim, **dd)
        self.conv = large_conv(dim, kernel_size, inference_mode, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.se = squeeze_excite(dim, **dd)
        self.mlp = ConvMlp(dim, MLP_RATIO * dim, **dd)
        self.ls = Scale(dim, **dd) if layer_scale else nn.Identity()  # of the shortcut
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        x = self.dwconv(x)
        y = self.se(self.bn(self.conv(self.norm(x))))
        return self.ls(x) + self.drop_path(self.mlp(y))


def conv_norm(in_dim: int, dim: int, kernel_size: int = 1, stride: int = 1, device=None, dtype=None) -> nn.Sequential:
    dd = {'device': device, 'dtype': dtype}
    conv = nn.Conv2d(in_dim, dim, kernel_size, stride, kernel_size // 2, bias=False, **dd)
    return nn.Sequential(conv, nn.BatchNorm2d(dim, **dd))


class Stem(nn.Sequential):
    """Four convolutions, two of them strided. (B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            *(*conv_norm(in_chans, dim // 2, 3, 2, **dd), nn.GELU()),
            *(*conv_norm(dim // 2, dim // 2, 3, **dd), nn.GELU()),
            *(*conv_norm(dim // 2, dim, 3, 2, **dd), nn.GELU()),
            *conv_norm(dim, dim, 3, **dd),
        )

    def forward(self, x):
        return super().forward(x.contiguous(memory_format=torch.channels_last))


@register_notrace_function
def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A map (B, C, H, W) interpolated to the size of another."""
    return F.interpolate(x, like.shape[2:], mode='bilinear')


class Overview(nn.Module):
    """The overview net: a coarse look at the base net's map, from which comes the guide of the focus net.

    (B, in_dim, H, W) -> the first state of the focus net (see `FocusBlock`).
    """

    def __init__(self, in_dim: int, dim: int, guide_dim: int, blocks: list[nn.Module], device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dim = dim
        self.downsample = conv_norm(in_dim, dim, 3, 2, **dd)
        self.blocks = nn.Sequential(*blocks)
        self.proj = nn.Conv2d(dim, guide_dim, 1, **dd)
        self.aux_head = None

    def reset_classifier(self, num_classes: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        fc = nn.Conv2d(self.dim, num_classes, 1, **dd) if num_classes else nn.Identity()
        layers = nn.BatchNorm2d(self.dim, **dd), nn.AdaptiveAvgPool2d(1), fc, nn.Flatten()
        self.aux_head = nn.Sequential(*layers).train(self.training)

    def forward(self, x):
        overview = self.blocks(self.downsample(x))
        coarse = self.proj(overview)
        guide = resized(coarse, x)
        logits = [self.aux_head(overview)] if self.training and self.aux_head is not None else []
        return torch.cat([x, guide], dim=1), guide, coarse, *logits


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

    Half of the heads have a small kernel, half a large one. Kernels are shifted inward at borders, not padded.
    (B, dim + guide_dim, H, W) -> same.
    """

    def __init__(
        self,
        dim: int,
        guide_dim: int,
        num_heads: int,
        kernel_size: int,
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
        self.kernel_sizes = (SMALL_KERNEL, kernel_size)
        self.fusion = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, **dd),
            nn.BatchNorm2d(width, **dd),
            nn.GELU(),
            nn.Conv2d(width, dim, 1, **dd),
            GlobalResponseNorm(dim, **dd),
        )
        self.gate = nn.Sequential(*conv_norm(dim, dim, **dd), nn.SiLU())
        self.lepe = nn.Sequential(large_conv(dim, kernel_size, inference_mode, **dd), nn.BatchNorm2d(dim, **dd))
        self.weight_query = conv_norm(dim, dim // 2, **dd)
        self.weight_key = conv_norm(guide_dim, dim // 2, **dd)
        self.weight_proj = nn.Conv2d(POOLED**2, sum(size**2 for size in self.kernel_sizes), 1, **dd)
        self.rpb1, self.rpb2 = (
            nn.Parameter(torch.empty(self.num_heads, 2 * size - 1, 2 * size - 1, **dd)) for size in self.kernel_sizes
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
        key = self.heads(self.weight_key(F.adaptive_avg_pool2d(guide, POOLED)))
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


class FocusBlock(nn.Module):
    """Block of the focus net: a context-mixing dynamic convolution and a perceptron.

    Its input and output is a state: the map (B, dim + guide_dim, H, W), whose last channels began as the guide, then
    the guide itself (B, guide_dim, H, W), then what later modules need. All blocks but the first, whose map has the
    guide as it is, remind the map of the guide.
    """

    def __init__(
        self,
        dim: int,
        guide_dim: int,
        num_heads: int,
        kernel_size: int,
        is_first: bool = False,
        inference_mode: bool = False,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        width = dim + guide_dim
        self.split = [dim, guide_dim]
        self.x_scale = None if is_first else Scale(guide_dim, **dd)
        self.h_scale = None if is_first else Scale(guide_dim, **dd)
        self.dwconv1 = ResidualConv2d(width, **dd)
        self.norm1 = LayerNorm2d(width, **dd)
        self.mix = ContextMixing(dim, guide_dim, num_heads, kernel_size, inference_mode, **dd)
        self.ls1 = Scale(width, **dd)  # of the shortcut, as ls2
        self.dwconv2 = ResidualConv2d(width, **dd)
        self.norm2 = LayerNorm2d(width, **dd)
        self.mlp = ConvMlp(width, FOCUS_MLP_RATIO * dim, **dd)
        self.ls2 = Scale(width, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, state):
        x, guide, *rest = state
        if self.x_scale is not None:
            x, remembered = x.split(self.split, dim=1)
            x = torch.cat([x, self.x_scale(remembered) + self.h_scale(guide)], dim=1)
        x = self.dwconv1(x)
        x = self.ls1(x) + self.drop_path(self.mix(self.norm1(x)))
        x = self.dwconv2(x)
        x = self.ls2(x) + self.drop_path(self.mlp(self.norm2(x)))
        return x, guide, *rest


class FocusDownsample(nn.Module):
    """The state of the focus net's second stage from that of its first."""

    def __init__(self, in_dim: int, dim: int, guide_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.split = [in_dim, guide_dim]
        self.x_proj = conv_norm(in_dim, dim, 3, 2, **dd)
        self.h_proj = conv_norm(guide_dim, guide_dim, 3, 2, **dd)

    def forward(self, state):
        x, _, coarse, *rest = state
        x, remembered = x.split(self.split, dim=1)
        return torch.cat([self.x_proj(x), self.h_proj(remembered)], dim=1), coarse, *rest


class Projection(nn.Sequential):
    """What is pooled for the classifier, of a state of the focus net; with the overview's logits if it holds some."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__(*conv_norm(in_dim, dim, device=device, dtype=dtype), nn.SiLU())

    def forward(self, state):
        x, _, *logits = state
        x = super().forward(x)
        return (x, *logits) if logits else x


class Passed(nn.Identity):
    """A state as it is. torch.fx looks into this module, and so sees a tuple, where PyTorch's own is opaque."""


class Map(nn.Module):
    """The map of a state of the focus net."""

    def forward(self, state):
        return state[0]


class OverLoCK(Pyramid):
    """OverLoCK.

    The last two levels are the focus net's: its map and what it remembers of the guide, concatenated. The third stage
    has the blocks of the base net, the overview net as one block, and those of the focus net.

    Args:
        dims: channels of the base net's three stages and of the overview net; a quarter of the last is the guide's.
        depths: blocks of the base net's three stages, the overview net, and the focus net's two stages.
        num_heads: of the focus net's two stages, for each half of each kernel size.
        kernel_sizes: of the stages and the overview net; the focus net's are the last two.
        aux_head: have a second classifier, on the overview: in training the model returns the logits of both, (of the
            focus, of the overview).
        inference_mode: have the large convolutions merged from the start; takes the authors' merged checkpoints.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    first_conv = 'stages.0.downsample.0'

    def __init__(
        self,
        dims=(56, 112, 256, 336),
        depths=(2, 2, 3, 2, 6, 2),
        num_heads=(4, 6),
        kernel_sizes=(17, 15, 13, 7),
        aux_head: bool = False,
        inference_mode: bool = False,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        if any(size not in DILATED for size in kernel_sizes):
            raise ValueError(f'kernel_sizes must be of {", ".join(map(str, DILATED))}, got {kernel_sizes}.')
        if any(dim % (4 * heads) for dim, heads in zip(dims[2:], num_heads, strict=True)):
            raise ValueError(f'Four times num_heads must divide the last two dims, got {num_heads} and {dims}.')
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        self.depths = tuple(depths)
        self.inference_mode = inference_mode
        guide_dim = dims[3] // 4
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        base_net = [
            [Block(dims[i], kernel_sizes[i], i >= 2, inference_mode, rate, **dd) for rate in rates[i]] for i in range(4)
        ]
        focus_net = [
            [
                FocusBlock(dims[i], guide_dim, heads, kernel_sizes[i], i == 2 and not j, inference_mode, rate, **dd)
                for j, rate in enumerate(rates[i + 2])
            ]
            for i, heads in zip((2, 3), num_heads, strict=True)
        ]
        overview = Overview(dims[2], dims[3], guide_dim, base_net[3], **dd)
        self.has_aux_head = aux_head
        if aux_head:
            overview.reset_classifier(self.num_classes, **dd)
        self.add_stage(Stem(self.in_chans, dims[0], **dd), base_net[0], num_chs=dims[0], stride=4)
        self.add_stage(conv_norm(dims[0], dims[1], 3, 2, **dd), base_net[1], num_chs=dims[1], stride=2)
        blocks = [*base_net[2], overview, *focus_net[0]]
        self.add_stage(
            conv_norm(dims[1], dims[2], 3, 2, **dd), blocks, num_chs=dims[2] + guide_dim, stride=2, norm=Passed()
        )
        downsample = FocusDownsample(dims[2], dims[3], guide_dim, **dd)
        self.add_stage(downsample, focus_net[1], num_chs=dims[3] + guide_dim, stride=2, norm=Passed())
        self.finish(Projection(dims[3] + guide_dim, PROJECTION, **dd), num_features=PROJECTION)

    def forward_head(self, x, pre_logits: bool = False):
        if isinstance(x, tuple):
            return super().forward_head(x[0], pre_logits), x[1]
        return super().forward_head(x, pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        super().reset_classifier(num_classes, global_pool, reset_other)
        for module in self.modules():
            if self.has_aux_head and isinstance(module, Overview):
                module.reset_classifier(num_classes, **get_device_dtype(self))

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop what the chosen levels don't need; returns their indices."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if len(self.stages) > 2 and isinstance(self.norm, nn.Identity):
            self.norm = Map()
        return take

    def _to_fmt(self, x, fmt: str):
        return super()._to_fmt(x[0] if isinstance(x, tuple) else x, fmt)

    @staticmethod
    def init_module(module):
        """Convolutions and linears truncated normal, with a standard deviation of 0.02."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """As every pyramid's, with the overview net's blocks a layer each."""
        layers = super().group_matcher(coarse)
        if not coarse:
            overview = rf'^stages\.(2)\.blocks\.({self.depths[2]})'
            layers['blocks'] = [
                (rf'{overview}\.downsample', (0,)),
                (rf'{overview}\.blocks\.(\d+)', None),
                (rf'{overview}\.(?:proj|aux_head)', (99999,)),
                *layers['blocks'],
            ]
        return layers

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under our keys; ours passes through. A classifier that the model lacks is dropped."""
        overview = f'stages.2.blocks.{self.depths[2]}.'
        mixer = 'fusion|gate|lepe|weight_query|weight_key|weight_proj|rpb1|rpb2|dyconv_proj|se_layer|proj'
        rules = [
            *((rf'^(blocks\d\.\d+)\.proj\.{key}\.', rf'\1.{name}.') for key, name in BLOCK_KEYS.items()),
            *((rf'^(sub_blocks\d\.\d+)\.mlp\.{key}\.', rf'\1.mlp.{name}.') for key, name in MLP_KEYS.items()),
            (rf'^(sub_blocks\d\.\d+)\.({mixer})\b', r'\1.mix.\2'),
            (r'^(sub_blocks.*\.se_layer)\.proj\.1\.', r'\1.fc1.'),
            (r'^(sub_blocks.*\.se_layer)\.proj\.3\.', r'\1.fc2.'),
            (r'^(sub_blocks.*\.weight_key)\.(\d)\.', lambda m: f'{m[1]}.{int(m[2]) - 1}.'),  # after a pooling
            (r'\.dil_(conv|bn)_(k\d+_\d+)\.', r'.dil_\1s.\2.'),
            (r'\.lk_origin\.', '.' if self.inference_mode else '.lk_origin.'),
            (r'^patch_embed([123])\.', lambda m: f'stages.{int(m[1]) - 1}.downsample.'),
            (r'^blocks([123])\.', lambda m: f'stages.{int(m[1]) - 1}.blocks.'),
            (r'^patch_embed4\.', f'{overview}downsample.'),
            (r'^blocks4\.', f'{overview}blocks.'),
            (r'^aux_head\.', f'{overview}aux_head.'),
            (r'^high_level_proj\.', f'{overview}proj.'),
            (r'^sub_blocks3\.(\d+)\.', lambda m: f'stages.2.blocks.{self.depths[2] + 1 + int(m[1])}.'),
            (r'^patch_embedx\.', 'stages.3.downsample.'),
            (r'^sub_blocks4\.', 'stages.3.blocks.'),
            (r'^head\.([01])\.', r'norm.\1.'),
            (r'^head\.4\.', 'head.fc.'),
        ]
        mapped = rename(state_dict, rules)
        if 'head.fc.weight' in mapped:
            mapped['head.fc.weight'] = mapped['head.fc.weight'].flatten(1)  # theirs is a convolution
        unused = () if self.has_aux_head else (f'{overview}aux_head.',)
        return {key: tensor for key, tensor in mapped.items() if not key.startswith(unused)}


variants(
    OverLoCK,
    overlock_xt=dict(drop_path_rate=0.1),
    overlock_t=dict(dims=(64, 128, 256, 512), depths=(4, 4, 6, 2, 12, 2), num_heads=(4, 8), drop_path_rate=0.15),
    overlock_s=dict(dims=(64, 128, 320, 512), depths=(6, 6, 8, 3, 16, 3), num_heads=(8, 16), drop_path_rate=0.4),
    overlock_b=dict(dims=(80, 160, 384, 576), depths=(8, 8, 10, 4, 20, 4), num_heads=(6, 9), drop_path_rate=0.5),
)
