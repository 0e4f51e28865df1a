"""The first iterations of a run by its own runner, loop, hooks and data, in a folder that vanishes, watched."""

import contextlib
import copy
import functools
import itertools
import logging
import os
import random
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import mmengine.dist.utils
import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer
from torch import Tensor, nn

from ..batches import fit
from ..runner import Runner

__all__ = ['NotChecked', 'Rehearsal', 'Step', 'is_labelled', 'isolated']

MANAGED = (DefaultScope, MMLogger, MessageHub, Visualizer)
ON_CPU = 4  # images of a batch that the model sees there
VALIDATED = 16  # at most, in each of two validation batches
# What hooks of these modules and names do is to write and to show.
WRITERS = ('zoo.train.records', 'zoo.train.hooks.Checkpoints', 'zoo.train.data.BrokenImages')
MMENGINE_WRITERS = {'CheckpointHook', 'IterTimerHook', 'LoggerHook', 'ProfilerHook', 'RuntimeInfoHook'}


class NotChecked(Exception):
    """Why a check does not apply."""


class _Stop(BaseException):
    """Ends the rehearsal of a loop. Not an Exception, which a loop could take for its own."""


@dataclass
class Step:
    """What was seen of a training iteration.

    Attributes:
        rates: learning rate of each parameter group, before.
        positions: `last_step` of each scheduler, before.
        in_eval: modules of the task in eval mode while the backbone computed, by name.
        teacher_in_train: modules of the teacher in train mode then.
        autocast: dtype of the autocast around the backbone, None without.
        dtypes: counts of the dtypes that linear layers and convolutions gave.
        inputs: what the backbone got (B, C, H, W).
        criteria: (logits, targets, arguments) of each call of the task's loss function.
        loss: its total.
        gradients: norm of each parameter's gradient, unscaled and unclipped, those of the iteration's backward pass.
        updated: whether the optimizer stepped.
    """

    rates: list[float]
    positions: list[int]
    in_eval: list[str] = field(default_factory=list)
    teacher_in_train: list[str] = field(default_factory=list)
    autocast: torch.dtype | None = None
    dtypes: dict[torch.dtype, int] = field(default_factory=dict)
    inputs: Tensor | None = None
    criteria: list[tuple] = field(default_factory=list)
    loss: float = float('nan')
    gradients: dict[str, float] = field(default_factory=dict)
    updated: bool = False

    @property
    def gradient_norm(self) -> float:
        return sum(norm**2 for norm in self.gradients.values()) ** 0.5


@contextmanager
def isolated() -> Iterator[None]:
    """Leave random states, torch's switches, environment variables and mmengine's named instances as they were.

    mmengine and the zoo see one process inside: a process can do things that the others don't take part in.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    states = random.getstate(), np.random.get_state()
    variables = dict(os.environ)
    cudnn = torch.backends.cudnn
    switches = cudnn.benchmark, cudnn.deterministic
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    instances = {manager: dict(manager._instance_dict) for manager in MANAGED}
    levels = {name: logging.getLogger(name).level for name in ('zoo', 'mmengine')}
    is_distributed = mmengine.dist.utils.is_distributed
    mmengine.dist.utils.is_distributed = lambda: False
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the run itself will warn
            yield
    finally:
        mmengine.dist.utils.is_distributed = is_distributed
        random.setstate(states[0])
        np.random.set_state(states[1])
        os.environ.clear()
        os.environ.update(variables)
        cudnn.benchmark, cudnn.deterministic = switches
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(precision)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for manager, before in instances.items():
            for name in set(manager._instance_dict) - set(before):
                for handler in getattr(manager._instance_dict[name], 'handlers', ()):
                    handler.close()
            manager._instance_dict.clear()
            manager._instance_dict.update(before)


class _TwoBatches:
    """A training loader that reads its first two batches, gives them cut to `limit` images, and then again."""

    def __init__(self, loader, limit: int | None):
        self.loader = loader
        self.limit = limit
        self.batches = []

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for batch in itertools.islice(self.loader, 2):
            self.batches.append(batch)
            yield self._cut(batch)
        while self.batches:
            yield from map(self._cut, self.batches)

    def _cut(self, batch):
        if self.limit is None or not (is_labelled(batch) or _is_listed(batch)):
            return batch
        return [part[: self.limit] for part in batch]


class _FewImages:
    """A validation loader's first images, in two batches."""

    def __init__(self, loader, limit: int):
        self.loader = loader
        self.limit = limit
        self.batches = []

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        # Of these images alone: a whole batch can be hundreds.
        order = list(itertools.islice(iter(self.loader.sampler), 2 * self.limit))
        self.batches = [
            self.loader.collate_fn([self.loader.dataset[draw] for draw in order[start : start + self.limit]])
            for start in range(0, len(order), self.limit)
        ]
        yield from self.batches


