"""The backbone for configs of mmdet and mmseg, of which nothing but their registries is needed here."""

import subprocess
import sys
import types

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, Registry
from torch import nn

from zoo.train.dense.bridge import TimmBackbone

TINY_VAN = dict(dims=(16, 32, 32, 48), depths=(1, 1, 2, 1))


@pytest.fixture(params=['mmdet', 'mmseg'])
def library(request, monkeypatch):
    """A library as mmdet is one: a registry of its scope, below mmengine's."""
    registry = Registry('model', parent=MODELS, scope=request.param)
    package, module = types.ModuleType(request.param), types.ModuleType(f'{request.param}.registry')
    module.MODELS = package.registry = registry
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    MODELS.children.pop(request.param)


def test_a_config_builds_it_by_custom_imports_with_the_weights_of_a_file(library, tmp_path):
    source = timm.create_model('van_b0', **TINY_VAN)
    torch.save(source.state_dict(), tmp_path / 'van.pth')
    (tmp_path / 'config.py').write_text(
        "custom_imports = dict(imports=['zoo.train.dense.bridge'], allow_failed_imports=False)\n"
        "model = dict(backbone=dict(type='TimmBackbone', name='van_b0', out_indices=(1, 3),\n"
        f'    checkpoint={str(tmp_path / "van.pth")!r}, **{TINY_VAN!r}))\n'
    )
    config = Config.fromfile(tmp_path / 'config.py')
    scope = library.__name__.partition('.')[0]
    with DefaultScope.overwrite_default_scope(scope):
        backbone = library.MODELS.build(config.model.backbone).eval()
    images = torch.randn(2, 3, 64, 81)
    maps = backbone(images)
    assert isinstance(maps, tuple)
    assert [x.shape[1] for x in maps] == backbone.feature_info.channels() == [32, 48]
    _, expected = source.eval().forward_intermediates(images)
    torch.testing.assert_close(maps, (expected[1], expected[3]))
    explicit = library.MODELS.build({**config.model.backbone, 'type': 'mmengine.TimmBackbone'})
    assert isinstance(explicit, TimmBackbone)


def test_it_takes_the_arguments_of_their_own_timm_backbone():
    backbone = TimmBackbone(
        model_name='test_resnet', features_only=True, in_channels=4, checkpoint_path='', out_indices=(2, 3)
    )
    assert [x.shape[2] for x in backbone(torch.randn(1, 4, 64, 64))] == [64 // s for s in (8, 16)]


def test_a_detectors_init_weights_leaves_it_as_it_is():
    from mmengine.model import BaseModule

    class Detector(BaseModule):
        def __init__(self):
            super().__init__()
            self.backbone = TimmBackbone('van_b0', **TINY_VAN)

    detector = Detector()
    for parameter in detector.parameters():
        nn.init.constant_(parameter, 0.5)
    detector.init_weights()
    assert all((parameter == 0.5).all() for parameter in detector.backbone.parameters())


def test_norms_can_keep_their_statistics():
    for norm_eval in (False, True):
        backbone = TimmBackbone('van_b0', norm_eval=norm_eval, **TINY_VAN).train()
        norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms
        assert all(norm.training is not norm_eval for norm in norms)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({}, 'needs the name of a model'),
        ({'name': 'van_b9'}, 'There is no model'),
        ({'name': 'van_b0', 'model_name': 'van_b1'}, 'name and model_name mean the same'),
        ({'name': 'van_b0', 'features_only': False}, 'can only be True'),
        ({'name': 'van_b0', 'init_cfg': {'type': 'Kaiming'}}, "can only be None or dict.type='Pretrained'"),
        ({'name': 'van_b0', 'window': 7}, 'could not be made with'),
    ],
)
def test_what_is_wrong_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**arguments)


def test_weights_come_by_init_cfg_too(tmp_path):
    source = timm.create_model('van_b0', **TINY_VAN)
    torch.save(source.state_dict(), tmp_path / 'van.pth')
    pretrained = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'van.pth')}
    backbone = TimmBackbone('van_b0', init_cfg=pretrained, **TINY_VAN)
    first = next(iter(backbone.parameters()))
    assert torch.equal(first, next(iter(source.parameters())))


def test_none_of_the_libraries_is_imported():
    code = (
        'import sys, zoo.train.dense.bridge\n'
        'print([name for name in ("mmcv", "mmdet", "mmseg", "mmpretrain") if name in sys.modules])\n'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.strip() == '[]', result.stderr
