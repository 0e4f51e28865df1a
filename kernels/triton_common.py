"""Parts of Triton kernels that operators share. Importing this imports triton: only modules of kernels do.

Scores are kept in base 2 everywhere, multiplied by LOG2E: exponentials are then exp2, one instruction of a GPU.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def map_offset(y, x, stride_y, stride_x):
    """Offset of row y and column x within an image and head."""
    return y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x


@triton.jit
def plane(image, head, heads, height, width):
    """Offset of a head's map in (batch, heads, height, width)."""
    return (image * heads + head) * height * width


@triton.jit
def vector(image, head, position, heads, height, width, HEAD_DIM: tl.constexpr):
    """Offset of a position's vector in a contiguous (batch, height, width, heads, head_dim)."""
    return ((image * height * width + position) * heads + head) * HEAD_DIM


@triton.jit
def load_tokens(pointer, offsets, stride, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """The vectors that start at `offsets` [N] with `stride` from entry to entry: [N, BLOCK_D], zero where not `exists`.

    UPCAST makes them float32 before anything is computed: the interpreter has no arithmetic of bfloat16.
    """
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    vectors = tl.load(pointer + offsets[:, None] + d[None, :] * stride, mask=mask, other=0.0)
    if UPCAST:
        vectors = vectors.to(tl.float32)
    return vectors


@triton.jit
def store_tokens(pointer, offsets, exists, vectors, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [N, BLOCK_D] as contiguous vectors that start at `offsets` [N], where `exists`."""
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    tl.store(pointer + offsets[:, None] + d[None, :], vectors.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def online_softmax_step(scores, maximum, total):
    """Take a block of scores [M, N], in base 2 and -inf where masked, into a softmax over blocks.

    Returns the new maximum and total [M], the block's weights [M, N], and the factor [M] that corrects what was
    accumulated with the former maximum. A row that has met no score yet has maximum -inf, and weights of zero.
    """
    maximum_now = tl.maximum(maximum, tl.max(scores, 1))
    shift = tl.where(maximum_now == float('-inf'), 0.0, maximum_now)
    weights = tl.exp2(scores - shift[:, None])
    correction = tl.exp2(maximum - shift)
    return maximum_now, total * correction + tl.sum(weights, 1), weights, correction
