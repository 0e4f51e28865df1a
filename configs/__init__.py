"""Recipes: mmengine configs, read by path or by their names below this folder (`zoo train NAME`)."""
