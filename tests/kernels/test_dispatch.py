"""The choice of an implementation: in order, with reasons, and never other than the one asked for."""

import pytest
import torch

from zoo.kernels import dispatch, explain, use


@pytest.fixture
def operator(monkeypatch):
    """An operator of three: one that needs an accelerator, one for everything but compiling, one for everything."""
    monkeypatch.setattr(dispatch, 'OPERATORS', {})
    operator = dispatch.Operator('double')

    def judge_fast(problem):
        if problem.device != 'cuda':
            return dispatch.impossible(f'needs cuda, not {problem.device}')
        return dispatch.chosen('fused')

    def judge_lean(problem):
        return dispatch.possible('opaque') if problem.compiling else dispatch.chosen('lean')

    operator.register('fast', lambda x: ('fast', x), judge_fast)
    operator.register('lean', lambda x: ('lean', x), judge_lean)
    operator.register('plain', lambda x: ('plain', x), lambda problem: dispatch.chosen('it runs everywhere'))
    return operator


def test_the_first_that_is_chosen_runs(operator):
    assert explain('double', device='cuda').implementation == 'fast'
    assert explain('double', device='cpu').implementation == 'lean'
    assert explain('double', device='cpu', compiling=True).implementation == 'plain'
    assert operator.select(torch.zeros(1)) is operator.functions['lean']


def test_an_explanation_says_what_every_implementation_says(operator):
    explanation = explain('double', device='cpu', dtype=torch.float16, shape=(1, 2))
    assert (explanation.operator, explanation.reason) == ('double', 'lean')
    assert list(explanation.verdicts) == ['fast', 'lean', 'plain']
    assert explanation.verdicts['fast'] == (False, False, 'needs cuda, not cpu')


def test_what_is_asked_for_runs_or_is_an_error(operator):
    x = torch.zeros(1)
    assert operator.select(x, 'plain') is operator.functions['plain']
    with pytest.raises(ValueError, match="'fast' cannot run: needs cuda, not cpu"):
        operator.select(x, 'fast')
    with pytest.raises(ValueError, match="unknown implementation 'quick', expected one of fast, lean, plain"):
        operator.select(x, 'quick')
    with use('fast'), pytest.raises(ValueError, match="'fast' cannot run"):
        operator.select(x)


def test_use_holds_inside_of_its_context_and_yields_to_an_argument(operator):
    x = torch.zeros(1)
    with use('plain'):
        assert operator.select(x) is operator.functions['plain']
        assert explain('double').reason == 'asked for by name'
        with use('lean', operator='double'):
            assert operator.select(x) is operator.functions['lean']
        assert operator.select(x) is operator.functions['plain']
        assert operator.select(x, 'lean') is operator.functions['lean']
    with pytest.raises(RuntimeError), use('plain'):
        raise RuntimeError
    assert operator.select(x) is operator.functions['lean']


def test_use_names_what_it_does_not_know(operator):
    with pytest.raises(ValueError, match="double: unknown implementation 'quick'"), use('quick'):
        pass
    with pytest.raises(ValueError, match="unknown operator 'triple', expected one of double"), use('lean', 'triple'):
        pass
    with pytest.raises(ValueError, match="unknown operator 'triple'"):
        explain('triple')


def test_use_is_seen_by_a_compiled_function(operator):
    def traced(x):
        return operator.select(x)(x)[0] == 'plain', x + 1

    compiled = torch.compile(traced, fullgraph=True, backend='eager')
    x = torch.zeros(1)
    assert compiled(x)[0]
    with use('lean'):
        assert not compiled(x)[0]
    assert compiled(x)[0]


def test_no_implementation_is_an_error():
    operator = dispatch.Operator('none')
    try:
        with pytest.raises(ValueError, match='none: no implementation for torch'):
            explain('none')
    finally:
        del dispatch.OPERATORS[operator.name]
