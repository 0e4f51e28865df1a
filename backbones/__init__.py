"""Backbones: one family a file, on a shared pyramid. Importing this registers every variant with timm."""

from .biformer import BiFormer
from .crossformer import CrossFormer
from .crossvit_dynamic import DynamicCrossViT
from .dhvt import DHVT
from .dinat_s import DiNATS
from .ecanet import ECAMobileNetV2, ECAResNet
from .fcaformer import FcaFormer
from .glnet import GLNet, TokenLabelGLNet
from .halonet import DynamicHaloNet, HaloNet
from .illama import ILLaMA
from .litv2 import LITv2
from .maxvit import MaxViT
from .moh import MoHTransNeXt
from .nat import NAT
from .overlock import OverLoCK
from .shvit_distilled import DistilledSHViT
from .smt import SMT
from .spectformer import SpectFormer
from .spectformer_h import HierarchicalSpectFormer, TokenLabelSpectFormer
from .stvit import SViT
from .transnext import TransNeXt
from .van import VAN
from .vsa import ViTAEv2VSA

__all__ = [
    'DHVT',
    'NAT',
    'SMT',
    'VAN',
    'BiFormer',
    'CrossFormer',
    'DiNATS',
    'DistilledSHViT',
    'DynamicCrossViT',
    'DynamicHaloNet',
    'ECAMobileNetV2',
    'ECAResNet',
    'FcaFormer',
    'GLNet',
    'HaloNet',
    'HierarchicalSpectFormer',
    'ILLaMA',
    'LITv2',
    'MaxViT',
    'MoHTransNeXt',
    'OverLoCK',
    'SViT',
    'SpectFormer',
    'TokenLabelGLNet',
    'TokenLabelSpectFormer',
    'TransNeXt',
    'ViTAEv2VSA',
]
