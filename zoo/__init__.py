"""Attention-centred vision backbones for timm.

    import timm, zoo
    model = timm.create_model('biformer_tiny', features_only=True)

Importing this registers every backbone with timm under its own name.
"""

import importlib
import warnings
from importlib.metadata import PackageNotFoundError, version

from . import backbones, kernels
from .acceleration import accelerate, restore
from .backbones.checkpoints import CheckpointError
from .backbones.registration import shadowed
from .conformance import check
from .exporting import ExportError, export
from .fusion import fuse
from .models import create_model, info, list_models

__all__ = [
    'CheckpointError',
    'ExportError',
    'accelerate',
    'backbones',
    'check',
    'create_model',
    'export',
    'fuse',
    'info',
    'kernels',
    'list_models',
    'restore',
    'shadowed',
]

try:
    __version__ = version('attention-zoo')
except PackageNotFoundError:  # run from a source tree that isn't installed
    __version__ = '0+unknown'

if shadowed():
    taken = ', '.join(f'{name} ({cls.__module__}.{cls.__name__})' for name, cls in shadowed().items())
    warnings.warn(
        f"timm has models of these names, and keeps them; the zoo's are reached by class: {taken}", stacklevel=2
    )


def __getattr__(name: str):
    if name == 'train':  # brings mmengine: only on use
        return importlib.import_module('.train', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
