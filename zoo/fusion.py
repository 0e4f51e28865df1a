"""`zoo.fuse`: BatchNorms merged into the convolutions and linears beside them, for inference.

In evaluation a BatchNorm multiplies and shifts each channel, so it can be part of the weights of a convolution or
linear before it, and of one after it that pads nothing. Two ways lead there:

1. Modules that can merge themselves (timm's `fuse`, `reparameterize`, `switch_to_deploy`) are asked to: they know more
   than that, as SHViT's residual depthwise convolutions, which take their shortcut into the kernel.
2. What else stands together is not guessed from the code but seen while the model runs: a BatchNorm is merged if its
   input is the output of one convolution, which nothing else uses, or if its output goes to one convolution alone.

Both happen in float64, and the merged model is compared with the original before it is handed back.
"""

import copy
import dataclasses
import math
from collections import Counter
from contextlib import contextmanager

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .backbones.layers import BatchNorm

__all__ = ['Fusion', 'Merge', 'fuse']

CHANNEL_AXIS = {
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 1,
    nn.BatchNorm3d: 1,
    nn.SyncBatchNorm: 1,
    BatchNormAct2d: 1,
    FrozenBatchNormAct2d: 1,
    BatchNorm: -1,
}
NORMS = tuple(CHANNEL_AXIS)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OWN_METHODS = ('fuse', 'reparameterize', 'switch_to_deploy')  # of modules that merge themselves, in timm's order
PROBE_SIZES = ((64, 64), (97, 75))  # the odd one pads wherever a model pads
REFUSALS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)  # of models that take other images
TOLERANCE = 1e-9  # relative, float64: rounding in another order gives about 1e-14
LOOKS = {  # functions of a tensor that don't use its values
    *(torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.size, torch.Tensor.stride, torch.Tensor.numel),
    *(torch.Tensor.is_contiguous, torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.get_device),
    *(getattr(torch.Tensor, name).__get__ for name in ('shape', 'ndim', 'dtype', 'device', 'layout', 'requires_grad')),
    *(getattr(torch.Tensor, name).__get__ for name in ('is_cuda', 'is_meta', 'is_quantized', 'is_sparse')),
}


@dataclasses.dataclass(frozen=True)
class Merge:
    """A BatchNorm, by name, the module that it is part of now, and how it got there."""

    norm: str
    into: str
    how: str


@dataclasses.dataclass(frozen=True)
class Fusion:
    """What `zoo.fuse` did: the BatchNorms merged, those left with the reason, and the difference of the outputs.

    `difference` is relative, in float64. Printed, it is a table.
    """

    merged: tuple[Merge, ...]
    left: dict[str, str]
    difference: float

    def __str__(self) -> str:
        if not self.merged:
            reason = 'no BatchNorm of the model can be merged' if self.left else 'the model has no BatchNorm'
            return '\n'.join([f'Nothing to merge: {reason}.', *self._left()])
        title = f'{len(self.merged)} BatchNorms merged, {len(self.left)} left; outputs differ by {self.difference:.0e}'
        width = max(len(merge.norm) for merge in self.merged)
        merged = [f'  {merge.norm:{width}}  into {merge.into} ({merge.how})' for merge in self.merged]
        return '\n'.join([title, *merged, *self._left()])

    def _left(self) -> list[str]:
        return [f'  {name}  left: {reason}' for name, reason in self.left.items()]


def fuse(model: nn.Module, images: torch.Tensor | None = None) -> nn.Module:
    """A copy of a model with its BatchNorms merged into the convolutions and linears beside them, for inference.

    Works for the zoo's models, timm's, and others that are called with images, with or without `features_only`. Results
    are the same up to rounding; fewer memory-bound operations run. The copy is in evaluation mode, on the same device
    and in the same dtype. It has other state-dict keys than the model: keep the original's checkpoint, and fuse after
    loading. It can't be trained on as the original would be.

    Args:
        model: any module; it stays as it is.
        images: (B, C, H, W), for a model that takes other images than random ones of two small sizes or of its
            `default_cfg`'s size.

    Returns:
        The merged copy. Its attribute `fusion` says what was merged and what was left, and prints as a table.

    Raises:
        ValueError: the model has no weights (meta device), or refuses the images.
        RuntimeError: the merged model computes something else. It is not handed back.
    """
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError('A model on the meta device has no weights to merge.')
    fused = _copied(model).eval().to('cpu', torch.float64)
    runs = _runs(fused, images)
    merged = _merge_by_own_methods(fused)
    while True:
        records = [_Record(fused, way, x) for way, x, _ in runs]
        pairs, left = _find(records, fused)
        if not pairs:
            break
        merged += [_merge(fused, *pair) for pair in pairs]
    difference = max(_difference(want, record.outputs) for (_, _, want), record in zip(runs, records, strict=True))
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f'The merged {type(model).__name__} differs from the original by {difference:.1e} (relative).'
        )
    _restore(fused, model)
    fused.fusion = Fusion(tuple(merged), left, difference)
    return fused


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps computed tensors, as EfficientViT its biases, which can't be copied."""
    kept = [leaf for module in model.modules() for leaf in tree_leaves(vars(module)) if isinstance(leaf, torch.Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf})


