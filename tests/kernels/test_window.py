"""Window attention: every implementation against the definition, and the definition against a loop over windows."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from zoo.kernels import explain, window_attention
from zoo.kernels.window import tiled

from .harness import TOLERANCE, assert_close, assert_equal_functions, output_and_gradients, packed, random

DTYPES = list(TOLERANCE)


def pair(value):
    return (value, value) if isinstance(value, int) else value


def inputs(*shape, window_size=None, dtype=torch.float64):
    """query, key, value, and a bias for windows of window_size."""
    tensors = dict(zip(('query', 'key', 'value'), packed(*shape, dtype=dtype), strict=True))
    if window_size is not None:
        rows, columns = pair(window_size)
        tensors['bias'] = random(shape[3], rows * columns, rows * columns, dtype=dtype)
    return tensors


def keys(*shape, share=0.6):
    """A mask of pixels, `share` of them keys, and of a corner without keys."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < share
    mask[..., :4, :4] = False
    return mask


def with_windows(window_size, dilation=1, key_mask=None, scale=None, implementation=None, offset=0):
    def attend(query, key, value, bias=None):
        return window_attention(query, key, value, window_size, dilation, bias, key_mask, scale, offset, implementation)

    return attend


def assert_exact(tensors, *arguments, offset=0, **kwargs):
    """`tiled` is the definition, for the same arguments."""
    candidate, reference = (
        with_windows(*arguments, implementation=name, offset=offset) for name in ('tiled', 'reference')
    )
    assert_equal_functions(candidate, reference, tensors, **kwargs)


