import csv
import json
import sys

import numpy as np
import pytest
import torch
from killing import launch

from zoo.train.dense.coco_metric import CocoAP, encode_masks
from zoo.train.distributed import process_group
from zoo.train.registry import METRICS

pytest.importorskip('faster_coco_eval')
official = pytest.importorskip('pycocotools.coco')
from pycocotools import mask as official_mask  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

CATEGORIES = [7, 3, 90]  # of labels 0, 1, 2: in another order than that of their ids
SIDES = ((160, 210), (45, 61), (220, 150), (33, 35), (128, 128))
IMAGE_IDS = [12, 5, 139, 4, 60]
NAMES = ['AP', 'AP50', 'AP75', 'APs', 'APm', 'APl']


def rectangle(generator, height, width):
    h, w = generator.integers(6, height), generator.integers(6, width)
    y, x = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
    return x, y, x + w, y + h


def blob(height, width, box):
    """A mask that fills most of a box: an ellipse in it."""
    x0, y0, x1, y1 = box
    y, x = np.mgrid[:height, :width] + 0.5
    return ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1.05


def moved(box, generator, height, width):
    x0, y0, x1, y1 = np.asarray(box) + generator.integers(-3, 4, 4)
    x0, y0 = max(x0, 0), max(y0, 0)
    return x0, y0, min(max(x1, x0 + 2), width), min(max(y1, y0 + 2), height)


def counts(mask):
    """Uncompressed run lengths."""
    flat = mask.T.reshape(-1).astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {'size': [*mask.shape], 'counts': [0, *runs] if flat[0] else runs}


def write_truth(path, seed):
    """Objects of five images and three categories: polygons, both forms of run lengths, crowds."""
    generator = np.random.default_rng(seed)
    annotations, images, objects = [], [], {}
    for image_id, (height, width) in zip(IMAGE_IDS, SIDES, strict=True):
        images.append({'id': image_id, 'height': height, 'width': width, 'file_name': f'{image_id:06}.png'})
        objects[image_id] = []
        for _ in range(generator.integers(0, 9) if image_id != 4 else 0):
            box = rectangle(generator, height, width)
            mask = blob(height, width, box)
            category = int(generator.choice(CATEGORIES))
            encoded = official_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            compressed = {'size': encoded['size'], 'counts': encoded['counts'].decode()}
            x0, y0, x1, y1 = (float(value) for value in box)
            polygon = [[x0, (y0 + y1) / 2, (x0 + x1) / 2, y0, x1, (y0 + y1) / 2, (x0 + x1) / 2, y1]]
            annotations.append(
                {
                    'id': 50 - len(annotations),
                    'image_id': image_id,
                    'category_id': category,
                    'bbox': [x0, y0, x1 - x0, y1 - y0],
                    'area': float(mask.sum()),
                    'iscrowd': int(generator.random() < 0.2),
                    'segmentation': (polygon, compressed, counts(mask))[generator.integers(3)],
                }
            )
            objects[image_id].append((box, CATEGORIES.index(category)))
    categories = [{'id': category, 'name': str(category)} for category in sorted(CATEGORIES)]
    path.write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': categories}))
    return objects


def predict(objects, generator, height, width):
    """Objects moved a little, some of another class, and some that aren't there."""
    found = [(moved(box, generator, height, width), label) for box, label in objects for _ in range(2)]
    found += [(rectangle(generator, height, width), int(generator.integers(3))) for _ in range(generator.integers(4))]
    found = [(box, label if generator.random() < 0.8 else int(generator.integers(3))) for box, label in found]
    masks = [blob(height, width, box) for box, _ in found]
    scores = generator.choice(np.linspace(0.1, 0.9, 7), len(found))  # with ties
    order = np.argsort(-scores, kind='stable')
    return {
        'boxes': torch.tensor(np.array([found[i][0] for i in order]), dtype=torch.float32).reshape(-1, 4),
        'scores': torch.tensor(scores[order], dtype=torch.float32),
        'labels': torch.tensor([found[i][1] for i in order], dtype=torch.int64),
        'masks': torch.tensor(np.array([masks[i] for i in order])).reshape(-1, height, width),
    }


def metric_of(path, *iou_types, **kwargs):
    metric = CocoAP(iou_types, **kwargs)
    metric.dataset_meta = {'annotations': str(path), 'category_ids': CATEGORIES, 'classes': ['a', 'b', 'c']}
    return metric


