"""``python -m refattn``: the command line."""

from .cli.main import main

main(prog_name="refattn")
