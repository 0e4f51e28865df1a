import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('sklearn.datasets')
pytest.importorskip('faster_coco_eval')

from killing import launch
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from zoo.train.dense import scenes
from zoo.train.dense.coco_metric import CocoAP
from zoo.train.dense.iou_metric import MeanIoU
from zoo.train.dense.task import collate
from zoo.train.distributed import process_group
from zoo.train.registry import DATASETS

TRAIN, TEST = 12, 7


@pytest.fixture(scope='module')
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8), labels


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return scenes.write(tmp_path_factory.mktemp('data') / 'scenes', TRAIN, TEST)


def test_a_scene_depends_on_its_split_index_and_seed_alone(digits):
    first = scenes.make_scene(*digits, 'train', 3, seed=5)
    again = scenes.make_scene(*digits, 'train', 3, seed=5)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)
    assert first.labels == again.labels
    for other in (('test', 3, 5), ('train', 4, 5), ('train', 3, 6)):
        assert not np.array_equal(scenes.make_scene(*digits, *other).class_map, first.class_map)


def test_masks_are_the_visible_pixels(digits, monkeypatch):
    """The digits of a scene, pasted one after another by a second hand."""
    calls = []
    place = scenes._place

    def watched(generator, owner, mask, areas):
        found = place(generator, owner, mask, areas)
        if found is not None:
            calls.append((found, mask.copy()))
        return found

    monkeypatch.setattr(scenes, '_place', watched)
    hidden = 0
    for index in range(30):
        calls.clear()
        scene = scenes.make_scene(*digits, 'train', index)
        height, width = scene.image.shape[:2]
        assert all(112 <= side <= 160 for side in (height, width))
        assert len(scene.labels) == len(calls) <= 6
        assert scene.masks.sum(axis=0).max() <= 1
        top = np.zeros((height, width), int)
        for number, (where, mask) in enumerate(calls, start=1):
            top[where][mask] = number
        for number, (_, mask) in enumerate(calls, start=1):
            assert np.array_equal(scene.masks[number - 1], top == number)
            assert scene.masks[number - 1].sum() >= 0.6 * mask.sum()  # none is hidden
            hidden += scene.masks[number - 1].sum() < mask.sum()
    assert hidden > 3  # some do overlap


def test_boxes_and_class_maps_are_those_of_the_masks(digits):
    scene = scenes.make_scene(*digits, 'test', 0)
    for (x0, y0, x1, y1), mask, label in zip(scene.boxes, scene.masks, scene.labels, strict=True):
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert all(edge.any() for edge in (mask[y0, x0:x1], mask[y1 - 1, x0:x1], mask[y0:y1, x0], mask[y0:y1, x1 - 1]))
        assert (scene.class_map[mask] == 1 + label).all()
    assert (scene.class_map[~scene.masks.any(axis=0)] == 0).all()


def test_pixels_of_digits_are_told_from_their_canvas(digits):
    """By colour: the mean distance of a digit's pixels from those around it."""
    for index in range(20):
        scene = scenes.make_scene(*digits, 'train', index)
        canvas = scene.image[scene.class_map == 0].astype(float).mean(axis=0)
        for mask in scene.masks:
            assert np.linalg.norm(scene.image[mask].mean(axis=0) - canvas) > 50


def test_a_digit_keeps_the_pixels_of_the_scan(digits):
    """Averaged back to 8x8 it is the digit that was enlarged."""
    for number in range(0, 100, 7):
        image = digits[0][number] / 16
        enlarged = scenes._enlarged(image, 48, 40)
        back = enlarged.reshape(8, 6, 8, 5).mean(axis=(1, 3))
        assert np.corrcoef(back.ravel(), image.ravel())[0, 1] > 0.98
    ramp = scenes._enlarged(np.arange(8.0)[None].repeat(8, axis=0), 16, 24)
    np.testing.assert_allclose(np.diff(ramp[0, 8:-8]), 1 / 3, atol=1e-12)  # linear in between


def test_test_scenes_have_other_digits(digits, tmp_path, monkeypatch):
    seen = {}

    def make(images, labels, split, index, seed):
        seen[split] = images, labels
        return scene(images, labels, split, index, seed)

    scene = scenes.make_scene
    monkeypatch.setattr(scenes, 'make_scene', make)
    scenes.write(tmp_path / 'scenes', 1, 1)
    assert np.array_equal(seen['train'][0], digits[0][:1200])
    assert np.array_equal(seen['test'][1], digits[1][1200:])


