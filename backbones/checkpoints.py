"""The authors' checkpoints into our models: key maps, and errors that say what does not fit and what would."""

import re
from collections.abc import Mapping

import timm
import torch

from . import catalogue

__all__ = ['CheckpointError', 'checkpoint_filter_fn', 'mismatches', 'rename']

WRAPPERS = ('state_dict', 'model')  # what the authors' training scripts put a state dict under
SHOWN = 10  # keys listed of each kind in an error


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read, or whose tensors are not those of the model."""


def checkpoint_filter_fn(state_dict: Mapping, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Map an official state dict, wrapped or not, to the model's own keys; the model's own pass through.

    The classifier may be absent, and it and the first convolution may have other widths than the model's: timm adapts
    both to `num_classes` and `in_chans` after this.

    Raises:
        CheckpointError: tensors are missing, unknown, or of other shapes; names the family that they would fit.
    """
    for wrapper in WRAPPERS:
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    mapped = model.map_official(state_dict)
    adaptable = (model.classifier_name + '.', model.first_conv + '.')
    problems = mismatches(mapped, model.state_dict(), lenient=adaptable)
    if problems:
        name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
        raise CheckpointError(f'The checkpoint does not fit {name}: {problems}.{_suggestion(state_dict, name)}')
    return mapped


def rename(state_dict: Mapping, rules) -> dict:
    """`state_dict` with each (pattern, replacement) of `rules` applied to its keys, in order (see re.sub)."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def mismatches(given: Mapping, wanted: Mapping, lenient: tuple[str, ...] = ()) -> str:
    """What keeps `given` from being loaded strictly as `wanted`, in words; '' if nothing does.

    Keys that start with one of `lenient` may be absent or have another shape. BatchNorm's `num_batches_tracked`, which
    old checkpoints lack, is never missed.
    """
    missing = [
        k for k in wanted if k not in given and not k.startswith(lenient) and not k.endswith('num_batches_tracked')
    ]
    unexpected = [k for k in given if k not in wanted and not k.startswith(lenient)]
    misshaped = [
        f'{k} {_shape(given[k])} instead of {_shape(wanted[k])}'
        for k in wanted
        if k in given and not k.startswith(lenient) and _shape(given[k]) != _shape(wanted[k])
    ]
    found = (('missing', missing), ('unexpected', unexpected), ('misshaped', misshaped))
    return '; '.join(f'{len(keys)} {kind} ({_first(keys)})' for kind, keys in found if keys)


def _shape(value):
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _first(keys: list[str]) -> str:
    return ', '.join(keys[:SHOWN]) + (', ...' if len(keys) > SHOWN else '')


def _suggestion(state_dict: Mapping, name: str) -> str:
    """' It looks like ...' when another variant of the catalogue has exactly these tensors, else ''."""
    for other in catalogue.variant_names():
        if other == name or not timm.is_model(other):
            continue
        model = timm.create_model(other, device='meta')
        if not hasattr(model, 'map_official'):  # timm's own model under a name that the catalogue knows too
            continue
        lenient = (model.classifier_name + '.', model.first_conv + '.')
        if not mismatches(model.map_official(state_dict), model.state_dict(), lenient):
            title = catalogue.families()[catalogue.family_of(other)]['title']
            return f' It looks like {title}: try {other!r}.'
    return ''
