"""Bi-level routing attention as fused Triton kernels, forward and backward, for GPUs.

Keys are read where they lie in the map, region by region as the routes list them, into an online softmax; the
log-sum-exp of each query is kept for the backward, which collects the gradients of a region's keys from the regions
that listed it. Nothing is gathered, nothing is added atomically: two runs give the same bits. triton is imported when
a kernel is first launched. README.md has the derivation.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import configs, launch
from ..dispatch import Problem, Verdict
from ..launch import Block, Launch, next_power_of_2

CONFIGS = Path(__file__).with_name('configs.json')
BUSY = 4  # times the programs that keep a device busy, before one takes several heads
SMALL = 16  # pixels of a region that the smallest product of matrices holds


def judge(problem: Problem) -> Verdict:
    return launch.judge(problem)


class Inverse(NamedTuple):
    """The regions that listed each region, as lists cut into pieces of at most `length` regions.

    The results of a list of one piece are written where they belong; those of a list of more into slots, to be summed.
    All tensors are int32, (batch, 1 or heads, ...).
    """

    length: int
    listers: Tensor  # (..., regions * topk): all lists, one behind the other
    first_lister: Tensor  # (..., regions + 1): where each list starts
    first_piece: Tensor  # (..., regions + 1)
    region_of_piece: Tensor  # (..., pieces): `regions` where there is no such piece
    slots: int

    @classmethod
    def of(cls, region_index: Tensor) -> 'Inverse':
        """Of routes (batch, 1 or heads, regions, topk), on their device, without waiting for it.

        A list has topk regions in the mean and a piece twice as many at most: half as many pieces as there are regions
        come to one for each, and no more than twice these belong to lists of several.
        """
        *_, regions, topk = region_index.shape
        length, more = 2 * topk, regions // 2
        listed, order = region_index.flatten(2).int().sort(dim=-1, stable=True)
        first_lister = torch.searchsorted(listed, _counting(listed, regions + 1), out_int32=True)
        pieces = (first_lister.diff().clamp(min=1) + length - 1) // length
        ends = pieces.cumsum(-1, dtype=torch.int32)
        region_of_piece = torch.searchsorted(ends, _counting(ends, regions + more), right=True, out_int32=True)
        return cls(length, (order // topk).int(), first_lister, F.pad(ends, (1, 0)), region_of_piece, 2 * more)


def _counting(like: Tensor, count: int) -> Tensor:
    """0 to count - 1 in each row of `like`."""
    numbers = torch.arange(count, dtype=like.dtype, device=like.device)
    return numbers.expand(*like.shape[:-1], count).contiguous()


@lru_cache(maxsize=1024)
def _blocks(pixels: int, head_dim: int, arithmetic: str, device: torch.device) -> dict[str, Block]:
    target = launch.target(device)
    return configs.find(CONFIGS, target, arithmetic=arithmetic, head_dim=head_dim, pixels=pixels)


class Call:
    """One call: the arguments that its kernels share, by name, and the launch of each kernel.

    Args:
        tensors: query, key and value; in a backward grad too.
        region_index: (batch, 1 or heads, regions, topk).
        blocks: how the kernels are cut; from the table when None.
        arithmetic: see launch.arithmetic; by the dtype and PyTorch's settings when None.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        region_index: Tensor,
        region_size: tuple[int, int],
        scale: float,
        mask_padding: bool,
        blocks: dict[str, Block] | None = None,
        arithmetic: str | None = None,
    ):
        query = tensors['query']
        self.batch, height, width, self.heads, self.head_dim = query.shape
        self.region_index = region_index
        *_, self.regions, self.topk = region_index.shape
        self.pixels = region_size[0] * region_size[1]
        arithmetic = arithmetic or launch.arithmetic(query.dtype)
        listed = 'half' if launch.INTERPRETED else arithmetic  # the interpreter takes its time by the step
        self.blocks = blocks or _blocks(self.pixels, self.head_dim, listed, query.device)
        routes = region_index.expand(-1, self.heads, -1, -1)
        self.arguments = {
            **tensors,
            **launch.strides('byxhd', **tensors),
            'routes': routes,
            **launch.strides('bhrk', routes=routes),
            'height': height,
            'width': width,
            'heads': self.heads,
            'rows': region_size[0],
            'columns': region_size[1],
            'topk': self.topk,
            'scale': scale,
            'MASK_PADDING': mask_padding,
            'HEAD_DIM': self.head_dim,
            'BLOCK_D': max(16, next_power_of_2(self.head_dim)),
            'UPCAST': launch.INTERPRETED and query.dtype == torch.bfloat16,
            'PRECISION': 'tf32' if arithmetic == 'tf32' else 'ieee',
        }

    def _launch(self, kernel, block: str, lists: int, listed: int = 1, together: bool = False, **arguments) -> Launch:
        """Of a program for each tile of a region, each of an image's `lists` of `listed` regions, and each head.

        Where routes are shared, one may go through heads `together`: as many as leave the device busy.
        """
        pixels, tile = self.pixels, self.blocks[block].tile[0] * self.blocks[block].tile[1]
        block_m = max(16, min(next_power_of_2(tile), next_power_of_2(pixels)))
        block_n = max(16, min(self.blocks[block].step, next_power_of_2(listed * pixels)))
        programs = self.batch * lists * -(-pixels // block_m)
        parts = self.heads
        if together and self.region_index.shape[1] == 1:
            parts = min(parts, 1 + BUSY * launch.programs(self.region_index.device) // max(programs, 1))
        given = {**self.arguments, 'BLOCK_M': block_m, 'BLOCK_N': block_n, 'parts': parts, **arguments}
        given |= dict(ONE_STEP=listed * pixels <= block_n, WHOLE=listed * pixels % block_n == 0)
        return Launch.of(kernel, programs * parts, self.blocks[block], given)

    def forward(self, output: Tensor, log_sum: Tensor) -> Launch:
        from .triton_kernels import forward

        tensors = dict(output=output, log_sum=log_sum)
        return self._launch(forward, 'forward', self.regions, self.topk, together=True, **tensors)

    def query_gradient(self, output: Tensor, log_sum: Tensor, delta: Tensor, d_query: Tensor) -> Launch:
        """Fills `delta` too, which the kernel after it reads."""
        from .triton_kernels import query_gradient

        tensors = dict(output=output, log_sum=log_sum, delta=delta, d_query=d_query)
        return self._launch(query_gradient, 'query', self.regions, self.topk, together=True, **tensors)

    def key_gradient(
        self, log_sum: Tensor, delta: Tensor | None, d_key: Tensor | None, d_value: Tensor | None
    ) -> Iterator[Launch]:
        """Two launches."""
        from .triton_kernels import key_gradient, key_gradient_sum

        inverse = Inverse.of(self.region_index)
        size = self.batch, self.heads, inverse.slots, self.pixels, self.head_dim
        partial_key, partial_value = (
            None if each is None else torch.empty(size, dtype=torch.float32, device=log_sum.device)
            for each in (d_key, d_value)
        )
        arguments = dict(
            **inverse._asdict(),
            groups=self.region_index.shape[1],
            log_sum=log_sum,
            delta=delta,
            d_key=d_key,
            d_value=d_value,
            partial_key=partial_key,
            partial_value=partial_value,
        )
        pieces = inverse.region_of_piece.shape[-1]
        yield self._launch(key_gradient, 'key', pieces, inverse.length, True, pieces=pieces, **arguments)
        yield self._launch(key_gradient_sum, 'key', self.regions, **arguments)


def _empty_results(query: Tensor, region_index: Tensor, region_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch, _, _, heads, _ = query.shape
    size = batch, heads, region_index.shape[2], region_size[0] * region_size[1]
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(size, dtype=torch.float32, device=query.device),
    )


@torch.library.custom_op('zoo::routing_attention_triton', mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_index: Tensor,
    region_size: Sequence[int],
    scale: float,
    mask_padding: bool,
) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp in base 2 of each query's scores (batch, heads, regions, pixels) for the backward."""
    output, log_sum = _empty_results(query, region_index, region_size)
    call = Call(dict(query=query, key=key, value=value), region_index, tuple(region_size), scale, mask_padding)
    call.forward(output, log_sum).run()
    return output, log_sum


@_forward.register_fake
def _(query, key, value, region_index, region_size, scale, mask_padding):
    return _empty_results(query, region_index, region_size)


@torch.library.custom_op('zoo::routing_attention_triton_backward', mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_index: Tensor,
    output: Tensor,
    log_sum: Tensor,
    region_size: Sequence[int],
    scale: float,
    mask_padding: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; empty where not `needed`, but that of query, which comes with delta."""
    of_query, of_key, of_value = needed
    d_query, d_key, d_value = _empty_gradients(query, needed)
    tensors = dict(query=query, key=key, value=value, grad=grad)
    call = Call(tensors, region_index, tuple(region_size), scale, mask_padding)
    delta = torch.empty_like(log_sum) if of_query or of_key else None
    if delta is not None:
        call.query_gradient(output, log_sum, delta, d_query).run()
    if of_key or of_value:
        for each in call.key_gradient(log_sum, delta, d_key if of_key else None, d_value if of_value else None):
            each.run()
    return d_query, d_key, d_value


@_backward.register_fake
def _(grad, query, key, value, region_index, output, log_sum, region_size, scale, mask_padding, needed):
    return _empty_gradients(query, needed)


def _empty_gradients(query: Tensor, needed: Sequence[bool]) -> tuple[Tensor, ...]:
    of_query, of_key, of_value = needed
    wanted = of_query or of_key, of_key, of_value
    return tuple(torch.empty(query.shape if want else 0, dtype=query.dtype, device=query.device) for want in wanted)


def _save(ctx, inputs, output):
    *tensors, ctx.region_size, ctx.scale, ctx.mask_padding = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad, _):
    needed = list(ctx.needs_input_grad[:3])
    gradients = _backward(grad, *ctx.saved_tensors, ctx.region_size, ctx.scale, ctx.mask_padding, needed)
    return *(d if need else None for d, need in zip(gradients, needed, strict=True)), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_index: Tensor,
    region_size: tuple[int, int],
    scale: float,
    mask_padding: bool,
) -> Tensor:
    """(batch, height, width, heads, head_dim) -> same, contiguous; region_index (batch, 1 or heads, regions, topk).

    One custom operator, with a backward of its own; kept are the arguments, the output, and a float32 a query and head.
    """
    return _forward(query, key, value, region_index, region_size, scale, mask_padding)[0]


def problems(row: dict) -> Iterator[tuple[str, dict[str, object]]]:
    """(name, arguments of `launches`) of the greatest problems that a row of the table is for.

    In half precision one of a head_dim that has to be padded is among them, and one whose keys are one step where those
    of the others are several, or the other way round.
    """
    match = row['match']
    arithmetic, head_dim = match['arithmetic'], match.get('head_dim', launch.HEAD_DIM)
    side = 4 if match.get('pixels') == SMALL else 8
    kinds = [(torch.float32, head_dim, 4)]
    if arithmetic == 'half':
        other = 16 if side == 4 else 1
        kinds = [
            (torch.bfloat16, head_dim, 4),
            (torch.float16, head_dim * 3 // 4, 4),
            (torch.bfloat16, head_dim, other),
        ]
    for dtype, head_dim, topk in kinds:
        name = str(dtype).removeprefix('torch.') if arithmetic == 'half' else arithmetic
        name = f'{name} regions {side}x{side} head_dim {head_dim}' + f' topk {topk}' * (topk != 4)
        yield name, dict(side=side, topk=topk, head_dim=head_dim, dtype=dtype, arithmetic=arithmetic)


def launches(
    blocks: dict[str, Block],
    side: int,
    topk: int,
    head_dim: int,
    dtype: torch.dtype,
    arithmetic: str,
    device: str = 'meta',
    batch: int = 2,
    heads: int = 2,
) -> dict[str, list[Launch]]:
    """{block: launches that it cuts} of a forward and backward of a map of 7x7 regions, each routed to `topk`."""
    query, key, value = torch.randn(batch, 7 * side, 7 * side, 3, heads, head_dim, dtype=dtype, device=device).unbind(3)
    region_index = torch.rand(batch, 1, 49, 49, device=device).topk(topk).indices
    output, log_sum = _empty_results(query, region_index, (side, side))
    tensors = dict(query=query, key=key, value=value, grad=torch.randn_like(output))
    call = Call(tensors, region_index, (side, side), head_dim**-0.5, False, blocks, arithmetic)
    delta, d_query, d_key, d_value = torch.empty_like(log_sum), *(torch.empty_like(output) for _ in range(3))
    return {
        'forward': [call.forward(output, log_sum)],
        'query': [call.query_gradient(output, log_sum, delta, d_query)],
        'key': list(call.key_gradient(log_sum, delta, d_key, d_value)),
    }


def tiles(row: dict) -> list[tuple[int, int]]:
    """Tiles to try for a row of the table: so many pixels of a region, in one row."""
    return [(1, SMALL)] if row['match'].get('pixels') == SMALL else [(1, 32), (1, 64), (1, 128)]
