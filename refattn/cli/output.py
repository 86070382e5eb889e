"""What `refattn check` prints: failures by cause, then one row for each kernel and format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..check.kernels import KERNELS
from ..check.model import EDGES
from ..check.report.report import Check, Report
from ..check.runner import ALONE
from ..variants import VARIANTS

__all__ = ["OPERATORS", "console_of", "print_failures", "print_outside", "table_of", "table_with"]

OPERATORS = ", ".join(VARIANTS) + "."
"""The operators' names, for the help of commands."""
NAMES = 4
"""Names of one cause that are printed."""


def console_of(stream: TextIO) -> Console:
    """Return what prints to a stream: a pipe or a log has no width of its own, let tables be as wide as they are."""
    return Console(file=stream, width=None if stream.isatty() else 1000, highlight=False)


def table_with(widths: Mapping[str, int]) -> Table:
    """Return an empty table whose columns are no wider than this, in a pipe too."""
    table = Table()
    for name, most in widths.items():
        table.add_column(name, max_width=most, overflow="fold")
    return table


def table_of(reports: Iterable[Report]) -> Table:
    """Return the table of verdicts, within 80 columns for names of usual length."""
    table = Table(
        title="Attention kernels against the exact answer",
        title_justify="left",
        caption="error/allowed: largest error ÷ allowed error of the checks that passed; below 1 passes",
        caption_justify="left",
        padding=(0, 1),
    )
    for name in ("kernel", "format"):
        table.add_column(name, overflow="fold")
    for name in ("passed", "wrong", "edges", "not run", "error/allowed"):
        table.add_column(name, justify="right")
    table.add_column("verdict", overflow="fold")
    for r in reports:
        for dtype in dict.fromkeys(c.dtype for c in r.checks):
            here = r.of_format(dtype)
            counts = [str(here.count(v)) for v in ("passed", "failed", "edge")]
            not_run = str(here.count("unread") + here.count("unsupported"))
            color = "red" if here.count("failed") else "green" if here.fits and not here.unasked else "yellow"
            name = escape(Path(r.kernel).name)
            table.add_row(name, dtype, *counts, not_run, _largest(here), f"[{color}]{here.verdict}[/]")
    return table


def _largest(report: Report) -> str:
    ratios = [c.ratio for c in report.checks if c.verdict == "passed" and c.worst is not None]
    return f"{max(ratios):.2g}" if ratios else "-"


def print_failures(console: Console, reports: list[Report]) -> None:
    """Print each cause once: the check with the smallest call, and the names of the others; then the edges."""
    for r in reports:
        causes: dict[str, list[Check]] = {}
        failed = [c for c in r.checks if c.verdict == "failed"]
        follow = [c for c in failed if ALONE in c.message]
        follow = follow if len(follow) < len(failed) else []
        for c in failed:
            if c not in follow:
                causes.setdefault(_cause(c.message), []).append(c)
        for group in sorted(causes.values(), key=lambda x: -len(x)):
            group.sort(key=lambda c: c.worst.elements if c.worst is not None else 0)
            if len(group) > 1:
                _print(console, f"{len(group)} checks fail alike; the smallest:")
            _print(console, r.describe(group[0]))
            if len(group) > 1:
                rest = [c.name for c in group[1:]]
                more = f" and {len(rest) - NAMES} more" if len(rest) > NAMES else ""
                _print(console, f"  the same in {', '.join(rest[:NAMES])}{more}")
        if follow:
            names = ", ".join(c.name for c in follow[:NAMES]) + (" ..." if len(follow) > NAMES else "")
            text = "of a law may fail for the same reason, its call being wrong"
            _print(console, f"{_counted(len(follow))} {text}: {names}")
        for name, n in r.broken.items():
            known = " (declared)" if name in r.edges else ""
            what = f"{name}, the contract that {EDGES[name]}"
            _print(console, f"{r.kernel} differs at an edge{known}, {_counted(n)}: {what}")
            _print(console, f"  e.g. {next(c for c in r.checks if name in c.edges).name}; docs/edges.md says more")
        for name in r.kept:
            _print(console, f"{r.kernel} declares that it differs at {name}, and keeps it: take it out of edges=")
        if r.diagnosis is not None:
            for line in filter(None, [*r.diagnosis.lines, r.diagnosis.program]):
                _print(console, f"{r.kernel}: {line}" if line != r.diagnosis.program else line)
        if causes or r.broken or r.kept:
            console.print()


def _counted(n: int) -> str:
    return f"{n} check" + "s" * (n != 1)


def _cause(message: str) -> str:
    """Return what a message says without numbers and places."""
    plain = re.sub(r"\([^)]*\)|\d[\d.]*", "", message)
    return "; ".join(dict.fromkeys(x.strip() for x in plain.split(";") if not x.strip().startswith("only ")))


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True, emoji=False)


def print_outside(console: Console, reports: list[Report], kernels: tuple[str, ...]) -> None:
    """Say what did not run, and why, and what nothing asked for."""
    for r in reports:
        lacks: dict[str, int] = {}
        for c in r.checks:
            if c.verdict in ("unsupported", "unread"):
                lacks[c.message] = lacks.get(c.message, 0) + 1
        if lacks:
            text = "; ".join(f"{n} × {m}" for m, n in sorted(lacks.items(), key=lambda x: -x[1])[:4])
            more = " ..." if len(lacks) > 4 else ""
            _print(console, f"{r.kernel}: {_counted(sum(lacks.values()))} not run: {text}{more}")
    for r in reports:
        if r.unasked:
            _print(console, f"{r.kernel}: declared, and no check asked for it: {', '.join(r.unasked)}")
        if r.truth:
            _print(console, f"{r.kernel}: {r.truth}")
        if r.lost:
            text = f"the device was lost in {r.lost}; {_counted(r.left)} after it did not run"
            how = "--time-limit SECONDS runs each kernel in a process of its own and goes on"
            _print(console, f"{r.kernel}: {text}; {how}")
        elif r.left:
            _print(console, f"{r.kernel}: the time was over before {r.left} checks, which did not run")
        if r.either:
            text = "rows whose scores its rounding may order otherwise; each was compared with the choice nearest to it"
            _print(console, f"{r.kernel}: {r.either} {text}")
    if any(c.name.startswith("calls/") for r in reports for c in r.checks):
        _print(console, f"calls drawn by seed {reports[0].seed}; --seed {reports[0].seed} draws them again")
    if not kernels:
        missing = sorted({e.package for e in KERNELS.values() if not e.here and not e.gpu})
        if missing:
            _print(console, f"not here: {', '.join(missing)}; refattn doctor tells how to add them")
        for e in KERNELS.values():
            named = {r.kernel for r in reports}
            if e.here and e.named_only and e.name not in named and reports[0].variant in e.variants:
                _print(console, f"{e.name}: runs only when named, {e.named_only}")
