"""The report of a run, finished, resumed or killed."""

import csv
import json
import re
import shlex
import shutil

import pytest
import torch
from interruption import Interrupted
from mmengine.config import Config

from zoo.train import checkpoints, report
from zoo.train.records import read_curve
from zoo.train.report import write_report
from zoo.train.run import train

CONFIG = 'quickstart/biformer_digits'


@pytest.fixture(scope='module')
def runs(colours, tmp_path_factory):
    """Folders of a run killed at 13 of 16 iterations, and of the same after it was resumed from 10."""
    torch.set_num_threads(1)

    def dataset(split):
        steps = [{'type': 'Resize', 'size': (33, 31)}, {'type': 'RandomHorizontalFlip'}, {'type': 'PILToTensor'}]
        return {'type': 'LabelledImages', 'root': str(colours), 'split': split, 'transform': steps, '_delete_': True}

    options = {
        'model.backbone': {'name': 'test_resnet', 'num_classes': 3, 'drop_path_rate': 0.2, '_delete_': True},
        'train_cfg.max_epochs': 2,
        'val_evaluator.k': (1, 2),
        'custom_hooks': [],
        'train_dataloader.dataset': dataset('train'),
        'train_dataloader.batch_size': 7,
        'val_dataloader.dataset': dataset('test'),
        'default_hooks.runtime_info': {'type': 'RuntimeInfo'},
        'default_hooks.speed': {'type': 'Speed'},
        'default_hooks.checkpoint.interval_iters': 5,
        'default_hooks.curve.interval': 4,
    }
    folder = tmp_path_factory.mktemp('reported')
    lost = {**options, 'custom_hooks': [{'type': 'StopAt', 'iteration': 13}]}
    with pytest.raises(Interrupted):
        train(CONFIG, folder / 'run', cfg_options=lost, preflight=False)
    shutil.copytree(folder / 'run', folder / 'killed')
    train(CONFIG, folder / 'run', resume=True, cfg_options=options, preflight=False)
    return folder / 'killed', folder / 'run'


