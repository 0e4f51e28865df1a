"""SViT: Vision Transformer with Super Token Sampling (arXiv 2211.11167).

Pixels are associated with super tokens, cells of a coarse grid, as in SLIC; these attend to each other, and what they
gain goes back to the pixels.

Original code: hhb072/STViT (MIT, by the headers of its files).
"""

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale2d, calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from .checkpoints import checkpoint_filter_fn
from .layers import PointwiseConv, pad_to_stride
from .pyramid import Pyramid
from .registration import variants

__all__ = ['SViT', 'checkpoint_filter_fn']

CELLS = 9  # a pixel is associated with the cell that it is in and those around it, in rows
HEAD_DIM = 1024  # channels before the classifier
EPS = 1e-12  # of the division by the pixels that a super token has


@register_notrace_module
class Attention(nn.Module):
    """Global multi-head attention. (B, C, H, W) -> same."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.qkv = PointwiseConv(dim, 3 * dim, 1, **dd)  # of each head, its query, key and value
        self.proj = PointwiseConv(dim, dim, 1, **dd)

    def forward(self, x):
        qkv = self.qkv(x.flatten(2).mT).unflatten(-1, (self.num_heads, 3, -1))
        out = F.scaled_dot_product_attention(*qkv.permute(3, 0, 2, 1, 4))  # (B, heads, H * W, head_dim)
        return self.proj(out.transpose(1, 2).flatten(2)).mT.reshape(x.shape)

    def extra_repr(self):
        return f'num_heads={self.num_heads}'


@register_notrace_module
class SuperTokenAttention(nn.Module):
    """Attention among super tokens, which a cell of pixels each begins (section 3.2). (B, C, H, W) -> same.

    Args:
        dim, num_heads: of the map and of the attention.
        stoken_size: side of a cell in pixels; 1 for attention among the pixels themselves.
        num_iters: how often pixels are associated and super tokens made of them again.
    """

    def __init__(self, dim: int, num_heads: int, stoken_size: int, num_iters: int = 1, device=None, dtype=None):
        super().__init__()
        self.stoken_size = stoken_size
        self.num_iters = num_iters
        self.stoken_refine = Attention(dim, num_heads, device=device, dtype=dtype)

    def forward(self, x):
        if self.stoken_size == 1:
            return self.stoken_refine(x)
        _, C, H, W = x.shape
        side = self.stoken_size
        x = pad_to_stride(x, (side, side))  # zeros, which take part as pixels
        rows, columns = x.shape[2] // side, x.shape[3] // side
        super_tokens = F.avg_pool2d(x, side)  # (B, C, rows, columns)
        pixels = x.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 3, 5, 1)
        pixels = pixels.reshape(-1, rows * columns, side * side, C)  # of each cell
        for _ in range(self.num_iters):
            # As the authors, no gradient goes through the association.
            association = pixels.detach() @ neighbors(super_tokens.detach()).mT * C**-0.5
            association = association.softmax(-1)  # (B, cells, pixels of a cell, 9)
            count = spread(association.sum(2)[..., None], rows, columns)
            super_tokens = spread(association.mT @ pixels, rows, columns) / (count + EPS)
        out = association @ neighbors(self.stoken_refine(super_tokens))  # (B, cells, pixels of a cell, C)
        out = out.unflatten(2, (side, side)).unflatten(1, (rows, columns)).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(x.shape)[:, :, :H, :W]

    def extra_repr(self):
        return f'stoken_size={self.stoken_size}, num_iters={self.num_iters}'


def neighbors(x: torch.Tensor) -> torch.Tensor:
    """The 3x3 cells around each cell, zeros outside: (B, C, rows, columns) -> (B, rows * columns, 9, C)."""
    return F.unfold(x, 3, padding=1).mT.unflatten(-1, (-1, CELLS)).mT


def spread(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """What each cell gives to the 3x3 cells around it, summed: (B, rows * columns, 9, C) -> (B, C, rows, columns)."""
    return F.fold(x.mT.flatten(2).mT, (rows, columns), 3, padding=1)


class ConvMlp(nn.Module):
    """A perceptron with a depthwise 3x3 convolution added to its hidden layer. (B, C, H, W) -> same."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act = nn.GELU()
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)

    def forward(self, x):
        x = self.act(self.fc1(x))
        return self.fc2(x + self.conv(x))


