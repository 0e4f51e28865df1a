"""What a backbone of the zoo promises, as checks of one model: for whoever adds a family, and for the tests.

report = zoo.check('van_b0', checkpoint='van_tiny_754.pth.tar')
report.passed, report.results
"""

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .backbones import catalogue
from .models import create_model

__all__ = ['CHECKS', 'Report', 'Result', 'Subject', 'check']

EXACT = 1e-10  # relative, float64: the same sums in another order differ by 1e-15 a layer
ODD_SIZES = ((33, 47), (97, 130))  # height, width; beside the model's own size
CHECKS: dict[str, Callable] = {}  # title -> function of a Subject: returns what it saw, raises if it must not be


@dataclass(frozen=True)
class Subject:
    """The model under check: a name with the arguments that make it, and weights from a file if there is one."""

    name: str
    arguments: dict = field(default_factory=dict)
    checkpoint: str | os.PathLike | None = None

    def create(self, **more) -> nn.Module:
        """The model in eval mode, with the same weights each time."""
        devices = [torch.device('cuda', i) for i in range(torch.cuda.device_count())]
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            return create_model(self.name, checkpoint=self.checkpoint, **{**self.arguments, **more}).eval()

    def images(self, batch: int, *size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """(batch, channels, height, width), the same each time."""
        channels = self.arguments.get('in_chans', 3)
        return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0)).to(dtype)

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width that the published weights were trained for."""
        cfg = timm.get_pretrained_cfg(self.name)
        return tuple(cfg.input_size[1:]) if cfg else (224, 224)


@dataclass(frozen=True)
class Result:
    title: str
    passed: bool
    detail: str  # what was seen, or the error


@dataclass(frozen=True)
class Report:
    name: str
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    def __str__(self) -> str:
        lines = (f'{"ok    " if each.passed else "FAILED"} {each.title}: {each.detail}' for each in self.results)
        return '\n'.join([self.name, *lines])


def check(
    name: str,
    checkpoint: str | os.PathLike | None = None,
    advance: Callable[[str], None] | None = None,
    **arguments,
) -> Report:
    """Run every check of a model, of the zoo or of timm.

    Args:
        name, checkpoint, arguments: as for `create_model`.
        advance: called with each check's title before it runs.

    Raises:
        ValueError: neither the zoo nor timm has a model of this name.
        FileNotFoundError, CheckpointError: of `create_model`, for the checkpoint.
    """
    if not timm.is_model(name):
        raise ValueError(f'There is no model {name!r}; `zoo list` shows the names.')
    subject = Subject(name, arguments, checkpoint)
    subject.create()  # what keeps the model from being made at all is the caller's to see
    results = []
    for title, function in CHECKS.items():
        if advance:
            advance(title)
        try:
            results.append(Result(title, True, function(subject)))
        except Exception as error:  # whatever a model raises is what its check has found
            message = str(error).strip().partition('\n')[0]
            results.append(Result(title, False, message or type(error).__name__))
    return Report(name, tuple(results))


def _check(title: str) -> Callable:
    def register(function):
        CHECKS[title] = function
        return function

    return register


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _difference(x: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference, relative to what is wanted."""
    return ((x - want).norm() / want.norm().clamp_min(1e-30)).item()


def _require_equal(what: str, x: torch.Tensor, want: torch.Tensor, tolerance: float = EXACT) -> float:
    _require(x.shape == want.shape, f'{what}: shapes {list(x.shape)} and {list(want.shape)}')
    difference = _difference(x, want)
    _require(difference <= tolerance, f'{what}: they differ by {difference:.1e} relative')
    return difference


@_check('parameters')
def parameters(subject: Subject) -> str:
    """As many as published, counted, if the model is built as published."""
    count = sum(p.numel() for p in subject.create(device='meta').parameters()) if not subject.checkpoint else None
    count = count or sum(p.numel() for p in subject.create().parameters())
    if subject.name not in catalogue.variant_names() or subject.arguments:
        return f'{count:,}'
    published = catalogue.info(subject.name)['params']
    _require(count == published, f'{count:,}, but the catalogue has {published:,}')
    return f'{count:,}, as published'


@_check('any size')
@torch.inference_mode()
def sizes(subject: Subject) -> str:
    """Logits, and a pyramid of (B, C, H, W) maps of ceil(side / stride), at the model's own size and at odd ones."""
    whole = subject.create(dtype=torch.float32)
    features = subject.create(dtype=torch.float32, features_only=True)
    channels, strides = features.feature_info.channels(), features.feature_info.reduction()
    for size in (subject.own_size, *ODD_SIZES):
        images = subject.images(1, *size, dtype=torch.float32)
        logits = whole(images)
        _require(logits.shape == (1, whole.num_classes), f'{size}: logits {list(logits.shape)}')
        maps = [list(x.shape) for x in features(images)]
        want = [
            [1, count, *(math.ceil(side / stride) for side in size)]
            for count, stride in zip(channels, strides, strict=True)
        ]
        _require(maps == want, f'{size}: maps {maps} instead of {want}')
    shown = ', '.join(f'{height}x{width}' for height, width in (subject.own_size, *ODD_SIZES))
    return f'{shown}; channels {channels} at strides {strides}'


@_check('batch')
@torch.inference_mode()
def batch_consistency(subject: Subject) -> str:
    """An image gives the same alone, in a batch, and in another memory layout."""
    model = subject.create(dtype=torch.float64)
    images = subject.images(3, 65, 96)
    together = model(images)
    alone = _require_equal('an image alone and in a batch', model(images[1:2]), together[1:2])
    strided = images.to(memory_format=torch.channels_last)
    _require_equal('contiguous and channels-last images', model(strided), together)
    return f'alone and in a batch differ by {alone:.0e} relative'


