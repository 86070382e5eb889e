"""EcoFormer: binary codes make attention linear, exactly; the released bias; energy by counted operations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS", "energy"]

Float = NDArray[np.float64]
MULTIPLY_PJ, ADD_PJ = 3.7, 0.9
"""Energy of a float32 operation at 45 nm, as the paper quotes it (recalled)."""


def energy(n: int, d: int, bits: int | None) -> float:
    """Return the picojoules of a head's attention: softmax's products, or the linear form with codes of some bits.

    Parameters
    ----------
    n, d : int
        Tokens and features.
    bits : int, optional
        Of a code; with codes ±1 products of codes and values are additions. None: QKᵀ and PV as they are.
    """
    if min(n, d, bits or 1) < 1:
        raise InvalidInput(f"energy: got n {n}, d {d}, bits {bits}")
    if bits is None:
        return 2 * n * n * d * (MULTIPLY_PJ + ADD_PJ)
    # sums of h_j v_jᵀ, v_j and h_j; each row's code times them; a division a row and feature
    additions = n * bits * d + n * d + n * bits + n * bits * d + n * d + n * bits
    return additions * ADD_PJ + n * d * MULTIPLY_PJ


def _codes(n: int = 80, bits: int = 16, d: int = 6) -> tuple[Float, Float, Float]:
    rng = np.random.default_rng(0)
    h, g = rng.choice([-1.0, 1.0], (2, n, bits))
    return h, g, rng.standard_normal((n, d))


def _dense(h: Float, g: Float, v: Float) -> Float:
    w = h @ g.T + h.shape[1] + 1
    return np.asarray(w @ v / w.sum(1, keepdims=True))


def linear(codes: str = "binary") -> Evidence:
    """Weights h_i·h_j + bits + 1 of ±1 codes: by sums over j, against the whole matrix."""
    h, g, v = _codes()
    if codes != "binary":
        h = h * 1.5
    needs(bool((np.abs(h) == 1).all() and (np.abs(g) == 1).all()), "codes of +1 and -1: else a weight may be below 1")
    bias = h.shape[1] + 1
    found = (h @ (g.T @ v) + bias * v.sum(0)) / (h @ g.sum(0) + bias * len(g))[:, None]
    return Evidence(float(np.abs(found - _dense(h, g, v)).max()), 1e-13, "distance from the whole matrix")


def released() -> Evidence:
    """The released code's bias: v_i times bits + 1 instead of the sum of all v_j."""
    h, g, v = _codes()
    bias = h.shape[1] + 1
    found = (h @ (g.T @ v) + bias * v) / (h @ g.sum(0) + bias * len(g))[:, None]
    return Evidence(float(np.abs(found - _dense(h, g, v)).max()), 1e-13, "distance with the released bias")


def _counted(n: int, d: int, bits: int) -> float:
    """Count the operations of a loop that does them, one by one."""
    additions = multiplications = 0
    for _ in range(n):
        additions += bits * d + d + bits  # the three sums
    for _ in range(n):
        additions += bits * d + d + bits  # the row's code times them, and the biases
        multiplications += d
    return additions * ADD_PJ + multiplications * MULTIPLY_PJ


def count() -> Evidence:
    """The formula against a count."""
    sizes = [(10, 4, 8), (50, 16, 16), (33, 7, 3)]
    return Evidence(max(abs(energy(*x) / _counted(*x) - 1) for x in sizes), 1e-12, "relative distance from a count")


def always() -> Evidence:
    """The wish that codes always save energy: not for short sequences."""
    return Evidence(
        max(energy(n, 64, 16) / energy(n, 64, None) for n in (1, 2, 4096)),
        1.0,
        "energy over that of softmax's products",
    )


SOURCE = "Liu et al., EcoFormer (arXiv 2209.09004; public code was read, energies are recalled)"
CLAIMS = [
    Claim(
        "ecoformer-linear",
        "With ±1 codes and weights h·h' + bits + 1, attention is exactly linear in n",
        SOURCE,
        linear,
        released,
        ("codes of +1 and -1",),
    ),
    Claim(
        "ecoformer-energy",
        "Energy is counted additions and multiplications; codes turn products into additions",
        SOURCE,
        count,
        always,
    ),
]
