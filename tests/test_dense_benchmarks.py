"""The benchmark of dense prediction runs, attributes time to its parts, and says what it measured."""

import itertools
import json
import os

import pytest
import torch
from PIL import Image

from zoo.benchmarks import dense
from zoo.benchmarks import report as reporting
from zoo.train.dense.coco import CocoInstances

SIZE, CROP = (128, 80), 64


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp('dense') / 'report.json'
    sizes = ['--size', *map(str, SIZE), '--crop', str(CROP)]
    dense.main(['shvit_s1', *sizes, '--rounds', '1', '--json', str(path)])
    return path


@pytest.fixture(scope='module')
def report(path):
    return json.loads(path.read_text())


def test_steps_are_measured_by_their_parts(report):
    assert report['setting'] == {'size': [128, 80], 'crop': 64, 'rounds': 1, 'device': 'cpu', 'threads': 1}
    data = {'decode', 'transforms', 'normalize, pad'}
    expected = {
        ('mask_rcnn', 'train'): data | {'masks of polygons', 'NMS of proposals'},
        ('mask_rcnn', 'test'): data
        | {'masks of polygons', 'NMS of proposals', 'NMS of classes', 'masks in the image', 'measure'},
        ('upernet', 'train'): data,
        ('upernet', 'test'): {'decode', 'transforms', 'resize, probabilities, classes', 'measure'},
    }
    for (task, kind), parts in expected.items():
        found = report['steps'][task]['shvit_s1'][kind]
        assert {*found['parts']} == {dense.MODEL, *parts}, (task, kind)
        assert all(seconds > 0 for seconds in found['parts'].values())
        total = sum(found['parts'].values())
        assert found['share'] == pytest.approx(1 - found['parts'][dense.MODEL] / total)  # of the one round
        assert len(found['shares']) == 1


def test_memory_is_that_of_a_step(report):
    found = report['memory']['shvit_s1']
    assert found['held'] == 12 * found['parameters']
    assert found['peak'] > 4 * found['parameters']  # the gradients of the parameters alone


def test_the_page_has_a_section_of_it_and_does_without(report, tmp_path, monkeypatch):
    text = reporting.dense_section(report)
    peak = report['memory']['shvit_s1']['peak']
    assert f'| shvit_s1 | {peak / 2**20:,.0f} |' in text
    assert '--size 128 80 --crop 64 --rounds 1' in text
    assert '| UPerNet, shvit_s1 | test |' in text
    monkeypatch.setattr(reporting, 'RESULTS', tmp_path)
    assert 'Mask R-CNN' not in reporting.page()
    (tmp_path / 'dense.json').write_text(json.dumps(report))
    assert text in reporting.page()


def test_figures_are_added_to_those_of_the_same_setting_alone(report, path):
    other = {**report, 'steps': {'mask_rcnn': {'other': {}}}, 'memory': {'other': {'peak': None, 'reason': ''}}}
    both = dense.merged(other, path)
    assert list(both['steps']['mask_rcnn']) == ['shvit_s1', 'other']
    assert list(both['memory']) == ['shvit_s1', 'other']
    assert both['steps']['upernet'] == report['steps']['upernet']
    setting = {**report['setting'], 'rounds': 2}
    assert dense.merged({**other, 'setting': setting}, path) == {**other, 'setting': setting}
    versions = {**report['machine'], 'versions': {}}
    assert dense.merged({**other, 'machine': versions}, path) == {**other, 'machine': versions}


def test_generated_objects_are_sound_and_their_images_no_noise_alone(tmp_path):
    dense.write_images(tmp_path / 'images', 3, (200, 120))
    dense.write_objects(tmp_path / 'objects.json', 3, (200, 120), classes=80)
    dataset = CocoInstances(tmp_path / 'images', tmp_path / 'objects.json')
    assert dataset.findings == []
    assert len(dataset) == 3
    for image, target in (dataset[i] for i in range(3)):
        assert image.shape == (3, 120, 200)
        assert len(target['boxes']) == dense.OBJECTS
        areas = target['masks'].flatten(1).sum(1)
        width, height = (target['boxes'][:, 2:] - target['boxes'][:, :2]).unbind(1)
        assert (areas > 0.2 * width * height).all()
    bits = 8 * os.path.getsize(tmp_path / 'images' / '0.jpg') / (200 * 120)
    assert 0.5 < bits < 6


