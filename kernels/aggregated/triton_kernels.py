"""The Triton kernels of aggregated attention; triton.py launches them, README.md derives them.

A program has a tile of TILE_Y x TILE_X pixels of one head: queries in all kernels but `key_gradient`, which has keys,
and those that are about pooled keys. Both kinds of keys are met in steps, by products of matrices. Pooled keys come
ROWS rows of COLUMNS a step, so that the column of each is the same in all steps of a column of steps: what a bias
depends on by the columns is loaded once for these. Windows come as the pixels that they cover together, HALO_Y x HALO_X
around the tile, NEAR of them a step, row by row; who is in whose window is a mask. M counts pixels of a tile, N keys of
a step; offsets into memory are of 64 bits. Vectors are read as they are and divided by their norms in registers:
`inverse` is of the norm.
"""

import triton
import triton.language as tl

from ..triton_common import LOG2E, load_tokens, map_offset, online_softmax_step, plane, store_tokens, vector

EPS = tl.constexpr(1e-12)  # least norm of a query or key, as in torch.nn.functional.normalize


@triton.jit
def place(index, height, width, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Of a tile: image, first row and first column."""
    tiles_y, tiles_x = tl.cdiv(height, TILE_Y), tl.cdiv(width, TILE_X)
    left = index % tiles_x * TILE_X
    index = index // tiles_x
    return (index // tiles_y).to(tl.int64), index % tiles_y * TILE_Y, left


@triton.jit
def pixels(top, left, height, width, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows and columns of a tile's pixels, and which the map has, all [M]."""
    m = tl.arange(0, BLOCK_M)
    y, x = top + m // TILE_X, left + m % TILE_X
    return y, x, (m < TILE_Y * TILE_X) & (y < height) & (x < width)


@triton.jit
def cells(top, left, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of a step's pooled keys, and which there are, all [N]."""
    return pixels(top, left, height, width, ROWS, COLUMNS, ROWS * COLUMNS)


@triton.jit
def load_vectors(
    pointer,
    first,
    offsets,
    stride,
    exists,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`load_tokens` at `offsets` from `first`, multiples of ALIGN: of those of a head the compiler cannot know it."""
    # The hint counts for an operation that is in this function, not for an argument.
    return load_tokens(pointer, tl.multiple_of(first + offsets, ALIGN), stride, exists, HEAD_DIM, BLOCK_D, UPCAST)


@triton.jit
def load_wide(
    pointer,
    first,
    offsets,
    stride,
    exists,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """As `load_vectors`, in float32."""
    vectors = load_vectors(pointer, first, offsets, stride, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)
    return vectors.to(tl.float32)


@triton.jit
def load_parameter(pointer, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A vector of float32 [D], zero in the padding."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(pointer + d * stride, mask=d < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def inverse_norm(x):
    """Of vectors [M, D] of float32."""
    return tl.rsqrt(tl.maximum(tl.sum(x * x, 1), EPS * EPS))


@triton.jit
def measures(k, embedding):
    """Inverse norms of keys [N, D] of float32, and the products of their unit vectors with the embedding, both [N]."""
    inverse = inverse_norm(k)
    return inverse, tl.sum(k * embedding[None, :], 1) * inverse


@triton.jit
def of_unnormalised(gradient, unit, inverse):
    """Gradient of vectors from that of their unit vectors, all [M, D] of float32."""
    along = tl.sum(gradient * unit, 1)
    return (gradient - unit * along[:, None]) * inverse[:, None]


@triton.jit
def keys_of(position, length, WINDOW: tl.constexpr):
    """How many positions of a window lie on its axis."""
    last, first = tl.minimum(position + WINDOW // 2, length - 1), tl.maximum(position - WINDOW // 2, 0)
    return last - first + 1


@triton.jit
def places_of(places, position, cell, length, cells):
    """Parts that an axis has in the places of biases in their table, for positions and pooled cells of the axis.

    Those outside of the axis have the part of its last: what is read for them is not used.
    """
    return tl.load(places + tl.minimum(position, length - 1) * cells + tl.minimum(cell, cells - 1))


@triton.jit
def rows_of(places, y, first_i, i, height, pooled_height, ROWS: tl.constexpr):
    """As `places_of`, of rows: one load a query where a step has one row of pooled keys, which is row first_i."""
    if ROWS == 1:
        return places_of(places, y, first_i, height, pooled_height)
    else:
        return places_of(places, y, i, height, pooled_height)


@triton.jit
def surroundings(
    first,
    top,
    left,
    height,
    width,
    WINDOW: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    NEAR: tl.constexpr,
):
    """Rows and columns of a step's pixels around a tile, the first of them `first`, and which the map has, all [N]."""
    n = first + tl.arange(0, NEAR)
    y, x = top - WINDOW // 2 + n // HALO_X, left - WINDOW // 2 + n % HALO_X
    return y, x, (n < HALO_Y * HALO_X) & (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def windows(
    first,
    WINDOW: tl.constexpr,
    CELLS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALO_X: tl.constexpr,
    NEAR: tl.constexpr,
):
    """Which cell of the windows of a tile's pixels those of `surroundings` are, [M, N].

    It is CELLS - 1 for none: CELLS is more than a window has.
    """
    m, n = tl.arange(0, BLOCK_M)[:, None], first + tl.arange(0, NEAR)[None, :]
    row, column = n // HALO_X - m // TILE_X, n % HALO_X - m % TILE_X
    met = (row >= 0) & (row < WINDOW) & (column >= 0) & (column < WINDOW) & (m < TILE_Y * TILE_X)
    return tl.where(met, row * WINDOW + column, CELLS - 1)


@triton.jit
def mirrored(cell, WINDOW: tl.constexpr):
    """As which cell of their windows queries that are cells of a key's have the key."""
    return tl.where(cell < WINDOW * WINDOW, WINDOW * WINDOW - 1 - cell, cell)


@triton.jit
def window_biases(local_bias, cell, seen, WINDOW: tl.constexpr):
    """Biases in base 2 of scores [M, N] of cells, -inf where there is none or it is not `seen`."""
    seen = seen & (cell < WINDOW * WINDOW)
    return tl.load(local_bias + cell, mask=seen, other=float('-inf')).to(tl.float32) * LOG2E


@triton.jit
def pooled_biases(pooled_bias, places, some):
    """Biases in base 2 of scores [M, N] of pooled keys from their places in the table, -inf where there is no key."""
    return tl.where(some[None, :], tl.load(pooled_bias + places).to(tl.float32) * LOG2E, float('-inf'))


@triton.jit
def places_in(
    first,
    WINDOW: tl.constexpr,
    CELLS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALO_X: tl.constexpr,
    NEAR: tl.constexpr,
):
    """The other way round: which of `surroundings` is a cell of a pixel's window, zero for none, and if, [M, CELLS]."""
    m, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, CELLS)[None, :]
    n = (m // TILE_X + c // WINDOW) * HALO_X + m % TILE_X + c % WINDOW - first
    met = (m < TILE_Y * TILE_X) & (c < WINDOW * WINDOW) & (n >= 0) & (n < NEAR)
    return tl.where(met, n, 0), met


@triton.jit
def load_learnable(tokens, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, CELLS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Learnable tokens of a head [CELLS, D], zero in the padding."""
    c, d = tl.arange(0, CELLS), tl.arange(0, BLOCK_D)
    places = tokens + c[:, None] + d[None, :] * (WINDOW * WINDOW)
    return tl.load(places, mask=(c < WINDOW * WINDOW)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_learnable_bias(bias, WINDOW: tl.constexpr, CELLS: tl.constexpr):
    """Of the cells [CELLS], zero in the padding."""
    c = tl.arange(0, CELLS)
    return tl.load(bias + c, mask=c < WINDOW * WINDOW, other=0.0).to(tl.float32)


@triton.jit
def learnable_weights(q, inverse_q, tokens, token_bias, PRECISION: tl.constexpr):
    """Weights [M, CELLS] that queries [M, D] as they are give to the cells of their windows beside the softmax."""
    weights = tl.dot(q, tl.trans(tokens.to(q.dtype)), input_precision=PRECISION)
    return weights * inverse_q[:, None] + token_bias[None, :]


@triton.jit
def taken(x, row, column):
    """x[row, column], [M, N] for rows and columns that broadcast to it.

    It is flat because that of rows would be shuffles, four for each number.
    """
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    index = row * C + column
    M: tl.constexpr = index.shape[0]
    N: tl.constexpr = index.shape[1]
    return tl.reshape(tl.gather(tl.reshape(x, [R * C]), tl.reshape(index, [M * N]), 0), [M, N])


@triton.jit
def scores_of(q, k, inverse_q, inverse_k, along_k, scale, biases, PRECISION: tl.constexpr):
    """Scores [M, N] in base 2 of queries [M, D] and keys [N, D] as they are: `scale` and `biases` are in base 2."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * inverse_k[None, :]
    return (scores * inverse_q[:, None] + along_k[None, :]) * scale[:, None] + biases


@triton.jit
def scores_by_keys(q, k, inverse_q, inverse_k, along_k, scale, biases, PRECISION: tl.constexpr):
    """As `scores_of`, a row a key: [N, M]."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * inverse_q[None, :]
    return (scores * inverse_k[:, None] + along_k[:, None]) * scale[None, :] + biases


@triton.jit(do_not_specialize=['height', 'width', 'pooled_height', 'pooled_width'])
def measure(
    pooled_key,
    query_embedding,
    inverse,
    along,
    lengths,
    pooled_key_b,
    pooled_key_p,
    pooled_key_h,
    pooled_key_d,
    height,
    width,
    heads,
    pooled_height,
    pooled_width,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Inverse norms of pooled keys, and their unit vectors times the query embedding, both (batch, heads, pooled).

    The first programs make the logarithms of the numbers of keys that queries have: (height, width).
    """
    pooled = pooled_height * pooled_width
    blocks, first = tl.cdiv(pooled, BLOCK_P), tl.cdiv(height * width, BLOCK_T)
    index = tl.program_id(0)
    if index < first:
        pixel = index * BLOCK_T + tl.arange(0, BLOCK_T)
        count = keys_of(pixel // width, height, WINDOW) * keys_of(pixel % width, width, WINDOW) + pooled
        exists = pixel < height * width
        tl.store(lengths + pixel, tl.log(tl.where(exists, count, 1).to(tl.float32)), mask=exists)
        return
    index -= first
    p = index % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    head = index // blocks % heads
    image = (index // (blocks * heads)).to(tl.int64)
    exists = p < pooled
    first_pooled_key = image * pooled_key_b + head.to(tl.int64) * pooled_key_h
    offsets = p.to(tl.int64) * pooled_key_p
    k = load_wide(
        pooled_key, first_pooled_key, offsets, pooled_key_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
    )  # [P, D]
    embedding = load_parameter(query_embedding + head * HEAD_DIM, 1, HEAD_DIM, BLOCK_D)
    inverses, alongs = measures(k, embedding)
    own = plane(image, head, heads, pooled, 1) + p
    tl.store(inverse + own, inverses, mask=exists)
    tl.store(along + own, alongs, mask=exists)


@triton.jit(
    do_not_specialize=['height', 'width', 'pooled_height', 'pooled_width', 'table_y', 'table_x', 'batch', 'parts']
)
def forward(
    query,
    key,
    value,
    pooled_key,
    pooled_value,
    query_embedding,
    temperature,
    local_bias,
    pooled_bias,
    row_places,
    column_places,
    learnable_tokens,
    learnable_bias,
    inverse,
    along,
    lengths,
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
    pooled_key_b,
    pooled_key_p,
    pooled_key_h,
    pooled_key_d,
    pooled_value_b,
    pooled_value_p,
    pooled_value_h,
    pooled_value_d,
    height,
    width,
    heads,
    pooled_height,
    pooled_width,
    table_y,
    table_x,
    batch,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WINDOW: tl.constexpr,
    CELLS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    NEAR: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_STEP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output, and the log-sum-exp in base 2 of each query's scores (batch, heads, height, width).

    A program has a tile of every `parts`-th image: biases are the same in all.
    """
    index = tl.program_id(0)
    head = index % heads
    part, top, left = place(index // heads, height, width, TILE_Y, TILE_X)
    pooled = pooled_height * pooled_width
    local_bias += head * WINDOW * WINDOW
    learnable_tokens += head * HEAD_DIM * WINDOW * WINDOW
    pooled_bias += head.to(tl.int64) * table_y * table_x
    tokens = load_learnable(learnable_tokens, WINDOW, HEAD_DIM, CELLS, BLOCK_D)  # [CELLS, D]
    token_bias = load_learnable_bias(learnable_bias + head * WINDOW * WINDOW, WINDOW, CELLS)  # [CELLS]
    embedding = load_parameter(query_embedding + head * HEAD_DIM, 1, HEAD_DIM, BLOCK_D)  # [D]
    m = tl.arange(0, BLOCK_M)
    y, x, exists = pixels(top, left, height, width, TILE_Y, TILE_X, BLOCK_M)  # [M]
    position = y.to(tl.int64) * width + x
    scale = tl.load(temperature + head).to(tl.float32) * LOG2E
    scale = scale * tl.load(lengths + y * width + x, mask=exists, other=0.0)  # [M]
    if WHOLE:
        near_y, near_x, near = surroundings(0, top, left, height, width, WINDOW, HALO_Y, HALO_X, NEAR)  # [N]
        cell = windows(0, WINDOW, CELLS, TILE_Y, TILE_X, BLOCK_M, HALO_X, NEAR)  # [M, N]
        near_biases = window_biases(local_bias, cell, near[None, :], WINDOW)
    if ONE_STEP:
        i, j, some = cells(0, 0, pooled_height, pooled_width, ROWS, COLUMNS)  # [N]
        places = rows_of(row_places, y[:, None], 0, i[None, :], height, pooled_height, ROWS)
        places += places_of(column_places, x[:, None], j[None, :], width, pooled_width)
        biases = pooled_biases(pooled_bias, places, some)  # [M, N]

    for n in range(part.to(tl.int32), batch, parts):
        image = tl.cast(n, tl.int64)
        first_query = image * query_b + head.to(tl.int64) * query_h
        first_key = image * key_b + head.to(tl.int64) * key_h
        first_value = image * value_b + head.to(tl.int64) * value_h
        first_pooled_key = image * pooled_key_b + head.to(tl.int64) * pooled_key_h
        first_pooled_value = image * pooled_value_b + head.to(tl.int64) * pooled_value_h
        first_p = plane(image, head, heads, pooled, 1)
        q = load_vectors(
            query, first_query, map_offset(y, x, query_y, query_x), query_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
        )  # [M, D]
        inverse_q = inverse_norm(q.to(tl.float32))
        learnable = learnable_weights(q, inverse_q, tokens, token_bias, PRECISION)  # [M, CELLS]
        learnt = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        maximum = tl.full([BLOCK_M], float('-inf'), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, HALO_Y * HALO_X, NEAR):
            if not WHOLE:
                near_y, near_x, near = surroundings(
                    first, top, left, height, width, WINDOW, HALO_Y, HALO_X, NEAR
                )  # [N]
                cell = windows(first, WINDOW, CELLS, TILE_Y, TILE_X, BLOCK_M, HALO_X, NEAR)  # [M, N]
                near_biases = window_biases(local_bias, cell, near[None, :], WINDOW)
            offsets = map_offset(near_y, near_x, key_y, key_x)
            k = load_vectors(key, first_key, offsets, key_d, near, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [N, D]
            offsets = map_offset(near_y, near_x, value_y, value_x)
            v = load_vectors(value, first_value, offsets, value_d, near, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [N, D]
            inverse_k, along_k = measures(k.to(tl.float32), embedding)
            scores = scores_of(q, k, inverse_q, inverse_k, along_k, scale, near_biases, PRECISION)  # [M, N]
            maximum, total, weights, correction = online_softmax_step(scores, maximum, total)
            accumulator = tl.dot(weights.to(v.dtype), v, accumulator * correction[:, None], input_precision=PRECISION)
            weights = taken(learnable, m[:, None], cell)  # values outside of the map are zero
            learnt = tl.dot(weights.to(v.dtype), v, learnt, input_precision=PRECISION)
        for first_j in range(0, COLUMNS if ONE_STEP else pooled_width, COLUMNS):
            if not ONE_STEP:
                j = first_j + tl.arange(0, ROWS * COLUMNS) % COLUMNS  # [N]
                columns = places_of(column_places, x[:, None], j[None, :], width, pooled_width)  # [M, N]
            for first_i in range(0, ROWS if ONE_STEP else pooled_height, ROWS):
                if not ONE_STEP:
                    i, j, some = cells(first_i, first_j, pooled_height, pooled_width, ROWS, COLUMNS)  # [N]
                    rows = rows_of(row_places, y[:, None], first_i, i[None, :], height, pooled_height, ROWS)
                    biases = pooled_biases(pooled_bias, rows + columns, some)  # [M, N]
                p = i * pooled_width + j
                offsets = p.to(tl.int64) * pooled_key_p
                k = load_vectors(
                    pooled_key, first_pooled_key, offsets, pooled_key_d, some, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
                )  # [N, D]
                offsets = p.to(tl.int64) * pooled_value_p
                v = load_vectors(
                    pooled_value, first_pooled_value, offsets, pooled_value_d, some, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
                )  # [N, D]
                inverse_k = tl.load(inverse + first_p + p, mask=some, other=0.0)
                along_k = tl.load(along + first_p + p, mask=some, other=0.0)
                scores = scores_of(q, k, inverse_q, inverse_k, along_k, scale, biases, PRECISION)  # [M, N]
                maximum, total, weights, correction = online_softmax_step(scores, maximum, total)
                accumulator = tl.dot(
                    weights.to(v.dtype), v, accumulator * correction[:, None], input_precision=PRECISION
                )

        own = vector(image, head, position, heads, height, width, HEAD_DIM)
        store_tokens(output, own, exists, accumulator / total[:, None] + learnt, HEAD_DIM, BLOCK_D)
        own = plane(image, head, heads, height, width) + position
        tl.store(log_sum + own, maximum + tl.log2(total), mask=exists)


@triton.jit(do_not_specialize=['height', 'width', 'batch', 'parts'])
def learnable_gradient(
    query,
    value,
    learnable_tokens,
    learnable_bias,
    output,
    grad,
    delta,
    d_learnable,
    query_b,
    query_y,
    query_x,
    query_h,
    query_d,
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
    batch,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WINDOW: tl.constexpr,
    CELLS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    NEAR: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Delta, (batch, heads, height, width), and sums of the gradients of the learnable tokens and their bias.

    Delta is the product of the gradient with what the softmax gave: the output without its learnable part. A program
    has a tile of every `parts`-th image, and leaves its own sums over these in d_learnable (heads, parts of tiles,
    cells, BLOCK_D + 1), the last of each cell that of the bias; none where it is None.
    """
    index = tl.program_id(0)
    head = index % heads
    part, top, left = place(index // heads, height, width, TILE_Y, TILE_X)
    learnable_tokens += head * HEAD_DIM * WINDOW * WINDOW
    tokens = load_learnable(learnable_tokens, WINDOW, HEAD_DIM, CELLS, BLOCK_D)  # [CELLS, D]
    token_bias = load_learnable_bias(learnable_bias + head * WINDOW * WINDOW, WINDOW, CELLS)  # [CELLS]
    c, d, m = tl.arange(0, CELLS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    y, x, exists = pixels(top, left, height, width, TILE_Y, TILE_X, BLOCK_M)  # [M]
    position = y.to(tl.int64) * width + x
    query_offsets, grad_offsets = map_offset(y, x, query_y, query_x), map_offset(y, x, grad_y, grad_x)
    d_tokens = tl.zeros([CELLS, BLOCK_D], tl.float32)
    d_bias = tl.zeros([CELLS], tl.float32)
    for n in range(part.to(tl.int32), batch, parts):
        image = tl.cast(n, tl.int64)
        first = image * query_b + head.to(tl.int64) * query_h
        q = load_vectors(query, first, query_offsets, query_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [M, D]
        first = image * grad_b + head.to(tl.int64) * grad_h
        do = load_vectors(grad, first, grad_offsets, grad_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [M, D]
        first_value = image * value_b + head.to(tl.int64) * value_h
        dp = tl.zeros([BLOCK_M, CELLS], tl.float32)
        for start in range(0, HALO_Y * HALO_X, NEAR):
            near_y, near_x, near = surroundings(start, top, left, height, width, WINDOW, HALO_Y, HALO_X, NEAR)  # [N]
            offsets = map_offset(near_y, near_x, value_y, value_x)
            v = load_vectors(value, first_value, offsets, value_d, near, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [N, D]
            places, met = places_in(start, WINDOW, CELLS, TILE_Y, TILE_X, BLOCK_M, HALO_X, NEAR)  # [M, CELLS]
            products = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [M, N]
            dp += tl.where(met, taken(products, m[:, None], places), 0.0)
        own = vector(image, head, position, heads, height, width, HEAD_DIM)
        o = load_tokens(output, own, 1, exists, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        unit = q.to(tl.float32)
        inverse_q = inverse_norm(unit)
        weights = learnable_weights(q, inverse_q, tokens, token_bias, PRECISION)  # [M, CELLS]
        deltas = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1) - tl.sum(dp * weights, 1)
        tl.store(delta + plane(image, head, heads, height, width) + position, deltas, mask=exists)
        if d_learnable is not None:
            unit = (unit * inverse_q[:, None]).to(q.dtype)
            d_tokens = tl.dot(tl.trans(dp.to(q.dtype)), unit, d_tokens, input_precision=PRECISION)
            d_bias += tl.sum(dp, 0)
    if d_learnable is not None:
        size: tl.constexpr = WINDOW * WINDOW * (BLOCK_D + 1)
        d_learnable += (head * (tl.num_programs(0) // heads) + index // heads).to(tl.int64) * size
        places = d_learnable + c * (BLOCK_D + 1)
        tl.store(places[:, None] + d[None, :], d_tokens, mask=(c < WINDOW * WINDOW)[:, None])
        tl.store(places + BLOCK_D, d_bias, mask=c < WINDOW * WINDOW)


@triton.jit(
    do_not_specialize=['height', 'width', 'pooled_height', 'pooled_width', 'table_y', 'table_x', 'batch', 'parts']
)
def query_gradient(
    query,
    key,
    value,
    pooled_key,
    pooled_value,
    query_embedding,
    temperature,
    local_bias,
    pooled_bias,
    row_places,
    column_places,
    learnable_tokens,
    inverse,
    along,
    lengths,
    grad,
    log_sum,
    delta,
    d_query,
    d_parameters,
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
    pooled_key_b,
    pooled_key_p,
    pooled_key_h,
    pooled_key_d,
    pooled_value_b,
    pooled_value_p,
    pooled_value_h,
    pooled_value_d,
    height,
    width,
    heads,
    pooled_height,
    pooled_width,
    table_y,
    table_x,
    batch,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WINDOW: tl.constexpr,
    CELLS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    NEAR: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_STEP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries, and sums of those of the query embedding, local_bias and temperature.

    A program has a tile of every `parts`-th image, and leaves its own sums over these in d_parameters (heads, parts of
    tiles, BLOCK_D + CELLS + 1), in this order; none where it is None.
    """
    index = tl.program_id(0)
    head = index % heads
    part, top, left = place(index // heads, height, width, TILE_Y, TILE_X)
    pooled = pooled_height * pooled_width
    local_bias += head * WINDOW * WINDOW
    learnable_tokens += head * HEAD_DIM * WINDOW * WINDOW
    pooled_bias += head.to(tl.int64) * table_y * table_x
    tokens = load_learnable(learnable_tokens, WINDOW, HEAD_DIM, CELLS, BLOCK_D)  # [CELLS, D]
    embedding = load_parameter(query_embedding + head * HEAD_DIM, 1, HEAD_DIM, BLOCK_D)  # [D]
    c, d, m = tl.arange(0, CELLS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    y, x, exists = pixels(top, left, height, width, TILE_Y, TILE_X, BLOCK_M)  # [M]
    position = y.to(tl.int64) * width + x
    length = tl.load(lengths + y * width + x, mask=exists, other=0.0)  # [M]
    heat = tl.load(temperature + head).to(tl.float32)
    scale = heat * LOG2E * length
    if WHOLE:
        near_y, near_x, near = surroundings(0, top, left, height, width, WINDOW, HALO_Y, HALO_X, NEAR)  # [N]
        cell = windows(0, WINDOW, CELLS, TILE_Y, TILE_X, BLOCK_M, HALO_X, NEAR)  # [M, N]
        near_biases = window_biases(local_bias, cell, near[None, :], WINDOW)
        member, held = places_in(0, WINDOW, CELLS, TILE_Y, TILE_X, BLOCK_M, HALO_X, NEAR)  # [M, CELLS]
    if ONE_STEP:
        i, j, some = cells(0, 0, pooled_height, pooled_width, ROWS, COLUMNS)  # [N]
        places = rows_of(row_places, y[:, None], 0, i[None, :], height, pooled_height, ROWS)
        places += places_of(column_places, x[:, None], j[None, :], width, pooled_width)
        biases = pooled_biases(pooled_bias, places, some)  # [M, N]
    d_embedding = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_local_bias = tl.zeros([BLOCK_M, CELLS], tl.float32)
    d_temperature = tl.zeros([BLOCK_M], tl.float32)
    for n in range(part.to(tl.int32), batch, parts):
        image = tl.cast(n, tl.int64)
        first_query = image * query_b + head.to(tl.int64) * query_h
        first_key = image * key_b + head.to(tl.int64) * key_h
        first_value = image * value_b + head.to(tl.int64) * value_h
        first_grad = image * grad_b + head.to(tl.int64) * grad_h
        first_pooled_key = image * pooled_key_b + head.to(tl.int64) * pooled_key_h
        first_pooled_value = image * pooled_value_b + head.to(tl.int64) * pooled_value_h
        first_p = plane(image, head, heads, pooled, 1)
        q = load_vectors(
            query, first_query, map_offset(y, x, query_y, query_x), query_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
        )  # [M, D]
        do = load_vectors(
            grad, first_grad, map_offset(y, x, grad_y, grad_x), grad_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
        )  # [M, D]
        inverse_q = inverse_norm(q.to(tl.float32))
        own = plane(image, head, heads, height, width) + position
        sums = tl.load(log_sum + own, mask=exists, other=float('inf'))  # queries outside have no probabilities
        deltas = tl.load(delta + own, mask=exists, other=0.0)
        dz = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # of the vectors whose products with unit keys are scaled
        d_learnable = tl.zeros([BLOCK_M, CELLS], tl.float32)  # of the learnable weights
        for first in range(0, HALO_Y * HALO_X, NEAR):
            if not WHOLE:
                near_y, near_x, near = surroundings(
                    first, top, left, height, width, WINDOW, HALO_Y, HALO_X, NEAR
                )  # [N]
                cell = windows(first, WINDOW, CELLS, TILE_Y, TILE_X, BLOCK_M, HALO_X, NEAR)  # [M, N]
                near_biases = window_biases(local_bias, cell, near[None, :], WINDOW)
                member, held = places_in(first, WINDOW, CELLS, TILE_Y, TILE_X, BLOCK_M, HALO_X, NEAR)  # [M, CELLS]
            offsets = map_offset(near_y, near_x, key_y, key_x)
            k = load_vectors(key, first_key, offsets, key_d, near, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [N, D]
            offsets = map_offset(near_y, near_x, value_y, value_x)
            v = load_vectors(value, first_value, offsets, value_d, near, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [N, D]
            inverse_k, along_k = measures(k.to(tl.float32), embedding)
            scores = scores_of(q, k, inverse_q, inverse_k, along_k, scale, near_biases, PRECISION)  # [M, N]
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = tl.exp2(scores - sums[:, None]) * (dp - deltas[:, None])
            unit_k = (k.to(tl.float32) * inverse_k[:, None]).to(k.dtype)
            dz = tl.dot(ds.to(k.dtype), unit_k, dz, input_precision=PRECISION)
            d_learnable += tl.where(held, taken(dp, m[:, None], member), 0.0)
            if d_parameters is not None:
                d_local_bias += tl.where(held, taken(ds, m[:, None], member), 0.0)
        for first_j in range(0, COLUMNS if ONE_STEP else pooled_width, COLUMNS):
            if not ONE_STEP:
                j = first_j + tl.arange(0, ROWS * COLUMNS) % COLUMNS  # [N]
                columns = places_of(column_places, x[:, None], j[None, :], width, pooled_width)  # [M, N]
            for first_i in range(0, ROWS if ONE_STEP else pooled_height, ROWS):
                if not ONE_STEP:
                    i, j, some = cells(first_i, first_j, pooled_height, pooled_width, ROWS, COLUMNS)  # [N]
                    rows = rows_of(row_places, y[:, None], first_i, i[None, :], height, pooled_height, ROWS)
                    biases = pooled_biases(pooled_bias, rows + columns, some)  # [M, N]
                p = i * pooled_width + j
                pooled_offsets = p.to(tl.int64) * pooled_key_p
                pooled_k = load_vectors(
                    pooled_key, first_pooled_key, pooled_offsets, pooled_key_d, some, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
                )  # [N, D]
                pooled_offsets = p.to(tl.int64) * pooled_value_p
                pooled_v = load_vectors(
                    pooled_value,
                    first_pooled_value,
                    pooled_offsets,
                    pooled_value_d,
                    some,
                    HEAD_DIM,
                    BLOCK_D,
                    ALIGN,
                    UPCAST,
                )  # [N, D]
                pooled_inverse = tl.load(inverse + first_p + p, mask=some, other=0.0)
                pooled_along = tl.load(along + first_p + p, mask=some, other=0.0)
                pooled_scores = scores_of(
                    q, pooled_k, inverse_q, pooled_inverse, pooled_along, scale, biases, PRECISION
                )  # [M, N]
                pooled_dp = tl.dot(do, tl.trans(pooled_v), input_precision=PRECISION)
                pooled_ds = tl.exp2(pooled_scores - sums[:, None]) * (pooled_dp - deltas[:, None])
                unit = (pooled_k.to(tl.float32) * pooled_inverse[:, None]).to(q.dtype)
                dz = tl.dot(pooled_ds.to(q.dtype), unit, dz, input_precision=PRECISION)

        unit_q = q.to(tl.float32) * inverse_q[:, None]
        if d_parameters is not None:
            d_temperature += length * tl.sum((unit_q + embedding[None, :]) * dz, 1)
        dz = dz * (heat * length)[:, None]
        if d_parameters is not None:
            d_embedding += dz
        # Of the unit vectors of queries.
        dz = tl.dot(d_learnable.to(q.dtype), tokens.to(q.dtype), dz, input_precision=PRECISION)
        own = vector(image, head, position, heads, height, width, HEAD_DIM)
        store_tokens(d_query, own, exists, of_unnormalised(dz, unit_q, inverse_q), HEAD_DIM, BLOCK_D)

    if d_parameters is not None:
        sums_of_head = head * (tl.num_programs(0) // heads) + index // heads
        d_parameters += sums_of_head.to(tl.int64) * (BLOCK_D + CELLS + 1)
        tl.store(d_parameters + d, tl.sum(d_embedding, 0))
        tl.store(d_parameters + BLOCK_D + c, tl.sum(d_local_bias, 0))
        tl.store(d_parameters + BLOCK_D + CELLS, tl.sum(d_temperature, 0))


@triton.jit(do_not_specialize=['height', 'width', 'batch', 'parts'])
def key_gradient(
    query,
    key,
    value,
    query_embedding,
    temperature,
    local_bias,
    learnable_tokens,
    learnable_bias,
    lengths,
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
    batch,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WINDOW: tl.constexpr,
    CELLS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    NEAR: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the keys and values of the map; one that is None is left out.

    A program has a tile of every `parts`-th image.
    """
    index = tl.program_id(0)
    head = index % heads
    part, top, left = place(index // heads, height, width, TILE_Y, TILE_X)
    local_bias += head * WINDOW * WINDOW
    embedding = load_parameter(query_embedding + head * HEAD_DIM, 1, HEAD_DIM, BLOCK_D)  # [D]
    heat = tl.load(temperature + head).to(tl.float32)
    if d_value is not None:
        learnable_tokens += head * HEAD_DIM * WINDOW * WINDOW
        tokens = load_learnable(learnable_tokens, WINDOW, HEAD_DIM, CELLS, BLOCK_D)  # [CELLS, D]
        token_bias = load_learnable_bias(learnable_bias + head * WINDOW * WINDOW, WINDOW, CELLS)  # [CELLS]
    y, x, exists = pixels(top, left, height, width, TILE_Y, TILE_X, BLOCK_M)  # [M], of keys
    position = y.to(tl.int64) * width + x
    around = tl.arange(0, NEAR)
    if WHOLE:
        near_y, near_x, near = surroundings(0, top, left, height, width, WINDOW, HALO_Y, HALO_X, NEAR)  # [N]
        cell = windows(0, WINDOW, CELLS, TILE_Y, TILE_X, BLOCK_M, HALO_X, NEAR)  # [M, N]
        cell = mirrored(cell, WINDOW)
        biases = window_biases(local_bias, cell, exists[:, None] & near[None, :], WINDOW)

    for n in range(part.to(tl.int32), batch, parts):
        image = tl.cast(n, tl.int64)
        first_query = image * query_b + head.to(tl.int64) * query_h
        first_key = image * key_b + head.to(tl.int64) * key_h
        first_value = image * value_b + head.to(tl.int64) * value_h
        first_grad = image * grad_b + head.to(tl.int64) * grad_h
        first_number = plane(image, head, heads, height, width)
        k = load_vectors(
            key, first_key, map_offset(y, x, key_y, key_x), key_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
        )  # [M, D]
        inverse_k, along_k = measures(k.to(tl.float32), embedding)
        if d_key is not None:
            offsets = map_offset(y, x, value_y, value_x)
            v = load_vectors(value, first_value, offsets, value_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [M, D]
        dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, HALO_Y * HALO_X, NEAR):
            if not WHOLE:
                near_y, near_x, near = surroundings(
                    first, top, left, height, width, WINDOW, HALO_Y, HALO_X, NEAR
                )  # [N]
                cell = windows(first, WINDOW, CELLS, TILE_Y, TILE_X, BLOCK_M, HALO_X, NEAR)  # [M, N]
                cell = mirrored(cell, WINDOW)
                biases = window_biases(local_bias, cell, exists[:, None] & near[None, :], WINDOW)
            near_offsets = map_offset(near_y, near_x, query_y, query_x)
            q = load_vectors(
                query, first_query, near_offsets, query_d, near, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
            )  # [N, D]
            near_offsets = map_offset(near_y, near_x, grad_y, grad_x)
            do = load_vectors(grad, first_grad, near_offsets, grad_d, near, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [N, D]
            near_position = near_y.to(tl.int64) * width + near_x
            sums = tl.load(log_sum + first_number + near_position, mask=near, other=0.0)
            scale = heat * tl.load(lengths + near_y * width + near_x, mask=near, other=0.0)  # [N]
            inverse_q = inverse_norm(q.to(tl.float32))
            scores = scores_by_keys(q, k, inverse_q, inverse_k, along_k, scale * LOG2E, biases, PRECISION)  # [M, N]
            probabilities = tl.exp2(scores - sums[None, :])
            if d_value is not None:
                learnable = learnable_weights(q, inverse_q, tokens, token_bias, PRECISION)  # [N, CELLS]
                weights = probabilities + taken(learnable, around[None, :], cell)  # [M, N]
                dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
            if d_key is not None:
                deltas = tl.load(delta + first_number + near_position, mask=near, other=0.0)
                ds = probabilities * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - deltas[None, :])
                embedded = (q.to(tl.float32) * inverse_q[:, None] + embedding[None, :]) * scale[:, None]
                dk = tl.dot(ds.to(q.dtype), embedded.to(q.dtype), dk, input_precision=PRECISION)
        own = vector(image, head, position, heads, height, width, HEAD_DIM)
        if d_key is not None:
            unit_k = k.to(tl.float32) * inverse_k[:, None]
            store_tokens(d_key, own, exists, of_unnormalised(dk, unit_k, inverse_k), HEAD_DIM, BLOCK_D)
        if d_value is not None:
            store_tokens(d_value, own, exists, dv, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=['height', 'width', 'pooled_height', 'pooled_width', 'table_y', 'table_x', 'parts'])
def pooled_gradient(
    query,
    pooled_key,
    pooled_value,
    query_embedding,
    temperature,
    pooled_bias,
    row_places,
    column_places,
    inverse,
    along,
    lengths,
    grad,
    log_sum,
    delta,
    d_keys,
    d_values,
    query_b,
    query_y,
    query_x,
    query_h,
    query_d,
    grad_b,
    grad_y,
    grad_x,
    grad_h,
    grad_d,
    pooled_key_b,
    pooled_key_p,
    pooled_key_h,
    pooled_key_d,
    pooled_value_b,
    pooled_value_p,
    pooled_value_h,
    pooled_value_d,
    height,
    width,
    heads,
    pooled_height,
    pooled_width,
    table_y,
    table_x,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of pooled values and of the unit vectors of pooled keys; one that is None is left out.

    A program has the pooled keys of one step, and every `parts`-th tile of queries: (batch, parts, pooled, heads,
    head_dim) of float32.
    """
    steps_y, steps_x = tl.cdiv(pooled_height, ROWS), tl.cdiv(pooled_width, COLUMNS)
    tiles_x = tl.cdiv(width, TILE_X)
    tiles = tl.cdiv(height, TILE_Y) * tiles_x
    pooled = pooled_height * pooled_width
    index = tl.program_id(0)
    part = index % parts
    index = index // parts
    first_j = index % steps_x * COLUMNS
    index = index // steps_x
    first_i = index % steps_y * ROWS
    index = index // steps_y
    head = index % heads
    image = (index // heads).to(tl.int64)
    first_query = image * query_b + head.to(tl.int64) * query_h
    first_pooled_key = image * pooled_key_b + head.to(tl.int64) * pooled_key_h
    first_pooled_value = image * pooled_value_b + head.to(tl.int64) * pooled_value_h
    first_grad = image * grad_b + head.to(tl.int64) * grad_h
    inverse += plane(image, head, heads, pooled, 1)
    along += plane(image, head, heads, pooled, 1)
    log_sum += plane(image, head, heads, height, width)
    if delta is not None:
        delta += plane(image, head, heads, height, width)
    pooled_bias += head.to(tl.int64) * table_y * table_x
    embedding = load_parameter(query_embedding + head * HEAD_DIM, 1, HEAD_DIM, BLOCK_D)  # [D]
    heat = tl.load(temperature + head).to(tl.float32)

    i, j, some = cells(first_i, first_j, pooled_height, pooled_width, ROWS, COLUMNS)  # [N]
    p = i * pooled_width + j
    k = load_vectors(
        pooled_key,
        first_pooled_key,
        p.to(tl.int64) * pooled_key_p,
        pooled_key_d,
        some,
        HEAD_DIM,
        BLOCK_D,
        ALIGN,
        UPCAST,
    )  # [N, D]
    if d_keys is not None:
        offsets = p.to(tl.int64) * pooled_value_p
        v = load_vectors(
            pooled_value, first_pooled_value, offsets, pooled_value_d, some, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
        )  # [N, D]
    inverse_k = tl.load(inverse + p, mask=some, other=0.0)
    along_k = tl.load(along + p, mask=some, other=0.0)
    dk = tl.zeros([ROWS * COLUMNS, BLOCK_D], tl.float32)
    dv = tl.zeros([ROWS * COLUMNS, BLOCK_D], tl.float32)
    for tile in range(part, tiles, parts):
        top, left = tile // tiles_x * TILE_Y, tile % tiles_x * TILE_X
        y, x, exists = pixels(top, left, height, width, TILE_Y, TILE_X, BLOCK_M)  # [M]
        q = load_vectors(
            query, first_query, map_offset(y, x, query_y, query_x), query_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
        )  # [M, D]
        unit = q.to(tl.float32)
        inverse_q = inverse_norm(unit)
        do = load_vectors(
            grad, first_grad, map_offset(y, x, grad_y, grad_x), grad_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
        )  # [M, D]
        position = y.to(tl.int64) * width + x
        sums = tl.load(log_sum + position, mask=exists, other=float('inf'))  # queries outside have no probabilities
        scale = heat * tl.load(lengths + y * width + x, mask=exists, other=0.0)  # [M]
        places = places_of(row_places, y[None, :], i[:, None], height, pooled_height)
        places += places_of(column_places, x[None, :], j[:, None], width, pooled_width)
        biases = tl.load(pooled_bias + places, mask=some[:, None], other=float('-inf')).to(tl.float32) * LOG2E  # [N, M]
        scores = scores_by_keys(q, k, inverse_q, inverse_k, along_k, scale * LOG2E, biases, PRECISION)
        probabilities = tl.exp2(scores - sums[None, :])
        if d_values is not None:
            dv = tl.dot(probabilities.to(do.dtype), do, dv, input_precision=PRECISION)
        if d_keys is not None:
            deltas = tl.load(delta + position, mask=exists, other=0.0)
            ds = probabilities * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - deltas[None, :])
            embedded = (unit * inverse_q[:, None] + embedding[None, :]) * scale[:, None]
            dk = tl.dot(ds.to(q.dtype), embedded.to(q.dtype), dk, input_precision=PRECISION)
    own = vector(image * parts + part, head, p, heads, pooled, 1, HEAD_DIM)
    if d_keys is not None:
        store_tokens(d_keys, own, some, dk, HEAD_DIM, BLOCK_D)
    if d_values is not None:
        store_tokens(d_values, own, some, dv, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=['pooled_height', 'pooled_width', 'parts'])
def pooled_gradient_sum(
    pooled_key,
    inverse,
    d_keys,
    d_values,
    d_pooled_key,
    d_pooled_value,
    pooled_key_b,
    pooled_key_p,
    pooled_key_h,
    pooled_key_d,
    heads,
    pooled_height,
    pooled_width,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Sum what `pooled_gradient` left over the parts, and differentiate the division of keys by their norms."""
    pooled = pooled_height * pooled_width
    blocks = tl.cdiv(pooled, BLOCK_P)
    index = tl.program_id(0)
    p = index % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    head = index // blocks % heads
    image = (index // (blocks * heads)).to(tl.int64)
    exists = p < pooled
    own = vector(image, head, p, heads, pooled, 1, HEAD_DIM)
    if d_keys is not None:
        dk = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        for part in range(parts):
            offsets = vector(image * parts + part, head, p, heads, pooled, 1, HEAD_DIM)
            dk += load_tokens(d_keys, offsets, 1, exists, HEAD_DIM, BLOCK_D, False)
        first_pooled_key = image * pooled_key_b + head.to(tl.int64) * pooled_key_h
        offsets = p.to(tl.int64) * pooled_key_p
        k = load_wide(
            pooled_key, first_pooled_key, offsets, pooled_key_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
        )  # [P, D]
        inverses = tl.load(inverse + plane(image, head, heads, pooled, 1) + p, mask=exists, other=0.0)
        dk = of_unnormalised(dk, k * inverses[:, None], inverses)
        store_tokens(d_pooled_key, own, exists, dk, HEAD_DIM, BLOCK_D)
    if d_values is not None:
        dv = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        for part in range(parts):
            offsets = vector(image * parts + part, head, p, heads, pooled, 1, HEAD_DIM)
            dv += load_tokens(d_values, offsets, 1, exists, HEAD_DIM, BLOCK_D, False)
        store_tokens(d_pooled_value, own, exists, dv, HEAD_DIM, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        *('height', 'width', 'pooled_height', 'pooled_width', 'table_y', 'table_x'),
        *('batch', 'parts', 'first_row', 'last_row'),
    ]
)
def bias_gradient(
    query,
    pooled_key,
    pooled_value,
    temperature,
    pooled_bias,
    row_places,
    column_places,
    inverse,
    along,
    lengths,
    grad,
    log_sum,
    delta,
    d_scores,
    query_b,
    query_y,
    query_x,
    query_h,
    query_d,
    grad_b,
    grad_y,
    grad_x,
    grad_h,
    grad_d,
    pooled_key_b,
    pooled_key_p,
    pooled_key_h,
    pooled_key_d,
    pooled_value_b,
    pooled_value_p,
    pooled_value_h,
    pooled_value_d,
    height,
    width,
    heads,
    pooled_height,
    pooled_width,
    table_y,
    table_x,
    batch,
    parts,
    first_row,
    last_row,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the scores of queries in rows from first_row to last_row, summed over images.

    A program has a tile of queries, the pooled keys of one step, and every `parts`-th image: (heads, parts, rows,
    width, pooled) of float32. Its biases, lengths and places are the same in all images.
    """
    steps_y, steps_x = tl.cdiv(pooled_height, ROWS), tl.cdiv(pooled_width, COLUMNS)
    pooled = pooled_height * pooled_width
    index = tl.program_id(0)
    part = index % parts
    index = index // parts
    first_j = index % steps_x * COLUMNS
    index = index // steps_x
    first_i = index % steps_y * ROWS
    index = index // steps_y
    head = index % heads
    _, top, left = place(index // heads, last_row - first_row, width, TILE_Y, TILE_X)
    y, x, exists = pixels(first_row + top, left, last_row, width, TILE_Y, TILE_X, BLOCK_M)  # [M]
    i, j, some = cells(first_i, first_j, pooled_height, pooled_width, ROWS, COLUMNS)  # [N]
    p = i * pooled_width + j
    pooled_bias += head.to(tl.int64) * table_y * table_x
    places = places_of(row_places, y[:, None], i[None, :], height, pooled_height)
    places += places_of(column_places, x[:, None], j[None, :], width, pooled_width)
    biases = pooled_biases(pooled_bias, places, some)  # [M, N]
    scale = tl.load(temperature + head).to(tl.float32) * LOG2E
    scale = scale * tl.load(lengths + y * width + x, mask=exists, other=0.0)  # [M]
    query_offsets, grad_offsets = map_offset(y, x, query_y, query_x), map_offset(y, x, grad_y, grad_x)
    key_offsets, value_offsets = p.to(tl.int64) * pooled_key_p, p.to(tl.int64) * pooled_value_p
    position = y.to(tl.int64) * width + x

    total = tl.zeros([BLOCK_M, ROWS * COLUMNS], tl.float32)
    for n in range(part, batch, parts):
        image = tl.cast(n, tl.int64)
        first = image * query_b + head.to(tl.int64) * query_h
        q = load_vectors(query, first, query_offsets, query_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [M, D]
        first = image * grad_b + head.to(tl.int64) * grad_h
        do = load_vectors(grad, first, grad_offsets, grad_d, exists, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [M, D]
        first = image * pooled_key_b + head.to(tl.int64) * pooled_key_h
        k = load_vectors(pooled_key, first, key_offsets, pooled_key_d, some, HEAD_DIM, BLOCK_D, ALIGN, UPCAST)  # [N, D]
        first = image * pooled_value_b + head.to(tl.int64) * pooled_value_h
        v = load_vectors(
            pooled_value, first, value_offsets, pooled_value_d, some, HEAD_DIM, BLOCK_D, ALIGN, UPCAST
        )  # [N, D]
        own = plane(image, head, heads, pooled, 1) + p
        inverse_k = tl.load(inverse + own, mask=some, other=0.0)
        along_k = tl.load(along + own, mask=some, other=0.0)
        own = plane(image, head, heads, height, width) + position
        sums = tl.load(log_sum + own, mask=exists, other=0.0)
        deltas = tl.load(delta + own, mask=exists, other=0.0)
        inverse_q = inverse_norm(q.to(tl.float32))
        scores = scores_of(q, k, inverse_q, inverse_k, along_k, scale, biases, PRECISION)
        probabilities = tl.exp2(scores - sums[:, None])
        total += probabilities * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - deltas[:, None])
    first = (head * parts + part).to(tl.int64) * (last_row - first_row) - first_row
    places = ((first + y) * width + x) * pooled
    tl.store(d_scores + places[:, None] + p[None, :], total, mask=exists[:, None] & some[None, :])


@triton.jit(
    do_not_specialize=[
        *('width', 'pooled_height', 'pooled_width', 'table_y', 'table_x', 'parts', 'first_row', 'last_row')
    ]
)
def bias_gradient_sum(
    d_scores,
    d_bias,
    row_pairs,
    row_starts,
    column_pairs,
    column_starts,
    width,
    pooled_height,
    pooled_width,
    table_y,
    table_x,
    parts,
    first_row,
    last_row,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Add what `bias_gradient` left up over parts, and over the pairs that share a place of the table.

    A program has BLOCK_T columns of a row of a head's table. Flat pairs (row of queries, row of pooled keys) of row r
    are row_pairs[row_starts[r]:row_starts[r + 1]], and those of columns likewise. Rows of queries before first_row have
    been added up already.
    """
    blocks = tl.cdiv(table_x, BLOCK_T)
    index = tl.program_id(0)
    column = index % blocks * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
    index = index // blocks
    row, head = index % table_y, index // table_y
    exists = column < table_x
    first = tl.load(column_starts + column, mask=exists, other=0)
    last = tl.load(column_starts + column + 1, mask=exists, other=0)
    longest = tl.max(last - first, 0).to(tl.int32)
    first_pair, last_pair = tl.load(row_starts + row).to(tl.int32), tl.load(row_starts + row + 1).to(tl.int32)
    pooled, rows = pooled_height * pooled_width, last_row - first_row
    places = d_bias + (head.to(tl.int64) * table_y + row) * table_x + column
    total = tl.zeros([BLOCK_T], tl.float32)
    if first_row > 0:
        total = tl.load(places, mask=exists, other=0.0)
    for n in range(longest):
        seen_x = first + n < last
        pair_x = tl.load(column_pairs + first + n, mask=seen_x, other=0).to(tl.int32)
        offset_x = pair_x // pooled_width * pooled + pair_x % pooled_width
        for start in range(first_pair, last_pair, BLOCK_R):
            pairs = start + tl.arange(0, BLOCK_R)
            pair_y = tl.load(row_pairs + pairs, mask=pairs < last_pair, other=0).to(tl.int32)
            y = pair_y // pooled_height - first_row
            offset_y = y.to(tl.int64) * width * pooled + pair_y % pooled_height * pooled_width
            seen = ((pairs < last_pair) & (y >= 0) & (y < rows))[:, None] & seen_x[None, :]
            for part in range(parts):
                scores = d_scores + (head * parts + part).to(tl.int64) * rows * width * pooled
                total += tl.sum(tl.load(scores + offset_y[:, None] + offset_x[None, :], mask=seen, other=0.0), 0)
    tl.store(places, total, mask=exists)
