"""A recurrence over any arithmetic, one token after another, and its gradients through time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..variants import Steps
from .heads import Head, matrix_of, numbers_of
from .tape import Tape, gradients

__all__ = ["begun", "by_steps"]


def by_steps(
    one: Head,
    f: Any,
    shape: Steps,
    dout: NDArray[np.float64] | None,
    dstate_out: NDArray[np.float64] | None = None,
) -> dict[str, NDArray[Any]]:
    """Return the arithmetic's numbers of a head's out and last state, and with `dout` of its gradients.

    These are dq, dk, dv, those by its gates, and by the state that it starts from where the call has one.

    Parameters
    ----------
    one : Head
        The head.
    f : arithmetic
        What to count in.
    shape : Steps
        The recurrence.
    dout : (b, h_q, n_q, d_v) float64, optional
        The gradient arriving at out.
    dstate_out : array of the state's shape, optional
        With `dout`, the gradient arriving at the last state.
    """
    taped = dout is not None
    o = one.options(f, wrap=Tape) if taped else one.options(f)
    with np.errstate(all="ignore"):
        shape.prepare(o)
        start = begun(one, f, shape, o, Tape if taped else None)
        state, parts = start, one.problem.state_parts
        tokens = one.tokens(f)
        if taped:
            tokens = [([Tape(x) for x in x3], {n: Tape(g) for n, g in gates.items()}) for x3, gates in tokens]
        outs = []
        for t, ((q, k, v), gates) in enumerate(tokens):
            vars(o).update(gates, token=t)
            state, out = shape.take(state, q, k, v, o)
            outs.append(out)
        if not taped:
            return {"out": _stacked(f, outs, one.v.shape[1]), "state": _joined(state[:parts])}
        arriving = dout[one.batch, one.head, one.rows]  # type: ignore[index]
        seeds = [matrix_of(f, arriving[t : t + 1]) for t in range(len(outs))]
        ends = outs
        if dstate_out is not None:
            at_end = np.split(dstate_out[one.sequence, one.head], parts)
            ends, seeds = [*outs, *state[:parts]], [*seeds, *(matrix_of(f, x) for x in at_end)]
        leaves = [[*x3, *gates.values()] for x3, gates in tokens]
        grads = gradients(ends, seeds, [*(x for token in leaves for x in token), *start[:parts]])
    grads, of_start = grads[:-parts], grads[-parts:]
    wide = {"dq": one.q, "dk": one.k, "dv": one.v} | {f"d{n}": x for n, x in one.gates.items()}
    by = {n: _stacked(f, grads[i :: len(wide)], x.shape[1]) for i, (n, x) in enumerate(wide.items())}
    out = _stacked(f, [x.value for x in outs], one.v.shape[1])
    by |= {} if one.state is None else {"dstate": _joined(of_start)}
    return {"out": out, "state": _joined([x.value for x in state[:parts]]), **by}


def begun(one: Head, f: Any, shape: Steps, o: Any, wrap: Any = None) -> list[Any]:
    """Return the matrices that a recurrence begins with in an arithmetic; those of a state are what ``o.state`` has."""
    given = [] if o.state is None else list(o.state) if isinstance(o.state, tuple) else [o.state]
    none = [matrix_of(f, x) for x in one.start(shape.held)[len(given) :]]
    return [*given, *(none if wrap is None else map(wrap, none))]


def _joined(parts: list[Any]) -> NDArray[Any]:
    return np.concatenate([numbers_of(x) for x in parts])


def _stacked(f: Any, rows: list[Any], width: int) -> NDArray[Any]:
    none = matrix_of(f, np.zeros((0, width)))  # there may be no token
    return np.concatenate([numbers_of(x) for x in [none, *rows]])
