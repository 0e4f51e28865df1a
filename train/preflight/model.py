"""Checks of the model, of what it gets, and of how it is trained, averaged and evaluated."""

import collections
import functools
import math

import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ..registry import MODELS
from ..seeding import seed_everything
from . import probes
from .checks import check, error, names, number, ok, require, stated, warning
from .data import to_pixels
from .findings import Finding
from .rehearsal import Rehearsal

NORMALIZATION_TOLERANCE = 0.02  # of a standard deviation
TRAIN_DRAWS = 16  # of each colour, of whose results the median counts; even for mixup
PRIMARIES = ('red', 'green', 'blue')  # in the order of their channels
DROP_PATHS = {'DropPath': 'drop_prob', 'StochasticDepth': 'p', 'ResidualDrop': 'drop'}  # timm's and torchvision's
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


@check()
def drop_path(run: Rehearsal) -> Finding:
    """The probability that each block of the backbone is dropped with."""
    require(run.backbone is not None, 'the task has no backbone')
    rates = [rate for module in run.backbone.modules() if (rate := _drop_path_rate(module)) is not None]
    greatest = max(rates, default=0.0)
    want, source = stated(run, 'drop_path', run.cfg.model.get('backbone', {}).get('drop_path_rate'))
    text = f'{number(greatest)} at most' + (
        f', in {sum(map(bool, rates))} layers from {number(min(rates))}' if rates else ''
    )
    if want is None:
        return ok(text)
    expected = f'{source}: {number(float(want))}'
    if not math.isclose(greatest, want, rel_tol=0.02, abs_tol=1e-6):
        cause = (
            'It does not reach the model: give it as drop_path_rate in model.backbone, and see that the model uses it.'
            if want and not greatest
            else 'Set drop_path_rate in model.backbone to that.'
        )
        return warning(text, expected, cause)
    return ok(text, expected)


def _drop_path_rate(module: nn.Module) -> float | None:
    key = DROP_PATHS.get(type(module).__name__)
    return None if key is None else float(getattr(module, key) or 0.0)


@check()
def dropout(run: Rehearsal) -> Finding:
    """The dropout in the backbone."""
    want = run.cfg.model.get('backbone', {}).get('drop_rate')
    require(run.backbone is not None, 'the task has no backbone')
    dropouts = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout
    greatest = max((module.p for module in run.backbone.modules() if isinstance(module, dropouts)), default=0.0)
    greatest = max(greatest, float(getattr(run.backbone, 'drop_rate', 0.0) or 0.0))
    if want and not greatest:
        return warning('none', f'config: {want}', 'It does not reach the model: see that the model takes drop_rate.')
    return ok(f'{number(greatest)} at most', f'config: {want}' if want is not None else '')


def _paths(run: Rehearsal):
    """(name, function of a uint8 or float batch that gives what the backbone gets) of evaluation and training."""

    def labels(images: Tensor) -> Tensor:
        return torch.zeros(len(images), dtype=torch.long, device=run.device)

    def evaluate(images: Tensor) -> Tensor:
        run.task.eval()
        return _backbone_inputs(run, lambda: run.task.val_step([images, labels(images)]))

    def train(images: Tensor) -> Tensor:
        run.task.train()
        batch = run.task.data_preprocessor([images, labels(images)], True)
        return _backbone_inputs(run, lambda: run.task(*batch, mode='loss'))

    return (('evaluation', evaluate), ('training', train))


class _Caught(BaseException):
    """Ends a forward pass at the backbone."""


def _backbone_inputs(run: Rehearsal, call) -> Tensor:
    caught = []

    def hook(module, arguments):
        caught.append(arguments[0].detach().clone())
        raise _Caught

    handle = run.backbone.register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            call()
    except _Caught:
        pass
    finally:
        handle.remove()
    require(caught, 'the task does not call its backbone')
    return caught[0]


