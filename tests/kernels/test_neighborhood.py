"""Neighborhood attention: the definition against a loop over queries, every implementation against the definition."""

import math

import pytest
import torch
from torch.export import Dim

from zoo.kernels import explain, neighborhood_attention, use
from zoo.kernels.neighborhood import tiled

from .harness import TOLERANCE, assert_close, assert_equal_functions, output_and_gradients, packed, random

HEADS, HEAD_DIM = 3, 8


def attention(kernel_size, dilation=1, implementation=None, scale=None):
    def attend(query, key, value, bias=None):
        return neighborhood_attention(query, key, value, kernel_size, dilation, bias, scale, implementation)

    return attend


def inputs(*sizes, kernel_size=None, batch=2, heads=HEADS, head_dim=HEAD_DIM, dtype=torch.float64):
    """query, key, value, and with a kernel size a bias too."""
    tensors = dict(zip(('query', 'key', 'value'), packed(batch, *sizes, heads, head_dim, dtype=dtype), strict=True))
    if kernel_size is not None:
        kernels = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,) * len(sizes)
        tensors['bias'] = random(heads, *(2 * k - 1 for k in kernels), dtype=dtype)
    return tensors


def assert_exact(tensors, kernel_size, dilation=1, scale=None, **kwargs):
    candidate, reference = (attention(kernel_size, dilation, name, scale) for name in ('tiled', 'reference'))
    assert_equal_functions(candidate, reference, tensors, **kwargs)


