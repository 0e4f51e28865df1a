"""Parameter groups as timm makes them, and mixed precision on any device."""

from contextlib import contextmanager

import timm.optim
import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from .registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS

__all__ = ['AutocastOptimWrapper', 'TimmParamGroups', 'param_groups']

OPTIMIZERS.register_module(module=timm.optim.Lamb)


def param_groups(
    backbone: nn.Module, lr: float, weight_decay: float = 0.0, layer_decay: float | None = None
) -> list[dict]:
    """Groups with learning rate and weight decay of a timm model's trainable parameters.

    Biases, norms and what the model's no_weight_decay() names aren't decayed. With layer_decay, a layer's rate is
    that factor times the next layer's, layers being counted by the model's group_matcher.
    """
    exempt = backbone.no_weight_decay() if hasattr(backbone, 'no_weight_decay') else ()
    arguments = {'weight_decay': weight_decay, 'no_weight_decay_list': exempt}
    if layer_decay is None:
        return [{**group, 'lr': lr} for group in param_groups_weight_decay(backbone, **arguments)]
    groups = param_groups_layer_decay(backbone, **arguments, layer_decay=layer_decay)
    return [
        {'params': group['params'], 'weight_decay': group['weight_decay'], 'lr': lr * group['lr_scale']}
        for group in groups
    ]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmParamGroups:
    """Builds an optimizer wrapper on `param_groups` of the task's backbone; `paramwise_cfg` may hold `layer_decay`."""

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop('optimizer'))
        self.arguments = dict(paramwise_cfg or {})

    def __call__(self, model: nn.Module) -> OptimWrapper:
        backbone = (model.module if is_model_wrapper(model) else model).backbone
        lr, weight_decay = self.optimizer['lr'], self.optimizer.get('weight_decay', 0.0)
        groups = param_groups(backbone, lr, weight_decay, **self.arguments)
        optimizer = OPTIMIZERS.build({**self.optimizer, 'params': groups})
        return OPTIM_WRAPPERS.build({'type': 'OptimWrapper', **self.wrapper, 'optimizer': optimizer})


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Forward passes under autocast, on the CPU too. bfloat16 needs no loss scaling; for float16 see AmpOptimWrapper.

    Args:
        dtype: of the autocast.
    """

    def __init__(self, dtype: str = 'bfloat16', **kwargs):
        super().__init__(**kwargs)
        if dtype != 'bfloat16':
            raise ValueError(
                f"dtype must be 'bfloat16', got {dtype!r}; mmengine's AmpOptimWrapper scales float16's loss."
            )

    @contextmanager
    def optim_context(self, model: nn.Module):
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield
