"""CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification (arXiv 2103.14899).

Two transformers read the image in small and in large patches, and exchange their class tokens. timm owns CrossViT; its
models resize every image to their own size without a word. Under `NAME_dynamic` the same models, with the same weights,
read an image of any size in as many patches as it has.

Original code: IBM/CrossViT (Apache-2.0).
"""

import math

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models.crossvit import CrossVit, scale_image

from . import adopted
from .checkpoints import checkpoint_filter_fn, rename
from .layers import pad_to_stride
from .pyramid import check_images
from .registration import variants

__all__ = ['DynamicCrossViT', 'checkpoint_filter_fn']


@register_notrace_function
def scaled(x: torch.Tensor, of: int, to: int, crop: bool = False) -> torch.Tensor:
    """Images (B, C, H, W) scaled by to / of, rounded up, as timm scales them (bicubic) or cropped."""
    height, width = (-(-side * to // of) for side in x.shape[2:])
    return scale_image(x, (height, width), crop)


@register_notrace_function
def tokens(patches: torch.Tensor, cls_token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Class token and patches (B, C, h, w) with the positions of a square grid resampled to h x w: (B, 1 + h w, C)."""
    batch, _, height, width = patches.shape
    x = torch.cat((cls_token.expand(batch, -1, -1), patches.flatten(2).mT), dim=1)
    return x + resample_abs_pos_embed(positions, [height, width])


class DynamicCrossViT(CrossVit):
    """timm's CrossViT on images of any size from 32x32; states and weights are timm's, and results at its own size.

    The second branch sees the image at `img_scale` (of 240 pixels, 224), whatever its size. What a branch's patches
    don't divide is padded with zeros at the bottom and right, and its position embeddings are resampled to its grid
    (bicubic, antialiased). The features are the patches of the small branch, with reduction 12, and of the large one,
    with reduction 16 / img_scale (17.14 for 240 pixels): ceil(side / reduction) a side.

    Args:
        img_size: side of the square images whose grids the position embeddings are made for.
        arguments: as for timm's CrossVit.
    """

    out_indices = (2, 5)

    def __init__(self, img_size: int = 240, **arguments):
        super().__init__(img_size=img_size, **arguments)
        self.grad_checkpointing = False
        for i, level in enumerate(self.feature_info):
            branch = i // self.num_feature_blocks
            pixels, scaled_to = (
                self.patch_embed[branch].patch_size[0] * self.img_size[0],
                self.img_size_scaled[branch][0],
            )
            exact = pixels / scaled_to  # not always whole: rounded up, ceil(side / reduction) is right at every side
            level['reduction'] = math.nextafter(exact, math.inf) if pixels % scaled_to else int(exact)

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under timm's keys; timm's pass through."""
        return rename(state_dict, adopted.CROSSVIT)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each multi-scale block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def forward(self, x):
        """Logits (batch, num_classes) of images (batch, in_chans, height, width)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x):
        """The tokens of each branch, (B, 1 + h w, C), the class token first."""
        xs = self._embed(x)
        for block in self.blocks:
            xs = checkpoint(block, xs) if self.grad_checkpointing else block(xs)
        return [norm(x) for norm, x in zip(self.norm, xs, strict=True)]

    def _embed(self, x):
        check_images(x, self.in_chans)
        embedded = []
        for i, patch_embed in enumerate(self.patch_embed):
            images = scaled(x, self.img_size[0], self.img_size_scaled[i][0], self.crop_scale)
            patches = patch_embed.proj(pad_to_stride(images, patch_embed.patch_size))
            y = tokens(patches, getattr(self, f'cls_token_{i}'), getattr(self, f'pos_embed_{i}'))
            embedded.append(self.pos_drop(y))
        return embedded

    def forward_intermediates(
        self,
        x,
        indices=None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ):
        """As timm's: a map of each chosen block, those of the small branch first."""
        assert output_fmt in ('NCHW', 'NLC'), f'output_fmt must be NCHW or NLC, got {output_fmt}.'
        final, features = super().forward_intermediates(x, indices, norm, stop_early, output_fmt='NLC')
        if output_fmt == 'NCHW':
            take, _ = feature_take_indices(self.num_branches * self.num_feature_blocks, indices)
            branches = (index // self.num_feature_blocks for index in sorted(set(take)))
            features = [
                y.mT.unflatten(2, self._grid(branch, x.shape[2:])).contiguous()
                for y, branch in zip(features, branches, strict=True)
            ]
        return features if intermediates_only else (final, features)

    def _grid(self, branch: int, size) -> tuple[int, int]:
        """Patches of a branch along the sides of an image."""
        patch = self.patch_embed[branch].patch_size[0] * self.img_size[0]
        return tuple(-(-side * self.img_size_scaled[branch][0] // patch) for side in size)


def arguments(embed_dim: int, num_heads: int, depth: int, mlp_ratio: float = 3, img_size: int = 240, **others) -> dict:
    """Of a variant, for the small branch; the large one is twice as wide, and its patches are 16 pixels for 12."""
    return dict(
        img_size=img_size,
        img_scale=(1.0, {240: 224, 408: 384}[img_size] / img_size),
        patch_size=(12, 16),
        embed_dim=(embed_dim, 2 * embed_dim),
        depth=((1, depth, 0),) * 3,
        num_heads=(num_heads, num_heads),
        mlp_ratio=(mlp_ratio, mlp_ratio, 1),
        **others,
    )


variants(
    DynamicCrossViT,
    crossvit_tiny_240_dynamic=arguments(96, 3, 4, 4),
    crossvit_small_240_dynamic=arguments(192, 6, 4, 4),
    crossvit_base_240_dynamic=arguments(384, 12, 4, 4),
    crossvit_9_240_dynamic=arguments(128, 4, 3),
    crossvit_15_240_dynamic=arguments(192, 6, 5),
    crossvit_18_240_dynamic=arguments(224, 7, 6),
    crossvit_9_dagger_240_dynamic=arguments(128, 4, 3, multi_conv=True),
    crossvit_15_dagger_240_dynamic=arguments(192, 6, 5, multi_conv=True),
    crossvit_18_dagger_240_dynamic=arguments(224, 7, 6, multi_conv=True),
    crossvit_15_dagger_408_dynamic=arguments(192, 6, 5, img_size=408, multi_conv=True),
    crossvit_18_dagger_408_dynamic=arguments(224, 7, 6, img_size=408, multi_conv=True),
)