def test_generated_maps_have_all_values_below_a_bound(tmp_path):
    dense.write_maps(tmp_path / 'maps', 20, (32, 24), 151)
    values = {value for i in range(20) for value in Image.open(tmp_path / 'maps' / f'{i}.png').get_flattened_data()}
    assert values == set(range(151))


def test_time_within_a_part_is_not_that_of_the_part_around_it(monkeypatch):
    class Owner:
        def outer(self):
            return 1 + self.inner() + self.inner()

        def inner(self):
            return 10

    owner, ticks = Owner(), itertools.count()
    monkeypatch.setattr(dense.time, 'process_time', lambda: float(next(ticks)))
    watch = dense.Stopwatch()
    with watch.running([(owner, 'outer', 'outer'), (owner, 'inner', 'inner')]):
        assert owner.outer() == 21
    # model 0-1, outer 1-2, inner 2-3, outer 3-4, inner 4-5, outer 5-6, model 6-7
    assert watch.seconds == {dense.MODEL: 2, 'outer': 3, 'inner': 2}
    next(ticks)
    owner.outer()  # no longer timed
    assert watch.seconds == {dense.MODEL: 2, 'outer': 3, 'inner': 2}


def test_a_backbone_stands_in_its_own_config_if_it_has_one():
    assert dense._config('mask_rcnn', 'biformer_small').model.backbone.n_win == 16
    base = dense._config('mask_rcnn', 'resnet50').model
    assert base.backbone == {'name': 'resnet50'}
    assert tuple(base.neck.strides) == (4, 8, 16, 32, 64)
    assert dense._config('upernet', 'van_b0').model.head.num_classes == 150


@pytest.mark.parametrize(
    ('function', 'argument', 'reason'),
    [(os._exit, 1, 'ended'), (bytearray, 2**62, 'memory')],
    ids=['killed', 'refused'],
)
def test_a_step_that_does_not_fit_has_no_figure(function, argument, reason):
    found = dense._fresh(function, argument)
    assert found['peak'] is None
    assert reason in found['reason']
    assert dense.memory_rows({'memory': {'big': found}}) == [['big', 'does not fit', '', '', '']]


def test_memory_is_a_multiple_of_the_reference():
    memory = {
        'resnet50': {'peak': 2**30, 'held': 2**29, 'parameters': 44_000_000},
        'other': {'peak': 2**29, 'held': 2**28, 'parameters': 24_300_000},
    }
    assert dense.memory_rows({'memory': memory}) == [
        ['resnet50', '1,024', '1.00', '512', '44.0'],
        ['other', '512', '0.50', '256', '24.3'],
    ]


@pytest.mark.parametrize('wrong', [['van_b00'], ['van_b0', '--rounds', '0'], ['van_b0', '--size', '16', '800']])
def test_wrong_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        dense.main(wrong)
    message = capsys.readouterr().err
    assert 'van_b00' in message or 'must be' in message


def test_threads_are_as_before():
    class Idle:
        def parts(self, kind):
            return []

        def train(self, number):
            assert torch.get_num_threads() == 1

    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        dense.time_steps(Idle(), 'train', 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize('task', ['mask_rcnn', 'upernet'])
def test_data_and_post_processing_take_at_most_15_per_cent_of_a_step(task, tmp_path):
    path = tmp_path / 'report.json'
    dense.main(['van_b0', '--only', task, '--rounds', '1', '--json', str(path)])
    found = json.loads(path.read_text())['steps'][task]['van_b0']
    assert found['train']['share'] < 0.15
    assert found['test']['share'] < 0.15
