"""The authors' checkpoints into our models: key maps, and errors that say what does not fit and what would."""

import re
import sys
from collections.abc import Mapping

import timm
import torch

from . import adopted, catalogue

__all__ = [
    'PVT_KEYS',
    'SWIN_KEYS',
    'CheckpointError',
    'as_linear',
    'checkpoint_filter_fn',
    'misfit',
    'mismatches',
    'rename',
    'to_own_keys',
]

WRAPPERS = ('state_dict', 'model')  # what the authors' training scripts put a state dict under
PARALLEL = 'module.'  # what DataParallel puts before each key
SHOWN = 10  # keys listed of each kind in an error
# What filters raise that meet another model's tensors.
NOT_THEIRS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Rules for `rename`, the keys of families built after PVT (v2), and after Swin, to those of a pyramid.
PVT_KEYS = (
    (r'^patch_embed(\d)\.', lambda m: f'stages.{int(m[1]) - 1}.downsample.'),
    (r'^block(\d)\.', lambda m: f'stages.{int(m[1]) - 1}.blocks.'),
    (r'^norm(\d)\.', lambda m: f'stages.{int(m[1]) - 1}.norm.'),
    (r'\.dwconv\.dwconv\.', '.dwconv.'),
)
SWIN_KEYS = (
    (r'^patch_embed\.', 'stages.0.downsample.'),
    (r'^layers\.(\d)\.downsample\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.'),
    (r'^layers\.', 'stages.'),
)
ALIKE = 0.2  # least share of a variant's keys that a checkpoint has, for its family to be a guess


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read, or whose tensors are not those of the model."""


def checkpoint_filter_fn(state_dict: Mapping, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Map an official state dict, wrapped or not, to the model's own keys; the model's own pass through.

    The classifier may be absent, and it and the first convolution may have other widths than the model's: timm adapts
    both to `num_classes` and `in_chans` after this.

    Raises:
        CheckpointError: tensors are missing, unknown, or of other shapes; names the family that they would fit.
    """
    state_dict = unwrap(state_dict, _architecture(model))
    problem = misfit(state_dict, model)
    if problem:
        raise CheckpointError(problem)
    return to_own_keys(state_dict, model)


def unwrap(state_dict: Mapping, name: str = '') -> Mapping:
    """The state dict of model `name` itself, out of what the authors' training scripts save around it."""
    for wrapper in (*catalogue.wrappers(name), *WRAPPERS):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    if state_dict and all(str(key).startswith(PARALLEL) for key in state_dict):
        return {key.removeprefix(PARALLEL): tensor for key, tensor in state_dict.items()}
    return state_dict


def to_own_keys(state_dict: Mapping, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """An official state dict under the keys of `model`, one of the zoo or of timm; the model's own pass through."""
    if hasattr(model, 'map_official'):
        return model.map_official(state_dict)
    mapped = rename(state_dict, adopted.official_keys(_architecture(model)))
    timms_filter = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if timms_filter is None:
        return mapped
    try:
        return timms_filter(mapped, model)
    except NOT_THEIRS:
        return mapped


def misfit(
    state_dict: Mapping, model: torch.nn.Module, lenient: tuple[str, ...] = (), adapts_layers: bool = True
) -> str:
    """Why a state dict, official or own, can't be the weights of `model`, and whose it may be; '' if it can.

    Keys that start with one of `lenient` may be absent or have other shapes, and so may those of the classifier and of
    the first convolution, which timm adapts, if `adapts_layers`.
    """
    if adapts_layers:
        lenient += _adaptable(model)
    problems = mismatches(to_own_keys(state_dict, model), model.state_dict(), lenient)
    if not problems:
        return ''
    name = _architecture(model) or type(model).__name__
    return f'The checkpoint does not fit {name}: {problems}.{suggestion(state_dict, name)}'


def _architecture(model: torch.nn.Module) -> str:
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or ''


def _adaptable(model: torch.nn.Module) -> tuple[str, ...]:
    """Prefixes of the keys that timm adapts to `num_classes` and `in_chans`."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    names = (cfg.get('classifier') or (), cfg.get('first_conv') or ())
    return tuple(f'{name}.' for group in names for name in ((group,) if isinstance(group, str) else group))


def rename(state_dict: Mapping, rules) -> dict:
    """`state_dict` with each (pattern, replacement) of `rules` applied to its keys, in order (see re.sub)."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def as_linear(tensor):
    """The weight (out, in, 1, 1) of a pointwise convolution as that of a linear (out, in); anything else as it is."""
    is_pointwise = getattr(tensor, 'ndim', 0) == 4 and tensor.shape[2:] == (1, 1)
    return tensor.flatten(1) if is_pointwise else tensor


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


def suggestion(state_dict: Mapping, name: str) -> str:
    """' It looks like ...' when another variant of the catalogue has exactly these tensors, else ''."""
    families = catalogue.families()
    first_of = {key: next(iter(family['variants'])) for key, family in families.items()}
    shares = {key: _share(state_dict, first) for key, first in first_of.items()}
    for key in sorted(shares, key=shares.get, reverse=True):
        if shares[key] < ALIKE:
            break
        for other in families[key]['variants']:
            if other != name and _fits(state_dict, other):
                return f' It looks like {families[key]["title"]}: try {other!r}.'
    return ''


def _share(state_dict: Mapping, name: str) -> float:
    """The share of the keys of variant `name` that the state dict has."""
    _, given, wanted = _compared(state_dict, name)
    return sum(key in given for key in wanted) / len(wanted)


def _fits(state_dict: Mapping, name: str) -> bool:
    model, given, wanted = _compared(state_dict, name)
    return not mismatches(given, wanted, _adaptable(model))


def _compared(state_dict: Mapping, name: str) -> tuple[torch.nn.Module, Mapping, Mapping]:
    """Variant `name`, the state dict under its keys, and its own."""
    model = timm.create_model(name, device='meta')
    try:
        given = to_own_keys(state_dict, model)
    except NOT_THEIRS:
        given = state_dict
    return model, given, model.state_dict()
