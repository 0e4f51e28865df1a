"""`zoo.accelerate`: timm's window attention on the zoo's operators, in place, with the same weights and results.

A module is accelerated by giving it another class: a subclass of timm's with another way to compute the same. Its
parameters, buffers and names stay the objects that they are, so state dicts, optimizers, copies and pickles notice
nothing, and `zoo.restore` gives the old class back. Only exact types are taken: what a user has subclassed stays.

The new way runs where it was measured to gain: on a CPU, eager, in float32 and float64. Everywhere else (GPUs,
autocast, torch.compile, torch.export, tracing; dropout in the attention, hooks on parts that it would not call), and
where it would not be exact, the module takes timm's own path, decided at each call. docs/acceleration.md explains more.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from timm.layers import GELU, Attention, GELUTanh, Mlp
from timm.layers.halo_attn import HaloAttn
from timm.models import (
    crossvit,
    davit,
    efficientvit_msra,
    maxxvit,
    register_notrace_module,
    shvit,
    swin_transformer,
    swin_transformer_v2,
)
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import biformer, crossformer, maxvit, nat, transnext
from .backbones.layers import TOKENS
from .kernels import window_attention

__all__ = ['Acceleration', 'accelerate', 'restore']

HIDDEN = 2**20  # members of a hidden layer that inference makes at a time: they stay in cache, products are still large
# Swin keeps pixels of other regions out of a shifted window by adding -100 to their scores. While that leaves them this
# far below all others, they have no part in the result that float64 could show; the operator leaves them out.
MARGIN = 30


@dataclasses.dataclass(frozen=True)
class Acceleration:
    """What `zoo.accelerate` did: {module's name: what computes it now} and {module's name: why it was left}.

    Printed, it is a table.
    """

    changed: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        title = f'{len(self.changed)} modules accelerated, {len(self.left)} left'
        if not self.changed:
            title = 'Nothing to accelerate' + ('.' if self.left else ': the model has no attention that zoo knows.')
        names = [*self.changed, *self.left]
        width = max(map(len, names), default=0)
        lines = [f'  {name:{width}}  {what}' for name, what in self.changed.items()]
        return '\n'.join([title, *lines, *(f'  {name:{width}}  left: {why}' for name, why in self.left.items())])


def accelerate(model: nn.Module) -> Acceleration:
    """Let the attention of a timm model be computed by the zoo's operators, where that is faster; in place.

    Results and gradients stay the same up to rounding; parameters, buffers and state-dict keys are untouched. Works for
    Swin (v1 and v2) and MaxViT, with or without `features_only`, alone or in a larger model; every other model stays as
    it is, and the report says why. `restore` undoes it. Accelerating twice changes nothing more.

    The gain is in time of inference, and for Swin in memory of training, on CPUs, in eager mode, without autocast;
    elsewhere timm's own path runs. On a CPU, second derivatives, forward-mode differentiation, torch.func.vmap and
    TorchScript need the restored model.

    Returns:
        What was changed and what was left, by name, with the reason. Prints as a table.
    """
    changed, left = {}, {}
    for name, module in model.named_modules():
        cls = type(module)
        if cls in ACCELERATED:
            accelerated = ACCELERATED[cls]
            reason = accelerated.refusal(module)
            if reason:
                left[name] = reason
            else:
                module.__class__ = accelerated
                changed[name] = accelerated.what
        elif reason := _reason_to_leave(cls):
            left[name] = reason
    return Acceleration(changed, left)


def restore(model: nn.Module) -> list[str]:
    """Give the modules that `accelerate` changed their own classes back; the names of these modules."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Accelerated)}
    for module in found.values():
        module.__class__ = module.original
    return list(found)


def _reason_to_leave(cls: type) -> str | None:
    if issubclass(cls, Accelerated):
        return 'accelerated already'
    base = next((base for base in cls.__mro__ if base in ACCELERATED), None)
    if base:
        return f'{cls.__name__} is a subclass of {base.__name__}, and may compute something else'
    return next((LEFT[base] for base in cls.__mro__ if base in LEFT), None)


# --- where the new way runs


def _is_eager_on_cpu(x: Tensor) -> bool:
    return (
        x.device.type == 'cpu'
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()  # true in torch.export too
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled('cpu')
    )


