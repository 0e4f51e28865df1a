"""MaxViT: Multi-Axis Vision Transformer (arXiv 2204.01697).

A block is a mobile convolution, attention within contiguous windows of a map, and attention over a grid of pixels
spread evenly over the whole map: local and global attention at a cost linear in the pixels.

Original code: google-research/maxvit (Apache-2.0), in TensorFlow. The weights are its authors' as timm ported them:
state dicts of timm's `maxvit_*_tf_*` are those of these models.
"""

from collections.abc import Mapping
from functools import partial

import torch
from timm.layers import (
    DropPath,
    LayerNorm2d,
    Mlp,
    NormMlpClassifierHead,
    SqueezeExcite,
    calculate_drop_path_rates,
    to_2tuple,
)
from timm.models import register_notrace_function, register_notrace_module
from torch import nn
from torch.nn import functional as F

from ..kernels import window_attention
from . import checkpoints
from .checkpoints import CheckpointError
from .layers import PreNormBlock, SameConv2d
from .pyramid import Pyramid, init_conv
from .registration import variants

__all__ = ['MaxViT', 'checkpoint_filter_fn']

HEAD_DIM = 32  # section 4.1, as are the two ratios
EXPANSION = 4  # of the mobile convolutions, in output channels, and of the MLPs
SQUEEZE = 0.25  # hidden width of squeeze and excitation, in output channels
BATCH_NORM_EPS = 1e-3  # TensorFlow's default, as the official code has it
LAYER_NORM_EPS = 1e-5

GELU = partial(nn.GELU, approximate='tanh')
TABLE = 'relative_position_bias_table'


@register_notrace_function
def average_pool(x: torch.Tensor) -> torch.Tensor:
    """Averages of 2x2 pixels: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)).

    Beyond a map of odd size are zeros that count, as in timm; TensorFlow would leave them out of the averages.
    """
    if torch.compiler.is_exporting():  # with ceil_mode a graph would be for odd sizes, or for even ones
        rows, columns = ((side - 1) // 2 * 2 + 2 - side for side in x.shape[2:])
        return F.avg_pool2d(F.pad(x, (0, columns, 0, rows)), 2)
    return F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=4)


