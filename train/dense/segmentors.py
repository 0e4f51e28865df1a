"""Semantic segmentation: a class for every pixel."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import FUNCTIONS, MODELS
from .segmentation_heads import resize
from .task import DenseTask

__all__ = ['Segmentor', 'Views', 'cross_entropy', 'ohem_cross_entropy']


def cross_entropy(
    logits: Tensor, masks: Tensor, ignore_index: int = 255, class_weight: Sequence[float] | None = None
) -> Tensor:
    """Mean over the pixels that count, by the weights of their classes; zero if none does.

    Args:
        logits: (B, K, H, W).
        masks: class indices (B, H, W), `ignore_index` where none counts.
        class_weight: K numbers, or None for equal weights.
    """
    losses = F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction='none')
    return _mean(losses, _pixel_weights(logits, masks, ignore_index, class_weight))


def ohem_cross_entropy(
    logits: Tensor,
    masks: Tensor,
    ignore_index: int = 255,
    class_weight: Sequence[float] | None = None,
    threshold: float = 0.7,
    min_kept: int = 100_000,
) -> Tensor:
    """The same over hard pixels (online hard example mining, arXiv 1604.03540, for pixels as in CCNet).

    These are the ones whose class has a probability below the threshold, and at least the `min_kept` of an image, on
    average over the batch, with the lowest.
    """
    losses = F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction='none')
    weights = _pixel_weights(logits, masks, ignore_index, class_weight)
    hardness = losses.detach().masked_fill(masks == ignore_index, -1).flatten()
    least = hardness.topk(min(min_kept * len(masks), hardness.numel())).values[-1]
    is_hard = hardness >= least.clamp(max=-math.log(threshold))
    return _mean(losses, weights * is_hard.view_as(weights))


def _pixel_weights(logits: Tensor, masks: Tensor, ignore_index: int, class_weight: Sequence[float] | None) -> Tensor:
    counts = masks != ignore_index
    if class_weight is None:
        return counts.to(logits.dtype)
    if len(class_weight) != logits.shape[1]:
        raise ValueError(f'class_weight must have a number for each of {logits.shape[1]} classes, got {class_weight}.')
    weights = logits.new_tensor(class_weight)
    return weights[masks.where(counts, 0)] * counts


def _mean(losses: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum()
    return (losses * weights).sum() / total.where(total > 0, 1)


LOSSES = {'cross_entropy': cross_entropy, 'ohem_cross_entropy': ohem_cross_entropy}


@dataclass(frozen=True)
class Views:
    """How an image is looked at in a test.

    Args:
        resize: longest and shortest side, in pixels: an image is made as large as both allow, its ratio kept; it stays
            as it is if None.
        divisor: sides are then stretched to a multiple of it, for backbones that take no others; no multiple if None.
        mode: 'whole', or 'slide' for windows whose logits are averaged where they overlap.
        crop: height and width of windows. A smaller image is padded right and bottom.
        stride: rows and columns from a window to the next; two thirds of the crop if None.
        scales: what the size is multiplied by, for a view each.
        flip: whether each view is mirrored, too.

    Raises:
        ValueError: another value, or windows that leave pixels out.
    """

    resize: tuple[int, int] | None = None
    divisor: int | None = None
    mode: str = 'whole'
    crop: tuple[int, int] = (512, 512)
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self):
        if self.mode not in ('whole', 'slide'):
            raise ValueError(f"mode must be 'whole' or 'slide', got {self.mode!r}.")
        for name in ('resize', 'crop', 'stride'):
            value = getattr(self, name)
            if value is None and name != 'crop':
                continue
            if not isinstance(value, Sequence) or len(value) != 2 or not all(_is_positive(side) for side in value):
                raise ValueError(f'{name} must be two positive integers, got {value!r}.')
        if any(step > side for step, side in zip(self.steps, self.crop, strict=True)):
            raise ValueError(f'stride must be crop {self.crop} at most, or pixels are left out, got {self.stride}.')
        if self.divisor is not None and not _is_positive(self.divisor):
            raise ValueError(f'divisor must be a positive integer or None, got {self.divisor!r}.')
        if not isinstance(self.scales, Sequence) or not self.scales or min(self.scales) <= 0:
            raise ValueError(f'scales must be one positive number or more, got {self.scales!r}.')

    @property
    def steps(self) -> tuple[int, int]:
        return self.stride or tuple(max(2 * side // 3, 1) for side in self.crop)

    def sizes(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """Heights and widths of the views of an image, without the mirrored ones."""
        factor = 1.0
        if self.resize:
            long, short = max(self.resize), min(self.resize)
            factor = min(long / max(height, width), short / min(height, width))
        divisor = self.divisor or 1
        for scale in self.scales:
            sides = (max(int(side * factor * scale + 0.5), 1) for side in (height, width))
            yield tuple(math.ceil(side / divisor) * divisor for side in sides)

    def windows(self, height: int, width: int) -> list[tuple[slice, slice]]:
        """Rows and columns of the windows of an image of at least the crop's size. The last end at its border."""
        rows, columns = (
            [slice(start, start + side) for start in _starts(length, side, step)]
            for length, side, step in zip((height, width), self.crop, self.steps, strict=True)
        )
        return [(row, column) for row in rows for column in columns]


