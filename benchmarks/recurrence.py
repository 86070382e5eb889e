"""How far a recurrence's state drifts in 10**5 tokens, by decay and by the type that the state is kept in; its time.

Two recurrences of 8 x 8 states: linear attention with a decay, and the delta rule with gates (keys of length 1, steps
from 0 to 1). The state is kept in float32, bfloat16 or float16, each step computed in float32. Beside it the same in
float64: what that loses itself is bounded below, 2**-29 of the bound of float32, so the figures are the error of the
state. At the end both recurrences' float64 states are held to their enclosures: the operator's own steps over
fixed-point integers of 128 bits after the point, every operation of which is off by less than one unit.

The bound adds up, token by token, what a step may round away, times the decay: nothing in it is picked. An error is
the largest over the state's elements, over the largest element of the state; figures are in unit roundoffs u of the
state's type.

Time is that of 10**3, 10**4 and 10**5 steps in NumPy, float32, in CPU seconds, the least of three runs; the state is
counted in bytes after them. What a token costs does not grow, and the state is as large as ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from refattn.bench import Row
from refattn.dtypes import FORMATS
from refattn.variants import Steps, variant_of

STEPS = 10**5
D = 8
DECAYS = (0.5, 0.1, 1e-2, 1e-3, 1e-4, 0.0)
"""Rates: a step keeps exp(-rate) of the state."""
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
RULES = {"linear": "lightning", "delta": "gated_delta"}
"""Each with the operator whose steps it takes."""
POINT = 128
"""Bits after the point of an enclosure's numbers."""
LENGTHS = (10**3, 10**4, 10**5)


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


class Fixed:
    """A matrix of integers that stand for so many 2**-POINT; a product is rounded down by less than one of them."""

    def __init__(self, a: Any) -> None:
        self.a = a

    @classmethod
    def of(cls, x: Any) -> Fixed:
        """Take in float numbers, exactly."""
        scaled = np.ldexp(np.asarray(x, np.float64), POINT // 2)
        assert (scaled == np.floor(scaled)).all()
        return cls(np.frompyfunc(lambda y: int(y) << POINT // 2, 1, 1)(scaled).astype(object))

    @property
    def T(self) -> Fixed:
        """The transpose."""
        return Fixed(self.a.T)

    def __add__(self, o: Fixed) -> Fixed:
        return Fixed(self.a + o.a)

    def __sub__(self, o: Fixed) -> Fixed:
        return Fixed(self.a - o.a)

    def __mul__(self, o: Fixed) -> Fixed:
        return Fixed((self.a * o.a) >> POINT)

    def __matmul__(self, o: Fixed) -> Fixed:
        return Fixed(np.dot(self.a, o.a) >> POINT)


def enclosed(rule: str, decays: Any = DECAYS, steps: int = STEPS) -> tuple[Any, Fraction]:
    """Return the last states, as integers (D, decays · D) of 2**-POINT, and what each is off by at most.

    A step takes an error E to M E, and M shrinks no less than the decay does: it is the decay times I, or times
    I - beta k^T k with 0 <= beta |k|**2 <= 2, which is looked at in integers. What a step adds is counted in units: one
    for each of 64 numbers that fade, together sqrt(64) long at most, and for each of the 64 that are added; of the
    delta rule also for each of 8 columns one of k S and one of its product with beta, both times k. Keys and values are
    taken in exactly.
    """
    definition = variant_of(RULES[rule]).shape
    assert isinstance(definition, Steps)
    fade = np.exp(-np.asarray(decays, np.float64)).astype(np.float32)
    k, v, beta = (Fixed.of(x).a for x in tokens(steps))
    row = Fixed.of(np.repeat(fade, D)[None])
    none, one = Fixed(np.zeros((0, D), int).astype(object)), Fixed.of(np.ones((1, 1)))
    o = SimpleNamespace(scale=one, fade=row, alpha=row.T, beta=one)
    state = Fixed(np.zeros((D, len(fade) * D), int).astype(object))
    length = (k * k).sum(1)
    assert rule == "linear" or (length * beta[:, 0] <= 2 << 3 * POINT).all()
    of_key = int(max(length, default=0) >> 2 * POINT) + 1  # at least |k|**2, hence at least |k|
    for i in range(steps):
        o.beta = Fixed(beta[i : i + 1])
        state, _ = definition.step(state, none, Fixed(k[i : i + 1]), Fixed(np.tile(v[i : i + 1], len(fade))), o)
    units = D + (D if rule == "linear" else 2 * D * of_key + D)
    return state.a, Fraction(units * steps, 2**POINT)


def off_by(rule: str, states: Any, decays: Any = DECAYS, steps: int = STEPS) -> list[tuple[float, float]]:
    """Return by decay how far float64 states (decays, D, D) are from their enclosures' middles, and the radius."""
    mids, radius = enclosed(rule, decays, steps)
    found = []
    for i, state in enumerate(states):
        mid = mids[:, i * D : (i + 1) * D].ravel()
        far = max(abs(Fraction(float(x)) - Fraction(int(y), 2**POINT)) for x, y in zip(state.ravel(), mid, strict=True))
        top = Fraction(int(max(abs(mid))), 2**POINT)
        found.append((float(far / top), float(radius / top)))
    return found


def timed(rule: str, n: int) -> tuple[float, int]:
    """Return the least CPU seconds of three runs over n tokens, step by step, and the bytes of the last state."""
    k, v, beta = tokens(n)
    fade, seconds, state = np.full((1, 1, 1), np.exp(-0.01), np.float32), [], np.zeros(0)
    for _ in range(3):
        start, state = time.process_time(), np.zeros((1, D, D), np.float32)
        for i in range(n):
            state = stepped(rule, state, fade, k[i], v[i], beta[i], np.float32)
        seconds.append(time.process_time() - start)
    return min(seconds), state.nbytes


def rows() -> Iterator[Row]:
    """Yield the figures: the error after 10**5 tokens by rule, type and decay, each held to its bound."""
    for rule in RULES:
        found = drift(rule)
        for t in TYPES:
            for decay, error, bound in zip(DECAYS, found.error[t], found.bound[t], strict=True):
                yield Row(f"{rule}, {t}, decay {decay:g}", float(error), "u", at_most=float(bound))
        for decay, (off, room) in zip(DECAYS, off_by(rule, found.state), strict=True):
            yield Row(f"{rule}, float64 beside its enclosure, decay {decay:g}", off / 2.0**-53, "u")
            yield Row(f"{rule}, the enclosure's radius, decay {decay:g}", room / 2.0**-53, "u")
        for n in LENGTHS:
            seconds, size = timed(rule, n)
            yield Row(f"{rule}, time of {n} tokens", seconds, "s")
            yield Row(f"{rule}, time of a token, {n} tokens", 1e6 * seconds / n, "us")
            yield Row(f"{rule}, state after {n} tokens", float(size), "bytes", at_most=4.0 * D * D)
