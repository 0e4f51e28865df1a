"""The benchmarks run from the command line and report what they say they do."""

import json
from pathlib import Path

import pytest

from zoo.benchmarks import models
from zoo.benchmarks import report as reporting


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(models, 'BASELINE', 'resnet10t')
    path = tmp_path / 'report.json'
    names = ['van_b0', 'biformer_stl:official']
    models.main([*names, '--size', '224', '--batch', '1', '--rounds', '1', '--json', str(path)])
    return json.loads(path.read_text())


def test_models_are_measured_beside_the_baseline(report):
    assert list(report['models']) == ['resnet10t', 'van_b0', 'biformer_stl:official']
    assert report['setting'] == {
        'size': 224,
        'batch': 1,
        'rounds': 1,
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


def test_an_unknown_model_is_named(capsys):
    with pytest.raises(SystemExit):
        models.main(['van_b00'])
    assert 'van_b00' in capsys.readouterr().err


def test_the_page_of_measurements_is_that_of_the_recorded_results():
    page = Path(__file__).parents[1] / 'docs' / 'benchmarks.md'
    assert page.read_text() == reporting.page(), 'run `zoo bench report --write`'
    assert '| transnext_micro |' in page.read_text()
