"""The pyramid: timm's whole contract for hierarchical backbones, written once. A family brings blocks and downsamplers.

    images (B, in_chans, H, W)
      -> stem, where the family has one that is a level of its own
      -> stages.0 ... stages.n: [downsample, blocks, norm]   each a level of the feature pyramid
      -> norm -> head (pooling, dropout, classifier)

Every level has ceil(H / reduction) x ceil(W / reduction) pixels, whatever the image's size.
"""

import math

import torch
from timm.layers import ClassifierHead, Format, get_device_dtype, nchw_to, nhwc_to
from timm.models import checkpoint_seq, register_notrace_function
from timm.models._features import feature_take_indices
from torch import nn

from .checkpoints import rename

__all__ = [
    'ImageChecks',
    'Pyramid',
    'Stage',
    'check_images',
    'init_conv',
    'init_conv_and_linear',
    'init_truncated',
]

STEM = r'^stem|^stages\.0\.downsample'  # parameters before the first block
MIN_SIZE = 32  # pixels a side: one pixel of the level with stride 32


@torch.fx.wrap
@register_notrace_function
def check_images(x: torch.Tensor, in_chans: int, min_size: int = MIN_SIZE) -> None:
    """ValueError unless x is (batch, in_chans, height, width) with sides of at least min_size."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f'Expected images (batch, {in_chans}, height, width), got shape {list(x.shape)}.')
    if x.shape[2] < min_size or x.shape[3] < min_size:
        raise ValueError(f'Expected images of at least {min_size}x{min_size}, got {x.shape[2]}x{x.shape[3]}.')


class ImageChecks:
    """For subclasses of timm's models, before these in the bases: images that don't fit are refused at once."""

    def forward_features(self, x, *args, **kwargs):
        check_images(x, self.in_chans)
        return super().forward_features(x, *args, **kwargs)

    def forward_intermediates(self, x, *args, **kwargs):
        check_images(x, self.in_chans)
        return super().forward_intermediates(x, *args, **kwargs)


def init_conv(module: nn.Module) -> None:
    """A convolution's weights normal with variance 2 / fan-out, fan-out counted per group; other modules stay."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_linear(module: nn.Module) -> None:
    """A linear's weights truncated normal with a standard deviation of 0.02; other modules stay."""
    if isinstance(module, nn.Linear):
        init_truncated(module)


def init_conv_and_linear(module: nn.Module) -> None:
    """Convolutions by their fan-out, linears truncated normal."""
    init_conv(module)
    init_linear(module)


def init_truncated(module: nn.Module) -> None:
    """Convolutions and linears truncated normal, with a standard deviation of 0.02."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Stage(nn.Module):
    """One level of a pyramid: downsample, blocks, norm."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x):
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)


