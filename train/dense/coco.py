"""Objects with boxes and masks in COCO's format: read for training and evaluation, and written."""

import difflib
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..checkpoints import write_atomically
from ..images import ImageError, decode
from ..registry import DATASETS
from .annotations import AnnotatedImages, check_coco
from .coco_metric import encode_masks

__all__ = ['CocoInstances', 'decode_masks', 'predictions_to_coco', 'read_coco', 'write_coco']


def _mask_api():
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ImportError("COCO's masks need faster-coco-eval: pip install attention-zoo[dense]") from error
    return mask


def decode_masks(segmentations: Sequence, height: int, width: int) -> torch.Tensor:
    """Masks uint8 (N, H, W) of 0 and 1 of segmentations in COCO's three forms: polygons, and run lengths, as a list or
    compressed.

    Raises:
        ImportError: faster-coco-eval isn't installed.
        ValueError: a segmentation that is none, or of another size.
    """
    if not len(segmentations):
        return torch.zeros((0, height, width), dtype=torch.uint8)
    api = _mask_api()
    try:
        encoded = [_encoded(api, segmentation, height, width) for segmentation in segmentations]
        columns = api.decode(encoded)  # (H, W, N)
    except (IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"A mask is in none of COCO's forms: {error}") from error
    if columns.shape[:2] != (height, width):
        raise ValueError(f'Expected masks of {height} x {width}, got {columns.shape[0]} x {columns.shape[1]}.')
    return torch.from_numpy(np.ascontiguousarray(columns.transpose(2, 0, 1)))


def _encoded(api, segmentation, height: int, width: int) -> dict:
    if isinstance(segmentation, list):
        return api.merge(api.frPyObjects(segmentation, height, width))
    if isinstance(segmentation['counts'], list):
        return api.frPyObjects(segmentation, *segmentation['size'])
    return segmentation


