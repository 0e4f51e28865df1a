"""Routing attention: every implementation against the definition, and the definition against a loop over regions."""

import pytest
import torch

from zoo.kernels import explain, routing_attention
from zoo.kernels.routing import tiled

from .harness import TOLERANCE, assert_close, assert_equal_functions, output_and_gradients, packed, random

DTYPES = list(TOLERANCE)


def routes(batch, regions, topk, heads=None, seed=3):
    """Distinct regions for each region, as a router picks them."""
    shape = (batch, regions, regions) if heads is None else (batch, heads, regions, regions)
    return random(*shape, seed=seed).topk(topk).indices


def inputs(*shape, dtype=torch.float64):
    return dict(zip(('query', 'key', 'value'), packed(*shape, dtype=dtype), strict=True))


def with_routes(region_index, region_size, implementation=None, scale=None, mask_padding=False):
    def attend(query, key, value):
        return routing_attention(query, key, value, region_index, region_size, scale, mask_padding, implementation)

    return attend


def assert_exact(tensors, region_index, region_size, scale=None, mask_padding=False, **kwargs):
    candidate, reference = (
        with_routes(region_index, region_size, name, scale, mask_padding) for name in ('tiled', 'reference')
    )
    assert_equal_functions(candidate, reference, tensors, **kwargs)


@pytest.mark.parametrize('per_head', [False, True])
def test_the_definition_is_attention_of_each_region_to_its_regions(per_head):
    B, heads, d, rows, columns, topk = 2, 3, 8, 2, 3, 2
    q, k, v = packed(B, 2 * rows, 2 * columns, heads, d)
    index = routes(B, 4, topk, heads if per_head else None)
    out = routing_attention(q, k, v, index, (rows, columns), implementation='reference')
    for b in range(B):
        for h in range(heads):
            for r in range(4):

                def region(x, n):
                    top, left = n // 2 * rows, n % 2 * columns
                    return x[b, top : top + rows, left : left + columns, h].flatten(0, 1)  # noqa: B023

                chosen = index[b, h, r] if per_head else index[b, r]
                keys, values = (torch.cat([region(x, n) for n in chosen.tolist()]) for x in (k, v))
                expected = (region(q, r) @ keys.T * d**-0.5).softmax(-1) @ values
                assert_close(region(out, r), expected)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('per_head', [False, True])
@pytest.mark.parametrize(
    ('shape', 'region_size', 'topk'),
    [
        ((2, 14, 21, 2, 32), (7, 7), 1),
        ((2, 8, 12, 3, 24), (2, 3), 5),
        ((1, 6, 6, 2, 48), 1, 7),  # regions of one pixel
        ((2, 13, 10, 2, 24), (4, 3), 3),  # padded at both sides
        ((1, 5, 3, 1, 8), 8, 1),  # one region, greater than the map
        ((1, 8, 8, 2, 16), 4, 4),  # all regions: dense attention
    ],
)
def test_tiled_equals_the_definition(shape, region_size, topk, per_head, dtype):
    rows, columns = (region_size, region_size) if isinstance(region_size, int) else region_size
    regions = -(-shape[1] // rows) * -(-shape[2] // columns)
    index = routes(shape[0], regions, topk, shape[3] if per_head else None)
    assert_exact(inputs(*shape, dtype=dtype), index, region_size, scale=0.3)


@pytest.mark.parametrize('mask_padding', [False, True])
@pytest.mark.parametrize('limit', [1, 700, 5000])
def test_chunks_and_strips_change_nothing(limit, mask_padding, monkeypatch):
    monkeypatch.setattr(tiled, 'CPU_CHUNK', limit)
    assert_exact(inputs(3, 13, 10, 2, 24), routes(3, 16, 4), (4, 3), mask_padding=mask_padding)


def test_a_region_that_all_choose_and_one_that_none_chooses():
    index = torch.tensor([0, 1, 2, 0, 0, 0]).expand(2, 6, 6)[..., :2].contiguous()  # of 6 regions, only 0 and 1
    tensors = inputs(2, 6, 9, 2, 16)
    assert_exact(tensors, index, 3)
    _, gradients = output_and_gradients(with_routes(index, 3), tensors)
    for name in ('key', 'value'):
        assert gradients[name][:, 3:].eq(0).all()
        assert gradients[name][:, :3, :6].ne(0).all()


def test_repeated_regions_and_a_region_routed_to_itself():
    index = torch.arange(6).view(1, 6, 1).repeat(2, 1, 3)
    tensors = inputs(2, 6, 9, 2, 16)
    assert_exact(tensors, index, 3)
    assert_close(with_routes(index, 3)(**tensors), with_routes(index[..., :1], 3)(**tensors))


def test_padding_takes_part_with_logit_zero():
    q, k, v = (torch.ones(1, 1, 3, 1, 1, dtype=torch.float64) for _ in range(3))
    out = routing_attention(q, k, v, torch.tensor([[[1], [1]]]), (1, 2), scale=1.0)
    assert_close(out, torch.full_like(out, torch.e / (torch.e + 1)))  # of two keys, one is padding


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_masked_padding_takes_no_part(implementation):
    q, k, v = (random(1, 1, 3, 1, 1, seed=i) for i in range(3))
    index = torch.tensor([[[0, 1], [1, 0]]])  # of regions of two pixels, of which the last is padding
    out = with_routes(index, (1, 2), implementation, mask_padding=True)(q, k, v)
    dense = with_routes(torch.zeros(1, 1, 1, dtype=torch.int64), (1, 3), 'reference')(q, k, v)
    assert_close(out, dense)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('size', 'region_size'), [((13, 10), (4, 3)), ((7, 9), 3), ((5, 3), 8), ((6, 9), 3)])
