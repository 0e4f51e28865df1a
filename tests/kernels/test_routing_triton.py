"""Routing attention in Triton: held against the definition, interpreted on the CPU or run on a GPU; compiled."""

from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo.kernels import configs, routing_attention, tune, use
from zoo.kernels.routing import triton

from .harness import assert_close, assert_equal_functions, output_and_gradients, packed, random
from .triton_harness import assert_deterministic, compiled, interpreted, moved

pytest.importorskip('triton')


class Case(NamedTuple):
    """A problem; what it is there for is in the comment beside it."""

    size: tuple[int, int]
    region_size: int | tuple[int, int]
    topk: int
    batch: int = 1
    heads: int = 1
    head_dim: int = 16
    per_head: bool = False
    mask_padding: bool = False
    scale: float | None = None

    @property
    def regions(self) -> int:
        sides = self.region_size if isinstance(self.region_size, tuple) else (self.region_size,) * 2
        return -(-self.size[0] // sides[0]) * -(-self.size[1] // sides[1])


CASES = [
    Case((6, 9), 3, 2, batch=2, heads=2, head_dim=8),  # a tile holds a region, a step several
    Case((4, 6), 2, 3, batch=2, heads=2, head_dim=24, per_head=True, scale=-0.7),
    Case((7, 7), (3, 4), 3, heads=2, head_dim=48),  # padded at both sides
    Case((7, 7), (3, 4), 3, batch=2, mask_padding=True),
    Case((7, 3), (4, 3), 2, heads=2, per_head=True, mask_padding=True),
    Case((1, 11), 1, 7, head_dim=8),  # regions of one pixel, more keys than a step in the backward
    Case((11, 20), (10, 10), 3),  # a region is two tiles, its keys are several steps; a region of a row
    Case((11, 13), (11, 13), 1, mask_padding=True),  # one region, dense attention
    Case((5, 3), 8, 1),  # one region, greater than the map
]


def routes(case):
    shape = case.batch, *[case.heads] * case.per_head, case.regions, case.regions
    return random(*shape, seed=3).topk(case.topk).indices


def attention(case, implementation, region_index=None):
    region_index = routes(case) if region_index is None else region_index

    def attend(query, key, value):
        return routing_attention(
            query,
            key,
            value,
            region_index.to(query.device),
            case.region_size,
            case.scale,
            case.mask_padding,
            implementation,
        )

    return attend


def inputs(case, dtype=torch.float32, device='cpu'):
    """Views of a packed qkv inside of NaNs."""
    tensors = packed(case.batch, *case.size, case.heads, case.head_dim, dtype=dtype)
    return moved(dict(zip(('query', 'key', 'value'), tensors, strict=True)), device)


def assert_exact(
    case, dtype=torch.float32, device='cpu', region_index=None, tensors=None, grad_output=None, needs=None
):
    tensors = inputs(case, dtype, device) if tensors is None else tensors
    if grad_output is None:
        grad_output = random(*tensors['query'].shape, seed=2).to(dtype).to(device)
    candidate, reference = (attention(case, name, region_index) for name in ('triton', 'reference'))
    assert_equal_functions(candidate, reference, tensors, grad_output, needs)


@interpreted
@pytest.mark.parametrize('case', CASES, ids=str)
def test_interpreted_it_is_exact_with_every_gradient(case):
    assert_exact(case)


@interpreted
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_interpreted_half_precision_is_within_its_tolerance(dtype):
    assert_exact(Case((5, 9), 3, 2, head_dim=24), dtype)


@interpreted
@pytest.mark.parametrize(
    'case',
    [
        Case((4, 6), 2, 4, heads=3, head_dim=24),
        Case((7, 7), (3, 4), 3, batch=2, heads=2, mask_padding=True),
        Case((4, 6), 2, 3, heads=2, per_head=True),
    ],
    ids=str,
)
def test_interpreted_heads_of_one_program_are_exact(case, monkeypatch):
    monkeypatch.setattr(triton, 'BUSY', 0)
    assert_exact(case)


@interpreted
@pytest.mark.parametrize('needs', [['query'], ['key'], ['value'], ['query', 'value'], []])
def test_interpreted_gradients_of_some_inputs_are_those_of_all(needs):
    case = Case((4, 6), 2, 2)
    assert_exact(case, region_index=torch.zeros_like(routes(case)), needs=needs)


@interpreted
@pytest.mark.parametrize(
    'listed',
    [
        [[0], [0], [0], [0], [0], [5]],  # one list in three pieces, one of one, four empty ones
        [[1, 1], [1, 1], [2, 4], [1, 2], [2, 2], [4, 2]],  # regions listed twice; lists of several pieces
        [[0, 1, 2, 3, 4, 5]] * 6,  # dense
    ],
)
def test_interpreted_popular_empty_and_repeated_regions_are_exact(listed):
    case = Case((4, 5), 2, len(listed[0]), batch=2)
    index = torch.tensor(listed)
    assert_exact(case, region_index=torch.stack([index, index.flip(0)]))
    _, gradients = output_and_gradients(attention(case, 'triton', index.expand(2, 6, -1)), inputs(case))
    unlisted = torch.arange(6)[~torch.isin(torch.arange(6), index)]
    for name in ('key', 'value'):
        for region in unlisted.tolist():
            top, left = region // 3 * 2, region % 3 * 2
            assert not gradients[name][:, top : top + 2, left : left + 2].any()


@interpreted
def test_interpreted_any_strides_are_taken_of_inputs_routes_and_gradient():
    case = Case((4, 6), 2, 2, batch=2, heads=2, per_head=True)
    tensors = {
        'query': random(16, 2, 6, 4, 2, dtype=torch.float32).permute(4, 3, 2, 1, 0),
        'key': packed(2, 4, 6, 2, 16, dtype=torch.float32)[0],
        'value': random(1, 4, 6, 2, 16, dtype=torch.float32).expand(2, 4, 6, 2, 16),
    }
    region_index = routes(case).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    grad_output = torch.ones(()).expand(tensors['query'].shape)
    assert_exact(case, region_index=region_index, tensors=tensors, grad_output=grad_output)


@interpreted
def test_interpreted_an_empty_batch_stays_empty():
    case = Case((6, 6), 3, 2, batch=0)
    output, gradients = output_and_gradients(attention(case, 'triton'), inputs(case))
    assert output.shape == (0, 6, 6, 1, 16)
    assert all(gradient.shape == output.shape for gradient in gradients.values())


@interpreted
def test_interpreted_a_region_that_there_is_none_of_is_padding():
    """Nothing is read or written outside of the map: the packed inputs lie inside of NaNs."""
    case, tensors = Case((4, 4), 2, 2), inputs(Case((4, 4), 2, 2))
    index = torch.tensor([[[0, -1], [1, 4], [2, 1000], [3, -1000]]])
    output, gradients = output_and_gradients(attention(case, 'triton', index), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    below = {name: torch.cat([x, torch.zeros_like(x[:, :2])], 1) for name, x in tensors.items()}  # regions 4 and 5
    index = torch.tensor([[[0, 4], [1, 4], [2, 4], [3, 4], [4, 4], [4, 4]]])
    assert_close(output, attention(case, 'reference', index)(**below)[:, :4])


@interpreted
@pytest.mark.parametrize('mask_padding', [False, True])
def test_interpreted_the_operator_keeps_the_rules_of_custom_operators(mask_padding):
    case = Case((3, 4), 2, 2)
    tensors = [x.contiguous().requires_grad_() for x in inputs(case).values()]
    arguments = (*tensors, routes(case)[:, None], [2, 2], 0.5, mask_padding)
    torch.library.opcheck(torch.ops.zoo.routing_attention_triton, arguments)


class Attend(torch.nn.Module):
    """Its region size and routes follow the map."""

    def forward(self, qkv):
        query, key, value = qkv.unbind(3)
        size = qkv.shape[1] // 2, qkv.shape[2] // 2
        means = query.unflatten(2, (2, size[1])).unflatten(1, (2, size[0])).mean((2, 4)).flatten(1, 2).flatten(2)
        return routing_attention(query, key, value, (means @ means.mT).topk(2).indices, size)


@interpreted
def test_interpreted_it_compiles_whole_and_exports_as_one_operator():
    case, model, qkv = Case((4, 4), 2, 2), Attend(), random(2, 4, 6, 3, 1, 16, dtype=torch.float32)
    whole = torch.compile(attention(case, 'triton'), fullgraph=True, backend='aot_eager')
    assert_equal_functions(whole, attention(case, 'reference'), inputs(case))
    with use('triton', 'routing_attention'):
        sizes = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
        program = torch.export.export(model, (qkv,), dynamic_shapes=(sizes,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert 'zoo.routing_attention_triton.default' in targets
    other = random(1, 6, 4, 3, 1, 16, dtype=torch.float32)
    assert_close(program.module()(other), model(other))


@interpreted
def test_interpreted_autocast_casts_query_key_and_value():
    case = Case((4, 4), 2, 2)
    tensors = inputs(case)
    half = {name: x.bfloat16() for name, x in tensors.items()}
    expected, expected_gradients = output_and_gradients(attention(case, 'triton'), half)
    with torch.autocast('cpu', torch.bfloat16):
        output, gradients = output_and_gradients(attention(case, 'triton'), tensors)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected_gradients[name].float()), name


@pytest.mark.parametrize('topk', [1, 2, 5, 12])
@pytest.mark.parametrize('popular', [0, 1, 4, 100])
def test_lists_in_pieces_hold_every_route_once(popular, topk):
    """From routes that favour no region to those that all list one; there is room for every piece and slot."""
    regions = 12
    weight = random(1, 2, 1, regions, seed=4) * popular
    region_index = (random(3, 2, regions, topk, regions, seed=5) + weight[:, :, :, None]).argmax(-1)
    inverse = triton.Inverse.of(region_index)
    for image in range(3):
        for group in range(2):
            routed, lists = region_index[image, group], {r: [] for r in range(regions)}
            for r in range(regions):
                for listed in routed[r].tolist():
                    lists[listed].append(r)
            listers, first_lister, first_piece, region_of_piece = (
                x[image, group].tolist() for x in inverse if isinstance(x, torch.Tensor)
            )
            slots = 0  # taken by the regions before
            for r in range(regions):
                assert listers[first_lister[r] : first_lister[r + 1]] == lists[r]
                pieces = max(1, -(-len(lists[r]) // inverse.length))
                assert first_piece[r + 1] - first_piece[r] == pieces
                assert region_of_piece[first_piece[r] : first_piece[r + 1]] == [r] * pieces
                first_slot = 2 * (first_piece[r] - r)  # as in the kernels
                if pieces > 1:
                    assert slots <= first_slot
                    slots = first_slot + pieces
                assert slots <= inverse.slots
            assert region_of_piece[first_piece[-1] :] == [regions] * (len(region_of_piece) - first_piece[-1])


def test_tensors_of_a_gpu_that_is_not_here_take_it():
    with FakeTensorMode():
        q, k, v = torch.empty(2, 9, 10, 3, 4, 32, device='cuda', dtype=torch.float16, requires_grad=True).unbind(3)
        index = torch.empty(2, 20, 3, device='cuda', dtype=torch.int64)
        output = routing_attention(q, k, v, index, (2, 3))
    assert 'routing_attention_triton' in output.grad_fn.name()
    assert (output.shape, output.device.type) == ((2, 9, 10, 4, 32), 'cuda')


@pytest.mark.parametrize('arithmetic', ['half', 'tf32', 'ieee'])
def test_the_table_has_a_row_for_every_problem(arithmetic):
    for head_dim in (8, 24, 48, 128):
        for pixels in (1, 16, 17, 64, 1000):
            blocks = configs.find(triton.CONFIGS, None, arithmetic=arithmetic, head_dim=head_dim, pixels=pixels)
            assert list(blocks) == ['forward', 'query', 'key']


def test_tuning_takes_the_fastest_block_of_each_kernel():
    row = next(row for row in configs.load(triton.CONFIGS) if row['match'] == dict(arithmetic='half', head_dim=32))

    def measure(launches):  # fastest for 8 warps and tiles of 32 pixels
        return abs(launches[0].num_warps - 8) + abs(launches[0].arguments['BLOCK_M'] - 32)

    tuned = tune.tune_row(triton, row, measure)
    assert {name: block['num_warps'] for name, block in tuned['blocks'].items()} == dict.fromkeys(row['blocks'], 8)
    assert {name: block['tile'] for name, block in tuned['blocks'].items()} == dict.fromkeys(row['blocks'], (1, 32))


@pytest.mark.gpu
@compiled
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('case', [*CASES, Case((56, 56), 8, 4, batch=4, heads=2, head_dim=32)], ids=str)
def test_on_a_gpu_it_is_exact_with_every_gradient(case, dtype):
    assert_exact(case, dtype, 'cuda')


@pytest.mark.gpu
@compiled
@pytest.mark.parametrize('head_dim', [32, 64, 128])
@pytest.mark.parametrize(('region_size', 'topk'), [(2, 16), (4, 4), (8, 1), ((9, 15), 2)])
def test_on_a_gpu_every_class_of_the_table_is_exact(region_size, topk, head_dim):
    rows, columns = region_size if isinstance(region_size, tuple) else (region_size, region_size)
    case = Case((7 * rows - 1, 7 * columns), region_size, topk, batch=2, heads=2, head_dim=head_dim)
    for dtype in (torch.bfloat16, torch.float32):
        assert_exact(case, dtype, 'cuda')


@pytest.mark.gpu
@compiled
def test_on_a_gpu_lists_of_many_pieces_are_exact():
    case = Case((28, 28), 4, 4, batch=8, heads=2, head_dim=32)
    weight = 4 * random(8, 1, 49, seed=4)
    region_index = (random(8, 49, 49, seed=3) + weight).topk(4).indices
    assert_exact(case, torch.float16, 'cuda', region_index)


@pytest.mark.gpu
@compiled
def test_on_a_gpu_two_runs_give_the_same_bits_in_deterministic_mode():
    case = Case((56, 56), 8, 4, batch=8, heads=2, head_dim=32)
    tensors = inputs(case, torch.float16, 'cuda')
    grad = random(*tensors['query'].shape, seed=2).half().cuda()
    assert_deterministic(attention(case, None), tensors, grad)


@pytest.mark.gpu
@compiled
def test_on_a_gpu_it_compiles_whole():
    case = Case((7, 9), 3, 2, heads=2)
    tensors, grad = inputs(case, device='cuda'), random(1, 7, 9, 2, 16, seed=2).float().cuda()
    whole = torch.compile(attention(case, None), fullgraph=True)
    assert_equal_functions(whole, attention(case, 'reference'), tensors, grad)
