"""What a run records and shows of itself."""

import io
import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from interruption import Interrupted
from rich.console import Console
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.train import pictures, records
from zoo.train.environment import environment
from zoo.train.records import Curve, ProgressBar, RuntimeInfo, Speed, TensorBoard, duration, read_curve
from zoo.train.run import train

CONFIG = 'quickstart/biformer_digits'
ITERATIONS = 16  # 2 epochs of 8
BATCH = 7


@pytest.fixture(scope='module')
def options(colours):
    def dataset(split):
        steps = [{'type': 'Resize', 'size': (33, 31)}, {'type': 'RandomHorizontalFlip'}, {'type': 'PILToTensor'}]
        return {'type': 'LabelledImages', 'root': str(colours), 'split': split, 'transform': steps, '_delete_': True}

    return {
        'model.backbone': {'name': 'test_resnet', 'num_classes': 3, 'drop_path_rate': 0.2, '_delete_': True},
        'train_cfg.max_epochs': 2,
        'val_evaluator.k': (1, 2),
        'custom_hooks': [],
        'train_dataloader.dataset': dataset('train'),
        'train_dataloader.batch_size': BATCH,
        'val_dataloader.dataset': dataset('test'),
        'default_hooks.runtime_info': {'type': 'RuntimeInfo'},
        'default_hooks.speed': {'type': 'Speed'},
        'default_hooks.checkpoint.interval_iters': 5,
        'default_hooks.curve.interval': 4,
    }


@pytest.fixture(scope='module')
def runs(options, tmp_path_factory):
    """Folders of the same run: whole, and killed at 13, past the line of 12, then resumed from the checkpoint of 10."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('runs')
    whole, parts = folder / 'whole', folder / 'parts'
    hooks = [{'type': 'TensorBoard'}] if torch_has_tensorboard() else []
    train(CONFIG, whole, cfg_options=options, preflight=False)
    stopped = {**options, 'custom_hooks': [*hooks, {'type': 'StopAt', 'iteration': 13}]}
    with pytest.raises(Interrupted):
        train(CONFIG, parts, cfg_options=stopped, preflight=False)
    with (parts / 'speed.jsonl').open('a') as file:
        file.write('{"event": "tra')  # a kill in the middle of a line
    train(CONFIG, parts, resume=True, cfg_options={**options, 'custom_hooks': hooks}, preflight=False)
    return whole, parts


def torch_has_tensorboard():
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_resumed_run_leaves_the_same_curve_to_the_byte(runs):
    whole, parts = runs
    assert (whole / 'curve.jsonl').read_bytes() == (parts / 'curve.jsonl').read_bytes()
    curve = read_curve(whole / 'curve.jsonl')
    assert [record['iter'] for record in curve if 'loss' in record] == [4, 8, 12, 16]
    assert [record['iter'] for record in curve if 'top1' in record] == [8, 16]
    assert all(record['epoch'] == record['iter'] / 8 for record in curve)
    assert all(record['grad_norm'] > 0 for record in curve if 'loss' in record)


def test_a_line_is_the_mean_of_the_iterations_since_the_last(runs, options, tmp_path):
    train(CONFIG, tmp_path, cfg_options={**options, 'default_hooks.curve.interval': 1}, preflight=False)
    single = [record for record in read_curve(tmp_path / 'curve.jsonl') if 'loss' in record]
    assert len(single) == ITERATIONS
    for record in read_curve(runs[0] / 'curve.jsonl'):
        if 'loss' in record:
            covered = single[record['iter'] - 4 : record['iter']]
            for name in ('loss', 'grad_norm'):
                assert record[name] == sum(each[name] for each in covered) / 4
            assert record['lr'] == covered[-1]['lr']


def test_speed_counts_every_image_and_all_of_the_time(runs):
    events = read_curve(runs[0] / 'speed.jsonl')
    assert [event['event'] for event in events if event['event'] in ('start', 'end')] == ['start', 'end']
    start, lines = events[0], [event for event in events if event['event'] == 'train']
    assert (start['processes'], start['nodes'], start['batch'], start['max_iters']) == (1, 1, BATCH, ITERATIONS)
    assert start['parameters'] == start['trainable'] > 300_000
    assert start['environment']['packages']['torch'] == torch.__version__.split('+')[0]
    assert (runs[0] / start['config']).exists()
    assert sum(line['images'] for line in lines) == ITERATIONS * BATCH
    for line in lines:
        assert 0 <= line['data_seconds'] < line['seconds']
        assert line['images_per_second'] == pytest.approx(line['images'] / line['seconds'], rel=1e-3)
        assert 100 * 2**20 < line['peak_memory'] < 100 * 2**30
    assert {event['iter'] for event in events if event['event'] == 'validation'} == {8, 16}
    assert {event['iter'] for event in events if event['event'] == 'checkpoint'} >= {5, 10, 15, 16}
    timed = [event for event in events[: events.index(lines[-1]) + 1] if 'seconds' in event]
    assert sum(event['seconds'] for event in timed) == pytest.approx(timed[-1]['time'] - start['time'], abs=0.05)


def test_speed_goes_on_after_a_kill_in_the_middle_of_a_line(runs):
    events = read_curve(runs[1] / 'speed.jsonl')
    assert [event['iter'] for event in events if event['event'] == 'start'] == [0, 10]
    assert [(event['iter'], event['images']) for event in events if event['event'] == 'train'] == [
        (4, 4 * BATCH),
        (8, 4 * BATCH),
        (12, 4 * BATCH),
        (12, 2 * BATCH),  # again, from the checkpoint of 10
        (16, 4 * BATCH),
    ]
    assert events[-1]['event'] == 'end'


class NoFetching(TorchDispatchMode):
    """An error where a value leaves its device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, 'a value was fetched'
        return function(*args, **kwargs or {})


