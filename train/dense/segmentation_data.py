"""Images with maps of classes: ADE20K, Cityscapes, and any two folders of files whose names match."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from ..images import EXTENSIONS, ImageError, decode
from ..registry import DATASETS
from .annotations import AnnotatedImages, Finding
from .transforms import IGNORED

__all__ = ['ADE20K', 'ADE20K_CLASSES', 'CITYSCAPES_CLASSES', 'Cityscapes', 'SegmentationFolder']

NO_MASK, NO_IMAGE = 'image without mask', 'mask without image'
BAD_MASK, OTHER_SIZE, NO_CLASS = 'broken mask', 'mask of another size than its image', 'class out of range'
UNKNOWN = -1  # stands for a stored value that is no class
STORED = 2**16  # values that a mask's pixel can have
THREADS = 16  # that look through the masks

ADE20K_CLASSES = (  # noqa: SIM905
    'wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, '
    'table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, '
    'armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, '
    'chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, '
    'case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, '
    'book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, '
    'hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, '
    'dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, '
    'fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, '
    'minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, '
    'screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, '
    'monitor, bulletin board, shower, radiator, glass, clock, flag'
).split(', ')

CITYSCAPES_CLASSES = (  # noqa: SIM905
    'road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, '
    'rider, car, truck, bus, train, motorcycle, bicycle'
).split(', ')
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of labelIds, by class


@DATASETS.register_module()
class SegmentationFolder(AnnotatedImages):
    """Images in one folder and maps of classes in another, under the same names but for their ends.

    See `zoo.train.dense` for the samples: the maps have class indices, and 255 where none counts. What is stored may be
    indices (grey or palette images, of 8 or 16 bits), or colours.

    Args:
        images, masks: folders, with what lies below them.
        classes: names, in the order of their indices; 255 at most.
        transform: of (image, target): its config, or a list of them; None for images as they are stored.
        image_suffix: end of the images' names; any of `images.EXTENSIONS` if None.
        mask_suffix: end of the masks' names.
        palette: colours (red, green, blue) of stored values 0, 1, ..., of masks in colours.
        class_map: index of each value that is stored, 255 of those that don't count; by default values are indices.
        reduce_zero_label: value 0 doesn't count, and k is class k - 1.
        ignore_index: value that doesn't count.
        on_error: what broken annotations and images do: 'raise', or 'skip' (the image is left out). An image without
            mask is broken, as is a mask without image, of another size or with a value that is no class. Without a key,
            as in evaluation, a black image whose map counts nowhere stands for one that can't be decoded.
        check: read all masks at once to see whether they are broken; else they are checked when they are used.

    Raises:
        FileNotFoundError: no such folder.
        AnnotationError: broken annotations, all of them; a ValueError.
        ValueError: arguments that contradict each other, or there are no images.
    """

    def __init__(
        self,
        images,
        masks,
        classes: Sequence[str],
        transform=None,
        image_suffix: str | None = None,
        mask_suffix: str = '.png',
        palette: Sequence[Sequence[int]] | None = None,
        class_map: Mapping[int, int] | None = None,
        reduce_zero_label: bool = False,
        ignore_index: int = IGNORED,
        on_error: str = 'raise',
        check: bool = True,
    ):
        super().__init__(transform, on_error)
        self.classes = list(classes)
        self._table = _table(len(self.classes), class_map, reduce_zero_label, ignore_index)
        self._palette = None if palette is None else _colours(palette)
        self.images, self.masks = Path(images).expanduser(), Path(masks).expanduser()
        found, maps = _find(self.images, image_suffix), _find(self.masks, mask_suffix)
        if not found:
            suffix = image_suffix or ', '.join(sorted(EXTENSIONS))
            raise ValueError(f'{self.images} holds no images (by name: {suffix}).')
        findings = [
            Finding(NO_MASK, str(self.images / found[key]), f'no {key}{mask_suffix} in {self.masks}')
            for key in found.keys() - maps.keys()
        ]
        findings += [
            Finding(NO_IMAGE, str(self.masks / maps[key]), f'no {key}{image_suffix or ".*"} in {self.images}')
            for key in maps.keys() - found.keys()
        ]
        findings.sort(key=lambda finding: (finding.kind, finding.name))
        self._pairs = np.array([(found[key], maps[key]) for key in found if key in maps])
        if check:
            with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
                problems = list(threads.map(self._problem, range(len(self._pairs))))
            findings += [problem for problem in problems if problem is not None]
            self._pairs = self._pairs[[problem is None for problem in problems]]
        self.settle(self.masks, findings)
        if not len(self._pairs):
            raise ValueError(f'{self.images} has no images with a map of classes in {self.masks}.')

    @property
    def metainfo(self) -> dict:
        """`classes`: their names, in the order of their indices."""
        return {'classes': self.classes}

    def __len__(self) -> int:
        return len(self._pairs)

    def filename(self, index: int) -> str:
        """Where an image is, for people."""
        return str(self.images / self._pairs[index, 0])

    def read(self, index: int) -> tuple[Image.Image, dict]:
        path = self.filename(index)
        with open(path, 'rb') as file:
            image = decode(file, 'RGB', path)
        where = str(self.masks / self._pairs[index, 1])
        classes = self._classes(where)
        problem = _size_problem(classes, image.size) or self._class_problem(classes, where)
        if problem is not None:
            raise ImageError(f'Cannot use the mask {where}: {problem[0]}, {problem[1]}', where, ': '.join(problem))
        return image, self._target(index, torch.from_numpy(classes.astype(np.uint8)))

    def blank(self, index: int) -> tuple[Image.Image, dict]:
        return Image.new('RGB', (256, 256)), self._target(index, torch.full((256, 256), IGNORED, dtype=torch.uint8))

    def _target(self, index: int, classes: torch.Tensor) -> dict:
        return {'name': str(self._pairs[index, 0]), 'mask': tv_tensors.Mask(classes)}

    def _stored(self, path: str) -> np.ndarray:
        """The values of a mask, (H, W).

        Raises:
            ImageError: it can't be decoded, or has no values.
        """
        with open(path, 'rb') as file:
            image = decode(file, None if self._palette is None else 'RGB', path)
        values = np.asarray(image)
        if self._palette is not None:
            return _values_of(values, self._palette)
        if values.ndim != 2 or values.dtype.kind not in 'buiI':
            reason = f'its pixels (mode {image.mode}) are colours or fractions: give the palette of a mask in colours'
            raise ImageError(f'Cannot read the mask {path}: {reason}', path, reason)
        return values.astype(np.int32, copy=False)

    def _classes(self, path: str) -> np.ndarray:
        """Class indices (H, W) of a mask; UNKNOWN where a value is none."""
        values = self._stored(path)
        is_known = (values >= 0) & (values < STORED)
        return np.where(is_known, self._table[np.where(is_known, values, 0)], UNKNOWN)

    def _class_problem(self, classes: np.ndarray, path: str) -> tuple[str, str] | None:
        if classes.size and classes.min() == UNKNOWN:
            is_unknown = classes == UNKNOWN
            values = np.unique(self._stored(path)[is_unknown])
            if self._palette is not None:
                return NO_CLASS, f'{is_unknown.sum()} pixels of colours that are not in the palette'
            return NO_CLASS, f'values {", ".join(map(str, values[:5]))} in {is_unknown.sum()} pixels'
        return None

    def _problem(self, index: int) -> Finding | None:
        path, where = self.filename(index), str(self.masks / self._pairs[index, 1])
        try:
            classes = self._classes(where)
        except ImageError as error:
            return Finding(BAD_MASK, where, error.reason)
        try:
            with Image.open(path) as image:  # no more than its header
                problem = _size_problem(classes, image.size)
        except FileNotFoundError:
            raise
        except Exception:  # a broken image, which is told of when it is drawn
            problem = None
        problem = problem or self._class_problem(classes, where)
        return None if problem is None else Finding(problem[0], where, problem[1])


def _size_problem(classes: np.ndarray, size: tuple[int, int]) -> tuple[str, str] | None:
    if classes.shape != size[::-1]:
        return OTHER_SIZE, f'{classes.shape[0]} x {classes.shape[1]}, image {size[1]} x {size[0]}'
    return None


def _table(count: int, class_map: Mapping[int, int] | None, reduce_zero_label: bool, ignore_index: int) -> np.ndarray:
    """Class index of each value that may be stored."""
    if not 0 < count <= IGNORED:
        raise ValueError(f'Expected 1 to {IGNORED} classes, got {count}.')
    if class_map is not None and reduce_zero_label:
        raise ValueError('class_map says itself what 0 stands for: leave reduce_zero_label out.')
    if class_map is None:
        class_map = {value + reduce_zero_label: value for value in range(count)}
        class_map |= {0: IGNORED} if reduce_zero_label else {}
    table = np.full(STORED, UNKNOWN, np.int16)
    for value, index in class_map.items():
        if not 0 <= value < STORED or not (0 <= index < count or index == IGNORED):
            raise ValueError(
                f'class_map must lead from 0..{STORED - 1} to 0..{count - 1} or 255, got {value}: {index}.'
            )
        table[value] = index
    if not 0 <= ignore_index < STORED:
        raise ValueError(f'ignore_index must be from 0 to {STORED - 1}, got {ignore_index!r}.')
    table[ignore_index] = IGNORED
    return table


def _colours(palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Colours as numbers."""
    colours = np.asarray(palette)
    if colours.ndim != 2 or colours.shape[1] != 3 or colours.dtype.kind not in 'iu':
        raise ValueError(f'palette must be colours of three integers each, got {palette!r}.')
    if colours.min() < 0 or colours.max() > 255:
        raise ValueError(f'palette must be of integers from 0 to 255, got {colours.min()} to {colours.max()}.')
    numbers = _numbers(colours)
    if len(np.unique(numbers)) < len(numbers):
        raise ValueError('palette has a colour twice.')
    return numbers


