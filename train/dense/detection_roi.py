"""Heads on regions: pooling, boxes and masks within proposals, of torchvision's parts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss, roi_align

from .detection_parts import Float32

__all__ = ['BoxPredictor', 'RoIPool', 'RoIStage', 'SyncBatchNorm']

CANONICAL = 14  # a box of 224 pixels is pooled from stride 16 (arXiv 1612.03144, equation 1): its side is 14 strides
GIOU_WEIGHT = 10.0  # of the configs with GIoU of Swin, UniFormer and ConvNeXt


class _MaskPredictor(Float32, MaskRCNNPredictor):
    pass


class RoIPool(nn.Module):
    """Maps within boxes, each box from the level that fits its size (arXiv 1612.03144, section 4.2).

    That is the coarsest whose stride goes 14 times into the square root of the box's area, else the finest. Samples are
    taken at the centres of pixels, as many as the box covers.

    Args:
        strides: of the levels to pool from, finest first; maps of more levels may be given.
        output_size: side of what is pooled.
    """

    def __init__(self, strides: Sequence[float], output_size: int):
        super().__init__()
        self.strides = tuple(strides)
        self.output_size = output_size

    def forward(self, maps: dict[str, Tensor], boxes: Sequence[Tensor], image_shapes=None) -> Tensor:
        """(N, C, S, S) of the boxes (N_i, 4) of all images, in the order given; image_shapes are not used."""
        maps = list(maps.values())
        rois = torch.cat([F.pad(own, (1, 0), value=image) for image, own in enumerate(boxes)])
        sides = (rois[:, 3:] - rois[:, 1:3]).prod(1).sqrt()
        first = torch.zeros_like(sides, dtype=torch.int64)
        levels = sum((sides >= CANONICAL * stride for stride in self.strides[1:]), start=first)
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], self.output_size, self.output_size)
        for level, (x, stride) in enumerate(zip(maps, self.strides, strict=False)):
            own = torch.where(levels == level)[0]
            pooled[own] = roi_align(x, rois[own], self.output_size, 1 / stride, aligned=True).to(pooled.dtype)
        return pooled


class BoxPredictor(Float32, FastRCNNPredictor):
    """torchvision's, begun as Detectron2 and mmdet do; class_agnostic regresses a box once for all classes."""

    def __init__(self, in_channels: int, num_classes: int, class_agnostic: bool = False):
        super().__init__(in_channels, num_classes)
        self.copies = num_classes if class_agnostic else 1
        if class_agnostic:
            self.bbox_pred = nn.Linear(in_channels, 4)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, K + 1) and deltas (N, 4 (K + 1)), of the background first."""
        logits, deltas = super().forward(x)
        return logits, deltas.repeat(1, self.copies)


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's, which refuses to train on a CPU: there it is a BatchNorm of the process's own samples."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.is_cuda else _BatchNorm.forward(self, x)


def _box_head(kind: str, channels: int, norm: str | None, width: int) -> nn.Module:
    norms = {None: None, 'bn': nn.BatchNorm2d, 'syncbn': SyncBatchNorm}
    if kind not in ('2fc', '4conv1fc'):
        raise ValueError(f"box_head must be '2fc' or '4conv1fc', got {kind!r}.")
    if norm not in norms:
        raise ValueError(f"norm must be None, 'bn' or 'syncbn', got {norm!r}.")
    if kind == '4conv1fc':
        return FastRCNNConvFCHead((channels, 7, 7), [256] * 4, [width], norm_layer=norms[norm])
    if norm is not None:
        raise ValueError(f"norm={norm!r} is of convolutions: box_head='2fc' has none.")
    return TwoMLPHead(channels * 7 * 7, width)


class RoIStage(RoIHeads):
    """torchvision's heads on regions: classes, boxes, and masks within them.

    Args:
        channels, strides: of the levels to pool from.
        num_classes: K, without the background.
        masks: whether to predict masks.
        box_head: '2fc', two layers of box_width, or '4conv1fc', four convolutions of 256 and a layer of box_width.
        box_width, mask_width: of the layers on boxes, and of the four convolutions on masks.
        norm: of the convolutions of '4conv1fc': 'bn', 'syncbn' or None.
        box_loss: 'smooth_l1' on the deltas, torchvision's, or 'giou' on the boxes, weighted by 10; either is summed
            over positives and divided by the number of samples.
        class_agnostic: regress one box for all classes.
        iou_threshold: proposals that overlap an object this much are positives.
        box_weights: what deltas of x, y, width and height are multiplied by.
        samples, positive_fraction: how many proposals of an image are trained on, and the most that are positives.
        score_threshold, nms_threshold, max_detections: of the boxes that are given.

    Raises:
        ValueError: box_head, norm or box_loss that there isn't.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[float],
        num_classes: int,
        masks: bool = False,
        box_head: str = '2fc',
        norm: str | None = None,
        box_width: int = 1024,
        mask_width: int = 256,
        box_loss: str = 'smooth_l1',
        class_agnostic: bool = False,
        iou_threshold: float = 0.5,
        box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        samples: int = 512,
        positive_fraction: float = 0.25,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ):
        if box_loss not in ('smooth_l1', 'giou'):
            raise ValueError(f"box_loss must be 'smooth_l1' or 'giou', got {box_loss!r}.")
        super().__init__(
            RoIPool(strides, 7),
            _box_head(box_head, channels, norm, box_width),
            BoxPredictor(box_width, num_classes + 1, class_agnostic),
            iou_threshold,
            iou_threshold,
            samples,
            positive_fraction,
            tuple(box_weights),
            score_threshold,
            nms_threshold,
            max_detections,
        )
        self.box_loss = box_loss
        if masks:
            self.mask_roi_pool = RoIPool(strides, 14)
            self.mask_head = MaskRCNNHeads(channels, (mask_width,) * 4, 1)
            self.mask_predictor = _MaskPredictor(mask_width, mask_width, num_classes + 1)

    def boxes(self, maps: dict[str, Tensor], proposals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (N, K + 1) and deltas (N, 4 (K + 1)) of the proposals of all images, in float32."""
        return self.box_predictor(self.box_head(self.box_roi_pool(maps, proposals)))

    def masks(self, maps: dict[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Logits (N, K + 1, 28, 28) within the boxes of all images, in float32."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes)))

    def losses(
        self, maps: dict[str, Tensor], proposals: Sequence[Tensor], sizes: Sequence, targets: Sequence[dict]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses, and the sampled proposals as this stage would have them, for a next one.

        Args:
            maps: levels to pool from, and any after them.
            proposals: (N_i, 4) of each image, to which its objects are added.
            sizes: height and width of each image.
            targets: `boxes`, `labels` from 1, and `masks` if there are to be any.
        """
        proposals, matches, labels, deltas = self.select_training_samples(proposals, targets)
        truth = [F.pad(target['boxes'], (0, 0, 0, 1))[own] for target, own in zip(targets, matches, strict=True)]
        logits, predicted = self.boxes(maps, proposals)
        classification, regression = fastrcnn_loss(logits, predicted, labels, deltas)
        if self.box_loss == 'giou':
            regression = self._giou(predicted, torch.cat(proposals), torch.cat(truth), torch.cat(labels))
        losses = {'loss_classifier': classification, 'loss_box_reg': regression}
        positives = [own > 0 for own in labels]
        if self.has_mask():
            regions = [own[chosen] for own, chosen in zip(proposals, positives, strict=True)]
            losses['loss_mask'] = maskrcnn_loss(
                self.masks(maps, regions),
                [own - 0.5 for own in regions],  # torchvision cuts with pixels' centres at whole numbers
                [target['masks'] for target in targets],
                [target['labels'] for target in targets],
                [own[chosen] for own, chosen in zip(matches, positives, strict=True)],
            )
        refined = self.refine(logits, predicted, proposals, sizes, torch.cat(labels))
        is_truth = [(own == box).all(1) & chosen for own, box, chosen in zip(proposals, truth, positives, strict=True)]
        return losses, [own[~added] for own, added in zip(refined, is_truth, strict=True)]

    def _giou(self, deltas: Tensor, proposals: Tensor, truth: Tensor, labels: Tensor) -> Tensor:
        positives = torch.where(labels > 0)[0]
        own = deltas.unflatten(1, (-1, 4))[positives, labels[positives]]
        boxes = self.box_coder.decode_single(own, proposals[positives])
        return GIOU_WEIGHT * generalized_box_iou_loss(boxes, truth[positives], reduction='sum') / labels.numel()

    def refine(
        self,
        logits: Tensor,
        deltas: Tensor,
        proposals: Sequence[Tensor],
        sizes: Sequence,
        labels: Tensor | None = None,
    ) -> list[Tensor]:
        """Proposals moved by the deltas of their class, within their images. They carry no gradient.

        The class is that of `labels` (N,) where it isn't the background, else the likeliest of the others.
        """
        classes = logits[:, 1:].argmax(1) + 1
        if labels is not None:
            classes = torch.where(labels > 0, labels, classes)
        own = deltas.detach().unflatten(1, (-1, 4))[torch.arange(len(deltas), device=deltas.device), classes]
        boxes = self.box_coder.decode_single(own, torch.cat(list(proposals)))
        split = boxes.split([len(own) for own in proposals])
        return [clip_boxes_to_image(own, size) for own, size in zip(split, sizes, strict=True)]

    def select(self, logits: Tensor, deltas: Tensor, proposals: Sequence[Tensor], sizes: Sequence) -> list[dict]:
        """The boxes that pass threshold and NMS, with labels from 0, of each image."""
        found = self.postprocess_detections(logits, deltas, list(proposals), sizes)
        return [
            {'boxes': boxes, 'scores': scores, 'labels': labels - 1}
            for boxes, scores, labels in zip(*found, strict=True)
        ]
