"""DHVT: Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets (2210.05958).

For small datasets: patches are embedded by convolutions, perceptrons have one in their hidden layer, and beside the
patches' tokens each head has one of its own, by which the heads attend to each other.

Original code: ArieSeirack/DHVT (Apache-2.0).
"""

import re
from functools import partial

import torch
from timm.layers import DropPath, to_2tuple
from timm.layers import PatchEmbed as PatchGrid
from timm.models import checkpoint, register_notrace_module
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F

from .checkpoints import checkpoint_filter_fn, rename
from .columnar import Columnar
from .layers import BatchNorm
from .pyramid import check_images
from .registration import variants

__all__ = ['DHVT', 'checkpoint_filter_fn']

torch.fx.wrap('check_images')  # in this module too

NORM_EPS = 1e-6  # of the blocks' norms and the last
EMBEDDING_WIDTHS = {2: (1,), 4: (2, 1), 16: (8, 4, 2, 1)}  # by patch size: what channels are divided by
MLP_RATIO = 4
SQUEEZE = 4  # of the channels where the class token's weights are made
BASE_ARGUMENTS = {
    *('img_size', 'patch_size', 'in_chans', 'num_classes', 'global_pool', 'drop_rate', 'device', 'dtype'),
}


class Affine(nn.Module):
    """Scale and shift each channel. (B, C, H, W) -> same."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.alpha)
        nn.init.zeros_(self.beta)

    def forward(self, x):
        return torch.addcmul(self.beta, x, self.alpha)


class PatchEmbed(PatchGrid):
    """Sequential overlapping patch embedding (section 3.2): a strided convolution for each halving of the sides.

    (B, in_chans, H, W) -> (B, ceil(H / patch_size), ceil(W / patch_size), C)
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, device=None, dtype=None, **grid):
        if patch_size not in EMBEDDING_WIDTHS:
            raise ValueError(f'patch_size must be one of {", ".join(map(str, EMBEDDING_WIDTHS))}, got {patch_size}.')
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, device='meta', **grid)
        dd = {'device': device, 'dtype': dtype}
        self.pre_affine = Affine(in_chans, **dd)
        layers = []
        for part in EMBEDDING_WIDTHS[patch_size]:
            width = embed_dim // part
            conv = nn.Conv2d(in_chans, width, 3, 2, 1, bias=False, **dd)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(width, **dd)), nn.GELU()]
            in_chans = width
        self.proj = nn.Sequential(*layers[: None if patch_size == 2 else -1])
        self.post_affine = Affine(embed_dim, **dd)

    def set_input_size(self, img_size=None, patch_size=None):
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f'patch_size can only be chosen when the model is made, got {patch_size}.')
        super().set_input_size(img_size)

    def forward(self, x):
        x = self.pre_affine(x).contiguous(memory_format=torch.channels_last)
        return self.post_affine(self.proj(x)).permute(0, 2, 3, 1)


