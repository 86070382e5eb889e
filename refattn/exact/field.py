"""The exactness test: a definition run in a prime field decides whether a value is exactly zero.

Scores are elements A·√D + B of Q(√D), kept exactly. An exponential exp(A·√D + B) becomes x^A · y^B, where x and y
generate the subgroup of prime order q of the field of p = 2q + 1 elements: exponents live modulo the prime q, so every
rational has its place there, and exp(s)·exp(t) = exp(s + t) holds. For distinct algebraic scores the exponentials are
linearly independent over the algebraic numbers (Lindemann-Weierstrass), so a value that is zero is zero as a formal
expression and its image is zero; an image that is not zero proves that the value is not. A zero image of a nonzero
expression would need x and y to be roots of it by accident: their chance is about its degree over 2^505.

What has no such form (tanh, log of a sum) becomes a fixed pseudo-random element chosen by its argument: a zero image
then still means that the expression vanishes identically, but one that is not zero proves nothing.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import prod
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedProblem
from .matrix import Reflected

__all__ = ["Field", "FieldMatrix"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Surd = tuple[Array, Array]  # A and B of A·√D + B, as rationals


@lru_cache(maxsize=1)
def _prime() -> int:
    # p = -1 modulo 8 and modulo every odd prime up to 257: by reciprocity each of them is a square modulo p
    small = [n for n in range(3, 258) if all(n % i for i in range(2, int(n**0.5) + 1))]
    return 8 * prod(small) * (2**160 + 3016) - 1


@lru_cache(maxsize=2**12)
def _inverse(n: int, modulus: int) -> int:
    return pow(n, -1, modulus)


def _square_part(n: int) -> tuple[int, int]:
    """Return (s, D) with n = s**2 * D and D free of squares."""
    s, d, i = 1, n, 2
    while i * i <= d:
        while d % (i * i) == 0:
            d //= i * i
            s *= i
        i += 1
    return s, d


class Field:
    """The field, with √D in it, where D is the square-free part of `width` (scores carry 1/√width)."""

    def __init__(self, width: int) -> None:
        self.p = _prime()
        self.q = (self.p - 1) // 2
        self.square, self.d = _square_part(width)
        if pow(self.d, self.q, self.p) != 1:
            raise UnsupportedProblem(
                f"dim: the exactness test knows widths whose prime factors are at most 257, got {width}"
            )
        self.root = pow(self.d, (self.p + 1) // 4, self.p)
        self.x, self.y = self._random("x"), self._random("y")
        self.signs: list[Mask] = []  # what relus were told, in order
        self._powers: dict[tuple[Any, Any], int] = {}  # equal scores are many where they are asked for

    def _random(self, label: str) -> int:
        digest = b"".join(hashlib.sha512(f"{label} {i}".encode()).digest() for i in range(2))
        return pow(int.from_bytes(digest, "big") % self.p, 2, self.p)  # a square: of order q

    def matrix(self, a: Array, b: Array) -> FieldMatrix:
        """Take in the exact numbers a·√D + b."""
        image = _objects(self._image(u, v) for u, v in zip(a.ravel(), b.ravel(), strict=True))
        return FieldMatrix(self, image.reshape(a.shape), (a, b))

    def array(self, x: Array) -> FieldMatrix:
        """Take in a float64 array, exactly."""
        b = _objects(_rational(y) for y in np.asarray(x, np.float64).ravel().tolist()).reshape(x.shape)
        return self.matrix(b * flint.fmpq(0), b)

    def number(self, x: Any) -> FieldMatrix:
        """Take in an int, float or Fraction."""
        return self.matrix(*(np.array([[v]], object) for v in (flint.fmpq(0), _rational(x))))

    def rsqrt(self, n: int) -> FieldMatrix:
        """Return 1/sqrt(n), for the n that the field was made for."""
        s, d = _square_part(n)
        a, b = (flint.fmpq(0), flint.fmpq(1, s)) if d == 1 else (flint.fmpq(1, s * d), flint.fmpq(0))
        return self.matrix(*(np.array([[v]], object) for v in (a, b)))

    def _image(self, a: Any, b: Any) -> int:
        return (self._residue(a, self.p) * self.root + self._residue(b, self.p)) % self.p

    @staticmethod
    def _residue(x: Any, modulus: int) -> int:
        return int(x.p) * _inverse(int(x.q), modulus) % modulus

    def exponential(self, a: Any, b: Any) -> int:
        """Return x^a · y^b."""
        if (a, b) not in self._powers:
            left = pow(self.x, self._residue(a, self.q), self.p) if a else 1
            self._powers[a, b] = left * pow(self.y, self._residue(b, self.q), self.p) % self.p
        return self._powers[a, b]

    def oracle(self, label: str, image: int) -> int:
        """Return the fixed pseudo-random stand-in for a function's value."""
        return self._random(f"{label} {image}")


