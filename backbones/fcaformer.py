"""FcaFormer: Forward Cross Attention in Hybrid Vision Transformer (arXiv 2211.07198).

Early stages are ConvNeXt's. Later ones attend globally, and a block's pixels attend to more than themselves: to a few
tokens that each earlier block of the stage has merged its map into.

Original code: hkzhang-git/FcaFormer (without a licence).
"""

import math
import re

import torch
from timm.layers import ClNormMlpClassifierHead, DropPath, LayerScale, calculate_drop_path_rates, to_2tuple
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from .checkpoints import checkpoint_filter_fn
from .layers import BatchNorm, Stem, apply_nchw, biased_attention, by_images, pairs
from .pyramid import Pyramid, init_truncated
from .registration import variants

__all__ = ['FcaFormer', 'ForwardCrossAttention', 'checkpoint_filter_fn']

MERGED = 4  # pixels along each side that a cross token stands for
MERGE_KERNEL = 7
MAX_SOURCES = 12  # earlier blocks, the nearest, that a block attends to
MLP_RATIO = 4
LAYER_SCALE = 1e-6  # initial
CONVNEXT_NORM_EPS = 1e-6
TABLES = ('attention_biases', 's_token_bias', 's_scale_factors')  # parameters that a size of the map has shaped


def linear_weights(length: int, new_length: int, like: torch.Tensor) -> torch.Tensor:
    """(new_length, length): each row sums to 1 and interpolates; the first and last positions stay what they are."""
    position = torch.arange(new_length, device=like.device, dtype=torch.float32)
    position = (position * (length - 1) / position[-1].clamp(min=1))[:, None]
    known = torch.arange(length, device=like.device, dtype=torch.float32)
    return (1 - (position - known).abs()).clamp(min=0).to(like.dtype)


