"""Checks of batch, learning rate, parameter groups and gradients."""

import copy
import fnmatch
import itertools
import math
import time

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from .checks import check, error, names, number, ok, require, stated, warning
from .findings import Finding
from .rehearsal import Rehearsal

CUT = 100  # how much greater than its clip a gradient may be
OVERFIT_STEPS = 60
OVERFIT_IMAGES = 8
FOLLOW_SECONDS = 30  # of a schedule
TIE = 1e-6  # relative difference of rates that are the same


@check()
def effective_batch(run: Rehearsal) -> Finding:
    """Images in an optimizer step: processes x batch x accumulated batches, as counted."""
    require(run.batches, 'no batch was read')
    batch = len(run.batches[0][0])
    counted = _counted_batches(run)
    total = run.world_size * batch * counted
    text = f'{run.world_size} processes x {batch} images x {counted} batches = {total}'
    want, source = stated(run, 'total_batch', run.cfg.get('total_batch'))
    if want is not None and total != want:
        return warning(
            text,
            f'{source}: {want}',
            'Set total_batch (or batch_size and accumulative_counts) to that; with another batch, scale the rate too.',
        )
    if counted != run.accumulated:
        return warning(
            text,
            f'config: {run.accumulated} batches a step',
            'The optimizer steps at other iterations than accumulative_counts says: the wrapper or a hook steps it.',
        )
    return ok(text, f'{source}: {want}' if want is not None else '')


def _counted_batches(run: Rehearsal) -> int:
    updates = [i for i, step in enumerate(run.steps) if step.updated]
    return updates[0] + 1 if updates else run.accumulated


@check()
def learning_rate(run: Rehearsal) -> Finding:
    """The rate at the first step, its peak, and at the last step, of the group of the greatest rate."""
    rates = _followed(run)
    base = max(group.get('initial_lr', group['lr']) for group in run.groups)
    first, peak, last = rates[0], max(rates), rates[-1]
    at = rates.index(peak) / run.loop.epoch_length
    text = f'{number(first)} at first, {number(peak)} after {at:.1f} epochs, {number(last)} at the end'
    want, source = stated(run, 'lr', run.cfg.optim_wrapper.optimizer.get('lr'))
    warmup = run.recipe.get('warmup_lr', ...)
    least = run.recipe.get('min_lr')
    expected = f'{source}: {number(want)}'
    if warmup is not ...:
        expected += f', first {number(warmup)}' if warmup is not None else ', no warm-up'
    expected += f', last {number(least)}' if least is not None else ''
    if want and not math.isclose(base, want, rel_tol=0.01):
        times = base / want
        hint = 'Scale it with the batch (scale_lr), or correct it.'
        return warning(f'{text}; {times:.3g} times what it should be', expected, hint)
    if want and peak < 0.5 * want:
        return warning(text, expected, 'The rate never gets near its peak: is the warm-up as long as the run?')
    if warmup is None and first < 0.9 * peak:
        return warning(text, expected, 'Leave the warm-up out.')
    if isinstance(warmup, float) and not math.isclose(first, warmup, rel_tol=0.05):
        missing = 'The warm-up is missing' if first > 0.9 * peak else 'The warm-up begins elsewhere'
        return warning(text, expected, f'{missing}: correct param_scheduler.')
    # A cosine by epochs ends an epoch before its minimum.
    short = 1.1 * peak * (math.pi / (2 * run.loop.max_epochs)) ** 2
    if least is not None and not math.isclose(last, least, rel_tol=0.05, abs_tol=short):
        return warning(text, expected, 'The schedule ends at another rate: correct its min_lr, or its length.')
    lowest = min(range(len(rates)), key=rates.__getitem__)
    if max(rates[lowest:]) > 1.5 * max(rates[lowest], 1e-3 * peak) and lowest > rates.index(peak):
        return warning(
            f'{text}; it rises again after its minimum at epoch {lowest / run.loop.epoch_length:.1f}',
            expected,
            'The schedule is shorter than the run: give both the same length.',
        )
    return ok(text, expected)


