"""Plots of evidence: what changes with a size, in logarithms."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import UnsupportedProblem, install
from .claim import Result

__all__ = ["figure"]


def _series(names: list[str] | None, order: list[int]) -> list[list[int]]:
    """Return the places of each series in order: those of one name, or all of them where there are no names."""
    return [order] if names is None else [[i for i in order if names[i] == one] for one in dict.fromkeys(names)]


def figure(result: Result) -> Any:
    """Return a matplotlib figure of a result's lists against the first of them, or None where there are not two.

    A list "series" says of each place which line it is of.

    Raises
    ------
    UnsupportedProblem
        matplotlib is missing.
    """
    lists = {n: x for n, x in result.detail.items() if isinstance(x, list) and len(x) > 1 and n != "series"}
    if not lists:
        return None
    (along, at), *others = lists.items()
    others = [(n, x) for n, x in others if len(x) == len(at)]
    if not others:
        return None
    try:
        made = importlib.import_module("matplotlib.figure").Figure(figsize=(6, 4))
    except ModuleNotFoundError as e:
        raise UnsupportedProblem(f"theory: plots need matplotlib; {install('report')}") from e
    axes = made.subplots()
    order = sorted(range(len(at)), key=at.__getitem__)
    for label, values in others:
        for part in _series(result.detail.get("series"), order):
            name = label if part is order else f"{label}, {result.detail['series'][part[0]]}"
            axes.plot([at[i] for i in part], [values[i] for i in part], "o-", label=name)
    positive = all(v > 0 for _, values in others for v in values) and min(at) > 0
    axes.set(xlabel=along, title=result.name, **({"xscale": "log", "yscale": "log"} if positive else {}))
    axes.tick_params(which="minor", labelsize=6)  # labels within a decade overlap otherwise
    axes.legend()
    return made
