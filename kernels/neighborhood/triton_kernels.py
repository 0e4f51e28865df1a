"""The Triton kernels of neighborhood attention; triton.py launches them, README.md derives them.

A program has one head and a share of a group of tiles: of queries, in `key_gradient` of keys. A group are tiles that
lie alike to the borders of their residue class, in all classes of one size and in all images: masks and biases are the
same in them, and offsets but for a shift, so that a program makes them once. Rows and columns (y, x) count within the
residue class. A tile that would reach over the far border is moved inward, and owns what the tile before it left over.
The keys that the windows of a tile of queries reach, its halo, thus always start HALO_Y rows and HALO_X columns before
the tile, and a key's position relative to a query's is the same in all tiles. A step takes ROWS rows of the halo, of
COLUMNS each. M counts queries of a tile, N those of a step in `key_gradient`, else inversely; offsets into memory are
of 64 bits.

Bias and mask of a step are one table [M, N]: biases in base 2, -inf outside of the windows. Where the tables of all
STEPS fit into registers, KEPT, a program makes them once, else it makes each whenever it is needed.
"""

import triton
import triton.language as tl

from ..triton_common import LOG2E, load_tokens, map_offset, online_softmax_step, store_tokens


@triton.jit
def residues(index, length, dilation):
    """Of the `index`-th size of residue classes of an axis: the size, the first residue, and how many there are."""
    longer = length % dilation  # so many classes have one position more than the others
    if (index == 0) & (longer > 0):
        size, first, count = length // dilation + 1, 0, longer
    else:
        size, first, count = length // dilation, longer, dilation - longer
    return size, first, count


@triton.jit
def groups(length, TILE: tl.constexpr):
    """Groups along an axis, and how many tiles beyond one has that of those at no border.

    The first tile and the two last are groups of their own: windows of the last but one may be at the border too.
    """
    tiles = tl.cdiv(length, TILE)
    more = tl.maximum(tiles - 4, 0)
    return tiles - more, more


@triton.jit
def tiles_of(group, more):
    """First tile of a group along an axis, and how many it has."""
    return group + tl.where(group > 1, more, 0), 1 + tl.where(group == 1, more, 0)


