"""Values that no precision decides: exact ties and exact zeros, recognised and not looped on."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..dtypes import Format
from ..errors import UnsupportedProblem
from ..problem import Problem
from ..variants import variant_of
from .enclosure import Enclosure
from .field import Field
from .slabs import slabs

__all__ = ["decide_by_sign", "exact_ties", "lone_key_lse"]

Values = dict[str, NDArray[np.float64]]
Decided = dict[str, NDArray[np.bool_]]


def lone_key_lse(problem: Problem, form: Format, values: Values, decided: Decided) -> None:
    """Round the lse of rows that see one key and no sink: it is the score itself, a rational number or a surd.

    With two keys or more it is transcendental (Lindemann-Weierstrass) and no tie.
    """
    if "lse" not in decided or decided["lse"].all() or problem.softcap is not None:
        return
    for slab in slabs(problem):
        at = (slab.batch, slab.head, slab.rows)
        for i in np.nonzero(~decided["lse"][at] & (slab.allowed.sum(1) == 1) & (slab.sink is None))[0]:
            j = int(np.nonzero(slab.allowed[i])[0][0])
            dot = sum(
                (Fraction(a) * Fraction(b) for a, b in zip(slab.q[i].tolist(), slab.k[j].tolist(), strict=True)),
                Fraction(0),
            )
            scale = _rational_scale(problem)
            if scale is None and dot != 0:
                continue  # a surd is no tie
            s = dot * (scale or 0) + Fraction(0 if slab.bias is None else float(slab.bias[i, j]))
            values["lse"][at][i], decided["lse"][at][i] = form.round(s), True


def _rational_scale(problem: Problem) -> Fraction | None:
    if problem.scale is not None:
        return Fraction(problem.scale)
    if variant_of(problem.variant).default_scale == "one":
        return Fraction(1)
    root = int(np.sqrt(problem.d_k) + 0.5)
    return Fraction(1, root) if root * root == problem.d_k else None


def exact_ties(
    problem: Problem, form: Format, dout: Any, enclosures: dict[str, Enclosure], values: Values, decided: Decided
) -> None:
    """Decide in a prime field which undecided elements sit exactly on their rounding boundary, and round those.

    An element whose definition has no image in the field (a maximum, say) stays undecided.
    """
    from .driver import _undecided_rows, run

    undecided = {n: d for n, d in decided.items() if n != "lse"}
    if all(d.all() for d in undecided.values()):
        return
    try:
        f = Field(problem.d_k)
        images = run(problem, f, dout, _undecided_rows(problem, undecided))
    except UnsupportedProblem:
        return
    except ZeroDivisionError:
        _no_number(problem, values, decided)
        return
    for name, d in undecided.items():
        for index in zip(*np.nonzero(~d), strict=True):
            boundary = enclosures[name].boundary(index, form)
            if boundary is None or isinstance(images[name][index], float):
                continue
            if images[name][index] % f.p == f.number(boundary).image[0, 0]:
                values[name][index], d[index] = form.round(boundary), True


def decide_by_sign(
    raw: dict[str, NDArray[Any]],
    forms: dict[str, Format],
    form: Format,
    enclosures: dict[str, Enclosure],
    values: Values,
    decided: Decided,
) -> None:
    """Round undecided elements by the side of their rounding boundary that the ball itself lies on.

    A ball of many bits decides what its float64 enclosure cannot hold: a tie broken by exp(-100000), say.
    """
    for name, d in decided.items():
        for index in zip(*np.nonzero(~d), strict=True):
            to = forms.get(name, form)
            ball, boundary = raw[name][index], enclosures[name].boundary(index, to)
            if boundary is None or isinstance(ball, float):
                continue
            if boundary == 0 and not enclosures[name].rounds_to_zero(index, to):
                continue
            gap = ball - flint.arb(flint.fmpq(boundary.numerator, boundary.denominator))
            if gap > 0 or gap < 0:
                side = 1 if gap > 0 else -1
                values[name][index], d[index] = to.beside(boundary, side), True


def _no_number(problem: Problem, values: Values, decided: Decided) -> None:
    """Give NaN to the rows whose denominator is exactly 0: only they have an undecided, unbounded output."""
    lost = ~decided["out"] & np.isnan(values["out"])
    values["out"][lost], decided["out"][lost] = np.nan, True
