"""Transformers of one width and resolution: timm's VisionTransformer, on images of any size.

    images (B, in_chans, H, W) -> patch_embed, positions -> blocks.0 ... blocks.n -> norm -> head

A family brings blocks, and says how its authors' checkpoints are named. timm's contract is timm's own.
"""

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import register_notrace_function
from timm.models.vision_transformer import VisionTransformer

from .checkpoints import rename
from .pyramid import ImageChecks

__all__ = ['Columnar']


@torch.fx.wrap
@register_notrace_function
def positioned(
    patches: torch.Tensor, prefix: torch.Tensor | None, pos_embed: torch.Tensor, grid_size: list[int]
) -> torch.Tensor:
    """Tokens, those of a prefix (1, n, C) first, of patches (B, H, W, C), plus their positions.

    Positions (1, n + rows * columns, C) of a grid are resampled to the patches, as by timm.
    """
    B, H, W, _ = patches.shape
    x, prefix_length = patches.flatten(1, 2), 0
    if prefix is not None:
        prefix_length = prefix.shape[1]
        x = torch.cat((prefix.expand(B, -1, -1), x), dim=1)
    return x + resample_abs_pos_embed(pos_embed, [H, W], list(grid_size), prefix_length)


class Columnar(ImageChecks, VisionTransformer):
    """Base of the families of one width.

    At another size than `img_size`, positions are resampled to the image's patches (bicubic, antialiased), and what
    patches don't divide is padded with zeros at the bottom and right, to ceil(side / patch_size) tokens a side.

    Args:
        arguments: as for timm's VisionTransformer, `block_fn` among them.
    """

    first_conv = 'patch_embed.proj'
    classifier_name = 'head'
    out_indices = 3  # the last three blocks, that features_only gives by default
    pools_map = False  # the head pools tokens
    official_keys: list[tuple] = []  # (pattern, replacement) of re.sub, from the authors' keys to ours

    def __init__(self, **arguments):
        super().__init__(**{'dynamic_img_size': True, 'dynamic_img_pad': True, **arguments})

    def forward(self, x):
        """Logits (batch, num_classes) of images (batch, in_chans, height, width)."""
        return self.forward_head(self.forward_features(x))

    def _pos_embed(self, x):
        if not self.dynamic_img_size or self.reg_token is not None:
            return super()._pos_embed(x)
        return self.pos_drop(positioned(x, self.cls_token, self.pos_embed, self.patch_embed.grid_size))

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under our keys, with positions for the model's size; ours passes through."""
        state_dict = rename(state_dict, self.official_keys)
        positions = state_dict.get('pos_embed')
        if positions is not None and self.pos_embed is not None and positions.shape[1] != self.pos_embed.shape[1]:
            state_dict['pos_embed'] = resample_abs_pos_embed(
                positions, list(self.patch_embed.grid_size), num_prefix_tokens=self.num_prefix_tokens, antialias=False
            )
        return state_dict
