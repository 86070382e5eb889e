"""Products of a few rows of balls with a large float64 matrix: by exact slices, so that few numbers become balls.

Slices are those of ``levels.py``, as many as the precision asks for; nothing rounds but what no slice holds
(docs/proofs/products.md).
"""

from __future__ import annotations

from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from .anywhere import power_above
from .blas import one_thread
from .doubledouble import two_sum
from .levels import ETA, UP, Bounded, Level, gamma, head_bits
from .matrix import Matrix

__all__ = ["Plain", "taken"]

Float = NDArray[np.float64]
LARGE = 2**15
"""Numbers of a matrix that is not made into balls before they are asked for."""
SAVED = 8
"""How many numbers a product by slices keeps from becoming balls for each of its own, and of a left side in balls."""
MOST_BITS = 140
"""Three float64 numbers hold a left operand to 2**-150 of it."""
RANGE = 2.0**300
"""Where the largest of a row or column is beyond it, or below its inverse, slices might underflow: Arb's product."""
BLOCK, COLUMNS = 2**11, 2**9
"""Terms of a sum, and columns, of a block: its numbers stay in cache."""


def taken(f: Any, x: Float) -> Matrix:
    """Return a float64 matrix over balls."""
    return Plain(x, f) if x.size >= LARGE else Matrix(f.array(x), f)


class Plain(Matrix):
    """A matrix of float64 numbers over balls, made into balls when they are asked for one by one."""

    __slots__ = ("made", "x")
    f: Any

    def __init__(self, x: Float, f: Any) -> None:
        self.x, self.f = x, f
        self.made: NDArray[Any] | None = None

    @property
    def a(self) -> NDArray[Any]:  # type: ignore[override]
        """The balls."""
        if self.made is None:
            self.made = self.f.array(self.x)
        return self.made

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, m)."""
        return tuple(self.x.shape)

    @property
    def T(self) -> Matrix:
        """The transpose."""
        return Plain(self.x.T, self.f)

    def columns(self, at: NDArray[Any]) -> Matrix:
        """Return the columns of those numbers."""
        return Plain(self.x[:, at], self.f)

    def __matmul__(self, o: Matrix) -> Matrix:
        return o.__rmatmul__(self) if isinstance(o, Plain) else super().__matmul__(o)

    def __rmatmul__(self, left: Matrix) -> Matrix:
        """Return left @ self: by slices where the product is small beside its operands."""
        (n, k), m = left.shape, self.shape[1]
        few = isinstance(left, Plain) or SAVED * n <= m  # what the left side takes to be no balls
        if few and SAVED * n * m <= k * (n + m) and self.f.bits <= MOST_BITS:
            parts = (left.x, 0 * left.x, 0 * left.x, 0 * left.x) if isinstance(left, Plain) else _four(left.a)
            if _in_range(parts[0], 1) and _in_range(self.x, 0) and np.isfinite(parts[3]).all():
                with one_thread():  # small products
                    return Matrix(product(*parts, self.x, self.f.bits), self.f)
        return Matrix(self.f.matmul(left.a, self.a), self.f)


def _in_range(x: Float, axis: int) -> bool:
    """Tell whether the largest of each row or column is 0 or of a size that slices can be made of."""
    top = np.maximum(x.max(axis, initial=0.0), -x.min(axis, initial=0.0))
    return bool(((top == 0) | ((top < RANGE) & (top > 1 / RANGE))).all())  # False where there is NaN


def _four(a: NDArray[Any]) -> tuple[Float, Float, Float, Float]:
    """Return balls as h + l + t within r, four float64 matrices."""
    found = np.empty((4, a.size))
    for i, x in enumerate(a.ravel()):
        for part in range(3):
            found[part, i] = middle = float(x)
            x = x - middle
        found[3, i] = 0.0 if x == 0 else float(abs(x).upper()) * UP + ETA
    h, low, t, r = found.reshape(4, *a.shape)
    return h, low, t, r


def product(h: Float, low: Float, t: Float, r: Float, right: Float, bits: int) -> NDArray[Any]:
    """Return (h + low + t) @ right as balls (n, m); the left side (n, k) is known within r, right (k, m) is exact."""
    left, (k, m) = (h, low, t, r), right.shape
    terms = [slice(i, i + BLOCK) for i in range(0, k, BLOCK)]
    return np.concatenate(
        [
            sum(_block([x[:, at] for x in left], right[at, j : j + COLUMNS], bits) for at in terms)
            for j in range(0, m, COLUMNS)
        ],
        1,
    )


def _block(left: list[Float], right: Float, bits: int) -> Any:
    h, low, t, r = left
    (n, k), tops = h.shape, (np.abs(h).max(1), np.abs(right).max(0))
    count = next(c for c in range(2, 24) if c * (head_bits(k, c) + 1) - np.log2(k * (c + 1)) >= bits)
    b, (unit, units) = head_bits(k, count), map(power_above, tops)
    point, rest, head = np.zeros((1, 1)), right.copy(), np.empty_like(right)
    heads = np.stack(Bounded(Level(0), h, low, point)._cut(b, count)[0])
    sums = np.zeros((count, n, right.shape[1]))
    for s in range(count):
        sigma = units * (1.5 * 2.0 ** (52 - b - s * (b + 1)))
        np.subtract(np.add(rest, sigma, out=head), sigma, out=head)
        rest -= head
        sums[s:] += (heads[: count - s].reshape(-1, k) @ head).reshape(-1, n, right.shape[1])
        if not rest.any():  # the other slices are 0
            break
    left_out = 2.0 ** -(count * (b + 1)) * k * (count + 1) * np.outer(unit, units)
    lost = (left_out + np.outer(gamma(k + 2) * _sum(t) + _sum(r), tops[1])) * (1 + 2.0**-8) + ETA
    nothing = np.outer(_sum(h) + _sum(r), tops[1]) == 0  # a sum of exact zeros is exact
    (high, middle, last), rounded = _three([*sums, t @ right])
    return _balls(high) + _balls(middle) + _balls(last, np.where(nothing, 0.0, lost + rounded))


def _three(terms: list[Float]) -> tuple[list[Float], Float]:
    """Return the sum of some matrices as three, and a bound of what these leave: errors of sums are summed in turn."""
    found = []
    for _ in range(3):
        total, left = terms[-1], []
        for x in terms[-2::-1]:
            total, e = two_sum(total, x)
            left.append(e)
        found.append(total)
        terms = left[::-1]
    left_out: Any = sum((np.abs(x) for x in terms), np.zeros_like(total))
    return found, left_out * (1 + 2.0**-40)


def _sum(x: Float) -> Float:
    return np.asarray(np.abs(x).sum(1))


def _balls(x: Float, *r: Float) -> NDArray[Any]:
    found = np.empty(x.size, object)
    found[:] = list(map(flint.arb, *(y.ravel().tolist() for y in (x, *r))))
    return found.reshape(x.shape)
