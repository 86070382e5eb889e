"""``python -m refattn``: the command line."""

from .cli import main

main(prog_name="refattn")
