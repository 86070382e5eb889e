"""Relative positions: what softmax with a bias alone cannot say, and one layer with a gain can."""

from __future__ import annotations

from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, needs, total
from .fields import Q, balls, disjoint, each, exp, precise, rational, rationals, zeros

__all__ = ["CLAIMS", "layer"]

Array = NDArray[Any]


def layer(x: Array, weights: Any, bias: Array, gain: Array | None = None) -> Array:
    """Return (softmax(QKᵀ + B) ∘ C) V of balls; B and C are Toeplitz: a number for each of the 2n - 1 offsets.

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
    p = exp(q @ k.T + bias[at])
    p = p / p.sum(1, keepdims=True)
    return np.asarray((p if gain is None else p * gain[at]) @ v)


def _net(tokens: Array, gained: bool, layers: int) -> Array:
    """Return the outputs of a random net with biases, with gains or without, residuals and ReLU networks."""
    x, (n, d) = balls(tokens), tokens.shape
    for i in range(layers):
        weights, bias, gain, w = (
            balls(rationals(4 * i + j, *shape, over=16))
            for j, shape in enumerate(((3, d, d), (2 * n - 1,), (2 * n - 1,), (d, d)))
        )
        attended = layer(x, weights, bias, gain if gained else None)
        x = x + attended + np.maximum(attended @ w, balls(zeros(n, d)))
    return x


def _by_bias(n: int = 4) -> int:
    """Return how many outputs surely differ from means by exp of biases, where queries and keys are 0."""
    x, shares = rationals(5, n, 1), rationals(6, 2 * n - 1, least=1)
    out = layer(balls(x), balls(np.array([[[Q(0)]], [[Q(0)]], [[Q(1)]]])), each(lambda b: flint.arb(b).log(), shares))
    seen = [[shares[i - j + n - 1] for j in range(n)] for i in range(n)]
    return disjoint(out[:, 0], [sum(s * x[:, 0]) / sum(s) for s in np.array(seen)])


def _apart(gained: bool, layers: int, same: bool, what: str) -> Evidence:
    one = rationals(99, 6, 3) if not same else np.tile(rationals(99, 3), (6, 1))
    needs(bool((one == one[0]).all()), "all tokens are equal")
    out = _net(one, gained, layers)
    return Evidence(total(disjoint(out, np.tile(out[0], (6, 1))), _by_bias()), 0, what)


@precise()
def constant(layers: int = 4, same: bool = True) -> Evidence:
    """A random net with relative biases, on equal tokens: no output surely differs from the first place's."""
    return _apart(False, layers, same, "elements that surely differ from the first place's")


@precise()
def with_gain() -> Evidence:
    """The same net with a gain after softmax."""
    return _apart(True, 4, True, "elements that surely differ, with a gain")


def _index(gain: bool, what: str, n: int = 17) -> Evidence:
    weights = rational(np.array([0, 0, 1]))[:, None, None]
    seen = rational(np.arange(-(n - 1), n) >= 0)
    found = layer(balls(zeros(n, 1) + 1), balls(weights), balls(zeros(2 * n - 1)), balls(seen) if gain else None)
    places = balls(rational(np.arange(1, n + 1))) / n
    return Evidence(disjoint(found[:, 0], places), 0, what)


@precise()
def position() -> Evidence:
    """One layer with the gain 1[j <= i] on equal tokens outputs exactly i/n."""
    return _index(True, "places whose output surely differs from i/n")


@precise()
def position_without() -> Evidence:
    """Without the gain all places have one output."""
    return _index(False, "places whose output surely differs from i/n, no gain")


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
