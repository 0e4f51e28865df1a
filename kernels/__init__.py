"""Attention operators. This room knows torch and Triton, nothing else of the project."""

from .aggregated import aggregated_attention
from .crisscross import crisscross_attention
from .dispatch import OPERATORS, Explanation, explain, use
from .neighborhood import neighborhood_attention
from .routing import routing_attention
from .window import window_attention

__all__ = [
    'OPERATORS',
    'Explanation',
    'aggregated_attention',
    'crisscross_attention',
    'explain',
    'neighborhood_attention',
    'routing_attention',
    'use',
    'window_attention',
]
