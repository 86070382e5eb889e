"""Values that no precision decides: exact ties and exact zeros, recognised and not looped on."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_float64
from ..dtypes import Format
from ..errors import UnsupportedProblem
from ..norms import NORMS
from ..positions import partners, places, slope_of, tables
from ..problem import Problem
from ..variants import variant_of
from .field import Field
from .heads import Head, heads, plain_scores
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
    scale, width = _scale(problem)
    for one in heads(problem):
        at = (one.batch, one.head, one.rows)
        for i in np.nonzero(~state.decided["lse"][at])[0]:
            place = (one.batch, one.head, one.rows.start + int(i))
            seen = np.nonzero(one.allowed[i])[0]
            j = int(seen[int(np.argmax(plain_scores(one, int(i))[seen]))])
            dot, added, square = _score(one, int(i), j)
            root = _root(square * width)
            if root is None and dot != 0:
                continue  # a surd is no boundary
            s = dot * scale / (root or 1) + added
            form = state.form("lse")
            if len(seen) == 1 and one.sink is None:
                state.settle("lse", place, form.round(s))
            elif boundaries.get(("lse", place)) == s:
                state.settle("lse", place, form.round(s + Fraction(1, 2**FAR)))


def _score(one: Head, i: int, j: int) -> tuple[Fraction, Fraction, Fraction]:
    """Return the exact product of a query and a key, turned by their positions, and what is added to the score.

    The last number is the square of what the product is to be divided by: of norms, else 1.
    """
    p, square = one.problem, Fraction(1)
    q, k = ([Fraction(x) for x in row.tolist()] for row in (one.q[i], one.k[j]))
    for name, x in zip(NORMS, (q, k), strict=True):
        if (w := getattr(p, name)) is not None:
            square *= sum((a * a for a in x), Fraction(0)) / len(x) + Fraction(p.norm_eps or 0)
            x[:] = [a * Fraction(b) for a, b in zip(x, to_float64(w).tolist(), strict=True)]
    at = places(p, one.batch, one.rows, one.keys) if p.rotary or p.alibi_slopes is not None else None
    if p.rotary is not None and at is not None:
        partner = partners(p).tolist()
        q, k = (_turned(x, partner, *tables(p, w[n : n + 1])) for x, w, n in ((q, at[0], i), (k, at[1], j)))
    added = Fraction(0 if one.bias is None else float(one.bias[i, j]))
    if p.alibi_slopes is not None and at is not None:
        added -= Fraction(slope_of(p, one.batch, one.head)) * abs(int(at[0][i]) - int(at[1][j]))
    return sum((a * b for a, b in zip(q, k, strict=True)), Fraction(0)), added, square


def _turned(x: list[Fraction], partner: list[int], cos: NDArray[Any], sin: NDArray[Any]) -> list[Fraction]:
    rows = zip(x, cos[0].tolist(), partner, sin[0].tolist(), strict=True)
    return [a * Fraction(c) + x[other] * Fraction(s) for a, c, other, s in rows]


def _scale(problem: Problem) -> tuple[Fraction, int]:
    """Return the scale as a / sqrt(n): a, and n."""
    if problem.scale is not None:
        return Fraction(problem.scale), 1
    one = variant_of(problem.variant).default_scale == "one" or problem.d_k == 0
    return Fraction(1), 1 if one else problem.d_k


def _root(x: Fraction) -> Fraction | None:
    """Return the square root of a fraction where it is one."""
    above, below = isqrt(x.numerator), isqrt(x.denominator)
    return Fraction(above, below) if above**2 == x.numerator and below**2 == x.denominator else None


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
