"""Aggregated attention in Triton: held against the definition, interpreted on the CPU or run on a GPU; compiled."""

import math
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo.kernels import aggregated_attention, configs, tune, use
from zoo.kernels.aggregated import triton
from zoo.kernels.dispatch import Problem

from .harness import assert_close, assert_equal_functions, output_and_gradients, packed, random
from .triton_harness import assert_deterministic, compiled, inside_nans, interpreted, moved

pytest.importorskip('triton')


class Case(NamedTuple):
    size: tuple[int, int]
    pooled: tuple[int, int]
    window_size: int = 3
    batch: int = 1
    heads: int = 1
    head_dim: int = 16
    relative: bool = True  # whether biases are of relative positions, else each pair has its own


CASES = [
    Case((5, 9), (3, 3), batch=2, heads=2, head_dim=24),  # tiles at both borders, pooled columns padded to four
    Case((3, 17), (1, 70), head_dim=8),  # more pooled columns than a step has
    Case((4, 8), (11, 5), heads=2),  # one tile is the map; several steps of pooled rows
    Case((5, 6), (2, 2), 5, relative=False),
    Case((3, 4), (1, 2), 7, batch=2),  # a window greater than the map
    Case((4, 9), (2, 3), 1, head_dim=48),
    Case((1, 1), (1, 1)),
]


