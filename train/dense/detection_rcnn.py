"""Faster and Mask R-CNN (arXiv 1506.01497, 1703.06870) of torchvision's parts, on any pyramid.

Shapes and numbers of proposals are those of Detectron2 and mmdet, whose recipes are published; box losses and sampling
are torchvision's. Regions are pooled, and masks cut and pasted, with pixels' centres at +0.5, as both do, but not
torchvision.
"""

from collections.abc import Sequence

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from ..registry import MODELS
from .detection_parts import Anchors, Float32, levels_of
from .detection_roi import RoIStage

__all__ = ['FasterRCNN', 'MaskRCNN', 'TwoStage', 'proposal_network']

COARSEST = 32  # coarser levels serve proposals only, as P6 does in arXiv 1612.03144


class _ProposalHead(Float32, RPNHead):
    pass


def proposal_network(
    channels: int,
    strides: Sequence[float],
    anchor_scale: float = 8.0,
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    fg_iou_thresh: float = 0.7,
    bg_iou_thresh: float = 0.3,
    batch_size_per_image: int = 256,
    positive_fraction: float = 0.5,
    pre_nms_top_n: Sequence[int] = (2000, 1000),
    post_nms_top_n: Sequence[int] = (1000, 1000),
    nms_thresh: float = 0.7,
    convs: int = 1,
) -> RegionProposalNetwork:
    """torchvision's, with anchors of `anchor_scale` strides at each level; top_n are of training and of testing.

    `convs` is how many convolutions the two predictions share. Before NMS the best are taken of each level, after it of
    each image.
    """
    anchors = Anchors(strides, [[anchor_scale * stride] for stride in strides], aspect_ratios)
    parts = ('training', 'testing')
    return RegionProposalNetwork(
        anchors,
        _ProposalHead(channels, len(aspect_ratios), convs),
        fg_iou_thresh,
        bg_iou_thresh,
        batch_size_per_image,
        positive_fraction,
        dict(zip(parts, pre_nms_top_n, strict=True)),
        dict(zip(parts, post_nms_top_n, strict=True)),
        nms_thresh,
    )


class TwoStage(nn.Module):
    """A region proposal network, and stages that a subclass sets as `roi_heads` and goes through.

    Args:
        feature_info: of the maps, which must have equal channels.
        num_classes: K.
        rpn: arguments of `proposal_network`.
        roi_levels: how many levels to pool from; those of stride 32 and finer unless given, and the finest in any case.
    """

    def __init__(
        self, feature_info: FeatureInfo, num_classes: int, rpn: dict | None = None, roi_levels: int | None = None
    ):
        super().__init__()
        self.channels, strides = levels_of(feature_info, num_classes)
        if roi_levels is None:
            roi_levels = max(1, sum(stride <= COARSEST for stride in strides))
        if not 1 <= roi_levels <= len(strides):
            raise ValueError(f'roi_levels must be 1 to {len(strides)}, the number of levels, got {roi_levels!r}.')
        self.num_classes = num_classes
        self.roi_strides = strides[:roi_levels]
        self.rpn = proposal_network(self.channels, strides, **(rpn or {}))

    @property
    def stages(self) -> list[RoIStage]:
        return [self.roi_heads] if isinstance(self.roi_heads, RoIStage) else list(self.roi_heads)

    @property
    def has_masks(self) -> bool:
        return self.stages[-1].has_mask()

    @property
    def nms_threshold(self) -> float:
        return self.stages[-1].nms_thresh

    @property
    def max_detections(self) -> int:
        return self.stages[-1].detections_per_img

    def losses(self, maps: Sequence[Tensor], images: ImageList, targets: Sequence[dict]) -> dict[str, Tensor]:
        maps = _named(maps)
        targets = [{**target, 'labels': target['labels'] + 1} for target in targets]  # 0 is the background
        proposals, losses = self.rpn(images, maps, targets)
        return losses | self._losses(maps, proposals, images.image_sizes, targets)

    def detect(self, maps: Sequence[Tensor], images: ImageList) -> list[dict]:
        maps = _named(maps)
        proposals, _ = self.rpn(images, maps)
        return self._detect(maps, proposals, images.image_sizes)

    def predict_masks(
        self, maps: Sequence[Tensor], images: ImageList, boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> list[Tensor]:
        """Probabilities (N, 28, 28) within the boxes of each image, of their labels; the mean of the stages."""
        maps = _named(maps)
        labels = [own + 1 for own in labels]
        views = [maskrcnn_inference(stage.masks(maps, boxes), labels) for stage in self.stages]
        return [torch.stack(own).mean(0)[:, 0] for own in zip(*views, strict=True)]


def _named(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(level): x for level, x in enumerate(maps)}


@MODELS.register_module()
class FasterRCNN(TwoStage):
    """Faster R-CNN.

    Args:
        feature_info, num_classes, rpn, roi_levels: of `TwoStage`.
        kwargs: others of `RoIStage`.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        num_classes: int,
        rpn: dict | None = None,
        roi_levels: int | None = None,
        **kwargs,
    ):
        super().__init__(feature_info, num_classes, rpn, roi_levels)
        self.roi_heads = RoIStage(self.channels, self.roi_strides, num_classes, **kwargs)

    def _losses(self, maps, proposals, sizes, targets) -> dict[str, Tensor]:
        return self.roi_heads.losses(maps, proposals, sizes, targets)[0]

    def _detect(self, maps, proposals, sizes) -> list[dict]:
        return self.roi_heads.select(*self.roi_heads.boxes(maps, proposals), proposals, sizes)


@MODELS.register_module()
class MaskRCNN(FasterRCNN):
    """Mask R-CNN: FasterRCNN, with its arguments, and four convolutions for masks of 28 x 28."""

    def __init__(self, feature_info: FeatureInfo, num_classes: int, **kwargs):
        super().__init__(feature_info, num_classes, masks=True, **kwargs)