def _colours(run: Rehearsal) -> dict[str, dict[str, Tensor]]:
    """What the backbone gets for images of one colour: {'evaluation' or 'training': {colour: value of each channel}}.

    In evaluation, from image files on; in training, from files on too, as the medians over draws.
    """
    if hasattr(run, 'colours'):
        return run.colours
    require(run.backbone is not None and run.batches and run.batches[0][0].ndim == 4, 'the task is no classifier')
    images = {name: probes.solid(name) for name in probes.COLOURS}
    found = {}
    for (stage, path), loader in zip(_paths(run), (run.val_loader, run.train_loader), strict=True):
        if loader is None:
            continue
        probe = probes.with_images(loader.dataset, list(images.values()))
        require(probe is not None, 'the dataset has no reader to give an image to')
        found[stage] = {}
        for index, name in enumerate(images):
            draws = [index] * 2 if stage == 'evaluation' else [(index, (0, draw)) for draw in range(TRAIN_DRAWS)]
            batch = torch.stack([torch.as_tensor(to_pixels(probe[draw][0])) for draw in draws]).to(run.device)
            medians = path(batch).float().flatten(2).median(dim=2).values
            found[stage][name] = medians.median(dim=0).values.cpu()
    run.colours = found
    return found


def _expected_normalization(run: Rehearsal) -> tuple[Tensor, Tensor, str]:
    facts = getattr(run.backbone, 'pretrained_cfg', None) or {}
    mean, source = stated(run, 'mean', facts.get('mean'), 'backbone')
    std, _ = stated(run, 'std', facts.get('std'), 'backbone')
    require(mean is not None and std is not None, 'the backbone says no mean and std')
    return torch.tensor(mean), torch.tensor(std), source


@check(of='labels')
def channel_order(run: Rehearsal) -> Finding:
    """That red, green and blue images arrive as the first, second and third channel."""
    expected = 'red, green, blue'
    for stage, values in _colours(run).items():
        black = values['black']
        require(len(black) == 3, 'images do not have 3 channels')
        order = [int((values[name] - black).argmax()) for name in PRIMARIES]
        if order != [0, 1, 2]:
            listed = ', '.join(f'{name} in channel {channel}' for name, channel in zip(PRIMARIES, order, strict=True))
            return warning(f'in {stage}: {listed}', expected, 'The channels are swapped (BGR?): decode images as RGB.')
    return ok(expected, expected)


@check(of='labels')
def normalization(run: Rehearsal) -> Finding:
    """The mean and standard deviation by which images are normalized, as the backbone gets them."""
    mean, std, source = _expected_normalization(run)
    expected = f'{source}: mean {_triple(mean)}, std {_triple(std)}'
    text = ''
    for stage, values in _colours(run).items():
        black, white = values['black'], values['white']
        if len(black) != len(mean):
            require(False, f'the backbone is of {len(mean)} channels, the images of {len(black)}')
        slope = white - black
        if (slope.abs() < 1e-6).any():
            return warning(f'in {stage}, black and white images are alike', expected, 'Look at the transforms.')
        found_std, found_mean = 1 / slope, -black / slope
        text = text or f'mean {_triple(found_mean)}, std {_triple(found_std)}'
        # Augmentation may change colours in most draws, so that the medians of training are coarse.
        tolerance = NORMALIZATION_TOLERANCE if stage == 'evaluation' else 0.25
        if ((slope * std - 1).abs() < tolerance).all() and ((black + mean / std) * std).abs().max() < tolerance:
            continue
        ratio = float((slope * std).median())
        if 200 < ratio < 300 or 1 / 300 < ratio < 1 / 200:
            cause = 'The pixels are in 0..255 for a normalization of 0..1, or the other way round.'
        elif (slope * std**2 - 1).abs().max() < max(tolerance, 0.05):
            cause = 'The images are normalized twice: leave it out of the transform, the task does it.'
        else:
            cause = "Leave mean and std out of the task's config, which then takes the backbone's, or correct them."
        return warning(f'in {stage}, mean {_triple(found_mean)}, std {_triple(found_std)}', expected, cause)
    return ok(text, expected)


def _triple(values: Tensor) -> str:
    return '(' + ', '.join(f'{float(value):.3f}' for value in values) + ')'


