"""How far a recurrence's state drifts in 10**5 tokens, by decay and by the type that the state is kept in.

Two recurrences of 8 x 8 states: linear attention with a decay, and the delta rule with gates (keys of length 1, steps
from 0 to 1). The state is kept in float32, bfloat16 or float16, each step computed in float32. Beside it the same in
float64: what that loses itself is bounded below, 2**-29 of the bound of float32, so the figures are the error of the
state. At the end the linear recurrence's float64 state is held to its enclosure, one certified product of all tokens.

The bound adds up, token by token, what a step may round away, times the decay: nothing in it is picked. An error is
the largest over the state's elements, over the largest element of the state; figures are in unit roundoffs u of the
state's type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from refattn.bench import Row
from refattn.dtypes import FORMATS
from refattn.exact.levels import Level

STEPS = 10**5
D = 8
DECAYS = (0.5, 0.1, 1e-2, 1e-3, 1e-4, 0.0)
"""Rates: a step keeps exp(-rate) of the state."""
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
RULES = ("linear", "delta")


class Drift(NamedTuple):
    """By decay: how far each type's state is off, and what it may be off by, in u; and the state in float64."""

    error: dict[str, Any]
    bound: dict[str, Any]
    state: Any


def tokens(steps: int) -> tuple[Any, Any, Any]:
    """Return keys of length 1 and values (steps, D), and steps beta (steps, 1), all float32."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, steps, D))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    return k.astype(np.float32), v.astype(np.float32), rng.random((steps, 1)).astype(np.float32)


def stepped(rule: str, state: Any, fade: Any, k: Any, v: Any, beta: Any, kind: Any) -> Any:
    """Return the states (decays, D, D) after one token, computed in one type."""
    state = fade * state
    if rule == "linear":
        return state + k[:, None] * v
    return state + k[:, None] * ((v - k @ state) * beta)[:, None]


def own(rule: str, state: Any, before: Any, k: Any, v: Any, inside: float, kept: float) -> Any:
    """Return the largest norm of what a token's step rounds away, (decays,).

    ``inside`` is the unit roundoff of the step's operations, ``kept`` of the state's type: the decay, k S (D terms),
    v less it, beta, times k, the sum, and the state's own rounding.
    """
    size, was, read = (np.sqrt((x * x).sum((1, 2))) for x in (state, before, before))
    brought = 1.0001 * np.sqrt((v.astype(np.float64) ** 2).sum())
    if rule == "linear":
        return inside * (was + brought + size) + kept * size
    return inside * (was + (D + 6) * (read + brought) + size) + kept * size


def drift(rule: str, decays: Any = DECAYS, steps: int = STEPS, types: Any = tuple(TYPES)) -> Drift:
    """Return the errors of the state after some tokens, by decay.

    Parameters
    ----------
    rule : {"linear", "delta"}
    decays : sequence of float
    steps : int
    types : sequence of str
        Out of ``TYPES``.
    """
    fade = np.exp(-np.asarray(decays, np.float64)).astype(np.float32)[:, None, None]
    k, v, beta = tokens(steps)
    wide = [x.astype(np.float64) for x in (k, v, beta)]
    exact = np.zeros((len(fade), D, D))
    states = {t: exact.astype(np.float32) for t in types}
    bound = {t: np.zeros(len(fade)) for t in (*types, "float64")}
    units = {t: FORMATS[t].unit_roundoff for t in bound}
    for i in range(steps):
        before = fade * exact
        exact = stepped(rule, exact, fade.astype(np.float64), *(x[i] for x in wide), np.float64)
        for t in bound:
            inside = units["float64" if t == "float64" else "float32"]
            kept = 0.0 if t in ("float32", "float64") else units[t]
            bound[t] = fade[:, 0, 0] * bound[t] + own(rule, exact, before, k[i], v[i], inside, kept)
            if t != "float64":
                new = stepped(rule, states[t], fade, k[i], v[i], beta[i], np.float32)
                states[t] = new.astype(TYPES[t]).astype(np.float32)
    top = np.abs(exact).max((1, 2))
    assert all((bound["float64"] <= 2.0**-28 * bound[t]).all() for t in types)
    error = {t: np.abs(states[t].astype(np.float64) - exact).max((1, 2)) / top / units[t] for t in types}
    return Drift(error, {t: bound[t] / top / units[t] for t in types}, exact)


def enclosed(decay: float, steps: int = STEPS) -> tuple[Any, Any]:
    """Return the linear recurrence's last state and its radius: the decays' powers and one product, certified."""
    f, (k, v, _) = Level(2), tokens(steps)
    fade = float(np.float32(np.exp(-decay)))
    logs = f.array(np.array([[fade]])).log() * f.array(np.arange(steps - 1.0, -1.0, -1.0)[:, None])
    s = (f.array(k.astype(np.float64)) * logs.exp()).T @ f.array(v.astype(np.float64))
    return s.h, np.abs(s.l) + s.r


def rows() -> Iterator[Row]:
    """Yield the figures: the error after 10**5 tokens by rule, type and decay, each held to its bound."""
    for rule in RULES:
        found = drift(rule)
        for t in TYPES:
            for decay, error, bound in zip(DECAYS, found.error[t], found.bound[t], strict=True):
                yield Row(f"{rule}, {t}, decay {decay:g}", float(error), "u", at_most=float(bound))
        if rule == "linear":
            for decay, state in zip(DECAYS, found.state, strict=True):
                mid, radius = enclosed(decay)
                off, room = ((x / np.abs(mid).max()).max() / 2.0**-53 for x in (np.abs(state - mid), radius))
                yield Row(f"{rule}, float64 beside its enclosure, decay {decay:g}", float(off), "u")
                yield Row(f"{rule}, the enclosure's radius, decay {decay:g}", float(room), "u")
