"""Lightning attention: chunks equal the recurrence, and take no power of the decay above 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, needs, total
from .fields import Q, rationals, unequal

__all__ = ["CLAIMS", "chunked", "recurrent"]

Array = NDArray[Any]
Form = Callable[[Array, Array, Array, Any], Array]


class Decay:
    """A decay that notes the exponents of its powers."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.exponents: list[int] = []

    def __pow__(self, exponent: int) -> Any:
        self.exponents.append(exponent)
        return self.value**exponent


def recurrent(q: Array, k: Array, v: Array, decay: Any) -> Array:
    """Return o_t = q_t · S_t with S_t = decay · S_{t-1} + k_t v_tᵀ."""
    state, out = np.zeros((k.shape[1], v.shape[1]), k.dtype), np.empty_like(v)
    for t in range(len(q)):
        state = decay**1 * state + np.multiply.outer(k[t], v[t])
        out[t] = q[t] @ state
    return out


def _powers(decay: Any, exponents: range) -> Array:
    return np.array([decay**e for e in exponents])


def chunked(q: Array, k: Array, v: Array, decay: Any, chunk: int) -> Array:
    """Return the same by chunks: inside one by a masked product, before it by the state; no power above 1 occurs."""
    state, out = np.zeros((k.shape[1], v.shape[1]), k.dtype), np.empty_like(v)
    for t in range(0, len(q), chunk):
        a, b, c = q[t : t + chunk], k[t : t + chunk], v[t : t + chunk]
        n = len(a)
        mask = np.array([[decay ** (i - j) if i >= j else 0 for j in range(n)] for i in range(n)])
        out[t : t + chunk] = ((a @ b.T) * mask) @ c + _powers(decay, range(1, n + 1))[:, None] * (a @ state)
        state = decay**n * state + (_powers(decay, range(n - 1, -1, -1))[:, None] * b).T @ c
    return out


def _split(q: Array, k: Array, v: Array, decay: Any) -> Array:
    """Return it by (q · decay^t)(k · decay^-s), masked: right in the field, but with powers above 1."""
    n = len(q)
    s = (q * _powers(decay, range(n))[:, None]) @ (k * _powers(decay, range(0, -n, -1))[:, None]).T
    return np.asarray(np.where(np.tril(np.ones((n, n), bool)), s, 0 * s) @ v)


def _call(n: int = 22, d: int = 3) -> Array:
    return rationals(0, 3, n, d)


def _differ(form: Form, decay: Any, what: str) -> Evidence:
    q, k, v = _call()
    return Evidence(unequal(form(q, k, v, decay), recurrent(q, k, v, decay)), 0, what)


def equal(decay: float = 0.5, chunk: int = 8) -> Evidence:
    """Chunks, the last one ragged, against the recurrence in rationals: the same numbers."""
    needs(0 < decay <= 1, f"a decay in (0, 1], got {decay}")
    by = Q(*decay.as_integer_ratio())
    return _differ(lambda q, k, v, a: chunked(q, k, v, a, chunk), by, "elements that differ from the recurrence's")


def late() -> Evidence:
    """Keys that reach the state one decay too few times."""
    found = "elements that differ, keys decayed once too few"
    return _differ(lambda q, k, v, a: chunked(q, k / a, v, a, 8), Q(1, 2), found)


def _least(form: Form, what: str) -> Evidence:
    """Return how negative an exponent of the decay a form takes, once it is right."""
    decay = Decay(Q(1, 2))
    q, k, v = _call()
    wrong = unequal(form(q, k, v, decay), recurrent(q, k, v, Q(1, 2)))
    return Evidence(total(-min(decay.exponents), wrong), 0, what)


def powers(chunk: int = 8) -> Evidence:
    """The exponents of the decay that chunks take, noted by the decay itself: none is negative."""
    return _least(lambda q, k, v, a: chunked(q, k, v, a, chunk), "the most negative exponent's size")


def split() -> Evidence:
    """The split (q · decay^t)(k · decay^-s): the same result, by exponents down to 1 - n."""
    return _least(_split, "the most negative exponent's size, of the split")


SOURCE = "Qin et al., Lightning Attention (public code was read)"
CLAIMS = [
    Claim(
        "lightning-chunks",
        "Chunked linear attention with decay equals the recurrence",
        SOURCE,
        equal,
        late,
        ("0 < decay <= 1",),
    ),
    Claim(
        "lightning-powers",
        "Chunks take powers of the decay up to 1 only, so that none overflows; splitting the decay into rows and"
        " columns takes decay^(1 - n)",
        SOURCE,
        powers,
        split,
    ),
]