def batches(predictions, size=2):
    ids = list(predictions)
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        sides = [SIDES[IMAGE_IDS.index(image_id)] for image_id in part]
        images = [torch.zeros(3, *side, dtype=torch.uint8) for side in sides]
        targets = [{'image_id': image_id, 'name': f'{image_id}.png'} for image_id in part]
        yield (images, targets), [predictions[image_id] for image_id in part]


def evaluate(metric, predictions, size=5):
    for batch, part in batches(predictions):
        metric.process(batch, part)
    return metric.evaluate(size)


@pytest.fixture(params=range(3))
def scenes(request, tmp_path):
    """A file of annotations, and predictions for each image."""
    objects = write_truth(tmp_path / 'truth.json', request.param)
    generator = np.random.default_rng(100 + request.param)
    predictions = {
        image_id: predict(objects[image_id], generator, *side) for image_id, side in zip(IMAGE_IDS, SIDES, strict=True)
    }
    return tmp_path / 'truth.json', predictions


def by_pycocotools(path, predictions, iou_type):
    """What pycocotools itself makes of them, each class by itself too."""
    entries = []
    for image_id, prediction in predictions.items():
        for box, score, label, mask in zip(
            *(prediction[key].numpy() for key in ('boxes', 'scores', 'labels', 'masks')), strict=True
        ):
            x0, y0, x1, y1 = box.astype(float)
            entry = {'image_id': image_id, 'category_id': CATEGORIES[label], 'score': float(score)}
            if iou_type == 'bbox':
                entry['bbox'] = [x0, y0, x1 - x0, y1 - y0]
            else:
                entry['segmentation'] = official_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            entries.append(entry)
    truth = official.COCO(str(path))
    results = truth.loadRes(entries)

    def run(categories):
        evaluation = COCOeval(truth, results, iou_type)
        evaluation.params.catIds = categories
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return [np.nan if value == -1 else 100 * value for value in evaluation.stats[:6]]

    return run(sorted(CATEGORIES)), [run([category]) for category in CATEGORIES]


@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
def test_it_gives_what_pycocotools_gives(scenes, iou_type):
    path, predictions = scenes
    metric = metric_of(path, iou_type)
    metrics = evaluate(metric, predictions)
    expected, by_class = by_pycocotools(path, predictions, iou_type)
    assert 5 < expected[0] < 95  # neither trivial
    assert list(metrics) == [f'{iou_type}_{name}' for name in NAMES]
    np.testing.assert_allclose(list(metrics.values()), expected, rtol=0, atol=1e-12)
    table = [[row[name] for name in NAMES] for row in metric.classes]
    np.testing.assert_allclose(table, by_class, rtol=0, atol=1e-12)


def test_several_types_are_those_by_themselves(scenes):
    path, predictions = scenes
    both = evaluate(metric_of(path, 'bbox', 'segm', 'boundary'), predictions)
    assert len(both) == 18
    for iou_type in ('bbox', 'segm', 'boundary'):
        own = evaluate(metric_of(path, iou_type), predictions)
        np.testing.assert_equal({name: both[name] for name in own}, own)
    assert both['boundary_AP'] < both['segm_AP']  # an IoU that is never greater


