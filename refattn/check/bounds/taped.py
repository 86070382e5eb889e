"""Bounds of any operator's gradients: the tape of its definition over the arithmetic of losses.

Errors are taken on and never back, so nothing cancels: wider than softmax's own (``gradients.py``), at the cost of one
backward pass. A kernel may take its stored output for what the definition gives, so that rounding counts, too.

A kernel of a recurrence may go token by token, backward too: what that loses is allowed as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import format_of
from ...exact.heads import Head, gate_of, rows_of
from ...exact.steps import begun
from ...exact.tape import Tape, gradients
from ...gates import GATES
from ...variants import Steps, variant_of
from ..model import Model
from .cumulated import decays_met, steps_lost
from .losses import Losses, Lossy
from .operands import Operands, lost
from .pieces import gradients_of, ways_of

__all__ = ["head_gradients"]

Float = NDArray[np.float64]


def head_gradients(
    one: Head, model: Model, dout: Float, arriving: Any, limit: Float, of_state: Float | None = None
) -> dict[str, tuple[Float, Float]]:
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
    of_state : (d_k, d_v) array, optional
        The gradient arriving at a recurrence's last state.

    Returns
    -------
    dict
        By gradient "dq", "dk", "dv", "dbias", "dalpha", "dbeta", "deta", "dstate": size and largest error.
    """
    ways = ways_of(one, model)
    if ways:
        found = gradients_of(ways, dout, lost(dout, arriving, model), of_state)
        return _with_ratios(found, one, model, dout, of_state)
    f, off = Losses(model, one.k.shape[0], chance=False), Operands.of(one, model)
    q = f.leaf(one.q, ("q", "d"), off.q)
    k, v = f.leaf(one.k, ("k", "d"), off.k), f.leaf(one.v, ("k", "v"), off.v)
    leaves = {"dq": Tape(q), "dk": Tape(k), "dv": Tape(v)}
    o = one.options(f, wrap=Tape)
    if model.cumulated and "alpha" in one.gates:
        o.alpha.value.node.err = steps_lost(one, model)
    leaves |= _further(o, "bias")
    with np.errstate(all="ignore"):
        out, _ = rows_of(one).define(leaves["dq"], leaves["dk"], leaves["dv"], o)
        out.value.node.span = out.value.node.span + np.nan_to_num(limit, nan=np.inf)
        seed = f.leaf(dout, ("q", "v"), lost(dout, arriving, model))
        grads: list[Lossy] = gradients([out], [seed], list(leaves.values()))
    found = _joined(leaves, [(np.abs(g.a), _span(g)) for g in grads])
    if of_state is not None:
        u = format_of(model.accumulator).unit_roundoff
        for n, (size, span) in _from_state(one, model, of_state).items():  # both parts rounded, then added
            both = found[n][0] + size
            found[n] = both, found[n][1] + span + 2 * u * (both + found[n][1] + span)
    found = _with_ratios(found, one, model, dout, of_state)
    shape = variant_of(one.problem.variant).shape
    if isinstance(shape, Steps):
        more = _stepped(one, shape, model, dout, lost(dout, arriving, model), off, of_state)
        found |= {n: (size, np.maximum(span, more[n])) for n, (size, span) in found.items()}
    return found


def _with_ratios(
    found: dict[str, tuple[Float, Float]], one: Head, model: Model, dout: Float, of_state: Float | None
) -> dict[str, tuple[Float, Float]]:
    if "dalpha" in found:
        found["dalpha"] = found["dalpha"][0], found["dalpha"][1] + decays_met(one, model, dout, of_state)
    return found


