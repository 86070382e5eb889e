"""The elementwise steps of the streaming path in NumPy; ``compiled.py`` has the same steps for numba.

Each works on one tile of r query rows and w keys, in place where it says so.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .anywhere import largest, power_above
from .doubledouble import EXP2_ERROR, EXP2_FLOOR, U, exp2, two_prod, two_sum

__all__ = [
    "accumulate",
    "capped",
    "cut",
    "damped",
    "gains",
    "gradient_weights",
    "places",
    "row_sum_error",
    "row_sums",
    "scores",
    "steps",
    "weights",
]

Float = NDArray[np.float64]


@lru_cache(maxsize=1)
def steps() -> Any:
    """Return these steps: compiled where numba is here, NumPy's otherwise."""
    try:
        from . import compiled
    except ImportError:
        return sys.modules[__name__]
    return compiled


def places(x: Float, b: int, level: int) -> Float:
    """Return what is added to a row's numbers and taken off again to leave its heads of b bits, (L, n)."""
    if not level:
        return np.empty((0, len(x)))
    return np.outer([1.5 * 2.0 ** (52 - b - s * (b + 1)) for s in range(level)], power_above(largest(np.abs(x), 1)))


def cut(x: Float, y: Float, sigma: Float, heads: Float, tails: Float) -> None:
    """Cut a double-double x + y (n, m) along rows into heads (L, n, m), leaving tails (L + 1, n, m); sigma (L, n)."""
    tails[0] = x + y
    for s, c in enumerate(sigma[..., None]):
        heads[s] = (x + c) - c
        x, y = two_sum(x - heads[s], y)
        tails[s + 1] = x + y


def scores(levels: list[Float], c: float, c_low: float, h: Float, low: Float) -> None:
    """Write c · (sum of the levels) as a double-double into h and low."""
    s, s_low = levels[0], 0.0
    for x in levels[1:]:
        s, e = two_sum(s, x)
        s_low = s_low + e
    p, e = two_prod(s, c)
    h[...], low[...] = two_sum(p, e + (s * c_low + s_low * c))


CAPPED_ERROR = EXP2_ERROR + 64 * U * U
"""The error of :func:`capped`, over the cap in base 2 (docs/proofs/streaming.md)."""


def capped(h: Float, low: Float, k: tuple[float, float], c: tuple[float, float]) -> None:
    """Replace scores x = h + low in base 2 by c tanh(x ln 2 / cap), in place: c is the cap in base 2, k is 2 / cap."""
    minus = h < 0
    x, x_low = np.where(minus, -h, h), np.where(minus, -low, low)
    z, e = two_prod(x, k[0])
    far = ~(z < -EXP2_FLOOR)  # 1 but for 2**-249
    z, z_low = two_sum(np.where(far, -EXP2_FLOOR, z), np.where(far, 0.0, e + (x * k[1] + x_low * k[0])))
    w, e = exp2(z, z_low)
    w, w_low = two_sum(w, 1.0)
    w, w_low = two_sum(w, w_low + e)
    q = 2.0 / w
    p, e = two_prod(q, w)
    t, t_low = two_sum(1.0, -q)
    t, t_low = two_sum(t, t_low - (((2.0 - p) - e) - q * w_low) / w)
    p, e = two_prod(t, c[0])
    p, e = two_sum(p, e + (t * c[1] + t_low * c[0]))
    h[...], low[...] = np.where(minus, -p, p), np.where(minus, -e, e)


def gains(h: Float, low: Float, per_cap: tuple[float, float], gain: Float, gain_low: Float) -> None:
    """Write the softcap's slopes 1 - (x / cap)**2 at capped scores x = h + low; per_cap is 1 / cap as two numbers."""
    p, e = two_prod(h, per_cap[0])
    y, y_low = two_sum(p, e + (h * per_cap[1] + low * per_cap[0]))
    p, e = two_prod(y, y)
    p, rest = two_sum(p, e + 2 * (y * y_low))
    s, e = two_sum(1.0, -p)
    gain[...], gain_low[...] = two_sum(s, e - rest)


def damped(products: Float, gain: Float, gain_low: Float, sigma: Float) -> None:
    """Multiply products (r, L + 1, w), heads and tail, by gain + gain_low (r, w), in place, and cut them again."""
    h, low = products[:, 0], 0.0
    for s in range(1, products.shape[1]):
        h, e = two_sum(h, products[:, s])
        low = low + e
    p, e = two_prod(h, gain)
    high, rest = two_sum(p, e + (h * gain_low + low * gain))
    for s, cut in enumerate(sigma):
        head = (high + cut) - cut
        products[:, s] = head
        high, rest = two_sum(high - head, rest)
    products[:, len(sigma)] = high + rest


def weights(h: Float, low: Float, m: Float, sigma: Float, out: Float) -> None:
    """Write 2**(h + low - m) as heads and tail into out (r, L + 1, w); sigma (L,) cuts the heads off."""
    z, e = two_sum(h, -m[:, None])
    z, z_low = two_sum(z, np.where(np.isfinite(z), e + low, 0.0))
    x, y = exp2(z, z_low)
    for s, cut in enumerate(sigma):
        head = (x + cut) - cut
        out[:, s] = head
        x, y = two_sum(x - head, y)
    out[:, len(sigma)] = x + y


def gradient_weights(
    h: Float, low: Float, m: Float, g: Float, g_low: Float, d: Float, d_low: Float, unit: Float, sigma: Float,
    out: Float, out_g: Float,
) -> None:  # fmt: skip
    """Write weights w = 2**(h + low - m) into out and w · (g + g_low - d - d_low) · unit into out_g, both cut."""
    z, e = two_sum(h, -m[:, None])
    z, z_low = two_sum(z, np.where(np.isfinite(z), e + low, 0.0))
    x, y = exp2(z, z_low)
    a, e = two_sum(g, -d[:, None])
    a, a_low = two_sum(a, e + (g_low - d_low[:, None]))
    a, a_low = a * unit[:, None], a_low * unit[:, None]
    p, e = two_prod(x, a)
    p, p_low = two_sum(p, e + (x * a_low + y * a))
    for high, rest, to in ((x, y, out), (p, p_low, out_g)):
        for s, cut in enumerate(sigma):
            head = (high + cut) - cut
            to[:, s] = head
            high, rest = two_sum(high - head, rest)
        to[:, len(sigma)] = high + rest


def row_sums(p: Float, out: Float) -> None:
    """Write the sums of p (r, L + 1, w) over keys into out (r, L + 1), within :func:`row_sum_error`."""
    np.sum(p, axis=2, out=out)


def row_sum_error(w: int) -> float:
    """Return the error of a sum over w keys, over the sum of absolute values: NumPy sums its fast axis pairwise."""
    return (w / 16 + 40) * U * (1 + 2.0**-30)


def accumulate(h: Float, low: Float, x: Float) -> None:
    """Add x to the double-double h + low, in place."""
    s, e = two_sum(h, x)
    h[...], low[...] = two_sum(s, low + e)
