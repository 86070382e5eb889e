"""Norms of queries and keys in NumPy, as kernels take them, and the way back: for the tiled kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import to_float64
from ...masks import unused
from ...norms import NORMS
from ...problem import Problem

__all__ = ["normed", "unnormed"]

Array = NDArray[Any]


def normed(p: Problem, x: Array, which: int) -> Array:
    """Return queries (0) or keys (1) over their root mean square, times the norm's weights; as they are without."""
    w = getattr(p, NORMS[which])
    return x if w is None else x * _inverse_root(p, x) * to_float64(w).astype(x.dtype)


def unnormed(p: Problem, x: Array, g: Array, which: int) -> tuple[Array, Array]:
    """Return the gradients by queries (0) or keys (1), and by the norm's weights, of those by what was normed."""
    w, gone = to_float64(getattr(p, NORMS[which])).astype(x.dtype), unused(p)
    if gone is not None:
        x = np.where(gone[which][:, None, :, None], 0, x)
    x = np.where(np.isfinite(x).all(-1, keepdims=True), x, 0)  # a key that no row sees
    r = _inverse_root(p, x)
    back = r * (w * g - x * r * r * (x * w * g).mean(-1, keepdims=True))
    return back, (g * x * r).sum((0, 1, 2))


def _inverse_root(p: Problem, x: Array) -> Array:
    eps = x.dtype.type(p.norm_eps)
    return np.asarray(1 / np.sqrt((x * x).mean(-1, keepdims=True, dtype=x.dtype) + eps))
