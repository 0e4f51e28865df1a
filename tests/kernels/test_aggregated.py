"""Aggregated attention: the fast implementation against the definition, that against a loop over pixels."""

import math

import pytest
import torch
from torch.nn import functional as F

from zoo.kernels import aggregated_attention, explain
from zoo.kernels.aggregated import fused, position_bias, tiled

from .harness import TOLERANCE, assert_close, assert_equal_functions, output_and_gradients, packed, random

DTYPES = list(TOLERANCE)
MAPS = ('query', 'key', 'value')
POOLED = ('pooled_key', 'pooled_value')
FAST = {'tiled': tiled, 'fused': fused}


def indices(height, width, pooled=(2, 2)):
    """Each pair of a position and a cell its own place in a table that is greater than needed, out of order."""
    for length, cells in zip((height, width), pooled, strict=True):
        places = torch.randperm(length * cells + 3, generator=torch.Generator().manual_seed(length))
        yield places[: length * cells].view(length, cells)


def inputs(B, H, W, heads, d, pooled=(2, 2), window_size=3, dtype=torch.float64):
    """Floating inputs; parameters in float32 at least, as models have them."""
    cells = window_size**2
    wide = torch.promote_types(dtype, torch.float32)
    parameters = {
        'query_embedding': (heads, d),
        'temperature': (heads,),
        'local_bias': (heads, cells),
        'pooled_bias': (heads, H * pooled[0] + 3, W * pooled[1] + 3),
        'learnable_tokens': (heads, d, cells),
        'learnable_bias': (heads, cells),
    }
    return {
        **dict(zip(MAPS, packed(B, H, W, heads, d, dtype=dtype), strict=True)),
        **dict(zip(POOLED, packed(B, math.prod(pooled), heads, d, parts=2, dtype=dtype, seed=4), strict=True)),
        **{name: random(*shape, dtype=wide, seed=5 + i) for i, (name, shape) in enumerate(parameters.items())},
    }


def attention(size, pooled=(2, 2), window_size=3, implementation=None):
    row_index, column_index = indices(*size, pooled)

    def attend(**tensors):
        others = dict(row_index=row_index, column_index=column_index)
        return aggregated_attention(**tensors, **others, window_size=window_size, implementation=implementation)

    return attend


def assert_exact(tensors, pooled=(2, 2), window_size=3, **kwargs):
    size = tensors['query'].shape[1:3]
    reference = attention(size, pooled, window_size, 'reference')
    for name in FAST:
        assert_equal_functions(attention(size, pooled, window_size, name), reference, tensors, **kwargs)


def test_the_definition_is_one_softmax_over_window_and_pooled_keys_plus_learnable_weights():
    B, H, W, heads, d, pooled, size = 2, 4, 5, 2, 8, (2, 3), 3
    tensors = inputs(B, H, W, heads, d, pooled, size)
    row_index, column_index = indices(H, W, pooled)
    out = attention((H, W), pooled, size, 'reference')(**tensors)
    q, k, v, pk, pv, embedding, temperature, local_bias, pooled_bias, tokens, token_bias = tensors.values()
    for b, h, y, x in torch.cartesian_prod(*map(torch.arange, (B, heads, H, W))).tolist():
        window = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        inside = [n for n, (i, j) in enumerate(window) if 0 <= i < H and 0 <= j < W]
        cells = [window[n] for n in inside]
        q_hat = q[b, y, x, h] / q[b, y, x, h].norm()
        keys = torch.stack([k[b, i, j, h] for i, j in cells] + [*pk[b, :, h]])
        values = torch.stack([v[b, i, j, h] for i, j in cells] + [*pv[b, :, h]])
        bias = pooled_bias[h, row_index[y][:, None], column_index[x]].flatten()
        length = torch.tensor(float(len(keys))).log().double()  # in float32
        scores = F.normalize(keys, dim=-1) @ (q_hat + embedding[h]) * temperature[h] * length
        weights = (scores + torch.cat([local_bias[h, inside], bias])).softmax(0)
        weights[: len(inside)] += (q_hat @ tokens[h] + token_bias[h])[inside]
        assert_close(out[b, y, x, h], weights @ values)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    ('shape', 'pooled', 'window_size'),
    [
        ((2, 9, 13, 3, 24), (2, 3), 3),
        ((2, 14, 14, 2, 48), (7, 7), 3),
        ((1, 29, 21, 1, 24), (3, 2), 3),
        ((2, 1, 6, 2, 8), (1, 2), 3),  # one row
        ((2, 7, 1, 2, 24), (3, 1), 3),  # one column
        ((1, 1, 1, 1, 24), (1, 1), 3),
        ((2, 11, 10, 2, 24), (2, 2), 5),
        ((1, 3, 4, 2, 8), (1, 2), 7),  # windows greater than the map
        ((1, 6, 5, 2, 24), (2, 2), 1),
    ],
)
def test_fast_implementations_equal_the_definition(shape, pooled, window_size, dtype):
    assert_exact(inputs(*shape, pooled, window_size, dtype), pooled, window_size)


