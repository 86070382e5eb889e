"""Attention as a dynamical system: recurrences equal masked matrices, and softmax is the limit of growing state."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
from numpy.typing import NDArray

from ..tensor import polynomial
from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS"]

Float = NDArray[np.float64]


def _call(n: int = 60, d: int = 4) -> tuple[Float, Float, Float, Float]:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, n, d)) * 0.6
    return q, k, v, rng.uniform(0.8, 1, n)


def _gated(q: Float, k: Float, v: Float, a: Float) -> Float:
    state, out = np.zeros((q.shape[1], v.shape[1])), np.empty_like(v)
    for t in range(len(q)):
        state = a[t] * state + np.outer(k[t], v[t])
        out[t] = q[t] @ state
    return out


def _from_matrix(first: int, what: str) -> Evidence:
    """Compare the recurrence with (QKᵀ ∘ L) V, L_ts the product of a from s + first to t."""
    q, k, v, a = _call()
    logs = np.cumsum(np.log(a))
    mask = np.tril(np.exp(logs[:, None] - logs + (1 - first) * np.log(a)))
    size = (np.abs(q) @ np.abs(k).T * mask) @ np.abs(v)
    error = np.abs(_gated(q, k, v, a) - ((q @ k.T) * mask) @ v)
    return Evidence(float((error / size).max()), 300 * 2.0**-53, what)


def recurrence() -> Evidence:
    """h_t = a_t h_{t-1} + k_t v_tᵀ, o_t = q_t h_t, against (QKᵀ ∘ L) V, L_ts the product of a from s + 1 to t."""
    return _from_matrix(1, "error over the sum of the terms' sizes")


def recurrence_off_by_one() -> Evidence:
    """The mask with a's product from s instead of s + 1."""
    return _from_matrix(0, "the same, off by one")


def _normalised(scaled: bool, what: str) -> Evidence:
    """Compare a system that divides as it goes with the masked matrix; its state is scaled down, or not."""
    rng = np.random.default_rng(1)
    q, k = np.abs(rng.standard_normal((2, 60, 4)))
    v = rng.standard_normal((60, 3))
    # per output row the normaliser depends on q: the state holds (k v, k), as for any finite map
    state, total, found = np.zeros((4, 3)), np.zeros(4), np.empty_like(v)
    before = 0.0
    for t in range(60):
        now = before + float(k[t].sum())
        factor = before / now if scaled else 1.0
        state, total = factor * state + np.outer(k[t], v[t]) / now, factor * total + k[t] / now
        found[t] = (q[t] @ state) / (q[t] @ total)
        before = now
    p = np.tril(q @ k.T)
    error = np.abs(found - p @ v / p.sum(1, keepdims=True)).max()
    return Evidence(float(error), 1000 * 2.0**-53, what)


def normalised() -> Evidence:
    """Normalised linear attention as a system with Λ_t = η_{t-1}/η_t and B_t = k_t/η_t: it divides as it goes."""
    return _normalised(True, "distance from the masked matrix")


def normalised_without() -> Evidence:
    """Without the factor Λ."""
    return _normalised(False, "the same without the factor")


def selective(a: float = 1.7) -> Evidence:
    """exp(-a·softplus(x)) = sigmoid(-x)^a at 50 digits: S6's decay is a gate of an RNN."""
    needs(a > 0, "a > 0")
    worst = mpmath.mpf(0)
    with mpmath.workdps(50):
        for x in (-30, -3, -0.1, 0, 0.5, 4, 40):
            left = mpmath.exp(-a * mpmath.log1p(mpmath.exp(x)))
            right = (1 / (1 + mpmath.exp(x))) ** a
            worst = max(worst, abs(left / right - 1))
    return Evidence(float(worst), 1e-47, "relative distance at 50 digits")


def selective_other() -> Evidence:
    """sigmoid(x)^a, the other sign."""
    x, a = 0.5, 1.7
    ratio = math.exp(-a * math.log1p(math.exp(x))) / (1 / (1 + math.exp(-x))) ** a
    return Evidence(abs(ratio - 1), 1e-47, "relative distance with the other sign")


def growing(degrees: tuple[int, ...] = (2, 4, 6, 8)) -> Evidence:
    """Causal softmax as a recurrence with C(d + g, g) numbers a feature of v: within its proven bound, for each g."""
    q, k, v, _ = _call()
    given = [x[None, None] for x in (q, k, v)]
    p = np.tril(np.exp(q @ k.T / 4))
    exact = p @ v / p.sum(1, keepdims=True)
    errors, states, worst = [], [], 0.0
    for g in degrees:
        found = polynomial(given[0], [given[1]], [given[2]], scale=0.25, causal=True, degree=g)
        errors.append(float(np.abs(found.out[0, 0] - exact).max()))
        states.append(math.comb(4 + g, g))
        worst = max(worst, float((np.abs(found.out[0, 0] - exact).max(1) / found.bound[0, 0]).max()))
    falling = max(b / a for a, b in itertools.pairwise(errors))
    return Evidence(
        max(worst, falling),
        1.0,
        "error over its bound, and over that of the smaller state",
        {"states": states, "errors": errors},
    )


def fixed_state() -> Evidence:
    """A state of degree 2 held to what degree 8 reaches."""
    q, k, v, _ = _call()
    given = [x[None, None] for x in (q, k, v)]
    p = np.tril(np.exp(q @ k.T / 4))
    exact = p @ v / p.sum(1, keepdims=True)
    small, large = (
        np.abs(polynomial(given[0], [given[1]], [given[2]], scale=0.25, causal=True, degree=g).out[0, 0] - exact).max()
        for g in (2, 8)
    )
    return Evidence(float(small / large), 1.0, "error of degree 2 over that of degree 8")


SOURCE = "Sieber et al., Understanding the differences in foundation models (arXiv 2405.15731; an overview was read)"
CLAIMS = [
    Claim(
        "systems-recurrence",
        "Linear attention with decays is a recurrence and a masked matrix: the same",
        SOURCE,
        recurrence,
        recurrence_off_by_one,
    ),
    Claim(
        "systems-normalised",
        "Normalised attention is a system whose state is scaled down as its normaliser grows",
        SOURCE,
        normalised,
        normalised_without,
    ),
    Claim(
        "systems-selective",
        "S6's decay exp(-a softplus(x)) is the gate sigmoid(-x)^a",
        SOURCE,
        selective,
        selective_other,
        ("a > 0",),
    ),
    Claim(
        "systems-growing-state",
        "Softmax attention is the limit of recurrences whose state grows: each state within its bound",
        SOURCE,
        growing,
        fixed_state,
        ("bounded logits",),
    ),
]
