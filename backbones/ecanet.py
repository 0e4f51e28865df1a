"""ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks (arXiv 1910.03151).

A channel is weighted by what a one-dimensional convolution makes of its own and its neighbours' means. The networks are
timm's ResNet and MobileNetV2 with this gate where the authors have it, of the sizes of their released weights: these
follow neither the paper's formula nor timm's.

Original code: BangguWu/ECANet (MIT).
"""

from collections import OrderedDict

import torch
from timm.layers import EcaModule, get_device_dtype
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from .checkpoints import checkpoint_filter_fn, rename
from .pyramid import ImageChecks
from .registration import variants

__all__ = ['ECAMobileNetV2', 'ECAResNet', 'checkpoint_filter_fn']


class ECAResNet(ImageChecks, ResNet):
    """ResNet with a gate at the end of each residual branch.

    Args:
        block, layers: the kind of block, and their number in each stage.
        kernel_sizes: of the gates in each stage.
        arguments: as for timm's ResNet.
    """

    first_conv = 'conv1'
    classifier_name = 'fc'
    out_indices = (0, 1, 2, 3, 4)

    def __init__(self, block: type, layers=(2, 2, 2, 2), kernel_sizes=(3, 5, 7, 7), **arguments):
        super().__init__(block, layers, **{'zero_init_last': False, **arguments})
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        for stage, kernel_size in zip(stages, kernel_sizes, strict=True):
            for each in stage:
                each.se = EcaModule(kernel_size=kernel_size, **get_device_dtype(self))

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under timm's keys; timm's pass through."""
        return rename(state_dict, [(r'\.eca\.', '.se.')])


MOBILENETV2 = (  # table 2 of arXiv 1801.04381, in timm's words
    'ds_r1_k3_s1_c16',
    'ir_r2_k3_s2_e6_c24',
    'ir_r3_k3_s2_e6_c32',
    'ir_r4_k3_s2_e6_c64',
    'ir_r3_k3_s1_e6_c96',
    'ir_r3_k3_s2_e6_c160',
    'ir_r1_k3_s1_e6_c320',
)
NARROW = 96  # channels below which the gate looks at no neighbour


class ECAMobileNetV2(ImageChecks, EfficientNet):
    """MobileNetV2 with a gate at the end of each block, before the shortcut is added.

    Args:
        drop_rate: dropout before the classifier, 0.25 as the authors have it.
        arguments: as for timm's EfficientNet.
    """

    first_conv = 'conv_stem'
    classifier_name = 'classifier'
    out_indices = (0, 1, 2, 3, 4)

    def __init__(self, drop_rate: float = 0.25, **arguments):
        blocks = decode_arch_def([[stage] for stage in MOBILENETV2])
        super().__init__(blocks, drop_rate=drop_rate, **{'act_layer': nn.ReLU6, **arguments})
        for stage in self.blocks:
            for block in stage:
                last = 'bn3' if hasattr(block, 'bn3') else 'bn2'
                norm = getattr(block, last)
                gate = EcaModule(kernel_size=1 if norm.num_features < NARROW else 3, **get_device_dtype(self))
                setattr(block, last, nn.Sequential(OrderedDict(norm=norm, eca=gate)))

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under timm's keys; timm's pass through."""
        places = [f'blocks.{i}.{j}' for i, stage in enumerate(self.blocks) for j in range(len(stage))]
        expanding = {'0.0': 'conv_pw', '0.1': 'bn1', '1.0': 'conv_dw', '1.1': 'bn2'}
        expanding |= {'2': 'conv_pwl', '3': 'bn3.norm', '4': 'bn3.eca'}
        separable = {'0.0': 'conv_dw', '0.1': 'bn1', '1': 'conv_pw', '2': 'bn2.norm', '3': 'bn2.eca'}

        def module(match):
            index = int(match[1]) - 1
            names = expanding if index else separable
            return f'{places[index]}.{names[match[2]]}.'

        rules = [
            (r'^features\.0\.0\.', 'conv_stem.'),
            (r'^features\.0\.1\.', 'bn1.'),
            (rf'^features\.{len(places) + 1}\.0\.', 'conv_head.'),
            (rf'^features\.{len(places) + 1}\.1\.', 'bn2.'),
            (r'^features\.(1)\.conv\.(0\.0|0\.1|[1-3])\.', module),
            (r'^features\.(\d+)\.conv\.(0\.0|0\.1|1\.0|1\.1|[2-4])\.', module),
            (r'^classifier\.1\.', 'classifier.'),
        ]
        return rename(state_dict, rules)


variants(
    ECAResNet,
    eca_resnet18=dict(block=BasicBlock),
    eca_resnet34=dict(block=BasicBlock, layers=(3, 4, 6, 3), kernel_sizes=(3, 3, 5, 7)),
    eca_resnet50=dict(block=Bottleneck, layers=(3, 4, 6, 3), kernel_sizes=(3, 5, 5, 7)),
    eca_resnet101=dict(block=Bottleneck, layers=(3, 4, 23, 3), kernel_sizes=(3, 3, 5, 7)),
    eca_resnet152=dict(block=Bottleneck, layers=(3, 8, 36, 3), kernel_sizes=(3, 3, 5, 7)),
)
variants(ECAMobileNetV2, eca_mobilenetv2_100={})
