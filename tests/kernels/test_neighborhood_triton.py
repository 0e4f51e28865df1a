"""Neighborhood attention in Triton: held against the definition, interpreted on the CPU or run on a GPU; compiled."""

from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo.kernels import configs, neighborhood_attention, tune, use
from zoo.kernels.dispatch import Problem
from zoo.kernels.neighborhood import triton

from .harness import assert_close, assert_equal_functions, output_and_gradients, packed, random
from .triton_harness import assert_deterministic, compiled, inside_nans, interpreted, moved

pytest.importorskip('triton')


class Case(NamedTuple):
    """A problem; the class of its map in the table of configurations is in the comment beside it."""

    size: tuple[int, ...]
    kernel_size: int | tuple[int, int]
    dilation: int | tuple[int, int] = 1
    batch: int = 1
    heads: int = 1
    head_dim: int = 16
    biased: bool = True
    scale: float | None = None


CASES = [
    Case((12, 17), 7, batch=2, head_dim=8),  # many tiles, the last of an axis moved inward
    Case((15, 16), 7, (2, 1), heads=2, head_dim=24),  # rows of 8 and 7, 16 columns: one tile is as wide as the map
    Case((19, 20), 5, 3, head_dim=48, biased=False),  # rows of 7, 6 and 6: one tile is the map
    Case((13, 13), 13),  # the window is the map
    Case((14, 17), (3, 9), scale=-0.7),  # another kernel size per axis, a larger tile than half a window
    Case((8, 20), (1, 13), batch=2),  # rows alone
    Case((29,), 7, 2, batch=2, heads=2),  # one axis, of 15 and 14
    Case((4, 5), (3, 1), (1, 2), heads=2),  # two residues of columns
    Case((32, 44), 3, batch=2),  # tiles that touch no border, and programs with some of each
    Case((211,), 9, 2, batch=3, biased=False),  # so for an axis, with residue classes of two sizes
    Case((4, 70), (3, 13)),  # keys of a tile that is smaller than a window
]


def attention(case, implementation):
    def attend(query, key, value, bias=None):
        return neighborhood_attention(
            query, key, value, case.kernel_size, case.dilation, bias, case.scale, implementation
        )

    return attend


def inputs(case, dtype=torch.float32, device='cpu'):
    """Views of a packed qkv and a bias (float32, as models keep it), both inside of NaNs."""
    tensors = packed(case.batch, *case.size, case.heads, case.head_dim, dtype=dtype)
    tensors = dict(zip(('query', 'key', 'value'), tensors, strict=True))
    if case.biased:
        kernels = case.kernel_size if isinstance(case.kernel_size, tuple) else (case.kernel_size,) * len(case.size)
        bias = random(case.heads, *(2 * k - 1 for k in kernels), dtype=torch.float32)
        tensors['bias'] = inside_nans(bias)
    return moved(tensors, device)


def assert_exact(case, dtype=torch.float32, device='cpu', tensors=None, grad_output=None, needs=None):
    tensors = inputs(case, dtype, device) if tensors is None else tensors
    if grad_output is None:
        grad_output = random(*tensors['query'].shape, seed=2).to(dtype).to(device)
    assert_equal_functions(attention(case, 'triton'), attention(case, 'reference'), tensors, grad_output, needs)


@interpreted
@pytest.mark.parametrize('case', CASES, ids=str)
def test_interpreted_it_is_exact_with_every_gradient(case):
    assert_exact(case)


@interpreted
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_interpreted_half_precision_is_within_its_tolerance(dtype):
    assert_exact(Case((9, 12), 5, head_dim=24), dtype)


@interpreted
@pytest.mark.parametrize('needs', [['query'], ['key'], ['value'], ['bias'], []])
def test_interpreted_gradients_of_some_inputs_are_those_of_all(needs):
    assert_exact(Case((5, 6), 3), needs=needs)


@interpreted
def test_interpreted_any_strides_are_taken_of_inputs_and_gradient():
    case = Case((5, 6), 3, batch=2)
    tensors = {
        'query': random(16, 1, 6, 5, 2, dtype=torch.float32).permute(4, 3, 2, 1, 0),
        'key': packed(2, 5, 6, 1, 16, dtype=torch.float32)[0],
        'value': random(1, 5, 6, 1, 16, dtype=torch.float32).expand(2, 5, 6, 1, 16),
    }
    assert_exact(case, tensors=tensors, grad_output=torch.ones(()).expand(tensors['query'].shape))


