"""Published facts of every variant, read once from catalogue.json; default_cfgs, `zoo.info` and the docs stand on them.

catalogue.json maps a family to its paper, code, licence, preprocessing and variants. A variant has `params` (counted),
`gmacs` (10^9 multiply-adds at its input size, as published) and `weights`, one entry a checkpoint, the default first:
`tag`, `trained_on`, `top1` (% on ImageNet-1k validation), and `url` (direct link) or `page` (a link for a browser).
"""

import functools
import json
from pathlib import Path

__all__ = ['default_cfg', 'families', 'family_of', 'info', 'variant_names']


@functools.cache
def families() -> dict[str, dict]:
    """Family key -> its facts, in the order of the file."""
    return json.loads(Path(__file__).with_name('catalogue.json').read_text(encoding='utf-8'))


@functools.cache
def _family_by_variant() -> dict[str, str]:
    return {name: key for key, family in families().items() for name in family['variants']}


def variant_names() -> list[str]:
    return list(_family_by_variant())


def family_of(name: str) -> str:
    """The family key of variant `name`. KeyError if the catalogue has no such variant."""
    return _family_by_variant()[name]


def info(name: str) -> dict:
    """All facts of variant `name`: its own and its family's. KeyError if the catalogue has no such variant."""
    key = family_of(name)
    family = dict(families()[key])
    variant = family.pop('variants')[name]
    notes = [note for note in (family.pop('note', None), variant.get('note')) if note]
    preprocessing = {'input_size': [3, 224, 224], 'num_classes': 1000, **family.pop('preprocessing')}
    return {'name': name, 'family': key, **family, **preprocessing, **variant, 'notes': notes}


def default_cfg(name: str) -> dict[str, dict]:
    """timm's pretrained cfgs of variant `name`: 'name.tag' -> fields that don't depend on the architecture."""
    facts = info(name)
    shared = {
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
    if not facts['weights']:
        return {f'{name}.untrained': shared}
    return {f'{name}.{entry["tag"]}': {**shared, 'url': entry.get('url', '')} for entry in facts['weights']}