def _followed(run: Rehearsal) -> list[float]:
    """The greatest rate before each iteration of the whole run, by stepping copies of the schedulers."""
    group = max(run.groups, key=lambda group: group.get('initial_lr', group['lr']))
    if not run.schedule:
        return [group['lr']] * run.loop.max_iters
    until = time.monotonic() + FOLLOW_SECONDS
    rates = []
    for iteration in range(run.loop.max_iters):
        rates.append(group['lr'])
        for scheduler in run.schedule:
            scheduler.step()
        require(
            iteration % 1000 or time.monotonic() < until,
            f'a schedule of {run.loop.max_iters:,} iterations takes more than {FOLLOW_SECONDS} s to follow',
        )
    return rates


@check()
def scheduler_steps(run: Rehearsal) -> Finding:
    """That the schedule advances by one an iteration."""
    positions = [step.positions for step in run.steps]
    require(positions and positions[0], 'there is no schedule')
    require(len(positions) > 1, 'too few iterations were run')
    expected = 'once an iteration'
    for before, after in itertools.pairwise(positions):
        for scheduler, (a, b) in zip(run.schedule, zip(before, after, strict=True), strict=True):
            if b - a != 1:
                what = f'{type(scheduler).__name__} steps {b - a} times an iteration'
                cause = (
                    'Nothing steps it: it needs a ParamSchedulerHook among the hooks.'
                    if b == a
                    else 'Two hooks step it: take one ParamSchedulerHook out.'
                )
                return warning(what, expected, cause)
    return ok(expected)


@check()
def run_length(run: Rehearsal) -> Finding:
    """Epochs, iterations and optimizer steps of the whole run."""
    epochs, length = run.loop.max_epochs, run.loop.epoch_length
    steps = run.loop.max_iters // run.accumulated
    text = f'{epochs} epochs x {length:,} iterations = {steps:,} optimizer steps'
    for unit, found, setting in (('epochs', epochs, 'max_epochs'), ('steps', steps, 'max_steps')):
        want, source = stated(run, unit)
        if want is not None:
            expected = f'{source}: {want:,} {unit}'
            same = found == want
            return ok(text, expected) if same else warning(text, expected, f'Set train_cfg.{setting}={want}.')
    return ok(text)


@check()
def parameter_groups(run: Rehearsal) -> Finding:
    """That the optimizer has each trainable parameter of the task once, and nothing else."""
    own = {parameter: name for name, parameter in run.task.named_parameters()}
    grouped = [parameter for group in run.optimizer.param_groups for parameter in group['params']]
    expected = 'each trainable parameter once'
    foreign = [parameter for parameter in grouped if parameter not in own]
    if foreign:
        return error(
            f'{len(foreign)} of {len(grouped)} parameters in the optimizer are not of this model',
            expected,
            'The optimizer was made for another model, or for the model before it was changed.',
        )
    left_out = [name for parameter, name in own.items() if parameter.requires_grad and parameter not in set(grouped)]
    if left_out:
        return warning(
            f'{len(left_out)} trainable parameters in no group: {names(left_out)}',
            expected,
            'They would stay as they are: add them to a group, or freeze them.',
        )
    if len(set(grouped)) < len(grouped):
        return warning('some parameters in more than one group', expected, 'They would be stepped twice.')
    groups = len(run.optimizer.param_groups)
    return ok(f'{len(grouped)} parameters ({sum(p.numel() for p in grouped):,} numbers) in {groups} groups', expected)