class Shortcut(nn.Module):
    """Halve a map by averages, and widen it if need be. (B, in, H, W) -> (B, out, ceil(H/2), ceil(W/2))."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        widens = dim != in_chans
        self.expand = nn.Conv2d(in_chans, dim, 1, device=device, dtype=dtype) if widens else nn.Identity()

    def forward(self, x):
        return self.expand(average_pool(x))


class MBConv(nn.Module):
    """Mobile convolution with squeeze and excitation, after a norm (section 3.3, equations 4 and 5).

    (B, in, H, W) -> (B, out, ceil(H/stride), ceil(W/stride)).
    """

    def __init__(self, in_chans: int, dim: int, stride: int, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        norm = partial(nn.BatchNorm2d, eps=BATCH_NORM_EPS, **dd)
        hidden_dim = EXPANSION * dim
        self.shortcut = Shortcut(in_chans, dim, **dd) if stride == 2 else nn.Identity()
        self.pre_norm = norm(in_chans)
        self.conv1_1x1 = nn.Conv2d(in_chans, hidden_dim, 1, bias=False, **dd)
        self.norm1 = norm(hidden_dim)
        self.act1 = GELU()
        self.conv2_kxk = SameConv2d(hidden_dim, hidden_dim, 3, stride, groups=hidden_dim, bias=False, **dd)
        self.norm2 = norm(hidden_dim)
        self.act2 = GELU()
        self.se = SqueezeExcite(hidden_dim, rd_channels=int(SQUEEZE * dim), act_layer=nn.SiLU, **dd)
        self.conv3_1x1 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        shortcut = self.shortcut(x)
        x = self.act1(self.norm1(self.conv1_1x1(self.pre_norm(x))))
        x = self.act2(self.norm2(self.conv2_kxk(x)))
        return self.drop_path(self.conv3_1x1(self.se(x))) + shortcut


class RelativePositionBias(nn.Module):
    """A learned bias for each head and each offset from query to key: () -> (heads, N, N), N = rows * columns.

    The biases learned are those of windows of `table_window_size`, resized to `window_size` at each call.
    """

    def __init__(
        self,
        window_size: tuple[int, int],
        num_heads: int,
        table_window_size: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.window_size = window_size
        self.table_window_size = table_window_size = table_window_size or window_size
        rows, columns = table_window_size
        table = torch.empty(num_heads, 2 * rows - 1, 2 * columns - 1, device=device, dtype=dtype)
        self.relative_position_bias_table = nn.Parameter(table)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def forward(self):
        rows, columns = self.window_size
        table = self.relative_position_bias_table
        if self.window_size != self.table_window_size:
            table = F.interpolate(table[None], (2 * rows - 1, 2 * columns - 1), mode='bilinear')[0]
        # A query's biases are the rows x columns of the table that begin where its own offset comes to lie; the first
        # query's begin last.
        bias = table.unfold(1, rows, 1).unfold(2, columns, 1).flip(1, 2)
        return bias.reshape(-1, rows * columns, rows * columns)


@register_notrace_module
class Attention(nn.Module):
    """Multi-head self-attention in windows of a map, contiguous or, if `is_grid`, spread evenly over it (section 3.2).

    (B, H, W, C) -> same. The windows lie as they would on a map padded at the bottom and right to a multiple of
    `window_size`, whose padding is masked.
    """

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        is_grid: bool,
        table_window_size: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.window_size = window_size
        self.is_grid = is_grid
        self.num_heads = dim // HEAD_DIM
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.rel_pos = RelativePositionBias(window_size, self.num_heads, table_window_size, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x):
        _, H, W, _ = x.shape
        rows, columns = self.window_size
        dilation = (-(-H // rows), -(-W // columns)) if self.is_grid else (1, 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)  # (B, H, W, heads, head_dim)
        x = window_attention(q, k, v, self.window_size, dilation, bias=self.rel_pos())
        return self.proj(x.flatten(-2))

    def extra_repr(self):
        return f'window_size={self.window_size}, is_grid={self.is_grid}, num_heads={self.num_heads}'


class TransformerBlock(PreNormBlock):
    """Pre-norm transformer block of block attention or grid attention. (B, H, W, C) -> same."""

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        is_grid: bool,
        drop_path: float = 0.0,
        table_window_size: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        attn = Attention(dim, window_size, is_grid, table_window_size, **dd)
        mlp = Mlp(dim, EXPANSION * dim, act_layer=GELU, **dd)
        super().__init__(dim, attn, mlp, drop_path, partial(nn.LayerNorm, eps=LAYER_NORM_EPS), **dd)


class Block(nn.Module):
    """Mobile convolution, block and grid attention (figure 2). (B, in, H, W) -> (B, out, ceil(H/s), ceil(W/s))."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int,
        window_size: tuple[int, int],
        drop_path: float = 0.0,
        table_window_size: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv = MBConv(in_chans, dim, stride, drop_path, **dd)
        self.attn_block = TransformerBlock(dim, window_size, False, drop_path, table_window_size, **dd)
        self.attn_grid = TransformerBlock(dim, window_size, True, drop_path, table_window_size, **dd)

    def forward(self, x):
        x = self.conv(x).permute(0, 2, 3, 1)
        return self.attn_grid(self.attn_block(x)).permute(0, 3, 1, 2)


