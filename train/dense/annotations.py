"""Annotations, looked through before training: what is broken is named, counted, and refused or skipped."""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.dist import is_main_process
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..checkpoints import write_atomically
from ..data import DrawnImages, build_transform

__all__ = ['BROKEN_LIST', 'AnnotatedImages', 'AnnotationError', 'Finding', 'check_coco', 'summary']

logger = logging.getLogger(__name__)

BROKEN_LIST = 'broken_annotations.txt'
NAMED = 3  # findings of a kind that a summary lists
ROUNDING = 1.0  # pixels that a box may reach over the border: COCO's own do

BAD_IMAGE, DOUBLE_IMAGE, NO_FILE = 'image without name or size', 'image id given twice', 'missing image file'
DOUBLE_OBJECT, NO_IMAGE, NO_CATEGORY = 'annotation id given twice', 'unknown image', 'unknown category'
BAD_BOX, EMPTY_BOX = 'broken box', 'box without area'
OUTSIDE, PARTLY_OUTSIDE = 'box outside the image', 'box partly outside the image'
EMPTY_MASK, BAD_MASK = 'empty mask', 'broken mask'


@dataclass(frozen=True, slots=True)
class Finding:
    """Something broken: its `kind`, by which it is counted, the `name` of what has it, and the `reason` in numbers."""

    kind: str
    name: str
    reason: str


class AnnotationError(ValueError):
    """Annotations that are broken, which `findings` lists."""

    def __init__(self, message: str, findings: Sequence[Finding] = ()):
        super().__init__(message)
        self.findings = list(findings)


