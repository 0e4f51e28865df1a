"""Detectors: a backbone, a neck and a head of torchvision's parts, in pixels of the images that are given."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, clip_boxes_to_image
from torchvision.transforms.v2.functional import resize

from ..registry import MODELS
from .task import DenseTask

__all__ = ['Detector', 'checked_targets', 'merge_detections', 'paste_masks']

TEST = {'resize': (800, 1333), 'scales': (1.0,), 'flip': False}
LIMITS = ('score_threshold', 'nms_threshold', 'max_detections')


class _View(NamedTuple):
    """The images of a batch, resized and perhaps mirrored, and their maps."""

    images: ImageList
    maps: list[Tensor]
    is_mirrored: bool


@MODELS.register_module()
class Detector(DenseTask):
    """Boxes, and with some heads masks, of objects.

    Training images come as they are trained on. Images to predict come as stored: they are resized here, and what is
    predicted is in their own pixels. With several views (scales, mirrored images) the boxes of all go through NMS
    together, then masks are predicted for those that are left, in each view, and averaged.

    Args:
        backbone, neck: of `DenseTask`. The maps must have equal channels.
        head: type (RetinaNet, FCOS, FasterRCNN, MaskRCNN, CascadeRCNN) and arguments, num_classes among them.
        test: how to predict: `resize`, what short and long side are resized to, the latter at most (800 and 1333; None
            leaves images as they are); `scales`, factors of that (1 only); `flip`, mirrored images too (False);
            `score_threshold`, `nms_threshold` and `max_detections` (the head's own unless given).
        arguments: others of `DenseTask`.

    Raises:
        ValueError: an argument that doesn't exist or has no meaning, or maps of unequal channels.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        neck: dict | Sequence[dict] | None = None,
        test: dict | None = None,
        **arguments,
    ):
        super().__init__(backbone, neck, **arguments)
        unknown = set(test or ()) - {*TEST, *LIMITS}
        if unknown:
            raise ValueError(f'test takes {", ".join((*TEST, *LIMITS))}, not {", ".join(sorted(unknown))}.')
        limits = {key: test[key] for key in LIMITS if test and test.get(key) is not None}
        self.test = {key: (test or {}).get(key, value) for key, value in TEST.items()}
        _check_test(**self.test)
        self.head = MODELS.build({**head, **limits, 'feature_info': self.feature_info})
        self.to(memory_format=self.memory_format)

    def loss(self, images: Sequence[Tensor], targets: Sequence[dict]) -> dict[str, Tensor]:
        """Losses of a training batch.

        Raises:
            ValueError: a target that is not as `zoo.train.dense` says, by the name of its image.
            RuntimeError: the detector is in evaluation mode.
        """
        if not self.training:
            raise RuntimeError('Losses are of training mode: call train() before.')
        targets = checked_targets(images, targets, self.head.num_classes, self.head.has_masks)
        view = self._view(images)
        return self.head.losses(view.maps, view.images, targets)

    def predict(self, images: Sequence[Tensor]) -> list[dict]:
        """A prediction for each image; see `zoo.train.dense`.

        Raises:
            RuntimeError: the detector is in training mode.
        """
        if self.training:
            raise RuntimeError('Predictions are of evaluation mode: call eval() before.')
        views, found = [], []
        for scale in self.test['scales']:
            for is_mirrored in (False, True) if self.test['flip'] else (False,):
                view = self._view([self.resize(image, scale) for image in images], is_mirrored)
                found.append(self._detect(view, images))
                views.append(view if self.head.has_masks else None)  # maps are large
        limits = self.head.nms_threshold, self.head.max_detections
        predictions = [merge_detections(own, *limits) for own in zip(*found, strict=True)]
        if self.head.has_masks:
            probabilities = [self._masks(view, images, predictions) for view in views]
            for image, prediction, own in zip(images, predictions, zip(*probabilities, strict=True), strict=True):
                prediction['masks'] = paste_masks(torch.stack(own).mean(0), prediction['boxes'], image.shape[-2:])
        return predictions

    def resize(self, image: Tensor, scale: float = 1.0) -> Tensor:
        """An image (C, H, W) at the size of `test['resize']`, times scale: bilinear, antialiased, of the same dtype."""
        height, width = image.shape[-2:]
        if self.test['resize']:
            short, long = self.test['resize']
            scale = min(short * scale / min(height, width), long * scale / max(height, width))
        size = [max(1, int(side * scale + 0.5)) for side in (height, width)]
        return resize(image, size, antialias=True)

    def _view(self, images: Sequence[Tensor], is_mirrored: bool = False) -> _View:
        batch = self.batch([image.flip(-1) for image in images] if is_mirrored else images)
        sizes = [tuple(image.shape[-2:]) for image in images]
        return _View(ImageList(batch, sizes), self.extract(batch), is_mirrored)

    def _detect(self, view: _View, images: Sequence[Tensor]) -> list[dict]:
        found = self.head.detect(view.maps, view.images)
        for prediction, image, size in zip(found, images, view.images.image_sizes, strict=True):
            boxes = _moved(prediction['boxes'], size, image.shape[-2:], view.is_mirrored)
            prediction['boxes'] = clip_boxes_to_image(boxes, tuple(image.shape[-2:]))
        return found

    def _masks(self, view: _View, images: Sequence[Tensor], predictions: Sequence[dict]) -> list[Tensor]:
        boxes = [
            _moved(prediction['boxes'], image.shape[-2:], size, view.is_mirrored)
            for prediction, image, size in zip(predictions, images, view.images.image_sizes, strict=True)
        ]
        labels = [prediction['labels'] for prediction in predictions]
        masks = self.head.predict_masks(view.maps, view.images, boxes, labels)
        return [own.flip(-1) for own in masks] if view.is_mirrored else masks


