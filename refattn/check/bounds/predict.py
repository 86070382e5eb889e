r"""The errors that a right kernel of a model should show: a predicted variance for every element.

Roundings are taken as independent. One to nearest, of a number whose mantissa is spread as mantissas are, has the
variance ``C u^2`` of its square with C = 3 / (8 ln 2) / 3. A dot product of terms t_k rounds its partial sums: it loses
``C u^2 (depth W + T)`` with T = sum t_k^2 and W their mean square, that of the terms as they come or of a walk from 0
to s = sum t_k in no order, s^2 / 3 + T / 6, whichever is larger. The exponential is off by up to exp_ulps, evenly. The
variances meet as in the bounds (``bounds.py``, ``gradient_bounds.py``), squares in place of sizes. Derived in
docs/proofs/bounds.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import to_float64
from ...dtypes import FORMATS, format_of
from ...exact.driver import Answer
from ...exact.slabs import Slab, slabs
from ...variants import variant_of
from ..call import SOURCES
from ..diagnose.statistics import bands
from ..model import Model, inside_type
from .forward import floor
from .gradients import spread, spread_over
from .operands import C, variance

__all__ = ["predict"]

Float = NDArray[np.float64]
WILD = 1 / 16
"""The variance of a score from which on errors are not proportional to roundings, and nothing is predicted."""
PLACES = 8
"""Where partial sums are looked at."""


def predict(answer: Answer, model: Model, dout: Any = None) -> dict[str, Float]:
    """Return the predicted variance of the error of every element of out and lse, or with `dout` of the gradients.

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
    names = [n for n in answer.enclosures if n in ("out", "lse") or (dout is not None and not model.operands)]
    total = {n: np.zeros(answer.enclosures[n].mid.shape) for n in names}
    arriving = None if dout is None else to_float64(dout)
    for slab in slabs(p):
        at = (slab.batch, slab.head, slab.rows)
        arriving_here = arriving[at] if arriving is not None and "dq" in names else None
        with np.errstate(all="ignore"):
            _head(slab, model, answer.enclosures["out"].mid[at], arriving_here, total)
    for n, x in total.items():
        exact = answer.enclosures[n].mid
        form = FORMATS[{"out": p.dtype, "lse": model.lse}.get(n) or getattr(p, SOURCES[n]).dtype.name]
        with np.errstate(over="ignore"):
            total[n] = x + form.ulp_array(np.where(np.isfinite(exact), exact, 0.0)) ** 2 / 12
    return total


