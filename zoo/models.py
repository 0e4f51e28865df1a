"""Models by name: create them, with official checkpoints; list them; say what is known of them."""

import fnmatch
import os
import pickle
import zipfile
from pathlib import Path

import timm
from safetensors import SafetensorError
from timm.models import load_state_dict

from .backbones import adopted, catalogue
from .backbones.checkpoints import CheckpointError, misfit, rename, unwrap

__all__ = ['create_model', 'info', 'list_models']


def create_model(name: str, pretrained: bool = False, checkpoint: str | os.PathLike | None = None, **kwargs):
    """`timm.create_model`, that also takes an official checkpoint of any family, timm's included.

    Args:
        name: a model's name, of the zoo or of timm.
        pretrained: download the authors' weights where they give a direct link.
        checkpoint: a file of weights (.pth, .pt, .tar, .bin or .safetensors) as the authors published it, or as saved
            from the model. Read with weights_only: nothing in it is executed. Its classifier is kept if it has
            `num_classes` classes, or else replaced by a new one. If it has SHViT's distillation head, the model is
            `NAME_distilled`, which predicts as the authors' evaluation does.
        kwargs: arguments of `timm.create_model` and of the model. `features_only=True` gives (B, C, H, W) maps of every
            model of the catalogue, MambaOut included, whose maps timm gives as (B, H, W, C).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file can't be read, or doesn't fit the model; says which keys, and what it would fit.
    """
    if kwargs.get('features_only'):
        kwargs = {**adopted.feature_arguments(name), **kwargs}
    if checkpoint is None:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    state_dict = unwrap(read_checkpoint(checkpoint), name)
    name = adopted.resolve(name, state_dict)
    feature_args = {key: kwargs.pop(key) for key in ('features_only', 'out_indices', 'feature_cls') if key in kwargs}
    model, classes = _create_loaded(name, checkpoint, state_dict, kwargs)
    if not feature_args.get('features_only'):
        return model
    overlay = _overlay(name, state_dict, classes, kwargs.pop('pretrained_cfg_overlay', None))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **feature_args, **kwargs)


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The state dict in a file, unwrapped. FileNotFoundError, or CheckpointError if it holds none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint {path}.')
    try:
        state_dict = load_state_dict(str(path))
    except (RuntimeError, SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError) as error:
        reason = str(error).strip().partition('\n')[0] or type(error).__name__
        raise CheckpointError(f'{path} is not a readable checkpoint ({reason})') from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path} holds no state dict ({error})') from error
    if not state_dict or not all(hasattr(value, 'shape') or isinstance(value, dict) for value in state_dict.values()):
        raise CheckpointError(f'{path} holds no state dict: expected names of parameters with their tensors.')
    return state_dict


def _overlay(name: str, state_dict, classes: int, overlay: dict | None) -> dict:
    """What makes timm load the state dict into model `name` as its pretrained weights, of `classes` classes."""
    mapped = rename(state_dict, adopted.official_keys(name))
    return {**(overlay or {}), 'state_dict': mapped, 'num_classes': classes}


def _create_loaded(name, path, state_dict, kwargs):
    """The model with all of the state dict in it, and the number of classes that the state dict has."""
    overlay = kwargs.pop('pretrained_cfg_overlay', None)
    published = timm.get_pretrained_cfg(name, allow_unregistered=False)
    published = published.num_classes if published else 1000
    wanted = kwargs.pop('num_classes', published)
    error = None
    for classes in dict.fromkeys((wanted, published)):
        try:
            model = timm.create_model(
                name,
                pretrained=True,
                pretrained_cfg_overlay=_overlay(name, state_dict, classes, overlay),
                num_classes=classes,
                **kwargs,
            )
        except CheckpointError as problem:
            raise CheckpointError(f'{path}: {problem}') from None
        except RuntimeError as problem:  # load_state_dict's, with every key in it
            error = error or problem
            continue
        if adopted.loads_loosely(name):
            problem = misfit(state_dict, model, lenient=adopted.MISSING_FROM_FLORENCE2)
            if problem:
                raise CheckpointError(f'{path}: {problem}')
        if classes != wanted:
            model.reset_classifier(wanted)
        return model, classes
    model = timm.create_model(name, num_classes=wanted, device='meta', **kwargs)
    problem = misfit(state_dict, model) or misfit(state_dict, model, adapts_layers=False) or str(error)
    raise CheckpointError(f'{path}: {problem}') from error


def list_models(
    pattern: str = '*', family: str | None = None, pretrained: bool = False, origin: str | None = None
) -> list[str]:
    """Names of the catalogue's models: the zoo's, and those of its families that timm owns.

    Args:
        pattern: a shell-style wildcard, 'nat_*'.
        family: a family's key, 'dinat'. ValueError if there is none of this name.
        pretrained: only models whose weights `pretrained=True` downloads.
        origin: 'zoo' for the zoo's own models, 'timm' for timm's, 'timm, extended' for the zoo's subclasses of timm's.
            ValueError if it is none of these.
    """
    families = catalogue.families()
    if family is not None and family not in families:
        raise ValueError(f'There is no family {family!r}; there are {", ".join(families)}.')
    if origin is not None and origin not in catalogue.ORIGINS:
        raise ValueError(f'There is no origin {origin!r}; there are {", ".join(map(repr, catalogue.ORIGINS))}.')
    return [
        name
        for name in catalogue.variant_names()
        if fnmatch.fnmatch(name, pattern)
        and family in (None, catalogue.family_of(name))
        and origin in (None, catalogue.origin_of(name))
        and (not pretrained or any(map(catalogue.is_downloadable, catalogue.info(name)['weights'])))
    ]


def info(name: str) -> dict:
    """What is known of a model: published facts with their source, and its feature pyramid.

    Keys: name, family, title, origin ('zoo', 'timm' or 'timm, extended'), paper, paper_id, code, commit (of the code
    that the zoo's was written after), license, source, params, gmacs (10^9 multiply-adds at input_size, if published),
    input_size, mean, std, crop_pct, interpolation, weights (tag, trained_on, top1 in %, url, hf_hub_id or page), notes,
    channels and strides (of the levels that features_only gives).

    Raises:
        ValueError: the zoo has no such model; names those nearest.
    """
    try:
        facts = catalogue.info(name)
    except KeyError:
        import difflib

        near = difflib.get_close_matches(name, catalogue.variant_names(), n=3)
        hint = f'; did you mean {", ".join(near)}?' if near else '; `zoo list` shows all.'
        raise ValueError(f'The zoo has no model {name!r}{hint}') from None
    levels = timm.create_model(name, device='meta', features_only=True).feature_info
    return {**facts, 'channels': levels.channels(), 'strides': levels.reduction()}
