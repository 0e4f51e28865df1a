"""Necks: what a backbone's maps pass through before a head.

Each takes the backbone's `feature_info`, from which it knows the maps' channels and strides, and has one of its own for
what comes next. `FPN(model.feature_info)(model(images))` is all that it takes; a config says `dict(type='FPN', ...)`.

`strides` says which levels a neck gives, whatever the backbone has. A stride that the backbone has is a level of its
map (maps whose strides aren't asked for are left out), finer ones are added before these and coarser ones after, each
of twice or half the side. `in_levels` chooses maps by number instead, and `extra_levels` adds coarser levels to them.

A level has ceil(side / stride) pixels of the image. Of finer levels that is so where the stride of the finest map taken
divides the image's sides, as a neck doesn't see the image; otherwise they end beyond it, as that map does.

Weights begin by Xavier's uniform distribution and biases by zero, as in mmdet, counting of depthwise and transposed
convolutions what a pixel is made of. Maps are (B, C, H, W), lists are finest first.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from timm.layers import LayerNorm2d
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import MODELS
from .features import levels

__all__ = ['FPN', 'HRFPN', 'PAFPN', 'BiFPN', 'ChannelMapper', 'Neck', 'SimpleFPN']

Norm = Callable[[int], nn.Module] | None

NORMS = {
    'bn': nn.BatchNorm2d,
    'gn': partial(nn.GroupNorm, 32),
    'ln': partial(LayerNorm2d, eps=1e-6),
}
EXTRAS = ('pool', 'conv_on_input', 'conv_on_output')
FUSION_EPS = 1e-4  # EfficientDet, section 3.3


def _norm(name: str | None) -> Norm:
    if name is not None and name not in NORMS:
        raise ValueError(f'norm must be None or one of {", ".join(map(repr, NORMS))}, got {name!r}.')
    return NORMS[name] if name else None


def _told(feature_info: FeatureInfo) -> tuple[list[int], list[int]]:
    """Channels and strides of the maps that feature_info is of."""
    if not callable(getattr(feature_info, 'channels', None)):
        raise TypeError(
            'feature_info must be that of a model made with features_only=True, or of a neck, '
            f'got {type(feature_info).__name__}.'
        )
    return list(feature_info.channels()), list(feature_info.reduction())


def _integer(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}.')
    return value


def _rising(name: str, values: Sequence[int], least: int) -> tuple[int, ...]:
    """Values of an argument, of which there must be some, each an integer above the one before."""
    whole = isinstance(values, Sequence) and all(isinstance(value, int) for value in values)
    if not whole or not values or values[0] < least or any(a >= b for a, b in pairwise(values)):
        raise ValueError(f'{name} must be rising integers from {least} on, got {values!r}.')
    return tuple(values)


def _ratios(strides: Sequence[int]) -> list[int]:
    """How many times coarser each level is than the one before it."""
    if any(b % a for a, b in pairwise(strides)):
        raise ValueError(f'Each stride must be a multiple of the one before, got {tuple(strides)}.')
    return [b // a for a, b in pairwise(strides)]


def _conv(
    in_channels: int,
    channels: int,
    kernel_size: int = 1,
    stride: int = 1,
    norm: Norm = None,
    groups: int = 1,
    transposed: bool = False,
    bias: bool = True,
) -> nn.Module:
    """A convolution and its norm, which takes the place of a bias; n pixels become ceil(n / stride), or n * stride."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    padding = 0 if transposed else kernel_size // 2
    conv = kind(in_channels, channels, kernel_size, stride, padding, groups=groups, bias=bias and norm is None)
    taps = kernel_size**2 / (stride**2 if transposed else 1)
    bound = math.sqrt(6 * groups / (taps * (in_channels + channels)))
    nn.init.uniform_(conv.weight, -bound, bound)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv if norm is None else nn.Sequential(conv, norm(channels))


def _top_down(maps: Sequence[Tensor]) -> list[Tensor]:
    """To each map is added the sum at the coarser one, its nearest pixels."""
    sums = [maps[-1]]
    for x in reversed(maps[:-1]):
        sums.append(x + F.interpolate(sums[-1], size=x.shape[-2:]))
    return sums[::-1]


