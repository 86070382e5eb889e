"""Combiner's factorised attention: a distribution with full support, at sub-quadratic cost."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS", "factorised"]

Float = NDArray[np.float64]


def factorised(q: Float, k: Float, v: Float, block: int) -> tuple[Float, Float]:
    """Return causal Combiner-fixed attention, factorised, and the distribution that it stands for, (n, n).

    A token attends to its own block token by token, and to each earlier block as one: to the block by its largest
    features, within it by the block's own query.
    """
    n, d = q.shape
    needs(n % block == 0, f"blocks of {block} divide n = {n}")
    by, blocks = 1 / math.sqrt(d), n // block
    of_q, of_k = (x.reshape(blocks, block, d).max(1) for x in (q, k))
    inner = np.exp(by * np.einsum("rd,rtd->rt", of_q, k.reshape(blocks, block, d)))
    inner /= inner.sum(1, keepdims=True)
    summary = np.einsum("rt,rtd->rd", inner, v.reshape(blocks, block, -1))
    out, weights = np.zeros_like(v), np.zeros((n, n))
    for i in range(n):
        r = i // block
        own = slice(r * block, i + 1)
        a, b = np.exp(by * (k[own] @ q[i])), np.exp(by * (of_k[:r] @ q[i]))
        total = a.sum() + b.sum()
        out[i] = (a @ v[own] + b @ summary[:r]) / total
        weights[i, own] = a / total
        weights[i, : r * block] = (b[:, None] * inner[:r] / total).ravel()
    return out, weights


def _call() -> tuple[Float, Float, Float]:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 64, 8))
    return q, k, v


def distribution(block: int = 8) -> Evidence:
    """Rows sum to one, every earlier token has a weight above 0, and the factorised result is that distribution's."""
    q, k, v = _call()
    out, weights = factorised(q, k, v, block)
    error = max(float(np.abs(out - weights @ v).max()), float(np.abs(weights.sum(1) - 1).max()))
    support = bool((weights[np.tril_indices(len(q))] > 0).all())
    return Evidence(error if support else math.inf, 1e-14, "distance of the results, and of row sums from 1")


def is_softmax() -> Evidence:
    """The wish that the distribution is softmax's: mean total variation."""
    q, k, v = _call()
    _, weights = factorised(q, k, v, 8)
    s = np.where(np.tril(np.ones((64, 64), bool)), q @ k.T / math.sqrt(8), -np.inf)
    p = np.exp(s - s.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return Evidence(float(0.5 * np.abs(weights - p).sum(1).mean()), 0.05, "mean total variation to softmax")


CLAIMS = [
    Claim(
        "combiner-support",
        "Combiner's attention is a distribution over all earlier tokens: full support, rows sum to one",
        "Ren et al., Combiner (arXiv 2107.05768; recalled)",
        distribution,
        is_softmax,
        ("blocks divide n",),
    ),
]