@interpreted
def test_interpreted_an_empty_batch_stays_empty():
    case = Case((5, 6), 3, batch=0)
    output, gradients = output_and_gradients(attention(case, 'triton'), inputs(case))
    assert output.shape == (0, 5, 6, 1, 16)
    assert not gradients['bias'].any()


@interpreted
@pytest.mark.parametrize('biased', [False, True])
def test_interpreted_the_operator_keeps_the_rules_of_custom_operators(biased):
    tensors = [x.contiguous().requires_grad_() for x in inputs(Case((4, 5), 3, biased=biased)).values()]
    arguments = (*tensors, *[None] * (not biased), [3, 3], [1, 1], 0.5)
    torch.library.opcheck(torch.ops.zoo.neighborhood_attention_triton, arguments)


class Attend(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(random(1, 5, 5, dtype=torch.float32))

    def forward(self, qkv):
        return neighborhood_attention(*qkv.unbind(3), 3, 1, self.bias)


@interpreted
def test_interpreted_it_compiles_whole_and_exports_as_one_operator():
    case, model, qkv = Case((4, 5), 3), Attend(), random(1, 4, 5, 3, 1, 16, dtype=torch.float32)
    whole = torch.compile(attention(case, 'triton'), fullgraph=True, backend='aot_eager')
    assert_equal_functions(whole, attention(case, 'reference'), inputs(case))
    with use('triton', 'neighborhood_attention'):
        free = {0: torch.export.Dim('batch'), 1: torch.export.Dim('height', min=3)}
        program = torch.export.export(model, (torch.cat([qkv, qkv]),), dynamic_shapes=(free,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert 'zoo.neighborhood_attention_triton.default' in targets
    assert_close(program.module()(qkv), model(qkv))


@interpreted
def test_interpreted_autocast_casts_query_key_and_value_and_keeps_the_bias():
    case = Case((5, 6), 3)
    tensors = inputs(case)
    half = {name: x if name == 'bias' else x.bfloat16() for name, x in tensors.items()}
    expected, expected_gradients = output_and_gradients(attention(case, 'triton'), half)
    with torch.autocast('cpu', torch.bfloat16):
        output, gradients = output_and_gradients(attention(case, 'triton'), tensors)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected_gradients[name].float()), name


def verdict(device='cuda', dtype=torch.float16, head_dim=32, **options):
    capability = options.pop('capability', (8, 0))
    return triton.judge(Problem(device, dtype, (1, 56, 56, 2, head_dim), capability=capability, options=options))


@compiled
@pytest.mark.parametrize(
    ('problem', 'reason'),
    [
        (dict(kernel_size=(7, 15)), 'kernel sizes up to 13, not 15'),
        (dict(kernel_size=9, dtype=torch.float32, head_dim=72), 'above 64 it takes kernel sizes up to 7, not 9'),
    ],
)
def test_kernel_sizes_that_are_too_large_say_why(problem, reason):
    found = verdict(**problem)
    assert not found.runs
    assert reason in found.reason


def test_tensors_of_a_gpu_that_is_not_here_take_it():
    with FakeTensorMode():
        q, k, v = torch.empty(2, 9, 10, 3, 4, 32, device='cuda', dtype=torch.float16, requires_grad=True).unbind(3)
        output = neighborhood_attention(q, k, v, 7)
    assert 'neighborhood_attention_triton' in output.grad_fn.name()
    assert (output.shape, output.device.type) == ((2, 9, 10, 4, 32), 'cuda')


@pytest.mark.parametrize('arithmetic', ['half', 'tf32', 'ieee'])
def test_the_table_has_a_tile_for_every_problem(arithmetic):
    """A tile that is smaller than half a window would miss keys at a border."""
    for head_dim in (8, 24, 48, 128):
        for kernel_size in range(1, 15, 2):
            for height in (1, 8, 16, 500):
                for width in (8, 16, 500):
                    if kernel_size > width:
                        continue
                    if arithmetic != 'half' and head_dim > triton.WIDE and kernel_size > triton.WIDE_KERNEL_SIZE:
                        continue  # judged impossible
                    problem = dict(head_dim=head_dim, kernel_size=kernel_size, height=height, width=width)
                    blocks = configs.find(triton.CONFIGS, None, arithmetic=arithmetic, **problem)
                    for name in ('forward', 'query', 'bias'):
                        sides = zip(blocks[name].tile, (height, width), strict=True)
                        assert all(tile >= min(length, kernel_size // 2 + 1) for tile, length in sides), problem


def test_a_row_may_be_for_some_gpus_alone(tmp_path):
    rows = configs.load(triton.CONFIGS)
    targeted = [{**rows[0], 'targets': [90], 'match': {}}, *rows]
    configs.save(tmp_path / 'targeted.json', targeted)
    problem = dict(arithmetic='half', head_dim=32, kernel_size=7, height=9, width=9)
    found = [configs.find(tmp_path / 'targeted.json', target, **problem) for target in (90, 80, None)]
    assert found[0] == configs.blocks(rows[0])
    assert found[1] == found[2] == configs.find(triton.CONFIGS, 90, **problem)
    with pytest.raises(ValueError, match=r'no row for .*head_dim.*1000'):
        configs.find(triton.CONFIGS, None, **problem | {'head_dim': 1000})


def test_tuning_takes_the_fastest_block_of_each_kernel(tmp_path):
    rows = configs.load(triton.CONFIGS)
    row = next(row for row in rows if row['match'] == dict(arithmetic='half', head_dim=32, kernel_size=7))

    def measure(launches):  # fastest for 8 warps, wider tiles in some kernels
        wide = launches[0].kernel.__name__ in ('forward', 'bias_gradient')
        return abs(launches[0].num_warps - 8) + abs(launches[0].arguments['TILE_X'] - (12 if wide else 4))

    tuned = tune.tune_row(triton, row, measure)
    assert {name: block['num_warps'] for name, block in tuned['blocks'].items()} == dict.fromkeys(row['blocks'], 8)
    assert {name: block['tile'][1] for name, block in tuned['blocks'].items()} == dict(
        forward=12, query=4, key=4, bias=12
    )
    merged = tune.merge(rows, [{**tuned, 'targets': [90]}])
    again = tune.merge(merged, [{**row, 'targets': [90]}])
    assert len(merged) == len(again) == len(rows) + 1
    configs.save(tmp_path / 'table.json', merged)
    problem = dict(arithmetic='half', head_dim=32, kernel_size=7, height=56, width=56)
    found = [configs.find(tmp_path / 'table.json', target, **problem)['forward'] for target in (90, 80)]
    assert [block.tile[1] for block in found] == [12, 10]


def test_rows_to_tune_are_chosen_by_a_pattern_of_their_problems():
    found = tune.rows_to_tune(triton, 'bfloat16*kernel 7x7 head_dim 32')
    assert {row['match']['head_dim'] for row in found} == {32}
    assert len(found) < len(tune.rows_to_tune(triton)) < len(configs.load(triton.CONFIGS))
    with pytest.raises(ValueError, match="pattern 'int8'; there are 'bfloat16 "):
        tune.rows_to_tune(triton, 'int8')


@pytest.mark.gpu
@compiled
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('case', [*CASES, Case((56, 57), 7, batch=4, heads=2, head_dim=32)], ids=str)
def test_on_a_gpu_it_is_exact_with_every_gradient(case, dtype):
    assert_exact(case, dtype, 'cuda')


@pytest.mark.gpu
@compiled
@pytest.mark.parametrize('head_dim', [32, 64, 128])
@pytest.mark.parametrize('kernel_size', [3, 7, 13])
@pytest.mark.parametrize('size', [(57, 57), (13, 15), (14, 40), (1, 100)])
def test_on_a_gpu_every_class_of_the_table_is_exact(size, kernel_size, head_dim):
    case = Case(size, tuple(min(kernel_size, n) for n in size), batch=2, heads=2, head_dim=head_dim)
    for dtype in (torch.bfloat16, *[torch.float32] * (head_dim < 128 or kernel_size < 13)):
        assert_exact(case, dtype, 'cuda')


@pytest.mark.gpu
@compiled
def test_on_a_gpu_two_runs_give_the_same_bits_in_deterministic_mode():
    case = Case((56, 57), 7, 2, batch=8, heads=2, head_dim=32)
    tensors = inputs(case, torch.float16, 'cuda')
    grad = random(*tensors['query'].shape, seed=2).half().cuda()
    assert_deterministic(attention(case, None), tensors, grad)


@pytest.mark.gpu
@compiled
def test_on_a_gpu_it_compiles_whole():
    case = Case((9, 12), 5, 2, heads=2)
    tensors, grad = inputs(case, device='cuda'), random(1, 9, 12, 2, 16, seed=2).float().cuda()
    whole = torch.compile(attention(case, None), fullgraph=True)
    assert_equal_functions(whole, attention(case, 'reference'), tensors, grad)
