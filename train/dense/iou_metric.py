"""Mean intersection over union of class maps, from one confusion matrix of all images."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..registry import METRICS
from .image_metric import ImageMetric

__all__ = ['MeanIoU', 'boundaries', 'confusion_matrix', 'reduce_zero_label']


def reduce_zero_label(labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Class maps whose 0 stands for 'other', as ADE20K's are stored: 0 is ignored, and the rest moves down by one."""
    return torch.where((labels == 0) | (labels == ignore_index), ignore_index, labels - 1)


def confusion_matrix(prediction: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Numbers of pixels of each class (row) that are predicted as each (column): int64 (K, K) of two maps (H, W).

    Raises:
        ValueError: maps of different sizes, or values that are no classes.
    """
    if prediction.shape != labels.shape:
        raise ValueError(f'Expected a prediction {tuple(labels.shape)}, got {tuple(prediction.shape)}.')
    counted = labels != ignore_index
    prediction, labels = prediction[counted].long(), labels[counted].long()
    for name, values in (('Predicted classes', prediction), ('Classes', labels)):
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f'{name} must be from 0 to {num_classes - 1}, got {values.min()} to {values.max()}.')
    return torch.bincount(labels * num_classes + prediction, minlength=num_classes**2).view(num_classes, num_classes)


def boundaries(masks: Tensor, dilation_ratio: float = 0.02) -> Tensor:
    """What of masks is near their contours, as Boundary IoU takes it (2103.16562, section 4): bool (N, H, W) -> same.

    Near is at most d steps, each to any of the eight neighbours, from a pixel that isn't in the mask, where d is this
    ratio of the image's diagonal, rounded, and at least 1. What is beyond the image isn't in the mask.
    """
    height, width = masks.shape[-2:]
    distance = max(1, round(dilation_ratio * (height**2 + width**2) ** 0.5))
    outside = F.pad(1 - masks[:, None].float(), (distance,) * 4, value=1)
    outside = F.max_pool2d(outside, (2 * distance + 1, 1), stride=1)  # rows, then columns: a square by its sides
    return masks & F.max_pool2d(outside, (1, 2 * distance + 1), stride=1)[:, 0].bool()


@METRICS.register_module()
class MeanIoU(ImageMetric):
    """Measures of class maps over all pixels of all images, in per cent, as ADE20K and Cityscapes define them.

    mIoU: mean over the classes of intersection / union; mAcc: mean of the classes' shares of pixels that are right;
    aAcc: the share of all pixels. A class that neither the labels nor the predictions hold isn't in mIoU's mean, one
    that the labels don't hold isn't in mAcc's.

    Args:
        ignore_index: pixels of this label don't count.
        reduce_zero_label: the labels are as ADE20K stores them, see `reduce_zero_label`; false if the dataset has done
            it.
        boundary: give boundary_mIoU as well (Boundary IoU, arXiv 2103.16562): the same of only those pixels of each
            class that are near a contour of it, in labels and predictions by themselves. Where the labels are ignored,
            the prediction is too, before its contours are drawn.
        dilation_ratio: how near, in the image's diagonal.
        per_class, out: see `ImageMetric`; written is classes.csv.

    The dataset's metainfo gives `classes`, their names.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        reduce_zero_label: bool = False,
        boundary: bool = False,
        dilation_ratio: float = 0.02,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not 0 < dilation_ratio < 1:
            raise ValueError(f'dilation_ratio must be between 0 and 1, got {dilation_ratio!r}.')
        self.ignore_index = ignore_index
        self.reduce_zero_label = reduce_zero_label
        self.boundary = boundary
        self.dilation_ratio = dilation_ratio

    @property
    def names(self) -> Sequence[str]:
        """Names of the classes."""
        classes = (self.dataset_meta or {}).get('classes')
        if not classes:
            raise ValueError("MeanIoU needs 'classes', their names, in the dataset's metainfo.")
        return classes

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        """Take the (images, targets) of a batch and its predictions: `mask` (H, W) of each.

        Raises:
            ValueError: maps of different sizes, or values that are no classes; names the image.
        """
        for target, prediction in zip(data_batch[1], data_samples, strict=True):
            found = prediction['mask'].detach()
            labels = torch.as_tensor(target['mask']).as_subclass(Tensor).to(found.device).long()
            if self.reduce_zero_label:
                labels = reduce_zero_label(labels, self.ignore_index)
            try:
                matrix = confusion_matrix(found, labels, len(self.names), self.ignore_index)
            except ValueError as error:
                raise ValueError(f'{target["name"]}: {error}') from error
            near = self._near(found, labels) if self.boundary else None
            self.results.append((target['name'], (_compact(matrix), near)))

    def _near(self, found: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Intersections and unions of boundaries, the places and values that are not zero."""
        found = found.where(labels != self.ignore_index, self.ignore_index)
        sums = found.new_zeros(2, len(self.names))
        for i in torch.cat([found.unique(), labels.unique()]).unique().tolist():
            if i != self.ignore_index:  # one at a time: hundreds of maps would not fit
                own, true = boundaries(torch.stack([found == i, labels == i]), self.dilation_ratio)
                sums[0, i], sums[1, i] = (own & true).sum(), (own | true).sum()
        return _compact(sums)

    def compute_metrics(self, results: list) -> dict[str, float]:
        count = len(self.names)
        matrix, near = np.zeros(count**2, np.int64), np.zeros(2 * count, np.int64)
        for _, (pixels, of_boundary) in results:
            matrix[pixels[0]] += pixels[1]
            if of_boundary is not None:
                near[of_boundary[0]] += of_boundary[1]
        matrix = matrix.reshape(count, count)
        right, labelled, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
        iou = _per_cent(right, labelled + predicted - right)
        accuracy = _per_cent(right, labelled)
        columns = {'IoU': iou, 'accuracy': accuracy}
        metrics = {
            'mIoU': _mean(iou),
            'mAcc': _mean(accuracy),
            'aAcc': float(_per_cent(right.sum(), labelled.sum())),
        }
        if self.boundary:
            columns['boundary IoU'] = _per_cent(*near.reshape(2, count))
            metrics['boundary_mIoU'] = _mean(columns['boundary IoU'])
        self.classes = [
            {'class': name, **{column: float(values[i]) for column, values in columns.items()}, 'pixels': int(pixels)}
            for i, (name, pixels) in enumerate(zip(self.names, labelled, strict=True))
        ]
        self.show('Measures of each class (%)', 'classes.csv')
        return metrics


def _compact(counts: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of what isn't zero: an image has few of ADE20K's 22,500 pairs of classes."""
    places = counts.flatten().nonzero()[:, 0]
    return places.cpu().numpy().astype(np.int32), counts.flatten()[places].cpu().numpy()


def _per_cent(part, whole) -> np.ndarray:
    with np.errstate(invalid='ignore'):
        return 100 * np.asarray(part) / np.asarray(whole)  # NaN where there is nothing


def _mean(values: np.ndarray) -> float:
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if counted.size else float('nan')