def read_coco(path: Path | str) -> dict:
    """The content of a COCO file of instances: `images`, `annotations` and `categories`, each a list of dicts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, its images or categories have no ids, or two categories share an id or name.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'There is no annotation file {path.absolute()}.')
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f'{path} is not a JSON file: {error}') from error
    for key in ('images', 'annotations', 'categories'):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f'{path} is not a COCO file of instances: it has no list of {key}.')
        if key != 'annotations' and not all(isinstance(entry.get('id'), int) for entry in entries):
            raise ValueError(f'{path} has {key} whose id is no integer.')
    for key in ('id', 'name'):
        values = [category.get(key) for category in content['categories']]
        if len(set(values)) < len(values):
            raise ValueError(f'{path} has categories that share the {key} {max(values, key=values.count)!r}.')
    return content


@DATASETS.register_module()
class CocoInstances(AnnotatedImages):
    """Images with boxes and masks of a COCO file. See `zoo.train.dense` for the samples.

    Labels are the categories' places in the file, or among those that are chosen. Boxes are clipped to the image. To
    train on, crowds are left out; to evaluate on, they stay, and targets have `crowd` (bool (N,)) too.

    COCO's own train2017 has two annotations of no height, so that it needs on_error='skip'.

    Args:
        root: folder of the images.
        annotations: path of the file.
        transform: of (image, target): its config, or a list of them; None for images as they are stored.
        masks: whether targets have masks, and objects need them.
        training: leave out crowds, images that no object is left of, and small images.
        filter_empty: whether training leaves out the images without objects.
        min_size: training leaves out images whose shorter side is less.
        categories: names of those to take, in the order that labels are to have; all if None.
        on_error: what broken annotations (see `annotations.check_coco`) and images that can't be decoded do: 'raise',
            or 'skip' (boxes that are partly outside of their images are kept, clipped). An image that isn't as large
            as the file says is a broken one. Without a key, as in evaluation, a black image stands for a broken one: of
            its objects all count as missed.

    Raises:
        FileNotFoundError: no such folder or file.
        ImportError: masks, but no faster-coco-eval.
        AnnotationError: broken annotations, all of them; a ValueError.
        ValueError: the file is none of COCO's, has no such category, or nothing is left to train on.
    """

    def __init__(
        self,
        root,
        annotations,
        transform=None,
        masks: bool = True,
        training: bool = True,
        filter_empty: bool = True,
        min_size: int = 32,
        categories: Sequence[str] | None = None,
        on_error: str = 'raise',
    ):
        super().__init__(transform, on_error)
        self.root, self.annotations = Path(root).expanduser(), Path(annotations).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(f'There is no image folder {self.root.absolute()}.')
        self.masks, self.training = masks, training
        if masks:
            _mask_api()
        content = read_coco(self.annotations)
        self.classes, self.category_ids = _choose(content['categories'], categories, self.annotations)
        findings, images, objects = check_coco(content, self.root, masks)
        self.settle(self.annotations, findings)
        labels = {category: label for label, category in enumerate(self.category_ids)}
        objects = [own for own in objects if own['category_id'] in labels and not (training and own.get('iscrowd'))]
        if training:
            filled = {own['image_id'] for own in objects}
            images = [
                image
                for image in images
                if (image['id'] in filled or not filter_empty) and min(image['width'], image['height']) >= min_size
            ]
        if not images:
            raise ValueError(f'{self.annotations} has no images to {"train" if training else "evaluate"} on.')
        self._all_images = len(images) == len(content['images'])
        self._keep(images, objects, labels)

    def _keep(self, images: list[dict], objects: list[dict], labels: Mapping[int, int]) -> None:
        """Keep it in few arrays: Python's own objects would be copied to each worker, as counting references writes."""
        places = {image['id']: place for place, image in enumerate(images)}
        objects = sorted((own for own in objects if own['image_id'] in places), key=lambda own: places[own['image_id']])
        self._ids = np.array([image['id'] for image in images])
        self._sizes = np.array([(image['height'], image['width']) for image in images])
        self._names = np.array([image['file_name'].encode() for image in images])
        self._starts = np.searchsorted([places[own['image_id']] for own in objects], np.arange(len(images) + 1))
        boxes = np.array([own['bbox'] for own in objects], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limits = np.repeat(self._sizes[:, ::-1], np.diff(self._starts), axis=0)
        self._boxes = np.clip(boxes, 0, np.tile(limits, 2)).astype(np.float32)
        self._labels = np.array([labels[own['category_id']] for own in objects], dtype=np.int64)
        self._crowd = np.array([bool(own.get('iscrowd')) for own in objects], dtype=bool)
        shapes = [pickle.dumps(own['segmentation']) for own in objects] if self.masks else []
        self._shapes = np.frombuffer(b''.join(shapes), np.uint8)
        self._shape_ends = np.cumsum([0, *map(len, shapes)])

    @property
    def metainfo(self) -> dict:
        """`classes` (names by label), `category_ids` (by label), `annotations` (path); of an evaluation on some of the
        file's images, their `image_ids`.
        """
        info = {
            'classes': self.classes,
            'category_ids': self.category_ids,
            'annotations': str(self.annotations),
        }
        if not self.training and not self._all_images:
            info['image_ids'] = self._ids.tolist()
        return info

    def __len__(self) -> int:
        return len(self._ids)

    def filename(self, index: int) -> str:
        """Where an image is, for people."""
        return str(self.root / self._names[index].decode())

    def read(self, index: int) -> tuple[Image.Image, dict]:
        index = range(len(self))[index]  # which has an IndexError, that ends a loop over the dataset
        path = self.filename(index)
        with open(path, 'rb') as file:
            image = decode(file, 'RGB', path)
        expected = tuple(self._sizes[index].tolist())
        if image.size[::-1] != expected:
            reason = f'it is {image.height} x {image.width}, by its annotations {expected[0]} x {expected[1]}'
            raise ImageError(f'Cannot use the image {path}: {reason}', path, reason)
        return image, self._target(index)

    def blank(self, index: int) -> tuple[Image.Image, dict]:
        index = range(len(self))[index]
        height, width = self._sizes[index].tolist()
        return Image.new('RGB', (width, height)), self._target(index)

    def _target(self, index: int) -> dict:
        height, width = size = tuple(self._sizes[index].tolist())
        own = slice(*self._starts[index : index + 2].tolist())
        target = {
            'name': self._names[index].decode(),
            'image_id': int(self._ids[index]),
            'boxes': tv_tensors.BoundingBoxes(self._boxes[own], format='XYXY', canvas_size=size),
            'labels': torch.from_numpy(self._labels[own].copy()),
        }
        if self.masks:
            ends = self._shape_ends[own.start : own.stop + 1].tolist()
            shapes = [pickle.loads(self._shapes[start:stop]) for start, stop in pairwise(ends)]
            target['masks'] = tv_tensors.Mask(decode_masks(shapes, height, width))
        if not self.training:
            target['crowd'] = torch.from_numpy(self._crowd[own].copy())
        return target


def _choose(stored: list[dict], names: Sequence[str] | None, path: Path) -> tuple[list[str], list[int]]:
    """Names and ids of the categories, in the order of their labels."""
    ids = {category.get('name', str(category['id'])): category['id'] for category in stored}
    chosen = list(ids) if names is None else list(names)
    for name in chosen:
        if name not in ids:
            near = difflib.get_close_matches(name, ids)
            hint = f' Near: {", ".join(near)}.' if near else f' It has {", ".join(list(ids)[:10])}.'
            raise ValueError(f'{path} has no category {name!r}.{hint}')
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f'Expected different categories of {path}, got {chosen}.')
    return chosen, [ids[name] for name in chosen]


