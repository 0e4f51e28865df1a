"""Aggregated attention as fused Triton kernels, forward and backward, for GPUs.

One online softmax over the pixels around a tile of queries, of which each sees its window, and the pooled keys, by
products of matrices, with the log-sum-exp of each query kept for the backward. No window is unfolded, nothing of the
size of the scores is stored, and nothing is added atomically: two runs give the same bits. triton is imported when a
kernel is first launched. README.md has the derivation.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .. import configs, launch
from ..dispatch import Problem, Verdict, impossible
from ..launch import Block, Launch, next_power_of_2

CONFIGS = Path(__file__).with_name('configs.json')
WINDOW_SIZE = 7  # the greatest
MAPS, POOLED = ('query', 'key', 'value'), ('pooled_key', 'pooled_value')
PARAMETERS = ('query_embedding', 'temperature', 'local_bias', 'pooled_bias', 'learnable_tokens', 'learnable_bias')
FLOATING = (*MAPS, *POOLED, *PARAMETERS)
# Parameters whose gradients are sums over all queries, by the kernel that makes them.
OF_LEARNABLE, OF_PARAMETERS = {'learnable_tokens', 'learnable_bias'}, {'query_embedding', 'temperature', 'local_bias'}
BLOCK_P = 32  # pooled keys of a program that only measures or sums them
BLOCK_R, BLOCK_T = 8, 128  # pairs of rows, and columns of the table of biases, of a program that only sums them
IMAGES = 8  # that a program goes through, where there are so many
SCORES = 2**24  # gradients of scores, sums over images, that are kept at a time


def judge(problem: Problem) -> Verdict:
    window_size = problem.options.get('window_size', 1)
    if window_size > WINDOW_SIZE:
        return impossible(f'it takes windows up to {WINDOW_SIZE}, not {window_size}')
    return launch.judge(problem)


@lru_cache(maxsize=1024)
def _blocks(window_size: int, head_dim: int, arithmetic: str, device: torch.device) -> dict[str, Block]:
    problem = dict(window_size=window_size, head_dim=head_dim, arithmetic=arithmetic)
    return configs.find(CONFIGS, launch.target(device), **problem)


def _by_place(index: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Flat positions in `index`, sorted by the place that they hold, and where those of each place begin and end."""
    held, positions = index.flatten().sort(stable=True)
    return positions, torch.searchsorted(held, torch.arange(places + 1, device=index.device))


