"""Transforms of samples (image, target) that detection and segmentation train with, beside torchvision's own.

Images, boxes, masks and maps of classes go through each together. Numbers are drawn by torch's generator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from ..registry import TRANSFORMS

__all__ = [
    'IGNORED',
    'FilterObjects',
    'PadTo',
    'PhotometricDistortion',
    'RandomChoiceResize',
    'RandomCropMax',
    'RandomCropSize',
    'RandomResizeRatio',
    'ResizeKeepRatio',
]

IGNORED = 255  # what maps of classes have where none counts
OF_OBJECTS = ('boxes', 'labels', 'masks', 'crowd')  # of a target: an entry an object
TRIES = 10  # crops that RandomCropMax draws at most, as mmsegmentation


def _pair(name: str, value) -> tuple[int, int]:
    """Two positive integers, or one twice."""
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(v, int) and v > 0 for v in pair):
        raise ValueError(f'{name} must be one or two positive integers, got {value!r}.')
    return tuple(pair)


def _range(name: str, value) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not 0 < value[0] <= value[1]:
        raise ValueError(f'{name} must be two positive numbers, the lower first, got {value!r}.')
    return tuple(value)


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


def _integer(low: int, high: int) -> int:
    """One of low..high, both included."""
    return int(torch.randint(low, high + 1, ()))


class _Resize(v2.Transform):
    """Resize by one factor, so that the image fits into what `scale` draws: limits of its long and its short side.

    Sides are rounded as mmcv does. Masks take the pixel whose centre is nearest, so that they stay aligned with images
    and boxes; mmcv's and torchvision's take the one above and left.
    """

    def __init__(self, antialias: bool = True):
        super().__init__()
        self.antialias = antialias

    def scale(self) -> tuple[float, float]:
        raise NotImplementedError

    def make_params(self, flat_inputs: list) -> dict:
        height, width = v2.query_size(flat_inputs)
        scale = self.scale()
        factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
        return {'size': [max(int(side * factor + 0.5), 1) for side in (height, width)]}

    def transform(self, inpt, params: dict):
        if not isinstance(inpt, tv_tensors.Mask):
            resized = F.resize(inpt, params['size'], InterpolationMode.BILINEAR, antialias=self.antialias)
            # The last bit of a product may lie over the border.
            return F.clamp_bounding_boxes(resized) if isinstance(inpt, tv_tensors.BoundingBoxes) else resized
        maps = inpt.as_subclass(Tensor)
        resized = F.resize_image(
            maps if maps.ndim > 2 else maps[None], params['size'], interpolation=InterpolationMode.NEAREST_EXACT
        )
        return tv_tensors.wrap(resized if maps.ndim > 2 else resized[0], like=inpt)


@TRANSFORMS.register_module()
class ResizeKeepRatio(_Resize):
    """Make an image as large as two limits allow, as mmdetection's Resize with keep_ratio.

    Args:
        scale: limits of the long and the short side, in any order: (1333, 800).
        antialias: of images that become smaller; mmcv and detectron2's OpenCV have none.
    """

    def __init__(self, scale: Sequence[int], antialias: bool = True):
        super().__init__(antialias)
        self.limits = _pair('scale', scale)

    def scale(self) -> tuple[int, int]:
        return self.limits


@TRANSFORMS.register_module()
class RandomChoiceResize(_Resize):
    """`ResizeKeepRatio` to one of several scales, each as likely as the others.

    Args:
        scales: pairs of limits.
        antialias: of images that become smaller.
    """

    def __init__(self, scales: Sequence[Sequence[int]], antialias: bool = True):
        super().__init__(antialias)
        if not isinstance(scales, list | tuple) or not scales:
            raise ValueError(f'scales must be pairs of integers, got {scales!r}.')
        self.scales = [_pair('Each of scales', scale) for scale in scales]

    def scale(self) -> tuple[int, int]:
        return self.scales[_integer(0, len(self.scales) - 1)]


@TRANSFORMS.register_module()
class RandomResizeRatio(_Resize):
    """`ResizeKeepRatio` to limits that are multiplied by one random number, as mmsegmentation's RandomResize.

    Followed by a crop and `PadTo`, (size, size) and (0.1, 2.0) are large-scale jittering (arXiv 2012.07177).

    Args:
        scale: limits of the long and the short side, in any order: (2048, 512).
        ratio: the number's lowest and highest value.
        antialias: of images that become smaller.
    """

    def __init__(self, scale: Sequence[int], ratio: Sequence[float] = (0.5, 2.0), antialias: bool = True):
        super().__init__(antialias)
        self.limits = _pair('scale', scale)
        self.ratio = _range('ratio', ratio)

    def scale(self) -> tuple[int, int]:
        ratio = _uniform(*self.ratio)
        return tuple(max(int(limit * ratio), 1) for limit in self.limits)


def _filter(target: dict, min_size: float, boxes_from_masks: bool = False) -> dict:
    """A target without objects that hardly are in the image any more."""
    if 'boxes' not in target:
        return target
    target = dict(target)
    masks = target.get('masks')
    if boxes_from_masks:
        if masks is None:
            raise ValueError('boxes_from_masks needs masks in the targets.')
        target['boxes'] = tv_tensors.wrap(_boxes_of(masks), like=target['boxes'])
    target['boxes'] = F.clamp_bounding_boxes(target['boxes'])
    boxes = target['boxes'].as_subclass(Tensor)
    kept = (boxes[:, 2:] - boxes[:, :2] >= min_size).all(dim=1)
    if masks is not None:
        kept &= _filled(masks)
    for key in OF_OBJECTS:
        if key in target:
            value = target[key]
            own = value.as_subclass(Tensor)[kept]
            target[key] = tv_tensors.wrap(own, like=value) if isinstance(value, tv_tensors.TVTensor) else own
    return target


def _filled(masks: Tensor) -> Tensor:
    """Whether each of the masks (N, H, W) has a pixel."""
    return masks.as_subclass(Tensor).ne(0).flatten(1).any(dim=1)


def _boxes_of(masks: Tensor) -> Tensor:
    """Boxes (N, 4) around the pixels of masks (N, H, W); of an empty one, without area."""
    masks = masks.as_subclass(Tensor)
    boxes = torch.zeros(len(masks), 4)
    filled = _filled(masks)
    if filled.any():
        boxes[filled] = masks_to_boxes(masks[filled]).float() + torch.tensor([0.0, 0.0, 1.0, 1.0])
    return boxes


@TRANSFORMS.register_module()
class FilterObjects(v2.Transform):
    """Clip boxes to the image, and leave out objects of less than a size, or whose mask is empty.

    Torchvision's SanitizeBoundingBoxes also leaves out what reaches over the border, and looks at no mask. Crops of
    this module do it themselves.

    Args:
        min_size: pixels of the shorter side of a box, at least.
        boxes_from_masks: draw boxes around the masks anew.
    """

    def __init__(self, min_size: float = 1.0, boxes_from_masks: bool = False):
        super().__init__()
        if not min_size > 0:
            raise ValueError(f'min_size must be positive, got {min_size!r}.')
        self.min_size = min_size
        self.boxes_from_masks = boxes_from_masks

    def forward(self, image: Tensor, target: dict) -> tuple[Tensor, dict]:
        return image, _filter(target, self.min_size, self.boxes_from_masks)


class _Crop(v2.Transform):
    """Crop to what `window` draws; objects with less than a pixel of it are left out."""

    def __init__(self, boxes_from_masks: bool = False):
        super().__init__()
        self.boxes_from_masks = boxes_from_masks

    def window(self, height: int, width: int, target: dict) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop of an image."""
        raise NotImplementedError

    def forward(self, image: Tensor, target: dict) -> tuple[Tensor, dict]:
        window = self.window(*image.shape[-2:], target)
        cropped = {
            key: F.crop(value, *window) if isinstance(value, tv_tensors.TVTensor) else value
            for key, value in target.items()
        }
        return F.crop(image, *window), _filter(cropped, 1.0, self.boxes_from_masks)


