"""Bi-level routing attention in chunks that stay in cache, on any device, with an explicit backward.

The map is rearranged once so that a region of a head is one contiguous row, whose gather is a copy of memory. The
queries of a region and the keys it is routed to make one small dense problem; as many problems as a cache holds are
gathered and multiplied at a time. The backward recomputes the probabilities, so that nothing is kept but the inputs;
rows of the gradients of keys and values are added where they were gathered from. README.md explains more.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

CPU_CHUNK = 2**19  # numbers of scores, keys and values held at a time: 2 MiB of float32
CHUNK = 2**26  # elsewhere, where calls must be few


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_index: Tensor,
    region_size: tuple[int, int],
    scale: float,
    mask_padding: bool,
) -> Tensor:
    """(batch, height, width, heads, head_dim) -> same, contiguous; region_index (batch, 1 or heads, regions, topk)."""
    return torch.ops.zoo.routing_attention(query, key, value, region_index, *region_size, scale, mask_padding)


@torch.library.custom_op('zoo::routing_attention', mutates_args=())
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_index: Tensor,
    rows: int,
    columns: int,
    scale: float,
    mask_padding: bool = False,
) -> Tensor:
    layout = Layout(query, region_index, rows, columns, mask_padding)
    out = layout.empty()
    with torch.autocast(query.device.type, enabled=False):
        for images in layout.images():
            q = layout.regions(query, images) * scale
            k, v = layout.regions(key, images), layout.regions(value, images)
            o = torch.empty_like(q)
            for part, chosen in layout.problems(images):
                p = layout.softmax(torch.bmm(layout.queries(q)[part], layout.gather(k, chosen).mT), chosen)
                torch.bmm(p, layout.gather(v, chosen), out=layout.queries(o)[part])
            layout.write(out, images, o)
    return layout.crop(out)


@torch.library.custom_op('zoo::routing_attention_backward', mutates_args=())
def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_index: Tensor,
    rows: int,
    columns: int,
    scale: float,
    mask_padding: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = Layout(query, region_index, rows, columns, mask_padding)
    grad_query, grad_key, grad_value = layout.empty(), layout.empty(), layout.empty()
    with torch.autocast(query.device.type, enabled=False):
        for images in layout.images():
            q = layout.regions(query, images) * scale
            k, v, do = (layout.regions(x, images) for x in (key, value, grad_output))
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for part, chosen in layout.problems(images):
                q_part, do_part = layout.queries(q)[part], layout.queries(do)[part]
                k_part = layout.gather(k, chosen)
                p = layout.softmax(torch.bmm(q_part, k_part.mT), chosen)
                layout.scatter_add(dv, chosen, torch.bmm(p.mT, do_part))
                dp = torch.bmm(do_part, layout.gather(v, chosen).mT)
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                torch.bmm(ds, k_part, out=layout.queries(dq)[part])
                layout.scatter_add(dk, chosen, torch.bmm(ds.mT, q_part))
            layout.write(grad_query, images, dq.mul_(scale))
            layout.write(grad_key, images, dk)
            layout.write(grad_value, images, dv)
    return layout.crop(grad_query), layout.crop(grad_key), layout.crop(grad_value)


class Layout:
    """Where regions and their pixels lie, and how the work is cut into chunks."""

    def __init__(self, query: Tensor, region_index: Tensor, rows: int, columns: int, mask_padding: bool):
        self.query = query
        self.batch, self.height, self.width, self.heads, self.head_dim = query.shape
        self.rows, self.columns = rows, columns
        self.padded = self.height + -self.height % rows, self.width + -self.width % columns
        self.grid = self.padded[0] // rows, self.padded[1] // columns
        self.num_regions = self.grid[0] * self.grid[1]
        if region_index.device.type == 'cpu' and region_index.numel():  # elsewhere the check would wait for the device
            low, high = (x.item() for x in region_index.aminmax())
            if low < 0 or high >= self.num_regions:
                raise IndexError(f'routing_attention: region_index holds {low}..{high} of {self.num_regions} regions')
        self.index = region_index.expand(-1, self.heads, -1, -1)  # (batch, heads, regions, topk)
        self.limit = CPU_CHUNK if query.device.type == 'cpu' else CHUNK
        self.padding = None  # (regions, pixels)
        if mask_padding and self.padded != (self.height, self.width):
            outside = query.new_zeros(1, self.height, self.width, 1, 1, dtype=torch.bool)
            self.padding = self.by_region(self.pad(outside, value=True)).reshape(self.num_regions, rows * columns)
        # Where the scores of one region are many, its queries are cut into strips: each is a problem of its own.
        pixels = rows * columns
        keys = region_index.shape[-1] * pixels
        enough = (n for n in range(1, pixels) if pixels % n == 0 and pixels // n * keys <= self.limit)
        self.strips = next(enough, pixels)
        self.chunk = max(1, self.limit // (2 * keys * (self.head_dim + pixels // self.strips)))

    def empty(self) -> Tensor:
        """A map of the padded size, in the layout of the query."""
        return self.query.new_empty(self.batch, *self.padded, self.heads, self.head_dim)

    def crop(self, x: Tensor) -> Tensor:
        return x[:, : self.height, : self.width].contiguous()

    def pad(self, x: Tensor, value: float = 0) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, self.padded[1] - self.width, 0, self.padded[0] - self.height), value=value)

    def images(self) -> Iterator[slice]:
        """The batch in groups of images whose rearranged maps a chunk holds."""
        size = self.padded[0] * self.padded[1] * self.heads * self.head_dim
        step = max(1, self.limit // max(1, size))
        return (slice(i, i + step) for i in range(0, self.batch, step))

    def regions(self, x: Tensor, images: slice) -> Tensor:
        """Images of a map, padded, as contiguous (images, heads, regions, pixels, head_dim) of at least float32."""
        x = self.by_region(self.pad(x[images]))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.contiguous().view(-1, self.heads, self.num_regions, self.rows * self.columns, self.head_dim)

    def write(self, out: Tensor, images: slice, x: Tensor) -> None:
        """The inverse of `regions`."""
        out = self.by_region(out[images])
        out.copy_(x.view(out.shape))

    def by_region(self, x: Tensor) -> Tensor:
        """A view (images, heads, *grid, rows, columns, head_dim) of a padded map."""
        x = x.unflatten(2, (self.grid[1], self.columns)).unflatten(1, (self.grid[0], self.rows))
        return x.permute(0, 5, 1, 3, 2, 4, 6)

    def problems(self, images: slice) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of problems, each with the rows of `regions` that hold the keys of its problems."""
        index = self.index[images]  # (images, heads, regions, topk)
        first = torch.arange(index.shape[0] * self.heads, device=index.device) * self.num_regions
        index = (index + first.view(-1, self.heads, 1, 1)).flatten(0, 2).repeat_interleave(self.strips, 0)
        for start in range(0, len(index), self.chunk):
            part = slice(start, start + self.chunk)
            yield part, index[part]  # (problems, topk)

    def queries(self, x: Tensor) -> Tensor:
        """`regions` by problem: (problems, pixels of a strip, head_dim)."""
        return x.view(-1, self.rows * self.columns // self.strips, self.head_dim)

    def gather(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The chosen rows of `regions`: (problems, topk * pixels, head_dim)."""
        rows = x.view(-1, self.rows * self.columns * self.head_dim)
        return rows.index_select(0, chosen.flatten()).view(len(chosen), -1, self.head_dim)

    def softmax(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """Of (problems, queries, keys), which it may change; a region holds at least one pixel of the map."""
        if self.padding is not None:
            scores.masked_fill_(self.padding[chosen % self.num_regions].flatten(1)[:, None], -torch.inf)
        return torch.softmax(scores, -1)

    def scatter_add(self, x: Tensor, chosen: Tensor, gathered: Tensor) -> None:
        """The transpose of `gather`: adds to the rows of `regions`, in a fixed order on the CPU."""
        rows = x.view(-1, self.rows * self.columns * self.head_dim)
        rows.index_add_(0, chosen.flatten(), gathered.view(chosen.numel(), -1))


@forward.register_fake
def _(query, key, value, region_index, rows, columns, scale, mask_padding=False):
    return query.new_empty(query.shape)


@backward.register_fake
def _(grad_output, query, key, value, region_index, rows, columns, scale, mask_padding=False):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output):
    query, key, value, region_index, *ctx.arguments = inputs
    ctx.save_for_backward(query, key, value, region_index)


def _backward(ctx, grad_output):
    grads = torch.ops.zoo.routing_attention_backward(grad_output, *ctx.saved_tensors, *ctx.arguments)
    return *grads, None, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)