def perfect(path):
    stored = json.loads(path.read_text())
    predictions = {}
    truth = official.COCO(str(path))
    for image_id, side in zip(IMAGE_IDS, SIDES, strict=True):
        own = [a for a in stored['annotations'] if a['image_id'] == image_id and not a.get('iscrowd')]
        boxes = torch.tensor([a['bbox'] for a in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.array([truth.annToMask(a) for a in own]).reshape(-1, *side)
        predictions[image_id] = {
            'boxes': boxes,
            'scores': torch.ones(len(own)),
            'labels': torch.tensor([CATEGORIES.index(a['category_id']) for a in own], dtype=torch.int64),
            'masks': torch.tensor(masks, dtype=torch.bool),
        }
    return predictions


def test_the_truth_itself_reaches_100_and_nothing_0(scenes):
    path, _ = scenes
    predictions = perfect(path)
    metrics = evaluate(metric_of(path, 'bbox', 'segm', 'boundary'), predictions)
    assert len(metrics) == 18
    assert {value for value in metrics.values() if not np.isnan(value)} == {100.0}
    nothing = {
        image_id: {key: value[:0] for key, value in prediction.items()} for image_id, prediction in predictions.items()
    }
    metrics = evaluate(metric_of(path, 'bbox', 'segm', 'boundary'), nothing)
    assert len(metrics) == 18
    assert {value for value in metrics.values() if not np.isnan(value)} == {0.0}


def test_ids_from_zero_and_objects_without_area_are_no_trap(scenes):
    """pycocotools takes the object of id 0 for none, and fails without areas."""
    path, predictions = scenes
    stored = json.loads(path.read_text())
    truth = official.COCO(str(path))
    expected = {}
    for iou_type in ('bbox', 'segm'):
        for own in stored['annotations']:
            own['area'] = float(official_mask.area(truth.annToRLE(own)))
            if iou_type == 'bbox':
                own['area'] = own['bbox'][2] * own['bbox'][3]
        path.write_text(json.dumps(stored))
        expected |= evaluate(metric_of(path, iou_type), predictions)
    for number, own in enumerate(stored['annotations']):
        own['id'] = number
        del own['area']
    path.write_text(json.dumps(stored))
    np.testing.assert_equal(evaluate(metric_of(path, 'bbox', 'segm'), predictions), expected)


def test_broken_annotations_do_not_count(scenes):
    path, predictions = scenes
    expected = evaluate(metric_of(path, 'bbox', 'segm'), predictions)
    stored = json.loads(path.read_text())
    first = stored['annotations'][0]
    for change in ({'bbox': [0, 0, 5, 0]}, {'bbox': None}, {'category_id': 55}, {'image_id': 1000}):
        stored['annotations'].append({**first, 'id': 1000 + len(stored['annotations']), **change})
    path.write_text(json.dumps(stored))
    np.testing.assert_equal(evaluate(metric_of(path, 'bbox', 'segm'), predictions), expected)
    unseen = {'id': 999, 'iscrowd': 0, 'bbox': [0, 0, 2, 2], 'area': 4, 'segmentation': []}
    stored['annotations'].append({**first, **unseen})
    path.write_text(json.dumps(stored))
    assert evaluate(metric_of(path, 'segm'), predictions)['segm_AP'] == expected['segm_AP']
    assert evaluate(metric_of(path, 'bbox'), predictions)['bbox_AP'] < expected['bbox_AP']  # its box is whole


def test_sizes_that_no_object_has_have_no_figure(tmp_path):
    write_truth(tmp_path / 'truth.json', 0)
    stored = json.loads((tmp_path / 'truth.json').read_text())
    for own in stored['annotations']:
        own['area'] = 100.0
    (tmp_path / 'truth.json').write_text(json.dumps(stored))
    metrics = evaluate(metric_of(tmp_path / 'truth.json', 'bbox'), perfect(tmp_path / 'truth.json'))
    assert metrics['bbox_AP'] == metrics['bbox_APs'] == 100
    assert np.isnan([metrics['bbox_APm'], metrics['bbox_APl']]).all()


def test_images_that_come_twice_count_once(scenes):
    path, predictions = scenes
    expected = evaluate(metric_of(path, 'bbox', 'segm'), predictions)
    metric = metric_of(path, 'bbox', 'segm')
    for batch, part in batches({key: predictions[key] for key in IMAGE_IDS[:3]}):
        metric.process(batch, part)
    np.testing.assert_equal(evaluate(metric, predictions), expected)
    np.testing.assert_equal(evaluate(metric, predictions), expected)  # nothing is left of the first time


def evaluate_part(path, shares, results) -> None:
    """A process's share of the images, and what the metric makes of all."""
    with process_group():
        rank = torch.distributed.get_rank()
        predictions = torch.load(path.with_name('predictions.pth'))
        metric = metric_of(path, 'bbox', 'segm')
        metrics = evaluate(metric, {image_id: predictions[image_id] for image_id in shares[rank]})
        (results / f'{rank}.json').write_text(json.dumps(metrics))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='needs gloo')
@pytest.mark.parametrize('shares', [([12, 139, 60], [5, 4, 12]), ([60, 4, 5, 139], [12])], ids=['padded', 'uneven'])
def test_two_processes_give_what_one_gives(tmp_path, shares):
    objects = write_truth(tmp_path / 'truth.json', 0)
    generator = np.random.default_rng(7)
    predictions = {
        image_id: predict(objects[image_id], generator, *side) for image_id, side in zip(IMAGE_IDS, SIDES, strict=True)
    }
    torch.save(predictions, tmp_path / 'predictions.pth')
    expected = evaluate(metric_of(tmp_path / 'truth.json', 'bbox', 'segm'), predictions)
    assert launch(evaluate_part, tmp_path / 'truth.json', shares, tmp_path, world=2) == [0, 0]
    for rank in range(2):
        np.testing.assert_equal(json.loads((tmp_path / f'{rank}.json').read_text()), expected)


def test_images_that_do_not_come_are_named(scenes):
    path, predictions = scenes
    some = {key: predictions[key] for key in IMAGE_IDS[1:4]}
    metric = metric_of(path, 'bbox')
    with pytest.raises(ValueError, match=r'2 images: 12 \(000012.png\), 60 \(000060.png\), of 5'):
        evaluate(metric, some)
    metric.dataset_meta = {**metric.dataset_meta, 'image_ids': IMAGE_IDS[1:4]}  # a dataset that has no more
    assert evaluate(metric, some, 3)['bbox_AP'] > 0
    with pytest.raises(ValueError, match=r'Not of .*truth.json are 2 images: 12'):
        evaluate(metric, predictions)


def test_results_are_written_as_coco_takes_them(scenes, tmp_path, capsys):
    path, predictions = scenes
    metric = metric_of(path, 'bbox', 'segm', out=tmp_path / 'out', per_class=True)
    metrics = evaluate(metric, predictions)
    assert {file.name for file in (tmp_path / 'out').iterdir()} == {
        'bbox.json',
        'bbox_classes.csv',
        'segm.json',
        'segm_classes.csv',
    }
    for iou_type in ('bbox', 'segm'):
        truth = official.COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / 'out' / f'{iou_type}.json')), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert 100 * evaluation.stats[0] == pytest.approx(metrics[f'{iou_type}_AP'], abs=1e-12)
    rows = list(csv.DictReader((tmp_path / 'out' / 'segm_classes.csv').open()))
    assert [row['class'] for row in rows] == ['a', 'b', 'c']
    means = [float(row['AP']) for row in rows if row['AP']]
    assert np.mean(means) == pytest.approx(metrics['segm_AP'], abs=0.01)
    assert 'bbox AP of each class' in capsys.readouterr().out