def _from_state(one: Head, model: Model, of_state: Float) -> dict[str, tuple[Float, Float]]:
    """Return the sizes and errors of what arrives at the last state: unit rows that read it at the end.

    They read no momentum: a form of a recurrence that has one leaves the last state, a tuple, as ``o.last``.
    """
    f, off = Losses(model, one.k.shape[0], chance=False), Operands.of(one, model)
    k, v = f.leaf(one.k, ("k", "d"), off.k), f.leaf(one.v, ("k", "v"), off.v)
    leaves = {"dk": Tape(k), "dv": Tape(v)}
    d = one.q.shape[1]
    o = one.options(f, np.full(d, len(one.q) - 1), wrap=Tape)
    o.scale = f.number(1)
    if model.cumulated and "alpha" in one.gates:
        o.alpha.value.node.err = steps_lost(one, model)
    leaves |= _further(o)
    with np.errstate(all="ignore"):
        reads = Tape(f.leaf(np.eye(d), ("q", "d")))
        out, _ = rows_of(one).define(reads, leaves["dk"], leaves["dv"], o)
        ends = o.last if one.problem.state_parts > 1 else [out]
        seeds = [f.leaf(x, ("d", "v")) for x in np.split(of_state, one.problem.state_parts)]
        grads = gradients(ends, seeds, list(leaves.values()))
    return _joined(leaves, [(abs(g.a), _span(g)) for g in grads])


def _further(o: Any, *names: str) -> dict[str, Any]:
    """Return by gradient what a call has of these, of gates and of a state, whose matrices have a number each."""
    found = {f"d{n}": x for n in (*names, *GATES) if (x := getattr(o, n)) is not None}
    state = o.state if isinstance(o.state, tuple) else () if o.state is None else (o.state,)
    return found | {f"dstate {i}": x for i, x in enumerate(state)}


def _joined(names: Any, found: Any) -> dict[str, Any]:
    """Return what was found by gradient, of a state's matrices one below the other."""
    by = dict(zip(names, found, strict=True))
    state = [by.pop(n) for n in list(by) if n.startswith("dstate ")]
    return by | ({"dstate": tuple(np.concatenate(x) for x in zip(*state, strict=True))} if state else {})


def _stepped(
    one: Head, shape: Steps, model: Model, dout: Float, lost_dout: Any, off: Operands, of_state: Float | None
) -> dict[str, Float]:
    """Return the largest errors of the gradients of a recurrence that goes token by token, forward and backward."""
    f = Losses(model, 1, chance=False)
    o = one.options(f, wrap=Tape)
    start, parts = begun(one, f, shape, o, Tape), one.problem.state_parts
    state, outs, seeds, leaves = start, [], [], []
    with np.errstate(all="ignore"):
        shape.prepare(o)
        for t in range(len(one.q)):
            at = slice(t, t + 1)
            q, k, v = (
                Tape(f.leaf(x[at], axes, less[at]))
                for x, axes, less in (
                    (one.q, ("q", "d"), off.q),
                    (one.k, ("k", "d"), off.k),
                    (one.v, ("k", "v"), off.v),
                )
            )
            gates = {n: Tape(gate_of(f, x[at])) for n, x in one.gates.items()}
            vars(o).update(gates, token=t)
            state, out = shape.take(state, q, k, v, o)
            outs.append(out)
            seeds.append(f.leaf(dout[at], ("q", "v"), np.broadcast_to(lost_dout, dout.shape)[at]))
            leaves.append([q, k, v, *gates.values()])
        if of_state is not None:
            at_end = [f.leaf(x, ("d", "v")) for x in np.split(of_state, parts)]
            outs, seeds = [*outs, *state[:parts]], [*seeds, *at_end]
        grads = gradients(outs, seeds, [*(x for token in leaves for x in token), *start[:parts]])
    grads, of_start = grads[:-parts], grads[-parts:]
    names = ["dq", "dk", "dv", *(f"d{n}" for n in one.gates)]
    found = {n: np.concatenate([_span(g) for g in grads[i :: len(names)]]) for i, n in enumerate(names)}
    return found | {"dstate": np.concatenate([_span(g) for g in of_start])}


def _span(g: Lossy) -> Float:
    return np.asarray(np.nan_to_num(np.broadcast_to(g.node.span, g.a.shape), nan=np.inf))
