"""ViTAEv2-VSA: Learning Varied-Size Window Attention in Vision Transformers (VSA, arXiv 2204.08446).

Each window of queries predicts, for each head, where its keys and values are taken from and how far apart; otherwise
the backbone is ViTAEv2 (arXiv 2202.10108), whose cells have a branch of convolutions beside the attention.

Original code: ViTAE-Transformer/ViTAE-VSA (without a licence).
"""

import torch
from timm.layers import DropPath, Mlp
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from ..kernels import window_attention
from .checkpoints import as_linear, checkpoint_filter_fn
from .layers import apply_nchw, pad_bottom_right, pairs
from .pyramid import Pyramid
from .registration import variants

__all__ = ['VariedSizeWindowAttention', 'ViTAEv2VSA', 'checkpoint_filter_fn']

DILATIONS = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))  # of the pyramid reduction module of each stage
KERNEL_SIZES = (7, 3, 3, 3)  # of its convolutions
STRIDES = (4, 2, 2, 2)
REDUCTION_GROUPS = (1, 16, 32, 64)  # of the convolutions beside the attention, in reduction cells
NORMAL_GROUPS = (1, 32, 64, 128)  # and in normal cells
CELL_NORM_EPS = 1e-6  # of the norms of normal cells
EXPANSION = 4  # of the hidden layers of normal cells


@register_notrace_module
class VariedSizeWindowAttention(nn.Module):
    """Attention of the pixels of a window to a window of another place and size (section 3.2). (B, H, W, in) -> out.

    Args:
        in_dim, dim: channels before and after.
        num_heads: heads of dim / num_heads channels.
        window_size: side of the windows, at least 2; a map that they don't divide is padded with zeros, which are keys.
    """

    def __init__(self, in_dim: int, dim: int, num_heads: int, window_size: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.scale = (in_dim / num_heads) ** -0.5  # as the authors: of the input's channels
        self.sampling_offsets = nn.Linear(in_dim, 2 * num_heads, **dd)
        self.sampling_scales = nn.Linear(in_dim, 2 * num_heads, **dd)
        self.qkv = nn.Linear(in_dim, 3 * dim, **dd)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x):
        _, H, W, _ = x.shape
        side = self.window_size
        rows, columns = -(-H // side), -(-W // side)  # of windows
        size = rows * side, columns * side
        points = self.sampling_points(pad_bottom_right(x, *size), (H, W))
        qkv = pad_bottom_right(self.qkv(x), *size).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv[..., 0, :, :], *sampled(qkv[..., 1:, :, :], points).unbind(3)
        x = window_attention(query, key, value, side, bias=self.position_bias(), scale=self.scale)
        return self.proj(x[:, :H, :W].flatten(3))

    def sampling_points(self, x, size: tuple[int, int]):
        """Where the pixels of a padded map, of `size` before, take keys and values: (B, heads, rows, columns, 2).

        x first, in [-1, 1] from the first pixel to the last, as for `grid_sample`.
        """
        side, dtype = self.window_size, torch.promote_types(x.dtype, torch.float32)
        means = F.leaky_relu(F.avg_pool2d(x.permute(0, 3, 1, 2), side)).permute(0, 2, 3, 1)
        offsets, scales = (
            linear(means).to(dtype).unflatten(-1, (self.num_heads, 2, 1))
            for linear in (self.sampling_offsets, self.sampling_scales)
        )  # (B, window rows, window columns, heads, 2, 1)
        middle = (side - 1) / 2
        pixels = torch.arange(side, device=x.device, dtype=dtype) - middle  # of a window
        axes = []
        for axis in (1, 0):
            windows = means.shape[1 + axis]
            centers = torch.arange(windows, device=x.device, dtype=dtype) * side + middle
            place = centers.view(-1, *[1] * (3 - axis)) + pixels * (1 + scales[..., 1 - axis, :])
            # Offsets are of half the map, by the number of whole windows in it: of a smaller map, one.
            shift = offsets[..., 1 - axis, :] / max(1, size[axis] // side)
            axes.append(place * (2 / (windows * side - 1)) - 1 + shift)  # (B, window rows, window columns, heads, side)
        x_axis = axes[0].permute(0, 3, 1, 2, 4)[:, :, :, None]
        y_axis = axes[1].permute(0, 3, 1, 4, 2)[..., None]
        points = torch.stack(torch.broadcast_tensors(x_axis, y_axis), dim=-1)
        return points.flatten(4, 5).flatten(2, 3)

    def position_bias(self):
        """(heads, N, N) of the N pixels of a window."""
        side = self.window_size
        place = torch.arange(side, device=self.relative_position_bias_table.device)
        distance = place[:, None] - place + side - 1  # (queries, keys) along an axis
        table = self.relative_position_bias_table.T.unflatten(1, (2 * side - 1, 2 * side - 1))
        return pairs(table, distance, distance).flatten(3).flatten(1, 2)

    def extra_repr(self):
        return f'num_heads={self.num_heads}, window_size={self.window_size}'


def sampled(maps, points):
    """Bilinear samples of maps (B, H, W, 2, heads, C) at the points of each head (B, heads, H, W, 2), zero beyond."""
    B, H, W, _, heads, _ = maps.shape
    planes = maps.permute(0, 4, 3, 5, 1, 2).flatten(2, 3).flatten(0, 1).to(points.dtype)
    out = F.grid_sample(planes, points.flatten(0, 1), align_corners=True).to(maps.dtype)
    return out.view(B, heads, 2, -1, H, W).permute(0, 4, 5, 2, 1, 3)


class PyramidReduction(nn.Module):
    """Strided convolutions of several dilations, side by side (ViTAEv2). (B, H, W, in) -> (B, rows, columns, out * n).

    Rows and columns are ceil(H / stride) and ceil(W / stride).
    """

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int, dilations, device=None, dtype=None):
        super().__init__()
        self.convs = nn.ModuleList(
            StridedConv2d(in_dim, dim, kernel_size, stride, dilation=dilation, device=device, dtype=dtype)
            for dilation in dilations
        )
        self.act = nn.GELU()

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)
        return self.act(torch.cat([conv(x) for conv in self.convs], dim=1).permute(0, 2, 3, 1))