def begins_from_weights(run: Rehearsal) -> str | None:
    """What the run's weights come from, if not from chance."""
    backbone = run.cfg.model.get('backbone', {})
    for key in ('checkpoint', 'checkpoint_path', 'pretrained'):
        if backbone.get(key):
            return f'model.backbone.{key}={backbone[key]}'
    return f'load_from={run.cfg.load_from}' if run.cfg.get('load_from') else None


@check()
def weights_loaded(run: Rehearsal) -> Finding:
    """Which parameters the named weights have set: those that are the same whatever the seed."""
    source = begins_from_weights(run)
    require(source, 'no weights are named')
    require(run.before is not None, 'nothing was built')
    if run.cfg.get('load_from'):
        return _compare_with_file(run, source)
    config = run.cfg.model.copy()
    config.pop('teacher', None)
    config.pop('distillation', None)
    config.compile = False
    seed_everything(20231, 1)
    with DefaultScope.overwrite_default_scope('zoo'):
        again = MODELS.build(config).state_dict()
    random = [
        name
        for name, value in run.before.items()
        if name in again and value.is_floating_point() and not torch.equal(again[name].to(value.device), value)
    ]
    return _loaded_or_not(run, random, source)


def _compare_with_file(run: Rehearsal, source: str) -> Finding:
    stored = torch.load(run.cfg.load_from, map_location='cpu', weights_only=True)
    stored = stored.get('state_dict', stored)
    changed = [
        name for name, value in run.before.items() if name not in stored or not torch.equal(stored[name], value.cpu())
    ]
    return _loaded_or_not(run, changed, source)


def _loaded_or_not(run: Rehearsal, fresh: list[str], source: str) -> Finding:
    classifier = _classifier_names(run)
    missing = [name for name in fresh if not name.startswith(classifier)]
    count = len(run.before)
    if missing:
        return warning(
            f'{len(missing)} of {count} tensors begin random all the same: {names(missing)}',
            source,
            'The weights are not loaded, or not all of them: compare the names in the file with those of the model.',
        )
    note = f'; the classifier begins anew ({names(fresh)})' if fresh else ''
    return ok(f'{count - len(fresh)} of {count} tensors are loaded{note}', source)


def _classifier_names(run: Rehearsal) -> tuple[str, ...]:
    facts = getattr(run.backbone, 'pretrained_cfg', None) or {}
    listed = facts.get('classifier') or ()
    return tuple(f'backbone.{name}' for name in ((listed,) if isinstance(listed, str) else listed)) or ('\0',)


@check()
def training_mode(run: Rehearsal) -> Finding:
    """That the whole task is in train mode in training: BatchNorm takes the batch's statistics, dropout drops."""
    require(run.steps and run.steps[-1].inputs is not None, 'no forward pass was seen')
    found = sorted(set().union(*(step.in_eval for step in run.steps)))
    if found:
        modules = dict(run.task.named_modules())
        batch_norms = sum(isinstance(modules[name], BATCH_NORMS) for name in found)
        return warning(
            f'{len(found)} modules in eval mode, {batch_norms} of them BatchNorm: {names(found)}',
            'train mode',
            'Something calls eval() on them before the step. If frozen statistics are meant, silence this check.',
        )
    return ok('all modules', 'train mode')


@check()
def evaluation_mode(run: Rehearsal) -> Finding:
    """That nothing is in train mode in validation: dropout and stochastic depth are off."""
    require(run.val_training is not None, 'no validation was seen')
    if run.val_training:
        modules = dict(run.task.named_modules())
        kinds = collections.Counter(type(modules[name]).__name__ for name in run.val_training)
        return warning(
            f'{len(run.val_training)} modules in train mode: {names(f"{n} {kind}" for kind, n in kinds.most_common())}',
            'eval mode',
            'Dropout, stochastic depth or batch statistics act in evaluation: something calls train() on them.',
        )
    return ok('all modules', 'eval mode')