def _is_positive(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _starts(length: int, side: int, step: int) -> list[int]:
    last = length - side
    return [*range(0, last, step), last]


@MODELS.register_module()
class Segmentor(DenseTask):
    """A class for each pixel, by a head on the levels of the neck.

    Args:
        backbone, neck: of `DenseTask`.
        head: type and arguments of a head of `segmentation_heads`, which is made for the last neck's levels.
        auxiliary: the same of heads that are trained beside it, on the backbone's own levels, each with the `weight` of
            its loss (0.4). They have the head's number of classes unless they say so.
        loss: `type`, 'cross_entropy' or 'ohem_cross_entropy' or a registered function of logits (B, K, H, W) and masks
            (B, H, W), and more arguments (`ignore_index`, `class_weight`, ...).
        test: arguments of `Views`.
        kwargs: other arguments of `DenseTask`.

    Raises:
        ValueError: a model, head, loss or argument that doesn't exist, or two heads of other classes.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        neck: dict | Sequence[dict] | None = None,
        auxiliary: Sequence[dict] = (),
        loss: dict | None = None,
        test: dict | None = None,
        **kwargs,
    ):
        super().__init__(backbone, neck, **kwargs)
        self.head = MODELS.build({**head, 'feature_info': self.feature_info})
        self.auxiliary = nn.ModuleList()
        self.auxiliary_weights = []
        for config in [auxiliary] if isinstance(auxiliary, dict) else auxiliary or ():
            config = {'num_classes': self.num_classes, **config, 'feature_info': self.backbone.feature_info}
            self.auxiliary_weights.append(config.pop('weight', 0.4))
            self.auxiliary.append(MODELS.build(config))
            if self.auxiliary[-1].num_classes != self.num_classes:
                classes = self.auxiliary[-1].num_classes
                raise ValueError(f'The head has {self.num_classes} classes, an auxiliary one {classes}.')
        loss = {'type': 'cross_entropy', **(loss or {})}
        self._loss = _function(loss.pop('type'))
        self._loss_arguments = loss
        self.ignore_index = loss.get('ignore_index', 255)
        try:
            self.views = Views(**(test or {}))
        except TypeError as error:
            raise ValueError(f'test could not be understood: {error}') from error
        self.to(memory_format=self.memory_format)

    def loss(self, images: Sequence[Tensor], targets: Sequence[dict]) -> dict[str, Tensor]:
        """Of a training batch: `loss_segmentation`, `loss_auxiliary` with auxiliary heads, and `accuracy`.

        The latter is the percentage of pixels that are classified right, of those that count.

        Raises:
            ValueError: a mask that isn't of its image's size.
        """
        batch = self.batch(images)
        masks = self.batch_masks(images, targets, batch.shape[-2:])
        maps = self.backbone(batch)
        logits = self._resized(self.head(self.neck(maps)), batch)
        losses = {'loss_segmentation': self._loss(logits, masks, **self._loss_arguments)}
        if self.auxiliary:
            losses['loss_auxiliary'] = sum(
                weight * self._loss(self._resized(head(maps), batch), masks, **self._loss_arguments)
                for weight, head in zip(self.auxiliary_weights, self.auxiliary, strict=True)
            )
        with torch.no_grad():
            counts = masks != self.ignore_index
            right = (logits.argmax(1) == masks) & counts
            losses['accuracy'] = 100 * right.sum() / counts.sum().clamp(min=1)
        return losses

    def batch_masks(self, images: Sequence[Tensor], targets: Sequence[dict], size: Sequence[int]) -> Tensor:
        """Masks int64 (B, height, width), padded right and bottom with what doesn't count."""
        result = self.mean.new_full((len(targets), *size), self.ignore_index, dtype=torch.int64)
        for own, image, target in zip(result, images, targets, strict=True):
            mask = target['mask']
            if mask.shape != image.shape[-2:]:
                name = target.get('name', 'an image')
                raise ValueError(f'The mask of {name} must be {tuple(image.shape[-2:])}, got {tuple(mask.shape)}.')
            own[: mask.shape[-2], : mask.shape[-1]] = mask
        return result

    def predict(self, images: Sequence[Tensor]) -> list[dict]:
        """`mask` int64 (H, W) of each image, in its own pixels."""
        return [{'mask': self.probabilities(image).argmax(0)} for image in images]

    @torch.no_grad()
    def probabilities(self, image: Tensor) -> Tensor:
        """Of each class at each pixel of an image (C, H, W) of bytes: float32 (K, H, W), a mean over all views."""
        image = image.to(self.mean.device, self.mean.dtype)
        size = image.shape[-2:]
        total, count = None, 0
        for view in self.views.sizes(*size):
            resized = image[None]
            if view != tuple(size):
                resized = F.interpolate(resized, view, mode='bilinear', align_corners=False, antialias=True)
            resized = self.normalize(resized).contiguous(memory_format=self.memory_format)
            for is_mirrored in (False, True) if self.views.flip else (False,):
                logits = self.logits(resized.flip(-1)).flip(-1) if is_mirrored else self.logits(resized)
                own = resize(logits, size).softmax(1)[0]
                total = own if total is None else total.add_(own)  # in place: there are gigabytes of a large image
                count += 1
        return total.div_(count) if count > 1 else total

    def logits(self, images: Tensor) -> Tensor:
        """Of each pixel of a normalized batch (B, C, H, W), as a test computes them: (B, K, H, W), float32."""
        if self.views.mode == 'whole':
            return self._resized(self.head(self.extract(images)), images)
        height, width = images.shape[-2:]
        bottom, right = (max(side - n, 0) for side, n in zip(self.views.crop, (height, width), strict=True))
        images = F.pad(images, (0, right, 0, bottom))
        total = images.new_zeros(len(images), self.num_classes, *images.shape[-2:])
        counts = images.new_zeros(images.shape[-2:])
        for rows, columns in self.views.windows(*images.shape[-2:]):
            window = images[..., rows, columns]
            total[..., rows, columns] += self._resized(self.head(self.extract(window)), window)
            counts[rows, columns] += 1
        return (total / counts)[..., :height, :width]

    @staticmethod
    def _resized(logits: Tensor, images: Tensor) -> Tensor:
        """Logits at the images' size, in float32 at least."""
        return resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), images.shape[-2:])


def _function(name: str) -> Callable[..., Tensor]:
    function = LOSSES.get(name) or FUNCTIONS.get(name)
    if function is None:
        raise ValueError(f'There is no loss {name!r} of pixels. Losses: {", ".join(LOSSES)}, and those registered.')
    return function