class Call:
    """One call: the arguments that its kernels share, by name, and the launch of each kernel.

    Args:
        tensors: the floating inputs and both indices; in a backward grad too.
        blocks: how the kernels are cut; from the table when None.
        arithmetic: see launch.arithmetic; by the dtype and PyTorch's settings when None.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        window_size: int,
        blocks: dict[str, Block] | None = None,
        arithmetic: str | None = None,
    ):
        query = tensors['query']
        self.batch, self.height, self.width, self.heads, head_dim = query.shape
        self.device, self.window_size = query.device, window_size
        self.pooled = tensors['row_index'].shape[1], tensors['column_index'].shape[1]
        self.table = tensors['pooled_bias'].shape[1:]
        arithmetic = arithmetic or launch.arithmetic(query.dtype)
        listed = 'half' if launch.INTERPRETED else arithmetic  # the interpreter takes its time by the step
        self.blocks = blocks or _blocks(window_size, head_dim, listed, query.device)
        maps = {name: x for name, x in tensors.items() if name in (*MAPS, 'grad')}
        pooled = {name: tensors[name] for name in POOLED}
        self.index = tensors['row_index'], tensors['column_index']
        if self.table.numel() >= 2**31:
            raise ValueError(f'pooled_bias may have fewer than 2 ** 31 entries a head, got {tuple(self.table)}')
        strides = {**launch.strides('byxhd', **maps), **launch.strides('bphd', **pooled)}
        starts = (n for name, n in strides.items() if not name.endswith('_d'))
        self.arguments = {
            **maps,
            **pooled,
            **{name: tensors[name].contiguous() for name in PARAMETERS},
            'row_places': (self.index[0] * self.table[1]).int(),
            'column_places': self.index[1].int().contiguous(),
            **strides,
            'height': self.height,
            'width': self.width,
            'heads': self.heads,
            'pooled_height': self.pooled[0],
            'pooled_width': self.pooled[1],
            'table_y': self.table[0],
            'table_x': self.table[1],
            'WINDOW': window_size,
            'CELLS': max(16, next_power_of_2(window_size**2)),
            'HEAD_DIM': head_dim,
            'BLOCK_D': max(16, next_power_of_2(head_dim)),
            'BLOCK_P': BLOCK_P,
            'BLOCK_R': BLOCK_R,
            'BLOCK_T': BLOCK_T,
            'ALIGN': math.gcd(16, *starts),
            'UPCAST': launch.INTERPRETED and query.dtype == torch.bfloat16,
            'PRECISION': 'tf32' if arithmetic == 'tf32' else 'ieee',
        }

    def cut(self, name: str) -> dict[str, int]:
        """How kernel `name` is cut."""
        tile_y, tile_x = self.blocks[name].tile
        step = self.blocks[name].step
        rows, columns = (next_power_of_2(n) for n in self.pooled)
        columns = min(columns, step)
        rows = max(16 // columns, min(step // columns, rows))
        halo_y, halo_x = tile_y + self.window_size - 1, tile_x + self.window_size - 1
        return {
            'TILE_Y': tile_y,
            'TILE_X': tile_x,
            'BLOCK_M': max(16, next_power_of_2(tile_y * tile_x)),
            'HALO_Y': halo_y,
            'HALO_X': halo_x,
            'NEAR': max(16, min(step, next_power_of_2(halo_y * halo_x))),
            'COLUMNS': columns,
            'ROWS': rows,
            'WHOLE': step >= halo_y * halo_x,
            'ONE_STEP': rows >= self.pooled[0] and columns >= self.pooled[1],
        }

    def tiles(self, name: str) -> int:
        """Tiles of an image."""
        tile_y, tile_x = self.blocks[name].tile
        return -(-self.height // tile_y) * -(-self.width // tile_x)

    def parts(self, programs: int, most: int) -> int:
        """Among how many programs the work of each of `programs` is divided, up to `most`, to keep the device busy."""
        return max(1, min(most, launch.programs(self.device) // max(programs, 1)))

    def over_images(self, name: str) -> tuple[int, int]:
        """How many programs have a tile and head each, and among how many of them the images of one are divided."""
        programs = self.tiles(name) * self.heads
        parts = max(self.parts(programs, self.batch), -(-self.batch // IMAGES))
        return programs * parts, parts

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _launch(self, kernel, block: str, programs: int, **arguments) -> Launch:
        return Launch.of(kernel, programs, self.blocks[block], {**self.arguments, **self.cut(block), **arguments})

    def measure(self) -> Launch:
        """Makes the two numbers of each pooled key, and that of each pixel, that the kernels after it read."""
        from .triton_kernels import measure

        pooled = self.pooled[0] * self.pooled[1]
        self.arguments |= {name: self.new(self.batch, self.heads, pooled) for name in ('inverse', 'along')}
        self.arguments['lengths'] = self.new(self.height, self.width)
        programs = self.batch * self.heads * -(-pooled // BLOCK_P) + -(-self.height * self.width // BLOCK_T)
        return self._launch(measure, 'forward', programs)

    def forward(self, output: Tensor, log_sum: Tensor) -> Launch:
        from .triton_kernels import forward

        programs, parts = self.over_images('forward')
        tensors = dict(output=output, log_sum=log_sum, batch=self.batch, parts=parts)
        return self._launch(forward, 'forward', programs, **tensors)

    def learnable_gradient(self, output: Tensor, delta: Tensor, summed: bool) -> tuple[Launch, Tensor | None]:
        """Fills `delta`, which the kernels after it read; and (heads, parts, cells, BLOCK_D + 1), if `summed`.

        The latter are of learnable_tokens and learnable_bias, to be summed over the parts.
        """
        from .triton_kernels import learnable_gradient

        programs, parts = self.over_images('learnable')
        shape = programs // self.heads, self.window_size**2, self.arguments['BLOCK_D'] + 1
        sums = self.new(self.heads, *shape) if summed else None
        tensors = dict(output=output, delta=delta, d_learnable=sums, batch=self.batch, parts=parts)
        return self._launch(learnable_gradient, 'learnable', programs, **tensors), sums

    def query_gradient(
        self, log_sum: Tensor, delta: Tensor, d_query: Tensor, summed: bool
    ) -> tuple[Launch, Tensor | None]:
        """Fills `d_query`; and (heads, parts, BLOCK_D + CELLS + 1), if `summed`.

        The latter are of query_embedding, local_bias and temperature, to be summed over the parts.
        """
        from .triton_kernels import query_gradient

        programs, parts = self.over_images('query')
        length = self.arguments['BLOCK_D'] + self.arguments['CELLS'] + 1
        sums = self.new(self.heads, programs // self.heads, length) if summed else None
        tensors = dict(log_sum=log_sum, delta=delta, d_query=d_query, d_parameters=sums, batch=self.batch, parts=parts)
        return self._launch(query_gradient, 'query', programs, **tensors), sums

    def of_sums(self, learnable: Tensor | None, parameters: Tensor | None) -> dict[str, Tensor]:
        """Gradients of parameters by name, from what the two kernels left."""
        head_dim, block, cells = self.arguments['HEAD_DIM'], self.arguments['BLOCK_D'], self.window_size**2
        found = {}
        if learnable is not None:
            total = learnable.sum(1)
            found |= dict(learnable_tokens=total[..., :head_dim].mT, learnable_bias=total[..., block])
        if parameters is not None:
            total = parameters.sum(1)
            local_bias = total[:, block : block + cells]
            found |= dict(query_embedding=total[:, :head_dim], local_bias=local_bias, temperature=total[:, -1])
        return found

    def key_gradient(
        self, log_sum: Tensor, delta: Tensor | None, d_key: Tensor | None, d_value: Tensor | None
    ) -> Launch:
        from .triton_kernels import key_gradient

        programs, parts = self.over_images('key')
        tensors = dict(log_sum=log_sum, delta=delta, d_key=d_key, d_value=d_value, batch=self.batch, parts=parts)
        return self._launch(key_gradient, 'key', programs, **tensors)

    def pooled_gradient(
        self, log_sum: Tensor, delta: Tensor | None, d_pooled_key: Tensor | None, d_pooled_value: Tensor | None
    ) -> Iterator[Launch]:
        """Two launches."""
        from .triton_kernels import pooled_gradient, pooled_gradient_sum

        cut, pooled = self.cut('pooled'), self.pooled[0] * self.pooled[1]
        programs = self.batch * self.heads * -(-self.pooled[0] // cut['ROWS']) * -(-self.pooled[1] // cut['COLUMNS'])
        parts = self.parts(programs, self.tiles('pooled'))
        d_keys, d_values = (
            None if x is None else self.new(self.batch, parts, pooled, self.heads, self.arguments['HEAD_DIM'])
            for x in (d_pooled_key, d_pooled_value)
        )
        tensors = dict(log_sum=log_sum, delta=delta, d_keys=d_keys, d_values=d_values, parts=parts)
        yield self._launch(pooled_gradient, 'pooled', programs * parts, **tensors)
        tensors |= dict(d_pooled_key=d_pooled_key, d_pooled_value=d_pooled_value)
        yield self._launch(pooled_gradient_sum, 'pooled', self.batch * self.heads * -(-pooled // BLOCK_P), **tensors)

    def bias_gradient(self, log_sum: Tensor, delta: Tensor, d_bias: Tensor) -> Iterator[Launch]:
        """Two launches a band of rows of the map. `d_bias` is contiguous and float32."""
        from .triton_kernels import bias_gradient, bias_gradient_sum

        cut, tile_y, (rows, columns) = self.cut('bias'), self.blocks['bias'].tile[0], self.table
        pooled = self.pooled[0] * self.pooled[1]
        steps = self.heads * -(-self.pooled[0] // cut['ROWS']) * -(-self.pooled[1] // cut['COLUMNS'])
        parts = self.parts(self.tiles('bias') * steps, self.batch)
        band = max(1, SCORES // (self.heads * parts * tile_y * self.width * pooled)) * tile_y
        d_scores = self.new(self.heads, parts, min(band, self.height), self.width, pooled)
        tensors = dict(log_sum=log_sum, delta=delta, d_scores=d_scores, d_bias=d_bias, batch=self.batch, parts=parts)
        for axis, index, places in zip(('row', 'column'), self.index, self.table, strict=True):
            tensors[f'{axis}_pairs'], tensors[f'{axis}_starts'] = _by_place(index, places)
        for first in range(0, self.height, band):
            tensors |= dict(first_row=first, last_row=min(first + band, self.height))
            tiles = -(-(tensors['last_row'] - first) // tile_y) * -(-self.width // self.blocks['bias'].tile[1])
            yield self._launch(bias_gradient, 'bias', tiles * steps * parts, **tensors)
            yield self._launch(bias_gradient_sum, 'bias', self.heads * rows * -(-columns // BLOCK_T), **tensors)


@torch.library.custom_op('zoo::aggregated_attention_triton', mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pooled_bias: Tensor,
    row_index: Tensor,
    column_index: Tensor,
    learnable_tokens: Tensor,
    learnable_bias: Tensor,
    window_size: int,
) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp in base 2 of each query's scores (batch, heads, height, width) for the backward."""
    output, log_sum = launch.empty_results(query)
    tensors = dict(
        query=query,
        key=key,
        value=value,
        pooled_key=pooled_key,
        pooled_value=pooled_value,
        query_embedding=query_embedding,
        temperature=temperature,
        local_bias=local_bias,
        pooled_bias=pooled_bias,
        row_index=row_index,
        column_index=column_index,
        learnable_tokens=learnable_tokens,
        learnable_bias=learnable_bias,
    )
    call = Call(tensors, window_size)
    call.measure().run()
    call.forward(output, log_sum).run()
    return output, log_sum


