"""What a backbone is trained for. Backbones come from timm by name, those of the zoo among them."""

import difflib
from collections.abc import Sequence

import timm
import torch
from mmengine.model import BaseModel
from timm.data import Mixup, resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

import zoo  # noqa: F401 (makes its models known to timm)

from .registry import FUNCTIONS, MODELS

__all__ = ['ImageClassifier', 'create_backbone']

FUNCTIONS.register_module(module=F.cross_entropy)


@FUNCTIONS.register_module()
def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples and classes, each class by itself; targets are class indices or probabilities."""
    if not targets.is_floating_point():
        targets = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets)


def create_backbone(name: str, **kwargs) -> nn.Module:
    """`timm.create_model`, with errors that say what in a config is wrong.

    Raises:
        ValueError: no such model, or an argument that it doesn't take.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(f'There is no model {name!r}.' + (f' Near: {", ".join(near)}.' if near else ''))
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f'{name} could not be made with {kwargs}: {error}') from error


def _function(name: str):
    function = FUNCTIONS.get(name)
    if function is None:
        raise ValueError(f'There is no loss {name!r}. Losses: {", ".join(sorted(FUNCTIONS.module_dict))}.')
    return function


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """One label an image.

    Args:
        backbone: `name` and other arguments of `timm.create_model`.
        loss: function of logits and targets: its registered name as `type`, and more arguments.
        mean, std: of the images' channels, in 0..1; those of the backbone's pretrained_cfg unless given.
        mixup: arguments of timm's Mixup (CutMix too) for training batches; none if None.
    """

    def __init__(
        self,
        backbone: dict,
        loss: dict,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        mixup: dict | None = None,
    ):
        super().__init__()
        self.backbone = create_backbone(**backbone)
        loss = dict(loss)
        self._loss = _function(loss.pop('type'))
        self._loss_arguments = loss
        self.mixup = Mixup(**mixup, num_classes=self.num_classes) if mixup else None
        stored = resolve_model_data_config(self.backbone)
        for key, value in (('mean', mean), ('std', std)):
            channels = torch.tensor(value or stored[key]).view(-1, 1, 1)
            self.register_buffer(key, 255 * channels, persistent=False)  # images come as bytes

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    def init_weights(self) -> None:
        """Nothing: timm has initialized or loaded the backbone, and mmengine would call its init_weights again."""

    def forward(self, images: Tensor, labels: Tensor | None = None, mode: str = 'tensor'):
        """Logits, or with mode='loss' and labels {'loss': scalar}. Images are uint8 (B, C, H, W), labels int64 (B,)."""
        if mode == 'loss':
            return self.loss(images, labels)
        return self.predict(images)

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes), float32, of images as bytes."""
        return self.backbone(self.normalize(images)).float()

    def loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss of a training batch."""
        images = self.normalize(images)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        return {'loss': self._loss(self.backbone(images).float(), labels, **self._loss_arguments)}

    def normalize(self, images: Tensor) -> Tensor:
        """Bytes to floats of the mean and standard deviation that the backbone expects."""
        return (images - self.mean) / self.std
