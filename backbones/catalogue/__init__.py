"""Published facts of every variant; default_cfgs, `zoo.info` and the docs stand on them.

FAMILY.json beside this file has the family's paper, code, licence, preprocessing and variants. A variant has `params`
(counted), `gmacs` (10^9 multiply-adds at its input size, as published) and `weights`, one entry a checkpoint, the
default first: `tag`, `trained_on`, `top1` (% on ImageNet-1k validation), and where it is: `url` (direct link),
`hf_hub_id`, or `page` (a link for a browser). A checkpoint made for another preprocessing, input size or number of
classes says so in its entry, which goes before what variant and family say. `origin` is 'timm' where the model is
timm's own.
"""

import functools
import json
from pathlib import Path

__all__ = ['default_cfg', 'families', 'family_of', 'info', 'is_downloadable', 'variant_names']


@functools.cache
def families() -> dict[str, dict]:
    """Family key -> its facts, by title."""
    found = {path.stem: json.loads(path.read_text(encoding='utf-8')) for path in Path(__file__).parent.glob('*.json')}
    return dict(sorted(found.items(), key=lambda item: item[1]['title'].lower()))


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
    family = {'origin': 'zoo', **families()[key]}
    variant = family.pop('variants')[name]
    notes = [note for note in (family.pop('note', None), variant.get('note')) if note]
    preprocessing = {'input_size': [3, 224, 224], 'num_classes': 1000, **family.pop('preprocessing')}
    return {'name': name, 'family': key, **family, **preprocessing, **variant, 'notes': notes}


def is_downloadable(weights: dict) -> bool:
    """Whether `pretrained=True` can fetch this entry of `weights`."""
    return 'url' in weights or 'hf_hub_id' in weights


def default_cfg(name: str) -> dict[str, dict]:
    """timm's pretrained cfgs of variant `name`: 'name.tag' -> fields that don't depend on the architecture."""
    facts = info(name)
    return {f'{name}.{entry["tag"]}': _cfg(facts | entry) for entry in facts['weights'] or [{'tag': 'untrained'}]}


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
