"""Backbones: one family a file, on a shared pyramid. Importing this registers every variant with timm."""

from .biformer import BiFormer
from .dinat_s import DiNATS
from .nat import NAT
from .van import VAN

__all__ = ['NAT', 'VAN', 'BiFormer', 'DiNATS']
