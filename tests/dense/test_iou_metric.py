import csv
import json

import numpy as np
import pytest
import torch
from killing import launch
from scipy import ndimage
from torchvision import tv_tensors

from zoo.train.dense.iou_metric import MeanIoU, boundaries, confusion_matrix, reduce_zero_label
from zoo.train.distributed import process_group
from zoo.train.registry import METRICS

CLASSES = ['sky', 'road', 'tree', 'house', 'sea']
ABSENT, ONLY_PREDICTED = 3, 4
SIDES = ((37, 52), (64, 41), (50, 50), (33, 81), (120, 90))


def class_map(generator, height, width, choice):
    """Patches of classes, smoothed so that there are contours."""
    cells = generator.choice(choice, (height // 7 + 1, width // 9 + 1))
    return np.kron(cells, np.ones((7, 9), int))[:height, :width]


@pytest.fixture(scope='module')
def maps():
    """(labels, predictions) of five images: one class is nowhere, one only predicted."""
    generator = np.random.default_rng(0)
    pairs = []
    for height, width in SIDES:
        labels = class_map(generator, height, width, [0, 1, 2, 255])
        predictions = np.where(generator.random((height, width)) < 0.7, labels, class_map(generator, height, width, 3))
        predictions[labels == 255] = generator.choice([0, 1, 4])
        predictions[:3, :5] = ONLY_PREDICTED
        pairs.append((labels, predictions))
    pairs[2] = (np.full_like(pairs[2][0], 255), pairs[2][1])  # an image of which nothing counts
    return pairs


def metric_of(**kwargs):
    metric = MeanIoU(**kwargs)
    metric.dataset_meta = {'classes': CLASSES}
    return metric


def process(metric, pairs, indices):
    images = [torch.zeros(3, *pairs[i][0].shape, dtype=torch.uint8) for i in indices]
    targets = [{'name': f'{i}.png', 'mask': tv_tensors.Mask(torch.tensor(pairs[i][0]))} for i in indices]
    metric.process((images, targets), [{'mask': torch.tensor(pairs[i][1])} for i in indices])


def evaluate(metric, pairs, indices=range(5)):
    for part in np.array_split(list(indices), 2):
        process(metric, pairs, part)
    return metric.evaluate(5)


def by_hand(pairs):
    """IoU, accuracy of each class, and the share of right pixels, counted pixel by pixel."""
    intersection, union, right, labelled = (dict.fromkeys(range(5), 0) for _ in range(4))
    for labels, predictions in pairs:
        for label, prediction in zip(labels.ravel().tolist(), predictions.ravel().tolist(), strict=True):
            if label == 255:
                continue
            labelled[label] += 1
            right[label] += label == prediction
            for i in {label, prediction}:
                union[i] += 1
                intersection[i] += label == prediction
    iou = [intersection[i] / union[i] for i in range(5) if union[i]]
    accuracy = [right[i] / labelled[i] for i in range(5) if labelled[i]]
    return {
        'mIoU': 100 * np.mean(iou),
        'mAcc': 100 * np.mean(accuracy),
        'aAcc': 100 * sum(right.values()) / sum(labelled.values()),
    }


def test_it_is_what_is_counted_by_hand(maps):
    metric = metric_of()
    metrics = evaluate(metric, maps)
    assert metrics == pytest.approx(by_hand(maps), abs=1e-12)
    assert 20 < metrics['mIoU'] < 80
    rows = {row['class']: row for row in metric.classes}
    absent, predicted = rows[CLASSES[ABSENT]], rows[CLASSES[ONLY_PREDICTED]]
    assert np.isnan([absent['IoU'], absent['accuracy'], predicted['accuracy']]).all()  # left out of means
    assert predicted['IoU'] == 0  # in the mean


def test_it_pools_the_pixels_of_all_images(maps):
    """The mean of the images' own figures is something else."""
    alone = []
    for i in (0, 1, 3, 4):
        metric = metric_of()
        process(metric, maps, [i])
        alone.append(metric.evaluate(1)['mIoU'])
    assert abs(np.mean(alone) - evaluate(metric_of(), maps)['mIoU']) > 0.1


def test_the_definition_on_a_map_of_four_pixels():
    matrix = confusion_matrix(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [1, 255]]), 2)
    assert matrix.tolist() == [[1, 1], [0, 1]]
    metric = metric_of()
    pairs = {0: (np.array([[0, 0], [1, 255]]), np.array([[0, 1], [1, 1]]))}
    process(metric, pairs, [0])
    assert metric.evaluate(1) == pytest.approx({'mIoU': 50.0, 'mAcc': 75.0, 'aAcc': 200 / 3})


