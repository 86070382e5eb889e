"""A layer's plan that came from elsewhere: the client computes with nothing in it that is not checked here."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from ..errors import InvalidInput
from ..validation import shown
from .arguments import POWERS, is_count, is_number
from .costs import COSTS
from .layer_plan import LayerPlan, period_of
from .layout import Layout
from .noise import Ring
from .plan import MOST_BITS

__all__ = ["layer_plan_of"]

MOST_LEVELS, MOST_PRIME = 64, 60
MOST_ITEMS = 2**12
"""Rotations, and kinds of operations."""


def layer_plan_of(what: dict[str, Any]) -> LayerPlan:
    """Return the plan of what JSON held of one.

    Raises
    ------
    InvalidInput
        A part of it is not what a layer's plan has, or its ring is not within 128 bits of security.
    """
    ring = _ring(dict(what["ring"]))
    layout = _layout(dict(what["layout"]), ring)
    rotations, counts = what["rotations"], what["counts"]
    if not isinstance(rotations, list) or len(rotations) > MOST_ITEMS or len(set(rotations)) != len(rotations):
        raise InvalidInput(f"he: the plan's rotations are no list of at most {MOST_ITEMS} different steps")
    for r in rotations:
        _expect("a rotation", r, is_count(r, 1, ring.slots - 1), f"an integer from 1 to {ring.slots - 1}")
    if not isinstance(counts, list) or len(counts) > MOST_ITEMS:
        raise InvalidInput(f"he: the plan's counts are no list of at most {MOST_ITEMS} kinds of operations")
    found: Counter[tuple[str, int]] = Counter()
    for row in counts:
        good = isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and row[0] in COSTS
        good = good and is_count(row[1], 1, ring.levels + 1) and is_count(row[2], 0, 2**40)
        _expect("a count", row, good, "[operation, primes left, times]")
        found[row[0], row[1]] = row[2]
    levels = what["levels"]
    if not isinstance(levels, dict) or not all(is_count(x, 0, MOST_LEVELS) for x in levels.values()):
        raise InvalidInput(f"he: the plan's levels are {shown(levels)}, expected numbers of levels by step")
    made = LayerPlan(**what | {"ring": ring, "layout": layout, "rotations": tuple(rotations), "counts": found})
    _check(made)
    return made


def _expect(what: str, got: Any, good: bool, expected: str) -> None:
    if not good:
        raise InvalidInput(f"he: the plan has {what} of {shown(got)}, expected {expected}")


def _ring(what: dict[str, Any]) -> Ring:
    for name, most in (("first", MOST_PRIME), ("middle", MOST_PRIME), ("special", MOST_PRIME), ("levels", MOST_LEVELS)):
        _expect(f"ring.{name}", what[name], is_count(what[name], 1, most), f"an integer from 1 to {most}")
    degree = what["degree"]
    ring = Ring(**what)
    if not is_count(degree, 1, max(MOST_BITS)) or degree not in MOST_BITS or sum(ring.bits) > MOST_BITS[degree]:
        raise InvalidInput("he: the plan's ring is not within 128 bits of security")
    return ring


def _layout(what: dict[str, Any], ring: Ring) -> Layout:
    for name in ("slots", "keys", "columns", "groups", "parts", "queries", "heads", "spans"):
        n = what[name]
        good = is_count(n, 1, ring.slots) and n & (n - 1) == 0
        _expect(
            f"layout.{name}", n, good, f"a power of 2 of at most {ring.slots}; the plan's sizes do not fit its slots"
        )
    x = Layout(**what)
    alike = x.keys == x.queries and x.columns == x.heads * x.queries and (x.parts, x.spans, x.compact) == (1, 1, False)
    if x.slots != ring.slots or not alike or x.slots % period_of(x) or x.slots < period_of(x):
        raise InvalidInput("he: the plan's layout is none of a layer's: its sizes do not fit its slots")
    return x


def _check(made: LayerPlan) -> None:
    layout = made.layout
    most = {
        "n": (made.n, 1, layout.queries),
        "d": (made.d, 1, layout.slots if made.classes else 2 * layout.groups * layout.heads),
        "heads": (made.heads, 1, layout.heads),
        "classes": (made.classes, 0, 2 * layout.groups),
        "spread": (made.spread, 1, layout.groups),
        "apart": (made.apart, 1, layout.slots // period_of(layout)),
        "p": (made.p, min(POWERS), max(POWERS)),
        "residual_limbs": (made.residual_limbs, 0 if made.classes else 1, made.ring.levels + 1),
    }
    for name, (n, least, largest) in most.items():
        good = is_count(n, least, largest)
        _expect(name, n, good, f"an integer from {least} to {largest}; the plan's sizes do not fit its slots")
    _expect("p", made.p, made.p in POWERS, f"one of {', '.join(map(str, POWERS))}")
    _expect("upload", made.upload, made.upload in ("full", "whole"), "'full' or 'whole'")
    epsilon = made.first_epsilon
    _expect(
        "first_epsilon", epsilon, epsilon is None or (is_number(epsilon) and epsilon >= 0), "a number of at least 0"
    )
    for name in ("residual_factor", "out_factor"):
        x = getattr(made, name)
        good = is_number(x) and 1e-100 <= math.fabs(x) <= 1e100
        _expect(name, x, good, "a finite number other than 0")
