r"""The errors that a right backward pass should show: a predicted variance for every element of a gradient of softmax.

Roundings are taken as independent; what scores, out and lse show comes from the definition (``forward.py``), and these
meet as in the bounds (``gradients.py``), squares in place of sizes. Derived in docs/proofs/bounds.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import to_float64
from ...dtypes import FORMATS
from ...exact.answer import Answer
from ...exact.heads import heads
from ...norms import NORMS, has_norms
from ...positions import places
from ..call import SOURCES
from ..model import C, Model
from .gradients import spread, spread_over
from .parts import Parts, dot
from .placed import placed

__all__ = ["predict"]

Float = NDArray[np.float64]


def predict(answer: Answer, model: Model, dout: Any, variance: dict[str, Float], dlse: Any = None) -> dict[str, Float]:
    """Return the predicted variance of the error of every element of the gradients.

    NaN where the scores' errors are too large to foresee what they do. Nothing is predicted where operands are
    narrowed: what they lose is the same wherever they are multiplied, and only out's is followed through.

    Parameters
    ----------
    answer : Answer
        The exact answer of a softmax call, with gradients.
    model : Model
        The kernel's rounding model.
    dout : (b, h_q, n_q, d_v) array
        The gradient arriving at out.
    variance : dict
        What is predicted of out and lse.
    dlse : (b, h_q, n_q) array, optional
        The gradient arriving at lse.
    """
    p = answer.call.to("numpy")
    names = [n for n in answer.enclosures if n in SOURCES and not model.operands]
    moved = p.rotary is not None or has_norms(p)
    if moved:
        names = [n for n in names if n in ("dq", "dk", "dv") or n[1:] in NORMS]
    total = {n: np.zeros(answer.enclosures[n].mid.shape) for n in names}
    arriving = to_float64(dout)
    at_lse = np.zeros(p.out_shape[:3]) if dlse is None else to_float64(dlse)
    for one in heads(p) if names else ():
        at = (one.batch, one.head, one.rows)
        with np.errstate(all="ignore"):
            parts = Parts.of(
                one,
                model,
                answer.enclosures["out"].mid[at],
                arriving[at],
                variance["out"][at],
                variance["lse"][at],
                at_lse[at],
            )
            if moved:
                placed(parts, total)
            else:
                _inputs(parts, total)
                _masks(parts, total)
    for n, x in total.items():
        exact = answer.enclosures[n].mid
        with np.errstate(over="ignore"):
            ulp = FORMATS[getattr(p, SOURCES[n]).dtype.name].ulp_array(np.where(np.isfinite(exact), exact, 0.0))
            total[n] = x + ulp**2 / 12
    return total


def _inputs(s: Parts, total: Any) -> None:
    """Add the variances of dq, dk and dv."""
    one, model, f, cu = s.one, s.model, s.losses.f, s.cu
    q, k = one.q, one.k
    at, keys = (one.batch, one.head, one.rows), (one.batch, one.head_kv, one.keys)
    cu_p, tiles = C * model.loss(model.weights) ** 2, np.ceil(k.shape[0] / model.tile)
    seen = np.asarray(one.allowed) * 1.0
    n, w2, slope, scale = one.allowed.sum(1, keepdims=True), s.weights**2, s.slope, s.scale
    ds, own = s.ds, s.own()
    mean_k = (s.weights * slope) @ k
    rows = s.rows_of_a_key
    dq = scale * scale * (own @ (k * k) + s.var_d * mean_k**2 + cu * dot(f, n, ds, k))
    tiny_s = s.tiny + scale * scale * max(s.tiny_w, s.tiny)
    total["dq"][at] = np.where(s.wild, np.nan, dq + tiny_s * (seen @ (k * k)) + s.tiny * (n + tiles))
    dk = scale * scale * ((own + slope**2 * w2 * s.var_d).T @ (q * q) + cu * dot(f, rows, ds.T, q))
    total["dk"][keys] += dk + tiny_s * (seen.T @ (q * q)) + s.tiny * rows
    g2 = s.dout * s.dout
    by = s.kept * s.weights
    dv = (by * by * (s.var_p + cu_p)).T @ g2 + cu * dot(f, rows, by.T, s.dout)
    total["dv"][keys] += dv + max(s.tiny_w, s.tiny) * (seen.T @ g2) + s.tiny * rows
    if s.wild.any():
        total["dk"][keys], total["dv"][keys] = np.nan, np.nan


def _masks(s: Parts, total: Any) -> None:
    """Add the variances of dbias and dsink, where there are any."""
    one, model, cu, x = s.one, s.model, s.cu, s.x
    w2, tiny = s.weights**2, s.tiny
    if "dbias" in total:
        one_key = total["dbias"].shape[3] == 1  # then D's error is common to what is summed
        score = w2 * (x * x * (s.var_p + 2 * cu) + s.var_dp + s.var_d * (0 if one_key else 1))
        score = score + max(s.tiny_w, tiny) * x * x + tiny
        score = score + cu * (model.depth(spread_over(one)) / 6 + 1) * w2 * x * x
        score = score + (s.weights.sum(1, keepdims=True) ** 2 * s.var_d / one.k.shape[0] if one_key else 0.0)
        spread(one, total["dbias"], np.where(s.wild, np.nan, score if one_key else score * np.asarray(one.allowed)))
    if "dalibi_slopes" in total:
        rows, keys = places(one.problem, one.batch, one.rows, one.keys)
        apart = np.abs(rows[:, None] - keys) * (np.asarray(one.allowed) * 1.0)
        ds, at = apart * s.weights * x, (one.batch, one.head)[-total["dalibi_slopes"].ndim :]
        each = apart * apart * (w2 * (x * x * (s.var_p + 2 * cu) + s.var_dp) + max(s.tiny_w, tiny) * x * x)
        common = s.var_d * (apart * s.weights).sum(1, keepdims=True) ** 2
        common = common + cu * (2 * s.lse**2 + 4) * ds.sum(1, keepdims=True) ** 2  # of the lse
        more = cu * (model.depth(ds.size) / 6 + 1) * (ds * ds).sum()
        total["dalibi_slopes"][at] += (each + common / each.shape[1]).sum() + more
    if "dsink" in total and one.sink is not None:
        lse = s.lse[:, 0]
        p_sink, d = np.exp(one.sink - lse), s.d[:, 0]
        var_s = np.where(s.wild[:, 0], np.nan, s.var_lse) + cu * (lse**2 + one.sink**2 + 1)
        var_s = p_sink**2 * (d * d * (var_s + 2 * cu) + s.var_d[:, 0])
        rows = one.q.shape[0] * (one.problem.heads // one.problem.heads_kv)
        sums = cu * (model.depth(rows) + 1) * (p_sink * d) @ (p_sink * d)
        total["dsink"][one.head] += (var_s + tiny * d * d).sum() + sums