def _check_test(resize, scales, flip) -> None:
    is_pair = isinstance(resize, Sequence) and len(resize) == 2
    if resize is not None and not (is_pair and 0 < resize[0] <= resize[1]):
        raise ValueError(f'test.resize must be what the short and the long side become, or None, got {resize!r}.')
    if not scales or any(scale <= 0 for scale in scales):
        raise ValueError(f'test.scales must be positive factors, got {scales!r}.')
    if not isinstance(flip, bool):
        raise ValueError(f'test.flip must be True or False, got {flip!r}.')


def _moved(boxes: Tensor, source: Sequence[int], target: Sequence[int], is_mirrored: bool) -> Tensor:
    """Boxes in an image of one (height, width) as they lie in the same image of another, which may be mirrored."""
    factors = boxes.new_tensor([target[1] / source[1], target[0] / source[0]])
    boxes = boxes * factors.repeat(2)
    if is_mirrored:
        x0, y0, x1, y1 = boxes.unbind(1)
        boxes = torch.stack((target[1] - x1, y0, target[1] - x0, y1), dim=1)
    return boxes


def merge_detections(views: Sequence[dict], nms_threshold: float, max_detections: int) -> dict:
    """Detections of one image in several views, after NMS of each class and best first; of one view as they are."""
    if len(views) == 1:
        return views[0]
    merged = {key: torch.cat([view[key] for view in views]) for key in ('boxes', 'scores', 'labels')}
    keep = batched_nms(merged['boxes'], merged['scores'], merged['labels'], nms_threshold)[:max_detections]
    return {key: value[keep] for key, value in merged.items()}


