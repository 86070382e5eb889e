"""Run a benchmark of the folder benchmarks/ and report its figures."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from .check.report.machine import machine, versions
from .errors import InvalidInput, UnsupportedProblem
from .files import write_text

__all__ = ["Row", "benchmarks", "gpu_medians", "gpu_torch", "load", "run"]


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


def load(name: str) -> ModuleType:
    """Return a benchmark's module. Other processes cannot import it: what is sent to them carries its own text."""
    spec = importlib.util.spec_from_file_location(f"refattn_benchmark_{name}", _folder() / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def run(name: str, console: Console, json_file: str | None, **given: str) -> list[Row]:
    """Run a benchmark: its module's ``rows()`` yields the figures.

    Parameters
    ----------
    name : str
        One of :func:`benchmarks`.
    console : Console
        Where rows are printed.
    json_file : str or None
        Where ``{"machine", "versions", "rows"}`` is written.
    **given : str
        What ``rows()`` is called with.

    Raises
    ------
    InvalidInput
        The benchmark takes no such argument.
    """
    module = load(name)
    for key in given.keys() - inspect.signature(module.rows).parameters.keys():
        raise InvalidInput(f"bench: {name} takes no --{key}")
    rows: list[Row] = []
    about = {"machine": machine(), "versions": versions()}
    for row in _watched(module.rows(**given), console):
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


def gpu_torch() -> Any:
    """Return PyTorch, for a benchmark that needs it and an NVIDIA GPU.

    Raises
    ------
    UnsupportedProblem
        One of the two is missing.
    """
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as e:
        raise UnsupportedProblem("bench: needs PyTorch and an NVIDIA GPU") from e
    if not torch.cuda.is_available():
        raise UnsupportedProblem("bench: needs an NVIDIA GPU")
    return torch


def gpu_medians(
    torch: Any, calls: dict[str, Callable[[], Any]], runs: int = 15, least_ms: float = 1.0, ahead: bool = False
) -> dict[str, float]:
    """Return the median milliseconds of each call on a GPU; the calls take turns, each for at least some time.

    A GPU that has nothing to do waits for Python to queue the first call, and that is measured, too. With `ahead` it
    sleeps before until all calls of a measurement are queued: what is measured then is the GPU's time alone.
    """
    clocks = 2_000_000  # a millisecond of them, or more: no GPU runs faster

    def lasts(call: Callable[[], Any], repeats: int, sleep_ms: float = 0.0) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if sleep_ms:
            torch.cuda._sleep(int(sleep_ms * clocks))
        start.record()
        before = time.perf_counter()
        for _ in range(repeats):
            call()
        queued = time.perf_counter() - before
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats, 1e3 * queued

    repeats, sleeps = {}, {}
    for name, call in calls.items():
        lasts(call, 2)
        repeats[name] = max(1, math.ceil(least_ms / lasts(call, 4)[0]))
        sleeps[name] = 2 * lasts(call, repeats[name])[1] + 0.5 if ahead else 0.0
    times: dict[str, list[float]] = {n: [] for n in calls}
    for _ in range(runs):
        for name, call in calls.items():
            times[name].append(lasts(call, repeats[name], sleeps[name])[0])
    return {n: statistics.median(t) for n, t in times.items()}
