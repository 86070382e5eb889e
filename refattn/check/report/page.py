"""A check run as one HTML page that needs nothing else: no script to be read, no file or address to load."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..compare import Worst
from ..diagnose.rules import RULES
from ..diagnose.statistics import BANDS, EDGES, HEADS, Figures, bands
from .machine import machine, versions
from .report import PLACES, ROW, VERDICTS, Check, Report

__all__ = ["page"]

LEVELS = (0.0, *(4.0**k for k in range(-3, 4)))
"""Upper ends of the colours' ranges of error ÷ allowed; two more colours show what is larger, and what is infinite."""
SCALE = ("0", "to 1/64", "to 1/16", "to 1/4", "to 1", "to 4", "to 16", "to 64", "above 64", "infinite")
BOUND = SCALE.index("to 1") + 1
"""The first level above the bound."""
WORDS = {
    "passed": "✓ passed",
    "failed": "✗ failed",
    "edge": "△ an edge differs",
    "known": "– known",
    "unread": "– not read",
    "unsupported": "– outside capabilities",
}
SHOWN = ("passed", "failed", "edge", "not run")
"""The columns of counts."""
BINS = (*("0" if e == 0 else f"≤ {e:.7g}" for e in EDGES), "more")
CELL, BAR, LINE = 12, 200, 16


def page(reports: Sequence[Report]) -> str:
    """Return several reports as one self-contained HTML page.

    Parameters
    ----------
    reports : sequence of Report
        One a kernel, in the order in which they are shown.
    """
    return _TEMPLATE.render(
        kernels=[_kernel(f"k{i}", r) for i, r in enumerate(reports)],
        rules=_rules(c for r in reports for c in r.checks),
        machine=machine(),
        versions=versions(),
    )


def _kernel(key: str, r: Report) -> dict[str, Any]:
    checks = [{"id": f"{key}c{i}", "check": c, "spread": _spread(c)} for i, c in enumerate(r.checks)]
    failed = [x | _failure(r, c) for x, c in zip(checks, r.checks, strict=True) if c.verdict in ("failed", "edge")]
    some = "edge" if r.broken else "passed" if r.count("passed") else "nothing ran"
    verdict = "failed" if r.count("failed") else some
    formats = [_format(r, d) for d in dict.fromkeys(c.dtype for c in r.checks)]
    return {"id": key, "report": r, "verdict": verdict, "formats": formats, "checks": checks, "failed": failed}


def _spread(c: Check) -> Figures | None:
    """Return the figures of the array whose errors are largest beside what was predicted for it."""
    known = [a.figures for a in c.arrays if a.figures is not None and not math.isnan(a.figures.rms)]
    return max(known, key=lambda f: f.rms, default=None)


def _format(r: Report, dtype: str) -> dict[str, Any]:
    here = [c for c in r.checks if c.dtype == dtype]
    worst = {v: max((c.ratio for c in here if c.verdict == v and c.worst), default=None) for v in VERDICTS}
    return {
        "name": dtype,
        "counts": {v: count(here, v) for v in SHOWN},
        "total": len(here),
        "worst": worst,
        "rounded": r.correctly_rounded.get(dtype),
    }


def _failure(r: Report, c: Check) -> dict[str, Any]:
    arrays = c.arrays or ((c.worst,) if c.worst is not None else ())
    return {
        "sentence": r.describe(c).rpartition("\n  repeat it: ")[0],
        "command": r.command(c),
        "arrays": arrays,
        "pictures": [_pictures(w, w.figures) for w in arrays if w.figures is not None and not w.passed],
    }


