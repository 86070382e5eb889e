"""Lightning attention: chunks equal the recurrence, and the naive split of the decay overflows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS", "chunked", "recurrent"]

Array = NDArray[np.floating]


def recurrent(q: Array, k: Array, v: Array, decay: float) -> Array:
    """Return o_t = q_t · S_t with S_t = decay · S_{t-1} + k_t v_tᵀ."""
    state, out = np.zeros((q.shape[1], v.shape[1])), np.empty_like(v)
    for t in range(len(q)):
        state = decay * state + np.outer(k[t], v[t])
        out[t] = q[t] @ state
    return out


def chunked(q: Array, k: Array, v: Array, decay: float, chunk: int) -> Array:
    """Return the same by chunks: inside one by a masked product, before it by the state; no power above 1 occurs."""
    state, out = np.zeros((q.shape[1], v.shape[1])), np.empty_like(v)
    for t in range(0, len(q), chunk):
        a, b, c = q[t : t + chunk], k[t : t + chunk], v[t : t + chunk]
        i = np.arange(len(a))
        mask = np.where(i[:, None] >= i, decay ** np.maximum(i[:, None] - i, 0).astype(float), 0)
        out[t : t + chunk] = ((a @ b.T) * mask) @ c + decay ** (i[:, None] + 1.0) * (a @ state)
        state = decay ** len(a) * state + (decay ** (len(a) - 1.0 - i)[:, None] * b).T @ c
    return out


def _call(n: int = 250, d: int = 16) -> tuple[Array, Array, Array]:
    q, k, v = np.random.default_rng(0).standard_normal((3, n, d))
    return q, k, v


def equal(decay: float = 0.5, chunk: int = 32) -> Evidence:
    """Chunks, the last one ragged, against the recurrence; the error over the size of the terms."""
    needs(0 < decay <= 1, f"a decay in (0, 1], got {decay}")
    q, k, v = _call()
    size = recurrent(np.abs(q), np.abs(k), np.abs(v), decay)
    error = np.abs(chunked(q, k, v, decay, chunk) - recurrent(q, k, v, decay))
    return Evidence(float((error / size).max()), 300 * 2.0**-53, "error over the sum of the terms' sizes")


def naive() -> Evidence:
    """(q·decay^t)(k·decay^-s): in float32 the powers overflow and underflow."""
    q, k, v = (x.astype(np.float32) for x in _call())
    at = np.arange(len(q), dtype=np.float32)[:, None]
    with np.errstate(all="ignore"):
        s = (q * np.float32(0.5) ** at) @ (k * np.float32(0.5) ** -at).T
        found = np.where(np.tril(np.ones(s.shape, bool)), s, 0) @ v
        error = np.abs(found - recurrent(*_call(), 0.5)).max()
    return Evidence(float(error), 1e-3, "error of the naive split in float32")


CLAIMS = [
    Claim(
        "lightning-chunks",
        "Chunked linear attention with decay equals the recurrence, with powers of the decay up to 1 only",
        "Qin et al., Lightning Attention (public code was read)",
        equal,
        naive,
        ("0 < decay <= 1",),
    ),
]
