"""Polynomials in place of functions on an interval: nearly the best that there are, with their certified error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from ..errors import InvalidInput, UnsupportedProblem
from .inverse import product

__all__ = ["ACTIVATIONS", "Activation", "Polynomial", "activation", "inverse_sqrt", "sigmoids"]

Float = NDArray[np.float64]
POINTS = 1 << 18
"""Points at which an error is evaluated; slopes bound it between them."""
DEGREES = range(1, 16)


@dataclass(frozen=True)
class Polynomial:
    """A polynomial near a function f on [low, high].

    Attributes
    ----------
    low, high : float
        The interval.
    coefficients : tuple of float
        Of Chebyshev polynomials in w = (2x - low - high) / (high - low).
    error : float
        A bound on ``weight(x)·|f(x) - p(x)|`` there: the largest at many points, and what slopes allow between.
    """

    low: float
    high: float
    coefficients: tuple[float, ...]
    error: float

    @property
    def degree(self) -> int:
        """The degree."""
        return len(self.coefficients) - 1

    def __call__(self, x: Float) -> Float:
        """Return p(x) in float64."""
        w = (2 * np.asarray(x, np.float64) - self.low - self.high) / (self.high - self.low)
        return np.asarray(chebyshev.chebval(w, self.coefficients))

    def factors(self) -> tuple[float, list[tuple[float, ...]]]:
        """Return c and monic factors in w, as coefficients from the constant up: p = c times all of them."""
        roots = chebyshev.chebroots(self.coefficients)
        real = sorted(float(r.real) for r in roots if abs(r.imag) < 1e-12)
        found: list[tuple[float, ...]] = [
            (float(abs(r) ** 2), float(-2 * r.real), 1.0) for r in roots if r.imag > 1e-12
        ]
        while len(real) > 1:  # a small root beside a large one
            a, b = real.pop(0), real.pop()
            found.append((a * b, -(a + b), 1.0))
        found += [(-r, 1.0) for r in real]
        return self.coefficients[-1] * 2.0 ** (self.degree - 1), found

    def apply(self, m: Any, w: Any) -> list[Any]:
        """Return the monic factors by an arithmetic, of a ciphertext of w; all but the constant c."""
        square, found = None, []
        for constant, *rest in self.factors()[1]:
            if len(rest) == 1:
                found.append(m.add_constant(w, constant))
                continue
            if square is None:
                square = m.relinearize(m.square(w))
            z = m.add(m.times_constant(w, rest[0]), square)
            found.append(m.rescale(m.add_constant(z, constant)))
        return found


def _fit(f: Float, w: Float, weight: Float, degree: int) -> Float:
    """Return Chebyshev coefficients with nearly the least largest weighted error, by Lawson's iteration."""
    basis = chebyshev.chebvander(w, degree) * weight[:, None]
    share = np.full(len(w), 1 / len(w))
    best, least = np.zeros(degree + 1), math.inf
    for _ in range(60):
        root = np.sqrt(share)[:, None]
        found = np.linalg.lstsq(basis * root, f * weight * root[:, 0], rcond=None)[0]
        error = np.abs(f * weight - basis @ found)
        if error.max() < least:
            best, least = found, float(error.max())
        if least < 1e-14:
            break
        share = share * error
        share /= share.sum()
    return best


def _certified(
    f: Callable[[Float], Float], low: float, high: float, degree: int, slope: float,
    weight: Callable[[Float], Float] = np.ones_like, weight_slope: float = 0.0, tolerance: float = math.inf,
) -> Polynomial:  # fmt: skip
    """Return a polynomial of a degree with its error; where some points show one above the tolerance, with that.

    ``slope`` and ``weight_slope`` bound the derivatives of f and of the weight, both in x.
    """
    w = np.cos(np.linspace(0, math.pi, 40 * (degree + 2)))
    x = low + (w + 1) * (high - low) / 2
    coefficients = tuple(float(c) for c in _fit(f(x), w, weight(x), degree))
    made = Polynomial(low, high, coefficients, math.inf)
    seen = float((np.abs(f(x) - made(x)) * weight(x)).max())
    if seen > tolerance:
        return Polynomial(low, high, coefficients, seen)
    x = np.linspace(low, high, POINTS)
    difference = np.abs(f(x) - made(x))
    # Markov: |T_k'| <= k**2
    steep = 2 / (high - low) * sum(k * k * abs(c) for k, c in enumerate(coefficients))
    largest = float(weight(x).max())
    half = (high - low) / (POINTS - 1) / 2
    between = half * (largest * (slope + steep) + weight_slope * (float(difference.max()) + half * (slope + steep)))
    rounding = 1e-13 * largest * (1 + sum(abs(c) for c in coefficients) + float(np.abs(f(x)).max()))
    error = float((difference * weight(x)).max()) + between + rounding
    return Polynomial(low, high, coefficients, error)


