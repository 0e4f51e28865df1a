"""What heads of detectors share, and what they are asked for.

A head works on maps that are computed already. It has `num_classes`, `has_masks`, `nms_threshold`, `max_detections` and

- `losses(maps, images, targets)`: a dict of scalars; labels of targets are 0 to K - 1.
- `detect(maps, images)`: a dict of `boxes`, `scores` (falling) and `labels` an image, in pixels of the batch.
- with masks, `predict_masks(maps, images, boxes, labels)`: probabilities (N, M, M) within each image's boxes.

`images` is torchvision's ImageList: the batch, and the sizes of its images before padding. Heads are made of
torchvision.models.detection's parts. Two are other than torchvision's, by which results would depend on other images:
anchors lie by the strides of the levels (torchvision divides the sides of the padded batch by those of the map), and
pooling takes any strides (torchvision infers powers of two, once, from the first batch it sees).
"""

from collections.abc import Sequence

import torch
from timm.models import FeatureInfo
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

__all__ = ['Anchors', 'Float32', 'levels_of']


class Anchors(AnchorGenerator):
    """torchvision's anchors, around the points (x * stride, y * stride) of each level, always in float32.

    Args:
        strides: of the levels.
        sizes: of each level, in pixels: square roots of the areas of its anchors.
        aspect_ratios: heights by widths.
    """

    def __init__(self, strides: Sequence[float], sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float]):
        super().__init__(tuple(tuple(own) for own in sizes), (tuple(aspect_ratios),) * len(strides))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Anchors (A, 4) for each image, level after level."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [x.shape[-2:] for x in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(stride, stride) for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


def _float32(outputs):
    if isinstance(outputs, dict):
        return {key: _float32(value) for key, value in outputs.items()}
    return outputs.float() if isinstance(outputs, Tensor) else type(outputs)(map(_float32, outputs))


class Float32:
    """Gives a head outputs in float32 under autocast too: boxes of a thousand pixels are decoded from them."""

    def forward(self, x):
        return _float32(super().forward(x))


def levels_of(feature_info: FeatureInfo, num_classes: int) -> tuple[int, list[int]]:
    """Channels and strides of a pyramid, if a head can work on it."""
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f'num_classes must be a positive integer, got {num_classes!r}.')
    channels = feature_info.channels()
    if len({*channels}) != 1:
        raise ValueError(f'A detector needs levels of equal channels, got {channels}: give it a neck, such as an FPN.')
    return channels[0], feature_info.reduction()