@check()
def weight_decay(run: Rehearsal) -> Finding:
    """Which parameters are decayed, and how much: matrices, not biases and vectors."""
    own = {parameter: name for name, parameter in run.task.named_parameters()}
    decays = {
        own[parameter]: (group.get('weight_decay', 0.0), parameter.ndim)
        for group in run.optimizer.param_groups
        for parameter in group['params']
        if parameter in own
    }
    require(decays, 'the optimizer has no parameters of the model')
    patterns = (run.cfg.optim_wrapper.get('paramwise_cfg') or {}).get('decay', ())
    small = [
        name
        for name, (decay, ndim) in decays.items()
        if decay and (ndim < 2 or name.endswith('.bias')) and not any(fnmatch.fnmatch(name, f'*{p}') for p in patterns)
    ]
    values = {decay for decay, _ in decays.values() if decay}
    decayed = sum(bool(decay) for decay, _ in decays.values())
    text = f'{names(sorted(values)) or 0} on {decayed} of {len(decays)} parameters'
    want, source = stated(run, 'weight_decay', run.cfg.optim_wrapper.optimizer.get('weight_decay'))
    expected = f'{source}: {number(want)}' if want is not None else ''
    if want and not values:
        return warning(text, expected, 'The weight decay reaches no parameter: look at the groups that are built.')
    if want is not None and values - {want}:
        return warning(text, expected, 'Set optim_wrapper.optimizer.weight_decay to that.')
    if small and run.cfg.optim_wrapper.get('constructor') != 'DenseParamGroups':  # which decays all but what it names
        return warning(
            f'{text}; {len(small)} biases and vectors are decayed: {names(small)}',
            f'{expected}, on matrices alone',
            "Use constructor='TimmParamGroups', which leaves them out.",
        )
    return ok(text, expected)


@check()
def layer_decay(run: Rehearsal) -> Finding:
    """The learning rate of each layer of the backbone, from the first to the last."""
    factor = (run.cfg.optim_wrapper.get('paramwise_cfg') or {}).get('layer_decay')
    require(run.backbone is not None and hasattr(run.backbone, 'group_matcher'), 'the backbone has no layer groups')
    layers = group_parameters(run.backbone, run.backbone.group_matcher(coarse=False), reverse=True)
    own = {parameter: name for name, parameter in run.backbone.named_parameters()}
    rates = {}
    for group in run.groups:
        for parameter in group['params']:
            if own.get(parameter) in layers:
                rates.setdefault(layers[own[parameter]], set()).add(group.get('initial_lr', group['lr']))
    require(rates, 'the optimizer has no parameters of the backbone')
    ordered = [max(rates[layer]) for layer in sorted(rates)]
    require(factor or len(set(ordered)) > 1, 'all layers have one rate')
    text = f'{len(ordered)} layers, {number(ordered[0])} in the first to {number(ordered[-1])} in the last'
    expected = f'config: {factor} from a layer to the one before' if factor else 'one rate'
    if factor and factor != 1:
        if ordered[0] > ordered[-1] * (1 + TIE):
            return warning(text, expected, 'The order is reversed: the first layers would learn fastest.')
        layers_apart = sorted(rates)[-1] - sorted(rates)[0]
        want = ordered[-1] * factor**layers_apart
        if not math.isclose(ordered[0], want, rel_tol=0.01) or any(
            a > b * (1 + TIE) for a, b in itertools.pairwise(ordered)
        ):
            return warning(text, f'{expected}: {number(want)} in the first', 'The decay does not reach the groups.')
    elif ordered[0] > ordered[-1] * (1 + TIE) and not factor:
        return warning(text, expected, 'The first layers would learn fastest: is the order of the layers reversed?')
    return ok(text, expected)


@check()
def gradients(run: Rehearsal) -> Finding:
    """Finite losses and gradients that are not zero."""
    require(any(step.gradients for step in run.steps), 'no backward pass was seen')
    losses = [step.loss for step in run.steps]
    norms = [step.gradient_norm for step in run.steps]
    text = f'norms {names(map(number, norms))}, losses {names(map(number, losses))}'
    if not all(map(math.isfinite, losses)):
        return error(text, 'finite', 'The loss is not finite: look at the precision, the rate and the normalization.')
    scaler = getattr(run.wrapper, 'scaler', None) or getattr(run.wrapper, 'loss_scaler', None)
    is_scaled = scaler is not None and scaler.is_enabled()
    infinite = [norm for norm in norms if not math.isfinite(norm)]
    if infinite and (not is_scaled or len(infinite) == len(norms)):
        return error(text, 'finite', 'Gradients are not finite: look at the precision and at the loss.')
    if not any(norms):
        return error(text, 'above 0', 'Nothing is learnt: the loss does not depend on the weights.')
    return ok(text, 'finite')


