"""SpectFormer: Frequency and Attention is what you need in a Vision Transformer (arXiv 2304.06446).

The first blocks multiply the spectrum of the map by a learned filter, the later ones attend globally. This is the model
of one width, after GFNet; the hierarchical one is in spectformer_h.py.

Original code: badripatro/SpectFormers (without a licence).
"""

from functools import partial

import torch
from timm.layers import Attention, DropPath, Mlp, to_2tuple
from timm.models import register_notrace_module
from timm.models.vision_transformer import Block
from torch import nn

from .checkpoints import checkpoint_filter_fn
from .columnar import Columnar
from .registration import variants

__all__ = ['GlobalAttention', 'SpectFormer', 'SpectralGating', 'checkpoint_filter_fn', 'fit_filters']

NORM_EPS = 1e-6


def as_spectrum(weight: torch.Tensor) -> torch.Tensor:
    """A parameter (rows, columns // 2 + 1, C, 2), real and imaginary parts, as complex (C, rows, columns // 2 + 1)."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.view_as_complex(weight.permute(2, 0, 1, 3).contiguous())


def as_weight(spectrum: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The parameter of a spectrum."""
    return torch.view_as_real(spectrum).permute(1, 2, 0, 3).to(dtype).contiguous()


def resampled(spectrum: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """The filter (C, rows, columns // 2 + 1) of maps of size `old` at the frequencies of maps of size `new`.

    A filter is samples of a continuous spectrum, of which another size takes others (GFNet, arXiv 2107.00645, section
    3.2). So the kernel that the filter is the spectrum of stays as it is, in tokens; on a map that is smaller it wraps.
    """
    kernel = torch.fft.irfft2(spectrum, s=old)
    for axis, (length, target) in enumerate(zip(old, new, strict=True), start=1):
        place = torch.arange(length, device=kernel.device)
        place = (place + length // 2) % length - length // 2  # 0, 1, ... -2, -1: from the token itself
        shape = [*kernel.shape[:axis], target, *kernel.shape[axis + 1 :]]
        kernel = kernel.new_zeros(shape).index_add(axis, place % target, kernel)
    return torch.fft.rfft2(kernel)


@register_notrace_module
class SpectralGating(nn.Module):
    """Multiply the spectrum of a map by a learned filter (section 3.1). (B, H, W, C) -> same.

    Args:
        dim: channels.
        size: rows and columns of the maps that the filter is made for; for others it is resampled.
    """

    def __init__(self, dim: int, size: tuple[int, int], device=None, dtype=None):
        super().__init__()
        self.size = size
        self.complex_weight = nn.Parameter(torch.empty(size[0], size[1] // 2 + 1, dim, 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.complex_weight, std=0.02)

    def forward(self, x):
        size = tuple(x.shape[1:3])
        spectrum = as_spectrum(self.complex_weight)
        if size != self.size:
            spectrum = resampled(spectrum, self.size, size)
        maps = x.permute(0, 3, 1, 2).to(spectrum.real.dtype).contiguous()  # transforms are fastest of whole rows
        maps = torch.fft.irfft2(torch.fft.rfft2(maps) * spectrum, s=size)
        return maps.permute(0, 2, 3, 1).to(x.dtype)

    @torch.no_grad()
    def set_size(self, size: tuple[int, int]) -> None:
        """Resample the filter for good."""
        if size != self.size:
            old = self.complex_weight
            spectrum = resampled(as_spectrum(old), self.size, size)
            self.complex_weight = nn.Parameter(as_weight(spectrum, old.dtype), requires_grad=old.requires_grad)
            self.size = size

    def extra_repr(self):
        return f'dim={self.complex_weight.shape[2]}, size={self.size}'


def fit_filters(state_dict: dict, model: nn.Module) -> dict:
    """The state dict with its filters, of square maps where they can be, resampled to the model's sizes."""
    modules = model.named_modules()
    gatings = {f'{name}.complex_weight': each for name, each in modules if isinstance(each, SpectralGating)}

    def fitted(key, value):
        own = gatings[key].complex_weight.shape if key in gatings else None
        if own is None or value.ndim != 4 or value.shape[2:] != own[2:] or value.shape == own:
            return value
        rows, half = value.shape[:2]
        columns = rows if rows // 2 + 1 == half else 2 * (half - 1)
        return as_weight(resampled(as_spectrum(value), (rows, columns), gatings[key].size), value.dtype)

    return {key: fitted(key, value) for key, value in state_dict.items()}


@register_notrace_module
class GlobalAttention(Attention):
    """Multi-head self-attention of all tokens of a map. (B, H, W, C) -> same."""

    def forward(self, x, **mask):
        return super().forward(x.flatten(1, 2), **mask).unflatten(1, x.shape[1:3])


class SpectralBlock(nn.Module):
    """Spectral gating and a perceptron, with one residual connection around both. (B, H, W, C) -> same."""

    def __init__(
        self, dim: int, size: tuple[int, int], mlp_ratio: float, drop_path: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, **dd)
        self.filter = SpectralGating(dim, size, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        return x + self.drop_path(self.mlp(self.norm2(self.filter(self.norm1(x)))))


class SpectFormer(Columnar):
    """SpectFormer of one width. Its blocks keep the tokens as a map (B, H, W, C).

    Args:
        img_size: side, or height and width, of the images that positions and filters are made for.
        patch_size: side of the patches.
        embed_dim, depth, num_heads, mlp_ratio: channels, blocks, and of these heads and expansion.
        spectral_depth: how many of the blocks, the first ones, gate the spectrum.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        in_chans, num_classes, global_pool, drop_rate, pos_drop_rate: as for timm's ViT.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        embed_dim: int = 256,
        depth: int = 12,
        spectral_depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        grid_size = tuple(side // patch_size for side in to_2tuple(img_size))

        def block(dim, depth, drop_path, device, dtype, **arguments):
            dd = {'device': device, 'dtype': dtype}
            if depth < spectral_depth:
                return SpectralBlock(dim, grid_size, mlp_ratio, drop_path, **dd)
            return Block(dim, drop_path=drop_path, **arguments, **dd)

        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_token=False,
            fc_norm=False,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
            block_fn=block,
            attn_layer=GlobalAttention,
            device=device,
            dtype=dtype,
        )

    def _pos_embed(self, x):
        return super()._pos_embed(x).unflatten(1, x.shape[1:3])

    def forward_features(self, x):
        """Tokens (B, N, C) of images (batch, in_chans, height, width), normed."""
        return super().forward_features(x).flatten(1, 2)

    def forward_intermediates(
        self,
        x,
        indices=None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        **mask,
    ):
        """What the chosen blocks end with, as timm's ViT has it. There are no prefix tokens, and a `mask` is None."""
        found = super().forward_intermediates(
            x,
            indices,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            output_dict=True,
            **mask,
        )
        if output_fmt == 'NLC':
            found['image_intermediates'] = [each.flatten(1, 2) for each in found['image_intermediates']]
        if not intermediates_only:
            found['image_features'] = found['image_features'].flatten(1, 2)
        if output_dict:
            return found
        maps = found['image_intermediates']
        return maps if intermediates_only else (found['image_features'], maps)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """As timm's ViT, and resample the filters."""
        super().set_input_size(img_size, patch_size)
        for block in self.blocks:
            if isinstance(block, SpectralBlock):
                block.filter.set_size(tuple(self.patch_embed.grid_size))

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict, with positions and filters for the model's size; ours passes through."""
        return fit_filters(super().map_official(state_dict), self)


# The authors' code leaves the number of heads of the base model open: these are two that its channels divide by.
base = dict(embed_dim=512, depth=19, num_heads=8, drop_path_rate=0.25)

variants(
    SpectFormer,
    spectformer_tiny={},
    spectformer_xsmall=dict(embed_dim=384, num_heads=6),
    spectformer_small=dict(embed_dim=384, depth=19, num_heads=6, drop_path_rate=0.15),
    spectformer_base=base,
    spectformer_base_h16=dict(base, num_heads=16),
)