def test_the_folder_is_coco_and_class_maps(folder, digits):
    assert sorted(path.name for path in folder.iterdir()) == ['annotations', 'images', 'masks', 'scenes.json']
    for split, count in (('train', TRAIN), ('test', TEST)):
        for kind in ('images', 'masks'):
            names = sorted(path.name for path in (folder / kind / split).iterdir())
            assert names == [f'{i:05}.png' for i in range(count)]
    part = [values[1200:] for values in digits]
    scene = scenes.make_scene(*part, 'test', 4)
    assert np.array_equal(np.asarray(Image.open(folder / 'images' / 'test' / '00004.png')), scene.image)
    assert np.array_equal(np.asarray(Image.open(folder / 'masks' / 'test' / '00004.png')), scene.class_map)


def test_pycocotools_reads_the_same_masks(folder, digits):
    coco = pytest.importorskip('pycocotools.coco').COCO(str(folder / 'annotations' / 'train.json'))
    part = [values[:1200] for values in digits]
    for index in range(TRAIN):
        scene = scenes.make_scene(*part, 'train', index)
        objects = coco.loadAnns(coco.getAnnIds(imgIds=[index + 1]))
        assert [own['category_id'] for own in objects] == [1 + label for label in scene.labels]
        for own, mask, (x0, y0, x1, y1) in zip(objects, scene.masks, scene.boxes.tolist(), strict=True):
            assert np.array_equal(coco.annToMask(own).astype(bool), mask)
            assert own['bbox'] == [x0, y0, x1 - x0, y1 - y0]
            assert own['area'] == mask.sum()


def test_runs_begin_with_unset_pixels():
    assert scenes._runs(np.array([[1, 0], [1, 1]], bool)) == [0, 2, 1, 1]
    assert scenes._runs(np.array([[0, 0, 1]], bool)) == [2, 1]
    assert scenes._runs(np.zeros((2, 2), bool)) == [4]


def test_writing_again_changes_nothing(folder):
    times = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    assert scenes.write(folder, TRAIN, TEST) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == times
    assert [path.name for path in folder.parent.iterdir()] == ['scenes']


def test_other_scenes_are_not_taken_for_these(folder, tmp_path):
    with pytest.raises(FileExistsError, match=r"has the scenes of .*'seed': 0.*, not of .*'seed': 1"):
        scenes.write(folder, TRAIN, TEST, seed=1)
    (tmp_path / 'mine.txt').write_text('')
    with pytest.raises(FileExistsError, match='not a folder of scenes'):
        scenes.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']
    with pytest.raises(ValueError, match='test must be a positive number of scenes, got 0'):
        scenes.write(tmp_path / 'new', test=0)


def test_an_interrupted_run_leaves_no_folder(tmp_path, monkeypatch):
    def fail(self, path):
        if '00002' in str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, 'save', fail)
    with pytest.raises(KeyboardInterrupt):
        scenes.write(tmp_path / 'scenes', 5, 1)
    assert not list(tmp_path.iterdir())


def test_runs_at_the_same_time_both_succeed(tmp_path):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(scenes.write(tmp_path / 'scenes', 3, 1))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / 'scenes'] * 2
    assert [path.name for path in tmp_path.iterdir()] == ['scenes']


class Oracle(BaseModel):
    """Predicts the truth of the images that it remembers."""

    def __init__(self, *datasets):
        super().__init__()
        self.known = {}
        for image, target in (sample for dataset in datasets for sample in dataset):
            found = {key: value.as_subclass(torch.Tensor) for key, value in target.items() if hasattr(value, 'dtype')}
            if 'mask' in found:
                found['mask'] = found['mask'].long()
            else:
                found.update(scores=torch.ones(len(found['labels'])), masks=found['masks'].bool())
            self.known[image.numpy().tobytes()] = found

    def forward(self, images, targets, mode):
        return [self.known[image.numpy().tobytes()] for image in images]


def validate(data, work_dir, kind, metric) -> None:
    """mmengine's validation of a model on test scenes; an odd number of them on two processes."""
    dataset = {'type': kind, 'root': str(data), 'split': 'test', 'train': TRAIN, 'test': TEST}
    with process_group():
        init_default_scope('zoo')
        rank = torch.distributed.get_rank()
        runner = Runner(
            model=Oracle(DATASETS.build(dataset)),
            work_dir=str(work_dir),
            val_dataloader={
                'dataset': dataset,
                'batch_size': 3,
                'num_workers': 0,
                'sampler': {'type': 'DefaultSampler', 'shuffle': False},
                'collate_fn': {'type': 'zoo.collate'},
            },
            val_evaluator=metric,
            val_cfg={},
            custom_hooks=[{'type': 'DensePictures', 'count': 2}],
            default_scope='zoo',
            log_level='ERROR',
            experiment_name=f'{work_dir.name} {rank}',
        )
        runner._launcher = 'pytorch'
        metrics = runner.val()
        (work_dir / f'{rank}.json').write_text(json.dumps(metrics))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='needs gloo')
