r"""What a backward pass must lose: an error bound for every element of a gradient, to first order.

With P the weights, X_ij = dout_i·v_j - D_i and D_i = dout_i·out_i, a flash kernel computes P again from its scores and
lse, and

    dS = P X,   dbias = dS,   dq = scale dS K,   dk = scale dS^T q,   dv = P^T dout,   dsink = -sum_i p_sink,i D_i

(dS times the softcap's slope before K and q). Errors, one line each (docs/proofs/bounds.md):

- P by ``P (exp(e + e_lse) - 1 + (elementary results) u)``, e the scores' error and e_lse the lse's;
- dout·v by ``(d_v + 1) u |dout|·|v|``; D by ``|dout|·e_out + (d_v + 1) u |dout|·|out|``, or by what
  sum_j P_ij dout_i·v_j would lose;
- dS by ``e_P |X| + (P + e_P) (e_dP + e_D) + 2 u |dS|``; rounded to P's type before it meets K and q;
- a sum of n products by ``(depth(n) + 3) u`` of the sum of absolute values, and its result by one rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import to_float64
from ...dtypes import FORMATS, format_of
from ...errors import UnsupportedProblem
from ...exact.answer import Answer
from ...exact.heads import Head, heads
from ...exact.stream import STREAMED
from ...positions import places
from ...variants import Steps, variant_of
from ..call import SOURCES
from ..model import Model, inside_type
from .features import Rotated
from .forward import head_losses
from .losses import Losses
from .operands import Operands, lost
from .rules import floor
from .taped import head_gradients

__all__ = ["dropped", "gradient_bounds", "spread", "spread_over"]

Float = NDArray[np.float64]


def gradient_bounds(
    answer: Answer, model: Model, dout: Any, limit: dict[str, Float], dlse: Any = None
) -> dict[str, Float]:
    """Return the largest error that a right backward pass of this model can make, for every element.

    Softmax has bounds of its own, which know how its kernels compute P again; every other operator's are those of the
    tape of its definition (``taped.py``).

    Parameters
    ----------
    answer : Answer
        The exact answer with gradients.
    model : Model
        The kernel's rounding model.
    dout : (b, h_q, n_q, d_v) array
        The gradient arriving at out.
    limit : dict
        What :func:`refattn.check.bounds.forward.bounds` allows out and lse.
    dlse : (b, h_q, n_q) array, optional
        The gradient arriving at lse: D_i is dout_i·out_i - dlse_i. Of a recurrence the one at its last state.

    Returns
    -------
    dict
        By gradient, of its input's shape: absolute errors, float64.
    """
    p = answer.call.to("numpy")
    if p.typed:
        raise UnsupportedProblem("gradients: have no bounds where types or scales are given; evaluate has their values")
    if model.forward_only:
        raise UnsupportedProblem(f"gradients: have no bounds for a model with {', '.join(model.forward_only)}")
    arriving, own = to_float64(dout), variant_of(p.variant).fused == STREAMED
    total = {n: np.zeros(np.shape(getattr(p, SOURCES[n]))) for n in SOURCES if n in answer.values}
    sums = {n: np.zeros_like(total[n]) for n in ("dk", "dv")}
    steps = isinstance(variant_of(p.variant).shape, Steps)
    at_lse = np.zeros(p.out_shape[:3]) if dlse is None else to_float64(dlse)
    if dlse is not None and not own and not steps:
        raise UnsupportedProblem(
            f"dlse: has no bounds for {p.variant} attention, only for what softmax kernels compute"
        )
    for one in heads(p):
        at = (one.batch, one.head, one.rows)
        of_out = limit["out"][at]
        with np.errstate(all="ignore"):
            if own:
                exact = answer.enclosures["out"].mid[at]
                _head(one, model, arriving, exact, of_out, limit["lse"][at], total, sums, at_lse[at])
            else:
                of_state = None if dlse is None else at_lse[one.sequence, one.head]
                _taped(one, model, arriving, of_out, total, sums, of_state)
    group = p.heads // p.heads_kv
    for n, x in total.items():
        if n in sums and group > 1:  # each head's part rounded, then added
            x = x + 2 * group * model.loss(model.group_sum or model.accumulator) * sums[n]
        form = FORMATS[_dtype(getattr(p, SOURCES[n]))]
        exact = np.abs(answer.enclosures[n].mid)
        x = x * (1 + form.unit_roundoff) + form.unit_roundoff * exact + floor(form, model)
        total[n] = x if model.subnormals else x + form.smallest_normal
    return total


def _taped(
    one: Head, model: Model, arriving: Float, limit: Float, total: Any, sums: Any, of_state: Float | None = None
) -> None:
    """Add what one head loses by the tape of its definition."""
    if not len(one.q):  # nothing arrives
        return
    at, keys = (one.batch, one.head, one.rows), (one.batch, one.head_kv, one.keys)
    found = head_gradients(one, model, arriving[at], arriving, limit, of_state)
    for n in {"dq", "dalpha", "dbeta", "deta"} & set(total):
        total[n][at] = found[n][1]
    if "dstate" in total:
        total["dstate"][one.sequence, one.head] = found["dstate"][1]
    for n in sums:
        sums[n][keys] += found[n][0]
        total[n][keys] += found[n][1]
    if "dbias" in total:
        size, lost_by = found["dbias"]
        u = format_of(model.accumulator).unit_roundoff
        spread(one, total["dbias"], lost_by + model.depth(spread_over(one)) * u * size)


def _dtype(x: Any) -> str:
    return str(x.dtype.name)


def _head(
    one: Head, model: Model, arriving: Float, o: Float, lost_o: Float, lost_lse: Float, total: Any, sums: Any,
    dlse: Float,
) -> None:  # fmt: skip
    """Add what one head loses."""
    p, inside = one.problem, format_of(model.accumulator)
    u, u_p = inside.unit_roundoff, model.loss(model.weights)
    dout, operands = arriving[one.batch, one.head, one.rows], Operands.of(one, model)
    turned = Rotated.of(one, model, operands, Losses(model, one.k.shape[0]))
    lost_dout = lost(dout, arriving, model)
    o, lost_o = np.nan_to_num(o, posinf=0, neginf=0), np.nan_to_num(lost_o, nan=np.inf)
    plain, head = one.plain(), head_losses(one, slice(None), model)
    assert head.lse is not None
    weights, lse, e = head.probabilities, head.lse.a[:, 0], head.score_errors
    kept, off = dropped(one, model, u)
    tiles = np.ceil(one.k.shape[0] / model.tile)
    passes = 1 + model.exp_ulps + tiles * (model.exp_ulps + 1) + 4
    lost_p = weights * (np.expm1(np.minimum(e + np.nan_to_num(lost_lse)[:, None], 700.0)) + passes * u)
    tiny = max(floor(inside_type(model.weights), model), floor(inside, model))
    allowed = np.asarray(one.allowed)
    lost_p = (np.minimum(lost_p, 1.0) + tiny) * allowed  # a right kernel's P stays in [0, 1], up to a rounding
    size, values, n, d_v = np.abs(dout), np.abs(one.v), allowed.sum(1, keepdims=True), dout.shape[1]
    dp, dp_size = kept * (dout @ one.v.T), kept * (size @ values.T)
    lost_dp = (d_v + 1) * u * dp_size + model.loss(model.scores) * np.abs(dp)
    lost_dp = lost_dp + kept * (lost_dout @ values.T + (size + lost_dout) @ operands.v.T) + off * dp_size
    d = (dout * o).sum(1, keepdims=True)
    from_out = (size * lost_o).sum(1, keepdims=True) + (d_v + 1) * u * (size * np.abs(o)).sum(1, keepdims=True)
    from_p = (lost_p * np.abs(dp) + weights * lost_dp).sum(1, keepdims=True)
    from_p = from_p + (model.depth(n) + 1) * u * (weights * dp_size).sum(1, keepdims=True)
    lost_d = np.maximum(from_out, from_p) + 2 * u * np.abs(dlse)[:, None]
    d = d - dlse[:, None]
    x = np.abs(dp - d)
    ds = weights * x
    alive = allowed & (x + lost_dp + lost_d > 0)  # where dout or the values are 0 so is dS, to the bit
    lost_ds = (lost_p * x + (weights + lost_p) * (lost_dp + lost_d) + 2 * u * ds + tiny) * alive
    _added(one, model, u, ds, lost_ds, total)
    if "dsink" in total and one.sink is not None:
        _sink(one, model, u, lse, d[:, 0], lost_lse, lost_d[:, 0], total["dsink"])
    if p.softcap is not None:
        ds, lost_ds = _capped(one, turned, u, ds, lost_ds)
    lost_ds = lost_ds + u_p * ds
    scale, q, k = abs(float(plain.scale)), np.abs(turned.q), np.abs(turned.k)
    keys = one.batch, one.head_kv, one.keys
    seen = alive.astype(np.float64)
    terms = seen.sum(1, keepdims=True)
    dq = scale * (lost_ds @ k + (model.depth(n) + tiles + 3) * u * (ds @ k) + tiny * (seen @ k))
    dq = dq + tiny * (seen @ k + terms)
    rows = model.depth(_rows_of(one)) + np.ceil(dout.shape[0] / model.tile) + 3
    dk = scale * (lost_ds.T @ q + rows * u * (ds.T @ q) + tiny * (seen.T @ q))
    dk = dk + tiny * (seen.T @ q + rows * seen.any(0)[:, None])
    sums["dk"][keys] += turned.back(1, scale * (ds.T @ q), np.zeros_like(dk))
    off = off + u_p * (1 if one.kept is None else 2)  # P is rounded, or before it is divided and after
    lost_p, weights = kept * (lost_p + off * weights), kept * weights  # values meet what dropout leaves
    total["dv"][keys] += lost_p.T @ size + rows * u * (weights.T @ size) + tiny * (allowed.T @ size + rows)
    sums["dv"][keys] += weights.T @ size
    if turned.lossy:
        dq = dq + scale * ((ds + lost_ds) @ turned.lost_k)
        dk = dk + scale * ((ds + lost_ds).T @ turned.lost_q)
        total["dv"][keys] += (weights + lost_p).T @ lost_dout
    _features(one, turned, (dq, dk), (scale * (ds @ k), scale * (ds.T @ q)), total)


def _capped(one: Head, turned: Rotated, u: float, ds: Float, lost_ds: Float) -> tuple[Float, Float]:
    """Return dS and what it loses behind the softcap, whose slope is off, too."""
    scale, cap = float(one.plain().scale), one.problem.softcap
    assert cap is not None
    t = np.tanh(turned.q @ turned.k.T * scale / cap)
    slope = 1 - t * t
    raw = (one.q.shape[1] + 3) * u * (np.abs(turned.q) @ np.abs(turned.k).T * abs(scale))
    raw = raw + abs(scale) * turned.products_lost
    lost_slope = 2 * np.abs(t) * (raw / cap * slope + 3 * u * np.abs(t)) + 3 * u
    return ds * slope, lost_ds * (slope + lost_slope) + ds * lost_slope


def _added(one: Head, model: Model, u: float, ds: Float, lost_ds: Float, total: dict[str, Float]) -> None:
    """Add what is lost of gradients by what is added to scores: the bias, and a head's ALiBi slope times distances."""
    if "dbias" in total:
        spread(one, total["dbias"], lost_ds + model.depth(spread_over(one)) * u * ds)
    if "dalibi_slopes" in total:
        p, by_head = one.problem, total["dalibi_slopes"]
        rows, keys = places(p, one.batch, one.rows, one.keys)
        apart = np.abs(rows[:, None] - keys).astype(np.float64)
        n = model.depth(ds.size * (p.batch if by_head.ndim == 1 else 1)) + 3
        by_head[(one.batch, one.head)[-by_head.ndim :]] += (apart * (lost_ds + n * u * ds)).sum()


