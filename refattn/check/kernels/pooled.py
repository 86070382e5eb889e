"""Our kernels, in NumPy, for softmax over pooled or sampled keys, and for softmax times a gate.

What a row sees and how often is written here, not taken from the operators' definitions. Float32 inside, weights
rounded to the input's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import from_float64, to_float64
from ...dtypes import FORMATS
from ...errors import UnsupportedProblem
from ...problem import Problem
from ...variants import variant_of
from .sparse import rows_with_keys

__all__ = ["pooled"]

Array = NDArray[Any]
Row = tuple[Array, Array, Array, Any]
Rows = Callable[[Array, Array, Array, Array, int, Any], Row]


def pooled(problem: Problem) -> Array | tuple[Array, Array]:
    """Return out (b, h_q, n_q, d_v) and, but for ``spark``, lse (b, h_q, n_q).

    Raises
    ------
    UnsupportedProblem
        Another operator.
    """
    if problem.variant not in ROWS:
        raise UnsupportedProblem(f"refattn-pooled: takes {', '.join(ROWS)}, got {problem.variant}")
    p, form = problem.to("numpy"), FORMATS[problem.dtype]
    variant, row = variant_of(p.variant), ROWS[p.variant]
    q, k, v = (to_float64(x).astype(np.float32) for x in (p.query, p.key, p.value))
    usual = 1 / np.sqrt(p.d_k) if variant.default_scale == "rsqrt" else 1
    out, lse = np.zeros(p.out_shape, np.float32), np.full(p.out_shape[:3], -np.inf, np.float32)
    with np.errstate(all="ignore"):
        for b, h, i, g, keys in rows_with_keys(p):
            own = {n: x[h % len(x)] if isinstance(x, tuple) else x for n, x in variant.settings(p).items()}
            own |= {"n_q": p.n_q, "n_k": p.n_k, "scale": np.float32(usual if p.scale is None else p.scale)}
            s, often, values, gate = row(q[b, h, i], k[b, g, keys], v[b, g, keys], keys, i, own)
            top = s.max(initial=-np.inf)
            w = np.exp(s - top) * often
            total = w.sum(dtype=np.float32)
            if total == 0:  # no key of the block, and none drawn
                continue
            w = form.round_array((w * gate).astype(np.float64)).astype(np.float32)
            out[b, h, i], lse[b, h, i] = (w @ values) / total, top + np.log(total)
    found = from_float64(form.round_array(out.astype(np.float64)), p.dtype)
    return (found, lse) if variant.has_lse else found


def _spark(q: Array, k: Array, v: Array, keys: Array, i: int, o: Any) -> Row:
    r = len(q) // 2 if o["predictor"] is None else o["predictor"]
    s, rest = ((k[:, at] @ q[at]) * o["scale"] for at in (slice(r), slice(r, None)))
    return s, np.ones_like(s), v, np.logaddexp(rest, np.float32(0))


def _codebook(q: Array, k: Array, v: Array, keys: Array, i: int, o: Any) -> Row:
    codes = np.arange(len(k)) if o["codes"] is None else np.array(o["codes"])
    names = np.unique(codes)
    sizes = np.array([(codes == c).sum() for c in names], np.float32)
    means, values = (np.array([x[codes == c].mean(0, dtype=np.float32) for c in names]) for x in (k, v))
    return (means @ q) * o["scale"], sizes, values, np.float32(1)


def _hyper(q: Array, k: Array, v: Array, keys: Array, i: int, o: Any) -> Row:
    n_q, n_k = o["n_q"], o["n_k"]
    many = -(-n_k // o["block_size"])
    row = i if o["order_q"] is None else o["order_q"].index(i)
    order = tuple(range(n_k)) if o["order_k"] is None else o["order_k"]
    place = np.array([order.index(j) for j in keys])
    own = place * many // n_k == row * many // n_q
    often = own.astype(np.float32)
    drawn = (o["drawn"] or ()) if many > 1 else ()
    for at in drawn:
        here = place == at
        often[here if o["mode"] == "released" else here & ~own] += np.float32(n_k / len(drawn))
    at = np.flatnonzero(often)
    return (k[at] @ q) * o["scale"], often[at], v[at], np.float32(1)


ROWS: dict[str, Rows] = {"codebook": _codebook, "spark": _spark, "hyper": _hyper}
"""By operator, of a row and the keys that it sees: scores, how often each counts, values, what multiplies weights."""
