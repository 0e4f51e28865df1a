import json
import pickle
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from zoo.train.data import BrokenImages
from zoo.train.dense.annotations import AnnotationError, check_coco
from zoo.train.dense.coco import CocoInstances, decode_masks, predictions_to_coco, read_coco, write_coco
from zoo.train.dense.task import collate
from zoo.train.images import ImageError
from zoo.train.registry import DATASETS

pytest.importorskip('faster_coco_eval')
official_mask = pytest.importorskip('pycocotools.mask')
COCO = pytest.importorskip('pycocotools.coco').COCO
COCOeval = pytest.importorskip('pycocotools.cocoeval').COCOeval

SIDES = {9: (48, 64), 4: (40, 50), 25: (33, 70), 7: (20, 60)}  # height and width by image id, in the file's order
CATEGORIES = [{'id': 3, 'name': 'car'}, {'id': 1, 'name': 'person'}, {'id': 90, 'name': 'toothbrush'}]
SQUARE = [[10, 5, 30, 5, 30, 20, 10, 20]]


def rectangle(height, width, top, left, bottom, right):
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def run_lengths(mask):
    """Uncompressed, as COCO's crowds are: down the columns, the first of background."""
    flat = mask.T.reshape(-1).astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {'size': [*mask.shape], 'counts': [0, *runs] if flat[0] else runs}


def compressed(mask):
    encoded = official_mask.encode(np.asfortranarray(mask))
    return {'size': encoded['size'], 'counts': encoded['counts'].decode()}


def an_object(number, image_id, category_id, box, segmentation, **more):
    return {'id': number, 'image_id': image_id, 'category_id': category_id, 'bbox': box, 'iscrowd': 0} | {
        'segmentation': segmentation,
        'area': box[2] * box[3],
        **more,
    }


def content_of(sides):
    return {
        'info': {'description': 'hand-written'},
        'images': [
            {'id': number, 'file_name': f'part/{number:012}.png', 'height': height, 'width': width}
            for number, (height, width) in sides.items()
        ],
        'annotations': [
            an_object(1, 4, 1, [2.5, 3, 10, 20.25], run_lengths(rectangle(40, 50, 3, 2, 24, 13))),
            an_object(5, 9, 90, [10, 5, 20, 15], SQUARE),
            an_object(2, 9, 3, [-0.4, 30, 20.4, 18.5], compressed(rectangle(48, 64, 30, 0, 48, 20))),
            an_object(3, 9, 1, [0, 0, 64, 48], run_lengths(rectangle(48, 64, 0, 0, 48, 64)), iscrowd=1),
            an_object(8, 4, 3, [20, 20, 30, 20], [[20, 20, 50, 20, 50, 40], [20, 30, 30, 30, 30, 40, 20, 40]]),
            an_object(9, 7, 3, [0, 0, 5, 5], [[0, 0, 5, 0, 5, 5, 0, 5]]),
        ],
        'categories': CATEGORIES,
    }