@triton.jit
def place(index, batch, lengths, dilations, share, TILE: tl.constexpr):
    """What the `index`-th program of a head has. Pairs are of rows and columns.

    Returns the size of its residue classes, the first residues, the first row and column that the first tile of the
    group owns; and how many residues and tiles an image has in the group, and which of the group's tiles are the
    program's, from a first to before a last.
    """
    sizes_x = tl.where(lengths[1] % dilations[1] > 0, 2, 1)
    sizes = tl.where(lengths[0] % dilations[0] > 0, 2, 1) * sizes_x
    size, group_y, group_x, first, last = 0, 0, 0, 0, 0
    for candidate_size in range(sizes):
        rows, _, residues_y = residues(candidate_size // sizes_x, lengths[0], dilations[0])
        columns, _, residues_x = residues(candidate_size % sizes_x, lengths[1], dilations[1])
        groups_y, more_y = groups(rows, TILE[0])
        groups_x, more_x = groups(columns, TILE[1])
        for candidate_y in range(groups_y):
            for candidate_x in range(groups_x):
                _, count_y = tiles_of(candidate_y, more_y)
                _, count_x = tiles_of(candidate_x, more_x)
                count = batch * residues_y * residues_x * count_y * count_x
                programs = tl.cdiv(count, share)
                if (index >= 0) & (index < programs):
                    size, group_y, group_x = candidate_size, candidate_y, candidate_x
                    first, last = index * share, tl.minimum((index + 1) * share, count)
                index -= programs
    rows, residue_y, residues_y = residues(size // sizes_x, lengths[0], dilations[0])
    columns, residue_x, residues_x = residues(size % sizes_x, lengths[1], dilations[1])
    _, more_y = groups(rows, TILE[0])
    _, more_x = groups(columns, TILE[1])
    tile_y, count_y = tiles_of(group_y, more_y)
    tile_x, count_x = tiles_of(group_x, more_x)
    own = tile_y * TILE[0], tile_x * TILE[1]
    return (rows, columns), (residue_y, residue_x), own, (count_x, count_y, residues_x, residues_y), first, last


@triton.jit
def tile_at(index, counts):
    """The `index`-th tile of a group: how many columns and rows of tiles, residues, and images after its first."""
    tile_x, index = index % counts[0], index // counts[0]
    tile_y, index = index % counts[1], index // counts[1]
    residue_x, index = index % counts[2], index // counts[2]
    return tile_x, tile_y, residue_x, index % counts[3], (index // counts[3]).to(tl.int64)


@triton.jit
def carried(digit, carry, count):
    """A digit of a number with a carry added, and the next carry."""
    digit += carry
    return tl.where(digit == count, 0, digit), tl.where(digit == count, 1, 0)


@triton.jit
def next_tile(tile, counts):
    """The tile after one, without a division."""
    tile_x, carry = carried(tile[0], 1, counts[0])
    tile_y, carry = carried(tile[1], carry, counts[1])
    residue_x, carry = carried(tile[2], carry, counts[2])
    residue_y, carry = carried(tile[3], carry, counts[3])
    return tile_x, tile_y, residue_x, residue_y, tile[4] + carry


@triton.jit
def dense(lengths, heads, HEAD_DIM: tl.constexpr):
    """Strides of a contiguous (batch, height, width, heads, head_dim), in the order of `vectors`."""
    row = lengths[1].to(tl.int64) * heads * HEAD_DIM
    return lengths[0] * row, row, heads * HEAD_DIM, HEAD_DIM, 1


@triton.jit
def planes(lengths, heads):
    """Strides of a contiguous (batch, heads, height, width), in the order of `vectors`."""
    plane = lengths[0].to(tl.int64) * lengths[1]
    return plane * heads, lengths[1], 1, plane, 1


@triton.jit
def vectors(pointer, strides, head, y, x, residue, dilations):
    """The vectors (or numbers) of a head at positions of the group's first tile, with strides along (b, y, x, h, d).

    As (pointer, offsets, strides, dilations), for `at`, `load` and `store`.
    """
    offsets = map_offset(residue[0] + dilations[0] * y, residue[1] + dilations[1] * x, strides[1], strides[2])
    return pointer + head * strides[3], offsets, strides, dilations


@triton.jit
def at(vectors, tile, row, column, TILE: tl.constexpr):
    """Pointer to which the offsets of vectors are added in another tile, so many rows and columns further on."""
    pointer, _, strides, dilations = vectors
    y = tile[3] + dilations[0] * (TILE[0] * tile[1] + row)
    x = tile[2] + dilations[1] * (TILE[1] * tile[0] + column)
    return pointer + tile[4] * strides[0] + map_offset(y, x, strides[1], strides[2])


@triton.jit
def load(
    vectors,
    tile,
    row,
    column,
    exists,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Vectors of a tile, so many rows and columns further on: [N, D], zero where not `exists`."""
    pointer = at(vectors, tile, row, column, TILE)
    return load_tokens(pointer, vectors[1], vectors[2][4], exists, HEAD_DIM, BLOCK_D, UPCAST)


@triton.jit
def store(vectors, tile, exists, values, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    store_tokens(at(vectors, tile, 0, 0, TILE), vectors[1], exists, values, HEAD_DIM, BLOCK_D)


@triton.jit
def load_numbers(numbers, tile, row, column, exists, TILE: tl.constexpr):
    return tl.load(at(numbers, tile, row, column, TILE) + numbers[1], mask=exists, other=0.0)


@triton.jit
def store_numbers(numbers, tile, exists, values, TILE: tl.constexpr):
    tl.store(at(numbers, tile, 0, 0, TILE) + numbers[1], values, mask=exists)


@triton.jit
def corner(own, size, TILE: tl.constexpr):
    """First row and column of a tile that owns what it owns from `own` on."""
    return tl.minimum(own[0], tl.maximum(size[0] - TILE[0], 0)), tl.minimum(own[1], tl.maximum(size[1] - TILE[1], 0))


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
def inside(y, x, size):
    """Whether positions exist."""
    return (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])


@triton.jit
def met(n, row, y, x, size, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """Whether positions of a step that starts at `row` of a halo exist, in all tiles of the group.

    What lies past the halo, since a step has a power of two of columns, may exist in the group's first tile alone.
    """
    return inside(y, x, size) & (row + n // COLUMNS < SPAN[0]) & (n % COLUMNS < SPAN[1])


@triton.jit
def queries(m, own, size, TILE: tl.constexpr):
    """Rows and columns of a tile's queries [M], and whether they are its own."""
    top, left = corner(own, size, TILE)
    y, x = top + m // TILE[1], left + m % TILE[1]
    return y, x, (m < TILE[0] * TILE[1]) & (y >= own[0]) & (x >= own[1]) & inside(y, x, size)


@triton.jit
def owns(position, own, length, TILE: tl.constexpr, KERNEL: tl.constexpr):
    """Whether a tile owns keys. Where a tile holds as many, the last KERNEL are the last tile's.

    Else a tile before could have keys that see the far border, whose queries are more than TILE + KERNEL - 1.
    """
    last = (length - 1) // TILE * TILE
    if TILE >= KERNEL:
        border = tl.minimum(last, length - KERNEL)
        return (position < length) & tl.where(own == last, position >= border, (position >= own) & (position < border))
    else:
        return (position < length) & (position >= own)


@triton.jit
def entry(y, x, KERNEL_X: tl.constexpr):
    """Place of a position in a table of which a row has 2 * KERNEL_X - 1 entries: linear, so that places subtract."""
    return y * (2 * KERNEL_X - 1) + x


@triton.jit
def table(bias, head, query_y, query_x, key_y, key_x, exists, size, KERNEL: tl.constexpr):
    """Biases, in base 2, of keys in windows of queries that exist; -inf elsewhere. Positions are [M, 1] and [1, N]."""
    seen = within(key_y, window(query_y, size[0], KERNEL[0]), KERNEL[0])
    seen = seen & within(key_x, window(query_x, size[1], KERNEL[1]), KERNEL[1]) & exists
    if bias is not None:
        own = entry(KERNEL[0] - 1, KERNEL[1] - 1, KERNEL[1])  # the middle of a head's table
        relative = entry(key_y, key_x, KERNEL[1]) - entry(query_y, query_x, KERNEL[1])
        added = tl.load(bias + head * (2 * own + 1) + own + relative, mask=seen, other=float('-inf'))
        return added.to(tl.float32) * LOG2E
    else:
        return tl.where(seen, 0.0, float('-inf'))


@triton.jit
def attend(q, k, v, added, factor, maximum, total, accumulator, PRECISION: tl.constexpr):
    """Take the keys of a step into the softmax, and their values into the output [M, D]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + added
    maximum, total, weights, correction = online_softmax_step(scores, maximum, total)
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator * correction[:, None], input_precision=PRECISION)
    return maximum, total, accumulator


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'dilation_y', 'dilation_x', 'share'])
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
    batch,
    height,
    width,
    heads,
    dilation_y,
    dilation_x,
    scale,
    share,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    SPAN_Y: tl.constexpr,
    SPAN_X: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output, and the log-sum-exp in base 2 of each query's scores (batch, heads, height, width)."""
    KERNEL: tl.constexpr = (KERNEL_Y, KERNEL_X)
    TILE: tl.constexpr = (TILE_Y, TILE_X)
    SPAN: tl.constexpr = (SPAN_Y, SPAN_X)
    lengths, dilations = (height, width), (dilation_y, dilation_x)
    head = (tl.program_id(0) % heads).to(tl.int64)
    size, residue, own, counts, first, last = place(tl.program_id(0) // heads, batch, lengths, dilations, share, TILE)
    if first >= last:
        return
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, ROWS * COLUMNS)
    y, x, owned = queries(m, own, size, TILE)  # [M]
    top, left = corner(own, size, TILE)
    keys_y, keys_x = top - HALO_Y + n // COLUMNS, left - HALO_X + n % COLUMNS  # [N], of the first step
    of_query = vectors(query, (query_b, query_y, query_x, query_h, query_d), head, y, x, residue, dilations)
    of_key = vectors(key, (key_b, key_y, key_x, key_h, key_d), head, keys_y, keys_x, residue, dilations)
    of_value = vectors(value, (value_b, value_y, value_x, value_h, value_d), head, keys_y, keys_x, residue, dilations)
    of_output = vectors(output, dense(lengths, heads, HEAD_DIM), head, y, x, residue, dilations)
    of_sum = vectors(log_sum, planes(lengths, heads), head, y, x, residue, dilations)
    tables = ()
    if KEPT:
        for step in tl.static_range(STEPS):
            rows = keys_y[None, :] + step * ROWS
            tables += (table(bias, head, y[:, None], x[:, None], rows, keys_x[None, :], owned[:, None], size, KERNEL),)
    begin, end = tl.maximum(HALO_Y - top, 0) // ROWS, tl.minimum(tl.cdiv(size[0] + HALO_Y - top, ROWS), STEPS)
    factor = scale * LOG2E
    tile = tile_at(first, counts)
    for _ in range(first, last):
        q = load(of_query, tile, 0, 0, owned, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        maximum = tl.full([BLOCK_M], float('-inf'), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if KEPT:
            for step in tl.static_range(STEPS):
                exists = met(n, step * ROWS, keys_y + step * ROWS, keys_x, size, COLUMNS, SPAN)
                k = load(of_key, tile, step * ROWS, 0, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                v = load(of_value, tile, step * ROWS, 0, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                added = tables[step]
                maximum, total, accumulator = attend(q, k, v, added, factor, maximum, total, accumulator, PRECISION)
        else:
            for step in range(begin, end):
                exists = met(n, step * ROWS, keys_y + step * ROWS, keys_x, size, COLUMNS, SPAN)
                k = load(of_key, tile, step * ROWS, 0, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                v = load(of_value, tile, step * ROWS, 0, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                rows = keys_y[None, :] + step * ROWS
                added = table(bias, head, y[:, None], x[:, None], rows, keys_x[None, :], owned[:, None], size, KERNEL)
                maximum, total, accumulator = attend(q, k, v, added, factor, maximum, total, accumulator, PRECISION)
        total = tl.where(owned, total, 1.0)
        inverse = 1.0 / total
        store(of_output, tile, owned, accumulator * inverse[:, None], TILE, HEAD_DIM, BLOCK_D)
        store_numbers(of_sum, tile, owned, maximum + tl.log2(total), TILE)
        tile = next_tile(tile, counts)


@triton.jit
def score_gradient(q, k, v, do, added, factor, sums, deltas, PRECISION: tl.constexpr):
    """Gradient of the scores of a step [M, N]; sums and deltas [M, 1]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + added
    return tl.exp2(scores - sums) * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - deltas)


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'dilation_y', 'dilation_x', 'share'])
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
    batch,
    height,
    width,
    heads,
    dilation_y,
    dilation_x,
    scale,
    share,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    SPAN_Y: tl.constexpr,
    SPAN_X: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries, and delta = (grad * output).sum(-1), as log_sum (batch, heads, height, width)."""
    KERNEL: tl.constexpr = (KERNEL_Y, KERNEL_X)
    TILE: tl.constexpr = (TILE_Y, TILE_X)
    SPAN: tl.constexpr = (SPAN_Y, SPAN_X)
    lengths, dilations = (height, width), (dilation_y, dilation_x)
    head = (tl.program_id(0) % heads).to(tl.int64)
    size, residue, own, counts, first, last = place(tl.program_id(0) // heads, batch, lengths, dilations, share, TILE)
    if first >= last:
        return
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, ROWS * COLUMNS)
    y, x, owned = queries(m, own, size, TILE)  # [M]
    top, left = corner(own, size, TILE)
    keys_y, keys_x = top - HALO_Y + n // COLUMNS, left - HALO_X + n % COLUMNS  # [N], of the first step
    of_query = vectors(query, (query_b, query_y, query_x, query_h, query_d), head, y, x, residue, dilations)
    of_key = vectors(key, (key_b, key_y, key_x, key_h, key_d), head, keys_y, keys_x, residue, dilations)
    of_value = vectors(value, (value_b, value_y, value_x, value_h, value_d), head, keys_y, keys_x, residue, dilations)
    of_grad = vectors(grad, (grad_b, grad_y, grad_x, grad_h, grad_d), head, y, x, residue, dilations)
    of_output = vectors(output, dense(lengths, heads, HEAD_DIM), head, y, x, residue, dilations)
    of_d_query = vectors(d_query, dense(lengths, heads, HEAD_DIM), head, y, x, residue, dilations)
    of_sum = vectors(log_sum, planes(lengths, heads), head, y, x, residue, dilations)
    of_delta = vectors(delta, planes(lengths, heads), head, y, x, residue, dilations)
    tables = ()
    if KEPT:
        for step in tl.static_range(STEPS):
            rows = keys_y[None, :] + step * ROWS
            tables += (table(bias, head, y[:, None], x[:, None], rows, keys_x[None, :], owned[:, None], size, KERNEL),)
    begin, end = tl.maximum(HALO_Y - top, 0) // ROWS, tl.minimum(tl.cdiv(size[0] + HALO_Y - top, ROWS), STEPS)
    factor = scale * LOG2E
    tile = tile_at(first, counts)
    for _ in range(first, last):
        q = load(of_query, tile, 0, 0, owned, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        do = load(of_grad, tile, 0, 0, owned, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        o = load(of_output, tile, 0, 0, owned, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        sums = load_numbers(of_sum, tile, 0, 0, owned, TILE)[:, None]
        deltas = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        store_numbers(of_delta, tile, owned, deltas, TILE)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if KEPT:
            for step in tl.static_range(STEPS):
                exists = met(n, step * ROWS, keys_y + step * ROWS, keys_x, size, COLUMNS, SPAN)
                k = load(of_key, tile, step * ROWS, 0, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                v = load(of_value, tile, step * ROWS, 0, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                ds = score_gradient(q, k, v, do, tables[step], factor, sums, deltas[:, None], PRECISION)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        else:
            for step in range(begin, end):
                exists = met(n, step * ROWS, keys_y + step * ROWS, keys_x, size, COLUMNS, SPAN)
                k = load(of_key, tile, step * ROWS, 0, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                v = load(of_value, tile, step * ROWS, 0, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                rows = keys_y[None, :] + step * ROWS
                added = table(bias, head, y[:, None], x[:, None], rows, keys_x[None, :], owned[:, None], size, KERNEL)
                ds = score_gradient(q, k, v, do, added, factor, sums, deltas[:, None], PRECISION)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        store(of_d_query, tile, owned, dq * scale, TILE, HEAD_DIM, BLOCK_D)
        tile = next_tile(tile, counts)


@triton.jit
def meet(
    k,
    v,
    q,
    do,
    added,
    factor,
    sums,
    deltas,
    dk,
    dv,
    OF_KEY: tl.constexpr,
    OF_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take the queries of a step into the gradients of keys and values [M, D]; scores are [M, N], keys first."""
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor + added - sums[None, :])
    if OF_VALUE:
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    if OF_KEY:
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - deltas[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'dilation_y', 'dilation_x', 'share'])
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
    batch,
    height,
    width,
    heads,
    dilation_y,
    dilation_x,
    scale,
    share,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    SPAN_Y: tl.constexpr,
    SPAN_X: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the keys and of the values; one that is None is left out."""
    KERNEL: tl.constexpr = (KERNEL_Y, KERNEL_X)
    TILE: tl.constexpr = (TILE_Y, TILE_X)
    SPAN: tl.constexpr = (SPAN_Y, SPAN_X)
    lengths, dilations = (height, width), (dilation_y, dilation_x)
    head = (tl.program_id(0) % heads).to(tl.int64)
    size, residue, own, counts, first, last = place(tl.program_id(0) // heads, batch, lengths, dilations, share, TILE)
    if first >= last:
        return
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, ROWS * COLUMNS)
    top, left = corner(own, size, TILE)
    y, x = top + m // TILE_X, left + m % TILE_X  # [M], of keys
    owned = owns(y, own[0], size[0], TILE_Y, KERNEL_Y) & owns(x, own[1], size[1], TILE_X, KERNEL_X)
    owned = owned & (m < TILE_Y * TILE_X)
    highest = tl.maximum(tl.minimum(top - KERNEL_Y // 2, size[0] - (TILE_Y + KERNEL_Y - 1)), 0)
    leftmost = tl.maximum(tl.minimum(left - KERNEL_X // 2, size[1] - (TILE_X + KERNEL_X - 1)), 0)
    queries_y, queries_x = highest + n // COLUMNS, leftmost + n % COLUMNS  # [N], of the first step
    of_query = vectors(
        query, (query_b, query_y, query_x, query_h, query_d), head, queries_y, queries_x, residue, dilations
    )
    of_grad = vectors(grad, (grad_b, grad_y, grad_x, grad_h, grad_d), head, queries_y, queries_x, residue, dilations)
    of_sum = vectors(log_sum, planes(lengths, heads), head, queries_y, queries_x, residue, dilations)
    if d_key is not None:
        of_delta = vectors(delta, planes(lengths, heads), head, queries_y, queries_x, residue, dilations)
        of_d_key = vectors(d_key, dense(lengths, heads, HEAD_DIM), head, y, x, residue, dilations)
    if d_value is not None:
        of_d_value = vectors(d_value, dense(lengths, heads, HEAD_DIM), head, y, x, residue, dilations)
    of_key = vectors(key, (key_b, key_y, key_x, key_h, key_d), head, y, x, residue, dilations)
    of_value = vectors(value, (value_b, value_y, value_x, value_h, value_d), head, y, x, residue, dilations)
    tables = ()
    if KEPT:
        for step in tl.static_range(STEPS):
            rows = queries_y + step * ROWS
            some = owned[:, None] & met(n, step * ROWS, rows, queries_x, size, COLUMNS, SPAN)[None, :]
            tables += (
                table(bias, head, rows[None, :], queries_x[None, :], y[:, None], x[:, None], some, size, KERNEL),
            )
    factor = scale * LOG2E
    tile = tile_at(first, counts)
    for _ in range(first, last):
        k = load(of_key, tile, 0, 0, owned, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        v = k
        if d_key is not None:
            v = load(of_value, tile, 0, 0, owned, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if KEPT:
            for step in tl.static_range(STEPS):
                row, column = step * ROWS, 0
                exists = met(n, row, queries_y + row, queries_x, size, COLUMNS, SPAN)
                added = tables[step]
                q = load(of_query, tile, row, column, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                do = load(of_grad, tile, row, column, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                sums = load_numbers(of_sum, tile, row, column, exists, TILE)
                deltas = sums
                if d_key is not None:
                    deltas = load_numbers(of_delta, tile, row, column, exists, TILE)
                dk, dv = meet(
                    k, v, q, do, added, factor, sums, deltas, dk, dv, d_key is not None, d_value is not None, PRECISION
                )
        else:  # tiles of a group do not lie alike if they are smaller than a window
            to_y, to_x = tile[1] * TILE_Y, tile[0] * TILE_X
            first_y, first_x = first_query(top + to_y, KERNEL_Y), first_query(left + to_x, KERNEL_X)
            last_y = last_query(tl.minimum(top + to_y + TILE_Y, size[0]) - 1, size[0], KERNEL_Y)
            last_x = last_query(tl.minimum(left + to_x + TILE_X, size[1]) - 1, size[1], KERNEL_X)
            steps_x = tl.cdiv(last_x - first_x + 1, COLUMNS)  # more than one at a border at most
            for step in range(0, tl.cdiv(last_y - first_y + 1, ROWS) * steps_x):
                rows = first_y + step // steps_x * ROWS + n // COLUMNS
                columns = first_x + step % steps_x * COLUMNS + n % COLUMNS
                exists = (rows <= last_y) & (columns <= last_x)
                row = first_y + step // steps_x * ROWS - highest - to_y
                column = first_x + step % steps_x * COLUMNS - leftmost - to_x
                some = owned[:, None] & exists[None, :]
                added = table(
                    bias,
                    head,
                    rows[None, :],
                    columns[None, :],
                    y[:, None] + to_y,
                    x[:, None] + to_x,
                    some,
                    size,
                    KERNEL,
                )
                q = load(of_query, tile, row, column, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                do = load(of_grad, tile, row, column, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
                sums = load_numbers(of_sum, tile, row, column, exists, TILE)
                deltas = sums
                if d_key is not None:
                    deltas = load_numbers(of_delta, tile, row, column, exists, TILE)
                dk, dv = meet(
                    k, v, q, do, added, factor, sums, deltas, dk, dv, d_key is not None, d_value is not None, PRECISION
                )
        if d_key is not None:
            store(of_d_key, tile, owned, dk * scale, TILE, HEAD_DIM, BLOCK_D)
        if d_value is not None:
            store(of_d_value, tile, owned, dv, TILE, HEAD_DIM, BLOCK_D)
        tile = next_tile(tile, counts)


@triton.jit(do_not_specialize=['batch', 'height', 'width', 'dilation_y', 'dilation_x', 'share'])
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
    batch,
    height,
    width,
    heads,
    dilation_y,
    dilation_x,
    scale,
    share,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    SPAN_Y: tl.constexpr,
    SPAN_X: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the scores of one step, summed over a program's tiles: (programs of a head, heads, steps, M, N).

    The sum over tiles can be taken before that over equal relative positions, since these are the same in all tiles.
    """
    BLOCK_N: tl.constexpr = ROWS * COLUMNS
    KERNEL: tl.constexpr = (KERNEL_Y, KERNEL_X)
    TILE: tl.constexpr = (TILE_Y, TILE_X)
    SPAN: tl.constexpr = (SPAN_Y, SPAN_X)
    lengths, dilations = (height, width), (dilation_y, dilation_x)
    step = tl.program_id(0) % STEPS
    head = (tl.program_id(0) // STEPS % heads).to(tl.int64)
    size, residue, own, counts, first, last = place(
        tl.program_id(0) // (STEPS * heads), batch, lengths, dilations, share, TILE
    )
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    y, x, owned = queries(m, own, size, TILE)  # [M]
    top, left = corner(own, size, TILE)
    keys_y, keys_x = top - HALO_Y + step * ROWS + n // COLUMNS, left - HALO_X + n % COLUMNS  # [N]
    exists = met(n, step * ROWS, keys_y, keys_x, size, COLUMNS, SPAN)
    of_query = vectors(query, (query_b, query_y, query_x, query_h, query_d), head, y, x, residue, dilations)
    of_key = vectors(key, (key_b, key_y, key_x, key_h, key_d), head, keys_y, keys_x, residue, dilations)
    of_value = vectors(value, (value_b, value_y, value_x, value_h, value_d), head, keys_y, keys_x, residue, dilations)
    of_grad = vectors(grad, (grad_b, grad_y, grad_x, grad_h, grad_d), head, y, x, residue, dilations)
    of_sum = vectors(log_sum, planes(lengths, heads), head, y, x, residue, dilations)
    of_delta = vectors(delta, planes(lengths, heads), head, y, x, residue, dilations)
    added = table(bias, head, y[:, None], x[:, None], keys_y[None, :], keys_x[None, :], owned[:, None], size, KERNEL)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tile = tile_at(first, counts)
    for _ in range(first, last):
        q = load(of_query, tile, 0, 0, owned, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        do = load(of_grad, tile, 0, 0, owned, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        k = load(of_key, tile, 0, 0, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
        v = load(of_value, tile, 0, 0, exists, TILE, HEAD_DIM, BLOCK_D, UPCAST)  # [N, D]
        sums = load_numbers(of_sum, tile, 0, 0, owned, TILE)[:, None]
        deltas = load_numbers(of_delta, tile, 0, 0, owned, TILE)[:, None]
        accumulator += score_gradient(q, k, v, do, added, scale * LOG2E, sums, deltas, PRECISION)
        tile = next_tile(tile, counts)
    partial += tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N)
    tl.store(partial + m[:, None] * BLOCK_N + n[None, :], accumulator)


@triton.jit
def bias_gradient_sum(
    partial,
    d_bias,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    HALO_Y: tl.constexpr,
    HALO_X: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sum (heads, steps, M, N) over the scores of equal relative positions; a program has a row of a head's table."""
    BLOCK_N: tl.constexpr = ROWS * COLUMNS
    WIDTH: tl.constexpr = 2 * KERNEL_X - 1
    index = tl.program_id(0)
    to_y = index % (2 * KERNEL_Y - 1) - (KERNEL_Y - 1)
    head = index // (2 * KERNEL_Y - 1)
    m, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    row = (m // TILE_X + to_y + HALO_Y)[None, :]  # of the halo; [E, M] from here on
    column = (m % TILE_X + HALO_X)[None, :] + (e - (KERNEL_X - 1))[:, None]
    exists = (row >= 0) & (row < STEPS * ROWS) & (column >= 0) & (column < COLUMNS)
    exists = exists & (m < TILE_Y * TILE_X)[None, :] & (e < WIDTH)[:, None]
    n = row % ROWS * COLUMNS + column
    offsets = (head * STEPS + row // ROWS) * (BLOCK_M * BLOCK_N) + m[None, :] * BLOCK_N + n
    total = tl.sum(tl.load(partial + offsets, mask=exists, other=0.0), 1)
    tl.store(d_bias + index * WIDTH + e, total, mask=e < WIDTH)
