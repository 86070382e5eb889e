"""Bounds of recurrences: the arithmetic of losses run token by token, as a kernel that carries its state runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...exact.heads import Head
from ...variants import Steps
from ..model import Model
from .losses import Losses, variance_of
from .operands import Operands

__all__ = ["stepped"]

Float = NDArray[np.float64]


def stepped(one: Head, shape: Steps, model: Model) -> tuple[tuple[Float, Float], tuple[Float, Float]]:
    """Return the largest errors and the variances of one head's out and last state, their own roundings apart.

    Out is (n_q, d_v), the state (d_k, d_v).

    Parameters
    ----------
    one : Head
        The head.
    shape : Steps
        The recurrence.
    model : Model
        The kernel's rounding model; its accumulator is the state's type.
    """
    f, lost = Losses(model, 1), Operands.of(one, model)
    o = one.options(f)
    start = np.zeros((one.q.shape[1], one.v.shape[1])) if one.state is None else one.state
    state, spans, variances = f.leaf(start, ("d", "v")), [], []
    with np.errstate(all="ignore"):
        shape.prepare(o)
        for t in range(len(one.q)):
            at = slice(t, t + 1)
            q = f.leaf(one.q[at], ("q", "d"), lost.q[at], lost.var_q[at])
            k = f.leaf(one.k[at], ("k", "d"), lost.k[at], lost.var_k[at])
            v = f.leaf(one.v[at], ("k", "v"), lost.v[at], lost.var_v[at])
            state, out = shape.step(state, q, k, v, o)
            spans.append(np.broadcast_to(out.node.span, out.shape))
            variances.append(np.broadcast_to(variance_of(out.node), out.shape))
            state = f.leaf(state.a, ("d", "v"), state.node.span, variance_of(state.node))  # without the graph behind it
    last = state.node
    return (
        (np.concatenate(spans), np.concatenate(variances)),
        (np.broadcast_to(last.span, state.shape), np.broadcast_to(last.var, state.shape)),
    )
