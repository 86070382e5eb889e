"""Numbers without rounding for claims: rationals and balls in NumPy's object arrays, compared exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..exact.precision import precision

__all__ = [
    "BITS", "Dual", "Q", "balls", "disjoint", "each", "exp", "meet", "orthogonal", "over", "precise", "rational",
    "rationals", "solve", "unequal", "zeros",
]  # fmt: skip

Exact = NDArray[Any]
Q = flint.fmpq
BITS = 256
"""Of a ball's middle: far below any error that a claim is about."""


@contextmanager
def precise(bits: int = BITS) -> Iterator[None]:
    """Compute balls with some bits, in a block or, as a decorator, in a function."""
    with precision(bits):
        yield


def each(function: Any, *arrays: Any) -> Exact:
    """Return a function's values element by element, as an object array."""
    return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), object)


def rational(x: Any) -> Exact:
    """Return floats or integers as rationals, exactly."""
    return each(lambda a: Q(*float(a).as_integer_ratio()), np.asarray(x))


def rationals(seed: int, *shape: int, over: int = 8, least: int = -8, most: int = 8) -> Exact:
    """Return random rationals from least/over to most/over, none of them 0.

    Parameters
    ----------
    seed : int
        Of the generator.
    *shape : int
        Of the array.
    over, least, most : int
        The denominator, and the range of the numerators.
    """
    chosen = [i for i in range(least, most + 1) if i]
    return each(lambda i: Q(int(i), over), np.random.default_rng(seed).choice(chosen, shape))


def zeros(*shape: int) -> Exact:
    """Return an array of the rational 0."""
    return np.full(shape, Q(0), object)


def balls(x: Any) -> Exact:
    """Return rationals, integers or floats as balls."""
    return each(flint.arb, np.asarray(x, object))


def exp(x: Any) -> Exact:
    """Return exponentials of balls."""
    return each(lambda a: a.exp(), x)


class Dual:
    """A number and its derivative by one variable, both exact."""

    def __init__(self, value: Any, slope: Any) -> None:
        self.value, self.slope = value, slope

    def __add__(self, other: Dual) -> Dual:
        return Dual(self.value + other.value, self.slope + other.slope)

    def __sub__(self, other: Dual) -> Dual:
        return self + Dual(-other.value, -other.slope)

    def __mul__(self, other: Dual) -> Dual:
        return Dual(self.value * other.value, self.value * other.slope + self.slope * other.value)

    def __truediv__(self, other: Dual) -> Dual:
        found = self.value / other.value
        return Dual(found, (self.slope - found * other.slope) / other.value)


def unequal(a: Any, b: Any) -> int:
    """Return how many elements of two arrays of one shape are not equal."""
    if np.shape(a) != np.shape(b):
        raise ValueError(f"unequal: got shapes {np.shape(a)} and {np.shape(b)}")
    return int(np.sum(each(lambda x, y: x != y, a, b).astype(bool)))


def disjoint(a: Any, b: Any) -> int:
    """Return how many elements of two arrays of one shape have balls that do not `meet`: they surely differ."""
    if np.shape(a) != np.shape(b):
        raise ValueError(f"disjoint: got shapes {np.shape(a)} and {np.shape(b)}")
    return int(np.sum(each(lambda x, y: not meet(x, y), a, b).astype(bool)))


def over(a: Any, b: Any) -> Any:
    """Return the ratio of two balls, 1 where they meet and half of their bits are known: a bound that is attained."""
    known = min(flint.arb(a).rel_accuracy_bits(), flint.arb(b).rel_accuracy_bits()) > BITS // 2
    return Q(1) if meet(a, b) and known else flint.arb(a) / flint.arb(b)


def meet(a: Any, b: Any) -> bool:
    """Return whether two balls are finite and have a common point; one that is not a number meets none."""
    x, y = flint.arb(a), flint.arb(b)
    return bool(x.is_finite() and y.is_finite() and x.overlaps(y))


def solve(a: Exact, b: Exact) -> Exact:
    """Return the x with a x = b, of rationals or of floats."""
    if a.dtype != object:
        return np.asarray(np.linalg.solve(a, b))
    columns = b.reshape(len(b), -1)
    found = flint.fmpq_mat(a.tolist()).solve(flint.fmpq_mat(columns.tolist()))
    return np.array(found.tolist(), object).reshape(b.shape)


def orthogonal(seed: int, n: int) -> Exact:
    """Return a rational orthogonal matrix, (I - S)(I + S)⁻¹ of a random S = -Sᵀ."""
    upper = np.triu(rationals(seed, n, n, over=3, least=-3, most=3), 1)
    skew, one = upper - upper.T, rational(np.eye(n))
    return solve((one + skew).T, (one - skew).T).T