class Pyramid(nn.Module):
    """Base of the hierarchical backbones.

    A subclass calls `super().__init__`, then `add_stem` if its stem is a level of the pyramid, then `add_stage` once a
    level, then `finish`. It names `first_conv` (the module that sees the image), sets `output_fmt` to the layout inside
    its stages and `out_indices` to its levels, and maps its authors' checkpoints with `official_keys` or, where tensors
    change too, `map_official`. A head that is not pooling and a linear overrides `make_head`.

    Args:
        in_chans: channels of the images.
        num_classes: width of the classifier; none if 0.
        global_pool: pooling before the classifier, as timm's ClassifierHead has it; '' for none.
        drop_rate: dropout before the classifier.
        device, dtype: of the parameters.

    Attributes that timm reads: `num_classes`, `in_chans`, `num_features` (channels of `forward_features`),
    `head_hidden_size` (width before the classifier), `feature_info`, `output_fmt`, `drop_rate`, `grad_checkpointing`.
    """

    output_fmt = 'NCHW'  # layout of the maps inside and after the stages: 'NCHW' or 'NHWC'
    out_indices = (0, 1, 2, 3)  # of the levels, that features_only gives by default
    first_conv: str
    classifier_name = 'head.fc'
    official_keys: list[tuple] = []  # (pattern, replacement) of re.sub, from the authors' keys to ours
    constants: tuple[str, ...] = ()  # ends of the authors' keys of tensors that the architecture computes

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = []
        self.stem = nn.Identity()
        self.stem_levels = 0  # 1 where the stem's map is a level of the pyramid
        self.stages = nn.Sequential()
        self._head_args = {'pool_type': global_pool, 'drop_rate': drop_rate, 'device': device, 'dtype': dtype}

    def add_stem(self, stem: nn.Module, num_chs: int, stride: int) -> None:
        """Begin with a level of `num_chs` channels, `stride` times smaller than the image, that has no blocks."""
        self.stem = stem
        self.stem_levels = 1
        self.feature_info.append({'num_chs': num_chs, 'reduction': stride, 'module': 'stem'})

    def add_stage(self, downsample, blocks, num_chs: int, stride: int, norm=None) -> None:
        """Append a level of `num_chs` channels, `stride` times smaller than the level (or the image) before it."""
        reduction = stride * (self.feature_info[-1]['reduction'] if self.feature_info else 1)
        self.feature_info.append(
            {'num_chs': num_chs, 'reduction': reduction, 'module': f'stages.{len(self.stages)}'},
        )
        self.stages.append(Stage(downsample, blocks, norm))

    def finish(self, norm: nn.Module | None = None, num_features: int | None = None) -> None:
        """Close the pyramid with its final norm and the classifier, and initialise the weights.

        `num_features` is the number of channels after the norm, where it is one with a projection.
        """
        self.norm = norm or nn.Identity()
        self.num_features = num_features or self.feature_info[-1]['num_chs']
        self.head = self.make_head(self.num_features, self.num_classes, **self.__dict__.pop('_head_args'))
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def make_head(self, in_features: int, num_classes: int, pool_type: str, drop_rate: float, device=None, dtype=None):
        """Pooling, dropout and classifier: a module with `fc`, `num_features` and `reset`, as timm's heads have."""
        dd = {'device': device, 'dtype': dtype}
        return ClassifierHead(in_features, num_classes, pool_type, drop_rate, input_fmt=self.output_fmt, **dd)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the authors do. `needs_reset` also fills what only constructors set, as after `to_empty()`."""
        if needs_reset:
            for module in self.modules():
                if hasattr(module, 'reset_parameters'):
                    module.reset_parameters()
        self.apply(self.init_module)

    @staticmethod
    def init_module(module: nn.Module) -> None:
        """The family's initialisation of one module; by default truncated normal (std 0.02) linears."""
        init_linear(module)

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under our keys, without constants; ours passes through."""
        state_dict = {key: value for key, value in state_dict.items() if not key.endswith(self.constants)}
        return rename(state_dict, (*self.official_keys, (r'^head\.(weight|bias)$', r'head.fc.\1')))

    def forward_features(self, x):
        """The last level, normed and unpooled, in `output_fmt`."""
        check_images(x, self.in_chans)
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x, pre_logits: bool = False):
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x):
        """Logits (batch, num_classes) of images (batch, in_chans, height, width)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x,
        indices=None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ):
        """The maps that the chosen levels end with, and the final features.

        Args:
            x: images (batch, in_chans, height, width).
            indices: levels to return: a list (negatives count from the end), the last n if an int, all if None.
            norm: apply the final norm to the last level's map.
            stop_early: don't compute the levels after the last chosen one.
            output_fmt: 'NCHW' or 'NHWC', the layout of the returned maps.
            intermediates_only: return the list of maps alone.
        """
        assert output_fmt in ('NCHW', 'NHWC'), f'output_fmt must be NCHW or NHWC, got {output_fmt}.'
        first = self.stem_levels
        take, last = feature_take_indices(first + len(self.stages), indices)
        check_images(x, self.in_chans)
        maps = []
        x = self.stem(x)
        if first and 0 in take:
            maps.append(self._to_fmt(x, output_fmt))
        stages = self.stages[: last + 1 - first] if stop_early and not torch.jit.is_scripting() else self.stages
        for i, stage in enumerate(stages):
            x = stage(x)
            is_final = i == len(self.stages) - 1
            if first + i in take:
                maps.append(self._to_fmt(self.norm(x) if norm and is_final else x, output_fmt))
            if is_final and not intermediates_only:
                x = self.norm(x)
        return maps if intermediates_only else (x, maps)

    def _to_fmt(self, x, fmt: str):
        if fmt == self.output_fmt:
            return x
        x = nchw_to(x, Format.NHWC) if fmt == 'NHWC' else nhwc_to(x, Format.NCHW)
        return x.contiguous()

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop what the chosen levels don't need; returns their indices."""
        take, last = feature_take_indices(self.stem_levels + len(self.stages), indices)
        kept = last + 1 - self.stem_levels
        is_cut = kept < len(self.stages)
        self.stages = self.stages[:kept]
        num_features = self.num_features
        if prune_norm or is_cut:
            self.norm = nn.Identity()
            self.num_features = self.feature_info[last]['num_chs']
        if prune_head or self.num_features != num_features:
            self.reset_classifier(0, '', reset_other=True)
        return take

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A new classifier (none if 0), by default with the pooling there is.

        `reset_other` takes away what else has weights in the head, as a norm or a hidden layer, that could not stay
        where the features change.
        """
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head.reset(num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for layer-wise learning-rate decay: a block each, downsamplers with the block after, norms before."""
        if coarse:
            return {'stem': STEM, 'blocks': [(r'^stages\.(\d+)', None), (r'^norm', (99999,))]}
        return {
            'stem': STEM,
            'blocks': [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)\.norm', (99999,)),
                (r'^norm', (99999,)),
            ],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that no weight decay applies to, beyond biases and vectors, which timm exempts itself."""
        return set()
