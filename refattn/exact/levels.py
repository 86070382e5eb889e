"""Enclosure arithmetic on BLAS: numbers h + l ± r in float64, the rigour inside each operator.

A matrix product cuts each operand into L fixed-point heads and exact tails,

    A B = sum_{s+t<L} A_s B_t  +  sum_{s<L} A_s B_{>=L-s}  +  A_{>=L} B,

an identity. Head products are sums of integers below 2**53 and exact in any order of summation; only the last level
rounds, on operands smaller by 2**(-b L). L = 0 is plain float64 with a certificate; each L adds about 20 bits.
Radii are float64 numbers rounded up by the factor ``UP``; ``ETA`` covers every underflow. Proofs:
docs/proofs/products.md and docs/proofs/operators.md.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cached_property
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from . import elementwise
from .anywhere import beside, largest, on_host, product
from .doubledouble import EXP2_ERROR, EXP2_FLOOR, U, constant, exp2, two_prod, two_sum
from .lossless import ALL, divided, head_bits, lossless, most, radius_sum, row_sum
from .matrix import Reflected, UnsureSign
from .precision import precision

__all__ = ["ETA", "UP", "Bounded", "Level", "gamma", "head_bits"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]

UP = 1 + 2.0**-40
"""More than the rounding of any radius computed here in fewer than 2**12 operations."""
ETA = 2.0**-1000
"""More than all that underflow can lose in one operator, for sums of fewer than 2**70 terms."""
LOG2E_BITS = 200
WIDE = 64
"""Matrices with more columns may keep one radius a row."""


def gamma(k: float) -> float:
    """Return k u / (1 - k u), the error factor of k roundings."""
    return k * U / (1 - k * U)


class Level:
    """The arithmetic of one level L, 0 to 3, on the CPU or on a GPU (a ``refattn.exact.device.Card``)."""

    def __init__(self, level: int, device: Any = None) -> None:
        self.level, self.device = level, device
        self.xp = np if device is None else device.xp
        self.name = f"float64 enclosures, L = {level}"
        self._last: tuple[Any, Any] = (None, None)

    @cached_property
    def log2e(self) -> Bounded:
        """1 / log(2)."""
        with precision(LOG2E_BITS):
            return self._ball(1 / flint.arb(2).log())

    @property
    def steps(self) -> Any:
        """The elementwise steps: the device's, or those of :func:`refattn.exact.elementwise.steps`."""
        return self.device or elementwise.steps()

    def array(self, x: Float) -> Bounded:
        """Take in a float64 array, exactly; to the device, if there is one."""
        x = self.xp.asarray(x, np.float64)
        return Bounded(self, x, self.xp.zeros((1, 1)), self.xp.zeros((1, 1)))

    def mask(self, x: Any) -> Any:
        """Return a mask where the numbers are; a device's copy of the last one is kept, which is asked for again."""
        if self.device is None or not isinstance(x, np.ndarray):
            return x
        if self._last[0] is not x:
            self._last = x, self.xp.asarray(x)
        return self._last[1]

    def number(self, x: Any) -> Bounded:
        """Take in an int, float or Fraction as a (1, 1) matrix."""
        if isinstance(x, Fraction):
            with precision(LOG2E_BITS):
                return self._ball(flint.arb(flint.fmpq(x.numerator, x.denominator)))
        return self.array(np.array([[float(x)]]))

    def rsqrt(self, n: int) -> Bounded:
        """Return 1/sqrt(n)."""
        with precision(LOG2E_BITS):
            return self._ball(1 / flint.arb(n).sqrt())

    def log2(self) -> Bounded:
        """Return log(2)."""
        with precision(LOG2E_BITS):
            return self._ball(flint.arb(2).log())

    def _ball(self, x: Any) -> Bounded:
        h, low = constant(x)
        r = 0.0 if x == flint.arb(h) else abs(h) * 2.0**-104
        return Bounded(self, *(self.xp.array([[v]]) for v in (h, low, r)))


