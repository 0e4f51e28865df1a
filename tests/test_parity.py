"""Every record of what the authors' code computed is reproduced."""

import parity_rule as rule
import pytest
import timm
import torch

import zoo
from zoo.backbones import catalogue

TOLERANCE = 1e-9  # relative, float64: rounding in another order gives 1e-13; records keep 10 digits
# Families that compute constants in float32, where an order of rounding shows.
FLOAT32_TABLES = {'transnext': 1e-7, 'moh': 1e-7, 'illama': 1e-6}


def relative_error(x, summary, n):
    want = torch.tensor(summary['samples'], dtype=torch.float64)
    return ((rule.samples(x, n) - want).norm() / want.norm()).item()


def computed(model, record):
    """Final features, and the maps or sequences of tokens of the levels that the record has."""
    image = rule.image(record['size'])
    if record.get('class_token') == 'last':  # where it is first in timm
        features, maps = model.forward_intermediates(image, return_prefix_tokens=True)
        maps = [torch.cat((x.flatten(2).mT, class_token), dim=1) for x, class_token in maps]
        final = features.roll(-1, dims=1)
    else:
        features, maps = model.forward_intermediates(image)
        final = features
    return features, [final if i == 'features' else maps[i] for i in record.get('levels', range(len(maps)))]


@pytest.mark.parametrize('name', rule.record_names())
def test_logits_and_stages_equal_the_official_ones(name, tmp_path):
    record = rule.load_record(name)
    tolerance = FLOAT32_TABLES.get(catalogue.family_of(record['name']), TOLERANCE)
    state_dict = rule.checkpoint(record)
    wrapper, _, remark = (record['facts'].get('ckpt_wrapper') or '').partition(' ')
    is_wrapped = wrapper in ('model', 'state_dict')
    if '"module."' in remark:
        state_dict = {f'module.{key}': value for key, value in state_dict.items()}
    path = tmp_path / 'official.pth'
    torch.save({wrapper: state_dict} if is_wrapped else state_dict, path)
    arguments = record.get('name_kwargs', {})
    model = zoo.create_model(record['name'], checkpoint=path, dtype=torch.float64, **arguments).eval()
    with torch.inference_mode():
        features, levels = computed(model, record)
        logits = model.forward_head(features)

    assert list(logits.shape) == record['logits']['shape']
    assert relative_error(logits, record['logits'], 64) < tolerance
    assert logits.norm().item() == pytest.approx(record['logits']['norm'], rel=tolerance)
    for x, stage in zip(levels, record['stages'], strict=True):
        if len(stage['shape']) == 3 and x.dim() == 4:  # (B, tokens, C)
            x = x.flatten(2).mT
        elif list(x.shape) != stage['shape']:  # (B, H, W, C)
            x = x.permute(0, 2, 3, 1)
        assert list(x.shape) == stage['shape']
        assert relative_error(x, stage, 16) < tolerance
        assert x.norm().item() == pytest.approx(stage['norm'], rel=tolerance)


@pytest.mark.parametrize('name', catalogue.variant_names())
def test_parameters_are_those_of_the_official_model(name):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == catalogue.info(name)['params']


def test_every_record_is_of_a_variant_in_the_catalogue():
    assert {rule.load_record(name)['name'] for name in rule.record_names()} <= set(catalogue.variant_names())
