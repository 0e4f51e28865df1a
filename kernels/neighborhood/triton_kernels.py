"""The Triton kernels of neighborhood attention; triton.py launches them, README.md derives them.

A program has a tile of one head and residue class: queries in all kernels but `key_gradient`, which has keys. Rows and
columns (y, x) count within the residue class. A tile that would reach over the far border is moved inward and owns
what lies past the tile before it. The keys that a tile's windows reach, its halo, thus always start HALO_Y rows and
HALO_X columns before the tile, SPAN_Y rows of COLUMNS, and a key's position relative to a query's is the same in all
tiles. A step takes ROWS rows of the halo. M counts queries of a tile, N those of a step in `key_gradient`, else
inversely; offsets into memory are of 64 bits.
"""

import triton
import triton.language as tl

from ..triton_common import LOG2E, load_tokens, map_offset, online_softmax_step, plane, store_tokens, vector


@triton.jit
def place(index, height, width, dilation_y, dilation_x, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Of a tile: image, residues, size of the residue class, first row and column that the tile owns."""
    tiles_y = tl.cdiv(tl.cdiv(height, dilation_y), TILE_Y)
    tiles_x = tl.cdiv(tl.cdiv(width, dilation_x), TILE_X)
    own_x = index % tiles_x * TILE_X
    index = index // tiles_x
    own_y = index % tiles_y * TILE_Y
    index = index // tiles_y
    residue_x = index % dilation_x
    index = index // dilation_x
    residue_y = index % dilation_y
    image = index // dilation_y
    rows = (height - residue_y + dilation_y - 1) // dilation_y
    columns = (width - residue_x + dilation_x - 1) // dilation_x
    return image.to(tl.int64), residue_y, residue_x, rows, columns, own_y, own_x


@triton.jit
def window(position, length, KERNEL: tl.constexpr):
    """First key of the window of a query."""
    return tl.minimum(tl.maximum(position - KERNEL // 2, 0), length - KERNEL)


@triton.jit
def first_query(position, KERNEL: tl.constexpr):
    """First query whose window holds a key."""
    return tl.where(position < KERNEL, 0, position - KERNEL // 2)


@triton.jit
def last_query(position, length, KERNEL: tl.constexpr):
    """Last query whose window holds a key."""
    return tl.where(position >= length - KERNEL, length - 1, position + KERNEL // 2)


@triton.jit
def within(position, start, KERNEL: tl.constexpr):
    return (position >= start) & (position < start + KERNEL)


@triton.jit
def token(y, x, residue_y, residue_x, dilation_y, dilation_x, stride_y, stride_x):
    """Offset of a position within its image and head."""
    return map_offset(residue_y + dilation_y * y, residue_x + dilation_x * x, stride_y, stride_x)


@triton.jit
def entry(y, x, KERNEL_X: tl.constexpr):
    """Place of a position in a table of which a row has 2 * KERNEL_X - 1 entries: linear, so that places subtract."""
    return y * (2 * KERNEL_X - 1) + x


@triton.jit
def bias_of(bias, head, relative, seen, KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr):
    """Bias of keys at places `relative` to those of their queries, in base 2."""
    own = entry(KERNEL_Y - 1, KERNEL_X - 1, KERNEL_X)  # the middle of a head's table
    table = bias + head * (2 * own + 1) + own
    return tl.load(table + relative, mask=seen, other=0.0).to(tl.float32) * LOG2E


@triton.jit(do_not_specialize=['height', 'width'])
def forward(
    query,
    key,
    value,
    bias,
    output,
    log_sum,
    query_b,
    query_y,
    query_x,
    query_h,
    query_d,
    key_b,
    key_y,
    key_x,
    key_h,
    key_d,
    value_b,
    value_y,
    value_x,
    value_h,
    value_d,
    height,
    width,
    heads,
    dilation_y,
    dilation_x,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    SPAN_Y: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output, and the log-sum-exp in base 2 of each query's scores (batch, heads, height, width)."""
    index = tl.program_id(0)
    head = index % heads
    image, residue_y, residue_x, rows, columns, own_y, own_x = place(
        index // heads, height, width, dilation_y, dilation_x, TILE_Y, TILE_X
    )
    if (own_y >= rows) | (own_x >= columns):
        return
    top = tl.minimum(own_y, tl.maximum(rows - TILE_Y, 0))
    left = tl.minimum(own_x, tl.maximum(columns - TILE_X, 0))
    query += image * query_b + head.to(tl.int64) * query_h
    key += image * key_b + head.to(tl.int64) * key_h
    value += image * value_b + head.to(tl.int64) * value_h

    m = tl.arange(0, BLOCK_M)
    y, x = top + m // TILE_X, left + m % TILE_X  # [M]
    owned = (m < TILE_Y * TILE_X) & (y >= own_y) & (y < rows) & (x >= own_x) & (x < columns)
    offsets = token(y, x, residue_y, residue_x, dilation_y, dilation_x, query_y, query_x)
    q = load_tokens(query, offsets, query_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]

    n = tl.arange(0, ROWS * COLUMNS)
    halo_y, halo_x = top - HALO_Y, left - HALO_X
    window_y = window(y, rows, KERNEL_Y)
    keys_x = halo_x + n % COLUMNS  # [N]
    in_columns = within(keys_x[None, :], window(x, columns, KERNEL_X)[:, None], KERNEL_X) & owned[:, None]  # [M, N]
    exists_x = (keys_x >= 0) & (keys_x < columns)
    maximum = tl.full([BLOCK_M], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(tl.maximum(-halo_y, 0) // ROWS, tl.cdiv(tl.minimum(SPAN_Y, rows - halo_y), ROWS)):
        keys_y = halo_y + step * ROWS + n // COLUMNS
        exists = (keys_y >= 0) & (keys_y < rows) & exists_x
        n_offsets = token(keys_y, keys_x, residue_y, residue_x, dilation_y, dilation_x, key_y, key_x)
        k = load_tokens(key, n_offsets, key_d, exists, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
        n_offsets = token(keys_y, keys_x, residue_y, residue_x, dilation_y, dilation_x, value_y, value_x)
        v = load_tokens(value, n_offsets, value_d, exists, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        seen = in_columns & within(keys_y[None, :], window_y[:, None], KERNEL_Y)
        if bias is not None:
            relative = entry(keys_y, keys_x, KERNEL_X)[None, :] - entry(y, x, KERNEL_X)[:, None]
            scores += bias_of(bias, head, relative, seen, KERNEL_Y, KERNEL_X)
        scores = tl.where(seen, scores, float('-inf'))
        maximum, total, weights, correction = online_softmax_step(scores, maximum, total)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * correction[:, None], input_precision=PRECISION)

    total = tl.where(owned, total, 1.0)
    position = token(y, x, residue_y, residue_x, dilation_y, dilation_x, width, 1)
    own = vector(image, head, position, heads, height, width, HEAD_DIM)
    store_tokens(output, own, owned, accumulator / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(log_sum + plane(image, head, heads, height, width) + position, maximum + tl.log2(total), mask=owned)


@triton.jit(do_not_specialize=['height', 'width'])
def query_gradient(
    query,
    key,
    value,
    bias,
    output,
    grad,
    log_sum,
    delta,
    d_query,
    query_b,
    query_y,
    query_x,
    query_h,
    query_d,
    key_b,
    key_y,
    key_x,
    key_h,
    key_d,
    value_b,
    value_y,
    value_x,
    value_h,
    value_d,
    grad_b,
    grad_y,
    grad_x,
    grad_h,
    grad_d,
    height,
    width,
    heads,
    dilation_y,
    dilation_x,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    SPAN_Y: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries, and delta = (grad * output).sum(-1), as log_sum (batch, heads, height, width)."""
    index = tl.program_id(0)
    head = index % heads
    image, residue_y, residue_x, rows, columns, own_y, own_x = place(
        index // heads, height, width, dilation_y, dilation_x, TILE_Y, TILE_X
    )
    if (own_y >= rows) | (own_x >= columns):
        return
    top = tl.minimum(own_y, tl.maximum(rows - TILE_Y, 0))
    left = tl.minimum(own_x, tl.maximum(columns - TILE_X, 0))
    query += image * query_b + head.to(tl.int64) * query_h
    key += image * key_b + head.to(tl.int64) * key_h
    value += image * value_b + head.to(tl.int64) * value_h
    grad += image * grad_b + head.to(tl.int64) * grad_h

    m = tl.arange(0, BLOCK_M)
    y, x = top + m // TILE_X, left + m % TILE_X  # [M]
    owned = (m < TILE_Y * TILE_X) & (y >= own_y) & (y < rows) & (x >= own_x) & (x < columns)
    offsets = token(y, x, residue_y, residue_x, dilation_y, dilation_x, query_y, query_x)
    q = load_tokens(query, offsets, query_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
    offsets = token(y, x, residue_y, residue_x, dilation_y, dilation_x, grad_y, grad_x)
    do = load_tokens(grad, offsets, grad_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
    position = token(y, x, residue_y, residue_x, dilation_y, dilation_x, width, 1)
    own = vector(image, head, position, heads, height, width, HEAD_DIM)
    o = load_tokens(output, own, 1, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
    position += plane(image, head, heads, height, width)
    sums = tl.load(log_sum + position, mask=owned, other=0.0)
    deltas = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + position, deltas, mask=owned)

    n = tl.arange(0, ROWS * COLUMNS)
    halo_y, halo_x = top - HALO_Y, left - HALO_X
    window_y = window(y, rows, KERNEL_Y)
    keys_x = halo_x + n % COLUMNS  # [N]
    in_columns = within(keys_x[None, :], window(x, columns, KERNEL_X)[:, None], KERNEL_X) & owned[:, None]  # [M, N]
    exists_x = (keys_x >= 0) & (keys_x < columns)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(tl.maximum(-halo_y, 0) // ROWS, tl.cdiv(tl.minimum(SPAN_Y, rows - halo_y), ROWS)):
        keys_y = halo_y + step * ROWS + n // COLUMNS
        exists = (keys_y >= 0) & (keys_y < rows) & exists_x
        n_offsets = token(keys_y, keys_x, residue_y, residue_x, dilation_y, dilation_x, key_y, key_x)
        k = load_tokens(key, n_offsets, key_d, exists, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
        n_offsets = token(keys_y, keys_x, residue_y, residue_x, dilation_y, dilation_x, value_y, value_x)
        v = load_tokens(value, n_offsets, value_d, exists, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        seen = in_columns & within(keys_y[None, :], window_y[:, None], KERNEL_Y)
        if bias is not None:
            relative = entry(keys_y, keys_x, KERNEL_X)[None, :] - entry(y, x, KERNEL_X)[:, None]
            scores += bias_of(bias, head, relative, seen, KERNEL_Y, KERNEL_X)
        p = tl.exp2(tl.where(seen, scores - sums[:, None], float('-inf')))  # [M, N]
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - deltas[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_tokens(d_query, own, owned, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=['height', 'width'])
def key_gradient(
    query,
    key,
    value,
    bias,
    grad,
    log_sum,
    delta,
    d_key,
    d_value,
    query_b,
    query_y,
    query_x,
    query_h,
    query_d,
    key_b,
    key_y,
    key_x,
    key_h,
    key_d,
    value_b,
    value_y,
    value_x,
    value_h,
    value_d,
    grad_b,
    grad_y,
    grad_x,
    grad_h,
    grad_d,
    height,
    width,
    heads,
    dilation_y,
    dilation_x,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the keys and of the values; one that is None is left out."""
    index = tl.program_id(0)
    head = index % heads
    image, residue_y, residue_x, rows, columns, top, left = place(
        index // heads, height, width, dilation_y, dilation_x, TILE_Y, TILE_X
    )
    if (top >= rows) | (left >= columns):
        return
    query += image * query_b + head.to(tl.int64) * query_h
    key += image * key_b + head.to(tl.int64) * key_h
    value += image * value_b + head.to(tl.int64) * value_h
    grad += image * grad_b + head.to(tl.int64) * grad_h

    m = tl.arange(0, BLOCK_M)
    y, x = top + m // TILE_X, left + m % TILE_X  # [M], of keys
    owned = (m < TILE_Y * TILE_X) & (y < rows) & (x < columns)
    offsets = token(y, x, residue_y, residue_x, dilation_y, dilation_x, key_y, key_x)
    k = load_tokens(key, offsets, key_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
    if d_key is not None:
        offsets = token(y, x, residue_y, residue_x, dilation_y, dilation_x, value_y, value_x)
        v = load_tokens(value, offsets, value_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]

    n = tl.arange(0, ROWS * COLUMNS)
    bottom, right = tl.minimum(top + TILE_Y, rows) - 1, tl.minimum(left + TILE_X, columns) - 1
    first_y, first_x = first_query(top, KERNEL_Y), first_query(left, KERNEL_X)
    last_y, last_x = last_query(bottom, rows, KERNEL_Y), last_query(right, columns, KERNEL_X)
    steps_x = tl.cdiv(last_x - first_x + 1, COLUMNS)  # more than one at a border at most
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(0, tl.cdiv(last_y - first_y + 1, ROWS) * steps_x):
        queries_y = first_y + step // steps_x * ROWS + n // COLUMNS  # [N]
        queries_x = first_x + step % steps_x * COLUMNS + n % COLUMNS
        exists = (queries_y <= last_y) & (queries_x <= last_x)
        n_offsets = token(queries_y, queries_x, residue_y, residue_x, dilation_y, dilation_x, query_y, query_x)
        q = load_tokens(query, n_offsets, query_d, exists, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
        n_offsets = token(queries_y, queries_x, residue_y, residue_x, dilation_y, dilation_x, grad_y, grad_x)
        do = load_tokens(grad, n_offsets, grad_d, exists, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
        n_position = token(queries_y, queries_x, residue_y, residue_x, dilation_y, dilation_x, width, 1)
        n_position += plane(image, head, heads, height, width)
        sums = tl.load(log_sum + n_position, mask=exists, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)  # [M, N]
        seen = within(y[:, None], window(queries_y, rows, KERNEL_Y)[None, :], KERNEL_Y)
        seen = seen & within(x[:, None], window(queries_x, columns, KERNEL_X)[None, :], KERNEL_X)
        seen = seen & exists[None, :] & owned[:, None]
        if bias is not None:
            relative = entry(y, x, KERNEL_X)[:, None] - entry(queries_y, queries_x, KERNEL_X)[None, :]
            scores += bias_of(bias, head, relative, seen, KERNEL_Y, KERNEL_X)
        p = tl.exp2(tl.where(seen, scores - sums[None, :], float('-inf')))  # [M, N]
        if d_value is not None:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        if d_key is not None:
            deltas = tl.load(delta + n_position, mask=exists, other=0.0)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - deltas[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    position = token(y, x, residue_y, residue_x, dilation_y, dilation_x, width, 1)
    own = vector(image, head, position, heads, height, width, HEAD_DIM)
    if d_key is not None:
        store_tokens(d_key, own, owned, dk * scale, HEAD_DIM, BLOCK_D)
    if d_value is not None:
        store_tokens(d_value, own, owned, dv, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=['height', 'width', 'tiles', 'parts'])
def bias_gradient(
    query,
    key,
    value,
    bias,
    grad,
    log_sum,
    delta,
    partial,
    query_b,
    query_y,
    query_x,
    query_h,
    query_d,
    key_b,
    key_y,
    key_x,
    key_h,
    key_d,
    value_b,
    value_y,
    value_x,
    value_h,
    value_d,
    grad_b,
    grad_y,
    grad_x,
    grad_h,
    grad_d,
    height,
    width,
    heads,
    dilation_y,
    dilation_x,
    scale,
    tiles,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    SPAN_Y: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the scores of one step, summed over every `parts`-th tile: (heads, steps, parts, M, N).

    The sum over tiles can be taken before that over equal relative positions, since these are the same in all tiles.
    """
    BLOCK_N: tl.constexpr = ROWS * COLUMNS
    STEPS: tl.constexpr = (SPAN_Y + ROWS - 1) // ROWS
    index = tl.program_id(0)
    part = index % parts
    step = index // parts % STEPS
    head = index // (parts * STEPS)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(part, tiles, parts):
        image, residue_y, residue_x, rows, columns, own_y, own_x = place(
            tile, height, width, dilation_y, dilation_x, TILE_Y, TILE_X
        )
        top = tl.minimum(own_y, tl.maximum(rows - TILE_Y, 0))
        left = tl.minimum(own_x, tl.maximum(columns - TILE_X, 0))
        y, x = top + m // TILE_X, left + m % TILE_X  # [M]
        owned = (m < TILE_Y * TILE_X) & (y >= own_y) & (y < rows) & (x >= own_x) & (x < columns)
        keys_y = top - HALO_Y + step * ROWS + n // COLUMNS  # [N]
        keys_x = left - HALO_X + n % COLUMNS
        exists = (keys_y >= 0) & (keys_y < rows) & (keys_x >= 0) & (keys_x < columns)

        first = image * query_b + head.to(tl.int64) * query_h
        offsets = first + token(y, x, residue_y, residue_x, dilation_y, dilation_x, query_y, query_x)
        q = load_tokens(query, offsets, query_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        first = image * grad_b + head.to(tl.int64) * grad_h
        offsets = first + token(y, x, residue_y, residue_x, dilation_y, dilation_x, grad_y, grad_x)
        do = load_tokens(grad, offsets, grad_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        first = image * key_b + head.to(tl.int64) * key_h
        offsets = first + token(keys_y, keys_x, residue_y, residue_x, dilation_y, dilation_x, key_y, key_x)
        k = load_tokens(key, offsets, key_d, exists, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
        first = image * value_b + head.to(tl.int64) * value_h
        offsets = first + token(keys_y, keys_x, residue_y, residue_x, dilation_y, dilation_x, value_y, value_x)
        v = load_tokens(value, offsets, value_d, exists, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
        position = token(y, x, residue_y, residue_x, dilation_y, dilation_x, width, 1)
        position += plane(image, head, heads, height, width)
        sums = tl.load(log_sum + position, mask=owned, other=0.0)
        deltas = tl.load(delta + position, mask=owned, other=0.0)

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        seen = within(keys_y[None, :], window(y, rows, KERNEL_Y)[:, None], KERNEL_Y)
        seen = seen & within(keys_x[None, :], window(x, columns, KERNEL_X)[:, None], KERNEL_X) & owned[:, None]
        relative = entry(keys_y, keys_x, KERNEL_X)[None, :] - entry(y, x, KERNEL_X)[:, None]
        scores += bias_of(bias, head, relative, seen, KERNEL_Y, KERNEL_X)
        p = tl.exp2(tl.where(seen, scores - sums[:, None], float('-inf')))  # [M, N]
        accumulator += p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - deltas[:, None])
    partial += index.to(tl.int64) * (BLOCK_M * BLOCK_N)
    tl.store(partial + m[:, None] * BLOCK_N + n[None, :], accumulator)


@triton.jit(do_not_specialize=['parts'])
def bias_gradient_sum(
    partial,
    d_bias,
    parts,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    SPAN_Y: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sum what `bias_gradient` left over parts and equal relative positions; a program has a row of a head's table."""
    BLOCK_N: tl.constexpr = ROWS * COLUMNS
    STEPS: tl.constexpr = (SPAN_Y + ROWS - 1) // ROWS
    WIDTH: tl.constexpr = 2 * KERNEL_X - 1
    index = tl.program_id(0)
    to_y = index % (2 * KERNEL_Y - 1) - (KERNEL_Y - 1)
    head = index // (2 * KERNEL_Y - 1)
    m, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    row = (m // TILE_X + to_y + HALO_Y)[None, :]  # of the halo; [E, M] from here on
    column = (m % TILE_X + HALO_X)[None, :] + (e - (KERNEL_X - 1))[:, None]
    exists = (row >= 0) & (row < SPAN_Y) & (column >= 0) & (column < COLUMNS)
    exists = exists & (m < TILE_Y * TILE_X)[None, :] & (e < WIDTH)[:, None]
    n = row % ROWS * COLUMNS + column
    offsets = (head * STEPS + row // ROWS) * parts * (BLOCK_M * BLOCK_N) + m[None, :] * BLOCK_N + n
    total = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
    for part in range(parts):
        total += tl.load(partial + offsets + part * (BLOCK_M * BLOCK_N), mask=exists, other=0.0)
    tl.store(d_bias + index * WIDTH + e, tl.sum(total, 1), mask=e < WIDTH)
