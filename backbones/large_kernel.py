"""Large-kernel convolutions and what stands beside them, after UniRepLKNet (arXiv 2311.15599): parts of OverLoCK."""

import torch
from timm.layers import SqueezeExcite
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

__all__ = [
    'DILATED',
    'DilatedReparamConv',
    'GlobalResponseNorm',
    'ResidualConv2d',
    'conv_norm',
    'large_conv',
    'squeeze_excite',
]

# (size, dilation) of the convolutions that are trained beside a large one, by its size; together they fit into it.
DILATED = {
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


@register_notrace_module
class DilatedReparamConv(nn.Module):
    """A large depthwise convolution, trained as a sum of itself and dilated smaller ones (UniRepLKNet, 2311.15599).

    In evaluation they are one convolution: their kernels are merged on each call, or for good by `reparameterize`, as
    `zoo.fuse` does. (B, C, H, W) -> same.
    """

    def __init__(self, dim: int, kernel_size: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.kernel_size = kernel_size
        self.lk_origin = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False, **dd)
        self.origin_bn = nn.BatchNorm2d(dim, **dd)
        self.dil_convs, self.dil_bns = nn.ModuleDict(), nn.ModuleDict()
        for size, dilation in DILATED[kernel_size]:
            name = f'k{size}_{dilation}'
            padding = dilation * (size // 2)
            self.dil_convs[name] = nn.Conv2d(dim, dim, size, 1, padding, dilation, groups=dim, bias=False, **dd)
            self.dil_bns[name] = nn.BatchNorm2d(dim, **dd)

    def branches(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [
            (self.lk_origin, self.origin_bn),
            *((conv, self.dil_bns[name]) for name, conv in self.dil_convs.items()),
        ]

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Kernel (C, 1, size, size) and bias (C) of the one convolution."""
        kernel = torch.zeros_like(self.lk_origin.weight)
        bias = torch.zeros_like(self.origin_bn.bias)
        for conv, norm in self.branches():
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            margin = self.kernel_size // 2 - conv.padding[0]
            taps = slice(margin, self.kernel_size - margin, conv.dilation[0])
            kernel[:, :, taps, taps] += conv.weight * scale[:, None, None, None]
            bias = bias + norm.bias - norm.running_mean * scale
        return kernel, bias

    def forward(self, x):
        if self.training:
            return sum(norm(conv(x)) for conv, norm in self.branches())
        kernel, bias = self.merged()
        return F.conv2d(x, kernel, bias, padding=self.kernel_size // 2, groups=len(kernel))

    def reparameterize(self) -> nn.Conv2d:
        kernel, bias = self.merged()
        conv = large_conv(len(kernel), self.kernel_size, True, device=kernel.device, dtype=kernel.dtype)
        conv.load_state_dict({'weight': kernel, 'bias': bias})
        return conv


def large_conv(dim: int, kernel_size: int, inference_mode: bool, device=None, dtype=None) -> nn.Module:
    """A large depthwise convolution, in the form to train or, in `inference_mode`, already merged."""
    dd = {'device': device, 'dtype': dtype}
    if inference_mode:
        return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
    return DilatedReparamConv(dim, kernel_size, **dd)


class ResidualConv2d(nn.Conv2d):
    """A depthwise 3x3 convolution added to its input. (B, C, H, W) -> same."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x):
        return x + super().forward(x)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The convolution whose kernel holds the shortcut too."""
        dim, like = self.in_channels, self.weight
        conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=like.device, dtype=like.dtype)
        conv.load_state_dict(self.state_dict())
        conv.weight[:, :, 1, 1] += 1
        return conv


class GlobalResponseNorm(nn.Module):
    """Scale channels by their norms over the map, relative to each other (arXiv 2301.00808). (B, C, H, W) -> same."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        scale = self.gamma * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + 1
        return torch.addcmul(self.beta, x, scale)


def squeeze_excite(dim: int, device=None, dtype=None) -> SqueezeExcite:
    return SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU, device=device, dtype=dtype)


def conv_norm(in_dim: int, dim: int, kernel_size: int = 1, stride: int = 1, device=None, dtype=None) -> nn.Sequential:
    dd = {'device': device, 'dtype': dtype}
    conv = nn.Conv2d(in_dim, dim, kernel_size, stride, kernel_size // 2, bias=False, **dd)
    return nn.Sequential(conv, nn.BatchNorm2d(dim, **dd))
