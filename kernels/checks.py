"""Checks of arguments that operators share, and the cast under autocast."""

import torch
from torch import Tensor


def same_kind(operator: str, **tensors: Tensor) -> None:
    """TypeError unless all `tensors` are floating tensors of one dtype; ValueError unless they are on one device."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f'{operator}: {name} must be a tensor, got {type(tensor).__name__}')
        if not tensor.is_floating_point():
            raise TypeError(f'{operator}: {name} must be floating, got {tensor.dtype}')
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        found = ', '.join(f'{name} {tensor.dtype}' for name, tensor in tensors.items())
        raise TypeError(f'{operator}: dtypes must be equal, got {found}')
    same_device(operator, **tensors)


def same_device(operator: str, **tensors: Tensor) -> None:
    """ValueError unless all `tensors` are on one device."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        found = ', '.join(f'{name} on {tensor.device}' for name, tensor in tensors.items())
        raise ValueError(f'{operator}: tensors must be on one device, got {found}')


def per_axis(operator: str, name: str, value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    """`value` as one positive int per axis, symbolic in tracing maybe; ValueError or TypeError if it is not that."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f'{operator}: {name} must be an int or {axes} ints, got {value}')
    for each in values:
        if not isinstance(each, (int, torch.SymInt)) or isinstance(each, bool):
            raise TypeError(f'{operator}: {name} must be an int or {axes} ints, got {value!r}')
        if each < 1:
            raise ValueError(f'{operator}: {name} must be positive, got {value}')
    return values


def autocasts(device: str) -> bool:
    """Whether an autocast region is open for a type of device."""
    return device != 'meta' and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`tensors` in the dtype of the autocast region that is open for their device, as they are outside of one.

    float64 stays, as everywhere in autocast.
    """
    device = tensors[0].device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)
