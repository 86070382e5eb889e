"""Run a benchmark of the folder benchmarks/ and report its figures."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .check.report import machine, versions
from .errors import InvalidInput
from .files import write_text

__all__ = ["Row", "benchmarks", "run"]


@dataclass(frozen=True)
class Row:
    """One figure: its name, value and unit, and the bound that it is held to, if any."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        """Tell whether the figure keeps its bound."""
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)


def _folder() -> Path:
    here = Path(__file__).parent
    for folder in (here / "_benchmarks", here.parent / "benchmarks"):  # installed, or a source tree
        if folder.is_dir():
            return folder
    raise InvalidInput("bench: the benchmarks are not installed; run from a source tree or reinstall refattn")


def benchmarks() -> list[str]:
    """Return the names of the benchmarks."""
    return sorted(p.stem for p in _folder().glob("*.py") if not p.stem.startswith("_"))


def run(name: str, console: Console, json_file: str | None) -> list[Row]:
    """Run a benchmark: its module's ``rows()`` yields the figures.

    Parameters
    ----------
    name : str
        One of :func:`benchmarks`.
    console : Console
        Where rows are printed.
    json_file : str or None
        Where ``{"machine", "versions", "rows"}`` is written.
    """
    spec = importlib.util.spec_from_file_location(f"refattn_benchmark_{name}", _folder() / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows: list[Row] = []
    about = {"machine": machine(), "versions": versions()}
    for row in _watched(module.rows(), console):
        rows.append(row)
        if json_file is not None:  # row by row: what was measured before an error or a crash is kept
            whole = about | {"rows": [asdict(r) | {"holds": r.holds} for r in rows]}
            write_text(json_file, json.dumps(whole, indent=1) + "\n")
    table = Table("figure", "value", "unit", "held to", "holds")
    for r in rows:
        bound = (
            f"at most {r.at_most:g}"
            if r.at_most is not None
            else f"at least {r.at_least:g}"
            if r.at_least is not None
            else "-"
        )
        table.add_row(r.name, f"{r.value:.4g}", r.unit, bound, "yes" if r.holds else "[red]no[/]")
    console.print(table)
    return rows


def _watched(rows: Iterable[Row], console: Console) -> Iterator[Row]:
    with console.status("measuring") as status:
        for row in rows:
            status.update(f"measured {row.name}")
            yield row
