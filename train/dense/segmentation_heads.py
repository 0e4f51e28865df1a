"""Heads that classify the pixels of a pyramid's finest map, or of one level.

A head is made for the `feature_info` of a neck or backbone and gives logits (B, num_classes, height, width) at the
stride of its finest level. Maps are brought to each other's sizes as they are, so any strides and images will do.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil, log2

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.backbones.checkpoints import CheckpointError, mismatches, unwrap
from zoo.kernels import crisscross_attention
from zoo.models import read_checkpoint

from ..registry import MODELS

__all__ = ['CCHead', 'CrissCrossAttention', 'FCNHead', 'SegFormerHead', 'SemanticFPNHead', 'UPerHead', 'resize']


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, H, W) interpolated to a size (height, width), bilinearly, without aligned corners."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode='bilinear', align_corners=False)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that takes a single value of a channel, a pooled map of one image, as in evaluation.

    A single value has no variance, and PyTorch's refuses it in training.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[1]:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


NORMS = {'bn': BatchNorm, 'syncbn': nn.SyncBatchNorm}


def normalized_convolution(
    in_channels: int, channels: int, kernel_size: int, norm: str, activation: Sequence[nn.Module] = ()
) -> nn.Sequential:
    """Convolution, norm and activation, a ReLU unless another is given, whose norm is at '1'."""
    if norm not in NORMS:
        raise ValueError(f'norm must be one of {", ".join(map(repr, NORMS))}, got {norm!r}.')
    convolution = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode='fan_out', nonlinearity='relu')
    (activation,) = activation or (nn.ReLU(inplace=True),)
    # The activation has a name, so that what follows can be numbered as where a norm and its activation are one module.
    return nn.Sequential(OrderedDict({'0': convolution, '1': NORMS[norm](channels), 'activation': activation}))


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f'num_classes must be a positive integer, got {num_classes!r}.')
    convolution = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(convolution.weight, std=0.01)
    nn.init.zeros_(convolution.bias)
    return convolution


def channels_of(feature_info: FeatureInfo, level: int) -> int:
    """Of one level, which may be counted from the coarsest by -1, -2, ..."""
    channels = feature_info.channels()
    if not -len(channels) <= level < len(channels):
        raise ValueError(f'level {level} is not one of the {len(channels)} levels that there are.')
    return channels[level]


@MODELS.register_module()
class FCNHead(nn.Module):
    """Convolutions of one level (FCN, arXiv 1411.4038, as PSPNet's and UPerNet's auxiliary head).

    Args:
        feature_info: timm's, of the maps.
        num_classes: of pixels.
        level: the map to take.
        channels: of the convolutions.
        num_convs: 3x3 convolutions before the classifier; none if 0.
        dropout: rate of channels before the classifier.
        norm: 'bn' or 'syncbn'.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        num_classes: int,
        level: int = -1,
        channels: int = 256,
        num_convs: int = 1,
        dropout: float = 0.1,
        norm: str = 'bn',
    ):
        super().__init__()
        self.num_classes = num_classes
        self.level = level
        width = channels_of(feature_info, level)
        self.convs = nn.Sequential()
        for _ in range(num_convs):
            self.convs.append(normalized_convolution(width, channels, 3, norm))
            width = channels
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.dropout(self.convs(maps[self.level])))


