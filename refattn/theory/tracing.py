"""A rounding model as an arithmetic: every rounding's first-order effect, and an enclosure of what may come out.

Each result is off by a factor 1 + delta of its own, delta at most u in size. A number carries its exact value, the
derivatives by all deltas before it, and a ball that holds whatever roundings may make of it. The sum of the
derivatives' sizes is the largest first-order error over u, attained where each delta has the sign of its derivative.
"""

from __future__ import annotations

import itertools
from typing import Any

import flint

from .claim import same
from .fields import Q

__all__ = ["Traced", "U"]

U = Q(1, 2**24)
"""The unit roundoff of float32."""
DOUBLE = Q(1, 2**52)
"""What an exponential or a logarithm by float64 is off, before it is rounded to float32."""
_names = itertools.count()


class Traced:
    """A number of a float32 program.

    Parameters
    ----------
    value : number or ball
        Exact.
    by : dict, optional
        Derivatives by roundings.
    may : ball, optional
        What the program may hold; the value itself for an input.
    """

    def __init__(self, value: Any, by: dict[int, Any] | None = None, may: Any = None) -> None:
        self.value = flint.arb(value)
        self.by: dict[int, Any] = by or {}
        self.may = self.value if may is None else may

    @property
    def error(self) -> Any:
        """The largest first-order error over u."""
        return sum((abs(x) for x in self.by.values()), start=flint.arb(0))

    def _rounded(self, value: Any, may: Any, parts: Any, exact: bool = False, extra: Any = 0) -> Traced:
        by: dict[int, Any] = {}
        for number, slope in parts:
            for name, x in number.by.items():
                by[name] = by.get(name, flint.arb(0)) + slope * x
        if not exact:
            by[next(_names)] = value
            may = may * flint.arb(1, U + extra)
        return Traced(value, by, may)

    def __add__(self, other: Traced) -> Traced:
        parts = ((self, 1), (other, 1))
        return self._rounded(self.value + other.value, self.may + other.may, parts)

    def __sub__(self, other: Traced) -> Traced:
        parts = ((self, 1), (other, -1))
        return self._rounded(self.value - other.value, self.may - other.may, parts, self.value == other.value)

    def __mul__(self, other: Traced) -> Traced:
        parts = ((self, other.value), (other, self.value))
        return self._rounded(self.value * other.value, self.may * other.may, parts, other.value == 1)

    def __truediv__(self, other: Traced) -> Traced:
        found = self.value / other.value
        parts = ((self, 1 / other.value), (other, -found / other.value))
        return self._rounded(found, self.may / other.may, parts)

    def exp(self) -> Traced:
        """Return the exponential; that of 0 is exact."""
        found = self.value.exp()
        return self._rounded(found, self.may.exp(), ((self, found),), self.value == 0, DOUBLE)

    def log(self) -> Traced:
        """Return the logarithm; that of 1 is exact."""
        parts = ((self, 1 / self.value),)
        return self._rounded(self.value.log(), self.may.log(), parts, self.value == 1, DOUBLE)


def modelled() -> list[int]:
    """Return for some operations whether their errors and what they may hold are the model's, 0 where they are."""
    product = Traced(3) * Traced(5)  # 15(1 + a)
    difference = product - product * Traced(2)  # 15(1 + a) - 30(1 + a)(1 + b), times 1 + c
    found: list[int] = [same(difference.error.unique_fmpz(), 15 + 30 + 15)]
    grown = Traced(1).exp()
    for number, most in ((product, U), (grown, U + DOUBLE)):
        ends = (number.value * (1 + sign * flint.arb(most)) for sign in (-1, 1))
        found += [same(number.may.contains(end), True) for end in ends]
    return found