def fake_runner(tmp_path, hooks, max_iters=8):
    groups = [{'lr': 0.1}, {'lr': 0.2}]
    runner = SimpleNamespace(
        work_dir=tmp_path,
        iter=0,
        epoch=0,
        max_iters=max_iters,
        max_epochs=1,
        optim_wrapper=SimpleNamespace(param_groups=groups, get_lr=lambda: {'lr': [0.2]}),
        train_loop=SimpleNamespace(epoch_length=max_iters),
        train_dataloader=SimpleNamespace(batch_size=2),
        model=torch.nn.Linear(2, 2),
        cfg=SimpleNamespace(filename='x.py'),
        seed=0,
        message_hub=SimpleNamespace(update_info=lambda *_: None),
    )

    def call_hook(name, **arguments):
        for hook in hooks:
            if hasattr(hook, name):
                getattr(hook, name)(runner, **arguments)

    runner.call_hook = call_hook
    return runner


def test_nothing_is_fetched_from_the_device_between_two_lines(tmp_path):
    hooks = [Curve(interval=4), ProgressBar(seconds=0, console=Console(file=io.StringIO())), Speed()]
    runner = fake_runner(tmp_path, hooks)
    runner.call_hook('before_train')
    hooks.append(RuntimeInfo())
    for i in range(8):
        runner.optim_wrapper.grad_norm = torch.tensor(1.0 + i)
        outputs = {'loss': torch.tensor(float(i)), 'teacher': torch.tensor(2.0 * i)}
        with NoFetching():
            runner.call_hook('before_train_iter', batch_idx=i)
            runner.call_hook('after_train_iter', batch_idx=i, outputs=outputs)
    lines = read_curve(tmp_path / 'curve.jsonl')
    assert lines == [
        {'iter': 4, 'epoch': 0.5, 'loss': 1.5, 'teacher': 3.0, 'grad_norm': 2.5, 'lr': 0.2},
        {'iter': 8, 'epoch': 1.0, 'loss': 5.5, 'teacher': 11.0, 'grad_norm': 6.5, 'lr': 0.2},
    ]


