"""Polynomials for 1/D on an interval, the best that there are by relative error, in forms with few levels.

The residual 1 - D·y(D) of the best polynomial y of degree m - 1 on [a, b] is T_m(u) / T_m(t0), T_m the Chebyshev
polynomial, u = (a + b - 2D)/(b - a) and t0 = (b + a)/(b - a): it equals 1 at D = 0, and its largest size on [a, b] is
1/T_m(t0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from ..validation import shown
from .arguments import is_count, is_number
from .arithmetic import Numbers

__all__ = ["Inverse", "choose", "product"]

Float = NDArray[np.float64]
MOST_QUADRATICS = 15
"""More lose more digits than they save levels."""
MOST_DOUBLINGS = 40
"""No chain has more levels."""


@dataclass(frozen=True)
class Inverse:
    """An approximation of 1/D on [low, high] by the best polynomial of degree m - 1, m = 2**doublings · odd.

    With v = u / t0 and T_2m = 2·T_m**2 - 1, the residual is brought down to T_odd by doublings, each a level and a
    factor 1 + v of 1/D; that of T_odd is 1 - v times (odd - 1)/2 quadratics in v.

    Attributes
    ----------
    low, high : float
        The interval.
    doublings : int
        How often T_2 is applied. Each is small for wide intervals.
    odd : int
        The order of what is left, odd.
    """

    low: float
    high: float
    doublings: int = 0
    odd: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.high) and 0 < self.low < self.high):
            raise InvalidInput(f"denominator: got ({self.low}, {self.high}), expected 0 < low < high")
        most = 2 * MOST_QUADRATICS + 1
        if not is_count(self.doublings, 0, MOST_DOUBLINGS) or not is_count(self.odd, 1, most) or self.odd % 2 == 0:
            raise InvalidInput(
                f"inverse: got {shown(self.doublings)} doublings of order {shown(self.odd)}, expected 0 or more of an "
                f"odd order, at most {MOST_DOUBLINGS} and {most}"
            )

    @property
    def centre(self) -> float:
        """t0 = (high + low)/(high - low), above 1."""
        return (self.high + self.low) / (self.high - self.low)

    @property
    def reach(self) -> float:
        """acosh(t0), which says how fast the error falls with m: to digits where t0 is all but 1."""
        above = 2 * self.low / (self.high - self.low)
        return math.log1p(above + math.sqrt(above * (2 + above)))

    @property
    def order(self) -> int:
        """m: the polynomial's degree, and one."""
        return self.odd << self.doublings

    @property
    def quadratics(self) -> int:
        """How many quadratics are left after the doublings."""
        return self.odd // 2

    @property
    def levels(self) -> int:
        """Levels from the denominator to the quotient, where the numerator comes a level later than it."""
        if self.order == 1:
            return 1
        return 1 + self.doublings + self.quadratics.bit_length()

    @property
    def products(self) -> int:
        """Products of ciphertexts, squares among them."""
        squares = self.doublings if self.odd > 1 else max(0, self.doublings - 1)
        return squares + (self.odd > 1) + self.doublings + self.quadratics

    @property
    def relative_error(self) -> float:
        """The largest size of 1 - D·y(D) on the interval: 1/T_m(t0)."""
        exponent = self.order * self.reach
        return 1 / math.cosh(exponent) if exponent < 700 else 0.0

    def _doubled(self) -> tuple[list[float], list[float], list[float], float]:
        """Return alpha, beta of v -> alpha·v**2 - beta, the factors that make it w -> w**2 - constant, and the centre.

        The last factor is 1: what is left after the doublings is v itself.
        """
        t, alpha, beta = self.centre, [], []
        for _ in range(self.doublings):
            twice = 2 * t**2
            # T_2**k of a narrow interval's centre grows past float64, where alpha is 1 and beta nothing
            t = min(twice - 1, 1e150)
            alpha.append(twice / (twice - 1))
            beta.append(1 / t)
        scale = [1.0] * (self.doublings + 1)
        # the last doubling's square is not taken where nothing is left after it
        for k in range(self.doublings - 1 - (self.odd == 1), -1, -1):
            scale[k] = math.sqrt(alpha[k] * scale[k + 1])
        return alpha, beta, scale, t

    def _quadratics(self, centre: float) -> list[tuple[float, float]]:
        """Return (l, c) of the factors v**2 + l·v + c: the roots of T_odd(t·v) = T_odd(t) but 1, in pairs."""
        angles = [2 * math.pi * k / self.odd for k in range(1, self.quadratics + 1)]
        factors = [(-2 * math.cos(x), 1 - (math.sin(x) / centre) ** 2) for x in angles]
        return [
            factors[i // 2] if i % 2 == 0 else factors[-1 - i // 2] for i in range(len(factors))
        ]  # small ones beside large

    @property
    def input_factor(self) -> float:
        """What D is multiplied with before the circuit sees it."""
        return 2 * self._doubled()[2][0] / (self.low + self.high)

    @property
    def output_factor(self) -> float:
        """What the circuit's quotient is multiplied with afterwards."""
        alpha, _, scale, centre = self._doubled()
        doubled = math.prod(a / s for a, s in zip(alpha, scale, strict=False))
        return doubled / scale[0] / math.prod(c for _, c in self._quadratics(centre))

    def factors(self, m: Any, denominator: Any, added: float) -> list[Any]:
        """Return what a numerator is multiplied with, one after another, by an arithmetic.

        The product of all is 1 / (denominator + added) / output_factor, the denominator and `added` times input_factor.
        """
        if self.order == 1:
            return []
        _, beta, scale, centre = self._doubled()
        w = m.add_constant(m.negate(denominator), scale[0] - added * self.input_factor)
        y = None
        for k in range(self.doublings):
            factor = m.add_constant(w, scale[k])
            y = factor if y is None else m.product(y, factor)
            if k < self.doublings - 1 or self.odd > 1:
                w = m.add_constant(m.rescale(m.relinearize(m.square(w))), -scale[k + 1] * beta[k])
        found = [] if y is None else [y]
        if self.odd == 1:
            return found
        square, quadratics = m.relinearize(m.square(w)), []
        for linear, constant in self._quadratics(centre):
            z = m.add(m.times_constant(w, linear), square)
            quadratics.append(m.rescale(m.add_constant(z, constant)))
        # 1, 2, 4, ... of them: each product is there when the numerator has come so far
        groups = (quadratics[2**i - 1 : 2 ** (i + 1) - 1] for i in range(self.quadratics.bit_length()))
        return found + [product(m, g) for g in groups]

    def apply(self, m: Any, numerator: Any, denominator: Any, added: float) -> Any:
        """Return numerator / (denominator + added) / output_factor by an arithmetic; both scaled by input_factor."""
        for factor in self.factors(m, denominator, added):
            numerator = m.product(numerator, factor)
        return numerator

    def __call__(self, x: Float) -> Float:
        """Return y(x) in float64."""
        x = np.asarray(x, np.float64)
        out = self.apply(Numbers(), np.full_like(x, self.input_factor), x * self.input_factor, 0.0)
        return np.asarray(out * self.output_factor)


def product(m: Any, factors: list[Any]) -> Any:
    """Return a product in the fewest levels; the deepest factors last."""
    factors = list(factors)
    while len(factors) > 1:
        factors = [
            m.product(*p) if len(p) == 2 else p[0] for p in (factors[i : i + 2] for i in range(0, len(factors), 2))
        ]
    return factors[0]


def choose(low: float, high: float, relative_error: float) -> list[Inverse]:
    """Return inverses within a relative error, those with few levels and then few products first; none if none is.

    Raises
    ------
    InvalidInput
        The interval is empty, or the error is not above 0.
    """
    if not is_number(relative_error) or not relative_error > 0:
        raise InvalidInput(f"tolerance: got {shown(relative_error)}, expected a number above 0")
    order = math.acosh(1 / min(relative_error, 1.0)) / Inverse(low, high).reach
    found = set()
    for doublings in range(min(math.ceil(math.log2(max(order, 1.0))) + 2, MOST_DOUBLINGS + 1)):
        # the least odd order, and two more for where noise leaves less room
        odd = max(1, 2 * math.ceil((order / 2**doublings - 1) / 2) + 1)
        found |= {Inverse(low, high, doublings, o) for o in (odd, odd + 2) if o // 2 <= MOST_QUADRATICS}
    good = [x for x in found if x.relative_error <= relative_error]
    return sorted(good, key=lambda x: (x.levels, x.products, x.order))