@pytest.mark.parametrize(
    ('kind', 'metric', 'name'),
    [
        ('DigitScenes', {'type': 'CocoAP', 'iou_types': ['bbox', 'segm']}, 'segm_AP'),
        ('DigitSceneMasks', {'type': 'MeanIoU'}, 'mIoU'),
    ],
)
def test_a_validation_by_two_processes_of_a_model_that_knows_all(folder, tmp_path, kind, metric, name):
    assert launch(validate, folder, tmp_path, kind, metric, world=2) == [0, 0]
    for rank in range(2):
        assert json.loads((tmp_path / f'{rank}.json').read_text())[name] == 100
    with Image.open(tmp_path / 'predictions.png') as picture:
        assert min(picture.size) > 300


def build(kind, root, **kwargs):
    init_default_scope('zoo')
    return DATASETS.build({'type': kind, 'root': str(root), 'train': TRAIN, 'test': TEST, **kwargs})


@pytest.mark.parametrize(('kind', 'extra'), [('DigitScenes', []), ('DigitSceneMasks', ['background'])])
def test_datasets_write_what_they_read(tmp_path, kind, extra):
    dataset = build(kind, tmp_path / 'scenes', split='train')
    assert dataset.metainfo['classes'] == [*extra, *'0123456789']
    assert len(dataset) == TRAIN
    with pytest.raises(ValueError, match='split must be one of train, test'):
        build(kind, tmp_path / 'scenes', split='val')


def test_samples_for_detection_are_the_scenes(folder, digits):
    dataset = build('DigitScenes', folder, split='test')
    assert len(dataset) == TEST
    scene = scenes.make_scene(*(values[1200:] for values in digits), 'test', 2)
    image, target = dataset[2]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), scene.image)
    assert np.array_equal(target['boxes'].numpy(), scene.boxes)
    assert np.array_equal(target['masks'].numpy().astype(bool), scene.masks)
    assert target['labels'].tolist() == scene.labels


def test_samples_for_segmentation_are_the_scenes(folder, digits):
    dataset = build('DigitSceneMasks', folder, split='test')
    assert len(dataset) == TEST
    scene = scenes.make_scene(*(values[1200:] for values in digits), 'test', 2)
    image, target = dataset[2]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), scene.image)
    assert np.array_equal(target['mask'].numpy(), scene.class_map)
    assert target['name'] == '00002.png'


def test_the_truth_predicted_reaches_100_miou(folder):
    dataset = build('DigitSceneMasks', folder, split='test')
    metric = MeanIoU(boundary=True)
    metric.dataset_meta = dataset.metainfo
    for images, targets in DataLoader(dataset, batch_size=3, collate_fn=collate):
        metric.process((images, targets), [{'mask': target['mask'].long()} for target in targets])
    assert metric.evaluate(len(dataset)) == {'mIoU': 100.0, 'mAcc': 100.0, 'aAcc': 100.0, 'boundary_mIoU': 100.0}


def test_the_truth_predicted_reaches_100_ap(folder):
    dataset = build('DigitScenes', folder, split='test')
    metric = CocoAP(('bbox', 'segm'))
    metric.dataset_meta = dataset.metainfo
    for images, targets in DataLoader(dataset, batch_size=3, collate_fn=collate):
        predictions = [
            {
                'boxes': target['boxes'].as_subclass(torch.Tensor),
                'scores': torch.ones(len(target['labels'])),
                'labels': target['labels'],
                'masks': target['masks'].as_subclass(torch.Tensor).bool(),
            }
            for target in targets
        ]
        metric.process((images, targets), predictions)
    metrics = metric.evaluate(len(dataset))
    assert {name for name, value in metrics.items() if value == 100} >= {'bbox_AP', 'segm_AP', 'bbox_APs', 'segm_AP75'}
    assert all(value == 100 or np.isnan(value) for value in metrics.values())
    assert json.loads((folder / 'scenes.json').read_text())['test'] == len(dataset)
