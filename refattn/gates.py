"""What a recurrence takes beside query, key and value, checked: the state that it starts from, and its gates."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidProblem

__all__ = ["GATES", "RECURRENT", "check_shape", "finite_state", "gate"]

GATES = {"alpha": 1, "beta": 2, "eta": 1}
"""The gates and the most that each may be; the least is 0. Up to 2 a step along a key of length 1 does not grow."""
RECURRENT = ("state", *GATES)


def check_shape(p: Any, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a state or a gate of another shape than a call's tensors ask for."""
    of_token = (p.batch, p.heads, p.n_k)
    if name == "state":
        of = "b" if p.cu_seqlens_q is None else "packed sequences"
        rows = "d_k" if p.eta is None else "2 d_k"
        more = "a matrix for each query head" if p.eta is None else "the memory, and below it its momentum"
        good, text = [p.state_shape], f"({of}, h_q, {rows}, d_v) = {{}}, {more}"
    elif name == "alpha":
        good = [(*of_token, 1), (*of_token, p.d_k)]
        text = "(b, h_q, n_k, 1) = {}, or d_k numbers for each token and query head in place of 1"
    else:
        good, text = [(*of_token, 1)], "(b, h_q, n_k, 1) = {}, a number for each token and query head"
    if shape not in good:
        raise InvalidProblem(f"{name}: got shape {shape}, expected {text.format(good[0])}")


def _expect_floats(name: str, x: Any) -> None:
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        got = f"dtype {x.dtype.name}" if isinstance(x, np.ndarray) else type(x).__name__
        raise InvalidProblem(f"{name}: got {got}, expected a NumPy array of floats")


def finite_state(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a state, refusing NaN and inf in it."""
    _expect_floats("state", x)
    if not np.isfinite(x).all():
        raise InvalidProblem("state: has NaN or inf; a recurrence starts from numbers")
    return x


def gate(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a gate's numbers, refusing those outside its range, NaN among them."""
    if name not in GATES:
        raise InvalidProblem(f"gate: got {name!r}, expected one of {', '.join(GATES)}")
    _expect_floats(name, x)
    out = ~((x >= 0) & (x <= GATES[name]))
    if out.any():
        at = tuple(int(i) for i in np.argwhere(out)[0])
        why = "clamp it"
        if np.isnan(x[at]):
            why = "look where it comes from"
        elif name == "alpha":
            why = "is it the decay's logarithm? pass its exp"
            why = "a decay above 1 makes the state grow; pass exp of its logarithm" if x[at] > 1 else why
        raise InvalidProblem(f"{name}: got {x[at]} at {at}, expected numbers from 0 to {GATES[name]}; {why}")
    return x