def summary(source: Path | str, findings: Iterable[Finding]) -> str:
    """The findings counted by kind, with the first few of each, for people."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    lines = [f'{source} has broken annotations ({sum(map(len, kinds.values()))}):']
    for kind, own in kinds.items():
        more = [f'and {len(own) - NAMED} more'] if len(own) > NAMED else []
        named = '; '.join([f'{finding.name} ({finding.reason})' for finding in own[:NAMED]] + more)
        lines.append(f'- {kind}, {len(own)}: {named}')
    return '\n'.join(lines)


class AnnotatedImages(DrawnImages):
    """Images with boxes, masks or maps of classes, whose annotations have been looked through.

    Args:
        transform: config of the transform of (image, target), or a list of them; None for images as they are stored.
        on_error: what broken annotations do: 'raise' refuses all, 'skip' leaves them out, says so once, and has
            `BrokenImages` list them in broken_annotations.txt in the run's folder, a line each: kind, tab, name, tab,
            reason. Of images that can't be decoded, see `DrawnImages`.

    Attributes:
        findings: what is broken.
        writes: whether the class writes its files itself where they aren't.
    """

    writes = False

    def __init__(self, transform, on_error: str):
        super().__init__(on_error)
        self.transform = build_transform(transform) if transform else None
        self.findings: list[Finding] = []

    def settle(self, source: Path | str, findings: Sequence[Finding]) -> None:
        """Keep what was found, and refuse it unless on_error is 'skip'.

        Raises:
            AnnotationError: it is refused.
        """
        self.findings = list(findings)
        if not findings:
            return
        text = summary(source, findings)
        if self.on_error == 'raise':
            raise AnnotationError(f"{text}\nMend them, or leave them out by on_error='skip'.", findings)
        if is_main_process():
            logger.warning(f'{text}\nThey are skipped.')

    def finish(self, image: Image.Image, target: dict) -> tuple[Tensor, dict]:
        image = tv_tensors.Image(F.pil_to_tensor(image))
        if self.transform is not None:
            image, target = self.transform(image, target)
        return image.as_subclass(Tensor), target

    def note_in(self, folder: Path | str) -> None:
        super().note_in(folder)
        if not (self.findings and is_main_process()):
            return
        path = Path(folder, BROKEN_LIST)
        lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []  # of another dataset
        lines += ['\t'.join((finding.kind, finding.name, finding.reason)) for finding in self.findings]
        text = ''.join(f'{line}\n' for line in dict.fromkeys(lines))
        write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding='utf-8'))


class _Files:
    """Files below a folder, each subfolder of which is listed once."""

    def __init__(self, root: Path):
        self.root = root
        self.listed: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self.listed:
            try:
                self.listed[folder] = set(os.listdir(self.root / folder))
            except (FileNotFoundError, NotADirectoryError):
                self.listed[folder] = set()
        return name in self.listed[folder]


def check_coco(
    content: Mapping, root: Path | str | None = None, masks: bool = True
) -> tuple[list[Finding], list[dict], list[dict]]:
    """What is broken in the content of a COCO file, and the images and annotations that can be used.

    A box may reach over the border by a pixel, as COCO's do by rounding. One that does so further is found, but can be
    used once it is clipped: without it, what is left of its object would be trained to be background.

    Args:
        content: `images`, `annotations` and `categories`, as the file has them.
        root: folder of the images, to see whether each is there; not looked at if None.
        masks: whether masks are needed. Polygons are judged by their points, run lengths by their sum.
    """
    findings: list[Finding] = []
    files = None if root is None else _Files(Path(root))
    images: dict[int, dict] = {}
    broken = set()  # images by themselves, which their annotations are left out with, silently
    for image in content['images']:
        kind, reason = _image_problem(image, images, files)
        if kind is None:
            images[image['id']] = image
        else:
            findings.append(Finding(kind, f'image {image.get("file_name", image["id"])}', reason))
            broken.add(image['id'])
    categories = {category['id'] for category in content['categories']}
    annotations, taken = [], set()
    for place, own in enumerate(content['annotations']):
        image_id, own_id = own.get('image_id'), own.get('id')
        if image_id in broken and image_id not in images:
            continue
        image = images.get(image_id)
        kind, reason = None, ''
        if own_id is not None and own_id in taken:
            kind, reason = DOUBLE_OBJECT, f'id {own_id}'
        elif image is None:
            kind, reason = NO_IMAGE, f'image_id {image_id!r}'
        elif own.get('category_id') not in categories:
            kind, reason = NO_CATEGORY, f'category_id {own.get("category_id")!r}'
        else:
            kind, reason = _box_problem(own.get('bbox'), image['width'], image['height'])
            if masks and kind in (None, PARTLY_OUTSIDE):
                of_mask = _mask_problem(own.get('segmentation'), image['width'], image['height'])
                kind, reason = (kind, reason) if of_mask[0] is None else of_mask
        taken.add(own_id)
        if kind is not None:
            where = '' if image is None else f' of {image["file_name"]}'
            findings.append(Finding(kind, f'annotation {place if own_id is None else own_id}{where}', reason))
        if kind in (None, PARTLY_OUTSIDE):
            annotations.append(own)
    return findings, list(images.values()), annotations


Problem = tuple[str | None, str]
FINE: Problem = (None, '')


def _image_problem(image: Mapping, others: Mapping, files: _Files | None) -> Problem:
    if image['id'] in others:
        return DOUBLE_IMAGE, f'id {image["id"]}, as {others[image["id"]]["file_name"]}'
    if not isinstance(image.get('file_name'), str):
        return BAD_IMAGE, f'file_name {image.get("file_name")!r}'
    size = image.get('width'), image.get('height')
    if not all(isinstance(side, int) and side > 0 for side in size):
        return BAD_IMAGE, f'width {size[0]!r}, height {size[1]!r}'
    if files is not None and image['file_name'] not in files:
        return NO_FILE, f'not in {files.root}'
    return FINE


def _box_problem(box, width: int, height: int) -> Problem:
    try:
        x, y, w, h = box
        is_finite = math.isfinite(x + y + w + h)
    except (TypeError, ValueError):
        is_finite = False
    if not is_finite:
        return BAD_BOX, f'{box!r} instead of x, y, width, height'
    if w <= 0 or h <= 0:
        return EMPTY_BOX, f'{w} x {h}'
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return OUTSIDE, f'{list(box)} in {width} x {height}'
    if min(x, y) < -ROUNDING or x + w > width + ROUNDING or y + h > height + ROUNDING:
        return PARTLY_OUTSIDE, f'{list(box)} in {width} x {height}'
    return FINE


def _mask_problem(segmentation, width: int, height: int) -> Problem:
    if not segmentation:
        return EMPTY_MASK, 'no polygon or run lengths'
    if isinstance(segmentation, list):
        problems = (_polygon_problem(polygon, width, height) for polygon in segmentation)
        return next((problem for problem in problems if problem != FINE), FINE)
    try:
        size, runs = list(segmentation['size']), segmentation['counts']
        runs = np.asarray(runs) if isinstance(runs, list) else _runs(runs)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return BAD_MASK, 'neither polygons nor run lengths'
    if size != [height, width]:
        return BAD_MASK, f'of {size} (height, width) in an image of {[height, width]}'
    if runs.ndim != 1 or runs.dtype.kind not in 'iu' or runs.min() < 0 or runs.sum() != height * width:
        return BAD_MASK, f'run lengths that do not come to {height * width} pixels'
    if not runs[1::2].any():
        return EMPTY_MASK, 'run lengths of background alone'
    return FINE


def _polygon_problem(polygon, width: int, height: int) -> Problem:
    if not isinstance(polygon, list) or len(polygon) % 2:
        return BAD_MASK, 'a polygon that is no list x, y, x, y, ...'
    if len(polygon) < 6:
        return EMPTY_MASK, f'a polygon of {len(polygon) // 2} points'
    limit = max(width, height)
    try:  # a NaN makes the sum one
        is_near = math.isfinite(sum(polygon)) and -limit <= min(polygon) and max(polygon) <= 2 * limit
    except TypeError:
        is_near = False
    return FINE if is_near else (BAD_MASK, 'a polygon with points that are no numbers, or far from the image')


def _runs(counts: str | bytes) -> np.ndarray:
    """Run lengths of COCO's compressed form: five bits a character, and from the fourth on less the last but one."""
    text = counts.encode() if isinstance(counts, str) else counts
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    is_last = codes & 32 == 0
    if not is_last[-1]:
        raise ValueError('It ends within a number.')
    starts = np.concatenate([[0], np.flatnonzero(is_last)[:-1] + 1])
    lengths = np.diff([*starts, len(codes)])
    if lengths.max() > 7:  # 35 bits: no image has as many pixels
        raise ValueError('A number is too long.')
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * places), starts)
    values -= np.where(codes[is_last] & 16, 1 << (5 * lengths), 0)  # the sign
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values
