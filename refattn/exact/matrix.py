"""Matrices whose elements belong to one arithmetic: what a definition is written over."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedProblem

__all__ = ["Arithmetic", "Matrix", "Reflected", "UnsureSign"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]


class UnsureSign(UnsupportedProblem, ArithmeticError):
    """A definition asks for a sign that numbers of this precision do not have; more bits may have it."""


class Arithmetic(Protocol):
    """A kind of number: how to take one in exactly, and the few functions that definitions use, over arrays of it."""

    name: str

    def array(self, x: Array) -> Array:
        """Take in a float64 array, exactly."""

    def number(self, x: Any) -> Any:
        """Take in an int, float or Fraction, exactly."""

    def rsqrt(self, n: int) -> Any:
        """Return 1/sqrt(n)."""

    def matmul(self, a: Array, b: Array) -> Array:
        """Return the matrix product."""

    def apply(self, function: str, a: Array) -> Array:
        """Apply exp, log, tanh, sigmoid, rsqrt or relu to every element."""

    def shift(self, a: Array, where: Mask) -> Array:
        """Return for each row an exact number near its largest element where `where` holds (0 if none does), (n, 1)."""

    def absmax(self, a: Array, where: Mask) -> Array:
        """Return each row's largest absolute value where `where` holds (0 if none does), (n, 1)."""


class Reflected:
    """Operators with a plain number on the left, such as 1 / x, for matrices of any arithmetic, and what most share."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError("definition: a matrix is neither true nor false; choose elements with where(mask)")

    def __eq__(self, o: object) -> bool:
        raise TypeError("definition: matrices cannot be compared; choose elements with where(mask) or positive()")

    def __radd__(self, o: Any) -> Any:
        return self + o

    def __rmul__(self, o: Any) -> Any:
        return self * o

    def __rsub__(self, o: Any) -> Any:
        return -self + o  # type: ignore[operator]

    def __rtruediv__(self, o: Any) -> Any:
        return (self.zeros() + o) / self  # type: ignore[attr-defined]

    def rsqrt(self) -> Any:
        """1 / sqrt(x), by the logarithm."""
        return (self.log() * -0.5).exp()  # type: ignore[attr-defined]

    def gated(self, g: Any) -> Any:
        """Return `g` where this is above 0, and 0 elsewhere: what relu takes back."""
        return g.where(self.positive())  # type: ignore[attr-defined]

    def written(self, moved: Mask) -> Any:
        """Return what a kernel may round to its inputs' type, the columns that moved: here it is as it was."""
        return self

    def geometric(self, reach: int) -> Any:
        """Return I + a + a^2 + ..., the inverse of I - a, of what is 0 on and above its diagonal and to this power."""
        a: Any = self
        n = a.shape[0]
        total, size = a + (a.zeros() + 1.0).where(np.eye(n, dtype=bool)), 2
        while size < min(reach, n):
            a = a @ a
            total, size = total + total @ a, 2 * size
        return total


