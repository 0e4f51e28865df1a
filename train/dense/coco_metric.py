"""Average precision as COCO defines it, by faster-coco-eval."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import write_atomically
from ..registry import METRICS
from .annotations import check_coco
from .image_metric import ImageMetric, listed

__all__ = ['CocoAP', 'encode_masks']

IOU_TYPES = ('bbox', 'segm', 'boundary')
IOU_50, IOU_75 = 0, 5  # of COCO's ten thresholds 0.5, 0.55, ..., 0.95
AREAS = ('', 's', 'm', 'l')  # all, below 32x32 pixels, below 96x96, and others


def _faster_coco_eval():
    try:
        import faster_coco_eval
    except ImportError as error:
        raise ImportError('COCO evaluation needs faster-coco-eval: pip install attention-zoo[dense]') from error
    return faster_coco_eval


def encode_masks(masks: Tensor) -> list[dict]:
    """COCO's run-length encodings ({'size': [height, width], 'counts': bytes}) of masks (N, H, W), nonzero being set.

    Raises:
        ImportError: faster-coco-eval isn't installed.
    """
    if masks.dtype != torch.bool:
        masks = masks != 0
    columns = masks.view(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()  # (N, W, H): runs go down the columns
    return _faster_coco_eval().mask.encode(columns.transpose(2, 1, 0)) if len(columns) else []


@METRICS.register_module()
class CocoAP(ImageMetric):
    """Average precision of detections and instance masks: the figures of COCO, in per cent.

    For each IoU type `<type>_AP` (mean over the thresholds 0.5, 0.55, ..., 0.95 and over the classes), `_AP50`,
    `_AP75`, and `_APs`, `_APm`, `_APl` of small, medium and large objects; NaN where there are none. Equal to
    pycocotools'. Where masks are measured, the size of a detection is its mask's, as in mmdetection and detectron2.

    The dataset's metainfo tells of the truth: `annotations` (path of the COCO JSON file), `category_ids` (the category
    of each label), `classes` (their names), and `image_ids` if the dataset has only some of the file's images. Broken
    annotations (see `annotations.check_coco`) don't count; the area of an object that is stored without is that of what
    is measured, its box or mask.

    Args:
        iou_types: of 'bbox', 'segm', and 'boundary' (Boundary AP, arXiv 2103.16562: masks compared by what of them is
            within 2 % of the image's diagonal of their contours).
        per_class, out: see `ImageMetric`; written are bbox.json and segm.json, results as COCO's server takes them, and
            a table <type>_classes.csv.

    Raises:
        ValueError: no IoU types, or others.
    """

    def __init__(self, iou_types: Sequence[str] = ('bbox',), **kwargs):
        super().__init__(**kwargs)
        self.iou_types = (iou_types,) if isinstance(iou_types, str) else tuple(iou_types)
        if not self.iou_types or not {*self.iou_types} <= {*IOU_TYPES}:
            raise ValueError(f'iou_types must be some of {", ".join(IOU_TYPES)}, got {iou_types!r}.')

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        """Take the (images, targets) of a batch and its predictions; of the targets, `image_id` alone.

        Raises:
            ValueError: predictions that don't fit their images, in size, classes or kind, or aren't finite.
        """
        for image, target, prediction in zip(*data_batch, data_samples, strict=True):
            size = tuple(image.shape[-2:])
            self.results.append((int(target['image_id']), self._compact(prediction, size, target.get('name', ''))))

    def _compact(self, prediction: dict, size: tuple[int, int], name: str) -> dict:
        boxes, scores, labels = (prediction[key].detach().cpu().numpy() for key in ('boxes', 'scores', 'labels'))
        count = len(scores)
        if boxes.shape != (count, 4) or labels.shape != (count,) or scores.ndim != 1:
            raise ValueError(
                f'Expected boxes (N, 4), scores (N,) and labels (N,) of image {name}, got {boxes.shape}, '
                f'{scores.shape} and {labels.shape}.'
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(f'Boxes or scores that the model predicts in image {name} are not finite numbers.')
        classes = len(self._meta('category_ids'))
        if count and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f'Labels must be from 0 to {classes - 1}, got {labels.min()} to {labels.max()} in {name}.')
        result = {'boxes': boxes, 'scores': scores, 'labels': labels}
        if self.iou_types != ('bbox',):
            if prediction.get('masks') is None:
                raise ValueError(f'The IoU types {", ".join(self.iou_types)} need masks, but the model predicts none.')
            masks = prediction['masks']
            if tuple(masks.shape) != (count, *size):
                raise ValueError(f'Expected masks {(count, *size)} of image {name}, got {tuple(masks.shape)}.')
            result['masks'] = encode_masks(masks)
        return result

    def _meta(self, key: str):
        meta = self.dataset_meta or {}
        if key not in meta:
            raise ValueError(f"CocoAP needs {key!r} in the dataset's metainfo, which has {sorted(meta)}.")
        return meta[key]

    def check_images(self, keys, size: int) -> None:
        path = self._meta('annotations')
        known = {image['id']: image.get('file_name', '') for image in _read_truth(path)['images']}
        wanted = {*self.dataset_meta.get('image_ids', known)}

        def named(ids) -> str:
            return f'{len(ids)} images: ' + listed(
                [f'{image_id} ({known.get(image_id, "?")})' for image_id in sorted(ids)]
            )

        if missing := wanted - keys:
            raise ValueError(f'Without results are {named(missing)}, of {len(wanted)} in all.')
        if foreign := keys - wanted:
            raise ValueError(f'Not of {path} are {named(foreign)}.')

    def compute_metrics(self, results: list[tuple[int, dict]]) -> dict[str, float]:
        path, categories = self._meta('annotations'), self._meta('category_ids')
        stored, metrics = _read_truth(path), {}
        for iou_type in self.iou_types:
            entries = _entries(results, categories, iou_type)
            if self.out is not None and iou_type != 'boundary':  # whose entries are those of segm
                self.out.mkdir(parents=True, exist_ok=True)
                write_atomically(self.out / f'{iou_type}.json', lambda path, e=entries: path.write_text(_json(e)))
            truth = _truth(stored, {image_id for image_id, _ in results}, iou_type)
            precision = _precision(truth, entries, categories, iou_type)
            metrics |= {f'{iou_type}_{name}': value for name, value in _measures(precision).items()}
            self.classes = self._table(precision, truth)
            self.show(f'{iou_type} AP of each class (%)', f'{iou_type}_classes.csv')
        return metrics

    def _table(self, precision: np.ndarray, truth: dict) -> list[dict]:
        categories = self._meta('category_ids')
        names = self.dataset_meta.get('classes') or [str(category) for category in categories]
        counted = [own['category_id'] for own in truth['annotations'] if not own.get('iscrowd', 0)]
        return [
            {'class': name, 'objects': counted.count(category), **_measures(precision[:, :, i : i + 1])}
            for i, (name, category) in enumerate(zip(names, categories, strict=True))
        ]


def _entries(results: list[tuple[int, dict]], categories: Sequence[int], iou_type: str) -> list[dict]:
    """Results in COCO's format. One that has masks has no boxes, which would be taken for its size."""
    entries = []
    for image_id, result in results:
        boxes = result['boxes'].astype(float)
        boxes[:, 2:] -= boxes[:, :2]
        for i, label in enumerate(result['labels'].tolist()):
            shape = {'bbox': boxes[i].tolist()} if iou_type == 'bbox' else {'segmentation': result['masks'][i]}
            score = float(result['scores'][i])
            entries.append({'image_id': image_id, 'category_id': int(categories[label]), **shape, 'score': score})
    return entries


def _json(entries: list[dict]) -> str:
    return json.dumps(entries, default=bytes.decode)  # counts are bytes


def _read_truth(annotations) -> dict:
    return json.loads(Path(annotations).read_text())


def _truth(stored: dict, image_ids: set[int], iou_type: str) -> dict:
    """COCO's dataset of these images, with what evaluation needs of its objects."""
    mask = _faster_coco_eval().mask
    _, images, annotations = check_coco(stored, masks=iou_type != 'bbox')
    truth = {
        'images': [image for image in images if image['id'] in image_ids],
        'annotations': [{**own} for own in annotations if own['image_id'] in image_ids],
        'categories': stored['categories'],
    }
    sizes = {image['id']: (image['height'], image['width']) for image in truth['images']}
    for number, own in enumerate(truth['annotations'], start=1):
        own['id'] = number  # 0, which some files begin with, would count as matched by nothing
        if 'area' not in own and iou_type == 'bbox':
            own['area'] = own['bbox'][2] * own['bbox'][3]
        elif 'area' not in own:
            own['area'] = float(mask.area(_run_lengths(own['segmentation'], *sizes[own['image_id']])))
    return truth


def _run_lengths(segmentation, height: int, width: int) -> dict:
    """A segmentation of any of COCO's three forms as compressed run lengths."""
    mask = _faster_coco_eval().mask
    if isinstance(segmentation, list):
        return mask.merge(mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation['counts'], list):
        return mask.frPyObjects(segmentation, height, width)
    return segmentation


def _precision(truth: dict, entries: list[dict], categories: Sequence[int], iou_type: str) -> np.ndarray:
    """Precision by (IoU threshold, recall, class in the order of labels, area); -1 where no object counts."""
    coco = _faster_coco_eval()
    loaded = coco.COCO(truth)
    evaluation = coco.COCOeval_faster(loaded, loaded.loadRes(entries), iouType=iou_type, print_function=_silent)
    evaluation.params.catIds = sorted(categories)
    evaluation.evaluate()
    evaluation.accumulate()
    order = np.argsort(np.argsort(categories))  # the place of each label's category among those that are sorted
    return np.asarray(evaluation.eval['precision'])[..., -1][:, :, order]


def _silent(*_) -> None:
    """faster-coco-eval's progress, which isn't shown."""


def _measures(precision: np.ndarray) -> dict[str, float]:
    measures = {'AP': precision[..., 0], 'AP50': precision[IOU_50, ..., 0], 'AP75': precision[IOU_75, ..., 0]}
    measures |= {f'AP{area}': precision[..., i] for i, area in enumerate(AREAS) if area}
    return {name: _mean_per_cent(values) for name, values in measures.items()}


def _mean_per_cent(values: np.ndarray) -> float:
    counted = values[values > -1]
    return 100 * float(counted.mean()) if counted.size else float('nan')
