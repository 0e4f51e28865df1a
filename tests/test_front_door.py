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
    ours = {
        name
        for name, entry in timm.models._registry._model_entrypoints.items()
        if entry.__module__.startswith('zoo.backbones.')
    }
    assert ours == set(catalogue.variant_names())


def test_default_cfgs_say_what_the_catalogue_says():
    for name in zoo.list_models():
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
    with pytest.raises(ValueError, match="no family 'swin'; there are biformer, dinat"):
        zoo.list_models(family='swin')


def test_info_has_facts_sources_and_the_pyramid():
    facts = zoo.info('nat_mini')
    assert facts['params'] == 19984174
    assert facts['weights'][0]['top1'] == 81.8
    assert facts['channels'] == [64, 128, 256, 512]
    assert facts['strides'] == [4, 8, 16, 32]
    assert all(facts[key] for key in ('paper_id', 'license', 'code', 'commit', 'source'))
    with pytest.raises(ValueError, match='did you mean'):
        zoo.info('nat_mni')


def test_command_line_lists_and_tells():
    listed = run('list', '--family', 'van')
    assert listed.exit_code == 0
    assert 'van_b6' in listed.output
    assert 'nat_mini' not in listed.output
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
        (('train', 'no/such/config'), 'no/such/config'),
        (('kernels', '--dtype', 'float33'), 'float33'),
    ],
)
def test_command_line_errors_are_a_line_and_exit_code_1(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert 'Traceback' not in result.output
