"""OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels (arXiv 2502.20087).

A base net encodes the image, an overview net looks over it coarsely, and a focus net starts again from the base net's
map, under the guidance of what the overview found: this guides the kernels that the focus net makes for each pixel.

Original code: LMMMEng/OverLoCK (Apache-2.0).
"""

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, SqueezeExcite, calculate_drop_path_rates, get_device_dtype
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from ..kernels.neighborhood.reference import neighbors
from .checkpoints import checkpoint_filter_fn, rename
from .pyramid import Pyramid, check_images
from .registration import variants

__all__ = ['OverLoCK', 'checkpoint_filter_fn']

DILATED = {  # size of a large kernel -> (size, dilation) of the convolutions beside it in training
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3), (3, 1)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
}