def _features(
    one: Head, turned: Rotated, errors: tuple[Float, Float], sizes: tuple[Float, Float], total: dict[str, Float]
) -> None:
    """Add what gradients by queries, keys and norms' weights lose, from those by what is multiplied."""
    total["dq"][one.batch, one.head, one.rows] = turned.back(0, errors[0], sizes[0])
    total["dk"][one.batch, one.head_kv, one.keys] += turned.back(1, errors[1], sizes[1])
    for which, name in enumerate(("dquery_norm", "dkey_norm")):
        if name in total:
            total[name] += turned.of_weights(which, errors[which], sizes[which])


def dropped(one: Head, model: Model, u: float) -> tuple[Any, float]:
    """Return what dropout multiplies weights with, (n_q, n_k), and what doing so twice loses; 1 and 0 without it."""
    if one.kept is None:
        return 1.0, 0.0
    share = 1 - float(one.problem.dropout_p or 0.0)
    return one.kept / share, (5 + 1 / share) * u + model.loss(model.scores)


def spread_over(one: Head) -> int:
    """Return how many scores meet in one element of the bias's gradient, at most."""
    p = one.problem
    full = (p.batch, p.heads, p.n_q, p.n_k)
    shape = full if p.bias is None else p.bias.shape
    return int(np.prod([n for n, m in zip(full, shape, strict=True) if m == 1]))