def test_the_guard_of_the_test_above_sees_a_fetch():
    with pytest.raises(AssertionError, match='fetched'), NoFetching():
        torch.tensor(1.0).item()


def test_a_norm_counts_once_however_many_batches_are_accumulated(tmp_path):
    curve = Curve(interval=4)
    runner = fake_runner(tmp_path, [curve], max_iters=4)
    runner.call_hook('before_train')
    runner.optim_wrapper.grad_norm = None
    for i in range(4):
        if i == 2:
            runner.optim_wrapper.grad_norm = torch.tensor(3.0)  # the only step
        curve.after_train_iter(runner, i, outputs={'loss': torch.tensor(1.0)})
    assert read_curve(tmp_path / 'curve.jsonl')[0]['grad_norm'] == 3.0


def test_weights_of_another_run_bring_none_of_its_losses(tmp_path):
    curve = Curve(interval=2)
    runner = fake_runner(tmp_path, [curve])
    curve.after_load_checkpoint(runner, {'curve': {'loss': [100.0]}})
    runner.call_hook('before_train')
    for i in range(2):
        curve.after_train_iter(runner, i, outputs={'loss': torch.tensor(1.0)})
    assert read_curve(tmp_path / 'curve.jsonl')[0]['loss'] == 1.0


@pytest.mark.parametrize('interval', [0, -3])
def test_an_interval_below_one_is_refused(interval):
    with pytest.raises(ValueError, match=f'got {interval}'):
        Curve(interval)


def run_with_console(monkeypatch, options, tmp_path, **arguments):
    output = io.StringIO()
    monkeypatch.setattr(records, 'Console', lambda: Console(file=output, width=160, **arguments))
    options = {**options, 'train_cfg.max_epochs': 1, 'default_hooks.progress.seconds': 0}
    train(CONFIG, tmp_path, cfg_options=options, preflight=False)
    return output.getvalue()


def test_in_a_file_progress_is_whole_lines(monkeypatch, options, tmp_path):
    lines = run_with_console(monkeypatch, options, tmp_path).splitlines()
    assert not any('\x1b' in line or '\r' in line for line in lines)
    trained = [line for line in lines if line.startswith('iteration')]
    assert [line.split()[1] for line in trained] == ['4/8', '5/8', '6/8', '7/8', '8/8']  # the first loss is that of 4
    for word in ('epoch 0.50', 'loss ', 'lr ', 'images/s', 'GiB', 'left'):
        assert word in trained[0]
    top1 = read_curve(tmp_path / 'curve.jsonl')[-1]['top1']
    assert lines[-1].startswith(f'epoch 1/1  top1 {top1:.2f}')


def test_in_a_terminal_progress_is_a_bar(monkeypatch, options, tmp_path):
    monkeypatch.setattr(ProgressBar, 'REFRESH', 0)
    shown = run_with_console(monkeypatch, options, tmp_path, force_terminal=True)
    for text in ('5/8', 'epoch 0.62', '8/8', 'loss ', 'lr ', 'images/s', 'GiB', ' left', 'validating', 'top1'):
        assert text in shown
    assert shown.endswith('\x1b[?25h')  # the cursor is back


def test_durations_are_read_at_a_glance():
    assert [duration(seconds) for seconds in (5.4, 3599.6, 86400 + 3661)] == ['00:05', '01:00:00', '1 d 01:01:01']


def test_tensorboard_has_the_curve_and_hides_what_was_done_again(runs):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs[1] / 'tensorboard')).Reload()
    curve = read_curve(runs[1] / 'curve.jsonl')
    for tag, name in (('train/loss', 'loss'), ('train/lr', 'lr'), ('val/top1', 'top1')):
        expected = [(record['iter'], pytest.approx(record[name], rel=1e-6)) for record in curve if name in record]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected
    assert [event.step for event in events.Scalars('speed/images_per_second')] == [4, 8, 12, 16]


