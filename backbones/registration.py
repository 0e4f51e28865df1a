"""Entry points: from a table of variants to models that `timm.create_model` knows by name."""

import sys
from collections.abc import Callable

from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from timm.models._builder import resolve_pretrained_cfg

from . import catalogue

__all__ = ['shadowed', 'variants']

_shadowed: dict[str, type] = {}


def shadowed() -> dict[str, type]:
    """Names of ours that this timm has already, with our class for each: timm's model keeps the name."""
    return dict(_shadowed)


def variants(model_cls: type, **table: dict) -> None:
    """Make and register an entry point `name(pretrained=False, **kwargs)` for each `name=dict(constructor arguments)`.

    The functions, and timm's `default_cfgs` that the catalogue's facts make, become attributes of the module that
    defines `model_cls`, which must also hold its `checkpoint_filter_fn`. A name that timm has already is left to timm.

    `model_cls` says which modules its `first_conv` and its classifier (`classifier_name`) are, a name or several, where
    the catalogue doesn't have them from the model of timm that it extends; and, by `pools_map = False`, that its head
    doesn't pool a map.
    """
    module = sys.modules[model_cls.__module__]
    fields = (('first_conv', 'first_conv'), ('classifier', 'classifier_name'))
    layers = {field: getattr(model_cls, name) for field, name in fields if hasattr(model_cls, name)}
    pools_map = getattr(model_cls, 'pools_map', True)
    cfgs = {
        tagged: {
            **({'pool_size': tuple(-(-side // 32) for side in cfg['input_size'][1:])} if pools_map else {}),
            **cfg,
            **layers,
        }
        for name in table
        for tagged, cfg in catalogue.default_cfg(name).items()
    }
    module.default_cfgs = {**getattr(module, 'default_cfgs', {}), **generate_default_cfgs(cfgs)}
    for name, arguments in table.items():
        entry = _entry_point(model_cls, name, arguments, module)
        setattr(module, name, entry)
        if is_model(name):
            _shadowed[name] = model_cls
        else:
            register_model(entry)


def _entry_point(model_cls: type, name: str, arguments: dict, module) -> Callable:
    def entry(pretrained=False, **kwargs):
        if pretrained:
            _require_weights(name, kwargs)
        return build_model_with_cfg(
            model_cls,
            name,
            pretrained,
            pretrained_filter_fn=module.checkpoint_filter_fn,
            feature_cfg={'out_indices': model_cls.out_indices, 'feature_cls': 'getter'},
            **{**arguments, **kwargs},
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = module.__name__
    settings = ', '.join(f'{key}={value}' for key, value in arguments.items()) or 'the defaults'
    entry.__doc__ = f'{model_cls.__name__} with {settings}; other arguments go to the class.'
    return entry


def _require_weights(name: str, kwargs: dict) -> None:
    """RuntimeError that says where the weights are, if `pretrained=True` has nothing to download."""
    overlay = kwargs.get('pretrained_cfg_overlay')
    cfg = resolve_pretrained_cfg(name, pretrained_cfg=kwargs.get('pretrained_cfg'), pretrained_cfg_overlay=overlay)
    if cfg.has_weights or cfg.state_dict:
        return
    facts = catalogue.info(name)
    pages = [entry['page'] for entry in facts['weights'] if 'page' in entry]
    if not pages:
        raise RuntimeError(
            f'There are no pretrained weights of {name}: its authors published none ({facts["code"]}). '
            f'Use pretrained=False, or zoo.create_model({name!r}, checkpoint=PATH) with weights of your own.'
        )
    raise RuntimeError(
        f'The weights of {name} have no direct link. Fetch the file with a browser from {pages[0]} '
        f'(linked in {facts["code"]}), then call zoo.create_model({name!r}, checkpoint=PATH).'
    )
