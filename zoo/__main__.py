"""`python -m zoo`: the command line."""

from .cli import app

app()
