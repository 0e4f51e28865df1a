"""The formulations that benchmarks measure beside compute what the zoo's modules do, and `NAME:official` is them."""

import copy

import parity_rule
import pytest
import timm
import torch
from conftest import TINY
from torch.nn import functional as F

from zoo.benchmarks import formulations, models
from zoo.benchmarks import report as reporting

TOLERANCE = 1e-9  # relative, float64
# Of each family the smallest variant, small; one of each kind of mixer.
NAMES = (
    'litv2_s',
    'smt_t',
    'stvit_small',
    'glnet_4g',
    'glnet_stl_paramslot',
    'overlock_xt',
    'fcaformer_l1',
    'dhvt_tiny_imagenet_patch16',
    'spectformer_tiny',
    'spectformer_h_s',
    'illama_tiny',
    'moh_transnext_small_80',
    'eca_resnet18',
    'eca_mobilenetv2_100',
    'vitaev2_vsa_s',
)


def model_of(name):
    """In float64, with weights that leave no branch without effect, as initial ones may."""
    model = timm.create_model(name, **TINY.get(name, {})).double().eval()
    state_dict = model.state_dict()
    values = {key: parity_rule.tensor_for(key, x.shape) for key, x in state_dict.items() if x.is_floating_point()}
    model.load_state_dict({**state_dict, **values})
    return model


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def logits_and_gradient(model, images):
    images = images.clone().requires_grad_()
    logits = model(images)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), images)[0]


@pytest.mark.parametrize('name', NAMES)
def test_logits_and_gradients_are_those_of_the_zoo(name):
    model = model_of(name)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    other = copy.deepcopy(model)
    assert formulations.formulate(other, images) > 0
    assert [key for key, _ in other.named_parameters()] == [key for key, _ in model.named_parameters()]
    for found, expected in zip(logits_and_gradient(other, images), logits_and_gradient(model, images), strict=True):
        assert error(found, expected) < TOLERANCE


def test_every_family_with_forms_is_tested():
    tested = [timm.create_model(name, device='meta', **TINY.get(name, {})) for name in NAMES]
    for family, forms in formulations.FORMS.items():
        modules = {type(module) for model in tested if isinstance(model, family) for module in model.modules()}
        assert set(forms) <= modules, family


def test_a_form_that_differs_is_refused(monkeypatch):
    model = timm.create_model('illama_tiny', **TINY['illama_tiny'])
    ((attention, form),) = formulations.FORMS[type(model)].items()

    class Other(form):
        def forward(self, x):
            return super().forward(x) * 1.001

    monkeypatch.setitem(formulations.FORMS, type(model), {attention: Other})
    with pytest.raises(RuntimeError, match='CausalAttention'):
        formulations.formulate(model, torch.randn(1, 3, 64, 64))
    assert not any(isinstance(module, form) for module in model.modules())


def test_models_of_other_families_stay_as_they_are():
    model = timm.create_model('van_b0', **TINY['van_b0'])
    kinds = [type(module) for module in model.modules()]
    assert formulations.formulate(model, torch.randn(1, 3, 64, 64)) == 0
    assert [type(module) for module in model.modules()] == kinds


def test_a_row_that_is_official_has_the_forms():
    model = models.build('illama_tiny:official', 64)
    ((_, form),) = formulations.FORMS[type(model.model)].items()
    assert sum(type(module) is form for module in model.modules()) == 12
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = models.build('illama_tiny', 64).eval()(images)
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-5)
    F.cross_entropy(model.train()(images), torch.tensor([1])).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_table_of_families_has_each_beside_its_formulation():
    def figures(seconds, times):
        measured = dict.fromkeys(('forward', 'train', 'memory'), seconds)
        return {**measured, 'macs': 2e9, 'relative': dict.fromkeys(measured, times)}

    report = {
        'machine': {'accelerator': 'none', 'python': '3.12', 'versions': {}, 'date': '2026-01-01'},
        'setting': {'size': 224, 'batch': 8, 'baseline': 'resnet50'},
        'models': {
            'resnet50': figures(2.0, 1.0),
            'smt_t': figures(4.0, 2.0),
            'smt_t:official': figures(5.0, 2.5),
        },
    }
    path = reporting.RESULTS / 'models_families_224_8.json'
    *_, line = reporting.formulations_section(report, path).splitlines()
    assert line == '| smt_t | 2.00 | 2 | 1.25 | 1.25 | 1.25 | 2.00 | 2.00 | 2.00 |'
    assert '--json benchmarks/results/models_families_224_8.json`' in reporting.formulations_section(report, path)
