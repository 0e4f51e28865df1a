"""The commands that use a trained model."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from zoo.cli import app
from zoo.train.preflight import Finding, Report


def run(*arguments, rank=None):
    env = {'COLUMNS': '240'} | ({} if rank is None else {'RANK': rank})
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'three.pth'
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), path)
    return path


@pytest.fixture
def images(tmp_path):
    """Three classes of two images, and one that is none."""
    for i in range(6):
        path = tmp_path / 'images' / f'class {i // 2}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (30, 20), (40 * i, 0, 200 - 40 * i)).save(path)
    (tmp_path / 'images' / 'class 2' / 'none.png').write_text('text')
    return tmp_path / 'images'


def test_eval_shows_the_measures_and_says_where_the_files_are(images, weights, tmp_path):
    arguments = ('eval', 'test_resnet', images, '--checkpoint', weights, '--out', tmp_path / 'out', '--workers', 0)
    result = run(*arguments)
    assert result.exit_code == 1
    assert f'Error: Cannot read the image {images}/class 2/none.png' in result.output
    assert not (tmp_path / 'out').exists()
    result = run(*arguments, '--on-error', 'skip')
    assert result.exit_code == 0, result.output
    top1 = json.loads((tmp_path / 'out' / 'metrics.json').read_text())['metrics']['top1']
    assert f'{top1:.3f} %' in result.output
    for name in ('metrics.json', 'classes.csv', 'predictions.csv', 'confusion.png', 'broken_images.txt'):
        assert (tmp_path / 'out' / name).stat().st_size
        assert str(tmp_path / 'out' / name) in result.output


def test_predict_shows_a_table_and_writes_what_is_asked_for(images, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ('--checkpoint', weights, '-k', 2, '--csv', 'p.csv', '--jsonl', 'p.jsonl', '--picture', 'p.png')
    result = run('predict', 'test_resnet', images, *arguments)
    assert result.exit_code == 0, result.output
    assert 'class names: their indices' in result.output
    assert f'{images}/class 1/2.png' in result.output
    assert 'Images that can not be read: 1 of 7; see broken_images.txt.' in result.output
    with open('p.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 2 + 1
    lines = [json.loads(line) for line in Path('p.jsonl').read_text().splitlines()]
    assert [line['file'] for line in lines[:2]] == [f'{images}/class 0/{i}.png' for i in range(2)]
    assert lines[0]['indices'][0] == int(rows[0]['index'])
    assert lines[6]['error'] == rows[-1]['error'] == 'not an image, or cut short in its header'
    assert Path('broken_images.txt').read_text() == f'{images}/class 2/none.png\t{lines[6]["error"]}\n'
    assert np.asarray(Image.open('p.png').convert('RGB')).std() > 0


def test_features_are_written_and_a_second_call_finds_them(images, weights, tmp_path):
    arguments = ('--checkpoint', weights, '--out', tmp_path / 'f.npy', '--on-error', 'skip', '--workers', 0)
    for _ in range(2):
        result = run('features', 'test_resnet', images, *arguments)
        assert result.exit_code == 0, result.output
        assert '6 images x 96 float32, names in' in result.output
        assert np.load(tmp_path / 'f.npy').shape == (6, 96)
    result = run('features', 'test_resnet', images, *arguments, '--layer', 0)
    assert result.exit_code == 1
    assert '(layer: None there, 0 now)' in result.output


@pytest.mark.parametrize('level', ['warning', 'error'])
def test_preflight_shows_its_findings_and_fails_if_one_is_an_error(tmp_path, monkeypatch, level):
    asked = {}

    def preflight(cfg, **arguments):
        asked.update(arguments, lr=cfg.optim_wrapper.optimizer.lr)
        return Report('the run', 'quick', [Finding('learning_rate', level, '0.1', '0.2', 'A cause.')])

    monkeypatch.setattr('zoo.train.preflight.preflight', preflight)
    arguments = ('--strict', '--silence', 'order', '--json', tmp_path / 'findings.json')
    result = run(
        'preflight', 'quickstart/biformer_digits', '--cfg-options', 'optim_wrapper.optimizer.lr=0.2', *arguments
    )
    assert result.exit_code == (level == 'error'), result.output
    assert 'A cause.' in result.output
    assert asked == {'depth': 'quick', 'strict': True, 'silence': ['order'], 'world_size': None, 'lr': 0.2}
    assert json.loads((tmp_path / 'findings.json').read_text())['findings'][0]['level'] == level


def test_train_passes_on_what_is_asked_for(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr('zoo.train.run.train', lambda config, **arguments: asked.update(arguments, config=config))
    given = (
        'train',
        'my.py',
        '--work-dir',
        tmp_path,
        '--resume',
        '--no-preflight',
        '--strict',
        '--cfg-options',
        'a.b=3',
    )
    assert run(*given).exit_code == 0
    assert asked == {
        'config': 'my.py',
        'work_dir': tmp_path,
        'resume': True,
        'cfg_options': {'a.b': '3'},
        'preflight': False,
        'strict': True,
    }


def test_errors_are_one_line_that_names_the_cause(images, weights):
    for arguments, message in (
        (
            ('eval', 'test_resnt', images),
            "There is no model, config or folder of a run 'test_resnt'. Near: test_resnet",
        ),
        (('eval', 'test_resnet', '/no/where', '--checkpoint', weights), 'There is no image folder /no/where.'),
        (
            ('predict', 'test_resnet', images / 'x.jpg', '--checkpoint', weights),
            f'There is no file or folder {images}/x.jpg.',
        ),
        (('features', 'test_resnet', images, '--out', 'x.csv'), 'Features are written to .npy, .parquet, .safetensors'),
        (('eval', 'test_resnet', images, '--checkpoint', weights, '--amp', 'fp8'), 'none, bf16, fp16'),
        (('eval', 'test_resnet', images, '--checkpoint', weights, '--device', 'gpu'), "There is no device 'gpu'"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert message in result.output
        assert 'Traceback' not in result.output
