"""A message-passing net with a virtual node computes attention: exactly, by polynomials of any width, or deep."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..tensor.polynomial import features, monomials
from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS"]

Float = NDArray[np.float64]


def _nodes(n: int = 40, d: int = 4) -> tuple[Float, Float, Float]:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, n, d)) / 2
    return q, k, v


def _softmax(q: Float, k: Float, v: Float) -> Float:
    p = np.exp(q @ k.T)
    return np.asarray(p @ v / p.sum(1, keepdims=True))


def _by_sums(of_q: Float, of_k: Float, v: Float) -> Float:
    """Return what nodes read: one sum over all nodes of (features of k times v, features of k), then own work."""
    messages = np.concatenate([(of_k[:, :, None] * v[:, None]).reshape(len(v), -1), of_k], 1)
    state = messages.sum(0)  # the virtual node: it knows no order and no count
    count, width = of_k.shape[1], v.shape[1]
    return np.asarray((of_q @ state[: count * width].reshape(count, width)) / (of_q @ state[count * width :])[:, None])


def _positive(x: Float, m: int = 16) -> Float:
    w = np.random.default_rng(7).standard_normal((m, x.shape[1]))
    return np.asarray(np.exp(x @ w.T - (x * x).sum(1, keepdims=True) / 2) / math.sqrt(m))


def linear() -> Evidence:
    """Kernel attention, e.g. Performer's: one sum and one broadcast, a state of m·(d + 1) numbers."""
    q, k, v = _nodes()
    a = _positive(q) @ _positive(k).T
    error = np.abs(_by_sums(_positive(q), _positive(k), v) - a @ v / a.sum(1, keepdims=True)).max()
    return Evidence(float(error), 100 * 2.0**-53, "distance from kernel attention", {"state": 16 * 5})


def linear_is_not_softmax() -> Evidence:
    """The same node as softmax attention: 16 random features are not exp."""
    q, k, v = _nodes()
    error = np.abs(_by_sums(_positive(q), _positive(k), v) - _softmax(q, k, v)).max()
    return Evidence(float(error), 100 * 2.0**-53, "distance from softmax attention")


def _taylor(degree: int) -> tuple[float, float]:
    q, k, v = _nodes()
    exponents, _, _ = monomials(q.shape[1], degree)
    weight = 1 / np.array([math.prod(math.factorial(int(a)) for a in e) for e in exponents])
    found = _by_sums(features(q, degree).T * weight, features(k, degree).T, v)
    largest = float(np.abs(q @ k.T).max())
    e = largest ** (degree + 1) / math.factorial(degree + 1) * math.exp(largest)
    bound = 2 * e / (1 - e) * float(np.abs(v).max()) if e < 1 else math.inf
    return float(np.abs(found - _softmax(q, k, v)).max()), bound


def wide(degrees: tuple[int, ...] = (6, 8, 10, 12)) -> Evidence:
    """Softmax attention by monomials up to a degree: within Taylor's bound, at every degree."""
    pairs = [_taylor(g) for g in degrees]
    needs(all(math.isfinite(b) for _, b in pairs), "a degree whose remainder on the range of the logits is below 1")
    worst = max(e / b for e, b in pairs)
    return Evidence(worst, 1.0, "error over its bound", {"degrees": list(degrees), "errors": [e for e, _ in pairs]})


def narrow() -> Evidence:
    """Degree 1 held to the bound of degree 12."""
    return Evidence(_taylor(1)[0] / _taylor(12)[1], 1.0, "error of degree 1 over the bound of degree 12")


def _read(x: Float, selector: Float, beta: float) -> Float:
    """Return what the virtual node reads: the softmax of a selector's scores over the nodes."""
    scores = beta * (x @ selector)
    p = np.exp(scores - scores.max())
    return np.asarray(p @ x / p.sum())


def _deep(x: Float, selectors: Float, beta: float) -> Float:
    """Return attention by n rounds: in each the virtual node reads one node by softmax, and all add its term."""
    total, weight = np.zeros_like(x), np.zeros(len(x))
    for s in selectors:
        read = _read(x, s, beta)
        w = np.exp(x @ read)
        total += w[:, None] * read
        weight += w
    return total / weight[:, None]


def _unit_nodes(separated: bool) -> Float:
    """Return nodes of unit norm; the first one at the mean of the others where they are not to be separable."""
    x = np.random.default_rng(1).standard_normal((24, 4))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    if not separated:
        x[0] = x[1:].mean(0)
    return x


def _separation(x: Float, selectors: Float) -> float:
    scores = x @ selectors.T
    others = np.where(np.eye(len(x), dtype=bool), -np.inf, scores).max(0)
    return float((scores.diagonal() - others).min())


def deep(beta: float = 2000.0, separated: bool = True) -> Evidence:
    """Rounds with selectors that pick one node each: an error below n·exp(-beta·delta) times what a node changes."""
    x = _unit_nodes(separated)
    delta = _separation(x, x)
    needs(delta > 0, f"every node has a selector that scores it above all others, got a gap of {delta:.2g}")
    error = np.abs(_deep(x, x, beta) - _softmax(x, x, x)).max()
    # a read is off by (n - 1)·exp(-beta·delta)·2; weights and terms change by at most exp(2)·3 times that
    bound = len(x) * math.exp(-beta * delta) * 2 * 3 * math.exp(2) * 2 + 1e-13
    return Evidence(float(error), bound, "distance from softmax attention", {"delta": delta})


def unselectable() -> Evidence:
    """A node at the mean of the others: no selector, of 5000, reads it."""
    x = _unit_nodes(separated=False)
    best = min(
        float(np.linalg.norm(_read(x, s, 2000.0) - x[0])) for s in np.random.default_rng(2).standard_normal((5000, 4))
    )
    return Evidence(best, 1e-6, "least distance of what is read from the node")


SOURCE = "Cai et al., MPNN and Graph Transformer (arXiv 2301.11956; a summary was read, constructions are ours)"
CLAIMS = [
    Claim(
        "virtual-node-linear",
        "One round with a virtual node computes linear attention exactly, its state independent of n",
        SOURCE,
        linear,
        linear_is_not_softmax,
    ),
    Claim(
        "virtual-node-wide",
        "One round with polynomial width approximates softmax attention within Taylor's bound",
        SOURCE,
        wide,
        narrow,
        ("bounded logits",),
    ),
    Claim(
        "virtual-node-deep",
        "n rounds of constant width compute softmax attention on separable features",
        SOURCE,
        deep,
        unselectable,
        ("features are separable",),
    ),
]
