"""Polynomials with integer coefficients and their slots, in double-double: about 97 bits where float64 has 53.

A polynomial p of degree below N has the slots p(z**(3**j)) for j < N/2, z = exp(i·pi/N). With c_k = p_k + i·p_(k + N/2)
those whose exponent is 1 modulo 4 are one Fourier transform of c_k·z**k of N/2 numbers; the others are conjugates.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..exact.doubledouble import U, constant, fast_two_sum, two_prod, two_sum
from ..exact.precision import precision
from .fast import compiled

__all__ = ["Pair", "coefficients", "error", "scaled", "slots", "spread"]

Float = NDArray[np.float64]
Pair = tuple[Any, Any]
"""A double-double: an unevaluated sum of two float64 arrays, or of two complex ones."""
ADD, MUL = 3 * U**2, 7 * U**2
"""Relative errors of a sum and of a product, for any signs (Joldes, Muller and Popescu, 2017; recalled)."""


def _add(a: Pair, b: Pair) -> Pair:
    s, e = two_sum(a[0], b[0])
    t, f = two_sum(a[1], b[1])
    s, e = fast_two_sum(s, e + t)
    return fast_two_sum(s, e + f)


def _negative(a: Pair) -> Pair:
    return -a[0], -a[1]


def _mul(a: Pair, b: Pair) -> Pair:
    p, e = two_prod(a[0], b[0])
    return fast_two_sum(p, e + (a[0] * b[1] + a[1] * b[0]))


def scaled(z: Pair, factor: float) -> Pair:
    """Return complex double-doubles times a float64 number, within MUL of it."""
    first, second = (np.ascontiguousarray(x, np.complex128).view(np.float64) for x in z)
    high, low = _mul((first, second), (np.float64(factor), np.float64(0.0)))
    return high.view(np.complex128), low.view(np.complex128)


Complex = tuple[Pair, Pair]
"""Real and imaginary parts."""


def _times(a: Complex, b: Complex) -> Complex:
    real = _add(_mul(a[0], b[0]), _negative(_mul(a[1], b[1])))
    return real, _add(_mul(a[0], b[1]), _mul(a[1], b[0]))


@lru_cache(maxsize=2)
def _roots(degree: int) -> Complex:
    """Return z**k for k < N."""
    with precision(200):
        turn = [flint.arb(k) / degree for k in range(degree)]
        parts = [np.array([constant(f(x)) for x in turn]).T for f in (flint.arb.cos_pi, flint.arb.sin_pi)]
    return tuple((np.ascontiguousarray(h), np.ascontiguousarray(low)) for h, low in parts)  # type: ignore[return-value]


def _at(x: Complex, where: Any) -> Complex:
    (a, b), (c, d) = x
    return (a[where], b[where]), (c[where], d[where])


def _transformed(x: Complex, degree: int) -> Complex:
    """Return sum_k x_k·exp(2i·pi·t·k / n) along the last axis, by Stockham's order of Cooley and Tukey's steps."""
    fast, n, stride = compiled(), degree // 2, 1
    if fast is not None:
        (a, b), (c, d) = _roots(degree)
        roots, some = np.stack([a, b, c, d]), np.stack([*x[0], *x[1]], -2)
        found = np.array([fast.turned(y, roots) for y in some.reshape(-1, 4, n)]).reshape(some.shape)
        return (found[..., 0, :], found[..., 1, :]), (found[..., 2, :], found[..., 3, :])
    x = _at(x, np.s_[..., None])
    while n > 1:
        half = n // 2
        a, b = _at(x, np.s_[..., :half, :]), _at(x, np.s_[..., half:, :])
        powers = _at(_roots(degree), np.s_[0 : 4 * stride * half : 4 * stride])
        sums = _add(a[0], b[0]), _add(a[1], b[1])
        rest = _times((_add(a[0], _negative(b[0])), _add(a[1], _negative(b[1]))), _at(powers, np.s_[:, None]))
        x = _joined(sums, rest, half, 2 * stride)
        n, stride = half, 2 * stride
    return _at(x, np.s_[..., 0, :])


def _joined(a: Complex, b: Complex, rows: int, columns: int) -> Complex:
    def one(u: Float, v: Float) -> Float:
        return np.stack([u, v], -2).reshape(*u.shape[:-2], rows, columns)

    (p, q), (r, s) = a, b
    return (one(p[0], r[0]), one(p[1], r[1])), (one(q[0], s[0]), one(q[1], s[1]))


@lru_cache(maxsize=4)
def _order(degree: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return, for each slot, where the transform has it, and whether as its conjugate."""
    exponents, power = np.empty(degree // 2, np.int64), 1
    for j in range(degree // 2):
        exponents[j], power = power, power * 3 % (2 * degree)
    turned = exponents % 4 == 3
    return (np.where(turned, 2 * degree - exponents, exponents) - 1) // 4, turned


def slots(p: Pair) -> Pair:
    """Return the slots of a polynomial.

    Parameters
    ----------
    p : pair of (..., N) float arrays
        Its coefficients.

    Returns
    -------
    pair of (..., N/2) complex arrays
    """
    degree = p[0].shape[-1]
    half = degree // 2
    c = (p[0][..., :half], p[1][..., :half]), (p[0][..., half:], p[1][..., half:])
    x = _transformed(_times(c, _at(_roots(degree), np.s_[:half])), degree)
    at, turned = _order(degree)
    (a, b), (c1, d) = _at(x, np.s_[..., at])
    sign = np.where(turned, -1.0, 1.0)
    return a + 1j * (sign * c1), b + 1j * (sign * d)


def coefficients(z: Pair) -> Pair:
    """Return the polynomial with given slots, its coefficients rounded to integers.

    Parameters
    ----------
    z : pair of (..., N/2) complex arrays
        The slots, times the scale.

    Returns
    -------
    pair of (..., N) float arrays
        Whole numbers, which add up to the coefficients.
    """
    degree = 2 * z[0].shape[-1]
    at, turned = _order(degree)
    found = np.empty((4, *z[0].shape))
    sign = np.where(turned, 1.0, -1.0)  # the inverse is the conjugate of the transform of the conjugate
    for row, values in enumerate((z[0].real, z[1].real, sign * z[0].imag, sign * z[1].imag)):
        found[row][..., at] = values
    x = _transformed(((found[0], found[1]), (found[2], found[3])), degree)
    # conjugated, times z**-k: the conjugate of x·z**k
    real, imaginary = _times(x, _at(_roots(degree), np.s_[: degree // 2]))
    each = 2.0 / degree  # a power of 2
    high = np.concatenate([real[0], -imaginary[0]], -1) * each
    low = np.concatenate([real[1], -imaginary[1]], -1) * each
    whole = np.rint(high)
    return whole, np.rint((high - whole) + low)


def error(degree: int) -> float:
    """Return a bound on a transform's error, in the Euclidean norm, relative to its result's.

    A step of a radix-2 transform is sqrt(2) times a unitary map. Of a complex sum the error is ADD of it, of a product
    with a root sqrt(2)·(ADD + MUL) of it and what the root itself is off by, 2**-105: 2·sqrt(2)·U**2. The last term
    bounds the products of errors.
    """
    step = ADD + math.sqrt(2) * (ADD + MUL + 2 * U**2) + ADD
    return (math.log2(degree) + 1) * step * (1 + 2.0**-40)


def spread(degree: int, modulus: int, chance: float = 2.0**-40) -> float:
    """Return what the slots of a polynomial with coefficients drawn modulo Q do not exceed, but for a chance.

    A uniform number about 0 of width Q is sub-Gaussian with its own variance Q**2/12, so a slot's real part is with
    N·Q**2/12 at most; so is its imaginary part; there are N of them in all, of two signs.
    """
    return modulus * math.sqrt(degree / 12 * 2 * math.log(2 * degree / chance)) * math.sqrt(2)
