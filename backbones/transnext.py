"""TransNeXt: Robust Foveal Visual Perception for Vision Transformers (arXiv 2311.17132).

Every pixel attends to the pixels around it and to coarse tokens of the whole map in one softmax, as an eye sees sharply
at its focus and dimly elsewhere; position biases and scores are made for maps of any size.
Original code: DaiShiResearch/TransNeXt (Apache-2.0).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from ..kernels.aggregated import aggregated_attention, position_bias
from .checkpoints import PVT_KEYS, checkpoint_filter_fn
from .layers import Downsample, PatchEmbed, PointwiseConv, PreNormBlock, apply_nchw, biased_attention, by_images, pairs
from .pyramid import MIN_SIZE, Pyramid, init_conv_and_linear
from .registration import variants

__all__ = ['AggregatedAttention', 'TransNeXt', 'checkpoint_filter_fn']

TEMPERATURE = 1 / 0.24  # section 3.3: initial factor of the scores
CPB_HIDDEN_DIM = 512  # of the MLP that makes position biases, as in Swin Transformer V2

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # of blocks and stages


def cells(length: int, pooled: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last position + 1 of each of the `pooled` cells of an axis, as adaptive average pooling cuts it."""
    cell = torch.arange(pooled, device=device)
    return cell * length // pooled, -((cell + 1) * -length // pooled)


