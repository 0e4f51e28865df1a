"""Scenes of digits for detection and segmentation: boxes, masks and class maps are exact, and they are there at once.

The pixels of the digits are real: those of scikit-learn's 1,797 handwritten ones (8x8), the first 1,200 for training,
the others, mostly by other writers, for testing. The scenes are not: digits are enlarged, coloured, and pasted on
canvases of procedural texture. They show that a detector or segmentor learns; they say nothing about photographs.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..digits import MAX_VALUE, TRAIN_SIZE
from ..registry import DATASETS
from .coco import CocoInstances
from .segmentation_data import SegmentationFolder

__all__ = ['CLASSES', 'SPLITS', 'DigitSceneMasks', 'DigitScenes', 'Scene', 'make_scene', 'write']

SPLITS = ('train', 'test')
CLASSES = tuple('0123456789')
SIDES = (112, 160)  # of a canvas
SIZES = (40, 64)  # of a digit's 8x8 pixels enlarged
DIGITS = (2, 4)  # in a scene
INK = 0.35  # of the darkest pixel's, from which on a pixel is the digit's
VISIBLE = 0.9  # of a digit's pixels, at least, after others have been pasted over it
CANVAS, DIGIT = (20, 100), (110, 256)  # channels of their colours: digits are the brighter ones
CONTRAST = 110  # between a digit and its canvas, at least: distance in RGB
DIFFERENCE = 60  # between digits of a scene
TRIES = 30  # places for a digit, before it is left out


@dataclass
class Scene:
    """A scene: what `make_scene` gives.

    Attributes:
        image: uint8 (H, W, 3).
        labels: the digits, in the order in which they were pasted.
        masks: bool (N, H, W), the pixels of each that are seen; no pixel is in two.
    """

    image: np.ndarray
    labels: list[int]
    masks: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """The least boxes around the masks: int64 (N, 4), x0 y0 x1 y1, the latter two exclusive."""
        boxes = np.zeros((len(self.labels), 4), np.int64)
        for box, mask in zip(boxes, self.masks, strict=True):
            (rows,), (columns,) = mask.any(axis=1).nonzero(), mask.any(axis=0).nonzero()
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes

    @property
    def class_map(self) -> np.ndarray:
        """0 for the canvas, 1 + the digit for a digit: uint8 (H, W)."""
        result = np.zeros(self.image.shape[:2], np.uint8)
        for label, mask in zip(self.labels, self.masks, strict=True):
            result[mask] = 1 + label
        return result


def make_scene(digits: np.ndarray, labels: np.ndarray, split: str, index: int, seed: int = 0) -> Scene:
    """The scene of this index; of the same arguments always the same.

    Args:
        digits: (M, 8, 8), of 0 to 16, to choose from.
        labels: (M,), theirs.
        split: 'train' or 'test'; scenes of the same index differ in canvas and places too.
        index, seed: which scene it is.
    """
    generator = np.random.default_rng((seed, SPLITS.index(split), index))
    height, width = generator.integers(SIDES[0], SIDES[1] + 1, 2)
    background = generator.integers(*CANVAS, 3)
    image = _canvas(generator, height, width, background)
    owner = np.full((height, width), -1)  # which digit a pixel shows
    pasted, areas, colours = [], [], []
    for _ in range(generator.integers(DIGITS[0], DIGITS[1] + 1)):
        number = generator.integers(len(digits))
        h, w = (int(side) for side in generator.integers(SIZES[0], SIZES[1] + 1) * generator.uniform((1, 0.8), 1))
        ink = _enlarged(digits[number] / MAX_VALUE, h, w)
        mask = ink >= INK
        place = _place(generator, owner, mask, areas)
        colour = _colour(generator, background, colours)
        if place is None:
            continue
        image[place][mask] = (colour * (0.55 + 0.45 * ink.clip(0, 1)[..., None]))[mask]  # pale strokes are darker
        owner[place][mask] = len(pasted)
        pasted.append(int(labels[number]))
        areas.append(int(mask.sum()))
        colours.append(colour)
    masks = owner == np.arange(len(pasted))[:, None, None]
    return Scene(image.round().clip(0, 255).astype(np.uint8), pasted, masks)


def _place(generator, owner: np.ndarray, mask: np.ndarray, areas: list[int]) -> tuple[slice, slice] | None:
    """A place where the mask hides none of the digits there more than allowed; None if none is found."""
    for _ in range(TRIES):
        y, x = (generator.integers(0, side - own + 1) for side, own in zip(owner.shape, mask.shape, strict=True))
        place = slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1])
        after = owner.copy()
        after[place][mask] = len(areas)
        if all((after == i).sum() >= VISIBLE * area for i, area in enumerate(areas)):
            return place
    return None


def _colour(generator, background: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """A colour that is told from the background, after the darkening of pale strokes too, and from other digits'."""
    while True:
        colour = generator.integers(*DIGIT, 3)
        contrast = min(np.linalg.norm(shade * colour - background) for shade in (1, 0.7))
        difference = min((np.linalg.norm(colour - other) for other in others), default=np.inf)
        if contrast >= CONTRAST and difference >= DIFFERENCE:
            return colour


def _canvas(generator, height: int, width: int, background: np.ndarray) -> np.ndarray:
    """Smooth noise of several scales, stripes and grain around a colour: float (H, W, 3)."""
    texture = np.zeros((height, width, 3))
    for cells in (3, 6, 12, 24):
        noise = generator.normal(size=(cells, cells, 3))
        texture += np.stack([_enlarged(noise[..., i], height, width) for i in range(3)], axis=-1) * 30 / cells**0.5
    y, x = np.mgrid[:height, :width]
    angle, length, phase = generator.uniform((0, 6, 0), (np.pi, 30, 2 * np.pi))
    stripes = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + phase)
    texture += stripes[..., None] * generator.uniform(-25, 25, 3) * generator.integers(0, 2)
    return background + texture + generator.normal(scale=3, size=texture.shape)


