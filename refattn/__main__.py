"""``python -m refattn``: the command line."""

from .cli.guard import guarded

guarded()