@pytest.fixture
def coco(tmp_path):
    """A folder of four images, of which one is small and one without objects, and the path of their annotations."""
    content = content_of(SIDES)
    generator = np.random.default_rng(0)
    (tmp_path / 'images' / 'part').mkdir(parents=True)
    for image in content['images']:
        pixels = generator.integers(0, 256, (image['height'], image['width'], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'images' / image['file_name'])
    (tmp_path / 'instances.json').write_text(json.dumps(content))
    return tmp_path / 'images', tmp_path / 'instances.json'


@pytest.fixture
def change(coco):
    """Change the content of the annotation file by a function of it."""

    def apply(function):
        content = json.loads(coco[1].read_text())
        function(content)
        coco[1].write_text(json.dumps(content))

    return apply


def of_name(dataset, number):
    (found,) = [sample for sample in dataset if sample[1]['image_id'] == number]
    return found


# Reading


def test_samples_are_those_of_the_contract(coco):
    dataset = CocoInstances(*coco, training=False)
    assert len(dataset) == 4
    image, target = dataset[0]
    assert type(image) is torch.Tensor
    assert (image.dtype, image.shape) == (torch.uint8, (3, 48, 64))
    assert torch.equal(image, torch.from_numpy(np.array(Image.open(coco[0] / target['name']))).permute(2, 0, 1))
    assert (target['name'], target['image_id']) == ('part/000000000009.png', 9)
    assert isinstance(target['boxes'], tv_tensors.BoundingBoxes)
    assert (target['boxes'].dtype, target['boxes'].canvas_size) == (torch.float32, (48, 64))
    assert target['boxes'].tolist() == [
        [10, 5, 30, 20],
        [0, 30, 20, 48],
        [0, 0, 64, 48],
    ]  # clipped: a pixel is rounding
    assert target['labels'].dtype == torch.int64
    assert target['labels'].tolist() == [2, 0, 1]
    assert target['crowd'].tolist() == [False, False, True]
    assert isinstance(target['masks'], tv_tensors.Mask)
    assert target['masks'].dtype == torch.uint8


def test_polygons_and_both_kinds_of_run_lengths_give_the_same_masks_as_cocos_own_code(coco):
    official = COCO(coco[1])
    dataset = CocoInstances(*coco, training=False)
    for _, target in dataset:
        own = official.loadAnns(official.getAnnIds(imgIds=target['image_id']))
        assert len(own) == len(target['masks'])
        for mask, annotation in zip(target['masks'], own, strict=True):
            assert np.array_equal(mask.numpy(), official.annToMask(annotation))
    assert np.array_equal(dataset[0][1]['masks'][0].numpy(), rectangle(48, 64, 5, 10, 20, 30))


def test_labels_follow_the_files_order_of_categories_whatever_their_ids(coco):
    dataset = CocoInstances(*coco)
    assert dataset.metainfo == {
        'classes': ['car', 'person', 'toothbrush'],
        'category_ids': [3, 1, 90],
        'annotations': str(coco[1]),
    }


def test_training_leaves_out_crowds_images_without_objects_and_small_ones(coco):
    dataset = CocoInstances(*coco)
    assert [target['image_id'] for _, target in dataset] == [9, 4]
    _, target = dataset[0]
    assert target['labels'].tolist() == [2, 0]
    assert len(target['masks']) == 2
    assert 'crowd' not in target
    everything = CocoInstances(*coco, filter_empty=False, min_size=1)
    assert [target['image_id'] for _, target in everything] == [9, 4, 25, 7]
    _, empty = everything[2]
    assert empty['boxes'].shape == (0, 4)
    assert empty['masks'].shape == (0, 33, 70)


def test_categories_may_be_chosen_in_an_order_of_ones_own(coco):
    dataset = CocoInstances(*coco, categories=['toothbrush', 'car'])
    assert dataset.metainfo['classes'] == ['toothbrush', 'car']
    assert dataset.metainfo['category_ids'] == [90, 3]
    assert of_name(dataset, 9)[1]['labels'].tolist() == [0, 1]
    assert of_name(dataset, 4)[1]['labels'].tolist() == [1]
    assert [target['image_id'] for _, target in CocoInstances(*coco, categories=['toothbrush'])] == [9]
    with pytest.raises(ValueError, match=r"no category 'tothbrush'\. Near: toothbrush"):
        CocoInstances(*coco, categories=['tothbrush'])
    with pytest.raises(ValueError, match='different categories'):
        CocoInstances(*coco, categories=['car', 'car'])


def test_masks_may_be_left_out(coco, change):
    change(lambda content: [own.pop('segmentation') for own in content['annotations']])
    dataset = CocoInstances(*coco, masks=False)
    assert set(dataset[0][1]) == {'name', 'image_id', 'boxes', 'labels'}


def test_missing_dependency_is_named(coco, monkeypatch):
    monkeypatch.setitem(sys.modules, 'faster_coco_eval.core', None)
    with pytest.raises(ImportError, match=r'pip install attention-zoo\[dense\]'):
        CocoInstances(*coco)
    assert len(CocoInstances(*coco, masks=False)) == 2


def test_a_draw_is_transformed_by_its_key_alone(coco):
    steps = [{'type': 'RandomCropSize', 'sides': (20, 30)}, {'type': 'RandomHorizontalFlip'}]
    config = Config({'dataset': {'type': 'CocoInstances', 'root': str(coco[0]), 'annotations': str(coco[1])}}).dataset
    dataset = DATASETS.build({**config, 'transform': steps})
    first, again, other = (dataset[0, key] for key in ((3, 11), (3, 11), (3, 12)))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1]['boxes'], again[1]['boxes'])
    assert not (first[0].shape == other[0].shape and torch.equal(first[0], other[0]))


