"""The benchmarks of the operators measure functions that agree, and say so in a report and a table."""

import dataclasses
import json

import pytest
import torch

from zoo.benchmarks import aggregated, kernels, neighborhood, operators, routing, window
from zoo.benchmarks.timing import interleaved, peak_memory

SMALL = {
    neighborhood: neighborhood.Case(2, 15, 2, dilation=2, head_dim=8),
    routing: routing.Case(1, 8, 2, 2, 3, head_dim=8),
    aggregated: aggregated.Case(2, 8, 2, 4, head_dim=8),
    window: window.Case(2, 8, 2, 3, head_dim=8),
}


@pytest.mark.parametrize('module', SMALL, ids=lambda module: module.BENCHMARK.name)
def test_an_operator_is_measured_beside_a_baseline(module, monkeypatch):
    monkeypatch.setattr('torch.compile', lambda function, **kwargs: function)

    def contenders(case, setting):
        each = module.contenders(case, setting)
        return {**each, 'forward only': next(iter(each.values()))._replace(train=None)}

    cases = {'cpu': {'small': SMALL[module]}}
    benchmark = dataclasses.replace(module.BENCHMARK, cases=cases, contenders=contenders)
    report = benchmark.measure(rounds=1)
    functions = report['cases']['small']['functions']
    assert benchmark.table(report).row_count == len(functions) > 2
    assert all(figures['forward'] > 0 for figures in functions.values())
    assert functions.pop('forward only')['train'] is None
    assert all(figures['train'] > 0 for figures in functions.values())
    assert {'date', 'processor', 'versions'} <= set(report['machine'])


@pytest.mark.parametrize('module', SMALL, ids=lambda module: module.BENCHMARK.name)
def test_contenders_agree_in_the_dtype_of_a_gpu(module, monkeypatch):
    monkeypatch.setattr('torch.compile', lambda function, **kwargs: function)
    setting = operators.Setting('cpu', operators.DTYPES['cuda'])
    case = SMALL[module]._replace(size=30 if module is neighborhood else 24)
    contenders = module.contenders(case, setting)
    assert module.BENCHMARK._agreeing(contenders, setting) == list(contenders)


def test_what_computes_something_else_is_found_out():
    def contenders(case, setting):
        each = window.contenders(case, setting)
        return {**each, 'wrong': each['ours']._replace(forward=lambda: 1.01 * each['ours'].forward())}

    benchmark = dataclasses.replace(window.BENCHMARK, cases={'cpu': {'small': SMALL[window]}}, contenders=contenders)
    with pytest.raises(RuntimeError, match="window, small: 'wrong' differs from 'plain'"):
        benchmark.measure(rounds=1)


def test_what_runs_out_of_memory_has_no_figures():
    def fail():
        raise torch.OutOfMemoryError

    def contenders(case, setting):
        each = window.contenders(case, setting)
        return {'greedy': each['plain']._replace(forward=fail), **each}

    benchmark = dataclasses.replace(window.BENCHMARK, cases={'cpu': {'small': SMALL[window]}}, contenders=contenders)
    report = benchmark.measure(rounds=1)
    functions = report['cases']['small']['functions']
    assert functions['greedy'] == {'forward': None, 'train': None, 'memory': None}
    assert functions['plain']['train'] > 0
    assert benchmark.table(report).row_count == 4


def test_a_run_goes_on_with_the_cases_that_are_left(tmp_path, monkeypatch):
    path = tmp_path / 'results.json'

    def run(*cases):
        small = {'cpu': dict.fromkeys(cases, SMALL[window])}
        monkeypatch.setitem(kernels.BENCHMARKS, 'window', dataclasses.replace(window.BENCHMARK, cases=small))
        kernels.main(['window', '--rounds', '1', '--minutes', '5', '--json', str(path)])
        return json.loads(path.read_text())['window']['cases']

    first = run('a')
    both = run('a', 'b')
    assert list(both) == ['a', 'b']
    assert both['a'] == first['a']
    monkeypatch.setattr('time.monotonic', iter([0.0, 1e6]).__next__)
    assert list(run('a', 'b', 'c')) == ['a', 'b']


def test_times_are_cpu_time_of_every_case():
    times = interleaved({'more': lambda: sum(range(200_000)), 'less': lambda: sum(range(1000))}, rounds=3)
    assert times['more'] > times['less'] > 0


def test_peak_memory_is_that_of_the_call():
    assert 60 << 20 <= peak_memory(lambda: bytearray(64 << 20).count(1)) < 80 << 20