@check()
def gradient_clipping(run: Rehearsal) -> Finding:
    """The clip of the gradients beside their norm."""
    arguments = getattr(run.wrapper, 'clip_grad_kwargs', None)
    clip = {'type': 'norm', **(run.cfg.optim_wrapper.get('clip_grad') or {})} if arguments else None
    want, source = stated(run, 'clip_grad', run.cfg.optim_wrapper.get('clip_grad'))
    want = {'type': 'norm', **want} if want else None
    expected = f'{source}: {_clip_text(want)}'
    norms = sorted(step.gradient_norm for step in run.steps if math.isfinite(step.gradient_norm))
    text = _clip_text(clip) + (f'; gradient norm {number(norms[len(norms) // 2])}' if norms else '')
    if clip != want:
        return warning(text, expected, 'Set optim_wrapper.clip_grad to that.')
    limit = (clip or {}).get('max_norm')
    if limit and norms and norms[len(norms) // 2] > CUT * limit:
        return warning(
            text,
            expected,
            f'The clip is less than 1/{CUT} of the gradient, which loses its size: raise max_norm or lower the loss.',
        )
    return ok(text, expected)


def _clip_text(clip: dict | None) -> str:
    return ', '.join(f'{key} {value}' for key, value in clip.items()) if clip else 'none'


@check()
def unused_parameters(run: Rehearsal) -> Finding:
    """Trainable parameters that get no gradient."""
    reached = {name for step in run.steps for name in step.gradients}
    require(reached, 'no backward pass was seen')
    trainable = [name for name, parameter in run.task.named_parameters() if parameter.requires_grad]
    unused = [name for name in trainable if name not in reached]
    if unused:
        return warning(
            f'no gradient for {len(unused)} of {len(trainable)}: {names(unused)}',
            'all used',
            'They take no part in the loss; with several processes, DDP stops at them. Remove or freeze them.',
        )
    return ok(f'{len(trainable)} parameters have gradients', 'all used')


@check()
def frozen_parameters(run: Rehearsal) -> Finding:
    """Parameters that don't require a gradient."""
    frozen = [(name, p.numel()) for name, p in run.task.named_parameters() if not p.requires_grad]
    count = sum(p.numel() for p in run.task.parameters())
    if frozen:
        share = sum(size for _, size in frozen) / count
        return warning(
            f'{len(frozen)} frozen, {share:.1%} of the numbers: {names(name for name, _ in frozen)}',
            'none',
            'If that is meant, silence this check; else find what sets requires_grad to False.',
        )
    return ok(f'none of {count:,} numbers', 'none')


@check()
def updates(run: Rehearsal) -> Finding:
    """That optimizer steps change the weights."""
    require(any(step.updated for step in run.steps), 'the optimizer has not stepped in these iterations')
    require(any(rate for step in run.steps if step.updated for rate in step.rates), 'the learning rate is 0 so far')
    trainable = [name for name, parameter in run.task.named_parameters() if parameter.requires_grad]
    moved = [name for name in trainable if not torch.equal(run.before[name], run.after[name])]
    text = f'{len(moved)} of {len(trainable)} parameters changed'
    scaler = getattr(run.wrapper, 'scaler', None)
    require(moved or scaler is None or not scaler.is_enabled(), 'the loss scale of float16 has not settled')
    if len(moved) < len(trainable) / 2:
        still = [name for name in trainable if name not in set(moved)]
        return warning(
            text, 'all', f'Unchanged: {names(still)}. Their rate is too small, or the optimizer has others instead.'
        )
    return ok(text, 'all')


@check(of='labels')
def accumulation(run: Rehearsal) -> Finding:
    """That accumulated batches give the gradient of one batch of their images."""
    require(run.is_full or run.accumulated > 1, 'of depth full, as nothing is accumulated')
    images, labels = _small_batch(run, 4 if run.is_full else 2)
    task, wrapper = _copies(run)
    task.to(torch.float64).eval()  # no batch statistics, no random depth
    task.mixup = task.random_erasing = None
    parameters = [p for p in task.parameters() if p.requires_grad]
    _keep_gradients(wrapper)

    def gradient(parts) -> Tensor:
        wrapper._accumulative_counts = len(parts)
        wrapper._inner_count = 0
        for parameter in parameters:
            parameter.grad = None
        for part in parts:
            loss = task.loss(*part)['loss']
            wrapper.update_params(loss, zero_kwargs={})
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    whole = gradient([(images, labels)])
    halves = gradient(list(zip(images.chunk(2), labels.chunk(2), strict=True)))
    difference = float((halves - whole).norm() / whole.norm().clamp_min(1e-300))
    expected = 'the gradient of one batch'
    if difference > 1e-4:
        times = float(halves.norm() / whole.norm())
        return warning(
            f'2 batches of {len(images) // 2} give {times:.3g} times the gradient of {len(images)}, or another one',
            expected,
            'Divide the loss by the batches of a step, and have it be a mean over images.',
        )
    return ok(
        f'2 batches of {len(images) // 2} and one of {len(images)} differ by {difference:.1e} in float64', expected
    )


def _copies(run: Rehearsal):
    """Task and optimizer wrapper of their own, at the start of a step."""
    task, wrapper = copy.deepcopy((run.task, run.wrapper))
    vars(wrapper).pop('step', None)  # mmengine's schedulers put the original's step there
    wrapper._inner_count, wrapper._max_counts = 0, -1
    return task, wrapper


def _keep_gradients(wrapper) -> None:
    """Have the wrapper leave the gradients where they are when it would step."""
    scaler = getattr(wrapper, 'scaler', None) or getattr(wrapper, 'loss_scaler', None)
    if scaler is not None:
        scaler._enabled = False
    wrapper.step = lambda **_: None
    wrapper.zero_grad = lambda **_: None


def _small_batch(run: Rehearsal, count: int) -> tuple[Tensor, Tensor]:
    """Images and integer labels of the first batch, on the task's device."""
    require(run.batches and len(run.batches[0]) == 2 and run.batches[0][0].ndim == 4, 'the batches are not images')
    require(hasattr(run.task, 'loss'), 'the task has no loss')
    images, labels = run.batches[0]
    require(not labels.is_floating_point(), 'labels are probabilities')
    count = min(count, len(images)) // 2 * 2
    require(count >= 2, 'a batch has one image')
    return images[:count].to(run.device), labels[:count].to(run.device)


@check('full', of='labels')
def overfit(run: Rehearsal) -> Finding:
    """That some tens of steps at the peak rate learn one small batch by heart."""
    images, labels = _small_batch(run, OVERFIT_IMAGES)
    run.load(run.before)
    task, wrapper = _copies(run)
    wrapper._accumulative_counts = 1
    task.mixup = task.random_erasing = None
    for module in task.modules():
        if hasattr(module, 'drop_prob'):
            module.drop_prob = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    task.train()
    for group in wrapper.optimizer.param_groups:
        group['lr'] = group.get('initial_lr', group['lr'])
    until = max(run.deadline, time.monotonic() + 5)
    losses = []
    while len(losses) < OVERFIT_STEPS and (len(losses) < 5 or time.monotonic() < until):
        with wrapper.optim_context(task):
            loss = task.loss(images, labels)['loss']
        wrapper.update_params(loss)
        losses.append(float(loss.detach()))
    lowest = min(losses)
    text = f'loss {losses[0]:.3f} to {lowest:.3f} in {len(losses)} steps on {len(images)} images'
    require(len(losses) >= 20 or lowest < 0.9 * losses[0], f'only {len(losses)} steps fit the time')
    if not lowest < 0.9 * losses[0]:
        return warning(
            text,
            'it falls by a tenth at least',
            'Nothing is learnt from these images: look at the rate, the clip, the labels and what the model gets.',
        )
    return ok(text, 'it falls')
