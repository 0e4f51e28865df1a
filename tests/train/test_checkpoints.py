import multiprocessing
import os
import time

import pytest
import timm
import torch

from zoo.train import checkpoints


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'iter_8.pth'
    checkpoints.save({'iter': 8}, path)
    context = multiprocessing.get_context('fork')
    is_writing = context.Event()

    def write(temporary):
        temporary.write_bytes(b'half of it')
        is_writing.set()
        time.sleep(60)

    process = context.Process(target=checkpoints.write_atomically, args=(path, write))
    process.start()
    assert is_writing.wait(60)
    process.kill()
    process.join()
    assert checkpoints.load(path) == {'iter': 8}
    assert checkpoints.latest(tmp_path) == path
    checkpoints.save({'iter': 9}, path)  # over what the killed one left
    assert checkpoints.load(path) == {'iter': 9}
    assert os.listdir(tmp_path) == [path.name]


def test_an_error_in_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'iter_8.pth'
    checkpoints.save({'iter': 8}, path)
    with pytest.raises((AttributeError, TypeError)):
        checkpoints.save({'iter': lambda: 9}, path)
    assert checkpoints.load(path) == {'iter': 8}


def test_a_checkpoint_with_code_is_refused(tmp_path):
    torch.save({'now': time.gmtime()}, tmp_path / 'foreign.pth')
    with pytest.raises(Exception, match='weights_only'):
        checkpoints.load(tmp_path / 'foreign.pth')


def test_the_latest_is_that_of_the_highest_number(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    for name in ('iter_9.pth', 'iter_100.pth', 'iter_20.pth.tmp', 'best.pth', 'iter_x.pth'):
        (tmp_path / name).touch()
    assert [path.stem for path in checkpoints.numbered(tmp_path)] == ['iter_9', 'iter_100']
    assert checkpoints.latest(tmp_path).name == 'iter_100.pth'


def test_exported_weights_load_in_timm(tmp_path):
    model = timm.create_model('test_resnet', num_classes=3)
    state = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    checkpoints.save({'state_dict': {**state, 'other': torch.ones(1)}}, tmp_path / 'iter_1.pth')
    checkpoints.export_backbone(tmp_path / 'iter_1.pth', tmp_path / 'model.safetensors')
    loaded = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(tmp_path / 'model.safetensors'))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