def _cut(x: Tensor, like: Tensor) -> Tensor:
    """A map made coarser, without the last row and column where the backbone dropped them."""
    height, width = like.shape[-2:]
    if x.shape[-2] < height or x.shape[-1] < width:
        raise ValueError(f'A level has {height} x {width} pixels, where the finer one leads to {tuple(x.shape[-2:])}.')
    return x[..., :height, :width]


class Neck(nn.Module):
    """Maps of a backbone in, a list of maps out.

    Args:
        feature_info: timm's, of the maps that will be given: a model's made with features_only=True, or another neck's.
        in_levels: which of them to use, by number, finest first; all if None.

    Attributes:
        feature_info: of the maps that come out; subclasses set it.
        in_channels, in_strides: of the maps used.

    Raises:
        TypeError: feature_info is none, but the list of a model that was made without features_only, for example.
        ValueError: a number of in_levels that isn't there.
    """

    feature_info: FeatureInfo

    def __init__(self, feature_info: FeatureInfo, in_levels: Sequence[int] | None = None):
        super().__init__()
        channels, strides = _told(feature_info)
        count = len(channels)
        numbers = range(-count, count)
        in_levels = range(count) if in_levels is None else in_levels
        if not isinstance(in_levels, Sequence) or any(level not in numbers for level in in_levels):
            raise ValueError(f'in_levels must be some of the {count} of the backbone, by number, got {in_levels!r}.')
        self.given_channels = tuple(channels)
        self.in_levels = _rising('in_levels', [level % count for level in in_levels], 0)
        self.in_channels = tuple(channels[level] for level in self.in_levels)
        self.in_strides = tuple(strides[level] for level in self.in_levels)

    def chosen(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Those of the backbone's maps that the neck uses.

        Raises:
            ValueError: the maps are not as many, or not of the channels, as feature_info told.
        """
        shapes = [tuple(x.shape) for x in maps]
        if any(len(shape) != 4 for shape in shapes) or tuple(shape[1] for shape in shapes) != self.given_channels:
            raise ValueError(
                f'{type(self).__name__} expects maps (B, C, H, W) of {", ".join(map(str, self.given_channels))} '
                f'channels, got {", ".join(map(str, shapes)) or "none"}.'
            )
        return [maps[level] for level in self.in_levels]

    def extra_repr(self) -> str:
        return f'in_strides={self.in_strides}, strides={tuple(self.feature_info.reduction())}'


class PyramidNeck(Neck):
    """A neck that gives a level for each map that it uses, added ones before and after, all of the same channels.

    Args:
        feature_info, in_levels: of `Neck`.
        out_channels: channels of all levels.
        extra_levels: how many coarser levels to add.
        strides: of the levels to give, instead of extra_levels.

    Attributes:
        finer, coarser: how many levels are added before and after.

    Raises:
        ValueError: strides that can't be had from these maps, or contradict the other arguments.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        out_channels: int,
        in_levels: Sequence[int] | None = None,
        extra_levels: int = 0,
        strides: Sequence[int] | None = None,
    ):
        _integer('out_channels', out_channels, 1)
        _integer('extra_levels', extra_levels, 0)
        if strides is not None:
            strides = _rising('strides', strides, 1)
            if extra_levels:
                raise ValueError(f'strides say which levels to add: leave out extra_levels, got {extra_levels}.')
            if in_levels is None:
                given = _told(feature_info)[1]
                in_levels = [level for level, stride in enumerate(given) if stride in strides]
                if not in_levels:
                    raise ValueError(f"strides {strides} hold none of the maps' strides, which are {given}.")
        super().__init__(feature_info, in_levels)
        first, last = self.in_strides[0], self.in_strides[-1]
        self.finer = 0 if strides is None else sum(stride < first for stride in strides)
        self.coarser = extra_levels if strides is None else sum(stride > last for stride in strides)
        finer = [first / 2**i for i in range(self.finer, 0, -1)]
        had = (*finer, *self.in_strides, *(last * 2**i for i in range(1, self.coarser + 1)))
        if strides is None:
            strides = had
        elif strides != had:
            raise ValueError(
                f'strides {strides} can not be had from maps of strides {self.in_strides}: levels to add are '
                f'{first}/2, {first}/4, ... and {last}*2, {last}*4, ... without a gap.'
            )
        self.feature_info = levels([out_channels] * len(strides), strides)


