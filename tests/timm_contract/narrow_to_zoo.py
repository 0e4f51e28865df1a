"""pytest plug-in: hold the models named in ZOO_MODELS to timm's own, unmodified tests/test_models.py.

timm's tests take their models from `timm.list_models` while they are imported, so this must be loaded before, with -p.
Only that function is replaced; the test file, the registry and the models stay as they are.
"""

import fnmatch
import os

import timm
import timm.models

from zoo.backbones import catalogue

PATTERNS = os.environ['ZOO_MODELS'].split(',')
# torch.jit is deprecated, and the attention families' window arithmetic is not written for it.
TORCHSCRIPT = ('van_*',)
# Sequences of tokens, which timm leaves out of its tests of maps, as it does its own: of these it names crossvit_*.
TIMMS_NON_STANDARD = 'crossvit_*'
NON_STANDARD = (TIMMS_NON_STANDARD, 'dhvt_*', 'illama_*', 'spectformer_[!h]*')
OURS = catalogue.variant_names(registered_by_zoo=True)

_list_models = timm.list_models


def _matches(name, patterns):
    return any(fnmatch.fnmatch(name.split('.')[0], pattern) for pattern in patterns)


def list_models(filter='', module='', pretrained=False, exclude_filters='', name_matches_cfg=False, include_tags=None):
    """Our models wherever timm asks for all of its own; none where it asks for families by name, or for weights."""
    excluded = [exclude_filters] if isinstance(exclude_filters, str) else exclude_filters
    if pretrained or filter:
        return []
    ours = [name for name in _list_models(include_tags=include_tags) if name.split('.')[0] in OURS]
    ours = [name for name in ours if _matches(name, PATTERNS)]
    if TIMMS_NON_STANDARD in excluded:
        ours = [name for name in ours if not _matches(name, NON_STANDARD)]
    if 'selecsls*' in excluded:  # the list of models that timm leaves out of its TorchScript tests
        ours = [name for name in ours if _matches(name, TORCHSCRIPT)]
    return ours


for package in (timm, timm.models):
    package.list_models = list_models
    package.list_pretrained = lambda *args, **kwargs: []


def pytest_collection_modifyitems(config, items):
    """Deselect timm's tests of its own models by name."""
    own, others = [], []
    for item in items:
        name = item.callspec.params.get('model_name') if hasattr(item, 'callspec') else None
        (own if isinstance(name, str) and _matches(name, OURS) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = own