def write_coco(
    samples,
    path: Path | str,
    classes: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    images: Path | str | None = None,
) -> None:
    """Write samples of detection as a COCO file, from which `CocoInstances` reads the same boxes, masks and labels.

    Args:
        samples: a dataset, or pairs (image, target), one after another.
        path: of the file.
        classes: names of the labels; those of the dataset if None.
        category_ids: their categories' ids; those of the dataset, or 1 to K, if None.
        images: folder to write the images to, as PNG files under their names; not written if None, as they are files
            already.

    Raises:
        ImportError: masks, but no faster-coco-eval.
        ValueError: no names of classes, as many ids as names, or a label that has none.
    """
    info = getattr(samples, 'metainfo', {})
    classes = list(info.get('classes', ()) if classes is None else classes)
    if category_ids is None:
        category_ids = info.get('category_ids') or range(1, len(classes) + 1)
    if not classes or len(category_ids) != len(classes):
        raise ValueError(f'Expected names of classes and an id of each, got {classes} and {list(category_ids)}.')
    content = {
        'images': [],
        'annotations': [],
        'categories': [{'id': own, 'name': name} for own, name in zip(category_ids, classes, strict=True)],
    }
    numbers = count(1)
    for image, target in (samples[i] for i in range(len(samples))) if hasattr(samples, '__len__') else samples:
        name = target['name'] if images is None else str(Path(target['name']).with_suffix('.png'))
        height, width = image.shape[-2:]
        content['images'].append({'id': target['image_id'], 'file_name': name, 'height': height, 'width': width})
        content['annotations'] += _objects(target, category_ids, numbers)
        if images is not None:
            file = Path(images, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            F.to_pil_image(image).save(file)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(content)))


def _objects(target: dict, category_ids: Sequence[int], numbers) -> Iterable[dict]:
    labels = target['labels'].tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(category_ids):
        raise ValueError(
            f'Labels of {target["name"]} must be from 0 to {len(category_ids) - 1}, got {min(labels)} to {max(labels)}.'
        )
    crowd = target['crowd'].tolist() if 'crowd' in target else [False] * len(labels)
    for label, is_crowd, shape in zip(labels, crowd, _shapes(target), strict=True):
        yield {
            'id': next(numbers),
            'image_id': target['image_id'],
            'category_id': category_ids[label],
            'iscrowd': int(is_crowd),
            **shape,
        }


def _shapes(found: dict) -> list[dict]:
    """Of the objects of a target or prediction: `bbox` and `area`, and of masks `segmentation`."""
    boxes = found['boxes'].detach().cpu().as_subclass(torch.Tensor).to(torch.float64, copy=True)
    boxes[:, 2:] -= boxes[:, :2]
    shapes = [{'bbox': box, 'area': box[2] * box[3]} for box in boxes.tolist()]
    if found.get('masks') is not None:
        areas = found['masks'].flatten(1).ne(0).sum(dim=1).tolist()
        for shape, area, encoded in zip(shapes, areas, encode_masks(found['masks']), strict=True):
            shape['segmentation'] = {'size': list(encoded['size']), 'counts': encoded['counts'].decode()}
            shape['area'] = area
    return shapes


def predictions_to_coco(
    predictions: Iterable[dict], image_ids: Iterable[int], category_ids: Sequence[int]
) -> list[dict]:
    """Predictions as COCO's results, which its servers, pycocotools and FiftyOne read.

    A dict for each object: `image_id`, `category_id`, `bbox` (x, y, width, height), `score`, and of masks
    `segmentation`, compressed run lengths.

    Args:
        predictions: a dict for each image, see `zoo.train.dense`.
        image_ids: of the images.
        category_ids: the category of each label, as a dataset's metainfo has them.
    """
    results = []
    for found, image_id in zip(predictions, image_ids, strict=True):
        rows = zip(found['labels'].tolist(), found['scores'].tolist(), _shapes(found), strict=True)
        for label, score, shape in rows:
            del shape['area']
            results.append({'image_id': image_id, 'category_id': category_ids[label], **shape, 'score': score})
    return results