def test_masks_are_encoded_as_pycocotools_does():
    generator = np.random.default_rng(0)
    masks = torch.tensor(generator.random((3, 17, 23)) < 0.4)
    for given in (masks, masks.to(torch.uint8), masks.transpose(1, 2).contiguous().transpose(1, 2)):
        assert encode_masks(given) == official_mask.encode(
            np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))
        )
    assert encode_masks(masks[:0]) == []


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'labels': torch.tensor([0, 3])}, 'Labels must be from 0 to 2, got 0 to 3 in 5.png'),
        ({'scores': torch.tensor([0.5, float('nan')])}, 'in image 5.png are not finite'),
        ({'boxes': torch.zeros(3, 4)}, r'Expected boxes \(N, 4\).* of image 5.png'),
        ({'masks': None}, 'segm need masks'),
        ({'masks': torch.zeros(2, 61, 45, dtype=torch.bool)}, r'Expected masks \(2, 45, 61\)'),
    ],
)
def test_predictions_that_do_not_fit_are_refused(tmp_path, change, message):
    prediction = {
        'boxes': torch.tensor([[0.0, 0, 4, 4], [1, 1, 7, 9]]),
        'scores': torch.tensor([0.5, 0.4]),
        'labels': torch.tensor([0, 2]),
        'masks': torch.zeros(2, 45, 61, dtype=torch.bool),
    }
    metric = metric_of(tmp_path / 'none.json', 'segm')
    batch = [torch.zeros(3, 45, 61)], [{'image_id': 5, 'name': '5.png'}]
    metric.process(batch, [prediction])
    with pytest.raises(ValueError, match=message):
        metric.process(batch, [{**prediction, **change}])


def test_what_is_missing_is_said(monkeypatch):
    assert isinstance(METRICS.build({'type': 'CocoAP', 'iou_types': 'segm'}), CocoAP)
    for iou_types in ((), ('bbox', 'masks')):
        with pytest.raises(ValueError, match='iou_types must be some of bbox, segm, boundary'):
            CocoAP(iou_types)
    metric = CocoAP()
    metric.dataset_meta = {'classes': ['a']}
    with pytest.raises(ValueError, match=r"needs 'annotations' in the dataset's metainfo, which has .'classes'"):
        metric.evaluate(0)
    monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
    with pytest.raises(ImportError, match=r'pip install attention-zoo\[dense\]'):
        encode_masks(torch.ones(1, 2, 2))
