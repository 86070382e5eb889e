"""Correctly rounded gradients of triple-wise attention: the pairwise ones in balls, summed over pairs in balls."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, from_float64, to_float64
from ..dtypes import format_of
from ..errors import UnsupportedProblem
from ..exact import evaluate
from ..exact.arithmetics import Balls
from ..exact.enclosure import Enclosure
from .forms import as_pairs, turned

__all__ = ["exact_gradients"]

LADDER = (128, 256, 512, 1024)
"""Bits of the balls, until every rounding is decided."""


def exact_gradients(
    query: Any, k1: Any, k2: Any, v1: Any, v2: Any, dout: Any, *, form: str = "trilinear", scale: float | None = None,
    causal: str | None = None, window: Any = None, allowed: Any = None, rounding: str | None = None,
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """Return the correctly rounded gradients of sum(out·dout) by query, k1, k2, v1 and v2.

    Parameters
    ----------
    query, k1, k2, v1, v2, form, scale, causal, window, allowed
        As in :func:`refattn.tensor.as_pairs`. All is in balls: for small sizes.
    dout : (b, h, n_q, d_v) array
        The gradient that arrives at out.
    rounding : str, optional
        The format of the answer: query's by default.

    Returns
    -------
    dict of str to array
        "dq", "dk1", "dk2", "dv1", "dv2".

    Raises
    ------
    UnsupportedProblem
        A rounding stays open at 1024 bits: an exact tie, or an exact zero that is a sum of others.
    """
    problem = as_pairs(query, k1, k2, v1, v2, form=form, scale=scale, causal=causal, window=window, allowed=allowed)
    target = format_of(rounding or dtype_name(query))
    given = [to_float64(np.asarray(x)) for x in (k1, k2, v1, v2)]
    arriving = to_float64(np.asarray(dout))
    for bits in LADDER:
        answer = evaluate(problem, bits, gradients=arriving)
        with Balls(bits).working():
            found = _by_inputs(form, {n: answer.balls[n] for n in ("dq", "dk", "dv")}, *given)
        settled = {n: Enclosure.of(np.asarray(x)).settle(target) for n, x in found.items()}
        if all(decided.all() for _, decided in settled.values()):
            return {n: from_float64(value, target.name) for n, (value, _) in settled.items()}
    open_ = {n: int((~decided).sum()) for n, (_, decided) in settled.items() if not decided.all()}
    raise UnsupportedProblem(f"tensor.exact_gradients: at {LADDER[-1]} bits these are still open: {open_}")


def _by_inputs(
    form: str, balls: dict[str, NDArray[Any]], k1: NDArray[Any], k2: NDArray[Any], v1: NDArray[Any], v2: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """Return the gradients by the inputs from those by the features of pairs, which are arrays of balls."""
    d, n1, n2 = k1.shape[3], k1.shape[2], k2.shape[2]
    dq, dk, dv = balls["dq"], balls["dk"], balls["dv"]
    dk, dv = (x.reshape(*x.shape[:2], n1, n2, x.shape[3]) for x in (dk, dv))
    parts = [dk[..., i : i + d] for i in range(0, dk.shape[4], d)]
    queries = [dq[..., i : i + d] for i in range(0, dq.shape[3], d)]

    def products(of: Any, a: NDArray[Any], b: NDArray[Any]) -> tuple[Any, Any]:
        """Return the gradients by a and b of what is a_j ∘ b_k."""
        return (of * b[:, :, None]).sum(3), (of * a[:, :, :, None]).sum(2)

    if form == "trilinear":
        (da, db), query = products(parts[0], k1, k2), queries[0]
    elif form == "determinant":
        ua, ub = products(parts[0], turned(k1, 1), turned(k2, 2))
        la, lb = products(parts[1], turned(k1, 2), turned(k2, 1))
        da, db = turned(ua, -1) + turned(la, -2), turned(ub, -2) + turned(lb, -1)
        query = queries[0] - queries[1]
    elif form == "strassen":
        da, db = products(parts[1], k1, k2)
        da, db, query = da + parts[0].sum(3), db + parts[2].sum(2), queries[0] + queries[2]
    elif form == "tree":
        da, db = products(parts[1], k1, k2)
        da, query = da + parts[0].sum(3), queries[0]
    else:
        da, db, query = parts[0].sum(3), parts[1].sum(2), queries[0] + queries[1]
    dv1, dv2 = products(dv, v1, v2)
    return {"dq": query, "dk1": da, "dk2": db, "dv1": dv1, "dv2": dv2}