@pytest.mark.parametrize('limit', [1, 700, 1300, 3000, 8000, 20000])
def test_chunks_change_nothing(limit, monkeypatch):
    for module in FAST.values():
        monkeypatch.setattr(module, 'CPU_CHUNK', limit)
    assert_exact(inputs(3, 13, 10, 2, 24))


def test_what_lies_outside_is_no_key_and_has_no_value():
    """With values of one, weights that sum to one give one, and learnable weights count inside of the map alone."""
    tensors = inputs(1, 3, 3, 1, 8)
    for name in ('value', 'pooled_value', 'learnable_bias'):
        tensors[name] = torch.ones_like(tensors[name])
    tensors['learnable_tokens'] = torch.zeros_like(tensors['learnable_tokens'])
    inside = torch.tensor([[4, 6, 4], [6, 9, 6], [4, 6, 4]]).double()
    expected = (1 + inside)[None, :, :, None, None].expand(1, 3, 3, 1, 8)
    for name in FAST:
        assert_close(attention((3, 3), implementation=name)(**tensors), expected)


def test_a_pixel_of_zeros_is_normalised_to_zeros():
    tensors = inputs(1, 4, 4, 2, 8)
    for name in ('query', 'key', 'pooled_key'):
        tensors[name] = tensors[name].clone()
        tensors[name][:, 1] = 0
    for name in FAST:
        assert attention((4, 4), implementation=name)(**tensors).isfinite().all()
    assert_exact(tensors, needs=['value', 'query_embedding', 'pooled_bias'])  # others divide by the least norm


@pytest.mark.parametrize('needs', [['query'], ['value', 'pooled_bias'], ['temperature'], ['learnable_tokens']])
def test_gradients_of_some_inputs(needs):
    assert_exact(inputs(1, 6, 9, 2, 16), needs=needs)


def test_gradients_of_an_expanded_gradient():
    gradient = torch.ones((), dtype=torch.float64).expand(2, 7, 9, 2, 16)
    assert_exact(inputs(2, 7, 9, 2, 16), grad_output=gradient)


def test_transposed_inputs_and_a_contiguous_output():
    tensors = inputs(2, 9, 6, 2, 16)
    for i, name in enumerate(MAPS):
        tensors[name] = random(2, 16, 6, 2, 9, seed=i).transpose(1, 4)
    for i, name in enumerate(POOLED):
        tensors[name] = random(16, 4, 2, 2, seed=i + 3).permute(2, 1, 3, 0)
    for name in ('pooled_bias', 'learnable_tokens'):
        tensors[name] = tensors[name].mT.contiguous().mT
    assert_exact(tensors)
    for name in FAST:
        assert attention((9, 6), implementation=name)(**tensors).is_contiguous()