class Laterals(nn.Module):
    """Maps of the channels of a neck: by 1x1 convolutions, finer ones by 2x2 transposed ones of the finest map.

    A second finer one is made of the first.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, finer: int = 0, norm: Norm = None):
        super().__init__()
        widths = [in_channels[0]] + [channels] * finer
        self.finer = nn.ModuleList(_conv(width, channels, 2, 2, norm, transposed=True) for width in widths[:finer])
        self.convs = nn.ModuleList(_conv(width, channels, norm=norm) for width in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        x, finer = maps[0], []
        for layer in self.finer:
            x = layer(x)
            finer.insert(0, x)
        return finer + [conv(x) for conv, x in zip(self.convs, maps, strict=True)]


class ExtraLevels(nn.Module):
    """Coarser levels, each of half the pixels of the one before.

    Args:
        kind: 'pool' takes every second pixel of the neck's coarsest map; 'conv_on_input' convolves (3x3, stride 2) the
            backbone's coarsest map, 'conv_on_output' the neck's. Further levels are made of the one before.
        count: how many.
        in_channels: of the backbone's coarsest map.
        channels: of the neck's maps.
        relu: before each convolution but the first.
        norm: after each convolution.
    """

    def __init__(self, kind: str, count: int, in_channels: int, channels: int, relu: bool = False, norm: Norm = None):
        super().__init__()
        if kind not in EXTRAS:
            raise ValueError(f'extra must be one of {", ".join(map(repr, EXTRAS))}, got {kind!r}.')
        if relu and kind == 'pool':
            raise ValueError("relu_before_extra needs convolutions: extra='conv_on_input' or 'conv_on_output'.")
        self.kind = kind
        self.relu = relu
        self.pools = count if kind == 'pool' else 0
        widths = [in_channels if kind == 'conv_on_input' else channels] + [channels] * count
        self.convs = nn.ModuleList(_conv(width, channels, 3, 2, norm) for width in widths[: count - self.pools])

    def forward(self, given: Tensor, output: Tensor) -> list[Tensor]:
        """Levels after `output`, the coarsest map of the neck; `given` is the backbone's."""
        x, result = given if self.kind == 'conv_on_input' else output, []
        for _ in range(self.pools):
            x = F.max_pool2d(x, 1, 2)
            result.append(x)
        for i, conv in enumerate(self.convs):
            x = conv(F.relu(x) if i and self.relu else x)
            result.append(x)
        return result


@MODELS.register_module()
class FPN(PyramidNeck):
    """Feature Pyramid Networks (arXiv 1612.03144): coarse maps are added to finer ones, which are convolved.

    Finer levels than the backbone's come by 2x2 transposed convolutions of its finest map, after SHViT's dense code,
    and are then levels like others.

    Args:
        feature_info: of the backbone.
        out_channels: channels of all levels.
        in_levels: maps to use, by number, finest first; all if None. RetinaNet leaves out the finest of four.
        extra_levels: how many coarser levels to add.
        extra: how these are made. 'pool': every second pixel, for Faster and Mask R-CNN. 'conv_on_input',
            'conv_on_output': 3x3 convolutions of stride 2 that begin at the backbone's, or the neck's, coarsest map:
            P6 and P7 of RetinaNet (arXiv 1708.02002) and FCOS.
        relu_before_extra: apply a ReLU before P7's convolution (and further ones).
        norm: 'bn', 'gn' (32 groups) or 'ln' after each convolution, none if None.
        strides: of the levels to give, instead of extra_levels.

    Raises:
        TypeError: feature_info is none.
        ValueError: levels that can't be had, an unknown extra or norm.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        out_channels: int = 256,
        in_levels: Sequence[int] | None = None,
        extra_levels: int = 0,
        extra: str = 'pool',
        relu_before_extra: bool = False,
        norm: str | None = None,
        strides: Sequence[int] | None = None,
    ):
        super().__init__(feature_info, out_channels, in_levels, extra_levels, strides)
        norm = _norm(norm)
        self.laterals = Laterals(self.in_channels, out_channels, self.finer, norm)
        count = self.finer + len(self.in_levels)
        self.smooth = nn.ModuleList(_conv(out_channels, out_channels, 3, norm=norm) for _ in range(count))
        self.extra = ExtraLevels(extra, self.coarser, self.in_channels[-1], out_channels, relu_before_extra, norm)

    def pyramid(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """All levels but the coarser ones that are added."""
        return [conv(x) for conv, x in zip(self.smooth, _top_down(self.laterals(maps)), strict=True)]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels of `feature_info` of a backbone's maps."""
        maps = self.chosen(maps)
        result = self.pyramid(maps)
        return result + self.extra(maps[-1], result[-1])


