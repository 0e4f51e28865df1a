"""Two processes of one machine on the CPU."""

import json
import socket

import pytest
import torch
from torch import multiprocessing

from zoo.train import checkpoints
from zoo.train.run import train


def worker(rank, port, folder, options, resume):
    import os

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=port)
    result = train('quickstart/biformer_digits', folder, resume=resume, cfg_options=options)
    (folder / f'result{rank}.json').write_text(json.dumps([result.metrics, str(result.checkpoint)]))
    torch.distributed.destroy_process_group()


def launch(*arguments):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    multiprocessing.start_processes(worker, (port, *arguments), nprocs=2, start_method='spawn')
    return [json.loads((arguments[0] / f'result{rank}.json').read_text()) for rank in range(2)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='needs gloo')
def test_two_processes_train_one_model_on_halves_of_each_batch(tiny, tmp_path):
    """Without BatchNorm and randomness in the model, the same as one process on whole batches."""
    options = {
        **tiny,
        'model.backbone': {'name': 'test_convnext', 'num_classes': 3, '_delete_': True},
        'train_dataloader.batch_size': 3,
        'train_cfg.max_epochs': 1,
    }
    results = launch(tmp_path / 'two', options, False)
    assert results[0] == results[1]
    single = train(
        'quickstart/biformer_digits', tmp_path / 'one', cfg_options={**options, 'train_dataloader.batch_size': 6}
    )
    one, two = (checkpoints.load(path) for path in (single.checkpoint, results[0][1]))
    assert one['meta']['iter'] == two['meta']['iter'] == 10
    for key, value in one['state_dict'].items():
        torch.testing.assert_close(two['state_dict'][key], value, rtol=1e-3, atol=1e-4)
    assert single.metrics == results[0][0]