@check(of='labels')
def evaluation_repeats(run: Rehearsal) -> Finding:
    """That an evaluation is the same twice: images, what the backbone gets, and logits."""
    require(run.val_batches, 'no validation images were read')
    dataset, batch = run.val_loader.dataset, run.val_batches[0]
    first = next(iter(run.val_loader.sampler))
    outputs = []
    for seed in (0, 1):
        seed_everything(seed)
        run.task.eval()
        outputs.append((to_pixels(dataset[first][0]).tobytes(), _predict(run, batch)))
    if outputs[0][0] != outputs[1][0]:
        return warning(
            'an image is read differently each time', 'the same', 'Leave random transforms out of val_dataloader.'
        )
    if not torch.equal(outputs[0][1], outputs[1][1]):
        difference = float((outputs[0][1] - outputs[1][1]).abs().max())
        if difference > 1e-3 * float(outputs[0][1].abs().max()):
            return warning(
                f'logits differ by {difference:.1e}',
                'the same',
                'Something random acts in evaluation, such as dropout or mixup.',
            )
    return ok(f'pixels and logits of {len(outputs[0][1])} images', 'the same')


def _predict(run: Rehearsal, batch) -> Tensor:
    logits = run.task.val_step(batch)
    return torch.stack(list(logits)) if not isinstance(logits, Tensor) else logits


@check(of='labels')
def evaluation_alone(run: Rehearsal) -> Finding:
    """That an image is evaluated by itself: what the backbone gets for it does not depend on its batch."""
    require(run.val_batches and run.backbone is not None, 'no validation images were read')
    images, labels = run.val_batches[0]
    require(len(images) > 1, 'there is one validation image')
    count = len(images) // 2 * 2
    run.task.eval()
    whole = _backbone_inputs(run, lambda: run.task.val_step([images[:count], labels[:count]]))
    half = count // 2 if count // 2 % 2 == 0 or count == 2 else count // 2 + 1
    part = _backbone_inputs(run, lambda: run.task.val_step([images[:half], labels[:half]]))
    if whole[:half].shape != part.shape or not torch.allclose(whole[:half], part, atol=1e-5):
        return warning(
            'what the backbone gets for an image depends on the others',
            'no mixing',
            'Mixup or CutMix acts in evaluation: mix in training alone.',
        )
    return ok('the backbone gets the same for an image in another batch', 'no mixing')


@check(of='labels')
def mixup(run: Rehearsal) -> Finding:
    """What mixing made of the labels in training."""
    targets = [target for step in run.steps for _, target, _ in step.criteria[:1]]
    require(targets, "the task's loss function was not seen")
    config = run.cfg.model.get('mixup')
    expected = f'config: {", ".join(f"{k} {v}" for k, v in config.items())}' if config else 'config: none'
    soft = [target for target in targets if target.is_floating_point() and target.ndim == 2]
    classes = run.task.num_classes
    mixed = 0
    for target in soft:
        sums = target.sum(dim=1)
        if (sums - 1).abs().max() > 1e-3:
            return warning(
                f'label probabilities sum to {float(sums.min()):.3f} to {float(sums.max()):.3f}',
                expected,
                'Each row must sum to 1: look at the mixing and at its num_classes.',
            )
        least = target.min(dim=1, keepdim=True).values if classes > 2 else 0
        mixed += int(((target - least > 1e-4).sum(dim=1) > 1).sum())
    total = sum(len(target) for target in targets)
    text = f'{mixed} of {total} labels are of two classes' if soft else 'labels are class indices'
    acts = bool(config) and config.get('prob', 1.0) >= 0.5
    acts = acts and bool(
        config.get('mixup_alpha', 1.0) or config.get('cutmix_alpha', 0.0) or config.get('cutmix_minmax')
    )
    if acts and not soft:
        return warning(text, expected, 'The mixing does not reach the loss: see that the task calls it in training.')
    if mixed and not config:
        return warning(text, expected, 'Something mixes labels that the config does not name.')
    return ok(text, expected)


def _criterion(run: Rehearsal):
    for step in run.steps:
        for logits, targets, options in step.criteria:
            return functools.partial(run.task._loss, **options), logits, targets
    return require(False, "the task's loss function was not seen")


