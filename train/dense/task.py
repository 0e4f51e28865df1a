"""What detectors and segmentors share: a backbone, a neck, and images of any size made into a batch."""

import math
from collections.abc import Sequence

import torch
from mmengine.model import BaseModel
from timm.data import resolve_model_data_config
from timm.models import FeatureInfo
from torch import Tensor, nn

from ..registry import FUNCTIONS, MODELS
from .features import Features, freeze_statistics

__all__ = ['DenseTask', 'collate']


@FUNCTIONS.register_module()
def collate(batch: Sequence[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
    """Lists of the images and of the targets of samples."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _check_divisor(size_divisor: int, neck: nn.Module) -> None:
    """ValueError if a neck that adds finer levels would give them other sizes than images of that padding have."""
    if getattr(neck, 'finer', 0) and size_divisor % neck.in_strides[0]:
        raise ValueError(
            f'{type(neck).__name__} makes levels finer than stride {neck.in_strides[0]}, of which size_divisor must be '
            f'a multiple, got {size_divisor}.'
        )


class DenseTask(BaseModel):
    """A backbone and a neck, for the head of a subclass.

    Args:
        backbone: `name` and other arguments of `Features`.
        neck: type and arguments of a neck, which is made for the backbone's levels, or a list of them to apply in turn.
        mean, std: of the images' channels, in 0..1; those of the backbone's pretrained_cfg unless given.
        size_divisor: sides of a batch are padded, right and bottom, to a multiple of it.
        frozen_norms: BatchNorms of the backbone keep to their stored statistics in training, as is usual with the small
            batches of detection; their weights are trained all the same.
        channels_last: memory format of the weights and images.
        grad_checkpointing: the backbone computes activations again in the backward pass instead of keeping them.
        compile: whether to compile the backbone, or the arguments of torch.compile.

    Raises:
        ValueError: a model, neck or argument that doesn't exist.
    """

    exported = ''  # the weights that a run leaves for use elsewhere: all

    def __init__(
        self,
        backbone: dict,
        neck: dict | Sequence[dict] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size_divisor: int = 32,
        frozen_norms: bool = False,
        channels_last: bool = False,
        grad_checkpointing: bool = False,
        compile: bool | dict = False,
    ):
        super().__init__()
        if not isinstance(size_divisor, int) or size_divisor < 1:
            raise ValueError(f'size_divisor must be a positive integer, got {size_divisor!r}.')
        self.backbone = Features(**backbone)
        self.neck = nn.Sequential()
        info = self.backbone.feature_info
        for config in [neck] if isinstance(neck, dict) else neck or ():
            self.neck.append(MODELS.build({**config, 'feature_info': info}))
            _check_divisor(size_divisor, self.neck[-1])
            info = self.neck[-1].feature_info
        self.feature_info: FeatureInfo = info
        stored = resolve_model_data_config(self.backbone)
        for key, value in (('mean', mean), ('std', std)):
            channels = torch.tensor(value or stored[key]).view(-1, 1, 1)
            self.register_buffer(key, 255 * channels, persistent=False)  # images come as bytes
        self.size_divisor = size_divisor
        self.frozen_norms = frozen_norms
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if grad_checkpointing:
            self.backbone.set_grad_checkpointing(True)
        if compile:
            self.backbone.compile(**(compile if isinstance(compile, dict) else {}))

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    def init_weights(self) -> None:
        """Nothing: parts come initialized or loaded, and mmengine would call their init_weights again."""

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.frozen_norms:
            freeze_statistics(self.backbone)
        return self

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict] | None = None, mode: str = 'predict'):
        """Losses of a training batch with mode='loss' (a dict of scalars), else predictions; see `zoo.train.dense`."""
        if mode == 'loss':
            return self.loss(images, targets)
        return self.predict(images)

    def loss(self, images: Sequence[Tensor], targets: Sequence[dict]) -> dict[str, Tensor]:
        """Losses of a training batch, which mmengine adds up (those whose names hold 'loss')."""
        raise NotImplementedError

    def predict(self, images: Sequence[Tensor]) -> list[dict]:
        """A prediction for each image, in its own pixels."""
        raise NotImplementedError

    def extract(self, images: Tensor) -> list[Tensor]:
        """Maps of the levels of `feature_info` of a normalized batch (B, C, H, W)."""
        return self.neck(self.backbone(images))

    def normalize(self, image: Tensor) -> Tensor:
        """Bytes (..., C, H, W), or floats in 0..255, to floats of the mean and deviation that the backbone expects."""
        if image.ndim < 3 or image.shape[-3] != len(self.mean):
            raise ValueError(f'Expected images ({len(self.mean)}, H, W), got {tuple(image.shape)}.')
        return (image - self.mean) / self.std

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Images (C, H, W) normalized, padded right and bottom with zeros to one size, and stacked."""
        if not images:
            raise ValueError('A batch needs at least one image.')
        height, width = (
            math.ceil(max(image.shape[axis] for image in images) / self.size_divisor) * self.size_divisor
            for axis in (-2, -1)
        )
        result = self.mean.new_zeros(len(images), len(self.mean), height, width)
        for own, image in zip(result, images, strict=True):
            own[:, : image.shape[-2], : image.shape[-1]] = self.normalize(image)
        return result.contiguous(memory_format=self.memory_format)
