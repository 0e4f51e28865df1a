"""Attention operators. This room knows torch and Triton, nothing else of the project."""