class Bounded(Reflected):
    """A matrix of numbers h + l ± (r + relative · abs(h)); all but h may have axes of length 1 and spread as in NumPy.

    A wide matrix keeps one radius a row where that loses little: its elements are never read one by one.
    """

    __slots__ = ("f", "h", "kept", "l", "relative", "rest")

    def __init__(self, f: Level, h: Float, low: Float, r: Float, relative: Float | None = None) -> None:
        self.f, self.h, self.l, self.rest, self.relative = f, h, low, r, relative
        self.kept: dict[Any, Any] = {}

    @property
    def r(self) -> Float:
        """The radius."""
        return self.rest if self.relative is None else (self.rest + self.relative * np.abs(self.h)) * UP

    def _by_row(self, *others: Bounded) -> bool:
        """Tell whether a result of this shape keeps one radius a row."""
        wide = self.h.shape[1] > WIDE
        return wide and all(o.relative is None and o.rest.shape[1] == 1 for o in (self, *others))

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, m)."""
        return tuple(self.h.shape)

    @property
    def T(self) -> Bounded:
        """The transpose, made once: its cuts are kept with it."""
        if "T" not in self.kept:
            relative = None if self.relative is None else self.relative.T
            self.kept["T"] = Bounded(self.f, self.h.T, self.l.T, self.rest.T, relative)
        turned: Bounded = self.kept["T"]
        return turned

    def columns(self, at: NDArray[np.intp]) -> Bounded:
        """Return the columns of those numbers."""
        at = beside(self.h, at)
        low, r = (x[:, at] if x.shape[1] > 1 else x for x in (self.l, self.r))
        return Bounded(self.f, self.h[:, at], low, r)

    def number(self, x: Any) -> Bounded:
        """Take in a number."""
        return self.f.number(x)

    def _taken(self, o: Any) -> Bounded:
        return o if isinstance(o, Bounded) else self.f.number(o)

    def zeros(self) -> Bounded:
        """Return exact zeros of the same shape."""
        return self.f.array(self.f.xp.zeros(self.h.shape))

    def positive(self) -> Mask:
        """Tell where an element is above 0, on the CPU; its sign must be certain."""
        if not ((np.abs(self.h) > np.abs(self.l) + self.r) | (self.r == 0)).all():
            raise UnsureSign(f"definition: the sign of a number is not certain in {self.f.name}")
        return np.asarray(on_host(self.h > 0))

    def gated(self, g: Bounded) -> Bounded:
        """Return `g` where this is above 0 and 0 elsewhere; between the two where the sign is not certain."""
        far = np.abs(self.h) > np.abs(self.l) + self.r
        exact = (self.h == 0) & (self.l == 0) & (self.r == 0)
        h, low, r = (np.broadcast_to(x, far.shape) for x in (g.h, g.l, g.r))
        keep = np.where(far, self.h > 0, np.where(exact, 0.0, 0.5))
        # halving is exact but for underflow
        wide = np.where(far | exact, 0.0, 0.5 * (np.abs(h) + np.abs(low)) * UP + ETA)
        return Bounded(self.f, h * keep, low * keep, np.where(keep == 0, 0.0, r) + wide)

    # sums and products of elements -------------------------------------------------------------------------------

    def __add__(self, o: Any) -> Bounded:
        o = self._taken(o)
        s, e = two_sum(self.h, o.h)
        if self._by_row(o):  # abs(e) <= u abs(s), abs(l) <= u abs(h)
            small = 2 * U * (largest(np.abs(self.h), 1)[:, None] + largest(np.abs(o.h), 1)[:, None])
            if self.f.device is None and not (self.rest.any() or o.rest.any() or self.l.any() or o.l.any()):
                small = np.where(e.any(1, keepdims=True), small, 0.0)
        else:
            small = np.abs(e) + np.abs(self.l) + np.abs(o.l)
        h, low = two_sum(s, e + (self.l + o.l))
        return Bounded(self.f, h, low, (self.r + o.r + 2 * U * small) * UP)

    def __neg__(self) -> Bounded:
        return Bounded(self.f, -self.h, -self.l, self.r)

    def __sub__(self, o: Any) -> Bounded:
        return self + (-self._taken(o))

    def __mul__(self, o: Any) -> Bounded:
        o = self._taken(o)
        p, e = two_prod(self.h, o.h)
        a, b = self.h * o.l, self.l * o.h
        h, low = two_sum(p, e + (a + b))
        if o.h.shape == (1, 1) and self._by_row():
            size, c = largest(np.abs(self.h), 1)[:, None] * UP, np.abs(o.h) * UP
            return Bounded(self.f, h, low, (16 * U * U * size * c + size * o.r + c * self.r + self.r * o.r) * UP + ETA)
        small = np.abs(self.l * o.l) + 4 * U * (np.abs(e) + np.abs(a) + np.abs(b))
        x, y = np.abs(self.h) + np.abs(self.l), np.abs(o.h) + np.abs(o.l)
        r = (small + x * o.r + y * self.r + self.r * o.r) * UP + ETA
        r = np.where((x + self.r == 0) | (y + o.r == 0), 0.0, r)  # 0 times a number is exact
        return Bounded(self.f, h, low, r)

    def __truediv__(self, o: Any) -> Bounded:
        o = self._taken(o)
        if o.shape == (len(self.h), 1) and self.f.device is None and not any(x.any() for x in (o.h - 1, o.l, o.r)):
            return self
        q = self.h / o.h
        p, e = two_prod(q, o.h)
        first = self.h - p - e
        back = q * o.l
        n = first + self.l - back
        t = n / o.h
        h, low = two_sum(q, t)
        least = np.abs(o.h) - np.abs(o.l)
        lost = 5 * U * (np.abs(first) + np.abs(self.l) + np.abs(back)) + 2 * U * np.abs(n) + np.abs(n * o.l) / least
        lost = lost + self.r + (np.abs(q) + 2 * np.abs(t)) * o.r + ETA
        sure = least > 2 * o.r
        r = np.where(sure, lost / np.where(sure, least - o.r, 1.0) * UP + ETA, np.inf)
        return Bounded(self.f, h, low, np.where(sure & divided(self, o), 0.0, r))

    # functions ----------------------------------------------------------------------------------------------------

    def where(self, mask: Mask | None) -> Bounded:
        """Keep the elements where `mask` holds; the others become 0."""
        mask = self.f.mask(mask)
        if mask is None or mask.all():
            return self
        h, low = np.where(mask, self.h, 0.0), np.where(mask, self.l, 0.0)
        if self.relative is not None or self._by_row():  # what is masked is 0, and its radius too wide by the row's
            return Bounded(self.f, h, low, self.rest, self.relative)
        return Bounded(self.f, h, low, np.where(mask, self.rest, 0.0))

    def exp(self, where: Mask | None = None) -> Bounded:
        """Exponential: 2**(x log2 e); 0 where `where` does not hold."""
        t, where = self * self.f.log2e, self.f.mask(where)
        if where is not None and not where.all():
            t = Bounded(self.f, np.where(where, t.h, 2 * EXP2_FLOOR), np.where(where, t.l, 0.0), t.rest, t.relative)
        h, low = exp2(np.minimum(t.h, 1000.0), t.l)
        # 2**d - 1 for the argument's radius d <= 1 is at most 0.7 d 1.5
        relative = EXP2_ERROR + np.where(t.r <= 2.0**-10, 0.694 * t.r, np.where(t.r <= 1, 1.05 * t.r, np.inf))
        floor = self.f.xp.full((1, 1), 2.0 ** (EXP2_FLOOR + 1))
        if (t.h > 1000.0).any():
            floor = np.where(t.h > 1000.0, np.inf, floor)
        return Bounded(self.f, h, low, floor, relative * UP)

    def sigmoid(self, where: Mask | None = None) -> Bounded:
        """1 / (1 + exp(-x)), from the exponential of -abs(x)."""
        up = self.h >= 0
        sign = np.where(up, -1.0, 1.0)
        e = Bounded(self.f, self.h * sign, self.l * sign, self.r + np.zeros_like(self.h)).exp()
        one = self.f.number(1)
        # (1 or e) / (1 + e)
        top = Bounded(self.f, np.where(up, 1.0, e.h), np.where(up, 0.0, e.l), np.where(up, 0.0, e.r))
        return (top / (one + e)).where(where)

    def tanh(self) -> Bounded:
        """(1 - e) / (1 + e) with e = exp(-2 abs(x)), and the sign of x; the slope is at most 1."""
        sign = np.where(self.h >= 0, 1.0, -1.0)
        point = np.zeros_like(self.h)
        e = Bounded(self.f, -2 * sign * self.h, -2 * sign * self.l, point).exp()
        one = self.f.number(1)
        t = (one - e) / (one + e)
        return Bounded(self.f, sign * t.h, sign * t.l, t.r + self.r)

    def log(self) -> Bounded:
        """Natural logarithm, t log 2 + log(1 + e), with t near log2(x) and 1 + e = x 2**-t."""
        near = (self.h > 2.0**-240) & (self.h < 2.0**240)
        t = np.log2(np.where(near, self.h, 1.0))
        h, low = exp2(-t, np.zeros_like(t))
        e = self * Bounded(self.f, h, low, h * (2 * EXP2_ERROR)) - 1
        size = np.abs(e.h) + np.abs(e.l) + e.r
        r = np.where(near & (size <= 0.5), (e.r + size * size) * UP, np.inf)
        found = self.f.array(t) * self.f.log2() + Bounded(self.f, e.h, e.l, r)
        return found if self.f.device is not None or near.all() else self._log()

    def _log(self) -> Bounded:
        """Natural logarithm, through Arb: of numbers far from 1."""
        out = np.empty((3, *self.h.shape))
        low, r = (np.broadcast_to(x, self.h.shape) for x in (self.l, self.r))
        with precision(160):
            for index in np.ndindex(*self.h.shape):
                x = flint.arb(self.h[index]) + flint.arb(low[index])
                x = (x + flint.arb(0, float(r[index]))).log() if np.isfinite(r[index]) else flint.arb("nan")
                h = float(x.mid())
                rest = x - flint.arb(h)
                t = float(rest.mid())
                left = float(abs(rest - flint.arb(t)).upper()) if x.is_finite() else np.inf
                out[:, *index] = h, t, left * UP + ETA
        return Bounded(self.f, *out)

    def relu(self) -> Bounded:
        """max(x, 0), which moves no two numbers apart."""
        up = self.h > 0
        return Bounded(self.f, np.where(up, self.h, 0.0), np.where(up, self.l, 0.0), self.r)

    def power(self, p: int, where: Mask | None = None) -> Bounded:
        """x**p by squaring; 0 where `where` does not hold."""
        base, result = self.where(where), self.f.number(1)
        first = True
        while p:
            if p & 1:
                result = base if first else base * result
                first = False
            p >>= 1
            if p:
                base = base * base
        return result.where(where)

    def shift(self, where: Mask, also: Bounded | None = None) -> Bounded:
        """Return each row's largest visible h, an exact number, (n, 1)."""
        top = largest(np.where(self.f.mask(where), self.h, -np.inf), 1)[:, None]
        if also is not None:
            top = np.maximum(top, also.h)
        return self.f.array(np.where(top == -np.inf, 0.0, top))

    def absmax(self, where: Mask) -> Bounded:
        """Return each row's largest visible absolute value, (n, 1)."""
        where = self.f.mask(where)
        size = np.where(where, np.abs(self.h), 0.0)
        at = size.argmax(1)[:, None] if size.shape[1] else np.zeros((size.shape[0], 0), int)
        take = [np.take_along_axis(np.broadcast_to(x, size.shape), at, 1) for x in (self.h, self.l)]
        sign = np.where(take[0] < 0, -1.0, 1.0)
        # no other element can exceed it by more than the largest uncertainty of the row
        slack = largest(np.where(where, 2 * (np.abs(self.l) + self.r), 0.0), 1)[:, None]
        return Bounded(self.f, sign * take[0], sign * take[1], slack * UP)

    def sum(self) -> Bounded:
        """Sum of each row, (n, 1)."""
        return self @ self.f.array(self.f.xp.ones((self.h.shape[1], 1)))

    # the product --------------------------------------------------------------------------------------------------

    def _cut(self, b: int, level: int, into: tuple[Any, Any] | None = None) -> tuple[list[Float], list[Float]]:
        """Return heads A_0 .. A_{L-1} and tails A_{>=0} .. A_{>=L}, cut along rows exactly, in `into` if given."""
        if b in self.kept:
            return self.kept[b]  # type: ignore[no-any-return]
        xp, device = self.f.xp, self.f.device
        sigma = (elementwise if device is None else device).places(self.h, b, level)
        heads, tails = into or (xp.empty((level, *self.h.shape)), xp.empty((level + 1, *self.h.shape)))
        self.f.steps.cut(self.h, np.broadcast_to(self.l, self.h.shape), sigma, heads, tails)
        self.kept[b] = list(heads), list(tails)
        return self.kept[b]  # type: ignore[no-any-return]

    def __matmul__(self, o: Bounded) -> Bounded:
        level, k = self.f.level, self.h.shape[1]
        if 0 in (*self.h.shape, *o.h.shape):
            return self.f.array(np.zeros((len(self.h), o.h.shape[1])))
        b, wide = head_bits(k, level), o.h.shape[1] > k  # a wide product keeps one radius a row
        left, left_tails = self._cut(b, level)
        right, right_tails = ([x.T for x in part] for part in _columns(o)._cut(b, level))
        pairs = [(left[s] if s < level else left_tails[level], right_tails[level - s]) for s in range(level + 1)]
        pairs = [(x, y) for x, y in pairs if y.any() and x.any()]
        device, low = self.f.device, 0.0
        h: Any = self.f.xp.zeros((self.h.shape[0], o.h.shape[1]))
        for t in range(level):
            exact = product(device, np.concatenate(left[: t + 1], 1), np.concatenate(right[t::-1], 0))
            h, e = two_sum(h, exact)
            low = low + e
        if pairs:
            last = product(device, np.concatenate([x for x, _ in pairs], 1), np.concatenate([y for _, y in pairs], 0))
            h, e = two_sum(h, last) if level else (last, 0.0)
            low = low + e
        h, low = two_sum(h, low + np.zeros_like(h)) if level else (h, np.zeros_like(h))
        one, top, own = row_sum(self.h), most(o.h, wide), radius_sum(self)
        rounding = gamma(k * (level + 1) + level + 4)  # the rounded level's own sums, and tails' to float64
        r: Any = 2.0**-100 * one * top + sum(rounding * row_sum(x) * most(y, wide) for x, y in pairs)
        their = most(np.broadcast_to(o.r, o.h.shape), wide) if o.r.any() else 0.0
        if self.h.shape[0] <= WIDE and self.r.shape == self.h.shape:  # few rows: each radius times its own element
            through = product(device, self.r, np.abs(o.h)) * ALL
        else:
            through = own * top
        r = (r + through + (one + own) * their) * UP + ETA
        r = np.where((one + own == 0) | (top + their == 0), 0.0, r)  # a sum of exact zeros
        if device is None and not own.any() and not np.any(their):
            r = np.where(lossless(self, o, one * top, pairs), 0.0, r)
        return Bounded(self.f, h, low, r.max(1, keepdims=True) if wide else r)


def _columns(o: Bounded) -> Bounded:
    """Return the transpose, kept with the matrix so that its cuts are made once."""
    if "columns" not in o.kept:
        o.kept["columns"] = Bounded(o.f, o.h.T.copy(), o.l.T, o.r.T)
    return o.kept["columns"]  # type: ignore[no-any-return]
