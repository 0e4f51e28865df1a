"""The benchmarks run from the command line and report what they say they do."""

import csv
import json
from pathlib import Path

import pytest

from zoo.benchmarks import models
from zoo.benchmarks import report as reporting


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(models, 'BASELINE', 'resnet10t')
    monkeypatch.setattr(models, 'ALWAYS', ())
    path = tmp_path / 'report.json'
    names = ['van_b0', 'biformer_stl:official']
    files = ['--json', str(path), '--csv', str(tmp_path / 'report.csv'), '--plot', str(tmp_path / 'report.png')]
    models.main([*names, '--size', '224', '--batch', '1', '--rounds', '1', *files])
    return json.loads(path.read_text())


def test_models_are_measured_beside_the_baseline(report, tmp_path):
    assert list(report['models']) == ['resnet10t', 'van_b0', 'biformer_stl:official']
    assert report['setting'] == {
        'size': 224,
        'batch': 1,
        'rounds': 1,
        'device': 'cpu',
        'dtype': 'float32',
        'threads': 1,
        'baseline': 'resnet10t',
    }
    assert {'date', 'processor', 'versions'} <= set(report['machine'])
    for figures in report['models'].values():
        assert all(figures[measure] > 0 for measure in ('forward', 'train', 'memory', 'parameters'))
        assert set(figures['relative']) == {'forward', 'train', 'memory'}
    assert report['models']['resnet10t']['relative'] == {'forward': 1, 'train': 1, 'memory': 1}
    assert 4.0e6 < report['models']['van_b0']['parameters'] < 4.2e6
    with (tmp_path / 'report.csv').open() as file:
        lines = list(csv.DictReader(file))
    assert [line['model'] for line in lines] == list(report['models'])
    assert 0.85 < float(lines[1]['GMACs']) < 0.88
    assert float(lines[1]['forward TMAC/s']) > 0
    assert (tmp_path / 'report.png').read_bytes().startswith(b'\x89PNG')


def vit_small():
    patches, dim = 196, 384
    block = (patches + 1) * 12 * dim**2 + 2 * (patches + 1) ** 2 * dim
    return patches * 16**2 * 3 * dim + 12 * block + dim * 1000


def nat_mini():
    count = 112**2 * 9 * 3 * 32 + 56**2 * 9 * 32 * 64  # two convolutions make tokens
    for dim, depth, side in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 5, 7)):
        count += depth * side**2 * (4 * dim**2 + 2 * 3 * dim**2 + 2 * 7**2 * dim)
        count += (side // 2) ** 2 * 9 * dim * 2 * dim if dim < 512 else dim * 1000
    return count


def crossformer_tiny():
    kernels = (4, 32), (12, 16), (20, 8), (36, 8)  # of 4, 8, 16 and 32 pixels, filled up to whole patches
    count = sum(56**2 * side**2 * 3 * dim for side, dim in kernels)
    for dim, depth, side, heads in ((64, 1, 56, 2), (128, 1, 28, 4), (256, 8, 14, 8), (512, 6, 7, 16)):
        position = dim // 4 // 4  # width of the MLP that makes biases of 13 x 13 relative positions
        bias = 13**2 * (2 * position + 2 * position**2 + position * heads)
        count += depth * (side**2 * (12 * dim**2 + 2 * 7**2 * dim) + bias)
        count += (side // 2) ** 2 * (2**2 + 4**2) * dim * dim if dim < 512 else dim * 1000
    return count


@pytest.mark.parametrize(
    ('name', 'expected'),
    [('vit_small_patch16_224', vit_small), ('nat_mini', nat_mini), ('crossformer_tiny', crossformer_tiny)],
)
def test_macs_are_those_of_a_hand_count(name, expected):
    assert models.macs(name, 224) == expected()


def test_an_unknown_model_is_named(capsys):
    with pytest.raises(SystemExit):
        models.main(['van_b00'])
    assert 'van_b00' in capsys.readouterr().err


def test_groups_of_no_models_are_refused(capsys):
    with pytest.raises(SystemExit):
        models.main(['van_b0', '--together', '0'])
    assert 'together must be 1 or more, got 0' in capsys.readouterr().err


def test_the_page_of_measurements_is_that_of_the_recorded_results():
    page = Path(__file__).parents[1] / 'docs' / 'benchmarks.md'
    assert page.read_text() == reporting.page(), 'run `zoo bench report --write`'
    assert '| transnext_micro |' in page.read_text()


def test_models_may_be_measured_in_groups_that_split_no_model(report, tmp_path):
    names = ['a', 'b', 'b:official', 'c', 'd:official', 'd', 'e']
    assert models.groups(names, None) == [names]
    assert models.groups(names, 3) == [['a', 'b', 'b:official'], ['c', 'd:official', 'd'], ['e']]
    assert models.groups(names, 1) == [['a'], ['b', 'b:official'], ['c'], ['d:official', 'd'], ['e']]
    path = tmp_path / 'groups.json'
    options = ['--size', '64', '--batch', '1', '--rounds', '1', '--together', '1', '--json', str(path)]
    models.main(['van_b0', 'nat_mini', *options])
    grouped = json.loads(path.read_text())
    assert list(grouped['models']) == ['resnet10t', 'van_b0', 'nat_mini']
    assert grouped['models']['nat_mini']['relative']['forward'] > 0
    assert '--size 64 --batch 1 --together 1`' in reporting.models_section(grouped)