def window(i, length, kernel_size, dilation):
    """Positions of the keys of query i, and their relative position index."""
    residue, index = i % dilation, i // dilation
    members = math.ceil((length - residue) / dilation)
    start = min(max(index - kernel_size // 2, 0), members - kernel_size)
    return [((start + t) * dilation + residue, start + t - index + kernel_size - 1) for t in range(kernel_size)]


@pytest.mark.parametrize(('height', 'width', 'kernel_size', 'dilation'), [(5, 7, (3, 5), 1), (8, 7, (3, 3), (2, 1))])
def test_the_definition_attends_to_the_clamped_window_of_the_residue_class(height, width, kernel_size, dilation):
    q, k, v, bias = inputs(height, width, kernel_size=kernel_size).values()
    out = neighborhood_attention(q, k, v, kernel_size, dilation, bias, implementation='reference')
    dilation = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    for y in range(height):
        for x in range(width):
            rows, columns = (
                window(y, height, kernel_size[0], dilation[0]),
                window(x, width, kernel_size[1], dilation[1]),
            )
            for head in range(HEADS):
                taps = [(a, b, bias[head, i, j]) for a, i in rows for b, j in columns]
                keys = torch.stack([k[:, a, b, head] for a, b, _ in taps], 1)
                values = torch.stack([v[:, a, b, head] for a, b, _ in taps], 1)
                scores = (keys @ q[:, y, x, head, :, None]).squeeze(-1) * HEAD_DIM**-0.5
                weights = (scores + torch.stack([tap[2] for tap in taps])).softmax(-1)
                assert_close(out[:, y, x, head], (weights[..., None] * values).sum(1))


@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize(
    ('height', 'width', 'kernel_size', 'dilation'),
    [
        (3, 3, 3, 1),  # the window is the map
        (7, 7, 7, 1),
        (7, 11, 7, 1),  # along one axis
        (57, 14, 7, 1),  # many strips, the last one of one row
        (14, 57, 7, 1),  # many tiles, the last one of one column
        (9, 23, (3, 5), 1),
        (16, 19, (5, 13), 1),
        (21, 21, 7, 3),  # every residue class is one window
        (23, 22, (7, 5), (3, 2)),  # residue classes of two sizes
        (11, 30, 3, (1, 4)),
        (5, 8, 1, 2),  # every query sees itself
    ],
)
def test_tiled_is_exact_with_every_gradient(height, width, kernel_size, dilation, biased):
    tensors = inputs(height, width, kernel_size=kernel_size if biased else None)
    assert_exact(tensors, kernel_size, dilation)


@pytest.mark.parametrize(('length', 'kernel_size', 'dilation'), [(7, 7, 1), (29, 5, 1), (20, 3, 4), (23, 7, 3)])
def test_one_axis_is_exact_with_every_gradient(length, kernel_size, dilation):
    assert_exact(inputs(length, kernel_size=kernel_size), kernel_size, dilation)
    q, k, v = packed(2, length, HEADS, HEAD_DIM)
    row = neighborhood_attention(*(x[:, None] for x in (q, k, v)), (1, kernel_size), (1, dilation))
    assert_close(neighborhood_attention(q, k, v, kernel_size, dilation), row[:, 0])


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('head_dim', [24, 32, 48])
def test_every_dtype_and_head_dim_is_within_its_tolerance(dtype, head_dim):
    assert_exact(inputs(13, 15, kernel_size=5, head_dim=head_dim, dtype=dtype), 5, 2)


def test_half_precision_takes_a_float32_bias_and_gives_it_a_float32_gradient():
    tensors = inputs(9, 10, dtype=torch.bfloat16) | {'bias': random(HEADS, 5, 5, dtype=torch.float32)}
    assert_exact(tensors, 3)


@pytest.mark.parametrize('scale', [0, 0.0, 2.5])
def test_a_scale_is_kept_zero_too(scale):
    assert_exact(inputs(9, 8, kernel_size=3), 3, scale=scale)
    q, k, v = packed(1, 9, 8, HEADS, HEAD_DIM)
    one = neighborhood_attention(q, k, v, 3, scale=scale)
    assert_close(one, neighborhood_attention(q * scale, k, v, 3, scale=1.0))


def test_large_scores_do_not_overflow():
    tensors = inputs(9, 8, dtype=torch.float32)
    tensors['query'], tensors['key'] = tensors['query'] * 100, tensors['key'] * 100
    output, gradients = output_and_gradients(attention(3), tensors)
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize('needs', [['query'], ['key'], ['value'], ['bias'], ['key', 'bias'], []])
def test_gradients_of_some_inputs_are_those_of_all(needs):
    assert_exact(inputs(9, 10, kernel_size=3), 3, needs=needs)


def test_a_gradient_without_strides_is_taken():
    assert_exact(
        inputs(9, 10, kernel_size=3), 3, 2, grad_output=torch.ones(()).double().expand(2, 9, 10, HEADS, HEAD_DIM)
    )


def test_any_strides_are_taken():
    q, k, v = packed(10, 2, 9, HEAD_DIM, HEADS)
    tensors = {n: x.permute(1, 2, 0, 4, 3) for n, x in (('query', q), ('key', k))}
    tensors['value'] = v[:, :1].permute(1, 2, 0, 4, 3).expand(2, 9, 10, HEADS, HEAD_DIM)
    output, gradients = output_and_gradients(attention(3, implementation='tiled'), tensors)
    copies = {name: x.contiguous() for name, x in tensors.items()}
    expected, expected_gradients = output_and_gradients(attention(3, implementation='reference'), copies)
    assert output.is_contiguous()
    assert_close(output, expected)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], name)


def test_a_chunk_boundary_changes_nothing(monkeypatch):
    tensors = inputs(13, 11, kernel_size=3, batch=5)
    whole = output_and_gradients(attention(3, 2), tensors)
    monkeypatch.setattr(tiled, 'CHUNK_BYTES', 2 * 4 * 13 * 11 * HEADS * HEAD_DIM)  # two images
    chunked = output_and_gradients(attention(3, 2), tensors)
    assert_close(chunked[0], whole[0])
    for name, gradient in chunked[1].items():
        assert_close(gradient, whole[1][name], name)


