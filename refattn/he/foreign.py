"""A layer's or an encoder's plan that came from elsewhere: nothing in it is used that is not checked here."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from ..errors import InvalidInput
from ..validation import shown
from .arguments import LEAST, MOST, POWERS, is_count, is_number
from .costs import COSTS
from .encoder_plan import MOST_DRIFT, EncoderPlan
from .integers import MOST_FIRST
from .layer_plan import LayerPlan, period_of
from .layout import Layout
from .noise import Ring
from .plan import MOST_BITS

__all__ = ["encoder_plan_of", "layer_plan_of"]

MOST_LEVELS, MOST_PRIME = 64, 60
MOST_ITEMS = 2**12
"""Rotations, and kinds of operations."""
MOST_BLOCKS = 2**8


def layer_plan_of(what: dict[str, Any]) -> LayerPlan:
    """Return the plan of what JSON held of one.

    Raises
    ------
    InvalidInput
        A part of it is not what a layer's plan has, or its ring is not within 128 bits of security.
    """
    made = LayerPlan(**what | _common(what))
    _check(made)
    return made


def encoder_plan_of(what: dict[str, Any]) -> EncoderPlan:
    """Return the plan of what JSON held of an encoder's.

    Raises
    ------
    InvalidInput
        A part of it is not what an encoder's plan has, or its ring is not within 128 bits of security.
    """
    limbs, factors = what["limbs"], what["factors"]
    good = isinstance(limbs, list) and 1 <= len(limbs) <= MOST_BLOCKS and isinstance(factors, list)
    good = good and len(factors) == len(limbs)
    if not good or not all(isinstance(x, list) for x in (*limbs, *factors)):
        raise InvalidInput(f"he: the plan's limbs and factors are no lists of as many blocks, at most {MOST_BLOCKS}")
    rows = {"limbs": tuple(map(tuple, limbs)), "factors": tuple(map(tuple, factors)), "drift": tuple(what["drift"])}
    made = EncoderPlan(**what | _common(what) | rows)
    most = made.ring.levels + 1
    for k, row in enumerate(made.limbs):
        good = len(row) == 3 and all(is_count(x, 0 if i == 2 and not k else 1, most) for i, x in enumerate(row))
        _expect("limbs", row, good, f"three integers from 1 to {most}; the plan's sizes do not fit its slots")
    for pair in made.factors:
        good = len(pair) == 2 and all(is_number(x) and LEAST <= math.fabs(x) <= MOST for x in pair)
        _expect("factors", pair, good, "two finite numbers other than 0")
    _check_sizes(made)
    _expect("ring.first", made.ring.first, made.ring.first <= MOST_FIRST, f"at most {MOST_FIRST} for an encoder")
    _check_factor(made, "out_factor")
    good = len(made.drift) == 2 and all(is_number(x) and 2 <= x <= MOST_DRIFT for x in made.drift)
    _expect("drift", made.drift, good, f"two numbers from 2 to {MOST_DRIFT}")
    return made


def _common(what: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a plan that are not numbers: ring, layout, rotations, counts."""
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
    return {"ring": ring, "layout": layout, "rotations": tuple(rotations), "counts": found}


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
    _check_sizes(made)
    n, least, most = made.residual_limbs, 0 if made.classes else 1, made.ring.levels + 1
    good = is_count(n, least, most)
    _expect("residual_limbs", n, good, f"an integer from {least} to {most}; the plan's sizes do not fit its slots")
    _expect("p", made.p, isinstance(made.p, int) and made.p in POWERS, f"one of {', '.join(map(str, POWERS))}")
    for name in ("residual_factor", "out_factor"):
        _check_factor(made, name)


def _check_sizes(made: LayerPlan | EncoderPlan) -> None:
    layout = made.layout
    alone = made.classes and isinstance(made, LayerPlan)  # without a residual
    most = {
        "n": (made.n, 1, layout.queries),
        "d": (made.d, 1, layout.slots if alone else 2 * layout.groups * layout.heads),
        "heads": (made.heads, 1, layout.heads),
        "classes": (made.classes, 0, 2 * layout.groups),
        "spread": (made.spread, 1, layout.groups),
        "apart": (made.apart, 1, layout.slots // period_of(layout)),
    }
    for name, (n, least, largest) in most.items():
        good = is_count(n, least, largest)
        _expect(name, n, good, f"an integer from {least} to {largest}; the plan's sizes do not fit its slots")
    _expect("upload", made.upload, made.upload in ("full", "whole"), "'full' or 'whole'")
    _expect("centred", made.centred, isinstance(made.centred, bool), "true or false")
    epsilon = made.first_epsilon
    good = epsilon is None or (is_number(epsilon) and epsilon >= 0)
    _expect("first_epsilon", epsilon, good, "a number of at least 0")


def _check_factor(made: Any, name: str) -> None:
    x = getattr(made, name)
    _expect(name, x, is_number(x) and LEAST <= math.fabs(x) <= MOST, "a finite number other than 0")