def inverse_sqrt(low: float, high: float, tolerance: float, most: int = 14) -> Polynomial:
    """Return the polynomial of least even degree near 1/sqrt(x) on [low, high].

    Parameters
    ----------
    low, high : float
        The interval, above 0.
    tolerance : float
        The largest relative error, ``error`` of the result: ``|1 - sqrt(x)·p(x)|``.
    most : int
        The largest degree.

    Raises
    ------
    InvalidInput
        The interval is empty or reaches 0, or the tolerance is not above 0.
    UnsupportedProblem
        No polynomial up to the largest degree is near enough.
    """
    if not (0 < low < high and math.isfinite(high)):
        raise InvalidInput(f"inverse_sqrt: got the interval ({low}, {high}), expected 0 < low < high")
    _check_tolerance(tolerance)
    for degree in range(2, most + 1, 2):
        slopes = low**-1.5 / 2, np.sqrt, 1 / (2 * math.sqrt(low))
        made = _certified(lambda x: 1 / np.sqrt(x), low, high, degree, *slopes, tolerance)
        if made.error <= tolerance:
            return made
    raise UnsupportedProblem(
        f"inverse_sqrt: degree {most} has a relative error of {made.error:.2g} on ({low:.3g}, {high:.3g}), above "
        f"{tolerance:.2g}; narrow the interval"
    )


def sigmoids(low: float, high: float, tolerance: float, count: int, most: int = 31) -> list[Polynomial]:
    """Return polynomials of odd degree near 1/(1 + exp(-x)) on [low, high]: the least within a tolerance, and the next.

    Their error is that of the product of factors, as it is computed, in float64.

    Parameters
    ----------
    low, high : float
        The interval.
    tolerance : float
        The largest error wanted.
    count : int
        How many.
    most : int
        The largest degree.

    Raises
    ------
    InvalidInput
        The interval is empty or not finite, or the tolerance is not above 0.
    UnsupportedProblem
        No polynomial up to the largest degree is near enough.
    """
    if not (-math.inf < low < high < math.inf):
        raise InvalidInput(f"sigmoids: got the interval ({low}, {high}), expected low < high")
    _check_tolerance(tolerance)

    def f(x: Float) -> Float:
        return np.asarray((1 + np.tanh(x / 2)) / 2)

    half, found = (high - low) / 2, []  # type: float, list[Polynomial]
    points = np.linspace(-1, 1, 4001)
    for degree in range(1, most + 1, 2):
        nodes = chebyshev.chebpts1(degree + 1)
        near = chebyshev.chebfit(nodes, f(low + (nodes + 1) * half), degree)
        seen = float(np.abs(f(low + (points + 1) * half) - chebyshev.chebval(points, near)).max())
        # interpolation's error is at most 2 + 2/pi·log(n + 1) times the best polynomial's
        if seen > tolerance * (2 + 2 / math.pi * math.log(degree + 1)):
            continue
        w = np.cos(np.linspace(0, math.pi, 40 * (degree + 2)))
        x = low + (w + 1) * (high - low) / 2
        coefficients = tuple(float(c) for c in _fit(f(x), w, np.ones_like(w), degree))
        made = Polynomial(low, high, coefficients, math.inf)
        if np.abs(f(x) - made(x)).max() <= tolerance:
            made = Polynomial(low, high, coefficients, _sigmoid_error(f, made))
            if made.error <= tolerance:
                found.append(made)
        if len(found) == count:
            break
    if not found:
        raise UnsupportedProblem(
            f"he: no polynomial up to degree {most} is within {tolerance:.2g} of the sigmoid on ({low:.3g}, "
            f"{high:.3g}); narrow the interval"
        )
    return found


