"""Bounds of any operator's gradients: the tape of its definition over the arithmetic of losses.

Errors are taken on and never back, so nothing cancels: wider than softmax's own (``gradients.py``), at the cost of one
backward pass. A kernel may take its stored output for what the definition gives, so that rounding counts, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...exact.heads import Head, rows_of
from ...exact.tape import Tape, gradients
from ..model import Model
from .losses import Losses, Lossy
from .operands import Operands, lost

__all__ = ["head_gradients"]

Float = NDArray[np.float64]


def head_gradients(one: Head, model: Model, dout: Float, arriving: Any, limit: Float) -> dict[str, tuple[Float, Float]]:
    """Return the sizes and the largest errors of one head's gradients, in all but the results' own roundings.

    Parameters
    ----------
    one : Head
        The head.
    model : Model
        The kernel's rounding model.
    dout : (n_q, d_v) array
        The gradient arriving at it.
    arriving : array
        All of it: what its scale is made from.
    limit : (n_q, d_v) array
        What out may be off by.

    Returns
    -------
    dict
        By gradient "dq", "dk", "dv", "dbias", "dalpha", "dbeta": size and largest error.
    """
    f, off = Losses(model, one.k.shape[0]), Operands.of(one, model)
    q = f.leaf(one.q, ("q", "d"), off.q)
    k, v = f.leaf(one.k, ("k", "d"), off.k), f.leaf(one.v, ("k", "v"), off.v)
    leaves = {"dq": Tape(q), "dk": Tape(k), "dv": Tape(v)}
    o = one.options(f, wrap=Tape)
    leaves |= {f"d{n}": x for n in ("bias", "alpha", "beta") if (x := getattr(o, n)) is not None}
    with np.errstate(all="ignore"):
        out, _ = rows_of(one).define(leaves["dq"], leaves["dk"], leaves["dv"], o)
        out.value.node.span = out.value.node.span + np.nan_to_num(limit, nan=np.inf)
        seed = f.leaf(dout, ("q", "v"), lost(dout, arriving, model))
        grads: list[Lossy] = gradients([out], [seed], list(leaves.values()))
    return {
        n: (np.abs(g.a), np.nan_to_num(np.broadcast_to(g.node.span, g.a.shape), nan=np.inf))
        for n, g in zip(leaves, grads, strict=True)
    }