def _runs(model: nn.Module, images: torch.Tensor | None) -> list[tuple]:
    """(way of running the model, images, outputs) for each way that users have, and sizes that the model takes."""
    if images is not None:
        return _accepted(model, images.detach().to('cpu', torch.float64))
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    own = tuple(cfg.get('input_size') or (3, 224, 224))
    first = next((m for m in model.modules() if isinstance(m, CONVOLUTIONS)), None)
    in_chans = getattr(model, 'in_chans', None) or (first.in_channels if first else own[0])
    generator = torch.Generator().manual_seed(0)
    runs = []
    for size in (*PROBE_SIZES, own[1:]):
        if size in PROBE_SIZES or not runs:  # its own, larger size only if it takes no other
            runs += _accepted(model, torch.randn(2, in_chans, *size, generator=generator, dtype=torch.float64))
    if not runs:
        raise ValueError(f'{type(model).__name__} refuses random images; pass images=... that it takes.')
    return runs


def _forward(model, x):
    return model(x)


def _intermediates(model, x):
    return model.forward_intermediates(x)


def _features(model, x):
    features = model.forward_features(x)
    return features, model.forward_head(features, pre_logits=True)


@torch.no_grad()
def _accepted(model: nn.Module, x: torch.Tensor) -> list[tuple]:
    """The runs that work with the images; none if the model can't be called with them."""
    runs = []
    for way, methods in (
        (_forward, ()),
        (_intermediates, ('forward_intermediates',)),
        (_features, ('forward_features', 'forward_head')),
    ):
        if not all(hasattr(model, method) for method in methods):
            continue
        try:
            runs.append((way, x, _tensors(way(model, x))))
        except REFUSALS:
            if way is _forward:
                return []
    return runs