@_check('memoryless')
@torch.inference_mode()
def memoryless(subject: Subject) -> str:
    """The same image gives the same whatever came before."""
    model = subject.create(dtype=torch.float64)
    images = subject.images(1, 65, 96)
    before = model(images)
    for size in (*ODD_SIZES, (64, 64)):
        model(subject.images(2, *size))
    _require(torch.equal(model(images), before), 'an image gives another result after images of other sizes')
    return 'bit-equal after images of three other sizes'


@_check('gradients')
def gradients(subject: Subject) -> str:
    """Every parameter gets a finite gradient, and recomputing activations changes none."""
    model = subject.create(dtype=torch.float64)
    images = subject.images(2, 64, 97)
    plain = _gradients(model, images)
    without = [key for key, grad in plain.items() if grad is None]
    _require(not without, f'no gradient reaches {len(without)} parameters: {", ".join(without[:3])}')
    infinite = [key for key, grad in plain.items() if not grad.isfinite().all()]
    _require(not infinite, f'{len(infinite)} gradients are not finite: {", ".join(infinite[:3])}')
    model.set_grad_checkpointing(True)
    recomputed = _gradients(model, images)
    # One tensor at a time: the largest models' gradients in one piece more do not fit a workstation.
    norms = torch.tensor([[(recomputed[key] - grad).norm(), grad.norm()] for key, grad in plain.items()])
    difference, norm = norms.norm(dim=0).tolist()
    _require(
        difference <= EXACT * norm,
        f'gradients with and without checkpointing differ by {difference / norm:.1e} relative',
    )
    count = sum(grad.numel() for grad in plain.values())
    del plain, recomputed
    model.zero_grad()
    model.train()
    model(images).square().mean().backward()
    return f'{count:,} finite; the same with gradient checkpointing'


def _gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(images).square().mean().backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


@_check('features')
@torch.inference_mode()
def features(subject: Subject) -> str:
    """The levels are the same by every way to them."""
    model = subject.create(dtype=torch.float64)
    images = subject.images(1, 64, 97)
    final, maps = model.forward_intermediates(images)
    # Models of several branches have a tensor of each.
    for own, want in zip(tree_leaves(final), tree_leaves(model.forward_features(images)), strict=True):
        _require_equal('forward_features and forward_intermediates', own, want)
    _require_equal('forward and forward_head', model.forward_head(final), model(images))
    only = subject.create(dtype=torch.float64, features_only=True)
    for i, x in zip(only.feature_info.out_indices, only(images), strict=True):
        _require_equal(f'level {i} of features_only', x, maps[i])
    early = model.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
    _require_equal('level 0 alone', early[0], maps[0])
    return f'{len(maps)} levels, by features_only and forward_intermediates'


@_check('checkpoint')
@torch.inference_mode()
def checkpoint(subject: Subject) -> str:
    """What is saved loads again, key by key, and computes the same; a classifier of another width is replaced."""
    model = subject.create()
    state_dict = model.state_dict()
    arguments = dict(subject.arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'saved.pth')
        torch.save(state_dict, path)
        arguments.setdefault('num_classes', model.num_classes)
        again = create_model(subject.name, checkpoint=path, **arguments).eval()
        arguments['num_classes'] = model.num_classes + 1
        wider = create_model(subject.name, checkpoint=path, **arguments).eval()
    images = subject.images(1, 64, 64, dtype=torch.float32)
    _require(torch.equal(again(images), model(images)), 'the saved model computes something else')
    _require(wider(images).shape[1] == model.num_classes + 1, 'num_classes does not replace the classifier')
    source = f'{subject.checkpoint}, ' if subject.checkpoint else ''
    return f'{source}{len(state_dict)} tensors saved and loaded'


@_check('bad input')
def bad_input(subject: Subject) -> str:
    """Images of a wrong rank, number of channels or size are a ValueError; unknown arguments a TypeError."""
    model = subject.create(device='meta') if not subject.checkpoint else subject.create()
    device = next(model.parameters()).device
    for shape in ((3, 64, 64), (1, model.in_chans + 1, 64, 64), (1, model.in_chans, 31, 64)):
        try:
            model(torch.empty(shape, device=device))
        except ValueError as error:
            _require('got' in str(error), f'the error for images {list(shape)} does not say what it got: {error}')
        else:
            raise AssertionError(f'images {list(shape)} are accepted')
    try:
        subject.create(no_such_argument=1)
    except TypeError:
        return 'wrong rank, channels, size and arguments are refused'
    raise AssertionError('an unknown argument is accepted')


@_check('meta device')
def meta_device(subject: Subject) -> str:
    """Built and run without storage, so that tools can plan with the model; then filled and initialised."""
    arguments = Subject(subject.name, subject.arguments)
    model = arguments.create(device='meta')
    logits = model(torch.empty(2, model.in_chans, 64, 97, device='meta'))
    _require(logits.shape == (2, model.num_classes), f'logits {list(logits.shape)}')
    if not hasattr(model, 'init_weights'):
        return 'forward'
    model.to_empty(device='cpu')
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float('nan') if tensor.is_floating_point() else 0)
    model.init_weights()
    unset = [key for key, tensor in [*model.named_parameters(), *model.named_buffers()] if not tensor.isfinite().all()]
    _require(not unset, f'init_weights leaves {len(unset)} tensors unset: {", ".join(unset[:3])}')
    return 'forward; to_empty and init_weights'