def _sigmoid_error(f: Callable[[Float], Float], p: Polynomial) -> float:
    """Return a bound on a polynomial's error, by its factors: at many points, and by second derivatives between."""
    w = np.linspace(-1, 1, POINTS)
    constant, factors = p.factors()
    x, of = p.low + (w + 1) * (p.high - p.low) / 2, np.full_like(w, constant)
    for factor in factors:
        of *= np.polynomial.polynomial.polyval(w, factor)
    half = (p.high - p.low) / 2
    # Markov: |T_k''| <= k**2 (k**2 - 1) / 3; the sigmoid's is at most 1/(6 sqrt(3))
    bend = sum(k * k * (k * k - 1) / 3 * abs(c) for k, c in enumerate(p.coefficients)) + half**2 / (6 * math.sqrt(3))
    rounding = 1e-13 * (2 + sum(abs(c) for c in p.coefficients))
    return float(np.abs(f(x) - of).max()) + (2 / (POINTS - 1)) ** 2 / 8 * bend + rounding


@dataclass(frozen=True)
class Activation:
    """f(u) = u/2 + e(u**2) on [-most, most], e a polynomial.

    Attributes
    ----------
    name : str
        Out of ``ACTIVATIONS``.
    most : float
        The largest size of an input.
    even : Polynomial
        e, of t = (u / most)**2 on [0, 1]. Its error is the largest of ``|f(u) - u/2 - e|``.
    """

    name: str
    most: float
    even: Polynomial

    @property
    def error(self) -> float:
        """The bound on the error, for inputs of at most ``most``."""
        return self.even.error

    def __call__(self, u: Float) -> Float:
        """Return the stand-in's value in float64."""
        u = np.asarray(u, np.float64)
        return u / 2 + self.even((u / self.most) ** 2)

    @property
    def constant(self) -> float:
        """What `apply` leaves to be multiplied with."""
        return self.even.factors()[0]

    def apply(self, m: Any, u: Any) -> Any:
        """Return f(most·u) / constant by an arithmetic, of a ciphertext of u in [-1, 1]."""
        if self.even.degree == 1:  # a square and a product at one scale: no level between
            square = m.relinearize(m.square(u))
            both = m.add(m.add(square, square), m.times_constant(u, self.most / 2 / self.constant))
            return m.add_constant(m.rescale(both), self.even.factors()[1][0][0] - 1.0)
        t = m.rescale(m.relinearize(m.square(u)))
        even = product(m, self.even.apply(m, m.add_constant(m.add(t, t), -1.0)))
        half = m.rescale(m.times_constant(u, self.most / 2 / self.constant))
        return m.add(even, m.like(half, even))


def _gelu(u: Float) -> Float:
    return np.asarray(u / 2 * (1 + np.vectorize(math.erf, otypes=[np.float64])(u / math.sqrt(2))))


def _silu(u: Float) -> Float:
    return np.asarray(u / (1 + np.exp(-u)))


ACTIVATIONS: dict[str, tuple[Callable[[Float], Float], float]] = {"gelu": (_gelu, 0.8), "silu": (_silu, 0.5)}
"""Functions f with f(u) - u/2 even, and the largest size of their second derivatives: at 0, 2/sqrt(2·pi) and 1/2."""


def activation(name: str, most: float, tolerance: float) -> Activation:
    """Return the polynomial of least degree near an activation on [-most, most].

    Parameters
    ----------
    name : str
        "gelu" (the exact one, by erf) or "silu".
    most : float
        The largest size of an input.
    tolerance : float
        The largest error wanted.

    Raises
    ------
    InvalidInput
        An unknown name, or an interval or a tolerance not above 0.
    UnsupportedProblem
        No degree up to 30 is near enough.
    """
    if name not in ACTIVATIONS:
        raise InvalidInput(f"activation: got {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    if not (0 < most < math.inf):
        raise InvalidInput(f"activation: got a largest input of {most}, expected a finite number above 0")
    _check_tolerance(tolerance)
    f, second = ACTIVATIONS[name]

    def even(t: Float) -> Float:
        u = most * np.sqrt(t)
        return np.asarray(f(u) - u / 2)

    for degree in DEGREES:
        made = Activation(name, most, _certified(even, 0.0, 1.0, degree, second * most**2 / 2, tolerance=tolerance))
        if made.error <= tolerance:
            return made
    raise UnsupportedProblem(
        f"activation: {name} on [-{most:g}, {most:g}] is within {made.error:.2g} at degree {2 * DEGREES[-1]}, "
        f"above {tolerance:.2g}; narrow the interval"
    )


def _check_tolerance(tolerance: float) -> None:
    if not tolerance > 0:
        raise InvalidInput(f"tolerance: got {tolerance}, expected a number above 0")