def test_workers_read_what_this_process_reads(coco):
    dataset = CocoInstances(*coco, training=False)
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=collate)
    found = [sample for images, targets in loader for sample in zip(images, targets, strict=True)]
    assert len(found) == 4
    for (image, target), (own, own_target) in zip(dataset, found, strict=True):
        assert torch.equal(image, own)
        assert torch.equal(target['masks'], own_target['masks'])
        assert isinstance(own_target['boxes'], tv_tensors.BoundingBoxes)
    copied = pickle.loads(pickle.dumps(dataset))  # as to workers that are spawned
    assert torch.equal(copied[1][1]['masks'], dataset[1][1]['masks'])


def test_what_is_kept_is_arrays_not_an_object_for_each_annotation(coco):
    dataset = CocoInstances(*coco)
    sizes = [len(value) for value in vars(dataset).values() if isinstance(value, list | dict | tuple)]
    assert max(sizes) <= len(CATEGORIES)


# Files that are none of COCO's


def test_missing_files_and_folders_are_named(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no image folder .*nowhere'):
        CocoInstances(tmp_path / 'nowhere', coco[1])
    with pytest.raises(FileNotFoundError, match=r'no annotation file .*nowhere'):
        CocoInstances(coco[0], tmp_path / 'nowhere.json')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"images": [', 'not a JSON file'),
        ('[]', 'no list of images'),
        ('{"images": [], "categories": []}', 'no list of annotations'),
        ('{"images": [{"id": "a"}], "annotations": [], "categories": []}', 'images whose id is no integer'),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}, {"id": 1}]}', 'share the id 1'),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}', "'a'"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / 'a.json').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_coco(tmp_path / 'a.json')


# Broken annotations


def set_on(number, **values):
    """A change of the annotation of this id."""

    def apply(content):
        next(own for own in content['annotations'] if own['id'] == number).update(values)

    return apply


def repeat_annotation(content):
    content['annotations'].append(content['annotations'][1])


def repeat_image(content):
    content['images'].append({**content['images'][0], 'file_name': 'other.png'})


def rename(content):
    content['images'][0]['file_name'] = 'part/gone.png'


def unsize(content):
    content['images'][0]['width'] = 0


RUNS = {'size': [48, 64], 'counts': [10, 20, 30]}
BROKEN = {  # kind: change, what is named, the reason
    'box outside the image': (set_on(5, bbox=[64, 5, 20, 15]), 'annotation 5 of part/000000000009.png', '64 x 48'),
    'box partly outside the image': (set_on(5, bbox=[10, 5, 20, 45]), 'annotation 5 of', '20, 45] in 64 x 48'),
    'box without area': (set_on(5, bbox=[10, 5, 20, 0]), 'annotation 5 of', '20 x 0'),
    'broken box': (set_on(5, bbox=[10, 5, 20]), 'annotation 5 of', 'instead of x, y, width, height'),
    'unknown category': (set_on(5, category_id=2), 'annotation 5 of', 'category_id 2'),
    'unknown image': (set_on(5, image_id=1000), 'annotation 5', 'image_id 1000'),
    'annotation id given twice': (repeat_annotation, 'annotation 5 of', 'id 5'),
    'image id given twice': (repeat_image, 'image other.png', 'id 9, as part/000000000009.png'),
    'image without name or size': (unsize, 'image part/000000000009.png', 'width 0, height 48'),
    'missing image file': (rename, 'image part/gone.png', '/images'),
    'empty mask': (set_on(5, segmentation=[]), 'annotation 5 of', 'no polygon'),
    'broken mask': (set_on(5, segmentation=RUNS), 'annotation 5 of', 'do not come to 3072 pixels'),
}