class Block(nn.Module):
    """Convolutional position embedding, super-token attention and perceptron. (B, C, H, W) -> same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stoken_size: int,
        num_iters: int = 1,
        mlp_ratio: float = 4,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.attn = SuperTokenAttention(dim, num_heads, stoken_size, num_iters, **dd)
        self.ls1 = LayerScale2d(dim, layer_scale, **dd) if layer_scale else nn.Identity()
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp2 = ConvMlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = LayerScale2d(dim, layer_scale, **dd) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        x = x + self.pos_embed(x)
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp2(self.norm2(x))))


class PatchEmbed(nn.Sequential):
    """Four convolutions, every second one strided. (B, in_chans, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        layers = []
        for width, stride in ((dim // 2, 2), (dim // 2, 1), (dim, 2), (dim, 1)):
            layers += [nn.Conv2d(in_chans, width, 3, stride, 1, **dd), nn.GELU(), nn.BatchNorm2d(width, **dd)]
            in_chans = width
        super().__init__(*layers)


class SViT(Pyramid):
    """Vision Transformer with Super Token Sampling.

    Args:
        dims, depths, num_heads: channels, blocks and heads of each stage.
        stoken_sizes: side in pixels of the cells that super tokens begin as, in each stage.
        num_iters: how often super tokens are sampled.
        layer_scale: initial value of the scales of the residual branches, of each stage; none if None.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    first_conv = 'stages.0.downsample.0'
    official_keys = [
        (r'^patch_embed\.proj\.', 'stages.0.downsample.'),
        (r'^layers\.(\d)\.blocks\.', r'stages.\1.blocks.'),
        (r'^layers\.(\d)\.downsample\.proj\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.'),
        (r'\.(pos_embed|mlp2)\.conv\.conv\.', r'.\1.conv.'),
        (r'\.pos_embed\.conv\.', '.pos_embed.'),
        (r'\.norm1\.norm\.', '.norm1.'),
        (r'\.gamma_(\d)$', r'.ls\1.gamma'),
        (r'^proj\.', 'norm.0.'),
        (r'^norm\.(?!\d)', 'norm.1.'),
    ]
    constants = ('attn.unfold.weights', 'attn.fold.weights')

    def __init__(
        self,
        dims=(64, 128, 320, 512),
        depths=(3, 5, 9, 3),
        num_heads=(1, 2, 5, 8),
        stoken_sizes=(8, 4, 1, 1),
        num_iters: int = 1,
        layer_scale=(None, None, None, None),
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        for i, dim in enumerate(dims):
            mixer = {'num_heads': num_heads[i], 'stoken_size': stoken_sizes[i], 'num_iters': num_iters}
            self.add_stage(
                nn.Sequential(nn.Conv2d(dims[i - 1], dim, 3, 2, 1, **dd), nn.BatchNorm2d(dim, **dd))
                if i
                else PatchEmbed(self.in_chans, dim, **dd),
                [Block(dim, **mixer, layer_scale=layer_scale[i], drop_path=rate, **dd) for rate in rates[i]],
                num_chs=dim,
                stride=2 if i else 4,
            )
        projection = nn.Sequential(nn.Conv2d(dims[-1], HEAD_DIM, 1, **dd), nn.BatchNorm2d(HEAD_DIM, **dd), nn.SiLU())
        self.finish(projection, num_features=HEAD_DIM)


deep_scale = (None, None, 1e-6, 1e-6)

variants(
    SViT,
    stvit_small=dict(drop_path_rate=0.1),
    stvit_base=dict(
        dims=(96, 192, 384, 512),
        depths=(4, 6, 14, 6),
        num_heads=(2, 3, 6, 8),
        layer_scale=deep_scale,
        drop_path_rate=0.4,
    ),
    stvit_large=dict(
        dims=(96, 192, 448, 640),
        depths=(4, 7, 19, 8),
        num_heads=(2, 3, 7, 10),
        layer_scale=deep_scale,
        drop_path_rate=0.6,
    ),
)
