"""Attention operators. This room knows torch and Triton, nothing else of the project."""

from .dispatch import OPERATORS, Explanation, explain, use
from .neighborhood import neighborhood_attention
from .routing import routing_attention

__all__ = ['OPERATORS', 'Explanation', 'explain', 'neighborhood_attention', 'routing_attention', 'use']