@pytest.mark.parametrize('kind', BROKEN)
def test_each_broken_annotation_is_named_and_refused(coco, change, kind):
    broken, name, reason = BROKEN[kind]
    change(broken)
    with pytest.raises(AnnotationError, match='on_error') as caught:
        CocoInstances(*coco)
    assert str(caught.value).startswith(f'{coco[1]} has broken annotations (1):\n- {kind}, 1: {name}')
    assert reason in str(caught.value)
    assert [finding.kind for finding in caught.value.findings] == [kind]


@pytest.mark.parametrize('kind', BROKEN)
def test_each_broken_annotation_is_skipped_if_asked_for(coco, change, kind, caplog):
    change(BROKEN[kind][0])
    dataset = CocoInstances(*coco, training=False, on_error='skip')
    assert [finding.kind for finding in dataset.findings] == [kind]
    assert len(caplog.records) == 1
    assert f'- {kind}, 1:' in caplog.text
    samples = list(dataset)
    if kind in ('missing image file', 'image without name or size'):
        assert [target['image_id'] for _, target in samples] == [4, 25, 7]
        assert dataset.metainfo['image_ids'] == [4, 25, 7]
    else:
        kept = [[10, 5, 30, 48]] if kind.startswith('box partly') else []
        kept = [[10, 5, 30, 20]] if 'twice' in kind else kept
        assert samples[0][1]['boxes'].tolist() == [*kept, [0, 30, 20, 48], [0, 0, 64, 48]]


SEGMENTATIONS = {
    'two points': ([[1, 1, 5, 5]], 'empty mask', 'a polygon of 2 points'),
    'one polygon of three': ([*SQUARE, [1, 1, 5, 5]], 'empty mask', 'a polygon of 2 points'),
    'odd': ([[1, 1, 5, 5, 5, 1, 1]], 'broken mask', 'no list x, y'),
    'not a number': ([[1, 1, 5, 5, float('nan'), 1]], 'broken mask', 'no numbers'),
    'far away': ([[1, 1, 5, 5, 1e9, 1]], 'broken mask', 'far from the image'),
    'flat': ([1, 1, 5, 5, 5, 1], 'broken mask', 'no list x, y'),
    'another size': (run_lengths(rectangle(48, 60, 1, 1, 5, 5)), 'broken mask', 'of [48, 60]'),
    'background': ({'size': [48, 64], 'counts': [3072]}, 'empty mask', 'background alone'),
    'compressed background': (compressed(np.zeros((48, 64), np.uint8)), 'empty mask', 'background alone'),
    'cut short': ({'size': [48, 64], 'counts': '`'}, 'broken mask', 'neither'),
    'cut between numbers': ({'size': [48, 64], 'counts': '52203'}, 'broken mask', '3072 pixels'),
    'negative': ({'size': [48, 64], 'counts': [3082, -20, 10]}, 'broken mask', '3072 pixels'),
    'nothing': (None, 'empty mask', 'no polygon'),
    'no counts': ({'size': [48, 64]}, 'broken mask', 'neither'),
}


@pytest.mark.parametrize('case', SEGMENTATIONS)
def test_masks_are_looked_into(case):
    segmentation, kind, reason = SEGMENTATIONS[case]
    content = content_of(SIDES)
    set_on(5, segmentation=segmentation)(content)
    (finding,), _, kept = check_coco(content)
    assert finding.kind == kind
    assert reason in finding.reason
    assert len(kept) == 5
    assert check_coco(content, masks=False)[0] == []


