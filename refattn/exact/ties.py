"""Values that no precision decides: exact ties and exact zeros, recognised and not looped on."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedProblem
from ..problem import Problem
from ..variants import variant_of
from .field import Field
from .run import run
from .slabs import slabs
from .state import State

__all__ = ["decide_by_sign", "exact_ties", "lone_key_lse"]


def lone_key_lse(problem: Problem, state: State) -> None:
    """Round the lse of rows that see one key and no sink: it is the score itself, a rational number or a surd.

    With two keys or more it is transcendental (Lindemann-Weierstrass) and no tie.
    """
    if "lse" not in state.decided or problem.softcap is not None:
        return
    for slab in slabs(problem):
        at = (slab.batch, slab.head, slab.rows)
        alone = ~state.decided["lse"][at] & (slab.allowed.sum(1) == 1) & (slab.sink is None)
        for i in np.nonzero(alone)[0]:
            j = int(np.nonzero(slab.allowed[i])[0][0])
            pairs = zip(slab.q[i].tolist(), slab.k[j].tolist(), strict=True)
            dot = sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
            scale = _rational_scale(problem)
            if scale is None and dot != 0:
                continue  # a surd is no tie
            s = dot * (scale or 0) + Fraction(0 if slab.bias is None else float(slab.bias[i, j]))
            state.settle("lse", (slab.batch, slab.head, slab.rows.start + i), state.form("lse").round(s))


def _rational_scale(problem: Problem) -> Fraction | None:
    if problem.scale is not None:
        return Fraction(problem.scale)
    if variant_of(problem.variant).default_scale == "one":
        return Fraction(1)
    root = int(np.sqrt(problem.d_k) + 0.5)
    return Fraction(1, root) if root * root == problem.d_k else None


def exact_ties(problem: Problem, dout: Any, state: State, need: NDArray[np.bool_]) -> None:
    """Decide in a prime field which undecided elements sit exactly on their rounding boundary, and round those.

    An element whose definition has no image in the field (a maximum, say) stays undecided.
    """
    places = state.open("lse")
    if not places:
        return
    try:
        f = Field(problem.d_k)
        images = run(problem, f, dout, need)
    except UnsupportedProblem:
        return
    except ZeroDivisionError:
        # a denominator is exactly 0: the rows whose output is not even bounded are those
        for name, index in places:
            if name == "out" and np.isnan(state.values["out"][index]):
                state.settle(name, index, np.nan)
        return
    for name, index in places:
        boundary = state.enclosures[name].boundary(index, state.form(name))
        image = images[name][index]
        if boundary is None or isinstance(image, float):
            continue
        if image % f.p == f.number(boundary).image[0, 0]:
            state.settle(name, index, state.form(name).round(boundary))


def decide_by_sign(raw: dict[str, NDArray[Any]], state: State) -> None:
    """Round undecided elements by the side of their rounding boundary that the ball itself lies on.

    A ball of many bits decides what its float64 enclosure cannot hold: a tie broken by exp(-100000), say.
    """
    for name, index in state.open():
        form, e = state.form(name), state.enclosures[name]
        ball, boundary = raw[name][index], e.boundary(index, form)
        if boundary is None or isinstance(ball, float | int):
            continue
        if boundary == 0 and not e.rounds_to_zero(index, form):
            continue
        gap = ball - flint.arb(flint.fmpq(boundary.numerator, boundary.denominator))
        if gap > 0 or gap < 0:
            state.settle(name, index, form.beside(boundary, 1 if gap > 0 else -1))
