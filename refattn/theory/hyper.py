"""HyperAttention's sampled normaliser and product: unbiased, error as m^-1/2, and alpha and kappa of a call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS", "spread"]

Float = NDArray[np.float64]


def spread(query: Any, key: Any, scale: float) -> tuple[float, float]:
    """Return alpha and kappa of a head: how unlike uniform the columns of softmax are, and how unlike its row sums.

    Parameters
    ----------
    query, key : (n, d) arrays
        One head.
    scale : float
        Of the scores.

    Returns
    -------
    alpha : float
        n · max over columns of the sum of squares of D⁻¹A.
    kappa : float
        The largest over the smallest row sum of A = exp(scale · QKᵀ).
    """
    q, k = np.asarray(query, np.float64), np.asarray(key, np.float64)
    if q.ndim != 2 or k.ndim != 2 or q.shape[1] != k.shape[1]:
        raise InvalidInput(f"spread: got shapes {q.shape} and {k.shape}, expected (n, d) and (m, d)")
    s = scale * q @ k.T
    logs = np.log(np.exp(s - s.max(1, keepdims=True)).sum(1)) + s.max(1)
    return len(k) * float((np.exp(s - logs[:, None]) ** 2).sum(0).max()), float(np.exp(np.ptp(logs)))


def _call(n: int = 768, d: int = 16) -> tuple[Float, Float]:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, n, d))
    return np.exp(q @ k.T / math.sqrt(d)), v


def _bias(own_block: bool, what: str, repeats: int = 400, m: int = 64, block: int = 64) -> Evidence:
    """Compare estimated row sums with the true ones: a block exactly, the rest from samples of all or of other keys."""
    a, _ = _call()
    n, rng = len(a), np.random.default_rng(1)
    inside = a[:, :block].sum(1)
    outside = np.arange(block, n) if own_block else np.arange(n)
    found = [inside + a[:, rng.choice(outside, m)].mean(1) * len(outside) for _ in range(repeats)]
    ratios = (np.array(found) / a.sum(1)).mean(1)  # repeats are independent, rows are not
    z = abs(ratios.mean() - 1) / (ratios.std(ddof=1) / math.sqrt(repeats))
    return Evidence(float(z), 4.0, what, {"mean ratio": float(ratios.mean())})


def unbiased() -> Evidence:
    """The estimator of row sums, its own block left out of the sampling: mean ratio 1 within four deviations."""
    return _bias(True, "deviations of the mean ratio from 1")


def counted_twice() -> Evidence:
    """The block also in the sampling, as where a block mask is ignored: it counts twice."""
    return _bias(False, "deviations of the mean ratio from 1, the block sampled too")


def _errors(sizes: tuple[int, ...], repeats: int = 8) -> Float:
    """Return the mean error of the product by m keys, sampled by the norms of values, for each m."""
    a, v = _call()
    n, rng = len(a), np.random.default_rng(2)
    exact = a @ v / a.sum(1, keepdims=True)
    share = (v * v).sum(1) / (v * v).sum()
    found = []
    for m in sizes:
        errors = []
        for _ in range(repeats):
            at = rng.choice(n, m, p=share)
            total = a[:, rng.choice(n, m)].mean(1) * n
            errors.append(np.linalg.norm((a[:, at] / (m * share[at])) @ v[at] / total[:, None] - exact, 2))
        found.append(np.mean(errors))
    return np.array(found)


def rate(sizes: tuple[int, ...] = (16, 64, 256, 1024)) -> Evidence:
    """The error in operator norm falls as m^-1/2: the slope of logarithms within 0.1."""
    needs(min(sizes) >= 8, "at least 8 samples")
    errors = _errors(sizes)
    slope = float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])
    a, _ = _call()
    detail = {"m": list(sizes), "errors": errors.tolist(), "kappa": float(a.sum(1).max() / a.sum(1).min())}
    return Evidence(abs(slope + 0.5), 0.1, "distance of the slope from -1/2", detail)


def first_keys() -> Evidence:
    """The same with the first m keys instead of samples: data in an order that is not random has no such rate."""
    a, v = _call()
    order = np.argsort(v[:, 0])
    a, v = a[:, order], v[order]
    exact, errors, sizes = a @ v / a.sum(1, keepdims=True), [], (16, 64, 256)
    for m in sizes:
        errors.append(np.linalg.norm(a[:, :m] @ v[:m] / a[:, :m].sum(1, keepdims=True) - exact, 2))
    slope = float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])
    return Evidence(abs(slope + 0.5), 0.1, "distance of the slope from -1/2, the first keys of a sorted list")


SOURCE = "Han et al., HyperAttention (arXiv 2310.05869; the opening was read, public code too)"
CLAIMS = [
    Claim(
        "hyper-unbiased",
        "Exact block plus uniform samples of the other keys estimates row sums without bias",
        SOURCE,
        unbiased,
        counted_twice,
    ),
    Claim(
        "hyper-rate",
        "Sampling m keys by the norms of values gives an error in operator norm that falls as m^-1/2",
        SOURCE,
        rate,
        first_keys,
        ("at least 8 samples",),
    ),
]
