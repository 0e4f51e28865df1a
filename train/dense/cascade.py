"""Cascade R-CNN and Cascade Mask R-CNN (arXiv 1712.00726, 1906.09756): boxes refined in stages."""

from collections.abc import Sequence

from timm.models import FeatureInfo
from torch import Tensor, nn

from ..registry import MODELS
from .detection_rcnn import TwoStage
from .detection_roi import RoIStage

__all__ = ['CascadeRCNN']

STAGES = (  # IoU of positives, weights of the deltas, weight of the losses (1712.00726, sections 4.1 and 5.1)
    (0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    (0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    (0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)


@MODELS.register_module()
class CascadeRCNN(TwoStage):
    """Three stages, each trained on the boxes of the one before at a higher IoU.

    A stage samples from what the stage before made of its samples, without the objects that were added to them, and
    adds the objects anew. At test the stages' probabilities of the last boxes' regions are averaged, each of them from
    its own boxes, and so are the masks' within the last boxes.

    Args:
        feature_info, num_classes, rpn, roi_levels: of `TwoStage`.
        masks: a mask head in each stage (Cascade Mask R-CNN).
        class_agnostic: a stage moves a box in one way, as in the papers; else by its class, the object's or the
            likeliest, as in the configs with GIoU of Swin, UniFormer and ConvNeXt.
        kwargs: others of `RoIStage`, the same for all stages.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        num_classes: int,
        masks: bool = False,
        class_agnostic: bool = True,
        rpn: dict | None = None,
        roi_levels: int | None = None,
        **kwargs,
    ):
        super().__init__(feature_info, num_classes, rpn, roi_levels)
        self.roi_heads = nn.ModuleList(
            RoIStage(
                self.channels,
                self.roi_strides,
                num_classes,
                masks,
                class_agnostic=class_agnostic,
                iou_threshold=iou,
                box_weights=weights,
                **kwargs,
            )
            for iou, weights, _ in STAGES
        )

    def _losses(self, maps, proposals: Sequence[Tensor], sizes, targets) -> dict[str, Tensor]:
        losses = {}
        for number, (stage, (_, _, weight)) in enumerate(zip(self.roi_heads, STAGES, strict=True), start=1):
            own, proposals = stage.losses(maps, proposals, sizes, targets)
            losses |= {f'{name}_{number}': weight * loss for name, loss in own.items()}
        return losses

    def _detect(self, maps, proposals: Sequence[Tensor], sizes) -> list[dict]:
        probabilities, moved = 0, proposals
        for stage in self.roi_heads:
            proposals = moved
            logits, deltas = stage.boxes(maps, proposals)
            probabilities = probabilities + logits.softmax(1) / len(STAGES)
            moved = stage.refine(logits, deltas, proposals, sizes)
        return stage.select(probabilities.log(), deltas, proposals, sizes)  # whose softmax are the probabilities