def _rows_of(one: Head) -> int:
    return int(one.q.shape[0]) * (one.problem.heads // one.problem.heads_kv)


def spread(one: Head, total: Float, x: Float) -> None:
    """Add what belongs to one head's scores where the bias has it."""
    shape = total.shape
    for axis, wide in ((0, shape[2]), (1, shape[3])):
        if wide == 1:
            x = x.sum(axis, keepdims=True)
    at = (one.batch if shape[0] > 1 else 0, one.head if shape[1] > 1 else 0)
    total[at][one.rows if shape[2] > 1 else slice(None), one.keys if shape[3] > 1 else slice(None)] += x


def _sink(one: Head, model: Model, u: float, lse: Any, d: Float, lost_lse: Float, lost_d: Float, lost: Float) -> None:
    live = np.isfinite(lse)
    p = np.exp(np.where(live, one.sink - np.where(live, lse, 0.0), -np.inf))
    lost_p = p * (
        np.nan_to_num(lost_lse)
        + (2 * np.abs(np.where(live, lse, 0.0)) + abs(float(one.sink or 0)) + model.exp_ulps + 3) * u
    )
    lost_p = lost_p + floor(format_of(model.accumulator), model)
    n = model.depth(len(d) * one.problem.batch) + 3
    lost[one.head] += (lost_p * np.abs(d) + p * lost_d + n * u * p * np.abs(d)).sum()