def test_inputs_are_left_as_they_are():
    tensors = {name: x.contiguous() for name, x in inputs(1, 4, 4, 1, 8).items()}
    before = {name: x.clone() for name, x in tensors.items()}
    output_and_gradients(attention((4, 4)), tensors)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_an_image_is_the_same_alone_and_in_a_batch():
    tensors = inputs(3, 9, 10, 2, 24)
    alone = {name: x[1:2] if name in (*MAPS, *POOLED) else x for name, x in tensors.items()}
    assert_close(attention((9, 10))(**tensors)[1:2], attention((9, 10))(**alone))


@pytest.mark.parametrize('implementation', FAST)
def test_the_empty_batch(implementation):
    output, gradients = output_and_gradients(attention((6, 5), implementation=implementation), inputs(0, 6, 5, 2, 8))
    assert output.shape == (0, 6, 5, 2, 8)
    assert gradients['query'].shape == output.shape
    assert gradients['pooled_bias'].eq(0).all()


@pytest.mark.parametrize('implementation', [*FAST, 'reference'])
def test_meta_tensors_give_shapes(implementation):
    tensors = {name: x.to('meta') for name, x in inputs(2, 7, 9, 2, 16, dtype=torch.float16).items()}
    row_index, column_index = (x.to('meta') for x in indices(7, 9))
    out = aggregated_attention(**tensors, row_index=row_index, column_index=column_index, implementation=implementation)
    assert (out.device.type, out.shape, out.dtype) == ('meta', (2, 7, 9, 2, 16), torch.float16)


def test_the_operators_are_registered_well():
    tensors = {name: x.detach().requires_grad_() for name, x in inputs(2, 5, 6, 2, 8).items()}
    *first, tokens, bias = tensors.values()
    torch.library.opcheck(torch.ops.zoo.aggregated_attention.default, (*first, *indices(5, 6), tokens, bias, 3))
    shapes = (2, 3, 5, 6, 8), (2, 3, 5, 6, 9), (2, 3, 4, 8), (2, 3, 4, 8), (3, 13, 15)
    floating = (random(*shape).requires_grad_() for shape in shapes)
    torch.library.opcheck(torch.ops.zoo.joint_softmax.default, (*floating, *indices(5, 6)))
    rows, columns, weight, bias = (x.requires_grad_() for x in mlp())
    torch.library.opcheck(torch.ops.zoo.position_bias.default, (rows, columns, weight, bias))


@pytest.mark.parametrize(
    ('implementation', 'dynamic'), [('tiled', True), ('fused', True), ('fused', False), ('reference', False)]
)
def test_compiled_graphs_are_whole_and_exact(implementation, dynamic):
    attend = attention((7, 9), implementation=implementation)
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    assert_equal_functions(compiled, attend, inputs(2, 7, 9, 2, 8))


