"""Relative positions: what softmax with a bias alone cannot say, and one layer with a gain can."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS", "layer"]

Float = NDArray[np.float64]


def layer(x: Float, weights: Any, bias: Float, gain: Float | None = None) -> Float:
    """Return (softmax(QKᵀ + B) ∘ C) V; B and C are Toeplitz: a number for each of the 2n - 1 offsets.

    Parameters
    ----------
    x : (n, d) array
        Tokens.
    weights : three (d, d) arrays
        To queries, keys and values.
    bias, gain : (2n - 1,) arrays
        B and C, from offset -(n - 1) on; without a gain C is 1.
    """
    n = len(x)
    at = np.arange(n)[:, None] - np.arange(n) + n - 1
    q, k, v = (x @ w for w in weights)
    s = q @ k.T + bias[at]
    p = np.exp(s - s.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return np.asarray((p if gain is None else p * gain[at]) @ v)


def _net(constant: bool, gained: bool = False, layers: int = 4) -> float:
    """Return how far a net's outputs spread over places, over their size."""
    rng = np.random.default_rng(0)
    n, d = 12, 6
    x = np.tile(rng.standard_normal(d), (n, 1)) if constant else rng.standard_normal((n, d))
    for _ in range(layers):
        gain = np.asarray(rng.standard_normal(2 * n - 1), np.float64) if gained else None
        attended = layer(x, rng.standard_normal((3, d, d)) / d**0.5, rng.standard_normal(2 * n - 1), gain)
        x = x + attended + np.maximum(attended @ rng.standard_normal((d, d)), 0)
    return float(np.ptp(x, axis=0).max() / np.abs(x).max())


def constant(layers: int = 4, same: bool = True) -> Evidence:
    """A random net with relative biases, on equal tokens: its outputs are equal, up to float64's rounding."""
    needs(same, "all tokens are equal")
    return Evidence(_net(constant=True, layers=layers), 1e-12 * layers, "spread over places")


def with_gain() -> Evidence:
    """The same net with a gain after softmax."""
    return Evidence(_net(constant=True, gained=True), 4e-12, "spread over places, with a gain")


def _index(gain: bool, n: int = 17) -> float:
    weights = [np.zeros((1, 1)), np.zeros((1, 1)), np.ones((1, 1))]
    offsets = np.arange(-(n - 1), n)
    seen = np.asarray(offsets >= 0, np.float64)
    found = layer(np.ones((n, 1)), weights, np.zeros(2 * n - 1), seen if gain else None)[:, 0]
    return float(np.abs(found - (np.arange(n) + 1) / n).max())


def position() -> Evidence:
    """One layer with the gain 1[j <= i] on equal tokens outputs exactly i/n."""
    return Evidence(_index(gain=True), 1e-14, "distance from i/n")


def position_without() -> Evidence:
    """Without the gain the best constant is half the range away."""
    return Evidence(_index(gain=False), 1e-14, "distance from i/n, no gain")


SOURCE = "Luo et al., URPE (arXiv 2205.13401; its abstract and code were read, the theorems are recalled)"
CLAIMS = [
    Claim(
        "rpe-constant",
        "Nets whose positions enter by biases in softmax alone are constant on equal tokens",
        SOURCE,
        constant,
        with_gain,
        ("all tokens are equal",),
    ),
    Claim(
        "urpe-position",
        "One layer with a Toeplitz gain after softmax outputs a token's place exactly",
        SOURCE,
        position,
        position_without,
    ),
]
