"""The elementwise steps of the streaming path in NumPy; ``compiled.py`` has the same steps for numba.

Each works on one tile of r query rows and w keys, in place where it says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .doubledouble import exp2, two_prod, two_sum

__all__ = ["accumulate", "row_sums", "scores", "weights"]

Float = NDArray[np.float64]


def scores(levels: list[Float], c: float, c_low: float, h: Float, low: Float) -> None:
    """Write c · (sum of the levels) as a double-double into h and low."""
    s, s_low = levels[0], 0.0
    for x in levels[1:]:
        s, e = two_sum(s, x)
        s_low = s_low + e
    p, e = two_prod(s, c)
    h[...], low[...] = two_sum(p, e + (s * c_low + s_low * c))


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


def row_sums(p: Float, out: Float) -> None:
    """Write the sums of p (r, L + 1, w) over keys into out (r, L + 1); those of heads are exact in any order."""
    np.sum(p, axis=2, out=out)


def accumulate(h: Float, low: Float, x: Float) -> None:
    """Add x to the double-double h + low, in place."""
    s, e = two_sum(h, x)
    h[...] = s
    low += e


def names() -> dict[str, Any]:
    """Return the steps by name."""
    return {"scores": scores, "weights": weights, "row_sums": row_sums, "accumulate": accumulate}
