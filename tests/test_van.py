"""What is special to VAN: its dilated convolution, which a CPU computes by phases of the map."""

import pytest
import torch
from torch.nn import functional as F

from zoo.backbones.van import DilatedDepthwiseConv2d


@pytest.mark.parametrize('size', [(1, 1), (2, 7), (14, 15), (9, 56)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_convolution_by_phases_is_the_dilated_convolution(size, memory_format):
    conv = DilatedDepthwiseConv2d(6, kernel_size=7, dilation=3, dtype=torch.float64)
    x = torch.randn(3, 6, *size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    y = conv(x)
    want = F.conv2d(x, conv.weight, conv.bias, padding=9, dilation=3, groups=6)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    inputs = [x, conv.weight, conv.bias]
    grads = zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (y, want)), strict=True)
    for found, expected in grads:
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
