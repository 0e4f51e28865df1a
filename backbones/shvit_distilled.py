"""SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design (arXiv 2401.16456).

timm owns SHViT: `shvit_s1` to `shvit_s4` are its models. Here is what it lacks, the classifier that learns from a
teacher in the authors' distillation.

Original code: ysj9909/SHViT (MIT).
"""

import torch
from timm.layers import get_device_dtype
from timm.models.shvit import NormLinear, SHViT
from torch import nn

from . import adopted
from .checkpoints import checkpoint_filter_fn, rename
from .pyramid import ImageChecks
from .registration import variants

__all__ = ['DistilledSHViT', 'checkpoint_filter_fn']


class DistilledSHViT(ImageChecks, SHViT):
    """SHViT with a second classifier, which learns from a teacher; predictions are the mean of both.

    Arguments are those of timm's SHViT. In training, after `set_distilled_training()`, the model returns the logits of
    the two classifiers, (from labels, from teacher).
    """

    classifier_name = ('head.l', 'head_dist.l')
    out_indices = (0, 1, 2)

    def __init__(self, *args, device=None, dtype=None, **kwargs):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.distilled_training = False
        self.head_dist = self._make_head_dist()

    def _make_head_dist(self):
        if not self.num_classes:
            return nn.Identity()
        return NormLinear(self.head_hidden_size, self.num_classes, **get_device_dtype(self)).train(self.training)

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under timm's keys; timm's pass through."""
        return rename(state_dict, adopted.SHVIT)

    @torch.jit.ignore
    def get_classifier(self):
        return self.head.l, self.head_dist.l

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether the model in training returns the logits of each classifier."""
        self.distilled_training = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head_dist = self._make_head_dist()

    def forward_head(self, x, pre_logits: bool = False):
        x = super().forward_head(x, pre_logits=True)
        if pre_logits:
            return x
        labels, teacher = self.head(x), self.head_dist(x)
        if self.training and self.distilled_training:
            return labels, teacher
        return (labels + teacher) / 2


variants(
    DistilledSHViT,
    shvit_s1_distilled=dict(
        embed_dim=(128, 224, 320), depth=(2, 4, 5), partial_dim=(32, 48, 68), types=('i', 's', 's')
    ),
    shvit_s2_distilled=dict(
        embed_dim=(128, 308, 448), depth=(2, 4, 5), partial_dim=(32, 66, 96), types=('i', 's', 's')
    ),
    shvit_s3_distilled=dict(
        embed_dim=(192, 352, 448), depth=(3, 5, 5), partial_dim=(48, 75, 96), types=('i', 's', 's')
    ),
    shvit_s4_distilled=dict(
        embed_dim=(224, 336, 448), depth=(4, 7, 6), partial_dim=(48, 72, 96), types=('i', 's', 's')
    ),
)
