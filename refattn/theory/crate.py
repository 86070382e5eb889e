"""CRATE: the coding rate and its gradient; when its attention step descends, and when that reading fails; ISTA."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS", "attention", "gradient", "rate"]

Float = NDArray[np.float64]


def rate(z: Float, bases: Float, beta: float) -> float:
    """Return R^c = sum over k of log det(I + beta (U_kᵀZ)ᵀ(U_kᵀZ)) / 2.

    Parameters
    ----------
    z : (d, n) array
        Tokens as columns.
    bases : (K, d, p) array
        Orthonormal U_k.
    beta : float
        p / (n eps²).
    """
    return sum(float(np.linalg.slogdet(np.eye(u.shape[1]) + beta * (w := u.T @ z) @ w.T)[1]) / 2 for u in bases)


def gradient(z: Float, bases: Float, beta: float) -> Float:
    """Return the rate's gradient, beta · sum of U (I + beta W Wᵀ)⁻¹ W with W = UᵀZ."""
    found = np.zeros_like(z)
    for u in bases:
        w = u.T @ z
        found += beta * u @ np.linalg.solve(np.eye(len(w)) + beta * w @ w.T, w)
    return found


def attention(z: Float, bases: Float) -> Float:
    """Return the sum of U W softmax(WᵀW), softmax over each column: multi-head subspace self-attention."""
    found = np.zeros_like(z)
    for u in bases:
        w = u.T @ z
        s = w.T @ w
        p = np.exp(s - s.max(0))
        found += u @ w @ (p / p.sum(0))
    return found


def _subspaces() -> tuple[Float, Float, float]:
    """Return tokens on four subspaces with noise, the subspaces, and beta."""
    rng = np.random.default_rng(0)
    d, p, count, n = 24, 3, 4, 200
    whole = np.linalg.qr(rng.standard_normal((d, d)))[0]
    bases = np.stack([whole[:, k * p : (k + 1) * p] for k in range(count)])
    of = rng.integers(count, size=n)
    z = np.stack([bases[k] @ rng.standard_normal(p) for k in of], 1) + 0.05 * rng.standard_normal((d, n))
    return z / np.linalg.norm(z, axis=0), bases, p / (n * 0.5**2)


def formula() -> Evidence:
    """The gradient against central differences along random directions."""
    z, bases, beta = _subspaces()
    rng, worst, h = np.random.default_rng(1), 0.0, 1e-5
    for _ in range(5):
        e = rng.standard_normal(z.shape)
        slope = (rate(z + h * e, bases, beta) - rate(z - h * e, bases, beta)) / (2 * h)
        worst = max(worst, abs(slope - float((gradient(z, bases, beta) * e).sum())) / abs(slope))
    # third derivatives times h², and rounding over h
    return Evidence(worst, 1e-6, "relative distance from differences")


def formula_without_inverse() -> Evidence:
    """beta · U UᵀZ, the gradient where Z is small, held to the same."""
    z, bases, beta = _subspaces()
    first = beta * sum(u @ (u.T @ z) for u in bases)
    exact = gradient(z, bases, beta)
    return Evidence(
        float(np.linalg.norm(first - exact) / np.linalg.norm(exact)), 1e-6, "relative distance of the first term"
    )


def descends(steps: tuple[float, ...] = (0.1, 0.5, 1.0)) -> Evidence:
    """(1 - s) Z + s · MSSA(Z): each step from the same tokens lowers the rate."""
    z, bases, beta = _subspaces()
    needs(float(np.linalg.norm(z, axis=0).max()) <= 1 + 1e-12, "tokens of at most unit norm")
    before = rate(z, bases, beta)
    after = [rate((1 - s) * z + s * attention(z, bases), bases, beta) for s in steps]
    return Evidence(max(after) / before, 1.0, "rate after over before", {"before": before, "after": after})


def literal() -> Evidence:
    """Z + MSSA(Z), as a residual block without the factor (1 - s) does: the rate rises."""
    z, bases, beta = _subspaces()
    return Evidence(
        rate(z + attention(z, bases), bases, beta) / rate(z, bases, beta), 1.0, "rate after Z + MSSA(Z) over before"
    )


def _two_terms(size: float) -> tuple[float, float]:
    """Return beta·lambda of tokens of some size, and the relative error of two terms of the series."""
    z, bases, beta = _subspaces()
    parts = [(u, u.T @ (size * z)) for u in bases]
    spectrum = max(float(np.linalg.eigvalsh(beta * w @ w.T)[-1]) for _, w in parts)
    exact = gradient(size * z, bases, beta)
    found = sum(beta * u @ (w - beta * w @ w.T @ w) for u, w in parts)
    return spectrum, float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def neumann(size: float = 0.05) -> Evidence:
    """(I + beta W Wᵀ)⁻¹ as I - beta W Wᵀ: a relative error below (beta·lambda)², where that is below 1."""
    spectrum, error = _two_terms(size)
    needs(spectrum < 1, f"beta · lambda below 1, got {spectrum:.2g}: the series does not converge")
    return Evidence(error, spectrum**2, "relative error of two terms", {"beta lambda": spectrum})


def neumann_large() -> Evidence:
    """The same two terms for tokens 20 times as large."""
    return Evidence(_two_terms(20.0)[1], 1.0, "relative error of two terms, large tokens")


def _lasso(step: float) -> float:
    rng = np.random.default_rng(2)
    d = np.linalg.qr(rng.standard_normal((16, 16)))[0] @ np.diag(np.linspace(0.5, 2, 16))
    x, z, weight, worst = rng.standard_normal((16, 8)), np.zeros((16, 8)), 0.1, -np.inf
    by = step / np.linalg.norm(d, 2) ** 2

    def loss(z: Float) -> float:
        return float(((x - d @ z) ** 2).sum() / 2 + weight * z.sum())

    for _ in range(30):
        after = np.maximum(z + by * d.T @ (x - d @ z) - by * weight, 0)
        worst, z = max(worst, loss(after) - loss(z)), after
    return worst


def ista(step: float = 1.0) -> Evidence:
    """relu(z + eta Dᵀ(x - D z) - eta lambda) never raises the non-negative lasso for eta up to 1/|D|²."""
    needs(0 < step <= 1, f"eta up to 1/|D|², got {step}/|D|²")
    return Evidence(_lasso(step), 1e-12, "largest rise of the loss in 30 steps")


def ista_long() -> Evidence:
    """eta = 3/|D|²."""
    return Evidence(_lasso(3.0), 1e-12, "largest rise of the loss, eta = 3/|D|²")


SOURCE = "Yu et al., CRATE (arXiv 2306.01129; its abstract and code were read, the theorems are recalled)"
CLAIMS = [
    Claim(
        "crate-gradient",
        "The coding rate's gradient is beta · sum of U (I + beta W Wᵀ)⁻¹ W",
        SOURCE,
        formula,
        formula_without_inverse,
    ),
    Claim(
        "crate-descent",
        "(1 - s) Z + s · MSSA(Z) lowers the coding rate, for tokens of unit norm near their subspaces",
        SOURCE,
        descends,
        literal,
        ("tokens of at most unit norm",),
    ),
    Claim(
        "crate-neumann",
        "Two terms of the Neumann series give the gradient up to (beta · lambda)²",
        SOURCE,
        neumann,
        neumann_large,
        ("beta · lambda < 1",),
    ),
    Claim(
        "crate-ista",
        "The sparsifying step never raises the lasso for eta up to 1/|D|²",
        SOURCE,
        ista,
        ista_long,
        ("eta <= 1/|D|²",),
    ),
]
