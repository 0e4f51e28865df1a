"""The average of the weights: its values, what is validated and exported, and its resume."""

from types import SimpleNamespace

import pytest
import timm
import torch
from mmengine.hooks import Hook
from timm.utils import ModelEmaV3

from zoo.train import checkpoints
from zoo.train.ema import EMA
from zoo.train.registry import HOOKS
from zoo.train.run import train

CONFIG = 'quickstart/biformer_digits'


@pytest.mark.parametrize('warmup', [False, True])
@pytest.mark.parametrize('buffers', ['average', 'copy'])
def test_the_average_is_timms(warmup, buffers):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3)
    timms = ModelEmaV3(model, decay=0.9, use_warmup=warmup)
    ours = EMA(decay=0.9, warmup=warmup, buffers=buffers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(1, 8):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        timms.update(model, step=step)
        ours.update(model, step)
    names = {name for name, _ in model.named_buffers()} if buffers == 'copy' else set()
    for name, value in timms.module.state_dict().items():
        assert torch.equal(ours.average[name], model.state_dict()[name] if name in names else value)


def test_weights_of_half_precision_are_averaged_in_float32():
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    average = EMA(decay=0.9999)
    average.update(model, 1)
    with torch.no_grad():
        model.weight += 1
    before = average.average['weight'].clone()
    average.update(model, 2)
    torch.testing.assert_close(average.average['weight'], before + 1e-4, rtol=0, atol=2e-6)


def test_the_average_steps_with_the_optimizer_not_with_its_batches():
    model = torch.nn.Linear(1, 1)
    wrapper = SimpleNamespace(accumulative_counts=3)
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper, max_iters=20)
    average = EMA(decay=0.5, interval=2)
    average.before_train(runner)
    taken = []
    average.update = lambda module, step: taken.append(step)
    for batch in range(20):
        average.after_train_iter(runner, batch)
    assert taken == [2, 4, 6]  # of 6 whole steps and a shorter seventh
    average.interval = 1
    average.after_train_iter(runner, 19)
    assert taken[-1] == 7


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        ({'decay': 1.0}, r'\[0, 1\), got 1\.0'),
        ({'validate': 'ema'}, "got 'ema'"),
        ({'interval': 0}, 'positive integer, got 0'),
        ({'buffers': 'none'}, "got 'none'"),
    ],
)
def test_a_wrong_argument_is_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        EMA(**arguments)


@HOOKS.register_module()
class Stop(Hook):
    priority = 'VERY_LOW'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == 13:
            raise InterruptedError


@pytest.fixture
def options(tiny):
    return {**tiny, 'default_hooks.checkpoint.interval_iters': 5, 'optim_wrapper.optimizer.lr': 0.01}


def hook(validate, decay=0.8):
    return {'type': 'EMA', 'decay': decay, 'validate': validate}


@pytest.mark.parametrize('validate', ['average', pytest.param('raw', marks=pytest.mark.slow)])
def test_an_interrupted_run_resumes_both_weights_to_the_bit(options, tmp_path, validate):
    options['custom_hooks'] = [hook(validate)]
    whole = train(CONFIG, tmp_path / 'whole', preflight=False, cfg_options=options)
    stop = {**options, 'custom_hooks': [hook(validate), {'type': 'Stop'}]}
    with pytest.raises(InterruptedError):
        train(CONFIG, tmp_path / 'parts', preflight=False, cfg_options=stop)
    resumed = train(CONFIG, tmp_path / 'parts', resume=True, preflight=False, cfg_options=options)
    assert resumed.metrics == whole.metrics
    one, other = (checkpoints.load(result.checkpoint) for result in (whole, resumed))
    second = {'average': 'raw_state_dict', 'raw': 'average_state_dict'}[validate]
    for key in ('state_dict', second):
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items())
    differ = [not torch.equal(value, one[second][name]) for name, value in one['state_dict'].items()]
    assert sum(differ) > len(differ) / 2


def test_what_is_validated_is_exported_and_the_other_does_not_disturb_training(options, tmp_path):
    options['train_cfg.max_epochs'] = 1
    results = {
        validate: train(
            CONFIG,
            tmp_path / validate,
            preflight=False,
            cfg_options={**options, 'custom_hooks': [hook(validate, 0.97)]},
        )
        for validate in ('average', 'raw')
    }
    plain = train(CONFIG, tmp_path / 'plain', preflight=False, cfg_options=options)
    weights = {name: checkpoints.load(result.checkpoint) for name, result in {**results, 'plain': plain}.items()}
    exported = {
        name: timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(result.weights)).state_dict()
        for name, result in {**results, 'plain': plain}.items()
    }
    for key, value in exported['plain'].items():
        assert torch.equal(value, exported['raw'][key])
        assert torch.equal(value, weights['average']['raw_state_dict'][f'backbone.{key}'])
        assert torch.equal(exported['average'][key], weights['raw']['average_state_dict'][f'backbone.{key}'])
    assert results['raw'].metrics == plain.metrics
