"""Optimizers and parameter groups as timm makes them, gradient clipping, and mixed precision on any device."""

import fnmatch
from contextlib import contextmanager

import mmengine.optim
import timm.optim
import torch
from mmengine.model import is_model_wrapper
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils.agc import adaptive_clip_grad
from torch import nn
from torch.distributed.tensor import DTensor

from .registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS

__all__ = [
    'AutocastOptimWrapper',
    'DenseParamGroups',
    'OptimWrapper',
    'TimmParamGroups',
    'dense_param_groups',
    'param_groups',
]

OPTIMIZERS.register_module(module=timm.optim.Lamb)
CLIP = {
    'norm': nn.utils.clip_grad_norm_,  # max_norm
    'value': nn.utils.clip_grad_value_,  # clip_value
    'agc': adaptive_clip_grad,  # clip_factor
}


def _register_timm_optimizers() -> None:
    """As 'timm/<name>', with timm's defaults of that name. Those that need CUDA or a library ask for it on use."""

    def constructor(name):
        return lambda params, **kwargs: timm.optim.create_optimizer_v2(params, name, **kwargs)

    for name in timm.optim.list_optimizers():
        OPTIMIZERS.register_module(name=f'timm/{name}', module=constructor(name))


_register_timm_optimizers()


def param_groups(
    backbone: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    decay: tuple[str, ...] = (),
    no_decay: tuple[str, ...] = (),
) -> list[dict]:
    """Groups with learning rate and weight decay of a timm model's trainable parameters.

    Biases, vectors and what the model's no_weight_decay() names aren't decayed. With layer_decay, a layer's rate is
    that factor times the next layer's, layers being counted by the model's group_matcher; `lr_scale` of a group is
    what its rate was multiplied by.

    Args:
        backbone: the model.
        lr: rate of the last layer, or of all.
        weight_decay: of the parameters that are decayed.
        layer_decay: factor from a layer to the one before it; None for one rate.
        decay: patterns of names ('*.rpb') that are decayed all the same.
        no_decay: patterns of further names that aren't.

    Raises:
        ValueError: a pattern that no parameter's name matches.
    """
    names = {parameter: name for name, parameter in backbone.named_parameters()}
    for pattern in (*decay, *no_decay):
        if not fnmatch.filter(names.values(), pattern):
            raise ValueError(f'No parameter of the {type(backbone).__name__} has a name like {pattern!r}.')
    exempt = backbone.no_weight_decay() if hasattr(backbone, 'no_weight_decay') else ()
    arguments = {'weight_decay': weight_decay, 'no_weight_decay_list': {*exempt, *no_decay}}
    if layer_decay is None:
        groups = param_groups_weight_decay(backbone, **arguments)
    else:
        groups = param_groups_layer_decay(backbone, **arguments, layer_decay=layer_decay)

    def is_decayed(parameter):
        return any(fnmatch.fnmatch(names[parameter], pattern) for pattern in decay)

    result = []
    for group in groups:
        scale = group.get('lr_scale', 1.0)
        parts = {group['weight_decay']: [p for p in group['params'] if not is_decayed(p)]}
        parts.setdefault(weight_decay, []).extend(filter(is_decayed, group['params']))
        for value, parameters in parts.items():
            if parameters:
                made = {'params': parameters, 'weight_decay': value, 'lr': lr * scale}
                result.append(made if layer_decay is None else {**made, 'lr_scale': scale})
    return result


def dense_param_groups(
    task: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    no_decay: tuple[str, ...] = (),
    layer_decay: float | None = None,
    backbone_lr: float = 1.0,
) -> list[dict]:
    """Groups with learning rate and weight decay of a detector's or segmentor's trainable parameters.

    As in mmdetection's and mmsegmentation's configs, everything is decayed, biases too, but what `no_decay` names.

    Args:
        task: with `backbone`, a `Features`.
        lr: of neck and heads.
        weight_decay: of the parameters that are decayed.
        no_decay: parts of names ('norm', 'relative_position_bias_table') of parameters that aren't.
        layer_decay: factor from a layer of the backbone to the one before it, layers being counted by its
            group_matcher, as for `param_groups`; the last is the one before the neck. None for one rate.
        backbone_lr: what the backbone's rate is of `lr`.

    Raises:
        ValueError: a part of a name that no parameter has, or layers of a model that has no group_matcher.
    """
    named = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    for part in no_decay:
        if not any(part in name for name in named):
            raise ValueError(f'No parameter of the {type(task).__name__} has {part!r} in its name.')
    layers = {} if layer_decay is None else _layers(task.backbone.model)
    groups = {}
    for name, parameter in named.items():
        scale = backbone_lr if name.startswith('backbone.') else 1.0
        if name in layers:
            scale *= layer_decay ** (max(layers.values()) + 1 - layers[name])
        decay = 0.0 if any(part in name for part in no_decay) else weight_decay
        group = {'params': [], 'weight_decay': decay, 'lr': lr * scale, 'lr_scale': scale}
        groups.setdefault((scale, decay), group)['params'].append(parameter)
    return list(groups.values())