class Matrix(Reflected):
    """An (n, m) matrix over one arithmetic; (n, 1) columns and plain numbers spread over it as in NumPy."""

    __slots__ = ("a", "f")

    def __init__(self, a: Array, f: Arithmetic) -> None:
        self.a, self.f = a, f

    def _other(self, o: Any) -> Any:
        return o.a if isinstance(o, Matrix) else o

    def _with(self, a: Array) -> Matrix:
        return Matrix(a, self.f)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, m)."""
        return tuple(self.a.shape)

    @property
    def T(self) -> Matrix:
        """The transpose."""
        return self._with(self.a.T)

    def columns(self, at: Array) -> Matrix:
        """Return the columns of those numbers."""
        return self._with(self.a[:, at])

    def __matmul__(self, o: Matrix) -> Matrix:
        return self._with(self.f.matmul(self.a, o.a))

    def __add__(self, o: Any) -> Matrix:
        return self._with(self.a + self._other(o))

    def __sub__(self, o: Any) -> Matrix:
        return self._with(self.a - self._other(o))

    def __mul__(self, o: Any) -> Matrix:
        return self._with(self.a * self._other(o))

    def __truediv__(self, o: Any) -> Matrix:
        return self._with(self.a / self._other(o))

    def __neg__(self) -> Matrix:
        return self._with(-self.a)

    def where(self, mask: Mask | None) -> Matrix:
        """Keep the elements where `mask` holds; the others become 0."""
        return self if mask is None else self._with(np.where(mask, self.a, self.f.number(0)))

    def number(self, x: Any) -> Any:
        """Take a number into the matrix's arithmetic."""
        return self.f.number(x)

    def zeros(self) -> Matrix:
        """Return exact zeros of the same shape."""
        return self.where(np.zeros(self.a.shape, bool))

    def positive(self) -> Mask:
        """Tell where an element is above 0; its sign must be certain."""
        above, unsure = self._above()
        if unsure.any():
            raise UnsureSign(f"definition: the sign of {int(unsure.sum())} numbers is not certain in {self.f.name}")
        return above

    def gated(self, g: Matrix) -> Matrix:
        """Return `g` where this is above 0 and 0 elsewhere; between the two where the sign is not certain."""
        above, unsure = self._above()
        f: Any = self.f
        known = f.signs.pop(0) if getattr(f, "signs", None) else None
        if not unsure.any():
            return g.where(above)
        if known is not None:
            return g.where(above | (unsure & known))
        f.doubts = True
        found = g.where(above)
        for i, j in zip(*np.nonzero(unsure), strict=True):
            found.a[i, j] = f.between(np.broadcast_to(g.a, self.a.shape)[i, j])
        return found

    def _above(self) -> tuple[Mask, Mask]:
        """Return where an element is certainly above 0, and where that is not known."""
        above = np.asarray(self.a > 0).astype(bool)
        if not hasattr(self.f, "between"):
            return above, np.zeros_like(above)
        return above, ~above & ~np.asarray(self.a <= 0).astype(bool)

    def _apply(self, function: str, where: Mask | None = None) -> Matrix:
        if where is None or self.a.dtype != object:
            return self._with(self.f.apply(function, self.a)).where(where)
        out = np.empty(self.a.shape, object)
        out[...] = self.f.number(0)
        out[where] = self.f.apply(function, self.a[where])
        return self._with(out)

    def exp(self, where: Mask | None = None) -> Matrix:
        """Exponential; 0 where `where` does not hold."""
        return self._apply("exp", where)

    def sigmoid(self, where: Mask | None = None) -> Matrix:
        """1 / (1 + exp(-x)); 0 where `where` does not hold."""
        return self._apply("sigmoid", where)

    def log(self) -> Matrix:
        """Natural logarithm."""
        return self._apply("log")

    def tanh(self) -> Matrix:
        """Hyperbolic tangent."""
        return self._apply("tanh")

    def rsqrt(self) -> Matrix:
        """1 / sqrt(x) of numbers above 0."""
        return self._apply("rsqrt")

    def relu(self) -> Matrix:
        """max(x, 0)."""
        return self._apply("relu")

    def power(self, p: int, where: Mask | None = None) -> Matrix:
        """x**p by squaring; 0 where `where` does not hold."""
        if isinstance(p, bool) or not isinstance(p, int) or p < 0:
            raise ValueError(f"power: got {p!r}, expected an integer of at least 0")
        base, result = self.where(where).a, self.number(1)
        while p:
            if p & 1:
                result = base * result
            p >>= 1
            if p:
                base = base * base
        return self._with(result).where(where)

    def sum(self) -> Matrix:
        """Sum of each row, (n, 1)."""
        ones = np.empty((self.a.shape[1], 1), self.a.dtype)
        ones[...] = self.f.number(1)
        return self._with(self.f.matmul(self.a, ones))

    def shift(self, where: Mask, also: Matrix | None = None) -> Matrix:
        """Return an exact number for each row near its largest element, (n, 1): taking it off tames an exponential.

        It counts the elements where `where` holds, and the (1, 1) matrix `also` where given.
        """
        a = self.a
        if also is not None:
            column = np.empty((a.shape[0], 1), a.dtype)
            column[...] = also.a
            a = np.concatenate([a, column], axis=1)
            where = np.concatenate([where, np.ones((a.shape[0], 1), bool)], axis=1)
        return self._with(self.f.shift(a, where))

    def absmax(self, where: Mask) -> Matrix:
        """Return each row's largest absolute value where `where` holds, (n, 1)."""
        return self._with(self.f.absmax(self.a, where))