def _enlarged(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """A grid (h, w) interpolated by cubic convolution: (height, width)."""
    return _weights(grid.shape[0], height) @ grid @ _weights(grid.shape[1], width).T


def _weights(size: int, new_size: int) -> np.ndarray:
    """What each of `size` values counts for each of `new_size` between them (Keys' kernel with a = -1/2)."""
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    weights = np.zeros((new_size, size))
    for step in range(-1, 3):
        index = np.floor(centres).astype(int) + step
        t = np.abs(centres - index)
        value = np.where(t <= 1, (1.5 * t - 2.5) * t**2 + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2)
        np.add.at(weights, (np.arange(new_size), index.clip(0, size - 1)), value)
    return weights


def write(folder: Path | str, train: int = 2000, test: int = 200, seed: int = 0) -> Path:
    """Write that many scenes of each split, and return the folder; it needs scikit-learn.

    In it are images/<split>/NNNNN.png; annotations/<split>.json, as COCO's, the category of digit d being 1 + d;
    masks/<split>/NNNNN.png, class maps with 0 for the canvas and 1 + d for digit d; and scenes.json, which says what is
    there. A folder that is complete is left as it is. Everything is written aside and renamed into place in one step,
    so that an interrupted run leaves no half of it, and runs at the same time don't disturb each other.

    Raises:
        FileExistsError: the folder holds something else, or other scenes.
    """
    for name, count in (('train', train), ('test', test)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f'{name} must be a positive number of scenes, got {count!r}.')
    folder = Path(folder).expanduser()
    contents = {'train': train, 'test': test, 'seed': seed}
    if folder.exists():
        _check(folder, contents)
        return folder
    from sklearn.datasets import load_digits  # an optional dependency

    digits, labels = load_digits(return_X_y=True)
    digits = digits.reshape(-1, 8, 8)
    parts = {'train': slice(0, TRAIN_SIZE), 'test': slice(TRAIN_SIZE, None)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'{folder.name}.tmp') as temporary:
        aside = Path(temporary, folder.name)
        for split, part in parts.items():
            scenes = (make_scene(digits[part], labels[part], split, i, seed) for i in range(contents[split]))
            _write_split(aside, split, scenes)
        (aside / 'scenes.json').write_text(json.dumps(contents))
        try:
            aside.rename(folder)
        except OSError:  # another run was first
            _check(folder, contents)
    return folder


def _check(folder: Path, contents: dict) -> None:
    try:
        found = json.loads((folder / 'scenes.json').read_text())
    except (OSError, ValueError):
        found = None
    if found != contents:
        what = 'not a folder of scenes' if found is None else f'has the scenes of {found}, not of {contents}'
        raise FileExistsError(f'{folder} exists, but is {what}. Remove it or choose another.')


def _write_split(folder: Path, split: str, scenes) -> None:
    images, annotations = [], []
    for kind in ('images', 'masks'):
        (folder / kind / split).mkdir(parents=True)
    for index, scene in enumerate(scenes):
        name = f'{index:05}.png'
        Image.fromarray(scene.image).save(folder / 'images' / split / name)
        Image.fromarray(scene.class_map).save(folder / 'masks' / split / name)
        height, width = scene.image.shape[:2]
        images.append({'id': index + 1, 'file_name': name, 'height': height, 'width': width})
        for (x0, y0, x1, y1), mask, label in zip(scene.boxes.tolist(), scene.masks, scene.labels, strict=True):
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': index + 1,
                    'category_id': 1 + label,
                    'bbox': [x0, y0, x1 - x0, y1 - y0],
                    'area': int(mask.sum()),
                    'iscrowd': 0,
                    'segmentation': {'size': [height, width], 'counts': _runs(mask)},
                }
            )
    categories = [{'id': 1 + digit, 'name': name} for digit, name in enumerate(CLASSES)]
    path = folder / 'annotations' / f'{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': categories}))


def _runs(mask: np.ndarray) -> list[int]:
    """Lengths of runs of unset and set pixels in turn, down the columns, as COCO has them uncompressed."""
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff([0, *edges, mask.size]).tolist()


@DATASETS.register_module()
class DigitScenes(CocoInstances):
    """Scenes with the boxes and masks of their digits, written to `root` first if they aren't there.

    Args:
        root, train, test, seed: of `write`.
        split: 'train' or 'test', of which the latter is for evaluation.
        kwargs: other arguments of `CocoInstances`.
    """

    writes = True

    def __init__(self, root, split: str, train: int = 2000, test: int = 200, seed: int = 0, **kwargs):
        _check_split(split)
        folder = write(root, train, test, seed)
        kwargs.setdefault('training', split == 'train')
        super().__init__(folder / 'images' / split, folder / 'annotations' / f'{split}.json', **kwargs)


@DATASETS.register_module()
class DigitSceneMasks(SegmentationFolder):
    """Scenes with their class maps, background and the ten digits, written to `root` first if they aren't there.

    Args:
        root, train, test, seed: of `write`.
        split: 'train' or 'test'.
        kwargs: other arguments of `SegmentationFolder`.
    """

    writes = True

    def __init__(self, root, split: str, train: int = 2000, test: int = 200, seed: int = 0, **kwargs):
        _check_split(split)
        folder = write(root, train, test, seed)
        super().__init__(folder / 'images' / split, folder / 'masks' / split, ('background', *CLASSES), **kwargs)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f'split must be one of {", ".join(SPLITS)}, got {split!r}.')
