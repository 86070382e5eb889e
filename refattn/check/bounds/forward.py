r"""What a kernel's arithmetic must lose: an error bound for every element, from the problem and the rounding model.

With scores s, weights w (up to the row's factor), denominator z and exact output o, one rounding error each:

- a score is off by at most ``e_ij = u ((d_k + 2) sum_c |scale q_ic k_jc| + roundings) + u_S |s_ij|``;
- a weight by ``|dw/ds| (exp(e_ij) - 1) + (elementary results and rescales) u w_ij``, where the exponential is
  the weight function, and by ``|dw/ds| e_ij`` otherwise;
- an error in a weight moves the output by ``|v_jc - o_ic| / z_i`` (it enters numerator and denominator alike), or by
  ``|v_jc|`` without a denominator; where all weights are positive the output cannot leave the values' hull;
- the n_i products and sums of row i, and its rescales, cost ``(depth(n_i) + tiles + 3) u`` of
  ``sum_j w_ij |v_jc| / z_i`` and of ``|o_ic|``; rounding P costs ``u_P max(|v_jc|, |v_jc - o_ic|)`` a key;
- underflow costs half the smallest subnormal of each type a rounding (the smallest normal number where subnormals are
  taken for zero); the result itself ``u_out |o_ic|``.

The first two are first order in u elsewhere. There is no tolerance to choose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FORMATS, Format, format_of
from ...exact.driver import Answer
from ...exact.slabs import Slab, slabs
from ...variants import variant_of
from ..model import Model, inside_type
from .operands import Operands, score_errors

__all__ = ["bounds"]

Float = NDArray[np.float64]
CHUNK = 2**21  # elements of (rows, keys, d_v) alive at a time


def bounds(answer: Answer, model: Model) -> dict[str, Float]:
    """Return the largest error that a right kernel of this model can make, for every element.

    Parameters
    ----------
    answer : Answer
        The exact answer (from ``evaluate(problem)``).
    model : Model
        The kernel's rounding model.

    Returns
    -------
    dict
        ``out`` (b, h_q, n_q, d_v) and, where the operator has one, ``lse`` (b, h_q, n_q): absolute errors, float64.
        0 where the contract fixes the value (rows without keys, rows that are NaN).
    """
    problem = answer.problem
    out = np.zeros(problem.out_shape)
    lse = np.zeros(problem.out_shape[:3])
    exact = answer.enclosures["out"].mid
    for slab in slabs(problem):
        at, operands = (slab.batch, slab.head, slab.rows), Operands.of(slab, model)
        live = np.nonzero(slab.live)[0]
        size = max(1, CHUNK // max(1, slab.k.shape[0] * slab.v.shape[1]))
        for start in range(0, len(live), size):
            rows = live[start : start + size]
            out[at][rows], lse[at][rows] = _rows(slab, operands, rows, exact[at][rows], model)
    if variant_of(problem.variant).has_lse:
        return {"out": out, "lse": lse}
    return {"out": out}


def _rows(slab: Slab, lost: Operands, rows: NDArray[np.intp], o: Float, model: Model) -> tuple[Float, Float]:
    inside, final = format_of(model.accumulator), FORMATS[slab.problem.dtype]
    # sums of the largest float64 numbers leave float64's range: work in smaller units there (a power of two)
    unit = 2.0**-64 if np.abs(slab.v).max(initial=0.0) > 2.0**900 else 1.0
    v, o = slab.v * unit, o * unit
    u, u_w = inside.unit_roundoff, model.loss(model.weights)
    with np.errstate(all="ignore"):
        s = variant_of(slab.problem.variant).sensitivity(slab.q[rows], slab.k, slab.plain(rows))
        seen = slab.allowed[rows]
        n = model.depth(seen.sum(1)[:, None])
        tiles = np.ceil(slab.k.shape[0] / model.tile) if s.lse is not None else 0.0
        e = score_errors(slab, s, lost, model, rows)
        passes: Any = s.relative + s.exponentials * model.exp_ulps + tiles * (model.exp_ulps + 1)
        merges = model.merges(slab.k.shape[0], slab.sink is not None)
        if merges > 1 and s.lse is not None:  # a part weighs exp of its lse less the whole's, both rounded
            passes = passes + (merges - 1) * (2 * np.abs(np.nan_to_num(s.lse)) + model.exp_ulps + 4)[:, None]
        off = s.slope * (np.expm1(np.minimum(e, 700.0)) if s.exponentials else e) + passes * u * np.abs(s.weights)
        z = np.ones(len(rows)) if s.denominator is None else s.denominator
        w = np.abs(s.weights)[:, :, None]
        size = np.abs(v)[None, :, :]
        if s.denominator is None:
            moved = (off[:, :, None] * size).sum(1)
            rounded = (w * size).sum(1)
            spread = rounded
        else:
            apart = np.abs(v[None, :, :] - np.where(np.isfinite(o), o, 0.0)[:, None, :])
            # an error in the denominator itself cannot make it smaller than this share
            share = 1 - off.sum(1)[:, None] / np.abs(z)[:, None]
            moved = (off[:, :, None] * apart).sum(1) / np.abs(z)[:, None]
            moved = np.where(share > 0, moved / np.maximum(share, 1e-300), np.inf)
            if s.lse is not None:
                hull = np.where(seen[:, :, None], apart, 0.0).max(1, initial=0.0)
                moved = np.minimum(moved, hull if slab.sink is None else np.maximum(hull, np.abs(o)))
            rounded = (w * np.maximum(size, apart)).sum(1) / np.abs(z)[:, None]
            spread = (w * size).sum(1) / np.abs(z)[:, None] + np.abs(o) * w.sum(1) / np.abs(z)[:, None]
        steps = n + tiles + 3
        total = moved + steps * u * spread + u_w * rounded
        if merges > 1 and s.lse is not None:  # the whole's lse divides every part alike
            total = total + (merges - 1) * u * (np.abs(np.nan_to_num(s.lse)) + 2)[:, None] * np.abs(o)
        if model.operands:
            total = total + (1 + u_w) * (np.abs(s.weights) @ (lost.v * unit)) / np.abs(z)[:, None]
        # underflow of a weight, of a product or sum, and of the result
        visible = (seen[:, :, None] * size).sum(1)
        total = total + max(floor(inside_type(model.weights), model), floor(inside, model)) * visible
        total = total + steps * floor(inside, model)
        total = total * (1 + final.unit_roundoff) + final.unit_roundoff * np.abs(o) + floor(final, model)
        if not model.subnormals:  # values that are subnormal were read as zero
            total = total + final.smallest_normal
        total = total / unit
        if s.lse is None:
            return total, np.zeros(len(rows))
        share = off.sum(1) / z
        log = np.where(share < 1, -np.log1p(-np.minimum(share, 1 - 1e-16)), np.inf)
        m = s.lse - np.log(z)
        wide = u * (steps[:, 0] + 4 * np.abs(np.log(z)) + 4 * np.abs(m) + np.abs(s.lse) + 4)
        wide = wide + u * merges * (2 * np.abs(s.lse) + model.exp_ulps + 4)
        back = format_of(model.lse)
        return total, log + wide + back.unit_roundoff * np.abs(s.lse) + floor(back, model)


def floor(form: Format, model: Model) -> float:
    """Return what underflow can cost one rounding."""
    if not model.subnormals:
        return form.smallest_normal
    return 0.5 * form.smallest_subnormal or form.smallest_subnormal  # half of float64's would be 0
