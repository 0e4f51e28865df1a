"""Runs killed with -9, and resumed, end in the bits of a run that wasn't."""

import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from killing import CONFIG, MOMENTS, launch, run, same

from zoo.train import checkpoints
from zoo.train.config import load_config
from zoo.train.signals import PREEMPTED

# Calls of each moment's function in one run, at least, from which its number is drawn.
CALLS = {
    'forward': 20,
    'step': 8,  # of 10, of which the loss scale leaves some out
    'after step': 8,
    'validation': 4,
    'record': 7,
    'write': 5,
    'rename': 5,
    'after rename': 5,
    'removal': 2,
}
RANDOM = random.Random(20)
DRAWN = [(moment, RANDOM.randint(1, CALLS[moment])) for moment in (*MOMENTS, *MOMENTS, 'write', 'validation')]


@pytest.fixture(scope='module')
def references(tmp_path_factory):
    """Folders of uninterrupted runs by their arguments, each run once."""
    return tmp_path_factory.mktemp('whole'), {}


@pytest.fixture
def options(tiny):
    """20 iterations with all that has a state: average, accumulation, loss scale, mixup, depths, augmentation."""
    chosen = {
        **tiny,
        'train_dataloader.batch_size': 6,
        'train_dataloader.num_workers': 0,
        'val_dataloader.batch_size': 4,
        'default_hooks.checkpoint.interval_iters': 5,  # in the middle of an accumulation
        'default_hooks.curve.interval': 4,
        'optim_wrapper.type': 'AutocastOptimWrapper',
        'optim_wrapper.dtype': 'float16',
        'optim_wrapper.accumulative_counts': 2,
        'model.mixup': {'mixup_alpha': 0.8, 'cutmix_alpha': 1.0},
        'custom_hooks': [{'type': 'EMA', 'decay': 0.9}],
    }
    for part in ('train', 'val'):
        steps = [dict(step) for step in chosen[f'{part}_dataloader.dataset']['transform']]
        steps[0]['size'] = (33, 31)
        chosen[f'{part}_dataloader.dataset'] = {**chosen[f'{part}_dataloader.dataset'], 'transform': steps}
    return chosen


def reference(references, options, world):
    # 20 iterations, validated twice: an epoch is 10 of one process, and 4 of two, a whole number of updates.
    epochs, interval = {1: (2, 1), 2: (5, 3)}[world]
    options.update({'train_cfg.max_epochs': epochs, 'train_cfg.val_interval': interval})
    folder, done = references
    workers = options['train_dataloader.num_workers']
    path = folder / f'{world}-{workers}'
    if path not in done:
        assert launch(run, path, options, world=world) == [0] * world
        done[path] = True
    return path


def assert_same_run(whole, resumed):
    """Weights, average, optimizer, scale, schedules; the best ones; the exported ones; the record of the run."""
    for name in ('iter_20.pth', 'best.pth'):
        a, b = (checkpoints.load(folder / name) for folder in (whole, resumed))
        for meta in (a['meta'], b['meta']):
            meta.pop('cfg')  # has the folder's name
        assert same(a, b), name
    for name in ('model.safetensors', 'curve.jsonl'):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    left = {path.name for path in resumed.glob('*.tmp')}
    assert not left
    assert [path.name for path in checkpoints.numbered(resumed)] == [path.name for path in checkpoints.numbered(whole)]


def with_hook(options, hook):
    return {
        **options,
        'custom_hooks': [*options['custom_hooks'], hook],
        'custom_imports': {'imports': ['killing'], '_delete_': True},
    }


def interrupt_and_resume(references, tmp_path, options, world, moment, number, rank=0):
    whole = reference(references, options, world)
    killer = {'type': 'Killer', 'moment': moment, 'number': number, 'rank': rank}
    codes = launch(run, tmp_path / 'parts', with_hook(options, killer), world=world)
    assert codes[rank] == -9
    assert 0 not in codes
    assert launch(run, tmp_path / 'parts', options, True, world=world) == [0] * world
    assert_same_run(whole, tmp_path / 'parts')


@pytest.mark.parametrize(('moment', 'number'), [('write', 4), ('validation', 4)])
def test_a_killed_run_resumes_to_the_same_bits(references, options, tmp_path, moment, number):
    options['train_dataloader.num_workers'] = 2
    interrupt_and_resume(references, tmp_path, options, 1, moment, number)


