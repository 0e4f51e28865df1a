"""What holds for the Triton form of every operator: where it runs, its table of configurations, its proof."""

from pathlib import Path

import pytest
import torch

from zoo.benchmarks import compile_proof
from zoo.kernels import configs, explain, launch, neighborhood_attention, targets, tune
from zoo.kernels.dispatch import Problem

from .harness import packed
from .triton_harness import compiled, run_interpreted

pytest.importorskip('triton')
OPERATORS = sorted(tune.OPERATORS)
HALVES_AND_FLOAT32 = torch.float16, torch.bfloat16, torch.float32


@compiled
@pytest.mark.parametrize('operator', OPERATORS)
def test_all_holds_under_the_interpreter(operator):
    run_interpreted(str(Path(__file__).with_name(f'test_{operator}_triton.py')))


@compiled
@pytest.mark.parametrize(
    ('operator', 'problem', 'count'),
    [
        ('neighborhood', 'bfloat16 57x57 kernel 7x7 head_dim 32', 10),
        ('routing', 'bfloat16 regions 8x8 head_dim 32', 8),
        ('aggregated', 'bfloat16 56x56 pooled 7x7 window 3x3 head_dim 24', 18),
    ],
)
def test_some_shipped_configurations_compile_without_a_gpu(operator, problem, count):
    found = compile_proof.tasks([operator], [80, 90], problem)
    assert len(found) == count
    report = compile_proof.report(compile_proof.prove(found))
    assert not report['failures']
    assert 'wgmma.mma_async' in str(report['operators'])


def test_a_configuration_that_is_too_much_for_a_gpu_fails_the_proof():
    task = compile_proof.Task('neighborhood', 'bfloat16', 'forward', 0, 86)
    result = compile_proof.Compiled(255, stack=8000, shared=100 << 10, loop=9, reloads=2, instructions=())
    reasons = [reason.split()[-1] for reason in compile_proof.failures(task, result)]
    assert reasons == ['stack', 'registers', 'KiB', 'instruction']
    assert compile_proof.failures(task, 'ptxas: no') == ['ptxas: no']
    fits = compile_proof.Compiled(128, stack=0, shared=99 << 10, loop=9, reloads=0, instructions=('mma.sync',))
    assert not compile_proof.failures(task, fits)
    assert compile_proof.table({task: result}).row_count == 1


@compiled
def test_a_row_of_the_table_is_compiled_for_the_gpus_that_take_it():
    problem = 'bfloat16 57x57 kernel 7x7 head_dim 32'  # of two rows, one of them for some GPUs alone
    taken = [(task.index, task.target) for task in compile_proof.tasks(['neighborhood'], [80, 86, 90], problem)]
    assert len({index for index, target in taken if target == 86}) == 5
    assert not {index for index, target in taken if target == 86} & {index for index, target in taken if target != 86}


def test_the_longest_loop_of_a_listing_is_found():
    lines = [(0x10, 'MOV R1, R2'), (0x20, 'FADD R1, R2, R3'), (0x30, 'LDL R5, [R1]'), (0x40, '@P0 BRA 0x20')]
    lines += [(0x50, '@!P1 BRA 0x10'), (0x60, 'IMAD.MOV.U32 R1, RZ, RZ, R2'), (0x70, 'BRA 0x60'), (0x80, 'BRA 0x90')]
    listing = '\n'.join(f'        /*{address:04x}*/      {text} ;   /* 0x000 */' for address, text in lines)
    assert targets.longest_loop(listing) == ['FADD', 'LDL', 'BRA']
    assert targets.longest_loop('no loop') == []


def verdict(operator, device='cuda', dtype=torch.float16, head_dim=32, capability=(8, 0)):
    return tune.OPERATORS[operator].judge(Problem(device, dtype, (1, 56, 56, 2, head_dim), capability=capability))


@compiled
@pytest.mark.parametrize('operator', OPERATORS)
def test_gpus_since_ampere_take_it_in_every_mode(operator):
    assert all(verdict(operator, dtype=dtype, capability=(9, 0)).chosen for dtype in HALVES_AND_FLOAT32)
    assert 'compute capability 8.0 is assumed' in verdict(operator, capability=None).reason
    for mode in ({}, {'compiling': True}, {'exporting': True}):
        found = explain(f'{operator}_attention', device='cuda', dtype=torch.float16, **mode)
        assert found.implementation == 'triton' or torch.cuda.is_available()


@compiled
@pytest.mark.parametrize('operator', OPERATORS)
@pytest.mark.parametrize(
    ('problem', 'reason'),
    [
        (dict(capability=(7, 5)), 'needs compute capability 8.0, not 7.5'),
        (dict(device='cpu'), 'needs CUDA or ROCm, not cpu'),
        (dict(dtype=torch.float64), 'float32 at most, not float64'),
        (dict(head_dim=256), 'head_dim up to 128, not 256'),
    ],
)
def test_what_cannot_run_says_why(operator, problem, reason):
    found = verdict(operator, **problem)
    assert not found.runs
    assert reason in found.reason


@compiled
@pytest.mark.parametrize('operator', OPERATORS)
def test_without_triton_plain_pytorch_runs(operator, monkeypatch):
    monkeypatch.setattr(launch, 'INSTALLED', False)
    found = explain(f'{operator}_attention', device='cuda', dtype=torch.float16)
    assert found.implementation == 'tiled'
    assert found.verdicts['triton'] == (False, False, 'triton is not installed')


@compiled
def test_forced_where_it_cannot_run_it_is_an_error():
    with pytest.raises(ValueError, match="'triton' cannot run: it needs CUDA or ROCm, not cpu"):
        neighborhood_attention(*packed(1, 7, 7, 1, 8, dtype=torch.float32), 7, implementation='triton')


@pytest.mark.parametrize('operator', OPERATORS)
def test_a_table_is_read_as_it_is_written(operator, tmp_path):
    shipped = tune.OPERATORS[operator].CONFIGS
    rows = configs.load(shipped)
    configs.save(tmp_path / 'table.json', rows)
    assert configs.load(tmp_path / 'table.json') == rows
    assert (tmp_path / 'table.json').read_text() == shipped.read_text()
