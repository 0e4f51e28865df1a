"""Window attention beside the plain formulation and PyTorch's fused attention, forward and with backward.

    python -m benchmarks.kernels window                                   # a few minutes

Eager; the shapes of crossformer_tiny, of maxvit_tiny, whose are the same, and of crossformer_pp_small at 224 pixels.
Inputs are views of a packed projection, and every formulation pays for its own layout.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from zoo.benchmarks.operators import Benchmark, Calls, Setting, calls
from zoo.kernels import window_attention


class Case(NamedTuple):
    batch: int
    size: int  # height and width of the map
    heads: int
    window_size: int
    dilation: int = 1
    head_dim: int = 32


CPU = {
    'stage 1, contiguous': Case(8, 56, 2, 7),
    'stage 1, dilated': Case(8, 56, 2, 7, 8),
    'stage 2, dilated': Case(8, 28, 4, 7, 4),
    'stage 3, dilated': Case(8, 14, 8, 7, 2),
    'stage 4': Case(8, 7, 16, 7),
    '++, stage 1, dilated, padded': Case(8, 56, 2, 4, 4),
    '++, stage 3': Case(8, 14, 8, 14),
}
CUDA = {name: case._replace(batch=128) for name, case in CPU.items()}


def partitioned(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Window attention by `attend(query, key, value, mask, scale)` on (windows, heads, pixels, head_dim).

    As in Swin, CrossFormer and MaxViT: maps are padded to whole windows and permuted, and the mask holds the bias, and
    a large negative number for the keys that are padding.
    """

    def function(query, key, value, window_size, dilation, bias, key_mask, scale, offset):
        B, H, W, heads, d = query.shape
        (rows, columns), (row_step, column_step) = window_size, dilation
        top, left = -offset[0] % rows, -offset[1] % columns
        bottom, right = -(top + H) % (rows * row_step), -(left + W) % (columns * column_step)
        grid = (top + H + bottom) // (rows * row_step), (left + W + right) // (columns * column_step)
        pads = top or left or bottom or right

        def windows(x, value=0.0):
            x = F.pad(x, (0, 0, 0, 0, left, right, top, bottom), value=value) if pads else x
            x = x.reshape(len(x), grid[0], rows, row_step, grid[1], columns, column_step, *x.shape[-2:])
            return x.permute(0, 1, 3, 4, 6, 7, 2, 5, 8).reshape(-1, x.shape[-2], rows * columns, x.shape[-1])

        mask = bias[None]
        if pads:
            mask = (mask + windows(bias.new_zeros(1, H, W, 1, 1), -1e6).mT).repeat(B, 1, 1, 1)
        out = attend(windows(query), windows(key), windows(value), mask, scale)
        out = out.view(B, grid[0], row_step, grid[1], column_step, heads, rows, columns, d)
        out = out.permute(0, 1, 6, 2, 3, 7, 4, 5, 8).reshape(B, top + H + bottom, left + W + right, heads, d)
        return out[:, top : top + H, left : left + W]

    return function


@partitioned
def plain(query, key, value, mask, scale):
    return (query * scale @ key.mT + mask).softmax(-1) @ value


@partitioned
def sdpa(query, key, value, mask, scale):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def ours(query, key, value, window_size, dilation, bias, key_mask, scale, offset):
    return window_attention(query, key, value, window_size, dilation, bias, key_mask, scale, offset)


FUNCTIONS = {'plain': plain, 'sdpa': sdpa, 'ours': ours}


def contenders(case: Case, setting: Setting) -> dict[str, Calls]:
    qkv = setting.randn(case.batch, case.size, case.size, 3, case.heads, case.head_dim, seed=0)
    bias = setting.randn(case.heads, case.window_size**2, case.window_size**2, seed=1)

    def unpacked(function):
        def attend(qkv, bias):
            windows = (case.window_size,) * 2, (case.dilation,) * 2
            return function(*qkv.unbind(3), *windows, bias, None, case.head_dim**-0.5, (0, 0))

        return attend

    return {name: calls(unpacked(function), [qkv, bias]) for name, function in FUNCTIONS.items()}


BENCHMARK = Benchmark('window', {'cpu': CPU, 'cuda': CUDA}, contenders, plain)