def paste_masks(probabilities: Tensor, boxes: Tensor, size: Sequence[int], threshold: float = 0.5) -> Tensor:
    """Masks in an image of what was predicted within boxes, bilinear, sampled at the centres of the image's pixels.

    Args:
        probabilities: (N, M, M), float32.
        boxes: (N, 4) in pixels of the image.
        size: height and width of the image.
        threshold: of what is in a mask.

    Returns:
        bool (N, H, W).
    """
    side = probabilities.shape[-1]
    cells = torch.arange(side, device=boxes.device)

    def window(start: Tensor, end: Tensor, pixels: int) -> slice:
        """Where weights of a box are not zero: up to half a cell beyond it."""
        start, end = (float(edge.detach().nan_to_num()) for edge in (start, end))
        margin = max(end - start, 0) / side / 2 + 1
        first = min(max(int(start - margin), 0), pixels)
        return slice(first, min(max(int(end + margin) + 1, first), pixels))

    def weights(start: Tensor, end: Tensor, pixels: slice) -> Tensor:  # (N, pixels, M)
        centres = torch.arange(pixels.start, pixels.stop, device=boxes.device) + 0.5
        extent = (end - start).clamp(min=torch.finfo(boxes.dtype).tiny)
        position = (centres - start[:, None]) / extent[:, None] * side - 0.5
        return (1 - (position[..., None] - cells).abs()).clamp(min=0)

    # In parts: a hundred masks of a million pixels are 400 MB. On a CPU each in its window alone, but where a window
    # would have to be waited for, in all of the image.
    is_cpu = boxes.device.type == 'cpu'
    part = 1 if is_cpu else 16
    rows, columns = (slice(0, length) for length in size)
    masks = boxes.new_full((len(boxes), *size), threshold <= 0, dtype=torch.bool)
    with torch.autocast(boxes.device.type, enabled=False):
        for start in range(0, len(boxes), part):
            own = slice(start, start + part)
            x0, y0, x1, y1 = boxes[own].unbind(1)
            if is_cpu:
                rows, columns = window(y0, y1, size[0]), window(x0, x1, size[1])
            values = weights(y0, y1, rows) @ probabilities[own] @ weights(x0, x1, columns).mT
            masks[own, rows, columns] = values >= threshold
    return masks


def checked_targets(
    images: Sequence[Tensor], targets: Sequence[dict], num_classes: int, has_masks: bool
) -> list[dict[str, Tensor]]:
    """Plain tensors of the targets of a training batch: boxes float32, labels int64, and masks if they are needed.

    Raises:
        ValueError: a part is missing or of a wrong shape, a box is not finite or has no area, or a label is not of 0 to
            num_classes - 1. The message names the image.
    """
    if len(images) != len(targets):
        raise ValueError(f'There are {len(images)} images and {len(targets)} targets.')
    parts = ('boxes', 'labels', 'masks') if has_masks else ('boxes', 'labels')
    names = [target.get('name', f'number {number}') for number, target in enumerate(targets)]
    checked = []
    for name, image, target in zip(names, images, targets, strict=True):
        missing = [part for part in parts if part not in target]
        if missing:
            raise ValueError(f'The target of image {name} lacks {" and ".join(missing)}.')
        count = len(target['labels'])
        shapes = {'boxes': (count, 4), 'labels': (count,), 'masks': (count, *image.shape[-2:])}
        for part in parts:
            if tuple(target[part].shape) != shapes[part]:
                got = tuple(target[part].shape)
                raise ValueError(f'{part} of image {name} must have the shape {shapes[part]}, got {got}.')
        own = {part: target[part].as_subclass(Tensor) for part in parts}  # operations on tv_tensors are slow
        checked.append({**own, 'boxes': own['boxes'].float(), 'labels': own['labels'].long()})
    boxes, labels = (torch.cat([target[part] for target in checked]) for part in ('boxes', 'labels'))
    is_box = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    is_label = (labels >= 0) & (labels < num_classes)
    if not bool((is_box & is_label).all()):  # the one place where a device is waited for
        owners = [name for name, target in zip(names, checked, strict=True) for _ in target['labels']]
        first = int((~(is_box & is_label)).nonzero()[0])
        if not is_box[first]:
            raise ValueError(f'Image {owners[first]} has a box without area or finite sides: {boxes[first].tolist()}.')
        raise ValueError(f'Image {owners[first]} has label {int(labels[first])}, but there are {num_classes} classes.')
    return checked