def test_random_compressed_run_lengths_are_whole():
    generator = np.random.default_rng(1)
    for _ in range(50):
        height, width = generator.integers(1, 200, 2).tolist()
        mask = (generator.random((height, width)) < generator.choice([0.02, 0.5, 0.98])).astype(np.uint8)
        mask[0, 0] = 1
        content = content_of({9: (height, width)})
        content['annotations'] = [an_object(1, 9, 3, [0, 0, 1, 1], compressed(mask))]
        assert check_coco(content)[0] == []
        assert np.array_equal(decode_masks([compressed(mask)], height, width)[0].numpy(), mask)


def test_a_box_may_reach_over_the_border_by_a_pixel_no_more():
    content = content_of(SIDES)
    set_on(5, bbox=[-1, -1, 66, 50])(content)
    assert check_coco(content)[0] == []
    set_on(5, bbox=[-1.01, -1, 66, 50])(content)
    assert [finding.kind for finding in check_coco(content)[0]] == ['box partly outside the image']


def test_many_findings_are_counted_and_the_first_few_named(coco, change):
    def spoil(content):
        for own in content['annotations'][:5]:
            own['category_id'] = 77
        content['annotations'][5]['bbox'] = [0, 0, 0, 5]

    change(spoil)
    with pytest.raises(AnnotationError, match=r'\(6\)') as caught:
        CocoInstances(*coco)
    text = str(caught.value)
    assert 'unknown category, 5: annotation 1 of' in text
    assert text.count('category_id 77') == 3
    assert 'and 2 more' in text
    assert 'box without area, 1: annotation 9 of' in text


def test_nothing_left_to_train_on_is_an_error(coco, change):
    change(lambda content: content['annotations'].clear())
    assert [len(target['boxes']) for _, target in CocoInstances(*coco, training=False)] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match='no images to train on'):
        CocoInstances(*coco)


class FakeRunner:
    def __init__(self, work_dir, dataset):
        self.work_dir = str(work_dir)
        self.train_loop = type('Loop', (), {'dataloader': type('Loader', (), {'dataset': dataset})})
        self.val_loop = None


def test_a_run_lists_what_was_skipped(coco, change, tmp_path):
    change(set_on(5, bbox=[64, 5, 20, 15]))
    for _ in range(2):  # a run that goes on doesn't list it twice
        BrokenImages().before_run(FakeRunner(tmp_path, CocoInstances(*coco, on_error='skip')))
    (line,) = (tmp_path / 'broken_annotations.txt').read_text().splitlines()
    assert line.split('\t')[:2] == ['box outside the image', 'annotation 5 of part/000000000009.png']


# Broken images


def spoil(coco):
    path = coco[0] / 'part' / '000000000009.png'
    path.write_bytes(path.read_bytes()[:80])
    return path


def test_a_broken_image_is_named_or_replaced_by_one_that_the_key_gives(coco):
    path = spoil(coco)
    with pytest.raises(ImageError, match=str(path)):
        CocoInstances(*coco)[0]
    dataset = CocoInstances(*coco, on_error='skip')
    with pytest.warns(UserWarning, match='skipped'):
        found = [dataset[0, (0, draw)][1]['image_id'] for draw in range(5)]
    assert found == [4] * 5
    assert not dataset.findings


def test_a_broken_image_is_black_in_evaluation_and_its_objects_are_missed(coco):
    spoil(coco)
    with pytest.warns(UserWarning, match='skipped'):
        image, target = CocoInstances(*coco, training=False, on_error='skip')[0]
    assert not image.any()
    assert image.shape == (3, 48, 64)
    assert len(target['boxes']) == 3