@MODELS.register_module()
class PAFPN(FPN):
    """Path Aggregation Network (arXiv 1803.01534, section 3.1): after an FPN, fine maps are added to coarser ones.

    N2 = P2 and N(i+1) = conv(conv(Ni, stride 2) + P(i+1)), with a ReLU after each of these 3x3 convolutions. mmdet's
    has no ReLUs, and goes on from the sums before their second convolution.

    Args:
        feature_info: of the backbone.
        kwargs: of `FPN`, the same.

    Raises:
        TypeError, ValueError: as of FPN, and of strides that aren't multiples of the one before.
    """

    def __init__(self, feature_info: FeatureInfo, out_channels: int = 256, norm: str | None = None, **kwargs):
        super().__init__(feature_info, out_channels, norm=norm, **kwargs)
        ratios = _ratios(self.feature_info.reduction()[: len(self.smooth)])
        conv = partial(_conv, out_channels, out_channels, 3, norm=_norm(norm))
        self.down = nn.ModuleList(conv(stride=ratio) for ratio in ratios)
        self.fuse = nn.ModuleList(conv() for _ in ratios)

    def pyramid(self, maps: Sequence[Tensor]) -> list[Tensor]:
        first, *others = super().pyramid(maps)
        result = [first]
        for down, fuse, x in zip(self.down, self.fuse, others, strict=True):
            result.append(F.relu(fuse(x + _cut(F.relu(down(result[-1])), x))))
        return result


class Fusion(nn.Module):
    """Fast normalized fusion (EfficientDet, section 3.3) of maps of one size, swish, and a separable convolution."""

    def __init__(self, count: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count))
        self.conv = nn.Sequential(
            _conv(channels, channels, 3, groups=channels, bias=False),
            _conv(channels, channels, norm=partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)),  # as the authors' code
        )

    def weights(self) -> Tensor:
        """Shares of the maps: (count,), from 0 to 1, whose sum is just below 1."""
        weight = self.weight.relu()
        return weight / (weight.sum() + FUSION_EPS)

    def forward(self, *maps: Tensor) -> Tensor:
        return self.conv(F.silu(sum(share * x for share, x in zip(self.weights(), maps, strict=True))))