def indices(case, device='cpu'):
    """Places in the table of biases; where they are not relative, out of order and with gaps."""
    for length, cells in zip(case.size, case.pooled, strict=True):
        if case.relative:
            index = torch.arange(length)[:, None] - torch.arange(cells) * (length // cells) + length
        else:
            places = torch.randperm(length * cells + 3, generator=torch.Generator().manual_seed(length))
            index = places[: length * cells].view(length, cells)
        yield index.to(device)


def attention(case, implementation, device='cpu'):
    row_index, column_index = indices(case, device)

    def attend(**tensors):
        others = dict(row_index=row_index, column_index=column_index, window_size=case.window_size)
        return aggregated_attention(**tensors, **others, implementation=implementation)

    return attend


def inputs(case, dtype=torch.float32, device='cpu'):
    """Views of packed projections, and parameters (float32, as models keep them), all inside of NaNs.

    The embedding and the learnable weights are small, as those of models, lest scores and output be mostly theirs;
    temperatures are positive.
    """
    heads, d, cells = case.heads, case.head_dim, case.window_size**2
    table = (2 * n if case.relative else n * m + 3 for n, m in zip(case.size, case.pooled, strict=True))
    parameters = {
        'query_embedding': (heads, d),
        'temperature': (heads,),
        'local_bias': (heads, cells),
        'pooled_bias': (heads, *table),
        'learnable_tokens': (heads, d, cells),
        'learnable_bias': (heads, cells),
    }
    maps = packed(case.batch, *case.size, heads, d, dtype=dtype)
    pooled = packed(case.batch, math.prod(case.pooled), heads, d, parts=2, dtype=dtype, seed=4)
    tensors = {
        **dict(zip(('query', 'key', 'value'), maps, strict=True)),
        **dict(zip(('pooled_key', 'pooled_value'), pooled, strict=True)),
        **{
            name: inside_nans(random(*shape, dtype=torch.float32, seed=5 + i))
            for i, (name, shape) in enumerate(parameters.items())
        },
    }
    for name in ('query_embedding', 'learnable_tokens', 'learnable_bias'):
        tensors[name].mul_(0.1)
    tensors['temperature'].abs_().add_(1)
    return moved(tensors, device)


def assert_exact(case, dtype=torch.float32, device='cpu', tensors=None, grad_output=None, needs=None):
    tensors = inputs(case, dtype, device) if tensors is None else tensors
    if grad_output is None:
        grad_output = random(*tensors['query'].shape, seed=2).to(dtype).to(device)
    candidate, reference = (attention(case, name, device) for name in ('triton', 'reference'))
    assert_equal_functions(candidate, reference, tensors, grad_output, needs)


@interpreted
@pytest.mark.parametrize('case', CASES, ids=str)
def test_interpreted_it_is_exact_with_every_gradient(case):
    assert_exact(case)


@interpreted
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_interpreted_half_precision_is_within_its_tolerance(dtype):
    assert_exact(Case((4, 9), (2, 3), heads=3, head_dim=24), dtype)


NEEDS = [
    ['query'],
    ['key'],
    ['value'],
    ['pooled_key'],
    ['pooled_value'],
    ['pooled_bias'],
    ['query_embedding', 'temperature'],
    ['learnable_tokens'],
    [],
]


@interpreted
@pytest.mark.parametrize('needs', NEEDS)
def test_interpreted_gradients_of_some_inputs_are_those_of_all(needs):
    assert_exact(Case((3, 4), (2, 2)), needs=needs)


@interpreted
def test_interpreted_gradients_of_biases_add_up_over_bands_and_parts(monkeypatch):
    """A band is at least a row of tiles; the images of one are divided among programs, and heads are two."""
    monkeypatch.setattr(triton, 'SCORES', 1)
    assert_exact(Case((9, 5), (3, 2), batch=3, heads=2), needs=['pooled_bias', 'learnable_tokens'])
    monkeypatch.setattr(triton, 'IMAGES', 2)
    assert_exact(Case((3, 4), (2, 2), batch=3), needs=['pooled_bias', 'learnable_tokens'])


@interpreted
def test_interpreted_what_lies_outside_is_no_key_and_has_no_value():
    """With values of one, weights that sum to one give one, and learnable weights count inside of the map alone."""
    case = Case((3, 3), (1, 1))
    tensors = inputs(case)
    for name in ('value', 'pooled_value', 'learnable_bias'):
        tensors[name] = torch.ones_like(tensors[name])
    tensors['learnable_tokens'] = torch.zeros_like(tensors['learnable_tokens'])
    inside = torch.tensor([[4, 6, 4], [6, 9, 6], [4, 6, 4]]).float()
    assert_close(attention(case, 'triton')(**tensors), (1 + inside)[None, :, :, None, None].expand(1, 3, 3, 1, 16))


@interpreted
def test_interpreted_a_pixel_of_zeros_is_normalised_to_zeros():
    case = Case((3, 4), (2, 2))
    tensors = inputs(case)
    for name in ('query', 'key', 'pooled_key'):
        tensors[name] = tensors[name].clone()
        tensors[name][:, 1] = 0
    assert_exact(case, tensors=tensors, needs=['value', 'query_embedding', 'pooled_bias'])  # others divide by no norm


@interpreted
def test_interpreted_any_strides_are_taken_of_inputs_and_gradient():
    case = Case((3, 4), (2, 2), batch=2)
    tensors = inputs(case)
    tensors |= {
        'query': random(16, 1, 4, 3, 2, dtype=torch.float32).permute(4, 3, 2, 1, 0),
        'value': random(1, 3, 4, 1, 16, dtype=torch.float32).expand(2, 3, 4, 1, 16),
        'pooled_key': random(16, 4, 1, 2, dtype=torch.float32).permute(3, 1, 2, 0),
        'pooled_bias': tensors['pooled_bias'].mT.contiguous().mT,
        'learnable_tokens': tensors['learnable_tokens'].mT.contiguous().mT,
    }
    assert_exact(case, tensors=tensors, grad_output=torch.ones(()).expand(tensors['query'].shape))


@interpreted
def test_interpreted_an_empty_batch_stays_empty():
    case = Case((3, 4), (2, 2), batch=0)
    output, gradients = output_and_gradients(attention(case, 'triton'), inputs(case))
    assert output.shape == (0, 3, 4, 1, 16)
    for name in triton.PARAMETERS:
        assert not gradients[name].any(), name


@interpreted
def test_interpreted_the_operator_keeps_the_rules_of_custom_operators():
    case = Case((2, 3), (1, 2))
    *first, tokens, bias = (x.contiguous().requires_grad_() for x in inputs(case).values())
    arguments = (*first, *indices(case), tokens, bias, case.window_size)
    torch.library.opcheck(torch.ops.zoo.aggregated_attention_triton, arguments)


class Attend(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        tensors = inputs(case._replace(head_dim=8))
        self.parameters_ = torch.nn.ParameterDict({name: tensors[name].clone() for name in triton.PARAMETERS})
        row_index, column_index = indices(case)
        self.register_buffer('row_index', row_index)
        self.register_buffer('column_index', column_index)

    def forward(self, qkv, pooled):
        others = dict(row_index=self.row_index, column_index=self.column_index)
        return aggregated_attention(*qkv.unbind(3), *pooled.unbind(2), **self.parameters_, **others)


@interpreted
def test_interpreted_it_compiles_whole_and_exports_as_one_operator():
    case = Case((3, 4), (2, 2))
    whole = torch.compile(attention(case, 'triton'), fullgraph=True, backend='aot_eager')
    assert_equal_functions(whole, attention(case, 'reference'), inputs(case))
    model, qkv, pooled = Attend(case), random(1, 3, 4, 3, 1, 8).float(), random(1, 4, 2, 1, 8).float()
    with use('triton', 'aggregated_attention'):
        free = {0: torch.export.Dim('batch')}
        twice = torch.cat([qkv, qkv]), torch.cat([pooled, pooled])
        program = torch.export.export(model, twice, dynamic_shapes=(free, free))
    assert 'zoo.aggregated_attention_triton.default' in {str(node.target) for node in program.graph.nodes}
    assert_close(program.module()(qkv, pooled), model(qkv, pooled))


@interpreted
def test_interpreted_autocast_casts_what_is_attended_to_and_keeps_parameters():
    case = Case((3, 4), (2, 2))
    tensors = inputs(case)
    half = {name: x if name in triton.PARAMETERS else x.bfloat16() for name, x in tensors.items()}
    expected, expected_gradients = output_and_gradients(attention(case, 'triton'), half)
    with torch.autocast('cpu', torch.bfloat16):
        output, gradients = output_and_gradients(attention(case, 'triton'), tensors)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected_gradients[name].float()), name


def test_windows_that_are_too_large_say_why():
    problem = Problem('cuda', torch.float16, (1, 56, 56, 2, 24), capability=(8, 0), options={'window_size': 9})
    assert triton.judge(problem).reason == 'it takes windows up to 7, not 9'


def test_tensors_of_a_gpu_that_is_not_here_take_it():
    case = Case((9, 10), (3, 3), heads=2, head_dim=24)
    shapes = {name: (x.shape, x.dtype) for name, x in inputs(case, torch.float16).items()}
    sizes = [index.shape for index in indices(case)]
    with FakeTensorMode():
        tensors = {
            name: torch.empty(shape, dtype=dtype, device='cuda', requires_grad=True)
            for name, (shape, dtype) in shapes.items()
        }
        row_index, column_index = (torch.zeros(size, dtype=torch.int64, device='cuda') for size in sizes)
        output = aggregated_attention(**tensors, row_index=row_index, column_index=column_index)
    assert 'aggregated_attention_triton' in output.grad_fn.name()
    assert (output.shape, output.device.type) == ((1, 9, 10, 2, 24), 'cuda')


@pytest.mark.parametrize('arithmetic', ['half', 'tf32', 'ieee'])
def test_the_table_has_blocks_of_every_kernel_for_every_problem(arithmetic):
    for head_dim in (8, 24, 32, 48, 64, 128):
        for window_size in (1, 3, 5, 7):
            problem = dict(arithmetic=arithmetic, head_dim=head_dim, window_size=window_size)
            blocks = configs.find(triton.CONFIGS, None, **problem)
            assert list(blocks) == ['forward', 'learnable', 'query', 'key', 'pooled', 'bias']
            assert all(block.step >= 16 for block in blocks.values()), problem


def test_tuning_takes_the_fastest_block_of_each_kernel():
    row = configs.load(triton.CONFIGS)[0]

    def measure(launches):  # fastest for 8 warps and 3 stages
        return abs(launches[0].num_warps - 8) + 1 / launches[0].num_stages

    tuned = tune.tune_row(triton, row, measure)
    assert {name: block['num_warps'] for name, block in tuned['blocks'].items()} == dict.fromkeys(row['blocks'], 8)
    assert {block['num_stages'] for block in tuned['blocks'].values()} == {3}


@pytest.mark.gpu
@compiled
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('case', [*CASES, Case((56, 57), (7, 7), batch=4, heads=2, head_dim=24)], ids=str)
def test_on_a_gpu_it_is_exact_with_every_gradient(case, dtype):
    assert_exact(case, dtype, 'cuda')


@pytest.mark.gpu
@compiled
@pytest.mark.parametrize('head_dim', [24, 32, 64, 128])
@pytest.mark.parametrize('window_size', [3, 7])
@pytest.mark.parametrize(('size', 'pooled'), [((57, 40), (7, 5)), ((64, 64), (16, 16)), ((20, 70), (2, 35))])
def test_on_a_gpu_every_class_of_the_table_is_exact(size, pooled, window_size, head_dim):
    case = Case(size, pooled, window_size, batch=2, heads=2, head_dim=head_dim)
    for dtype in (torch.bfloat16, torch.float32):
        assert_exact(case, dtype, 'cuda')


@pytest.mark.gpu
@compiled
def test_on_a_gpu_two_runs_give_the_same_bits_in_deterministic_mode():
    case = Case((56, 57), (7, 7), batch=8, heads=2, head_dim=24)
    tensors = inputs(case, torch.float16, 'cuda')
    grad = random(*tensors['query'].shape, seed=2).half().cuda()
    assert_deterministic(attention(case, None, 'cuda'), tensors, grad)


@pytest.mark.gpu
@compiled
def test_on_a_gpu_it_compiles_whole():
    case = Case((9, 12), (3, 4), heads=2)
    tensors, grad = inputs(case, device='cuda'), random(1, 9, 12, 2, 16, seed=2).float().cuda()
    whole = torch.compile(attention(case, None, 'cuda'), fullgraph=True)
    assert_equal_functions(whole, attention(case, 'reference', 'cuda'), tensors, grad)
