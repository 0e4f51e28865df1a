"""Criss-cross attention: every implementation against the definition, and the definition against a loop over pixels."""

import itertools

import pytest
import torch

from zoo.kernels import crisscross_attention, explain
from zoo.kernels.crisscross import tiled

from .harness import TOLERANCE, assert_close, assert_equal_functions, output_and_gradients, packed, random

DTYPES = list(TOLERANCE)
SHAPES = [
    (2, 7, 11, 2, 8),
    (3, 13, 4, 1, 12),
    (2, 1, 9, 2, 8),  # columns of one pixel, which is no key of its own
    (2, 9, 1, 2, 8),
    (2, 1, 1, 1, 8),
]


def inputs(*shape, value_dim=None, dtype=torch.float64):
    """query, key and value: views of packed projections, one for values of another head_dim."""
    query, key, value = packed(*shape, dtype=dtype)
    if value_dim is not None:
        (value,) = packed(*shape[:-1], value_dim, parts=1, dtype=dtype, seed=3)
    return dict(query=query, key=key, value=value)


def with_scale(scale=None, implementation=None):
    def attend(query, key, value):
        return crisscross_attention(query, key, value, scale, implementation)

    return attend


def assert_exact(tensors, scale=None, **kwargs):
    """`tiled` is the definition, for the same arguments."""
    assert_equal_functions(with_scale(scale, 'tiled'), with_scale(scale, 'reference'), tensors, **kwargs)


