import pytest

from zoo.train import quickstart
from zoo.train.config import find_config

SMALL = """
_base_ = {base!r}
work_dir = {folder!r} + '/run'
model = dict(backbone=dict(dims=(32, 32, 32, 32), depths=(1, 1, 1, 1), topks=(1, 2, 2, -2)))
train_cfg = dict(max_epochs=1)
train_dataloader = dict(dataset=dict(root={folder!r} + '/digits'))
val_dataloader = dict(dataset=dict(root={folder!r} + '/digits'))
"""


def test_the_quickstart_reports_and_fails_below_the_accuracy_it_promises(tmp_path, monkeypatch, capsys):
    pytest.importorskip('sklearn')
    config = tmp_path / 'small.py'
    config.write_text(SMALL.format(base=str(find_config(quickstart.CONFIG)), folder=str(tmp_path)))
    monkeypatch.setattr(quickstart, 'CONFIG', str(config))
    monkeypatch.setattr(quickstart, 'REQUIRED_ACCURACY', 99.9)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'iter_7.pth').touch()  # an earlier quickstart's

    assert quickstart.main() == 1
    printed = capsys.readouterr().out
    assert 'FAILED: top-1 is' in printed
    assert '(1, 32, 16, 16)' in printed
    for name in ('curve.png', 'predictions.png', 'routes.png', 'model.safetensors', 'iter_48.pth'):
        assert name in printed
        assert (tmp_path / 'run' / name).stat().st_size > 0
    assert not (tmp_path / 'run' / 'iter_7.pth').exists()
