"""The command line: refattn golden, exact answers as files."""

from __future__ import annotations

import math
import sys

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..check.report.report import Check, element
from ..dtypes import FORMATS
from ..golden.make import check_results, make, verify
from ..operators import load
from ..problem import VARIANT

__all__ = ["golden"]


@click.group()
def golden() -> None:
    """Write and verify golden files: whole calls with exact answers, for kernels outside Python."""


@golden.command(name="make")
@click.argument("folder", metavar="DIR")
@click.option(
    "--variant",
    default=VARIANT,
    show_default=True,
    help="The operator: a name, or path/file.py:NAME.",
)
@click.option(
    "--dtypes", default="float32,bfloat16", show_default=True, help="Formats, with commas: " + ", ".join(FORMATS) + "."
)
@click.option("--only", help="Only the cases of this name, as family/label[dtype] (a shell pattern).")
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "text"]),
    default="json",
    show_default=True,
    help="text: also write each file as flat text, one number a line.",
)
@click.option(
    "--gradients", is_flag=True, help="Also store dout and the exact gradients, for the cases that have them."
)
def make_(folder: str, variant: str, dtypes: str, only: str | None, form: str, gradients: bool) -> None:
    """Write the input cases of an operator with their exact answers and allowed errors to DIR (new or empty)."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("cases", total=None)
        names = make(
            folder,
            load(variant),
            [d.strip() for d in dtypes.split(",") if d.strip()],
            only,
            form == "text",
            lambda name: bar.update(task, description=name),
            gradients,
        )
    click.echo(f"{folder}: {len(names)} files")


@golden.command(name="verify")
@click.argument("folder", metavar="DIR")
@click.option("--results", help="A folder with a kernel's results, in files of the same names: judge them.")
@click.option("--variant", help="An operator of your own that DIR holds answers of, as path/file.py:NAME.")
def verify_(folder: str, results: str | None, variant: str | None) -> None:
    """Check the digests in DIR and recompute every answer; with --results, judge a kernel's results instead.

    Exit code: 0 all passed, 1 one failed, 2 bad input or nothing ran.
    """
    if variant is not None:
        load(variant)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("files", total=None)

        def step(name: str) -> None:
            bar.update(task, description=name)

        checks = verify(folder, step) if results is None else check_results(folder, results, step)
    console = Console(highlight=False)
    for c in checks:
        if c.verdict != "passed":
            console.print(f"{c.name}: {c.verdict}: {c.message}", markup=False, soft_wrap=True)
        if c.verdict == "failed" and c.worst is not None and c.worst.place:
            console.print(f"  {element(c.worst)}", markup=False, soft_wrap=True)
    console.print(_table(checks))
    if any(c.verdict == "failed" for c in checks):
        sys.exit(1)
    if not any(c.verdict == "passed" for c in checks):
        click.echo("error: nothing ran: there is no file to judge", err=True)
        sys.exit(2)


def _table(checks: list[Check]) -> Table:
    table = Table("format", "passed", "failed", "not run", "worst error/allowed")
    for dtype in dict.fromkeys(c.name.rsplit("[", 1)[1][:-1] for c in checks):
        here = [c for c in checks if c.name.endswith(f"[{dtype}]")]
        counts = [str(sum(c.verdict == v for c in here)) for v in ("passed", "failed", "not run")]
        worst = max((c.ratio for c in here if not math.isnan(c.ratio)), default=None)
        table.add_row(dtype, *counts, "-" if worst is None else f"{worst:.3g}")
    return table
