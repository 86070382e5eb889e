"""Rounding in log-sum-exp and softmax: bounds against the errors of float32 runs, and what biased rounding does."""

from __future__ import annotations

import math

import mpmath
import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS"]

Float = NDArray[np.float64]
U = 2.0**-24
FAMILIES = 40


def _inputs(spread: float) -> list[NDArray[np.float32]]:
    """Return float32 vectors of many kinds whose elements are at most `spread` apart."""
    found = []
    for seed in range(FAMILIES):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 400))
        x = (rng.standard_normal(n), rng.uniform(-1, 1, n), np.linspace(0, 1, n), rng.choice([0.0, 1.0], n))[seed % 4]
        x = (x - x.min()) / max(float(np.ptp(x)), 1e-9) * spread * rng.uniform(0.1, 1) + rng.uniform(-spread, spread)
        found.append(x.astype(np.float32))
    return found


def _summed(x: NDArray[np.float32]) -> np.float32:
    total = np.float32(0)
    for a in x:
        total = np.float32(total + a)
    return total


def _exact(x: NDArray[np.float32]) -> tuple[float, Float]:
    with mpmath.workdps(50):
        terms = [mpmath.exp(mpmath.mpf(float(a))) for a in x]
        total = mpmath.fsum(terms)
        return float(mpmath.log(total)), np.array([float(t / total) for t in terms])


def log_sum_exp(spread: float = 60.0) -> Evidence:
    """Shifted log-sum-exp in float32: the absolute error over (n + 2 + range + |y|)·u, exp and log within an ulp."""
    needs(0 < spread <= 80, "a range of elements at which no exponential underflows: up to 80")
    worst = 0.0
    for x in _inputs(spread):
        n, top = len(x), x.max()
        found = np.float32(top + np.log(_summed(np.exp(x - top))))
        y, _ = _exact(x)
        # differences: range·u; exp: u; n - 1 additions; log: u of at most log n; the last addition: u·|y|
        bound = (float(top - x.min()) + n + 2 + math.log(n) + 2 * abs(y)) * U
        worst = max(worst, abs(float(found) - y) / bound)
    return Evidence(worst, 1.0, "error over its bound")


def log_sum_exp_plain() -> Evidence:
    """Without the shift: exp overflows."""
    with np.errstate(over="ignore"):
        found = float(np.log(_summed(np.exp(np.array([100, 99], np.float32)))))
    return Evidence(
        abs(found - (100 + math.log1p(math.exp(-1)))) / (10 * 100 * U), 1.0, "error over its bound, no shift"
    )


def softmax(spread: float = 60.0) -> Evidence:
    """Shifted softmax in float32: the relative error over (n + 2 + 2·range)·u, first order with room for the second."""
    needs(0 < spread <= 80, "a range of elements at which no exponential underflows: up to 80")
    worst = 0.0
    for x in _inputs(spread):
        p = np.exp(x - x.max())
        found = (p / _summed(p)).astype(np.float64)
        _, exact = _exact(x)
        bound = (len(x) + 4 + 2 * float(np.ptp(x))) * U * (1 + 1e-3)
        worst = max(worst, float(np.abs(found / exact - 1).max()) / bound)
    return Evidence(worst, 1.0, "relative error over its bound")


def softmax_no_division() -> Evidence:
    """exp(x - lse) instead of a division: lse's rounding, u·|lse|, becomes a relative error."""
    worst = 0.0
    for seed in range(FAMILIES):
        rng = np.random.default_rng(seed)
        x = (rng.standard_normal(8) + 5000).astype(np.float32)
        lse = np.float32(x.max() + np.log(_summed(np.exp(x - x.max()))))
        _, exact = _exact(x - np.float32(5000))
        bound = (len(x) + 4 + 2 * float(np.ptp(x))) * U * (1 + 1e-3)
        worst = max(worst, float(np.abs(np.exp(x - lse) / exact - 1).max()) / bound)
    return Evidence(worst, 1.0, "relative error over the same bound, elements near 5000")


def online(block: int = 16) -> Evidence:
    """Sums by blocks with a running maximum: two more roundings a block, and the shifts' own."""
    needs(block >= 1, "blocks of at least one element")
    worst = 0.0
    for x in _inputs(60.0):
        top, total = np.float32(-np.inf), np.float32(0)
        for i in range(0, len(x), block):
            part = x[i : i + block]
            most = max(top, part.max())
            total = np.float32(total * np.exp(np.float32(top - most)) + _summed(np.exp(part - most)))
            top = most
        y, _ = _exact(x)
        blocks = -(-len(x) // block)
        bound = (len(x) + 2 + 3 * blocks + 2 * float(np.ptp(x)) + math.log(len(x)) + 2 * abs(y)) * U
        worst = max(worst, abs(float(np.float32(top + np.log(total))) - y) / bound)
    return Evidence(worst, 1.0, "error over its bound")


def online_without_rescale() -> Evidence:
    """The running sum not multiplied with exp(old maximum - new maximum)."""
    worst = 0.0
    for x in _inputs(60.0):
        top, total = np.float32(-np.inf), np.float32(0)
        for i in range(0, len(x), 16):
            top = max(top, x[i : i + 16].max())
            total = np.float32(total + _summed(np.exp(x[i : i + 16] - top)))
        y, _ = _exact(x)
        worst = max(worst, abs(float(top + np.log(total)) - y) / ((4 * len(x) + 200) * U))
    return Evidence(worst, 1.0, "error over its bound, nothing rescaled")


def _drift(p: NDArray[np.float32], rounded: Float) -> float:
    """Return the mean error of rows of P, as values that are all alike would see it, in its standard deviations."""
    errors = (rounded / p - 1).mean(1)
    return float(abs(errors.mean()) / (errors.std(ddof=1) / math.sqrt(len(errors))))


def _weights() -> NDArray[np.float32]:
    s = np.random.default_rng(0).standard_normal((400, 256))
    return np.asarray(np.exp(s - s.max(1, keepdims=True)).astype(np.float32))


def unbiased() -> Evidence:
    """Rounding P to the nearest bfloat16: errors of rows do not add up along a shared direction (|z| of 400 rows)."""
    p = _weights()
    return Evidence(_drift(p, p.astype(bfloat16).astype(np.float64)), 4.0, "mean error in standard deviations")


def biased() -> Evidence:
    """Truncation: they do."""
    p = _weights()
    cut = (p.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    return Evidence(_drift(p, cut), 4.0, "mean error in standard deviations, truncated")


BHH = "Blanchard, Higham and Higham, IMA J. Numer. Anal. 2021 (its abstract was read, bounds are derived here)"
CLAIMS = [
    Claim(
        "log-sum-exp-rounding",
        "Shifted log-sum-exp has an absolute error of (n + range + log n + 2|y| + 2)·u to first order",
        BHH,
        log_sum_exp,
        log_sum_exp_plain,
        ("no exponential underflows",),
    ),
    Claim(
        "softmax-rounding",
        "Shifted softmax with a division has a relative error of (n + 4 + 2·range)·u to first order",
        BHH,
        softmax,
        softmax_no_division,
        ("no exponential underflows",),
    ),
    Claim(
        "online-rescale",
        "The online sum with rescaling adds three roundings a block and the range once more",
        "derived here",
        online,
        online_without_rescale,
        ("blocks of at least one element",),
    ),
    Claim(
        "biased-rounding",
        "Unbiased rounding of P lets errors of similar rows cancel; biased rounding adds them up",
        "arXiv 2510.04212 (a summary was read)",
        unbiased,
        biased,
    ),
]
