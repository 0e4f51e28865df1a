"""The Triton kernels of routing attention; triton.py launches them, README.md derives them.

A program has a tile of the pixels of one region, and every so-many-th head: of queries in `forward` and
`query_gradient`, of keys in the others. It meets the pixels of a list of regions as one flat sequence, BLOCK_N a step:
small regions share a step, a large one takes several. A pixel in the padding is at no place of the map: nothing is read
or written there. M counts pixels of the tile, N those of a step; offsets into memory are of 64 bits.
"""

import triton
import triton.language as tl

from ..triton_common import LOG2E, load_tokens, map_offset, online_softmax_step, store_tokens, vector


@triton.jit
def place(index, heads, lists, tiles):
    """Of a program: image, head, which of an image's lists, and which tile of its region."""
    head = index % heads
    index = index // heads
    tile = index % tiles
    index = index // tiles
    return (index // lists).to(tl.int64), head, index % lists, tile


@triton.jit
def factor_of(divisor):
    """For `divide`."""
    return 0xFFFFFFFF // divisor.to(tl.uint32)


@triton.jit
def divide(n, divisor, factor):
    """Quotient and remainder of n from 0 to 2 ** 31 - 1, in a few instructions: division takes some twenty."""
    quotient = tl.umulhi(n.to(tl.uint32), factor).to(tl.int32)  # exact, or one too small
    remainder = n - quotient * divisor
    is_small = remainder >= divisor
    return tl.where(is_small, quotient + 1, quotient), tl.where(is_small, remainder - divisor, remainder)


@triton.jit
def grid_of(height, width, rows, columns):
    """What `listed` and `locate` have to know of a map and its regions; how many these are, and their pixels, first."""
    grid_x = tl.cdiv(width, columns)
    regions = tl.cdiv(height, rows) * grid_x
    pixels = rows * columns
    by_pixels, by_columns, by_grid = factor_of(pixels), factor_of(columns), factor_of(grid_x)
    return regions, pixels, by_pixels, height, width, rows, columns, by_columns, grid_x, by_grid


@triton.jit
def listed(regions_of, stride, count, n, grid):
    """Region and pixel of the flat positions n [N] in the pixels of a list of `count` regions.

    What is behind the list, or no region, is one more region behind the map's last.
    """
    regions, pixels, by_pixels, _, _, _, _, _, _, _ = grid
    slot, pixel = divide(n, pixels, by_pixels)
    region = tl.load(regions_of + slot.to(tl.int64) * stride, mask=slot < count, other=-1)
    return tl.minimum(region.to(tl.uint32), regions.to(tl.uint32)).to(tl.int32), pixel


@triton.jit
def locate(region, pixel, grid):
    """Row and column of a region's pixel, and whether it is one of the map."""
    _, _, _, height, width, rows, columns, by_columns, grid_x, by_grid = grid
    region_y, region_x = divide(region, grid_x, by_grid)
    pixel_y, pixel_x = divide(pixel, columns, by_columns)
    y, x = region_y * rows + pixel_y, region_x * columns + pixel_x
    return y, x, (pixel_y < rows) & (y < height) & (x < width)


@triton.jit
def keys_of(start, routes, stride, topk, grid, MASK_PADDING: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of a step's keys, which are pixels of the map, and which take part, all [N]."""
    n = start + tl.arange(0, BLOCK_N)
    region, pixel = listed(routes, stride, topk, n, grid)
    y, x, exists = locate(region, pixel, grid)
    return y, x, exists, exists if MASK_PADDING else n < topk * grid[1]  # keys in the padding are zeros


@triton.jit(
    do_not_specialize=[
        *('routes_b', 'routes_h', 'routes_r', 'routes_k'),
        *('height', 'width', 'rows', 'columns', 'topk', 'parts'),
    ]
)
def forward(
    query,
    key,
    value,
    routes,
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
    routes_b,
    routes_h,
    routes_r,
    routes_k,
    height,
    width,
    heads,
    rows,
    columns,
    topk,
    scale,
    parts,
    MASK_PADDING: tl.constexpr,
    ONE_STEP: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output, and the log-sum-exp in base 2 of each query's scores (batch, heads, regions, pixels).

    A program has every `parts`-th head. Where all keys are one step, these are located once.
    """
    grid = grid_of(height, width, rows, columns)
    regions, pixels = grid[0], grid[1]
    image, part, own_region, tile = place(tl.program_id(0), parts, regions, tl.cdiv(pixels, BLOCK_M))
    routes += image * routes_b + part.to(tl.int64) * routes_h + own_region.to(tl.int64) * routes_r
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y, x, owned = locate(own_region, m, grid)  # [M]
    query_offsets = image * query_b + map_offset(y, x, query_y, query_x)
    if ONE_STEP:
        keys_y, keys_x, exists, seen = keys_of(0, routes, routes_k, topk, grid, MASK_PADDING, BLOCK_N)  # [N]

    for head in range(part, heads, parts):
        h = tl.cast(head, tl.int64)
        q = load_tokens(query, query_offsets + h * query_h, query_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        maximum = tl.full([BLOCK_M], float('-inf'), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, BLOCK_N if ONE_STEP else topk * pixels, BLOCK_N):
            if not ONE_STEP:
                keys_y, keys_x, exists, seen = keys_of(start, routes, routes_k, topk, grid, MASK_PADDING, BLOCK_N)
            offsets = map_offset(keys_y, keys_x, key_y, key_x)
            k = load_tokens(
                key + (image * key_b + h * key_h), offsets, key_d, exists, HEAD_DIM, BLOCK_D, UPCAST
            )  # [N, D]
            offsets = map_offset(keys_y, keys_x, value_y, value_x)
            v = load_tokens(
                value + (image * value_b + h * value_h), offsets, value_d, exists, HEAD_DIM, BLOCK_D, UPCAST
            )  # [N, D]
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            if MASK_PADDING or not WHOLE:
                scores = tl.where(seen[None, :], scores, float('-inf'))
            maximum, total, weights, correction = online_softmax_step(scores, maximum, total)
            accumulator = tl.dot(weights.to(v.dtype), v, accumulator * correction[:, None], input_precision=PRECISION)

        own = vector(image, head, map_offset(y, x, width, 1), heads, height, width, HEAD_DIM)
        store_tokens(output, own, owned, accumulator / total[:, None], HEAD_DIM, BLOCK_D)
        position = ((image * heads + head) * regions + own_region) * pixels + m
        tl.store(log_sum + position, maximum + tl.log2(total), mask=m < pixels)


@triton.jit(
    do_not_specialize=[
        *('routes_b', 'routes_h', 'routes_r', 'routes_k'),
        *('height', 'width', 'rows', 'columns', 'topk', 'parts'),
    ]
)
def query_gradient(
    query,
    key,
    value,
    routes,
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
    routes_b,
    routes_h,
    routes_r,
    routes_k,
    height,
    width,
    heads,
    rows,
    columns,
    topk,
    scale,
    parts,
    MASK_PADDING: tl.constexpr,
    ONE_STEP: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries, and delta = (grad * output).sum(-1), as log_sum (batch, heads, regions, pixels).

    A program has every `parts`-th head, as in `forward`.
    """
    grid = grid_of(height, width, rows, columns)
    regions, pixels = grid[0], grid[1]
    image, part, own_region, tile = place(tl.program_id(0), parts, regions, tl.cdiv(pixels, BLOCK_M))
    routes += image * routes_b + part.to(tl.int64) * routes_h + own_region.to(tl.int64) * routes_r
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y, x, owned = locate(own_region, m, grid)  # [M]
    query_offsets = image * query_b + map_offset(y, x, query_y, query_x)
    grad_offsets = image * grad_b + map_offset(y, x, grad_y, grad_x)
    if ONE_STEP:
        keys_y, keys_x, exists, seen = keys_of(0, routes, routes_k, topk, grid, MASK_PADDING, BLOCK_N)  # [N]

    for head in range(part, heads, parts):
        h = tl.cast(head, tl.int64)
        q = load_tokens(query, query_offsets + h * query_h, query_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        do = load_tokens(grad, grad_offsets + h * grad_h, grad_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        own = vector(image, head, map_offset(y, x, width, 1), heads, height, width, HEAD_DIM)
        o = load_tokens(output, own, 1, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        position = ((image * heads + head) * regions + own_region) * pixels + m
        sums = tl.load(log_sum + position, mask=m < pixels, other=0.0)
        deltas = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + position, deltas, mask=m < pixels)

        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, BLOCK_N if ONE_STEP else topk * pixels, BLOCK_N):
            if not ONE_STEP:
                keys_y, keys_x, exists, seen = keys_of(start, routes, routes_k, topk, grid, MASK_PADDING, BLOCK_N)
            offsets = map_offset(keys_y, keys_x, key_y, key_x)
            k = load_tokens(
                key + (image * key_b + h * key_h), offsets, key_d, exists, HEAD_DIM, BLOCK_D, UPCAST
            )  # [N, D]
            offsets = map_offset(keys_y, keys_x, value_y, value_x)
            v = load_tokens(
                value + (image * value_b + h * value_h), offsets, value_d, exists, HEAD_DIM, BLOCK_D, UPCAST
            )  # [N, D]
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            if MASK_PADDING or not WHOLE:
                scores = tl.where(seen[None, :], scores, float('-inf'))
            p = tl.exp2(scores - sums[:, None])  # [M, N]
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - deltas[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        store_tokens(d_query, own, owned, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def first_slot(pieces_before, region):
    """Slot of a region's first piece. Regions before it of n > 1 pieces have n - 1 more than one, and 2n - 2 slots."""
    return 2 * (pieces_before - region)


@triton.jit(
    do_not_specialize=[
        *('groups', 'pieces', 'length', 'slots'),
        *('height', 'width', 'rows', 'columns', 'topk', 'parts'),
    ]
)
def key_gradient(
    query,
    key,
    value,
    grad,
    log_sum,
    delta,
    listers,
    first_lister,
    first_piece,
    region_of_piece,
    partial_key,
    partial_value,
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
    groups,
    pieces,
    length,
    slots,
    height,
    width,
    heads,
    rows,
    columns,
    topk,
    scale,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the keys and of the values, from one piece of the list of the regions that listed theirs.

    One that is None is left out. What comes of a list in several pieces goes into the pieces' slots, in float32. A
    program has every `parts`-th head.
    """
    grid = grid_of(height, width, rows, columns)
    regions, pixels = grid[0], grid[1]
    image, part, piece, tile = place(tl.program_id(0), parts, pieces, tl.cdiv(pixels, BLOCK_M))
    group = image * groups + part % groups
    own_region = tl.load(region_of_piece + group * pieces + piece)
    if own_region >= regions:
        return
    first = group * (regions + 1) + own_region
    pieces_before, pieces_to = tl.load(first_piece + first), tl.load(first_piece + first + 1)
    piece -= pieces_before
    begin = tl.load(first_lister + first) + piece * length
    count = tl.minimum(tl.load(first_lister + first + 1) - begin, length)
    listers += group * regions * topk + begin
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y, x, owned = locate(own_region, m, grid)  # [M], of keys
    key_offsets = image * key_b + map_offset(y, x, key_y, key_x)
    value_offsets = image * value_b + map_offset(y, x, value_y, value_x)

    for head in range(part, heads, parts):
        h = tl.cast(head, tl.int64)
        k = load_tokens(key, key_offsets + h * key_h, key_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        if d_key is not None:
            v = load_tokens(value, value_offsets + h * value_h, value_d, owned, HEAD_DIM, BLOCK_D, UPCAST)  # [M, D]
        dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, count * pixels, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            region, pixel = listed(listers, 1, count, n, grid)  # [N]
            queries_y, queries_x, exists = locate(region, pixel, grid)
            offsets = map_offset(queries_y, queries_x, query_y, query_x)
            q = load_tokens(
                query + (image * query_b + h * query_h), offsets, query_d, exists, HEAD_DIM, BLOCK_D, UPCAST
            )  # [N, D]
            offsets = map_offset(queries_y, queries_x, grad_y, grad_x)
            do = load_tokens(
                grad + (image * grad_b + h * grad_h), offsets, grad_d, exists, HEAD_DIM, BLOCK_D, UPCAST
            )  # [N, D]
            position = (image * heads + head) * regions * pixels + (region * pixels + pixel)
            sums = tl.load(log_sum + position, mask=n < count * pixels, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)  # [M, N]
            p = tl.exp2(scores - sums[None, :])  # 1 for a query that isn't there: its gradient is zeros
            if d_value is not None:
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            if d_key is not None:
                deltas = tl.load(delta + position, mask=n < count * pixels, other=0.0)
                ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - deltas[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

        if pieces_to - pieces_before == 1:
            own = vector(image, head, map_offset(y, x, width, 1), heads, height, width, HEAD_DIM)
            if d_key is not None:
                store_tokens(d_key, own, owned, dk * scale, HEAD_DIM, BLOCK_D)
            if d_value is not None:
                store_tokens(d_value, own, owned, dv, HEAD_DIM, BLOCK_D)
        else:
            slot = first_slot(pieces_before, own_region) + piece
            own = (((image * heads + head) * slots + slot) * pixels + m) * HEAD_DIM
            if d_key is not None:
                store_tokens(partial_key, own, owned, dk * scale, HEAD_DIM, BLOCK_D)
            if d_value is not None:
                store_tokens(partial_value, own, owned, dv, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=['groups', 'slots', 'height', 'width', 'rows', 'columns'])
def key_gradient_sum(
    first_piece,
    partial_key,
    partial_value,
    d_key,
    d_value,
    groups,
    slots,
    height,
    width,
    heads,
    rows,
    columns,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sum what `key_gradient` left in the slots of a region, one after the other."""
    grid = grid_of(height, width, rows, columns)
    regions, pixels = grid[0], grid[1]
    image, head, own_region, tile = place(tl.program_id(0), heads, regions, tl.cdiv(pixels, BLOCK_M))
    first = (image * groups + head % groups) * (regions + 1) + own_region
    pieces_before, pieces_to = tl.load(first_piece + first), tl.load(first_piece + first + 1)
    if pieces_to - pieces_before == 1:
        return
    begin = first_slot(pieces_before, own_region)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y, x, owned = locate(own_region, m, grid)  # [M]
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for slot in range(begin, begin + pieces_to - pieces_before):
        own = (((image * heads + head) * slots + slot) * pixels + m) * HEAD_DIM
        if d_key is not None:
            dk += load_tokens(partial_key, own, 1, owned, HEAD_DIM, BLOCK_D, False)
        if d_value is not None:
            dv += load_tokens(partial_value, own, 1, owned, HEAD_DIM, BLOCK_D, False)
    own = vector(image, head, map_offset(y, x, width, 1), heads, height, width, HEAD_DIM)
    if d_key is not None:
        store_tokens(d_key, own, owned, dk, HEAD_DIM, BLOCK_D)
    if d_value is not None:
        store_tokens(d_value, own, owned, dv, HEAD_DIM, BLOCK_D)