def adaptive_avg_pool(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, H, W, C) -> (B, *size, C). Products with constant matrices, which keep nothing for the backward."""

    def means(length, pooled):  # (pooled, length)
        first, end = (edge[:, None] for edge in cells(length, pooled, x.device))
        position = torch.arange(length, device=x.device)
        return ((position >= first) & (position < end)).to(x.dtype) / (end - first).to(x.dtype)

    B, H, W, _ = x.shape
    x = means(H, size[0]).expand(B, -1, -1).bmm(x.flatten(2)).unflatten(2, (W, -1))
    x = means(W, size[1]).expand(B * size[0], -1, -1).bmm(x.flatten(0, 1))
    return x.unflatten(0, (B, size[0]))


def relative_positions(length: int, pooled: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances of positions on an axis to the centres of its cells: those that there can be, and the index of each.

    Returns:
        float32 (distances,), and int64 (length, pooled).
    """
    query = torch.arange(length, device=device)[:, None]
    if length % pooled == 0:
        size = length // pooled
        last = (pooled - 1) * size
        index = query - torch.arange(pooled, device=device) * size + last
        return torch.arange(length + last, device=device) - last - (size - 1) / 2, index
    # Cells of unequal sizes have their centres on and between positions: distances are counted in halves.
    first, end = cells(length, pooled, device)
    last = (pooled - 1) * length // pooled + length - 1  # twice the centre of the last cell
    count = 2 * length - 1 + last - (-(-length // pooled) - 1)
    return (torch.arange(count, device=device) - last) / 2, 2 * query - (first + end - 1) + last


class ContinuousPositionBias(nn.Module):
    """Biases of relative positions by an MLP of their log-spaced coordinates (section 3.2, after Swin Transformer V2).

    Args:
        num_heads: biases of each position.
        trained_side: side of the map that coordinates are relative to, at least 2.
        made_at: side of the square map that biases are made for, and then resized bilinearly to that of the image; None
            makes them for the image's.
    """

    def __init__(self, num_heads: int, trained_side: int, made_at: int | None = None, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.trained_side = trained_side
        self.made_at = made_at
        self.fc1 = nn.Linear(2, CPB_HIDDEN_DIM, **dd)
        self.fc2 = nn.Linear(CPB_HIDDEN_DIM, num_heads, **dd)

    def forward(self, size: tuple[int, int], pool: Callable):
        """Biases of the pixels of a map for its cells. `pool` gives the size in cells of a map of a given size.

        Returns:
            table (num_heads, rows, columns), and the row and the column in it of each pair: (H, pooled H) and
            (W, pooled W).
        """
        made_at = (self.made_at, self.made_at)
        if self.made_at is None or size == made_at:
            return self.table(size, pool(size))
        bias = pairs(*self.table(made_at, pool(made_at)))
        bias = resize(bias.flatten(1, 2), pool(size)).unflatten(1, made_at)  # of the cells
        bias = resize(bias.permute(0, 3, 4, 1, 2).flatten(1, 2), size).unflatten(1, pool(size))  # of the pixels
        H, W, device = *size, bias.device
        table = bias.permute(0, 3, 1, 4, 2).flatten(3, 4).flatten(1, 2)  # (num_heads, H * pooled H, W * pooled W)
        rows, columns = (torch.arange(n, device=device) for n in table.shape[1:])
        return table, rows.view(H, -1), columns.view(W, -1)

    def table(self, size, pooled):
        """The same, made for this size."""
        device = self.fc1.weight.device
        rows, row_index = relative_positions(size[0], pooled[0], device)
        columns, column_index = relative_positions(size[1], pooled[1], device)
        # fc1 of a pair of coordinates is the sum of a term of each.
        of_row, of_column = self.fc1.weight.unbind(1)
        rows = self.coordinates(rows)[:, None] * of_row + self.fc1.bias
        columns = self.coordinates(columns)[:, None] * of_column
        table = position_bias(rows, columns, self.fc2.weight, self.fc2.bias)
        return table, row_index, column_index

    def coordinates(self, distances):
        """In float32, as the official tables: with others, published weights would compute slightly other biases."""
        scaled = distances.float() / (self.trained_side - 1) * 8
        return (scaled.sign() * scaled.abs().add(1).log2() / 3).to(self.fc1.weight.dtype)


def resize(x, size):
    """Bilinear, (heads, channels, *from, to be resized) -> (heads, channels, *size)."""
    return F.interpolate(x, size, mode='bilinear', align_corners=False)


@register_notrace_module
class AggregatedAttention(nn.Module):
    """Attention of each pixel over its window and the pooled map (sections 3.1 to 3.3). (B, H, W, C) -> same.

    Args:
        dim: channels.
        num_heads: heads.
        window_size: side of the window, odd.
        sr_ratio: pixels of the map along each side of a pooled token.
        fixed_pool_size: pooled tokens along each side, whatever the map's size: cost is then linear in pixels.
        cpb: arguments of `ContinuousPositionBias`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        sr_ratio: int,
        fixed_pool_size: int | None = None,
        device=None,
        dtype=None,
        **cpb,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.sr_ratio = sr_ratio
        self.fixed_pool_size = fixed_pool_size
        head_dim = dim // num_heads
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, head_dim, **dd))
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, window_size**2, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, head_dim, window_size**2, **dd))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, window_size**2, **dd))
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.sr = PointwiseConv(dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim, **dd)
        self.cpb = ContinuousPositionBias(num_heads, **cpb, **dd)
        self.head_gate = None  # a module that weighs the outputs of the heads, (B, H, W, C) -> (B, H, W, heads)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self):
        reset_query(self)
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def pooled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Pooled tokens along the sides of a map of `size`; never more than its pixels, nor none."""
        if self.fixed_pool_size:
            return min(self.fixed_pool_size, size[0]), min(self.fixed_pool_size, size[1])
        return max(size[0] // self.sr_ratio, 1), max(size[1] // self.sr_ratio, 1)

    def forward(self, x):
        size = x.shape[1:3]
        q = self.q(x).unflatten(-1, (self.num_heads, -1))  # (B, H, W, heads, head_dim)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        pooled = adaptive_avg_pool(self.act(self.sr(x)), self.pooled_size(size))
        pooled_k, pooled_v = self.kv(self.norm(pooled)).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        pooled_bias, row_index, column_index = self.cpb(size, self.pooled_size)
        out = aggregated_attention(
            q,
            k,
            v,
            pooled_k,
            pooled_v,
            query_embedding=self.query_embedding.squeeze(1),
            temperature=F.softplus(self.temperature).flatten(),
            local_bias=self.relative_pos_bias_local,
            pooled_bias=pooled_bias,
            row_index=row_index,
            column_index=column_index,
            learnable_tokens=self.learnable_tokens,
            learnable_bias=self.learnable_bias.squeeze(1),
            window_size=self.window_size,
        )
        return self.proj(gated(self.head_gate, x, out).flatten(-2))

    def extra_repr(self):
        return f'num_heads={self.num_heads}, window_size={self.window_size}, sr_ratio={self.sr_ratio}'


@register_notrace_module
class Attention(nn.Module):
    """Length-scaled cosine attention over the whole map (section 3.3). (B, H, W, C) -> same."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None, **cpb):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.cpb = ContinuousPositionBias(num_heads, **cpb, **dd)
        self.head_gate = None  # a module that weighs the outputs of the heads, (B, H, W, C) -> (B, H, W, heads)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self):
        reset_query(self)

    def forward(self, x):
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, H * W, head_dim)
        length = torch.full((), q.shape[2], dtype=torch.float64, device=x.device).log().to(q.dtype)
        q = (F.normalize(q, dim=-1) + self.query_embedding) * F.softplus(self.temperature) * length
        bias = pairs(*self.cpb(x.shape[1:3], lambda size: size)).flatten(3, 4).flatten(1, 2)  # (heads, H * W, H * W)
        q, k, bias = (y.to(v.dtype) for y in (q, F.normalize(k, dim=-1), bias))
        out = biased_attention(q, k, v, bias, scale=1.0)
        out = out.transpose(1, 2).unflatten(1, x.shape[1:3])  # (B, H, W, heads, head_dim)
        return self.proj(gated(self.head_gate, x, out).flatten(-2))

    def extra_repr(self):
        return f'num_heads={self.num_heads}'


def gated(head_gate: nn.Module | None, x, out):
    """Heads' outputs (B, H, W, heads, head_dim), each weighed by what a gate makes of the input (B, H, W, C)."""
    return out if head_gate is None else out * head_gate(x)[..., None]


def reset_query(attention: nn.Module) -> None:
    """Initialise what makes an attention's queries."""
    nn.init.constant_(attention.temperature, math.log(math.expm1(TEMPERATURE)))  # softplus of it is TEMPERATURE
    nn.init.trunc_normal_(attention.query_embedding, std=0.02)


@register_notrace_module
class ConvolutionalGLU(nn.Module):
    """A gated MLP whose gates see their neighbors, by a depthwise convolution (section 3.4). (B, H, W, C) -> same."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x):
        return by_images(self._forward, x)

    def _forward(self, x):
        gates, values = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.act(apply_nchw(self.dwconv, gates)) * values)


class Block(PreNormBlock):
    """Pre-norm transformer block. (B, H, W, C) -> same."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float = 0.0, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        mlp = ConvolutionalGLU(dim, int(2 * int(dim * mlp_ratio) / 3), **dd)
        super().__init__(dim, attn, mlp, drop_path, LayerNorm, **dd)


class TransNeXt(Pyramid):
    """TransNeXt.

    At any image size the model computes what the authors' dense code computes, which at the trained size is what their
    classification code does.

    Args:
        dims, depths, num_heads, mlp_ratios: channels, blocks, heads and expansion of each stage.
        sr_ratios: pixels of a stage's map along each side of a pooled token; 1 for attention over the whole map.
        window_size: side of the window of each pixel, odd.
        pretrain_size: side of the images, at least 64, that relative positions are measured by: for the authors'
            checkpoints, those fine-tuned at 384 pixels too, what they were trained at first.
        interpolation_size: side of the images that position biases are made for, to be resized bilinearly to the
            map's size (`is_extrapolation=False` of the authors' dense code, with its `img_size`); None makes them for
            the size of the image.
        fixed_pool_size: pooled tokens along each side, at any image size, for a cost linear in pixels.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    output_fmt = 'NHWC'
    first_conv = 'stages.0.downsample.proj'
    init_module = staticmethod(init_conv_and_linear)
    official_keys = [*PVT_KEYS, (r'\.cpb_fc(\d)\.', r'.cpb.fc\1.')]

    def __init__(
        self,
        dims=(72, 144, 288, 576),
        depths=(2, 2, 15, 2),
        num_heads=(3, 6, 12, 24),
        mlp_ratios=(8, 8, 4, 4),
        sr_ratios=(8, 4, 2, 1),
        window_size: int = 3,
        pretrain_size: int = 224,
        interpolation_size: int | None = None,
        fixed_pool_size: int | None = None,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        least = {
            'pretrain_size': (pretrain_size, 64),  # the last map has two positions a side, to measure a distance by
            'interpolation_size': (interpolation_size, MIN_SIZE),
            'fixed_pool_size': (fixed_pool_size, 1),
        }
        for name, (value, limit) in least.items():
            if value is not None and value < limit:
                raise ValueError(f'{name} must be at least {limit}, got {value}.')
        if window_size < 1 or window_size % 2 == 0:
            raise ValueError(f'window_size must be odd and positive, got {window_size}.')
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            reduction = 4 * 2**i
            cpb = {
                'trained_side': pretrain_size // reduction,
                'made_at': interpolation_size and -(-interpolation_size // reduction),
            }

            def attention(dim=dim, heads=heads, sr_ratio=sr_ratios[i], cpb=cpb):
                if sr_ratio == 1:
                    return Attention(dim, heads, **cpb, **dd)
                return AggregatedAttention(dim, heads, window_size, sr_ratio, fixed_pool_size, **cpb, **dd)

            if i:
                downsample = Downsample(nn.Conv2d(dims[i - 1], dim, 3, 2, 1, **dd), dim, **dd)
            else:
                downsample = PatchEmbed(nn.Conv2d(self.in_chans, dim, 7, 4, 3, **dd), dim, **dd)
            self.add_stage(
                downsample,
                [Block(dim, attention(), mlp_ratios[i], rate, **dd) for rate in rates[i]],
                num_chs=dim,
                stride=2 if i else 4,
                norm=LayerNorm(dim, **dd),
            )
        self.finish()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        exempt = ('query_embedding', 'relative_pos_bias_local', 'cpb', 'temperature')
        return {name for name, _ in self.named_parameters() if any(part in name for part in exempt)}


micro = dict(dims=(48, 96, 192, 384), num_heads=(2, 4, 8, 16), drop_path_rate=0.15)

variants(
    TransNeXt,
    transnext_micro=micro,
    transnext_tiny=dict(drop_path_rate=0.25),
    transnext_small=dict(depths=(5, 5, 22, 5), drop_path_rate=0.45),
    transnext_base=dict(dims=(96, 192, 384, 768), depths=(5, 5, 23, 5), num_heads=(4, 8, 16, 32), drop_path_rate=0.6),
    transnext_micro_aaaa=dict(micro, sr_ratios=(16, 8, 4, 2), pretrain_size=256),
)
