"""Match3: one triple-wise layer answers, and a given small pairwise layer is led astray."""

from __future__ import annotations

import numpy as np

from ..tensor import attention, collide, match3
from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS"]


def solved(sizes: tuple[tuple[int, int], ...] = ((16, 128), (64, 1021), (128, 8191))) -> Evidence:
    """The output's distance to the label, at lengths and moduli."""
    worst = 0.0
    for n, m in sizes:
        needs(n >= 1 and m >= 2, "at least one token and a modulus of at least 2")
        for seed in range(3):
            x = np.random.default_rng(seed).integers(0, m, n)
            worst = max(worst, float(np.abs(match3.solve(x, m) - match3.labels(x, m)).max()))
    return Evidence(worst, 0.1, "largest distance of an output to its label")


def small_logits() -> Evidence:
    """The same layer with its logits divided by 10⁵."""
    x = np.random.default_rng(0).integers(0, 1021, 64)
    q, *rest = match3.layer(x, 1021)
    found = attention(q / 1e5, *rest, scale=1.0)[0, 0, :, 0]
    return Evidence(float(np.abs(found - match3.labels(x, 1021)).max()), 0.1, "distance with logits divided by 10⁵")


def _layer(heads: int, width: int, universe: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(heads + width)
    tokens = 8 * universe + 7
    e, (q, k) = rng.standard_normal((tokens, 16)) / 4, rng.standard_normal((2, heads, 16, 8))
    v = e @ rng.standard_normal((heads, 16, width))
    return np.einsum("hc,hmc->hm", e[1] @ q, e @ k) / 8**0.5, v


def collision(heads: int = 1, width: int = 1, universe: int = 12) -> Evidence:
    """Opposite labels, and outputs that differ by less than 2^(1 - universe/(H(m+1))) of the values."""
    needs(heads * (width + 1) < universe, "a layer of H(m + 1) numbers, fewer than the elements of the universe")
    scores, values = _layer(heads, width, universe)
    found = collide(scores, values, universe=universe)
    size = float(np.ptp(values)) * 2 ** (1 - universe / (heads * (width + 1)))
    apart = found.difference if found.labels[0] != found.labels[1] else np.inf
    return Evidence(
        apart,
        size,
        "difference of the outputs",
        {"labels": [bool(x) for x in found.labels], "tokens": found.inputs.shape[1]},
    )


def triple_is_apart() -> Evidence:
    """The same two inputs in a triple-wise layer."""
    scores, values = _layer(1, 1, 12)
    found = collide(scores, values, universe=12)
    out = [float(match3.solve(x, found.modulus)[0]) for x in found.inputs]
    return Evidence(abs(out[0] - out[1]), found.difference, "difference of a triple-wise layer's outputs")


SOURCE = "Sanford, Hsu and Telgarsky, arXiv 2306.02896 (its abstract was read); the construction is ours"
CLAIMS = [
    Claim(
        "match3-one-layer",
        "One triple-wise head with five features answers Match3 exactly",
        SOURCE,
        solved,
        small_logits,
        ("at least one token",),
    ),
    Claim(
        "match3-pairwise",
        "A pairwise layer with H heads of m values has inputs of opposite labels that it nearly confuses",
        SOURCE,
        collision,
        triple_is_apart,
        ("H(m + 1) is small beside N",),
    ),
]