def _place(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A crop of this size, or as much as the image has, anywhere in it."""
    own = min(size[0], height), min(size[1], width)
    return _integer(0, height - own[0]), _integer(0, width - own[1]), *own


@TRANSFORMS.register_module()
class RandomCropMax(_Crop):
    """Crop to a size, or to the image's side where that is less: mmsegmentation's RandomCrop.

    Args:
        size: height and width of the crop, or one number for both.
        cat_max_ratio: of a map of classes, up to ten crops are drawn until one has two classes at least, none of which
            has this share of the pixels that count; the last one is taken in any case. 1 takes the first.
        boxes_from_masks: draw boxes around the masks anew, as large-scale jittering does; else they are clipped.

    Raises:
        ValueError: the targets have no map of classes, and cat_max_ratio is less than 1.
    """

    def __init__(self, size, cat_max_ratio: float = 1.0, boxes_from_masks: bool = False):
        super().__init__(boxes_from_masks)
        self.size = _pair('size', size)
        if not 0 < cat_max_ratio <= 1:
            raise ValueError(f'cat_max_ratio must be above 0 and at most 1, got {cat_max_ratio!r}.')
        self.cat_max_ratio = cat_max_ratio

    def window(self, height: int, width: int, target: dict) -> tuple[int, int, int, int]:
        window = _place(height, width, self.size)
        if self.cat_max_ratio == 1:
            return window
        if 'mask' not in target:
            raise ValueError(f'cat_max_ratio needs a map of classes in the targets, which have {", ".join(target)}.')
        classes = target['mask'].as_subclass(Tensor)
        for _ in range(TRIES):
            if self._is_mixed(F.crop_image(classes[None], *window)):
                break
            window = _place(height, width, self.size)
        return window

    def _is_mixed(self, classes: Tensor) -> bool:
        counts = torch.bincount(classes[classes != IGNORED].long())
        return int((counts > 0).sum()) > 1 and bool(counts.max() < self.cat_max_ratio * counts.sum())


@TRANSFORMS.register_module()
class RandomCropSize(_Crop):
    """Crop to sides drawn by themselves from a range, as DETR and mmdetection's RandomCrop of 'absolute_range' do.

    A crop may have no objects.

    Args:
        sides: the least and the most pixels of a side, (384, 600); a side of the image that is less stays whole.
        boxes_from_masks: draw boxes around the masks anew; else they are clipped.
    """

    def __init__(self, sides: Sequence[int], boxes_from_masks: bool = False):
        super().__init__(boxes_from_masks)
        self.sides = _range('sides', _pair('sides', sides))

    def window(self, height: int, width: int, target: dict) -> tuple[int, int, int, int]:
        size = tuple(_integer(*(min(side, limit) for side in self.sides)) for limit in (height, width))
        return _place(height, width, size)


@TRANSFORMS.register_module()
class PadTo(v2.Transform):
    """Pad right and bottom to a size at least.

    Args:
        size: height and width, or one number for both.
        fill: of the image's channels, or of all; ImageNet's mean unless given, which normalization makes zero.
        mask_fill: of maps of classes; masks of objects get 0.
    """

    def __init__(self, size, fill: int | Sequence[int] = (124, 116, 104), mask_fill: int = IGNORED):
        super().__init__()
        self.size = _pair('size', size)
        self.fill = list(fill) if isinstance(fill, list | tuple) else fill
        self.mask_fill = mask_fill

    def make_params(self, flat_inputs: list) -> dict:
        height, width = v2.query_size(flat_inputs)
        return {'padding': [0, 0, max(self.size[1] - width, 0), max(self.size[0] - height, 0)]}

    def transform(self, inpt, params: dict):
        if isinstance(inpt, tv_tensors.Mask):
            return F.pad(inpt, params['padding'], fill=self.mask_fill if inpt.ndim == 2 else 0)
        return F.pad(inpt, params['padding'], fill=self.fill)


@TRANSFORMS.register_module()
class PhotometricDistortion(v2.Transform):
    """Random brightness, contrast, saturation and hue, each with probability 1/2, as mmsegmentation has them.

    After SSD (arXiv 1512.02325), whose contrast comes before or after the colours. Torchvision's
    RandomPhotometricDistort also permutes the channels, multiplies by the brightness (0.875 to 1.125) instead of adding
    to it, keeps the mean when it changes the contrast, and turns the hue half as far.

    Args:
        brightness: what is added to the bytes, at most, and at least with a minus.
        contrast: lowest and highest factor of the bytes.
        saturation: lowest and highest factor of the saturation, of HSV.
        hue: turns of the hue, at most.
    """

    def __init__(
        self,
        brightness: float = 32,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: float = 0.1,
    ):
        super().__init__()
        if not 0 <= brightness <= 255 or not 0 <= hue <= 0.5:
            raise ValueError(f'brightness must be in 0..255 and hue in 0..0.5, got {brightness!r} and {hue!r}.')
        self.brightness, self.hue = brightness, hue
        self.contrast, self.saturation = _range('contrast', contrast), _range('saturation', saturation)

    def make_params(self, flat_inputs: list) -> dict:
        ranges = {
            'brightness': (-self.brightness, self.brightness),
            'contrast': self.contrast,
            'saturation': self.saturation,
            'hue': (-self.hue, self.hue),
        }
        params = {name: _uniform(*ends) if _integer(0, 1) else None for name, ends in ranges.items()}
        params['contrast_first'] = bool(_integer(0, 1))
        return params

    def transform(self, inpt, params: dict):
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image = inpt.as_subclass(Tensor)
        if params['brightness'] is not None:
            image = _bytes(image + params['brightness'])
        if params['contrast'] is not None and params['contrast_first']:
            image = _bytes(image * params['contrast'])
        if params['saturation'] is not None:
            image = _bytes(_saturated(image.float(), params['saturation']))
        if params['hue'] is not None:
            image = F.adjust_hue(image, params['hue'])
        if params['contrast'] is not None and not params['contrast_first']:
            image = _bytes(image * params['contrast'])
        return tv_tensors.wrap(image, like=inpt)


def _bytes(image: Tensor) -> Tensor:
    return image.clamp(0, 255).to(torch.uint8)


def _saturated(image: Tensor, factor: float) -> Tensor:
    """The saturation of HSV multiplied, up to 1: the distance of each channel (3, H, W) to the highest of its pixel."""
    top, low = image.amax(dim=-3, keepdim=True), image.amin(dim=-3, keepdim=True)
    limit = top / (top - low).clamp(min=1)  # 1 / saturation; a grey pixel stays as it is
    return top - (top - image) * limit.clamp(max=factor)
