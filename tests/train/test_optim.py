"""Optimizers, gradient accumulation and clipping, precision, learning rates, and the batch that a config comes to."""

import copy
import itertools

import pytest
import timm
import torch
from mmengine.config import Config
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from zoo.train.batches import effective_batch, fit
from zoo.train.optim import AutocastOptimWrapper, OptimWrapper, TimmParamGroups, param_groups
from zoo.train.registry import OPTIMIZERS, PARAM_SCHEDULERS
from zoo.train.samplers import ShuffledStream
from zoo.train.schedules import TimmLR


def parameters(*rates):
    return [{'params': [nn.Parameter(torch.ones(2, 2))], 'lr': rate} for rate in rates]


@pytest.mark.filterwarnings('ignore:It is highly recommended to have .opt_einsum')
def test_every_optimizer_of_timm_is_built_by_its_name_with_timms_defaults():
    for name in list_optimizers():
        try:
            expected = create_optimizer_v2(parameters(0.1), name, lr=0.1, weight_decay=0.05)
        except (AssertionError, ImportError):  # needs CUDA or a library
            with pytest.raises((AssertionError, ImportError)):
                OPTIMIZERS.build({'type': f'timm/{name}', 'params': parameters(0.1), 'lr': 0.1})
            continue
        built = OPTIMIZERS.build({'type': f'timm/{name}', 'params': parameters(0.1), 'lr': 0.1, 'weight_decay': 0.05})
        assert type(built) is type(expected)
        assert built.defaults == expected.defaults


def test_param_groups_decay_and_exempt_what_a_recipe_names():
    model = timm.create_model('nat_mini', device='meta')
    names = dict(model.named_parameters())
    decayed = {
        name
        for group in param_groups(model, 1e-3, 0.05, decay=['*.norm1.weight'], no_decay=['*.rpb'])
        for name, parameter in names.items()
        if group['weight_decay'] and any(parameter is other for other in group['params'])
    }
    assert {name for name in names if name.endswith('.norm1.weight')} <= decayed
    assert not any(name.endswith(('.rpb', '.bias', '.norm2.weight')) for name in decayed)
    assert {name for name in names if name.endswith('.qkv.weight')} <= decayed
    with pytest.raises(ValueError, match=r"'\*\.rpbs'"):
        param_groups(model, 1e-3, 0.05, decay=['*.rpbs'])


def test_layer_decay_keeps_its_factor_beside_the_rate():
    model = timm.create_model('test_vit', num_classes=3)
    groups = param_groups(model, lr=0.5, weight_decay=0.05, layer_decay=0.5, decay=['*.norm1.weight'])
    assert sum(len(group['params']) for group in groups) == len(list(model.parameters()))
    assert all(group['lr'] == 0.5 * group['lr_scale'] for group in groups)
    assert len({group['lr_scale'] for group in groups}) > 3


