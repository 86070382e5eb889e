"""Polynomials for 1/D on an interval, the best that there are by relative error, in forms with few levels.

The residual 1 - D·y(D) of the best polynomial y of degree m - 1 on [a, b] is T_m(u) / T_m(t0), T_m the Chebyshev
polynomial, u = (a + b - 2D)/(b - a) and t0 = (b + a)/(b - a): it equals 1 at D = 0, and its largest size on [a, b] is
1/T_m(t0).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput

__all__ = ["ChebyshevInverse", "Inverse", "ProductInverse", "choose", "product"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Inverse(ABC):
    """An approximation of 1/D on [low, high] by a polynomial.

    Attributes
    ----------
    low, high : float
        The interval.
    steps : int
        The degree is 2**steps - 2 (product form) or 2**steps - 1 (Chebyshev form).
    """

    low: float
    high: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.high) and 0 < self.low < self.high):
            raise InvalidInput(f"denominator: got ({self.low}, {self.high}), expected 0 < low < high")
        if self.steps < 1:
            raise InvalidInput(f"inverse: got {self.steps} steps, expected at least 1")

    @property
    def centre(self) -> float:
        """t0 = (high + low)/(high - low), above 1."""
        return (self.high + self.low) / (self.high - self.low)

    @property
    @abstractmethod
    def order(self) -> int:
        """m: the polynomial's degree, and one."""

    @property
    def relative_error(self) -> float:
        """The largest size of 1 - D·y(D) on the interval: 1/T_m(t0)."""
        exponent = self.order * math.acosh(self.centre)
        return 1 / math.cosh(exponent) if exponent < 700 else 0.0

    @property
    @abstractmethod
    def input_factor(self) -> float:
        """What D is multiplied with before the circuit sees it."""

    @property
    @abstractmethod
    def output_factor(self) -> float:
        """What the circuit's quotient is multiplied with afterwards."""

    @abstractmethod
    def factors(self, m: Any, denominator: Any, added: float) -> list[Any]:
        """Return what a numerator is multiplied with, one after another, by an arithmetic.

        The product of all is 1 / (denominator + added) / output_factor, the denominator and `added` times input_factor.
        """

    def apply(self, m: Any, numerator: Any, denominator: Any, added: float) -> Any:
        """Return numerator / (denominator + added) / output_factor by an arithmetic; both scaled by input_factor."""
        for factor in self.factors(m, denominator, added):
            numerator = m.product(numerator, factor)
        return numerator

    def __call__(self, x: Float) -> Float:
        """Return y(x) in float64."""
        from .circuit import Numbers

        x = np.asarray(x, np.float64)
        out = self.apply(Numbers(), np.full_like(x, self.input_factor), x * self.input_factor, 0.0)
        return np.asarray(out * self.output_factor)


class ProductInverse(Inverse):
    """The best polynomial of degree 2**steps - 2 as a product of quadratics in u: `steps` levels with the numerator."""

    @property
    def order(self) -> int:
        return (1 << self.steps) - 1

    def _quadratics(self) -> list[tuple[float, float]]:
        """Return (l, c) of the factors u**2 + l·u + c: the roots of T_m(u) = T_m(t0) but t0, in pairs."""
        count = (self.order - 1) // 2
        angles = [2 * math.pi * k / self.order for k in range(1, count + 1)]
        factors = [(-2 * self.centre * math.cos(x), self.centre**2 - math.sin(x) ** 2) for x in angles]
        return [
            factors[i // 2] if i % 2 == 0 else factors[-1 - i // 2] for i in range(count)
        ]  # small ones beside large

    @property
    def input_factor(self) -> float:
        return 2 / (self.high - self.low)

    @property
    def output_factor(self) -> float:
        constant = math.prod(c for _, c in self._quadratics())
        return (self.high - self.low) / (self.high + self.low) / constant

    def factors(self, m: Any, denominator: Any, added: float) -> list[Any]:
        if self.steps == 1:
            return []
        u = m.add_constant(m.negate(denominator), self.centre - added * self.input_factor)
        square = m.relinearize(m.square(u))
        quadratics = []
        for linear, constant in self._quadratics():
            z = m.add(m.times_constant(u, linear), square)
            quadratics.append(m.rescale(m.add_constant(z, constant)))
        # 1, 2, 4, ... of them: each product is there when the numerator has come so far
        return [product(m, quadratics[2**i - 1 : 2 ** (i + 1) - 1]) for i in range(self.steps - 1)]


class ChebyshevInverse(Inverse):
    """The best polynomial of degree 2**steps - 1 by T_2(T_2(...)): a level more, and small for wide intervals."""

    @property
    def order(self) -> int:
        return 1 << self.steps

    def _constants(self) -> tuple[list[float], list[float], list[float]]:
        """Return alpha, beta of v -> alpha·v**2 - beta, and the factors that make it w -> w**2 - constant."""
        t, alpha, beta = self.centre, [], []
        for _ in range(self.steps):
            twice = 2 * t**2
            # T_2**k of a narrow interval's centre grows past float64, where alpha is 1 and beta nothing
            t = min(twice - 1, 1e150)
            alpha.append(twice / (twice - 1))
            beta.append(1 / t)
        scale = [1.0] * self.steps
        for k in range(self.steps - 2, -1, -1):
            scale[k] = math.sqrt(alpha[k] * scale[k + 1])
        return alpha, beta, scale

    @property
    def input_factor(self) -> float:
        return 2 * self._constants()[2][0] / (self.low + self.high)

    @property
    def output_factor(self) -> float:
        alpha, _, scale = self._constants()
        return math.prod(a / s for a, s in zip(alpha, scale, strict=True)) / scale[0]

    def factors(self, m: Any, denominator: Any, added: float) -> list[Any]:
        _, beta, scale = self._constants()
        w = m.add_constant(m.negate(denominator), scale[0] - added * self.input_factor)
        y = None
        for k in range(self.steps):
            factor = m.add_constant(w, scale[k])
            y = factor if y is None else m.product(y, factor)
            if k < self.steps - 1:
                w = m.add_constant(m.rescale(m.relinearize(m.square(w))), -scale[k + 1] * beta[k])
        return [y]


def product(m: Any, factors: list[Any]) -> Any:
    """Return a product in the fewest levels; the deepest factors last."""
    factors = list(factors)
    while len(factors) > 1:
        factors = [
            m.product(*p) if len(p) == 2 else p[0] for p in (factors[i : i + 2] for i in range(0, len(factors), 2))
        ]
    return factors[0]


def choose(low: float, high: float, relative_error: float) -> list[Inverse]:
    """Return inverses within a relative error, those with few levels first.

    Raises
    ------
    InvalidInput
        The interval is empty, or the error is not above 0.
    """
    if not relative_error > 0:
        raise InvalidInput(f"tolerance: got {relative_error}, expected a number above 0")
    found: list[tuple[int, Inverse]] = []
    for steps in range(1, 33):
        # past four steps the product form's factors lose more digits than they save
        if steps <= 4:
            found.append((steps, ProductInverse(low, high, steps)))
        found.append((steps + 1, ChebyshevInverse(low, high, steps)))
    good = [(levels, x) for levels, x in found if x.relative_error <= relative_error]
    return [x for _, x in sorted(good, key=lambda pair: pair[0])]
