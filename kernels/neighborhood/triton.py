"""Neighborhood attention as fused Triton kernels, forward and backward, for GPUs.

An online softmax over the rows of a tile's halo, with the log-sum-exp of each query kept for the backward. Nothing of
the size of the scores is stored, and nothing is added atomically: two runs give the same bits. triton is imported when
a kernel is first launched. README.md has the derivation.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .. import configs, launch
from ..dispatch import Problem, Verdict, impossible
from ..launch import Block, Launch, next_power_of_2

CONFIGS = Path(__file__).with_name('configs.json')
KERNEL_SIZE = 13  # the greatest
WIDE_KERNEL_SIZE = 7  # the greatest in float32 where head_dim is greater than WIDE: shared memory holds no more
WIDE = 64
KEPT = 128  # numbers of tables that a thread keeps at most, of its 255 registers; none where head_dim is above WIDE


def judge(problem: Problem) -> Verdict:
    kernel_size = problem.options.get('kernel_size', 1)
    greatest = max(kernel_size) if isinstance(kernel_size, tuple) else kernel_size
    if greatest > KERNEL_SIZE:
        return impossible(f'it takes kernel sizes up to {KERNEL_SIZE}, not {greatest}')
    wide = problem.dtype == torch.float32 and problem.shape is not None and problem.shape[-1] > WIDE
    if wide and greatest > WIDE_KERNEL_SIZE:
        return impossible(
            f'in float32 with a head_dim above {WIDE} it takes kernel sizes up to {WIDE_KERNEL_SIZE}, not {greatest}'
        )
    return launch.judge(problem)


def _groups(length: int, dilation: int, tile: int) -> list[int]:
    """Tiles of an axis by group, of all residue classes, as `place` of the kernels counts them."""
    found = []
    longer = length % dilation
    for size, residues in ((length // dilation + 1, longer), (length // dilation, dilation - longer)):
        tiles = -(-size // tile)
        counts = [1] * tiles if tiles < 5 else [1, tiles - 3, 1, 1]
        found += [residues * count for count in counts if residues]
    return found


@lru_cache(maxsize=1024)
def _share(
    batch: int, size: tuple[int, int], dilation: tuple[int, int], tile: tuple[int, int], most: int
) -> tuple[int, int]:
    """How many tiles of a head a program has, and how many programs that makes: `most`, or as many as groups."""
    rows, columns = (_groups(*axis) for axis in zip(size, dilation, tile, strict=True))
    counts = [batch * n * m for n in rows for m in columns]
    most = max(most, len(counts))
    share = max(1, -(-sum(counts) // most))
    while (programs := sum(-(-count // share) for count in counts)) > most:
        share += max(1, share // 16)
    return share, programs


@lru_cache(maxsize=1024)
def _blocks(
    lengths: tuple[int, int], kernel_size: tuple[int, int], head_dim: int, arithmetic: str, device: torch.device
) -> dict[str, Block]:
    return configs.find(
        CONFIGS,
        launch.target(device),
        arithmetic=arithmetic,
        head_dim=head_dim,
        kernel_size=max(kernel_size),
        height=lengths[0],
        width=lengths[1],
    )


class Call:
    """One call: the arguments that its kernels share, by name, and the launch of each kernel.

    Args:
        tensors: query, key and value; in a backward grad too.
        blocks: how the kernels are cut; from the table when None.
        arithmetic: see launch.arithmetic; by the dtype and PyTorch's settings when None.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        bias: Tensor | None,
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        scale: float,
        blocks: dict[str, Block] | None = None,
        arithmetic: str | None = None,
    ):
        query = tensors['query']
        self.batch, self.height, self.width, self.heads, head_dim = query.shape
        self.kernel_size, self.dilation = tuple(kernel_size), tuple(dilation)
        self.lengths = -(-self.height // dilation[0]), -(-self.width // dilation[1])  # of the longest residue class
        arithmetic = arithmetic or launch.arithmetic(query.dtype)
        self.arithmetic = 'half' if launch.INTERPRETED else arithmetic  # the interpreter takes its time by the step
        self.device = query.device
        self.blocks = blocks or _blocks(self.lengths, self.kernel_size, head_dim, self.arithmetic, self.device)
        self.arguments = {
            **tensors,
            **launch.strides('byxhd', **tensors),
            'bias': None if bias is None else bias.contiguous(),
            'batch': self.batch,
            'height': self.height,
            'width': self.width,
            'heads': self.heads,
            'dilation_y': self.dilation[0],
            'dilation_x': self.dilation[1],
            'scale': scale,
            'KERNEL_Y': self.kernel_size[0],
            'KERNEL_X': self.kernel_size[1],
            'HEAD_DIM': head_dim,
            'BLOCK_D': max(16, next_power_of_2(head_dim)),
            'UPCAST': launch.INTERPRETED and query.dtype == torch.bfloat16,
            'PRECISION': 'tf32' if arithmetic == 'tf32' else 'ieee',
        }

    def cut(self, name: str) -> dict[str, object]:
        """How kernel `name` is cut. Where a tile holds a whole residue class, its halo is the tile."""
        block = self.blocks[name]
        halo, span = [], []
        for length, tile, kernel in zip(self.lengths, block.tile, self.kernel_size, strict=True):
            if name != 'key' and tile < min(length, kernel // 2 + 1):
                raise ValueError(f'{name}: a tile of {tile} is smaller than half a window of {kernel}')
            halo.append(0 if length <= tile else kernel // 2)
            span.append(tile if length <= tile else tile + kernel - 1)
        columns = next_power_of_2(span[1])
        rows = max(16 // columns, min(block.step // columns, next_power_of_2(span[0])), 1)
        steps = -(-span[0] // rows)
        size = max(16, next_power_of_2(block.tile[0] * block.tile[1]))
        return {
            'TILE_Y': block.tile[0],
            'TILE_X': block.tile[1],
            'HALO_Y': halo[0],
            'HALO_X': halo[1],
            'SPAN_Y': span[0],
            'SPAN_X': span[1],
            'COLUMNS': columns,
            'ROWS': rows,
            'STEPS': steps,
            'KEPT': self._keeps(name, size * rows * columns * steps // (32 * block.num_warps)),
            'BLOCK_M': size,
        }

    def _keeps(self, name: str, numbers: int) -> bool:
        """Whether a thread keeps so many `numbers` of the tables of all steps."""
        tile = self.blocks[name].tile
        if name == 'key' and any(length < kernel for length, kernel in zip(tile, self.kernel_size, strict=True)):
            return False
        return self.arithmetic == 'half' and self.arguments['BLOCK_D'] <= WIDE and numbers <= KEPT

    def _share(self, name: str, steps: int = 1) -> tuple[int, int]:
        """How many tiles a program has at most, and how many programs a head has; each has one of `steps`."""
        most = max(1, launch.programs(self.device) // (self.heads * steps))
        size = self.height, self.width
        return _share(self.batch, size, self.dilation, self.blocks[name].tile, most)

    def _launch(self, kernel, block: str, cut: dict[str, object], steps: int = 1, **arguments) -> Launch:
        share, programs = self._share(block, steps)
        given = {**self.arguments, **cut, 'share': share, **arguments}
        return Launch.of(kernel, programs * self.heads * steps, self.blocks[block], given)

    def forward(self, output: Tensor, log_sum: Tensor) -> Launch:
        from .triton_kernels import forward

        return self._launch(forward, 'forward', self.cut('forward'), output=output, log_sum=log_sum)

    def query_gradient(self, output: Tensor, log_sum: Tensor, delta: Tensor, d_query: Tensor) -> Launch:
        """Fills `delta` too, which the kernels after it read."""
        from .triton_kernels import query_gradient

        tensors = dict(output=output, log_sum=log_sum, delta=delta, d_query=d_query)
        return self._launch(query_gradient, 'query', self.cut('query'), **tensors)

    def key_gradient(
        self, log_sum: Tensor, delta: Tensor | None, d_key: Tensor | None, d_value: Tensor | None
    ) -> Launch:
        from .triton_kernels import key_gradient

        tensors = dict(log_sum=log_sum, delta=delta, d_key=d_key, d_value=d_value)
        return self._launch(key_gradient, 'key', self.cut('key'), **tensors)

    def bias_gradient(self, log_sum: Tensor, delta: Tensor, d_bias: Tensor) -> Iterator[Launch]:
        """Two launches, the second to be made after the first has run. `d_bias` is contiguous and float32."""
        from .triton_kernels import bias_gradient, bias_gradient_sum

        cut = self.cut('bias')
        steps = cut['STEPS']
        scores = cut['BLOCK_M'] * cut['ROWS'] * cut['COLUMNS']
        _, programs = self._share('bias', steps)
        partial = torch.empty(programs, self.heads * steps * scores, dtype=torch.float32, device=log_sum.device)
        tensors = dict(log_sum=log_sum, delta=delta, partial=partial)
        yield self._launch(bias_gradient, 'bias', cut, steps, **tensors)
        given = {**self.arguments, **cut, 'BLOCK_E': next_power_of_2(2 * self.kernel_size[1] - 1)}
        rows = self.heads * (2 * self.kernel_size[0] - 1)
        tensors = dict(partial=partial.sum(0), d_bias=d_bias)
        yield Launch.of(bias_gradient_sum, rows, self.blocks['bias'], {**given, **tensors})


@torch.library.custom_op('zoo::neighborhood_attention_triton', mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp in base 2 of each query's scores (batch, heads, height, width) for the backward."""
    output, log_sum = launch.empty_results(query)
    call = Call(dict(query=query, key=key, value=value), bias, kernel_size, dilation, scale)
    call.forward(output, log_sum).run()
    return output, log_sum


@_forward.register_fake
def _(query, key, value, bias, kernel_size, dilation, scale):
    return launch.empty_results(query)


@torch.library.custom_op('zoo::neighborhood_attention_triton_backward', mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias; empty where not `needed`, but that of query, which comes with delta."""
    of_query, of_key, of_value, of_bias = needed
    d_query, d_key, d_value, d_bias = _empty_gradients(query, bias, needed)
    call = Call(dict(query=query, key=key, value=value, grad=grad), bias, kernel_size, dilation, scale)
    delta = torch.empty_like(log_sum) if of_query or of_key or of_bias else None
    if delta is not None:
        call.query_gradient(output, log_sum, delta, d_query).run()
    if of_key or of_value:
        call.key_gradient(log_sum, delta, d_key if of_key else None, d_value if of_value else None).run()
    if of_bias:
        total = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for each in call.bias_gradient(log_sum, delta, total):
            each.run()
        d_bias.copy_(total)
    return d_query, d_key, d_value, d_bias


@_backward.register_fake
def _(grad, query, key, value, bias, output, log_sum, kernel_size, dilation, scale, needed):
    return _empty_gradients(query, bias, needed)


def _empty_gradients(query: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> tuple[Tensor, ...]:
    of_query, of_key, of_value, of_bias = needed
    wanted = of_query or of_key or of_bias, of_key, of_value, of_bias
    return tuple(
        torch.empty(like.shape if want else 0, dtype=like.dtype, device=like.device)
        for like, want in zip((query, query, query, query if bias is None else bias), wanted, strict=True)
    )


def _save(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.dilation, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad, _):
    needed = list(ctx.needs_input_grad[:4])
    gradients = _backward(grad, *ctx.saved_tensors, ctx.kernel_size, ctx.dilation, ctx.scale, needed)
    return *(d if need else None for d, need in zip(gradients, needed, strict=True)), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Tensor:
    """(batch, height, width, heads, head_dim) -> same, contiguous; bias (heads, 2 * kh - 1, 2 * kw - 1).

    One custom operator, with a backward of its own; kept are the arguments, the output, and a float32 a query and head.
    """
    return _forward(query, key, value, bias, kernel_size, dilation, scale)[0]


def problems(row: dict) -> Iterator[tuple[str, dict[str, object]]]:
    """(name, arguments of `launches`) of the greatest problems that a row of the table is for.

    In half precision one of a head_dim that has to be padded is among them.
    """
    match = row['match']
    arithmetic, head_dim = match['arithmetic'], match.get('head_dim', launch.HEAD_DIM)
    size = match.get('height', 57), match.get('width', 57)
    kernel_size = tuple(min(match.get('kernel_size', KERNEL_SIZE), n - 1 + n % 2) for n in size)
    kinds = [(torch.float32, head_dim)]
    if arithmetic == 'half':
        kinds = [(torch.bfloat16, head_dim), (torch.bfloat16, head_dim * 3 // 4), (torch.float16, head_dim)]
    for dtype, head_dim in kinds:
        name = str(dtype).removeprefix('torch.') if arithmetic == 'half' else arithmetic
        name = f'{name} {"x".join(map(str, size))} kernel {"x".join(map(str, kernel_size))} head_dim {head_dim}'
        yield name, dict(size=size, kernel_size=kernel_size, head_dim=head_dim, dtype=dtype, arithmetic=arithmetic)


def launches(
    blocks: dict[str, Block],
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    arithmetic: str,
    device: str = 'meta',
    batch: int = 2,
    heads: int = 2,
) -> dict[str, list[Launch]]:
    """{block: launches that it cuts} of a forward and backward with everything, in the order in which they run."""
    query, key, value = torch.randn(batch, *size, 3, heads, head_dim, dtype=dtype, device=device).unbind(3)
    bias = torch.randn(heads, *(2 * n - 1 for n in kernel_size), device=device)
    output, log_sum = launch.empty_results(query)
    tensors = dict(query=query, key=key, value=value, grad=torch.randn_like(output))
    call = Call(tensors, bias, kernel_size, (1, 1), head_dim**-0.5, blocks, arithmetic)
    delta, d_query, d_key, d_value = torch.empty_like(log_sum), *(torch.empty_like(output) for _ in range(3))
    return {
        'forward': [call.forward(output, log_sum)],
        'query': [call.query_gradient(output, log_sum, delta, d_query)],
        'key': [call.key_gradient(log_sum, delta, d_key, d_value)],
        'bias': list(call.bias_gradient(log_sum, delta, torch.empty_like(bias))),
    }


def tiles(row: dict) -> list[tuple[int, int]]:
    """Tiles of 64 or 128 positions, or fewer, to try for a row of the table."""
    match = row['match']
    if match.get('height') == 1:
        return [(1, 20), (1, 52)]
    side = match.get('kernel_size', 7) // 2 + 1
    heights = range(side, 128 // side + 1)
    if 'width' in match:
        return [(height, match['width']) for height in (4, 8, 16) if height in heights]
    return [(height, size // height) for size in (64, 128) for height in heights if size // height >= side]