def _tensors(result) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _difference(want: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Greatest relative difference of the tensors."""
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        error = (a - b).norm().item()
        worst = max(worst, error / a.norm().item() if error else 0.0, key=lambda x: math.inf if math.isnan(x) else x)
    return worst


def _restore(fused: nn.Module, model: nn.Module) -> None:
    """Bring the merged copy to the model's device and dtypes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    floating = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    first = next(iter(tensors.values()), None)
    if first is None:
        return
    usual = next(iter(floating.values()), torch.float32)
    fused.to(first.device, usual)
    for name, tensor in [*fused.named_parameters(), *fused.named_buffers()]:
        if floating.get(name, usual) != usual and tensor.is_floating_point():
            tensor.data = tensor.data.to(floating[name])


# --- modules that merge themselves


@contextmanager
def _float64_by_default():
    """Some of timm's `fuse` methods build layers of the default dtype, which would round the weights."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def _norm_names(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.modules.batchnorm._NormBase)]


def _merge_by_own_methods(model: nn.Module) -> list[Merge]:
    merged, done = [], {}

    def walk(parent, path):
        for name, child in list(parent.named_children()):
            own = next((method for method in OWN_METHODS if callable(getattr(type(child), method, None))), None)
            where = f'{path}{name}'
            if id(child) in done:
                setattr(parent, name, done[id(child)][1])
                continue
            result = child
            if own and not hasattr(child, 'forward_features'):  # a whole model is walked through
                norms = _norm_names(child)
                returned = getattr(child, own)()
                result = returned if isinstance(returned, nn.Module) else child
                setattr(parent, name, result)
                rest = set(_norm_names(result)) if result is child else set()
                how = f'{type(child).__name__}.{own}'
                merged.extend(
                    Merge('.'.join(filter(None, (where, norm))), where, how) for norm in norms if norm not in rest
                )
            done[id(child)] = child, result
            walk(result, f'{where}.')

    with torch.no_grad(), _float64_by_default():
        walk(model, '')
    return merged


# --- what stands together when the model runs


@dataclasses.dataclass(eq=False)
class _Call:
    """One run of a BatchNorm, convolution or linear."""

    module: nn.Module
    input: torch.Tensor
    output: torch.Tensor | None = None
    products: list = dataclasses.field(default_factory=list)  # of its weight: (input, output)


class _Record(TorchFunctionMode):
    """A run of the model: the calls of BatchNorms, convolutions and linears, and who uses their inputs and outputs."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, way, x: torch.Tensor):
        super().__init__()
        self.calls: list[_Call] = []
        self.running: list[_Call] = []
        self.users: dict[int, list] = {}  # id of a tensor -> calls in which it was used, None for elsewhere
        self.kept: list[torch.Tensor] = []  # so that no id is given twice
        hooks = []
        for module in model.modules():
            if isinstance(module, (*NORMS, *CONVOLUTIONS, nn.Linear)):
                hooks.append(module.register_forward_pre_hook(self.enter))
                hooks.append(module.register_forward_hook(self.leave))
        try:
            with self:
                self.outputs = _tensors(way(model, x))
        finally:
            for hook in hooks:
                hook.remove()
        for tensor in self.outputs:
            self.use(tensor)

    def enter(self, module, args):
        self.running.append(_Call(module, args[0] if args else None))

    def leave(self, module, args, output):
        call = self.running.pop()
        call.output = output
        self.kept += [call.input, output]
        self.calls.append(call)

    def use(self, tensor):
        self.kept.append(tensor)
        self.users.setdefault(id(tensor), []).append(self.running[-1] if self.running else None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in LOOKS:
            return function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        versions = [tensor._version for tensor in tensors]
        result = function(*args, **kwargs)
        for tensor, version in zip(tensors, versions, strict=True):
            if result is not tensor or tensor._version != version:  # not handed through, as dropout does
                self.use(tensor)
        if self.running and isinstance(self.running[-1].module, (*CONVOLUTIONS, nn.Linear)):
            self._note_product(self.running[-1], function, args, kwargs, result)
        return result

    def _note_product(self, call, function, args, kwargs, result):
        weight, bias = call.module.weight, call.module.bias
        if any(tensor is weight for tensor in tree_leaves((args, kwargs))):
            given = dict(zip(('input', 'weight', 'bias'), args, strict=False)) | kwargs
            is_plain = getattr(function, '__name__', '') in ('conv1d', 'conv2d', 'conv3d', 'linear')
            is_plain = is_plain and given.get('weight') is weight and given.get('bias') is bias
            call.products.append((given.get('input') if is_plain else None, result if is_plain else None))

    def calls_of(self, module) -> list[_Call]:
        return [call for call in self.calls if call.module is module]

    def is_used_by_alone(self, tensor, call) -> bool:
        users = self.users.get(id(tensor), [])
        return bool(users) and all(user is call for user in users)

    def before(self, norm: _Call) -> tuple[nn.Module | None, str]:
        """The convolution or linear whose output is the BatchNorm's input and nothing else's, or why there is none."""
        call = next((call for call in self.calls if call.output is norm.input and _is_linear(call.module)), None)
        if call is None:
            return None, 'its input is not the output of a convolution or linear'
        if not self.is_used_by_alone(norm.input, norm):
            return None, 'the output of the convolution or linear before it is used elsewhere too'
        if len(call.products) != 1 or call.products[0][1] is not call.output:
            return None, 'the layer before it does more than multiply by its weight'
        if not _same_axis(norm.module, call.module, norm.input):
            return None, 'it normalises another axis than the layer before it gives'
        return call.module, ''

    def after(self, norm: _Call) -> tuple[nn.Module | None, str]:
        """The convolution or linear that alone takes the BatchNorm's output, unpadded, or why there is none."""
        user = next(iter(self.users.get(id(norm.output), [])), None)
        if user is None or not _is_linear(user.module) or not self.is_used_by_alone(norm.output, user):
            return None, 'its output does not go to one convolution or linear alone'
        if len(user.products) != 1 or user.products[0][0] is not norm.output or not _pads_nothing(user.module):
            return None, 'the convolution after it pads'
        if not _same_axis(norm.module, user.module, norm.output):
            return None, 'it normalises another axis than the layer after it sums'
        return user.module, ''


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (*CONVOLUTIONS, nn.Linear))


def _same_axis(norm: nn.Module, linear: nn.Module, x: torch.Tensor) -> bool:
    """Whether the axis of a tensor between the two that the BatchNorm takes for channels is the linear's too."""
    if isinstance(linear, CONVOLUTIONS) and x.dim() != linear.weight.dim():  # an image without a batch
        return False
    axis = -1 if isinstance(linear, nn.Linear) else 1
    return CHANNEL_AXIS[type(norm)] % x.dim() == axis % x.dim()


def _pads_nothing(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    is_plain = any(type(module).forward is cls.forward for cls in CONVOLUTIONS)  # a subclass may pad at other sizes
    return is_plain and module.padding in ('valid', (0,) * len(module.kernel_size))


def _find(runs: list[_Record], model: nn.Module) -> tuple[list[tuple], dict[str, str]]:
    """(name of a BatchNorm, it, convolution or linear, whether that comes before it) to merge; the others, with why."""
    pairs, left = [], {}
    counts = [Counter(id(call.module) for call in run.calls) for run in runs]
    for name, norm in model.named_modules():
        if not isinstance(norm, nn.modules.batchnorm._NormBase | FrozenBatchNormAct2d):
            continue
        partner, is_before, reason = _partner(runs, counts, norm)
        if partner is None:
            left[name] = reason
        else:
            pairs.append((name, norm, partner, is_before))
    return pairs, left


def _partner(runs, counts, norm) -> tuple[nn.Module | None, bool, str]:
    """What a BatchNorm can be merged into in every run, whether that comes before it, or why there is nothing."""
    if type(norm) not in CHANNEL_AXIS:
        return None, False, f'{type(norm).__name__} is not a plain BatchNorm'
    if norm.running_mean is None:
        return None, False, "it normalises by the images' own statistics"
    most = max(count[id(norm)] for count in counts)
    if most != 1:
        return None, False, f'it runs {most} times' if most else 'it does not run in evaluation'
    reasons = []
    for is_before in (True, False):
        found = []
        for run in runs:
            found += [run.before(call) if is_before else run.after(call) for call in run.calls_of(norm)]
        partner, reason = next((each for each in found if each[0] is None), found[0])
        if partner is not None and not is_before and not isinstance(getattr(norm, 'act', None), None | nn.Identity):
            partner, reason = None, 'its activation stands between it and the layer after it'
        if partner is not None and any(each[0] is not partner for each in found):
            partner, reason = None, 'another layer stands beside it in each run'
        if partner is not None and any(count[id(partner)] != count[id(norm)] for count in counts):
            partner, reason = None, 'the layer beside it also runs without it'
        if partner is not None:
            return partner, is_before, ''
        reasons.append(reason)
    return None, False, '; '.join(reasons)


@torch.no_grad()
def _merge(model: nn.Module, name: str, norm: nn.Module, linear: nn.Module, is_before: bool) -> Merge:
    """Put the BatchNorm into the weights of the convolution or linear that comes before or after it."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    shift = shift if norm.bias is None else shift + norm.bias
    weight, bias = linear.weight, linear.bias
    kernel = (1,) * (weight.dim() - 2)
    if is_before:
        bias = shift if bias is None else bias * scale + shift
        weight = weight * scale.view(-1, 1, *kernel)
    else:
        groups = getattr(linear, 'groups', 1)
        per_output = len(weight) // groups
        scale, shift = (
            each.view(groups, -1).repeat_interleave(per_output, dim=0).view(*weight.shape[:2], *kernel)
            for each in (scale, shift)
        )
        added = (weight * shift).flatten(1).sum(1)
        bias = added if bias is None else bias + added
        weight = weight * scale
    trains = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight, requires_grad=trains)
    linear.bias = nn.Parameter(bias, requires_grad=trains)
    instead = getattr(norm, 'act', None) or nn.Identity()
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is norm:
                parent._modules[key] = instead
    into = next(key for key, module in model.named_modules() if module is linear)
    return Merge(name, into, f'{type(linear).__name__} {"before" if is_before else "after"} it')