@pytest.mark.parametrize(
    ('name', 'world', 'rank', 'last'),
    [('SIGTERM', 1, 0, 8), ('SIGUSR1', 2, 1, 8)],
)
def test_a_signal_to_one_process_stops_all_after_the_next_update(
    references, options, tmp_path, name, world, rank, last
):
    """Sent in the seventh iteration, of which every second one updates the weights."""
    options['train_dataloader.num_workers'] = 3 - world  # as the references of other tests
    whole = reference(references, options, world)
    killer = {'type': 'Killer', 'moment': 'forward', 'number': 7, 'rank': rank, 'signal': name}
    codes = launch(run, tmp_path / 'parts', with_hook(options, killer), world=world)
    assert codes == [PREEMPTED] * world
    assert checkpoints.latest(tmp_path / 'parts').name == f'iter_{last}.pth'
    assert launch(run, tmp_path / 'parts', options, True, world=world) == [0] * world
    assert_same_run(whole, tmp_path / 'parts')


def test_a_full_disk_stops_all_processes_and_keeps_the_last_checkpoint(references, options, tmp_path):
    options['train_dataloader.num_workers'] = 1
    whole = reference(references, options, 2)
    codes = launch(run, tmp_path / 'parts', with_hook(options, {'type': 'FullDisk', 'iteration': 8}), world=2)
    assert codes == [1, 1]
    message = (tmp_path / 'error0.txt').read_text()
    assert 'CheckpointWriteError: Cannot write' in message
    assert 'iter_10.pth: File too large' in message
    assert 'The last checkpoint there is iter_6.pth; --resume goes on from it' in message
    assert 'RuntimeError: The first process has failed. CheckpointWriteError' in (tmp_path / 'error1.txt').read_text()
    assert {path.name for path in (tmp_path / 'parts').glob('*.pth*')} == {'iter_6.pth'}
    assert launch(run, tmp_path / 'parts', options, True, world=2) == [0, 0]
    assert_same_run(whole, tmp_path / 'parts')


@pytest.mark.parametrize('harm', ['cut', 'flipped', 'empty'])
def test_a_torn_newest_checkpoint_is_named_and_passed_over(references, options, tmp_path, harm):
    options['train_dataloader.num_workers'] = 2
    whole = reference(references, options, 1)
    parts = tmp_path / 'parts'
    shutil.copytree(whole, parts)
    torn = parts / 'iter_20.pth'
    content = torn.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    torn.write_bytes({'cut': content[:-100], 'flipped': flipped, 'empty': b''}[harm])
    harmed = torn.read_bytes()
    with pytest.warns(UserWarning, match=r'passed over for iter_16\.pth: iter_20\.pth'):
        assert checkpoints.newest_whole(parts) == parts / 'iter_16.pth'
    assert torn.read_bytes() == harmed
    if harm == 'flipped':
        assert launch(run, parts, options, True) == [0]
        assert_same_run(whole, parts)


def test_without_any_whole_checkpoint_a_resume_is_refused(tmp_path):
    (tmp_path / 'iter_5.pth').write_bytes(b'PK')
    with pytest.raises(ValueError, match=r'No checkpoint in .* is whole: iter_5\.pth'):
        checkpoints.newest_whole(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('case', range(20))
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(references, options, tmp_path, case):
    moment, number = DRAWN[case]
    options['train_dataloader.num_workers'] = case % 3
    world = 1 + case // 3 % 2
    rank = case % world if moment in ('forward', 'step', 'after step', 'validation') else 0  # the first one writes
    interrupt_and_resume(references, tmp_path, options, world, moment, number, rank)


@pytest.mark.slow
@pytest.mark.parametrize('seconds', [RANDOM.uniform(0, 1.5) for _ in range(2)])
def test_a_command_killed_at_a_random_time_resumes_to_the_same_bits(references, options, tmp_path, seconds):
    """`zoo train`, seconds after its first checkpoint."""
    options['train_dataloader.num_workers'] = 1
    whole = reference(references, options, 1)
    cfg = load_config(CONFIG, options)
    for name in ('resize', 'shift', 'to_tensor'):  # what the datasets were made from
        cfg.pop(name)
    cfg.dump(tmp_path / 'config.py')
    parts = tmp_path / 'parts'
    command = [sys.executable, '-m', 'zoo', 'train', str(tmp_path / 'config.py'), '--work-dir', str(parts)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([*command, '--no-preflight'], env=environment)
    while not (parts / 'iter_6.pth').exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.wait()
    subprocess.run([*command, '--resume'], env=environment, check=True)
    assert_same_run(whole, parts)