@pytest.mark.parametrize('dilation', [(1, 1), (2, 3)])
def test_the_definition_is_attention_of_each_window_to_its_keys(dilation):
    size, window = (9, 11), (2, 3)
    tensors = inputs(2, *size, 2, 8, window_size=window)
    key_mask = keys(2, *size)
    out = with_windows(window, dilation, key_mask, implementation='reference')(**tensors)
    members = {}  # (row block, row residue, column block, column residue) -> [(row, column, position in the window)]
    for y, x in itertools.product(*map(range, size)):
        (block_y, inside_y), (block_x, inside_x) = (
            divmod(n, w * d) for n, w, d in zip((y, x), window, dilation, strict=True)
        )
        position = inside_y // dilation[0] * window[1] + inside_x // dilation[1]
        which = block_y, inside_y % dilation[0], block_x, inside_x % dilation[1]
        members.setdefault(which, []).append((y, x, position))
    for pixels, b, h in itertools.product(members.values(), range(2), range(2)):
        y, x, position = torch.tensor(pixels).T
        q, k, v = (tensors[name][b, y, x, h] for name in ('query', 'key', 'value'))
        scores = q @ k.T * 8**-0.5 + tensors['bias'][h][position[:, None], position]
        is_key = key_mask[b, y, x]
        expected = scores[:, is_key].softmax(-1) @ v[is_key] if is_key.any() else torch.zeros_like(q)
        torch.testing.assert_close(out[b, y, x, h], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('has_bias', [True, False])
@pytest.mark.parametrize(
    ('shape', 'window_size', 'dilation'),
    [
        ((2, 14, 21, 2, 32), 7, 1),  # divides: Swin, MaxViT's blocks
        ((2, 13, 10, 3, 24), (4, 3), 1),  # cut at both sides
        ((1, 12, 24, 2, 48), 3, (2, 4)),  # divides: CrossFormer's long distance
        ((2, 19, 23, 2, 24), (3, 2), (2, 5)),  # cut at both sides, in windows of two extents
        ((1, 9, 11, 2, 16), 4, (3, 3)),  # MaxViT's grid, of a map that it does not divide
        ((2, 5, 3, 2, 8), 7, 1),  # one window, greater than the map
        ((1, 4, 3, 1, 8), 2, 9),  # a dilation greater than the map: every pixel alone
        ((1, 6, 5, 2, 8), 1, 1),  # windows of one pixel
    ],
)
def test_tiled_equals_the_definition(shape, window_size, dilation, has_bias, dtype):
    tensors = inputs(*shape, window_size=window_size if has_bias else None, dtype=dtype)
    assert_exact(tensors, window_size, dilation, None, 0.3)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('mask_shape', [(9, 11), (2, 9, 11)])
@pytest.mark.parametrize('dilation', [1, (1, 3)])
def test_masked_keys_take_no_part(dilation, mask_shape, dtype):
    tensors = inputs(2, 9, 11, 2, 16, window_size=(2, 3), dtype=dtype)
    assert_exact(tensors, (2, 3), dilation, keys(*mask_shape))


def test_a_window_without_keys_gives_zeros_and_no_gradient():
    tensors = inputs(1, 6, 6, 2, 8, window_size=3)
    key_mask = torch.ones(6, 6, dtype=torch.bool)
    key_mask[:3, :3] = False
    assert_exact(tensors, 3, 1, key_mask)
    output, gradients = output_and_gradients(with_windows(3, key_mask=key_mask), tensors)
    assert output[:, :3, :3].eq(0).all()
    assert output[:, 3:].ne(0).all()
    for name in ('query', 'key', 'value'):
        assert gradients[name][:, :3, :3].eq(0).all()


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_a_map_that_windows_do_not_divide_is_one_padded_with_masked_keys(implementation):
    tensors = inputs(2, 7, 10, 2, 8, window_size=(3, 2))
    padded = {name: F.pad(x, (0, 0, 0, 0, 0, 2, 0, 5)) for name, x in tensors.items() if name != 'bias'}
    key_mask = F.pad(torch.ones(7, 10, dtype=torch.bool), (0, 2, 0, 5))
    windows = dict(window_size=(3, 2), dilation=(2, 3), implementation=implementation)
    out = with_windows(key_mask=key_mask, **windows)(**padded, bias=tensors['bias'])
    assert_close(with_windows(**windows)(**tensors), out[:, :7, :10])


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
@pytest.mark.parametrize(('size', 'offset'), [((7, 10), (2, 1)), ((7, 10), (0, 3)), ((2, 6), (2, 2)), ((1, 4), (2, 0))])
def test_windows_with_an_offset_are_those_of_a_map_that_begins_earlier(implementation, size, offset):
    window, (H, W) = (3, 4), size
    tensors = inputs(2, H, W, 2, 8, window_size=window)
    top, left = (-first % side for first, side in zip(offset, window, strict=True))
    padded = {name: F.pad(x, (0, 0, 0, 0, left, 0, top, 0)) for name, x in tensors.items() if name != 'bias'}
    key_mask = F.pad(torch.ones(H, W, dtype=torch.bool), (left, 0, top, 0))
    out = with_windows(window, key_mask=key_mask, implementation='reference')(**padded, bias=tensors['bias'])
    found = with_windows(window, implementation=implementation, offset=offset)(**tensors)
    assert_close(found, out[:, top:, left:])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('has_mask', [False, True])
@pytest.mark.parametrize(
    ('shape', 'window_size', 'offset'),
    [
        ((2, 14, 21, 2, 32), 7, 4),  # divides: Swin's shifted windows
        ((2, 13, 10, 3, 24), (4, 3), (1, 2)),  # cut at all sides
        ((2, 13, 10, 2, 24), (4, 3), (0, 2)),
        ((1, 2, 9, 2, 16), (7, 4), (3, 1)),  # a map of less than the first window
    ],
)
def test_tiled_windows_with_an_offset_equal_the_definition(shape, window_size, offset, has_mask, dtype):
    tensors = inputs(*shape, window_size=window_size, dtype=dtype)
    assert_exact(tensors, window_size, 1, keys(*shape[1:3]) if has_mask else None, offset=offset)


def test_windows_with_an_offset_are_swins_rolled_ones_with_their_mask():
    size, window, shift = (12, 8), 4, (1, 2)
    tensors = inputs(2, *size, 2, 8, window_size=window)
    rows, columns = (torch.arange(side) for side in (window, window))
    steps = (rows[:, None] - rows + 3)[:, None, :, None] * 7 + (columns[:, None] - columns + 3)[:, None]
    tensors['bias'] = random(49, 2)[steps.reshape(16, 16)].permute(2, 0, 1)
    regions = [torch.arange(side) + first for side, first in zip(size, shift, strict=True)]
    regions = (regions[0] >= size[0])[:, None] * 2 + (regions[1] >= size[1])  # what the roll brings from the other end

    def windows(x):
        return x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    q, k, v = (windows(tensors[name].roll((-1, -2), (1, 2))).transpose(2, 3) for name in ('query', 'key', 'value'))
    region = windows(regions[None, :, :, None])[..., 0]
    scores = q @ k.mT * 8**-0.5 + tensors['bias'] - 1e9 * (region[..., None] != region[..., None, :])[:, :, None]
    out = (scores.softmax(-1) @ v).transpose(2, 3).unflatten(2, (window, window)).unflatten(1, (3, 2))
    out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll(shift, (1, 2))
    for implementation in ('tiled', 'reference'):
        assert_close(with_windows(window, offset=shift, implementation=implementation)(**tensors), out)


@pytest.mark.parametrize('has_mask', [False, True])
@pytest.mark.parametrize('limit', [1, 60, 700, 5000])
def test_chunks_and_strips_change_nothing(limit, has_mask, monkeypatch):
    monkeypatch.setattr(tiled, 'CPU_CHUNK', limit)
    tensors = inputs(3, 13, 10, 2, 16, window_size=(4, 3))
    assert_exact(tensors, (4, 3), (1, 2), keys(13, 10) if has_mask else None)


@pytest.mark.parametrize('limit', [1, 5, 6, 30, 1000])
def test_boxes_cover_everything_once(limit):
    count = torch.zeros(2, 3, 1, 5)
    for box in tiled.boxes(count.shape, limit):
        assert count[box].numel() <= limit
        count[box] += 1
    assert count.eq(1).all()


@pytest.mark.parametrize('needs', [['query'], ['key'], ['value'], ['bias'], ['query', 'value']])
def test_gradients_of_some_inputs(needs):
    assert_exact(inputs(1, 7, 9, 2, 16, window_size=3), 3, (1, 2), needs=needs)


def test_gradients_of_an_expanded_gradient():
    gradient = torch.ones((), dtype=torch.float64).expand(2, 7, 9, 2, 16)
    assert_exact(inputs(2, 7, 9, 2, 16, window_size=3), 3, grad_output=gradient)


def test_transposed_inputs_and_a_contiguous_output():
    tensors = {name: random(2, 16, 9, 2, 6, seed=i).transpose(1, 4) for i, name in enumerate(('query', 'key', 'value'))}
    tensors['bias'] = random(9, 2, 9).transpose(0, 1)
    assert_exact(tensors, 3, 2)
    assert with_windows(3, 2)(**tensors).is_contiguous()


def test_a_bias_of_another_dtype_keeps_its_own_in_the_gradient():
    tensors = inputs(2, 7, 9, 2, 16, window_size=3, dtype=torch.bfloat16)
    tensors['bias'] = tensors['bias'].float()
    _, gradients = output_and_gradients(with_windows(3), tensors)
    assert gradients['bias'].dtype == torch.float32
    exact = {name: x.double() for name, x in tensors.items()}
    _, expected = output_and_gradients(with_windows(3, implementation='reference'), exact)
    assert_close(gradients['bias'], expected['bias'], tolerance=TOLERANCE[torch.bfloat16])


def test_inputs_are_left_as_they_are():
    tensors = {name: x.contiguous() for name, x in inputs(1, 4, 4, 1, 8, window_size=4).items()}  # needs no copies
    before = {name: x.clone() for name, x in tensors.items()}
    output_and_gradients(with_windows(4), tensors)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@pytest.mark.parametrize('shape', [(0, 6, 6, 2, 8), (2, 0, 6, 2, 8)])
def test_the_empty_map(shape):
    output, gradients = output_and_gradients(with_windows(3), inputs(*shape, window_size=3))
    assert output.shape == shape
    assert gradients['query'].shape == shape
    assert gradients['bias'].eq(0).all()


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_meta_tensors_give_shapes(implementation):
    q = torch.empty(2, 7, 9, 2, 16, device='meta', dtype=torch.float16)
    bias = torch.empty(2, 9, 9, device='meta')
    key_mask = torch.empty(7, 9, device='meta', dtype=torch.bool)
    out = window_attention(q, q, q, 3, 2, bias, key_mask, implementation=implementation)
    assert (out.device.type, out.shape, out.dtype) == ('meta', q.shape, q.dtype)


@pytest.mark.parametrize('has_bias', [True, False])
@pytest.mark.parametrize('has_mask', [True, False])
@pytest.mark.parametrize('keeps', [True, False])
def test_the_operator_is_registered_well(has_bias, has_mask, keeps):
    query, key, value, bias = (x.detach().requires_grad_() for x in inputs(2, 7, 9, 2, 8, window_size=3).values())
    key_mask = keys(7, 9)[None] if has_mask else None
    for dilation, offset in (((1, 2), (0, 0)), ((1, 1), (1, 2))):
        arguments = query, key, value, bias if has_bias else None, key_mask, (3, 3), dilation, 0.3, offset, keeps
        torch.library.opcheck(torch.ops.zoo.window_attention.default, arguments)


@pytest.mark.parametrize(('implementation', 'dynamic'), [('tiled', True), ('reference', False)])
def test_compiled_graphs_are_whole_and_exact(implementation, dynamic):
    attend = with_windows(3, (1, 2), keys(7, 9), implementation=implementation)
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    assert_equal_functions(compiled, attend, inputs(2, 7, 9, 2, 8, window_size=3))


class Grid(torch.nn.Module):
    """A caller whose dilation follows the map's size."""

    def forward(self, x, bias):
        return window_attention(x, x, x, 4, (-(-x.shape[1] // 4), -(-x.shape[2] // 4)), bias)


@pytest.mark.parametrize('strict', [False, True])
def test_exported_programs_take_other_sizes(strict):
    sizes = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    bias = random(2, 16, 16)
    example = random(2, 9, 13, 2, 8), bias
    program = torch.export.export(Grid(), example, dynamic_shapes=(sizes, None), strict=strict)
    assert 'zoo.window_attention.default' in {str(node.target) for node in program.graph.nodes}
    for size in ((12, 10), (21, 8)):
        x = random(3, *size, 2, 8)
        assert_close(program.module()(x, bias), Grid()(x, bias))


@pytest.mark.parametrize('implementation', ['tiled', 'reference'])
def test_autocast_casts_once_and_computes_in_float32(implementation):
    tensors = inputs(2, 7, 9, 2, 16, window_size=3, dtype=torch.float32)
    attend = with_windows(3, (1, 2), implementation=implementation)
    with torch.autocast('cpu', torch.bfloat16):
        output, gradients = output_and_gradients(attend, tensors)
    rounded = {name: x if name == 'bias' else x.bfloat16() for name, x in tensors.items()}
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
        (dict(key=torch.ones(1, 6, 7, 1, 8)), ValueError, r'key must have the shape of query, \(1, 6, 6, 1, 8\)'),
        (dict(value=torch.ones(1, 6, 6, 1, 8).double()), TypeError, 'dtypes must be equal'),
        (dict(query=torch.ones(1, 6, 6, 1, 8).long()), TypeError, 'query must be floating'),
        (dict(query=None), TypeError, 'query must be a tensor'),
        (dict(key=torch.ones(1, 6, 6, 1, 8, device='meta')), ValueError, 'one device'),
        (dict(window_size=0), ValueError, 'window_size.*positive'),
        (dict(window_size=(3, 3, 3)), ValueError, 'window_size must be an int or 2 ints'),
        (dict(window_size=3.0), TypeError, r'window_size.*3\.0'),
        (dict(dilation=(1, 0)), ValueError, r'dilation.*\(1, 0\)'),
        (dict(dilation=True), TypeError, 'dilation.*True'),
        (dict(offset=3), ValueError, r'offset must be 0 or more and less than window_size \(3, 3\), got 3'),
        (dict(offset=(0, -1)), ValueError, r'offset.*\(0, -1\)'),
        (dict(offset=(1, 1, 1)), ValueError, 'offset must be an int or 2 ints'),
        (dict(offset=1.0), TypeError, r'offset.*1\.0'),
        (dict(offset=(0, 1), dilation=(1, 2)), ValueError, 'windows with an offset must have dilation 1'),
        (dict(bias=torch.ones(1, 9, 8)), ValueError, r'bias must have shape \(1, 9, 9\), got \(1, 9, 8\)'),
        (dict(bias=torch.ones(1, 9, 9).long()), TypeError, 'bias must be floating'),
        (dict(bias=torch.ones(1, 9, 9, device='meta')), ValueError, 'one device'),
        (dict(key_mask=torch.ones(6, 6)), TypeError, 'key_mask must be a bool tensor, got torch.float32'),
        (dict(key_mask=[[True]]), TypeError, 'key_mask must be a bool tensor, got list'),
        (dict(key_mask=torch.ones(6, 5).bool()), ValueError, r'\(6, 6\) or \(1, 6, 6\), got \(6, 5\)'),
        (dict(key_mask=torch.ones(2, 6, 6).bool()), ValueError, r'got \(2, 6, 6\)'),
        (dict(key_mask=torch.ones(6, 6, device='meta').bool()), ValueError, 'one device'),
        (dict(implementation='fastest'), ValueError, "unknown implementation 'fastest'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    tensors = dict.fromkeys(('query', 'key', 'value'), torch.ones(1, 6, 6, 1, 8))
    with pytest.raises(error, match=message):
        window_attention(**{**tensors, 'window_size': 3, **change})


def test_scale_zero_is_not_the_default():
    tensors = inputs(1, 6, 6, 1, 8)
    mean = tensors['value'].mean((1, 2), keepdim=True).expand(1, 6, 6, 1, 8)
    assert_close(with_windows(6, scale=0.0)(**tensors), mean)


@pytest.mark.parametrize('situation', [{}, {'compiling': True}, {'exporting': True}])
def test_dispatch_takes_tiled_and_says_why(situation):
    explanation = explain('window_attention', **situation)
    assert explanation.implementation == 'tiled'
    assert explanation.reason


@pytest.mark.parametrize(
    ('window_size', 'dtype', 'is_trained', 'keeps'),
    [
        (4, torch.float32, True, True),
        (4, torch.float32, False, False),
        (5, torch.float32, True, False),
        (2, torch.bfloat16, True, True),
        (3, torch.bfloat16, True, False),
    ],
)
def test_probabilities_are_kept_where_they_are_trained_and_no_larger_than_queries_and_keys(
    window_size, dtype, is_trained, keeps
):
    query, key, value, bias = inputs(1, 9, 9, 2, 8, window_size=window_size).values()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        qkv = (x.detach().to(dtype).requires_grad_(is_trained) for x in (query, key, value))
        window_attention(*qkv, window_size, bias=bias.detach())
    assert any(x.ndim == 1 and x.numel() == 81 * 2 * window_size**2 for x in kept) == keeps
