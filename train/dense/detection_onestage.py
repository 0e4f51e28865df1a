"""Detectors of one stage: RetinaNet and FCOS, torchvision's, on any pyramid."""

from collections.abc import Sequence

from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead

from ..registry import MODELS
from .detection_parts import Anchors, Float32, levels_of

__all__ = ['FCOS', 'RetinaNet']


class _AnchorHead(Float32, RetinaNetHead):
    pass


class _PointHead(Float32, FCOSHead):
    pass


class _Given(nn.Identity):
    """Stands where torchvision's detectors have a backbone: the maps come computed."""

    def __init__(self, out_channels: int):
        super().__init__()
        self.out_channels = out_channels


class _OneStage:
    """What RetinaNet and FCOS share beyond torchvision."""

    has_masks = False

    @property
    def nms_threshold(self) -> float:
        return self.nms_thresh

    @property
    def max_detections(self) -> int:
        return self.detections_per_img

    def losses(self, maps: Sequence[Tensor], images: ImageList, targets: Sequence[dict]) -> dict[str, Tensor]:
        losses = self._losses(targets, self.head(maps), self.anchor_generator(images, maps), self._counts(maps))
        return {f'loss_{name}': loss for name, loss in losses.items()}

    def detect(self, maps: Sequence[Tensor], images: ImageList) -> list[dict]:
        counts = self._counts(maps)
        outputs = {name: list(output.split(counts, dim=1)) for name, output in self.head(maps).items()}
        anchors = [list(own.split(counts)) for own in self.anchor_generator(images, maps)]
        return self.postprocess_detections(outputs, anchors, images.image_sizes)

    def _counts(self, maps: Sequence[Tensor]) -> list[int]:
        per_point = self.anchor_generator.num_anchors_per_location()[0]
        return [x.shape[-2] * x.shape[-1] * per_point for x in maps]


@MODELS.register_module()
class RetinaNet(_OneStage, detection.RetinaNet):
    """RetinaNet (arXiv 1708.02002), torchvision's.

    Args:
        feature_info: of the maps, which must have equal channels.
        num_classes: K.
        score_threshold, nms_threshold, max_detections: of the boxes that are given.
        anchor_scale: sizes of the anchors are this many strides, times 1, 2 ** (1 / 3) and 2 ** (2 / 3).
        aspect_ratios: heights by widths of the anchors.
        fg_iou_thresh, bg_iou_thresh: anchors that overlap an object more are positives, those that overlap all less
            are negatives.
        topk_candidates: boxes of each level that go into NMS at most.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        num_classes: int,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        anchor_scale: float = 4.0,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.4,
        topk_candidates: int = 1000,
    ):
        channels, strides = levels_of(feature_info, num_classes)
        sizes = [[anchor_scale * stride * 2 ** (octave / 3) for octave in range(3)] for stride in strides]
        super().__init__(
            _Given(channels),
            num_classes,
            anchor_generator=Anchors(strides, sizes, aspect_ratios),
            head=_AnchorHead(channels, 3 * len(aspect_ratios), num_classes),
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_detections,
            fg_iou_thresh=fg_iou_thresh,
            bg_iou_thresh=bg_iou_thresh,
            topk_candidates=topk_candidates,
        )
        self.num_classes = num_classes

    def _losses(self, targets, outputs, anchors, counts) -> dict[str, Tensor]:
        return self.compute_loss(targets, outputs, anchors)


@MODELS.register_module()
class FCOS(_OneStage, detection.FCOS):
    """FCOS (arXiv 1904.01355) with centre sampling and GIoU, torchvision's: a score is the root of class x centerness.

    Args:
        feature_info: of the maps, which must have equal channels, a multiple of 32.
        num_classes: K.
        score_threshold, nms_threshold, max_detections: of the boxes that are given.
        center_sampling_radius: points within so many strides of an object's centre are positives.
        topk_candidates: boxes of each level that go into NMS at most.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        num_classes: int,
        score_threshold: float = 0.2,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
        center_sampling_radius: float = 1.5,
        topk_candidates: int = 1000,
    ):
        channels, strides = levels_of(feature_info, num_classes)
        super().__init__(
            _Given(channels),
            num_classes,
            anchor_generator=Anchors(strides, [[stride] for stride in strides], [1.0]),
            head=_PointHead(channels, 1, num_classes),
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_detections,
            center_sampling_radius=center_sampling_radius,
            topk_candidates=topk_candidates,
        )
        self.num_classes = num_classes

    def _losses(self, targets, outputs, anchors, counts) -> dict[str, Tensor]:
        return self.compute_loss(targets, outputs, anchors, counts)
