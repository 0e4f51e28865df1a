"""Schedules, lengths and parameter groups as the configs of detection and segmentation state them."""

import math

import pytest
import torch
from torch import nn

from zoo.train.dense.task import DenseTask
from zoo.train.optim import OptimWrapper, dense_param_groups
from zoo.train.registry import MODELS, PARAM_SCHEDULERS


def rates(end, accumulated=1, lr=2e-4, **schedule):
    wrapper = OptimWrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr), accumulated)
    built = PARAM_SCHEDULERS.build(
        {'type': 'DenseLR', 'by_epoch': False, 'end': end, **schedule},
        default_args={'optimizer': wrapper, 'epoch_length': 10},
    )
    found = []
    for _ in range(end):
        found.append(wrapper.param_groups[0]['lr'])
        wrapper.step()
        built.step()
    return found, built


def test_steps_fall_at_the_milestones_after_a_warm_up():
    found, _ = rates(120, sched='step', milestones=(8 / 12, 11 / 12), warmup_steps=10, warmup_start=0.1)
    expected = [2e-4 * 0.1 ** ((t >= 80) + (t >= 110)) for t in range(120)]
    expected[:10] = [2e-4 * (1 - (1 - t / 10) * 0.9) for t in range(10)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ('schedule', 'factor'),
    [
        ({'sched': 'poly', 'power': 0.9}, lambda x: (1 - x) ** 0.9),
        ({'sched': 'poly', 'min_ratio': 0.1}, lambda x: 0.1 + 0.9 * (1 - x)),
        ({'sched': 'cosine', 'min_ratio': 1e-8}, lambda x: 1e-8 + (1 - 1e-8) * (1 + math.cos(math.pi * x)) / 2),
    ],
)
def test_the_rate_is_the_schedules_times_the_warm_ups(schedule, factor):
    found, _ = rates(160, **schedule, warmup_steps=15, warmup_start=1e-6)
    ramp = [min(1, 1 - (1 - t / 15) * (1 - 1e-6)) for t in range(160)]
    assert found == pytest.approx([2e-4 * factor(t / 160) * ramp[t] for t in range(160)])


def test_accumulated_batches_share_the_rate_of_their_step():
    every, _ = rates(30, sched='poly', warmup_steps=5)
    fourfold, built = rates(120, 4, sched='poly', warmup_steps=5)
    assert fourfold == [rate for rate in every for _ in range(4)]
    assert built.steps == 30


@pytest.mark.parametrize(
    ('schedule', 'says'),
    [
        ({'sched': 'linear'}, "'linear'"),
        ({'sched': 'step', 'milestones': (8, 11)}, 'fractions'),
        ({'sched': 'poly', 'warmup_steps': 11}, '11'),
    ],
)
def test_a_wrong_schedule_is_refused(schedule, says):
    with pytest.raises(ValueError, match=says):
        rates(10, **schedule)


class Toy(DenseTask):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.head = nn.Conv2d(self.feature_info.channels()[-1], 2, 1)


def test_all_is_decayed_but_what_a_recipe_exempts():
    task = Toy(backbone={'name': 'nat_mini', 'output_norms': 1e-5})
    groups = dense_param_groups(task, 1e-4, 0.05, no_decay=('rpb', 'norm'), backbone_lr=0.1)
    named = {parameter: name for name, parameter in task.named_parameters()}
    found = {named[p]: (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    assert set(found) == set(named.values())
    for name, (lr, decay) in found.items():
        assert lr == pytest.approx(1e-5 if name.startswith('backbone.') else 1e-4), name
        assert decay == (0.0 if 'rpb' in name or 'norm' in name else 0.05), name
    assert found['head.bias'] == (1e-4, 0.05)


def test_layers_of_the_backbone_have_falling_rates():
    task = Toy(backbone={'name': 'van_b0'})
    named = {parameter: name for name, parameter in task.named_parameters()}
    groups = dense_param_groups(task, 1.0, layer_decay=0.5)
    found = {named[p]: group['lr'] for group in groups for p in group['params']}
    inner = task.backbone.model.model
    last = max(float(math.log2(1 / rate)) for rate in found.values())
    assert found['head.weight'] == 1.0
    assert last == round(last) > 4
    first = next(name for name, _ in inner.named_parameters() if name.startswith('stages.0'))
    final = next(name for name, _ in inner.named_parameters() if name.startswith('stages.3.norm'))
    assert found[f'backbone.model.model.{first}'] < found[f'backbone.model.model.{final}'] <= 0.5


def test_names_that_nothing_bears_and_models_without_layers_are_refused():
    with pytest.raises(ValueError, match='relative_position'):
        dense_param_groups(Toy(backbone={'name': 'van_b0'}), 1.0, no_decay=('relative_position',))
    with pytest.raises(ValueError, match='group_matcher'):
        dense_param_groups(Toy(backbone={'name': 'test_resnet'}), 1.0, layer_decay=0.5)


def test_a_batch_is_normalized_and_padded_to_its_largest_image():
    task = Toy(backbone={'name': 'van_b0'}, size_divisor=32)
    images = [torch.full((3, 40, 70), 255, dtype=torch.uint8), torch.zeros(3, 50, 20, dtype=torch.uint8)]
    batch = task.batch(images)
    assert batch.shape == (2, 3, 64, 96)
    assert (batch[0, :, :40, :70] == 1).all()  # VAN's mean and deviation are 0.5
    assert (batch[1, :, :50, :20] == -1).all()
    assert not batch[0, :, 40:].any()
    assert not batch[1, :, :, 20:].any()
    with pytest.raises(ValueError, match=r'\(3, H, W\), got \(1, 4, 4\)'):
        task.batch([torch.zeros(1, 4, 4)])
    with pytest.raises(ValueError, match='at least one'):
        task.batch([])


def test_images_are_padded_to_what_added_levels_need():
    neck = {'type': 'FPN', 'strides': (8, 16, 32, 64)}
    assert Toy(backbone={'name': 'shvit_s1'}, neck=neck).feature_info.reduction() == [8, 16, 32, 64]
    with pytest.raises(ValueError, match='finer than stride 16, of which size_divisor must be a multiple, got 8'):
        Toy(backbone={'name': 'shvit_s1'}, neck=neck, size_divisor=8)


def test_frozen_norms_keep_their_statistics_and_learn_their_weights():
    task = Toy(backbone={'name': 'test_resnet'}, frozen_norms=True).train()
    norms = [module for module in task.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    sum(x.square().mean() for x in task.extract(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))
    assert any(norm.weight.grad.any() for norm in norms)


def test_a_backbone_without_maps_is_refused():
    with pytest.raises(ValueError, match='no_such_model'):
        Toy(backbone={'name': 'no_such_model'})
    with pytest.raises(ValueError, match='van_b0'):
        Toy(backbone={'name': 'van_b0', 'out_indices': (7,)})
    with pytest.raises(KeyError, match='NoNeck'):
        MODELS.build({'type': 'NoNeck'})