def is_labelled(batch) -> bool:
    """Whether a batch is images (B, C, H, W) with labels."""
    return (
        isinstance(batch, list | tuple)
        and len(batch) == 2
        and all(isinstance(part, Tensor) for part in batch)
        and batch[0].ndim == 4
    )


def _is_listed(batch) -> bool:
    """Whether it is a list of images and one of targets, as of dense tasks."""
    return isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, list) for part in batch)


class _Runner(Runner):
    """The run's runner, without its records."""

    rehearsal: 'Rehearsal'

    def _log_env(self, env_cfg) -> None:
        """Nothing."""

    def dump_config(self) -> None:
        """Nothing."""

    def build_dataloader(self, dataloader, seed=None, diff_rank_seed=False):
        loader = super().build_dataloader(dataloader, seed, diff_rank_seed)
        sampler = getattr(loader, 'sampler', None)
        # The sampler has been told of one process.
        if hasattr(sampler, 'world_size') and not hasattr(sampler, 'num_samples'):
            sampler.world_size = self.rehearsal.world_size
        return loader

    def build_train_loop(self, loop):
        loop = super().build_train_loop(loop)
        self.rehearsal.train_loader = loop.dataloader
        loop.dataloader = _TwoBatches(loop.dataloader, self.rehearsal.limit)
        return loop

    def build_val_loop(self, loop):
        loop = super().build_val_loop(loop)
        self.rehearsal.val_loader = loop.dataloader
        loop.dataloader = _FewImages(loop.dataloader, min(self.rehearsal.limit or VALIDATED, VALIDATED))
        return loop


class _Spy(Hook):
    """Notes what goes on around iterations, after all other hooks, and ends the loops."""

    priority = 'LOWEST'

    def __init__(self, rehearsal: 'Rehearsal'):
        self.rehearsal = rehearsal

    def before_train(self, runner) -> None:
        self.rehearsal._began()

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.rehearsal._before_step(data_batch)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.rehearsal._after_step(outputs)

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.rehearsal.stage == 'validating' and not batch_idx:
            self.rehearsal.validated = self.rehearsal.weights()

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self.rehearsal.stage == 'validating' and batch_idx + 1 == len(runner.val_loop.dataloader.batches):
            raise _Stop


