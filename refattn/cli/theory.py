"""The command line: refattn theory, the claims behind attention: list, run."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from ..errors import InvalidInput
from ..files import check_folders, write_text, write_whole

__all__ = ["theory"]


@click.group()
def theory() -> None:
    """Claims of papers on attention as code: each with a check and a control that must fail."""


@theory.command(name="list")
def list_() -> None:
    """Print every claim, its source and what it rests on."""
    from ..theory import CLAIMS

    console = Console()
    for claim in CLAIMS.values():
        console.print(f"{claim.name}: {claim.statement}", markup=False, soft_wrap=True)
        for text in claim.hypotheses:
            console.print(f"  needs: {text}", markup=False, soft_wrap=True)
        if claim.conditional_on:
            console.print(f"  conditional on {claim.conditional_on}", markup=False, soft_wrap=True)
        console.print(f"  source: {claim.source}", markup=False, soft_wrap=True)


class _Naming(click.Command):
    """A command whose help ends with the claims' names; they are imported where help is asked for."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the names, several on a line."""
        from ..theory import CLAIMS

        with formatter.section("Claims"):
            room, indent = formatter.width - formatter.current_indent, " " * formatter.current_indent
            # names stay whole
            text = textwrap.fill(", ".join(CLAIMS), room, break_long_words=False, break_on_hyphens=False)
            formatter.write(textwrap.indent(text, indent) + "\n")


@theory.command(name="run", cls=_Naming)
@click.argument("names", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Run every claim.")
@click.option("--json", "json_file", help="Also write the evidence to this file as JSON.")
@click.option("--plots", help="Also draw what changes with a size, into this folder.")
def run_(names: tuple[str, ...], every: bool, json_file: str | None, plots: str | None) -> None:
    """Run claims: what was measured beside its bound, and whether the control failed as it must.

    NAMES are those that `refattn theory list` prints. Exit code: 1 where a claim does not hold or a control does.
    """
    from ..theory import CLAIMS, run
    from ..theory.plots import figure

    unknown = [n for n in names if n not in CLAIMS]
    if unknown:
        raise InvalidInput(f"theory: got {unknown[0]!r}, expected one of {', '.join(CLAIMS)}")
    if every == bool(names):
        raise InvalidInput("theory: give names of claims, or --all; `refattn theory list` prints them")
    check_folders(json_file, plots)
    chosen = list(CLAIMS) if every else list(names)
    console = Console()
    found = [run(CLAIMS[n]) for n in track(chosen, "claims", console=Console(stderr=True), transient=True)]
    head = ("holds", "control fails", "measured", "bound", "what", "seconds")
    table = Table(Column("claim", no_wrap=True), *head)
    for r in found:
        words = "yes" if r.holds else r.violated or "no"
        table.add_row(
            r.name, words, "yes" if r.control_failed else "NO", f"{r.measured:.3g}", f"{r.bound:.3g}", r.what,
            f"{r.seconds:.1f}",
        )  # fmt: skip
    console.print(table)
    if json_file is not None:
        write_text(json_file, json.dumps({"claims": [r.to_json() for r in found]}, indent=1) + "\n")
    if plots is not None:
        Path(plots).mkdir(exist_ok=True)
        for r in found:
            if (drawn := figure(r)) is not None:
                write_whole(Path(plots, f"{r.name}.png"), drawn.savefig)
    sys.exit(0 if all(r.holds and r.control_failed for r in found) else 1)