def _layers(features: nn.Module) -> dict[str, int]:
    """The layer of each parameter of a task's backbone, by its name in the task."""
    model = getattr(features, 'model', None)  # in timm's FeatureGetterNet
    if not hasattr(model, 'group_matcher'):
        raise ValueError(f'layer_decay needs a backbone with group_matcher, which {type(features).__name__} has not.')
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return {f'backbone.model.model.{name}': layer for name, layer in layers.items()}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmParamGroups:
    """Builds an optimizer wrapper on `param_groups` of the task's backbone.

    `paramwise_cfg` may hold `layer_decay`, `decay` and `no_decay`.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop('optimizer'))
        self.arguments = dict(paramwise_cfg or {})

    def groups(self, task: nn.Module, lr: float, weight_decay: float) -> list[dict]:
        return param_groups(task.backbone, lr, weight_decay, **self.arguments)

    def __call__(self, model: nn.Module) -> 'OptimWrapper':
        task = model.module if is_model_wrapper(model) else model
        groups = self.groups(task, self.optimizer['lr'], self.optimizer.get('weight_decay', 0.0))
        optimizer = OPTIMIZERS.build({**self.optimizer, 'params': groups})
        return OPTIM_WRAPPERS.build({'type': 'OptimWrapper', **self.wrapper, 'optimizer': optimizer})


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DenseParamGroups(TimmParamGroups):
    """Builds an optimizer wrapper on `dense_param_groups` of the task.

    `paramwise_cfg` may hold `no_decay`, `layer_decay` and `backbone_lr`.
    """

    def groups(self, task: nn.Module, lr: float, weight_decay: float) -> list[dict]:
        return dense_param_groups(task, lr, weight_decay, **self.arguments)


@OPTIM_WRAPPERS.register_module()
class OptimWrapper(mmengine.optim.OptimWrapper):
    """An optimizer with gradient accumulation and clipping.

    Args:
        optimizer: what steps.
        accumulative_counts: batches whose mean gradient makes a step.
        clip_grad: `type` 'norm' (the default), 'value' or 'agc' (adaptive clipping, arXiv 2102.06171), and the
            arguments of torch's clip_grad_norm_ (max_norm), clip_grad_value_ (clip_value) or timm's
            adaptive_clip_grad (clip_factor). All parameters are clipped, the classifier's too.

    Attributes:
        grad_norm: norm of the last step's gradient before clipping by norm, a tensor; None before, and otherwise.

    Raises:
        ValueError: no such type of clipping, or no batches to accumulate.
    """

    def __init__(self, optimizer, accumulative_counts: int = 1, clip_grad: dict | None = None):
        if not isinstance(accumulative_counts, int) or accumulative_counts < 1:
            raise ValueError(f'accumulative_counts must be a positive integer, got {accumulative_counts!r}.')
        super().__init__(optimizer, accumulative_counts)
        self.clip_grad_kwargs = dict(clip_grad or {})
        kind = self.clip_grad_kwargs.pop('type', 'norm')
        if kind not in CLIP:
            raise ValueError(f'clip_grad type must be one of {", ".join(CLIP)}, got {kind!r}.')
        self.clip_func = CLIP[kind]
        self.grad_norm = None

    @property
    def accumulative_counts(self) -> int:
        """Batches to a step."""
        return self._accumulative_counts

    def _clip_grad(self) -> None:
        # mmengine's keeps each norm in its message hub, at a wait for the device each step.
        parameters = [p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        if parameters:
            norm = self.clip_func(parameters, **self.clip_grad_kwargs)
            self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # sharded by FSDP2


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Forward passes under autocast, on the CPU too. The loss of float16 is scaled, and the scale resumed.

    Args:
        dtype: of the autocast, 'bfloat16' or 'float16'.
        loss_scale: initial scale of float16's loss; timm's and torch's 65536 by default. It halves whenever a
            gradient overflows, and that step is left out.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, dtype: str = 'bfloat16', loss_scale: float = 2.0**16, **kwargs):
        super().__init__(**kwargs)
        if dtype not in ('bfloat16', 'float16'):
            raise ValueError(f"dtype must be 'bfloat16' or 'float16', got {dtype!r}.")
        self.dtype = getattr(torch, dtype)
        device = self.optimizer.param_groups[0]['params'][0].device.type
        self.scaler = torch.amp.GradScaler(device, init_scale=loss_scale, enabled=dtype == 'float16')

    @contextmanager
    def optim_context(self, model: nn.Module):
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, self.dtype):
            yield

    def backward(self, loss, **kwargs) -> None:
        super().backward(self.scaler.scale(loss), **kwargs)

    def step(self, **kwargs) -> None:
        if self.clip_grad_kwargs:
            self.scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def state_dict(self) -> dict:
        return {**super().state_dict(), 'loss_scaler': self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        state_dict = dict(state_dict)
        self.scaler.load_state_dict(state_dict.pop('loss_scaler', None) or self.scaler.state_dict())
        super().load_state_dict(state_dict)
