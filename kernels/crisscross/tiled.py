"""Criss-cross attention line by line, on any device, with an explicit backward.

The rows of a map are dense problems, and so are its columns, of which some are computed at a time. One softmax over
both is made of two passes by the logarithm of its denominator, which is all that is kept beside inputs and output.
README.md explains more.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..window.tiled import boxes, compute_dtype

CPU_CHUNK = 2**18  # numbers of one input, or scores, that are worked on at a time: 1 MiB of float32
CHUNK = 2**26  # elsewhere, where calls must be few


def crisscross_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(batch, height, width, heads, head_dim) -> (batch, height, width, heads, head_dim of value), contiguous."""
    return forward(query, key, value, scale)[0]


@torch.library.custom_op('zoo::crisscross_attention', mutates_args=())
def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output, and of each query the logarithm of the sum of its exponential scores, (batch, height, width, heads)."""
    output, log_sums = empty_results(query, value)
    total = torch.zeros(output.shape, dtype=log_sums.dtype, device=output.device)
    log_sums.fill_(-torch.inf)
    with torch.autocast(query.device.type, enabled=False):
        for lines in axes(query, value):
            total_map, sums_map = lines.view(total), lines.view(log_sums[..., None])
            for chunk in lines.chunks():
                q, k, v, o, before = (lines.load(x, chunk) for x in (query, key, value, total, log_sums[..., None]))
                scores = lines.scores(q, k, scale)
                after = torch.logaddexp(before, scores.logsumexp(-1, keepdim=True))
                p = scores.sub_(after).exp_()
                lines.store(total_map[chunk], torch.baddbmm(o * (before - after).exp_(), p, v))
                lines.store(sums_map[chunk], after)
        output.copy_(total)
    return output, log_sums


@torch.library.custom_op('zoo::crisscross_attention_backward', mutates_args=())
def backward(
    grad_output: Tensor, output: Tensor, log_sums: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    dtype = log_sums.dtype
    totals = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        mean = (grad_output.to(dtype) * output).sum(-1, keepdim=True)  # of the weights' gradients, by the weights
        for lines in axes(query, value):
            grad_maps = [lines.view(x) for x in totals]
            for chunk in lines.chunks():
                inputs = query, key, value, grad_output, log_sums[..., None], mean
                q, k, v, g, log_sum, mean_line = (lines.load(x, chunk) for x in inputs)
                p = lines.scores(q, k, scale).sub_(log_sum).exp_()
                ds = torch.bmm(g, v.mT).sub_(mean_line).mul_(p).mul_(scale)
                for grad_map, x in zip(grad_maps, (ds @ k, ds.mT @ q, p.mT @ g), strict=True):
                    part = grad_map[chunk]
                    part.add_(x.view(part.shape))
        return tuple(total.to(x.dtype) for total, x in zip(totals, (query, key, value), strict=True))


def empty_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    output = torch.empty(value.shape, dtype=query.dtype, device=query.device)
    return output, torch.empty(query.shape[:-1], dtype=compute_dtype(query), device=query.device)


class Lines:
    """The rows of a map, or its columns, whose pixels are no keys of their own.

    A view of a map by lines is (batch, lines, heads, pixels, head_dim). Chunks are indices of its first dimensions.
    """

    def __init__(self, query: Tensor, value: Tensor, is_rows: bool):
        self.is_rows = is_rows
        self.dtype = compute_dtype(query)
        self.shape, (self.pixels, head_dim) = self.view(query).shape[:3], self.view(query).shape[3:]
        limit = CPU_CHUNK if query.device.type == 'cpu' else CHUNK
        self.lines_of_chunk = limit // (self.pixels * max(self.pixels, head_dim, value.shape[-1]))

    def view(self, x: Tensor) -> Tensor:
        return x.permute(0, 1, 3, 2, 4) if self.is_rows else x.permute(0, 2, 3, 1, 4)

    def chunks(self) -> Iterator[tuple[slice, ...]]:
        return boxes(self.shape, self.lines_of_chunk)

    def load(self, x: Tensor, chunk: Sequence[slice]) -> Tensor:
        """(lines and heads, pixels, head_dim); copied only if it must be."""
        x = self.view(x)[chunk]
        return x.to(self.dtype).reshape(-1, *x.shape[-2:])

    def store(self, out: Tensor, x: Tensor) -> None:
        out.copy_(x.view(out.shape))

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=scale)
        if not self.is_rows:
            scores.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        return scores


def axes(query: Tensor, value: Tensor) -> Iterator[Lines]:
    if query.numel():
        yield Lines(query, value, is_rows=True)
        yield Lines(query, value, is_rows=False)


@forward.register_fake
def _(query, key, value, scale):
    return empty_results(query, value)


@backward.register_fake
def _(grad_output, output, log_sums, query, key, value, scale):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad_output, _):
    return *backward(grad_output, *ctx.saved_tensors, ctx.scale), None


forward.register_autograd(_backward, setup_context=_setup_context)