def resized(tables: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Tables (n, rows, columns) interpolated to another size: offset 0 remains offset 0, and the last the last."""
    n, H, W = tables.shape
    if not torch.compiler.is_exporting() and size == (H, W):
        return tables
    rows, columns = linear_weights(H, size[0], tables), linear_weights(W, size[1], tables)
    return rows.expand(n, -1, -1).bmm(tables).bmm(columns.mT.expand(n, -1, -1))


def between_pixels(table: torch.Tensor) -> torch.Tensor:
    """Biases (heads, H, W) of the distances along both axes -> (heads, H * W, H * W), of each pair of pixels."""
    H, W = table.shape[1:]
    y, x = (torch.arange(side, device=table.device) for side in (H, W))
    rows, columns = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    return pairs(table, rows, columns).flatten(3).flatten(1, 2)


@register_notrace_module
class ForwardCrossAttention(nn.Module):
    """Attention of pixels to all pixels and to the cross tokens of earlier blocks (section 3.2).

    At another size than `map_size`, what belongs to distances and to cross tokens is interpolated.

    Args:
        dim, num_heads: channels and heads.
        map_size: height and width that biases are made for.
        sources: earlier blocks that give cross tokens.
    """

    def __init__(self, dim: int, num_heads: int, map_size: tuple[int, int], sources: int = 0, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.map_size = map_size
        self.sources = sources
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.attention_biases = nn.Parameter(torch.empty(num_heads, math.prod(map_size), **dd))
        if sources:
            self.cross_size = tuple(-(-side // MERGED) for side in map_size)
            tokens = sources * math.prod(self.cross_size)
            self.s_norm = nn.LayerNorm(dim, **dd)
            self.s_token_bias = nn.Parameter(torch.empty(1, num_heads, 1, tokens, **dd))
            self.s_scale_factors = nn.Parameter(torch.empty(1, tokens, 1, **dd))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.attention_biases)
        if self.sources:
            nn.init.zeros_(self.s_token_bias)
            nn.init.ones_(self.s_scale_factors)

    def forward(self, x, cross_tokens=()):
        """(B, H, W, C), and a map (B, ceil(H / 4), ceil(W / 4), C) of each source, the oldest first -> (B, H, W, C)."""
        B, H, W, C = x.shape
        bias = between_pixels(resized(self.attention_biases.unflatten(1, self.map_size), (H, W)))
        keys = x = self.norm1(x.flatten(1, 2))
        if self.sources:
            scale, cross_bias = self.of_cross_tokens(cross_tokens[0].shape[1:3])
            cross = torch.stack(cross_tokens, dim=1).flatten(1, 3)  # (B, tokens, C)
            keys = torch.cat((x, self.s_norm(cross * scale)), dim=1)
            bias = torch.cat((bias, cross_bias.expand(-1, H * W, -1)), dim=2)
        query = F.linear(x, self.qkv.weight[:C], self.qkv.bias[:C]).unflatten(-1, (self.num_heads, -1))
        pair = F.linear(keys, self.qkv.weight[C:], self.qkv.bias[C:]).unflatten(-1, (2, self.num_heads, -1))
        key, value = pair.permute(2, 0, 3, 1, 4)  # (B, heads, H * W + tokens, head_dim)
        x = biased_attention(query.transpose(1, 2), key, value, bias)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))

    def of_cross_tokens(self, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (1, tokens, 1) and biases (heads, 1, tokens) of the cross tokens of maps of this size."""
        scale, bias = (
            resized(table.view(-1, *self.cross_size), size).unflatten(0, (-1, 1, self.sources)).flatten(2)
            for table in (self.s_scale_factors, self.s_token_bias)
        )
        return scale.mT, bias

    def fit(self, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
        """Interpolate the tables of a state dict that were made for square maps of another size."""
        for name in TABLES:
            own, given = getattr(self, name, None), state_dict.get(prefix + name)
            if own is None or given is None or given.shape == own.shape:
                continue
            is_cross = own is not self.attention_biases
            of_map = (1 if name == 's_scale_factors' else self.num_heads) * (self.sources if is_cross else 1)
            side = math.isqrt(given.numel() // of_map)
            if given.numel() == of_map * side**2:
                size = self.cross_size if is_cross else self.map_size
                tables = resized(given.reshape(of_map, side, side), size)
                state_dict[prefix + name] = tables.reshape(own.shape)

    def extra_repr(self):
        return f'num_heads={self.num_heads}, map_size={self.map_size}, sources={self.sources}'


class ConvNorm(nn.Sequential):
    """A convolution without a bias, and BatchNorm. (B, in, H, W) -> (B, out, H / stride, W / stride), rounded up."""

    def __init__(
        self, in_dim: int, dim: int, kernel_size: int, stride: int = 1, groups: int = 1, device=None, dtype=None
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        padding = kernel_size // 2
        self.c = nn.Conv2d(in_dim, dim, kernel_size, stride, padding, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)


class CrossTokens(nn.Conv2d):
    """A token for every 4x4 pixels. (B, H, W, C) -> (B, ceil(H / 4), ceil(W / 4), C)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, dim, MERGE_KERNEL, MERGED, groups=dim, bias=False, device=device, dtype=dtype)

    def forward(self, x):
        # Were the convolution to pad, oneDNN (torch 2.15) would leave parts of the gradient of its weights in bfloat16
        # unset for maps of two pixels a side.
        x = F.pad(x, (0, 0, *(MERGE_KERNEL // 2,) * 4))
        return apply_nchw(super().forward, x)


class LinearNorm(nn.Sequential):
    """A pointwise convolution without a bias, and BatchNorm. (B, H, W, in) -> (B, H, W, out)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.c = nn.Linear(in_dim, dim, bias=False, **dd)
        self.bn = BatchNorm(dim, **dd)


@register_notrace_module
class NormMlp(nn.Module):
    """A norm and a perceptron. (B, H, W, C) -> same."""

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = nn.LayerNorm(dim, eps=eps, **dd)
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim, **dd)

    def forward(self, x):
        return by_images(lambda x: self.fc2(self.act(self.fc1(self.norm(x)))), x)


class ConvNeXtBlock(nn.Module):
    """ConvNeXt's block (arXiv 2201.03545). (B, H, W, C) -> same."""

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)
        self.mlp = NormMlp(dim, CONVNEXT_NORM_EPS, **dd)
        self.ls = LayerScale(dim, LAYER_SCALE, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        return x + self.drop_path(self.ls(self.mlp(apply_nchw(self.dwconv, x))))


class Block(nn.Module):
    """Forward cross attention, a depthwise convolution that nothing bypasses, and a perceptron (section 3.3).

    The first block of a stage takes its map (B, H, W, C), and the last gives one. Between blocks goes a tuple: the map,
    then the cross tokens of each block so far, (B, ceil(H / 4), ceil(W / 4), C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int],
        index: int = 0,
        is_last: bool = False,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.is_first = index == 0
        self.attn = ForwardCrossAttention(dim, num_heads, map_size, min(index, MAX_SOURCES), **dd)
        self.ls1 = LayerScale(dim, LAYER_SCALE, **dd)
        self.dw_conv = None if is_last else CrossTokens(dim, **dd)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = NormMlp(dim, **dd)
        self.ls2 = LayerScale(dim, LAYER_SCALE, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, state):
        x, *cross_tokens = (state,) if self.is_first else state
        x = x + self.drop_path(self.ls1(self.attn(x, cross_tokens[-MAX_SOURCES:])))
        new = () if self.dw_conv is None else (self.dw_conv(x),)
        x = apply_nchw(self.local_conv, x)
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return (x, *cross_tokens, *new) if new else x


class PatchMerging(nn.Module):
    """An inverted bottleneck with stride 2. (B, H, W, in) -> (B, ceil(H / 2), ceil(W / 2), out)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = LinearNorm(in_dim, dim, **dd)
        self.conv2 = ConvNorm(dim, dim, 3, 2, groups=dim, **dd)
        self.conv3 = LinearNorm(dim, dim, **dd)
        self.act = nn.GELU()

    def forward(self, x):
        return self.conv3(self.act(apply_nchw(self.conv2, self.act(self.conv1(x)))))


class FcaFormer(Pyramid):
    """FcaFormer, the hybrid with ConvNeXt.

    Args:
        dims, depths: channels and blocks of each stage.
        num_heads: of the attention in each stage; a stage of ConvNeXt blocks has 0.
        img_size: side, or height and width, of the images that biases are made for. At others they are interpolated,
            as are those of a checkpoint for another size.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    output_fmt = 'NHWC'
    first_conv = 'stages.0.downsample.0.c'
    init_module = staticmethod(init_truncated)
    official_keys = [
        (r'^patch_embed\.seq\.', 'stages.0.downsample.'),
        (r'^layer_(\d)\.downsample\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.'),
        (r'^layer_(\d)\.blocks\.', r'stages.\1.blocks.'),
        (rf'(\.blocks\.\d+)\.({"|".join(TABLES)}|norm1|s_norm|qkv|proj)\b', r'\1.attn.\2'),
        (r'(\.blocks\.\d+)\.norm\.', r'\1.mlp.norm.'),
        (r'\.pwconv(\d)\.', r'.mlp.fc\1.'),
        (r'(\.blocks\.\d+)\.gamma(?:_(\d))?$', r'\1.ls\2.gamma'),
        (r'^norm_head\.', 'head.norm.'),
    ]

    def __init__(
        self,
        dims=(64, 128, 192, 320),
        depths=(2, 2, 6, 2),
        num_heads=(0, 0, 6, 10),
        img_size: int | tuple[int, int] = 224,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        if any(heads and dim % heads for dim, heads in zip(dims, num_heads, strict=True)):
            raise ValueError(f'num_heads must divide dims, got {num_heads} and {dims}.')
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        def block(i, j):
            if not num_heads[i]:
                return ConvNeXtBlock(dims[i], rates[i][j], **dd)
            map_size = tuple(-(-side // 2 ** (i + 2)) for side in to_2tuple(img_size))
            return Block(dims[i], num_heads[i], map_size, j, j + 1 == depths[i], rates[i][j], **dd)

        for i, dim in enumerate(dims):
            self.add_stage(
                PatchMerging(dims[i - 1], dim, **dd) if i else self._stem(dim, **dd),
                [block(i, j) for j in range(depths[i])],
                num_chs=dim,
                stride=2 if i else 4,
            )
        self.finish()

    def _stem(self, dim: int, **dd) -> Stem:
        half = dim // 2
        return Stem(ConvNorm(self.in_chans, half, 3, 2, **dd), nn.GELU(), ConvNorm(half, dim, 3, 2, **dd))

    @torch.jit.ignore
    def make_head(self, in_features: int, num_classes: int, pool_type: str, drop_rate: float, device=None, dtype=None):
        """Pooling, norm, dropout and classifier."""
        dd = {'device': device, 'dtype': dtype}
        return ClNormMlpClassifierHead(
            in_features, num_classes, None, pool_type, drop_rate, norm_layer=nn.LayerNorm, **dd
        )

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under our keys, with biases for the model's size; ours passes through."""
        mapped = super().map_official(state_dict)
        for key, tensor in mapped.items():
            if re.search(r'\.downsample\.conv[13]\.c\.weight$', key):
                mapped[key] = tensor.flatten(1)  # theirs is a convolution
        for name, module in self.named_modules():
            if isinstance(module, ForwardCrossAttention):
                module.fit(mapped, f'{name}.')
        return mapped


variants(
    FcaFormer,
    fcaformer_l1=dict(drop_path_rate=0.1),
    fcaformer_l2=dict(dims=(96, 192, 320, 480), depths=(2, 2, 7, 2), num_heads=(0, 0, 10, 15), drop_path_rate=0.1),
    fcaformer_l3=dict(dims=(96, 192, 320, 512), depths=(3, 6, 12, 3), num_heads=(0, 0, 10, 16), drop_path_rate=0.1),
    fcaformer_l4=dict(dims=(128, 256, 512, 768), depths=(3, 6, 12, 3), num_heads=(0, 0, 16, 24), drop_path_rate=0.1),
)