class Stem(nn.Module):
    """Two convolutions, the first of stride 2. (B, in_chans, H, W) -> (B, dim, ceil(H/2), ceil(W/2))."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = SameConv2d(in_chans, dim, 3, 2, **dd)
        self.norm1 = nn.BatchNorm2d(dim, eps=BATCH_NORM_EPS, **dd)
        self.act = GELU()
        self.conv2 = SameConv2d(dim, dim, 3, **dd)

    def forward(self, x):
        # All that follow stay channels-last: the transformers' (B, H, W, C) are then the convolutions' maps, uncopied.
        x = x.contiguous(memory_format=torch.channels_last)
        return self.conv2(self.act(self.norm1(self.conv1(x))))


def sides_of(name: str, value) -> tuple[int, int]:
    """(rows, columns) of the windows that an argument asks for."""
    sides = to_2tuple(value)
    if len(sides) != 2 or any(side < 1 for side in sides):
        raise ValueError(f'{name} must be one or two positive ints, got {value}.')
    return tuple(sides)


class MaxViT(Pyramid):
    """MaxViT.

    The pyramid has five levels: the stem's, of stride 2, and four stages'.

    Args:
        dims, depths: channels, multiples of 32, and blocks of each stage.
        stem_dim: channels of the stem.
        window_size: side, or (rows, columns), of the windows and of the grid, at any image size. The authors trained
            with 1/32 of the image's side: 7 at 224 pixels, 12 at 384, 16 at 512. Their checkpoints hold a bias for each
            position in it, so a model takes those of its own window_size.
        pretrained_window_size: of the checkpoint that the model is to take, if that is another: biases are kept and
            learned at that size and resized, bilinearly, at each call, as in the official detectors (`scale_ratio` of
            tensorflow/models, official/projects/maxvit, is window_size / pretrained_window_size).
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`; global_pool must leave the
            width as it is.
    """

    first_conv = 'stem.conv1'
    out_indices = (0, 1, 2, 3, 4)

    def __init__(
        self,
        dims=(64, 128, 256, 512),
        depths=(2, 2, 5, 2),
        stem_dim: int = 64,
        window_size: int | tuple[int, int] = 7,
        pretrained_window_size: int | tuple[int, int] | None = None,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        if any(dim % HEAD_DIM for dim in dims):
            raise ValueError(f'dims must be multiples of {HEAD_DIM}, the width of a head, got {dims}.')
        window_size = sides_of('window_size', window_size)
        if pretrained_window_size is None:
            pretrained_window_size = window_size
        table_window_size = sides_of('pretrained_window_size', pretrained_window_size)
        super().__init__(device=device, dtype=dtype, **base)
        self.window_size = window_size
        self.table_window_size = table_window_size
        dd = {'device': device, 'dtype': dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        self.add_stem(Stem(self.in_chans, stem_dim, **dd), stem_dim, stride=2)
        previous = stem_dim
        for dim, stage_rates in zip(dims, rates, strict=True):
            blocks = [
                Block(dim if j else previous, dim, 1 if j else 2, window_size, rate, table_window_size, **dd)
                for j, rate in enumerate(stage_rates)
            ]
            self.add_stage(nn.Identity(), blocks, num_chs=dim, stride=2)  # the first block halves the map
            previous = dim
        self.finish()

    @torch.jit.ignore
    def make_head(self, in_features: int, num_classes: int, pool_type: str, drop_rate: float, device=None, dtype=None):
        """Pooling, norm, a tanh layer of the same width, dropout and classifier."""
        return NormMlpClassifierHead(
            in_features,
            num_classes,
            hidden_size=in_features,
            pool_type=pool_type,
            drop_rate=drop_rate,
            norm_layer=partial(LayerNorm2d, eps=LAYER_NORM_EPS),
            device=device,
            dtype=dtype,
        )

    @staticmethod
    def init_module(module):
        """Convolutions by their fan-out, transformers as in ViT."""
        init_conv(module)
        if isinstance(module, Attention):
            for linear in (module.qkv, module.proj):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        elif isinstance(module, Mlp):
            for linear in (module.fc1, module.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)

    @torch.jit.ignore
    def no_weight_decay(self):
        return {name for name, _ in self.named_parameters() if name.endswith(TABLE)}


def checkpoint_filter_fn(state_dict: Mapping, model: MaxViT) -> dict[str, torch.Tensor]:
    """As for every family (see `checkpoints`); where the windows are what does not fit, the error says which would."""
    try:
        return checkpoints.checkpoint_filter_fn(state_dict, model)
    except CheckpointError as error:
        window_size = trained_window_size(checkpoints.unwrap(state_dict))
        if window_size in (None, model.table_window_size):
            raise
        rows, columns = window_size
        argument = rows if rows == columns else window_size
        raise CheckpointError(
            f'{error} Its windows are {rows}x{columns}: pass window_size={argument}, or, for its biases to be resized '
            f'to other windows, pretrained_window_size={argument}.'
        ) from None


def trained_window_size(state_dict: Mapping) -> tuple[int, int] | None:
    """(rows, columns) of the windows that a state dict has biases for; None if it has none."""
    for key, table in state_dict.items():
        if key.endswith(TABLE):
            return (table.shape[-2] + 1) // 2, (table.shape[-1] + 1) // 2
    return None


variants(
    MaxViT,
    maxvit_tiny={},
    maxvit_small=dict(dims=(96, 192, 384, 768)),
    maxvit_base=dict(dims=(96, 192, 384, 768), depths=(2, 6, 14, 2)),
    maxvit_large=dict(dims=(128, 256, 512, 1024), depths=(2, 6, 14, 2), stem_dim=128),
    maxvit_xlarge=dict(dims=(192, 384, 768, 1536), depths=(2, 6, 14, 2), stem_dim=192),
)