def _is_plain(*modules: nn.Module) -> bool:
    """Whether nobody looks at the calls of modules, so that they need not be called, or not once for all."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


class Accelerated:
    """A block of timm with another way to compute the same."""

    original: type[nn.Module]
    what: str

    @staticmethod
    def refusal(block: nn.Module) -> str:
        """Why a block of the original class must stay as it is; empty if it need not."""
        return ''

    def takes(self, x: Tensor) -> bool:
        """Whether the new way is the one to take for a map (B, H, W, C)."""
        drops = self.training and max(self.attn.attn_drop.p, self.attn.proj_drop.p) > 0  # would draw in another order
        return _is_eager_on_cpu(x) and not drops and _is_plain(*self.attn.modules())

    def infers(self) -> bool:
        """Whether it may be computed a part of the batch at a time."""
        return not self.training and not torch.is_grad_enabled() and _is_plain(*self.modules())


def _in_groups(infer: Callable[..., None], x: Tensor, shape: Sequence[int], *args) -> Tensor:
    """Maps (B, *shape), which `infer(some, out, *args)` writes for some of the maps (B, H, W, C).

    These are as many as have TOKENS pixels, or one.
    """
    out = x.new_empty(len(x), *shape)
    images = max(1, TOKENS // (x.shape[1] * x.shape[2]))
    for some, result in zip(x.split(images), out.split(images), strict=True):
        infer(some, result, *args)
    return out


# --- the perceptron of a block, in inference

GELUS = {nn.GELU: None, GELU: 'none', GELUTanh: 'tanh'}  # to their approximations, None for the module's own


def _is_known(mlp: nn.Module | None) -> bool:
    return (
        type(mlp) is Mlp
        and type(mlp.fc1) is type(mlp.fc2) is nn.Linear
        and type(mlp.act) in GELUS
        and type(mlp.norm) is nn.Identity
    )


def _in_chunks(mlp: Mlp, x: Tensor) -> Tensor:
    """`mlp(x)` in evaluation, without gradients, of some pixels at a time, whose hidden layer is made in one place."""
    pixels = x.reshape(-1, x.shape[-1])
    out = pixels.new_empty(len(pixels), mlp.fc2.out_features)
    step = max(1, min(HIDDEN // mlp.fc1.out_features, len(pixels)))
    hidden = pixels.new_empty(step, mlp.fc1.out_features)
    approximate = GELUS[type(mlp.act)] or mlp.act.approximate
    for some, result in zip(pixels.split(step), out.split(step), strict=True):
        within = hidden[: len(some)]
        _linear(mlp.fc1, some, within)
        torch.ops.aten.gelu_(within, approximate=approximate)
        _linear(mlp.fc2, within, result)
    return out.view(*x.shape[:-1], -1)


def _linear(linear: nn.Linear, x: Tensor, out: Tensor) -> None:
    if linear.bias is None:
        torch.mm(x, linear.weight.T, out=out)
    else:
        torch.addmm(linear.bias, x, linear.weight.T, out=out)


# --- Swin


def _divides(x: Tensor, window_size: tuple[int, int]) -> bool:
    return not any(length % side for length, side in zip(x.shape[1:3], window_size, strict=True))


def _has_swins_shift(block: nn.Module, x: Tensor) -> bool:
    """Whether the block's mask is that of windows shifted over this map."""
    return all(0 <= shift < side for shift, side in zip(block.shift_size, block.window_size, strict=True)) and (
        block.dynamic_mask or not any(block.shift_size) or tuple(x.shape[1:3]) == tuple(block.input_resolution)
    )


@register_notrace_module
class SwinBlock(Accelerated, swin_transformer.SwinTransformerBlock):
    """Swin's block: windows with an offset instead of rolled maps and masks."""

    original = swin_transformer.SwinTransformerBlock
    what = 'window_attention, shifted by an offset'

    def takes(self, x):
        # timm pads maps that windows don't divide with zeros that take part, after its roll.
        return super().takes(x) and _divides(x, self.window_size) and _has_swins_shift(self, x)

    def _bias(self):
        return self.attn._get_rel_pos_bias()[0]

    def _windows(self, x, bias):
        attn = self.attn
        query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
        x = window_attention(query, key, value, self.window_size, bias=bias, offset=tuple(self.shift_size))
        return attn.proj(x.flatten(-2))

    def _attn(self, x):
        return self._windows(x, self._bias()) if self.takes(x) else super()._attn(x)

    def forward(self, x):
        if not (self.takes(x) and self.infers() and _is_known(self.mlp)):
            return super().forward(x)
        return _in_groups(self._infer, x, x.shape[1:], self._bias())

    def _infer(self, x, out, bias):
        x = self._windows(self.norm1(x), bias).add_(x)
        torch.add(x, _in_chunks(self.mlp, self.norm2(x)), out=out)