@check(of='labels')
def label_smoothing(run: Rehearsal) -> Finding:
    """How much of a label's probability the loss and the mixing move to all classes, each measured."""
    criterion, logits, targets = _criterion(run)
    classes = logits.shape[1]
    require(classes > 2, 'there are two classes')
    zeros = torch.zeros(classes, classes, dtype=torch.float64, device=logits.device, requires_grad=True)
    loss = criterion(zeros, torch.arange(classes, device=logits.device))
    require(abs(float(loss.detach()) - math.log(classes)) < 1e-4, 'the loss is not a cross-entropy')
    # Of a cross-entropy at equal logits, the gradient is (1/K - target)/B.
    (slope,) = torch.autograd.grad(loss, zeros)
    by_loss = classes * float((1 / classes - classes * slope).fill_diagonal_(1).min())
    by_mixing = 0.0
    if targets.is_floating_point():
        by_mixing = classes * float(targets.min())
    text = f'{by_loss:.3f} by the loss, {by_mixing:.3f} by the mixing'
    config = run.cfg.model.get('loss', {}).get('label_smoothing') or 0.0
    config += (run.cfg.model.get('mixup') or {}).get('label_smoothing') or 0.0
    want, source = stated(run, 'label_smoothing', config)
    expected = f'{source}: {number(want)}'
    if by_loss > 1e-3 and by_mixing > 1e-3:
        return warning(text, expected, 'Labels are smoothed twice: leave one out.')
    if want is not None and abs(by_loss + by_mixing - want) > 0.01:
        return warning(text, expected, 'Another smoothing acts than is asked for.')
    return ok(text, expected)


@check(of='labels')
def loss_at_init(run: Rehearsal) -> Finding:
    """The first loss beside that of equal logits: ln(classes) for a cross-entropy."""
    criterion, logits, targets = _criterion(run)
    if not targets.is_floating_point():
        require(int(targets.min()) >= 0, 'labels are not class indices')
    equal = float(criterion(torch.zeros_like(logits), targets))
    first = float(criterion(logits, targets))
    expected = f'equal logits: {equal:.3f}'
    text = f'{first:.3f}'
    require(equal > 0, 'equal logits have no loss')
    if not math.isfinite(first):
        return error(text, expected, 'The loss is not finite at the first step.')
    if first > 1.5 * equal + 0.5:
        return warning(
            text, expected, 'The model is sure of itself before it has learnt: look at its inputs and its classifier.'
        )
    if first < 0.3 * equal and not begins_from_weights(run):
        return warning(text, expected, 'The model knows the labels before it has learnt: do its inputs show them?')
    return ok(text, expected)


@check()
def precision(run: Rehearsal) -> Finding:
    """The dtype that linear layers and convolutions compute in."""
    counts = run.steps[-1].dtypes if run.steps else {}
    require(counts, 'no forward pass was seen')
    used = max(counts, key=counts.get)
    name = str(used).removeprefix('torch.')
    text = f'{name} in {counts[used]} of {sum(counts.values())} layers, ' + (
        'autocast' if run.steps[-1].autocast else 'no autocast'
    )
    config = run.cfg.optim_wrapper
    kind = config.get('type', 'OptimWrapper')
    asked = getattr(run.wrapper, 'dtype', None) or getattr(run.wrapper, 'cast_dtype', None)
    if asked is None:
        asked = 'float16' if kind == 'AmpOptimWrapper' else 'float32'
    asked = str(asked).removeprefix('torch.')
    if name != asked:
        return warning(
            text,
            f'config: {asked}',
            f'optim_wrapper of type {kind} does not act: see that optim_context does autocast.',
        )
    want, source = stated(run, 'precision')
    if want is not None and (want == 'float32') != (name == 'float32'):
        return warning(
            text, f'{source}: {want}', "Set optim_wrapper's type and dtype to that, or accept the difference."
        )
    return ok(text, f'{source}: {want}' if want else f'config: {asked}')


@check(of='labels')
def teacher(run: Rehearsal) -> Finding:
    """That the teacher is in eval mode, without gradients, and not in the optimizer."""
    module = getattr(run.task, 'teacher', None)
    require(isinstance(module, nn.Module), 'there is no teacher')
    expected = 'eval mode, no gradients'
    in_train = sorted(set().union(*(step.teacher_in_train for step in run.steps))) if run.steps else []
    if in_train:
        return warning(f'{len(in_train)} modules in train mode', expected, 'Keep the teacher in eval mode.')
    parameters = set(module.parameters())
    grouped = {p for group in run.optimizer.param_groups for p in group['params']}
    if parameters & grouped or any(p.requires_grad for p in parameters):
        return warning('its parameters are trained', expected, 'Call requires_grad_(False) on the teacher.')
    return ok(expected, expected)