def _numbers(colours: np.ndarray) -> np.ndarray:
    return colours.astype(np.int32) @ np.array([2**16, 2**8, 1], np.int32)


def _values_of(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Places in the palette of the colours (H, W, 3); UNKNOWN of others."""
    order = np.argsort(palette)
    numbers = _numbers(pixels)
    places = np.searchsorted(palette[order], numbers).clip(max=len(palette) - 1)
    return np.where(palette[order][places] == numbers, order[places], UNKNOWN)


def _find(folder: Path, suffix: str | None) -> dict[str, str]:
    """Files below a folder, in the order of their names, by name without suffix."""
    if not folder.is_dir():
        raise FileNotFoundError(f'There is no folder {folder.absolute()}.')
    found: dict[str, str] = {}
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for file in sorted(files):
            path = os.path.relpath(os.path.join(parent, file), folder)
            key, end = os.path.splitext(path)
            if suffix is not None:
                key, end = path.removesuffix(suffix), suffix if path.endswith(suffix) else None
            if end is None or (suffix is None and end.lower() not in EXTENSIONS):
                continue
            if key in found:
                raise ValueError(f'{folder} has both {found[key]} and {path}: give image_suffix to choose.')
            found[key] = path
    return found


@DATASETS.register_module()
class ADE20K(SegmentationFolder):
    """Scene parsing's 150 classes: ADEChallengeData2016, as it is unpacked.

    Images lie in root/images/{training,validation}, masks in root/annotations/{training,validation}, whose 0 doesn't
    count.

    Args:
        root: the folder ADEChallengeData2016.
        split: 'training' or 'validation'.
        kwargs: transform, on_error and check of `SegmentationFolder`.
    """

    def __init__(self, root, split: str = 'training', **kwargs):
        if split not in ('training', 'validation'):
            raise ValueError(f"split must be 'training' or 'validation', got {split!r}.")
        root = Path(root).expanduser()
        super().__init__(
            root / 'images' / split,
            root / 'annotations' / split,
            ADE20K_CLASSES,
            image_suffix='.jpg',
            reduce_zero_label=True,
            **kwargs,
        )


@DATASETS.register_module()
class Cityscapes(SegmentationFolder):
    """Cityscapes' 19 classes of evaluation.

    Images lie in root/leftImg8bit/{train,val}/<city>, masks in root/gtFine/{train,val}/<city>.

    Args:
        root: the folder of leftImg8bit and gtFine.
        split: 'train' or 'val'; the masks of 'test' are of no class.
        labels: 'labelIds', as they are downloaded, or 'labelTrainIds', as Cityscapes' scripts make them.
        kwargs: transform, on_error and check of `SegmentationFolder`.
    """

    def __init__(self, root, split: str = 'train', labels: str = 'labelIds', **kwargs):
        if split not in ('train', 'val'):
            raise ValueError(f"split must be 'train' or 'val', got {split!r}.")
        if labels not in ('labelIds', 'labelTrainIds'):
            raise ValueError(f"labels must be 'labelIds' or 'labelTrainIds', got {labels!r}.")
        class_map = None
        if labels == 'labelIds':
            class_map = {**dict.fromkeys(range(34), IGNORED), **{own: i for i, own in enumerate(CITYSCAPES_IDS)}}
        root = Path(root).expanduser()
        super().__init__(
            root / 'leftImg8bit' / split,
            root / 'gtFine' / split,
            CITYSCAPES_CLASSES,
            image_suffix='_leftImg8bit.png',
            mask_suffix=f'_gtFine_{labels}.png',
            class_map=class_map,
            **kwargs,
        )