class BiFPNLayer(nn.Module):
    """Once down and once up all levels (EfficientDet, section 3.2): maps of the same sizes, and channels, out as in."""

    def __init__(self, channels: int, ratios: Sequence[int]):
        super().__init__()
        self.pools = nn.ModuleList(nn.MaxPool2d(2 * (ratio // 2) + 1, ratio, ratio // 2) for ratio in ratios)
        self.down = nn.ModuleList(Fusion(2, channels) for _ in ratios)
        self.up = nn.ModuleList(Fusion(3 if i < len(ratios) else 2, channels) for i in range(1, len(ratios) + 1))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        middle = [maps[-1]]
        for x, fuse in zip(reversed(maps[:-1]), reversed(self.down), strict=True):
            middle.insert(0, fuse(x, F.interpolate(middle[0], size=x.shape[-2:])))
        own = [*zip(maps, middle, strict=True)]
        own[-1] = maps[-1:]  # which nothing is added to on the way down
        result = [middle[0]]
        for maps_here, pool, fuse in zip(own[1:], self.pools, self.up, strict=True):
            result.append(fuse(*maps_here, _cut(pool(result[-1]), maps_here[0])))
        return result


@MODELS.register_module()
class BiFPN(PyramidNeck):
    """EfficientDet's weighted bidirectional pyramid (arXiv 1911.09070, section 3) of two levels or more.

    Maps come to one width by a 1x1 convolution with BatchNorm, once for each map, where the authors' code does it anew
    for each use in the first layer. Coarser levels are made by max pooling (3x3, stride 2), as P6 and P7 there. Levels
    are brought to another's size by nearest pixels upwards and max pooling downwards.

    Args:
        feature_info: of the backbone.
        out_channels: channels of all levels: 64 in EfficientDet-D0, 88, 112, 160, 224, 288, 384 in D1 to D6.
        repeats: number of layers: 3 in D0, 4 to 8 in D1 to D6.
        in_levels: maps to use, by number, finest first; all if None. EfficientDet leaves out the finest of four.
        extra_levels: how many coarser levels to add: 2 in EfficientDet.
        strides: of the levels to give, instead of extra_levels.

    Raises:
        TypeError: feature_info is none.
        ValueError: levels that can't be had, one alone, or strides that aren't multiples of the one before.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        out_channels: int = 64,
        repeats: int = 3,
        in_levels: Sequence[int] | None = None,
        extra_levels: int = 0,
        strides: Sequence[int] | None = None,
    ):
        super().__init__(feature_info, out_channels, in_levels, extra_levels, strides)
        _integer('repeats', repeats, 1)
        ratios = _ratios(self.feature_info.reduction())
        if not ratios:
            raise ValueError(f'BiFPN needs at least two levels, got one, of stride {self.in_strides[0]}.')
        self.laterals = Laterals(self.in_channels, out_channels, self.finer, nn.BatchNorm2d)
        self.layers = nn.Sequential(*(BiFPNLayer(out_channels, ratios) for _ in range(repeats)))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels of `feature_info` of a backbone's maps."""
        maps = self.laterals(self.chosen(maps))
        for _ in range(self.coarser):
            maps.append(F.max_pool2d(maps[-1], 3, 2, padding=1))
        return self.layers(maps)


@MODELS.register_module()
class ChannelMapper(PyramidNeck):
    """Each map by itself to one width, by a 1x1 convolution and a norm, as in Deformable DETR (arXiv 2010.04159, A.2).

    Coarser levels are made by 3x3 convolutions of stride 2 with the norm, the first of the backbone's coarsest map;
    finer ones by 2x2 transposed ones of its finest.

    Args:
        feature_info: of the backbone.
        out_channels: channels of all levels.
        in_levels: maps to use, by number, finest first; all if None.
        extra_levels: how many coarser levels to add.
        norm: 'bn', 'gn' (32 groups) or 'ln' after each convolution, none if None.
        strides: of the levels to give, instead of extra_levels.

    Raises:
        TypeError: feature_info is none.
        ValueError: levels that can't be had, an unknown norm.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        out_channels: int = 256,
        in_levels: Sequence[int] | None = None,
        extra_levels: int = 0,
        norm: str | None = 'gn',
        strides: Sequence[int] | None = None,
    ):
        super().__init__(feature_info, out_channels, in_levels, extra_levels, strides)
        norm = _norm(norm)
        self.laterals = Laterals(self.in_channels, out_channels, self.finer, norm)
        self.extra = ExtraLevels('conv_on_input', self.coarser, self.in_channels[-1], out_channels, norm=norm)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels of `feature_info` of a backbone's maps."""
        maps = self.chosen(maps)
        result = self.laterals(maps)
        return result + self.extra(maps[-1], result[-1])


@MODELS.register_module()
class SimpleFPN(PyramidNeck):
    """ViTDet's simple feature pyramid (arXiv 2203.16527, section 3): every level is made of a plain ViT's last map.

    Finer levels by 2x2 transposed convolutions, each of half the channels of the one before, with norm and GELU between
    them; one coarser level by 2x2 max pooling; then on each a 1x1 and a 3x3 convolution with norms. Still coarser
    levels take every second pixel of the coarsest.

    Args:
        feature_info: of the backbone, whose last map is used alone.
        out_channels: channels of all levels.
        strides: of the levels to give, that of the ViT's patches among them: (7, 14, 28) for patches of 14 pixels.
        norm: 'ln', 'bn', 'gn' (32 groups) or none.

    Raises:
        TypeError: feature_info is none.
        ValueError: strides that can't be had, channels that can't be halved so often, an unknown norm.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        out_channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32),
        norm: str | None = 'ln',
    ):
        super().__init__(feature_info, out_channels, in_levels=(-1,), strides=strides)
        (width,) = self.in_channels
        if width % 2**self.finer:
            raise ValueError(f'A map of {width} channels can not be halved {self.finer} times, for strides {strides}.')
        norm = _norm(norm)
        self.resample = nn.ModuleList()
        self.project = nn.ModuleList()
        for halvings in (*range(self.finer, -1, -1), *(0,) * min(self.coarser, 1)):
            steps = []
            for i in range(halvings):
                if i:
                    steps += [norm(width >> i)] if norm else []
                    steps.append(nn.GELU())
                steps.append(_conv(width >> i, width >> i + 1, 2, 2, transposed=True))
            if len(self.resample) > self.finer:
                steps.append(nn.MaxPool2d(2, ceil_mode=True))
            self.resample.append(nn.Sequential(*steps))
            own = _conv(width >> halvings, out_channels, norm=norm), _conv(out_channels, out_channels, 3, norm=norm)
            self.project.append(nn.Sequential(*own))
        self.extra = ExtraLevels('pool', max(self.coarser - 1, 0), width, out_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels of `feature_info` of a backbone's maps."""
        (x,) = self.chosen(maps)
        result = [project(resample(x)) for resample, project in zip(self.resample, self.project, strict=True)]
        return result + self.extra(x, result[-1])


@MODELS.register_module()
class HRFPN(Neck):
    """HRNet's pyramid (arXiv 1904.04514, section 3): all maps at the size of the finest, concatenated and mixed.

    Maps are enlarged bilinearly, a 1x1 convolution mixes them, and each level is this mix, pooled to its stride, and
    convolved 3x3. One level, the default, is what HRNet's segmentation takes; five are its detectors'.

    Args:
        feature_info: of the backbone.
        out_channels: channels of all levels.
        in_levels: maps to use, by number, finest first; all if None.
        strides: of the levels to give, multiples of the first; that of the finest map alone if None. All maps are used,
            whatever the strides, and enlarged to the first one if that is finer than theirs.
        pool: 'avg' or 'max'.
        norm: 'bn', 'gn' (32 groups) or 'ln' after each convolution, none if None.

    Raises:
        TypeError: feature_info is none.
        ValueError: strides that can't be had, an unknown pool or norm.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        out_channels: int = 256,
        in_levels: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        pool: str = 'avg',
        norm: str | None = None,
    ):
        super().__init__(feature_info, in_levels)
        _integer('out_channels', out_channels, 1)
        pools = {'avg': nn.AvgPool2d, 'max': nn.MaxPool2d}
        if pool not in pools:
            raise ValueError(f"pool must be 'avg' or 'max', got {pool!r}.")
        finest = self.in_strides[0]
        strides = (finest,) if strides is None else _rising('strides', strides, 1)
        mixed = min(finest, strides[0])
        if any(stride % mixed for stride in (finest, *strides)):
            raise ValueError(
                f'strides {strides} must be multiples of {mixed}, and the first one, or a multiple of it, be {finest}.'
            )
        norm = _norm(norm)
        self.enlarge = finest // mixed
        self.mix = _conv(sum(self.in_channels), out_channels, norm=norm)
        self.pools = nn.ModuleList(pools[pool](stride // mixed, ceil_mode=True) for stride in strides)
        self.smooth = nn.ModuleList(_conv(out_channels, out_channels, 3, norm=norm) for _ in strides)
        self.feature_info = levels([out_channels] * len(strides), strides)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels of `feature_info` of a backbone's maps."""
        maps = self.chosen(maps)
        size = [self.enlarge * side for side in maps[0].shape[-2:]]
        same = [x if [*x.shape[-2:]] == size else F.interpolate(x, size=size, mode='bilinear') for x in maps]
        mixed = self.mix(torch.cat(same, dim=1))
        return [conv(pool(mixed)) for pool, conv in zip(self.pools, self.smooth, strict=True)]