class Rehearsal:
    """A few training iterations and validation batches of a run, and the objects that it has built.

    Args:
        cfg: the run's config.
        world_size: processes of the run; one of them is rehearsed.
        deadline: `time.monotonic()` after which only what has begun is finished.
        limit: images of each batch that the model sees; None for all.

    Attributes:
        cfg, recipe, world_size: the config fitted to the processes, its `recipe` ({} without one), and their number.
        runner, task, backbone, wrapper, optimizer, loop: what was built; `backbone` is None in tasks without.
        train_loader, val_loader: the run's own.
        batches, val_batches: whole training batches, and a few images of validation.
        steps: a `Step` each iteration.
        before, after, raw, validated: weights before the first step, after the last, before validation, and in it.
        val_training: modules in train mode while the backbone computed in validation, by name.
        schedule: copies of the schedulers before the first step; `groups` are the parameter groups that they set.
        failure: the exception that ended the rehearsal early.
        is_full: whether checks may take copies of the model and train them.
    """

    is_full = False

    def __init__(self, cfg: Config, world_size: int, deadline: float, limit: int | None):
        self.world_size = world_size
        self.deadline = deadline
        self.limit = limit
        self.cfg = fit(cfg, world_size)
        self.recipe = dict(self.cfg.get('recipe') or {})
        self.runner = self.task = self.backbone = self.wrapper = self.optimizer = self.loop = None
        self.train_loader = self.val_loader = None
        self.steps: list[Step] = []
        self.before = self.after = self.raw = self.validated = None
        self.val_training: list[str] | None = None
        self.schedule, self.groups = [], []
        self.failure: Exception | None = None
        self.stage = 'building'
        self._criterion = None
        self._is_in_step = False
        self._spies = []

    @property
    def batches(self) -> list:
        return self.loop.dataloader.batches if self.loop is not None else []

    @property
    def val_batches(self) -> list:
        return self.runner.val_loop.dataloader.batches if self.val_loader is not None else []

    @property
    def device(self) -> torch.device:
        return next(self.task.parameters()).device

    @property
    def accumulated(self) -> int:
        """Batches of an optimizer step."""
        return getattr(self.wrapper, '_accumulative_counts', 1)

    def run(self) -> None:
        """Build, train a few iterations, validate a few images. A failure is kept, not raised."""
        with tempfile.TemporaryDirectory(prefix='zoo-preflight', ignore_cleanup_errors=True) as folder:
            try:
                self._train(folder)
                self._validate()
            except _Stop:
                pass
            except Exception as error:
                self.failure = error
            finally:
                self._remove_spies()
                if self.after is not None:
                    self.load(self.after)

    def _train(self, folder: str) -> None:
        self.runner = type('Runner', (_Runner,), {'rehearsal': self}).from_cfg(self._quiet(folder))
        model = self.runner.model
        self.task = getattr(model, 'module', model)
        self.backbone = getattr(self.task, 'backbone', None)
        self.runner._hooks = [hook for hook in self.runner.hooks if not _writes(hook)]
        self.runner.register_hook(_Spy(self), priority='LOWEST')
        with contextlib.suppress(_Stop):
            self.stage = 'starting'
            self.runner.train()
        self.after = self.weights() if self.before is not None else None

    def _validate(self) -> None:
        if self.runner.val_loop is None or self.before is None:
            return
        self.stage = 'validating'
        with torch.no_grad():  # so that raw weights and averages can be told apart
            for parameter in self.task.parameters():
                parameter.add_(1e-3)
        self.raw = self.weights()
        with contextlib.suppress(_Stop):
            self.runner.val_loop.run()

    def _quiet(self, folder: str) -> Config:
        cfg = copy.deepcopy(self.cfg)
        cfg.merge_from_dict({'work_dir': folder, 'resume': False, 'launcher': 'none'})
        cfg.experiment_name = f'preflight_{uuid.uuid4().hex}'
        cfg.log_level = 'ERROR'
        cfg.visualizer = {'type': 'Visualizer', 'vis_backends': None}
        cfg.compile = False
        if 'compile' in cfg.model:
            cfg.model.compile = False
        for loader in ('train_dataloader', 'val_dataloader'):
            if cfg.get(loader):
                for name in ('persistent_workers', 'prefetch_factor'):
                    cfg[loader].pop(name, None)
                cfg[loader].num_workers = 0
        cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
        return cfg

    def weights(self) -> dict[str, Tensor]:
        """A copy of the task's state."""
        return {name: value.detach().clone() for name, value in self.task.state_dict().items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Give the task a state again."""
        with torch.no_grad():
            for name, value in self.task.state_dict().items():
                value.copy_(weights[name])

    def averages(self) -> list[tuple[Hook, Callable[[], dict[str, Tensor]]]]:
        """The hooks that average weights, with functions that give the averages by the names of the task's state."""
        found = []
        for hook in self.runner.hooks:
            if isinstance(getattr(hook, 'average', None), dict):
                found.append((hook, lambda hook=hook: hook.average))
            elif isinstance(getattr(hook, 'ema_model', None), nn.Module):
                found.append((hook, lambda hook=hook: hook.ema_model.module.state_dict()))
        return found

    # What the spy calls

    def _began(self) -> None:
        self.stage = 'training'
        self.wrapper, self.optimizer = self.runner.optim_wrapper, self.runner.optim_wrapper.optimizer
        self.loop = self.runner.train_loop
        self._copy_schedule()
        self.before = self.weights()
        self._spies.append(self.optimizer.register_step_post_hook(self._optimizer_stepped))
        for name, parameter in self.task.named_parameters():
            if parameter.requires_grad:
                hook = functools.partial(self._gradient, name)
                self._spies.append(parameter.register_post_accumulate_grad_hook(hook))
        if self.backbone is not None:
            self._spies.append(self.backbone.register_forward_pre_hook(self._backbone_called))
            for module in self.backbone.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    self._spies.append(module.register_forward_hook(self._layer_called))
        if hasattr(self.task, '_loss'):
            self._criterion = self.task._loss
            self.task._loss = self._criterion_called

    def _copy_schedule(self) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group['params']]
        shared = {id(parameter): parameter for parameter in parameters}  # parameters, not copies of them
        shared.update({id(self.optimizer.state): self.optimizer.state, id(self.wrapper): self.wrapper})
        self.schedule, optimizer = copy.deepcopy((list(self.runner.param_schedulers or ()), self.optimizer), shared)
        self.groups = optimizer.param_groups
        for scheduler in self.schedule:
            scheduler.optimizer = optimizer

    def _before_step(self, batch) -> None:
        if is_labelled(batch) and not batch[1].is_floating_point():
            classes = getattr(self.task, 'num_classes', None)
            if classes and not 0 <= int(batch[1].min()) <= int(batch[1].max()) < classes:
                raise _Stop  # a GPU would not survive it; the check of the labels says so
        self._is_in_step = True
        self.steps.append(
            Step(
                rates=[group['lr'] for group in self.optimizer.param_groups],
                positions=[scheduler.last_step for scheduler in self.runner.param_schedulers or ()],
            )
        )

    def _after_step(self, outputs) -> None:
        self._is_in_step = False
        step = self.steps[-1]
        if isinstance(outputs, dict) and isinstance(outputs.get('loss'), Tensor):
            step.loss = float(outputs['loss'].detach())
        step.gradients = {name: float(norm) for name, norm in step.gradients.items()}
        enough = len(self.steps) >= max(3, self.accumulated + 1)
        if enough or (len(self.steps) >= 2 and time.monotonic() > self.deadline):
            raise _Stop

    def _optimizer_stepped(self, *_) -> None:
        if self.steps:
            self.steps[-1].updated = True

    def _gradient(self, name: str, parameter: nn.Parameter) -> None:
        scaler = getattr(self.wrapper, 'scaler', None) or getattr(self.wrapper, 'loss_scaler', None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        self.steps[-1].gradients[name] = parameter.grad.detach().float().norm() / scale

    def _backbone_called(self, backbone, arguments) -> None:
        modules = [(name, module) for name, module in self.task.named_modules() if not list(module.children())]
        if self.stage == 'validating':
            if self.val_training is None:
                self.val_training = [name for name, module in modules if module.training]
            return
        if not self._is_in_step:
            return
        step = self.steps[-1]
        step.in_eval = [name for name, module in modules if not module.training]
        teacher = getattr(self.task, 'teacher', None)
        if isinstance(teacher, nn.Module):
            step.teacher_in_train = [name for name, module in teacher.named_modules() if module.training]
        kind = self.device.type
        step.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        step.inputs = arguments[0].detach()

    def _layer_called(self, module, arguments, output) -> None:
        if self._is_in_step and isinstance(output, Tensor):
            counts = self.steps[-1].dtypes
            counts[output.dtype] = counts.get(output.dtype, 0) + 1

    def _criterion_called(self, logits, targets, *arguments, **options):
        if self._is_in_step:
            self.steps[-1].criteria.append((logits.detach(), targets.detach(), options))
        return self._criterion(logits, targets, *arguments, **options)

    def _remove_spies(self) -> None:
        for handle in self._spies:
            handle.remove()
        self._spies.clear()
        if self._criterion is not None:
            self.task._loss = self._criterion
        self.stage = 'over'


def _writes(hook: Hook) -> bool:
    kind = type(hook)
    own = any(f'{base.__module__}.{base.__qualname__}'.startswith(WRITERS) for base in kind.__mro__)
    return own or any(base.__name__ in MMENGINE_WRITERS for base in kind.__mro__)
