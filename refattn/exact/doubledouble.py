"""Double-double building blocks in NumPy, without fused multiply-add; each with the bound that its proof gives.

A double-double h + l is an unevaluated sum of two float64 numbers. u = 2**-53. Proofs: docs/proofs/.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from .anywhere import beside
from .precision import precision

__all__ = ["EXP2_ERROR", "EXP2_FLOOR", "U", "constant", "exp2", "fast_two_sum", "table", "two_prod", "two_sum"]

Float = NDArray[np.float64]

U = 2.0**-53
EXP2_ERROR = 2.0**-92
"""Relative error of :func:`exp2` (docs/proofs/exp2.md)."""
EXP2_FLOOR = -250.0
"""Arguments below this give 0; the value that is lost is below 2**EXP2_FLOOR."""
TABLE_BITS = 12
TABLE = 2**TABLE_BITS


def two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """Return (s, e) with s = fl(a + b) and s + e = a + b exactly, barring overflow (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def fast_two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """Return what :func:`two_sum` does where abs(a) >= abs(b) or a is 0 (Dekker)."""
    s = a + b
    return s, b - (s - a)


def split(a: Any) -> tuple[Any, Any]:
    """Return a as the sum of two numbers of 26 bits, for abs(a) < 2**996 (Veltkamp)."""
    t = 134217729.0 * a
    h = t - (t - a)
    return h, a - h


def two_prod(a: Any, b: Any) -> tuple[Any, Any]:
    """Return (p, e) with p = fl(a * b) and p + e = a * b, exactly where no part of a product underflows (Dekker)."""
    p = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def constant(x: Any) -> tuple[float, float]:
    """Return an Arb ball (of 200 bits or more) as a double-double within 2**-105 of it, relatively."""
    h = float(x.mid())
    return h, float((x - flint.arb(h)).mid())


@lru_cache(maxsize=1)
def table() -> tuple[Float, Float, tuple[float, float]]:
    """Return 2**(i / TABLE) as two arrays, and log(2) / TABLE."""
    with precision(300):
        pairs = [constant(flint.arb(2) ** (flint.arb(i) / TABLE)) for i in range(TABLE)]
        log2 = constant(flint.arb(2).log() / TABLE)
    high, low = np.array(pairs).T
    return np.ascontiguousarray(high), np.ascontiguousarray(low), log2


def exp2(h: Float, low: Float) -> tuple[Float, Float]:
    """Return 2**(h + low) as a double-double.

    Parameters
    ----------
    h, low : float64 arrays
        A double-double with abs(low) <= 2**-52 abs(h) and h at most 1000.

    Returns
    -------
    tuple of float64 arrays
        Within ``EXP2_ERROR`` of the exact value, relatively, for h >= EXP2_FLOOR; 0 below.

    Notes
    -----
    h + low = k / 4096 + r with k an integer and abs(r) <= 2**-13 · 1.001; 2**(k / 4096) comes from a table, 2**r from a
    polynomial of degree 6 whose first two terms are double-double.
    """
    *powers, (c, c_low) = table()
    dead = ~(h >= EXP2_FLOOR)  # also where h is no number
    z = np.where(dead, EXP2_FLOOR, h) * TABLE
    k = np.rint(z)
    r, r_low = two_sum(z - k, np.where(dead, 0.0, low) * TABLE)
    index = k.astype(np.int64)
    i = index & (TABLE - 1)
    y, e = two_prod(r, c)
    y_low = e + (r * c_low + r_low * c)
    s = y * y
    a, b = split(y)
    s_low = ((a * a - s) + 2.0 * (a * b)) + b * b + 2.0 * (y * y_low)
    rest = (y * s) * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720))))
    q, e = fast_two_sum(y, 0.5 * s)
    q_low = e + (y_low + 0.5 * s_low) + rest
    t, t_low = (beside(h, x)[i] for x in powers)
    p, e = two_prod(t, q)
    out, e2 = fast_two_sum(t, p)
    low_part = e2 + (e + t * q_low + (t_low + t_low * q))
    out, low_part = fast_two_sum(out, low_part)
    power = (((index >> TABLE_BITS) + 1023) << 52).view(np.float64)
    if dead.any():
        power[dead] = 0.0
    return out * power, low_part * power
