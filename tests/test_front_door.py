"""What `import zoo`, the catalogue and the command line give."""

import json
import subprocess
import sys

import pytest
import timm
from typer.testing import CliRunner

import zoo
from zoo.backbones import catalogue
from zoo.cli import app


def run(*arguments):
    return CliRunner().invoke(app, arguments, env={'COLUMNS': '240'})


def test_importing_registers_models_and_brings_nothing_heavy():
    code = (
        'import sys, json, timm; before = set(sys.modules); import zoo;'
        'print(json.dumps([sorted({m.split(".")[0] for m in set(sys.modules) - before}), timm.is_model("nat_mini")]))'
    )
    output = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    loaded, registered = json.loads(output.splitlines()[-1])
    assert registered
    assert not {'mmengine', 'matplotlib', 'rich', 'typer', 'sklearn', 'cv2'} & set(loaded)


def test_every_variant_of_the_catalogue_is_registered_and_every_entry_point_is_in_it():
    assert all(timm.is_model(name) for name in catalogue.variant_names())
    modules = {name: entry.__module__ for name, entry in timm.models._registry._model_entrypoints.items()}
    ours = {name for name, module in modules.items() if module.startswith('zoo.backbones.')}
    assert ours == set(catalogue.variant_names(registered_by_zoo=True))
    timms = set(zoo.list_models(origin='timm'))
    assert timms == set(catalogue.variant_names()) - ours
    assert {modules[name] for name in timms} == {
        'timm.models.byoanet',
        'timm.models.crossvit',
        'timm.models.davit',
        'timm.models.efficientvit_msra',
        'timm.models.mambaout',
        'timm.models.shvit',
    }


def test_the_families_that_timm_owns_are_listed_whole():
    for module in ('shvit', 'davit', 'crossvit', 'efficientvit_msra', 'mambaout'):
        assert set(timm.list_models(module=module)) == set(zoo.list_models(family=module, origin='timm'))
    halonets = {name for name in timm.list_models(module='byoanet') if 'halo' in name}
    assert halonets == set(zoo.list_models(family='halonet', origin='timm'))


def test_default_cfgs_say_what_the_catalogue_says():
    for name in catalogue.variant_names(registered_by_zoo=True):
        cfg, facts = timm.get_pretrained_cfg(name), catalogue.info(name)
        assert list(cfg.mean) == facts['mean']
        assert list(cfg.std) == facts['std']
        assert cfg.crop_pct == facts['crop_pct']
        assert list(cfg.input_size) == facts['input_size']
        assert cfg.license == facts['license'].lower()
        assert cfg.paper_ids == facts['paper_id']


def test_list_models_filters():
    assert len(zoo.list_models()) == len(catalogue.variant_names())
    assert zoo.list_models('van_b[01]') == ['van_b0', 'van_b1']
    assert zoo.list_models(family='dinat_s') == ['dinat_s_tiny', 'dinat_s_small', 'dinat_s_base', 'dinat_s_large']
    assert 'biformer_tiny' not in zoo.list_models(pretrained=True)
    assert zoo.list_models('shvit_s1*') == ['shvit_s1', 'shvit_s1_distilled']
    assert zoo.list_models('shvit_s1*', origin='timm') == ['shvit_s1']
    assert zoo.list_models('shvit_s1*', origin='timm, extended') == ['shvit_s1_distilled']
    assert 'van_b0' in zoo.list_models(origin='zoo')
    with pytest.raises(ValueError, match=r"no family 'swin'; there are biformer, .*dinat"):
        zoo.list_models(family='swin')
    with pytest.raises(ValueError, match="no origin 'hub'; there are 'zoo', 'timm', 'timm, extended'"):
        zoo.list_models(origin='hub')


def test_info_has_facts_sources_and_the_pyramid():
    facts = zoo.info('nat_mini')
    assert facts['params'] == 19984174
    assert facts['weights'][0]['top1'] == 81.8
    assert facts['channels'] == [64, 128, 256, 512]
    assert facts['strides'] == [4, 8, 16, 32]
    assert all(facts[key] for key in ('paper_id', 'license', 'code', 'commit', 'source'))
    with pytest.raises(ValueError, match='did you mean'):
        zoo.info('nat_mni')


def test_facts_of_timms_models_are_timms():
    facts = zoo.info('davit_tiny')
    assert facts['origin'] == 'timm'
    assert facts['params'] == 28360168
    assert facts['input_size'] == [3, 224, 224]
    assert (facts['crop_pct'], facts['interpolation'], facts['license']) == (0.95, 'bicubic', 'apache-2.0')
    assert facts['weights'] == [{'tag': 'msft_in1k', 'hf_hub_id': 'timm/davit_tiny.msft_in1k'}]
    assert facts['strides'] == [4, 8, 16, 32]
    assert zoo.info('mambaout_tiny')['channels'] == [96, 192, 384, 576]
    larger = zoo.info('mambaout_base_plus_rw')['weights'][1]
    assert larger['input_size'] == [3, 384, 384]
    assert larger['crop_mode'] == 'squash'


def test_what_the_catalogue_adds_to_timms_weights_stands_beside_them():
    (weights,) = zoo.info('shvit_s4')['weights']
    assert weights['top1'] == 79.4
    assert weights['hf_hub_id'] == 'timm/shvit_s4.in1k'
    assert weights['official'].endswith('v1.0/shvit_s4.pth')
    assert zoo.info('shvit_s4')['input_size'] == [3, 256, 256]


def test_extended_models_have_the_facts_of_what_they_extend():
    facts = zoo.info('crossvit_15_dagger_408_dynamic')
    assert facts['origin'] == 'timm, extended'
    assert facts['input_size'] == [3, 408, 408]
    assert facts['weights'][0]['hf_hub_id'] == 'timm/crossvit_15_dagger_408.in1k'
    cfg = timm.get_pretrained_cfg('crossvit_15_dagger_408_dynamic')
    assert cfg.hf_hub_id == 'timm/crossvit_15_dagger_408.in1k'
    assert not cfg.fixed_input_size
    assert timm.get_pretrained_cfg('crossvit_15_dagger_240_dynamic').first_conv[0] == 'patch_embed.0.proj.0'
    assert not zoo.info('shvit_s1_distilled')['weights']


def test_command_line_lists_and_tells():
    listed = run('list', '--family', 'van')
    assert listed.exit_code == 0
    assert 'van_b6' in listed.output
    assert 'nat_mini' not in listed.output
    assert run('list', '--origin', 'timm, extended', '*halo*').output.count('timm, extended') == 5
    assert 'timm/davit_tiny.msft_in1k' in run('info', 'davit_tiny').output
    told = run('info', 'dinat_large')
    assert told.exit_code == 0
    assert '200,943,514' in told.output
    assert run('version').output.startswith('zoo ')


def test_command_line_says_which_kernel_runs_and_why():
    shown = run('kernels', '--device', 'cpu', '--dtype', 'float32')
    assert shown.exit_code == 0
    for operator in ('neighborhood_attention', 'routing_attention'):
        assert operator in shown.output
    assert 'tiled' in shown.output


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('info', 'nat_mni'), 'did you mean nat_mini'),
        (('list', '--family', 'swin'), "no family 'swin'"),
        (('list', '--origin', 'hub'), "no origin 'hub'"),
        (('train', 'no/such/config'), 'no/such/config'),
        (('kernels', '--dtype', 'float33'), 'float33'),
    ],
)
def test_command_line_errors_are_a_line_and_exit_code_1(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert 'Traceback' not in result.output