@register_notrace_module
class HeadInteractedAttention(nn.Module):
    """Attention of tokens and of a token of each head (HI-MHSA, section 3.4). (B, 1 + N, C) -> same.

    A head's token comes from the mean of all tokens; what it has gathered goes to the class token, which is the first.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.ht_proj = nn.Linear(head_dim, dim, **dd)
        self.ht_norm = nn.LayerNorm(head_dim, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, num_heads, dim, **dd))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def head_tokens(self, x):
        """(B, 1 + N, C) -> (B, heads, C)."""
        heads = (self.num_heads, -1)
        tokens = self.ht_proj(x.mean(1).unflatten(-1, heads))  # (B, heads, C), C being a part for each head
        return F.gelu(self.ht_norm(tokens.unflatten(-1, heads))).flatten(2) + self.pos_embed

    def forward(self, x):
        length = x.shape[1]
        x = torch.cat((x, self.head_tokens(x)), dim=1)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(query, key, value)  # (B, heads, 1 + N + heads, head_dim)
        x = self.proj(x.transpose(1, 2).flatten(2))
        class_token = x[:, :1] + x[:, length:].mean(1, keepdim=True)
        return torch.cat((class_token, x[:, 1:length]), dim=1)

    def extra_repr(self):
        return f'num_heads={self.num_heads}'


@register_notrace_module
class DynamicAggregation(nn.Module):
    """A perceptron with a convolution of the patches, whose mean weighs the class token (DAFF, section 3.3).

    (B, 1 + H * W, C), the size (H, W) -> (B, 1 + H * W, C)
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        hidden_dim = MLP_RATIO * dim
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.bn1 = BatchNorm(hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.bn2 = nn.BatchNorm2d(hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.bn3 = BatchNorm(dim, **dd)
        self.compress = nn.Linear(dim, dim // SQUEEZE, **dd)
        self.excitation = nn.Linear(dim // SQUEEZE, dim, **dd)
        self.act = nn.GELU()

    def forward(self, x, size: tuple[int, int]):
        class_token, patches = x[:, :1], x[:, 1:].unflatten(1, size)  # (B, 1, C), (B, H, W, C)
        patches = self.act(self.bn1(self.fc1(patches))).permute(0, 3, 1, 2)
        patches = patches + self.act(self.bn2(self.dwconv(patches)))
        patches = self.bn3(self.fc2(patches.permute(0, 2, 3, 1))).flatten(1, 2)
        weights = self.excitation(self.act(self.compress(patches.mean(1, keepdim=True))))
        return torch.cat((class_token * weights, patches), dim=1)


class Block(nn.Module):
    """Pre-norm block. (B, 1 + H * W, C), the size (H, W) -> (B, 1 + H * W, C)."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0, device=None, dtype=None, **_):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, **dd)
        self.attn = HeadInteractedAttention(dim, num_heads, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, **dd)
        self.mlp = DynamicAggregation(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x, size: tuple[int, int]):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class DHVT(Columnar):
    """Dynamic Hybrid Vision Transformer. It has no positions that depend on the size.

    Args:
        embed_dim, depth, num_heads: channels, blocks, heads.
        patch_size: 2, 4 or 16, the image's pixels to a token's side.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: img_size, in_chans, num_classes, global_pool and drop_rate, as for timm's ViT.
    """

    first_conv = 'patch_embed.proj.0.0'
    official_keys = [
        (r'\.mlp\.conv1\.', '.mlp.fc1.'),
        (r'\.mlp\.conv2\.', '.mlp.dwconv.'),
        (r'\.mlp\.conv3\.', '.mlp.fc2.'),
    ]

    def __init__(
        self,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        patch_size: int = 16,
        drop_path_rate: float = 0.0,
        **base,
    ):
        unknown = sorted(set(base) - BASE_ARGUMENTS)  # ViT hands its others to the blocks, which have no use for them
        if unknown:
            raise TypeError(f'DHVT does not take {", ".join(unknown)}. It takes {", ".join(sorted(BASE_ARGUMENTS))}.')
        if embed_dim % num_heads:
            raise ValueError(f'num_heads must divide embed_dim, got {num_heads} and {embed_dim}.')
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            pos_embed='none',
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
            embed_layer=PatchEmbed,
            block_fn=Block,
            **base,
        )

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """As timm's ViT, but the class token truncated normal, and perceptrons as the convolutions that they are."""
        super().init_weights(mode, needs_reset)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for block in self.blocks:
            block.mlp.fc1.reset_parameters()
            block.mlp.fc2.reset_parameters()

    def embed(self, x) -> tuple[torch.Tensor, tuple[int, int]]:
        """Tokens (B, 1 + H * W, C), that of the class first, and (H, W)."""
        check_images(x, self.in_chans)
        x = self.patch_embed(x)
        class_token = self.cls_token.expand(x.shape[0], -1, -1)
        return torch.cat((class_token, x.flatten(1, 2)), dim=1), (x.shape[1], x.shape[2])

    def through(self, block, x, size):
        """Tokens after a block, whose activations the backward pass makes again if it is set to."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(block, x, size)
        return block(x, size)

    def forward_features(self, x):
        """All tokens, normed: (B, 1 + H * W, C)."""
        x, size = self.embed(x)
        for block in self.blocks:
            x = self.through(block, x, size)
        return self.norm(x)

    def forward_intermediates(
        self,
        x,
        indices=None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        attn_mask: None = None,
    ):
        """As timm's ViT; `attn_mask` is there for its callers and must be None."""
        assert output_fmt in ('NCHW', 'NLC'), f'output_fmt must be NCHW or NLC, got {output_fmt}.'
        if attn_mask is not None:
            raise ValueError('DHVT convolves its patches and takes no attn_mask.')
        take, last = feature_take_indices(len(self.blocks), indices)
        x, size = self.embed(x)
        taken = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self.through(block, x, size)
            if i in take:
                taken.append(self.norm(x) if norm else x)
        patches = [tokens[:, 1:] for tokens in taken]
        if output_fmt == 'NCHW':
            patches = [tokens.mT.unflatten(2, size).contiguous() for tokens in patches]
        if return_prefix_tokens:
            patches = [(tokens, whole[:, :1]) for tokens, whole in zip(patches, taken, strict=True)]
        return patches if intermediates_only else (self.norm(x), patches)

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under our keys, pointwise convolutions as linears; ours passes through.

        What scales and shifts images of other channels than the model's becomes its mean.
        """
        state_dict = rename(state_dict, self.official_keys)
        for key, tensor in state_dict.items():
            if re.search(r'\.mlp\.fc[12]\.weight$', key):
                state_dict[key] = tensor.flatten(1)
        for name in ('alpha', 'beta'):
            key, own = f'patch_embed.pre_affine.{name}', getattr(self.patch_embed.pre_affine, name)
            if key in state_dict and state_dict[key].shape != own.shape:
                state_dict[key] = state_dict[key].mean(1, keepdim=True).expand_as(own)
        return state_dict


small = dict(embed_dim=384, num_heads=6)
cifar = dict(tiny=dict(img_size=32, num_heads=4), small=dict(img_size=32, embed_dim=384, num_heads=8))

variants(
    DHVT,
    dhvt_tiny_imagenet_patch16={},
    dhvt_small_imagenet_patch16=small,
    dhvt_tiny_domain_patch16=dict(num_heads=4),
    dhvt_small_domain_patch16=small,
    dhvt_tiny_cifar_patch4=dict(cifar['tiny'], patch_size=4),
    dhvt_small_cifar_patch4=dict(cifar['small'], patch_size=4),
    dhvt_tiny_cifar_patch2=dict(cifar['tiny'], patch_size=2),
    dhvt_small_cifar_patch2=dict(cifar['small'], patch_size=2),
)
