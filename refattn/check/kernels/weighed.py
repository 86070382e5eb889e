"""Our kernel for operators with other weights than softmax's, in NumPy: it gathers a row's keys and weighs them.

A row's weights are written here, not taken from the operators' definitions. Float32 inside, P rounded to the input's
type before a gain; what a row is divided by is a sum of weights that are not rounded.
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
from .sparse import of_row, rows_with_keys

__all__ = ["weighed"]

Array = NDArray[Any]
Weigh = Callable[[Array, Array, dict[str, Any]], tuple[Array, Any, Any]]


def weighed(problem: Problem) -> Array | tuple[Array, Array]:
    """Return out (b, h_q, n_q, d_v), and of ``urpe`` lse (b, h_q, n_q).

    Raises
    ------
    UnsupportedProblem
        Another operator.
    """
    if problem.variant not in WEIGHTS:
        raise UnsupportedProblem(f"refattn-weighed: takes {', '.join(WEIGHTS)}, got {problem.variant}")
    p, form = problem.to("numpy"), FORMATS[problem.dtype]
    weigh, options = WEIGHTS[p.variant], variant_of(p.variant).settings(p)
    q, k, v = (to_float64(x).astype(np.float32) for x in (p.query, p.key, p.value))
    if p.scale is not None or p.variant == "urpe":  # the others have none
        q = q * np.float32(1 / np.sqrt(p.d_k) if p.scale is None else p.scale)
    out, lse = np.zeros(p.out_shape, np.float32), np.full(p.out_shape[:3], -np.inf, np.float32)
    with np.errstate(all="ignore"):
        for b, h, i, g, keys in rows_with_keys(p):
            s = k[b, g, keys] @ q[b, h, i]
            if p.bias is not None:
                s = s + to_float64(of_row(p.bias, b, h, i, p.n_k)[keys]).astype(np.float32)
            ahead = keys - i - (0 if p.causal == "top_left" else p.n_k - p.n_q)
            w, total, lse[b, h, i] = weigh(s, keys, options | {"bits": p.d_k})
            w = form.round_array(w.astype(np.float64)).astype(np.float32)
            if options.get("gain"):  # after the rounding: that of a gain alone would be the same in every row
                w = w * _gain(options["gain"][h % len(options["gain"])], ahead)
            out[b, h, i] = (w @ v[b, g, keys]) / total
    out = from_float64(form.round_array(out.astype(np.float64)), p.dtype)
    return (out, lse) if p.variant == "urpe" else out


def _relu(s: Array, keys: Array, o: dict[str, Any]) -> tuple[Array, Any, Any]:
    return np.maximum(s, 0), np.float32(len(keys) if o["normalize"] == "count" else 1), 0


def _ecoformer(s: Array, keys: Array, o: dict[str, Any]) -> tuple[Array, Any, Any]:
    w = s + np.float32(o["bits"] + 1)
    return w, w.sum(dtype=np.float32), 0


def _urpe(s: Array, keys: Array, o: dict[str, Any]) -> tuple[Array, Any, Any]:
    top = s.max()
    top = np.float32(0) if top == -np.inf else top
    e = np.exp(s - top)
    total = e.sum(dtype=np.float32)
    if total == 0:  # every bias is -inf
        return np.zeros_like(e), np.float32(1), -np.inf
    return e, total, top + np.log(total)


def _gain(row: tuple[float, ...], ahead: Array) -> Array:
    reach = len(row) // 2
    gain: Array = np.array(row, np.float32)
    return np.take(gain, np.clip(ahead, -reach, reach) + reach)


WEIGHTS: dict[str, Weigh] = {"relu": _relu, "ecoformer": _ecoformer, "urpe": _urpe}
"""By operator, from a row's scores: its weights, what their products with values are divided by, the lse."""
