"""Families that timm owns: what the zoo adds to timm's own classes, which stay as they are.

timm's names of tensors are not always the authors'. For families of which timm loads only its own conversions,
`official_keys` has the rules from published names to timm's, which `zoo.create_model(name, checkpoint=...)` applies.
Where timm's own filter knows the published names (DaViT, MambaOut) nothing is needed here.
"""

import re
from collections.abc import Mapping

from . import catalogue

__all__ = ['feature_arguments', 'loads_loosely', 'official_keys', 'resolve']

MISSING_FROM_FLORENCE2 = ('head.norm.',)  # of its vision tower, a DaViT without a classifier
DOWNSAMPLERS = 3  # modules between the stages of SHViT and EfficientViT, at the front of the next stage's blocks


def _staged(names: Mapping[str, str]) -> list[tuple]:
    """Rules for `blocks1` ... `blocks3` of EfficientViT and SHViT, where a stage begins with what leads to it.

    `names`: of a downsampler's modules, the authors' to timm's, both relative to the stage.
    """

    def downsampler(match):
        return f'stages.{int(match[1]) - 1}.downsample.{names[match[2]]}.'

    def block(match):
        stage = int(match[1]) - 1
        return f'stages.{stage}.blocks.{int(match[2]) - (DOWNSAMPLERS if stage else 0)}.'

    return [
        (rf'^blocks([23])\.({"|".join(map(re.escape, names))})\.', downsampler),
        (r'^blocks(\d)\.(\d+)\.', block),
    ]


SHVIT = _staged({'0.0': '0', '0.1': '1', '1': '2', '2.0': '3', '2.1': '4'})
EFFICIENTVIT_MSRA = [
    *_staged({'0.0': 'res1.0', '0.1': 'res1.1', '1': 'patchmerge', '2.0': 'res2.0', '2.1': 'res2.1'}),
    (r'^patch_embed\.(\d)\.', lambda match: f'patch_embed.conv{int(match[1]) // 2 + 1}.'),
    (r'\.c\.', '.conv.'),
    (r'^(head|head_dist)\.l\.', r'\1.linear.'),
]
CROSSVIT = [(r'^(pos_embed|cls_token)\.', r'\1_')]
OFFICIAL_KEYS = {'shvit': SHVIT, 'efficientvit_msra': EFFICIENTVIT_MSRA, 'crossvit': CROSSVIT}


def official_keys(name: str) -> list[tuple]:
    """Rules of re.sub, from the authors' keys to timm's, for timm's model `name`; timm's own keys match none."""
    return OFFICIAL_KEYS.get(_family(name), [])


def resolve(name: str, state_dict: Mapping) -> str:
    """The model that a checkpoint for `name` is of: SHViT with a distillation head is a class of its own."""
    architecture = name.partition('.')[0]
    has_two_heads = _family(architecture) == 'shvit' and any(key.startswith('head_dist.') for key in state_dict)
    return f'{architecture}_distilled' if has_two_heads and not architecture.endswith('_distilled') else name


def feature_arguments(name: str) -> dict:
    """Arguments with which timm's `features_only` gives (B, C, H, W) maps of a model of the catalogue."""
    return {'feature_cls': 'getter'} if _family(name) == 'mambaout' else {}


def loads_loosely(name: str) -> bool:
    """Whether timm would take any checkpoint for the model, as it lets Florence-2's lack the head's norm."""
    return name.partition('.')[0].endswith('_fl') and _family(name) == 'davit'


def _family(name: str) -> str:
    try:
        return catalogue.family_of(name.partition('.')[0])
    except KeyError:
        return ''
