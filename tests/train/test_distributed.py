"""Several processes of one machine on the CPU: DDP, FSDP2, and torchrun."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killing import CONFIG, launch, run, same

from zoo.train import checkpoints
from zoo.train.config import load_config
from zoo.train.distributed import DataParallel, gather, process_group, shard, shard_like, synchronize_batchnorm
from zoo.train.run import train
from zoo.train.tasks import ImageClassifier

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='needs gloo')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('runs')


@pytest.fixture
def options(tiny):
    """10 iterations without BatchNorm, and without randomness that depends on the process."""
    return {
        **tiny,
        'model.backbone': {'name': 'test_convnext', 'num_classes': 3, '_delete_': True},
        'train_dataloader.batch_size': 3,
        'default_hooks.checkpoint.interval_iters': 4,
        'custom_hooks': [{'type': 'EMA', 'decay': 0.9}],
        'train_cfg.max_epochs': 1,
    }


@pytest.fixture
def two(folder, options):
    """A run of two processes by DDP."""
    if not (folder / 'two').exists():
        assert launch(run, folder / 'two', options, world=2) == [0, 0]
    return folder / 'two'


def assert_close(a, b, **tolerance):
    a, b = checkpoints.load(a), checkpoints.load(b)
    assert a['meta']['iter'] == b['meta']['iter']
    for part in ('state_dict', 'raw_state_dict'):
        for key, value in a[part].items():
            torch.testing.assert_close(b[part][key], value, **tolerance)
    for index, state in a['optimizer']['state'].items():
        for key, value in state.items():
            torch.testing.assert_close(b['optimizer']['state'][index][key], value, **tolerance)


def test_two_processes_train_one_model_on_halves_of_each_batch(two, options, tmp_path):
    """The same as one process on whole batches."""
    result = train(CONFIG, tmp_path, cfg_options={**options, 'train_dataloader.batch_size': 6}, preflight=False)
    assert result.checkpoint.name == 'iter_10.pth'
    assert_close(result.checkpoint, two / 'iter_10.pth', rtol=1e-3, atol=1e-4)
    lines = [json.loads(line) for line in (two / 'curve.jsonl').read_text().splitlines()]
    assert {key: lines[-1][key] for key in ('top1', 'top2')} == result.metrics


@pytest.fixture
def sharded(folder, options):
    """The same run by FSDP2."""
    if not (folder / 'sharded').exists():
        assert launch(run, folder / 'sharded', {**options, 'strategy': 'fsdp2'}, world=2) == [0, 0]
    return folder / 'sharded'


ROUNDING = {'rtol': 1e-4, 'atol': 1e-6}


def test_a_sharded_run_is_that_of_ddp_and_its_checkpoints_are_plain(two, sharded):
    assert_close(two / 'iter_10.pth', sharded / 'iter_10.pth', **ROUNDING)
    weights = torch.load(sharded / 'iter_10.pth', weights_only=True)['state_dict']
    assert all(type(value) is torch.Tensor for value in weights.values())


@pytest.mark.parametrize('second', ['fsdp2', pytest.param('ddp', marks=pytest.mark.slow)])
def test_each_strategy_goes_on_from_checkpoints_of_the_other(two, sharded, options, tmp_path, second):
    first = two if second == 'fsdp2' else sharded
    mixed = tmp_path / 'mixed'
    mixed.mkdir()
    for name in ('iter_8.pth', 'curve.jsonl'):
        (mixed / name).write_bytes((first / name).read_bytes())
    assert launch(run, mixed, {**options, 'strategy': second}, True, world=2) == [0, 0]
    assert_close(two / 'iter_10.pth', mixed / 'iter_10.pth', **ROUNDING)


def write_gradients(path, name, batch) -> None:
    """Gradients of two processes, or of one on the whole batch."""
    torch.manual_seed(0)
    model = ImageClassifier({'name': name, 'num_classes': 3}, {'type': 'cross_entropy'}).double()
    images = torch.randint(0, 256, (2 * batch, 3, 33, 35))
    labels = torch.randint(0, 3, (2 * batch,))
    with process_group():
        if torch.distributed.is_initialized():
            part = slice(torch.distributed.get_rank() * batch, (torch.distributed.get_rank() + 1) * batch)
            images, labels = images[part], labels[part]
            wrapped = DataParallel(model)
        else:
            wrapped = model
        wrapped(images, labels, mode='loss')['loss'].backward()
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            torch.save({key: value.grad for key, value in model.named_parameters()}, path)


def test_gradients_of_two_processes_are_those_of_one_at_twice_the_batch(tmp_path):
    for world in (1, 2):
        assert launch(write_gradients, tmp_path / f'{world}.pth', 'test_convnext', 3, world=world) == [0] * world
    one, both = (torch.load(tmp_path / f'{world}.pth') for world in (1, 2))
    assert one.keys() == both.keys()
    for key, value in one.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(both[key], value, rtol=1e-12, atol=1e-12)


def train_without_a_part(path) -> None:
    model = ImageClassifier({'name': 'test_convnext', 'num_classes': 3}, {'type': 'cross_entropy'})
    model.backbone.unused = torch.nn.Linear(2, 3)
    batch = torch.randint(0, 256, (2, 3, 32, 32)), torch.tensor([0, 1])
    with process_group():
        from mmengine.optim import OptimWrapper

        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1))
        wrapped = DataParallel(model)
        try:
            for _ in range(2):
                wrapped.train_step(batch, wrapper)
        except ValueError as error:
            if torch.distributed.get_rank() == 0:
                Path(path).write_text(str(error))


def test_parameters_without_a_gradient_are_named(tmp_path):
    assert launch(train_without_a_part, tmp_path / 'error', world=2) == [0, 0]
    message = (tmp_path / 'error').read_text()
    assert 'took no part in the loss: ' in message
    assert {'backbone.unused.weight', 'backbone.unused.bias'} <= set(re.findall(r'[\w.]+\w', message))
    assert 'find_unused_parameters=True' in message


def shard_and_gather(path) -> None:
    with process_group():
        model = ImageClassifier({'name': 'test_vit', 'num_classes': 3, 'img_size': 32}, {'type': 'cross_entropy'})
        whole = {key: value.clone() for key, value in model.state_dict().items()}
        for value in whole.values():
            torch.distributed.broadcast(value, src=0)
        shard(model)
        sharded = model.state_dict()
        again = {key: shard_like(value, sharded[key]) for key, value in whole.items()}
        model.load_state_dict(again)
        gathered = gather(model.state_dict())
        units = [name for name, module in model.named_modules() if type(module).__name__.startswith('FSDP')]
        if torch.distributed.get_rank() == 0:
            assert same(dict(gathered), whole)
            Path(path).write_text(json.dumps(units))


def test_each_block_is_a_shard_of_its_own(tmp_path):
    assert launch(shard_and_gather, tmp_path / 'units', world=2) == [0, 0]
    blocks = [name for name in json.loads((tmp_path / 'units').read_text()) if name]
    assert len(blocks) > 1
    assert all(re.fullmatch(r'backbone\.blocks\.\d+', name) for name in blocks)


def test_other_data_or_another_batch_is_no_run_to_resume(two, options, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'iter_8.pth').write_bytes((two / 'iter_8.pth').read_bytes())
    with pytest.raises(ValueError, match='batch of all processes: 6, this one has 3'):
        train(CONFIG, tmp_path / 'run', resume=True, cfg_options=options, preflight=False)


def test_synchronized_batchnorm_asks_for_gpus():
    if torch.cuda.is_available():
        pytest.skip('there are GPUs')
    with pytest.raises(ValueError, match='sync_bn needs GPUs'):
        synchronize_batchnorm(torch.nn.BatchNorm2d(3))


# torchrun itself. Each of its processes imports for some seconds.

TESTS = str(Path(__file__).parents[1])


def torchrun(folder, options, *hooks, arguments=(), resume=False):
    """`torchrun ARGUMENTS --nproc-per-node 2 -m zoo train CONFIG`, started."""
    options = {**options, 'custom_hooks': [*options['custom_hooks'], *hooks]}
    cfg = load_config(CONFIG, options)
    cfg.custom_imports = {'imports': ['killing']}
    for name in ('resize', 'shift', 'to_tensor'):  # what the datasets were made from
        cfg.pop(name)
    folder.mkdir(exist_ok=True)
    cfg.dump(folder / 'config.py')
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', *arguments, '-m', 'zoo', 'train']
    command += [
        str(folder / 'config.py'),
        '--work-dir',
        str(folder / 'run'),
        '--no-preflight',
        *(['--resume'] if resume else []),
    ]
    environment = {**os.environ, 'PYTHONPATH': TESTS, 'OMP_NUM_THREADS': '1'}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def wait_for(path, process):
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_job_with_its_traceback(options, tmp_path):
    process = torchrun(tmp_path, options, {'type': 'Failure', 'iteration': 5, 'rank': 1})
    wait_for(tmp_path / 'run' / 'iter_4.pth', process)
    start = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - start < 30
    assert process.returncode == 1
    assert 'ArithmeticError: a planted failure' in output
    assert 'killing.py' in output  # the traceback's place


@pytest.mark.slow
def test_a_restart_by_torchrun_resumes_to_the_same_bits(two, options, tmp_path):
    killer = {'type': 'Killer', 'moment': 'step', 'number': 7, 'rank': 1}
    process = torchrun(tmp_path, options, killer, arguments=['--max-restarts', '1'])
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    whole, restarted = (checkpoints.load(path / 'iter_10.pth') for path in (two, tmp_path / 'run'))
    for part in ('state_dict', 'raw_state_dict', 'optimizer', 'param_schedulers'):
        assert same(whole[part], restarted[part])
    assert (two / 'curve.jsonl').read_bytes() == (tmp_path / 'run' / 'curve.jsonl').read_bytes()


@pytest.mark.slow
def test_a_restart_by_torchrun_leaves_another_run_alone(two, options, tmp_path):
    (tmp_path / 'run').mkdir()
    kept = (two / 'iter_8.pth').read_bytes()
    (tmp_path / 'run' / 'iter_8.pth').write_bytes(kept)
    process = torchrun(tmp_path, options, arguments=['--max-restarts', '1'])
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 1
    assert 'has checkpoints of another run' in output
    assert [path.name for path in (tmp_path / 'run').glob('*.pth')] == ['iter_8.pth']
    assert (tmp_path / 'run' / 'iter_8.pth').read_bytes() == kept


@pytest.mark.slow
def test_a_signal_to_torchrun_leaves_a_checkpoint_to_resume(two, options, tmp_path):
    long = {**options, 'train_cfg.max_epochs': 200}
    process = torchrun(tmp_path, long)
    wait_for(tmp_path / 'run' / 'iter_8.pth', process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    reached = re.search(r'Stopped by a signal after iteration (\d+)', output)
    assert reached, output
    assert checkpoints.latest(tmp_path / 'run').name == f'iter_{reached[1]}.pth'
    assert checkpoints.newest_whole(tmp_path / 'run') == checkpoints.latest(tmp_path / 'run')