def _dot(model: Model, n: Any, x: Float, y: Float) -> Float:
    """Return the variances of sums of n rounded products, those of x @ y, over C u^2."""
    total, walk = np.zeros((2, x.shape[0], y.shape[1]))
    for part in bands(x.shape[1], PLACES):
        at = slice(part.start, part.stop)
        total = total + x[:, at] @ y[at]
        walk = walk + total * total * (len(part) / x.shape[1])
    squares = (x * x) @ (y * y)
    return np.asarray(model.depth(n) * np.maximum(walk, total * total / 3 + squares / 6) + squares)


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
    raw = q @ k.T * scale
    t = np.zeros(1) if p.softcap is None else np.tanh(raw / p.softcap)
    slope: Any = 1 - t * t
    var_w = cu * (_dot(model, q.shape[1], q * scale, k.T) + raw**2) * slope**2 + cu * s.roundings**2
    var_w = var_w + C * model.loss(model.scores) ** 2 * s.roundings**2
    if model.operands:
        var_w = var_w + (scale * slope) ** 2 * ((q * q) @ variance(k, p.key, model).T)
    tiles = np.ceil(k.shape[0] / model.tile)
    var_w = var_w + (inside.unit_roundoff * model.exp_ulps) ** 2 / 3 + (s.relative + tiles) * cu
    wild = (np.where(slab.allowed, var_w, 0.0).max(1, initial=0.0) > WILD)[:, None]
    var_w = np.where(wild, 1.0, var_w)
    parts = model.merges(k.shape[0], slab.sink is not None)
    merges = 4 * parts
    live = np.isfinite(s.lse) & (s.denominator > 0)
    w2, v2, n = weights**2, v * v, slab.allowed.sum(1, keepdims=True)
    o = np.nan_to_num(o, posinf=0, neginf=0)
    moved = (w2 * var_w) @ v2 - 2 * o * ((w2 * var_w) @ v) + o * o * (w2 * var_w).sum(1, keepdims=True)
    out = np.maximum(moved, 0) + cu_p * (w2 @ v2) + cu * (_dot(model, n, weights, v) + (tiles + 3 + merges) * o * o)
    if parts > 1:
        sizes = np.where(live, s.lse, 0.0)[:, None] ** 2
        out = out + cu * ((2 * sizes + 2) * _moved_by_parts(slab, weights, o, model) + (parts - 1) * sizes * o * o)
    if model.operands:
        out = out + w2 @ variance(v, p.value, model) + scale**2 * _moved_by_queries(slab, weights * slope, o, model)
    # underflow: of a weight, of a product or a running sum
    tiny_w, tiny = (floor(form, model) ** 2 / 3 for form in (inside_type(model.weights), inside))
    seen = slab.allowed.astype(np.float64)
    out = out + max(tiny_w, tiny) * (seen @ v2) + tiny * (n + tiles)
    at, keys = (slab.batch, slab.head, slab.rows), (slab.batch, slab.head_kv, slab.keys)
    total["out"][at] = np.where(wild, np.nan, out)
    z, whole = np.where(live, s.denominator, 1.0), np.where(live, s.lse, 0.0)
    # the exponential may be off the same way for every key
    var_lse = (w2 * var_w).sum(1) + (inside.unit_roundoff * model.exp_ulps) ** 2
    var_lse = var_lse + cu * (
        _dot(model, n, weights, np.ones_like(v[:, :1]))[:, 0] + tiles + 1 + np.log(z) ** 2 + (whole - np.log(z)) ** 2
    )
    if model.operands:  # a query's errors are in all scores of its row
        mean = (weights * slope) @ k
        var_lse = var_lse + scale**2 * (variance(q, p.query, model) * mean * mean).sum(1)
    var_lse = np.where(live, var_lse + cu * (1 + merges / 2) * whole**2, 0.0)
    total["lse"][at] = np.where(wild[:, 0], np.nan, var_lse)
    if dout is None:
        return
    out = out + FORMATS[p.dtype].ulp_array(o) ** 2 / 12
    g2, dp = dout * dout, dout @ v.T
    var_dp = cu * _dot(model, v.shape[1], dout, v.T) + C * model.loss(model.scores) ** 2 * dp * dp
    var_d = (g2 * out).sum(1, keepdims=True) + cu * (g2 * o * o).sum(1, keepdims=True)
    x = dp - (dout * o).sum(1, keepdims=True)
    lse = np.where(slab.allowed.any(1), np.nan_to_num(s.lse, neginf=0.0), 0.0)[:, None]
    var_p = var_w + cu * ((2 + 2 * parts) * (lse**2 + 2))
    ds = weights * x * slope
    own = slope**2 * w2 * (x * x * (var_p + 2 * cu) + var_dp) + cu_p * ds * ds
    if p.softcap is not None:  # 1 - t^2 near 0 keeps the errors of t, which is good to 2 ulps, and of its square
        own = own + w2 * (x * x + var_dp + var_d) * (4 * t * t * (3 * inside.unit_roundoff * t) ** 2 / 3 + 4 * cu)
    mean_k = (weights * slope) @ k
    rows = q.shape[0] * (p.heads // p.heads_kv)
    dq = scale**2 * (own @ (k * k) + var_d * mean_k**2 + cu * _dot(model, n, ds, k))
    tiny_s = tiny + scale**2 * max(tiny_w, tiny)
    total["dq"][at] = np.where(wild, np.nan, dq + tiny_s * (seen @ (k * k)) + tiny * (n + tiles))
    dk = (own + slope**2 * w2 * var_d).T @ (q * q)
    dk = scale**2 * (dk + cu * _dot(model, rows, ds.T, q))
    total["dk"][keys] += dk + tiny_s * (seen.T @ (q * q)) + tiny * rows
    dv = (w2 * (var_p + cu_p)).T @ g2
    dv = dv + cu * _dot(model, rows, weights.T, dout)
    total["dv"][keys] += dv + max(tiny_w, tiny) * (seen.T @ g2) + tiny * rows
    if wild.any():
        total["dk"][keys], total["dv"][keys] = np.nan, np.nan
    if "dbias" in total:
        one_key = total["dbias"].shape[3] == 1  # then D's error is common to what is summed
        score = w2 * (x * x * (var_p + 2 * cu) + var_dp + var_d * (0 if one_key else 1))
        score = score + max(tiny_w, tiny) * x * x + tiny
        score = score + cu * (model.depth(spread_over(slab)) / 6 + 1) * w2 * x * x
        score = score + (weights.sum(1, keepdims=True) ** 2 * var_d / k.shape[0] if one_key else 0.0)
        spread(slab, total["dbias"], np.where(wild, np.nan, score * seen if not one_key else score))
    if "dsink" in total and slab.sink is not None:
        p_sink, d = np.exp(slab.sink - whole), (dout * o).sum(1)
        var_s = var_lse + inside_type(model.lse).ulp_array(whole) ** 2 / 12 + cu * (whole**2 + slab.sink**2 + 1)
        var_s = np.where(wild[:, 0], np.nan, p_sink**2 * (d * d * (var_s + 2 * cu) + var_d[:, 0]))
        total["dsink"][slab.head] += (var_s + tiny * d * d).sum() + cu * (model.depth(rows) + 1) * (p_sink * d) @ (
            p_sink * d
        )


def _moved_by_parts(slab: Slab, weights: Float, o: Float, model: Model) -> Float:
    """Return the squares of what a relative error of 1 in the weight of a part does to out, summed over the parts."""
    total = np.zeros_like(o)
    for start in range(0, slab.k.shape[0], model.split):
        part = weights[:, start : start + model.split]
        moved = part @ slab.v[start : start + model.split] - o * part.sum(1, keepdims=True)
        total += moved * moved
    return total if slab.sink is None else total + ((1 - weights.sum(1, keepdims=True)) * o) ** 2


def _moved_by_queries(slab: Slab, weights: Float, o: Float, model: Model) -> Float:
    """Return out's variance by the queries' errors, which all scores of a row share (over the scale's square)."""
    var_q = variance(slab.q, slab.problem.query, model)
    found = np.empty_like(o)
    for i, (w, lost) in enumerate(zip(weights, var_q, strict=True)):
        by = (slab.k * w[:, None]).T @ (slab.v - o[i])
        found[i] = lost @ (by * by)
    return found