@register_notrace_module
class StridedConv2d(nn.Conv2d):
    """A convolution padded to n -> ceil(n / stride) pixels, as the authors pad theirs."""

    def forward(self, x):
        stride, reach = self.stride[0], (self.kernel_size[0] - 1) * self.dilation[0] + 1
        # Of a side that the stride does not divide they take one pixel more on both sides, which is too much for 2.
        padding = [-(-(reach - stride) // 2) + (stride > 2 and side % stride > 0) for side in x.shape[2:]]
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation)


def parallel_convolutions(widths, strides, groups: int, device=None, dtype=None) -> nn.Sequential:
    """The parallel convolution module (ViTAE): three 3x3 convolutions through these widths, with norms between."""
    dd = {'device': device, 'dtype': dtype}
    layers = []
    for in_dim, dim, stride in zip(widths[:-1], widths[1:], strides, strict=True):
        layers += [nn.Conv2d(in_dim, dim, 3, stride, 1, groups=groups, **dd), nn.BatchNorm2d(dim, **dd), nn.SiLU()]
    return nn.Sequential(*layers[:-2])


def position_convolution(dim: int, device=None, dtype=None) -> nn.Conv2d:
    """Conditional position encoding, to be added: a depthwise 7x7 convolution."""
    return nn.Conv2d(dim, dim, 7, padding=3, groups=dim, device=device, dtype=dtype)


class ReductionCell(nn.Module):
    """Attention on dilated patches and convolutions, side by side, then a perceptron.

    (B, H, W, in) -> (B, ceil(H / stride), ceil(W / stride), out).

    Args:
        in_dim, dim: channels before and after.
        patch_dim: channels of the patches of each dilation.
        stage: which of the model's stages this begins.
        num_heads, window_size: of the attention.
        wide: whether the convolutions have 2 * dim channels inside, not patch_dim.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        patch_dim: int,
        stage: int,
        num_heads: int,
        window_size: int,
        wide: bool,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        stride, dilations = STRIDES[stage], DILATIONS[stage]
        width = patch_dim * len(dilations)
        inside = 2 * dim if wide else patch_dim
        strides = (2, 2, 1) if stride == 4 else (2, 1, 1)
        self.prm = PyramidReduction(in_dim, patch_dim, KERNEL_SIZES[stage], stride, dilations, **dd)
        self.pos = position_convolution(width, **dd)
        self.norm1 = nn.LayerNorm(width, **dd)
        self.attn = VariedSizeWindowAttention(width, dim, num_heads, window_size, **dd)
        self.pcm = parallel_convolutions((in_dim, inside, inside, dim), strides, REDUCTION_GROUPS[stage], **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, dim, **dd)

    def forward(self, x):
        patches = self.prm(x)
        patches = patches + apply_nchw(self.pos, patches)
        x = self.attn(self.norm1(patches)) + apply_nchw(self.pcm, x)
        return x + self.mlp(self.norm2(x))


class ImageReductionCell(ReductionCell):
    """The same, of images (B, in, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1))