@_forward.register_fake
def _(query, *arguments):
    return launch.empty_results(query)


@torch.library.custom_op('zoo::aggregated_attention_triton_backward', mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pooled_bias: Tensor,
    row_index: Tensor,
    column_index: Tensor,
    learnable_tokens: Tensor,
    learnable_bias: Tensor,
    output: Tensor,
    log_sum: Tensor,
    window_size: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the floating inputs, as FLOATING; empty where not `needed`."""
    tensors = dict(
        query=query,
        key=key,
        value=value,
        pooled_key=pooled_key,
        pooled_value=pooled_value,
        query_embedding=query_embedding,
        temperature=temperature,
        local_bias=local_bias,
        pooled_bias=pooled_bias,
        learnable_tokens=learnable_tokens,
        learnable_bias=learnable_bias,
    )
    gradients = _empty_gradients(tensors.values(), needed)
    wanted = {name: d for name, d, need in zip(FLOATING, gradients, needed, strict=True) if need}
    call = Call({**tensors, 'row_index': row_index, 'column_index': column_index, 'grad': grad}, window_size)
    call.measure().run()
    delta = learnable = parameters = None
    if wanted.keys() - {'value', 'pooled_value'}:
        delta = torch.empty_like(log_sum)
        launched, learnable = call.learnable_gradient(output, delta, bool(wanted.keys() & OF_LEARNABLE))
        launched.run()
    if wanted.keys() & {'query', *OF_PARAMETERS}:
        d_query = wanted['query'] if 'query' in wanted else torch.empty_like(output)
        launched, parameters = call.query_gradient(log_sum, delta, d_query, bool(wanted.keys() & OF_PARAMETERS))
        launched.run()
    for name, gradient in call.of_sums(learnable, parameters).items():
        if name in wanted:
            wanted[name].copy_(gradient)
    if wanted.keys() & {'key', 'value'}:
        call.key_gradient(log_sum, delta, wanted.get('key'), wanted.get('value')).run()
    if wanted.keys() & set(POOLED):
        for each in call.pooled_gradient(log_sum, delta, wanted.get('pooled_key'), wanted.get('pooled_value')):
            each.run()
    if 'pooled_bias' in wanted:
        d_bias = call.new(*pooled_bias.shape)
        for each in call.bias_gradient(log_sum, delta, d_bias):
            each.run()
        wanted['pooled_bias'].copy_(d_bias)
    return gradients


@_backward.register_fake
def _(grad, *arguments):
    *tensors, tokens, bias, _, _, _, needed = arguments
    return _empty_gradients((*tensors[:-2], tokens, bias), needed)


def _empty_gradients(tensors: Iterable[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty(like.shape if need else 0, dtype=like.dtype, device=like.device)
        for like, need in zip(tensors, needed, strict=True)
    ]


def _save(ctx, inputs, output):
    *tensors, ctx.window_size = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad, _):
    *needed, _, _, of_tokens, of_bias, _ = ctx.needs_input_grad
    needed += [of_tokens, of_bias]
    gradients = _backward(grad, *ctx.saved_tensors, ctx.window_size, needed)
    *gradients, tokens, bias = (d if need else None for d, need in zip(gradients, needed, strict=True))
    return *gradients, None, None, tokens, bias, None


_forward.register_autograd(_differentiate, setup_context=_save)


def aggregated_attention(*arguments) -> Tensor:
    """The arguments and the result of `reference.aggregated_attention`.

    One custom operator, with a backward of its own; kept are the arguments, the output, and a float32 a query and head.
    """
    return _forward(*arguments)[0]


def problems(row: dict) -> Iterator[tuple[str, dict[str, object]]]:
    """(name, arguments of `launches`) of the greatest problems that a row of the table is for.

    In half precision one of a head_dim that has to be padded is among them.
    """
    arithmetic, head_dim, window_size = (row['match'][name] for name in ('arithmetic', 'head_dim', 'window_size'))
    kinds = [(torch.float32, head_dim, 64, 16)]
    if arithmetic == 'half':
        kinds = [(torch.bfloat16, head_dim * 3 // 4, 56, 7), (torch.float16, head_dim, 64, 16)]
    for dtype, head_dim, size, pooled in kinds:
        name = str(dtype).removeprefix('torch.') if arithmetic == 'half' else arithmetic
        name = f'{name} {size}x{size} pooled {pooled}x{pooled} window {window_size}x{window_size} head_dim {head_dim}'
        problem = dict(size=size, pooled=pooled, window_size=window_size, head_dim=head_dim)
        yield name, dict(problem, dtype=dtype, arithmetic=arithmetic)


def launches(
    blocks: dict[str, Block],
    size: int,
    pooled: int,
    window_size: int,
    head_dim: int,
    dtype: torch.dtype,
    arithmetic: str,
    device: str = 'meta',
    batch: int = 2,
    heads: int = 2,
) -> dict[str, list[Launch]]:
    """{block: launches that it cuts} of a forward and backward with everything, in the order in which they run.

    The map is `size` x `size` and the pooled one `pooled` x `pooled`; biases are of relative positions.
    """
    query = torch.randn(batch, size, size, heads, head_dim, dtype=dtype, device=device)
    key, value = torch.randn(batch, size, size, 2, heads, head_dim, dtype=dtype, device=device).unbind(3)
    pooled_key, pooled_value = torch.randn(batch, pooled**2, 2, heads, head_dim, dtype=dtype, device=device).unbind(2)
    cell, cells = size // pooled, window_size**2
    index = torch.arange(size, device=device)[:, None] + torch.arange(size - cell, -1, -cell, device=device)
    output, log_sum = launch.empty_results(query)
    tensors = dict(
        query=query,
        key=key,
        value=value,
        pooled_key=pooled_key,
        pooled_value=pooled_value,
        query_embedding=torch.randn(heads, head_dim, device=device),
        temperature=torch.ones(heads, device=device),
        local_bias=torch.randn(heads, cells, device=device),
        pooled_bias=torch.randn(heads, 2 * size - cell, 2 * size - cell, device=device),
        row_index=index,
        column_index=index,
        learnable_tokens=torch.randn(heads, head_dim, cells, device=device),
        learnable_bias=torch.randn(heads, cells, device=device),
        grad=torch.randn_like(output),
    )
    call = Call(tensors, window_size, blocks, arithmetic)
    delta, d_query, d_key, d_value = torch.empty_like(log_sum), *(torch.empty_like(output) for _ in range(3))
    d_pooled_key, d_pooled_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (pooled_key, pooled_value)
    )
    return {
        'forward': [call.measure(), call.forward(output, log_sum)],
        'learnable': [call.learnable_gradient(output, delta, True)[0]],
        'query': [call.query_gradient(log_sum, delta, d_query, True)[0]],
        'key': [call.key_gradient(log_sum, delta, d_key, d_value)],
        'pooled': list(call.pooled_gradient(log_sum, delta, d_pooled_key, d_pooled_value)),
        'bias': list(call.bias_gradient(log_sum, delta, torch.empty_like(tensors['pooled_bias']))),
    }


def tiles(row: dict) -> list[tuple[int, int]]:
    """Tiles of 32, 64 or 128 pixels to try for a row of the table."""
    return [(size // width, width) for size in (32, 64, 128) for width in (4, 8, 16, 32) if width < size]
