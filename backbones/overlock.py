"""OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels (arXiv 2502.20087).

A base net encodes the image, an overview net takes a coarse look at it, and a focus net looks closely: it works on the
base net's map, and its kernels are made for each pixel from how this relates to what the overview found.

Original code: LMMMEng/OverLoCK (Apache-2.0).
"""

import torch
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates, get_device_dtype
from timm.models import register_notrace_function
from torch import nn
from torch.nn import functional as F

from .checkpoints import checkpoint_filter_fn, rename
from .contmix import ContextMixing
from .large_kernel import DILATED, GlobalResponseNorm, ResidualConv2d, conv_norm, large_conv, squeeze_excite
from .pyramid import Pyramid, init_truncated
from .registration import variants

__all__ = ['OverLoCK', 'checkpoint_filter_fn']

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
        kernel_sizes = (SMALL_KERNEL, kernel_size)
        self.mix = ContextMixing(dim, guide_dim, num_heads, kernel_sizes, POOLED, inference_mode, **dd)
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
    init_module = staticmethod(init_truncated)

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