@pytest.mark.parametrize('shape', SHAPES)
def test_the_definition_is_attention_of_each_pixel_to_its_row_and_its_column(shape):
    tensors = inputs(*shape, value_dim=5)
    out = with_scale(0.7, 'reference')(**tensors)
    B, H, W, heads, _ = shape
    for b, y, x, h in itertools.product(*map(range, (B, H, W, heads))):
        pixels = {(y, column) for column in range(W)} | {(row, x) for row in range(H)}
        assert len(pixels) == H + W - 1
        rows, columns = torch.tensor(sorted(pixels)).T
        k, v = (tensors[name][b, rows, columns, h] for name in ('key', 'value'))
        expected = (0.7 * k @ tensors['query'][b, y, x, h]).softmax(0) @ v
        torch.testing.assert_close(out[b, y, x, h], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('value_dim', [None, 24, 3])
@pytest.mark.parametrize('shape', SHAPES[:-1])
def test_tiled_equals_the_definition(shape, value_dim, dtype):
    assert_exact(inputs(*shape, value_dim=value_dim, dtype=dtype), 0.3)


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_a_single_pixel_is_its_own_value(implementation):
    tensors = inputs(2, 1, 1, 2, 8)
    output, gradients = output_and_gradients(with_scale(implementation=implementation), tensors)
    assert_close(output, tensors['value'])
    assert gradients['query'].abs().max() < 1e-14
    assert gradients['key'].abs().max() < 1e-14


def test_scores_too_great_for_their_exponentials():
    tensors = inputs(2, 5, 6, 1, 8, dtype=torch.float32)
    output, gradients = output_and_gradients(with_scale(100.0), tensors)
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert_close(output, with_scale(100.0, 'reference')(**tensors), tolerance=1e-4)  # scores of 1e3 round by 1e-4


@pytest.mark.parametrize('limit', [1, 100, 700, 3000])
def test_chunks_change_nothing(limit, monkeypatch):
    monkeypatch.setattr(tiled, 'CPU_CHUNK', limit)
    assert_exact(inputs(3, 13, 10, 2, 6, value_dim=11))


def test_no_chunk_holds_more_than_its_limit_or_a_line(monkeypatch):
    monkeypatch.setattr(tiled, 'CPU_CHUNK', 1000)
    found = []
    scores = tiled.Lines.scores
    monkeypatch.setattr(tiled.Lines, 'scores', lambda *args: found.append(scores(*args)) or found[-1])
    output_and_gradients(with_scale(), inputs(2, 40, 8, 2, 6))
    assert {x.shape[1:] for x in found} == {(8, 8), (40, 40)}
    assert max(x.numel() for x in found if x.shape[1] == 8) <= 1000
    assert {len(x) for x in found if x.shape[1] == 40} == {1}


@pytest.mark.parametrize('needs', [['query'], ['key'], ['value'], ['query', 'value']])
def test_gradients_of_some_inputs(needs):
    assert_exact(inputs(1, 7, 9, 2, 8), needs=needs)


def test_gradients_of_an_expanded_gradient():
    gradient = torch.ones((), dtype=torch.float64).expand(2, 7, 9, 2, 8)
    assert_exact(inputs(2, 7, 9, 2, 8), grad_output=gradient)


def test_maps_of_convolutions_and_a_contiguous_output():
    tensors = {name: random(2, 8, 7, 9, seed=i) for i, name in enumerate(('query', 'key', 'value'))}
    tensors = {name: x.permute(0, 2, 3, 1).unsqueeze(3) for name, x in tensors.items()}
    assert_exact(tensors)
    assert with_scale()(**tensors).is_contiguous()


def test_inputs_are_left_as_they_are():
    tensors = {name: x.contiguous() for name, x in inputs(1, 4, 5, 1, 8).items()}  # needs no copies
    before = {name: x.clone() for name, x in tensors.items()}
    output_and_gradients(with_scale(), tensors)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    tensors = inputs(3, 6, 7, 2, 8, dtype=torch.float32)
    alone = with_scale()(**{name: x[1:2] for name, x in tensors.items()})
    assert_close(with_scale()(**tensors)[1:2], alone)


@pytest.mark.parametrize('shape', [(0, 6, 6, 2, 8), (2, 0, 6, 2, 8), (2, 6, 0, 2, 8)])
def test_the_empty_map(shape):
    output, gradients = output_and_gradients(with_scale(), inputs(*shape))
    assert output.shape == shape
    assert gradients['query'].shape == shape


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_meta_tensors_give_shapes(implementation):
    q = torch.empty(2, 7, 9, 2, 8, device='meta', dtype=torch.float16)
    v = torch.empty(2, 7, 9, 2, 24, device='meta', dtype=torch.float16)
    out = crisscross_attention(q, q, v, implementation=implementation)
    assert (out.device.type, out.shape, out.dtype) == ('meta', v.shape, v.dtype)


@pytest.mark.parametrize('shape', SHAPES[:3])
def test_the_operator_is_registered_well(shape):
    tensors = (x.detach().requires_grad_() for x in inputs(*shape, value_dim=5).values())
    torch.library.opcheck(torch.ops.zoo.crisscross_attention.default, (*tensors, 0.3))


@pytest.mark.parametrize(('implementation', 'dynamic'), [('tiled', True), ('reference', False)])
def test_compiled_graphs_are_whole_and_exact(implementation, dynamic):
    attend = with_scale(implementation=implementation)
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    assert_equal_functions(compiled, attend, inputs(2, 7, 9, 2, 8, value_dim=5))


class Recurrent(torch.nn.Module):
    """A caller that applies it twice, as CCNet does."""

    def forward(self, x):
        for _ in range(2):
            x = x + crisscross_attention(x[..., :2], x[..., 2:4], x, 1.0)
        return x


@pytest.mark.parametrize('strict', [False, True])
def test_exported_programs_take_other_sizes(strict):
    sizes = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Recurrent(), (random(2, 9, 13, 1, 8),), dynamic_shapes=(sizes,), strict=strict)
    assert 'zoo.crisscross_attention.default' in {str(node.target) for node in program.graph.nodes}
    for size in ((12, 10), (21, 8)):
        x = random(3, *size, 1, 8)
        assert_close(program.module()(x), Recurrent()(x))


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_autocast_casts_once_and_computes_in_float32(implementation):
    tensors = inputs(2, 7, 9, 2, 8, value_dim=16, dtype=torch.float32)
    attend = with_scale(implementation=implementation)
    with torch.autocast('cpu', torch.bfloat16):
        output, gradients = output_and_gradients(attend, tensors)
    expected, expected_gradients = output_and_gradients(attend, {name: x.bfloat16() for name, x in tensors.items()})
    assert output.dtype == torch.bfloat16
    assert_close(output, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert_close(gradient, expected_gradients[name], name, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (dict(query=torch.ones(1, 6, 6, 8)), ValueError, r'\(batch, height, width, heads, head_dim\)'),
        (dict(key=torch.ones(1, 6, 7, 1, 8)), ValueError, r'key must have the shape of query, \(1, 6, 6, 1, 8\)'),
        (dict(value=torch.ones(1, 6, 7, 1, 8)), ValueError, r'value must be \(1, 6, 6, 1.*got \(1, 6, 7, 1, 8\)'),
        (dict(value=torch.ones(1, 6, 6, 1)), ValueError, r'value must be .* got \(1, 6, 6, 1\)'),
        (dict(value=torch.ones(1, 6, 6, 1, 8).double()), TypeError, 'dtypes must be equal'),
        (dict(query=torch.ones(1, 6, 6, 1, 8).long()), TypeError, 'query must be floating'),
        (dict(query=None), TypeError, 'query must be a tensor'),
        (dict(key=torch.ones(1, 6, 6, 1, 8, device='meta')), ValueError, 'one device'),
        (dict(implementation='fastest'), ValueError, "unknown implementation 'fastest'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    tensors = dict.fromkeys(('query', 'key', 'value'), torch.ones(1, 6, 6, 1, 8))
    with pytest.raises(error, match=message):
        crisscross_attention(**{**tensors, **change})


def test_scale_zero_is_not_the_default():
    value = inputs(1, 3, 4, 1, 8)['value']
    everything = value.sum(1, keepdim=True) + value.sum(2, keepdim=True) - value
    assert_close(with_scale(0.0)(value, value, value), everything / 6)


@pytest.mark.parametrize('situation', [{}, {'compiling': True}, {'exporting': True}])
def test_dispatch_takes_tiled_and_says_why(situation):
    explanation = explain('crisscross_attention', **situation)
    assert explanation.implementation == 'tiled'
    assert explanation.reason


def test_nothing_of_the_size_of_the_scores_is_kept():
    tensors = {name: x.requires_grad_() for name, x in inputs(2, 20, 21, 1, 4).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        crisscross_attention(**tensors)
    assert max(kept) == tensors['query'].numel()