def test_tensorboard_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(ImportError, match=r"pip install 'attention-zoo\[tensorboard\]'"):
        TensorBoard()


def long_curve(iterations=30_000):
    for i in range(10, iterations + 1, 10):
        yield {'iter': i, 'epoch': i / 1000, 'loss': 2.0 + i % 20 / 10, 'lr': 1e-3}
        if i % 1000 == 0:
            measures = {'top1': i / 400, 'top5': i / 310, 'val_loss': 3 - i / 15_000, 'images': i}
            yield {'iter': i, 'epoch': i / 1000, **measures}


def test_a_long_curve_is_thinned_to_means_of_all_its_points(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(pictures.Figure, 'savefig', lambda figure, path, dpi: drawn.append(figure))
    pictures.training_curve(list(long_curve()), tmp_path / 'curve.png')
    left, per_cent, others, rate = drawn[0].axes
    training = left.lines[0].get_xydata()
    assert len(training) == pictures.POINTS
    assert training[:, 1] == pytest.approx(2.5)  # of 2.0 and 3.0 by turns
    assert left.get_legend_handles_labels()[1] == ['training', 'val_loss: least 1 at 30, last 1']
    assert per_cent.get_legend_handles_labels()[1] == [
        'top1: best 75 at 30, last 75',
        'top5: best 96.77 at 30, last 96.77',
    ]
    assert [label.split(':')[0] for label in others.get_legend_handles_labels()[1]] == ['images']
    assert len(rate.lines[0].get_xydata()) == pictures.POINTS


@pytest.mark.parametrize(
    'curve',
    [
        [],
        [{'iter': 1, 'epoch': 0.1, 'loss': float('nan'), 'lr': 0.1}],
        [{'iter': 1, 'epoch': 0.1, 'top1': float('nan')}, {'iter': 2, 'epoch': 0.2, 'top1': 3.0}],
    ],
    ids=['nothing', 'a loss that is not a number', 'a measure that is not a number'],
)
def test_a_curve_is_drawn_of(curve, tmp_path):
    pictures.training_curve(curve, tmp_path / 'curve.png')
    assert (tmp_path / 'curve.png').read_bytes().startswith(b'\x89PNG')


def mean_worker(rank, port, folder):
    torch.distributed.init_process_group('gloo', init_method=f'tcp://localhost:{port}', rank=rank, world_size=2)
    curve = Curve(interval=2)
    runner = fake_runner(folder, [curve], max_iters=4)
    runner.call_hook('before_train')
    mesh = torch.distributed.init_device_mesh('cpu', (2,))
    gradient = distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [Shard(0)])
    for i in range(4):
        runner.optim_wrapper.grad_norm = gradient.norm()  # as clip_grad_norm_ gives it of sharded parameters
        curve.after_train_iter(runner, i, outputs={'loss': torch.tensor(10.0 * rank + i)})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='needs gloo')
def test_losses_are_means_over_the_processes(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(mean_worker, (port, tmp_path), nprocs=2, start_method='spawn')
    lines = [json.loads(line) for line in (tmp_path / 'curve.jsonl').read_text().splitlines()]
    assert [line['loss'] for line in lines] == [5.5, 7.5]
    assert [line['grad_norm'] for line in lines] == [5.0, 5.0]
    assert [b['iter'] - a['iter'] for a, b in itertools.pairwise(lines)] == [2]


def test_of_a_package_that_is_installed_twice_the_imported_version_is_recorded(tmp_path, monkeypatch):
    for folder, version in (('imported', '2.0'), ('shadowed', '1.0')):
        metadata = tmp_path / folder / f'twice-{version}.dist-info' / 'METADATA'
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f'Metadata-Version: 2.1\nName: twice\nVersion: {version}\n')
    monkeypatch.setattr(sys, 'path', [str(tmp_path / 'imported'), str(tmp_path / 'shadowed'), *sys.path])
    assert environment()['packages']['twice'] == '2.0'