def test_two_calls_give_the_same_bits():
    tensors = inputs(29, 30, kernel_size=7, dtype=torch.float32)
    (first, first_gradients), (second, second_gradients) = (
        output_and_gradients(attention(7), tensors) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert all(torch.equal(gradient, second_gradients[name]) for name, gradient in first_gradients.items())


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use():
    tensors = inputs(17, 12, kernel_size=3)
    with torch.inference_mode():
        neighborhood_attention(**tensors, kernel_size=3)
    assert_exact(tensors, 3)


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_an_empty_batch_stays_empty(implementation):
    tensors = inputs(9, 8, kernel_size=3, batch=0)
    output, gradients = output_and_gradients(attention(3, 2, implementation), tensors)
    assert output.shape == (0, 9, 8, HEADS, HEAD_DIM)
    assert not gradients['bias'].any()


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_meta_tensors_give_shapes(implementation):
    tensors = {name: x.to('meta') for name, x in inputs(9, 8, kernel_size=3).items()}
    output, gradients = output_and_gradients(
        attention(3, 2, implementation), tensors, torch.empty(2, 9, 8, HEADS, HEAD_DIM, device='meta')
    )
    assert output.shape == (2, 9, 8, HEADS, HEAD_DIM)
    assert output.device.type == 'meta'
    assert gradients['bias'].shape == (HEADS, 5, 5)


@pytest.mark.parametrize('biased', [False, True])
def test_the_operator_keeps_the_rules_of_custom_operators(biased):
    tensors = [x.contiguous() for x in inputs(6, 7, kernel_size=3).values()]
    tensors = [x.requires_grad_() for x in tensors[: 3 + biased]] + [None] * (not biased)
    torch.library.opcheck(torch.ops.zoo.neighborhood_attention_tiled, (*tensors, [3, 3], [2, 1], 0.5))


@pytest.mark.parametrize('implementation', ['reference', 'tiled', None])
def test_compiles_whole_with_every_gradient(implementation):
    torch.compiler.reset()
    compiled = torch.compile(attention(3, 2, implementation), fullgraph=True, dynamic=True, backend='aot_eager')
    for sizes in ((9, 7), (12, 11)):
        assert_equal_functions(compiled, attention(3, 2, 'reference'), inputs(*sizes, kernel_size=3))


def test_compiles_to_code_forward_and_backward():
    torch.compiler.reset()
    compiled = torch.compile(attention(3), fullgraph=True, dynamic=False)
    tensors = inputs(8, 7, kernel_size=3, dtype=torch.float32)
    assert_equal_functions(compiled, attention(3, implementation='reference'), tensors)


class Attend(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(random(HEADS, 5, 5))

    def forward(self, qkv):
        return neighborhood_attention(*qkv.unbind(3), 3, 2, self.bias)


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_exports_with_free_batch_height_and_width(implementation):
    model = Attend()
    free = {0: Dim('batch'), 1: Dim('height', min=6), 2: Dim('width', min=6)}
    with use(implementation):
        program = torch.export.export(model, (random(2, 9, 10, 3, HEADS, HEAD_DIM),), dynamic_shapes=(free,))
    calls = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert ('zoo.neighborhood_attention_tiled.default' in calls) == (implementation == 'tiled')
    for batch, height, width in ((2, 9, 10), (3, 6, 13)):
        qkv = random(batch, height, width, 3, HEADS, HEAD_DIM)
        assert_close(program.module()(qkv), model(qkv))


def test_exports_as_one_operator_unless_told_otherwise():
    program = torch.export.export(Attend(), (random(2, 9, 10, 3, HEADS, HEAD_DIM),))
    assert 'zoo.neighborhood_attention_tiled.default' in {str(node.target) for node in program.graph.nodes}


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_autocast_casts_query_key_and_value_and_keeps_the_bias(implementation):
    tensors = inputs(9, 10, kernel_size=3, dtype=torch.float32)
    half = {name: x if name == 'bias' else x.bfloat16() for name, x in tensors.items()}
    attend = attention(3, 2, implementation)
    expected, expected_gradients = output_and_gradients(attend, half)
    with torch.autocast('cpu', torch.bfloat16):  # the backward too
        output, gradients = output_and_gradients(attend, tensors)
        again, _ = output_and_gradients(attend, half)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    assert torch.equal(again, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected_gradients[name].float()), name


def test_autocast_leaves_double_precision():
    tensors = inputs(9, 10, kernel_size=3)
    with torch.autocast('cpu', torch.bfloat16):
        output = neighborhood_attention(**tensors, kernel_size=3)
    assert_close(output, neighborhood_attention(**tensors, kernel_size=3, implementation='reference'))


def test_memory_does_not_grow_with_the_neighbors():
    """The gathered keys alone would be 49 times the input."""
    from zoo.benchmarks.timing import peak_memory

    tensors = inputs(96, 96, kernel_size=7, head_dim=32, heads=4, dtype=torch.float32)
    attention(7)(**tensors)
    own = sum(x.nbytes for x in tensors.values())
    assert peak_memory(lambda: output_and_gradients(attention(7), tensors)) < 8 * own


def test_the_compiler_gets_the_definition_unless_dilated_and_everything_else_the_tiles():
    assert explain('neighborhood_attention').implementation == 'tiled'
    assert explain('neighborhood_attention', compiling=True).implementation == 'reference'
    assert explain('neighborhood_attention', compiling=True, dilation=(1, 1)).implementation == 'reference'
    assert explain('neighborhood_attention', compiling=True, dilation=(1, 2)).implementation == 'tiled'
    assert explain('neighborhood_attention', exporting=True).implementation == 'tiled'
    assert explain('neighborhood_attention', device='meta').implementation == 'tiled'


Q = torch.zeros(2, 8, 9, 3, 4)


@pytest.mark.parametrize(
    ('error', 'message', 'arguments'),
    [
        (ValueError, r'got shape \(8, 9, 3\)', {'query': Q[0, ..., 0], 'key': Q[0, ..., 0], 'value': Q[0, ..., 0]}),
        (ValueError, r'one shape.*\(2, 8, 9, 3, 4\), \(2, 8, 8, 3, 4\)', {'key': Q[:, :, :8]}),
        (ValueError, r'one shape', {'value': Q[..., :2]}),
        (ValueError, r'odd, got 4', {'kernel_size': 4}),
        (ValueError, r'odd, got 2', {'kernel_size': (3, 2)}),
        (ValueError, r'2 ints, got \(3, 3, 3\)', {'kernel_size': (3, 3, 3)}),
        (ValueError, r'positive, got 0', {'dilation': 0}),
        (TypeError, r'2 ints, got 3.0', {'kernel_size': 3.0}),
        (ValueError, r'9 \* 1 exceeds the size 8', {'kernel_size': (9, 9)}),
        (ValueError, r'5 \* 2 exceeds the size 9', {'kernel_size': 5, 'dilation': (1, 2)}),
        (ValueError, r'\(3, 5, 5\), got \(3, 3, 3\)', {'bias': torch.zeros(3, 3, 3)}),
        (TypeError, r'bias must be floating', {'bias': torch.zeros(3, 5, 5, dtype=torch.int)}),
        (ValueError, r'one device.*meta', {'bias': torch.zeros(3, 5, 5, device='meta')}),
        (ValueError, r'one device.*key on meta', {'key': Q.to('meta')}),
        (TypeError, r'key torch.float64', {'key': Q.double()}),
        (TypeError, r'query must be floating, got torch.int64', {'query': Q.long()}),
        (TypeError, r'value must be a tensor, got NoneType', {'value': None}),
        (
            ValueError,
            r"unknown implementation 'cuda', expected one of triton, tiled, reference",
            {'implementation': 'cuda'},
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(error, message, arguments):
    with pytest.raises(error, match=message):
        neighborhood_attention(**({'query': Q, 'key': Q, 'value': Q, 'kernel_size': 3} | arguments))
