r"""The errors that a right kernel of a model should show: a predicted variance for every element.

Roundings are taken as independent. One to nearest, of a number whose mantissa is spread as mantissas are, has the
variance ``C u^2`` of its square with C = 3 / (8 ln 2) / 3. A dot product of d terms t_k adds up partial sums that
wander from 0 to s = sum t_k, so it loses ``C u^2 (depth (s^2 / 3 + T / 6) + T)`` with T = sum t_k^2. The exponential
is off by up to exp_ulps, evenly. The variances meet as in the bounds (``bounds.py``, ``gradient_bounds.py``), squares
in place of sizes. Derived in docs/proofs/bounds.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_float64
from ..dtypes import FORMATS, format_of
from ..exact.driver import Answer
from ..exact.slabs import Slab, slabs
from ..variants import variant_of
from .bounds import floor
from .call import SOURCES
from .model import Model, inside_type
from .operands import C, variance

__all__ = ["predict"]

Float = NDArray[np.float64]
WILD = 1 / 16
"""The variance of a score from which on errors are not proportional to roundings, and nothing is predicted."""


def predict(answer: Answer, model: Model, dout: Any = None) -> dict[str, Float]:
    """Return the predicted variance of the error of every element of out, and of dq, dk and dv with `dout`.

    NaN where the scores' errors are too large to foresee what they do.

    Parameters
    ----------
    answer : Answer
        The exact answer of a softmax call, with gradients where `dout` is given.
    model : Model
        The kernel's rounding model.
    dout : (b, h_q, n_q, d_v) array, optional
        The gradient arriving at out.
    """
    p = answer.problem.to("numpy")
    # what operands lose is the same wherever they are multiplied: only out's is followed through
    names = ["out"] if dout is None or model.operands else ["out", "dq", "dk", "dv"]
    total = {n: np.zeros(answer.enclosures[n].mid.shape) for n in names}
    arriving = None if dout is None else to_float64(dout)
    for slab in slabs(p):
        at = (slab.batch, slab.head, slab.rows)
        arriving_here = arriving[at] if arriving is not None and "dq" in names else None
        with np.errstate(all="ignore"):
            _head(slab, model, answer.enclosures["out"].mid[at], arriving_here, total)
    for n, x in total.items():
        form = FORMATS[p.dtype if n == "out" else getattr(p, SOURCES[n]).dtype.name]
        with np.errstate(over="ignore"):
            total[n] = x + form.ulp_array(answer.enclosures[n].mid) ** 2 / 12
    return total


def _dot(model: Model, n: Any, s: Float, squares: Float) -> Float:
    """Return the variance of a sum of n rounded products, over C u^2."""
    return np.asarray(model.depth(n) * (s * s / 3 + squares / 6) + squares)


def _head(slab: Slab, model: Model, o: Float, dout: Float | None, total: Any) -> None:
    """Add one head's variances, the results' own rounding apart."""
    p, inside = slab.problem, format_of(model.accumulator)
    cu, cu_p = C * inside.unit_roundoff**2, C * model.loss(model.weights) ** 2
    plain, q, k, v = slab.plain(), slab.q, slab.k, slab.v
    s = variant_of(p.variant).sensitivity(q, k, plain)
    assert s.denominator is not None
    assert s.lse is not None
    weights = s.weights / np.where(s.denominator > 0, s.denominator, 1.0)[:, None]
    scale = float(plain.scale)
    raw, squares = q @ k.T * scale, (q * q) @ (k * k).T * scale**2
    slope: Any = 1.0 if p.softcap is None else 1 - np.tanh(raw / p.softcap) ** 2
    var_w = cu * (_dot(model, q.shape[1], raw, squares) + raw**2) * slope**2 + cu * s.roundings**2
    var_w = var_w + C * model.loss(model.scores) ** 2 * s.roundings**2
    if model.operands:
        var_w = var_w + (scale * slope) ** 2 * ((q * q) @ variance(k, p.key, model).T)
    tiles = np.ceil(k.shape[0] / model.tile)
    var_w = var_w + (inside.unit_roundoff * model.exp_ulps) ** 2 / 3 + (s.relative + tiles) * cu
    wild = (np.where(slab.allowed, var_w, 0.0).max(1, initial=0.0) > WILD)[:, None]
    var_w = np.where(wild, 1.0, var_w)
    merges = 4 * model.merges(k.shape[0])
    w2, v2, n = weights**2, v * v, slab.allowed.sum(1, keepdims=True)
    o = np.nan_to_num(o, posinf=0, neginf=0)
    moved = (w2 * var_w) @ v2 - 2 * o * ((w2 * var_w) @ v) + o * o * (w2 * var_w).sum(1, keepdims=True)
    out = np.maximum(moved, 0) + cu_p * (w2 @ v2) + cu * (_dot(model, n, o, w2 @ v2) + (tiles + 3 + merges) * o * o)
    if model.operands:
        out = out + w2 @ variance(v, p.value, model) + scale**2 * _moved_by_queries(slab, weights * slope, o, model)
    # underflow: of a weight, of a product or a running sum
    tiny_w, tiny = (floor(form, model) ** 2 / 3 for form in (inside_type(model.weights), inside))
    seen = slab.allowed.astype(np.float64)
    out = out + max(tiny_w, tiny) * (seen @ v2) + tiny * (n + tiles)
    at, keys = (slab.batch, slab.head, slab.rows), (slab.batch, slab.head_kv, slab.keys)
    total["out"][at] = np.where(wild, np.nan, out)
    if dout is None:
        return
    out = out + FORMATS[p.dtype].ulp_array(o) ** 2 / 12
    g2, dp = dout * dout, dout @ v.T
    var_dp = cu * _dot(model, v.shape[1], dp, g2 @ v2.T) + C * model.loss(model.scores) ** 2 * dp * dp
    var_d = (g2 * out).sum(1, keepdims=True) + cu * (g2 * o * o).sum(1, keepdims=True)
    x = dp - (dout * o).sum(1, keepdims=True)
    lse = np.where(slab.allowed.any(1), np.nan_to_num(s.lse, neginf=0.0), 0.0)[:, None]
    var_p = var_w + cu * ((2 + 2 * model.merges(k.shape[0])) * (lse**2 + 2))
    ds = weights * x * slope
    own = slope**2 * w2 * (x * x * (var_p + 2 * cu) + var_dp) + cu_p * ds * ds
    mean_k = (weights * slope) @ k
    rows = q.shape[0] * (p.heads // p.heads_kv)
    dq = scale**2 * (own @ (k * k) + var_d * mean_k**2 + cu * _dot(model, n, ds @ k, ds**2 @ (k * k)))
    tiny_s = tiny + scale**2 * max(tiny_w, tiny)
    total["dq"][at] = np.where(wild, np.nan, dq + tiny_s * (seen @ (k * k)) + tiny * (n + tiles))
    dk = (own + slope**2 * w2 * var_d).T @ (q * q)
    dk = scale**2 * (dk + cu * _dot(model, rows, ds.T @ q, (ds**2).T @ (q * q)))
    total["dk"][keys] += dk + tiny_s * (seen.T @ (q * q)) + tiny * rows
    dv = (w2 * (var_p + cu_p)).T @ g2
    dv = dv + cu * _dot(model, rows, weights.T @ dout, w2.T @ g2)
    total["dv"][keys] += dv + max(tiny_w, tiny) * (seen.T @ g2) + tiny * rows
    if wild.any():
        total["dk"][keys], total["dv"][keys] = np.nan, np.nan


def _moved_by_queries(slab: Slab, weights: Float, o: Float, model: Model) -> Float:
    """Return out's variance by the queries' errors, which all scores of a row share (over the scale's square)."""
    var_q = variance(slab.q, slab.problem.query, model)
    found = np.empty_like(o)
    for i, (w, lost) in enumerate(zip(weights, var_q, strict=True)):
        by = (slab.k * w[:, None]).T @ (slab.v - o[i])
        found[i] = lost @ (by * by)
    return found