def test_tiled_equals_the_definition_with_masked_padding(size, region_size, dtype):
    rows, columns = (region_size, region_size) if isinstance(region_size, int) else region_size
    regions = -(-size[0] // rows) * -(-size[1] // columns)
    index = routes(2, regions, min(3, regions), 2)
    assert_exact(inputs(2, *size, 2, 8, dtype=dtype), index, region_size, mask_padding=True)


def test_where_regions_divide_the_map_nothing_is_masked():
    tensors, index = inputs(1, 6, 9, 2, 8), routes(1, 6, 2)
    plain, masked = (with_routes(index, 3, mask_padding=mask)(**tensors) for mask in (False, True))
    assert torch.equal(plain, masked)


@pytest.mark.parametrize('needs', [['query'], ['key'], ['value'], ['query', 'value']])
def test_gradients_of_some_inputs(needs):
    assert_exact(inputs(1, 6, 9, 2, 16), routes(1, 6, 2), 3, needs=needs)


def test_gradients_of_an_expanded_gradient():
    tensors = inputs(2, 7, 9, 2, 16)
    gradient = torch.ones((), dtype=torch.float64).expand(2, 7, 9, 2, 16)
    assert_exact(tensors, routes(2, 9, 2), 3, grad_output=gradient)


def test_transposed_inputs_and_a_contiguous_output():
    tensors = {name: random(2, 16, 9, 2, 6, seed=i).transpose(1, 4) for i, name in enumerate(('query', 'key', 'value'))}
    assert_exact(tensors, routes(2, 6, 2), 3)
    assert with_routes(routes(2, 6, 2), 3)(**tensors).is_contiguous()


def test_inputs_are_left_as_they_are():
    tensors = inputs(1, 4, 4, 1, 8)
    before = {name: x.clone() for name, x in tensors.items()}
    contiguous = {name: x.contiguous() for name, x in tensors.items()}  # one region and head: already rearranged
    output_and_gradients(with_routes(torch.zeros(1, 1, 1, dtype=torch.int64), 4), contiguous)
    assert all(torch.equal(contiguous[name], before[name]) for name in before)


def test_the_empty_batch():
    output, gradients = output_and_gradients(with_routes(routes(0, 4, 2), 3), inputs(0, 6, 6, 2, 8))
    assert output.shape == (0, 6, 6, 2, 8)
    assert all(gradient.shape == output.shape for gradient in gradients.values())


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_meta_tensors_give_shapes(implementation):
    q = torch.empty(2, 7, 9, 2, 16, device='meta', dtype=torch.float16)
    index = torch.empty(2, 9, 2, device='meta', dtype=torch.int64)
    out = routing_attention(q, q, q, index, 3, implementation=implementation)
    assert (out.device.type, out.shape, out.dtype) == ('meta', q.shape, q.dtype)


def test_the_operator_is_registered_well():
    query, key, value = (x.detach().requires_grad_() for x in inputs(2, 7, 9, 2, 8).values())
    index = routes(2, 9, 2)[:, None]
    torch.library.opcheck(torch.ops.zoo.routing_attention.default, (query, key, value, index, 3, 3, 0.3))


@pytest.mark.parametrize(('implementation', 'dynamic'), [('tiled', True), ('reference', False)])
def test_compiled_graphs_are_whole_and_exact(implementation, dynamic):
    attend = with_routes(routes(2, 9, 2), 3, implementation)
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    assert_equal_functions(compiled, attend, inputs(2, 7, 9, 2, 8))


class Router(torch.nn.Module):
    """A caller whose region size and routes follow the map's size."""

    def forward(self, x):
        size = x.shape[1] // 2, x.shape[2] // 2
        means = x.unflatten(2, (2, size[1])).unflatten(1, (2, size[0])).mean((2, 4)).flatten(1, 2).flatten(2)
        return routing_attention(x, x, x, (means @ means.mT).topk(2).indices, size)


@pytest.mark.parametrize('strict', [False, True])
def test_exported_programs_take_other_sizes(strict):
    sizes = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Router(), (random(2, 6, 8, 2, 8),), dynamic_shapes=(sizes,), strict=strict)
    assert 'zoo.routing_attention.default' in {str(node.target) for node in program.graph.nodes}
    x = random(3, 12, 10, 2, 8)
    assert_close(program.module()(x), Router()(x))


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_autocast_casts_once_and_computes_in_float32(implementation):
    tensors = inputs(2, 7, 9, 2, 16, dtype=torch.float32)
    attend = with_routes(routes(2, 9, 3), 3, implementation)
    with torch.autocast('cpu', torch.bfloat16):
        output, gradients = output_and_gradients(attend, tensors)
    rounded = {name: x.bfloat16() for name, x in tensors.items()}
    expected, expected_gradients = output_and_gradients(attend, rounded)
    assert output.dtype == torch.bfloat16
    assert_close(output, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert_close(gradient, expected_gradients[name], name, TOLERANCE[torch.bfloat16])


def test_indices_out_of_range_are_refused():
    tensors = inputs(1, 6, 6, 1, 8)
    for wrong in (-1, 4):
        index = torch.zeros(1, 4, 2, dtype=torch.int64)
        index[0, 2, 1] = wrong
        with pytest.raises(IndexError, match='of 4 regions'):
            with_routes(index, 3)(**tensors)


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (dict(query=torch.ones(1, 6, 6, 8)), ValueError, r'\(batch, height, width, heads, head_dim\)'),
        (dict(key=torch.ones(1, 6, 7, 1, 8)), ValueError, r'key must have the shape of query, \(1, 6, 6, 1, 8\)'),
        (dict(value=torch.ones(1, 6, 6, 1, 8).double()), TypeError, 'dtypes must be equal'),
        (dict(query=torch.ones(1, 6, 6, 1, 8).long()), TypeError, 'query must be floating'),
        (dict(query=None), TypeError, 'query must be a tensor'),
        (dict(key=torch.ones(1, 6, 6, 1, 8, device='meta')), ValueError, 'one device'),
        (dict(region_index=torch.zeros(1, 4, 1, dtype=torch.int32)), TypeError, 'int64, got torch.int32'),
        (dict(region_index=[[0]]), TypeError, 'region_index must be a tensor, got list'),
        (dict(region_index=torch.zeros(1, 4, 1, dtype=torch.int64, device='meta')), ValueError, 'one device'),
        (dict(region_index=torch.zeros(1, 5, 1, dtype=torch.int64)), ValueError, r'4 regions of 3x3.*\(1, 5, 1\)'),
        (dict(region_index=torch.zeros(1, 2, 4, 1, dtype=torch.int64)), ValueError, r'\(1, 1, 4, topk\)'),
        (dict(region_index=torch.zeros(4, 1, dtype=torch.int64)), ValueError, r'got \(4, 1\)'),
        (dict(region_index=torch.zeros(1, 4, 0, dtype=torch.int64)), ValueError, r'topk.*1\.\.4, got 0'),
        (dict(region_index=torch.zeros(1, 4, 5, dtype=torch.int64)), ValueError, r'topk.*1\.\.4, got 5'),
        (dict(region_size=0), ValueError, 'positive'),
        (dict(region_size=(3, 3, 3)), ValueError, 'region_size must be an int or 2 ints'),
        (dict(region_size=3.0), TypeError, r'region_size.*3\.0'),
        (dict(implementation='fastest'), ValueError, "unknown implementation 'fastest'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    right = dict(
        query=torch.ones(1, 6, 6, 1, 8),
        key=torch.ones(1, 6, 6, 1, 8),
        value=torch.ones(1, 6, 6, 1, 8),
        region_index=torch.zeros(1, 4, 1, dtype=torch.int64),
        region_size=3,
    )
    with pytest.raises(error, match=message):
        routing_attention(**{**right, **change})


def test_scale_zero_is_not_the_default():
    tensors = inputs(1, 6, 6, 1, 8)
    index = torch.arange(4).expand(1, 4, 4)
    mean = tensors['value'].mean((1, 2), keepdim=True).expand(1, 6, 6, 1, 8)
    assert_close(with_routes(index, 3, scale=0.0)(**tensors), mean)


@pytest.mark.parametrize('situation', [{}, {'compiling': True}, {'exporting': True}])
def test_dispatch_takes_tiled_and_says_why(situation):
    explanation = explain('routing_attention', **situation)
    assert explanation.implementation == 'tiled'
    assert explanation.reason