def test_an_image_of_another_size_than_its_annotations_say_is_broken(coco):
    path = coco[0] / 'part' / '000000000009.png'
    Image.new('RGB', (48, 64)).save(path)
    with pytest.raises(ImageError, match=rf'{path}: it is 64 x 48, by its annotations 48 x 64'):
        CocoInstances(*coco)[0]


# Writing


def equal(one, other):
    (image, target), (own, own_target) = one, other
    assert torch.equal(image, own)
    assert target.keys() == own_target.keys()
    for key, value in target.items():
        same = torch.equal(value, own_target[key]) if isinstance(value, torch.Tensor) else value == own_target[key]
        assert same, key


def test_samples_that_are_written_are_read_back_equal(coco, tmp_path):
    dataset = CocoInstances(*coco, training=False)
    write_coco(dataset, tmp_path / 'again' / 'own.json')
    again = CocoInstances(coco[0], tmp_path / 'again' / 'own.json', training=False)
    assert again.metainfo['category_ids'] == [3, 1, 90]
    for one, other in zip(dataset, again, strict=True):
        equal(one, other)


def test_transformed_samples_are_written_with_their_images(coco, tmp_path):
    steps = [{'type': 'RandomCropSize', 'sides': (25, 33)}, {'type': 'RandomHorizontalFlip', 'p': 1.0}]
    dataset = CocoInstances(*coco, steps)
    samples = [dataset[i, (0, i)] for i in range(2)]
    write_coco(iter(samples), tmp_path / 'own.json', classes=dataset.metainfo['classes'], images=tmp_path / 'pictures')
    again = CocoInstances(tmp_path / 'pictures', tmp_path / 'own.json', min_size=1)
    assert again.metainfo['category_ids'] == [1, 2, 3]
    for one, other in zip(samples, again, strict=True):
        equal(one, other)


def test_written_files_are_whole_for_cocos_own_code(coco, tmp_path):
    write_coco(CocoInstances(*coco, training=False), tmp_path / 'own.json')
    loaded = COCO(tmp_path / 'own.json')
    (own,) = loaded.loadAnns(loaded.getAnnIds(imgIds=9, catIds=90))
    assert own['bbox'] == [10, 5, 20, 15]
    assert own['area'] == loaded.annToMask(own).sum() == 300
    (crowd,) = loaded.loadAnns(loaded.getAnnIds(iscrowd=True))
    assert crowd['image_id'] == 9


def test_labels_without_a_class_are_refused(coco, tmp_path):
    samples = list(CocoInstances(*coco))
    with pytest.raises(ValueError, match=r'Labels of part/000000000009\.png must be from 0 to 1, got 0 to 2'):
        write_coco(samples, tmp_path / 'own.json', classes=['a', 'b'])
    with pytest.raises(ValueError, match='Expected names of classes'):
        write_coco(samples, tmp_path / 'own.json')


def test_predictions_are_results_that_cocos_own_code_scores(coco):
    """The truth, as predictions, is found whole."""
    dataset = CocoInstances(*coco, training=False)
    predictions = []
    for _, target in dataset:
        kept = ~target['crowd']
        predictions.append(
            {
                'boxes': target['boxes'][kept].double(),
                'labels': target['labels'][kept],
                'masks': target['masks'][kept].bool(),
                'scores': torch.linspace(0.9, 0.5, int(kept.sum())),
            }
        )
    before = predictions[0]['boxes'].clone()
    ids = [target['image_id'] for _, target in dataset]
    results = predictions_to_coco(predictions, ids, dataset.metainfo['category_ids'])
    assert torch.equal(predictions[0]['boxes'], before)
    assert json.loads(json.dumps(results)) == results
    assert set(results[0]) == {'image_id', 'category_id', 'bbox', 'score', 'segmentation'}
    assert results[0]['bbox'] == [10, 5, 20, 15]
    truth = COCO(coco[1])
    for own in truth.dataset['annotations']:
        own['area'] = float(truth.annToMask(own).sum())
    for iou_type in ('bbox', 'segm'):
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1)