def test_the_truth_itself_reaches_100(maps):
    labels = [(own, np.where(own == 255, 0, own)) for own, _ in maps]
    metrics = evaluate(metric_of(boundary=True), labels)
    assert metrics == {'mIoU': 100.0, 'mAcc': 100.0, 'aAcc': 100.0, 'boundary_mIoU': 100.0}


def test_nothing_that_counts_gives_no_figure():
    metric = metric_of(boundary=True)
    process(metric, {0: (np.full((9, 8), 255), np.zeros((9, 8), int))}, [0])
    metrics = metric.evaluate(1)
    assert set(metrics) == {'mIoU', 'mAcc', 'aAcc', 'boundary_mIoU'}
    assert np.isnan(list(metrics.values())).all()


def test_the_label_zero_can_stand_for_none(maps):
    stored = [(np.where(labels == 255, 0, labels + 1), predictions) for labels, predictions in maps]
    assert evaluate(metric_of(reduce_zero_label=True), stored) == evaluate(metric_of(), maps)
    reduced = reduce_zero_label(torch.tensor([0, 1, 150, 255], dtype=torch.uint8))
    assert reduced.tolist() == [255, 0, 149, 255]


def test_another_label_can_be_ignored(maps):
    other = [(np.where(labels == 255, -1, labels), predictions) for labels, predictions in maps]
    boundary = {'boundary': True}
    assert evaluate(metric_of(ignore_index=-1, **boundary), other) == evaluate(metric_of(**boundary), maps)


def eroded(mask, distance):
    """The mask without its boundary, as the authors' code has it: 3x3 erosions, nothing beyond the border."""
    return ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=0)


@pytest.mark.parametrize(('height', 'width', 'ratio'), [(37, 52, 0.02), (120, 90, 0.02), (64, 41, 0.1), (9, 5, 0.5)])
def test_boundaries_are_what_erosion_takes_away(height, width, ratio):
    generator = np.random.default_rng(1)
    mask = class_map(generator, height, width, 2).astype(bool)
    distance = max(1, round(ratio * np.hypot(height, width)))
    found = boundaries(torch.tensor(np.stack([mask, ~mask])), ratio).numpy()
    for own, boundary in zip((mask, ~mask), found, strict=True):
        assert np.array_equal(boundary, own & ~eroded(own, distance))


def test_boundary_iou_is_that_of_the_boundaries(maps):
    sums = np.zeros((2, 5))
    for labels, predictions in maps:
        predictions = np.where(labels == 255, 255, predictions)
        distance = max(1, round(0.02 * np.hypot(*labels.shape)))
        for i in range(5):
            true, found = (own & ~eroded(own, distance) for own in (labels == i, predictions == i))
            sums[:, i] += (true & found).sum(), (true | found).sum()
    expected = 100 * np.mean(sums[0, sums[1] > 0] / sums[1, sums[1] > 0])
    metric = metric_of(boundary=True)
    metrics = evaluate(metric, maps)
    assert metrics['boundary_mIoU'] == pytest.approx(expected, abs=1e-12)
    assert {name: metrics[name] for name in ('mIoU', 'mAcc', 'aAcc')} == evaluate(metric_of(), maps)
    assert np.isnan(metric.classes[ABSENT]['boundary IoU'])


def test_contours_that_are_off_cost_more_at_the_boundary():
    labels = np.zeros((200, 200), int)
    labels[50:150, 50:150] = 1
    predictions = np.roll(labels, 4, axis=1)
    metric = metric_of(boundary=True)
    process(metric, {0: (labels, predictions)}, [0])
    metrics = metric.evaluate(1)
    assert metrics['mIoU'] > 90
    assert metrics['boundary_mIoU'] < 80


