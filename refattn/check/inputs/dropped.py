"""Calls with dropout: small problems in which a mask of another head, row or moment shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...problem import Problem
from .draw import Draw

__all__ = ["DROPPED", "dropout"]


def dropout(d: Draw, p: float, *shape: int) -> dict[str, Any]:
    """Return a probability and a mask of so many weights, none of which is alike for two heads or rows."""
    return {"dropout_p": p, "dropout_mask": d.rng.random(shape) >= p}


def _plain(d: Draw) -> Problem:
    return d.problem(20, 70, b=2, h=4, h_kv=2, **dropout(d, 0.25, 2, 4, 20, 70))


def _options(d: Draw) -> Problem:
    """Return a call of which nine weights in ten are dropped, of some rows all; a sink counts, and is never dropped."""
    more: dict[str, Any] = {"bias": d.normal(1, 2, 37, 67), "sink": d.normal(2), "causal": "bottom_right"}
    more |= dropout(d, 0.9, 1, 2, 37, 67)
    more["dropout_mask"][:, :, 5::9] = False
    return d.problem(softcap=5.0, **more)


def _decoded(d: Draw) -> Problem:
    """Return one query for each cache, with a mask that all batch items and heads share."""
    return d.problem(1, 200, b=3, h=4, h_kv=1, **dropout(d, 0.5, 1, 1, 1, 200))


Entry = tuple[Callable[[Draw], Problem], tuple[str, ...]]
DROPPED: dict[str, Entry] = {
    # a scale that is missing, a denominator of what is kept, the mask of the next head or row
    "plain": (_plain, ("dropout_mask",)),
    # rows of which nothing is kept: out is 0, lse is not
    "options": (_options, ("dropout_mask", "bias", "sink", "softcap", "causal")),
    "decoding": (_decoded, ("dropout_mask",)),
}
"""Calls by label, and the options that an operator must have for them."""