@pytest.mark.parametrize('steps', [6, 7])
def test_accumulated_batches_make_the_step_of_their_union(steps):
    """In float64, over whole steps and a shorter last one."""
    torch.manual_seed(0)
    model = timm.create_model('test_convnext', num_classes=3).double()  # without statistics of a batch
    images, labels = torch.randn(2 * steps, 3, 32, 32, dtype=torch.float64), torch.randint(3, (2 * steps,))
    models = []
    for accumulated in (3, 1):
        model_ = copy.deepcopy(model)
        wrapper = TimmParamGroups(
            {
                'type': 'OptimWrapper',
                'optimizer': {'type': 'SGD', 'lr': 0.1, 'momentum': 0.9, 'weight_decay': 0.05},
                'accumulative_counts': accumulated,
                'clip_grad': {'max_norm': 0.1},
            }
        )(nn.ModuleDict({'backbone': model_}))
        parts = range(0, 2 * steps, 6 // accumulated)
        wrapper.initialize_count_status(model_, 0, len(parts))
        for start in parts:
            part = slice(start, start + 6 // accumulated)
            wrapper.update_params(nn.functional.cross_entropy(model_(images[part]), labels[part]))
            assert wrapper.should_update() == (part.stop % 6 == 0 or part.stop >= 2 * steps)
        models.append(model_)
    for many, one in zip(*(model_.parameters() for model_ in models), strict=True):
        torch.testing.assert_close(many, one, rtol=0, atol=1e-12)


def test_accumulation_draws_the_same_images_in_each_step_as_more_processes():
    """Epochs too are of the same steps."""
    sizes = {}
    for world_size, accumulated in ((4, 1), (1, 4), (2, 2)):
        streams = []
        for rank in range(world_size):
            stream = ShuffledStream(range(61), seed=3, multiple=5 * accumulated)
            stream.rank, stream.world_size = rank, world_size
            streams.append([draw for draw, _ in zip(stream, range(200), strict=False)])
        step = 5 * accumulated
        sizes[world_size] = (
            [{draw for stream in streams for draw in stream[start : start + step]} for start in range(0, 50, step)][:2],
            len(stream) // step,
        )
    assert sizes[4] == sizes[1] == sizes[2]
    assert sizes[1][1] == 61 // 20


@pytest.mark.parametrize(
    ('clip_grad', 'expected'),
    [
        ({'max_norm': 0.1}, lambda p: nn.utils.clip_grad_norm_(p, 0.1)),
        ({'type': 'value', 'clip_value': 0.01}, lambda p: nn.utils.clip_grad_value_(p, 0.01)),
        ({'type': 'agc', 'clip_factor': 0.02}, lambda p: adaptive_clip_grad(p, 0.02)),
    ],
)
def test_clipping_is_torchs_and_timms(clip_grad, expected):
    torch.manual_seed(0)
    clipped = nn.Linear(3, 4)
    reference = copy.deepcopy(clipped)
    before = copy.deepcopy(clip_grad)
    wrapper = OptimWrapper(torch.optim.SGD(clipped.parameters(), 1.0), clip_grad=clip_grad)
    assert clip_grad == before  # a config is not used up
    wrapper.update_params(clipped(torch.ones(2, 3)).square().sum())
    reference(torch.ones(2, 3)).square().sum().backward()
    norm = expected(list(reference.parameters()))
    torch.optim.SGD(reference.parameters(), 1.0).step()
    assert all(map(torch.equal, clipped.parameters(), reference.parameters()))
    if 'max_norm' in clip_grad:
        assert torch.equal(wrapper.grad_norm, norm)


def test_wrong_clipping_and_accumulation_are_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    with pytest.raises(ValueError, match="norm, value, agc, got 'agv'"):
        OptimWrapper(optimizer, clip_grad={'type': 'agv', 'clip_factor': 0.02})
    with pytest.raises(ValueError, match='positive integer, got 0'):
        OptimWrapper(optimizer, accumulative_counts=0)


def fp16(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = nn.Linear(3, 4)
    return model, AutocastOptimWrapper('float16', optimizer=torch.optim.SGD(model.parameters(), 0.1), **kwargs)


def step(model, wrapper, factor=1.0):
    with wrapper.optim_context(model):
        output = model(torch.full((2, 3), 0.5))
    assert output.dtype == torch.float16
    wrapper.update_params((output.float() * factor).square().mean())


def test_float16_scales_its_loss_leaves_out_an_overflow_and_resumes():
    model, wrapper = fp16(clip_grad={'max_norm': 10.0})
    step(model, wrapper)
    before = copy.deepcopy(model.state_dict())
    step(model, wrapper, factor=float('inf'))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert wrapper.state_dict()['loss_scaler']['scale'] == 2.0**15
    other, resumed = fp16(seed=1, clip_grad={'max_norm': 10.0})
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    assert resumed.scaler.get_scale() == 2.0**15
    for both in ((model, wrapper), (other, resumed)):
        step(*both)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    plain = nn.Linear(3, 4)
    plain.load_state_dict(before)
    with torch.autocast('cpu', torch.float16):
        output = plain(torch.full((2, 3), 0.5))
    output.float().square().mean().backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


SCHEDULES = [
    {'sched': 'cosine', 'warmup_epochs': 3, 'warmup_lr': 1e-6, 'min_lr': 1e-5, 'cooldown_epochs': 2},
    {'sched': 'cosine', 'warmup_epochs': 2, 'warmup_lr': 1e-6, 'warmup_prefix': True},
    {'sched': 'cosine', 'k_decay': 0.8, 'noise': (0.4, 0.9), 'noise_seed': 7},
    {'sched': 'tanh', 'warmup_epochs': 1, 'warmup_lr': 1e-6},
    {'sched': 'step', 'decay_epochs': 3, 'decay_rate': 0.5},
    {'sched': 'multistep', 'decay_milestones': [2, 5], 'decay_rate': 0.1},
    {'sched': 'poly', 'decay_rate': 0.9, 'min_lr': 1e-5},
    {'sched': 'wsd', 'decay_epochs': 2, 'warmup_epochs': 1, 'warmup_lr': 1e-6},
    {'sched': 'rsqrt', 'decay_epochs': 2, 'warmup_epochs': 1, 'warmup_lr': 1e-6},
    {'sched': 'constant', 'warmup_epochs': 2, 'warmup_lr': 1e-6},
]
EPOCHS, STEPS, ACCUMULATED = 8, 5, 2  # steps of an epoch, batches of a step
SCALES = (1.0, 0.25)


def timms_rates(per_step, **arguments):
    """Rates of each optimizer step, by timm's own schedule, stepped as timm's train.py does."""
    groups = [{**group, 'lr_scale': scale} for group, scale in zip(parameters(1e-3, 1e-3), SCALES, strict=True)]
    optimizer = torch.optim.SGD(groups)
    length = EPOCHS - arguments.get('cooldown_epochs', 0)
    length -= arguments['warmup_epochs'] if arguments.get('warmup_prefix') else 0
    schedule, epochs = create_scheduler_v2(
        optimizer, num_epochs=length, step_on_epochs=not per_step, updates_per_epoch=STEPS, **arguments
    )
    assert epochs in (EPOCHS, length)
    schedule.step_update(0)
    schedule.step(0)
    for done in range(EPOCHS * STEPS):
        yield [group['lr'] for group in optimizer.param_groups]
        schedule.step_update(done + 1)
        if (done + 1) % STEPS == 0:
            schedule.step((done + 1) // STEPS)


def built(arguments, per_step):
    groups = [
        {**group, 'lr': group['lr'] * scale, 'lr_scale': scale}
        for group, scale in zip(parameters(1e-3, 1e-3), SCALES, strict=True)
    ]
    wrapper = OptimWrapper(torch.optim.SGD(groups, lr=1e-3), accumulative_counts=ACCUMULATED)
    cfg = {'type': 'TimmLR', 'convert_to_iter_based': True, 'per_step': per_step, **arguments}
    defaults = {'optimizer': wrapper, 'epoch_length': STEPS * ACCUMULATED, 'end': EPOCHS}  # as the runner gives them
    return wrapper, PARAM_SCHEDULERS.build(cfg, default_args=defaults)


@pytest.mark.parametrize('per_step', [False, True], ids=['by epoch', 'by step'])
@pytest.mark.parametrize('arguments', SCHEDULES, ids=lambda arguments: arguments['sched'])
def test_learning_rates_are_those_of_timms_own_schedules_also_after_a_resume(arguments, per_step):
    expected = [rates for rates in timms_rates(per_step, **arguments) for _ in range(ACCUMULATED)]
    wrapper, schedule = built(arguments, per_step)
    rates = []
    for batch in range(EPOCHS * STEPS * ACCUMULATED):
        if batch == 33:
            state = schedule.state_dict(), wrapper.state_dict()
            assert all(isinstance(value, int) for value in state[0].values())
            wrapper, schedule = built(arguments, per_step)
            wrapper.load_state_dict(state[1])
            schedule.load_state_dict(state[0])
        rates.append([group['lr'] for group in wrapper.optimizer.param_groups])
        wrapper.step()
        schedule.step()
    assert rates == [pytest.approx(rate, rel=1e-12) for rate in expected]


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        ({'sched': 'cosin'}, "got 'cosin'"),
        ({'warm_up': 3}, 'does not take warm_up.*warmup_epochs'),
        ({'cooldown_epochs': 8}, 'leave 0 to the cosine'),
        ({'warmup_steps': 3}, 'needs per_step'),
    ],
)
def test_a_wrong_schedule_is_refused(arguments, says):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    with pytest.raises(ValueError, match=says):
        TimmLR(optimizer, epoch_length=5, end=8, **arguments)


def test_a_warm_up_can_be_counted_in_steps():
    wrapper = OptimWrapper(torch.optim.SGD(parameters(1.0), 1.0), accumulative_counts=3)
    schedule = TimmLR(wrapper, epoch_length=9, end=10, per_step=True, warmup_steps=10, warmup_lr=0.0)
    rates = []
    for _ in range(10 * 3 + 1):
        rates.append(wrapper.optimizer.param_groups[0]['lr'])
        schedule.step()
    assert rates[::3] == pytest.approx([i / 10 for i in range(10)] + [rates[30]])
    assert rates[30] == pytest.approx(0.5 * (1 + torch.tensor(torch.pi * 10 / 30).cos().item()))


def config(**changes):
    cfg = Config(
        {
            'model': {'mixup': None},
            'train_dataloader': {'batch_size': 128, 'sampler': {'type': 'ShuffledStream'}},
            'optim_wrapper': {'optimizer': {'lr': 5e-4}},
            'param_scheduler': {'min_lr': 5e-6, 'warmup_lr': 5e-7},
            'total_batch': 1024,
            'scale_lr': {'base_batch': 512, 'scaled': ('lr', 'min_lr')},
        }
    )
    cfg.merge_from_dict(changes)
    return cfg


@pytest.mark.parametrize(
    ('world_size', 'batch', 'accumulated'), [(8, 128, 1), (1, 128, 8), (16, 64, 1), (2, 128, 4), (1024, 1, 1)]
)
def test_a_config_keeps_its_total_batch_on_any_machine(world_size, batch, accumulated):
    cfg = config()
    text = cfg.pretty_text
    fitted = fit(cfg, world_size)
    assert cfg.pretty_text == text
    assert effective_batch(fitted, world_size) == 1024
    assert (fitted.train_dataloader.batch_size, fitted.optim_wrapper.accumulative_counts) == (batch, accumulated)
    assert fitted.train_dataloader.sampler.get('multiple', batch) == batch * accumulated
    assert fitted.optim_wrapper.optimizer.lr == 1e-3
    assert (fitted.param_scheduler.min_lr, fitted.param_scheduler.warmup_lr) == (1e-5, 5e-7)
    assert fit(fitted, world_size).pretty_text == fitted.pretty_text


def test_rates_scale_with_the_batch_that_is_run():
    assert fit(config(total_batch=256), 1).optim_wrapper.optimizer.lr == 2.5e-4
    alone = config(total_batch=None)  # 3 processes of 128
    assert fit(alone, 3).optim_wrapper.optimizer.lr == pytest.approx(5e-4 * 384 / 512)
    fixed = config(scale_lr=None)
    assert fit(fixed, 1).optim_wrapper.optimizer.lr == 5e-4


@pytest.mark.parametrize(
    ('changes', 'world_size', 'says'),
    [
        ({}, 3, '3 processes do not divide total_batch=1024'),
        ({'total_batch': 127 * 2}, 1, 'no batch near train_dataloader.batch_size=100.*1, 2, 127'),
        ({'total_batch': 9, 'model.mixup': True}, 1, 'no even batch.*none'),
        ({'scale_lr.scaled': ('lr', 'lr_min')}, 8, "'lr_min'"),
        ({'scale_lr.base': 512}, 8, 'takes base_batch and scaled'),
    ],
)
def test_a_batch_that_cannot_be_is_refused(changes, world_size, says):
    cfg = config(**changes)
    if 'near' in says:
        cfg.train_dataloader.batch_size = 100
    with pytest.raises(ValueError, match=says):
        fit(cfg, world_size)


def test_repeated_augmentation_draws_as_timms_sampler():
    """Each image `repeats` times in a row, spread over the processes; an epoch as long as timm cuts it."""
    from timm.data.distributed_sampler import RepeatAugSampler

    size, world_size = 600, 4
    ours = []
    for rank in range(world_size):
        stream = ShuffledStream(range(size), seed=1, repeats=3)
        stream.rank, stream.world_size = rank, world_size
        timms = RepeatAugSampler(range(size), num_replicas=world_size, rank=rank, num_repeats=3)
        assert len(stream) == len(timms) == len(list(timms)) == 512 // world_size
        ours.append([index for index, _ in itertools.islice(stream, 2 * len(stream))])
    for epoch in range(2):
        part = slice(epoch * 128, epoch * 128 + 128)
        draws = [index for row in zip(*(stream[part] for stream in ours), strict=True) for index in row]
        runs = [len(list(run)) for _, run in itertools.groupby(draws)]
        assert runs == [3] * 170 + [2]  # as 512 = 170 x 3 + 2
        assert len(set(draws)) == 171


def test_a_stream_of_repeats_begins_anywhere_and_augments_each_repeat_by_a_key_of_its_own():
    stream = ShuffledStream(range(300), seed=1, repeats=3)
    whole = list(itertools.islice(stream, 700))
    stream.start = 413
    assert list(itertools.islice(stream, 100)) == whole[413:513]
    assert len({key for _, key in whole}) == 700
    with pytest.raises(ValueError, match='repeats must be a positive integer, got 0'):
        ShuffledStream(range(9), repeats=0)