def evaluate_part(folder, shares) -> None:
    with process_group():
        rank = torch.distributed.get_rank()
        pairs = torch.load(folder / 'maps.pth', weights_only=False)
        metrics = evaluate(metric_of(boundary=True), pairs, shares[rank])
        (folder / f'{rank}.json').write_text(json.dumps(metrics))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='needs gloo')
@pytest.mark.parametrize('shares', [([0, 2, 4], [1, 3, 0]), ([3, 1, 4, 2], [0])], ids=['padded', 'uneven'])
def test_two_processes_give_what_one_gives(maps, tmp_path, shares):
    torch.save(maps, tmp_path / 'maps.pth')
    assert launch(evaluate_part, tmp_path, shares, world=2) == [0, 0]
    expected = evaluate(metric_of(boundary=True), maps)
    for rank in range(2):
        assert json.loads((tmp_path / f'{rank}.json').read_text()) == expected


def lose_an_image(folder) -> None:
    with process_group():
        rank = torch.distributed.get_rank()
        metric = metric_of()
        process(metric, torch.load(folder / 'maps.pth', weights_only=False), [0, 1] if rank else [2, 3])
        try:
            metric.evaluate(5)
        except (ValueError, RuntimeError) as error:
            (folder / f'{rank}.txt').write_text(str(error))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='needs gloo')
def test_a_lost_image_is_an_error_of_every_process(maps, tmp_path):
    torch.save(maps, tmp_path / 'maps.pth')
    assert launch(lose_an_image, tmp_path, world=2) == [0, 0]
    for rank in range(2):
        assert 'has 5 images, but there are results of 4' in (tmp_path / f'{rank}.txt').read_text()


def test_images_that_come_twice_count_once(maps):
    metric = metric_of()
    process(metric, maps, [3, 0])
    assert evaluate(metric, maps) == evaluate(metric_of(), maps)


def test_the_table_of_classes_is_printed_and_written(maps, tmp_path, capsys):
    metric = METRICS.build({'type': 'MeanIoU', 'per_class': True, 'out': tmp_path / 'out', 'boundary': True})
    metric.dataset_meta = {'classes': CLASSES}
    metrics = evaluate(metric, maps)
    rows = list(csv.DictReader((tmp_path / 'out' / 'classes.csv').open()))
    assert [row['class'] for row in rows] == CLASSES
    assert list(rows[0]) == ['class', 'IoU', 'accuracy', 'boundary IoU', 'pixels']
    assert (rows[ABSENT]['IoU'], rows[ABSENT]['pixels']) == ('', '0')
    assert np.mean([float(row['IoU']) for row in rows if row['IoU']]) == pytest.approx(metrics['mIoU'], abs=0.01)
    assert sum(int(row['pixels']) for row in rows) == sum((labels != 255).sum() for labels, _ in maps)
    printed = capsys.readouterr().out
    assert all(name in printed for name in CLASSES)


@pytest.mark.parametrize(
    ('labels', 'prediction', 'message'),
    [
        (torch.zeros(4, 5), torch.zeros(4, 4), r'7.png: Expected a prediction \(4, 5\), got \(4, 4\)'),
        (torch.full((4, 5), 5), torch.zeros(4, 5), '7.png: Classes must be from 0 to 4, got 5 to 5'),
        (torch.zeros(4, 5), torch.full((4, 5), 255), '7.png: Predicted classes must be from 0 to 4'),
    ],
)
def test_maps_that_do_not_fit_are_refused(labels, prediction, message):
    with pytest.raises(ValueError, match=message):
        metric_of().process(([None], [{'name': '7.png', 'mask': labels.long()}]), [{'mask': prediction.long()}])


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match='dilation_ratio must be between 0 and 1'):
        MeanIoU(dilation_ratio=2)
    with pytest.raises(ValueError, match="MeanIoU needs 'classes'"):
        MeanIoU().compute_metrics([])
