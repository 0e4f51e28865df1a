import multiprocessing
import os
import resource
import subprocess
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
    checkpoints.export_weights(tmp_path / 'iter_1.pth', tmp_path / 'model.safetensors')
    loaded = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(tmp_path / 'model.safetensors'))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_full_disk_is_an_error_that_says_so_and_leaves_the_old_file(tmp_path):
    """A write that the system refuses half-way, by a limit on the size of files."""
    checkpoints.save({'iter': 8}, tmp_path / 'iter_8.pth')

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            checkpoints.save({'weights': torch.zeros(10**6)}, tmp_path / 'iter_9.pth')
        except checkpoints.CheckpointWriteError as error:
            (tmp_path / 'said').write_text(str(error))

    process = multiprocessing.get_context('fork').Process(target=write)
    process.start()
    process.join()
    said = (tmp_path / 'said').read_text()
    assert f'Cannot write {tmp_path}/iter_9.pth: File too large' in said
    assert 'The last checkpoint there is iter_8.pth' in said
    assert sorted(os.listdir(tmp_path)) == ['iter_8.pth', 'said']


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() != 0, reason='mounts a small disk')
def test_a_disk_without_space_is_an_error_that_says_so(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=100k', 'tmpfs', str(disk)], capture_output=True).returncode:
        pytest.skip('mounts are not allowed')
    try:
        with pytest.raises(checkpoints.CheckpointWriteError, match=r'No space left on device \(0 MiB are free'):
            checkpoints.save({'weights': torch.zeros(10**6)}, disk / 'iter_9.pth')
        assert os.listdir(disk) == []
    finally:
        subprocess.run(['umount', str(disk)], check=True)


def test_a_folder_that_is_gone_is_an_error_that_names_it(tmp_path):
    with pytest.raises(checkpoints.CheckpointWriteError, match=r'Cannot write .*/gone/iter_9\.pth: No such file'):
        checkpoints.save({}, tmp_path / 'gone' / 'iter_9.pth')


def test_a_file_and_its_folder_are_on_the_disk_before_the_write_returns(tmp_path, monkeypatch):
    order = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, 'fsync', lambda file: order.append(os.readlink(f'/proc/self/fd/{file}')) or fsync(file))
    monkeypatch.setattr(os, 'replace', lambda *paths: order.append('rename') or replace(*paths))
    if not os.path.exists('/proc/self/fd'):
        pytest.skip('no /proc')
    checkpoints.save({}, tmp_path / 'iter_9.pth')
    assert order == [f'{tmp_path}/iter_9.pth.tmp', 'rename', str(tmp_path)]


def test_what_killed_writes_left_is_removed_and_nothing_else(tmp_path):
    kept = {'iter_8.pth', 'best.pth', 'curve.jsonl', 'notes.tmp'}
    for name in (*kept, 'iter_9.pth.tmp', 'best.pth.tmp', 'model.safetensors.tmp'):
        (tmp_path / name).touch()
    checkpoints.clean(tmp_path)
    assert set(os.listdir(tmp_path)) == kept
