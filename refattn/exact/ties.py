"""Values that no precision decides: exact ties and exact zeros, recognised and not looped on."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Format
from ..errors import UnsupportedProblem
from ..problem import Problem
from ..variants import variant_of
from .field import Field
from .heads import heads
from .run import Work
from .state import State

__all__ = ["decide_by_ends", "exact_lse", "exact_ties"]


FAR = 3000
Boundaries = dict[tuple[str, tuple[int, ...]], Fraction]


def exact_lse(problem: Problem, state: State, boundaries: Boundaries) -> None:
    """Round lse where a key's score is known to lie on its rounding boundary.

    With one key and no sink, lse is the score itself: a rational number, or a surd and then no tie. With more it is
    transcendental (Lindemann-Weierstrass) and above every score, so a boundary that is a score lies below it.
    """
    if "lse" not in state.decided or problem.softcap is not None:
        return
    scale = _rational_scale(problem)
    for one in heads(problem):
        at = (one.batch, one.head, one.rows)
        for i in np.nonzero(~state.decided["lse"][at])[0]:
            place = (one.batch, one.head, one.rows.start + int(i))
            seen = np.nonzero(one.allowed[i])[0]
            with np.errstate(all="ignore"):
                plain = one.q[i] @ one.k[seen].T * float(scale if scale is not None else problem.d_k**-0.5)
            if one.bias is not None:
                plain = plain + one.bias[i, seen]
            j = int(seen[int(np.argmax(plain))])
            pairs = zip(one.q[i].tolist(), one.k[j].tolist(), strict=True)
            dot = sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
            if scale is None and dot != 0:
                continue  # a surd is no boundary
            s = dot * (scale or 0) + Fraction(0 if one.bias is None else float(one.bias[i, j]))
            form = state.form("lse")
            if len(seen) == 1 and one.sink is None:
                state.settle("lse", place, form.round(s))
            elif boundaries.get(("lse", place)) == s:
                state.settle("lse", place, form.round(s + Fraction(1, 2**FAR)))


def _rational_scale(problem: Problem) -> Fraction | None:
    if problem.scale is not None:
        return Fraction(problem.scale)
    if variant_of(problem.variant).default_scale == "one" or problem.d_k == 0:
        return Fraction(1)
    root = int(np.sqrt(problem.d_k) + 0.5)
    return Fraction(1, root) if root * root == problem.d_k else None


def decide_by_ends(raw: dict[str, NDArray[Any]], state: State) -> Boundaries:
    """Round undecided elements by the exact ends of their balls, which hold what a float64 enclosure cannot.

    Returns
    -------
    dict
        For the elements that stay open, the one rounding boundary (or zero) inside their ball, where there is just one.
    """
    boundaries: Boundaries = {}
    for name, index in state.open():
        ball, form = raw[name][index], state.form(name)
        if isinstance(ball, float | int) or not ball.is_finite():
            continue
        low, high = _fraction(ball.lower()), _fraction(ball.upper())
        a, b = form.round(low), form.round(high)
        if (a == b and np.signbit(a) == np.signbit(b)) or (np.isnan(a) and np.isnan(b)):
            state.settle(name, index, a)
            continue
        boundary = _boundary(low, high, form)
        if boundary is not None:
            boundaries[name, index] = boundary
    return boundaries


def _fraction(x: Any) -> Fraction:
    """Return an exact ball as a fraction; far outside every format's range, one of its sign that is there too."""
    mantissa, exponent = (int(y) for y in x.man_exp())
    if mantissa and abs(mantissa.bit_length() + exponent) > FAR:
        edge = Fraction(2) ** (FAR if mantissa.bit_length() + exponent > 0 else -FAR)
        return edge if mantissa > 0 else -edge
    return Fraction(mantissa) * Fraction(2) ** exponent


def _boundary(low: Fraction, high: Fraction, form: Format) -> Fraction | None:
    if low <= 0 <= high:
        return Fraction(0)
    near, far = (form.round(pick(low, high, key=abs)) for pick in (min, max))
    if not np.isfinite(near):
        return None
    boundary = form.neighbours(near)[1 if low > 0 else 0]
    # the only one, if the far end rounds to the next number (past the largest there is no next)
    one = not np.isfinite(far) or form.neighbours(far)[0 if low > 0 else 1] == boundary
    return boundary if one else None


def exact_ties(
    work: Work,
    state: State,
    need: NDArray[np.bool_],
    boundaries: Boundaries,
) -> None:
    """Decide in a prime field which undecided elements sit exactly on their rounding boundary, and round those.

    An element whose definition has no image in the field (a maximum, say) stays undecided.
    """
    places = state.open("lse")
    if not places:
        return
    try:
        f = Field(max(work.p.d_k, 1))
        images = work.run(f, need)
    except UnsupportedProblem:
        return
    except ZeroDivisionError:
        # a denominator is exactly 0: the rows whose output is not even bounded are those
        for name, index in places:
            if name == "out" and np.isnan(state.values["out"][index]):
                state.settle(name, index, np.nan)
        return
    for name, index in places:
        boundary, image = boundaries.get((name, index)), images[name][index]
        if boundary is not None and not isinstance(image, float) and image % f.p == f.number(boundary).image[0, 0]:
            state.settle(name, index, state.form(name).round(boundary))
