"""Attention operators. This room knows torch and Triton, nothing else of the project."""

from zoo.kernels.dispatch import OPERATORS, Explanation, explain, use
from zoo.kernels.neighborhood import neighborhood_attention
from zoo.kernels.routing import routing_attention

__all__ = ['OPERATORS', 'Explanation', 'explain', 'neighborhood_attention', 'routing_attention', 'use']
