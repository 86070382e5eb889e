"""Where sums of products lose nothing, being multiples of one power of two below 2**53 of it; bounds of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALL", "divided", "grain", "head_bits", "lossless", "most", "radius_sum", "row_sum"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
ALL = 1 + 2.0**-30
"""More than the rounding of a sum of fewer than 2**22 numbers above 0, in any order."""
BITS = 2.0**53
TINY, HUGE = 2.0**-800, 2.0**1000
"""Products of slices of numbers whose product is between these neither underflow nor overflow."""


def head_bits(k: int, level: int) -> int:
    """Return the width b of a head: k · level · (2**b + 1)**2 <= 2**53, so that its products sum exactly."""
    return int((52.99 - np.log2(max(k * max(level, 1), 1))) // 2)


def grain(x: Float, axis: int | None = None) -> Any:
    """Return the largest power of two's exponent, of which all finite numbers are multiples; inf of zeros alone."""
    part, exponent = np.frexp(x)
    whole = np.ldexp(part, 53).astype(np.int64)
    lowest = np.log2(np.maximum(whole & -whole, 1).astype(np.float64))
    units = np.where(whole == 0, np.inf, exponent - 53 + lowest)
    return units.min(axis=axis, keepdims=axis is not None, initial=np.inf)


def lossless(a: Any, b: Any, size: Any, pairs: list[tuple[Float, Float]]) -> Any:
    """Tell which numbers of a product of exact matrices are exact, (n, 1) or (n, m).

    Parameters
    ----------
    a, b : Bounded
        The matrices (n, k) and (k, m), whose radii are 0.
    size : array
        Above the sum of a number's products' sizes, (n, 1) or (n, m).
    pairs : list of (array, array)
        What the rounded level multiplies; at level 0 these are the matrices.

    Adding up exact levels rounds nothing: in the first one's unit the sum is below 2**53, what it leaves is below 2,
    and all are multiples of the last one's unit, 2**-(2 b + 2) with b at most 25.
    """
    none = np.zeros((len(a.h), 1), bool)
    if a.l.any() or b.l.any() or not (size < HUGE).all():
        return none
    if a.f.level:
        clean = ~np.logical_or.reduce([none, *(x.any(1, keepdims=True) for x, _ in pairs)])
        return clean if clean.any() and _least(a) * _least(b) >= TINY else none
    unit = b.kept.get("grain")
    if unit is None:
        unit = b.kept["grain"] = float(grain(b.h))

    def whole(part: Float) -> Any:
        units = grain(part, 1) + unit
        return (units >= -1074) & (size <= BITS * np.exp2(np.clip(units, -1080, 900)))

    return whole(a.h) if whole(a.h[:, :1]).any() else none


def divided(x: Any, by: Any) -> Any:
    """Tell which quotients are exact: those of 0, and those by powers of two that stay within the range of float64."""
    zero = (x.h == 0) & (x.l == 0) & (x.r == 0)
    size = np.abs(by.h)
    point = (x.r == 0) & (by.r == 0) & (by.l == 0) & (np.frexp(size)[0] == 0.5) & (size > 2.0**-100) & (size < 2.0**100)
    if not point.any():
        return zero
    near = [(part == 0) | ((np.abs(part) >= TINY) & (np.abs(part) < 1 / TINY)) for part in (x.h, x.l)]
    return zero | (point & near[0] & near[1])


def row_sum(x: Any) -> Any:
    """Return a bound of the sum of each row's sizes, (n, 1)."""
    return np.abs(x).sum(1, keepdims=True) * ALL


def most(x: Any, wide: bool) -> Any:
    """Return the largest size of each column, (1, m), or of all where the matrix is wide, (1, 1)."""
    top = np.abs(x).max(0, keepdims=True)
    return top.max(1, keepdims=True) if wide else top


def radius_sum(x: Any) -> Any:
    """Return a bound of the sum of each row's radii, (n, 1)."""
    rest: Any = x.rest.sum(1, keepdims=True) if x.rest.shape[1] > 1 else x.rest * float(x.h.shape[1])
    if x.relative is None:
        return rest * ALL
    if x.relative.shape[1] > 1:
        return (rest + (x.relative * np.abs(x.h)).sum(1, keepdims=True)) * ALL
    return (rest + x.relative * row_sum(x.h)) * ALL


def _least(x: Any) -> float:
    """Return the smallest size of a number that is not 0."""
    if "least" not in x.kept:
        size = np.abs(x.h)
        x.kept["least"] = float(np.where(size > 0, size, np.inf).min(initial=np.inf))
    return float(x.kept["least"])
