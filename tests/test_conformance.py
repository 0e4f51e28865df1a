"""Every family keeps what `zoo.check` looks for, and `zoo.check` finds what is wrong."""

import pytest
import torch
from conftest import TINY, tiny
from torch import nn
from typer.testing import CliRunner

import zoo
from zoo.backbones import catalogue
from zoo.backbones.pyramid import Pyramid
from zoo.backbones.van import VAN
from zoo.cli import app
from zoo.conformance import CHECKS, Report, Result, Subject


@pytest.mark.parametrize('title', CHECKS)
@pytest.mark.parametrize('name', TINY)
def test_family_conforms(name, title):
    CHECKS[title](Subject(name, TINY[name]))


@pytest.mark.slow
@pytest.mark.parametrize('name', catalogue.variant_names(registered_by_zoo=True))
def test_every_variant_conforms(name):
    report = zoo.check(name)
    assert report.passed, str(report)


def test_a_model_of_two_branches_is_checked_by_each():
    assert CHECKS['features'](Subject('crossvit_tiny_240_dynamic', {})).startswith('6 levels')


def batch_mean(model, x):
    return x + x.mean(0, keepdim=True)


def counter(model, x):
    model.calls = getattr(model, 'calls', 0) + 1
    return x + model.calls


def constant(model, x):
    if not hasattr(model, 'noise'):
        model.noise = torch.randn((), dtype=x.dtype)
    return x + model.noise


def detached(model, x):
    return x.detach()


FAULTS = {'batch': batch_mean, 'memoryless': counter, 'checkpoint': constant, 'gradients': detached}


@pytest.mark.parametrize('title', FAULTS)
def test_a_fault_of_the_forward_pass_is_found(monkeypatch, title):
    forward_features = Pyramid.forward_features
    monkeypatch.setattr(
        VAN, 'forward_features', lambda model, x: FAULTS[title](model, forward_features(model, x)), raising=False
    )
    with pytest.raises(AssertionError):
        CHECKS[title](Subject('van_b0', TINY['van_b0']))


def test_levels_of_another_size_are_found(monkeypatch):
    to_fmt = Pyramid._to_fmt
    monkeypatch.setattr(Pyramid, '_to_fmt', lambda model, x, fmt: to_fmt(model, x, fmt)[..., 1:])
    with pytest.raises(AssertionError, match='instead of'):
        CHECKS['any size'](Subject('van_b0', TINY['van_b0']))


def test_levels_that_differ_by_the_way_to_them_are_found(monkeypatch):
    monkeypatch.setattr(VAN, 'forward_features', lambda model, x: model.stages(x) + 1, raising=False)
    with pytest.raises(AssertionError, match='forward_features and forward_intermediates'):
        CHECKS['features'](Subject('van_b0', TINY['van_b0']))


def test_unchecked_input_is_found(monkeypatch):
    monkeypatch.setattr('zoo.backbones.pyramid.check_images', lambda *args: None)
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS['bad input'](Subject('van_b0', TINY['van_b0']))


def test_parameters_that_nothing_initialises_are_found(monkeypatch):
    finish = Pyramid.finish

    def with_a_loose_parameter(model, *args):
        finish(model, *args)
        model.loose = nn.Parameter(torch.zeros(3, device=model.head.fc.weight.device))

    monkeypatch.setattr(Pyramid, 'finish', with_a_loose_parameter)
    with pytest.raises(AssertionError, match='loose'):
        CHECKS['meta device'](Subject('van_b0', TINY['van_b0']))
    with pytest.raises(AssertionError, match=r'but the catalogue has 4,105,800'):
        CHECKS['parameters'](Subject('van_b0'))


def test_report_has_every_check_and_says_what_failed(monkeypatch):
    monkeypatch.setitem(CHECKS, 'batch', lambda subject: 1 / 0)
    seen = []
    report = zoo.check('van_b0', advance=seen.append, **TINY['van_b0'])
    assert [result.title for result in report.results] == seen == list(CHECKS)
    assert not report.passed
    assert [result.title for result in report.results if not result.passed] == ['batch']
    assert 'FAILED batch: division by zero' in str(report)


def test_unknown_names_and_absent_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no model 'van_b99'"):
        zoo.check('van_b99')
    with pytest.raises(FileNotFoundError, match='absent'):
        zoo.check('van_b0', checkpoint=tmp_path / 'absent.pth')


def test_command_prints_a_table_and_fails_if_a_check_does(monkeypatch, tmp_path):
    torch.save(tiny('van_b0').state_dict(), tmp_path / 'foreign.pth')
    run = CliRunner().invoke(app, ['check', 'van_b0', '--checkpoint', str(tmp_path / 'foreign.pth')])
    assert run.exit_code == 1
    assert 'does not fit' in run.output
    for passed in (True, False):
        report = Report('van_b0', (Result('batch', passed, 'as [seen]'),))
        monkeypatch.setattr(zoo, 'check', lambda *args, report=report, **kwargs: report)
        run = CliRunner().invoke(app, ['check', 'van_b0'])
        assert run.exit_code == (0 if passed else 1)
        assert 'as [seen]' in run.output
