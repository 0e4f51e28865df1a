"""Published facts of every variant; default_cfgs, `zoo.info` and the docs stand on them.

FAMILY.json beside this file has the family's paper, code, licence, preprocessing and variants. A variant has `params`
(counted), `gmacs` (10^9 multiply-adds at its input size, as published) and `weights`, one entry a checkpoint, the
default first: `tag`, `trained_on`, `top1` (% on ImageNet-1k validation), and where it is: `url` (direct link),
`hf_hub_id`, or `page` (a link for a browser); `official` is the authors' file where the default is a conversion of it.
Accuracy that was published without weights is `paper_top1`; `wrapper` is the key under which a variant's files have the
weights, where it isn't one of those that all have. A checkpoint made for another preprocessing, input size or number of
classes says so in its entry, which goes before what variant and family say.

`origin`, of a family or of a variant, says whose the model is:
- 'zoo': the zoo's, the default;
- 'timm': timm's own entry point. Preprocessing and weights are read from timm's pretrained cfgs, not repeated here; an
  entry of `weights` adds facts to timm's of the same tag.
- 'timm, extended': the zoo's subclass of timm's class, under a name of its own. `extends` names timm's model, whose
  preprocessing it has, and whose weights unless it lists its own.
"""

import functools
import json
from pathlib import Path

from timm.models import get_arch_pretrained_cfgs

__all__ = [
    'ORIGINS',
    'default_cfg',
    'families',
    'family_of',
    'info',
    'is_downloadable',
    'origin_of',
    'variant_names',
    'wrappers',
]

ORIGINS = ('zoo', 'timm', 'timm, extended')
PREPROCESSING = ('input_size', 'num_classes', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation', 'license')
LAYERS = ('first_conv', 'classifier', 'pool_size')  # fields of a cfg that depend on the architecture


@functools.cache
def families() -> dict[str, dict]:
    """Family key -> its facts, by title."""
    found = {path.stem: json.loads(path.read_text(encoding='utf-8')) for path in Path(__file__).parent.glob('*.json')}
    return dict(sorted(found.items(), key=lambda item: item[1]['title'].lower()))


@functools.cache
def _family_by_variant() -> dict[str, str]:
    return {name: key for key, family in families().items() for name in family['variants']}


def variant_names(registered_by_zoo: bool = False) -> list[str]:
    """All variants, or only those whose entry points are the zoo's."""
    return [name for name in _family_by_variant() if not registered_by_zoo or origin_of(name) != 'timm']


def family_of(name: str) -> str:
    """The family key of variant `name`. KeyError if the catalogue has no such variant."""
    return _family_by_variant()[name]


def origin_of(name: str) -> str:
    """One of ORIGINS. KeyError if the catalogue has no such variant."""
    family = families()[family_of(name)]
    return family['variants'][name].get('origin') or family.get('origin', 'zoo')


def wrappers(name: str) -> tuple[str, ...]:
    """Where the published files of variant `name` have the weights, if it isn't where all have them."""
    name = name.partition('.')[0]
    facts = families()[family_of(name)]['variants'][name] if name in _family_by_variant() else {}
    return (facts['wrapper'],) if 'wrapper' in facts else ()


def info(name: str) -> dict:
    """All facts of variant `name`: its own and its family's. KeyError if the catalogue has no such variant."""
    key = family_of(name)
    family = {**families()[key], 'origin': origin_of(name)}
    variant = family.pop('variants')[name]
    notes = [note for note in (family.pop('note', None), variant.get('note')) if note]
    preprocessing = {'input_size': [3, 224, 224], 'num_classes': 1000, **family.pop('preprocessing', {})}
    if family['origin'] != 'zoo':
        published = _timm_cfgs(name)
        preprocessing |= _preprocessing(next(iter(published.values())))
        if family['origin'] == 'timm' or 'weights' not in variant:
            variant = {**variant, 'weights': _timm_weights(published, variant.get('weights', []))}
    return {'name': name, 'family': key, **preprocessing, **family, **variant, 'notes': notes}


def is_downloadable(weights: dict) -> bool:
    """Whether `pretrained=True` can fetch this entry of `weights`."""
    return 'url' in weights or 'hf_hub_id' in weights


def default_cfg(name: str) -> dict[str, dict]:
    """timm's pretrained cfgs of variant `name`: 'name.tag' -> fields, the layers' names only where timm knows them."""
    facts = info(name)
    layers = {}
    if facts['origin'] == 'timm, extended':
        published = next(iter(_timm_cfgs(name).values()))
        layers = {field: getattr(published, field) for field in LAYERS}
    return {
        f'{name}.{entry["tag"]}': {**layers, **_cfg(facts | entry)}
        for entry in facts['weights'] or [{'tag': 'untrained'}]
    }


def _timm_cfgs(name: str) -> dict:
    """timm's cfgs of variant `name`, or of what it extends: tag -> cfg, the default first."""
    variant = families()[family_of(name)]['variants'][name]
    cfgs = get_arch_pretrained_cfgs(variant.get('extends', name))
    return {cfg.tag or 'untrained': cfg for cfg in cfgs.values()}


def _preprocessing(cfg) -> dict:
    found = {field: getattr(cfg, field) for field in PREPROCESSING}
    return {
        field: list(value) if isinstance(value, tuple) else value for field, value in found.items() if value is not None
    }


def _timm_weights(published: dict, known: list[dict]) -> list[dict]:
    """An entry for each checkpoint of timm's: where it is, what is `known` of it, what differs from the default's."""
    known = {entry['tag']: entry for entry in known}
    default = _preprocessing(next(iter(published.values())))
    entries = []
    for tag, cfg in published.items():
        where = {'hf_hub_id': cfg.hf_hub_id} if cfg.hf_hub_id else {'url': cfg.url} if cfg.url else {}
        if where:
            other = {field: value for field, value in _preprocessing(cfg).items() if value != default.get(field)}
            entries.append({**known.get(tag, {'tag': tag}), **where, **other})
    return entries


def _cfg(facts: dict) -> dict:
    optional = {key: facts[key] for key in ('hf_hub_id', 'crop_mode') if key in facts}
    return {
        'url': facts.get('url', ''),
        **optional,
        'input_size': tuple(facts['input_size']),
        'num_classes': facts['num_classes'],
        'mean': tuple(facts['mean']),
        'std': tuple(facts['std']),
        'crop_pct': facts['crop_pct'],
        'interpolation': facts['interpolation'],
        'license': facts['license'].lower(),
        'paper_ids': facts['paper_id'],
        'paper_name': facts['paper'],
        'origin_url': facts['code'],
    }