def _rules(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """Count for each rule what it would have said, over the checks whose out it judges."""
    known = [c for c in checks if c.rules]
    table = []
    for rule in dict.fromkeys((*RULES, *(n for c in known for n in c.rules))):
        said = [(c, c.rules[rule]) for c in known if c.rules.get(rule) is not None]
        wrong = [(c, ok) for c, ok in said if c.verdict == "failed"]
        right = [ok for c, ok in said if c.verdict == "passed"]
        accepted = [c for c, ok in wrong if ok]
        table.append(
            {
                "name": rule,
                "accepts": len(accepted),
                "accepts_out": sum(any(a.array == "out" and not a.passed for a in c.arrays) for c in accepted),
                "failed": len(wrong),
                "rejects": right.count(False),
                "passed": len(right),
            }
        )
    return table if known else []


def _pictures(w: Worst, f: Figures) -> dict[str, Any]:
    """Return the error maps and the histogram of one array."""
    names = PLACES.get(f.array, ROW)
    head, row, column = "head", *(names[2:4] + ("row", "column")[len(names[2:4]) :])
    whole = (f.shape[0], 1, 1) if len(f.shape) == 1 else (*f.shape[1:], 1, 1)[:3]
    strips = [(head, f.by_head, bands(whole[0])), (row, f.by_row, bands(whole[1]))]
    heads, rows, columns = (bands(n, most) for n, most in zip(whole, (HEADS, BANDS, BANDS), strict=True))
    lines = [_span(row, b, b) for b in rows]
    return {
        "array": f.array,
        "failures": w.failures,
        "elements": w.elements,
        "strips": [{"name": n, "map": _heat([x], [""], n, b)} for n, x, b in strips if x],
        "maps": [
            {"name": _span(head, h, h), "map": _heat(x, lines, column, columns)}
            for h, x in zip(heads, f.map, strict=False)
        ],
        "axes": f"{_span(row, rows[0], rows[-1])} down, {_span(column, columns[0], columns[-1])} across",
        "bars": _bars(f.histogram),
    }


def _heat(values: Sequence[Sequence[float]], rows: list[str], name: str, columns: list[range]) -> dict[str, Any]:
    """Return the rectangles of a heat map; neighbours of one level are drawn as one, which keeps the page small."""
    cells = []
    for y, (line, row) in enumerate(zip(values, rows, strict=True)):
        x = 0
        for level, group in groupby(line, _level):
            run = list(group)
            place = ", ".join(filter(None, (row, _span(name, columns[x], columns[x + len(run) - 1]))))
            low, high = number(min(run)), number(max(run))
            title = f"{place}: error ÷ allowed {low if low == high else f'{low} to {high}'}"
            cells.append({"x": x * CELL, "y": y * CELL, "width": len(run) * CELL, "level": level, "title": title})
            x += len(run)
    every = [v for line in values for v in line]
    over = sum(v > 1 for v in every)
    return {
        "width": max(map(len, values)) * CELL,
        "height": len(values) * CELL,
        "cells": cells,
        "label": f"largest error ÷ allowed {number(max(every))}, {over} of {len(every)} cells above 1",
    }


def _span(name: str, first: range, last: range) -> str:
    start, end = first.start, last.stop - 1
    return f"{name} {start}" if start == end else f"{name}s {start} to {end}"


def _level(x: float) -> int:
    return bisect_left(LEVELS, x) if math.isfinite(x) else len(SCALE) - 1


def _bars(counts: Sequence[int]) -> list[dict[str, Any]]:
    """Return the bars between the first and the last bin that hold something."""
    used = [i for i, n in enumerate(counts) if n]
    if not used:
        return []
    most = max(counts)
    return [
        {"label": BINS[i], "count": counts[i], "width": math.ceil(BAR * counts[i] / most)}
        for i in range(used[0], used[-1] + 1)
    ]


def number(x: float | None) -> str:
    """Return a figure as text."""
    if x is None:
        return "–"
    if math.isnan(x):
        return "NaN"
    return f"{x:.3g}" if math.isfinite(x) else "infinite" if x > 0 else "-infinite"


def order(x: float | None) -> str:
    """Return by what a figure is sorted, as JavaScript reads it; what is none comes below all."""
    if x is None or math.isnan(x):
        return "-1"
    return repr(float(abs(x))) if math.isfinite(x) else "Infinity"


def count(checks: Sequence[Check], verdict: str) -> int:
    """Return how many checks have a verdict of the table; "not run" is all that have none of the others."""
    if verdict == "not run":
        return sum(c.verdict not in SHOWN for c in checks)
    return sum(c.verdict == verdict for c in checks)


_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters |= {"number": number, "order": order}
_ENVIRONMENT.globals |= {"WORDS": WORDS, "SCALE": SCALE, "BOUND": BOUND, "CELL": CELL, "BAR": BAR, "LINE": LINE}
_ENVIRONMENT.globals |= {"SHOWN": SHOWN, "count": count}
_TEMPLATE = _ENVIRONMENT.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