class NormalCell(nn.Module):
    """Attention and convolutions, side by side, then a perceptron. (B, H, W, C) -> same.

    The position encoding is the attention's alone.
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int, groups: int, drop_path: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.pos = position_convolution(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=CELL_NORM_EPS, **dd)
        self.attn = VariedSizeWindowAttention(dim, dim, num_heads, window_size, **dd)
        self.pcm = parallel_convolutions((dim, EXPANSION * dim, dim, dim), (1, 1, 1), groups, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=CELL_NORM_EPS, **dd)
        self.mlp = Mlp(dim, EXPANSION * dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        attended = self.attn(self.norm1(x + apply_nchw(self.pos, x)))
        x = x + self.drop_path(attended) + self.drop_path(apply_nchw(self.pcm, x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViTAEv2VSA(Pyramid):
    """ViTAEv2 with varied-size window attention.

    Args:
        patch_dims: channels of the patches of each dilation, of each stage's reduction cell.
        dims, depths: channels and normal cells of each stage.
        num_heads, reduction_heads: heads of the attention of each stage's normal cells, and of its reduction cell.
        window_size: side of the windows in pixels, at least 2.
        wide: whether the convolutions of the reduction cells are wide.
        drop_path_rate: stochastic depth of the normal cells, rising linearly.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    output_fmt = 'NHWC'
    first_conv = (
        *(f'stages.0.downsample.prm.convs.{i}' for i in range(len(DILATIONS[0]))),
        'stages.0.downsample.pcm.0',
    )
    official_keys = [
        (r'^layers\.(\d)\.RC\.', r'stages.\1.downsample.'),
        (r'^layers\.(\d)\.NC\.', r'stages.\1.blocks.'),
        (r'\.PRM\.convs\.(\d)\.0\.', r'.prm.convs.\1.'),
        (r'\.PCM\.', '.pcm.'),
        (r'\.sampling_(offsets|scales)\.2\.', r'.sampling_\1.'),
    ]
    constants = ('.attn.relative_position_index',)

    def __init__(
        self,
        patch_dims=(64, 64, 128, 256),
        dims=(64, 128, 256, 512),
        depths=(2, 2, 8, 2),
        num_heads=(2, 4, 8, 16),
        reduction_heads=(2, 2, 4, 8),
        window_size: int = 7,
        wide: bool = False,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        if window_size < 2:
            raise ValueError(f'window_size must be at least 2, got {window_size}.')
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        rates = torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist()
        for i, dim in enumerate(dims):
            # As the authors, who count from the stage before alone: rates do not rise over all cells.
            start = depths[i - 1] if i else 0
            self.add_stage(
                (ReductionCell if i else ImageReductionCell)(
                    dims[i - 1] if i else self.in_chans,
                    dim,
                    patch_dims[i],
                    i,
                    reduction_heads[i],
                    window_size,
                    wide,
                    **dd,
                ),
                [
                    NormalCell(dim, num_heads[i], window_size, NORMAL_GROUPS[i], rate, **dd)
                    for rate in rates[start : start + depths[i]]
                ],
                num_chs=dim,
                stride=STRIDES[i],
            )
        self.finish()

    @staticmethod
    def init_module(module):
        """Linears truncated normal, but what the authors have as convolutions stays as PyTorch initialises these."""
        Pyramid.init_module(module)
        if isinstance(module, VariedSizeWindowAttention):
            for linear in (module.sampling_offsets, module.sampling_scales, module.qkv, module.proj):
                linear.reset_parameters()

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under our keys; 1x1 convolutions become linears."""
        return {key: as_linear(value) for key, value in super().map_official(state_dict).items()}


wide = dict(reduction_heads=(2, 4, 8, 16), wide=True)
base = dict(
    wide,
    patch_dims=(128, 128, 256, 512),
    dims=(128, 256, 512, 1024),
    depths=(2, 2, 12, 2),
    num_heads=(4, 8, 16, 32),
    reduction_heads=(4, 8, 16, 32),
)

variants(
    ViTAEv2VSA,
    vitaev2_vsa_s={},
    vitaev2_vsa_widepcm_s=wide,
    vitaev2_vsa_widepcm_48m=dict(
        wide,
        patch_dims=(96, 96, 192, 384),
        dims=(96, 192, 384, 768),
        depths=(2, 2, 11, 2),
        num_heads=(3, 6, 12, 24),
        reduction_heads=(3, 6, 12, 24),
        drop_path_rate=0.25,
    ),
    vitaev2_vsa_widepcm_b=base,
    vitaev2_vsa_widepcm_b_ws12=dict(base, window_size=12),
)