class FieldMatrix(Reflected):
    """A matrix over :class:`Field`: the images, and the exact numbers while the value is still in Q(√D)."""

    __slots__ = ("exact", "f", "image")

    def __init__(self, f: Field, image: Array, exact: Surd | None = None) -> None:
        self.f, self.image, self.exact = f, image, exact

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, m)."""
        return tuple(self.image.shape)

    @property
    def T(self) -> FieldMatrix:
        """The transpose."""
        return FieldMatrix(self.f, self.image.T, self.exact and (self.exact[0].T, self.exact[1].T))

    def columns(self, at: Array) -> FieldMatrix:
        """Return the columns of those numbers."""
        return FieldMatrix(self.f, self.image[:, at], self.exact and (self.exact[0][:, at], self.exact[1][:, at]))

    def _combine(self, o: FieldMatrix, image: Array, exact: Any) -> FieldMatrix:
        both = self.exact is not None and o.exact is not None
        return FieldMatrix(self.f, image % self.f.p, exact(*(self.exact or ()), *(o.exact or ())) if both else None)

    def _product(self, o: FieldMatrix, multiply: Any) -> FieldMatrix:
        def exact(a: Array, b: Array, c: Array, e: Array) -> Surd:
            if not (a.any() or c.any()):  # most numbers are rational
                whole = multiply(b, e)
                return np.full(whole.shape, flint.fmpq(0)), whole
            return multiply(a, e) + multiply(b, c), multiply(b, e) + multiply(a, c) * self.f.d

        return self._combine(o, multiply(self.image, o.image), exact)

    def __matmul__(self, o: FieldMatrix) -> FieldMatrix:
        return self._product(o, np.matmul)

    def __mul__(self, o: Any) -> FieldMatrix:
        o = self._taken(o)
        return self._product(o, np.multiply)

    def __add__(self, o: Any) -> FieldMatrix:
        o = self._taken(o)
        return self._combine(o, self.image + o.image, lambda a, b, c, e: (a + c, b + e))

    def __sub__(self, o: Any) -> FieldMatrix:
        o = self._taken(o)
        return self._combine(o, self.image - o.image, lambda a, b, c, e: (a - c, b - e))

    def __neg__(self) -> FieldMatrix:
        return FieldMatrix(self.f, -self.image % self.f.p, self.exact and (-self.exact[0], -self.exact[1]))

    def __truediv__(self, o: Any) -> FieldMatrix:
        o = self._taken(o)
        if (o.image == 0).any():
            raise ZeroDivisionError
        inverse = self._each(o.image, lambda z: pow(int(z), -1, self.f.p))
        exact = self.exact and o.exact and _divide(self.exact, o.exact, self.f.d)
        return FieldMatrix(self.f, self.image * inverse % self.f.p, exact)

    def _each(self, a: Array, function: Any) -> Array:
        return _objects(function(z) for z in a.ravel()).reshape(a.shape)

    def where(self, mask: Mask | None) -> FieldMatrix:
        """Keep the elements where `mask` holds; the others become 0."""
        if mask is None:
            return self
        zero = flint.fmpq(0)
        exact = self.exact and (np.where(mask, self.exact[0], zero), np.where(mask, self.exact[1], zero))
        return FieldMatrix(self.f, np.where(mask, self.image, 0), exact)

    def _taken(self, o: Any) -> FieldMatrix:
        return o if isinstance(o, FieldMatrix) else self.f.number(o)

    def zeros(self) -> FieldMatrix:
        """Return zeros of the same shape."""
        return self.where(np.zeros(self.shape, bool))

    def number(self, x: Any) -> FieldMatrix:
        """Take in a number."""
        return self.f.number(x)

    def positive(self) -> Mask:
        """Tell where an element is above 0; it must be in Q(√D)."""
        if self.exact is None:
            raise UnsupportedProblem("exactness: the sign of this number is not known in the field")
        pairs = zip(self.exact[0].ravel(), self.exact[1].ravel(), strict=True)
        return np.array([_positive(a, b, self.f.d) for a, b in pairs], bool).reshape(self.shape)

    def gated(self, g: FieldMatrix) -> FieldMatrix:
        """Return `g` where this is above 0, and 0 elsewhere; the field notes which."""
        self.f.signs.append(self.positive())
        return g.where(self.f.signs[-1])

    def exp(self, where: Mask | None = None) -> FieldMatrix:
        """Exponential: x^A · y^B, or the stand-in of a transcendental argument."""
        where = np.ones(self.shape, bool) if where is None else where
        image = np.zeros(self.shape, object)
        for i, j in zip(*np.nonzero(where), strict=True):
            image[i, j] = (
                self.f.oracle("exp", self.image[i, j])
                if self.exact is None
                else self.f.exponential(self.exact[0][i, j], self.exact[1][i, j])
            )
        return FieldMatrix(self.f, image)

    def sigmoid(self, where: Mask | None = None) -> FieldMatrix:
        """1 / (1 + exp(-x))."""
        one = self.f.number(1)
        return (one / (one + (-self).exp())).where(where)

    def tanh(self) -> FieldMatrix:
        """Stand-in of the hyperbolic tangent, odd as it is."""

        def stand_in(z: int) -> int:
            low = min(z, self.f.p - z)  # tanh(-x) = -tanh(x), tanh(0) = 0
            t = self.f.oracle("tanh", low) if low else 0
            return t if low == z else -t % self.f.p

        return FieldMatrix(self.f, self._each(self.image, stand_in))

    def log(self) -> FieldMatrix:
        """Stand-in of the logarithm."""
        return FieldMatrix(self.f, self._each(self.image, lambda z: 0 if z == 1 else self.f.oracle("log", z)))

    def rsqrt(self) -> FieldMatrix:
        """Stand-in of 1 / sqrt(x)."""
        return FieldMatrix(self.f, self._each(self.image, lambda z: self.f.oracle("rsqrt", z)))

    def relu(self) -> FieldMatrix:
        """max(x, 0) of rational numbers."""
        return self.where(self.positive())

    def power(self, p: int, where: Mask | None = None) -> FieldMatrix:
        """x**p."""
        return FieldMatrix(self.f, self._each(self.image, lambda z: pow(int(z), p, self.f.p))).where(where)

    def sum(self) -> FieldMatrix:
        """Sum of each row, (n, 1)."""
        exact = self.exact and (self.exact[0].sum(1, keepdims=True), self.exact[1].sum(1, keepdims=True))
        return FieldMatrix(self.f, self.image.sum(1, keepdims=True) % self.f.p, exact)

    def shift(self, where: Mask, also: Any = None) -> FieldMatrix:
        """Return 0 for every row: no number is too large here."""
        return self.f.array(np.zeros((self.shape[0], 1)))

    def absmax(self, where: Mask) -> FieldMatrix:
        """Refuse: a field has no order."""
        raise UnsupportedProblem("exactness: the largest score is not known in the field")

    def is_zero(self) -> Mask:
        """Tell where the image is zero."""
        return np.asarray(self.image == 0).astype(bool)


def _positive(a: Any, b: Any, d: int) -> bool:
    """Tell whether a·√d + b is above 0, by squares."""
    if a == 0 or b == 0 or (a > 0) == (b > 0):
        return bool(a + b > 0)
    larger = a if a * a * d > b * b else b  # never equal: d is no square, or 1 and then a is 0
    return bool(larger > 0)


def _divide(x: Surd, y: Surd, d: int) -> Surd:
    a, b = x
    c, e = y
    norm = e * e - c * c * d
    return (b * -c + a * e) / norm, (b * e - a * c * d) / norm


def _rational(x: Any) -> Any:
    n, m = x.as_integer_ratio()
    return flint.fmpq(n, m)


def _objects(values: Any) -> Array:
    items = list(values)
    out = np.empty(len(items), object)
    out[:] = items
    return out
