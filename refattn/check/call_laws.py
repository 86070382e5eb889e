"""Relations of calls that say the same in two ways: by scales, positions, slopes and corners."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import from_float64, to_float64
from ..problem import Problem
from .compare import Worst
from .inputs.draw import Draw
from .inputs.positioned import rotary, slopes
from .law import Law
from .trial import Trial, agree, same_out

__all__ = ["CALL_LAWS"]

MOVED = 1001
"""What is added to every position: past what eight bits tell apart."""


def _scaled(d: Draw) -> Problem:
    """Return a call in float8 with a scale for each head; its elements have room for a factor of two."""
    p = d.problem(20, 40, b=2, h=4, h_kv=2, scale=16.0)
    found = {}
    for name, least in (("query", 0.015), ("key", 0.7), ("value", 0.3)):
        x = np.clip(np.rint(4 * to_float64(getattr(p, name))), -15, 15) / 4
        found[name] = from_float64(x, "float8_e4m3fn")
        found[f"{name}_scale"] = np.linspace(least, 2 * least, x.shape[1], dtype=np.float32).reshape(1, -1, 1, 1)
    return p.replace(**found, out_dtype=p.dtype)


def _scales_moved(ask: Trial, p: Problem) -> Worst:
    """Move powers of two from scales to elements, and from the scale of queries to that of keys."""
    twice = {n: from_float64(2 * to_float64(getattr(p, n)), "float8_e4m3fn") for n in ("query", "value")}
    by = {"query_scale": 2.0**-13, "key_scale": 2.0**12, "value_scale": 0.5}
    other = p.replace(**twice, **{n: getattr(p, n) * np.float32(x) for n, x in by.items()})
    return same_out(ask, other, p, "powers of two moved between scales and elements change the output")


def _plain_tables(d: Draw) -> Problem:
    """Return a call whose tables turn nothing."""
    tables = rotary(d, "half", 16)
    if tables:
        tables |= {"rotary_cos": np.ones_like(tables["rotary_cos"]), "rotary_sin": np.zeros_like(tables["rotary_sin"])}
    return d.problem(20, 40, h=4, h_kv=2, **tables)


def _rotary_none(ask: Trial, p: Problem) -> Worst:
    """Leave tables out that turn nothing."""
    plain = p.replace(rotary=None, rotary_cos=None, rotary_sin=None)
    return same_out(ask, p, plain, "rotary positions whose angles are all 0 change the output")


def _quarter_turns(d: Draw) -> Problem:
    """Return a call whose tables turn by quarters, each pair at its own pace: exact in every format."""
    tables = rotary(d, "half", 16, MOVED + 60)
    if tables:
        angle = np.arange(len(tables["rotary_cos"]))[:, None] * np.arange(1, 1 + tables["rotary_cos"].shape[1]) % 4
        cos, sin = np.array([1, 0, -1, 0])[angle], np.array([0, 1, 0, -1])[angle]
        tables |= {n: x.astype(tables["rotary_cos"].dtype) for n, x in (("rotary_cos", cos), ("rotary_sin", sin))}
    at: dict[str, Any] = {f"positions_{x}": d.rng.integers(0, 60, n, dtype=np.int32) for x, n in (("q", 20), ("k", 40))}
    return d.problem(20, 40, h=4, h_kv=2, **tables, **at)


def _positions_moved(ask: Trial, p: Problem) -> Worst:
    """Add the same number to all positions."""
    moved = p.replace(positions_q=p.positions_q + MOVED, positions_k=p.positions_k + MOVED)
    return same_out(ask, moved, p, "a number added to all positions changes the output")


def _level(d: Draw) -> Problem:
    return d.problem(20, 40, h=4, h_kv=2, alibi_slopes=0 * slopes(d, 4))


def _alibi_none(ask: Trial, p: Problem) -> Worst:
    """Leave slopes of 0 out."""
    return same_out(ask, p, p.replace(alibi_slopes=None), "slopes of 0 change the output")


def _corner_of_window(ask: Trial, p: Problem) -> Worst:
    """Name the corner that an offset moves the diagonal of a window to."""
    named = p.replace(alignment="bottom_right", offset=None)
    text = "a window at the top left with an offset to the other corner is not one at the bottom right"
    return agree(ask.out(p), ask.out(named), 2 * ask.allowed(p)["out"], text)


CALL_LAWS = (
    Law("scales_moved", "powers of two may stand in scales or in elements", _scaled, _scales_moved),
    Law(
        "rotary_none",
        "rotary positions whose angles are all 0 are none",
        _plain_tables,
        _rotary_none,
        uses=frozenset({"rotary"}),
    ),
    Law(
        "positions_moved",
        "rotary positions count by their differences",
        _quarter_turns,
        _positions_moved,
        uses=frozenset({"rotary"}),
    ),
    Law(
        "alibi_none",
        "slopes of 0 are none",
        _level,
        _alibi_none,
        uses=frozenset({"alibi_slopes"}),
    ),
    Law(
        "corner_of_window",
        "a window at the top left moved to the other corner is one at the bottom right",
        lambda d: d.problem(window=(9, 4), alignment="top_left", offset=30),
        _corner_of_window,
        uses=frozenset({"window", "alignment", "offset"}),
    ),
)
"""Laws of scales, positions, slopes and corners."""