class Caller(torch.nn.Module):
    """A caller whose pooled tokens and table follow the map's size."""

    def __init__(self):
        super().__init__()
        self.tensors = inputs(1, 1, 1, 2, 8)

    def forward(self, x):
        _, H, W, heads, _ = x.shape
        pooled = x.unflatten(2, (2, W // 2)).unflatten(1, (2, H // 2)).mean((2, 4)).flatten(1, 2)
        row_index, column_index = (torch.arange(2 * length).view(length, 2) for length in (H, W))
        table = torch.arange(heads * 2 * H * 2 * W).view(heads, 2 * H, 2 * W).to(x.dtype).sin()
        others = {name: y for name, y in self.tensors.items() if name not in (*MAPS, *POOLED, 'pooled_bias')}
        return aggregated_attention(
            x, x, x, pooled, pooled, row_index=row_index, column_index=column_index, pooled_bias=table, **others
        )


@pytest.mark.parametrize('strict', [False, True])
def test_exported_programs_take_other_sizes(strict):
    sizes = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Caller(), (random(2, 6, 8, 2, 8),), dynamic_shapes=(sizes,), strict=strict)
    assert 'zoo.aggregated_attention.default' in {str(node.target) for node in program.graph.nodes}
    x = random(3, 12, 10, 2, 8)
    assert_close(program.module()(x), Caller()(x))


@pytest.mark.parametrize('implementation', [*FAST, 'reference'])
def test_autocast_casts_once_and_computes_in_float32(implementation):
    tensors = inputs(2, 7, 9, 2, 16, dtype=torch.float32)
    attend = attention((7, 9), implementation=implementation)
    with torch.autocast('cpu', torch.bfloat16):
        output, gradients = output_and_gradients(attend, tensors)
    rounded = {name: x.bfloat16() if name in (*MAPS, *POOLED) else x for name, x in tensors.items()}
    expected, expected_gradients = output_and_gradients(attend, rounded)
    assert output.dtype == torch.bfloat16
    assert_close(output, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert_close(gradient, expected_gradients[name], name, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (dict(query=torch.ones(1, 6, 6, 8)), ValueError, r'\(batch, height, width, heads, head_dim\)'),
        (dict(query=torch.ones(1, 0, 6, 1, 8)), ValueError, r'got shape \(1, 0, 6, 1, 8\)'),
        (dict(key=torch.ones(1, 6, 7, 1, 8)), ValueError, r'key must have shape \(1, 6, 6, 1, 8\)'),
        (dict(value=torch.ones(1, 6, 6, 1, 8).double()), TypeError, 'dtypes must be equal'),
        (dict(query=torch.ones(1, 6, 6, 1, 8).long()), TypeError, 'query must be floating'),
        (dict(query=None), TypeError, 'query must be a tensor'),
        (dict(pooled_key=torch.ones(1, 5, 1, 8)), ValueError, r'pooled_key must have shape \(1, 4, 1, 8\)'),
        (dict(pooled_value=torch.ones(1, 4, 1, 8, device='meta')), ValueError, 'one device'),
        (dict(query_embedding=torch.ones(1, 1, 8)), ValueError, r'query_embedding must have shape \(1, 8\)'),
        (dict(temperature=torch.ones(1, 1)), ValueError, r'temperature must have shape \(1,\)'),
        (dict(temperature=2.0), TypeError, 'temperature must be a tensor, got float'),
        (dict(local_bias=torch.ones(1, 8)), ValueError, r'local_bias must have shape \(1, 9\)'),
        (dict(pooled_bias=torch.ones(2, 12, 12)), ValueError, r'pooled_bias must have shape \(1, 12, 12\)'),
        (dict(pooled_bias=torch.ones(12, 12)), ValueError, '2, 2 and 3 axes'),
        (dict(row_index=torch.zeros(5, 2).long()), ValueError, r'row_index must have shape \(6, 2\)'),
        (dict(column_index=torch.zeros(6, 2)), TypeError, 'column_index must be an int64 tensor, got torch.float32'),
        (dict(row_index=[[0]]), TypeError, 'row_index must be an int64 tensor, got list'),
        (dict(learnable_tokens=torch.ones(1, 9, 8)), ValueError, r'learnable_tokens must have shape \(1, 8, 9\)'),
        (dict(learnable_bias=torch.ones(9)), ValueError, r'learnable_bias must have shape \(1, 9\)'),
        (dict(window_size=4), ValueError, 'window_size must be odd, got 4'),
        (dict(window_size=0), ValueError, 'window_size must be positive'),
        (dict(window_size=3.0), TypeError, r'window_size.*3\.0'),
        (dict(implementation='fastest'), ValueError, "unknown implementation 'fastest'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    right = {
        **{name: torch.ones(1, 6, 6, 1, 8) for name in MAPS},
        **{name: torch.ones(1, 4, 1, 8) for name in POOLED},
        **{name: x.float() for name, x in inputs(1, 6, 6, 1, 8).items() if name not in (*MAPS, *POOLED)},
        **dict(zip(('row_index', 'column_index'), indices(6, 6), strict=True)),
    }
    with pytest.raises(error, match=message):
        aggregated_attention(**{**right, **change})


@pytest.mark.parametrize('implementation', FAST)
def test_places_outside_of_the_table_are_refused(implementation):
    tensors, (row_index, column_index) = inputs(1, 6, 6, 1, 8), indices(6, 6)
    others = dict(row_index=row_index + 99, column_index=column_index, implementation=implementation)
    with pytest.raises(IndexError, match=r'row_index must be in 0\.\.14, got 99\.\.'):
        aggregated_attention(**tensors, **others)


@pytest.mark.parametrize(
    ('operator', 'situation', 'implementation'),
    [
        ('aggregated_attention', {}, 'tiled'),
        ('aggregated_attention', {'compiling': True}, 'fused'),
        ('aggregated_attention', {'compiling': True, 'device': 'meta'}, 'tiled'),
        ('aggregated_attention', {'exporting': True}, 'tiled'),
        ('position_bias', {}, 'tiled'),
        ('position_bias', {'compiling': True}, 'tiled'),
        ('position_bias', {'exporting': True}, 'tiled'),
    ],
)
def test_dispatch_takes_what_suits_the_mode_and_says_why(operator, situation, implementation):
    explanation = explain(operator, **situation)
    assert explanation.implementation == implementation
    assert explanation.reason


@pytest.mark.parametrize('trains', [False, True])
def test_a_compiled_call_computes_the_same(trains):
    tensors = inputs(2, 6, 7, 2, 8)
    attend = attention((6, 7))
    with torch.set_grad_enabled(trains):
        compiled = torch.compile(attend, fullgraph=True, backend='aot_eager')
        assert_close(compiled(**tensors), attend(**tensors))


# --- position bias


def mlp(rows=5, columns=7, hidden=16, heads=3, dtype=torch.float64):
    shapes = (rows, hidden), (columns, hidden), (heads, hidden), (heads,)
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def biases(implementation):
    return lambda **tensors: position_bias(**tensors, implementation=implementation)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('limit', [1, 300, 10**6])
def test_position_bias_equals_an_mlp_of_every_pair(limit, dtype, monkeypatch):
    monkeypatch.setattr(tiled, 'CPU_CHUNK', limit)
    tensors = dict(zip(('rows', 'columns', 'weight', 'bias'), mlp(dtype=dtype), strict=True))
    assert_equal_functions(biases('tiled'), biases('reference'), tensors)
    rows, columns, weight, bias = (x.double() for x in tensors.values())
    expected = [[weight @ (row + column).clamp(min=0) + bias for column in columns] for row in rows]
    expected = torch.stack([torch.stack(row, -1) for row in expected], 1)  # (heads, rows, columns)
    for implementation in ('tiled', 'reference'):
        assert_close(biases(implementation)(**tensors), expected)


def test_compiled_position_bias_is_exact():
    tensors = dict(zip(('rows', 'columns', 'weight', 'bias'), mlp(), strict=True))
    torch._dynamo.reset()
    compiled = torch.compile(biases(None), backend='aot_eager', fullgraph=True, dynamic=True)
    assert_equal_functions(compiled, biases('reference'), tensors)


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (dict(rows=torch.ones(5)), ValueError, r'must be \(..., hidden\), got \(5,\)'),
        (dict(columns=torch.ones(7, 9)), ValueError, r'hidden\), got .*\(7, 9\)'),
        (dict(bias=torch.ones(2)), ValueError, r'bias must have shape \(3,\), got \(2,\)'),
        (dict(weight=torch.ones(3, 16).double()), TypeError, 'dtypes must be equal'),
        (dict(implementation='fastest'), ValueError, "unknown implementation 'fastest'"),
    ],
)
def test_wrong_arguments_of_position_bias_are_named(change, error, message):
    right = dict(zip(('rows', 'columns', 'weight', 'bias'), mlp(dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        position_bias(**{**right, **change})