def sections(index):
    """Text of each heading's part."""
    parts = re.split(r'^#+ (.*)\n', index.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text):
    """The rows of the first markdown table: {column: cell}."""
    cells = [
        [cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('|')
    ]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def table(text):
    """The same, by the first cell."""
    return {next(iter(row.values())): row for row in rows(text)}


def test_the_report_of_a_resumed_run_counts_all_of_its_starts(runs):
    found = sections(write_report(runs[1]))
    curve = read_curve(runs[1] / 'curve.jsonl')
    validations = [record for record in curve if 'loss' not in record]
    for name in ('top1', 'top2'):
        row = table(found['Reached'])[name]
        assert float(row['best']) == pytest.approx(max(record[name] for record in validations), rel=1e-4)
        assert float(row['last']) == pytest.approx(validations[-1][name], rel=1e-4)
    status = next(iter(found.values()))
    assert 'Trained to the end: 2 of 2 epochs (16 iterations of 7 images)' in status
    assert '2 starts, at least 2 iterations done twice' in status  # the line of 12 was the last before the kill
    starts = rows(found['Starts'])  # whose times may be the same
    assert [(row['from iteration'], row['to']) for row in starts] == [('0', '12'), ('10', '16')]
    assert [row['end'] for row in starts] == ['stopped, or still running', 'trained to the end']

    speed = read_curve(runs[1] / 'speed.jsonl')
    with (runs[1] / 'report' / 'summary.csv').open() as file:
        summary = {row['what']: row['value'] for row in csv.DictReader(file)}
    of_training = sum(event['seconds'] for event in speed if event['event'] == 'train')
    assert float(summary['seconds in training']) == pytest.approx(of_training, abs=1e-3)
    starts = [i for i, event in enumerate(speed) if event['event'] == 'start']
    total = speed[starts[1] - 1]['time'] - speed[0]['time'] + speed[-1]['time'] - speed[starts[1]]['time']
    assert float(summary['seconds, all starts']) == pytest.approx(total, abs=1e-3)
    assert int(summary['parameters']) == speed[0]['parameters']
    shares = [float(row['share'][:-1]) for row in table(found['Time']).values() if row['share']]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert found['Environment'].count(torch.__version__.split('+')[0]) == 1


def test_everything_that_the_report_names_is_there(runs):
    index = write_report(runs[1])
    links = re.findall(r'\]\((.*?)\)', index.read_text())
    assert {'curve.png', 'speed.png', '../model.safetensors', '../iter_16.pth'} <= set(links)
    for link in links:
        assert (index.parent / link).stat().st_size > 0
    for picture in ('curve.png', 'speed.png'):
        assert (index.parent / picture).read_bytes().startswith(b'\x89PNG')
    assert not list(index.parent.glob('*.tmp'))
    requirements = (index.parent / 'requirements.txt').read_text().splitlines()
    assert f'timm=={__import__("timm").__version__}' in requirements
    with (index.parent / 'losses.csv').open() as file:
        losses = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert losses == [record for record in read_curve(runs[1] / 'curve.jsonl') if 'loss' in record]


def test_its_config_trains_the_same_weights_again(runs, tmp_path):
    index = write_report(runs[1])
    command = shlex.split(re.search(r'^zoo train .*', index.read_text(), flags=re.MULTILINE)[0])
    assert command[:2] + command[3:] == ['zoo', 'train', '--work-dir', 'NEW_FOLDER']
    again = train(command[2], tmp_path, preflight=False)
    before, after = (checkpoints.load(path)['state_dict'] for path in (runs[1] / 'iter_16.pth', again.checkpoint))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_killed_run_can_be_reported_afterwards(runs, capsys):
    assert report.main([str(runs[0])]) == 0
    index = runs[0] / 'report' / 'index.md'
    assert capsys.readouterr().out.split() == [str(index)]
    found = sections(index)
    assert '**Not at its end**: 1.5 of 2 epochs (12 iterations' in next(iter(found.values()))
    assert list(table(found['Reached'])) == ['top1', 'top2']
    assert Config.fromfile(runs[0] / 'report' / 'config.py').train_cfg.max_epochs == 2


def test_a_run_that_was_killed_at_its_first_iteration_has_a_report(runs, tmp_path):
    first = (runs[0] / 'speed.jsonl').read_text().splitlines(keepends=True)[0]
    (tmp_path / 'speed.jsonl').write_text(first)
    (tmp_path / 'curve.jsonl').write_text('')
    found = sections(write_report(tmp_path))
    assert 'Reached' not in found
    assert 'Config' not in found
    assert '0 of 2 epochs' in next(iter(found.values()))


def test_a_run_without_records_of_speed_has_a_report_without_times(runs, tmp_path):
    shutil.copy(runs[1] / 'curve.jsonl', tmp_path)
    index = write_report(tmp_path)
    assert list(sections(index)) == [tmp_path.name, 'Reached', 'Files']
    assert '16 iterations' in index.read_text()


def test_a_run_of_several_machines_is_repeated_by_torchrun(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / 'run')
    lines = read_curve(runs[1] / 'speed.jsonl')
    for line in lines:
        if line['event'] == 'start':
            line |= {'processes': 16, 'nodes': 2}
            line['environment']['accelerators'] = ['NVIDIA H200'] * 8
    (tmp_path / 'run' / 'speed.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    found = sections(write_report(tmp_path / 'run'))
    assert 'torchrun --nnodes=2 --nproc-per-node=8 -m zoo train' in found['Again']
    assert table(found['Environment'])['accelerators']['value'] == '8 x NVIDIA H200'
    with (tmp_path / 'run' / 'report' / 'summary.csv').open() as file:
        seconds = {row['what']: row['value'] for row in csv.DictReader(file)}['seconds, all starts']
    assert table(found['Time'])['GPU hours']['value'] == f'{16 * float(seconds) / 3600:.2f}'


def test_what_preflight_found_is_in_the_report(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / 'run')
    findings = [
        {'name': 'batch', 'level': 'ok', 'expected': '7', 'found': '7', 'cause': ''},
        {'name': 'drop path', 'level': 'error', 'expected': '0.2 | linear', 'found': '0', 'cause': 'It is\nlost.'},
    ]
    found = {'passed': False, 'config': 'x', 'depth': 'full', 'findings': findings, 'seconds': 61.0}
    (tmp_path / 'run' / 'preflight.json').write_text(json.dumps(found | {'not_checked': {'teacher': 'there is none'}}))
    text = sections(write_report(tmp_path / 'run'))['Preflight']
    assert '| batch | ok | 7 | 7 |' in text
    assert '| drop path | **error** | 0.2 \\| linear | 0. It is lost. |' in text
    assert '2 checks (full) in 01:01.' in text
    assert 'Not checked: teacher (there is none).' in text


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert 'no curve.jsonl' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
