"""Which wrong elements break a contract at the edge of what attention is for, and which are plainly wrong."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..dtypes import format_of
from ..exact.answer import Answer
from ..problem import Problem

__all__ = ["edges_of"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


def edges_of(
    name: str, x: Float, exact: Float, bound: Float, failing: Mask, empty: Mask, answer: Answer, dtype: str
) -> dict[str, Mask]:
    """Return by contract (``refattn.check.EDGES``) the failing elements that break it and nothing else.

    Parameters
    ----------
    name : str
        "out", "lse" or a gradient's name.
    x, exact : float64 arrays
        What was got, and the exact values.
    bound : float64 array
        What is allowed.
    failing : bool array
        Of their shape: the elements that are wrong.
    empty : bool array
        Whether a row has no keys: of the shape of out or lse, or (b, h_q, n_q) for a gradient.
    answer : Answer
        The exact answer.
    dtype : str
        The format of what was got.
    """
    p = answer.call.to("numpy")
    found: dict[str, Mask] = {}
    rest = failing.copy()

    def take(edge: str, where: Mask) -> None:
        if (hits := rest & where).any():
            found[edge] = hits
            rest[hits] = False

    everywhere = np.ones(x.shape, bool)
    if p.scale is not None and p.scale <= 0:
        take("scale", everywhere)
    if name in ("out", "lse"):
        take("empty-lse" if name == "lse" else "empty-row", empty)
    elif empty.any():
        take("empty-row", _from_empty_rows(name, x, exact, empty, bound))
    take("nan-in-sight", ~np.isfinite(exact))
    if not all(_finite(a) for a in answer.problem.to("numpy").arrays().values()):
        take("nan-behind-mask", ~np.isfinite(x))
    elif _next_to_the_largest(p):
        take("overflow", ~np.isfinite(x))
    small = format_of(dtype).smallest_normal
    take("subnormal", (np.abs(exact) < small) & (np.abs(x) <= small))
    return found


def _from_empty_rows(name: str, x: Float, exact: Float, empty: Mask, bound: Float) -> Mask:
    """Return the elements of a gradient that rows without keys may have spoilt, and nothing else.

    These are NaN, such a row's own dq, and a share of its dout that all values get alike.
    """
    spoilt: Mask = ~np.isfinite(x)
    if name == "dq":
        return np.asarray(spoilt | empty[..., None])
    if name == "dv" and x.shape[2]:
        with np.errstate(all="ignore"):
            off = x - exact
            alike = (np.abs(off - off.mean(2, keepdims=True)) <= bound).all(2, keepdims=True)
        return np.asarray(spoilt | np.broadcast_to(alike, x.shape))
    return spoilt


def _finite(a: NDArray[np.generic]) -> bool:
    """Tell whether an array has neither NaN nor inf; -inf in a bias is a mask, and no number."""
    wide = a.astype(np.float64)
    return bool((np.isfinite(wide) | np.isneginf(wide)).all())


def _next_to_the_largest(p: Problem) -> bool:
    """Tell whether a value is within a factor of 2 of the type's largest, or a score leaves float32 unscaled."""
    form = format_of(p.out_type)
    wide = form if form.precision > 24 else format_of("float32")
    if 0 in (p.batch, p.n_k, p.n_q, p.d_k):
        return False
    q, k, v = (np.abs(a.astype(np.float64)) for a in (p.query, p.key, p.value))
    score = float(q.max()) * float(k.max()) * p.d_k
    return bool(v.max() >= form.largest / 2) or score >= wide.largest
