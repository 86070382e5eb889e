"""Whole numbers times one unit: what floats are, and sums, products and means of them. Nothing is rounded."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedProblem
from .matrix import Reflected

__all__ = ["Whole", "WholeMatrix"]

Array = NDArray[Any]


class Whole:
    """The arithmetic of matrices of Python's integers, each with a unit; it has no roots, exponentials or the like."""

    name = "whole"

    def array(self, x: Array) -> WholeMatrix:
        """Take in a float64 array, exactly."""
        part, exponent = np.frexp(np.asarray(x, np.float64))
        exponent = np.where(part == 0, 0, exponent - 53)
        least = int(exponent.min(initial=0))
        whole = np.ldexp(part, 53).astype(np.int64).astype(object) << (exponent - least).astype(object)
        return WholeMatrix(whole, Fraction(2) ** least)

    def number(self, x: Any) -> WholeMatrix:
        """Take in an int, float or Fraction."""
        return WholeMatrix(np.ones((1, 1), object), Fraction(x))

    def rsqrt(self, n: int) -> WholeMatrix | None:
        """Return 1/sqrt(n), or None where that is no fraction: what takes it then is refused."""
        return self.number(Fraction(1, isqrt(n))) if isqrt(n) ** 2 == n else None


class WholeMatrix(Reflected):
    """A matrix over :class:`Whole`: integers, and the fraction of 1 that they count."""

    __slots__ = ("a", "unit")

    def __init__(self, a: Array, unit: Fraction) -> None:
        self.a, self.unit = a, unit

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedProblem(f"{name}: whole numbers do not have it")

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, m)."""
        return tuple(self.a.shape)

    @property
    def T(self) -> WholeMatrix:
        """The transpose."""
        return WholeMatrix(self.a.T, self.unit)

    def columns(self, at: Array) -> WholeMatrix:
        """Return the columns of those numbers."""
        return WholeMatrix(self.a[:, at], self.unit)

    def zeros(self) -> WholeMatrix:
        """Return zeros of the same shape."""
        return self * 0

    def __matmul__(self, o: WholeMatrix) -> WholeMatrix:
        return WholeMatrix(self.a @ o.a, self.unit * o.unit)

    def __mul__(self, o: Any) -> WholeMatrix:
        o = _taken(o)
        return WholeMatrix(self.a * o.a, self.unit * o.unit)

    def __truediv__(self, o: Any) -> WholeMatrix:
        o = _taken(o)
        if not o.a.all():
            raise UnsupportedProblem("a division by 0: whole numbers have no quotient")
        every = lcm(*map(int, o.a.ravel()))
        return WholeMatrix(self.a * (every // o.a), self.unit / o.unit / every)

    def __add__(self, o: Any) -> WholeMatrix:
        o = _taken(o)
        below = lcm(self.unit.denominator, o.unit.denominator)
        a, b = (x.a * int(x.unit * below) for x in (self, o))
        return WholeMatrix(a + b, Fraction(1, below))

    def __sub__(self, o: Any) -> WholeMatrix:
        return self + -_taken(o)

    def __neg__(self) -> WholeMatrix:
        return WholeMatrix(-self.a, self.unit)

    def relu(self) -> WholeMatrix:
        """Return numbers below 0 as 0."""
        return WholeMatrix(np.where((self.a > 0) == (self.unit > 0), self.a, 0), self.unit)


def _taken(o: Any) -> WholeMatrix:
    if o is None:
        raise UnsupportedProblem("rsqrt: whole numbers do not have it")
    return o if isinstance(o, WholeMatrix) else Whole().number(o)