@register_notrace_module
class SwinV2Block(Accelerated, swin_transformer_v2.SwinTransformerV2Block):
    """Swin v2's block: the same, of normalised queries and keys."""

    original = swin_transformer_v2.SwinTransformerV2Block
    what = 'window_attention of cosines, shifted by an offset'

    def takes(self, x):
        return super().takes(x) and _divides(x, self.window_size) and _has_swins_shift(self, x) and self._is_masked()

    def _is_masked(self):
        """Whether -100 keeps out what it shall, with scores from -scale to scale and biases from 0 to 16."""
        if not any(self.shift_size):
            return True
        scale = self.attn.logit_scale.detach().max().clamp(max=math.log(100)).exp()
        return 2 * scale.item() + 16 <= 100 - MARGIN

    def _bias(self):
        attn = self.attn
        table = 16 * attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads).sigmoid()
        return table[attn.relative_position_index].permute(2, 0, 1)

    def _windows(self, x, bias):
        attn = self.attn
        qkv_bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if qkv_bias is None or attn.qkv_bias_separate:
            qkv = attn.qkv(x) if qkv_bias is None else attn.qkv(x) + qkv_bias
        else:
            qkv = F.linear(x, attn.qkv.weight, qkv_bias)
        query, key, value = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
        scale = attn.logit_scale.clamp(max=math.log(100)).exp()
        query = F.normalize(query, dim=-1) * scale.view(-1, 1)
        x = window_attention(
            query, F.normalize(key, dim=-1), value, self.window_size, 1, bias, None, 1.0, tuple(self.shift_size)
        )
        return attn.proj(x.flatten(-2))

    def _attn(self, x):
        return self._windows(x, self._bias()) if self.takes(x) else super()._attn(x)

    def forward(self, x):
        if not (self.takes(x) and self.infers() and _is_known(self.mlp)):
            return super().forward(x)
        return _in_groups(self._infer, x, x.shape[1:], self._bias())

    def _infer(self, x, out, bias):
        x = self.norm1(self._windows(x, bias)) + x
        torch.add(x, self.norm2(_in_chunks(self.mlp, x)), out=out)


@register_notrace_module
class SwinMerging(Accelerated, swin_transformer.PatchMerging):
    """Swin's downsampling, which needs no copy for padding where there is none."""

    original = swin_transformer.PatchMerging
    what = 'without a copy'

    def takes(self, x):
        return _is_eager_on_cpu(x) and self.infers() and _divides(x, (2, 2)) and type(self.reduction) is nn.Linear

    def forward(self, x):
        if not self.takes(x):
            return super().forward(x)
        _, H, W, _ = x.shape
        return _in_groups(self._infer, x, (H // 2, W // 2, self.out_dim))

    def _infer(self, x, out):
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        _linear(self.reduction, self.norm(x).flatten(0, 2), out.flatten(0, 2))


# --- MaxViT


@register_notrace_module
class MaxViTBlock(Accelerated, maxxvit.PartitionAttentionCl):
    """MaxViT's attention in windows or on a grid, and its perceptron. In training timm's own way is as fast."""

    original = maxxvit.PartitionAttentionCl
    what = 'window_attention, contiguous or dilated, in inference'

    def takes(self, x):
        return super().takes(x) and self.infers() and _is_known(self.mlp) and _divides(x, self.partition_size)

    def forward(self, x):
        if not self.takes(x):
            return super().forward(x)
        return _in_groups(self._infer, x, x.shape[1:], self._bias())

    def _bias(self):
        if self.attn.rel_pos is None:
            return None
        bias = self.attn.rel_pos.get_bias()  # with a batch of one or without
        return bias.view(bias.shape[-3:])

    def _infer(self, x, out, bias):
        attn, size, dilation = self.attn, tuple(self.partition_size), (1, 1)
        if not self.partition_block:
            dilation = tuple(length // side for length, side in zip(x.shape[1:3], size, strict=True))
        qkv = attn.qkv(self.norm1(x))
        if attn.head_first:
            query, key, value = qkv.unflatten(-1, (attn.num_heads, 3, -1)).unbind(-2)
        else:
            query, key, value = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
        windows = window_attention(query, key, value, size, dilation, bias)
        x = self.ls1(attn.proj(windows.flatten(-2))) + x
        torch.add(x, self.ls2(_in_chunks(self.mlp, self.norm2(x))), out=out)


ACCELERATED = {cls.original: cls for cls in (SwinBlock, SwinMerging, SwinV2Block, MaxViTBlock)}

OWN = (
    biformer.BiLevelRoutingAttention,
    crossformer.GroupAttention,
    maxvit.Attention,
    nat.NeighborhoodAttention,
    transnext.AggregatedAttention,
)

# Why modules stay as they are. docs/acceleration.md has the measurements.
FUSED = "PyTorch's fused attention already"
SMALL = 'measured: its attention is too small a part of the model'
LEFT = {
    HaloAttn: f'{SMALL} (5 % of the time of halonet26t)',
    shvit.SHSA: 'measured: fused attention makes shvit_s1 0.98 times as fast',
    efficientvit_msra.CascadedGroupAttention: 'measured: fused attention makes efficientvit_m0 0.99 times as fast',
    crossvit.CrossAttention: 'measured: fused attention makes crossvit_tiny_240 only 1.02 times as fast',
    davit.WindowAttention: 'measured: window_attention makes davit_tiny no faster (1.00)',
    davit.ChannelAttention: 'measured: an attention without copies makes davit_tiny only 1.02 times as fast',
    davit.ChannelAttentionV2: 'not measured',
    maxxvit.ParallelPartitionAttention: 'not measured',
    maxxvit.PartitionAttention2d: 'not measured',
    maxxvit.Attention2d: FUSED,
    Attention: FUSED,
    **dict.fromkeys(OWN, "stands on the zoo's operators already"),
}
