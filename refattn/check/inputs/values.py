"""Families of numbers: query, key and value of any shapes, for problems that are drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .draw import Draw, Float

__all__ = ["RARE", "VALUES", "numbers"]

Shape = tuple[int, ...]
Parts = tuple[Float, Float, Float]


def numbers(family: str, d: Draw, q: Shape, k: Shape, v: Shape) -> Parts:
    """Return query, key and value of a family, float64, not yet rounded to the format.

    Parameters
    ----------
    family : str
        Out of ``VALUES``.
    d : Draw
        The format and the generator.
    q, k, v : tuple of int
        The shapes (b, h_q, n_q, d_k), (b, h_kv, n_k, d_k) and (b, h_kv, n_k, d_v); lengths may be 0.
    """
    return BUILDERS[family](d, q, k, v)


def _normal(d: Draw, q: Shape, k: Shape, v: Shape) -> Parts:
    return d.normal(*q), d.normal(*k), d.normal(*v)


def _integers(d: Draw, q: Shape, k: Shape, v: Shape) -> Parts:
    x, y, z = (d.rng.integers(-n, n + 1, s).astype(np.float64) for n, s in ((1, q), (1, k), (3, v)))
    return x, y, z


def _peaked(d: Draw, q: Shape, k: Shape, v: Shape) -> Parts:
    x, y, z = _normal(d, q, k, v)
    at = int(d.rng.integers(0, max(1, k[2])))
    x[..., 0], y[..., 0] = 6, 0
    y[..., at : at + 1, 0] = 6 * np.sqrt(k[3])  # 36 above the others at the usual scale
    return x, y, z


def _probe(d: Draw, q: Shape, k: Shape, v: Shape) -> Parts:
    x, y, _ = _normal(d, q, k, v)
    return x, y, np.broadcast_to(128.0 * (np.arange(v[2])[:, None] % v[3] == np.arange(v[3])), v)


def _head_scales(d: Draw, q: Shape, k: Shape, v: Shape) -> Parts:
    x, y, z = _normal(d, q, k, v)
    return x, y, z * 2.0 ** d.rng.choice((-6, -3, 3, 6), (1, v[1], 1, 1))


def _shifted(d: Draw, q: Shape, k: Shape, v: Shape) -> Parts:
    x, y, z = _normal(d, q, k, v)
    size = float(d.rng.choice((20.0, 420.0)))
    x[..., 0], y[..., 0] = size, size * float(d.rng.choice((-1.0, 1.0)))
    return x, y, z


def _near_tie(d: Draw, q: Shape, k: Shape, v: Shape) -> Parts:
    x, y, z = _normal(d, q, k, v)
    base = d.normal(1, 1, 1, q[3])
    return base * 100 + x / 10, base * 25 + y / 200, z


def _positive(d: Draw, q: Shape, k: Shape, v: Shape) -> Parts:
    x, y, z = (d.rng.uniform(0.5, 1, s) for s in (q, k, v))
    return x, y, z


def _similar_rows(d: Draw, q: Shape, k: Shape, v: Shape) -> Parts:
    x, y, z = _normal(d, q, k, v)
    return d.normal(1, 1, 1, q[3]) + x / 64, y, 1.5 + z / 64


def _extreme(d: Draw, q: Shape, k: Shape, v: Shape) -> Parts:
    x, y, z = _normal(d, q, k, v)
    if d.rng.random() < 0.5:
        return x / 64, y, np.where(z < 0, -1.75, 1.75) * 2.0**d.form.emax
    return x, y, z * d.form.smallest_normal / 4


BUILDERS: dict[str, Callable[[Draw, Shape, Shape, Shape], Parts]] = {
    "integers": _integers,
    "normal": _normal,
    "peaked": _peaked,
    "probe": _probe,
    "head_scales": _head_scales,
    "positive": _positive,
    "similar_rows": _similar_rows,
    "shifted": _shifted,
    "near_tie": _near_tie,
    "extreme": _extreme,
    "poison": _normal,
}
RARE = {"shifted": "shifted", "near_tie": "shifted", "extreme": "extreme"}  # and the checks that have them

VALUES = {
    "integers": "small integers: answers known by hand, ties",
    "normal": "standard normal numbers",
    "peaked": "one key far above all others",
    "probe": "one-hot values: the output shows the weights",
    "head_scales": "values 2**-6 to 2**6 times as large, each head its own",
    "positive": "no number below 0: sums only grow",
    "similar_rows": "rows that nearly agree, values with a common offset: biased rounding adds up",
    "shifted": "scores far from 0, of either sign",
    "near_tie": "large scores that nearly agree",
    "extreme": "values at the largest, or below the smallest normal, numbers of the format",
    "poison": "NaN and inf in keys and values that no row sees",
}
"""The families of numbers by name, the simplest first."""