@MODELS.register_module()
class SemanticFPNHead(nn.Module):
    """Sum of all levels, each brought to the finest by a convolution and an upsampling for every doubling.

    The semantic branch of Panoptic FPN (arXiv 1901.02446, figure 3), with the BatchNorm that its later users have
    instead of GroupNorm.

    Args:
        feature_info: timm's, of the maps, all of as many channels as it says.
        num_classes: of pixels.
        channels: of the convolutions.
        dropout: rate of channels before the classifier.
        norm: 'bn' or 'syncbn'.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        num_classes: int,
        channels: int = 128,
        dropout: float = 0.1,
        norm: str = 'bn',
    ):
        super().__init__()
        self.num_classes = num_classes
        self.levels = nn.ModuleList()
        strides = feature_info.reduction()
        for width, stride in zip(feature_info.channels(), strides, strict=True):
            doublings = round(log2(stride / strides[0]))
            widths = [width, *[channels] * max(doublings, 1)]
            convs = [normalized_convolution(before, after, 3, norm) for before, after in pairwise(widths)]
            self.levels.append(nn.ModuleList(convs))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        finest = maps[0].shape[-2:]
        total = 0
        for x, convs in zip(maps, self.levels, strict=True):
            for left, conv in zip(reversed(range(len(convs))), convs, strict=True):  # doublings after this one
                x = resize(conv(x), [ceil(side / 2**left) for side in finest])
            total = total + x
        return self.classifier(self.dropout(total))


@MODELS.register_module()
class UPerHead(nn.Module):
    """UPerNet (arXiv 1807.10221): pyramid pooling of the coarsest level, an FPN, and all levels fused at the finest.

    Args:
        feature_info: timm's, of the maps.
        num_classes: of pixels.
        channels: of all convolutions.
        pool_scales: sides of the maps that the coarsest is averaged to.
        dropout: rate of channels before the classifier.
        norm: 'bn' or 'syncbn'.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        norm: str = 'bn',
    ):
        super().__init__()
        self.num_classes = num_classes
        self.pool_scales = tuple(pool_scales)
        *finer, coarsest = feature_info.channels()

        def conv(width: int, kernel_size: int) -> nn.Module:
            return normalized_convolution(width, channels, kernel_size, norm)

        self.pooled = nn.ModuleList(conv(coarsest, 1) for _ in self.pool_scales)
        self.bottleneck = conv(coarsest + len(self.pool_scales) * channels, 3)
        self.laterals = nn.ModuleList(conv(width, 1) for width in finer)
        self.outputs = nn.ModuleList(conv(channels, 3) for _ in finer)
        self.fuse = conv((len(finer) + 1) * channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, num_classes)

    def pool(self, x: Tensor) -> Tensor:
        """Pyramid pooling (PSPNet, arXiv 1612.01105) of the coarsest level."""
        size = x.shape[-2:]
        parts = [
            resize(conv(F.adaptive_avg_pool2d(x, side)), size)
            for side, conv in zip(self.pool_scales, self.pooled, strict=True)
        ]
        return self.bottleneck(torch.cat((x, *parts), dim=1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, coarsest = maps
        total = self.pool(coarsest)
        fused = [total]
        for x, lateral, output in reversed(list(zip(finer, self.laterals, self.outputs, strict=True))):
            total = lateral(x) + resize(total, x.shape[-2:])
            fused.append(output(total))
        finest = maps[0].shape[-2:]
        x = self.fuse(torch.cat([resize(x, finest) for x in reversed(fused)], dim=1))
        return self.classifier(self.dropout(x))


@MODELS.register_module()
class SegFormerHead(nn.Module):
    """A linear projection of each level, all at the finest, and one more of them together (arXiv 2105.15203).

    Args:
        feature_info: timm's, of the maps.
        num_classes: of pixels.
        channels: of the projections; SegFormer's B0 and B1 have 256, larger ones 768.
        dropout: rate of channels before the classifier.
        norm: 'bn' or 'syncbn', after the projection of all levels.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        num_classes: int,
        channels: int = 256,
        dropout: float = 0.1,
        norm: str = 'bn',
    ):
        super().__init__()
        self.num_classes = num_classes
        widths = feature_info.channels()
        self.projections = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.fuse = normalized_convolution(len(widths) * channels, channels, 1, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        finest = maps[0].shape[-2:]
        levels = [resize(projection(x), finest) for projection, x in zip(self.projections, maps, strict=True)]
        return self.classifier(self.dropout(self.fuse(torch.cat(levels, dim=1))))


class CrissCrossAttention(nn.Module):
    """x + gamma * attention of each pixel to its row and column (CCNet, section 3.2). (B, C, H, W) -> same."""

    def __init__(self, channels: int):
        super().__init__()
        reduced = max(channels // 8, 1)
        self.query_conv = nn.Conv2d(channels, reduced, 1)
        self.key_conv = nn.Conv2d(channels, reduced, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        projections = self.query_conv, self.key_conv, self.value_conv
        query, key, value = (projection(x).permute(0, 2, 3, 1).unsqueeze(3) for projection in projections)
        attended = crisscross_attention(query, key, value, scale=1.0).squeeze(3).permute(0, 3, 1, 2)
        return self.gamma * attended + x


@MODELS.register_module()
class CCHead(nn.Module):
    """CCNet's head: criss-cross attention applied in turn, with one set of weights, beside what it attends to.

    After CCNet (arXiv 1811.11721) and the authors' `RCCAModule` (speedinghzl/CCNet, MIT), whose parameters have the
    same names. They interpolate with aligned corners what this head gives, here nothing does.

    Args:
        feature_info: timm's, of the maps.
        num_classes: of pixels.
        level: the map to take; the authors' is the last, at stride 8.
        channels: of the classifier's input.
        recurrence: how often attention is applied: by 2 every pixel hears of every other, by 0 of none.
        dropout: rate of channels before the classifier.
        norm: 'bn' or 'syncbn'.
        checkpoint: file of the authors' whole network, or of the head alone, for weights to begin from.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: it can't be read, or doesn't fit the head.
    """

    def __init__(
        self,
        feature_info: FeatureInfo,
        num_classes: int,
        level: int = -1,
        channels: int = 512,
        recurrence: int = 2,
        dropout: float = 0.1,
        norm: str = 'bn',
        checkpoint: str | None = None,
    ):
        super().__init__()
        if not isinstance(recurrence, int) or recurrence < 0:
            raise ValueError(f'recurrence must be an integer of 0 or more, got {recurrence!r}.')
        self.num_classes = num_classes
        self.level = level
        self.recurrence = recurrence
        width = channels_of(feature_info, level)
        inner = max(width // 4, 1)

        def conv(before: int, after: int) -> nn.Sequential:
            return normalized_convolution(before, after, 3, norm, [nn.LeakyReLU(0.01, inplace=True)])

        self.conva = conv(width, inner)
        self.cca = CrissCrossAttention(inner)
        self.convb = conv(inner, inner)
        self.bottleneck = conv(width + inner, channels)
        self.bottleneck.add_module('2', nn.Dropout2d(dropout))
        self.bottleneck.add_module('3', classifier(channels, num_classes))
        if checkpoint:
            self._load(checkpoint)

    def _load(self, path: str) -> None:
        state_dict = of_head(unwrap(read_checkpoint(path)))
        problems = mismatches(state_dict, self.state_dict())
        if problems:
            raise CheckpointError(f'{path} does not fit this head: {problems}.')
        self.load_state_dict(state_dict)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[self.level]
        attended = self.conva(x)
        for _ in range(self.recurrence):
            attended = self.cca(attended)
        return self.bottleneck(torch.cat((x, self.convb(attended)), dim=1))


def of_head(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of CCNet's state dict that is its head's, without the prefix that the whole network has.

    The authors' norms are InPlace-ABN's, which scale by a weight's absolute value and count no batches.
    """
    prefix = 'head.'
    if any(key.startswith(prefix) for key in state_dict):
        state_dict = {key.removeprefix(prefix): x for key, x in state_dict.items() if key.startswith(prefix)}

    norms = {key.removesuffix('running_var') for key in state_dict if key.endswith('.running_var')}
    scales = {f'{norm}weight' for norm in norms if f'{norm}num_batches_tracked' not in state_dict}
    return {key: x.abs() if key in scales else x for key, x in state_dict.items()}