@check()
def ema(run: Rehearsal) -> Finding:
    """The moving average of the weights: its decay, measured at the run's end, and which weights are validated."""
    averages = run.averages()
    want, source = stated(run, 'ema')
    evaluates = run.recipe.get('evaluates')
    if not averages:
        require(source == 'recipe', 'no average is kept')
        if want is not None and evaluates != 'raw':
            return warning('no average', f'recipe: decay {want}', 'Add an EMA hook to custom_hooks.')
        return ok('no average', 'recipe: none' if want is None else f'recipe: {want}, not evaluated')
    hook, average = averages[0]
    decay = _measured_decay(run, hook, average)
    evaluated = _evaluated_weights(run)
    expected = f'recipe: decay {want}, {evaluates} weights evaluated' if source == 'recipe' else _asked_decay(hook)
    if decay is None:
        return warning('the average does not move', expected, 'Nothing updates it: see when the hook takes its steps.')
    steps = run.loop.max_iters // run.accumulated
    horizon = 1 / (1 - decay) if decay < 1 else math.inf
    text = f'decay {decay:.6g}, over the last {horizon:,.0f} of {steps:,} steps'
    text += f'; {evaluated} weights are validated' if evaluated else ''
    if decay < 0.01:
        return warning(text, expected, 'It averages nothing, it is the raw weights: set its decay near 1.')
    if horizon > steps:
        return warning(
            text, expected, f'The run is shorter than the average reaches back: take a decay below {1 - 1 / steps:.4g}.'
        )
    asked = want if source == 'recipe' else _decay_of(hook)
    if asked is not None and not math.isclose(1 - decay, 1 - asked, rel_tol=0.05):
        return warning(text, expected, 'Another decay acts than is asked for.')
    if want is None and source == 'recipe':
        return warning(text, 'recipe: none', 'The published run kept no average: leave the hook out.')
    if evaluates and evaluated and evaluated != evaluates:
        return warning(text, expected, f"Set validate='{evaluates}' in the EMA hook.")
    return ok(text, expected)


def _decay_of(hook) -> float | None:
    if getattr(hook, 'decay', None) is not None:
        return None if getattr(hook, 'warmup', False) else hook.decay
    momentum = getattr(getattr(hook, 'ema_model', None), 'momentum', None)
    return None if momentum is None else 1 - momentum


def _asked_decay(hook) -> str:
    decay = _decay_of(hook)
    return f'config: decay {decay:.6g}' if decay is not None else ''


def _measured_decay(run: Rehearsal, hook, average) -> float | None:
    """The decay of an update in the last iteration: the weights are set to the average plus 1, and the hook called."""
    loop = run.loop
    iteration = loop._iter
    interval = run.accumulated * getattr(hook, 'interval', 1)
    last = max(loop.max_iters // interval * interval, interval) - 1
    before = {name: value.detach().clone() for name, value in average().items()}
    parameters = [name for name, _ in run.task.named_parameters() if name in before]
    raw = {name: before[name] + 1 if name in parameters else value for name, value in run.after.items()}
    run.load(raw)
    loop._iter = last
    try:
        hook.after_train_iter(run.runner, last)
    finally:
        loop._iter = iteration
    # A parameter of great values has few digits left for the difference: the median of all.
    moved = torch.stack([(average()[name] - before[name]).double().mean() for name in parameters])
    share = float(moved.median())
    run.load(run.after)
    return None if share == 0 else max(0.0, 1 - share)


def _evaluated_weights(run: Rehearsal) -> str | None:
    """'raw' or 'average': which weights were there in validation."""
    if run.validated is None:
        return None
    parameters = [name for name, _ in run.task.named_parameters()]
    is_raw = all(torch.equal(run.validated[name], run.raw[name]) for name in parameters)
    return 'raw' if is_raw else 'average'
