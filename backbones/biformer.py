"""BiFormer: Vision Transformer with Bi-Level Routing Attention (arXiv 2303.08810).

A map is cut into regions; each region attends, pixel to pixel, only to the regions whose mean keys match its mean query
best. Original code: rayleizhu/BiFormer (MIT).
"""

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from ..kernels import routing_attention
from .checkpoints import as_linear, checkpoint_filter_fn
from .layers import BatchNorm, PaddedConv2d, Stem, apply_nchw, pad_bottom_right
from .pyramid import Pyramid
from .registration import variants

__all__ = ['BiFormer', 'BiLevelRoutingAttention', 'checkpoint_filter_fn']

HEAD_DIM = 32
GLOBAL_HEADS = 8  # of the last stage, whatever its width: the official block passes no number of heads on
GLOBAL = -2  # the top-k that stands for attention over the whole map


def region_means(x, size):
    """Mean pixel of each region of size (height, width), of what there is in those at the border.

    (B, H, W, C) -> (B, ceil(H / height), ceil(W / width), C)
    """

    def members(length, extent):
        """One row a region along an axis: 1 where its pixels are."""
        regions = torch.arange(-(-length // extent), device=x.device)
        return (torch.arange(length, device=x.device) // extent == regions[:, None]).to(x.dtype)

    rows, columns = members(x.shape[1], size[0]), members(x.shape[2], size[1])
    sums = columns @ (rows @ x.flatten(2)).unflatten(-1, x.shape[2:])
    return sums / (rows.sum(1)[:, None, None] * columns.sum(1)[:, None])


@register_notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Attention of each region over the `topk` regions it is routed to (section 3.2). (B, H, W, C) -> same.

    Args:
        dim: channels.
        n_win: regions along each side of the map.
        topk: regions that each region attends to; all, if there are fewer.
        auto_pad: pad maps that n_win doesn't divide (the padding is zero before the projection, and takes part
            unmasked), else refuse them.
        pad_input: where the original pads. True: the input, to multiples of n_win. False (its refactored version):
            queries, keys and values, to multiples of a region of H // n_win x W // n_win pixels, so that there may be
            more than n_win regions a side.
    """

    def __init__(
        self,
        dim: int,
        n_win: int,
        topk: int,
        auto_pad: bool = True,
        pad_input: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.n_win = n_win
        self.topk = topk
        self.auto_pad = auto_pad
        self.pad_input = pad_input
        self.scale = dim**-0.5  # of the full width, not of a head
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x):
        _, H, W, _ = x.shape
        x, size = self.partition(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q_heads, k_heads, v_heads = (t.unflatten(-1, (-1, HEAD_DIM)) for t in (q, k, v))
        out = routing_attention(q_heads, k_heads, v_heads, self.route(x, size), size, scale=self.scale)
        out = out.flatten(-2) + apply_nchw(self.lepe, v)
        return self.proj(out[:, :H, :W])

    def partition(self, x):
        """The input, padded where that is to be done before the projection, and the (height, width) of its regions."""
        _, H, W, _ = x.shape
        if not self.auto_pad and (H % self.n_win or W % self.n_win):
            raise ValueError(f'A map of {H}x{W} does not divide into {self.n_win}x{self.n_win} regions; use auto_pad.')
        if not self.pad_input:
            return x, (max(1, H // self.n_win), max(1, W // self.n_win))
        size = (-(-H // self.n_win), -(-W // self.n_win))
        return pad_bottom_right(x, size[0] * self.n_win, size[1] * self.n_win), size

    @torch.no_grad()
    def route(self, x, size):
        """Indices (B, regions, topk) of the regions that each attends to, best first; regions count row by row."""
        # The mean of a region's queries is the query of its mean pixel.
        q, k, _ = self.qkv(region_means(x, size).flatten(1, 2)).chunk(3, dim=-1)  # (B, regions, C)
        affinity = (q * self.scale) @ k.mT
        return affinity.topk(min(self.topk, affinity.shape[-1]), dim=-1).indices

    def extra_repr(self):
        return f'n_win={self.n_win}, topk={self.topk}'


@register_notrace_module
class GlobalAttention(nn.Module):
    """Multi-head self-attention over the whole map, plus a depthwise convolution of its input, or of the values."""

    def __init__(self, dim: int, num_heads: int = GLOBAL_HEADS, lepe_on_values: bool = False, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.lepe_on_values = lepe_on_values
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x):
        qkv = self.qkv(x)  # (B, H, W, 3C)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        lepe = apply_nchw(self.lepe, qkv.chunk(3, dim=-1)[2] if self.lepe_on_values else x)
        return self.proj(out + lepe)


class Block(nn.Module):
    """Positional convolution (unless the layout has none), attention, MLP. (B, H, W, C) -> same."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        pos_embed: bool,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_embed else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        if self.pos_embed is not None:
            x = x + apply_nchw(self.pos_embed, x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Downsample(nn.Sequential):
    """A downsampling between stages: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C')."""

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BiFormer(Pyramid):
    """BiFormer.

    Args:
        dims, depths: channels and blocks of each stage.
        topks: regions that each region attends to, a stage; -2 stands for attention over the whole map.
        n_win: regions along each side of a map.
        mlp_ratio: expansion of the MLPs.
        auto_pad: pad maps that n_win doesn't divide, as the official detection and segmentation code does; else they
            are refused, as in its classification code. The same where n_win divides.
        layout: 'biformer'; 'stl', the layout of Swin-T that the paper compares attentions in (section 4.4); or
            'stl_nchw', the same in the authors' refactored code, which pads elsewhere and, in the last stage, convolves
            the values: checkpoints of the two are not interchangeable.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    output_fmt = 'NHWC'
    first_conv = 'stages.0.downsample.0'
    official_keys = [
        (r'^downsample_layers\.(\d)\.', r'stages.\1.downsample.'),
        (r'^stages\.(\d)\.(\d+)\.', r'stages.\1.blocks.\2.'),
        (r'\.mlp\.0\.', '.mlp.fc1.'),
        (r'\.mlp\.[23]\.', '.mlp.fc2.'),
    ]
    official_attention_keys = [(r'\.attn\.qkv\.qkv\.', '.attn.qkv.'), (r'\.attn\.wo\.', '.attn.proj.')]
    refactored_attention_keys = [(r'\.attn\.qkv_linear\.', '.attn.qkv.'), (r'\.attn\.output_linear\.', '.attn.proj.')]

    def __init__(
        self,
        dims=(64, 128, 256, 512),
        depths=(2, 2, 8, 2),
        topks=(1, 4, 16, GLOBAL),
        n_win: int = 7,
        mlp_ratio: float = 3.0,
        auto_pad: bool = True,
        layout: str = 'biformer',
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        if layout not in ('biformer', 'stl', 'stl_nchw'):
            raise ValueError(f"layout must be 'biformer', 'stl' or 'stl_nchw', got {layout!r}.")
        if any(topk < 1 and topk != GLOBAL for topk in topks):
            raise ValueError(f'topks must be positive, or {GLOBAL} for attention over the whole map, got {topks}.')
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        is_nchw = layout == 'stl_nchw'
        attention_keys = self.refactored_attention_keys if is_nchw else self.official_attention_keys
        self.official_keys = [*self.official_keys, *attention_keys]
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        def attention(dim, topk):
            if topk == GLOBAL:
                return GlobalAttention(dim, lepe_on_values=is_nchw, **dd)
            return BiLevelRoutingAttention(dim, n_win, topk, auto_pad, pad_input=not is_nchw, **dd)

        for i, dim in enumerate(dims):
            previous = dims[i - 1] if i else self.in_chans
            if layout == 'biformer':
                downsample = self._overlapping_downsample(previous, dim, is_stem=i == 0, **dd)
            else:
                downsample = self._patch_downsample(previous, dim, is_stem=i == 0, **dd)
            self.add_stage(
                downsample,
                [
                    Block(
                        dim,
                        attention(dim, topks[i]),
                        mlp_ratio,
                        pos_embed=layout == 'biformer',
                        drop_path=rate,
                        **dd,
                    )
                    for rate in rates[i]
                ],
                num_chs=dim,
                stride=2 if i else 4,
            )
        self.finish(BatchNorm(dims[-1], **dd))

    @staticmethod
    def _overlapping_downsample(in_chans, dim, is_stem, **dd):
        if not is_stem:
            return Downsample(nn.Conv2d(in_chans, dim, 3, 2, 1, **dd), nn.BatchNorm2d(dim, **dd))
        return Stem(
            nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
            nn.BatchNorm2d(dim, **dd),
        )

    @staticmethod
    def _patch_downsample(in_chans, dim, is_stem, **dd):
        if is_stem:
            return Stem(PaddedConv2d(in_chans, dim, 4, 4, **dd), nn.BatchNorm2d(dim, **dd))
        return Downsample(nn.BatchNorm2d(in_chans, **dd), PaddedConv2d(in_chans, dim, 2, 2, **dd))

    def map_official(self, state_dict):
        """The authors' keys to ours; their refactored code's 1x1 convolutions become linears."""
        return {key: as_linear(value) for key, value in super().map_official(state_dict).items()}

    @torch.no_grad()
    def routes(self, images) -> list[dict]:
        """What each routing block attends to for the images, in order, as dicts.

        `module`: the block's attention by name; `regions`: (rows, columns) of the grid of regions; `index`:
        (B, regions, topk) regions that each region attends to, best first.
        """
        found, hooks = [], []

        def record(name, attn, inputs):
            x, size = attn.partition(inputs[0])
            grid = (-(-x.shape[1] // size[0]), -(-x.shape[2] // size[1]))
            found.append({'module': name, 'regions': grid, 'index': attn.route(x, size)})

        try:
            for name, module in self.named_modules():
                if isinstance(module, BiLevelRoutingAttention):
                    hook = module.register_forward_pre_hook(lambda attn, inputs, name=name: record(name, attn, inputs))
                    hooks.append(hook)
            self.forward_features(images)
        finally:
            for hook in hooks:
                hook.remove()
        return found


stl = dict(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), mlp_ratio=4.0)

variants(
    BiFormer,
    biformer_tiny={},
    biformer_small=dict(depths=(4, 4, 18, 4)),
    biformer_base=dict(dims=(96, 192, 384, 768), depths=(4, 4, 18, 4)),
    biformer_stl=dict(stl, layout='stl'),
    biformer_stl_nchw=dict(stl, layout='stl_nchw'),
)
