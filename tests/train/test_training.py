import json
from pathlib import Path

import pytest
import timm
import torch
from interruption import Interrupted
from mmengine.hooks import Hook

from zoo.train import checkpoints
from zoo.train.records import read_curve
from zoo.train.registry import DATASETS, HOOKS
from zoo.train.run import train

CONFIG = 'quickstart/biformer_digits'


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_training_learns_and_leaves_what_it_says(tiny, tmp_path):
    options = {**tiny, 'train_cfg.max_epochs': 4, 'optim_wrapper.optimizer.lr': 0.01, 'default_hooks.curve.interval': 4}
    result = train(CONFIG, tmp_path, cfg_options=options, preflight=False)
    losses = [record['loss'] for record in read_curve(result.curve) if 'loss' in record]
    assert len(losses) == 8  # of 32 iterations
    assert losses[-1] < 0.5 * losses[0]
    assert result.accuracy > 60
    assert result.picture.stat().st_size > 0
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ['iter_24.pth', 'iter_32.pth']
    assert result.checkpoint.name == 'iter_32.pth'

    # The exported weights, in a model from timm, make the same predictions: the accuracy counted by hand.
    model = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(result.weights)).eval()
    dataset = DATASETS.build({k: v for k, v in tiny['val_dataloader.dataset'].items() if k != '_delete_'})
    images, labels = zip(*dataset, strict=True)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        order = model((torch.stack(images) / 255 - mean) / std).argsort(dim=1, descending=True)
    for k in (1, 2):
        right = sum(label in row[:k] for label, row in zip(labels, order.tolist(), strict=True))
        assert result.metrics[f'top{k}'] == pytest.approx(100 * right / 15)

    best = max(record['top1'] for record in read_curve(result.curve) if 'top1' in record)
    assert checkpoints.load(result.best)['meta']['score'] == best


@pytest.mark.parametrize(
    ('stop', 'options'),
    [
        (13, {}),  # in the second epoch, past checkpoints at 5 and 10
        (9, {'custom_hooks': [{'type': 'EMA', 'decay': 0.9}], 'train_dataloader.num_workers': 2}),
        (8, {'optim_wrapper.type': 'AutocastOptimWrapper', 'model.mixup': {'mixup_alpha': 0.8, 'cutmix_alpha': 1.0}}),
    ],
    ids=['plain', 'average and workers', 'autocast and mixup'],
)
def test_a_resumed_run_ends_in_the_same_bits(tiny, tmp_path, stop, options):
    options = {**tiny, 'default_hooks.checkpoint.interval_iters': 4 if stop == 8 else 5, **options}
    if 'model.mixup' in options:
        options['train_dataloader.batch_size'] = 6  # mixup pairs the images of a batch
    whole = train(CONFIG, tmp_path / 'whole', cfg_options=options, preflight=False)
    hooks = [*options.get('custom_hooks', ()), {'type': 'StopAt', 'iteration': stop}]
    with pytest.raises(Interrupted):
        train(CONFIG, tmp_path / 'parts', cfg_options={**options, 'custom_hooks': hooks}, preflight=False)
    resumed = train(CONFIG, tmp_path / 'parts', resume=True, cfg_options=options, preflight=False)
    a, b = checkpoints.load(whole.checkpoint), checkpoints.load(resumed.checkpoint)
    for meta in (a.pop('meta'), b.pop('meta')):
        meta.pop('cfg')  # has the folder's name
    assert equal(a, b)
    assert resumed.metrics == whole.metrics
    validations = [[r for r in read_curve(result.curve) if 'loss' not in r] for result in (whole, resumed)]
    assert validations[0] == validations[1]
    assert checkpoints.load(whole.best)['meta']['score'] == checkpoints.load(resumed.best)['meta']['score']


def test_resuming_a_finished_run_gives_its_result(tiny, tmp_path):
    first = train(CONFIG, tmp_path, cfg_options=tiny, preflight=False)
    weights = first.weights.read_bytes()
    assert train(CONFIG, tmp_path, resume=True, cfg_options=tiny, preflight=False) == first
    assert first.weights.read_bytes() == weights
    with pytest.raises(FileExistsError, match='another run'):
        train(CONFIG, tmp_path, cfg_options=tiny, preflight=False)


@HOOKS.register_module()
class EndAfter(Hook):
    """Stand-in for mmengine's EarlyStoppingHook."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.train_loop.stop_training = batch_idx == 2


def test_a_run_that_a_hook_ends_early_leaves_its_last_checkpoint(tiny, tmp_path):
    options = {**tiny, 'train_dataloader.batch_size': 20, 'custom_hooks': [{'type': 'EndAfter'}]}
    result = train(CONFIG, tmp_path, cfg_options=options, preflight=False)
    assert result.checkpoint.name == 'iter_3.pth'
    assert checkpoints.load(result.checkpoint)['meta']['iter'] == 3


def test_a_record_cut_short_by_a_kill_is_left_out(tmp_path):
    path = Path(tmp_path, 'curve.jsonl')
    path.write_text(json.dumps({'iter': 10, 'loss': 1.0}) + '\n{"iter": 20, "lo')
    assert read_curve(path) == [{'iter': 10, 'loss': 1.0}]
