"""Bounded entries: the degree and the rank that approximate exp(QKᵀ), and what is conditional."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np

from ..tensor.polynomial import features, monomials
from .claim import SETH, Claim, Evidence, needs

__all__ = ["CLAIMS", "formula", "least_degree"]


def least_degree(bound: float, error: float) -> int:
    """Return the least g whose Chebyshev series has ``|p(s) - exp(s)| <= error · exp(-bound)`` on [-bound, bound].

    The coefficients that are left away are 2·I_m(bound), all positive: their sum is the error, at s = bound.
    """
    with mpmath.workdps(40):
        count = int(3 * bound + 60 - 4 * math.log(error))
        terms = [2 * mpmath.besseli(m, bound) for m in range(count)]
        left, most = mpmath.mpf(0), mpmath.mpf(error) * mpmath.exp(-bound)
        for g in range(count - 1, 0, -1):
            left += terms[g]
            if left > most:
                return g
    return 0


def formula(bound: float, error: float) -> float:
    """Return max(R, log(1/e) / log(log(1/e)/R)), the degree up to constants."""
    logs = math.log(1 / error)
    return max(bound, logs / math.log(max(logs / bound, math.e)))


def degree(
    bounds: tuple[float, ...] = (0.25, 1, 4, 16, 64), errors: tuple[float, ...] = (1e-2, 1e-4, 1e-8, 1e-12)
) -> Evidence:
    """The least degree is the formula times a constant from 1 to 3."""
    needs(min(bounds) > 0 and 0 < min(errors) <= max(errors) < 1, "R > 0 and an error between 0 and 1")
    ratios = [least_degree(r, e) / formula(r, e) for r in bounds for e in errors]
    return Evidence(
        max(max(ratios) / 3, 1 / min(ratios)), 1.0, "least degree over the formula, from 1 to 3", {"ratios": ratios}
    )


def degree_by_bound() -> Evidence:
    """The wish that the degree is in proportion to R alone, for all errors."""
    ratios = [least_degree(1.0, e) for e in (1e-2, 1e-80)]
    return Evidence(max(ratios) / min(ratios) / 3, 1.0, "degrees of errors 1e-2 and 1e-80 at R = 1, over a constant 3")


def _rank(d: int, g: int, n: int = 120) -> tuple[int, int]:
    rng = np.random.default_rng(d + g)
    q, k = rng.uniform(-1, 1, (2, n, d))
    s = q @ k.T
    p = sum(s**m / math.factorial(m) for m in range(g + 1))
    return int(np.linalg.matrix_rank(p, tol=1e-11 * np.linalg.norm(p, 2))), math.comb(d + g, g)


def rank() -> Evidence:
    """The matrix of p(q·k) has rank C(d+g, g), and the monomials factor it."""
    pairs = {(d, g): _rank(d, g) for d, g in ((2, 4), (3, 3), (4, 2), (3, 5), (2, 8))}
    rng = np.random.default_rng(0)
    q, k = rng.uniform(-1, 1, (2, 50, 3))
    exponents, _, _ = monomials(3, 5)
    weight = 1 / np.array([math.prod(math.factorial(int(a)) for a in e) for e in exponents])
    s = q @ k.T
    p = sum(s**m / math.factorial(m) for m in range(6))
    error = np.abs((features(q, 5) * weight[:, None]).T @ features(k, 5) - p).max()
    away = max(abs(a - b) for a, b in pairs.values())
    return Evidence(
        float(away) if error < 1e-13 else math.inf, 0.0, "ranks less C(d+g, g)", {"ranks": list(pairs.values())}
    )


def rank_recalled() -> Evidence:
    """The rank C(2(g+d), 2g) that is often quoted, as if it were needed."""
    ranks = [(_rank(d, g)[0], math.comb(2 * (g + d), 2 * g)) for d, g in ((2, 4), (3, 3), (4, 2))]
    return Evidence(float(max(b - a for a, b in ranks)), 0.0, "the quoted rank less the one found")


def near_linear() -> Evidence:
    """At R = sqrt(log n), d = log2 n, error 1/n the exponent of the rank falls with n, and passes 1 only late."""
    found = []
    for power in (20, 40, 80, 160, 320, 640):
        d, logs = power, power * math.log(2)
        g = least_degree(math.sqrt(logs), 2.0**-power)
        found.append(math.log(math.comb(g + d, g)) / logs)
    falling = max(b - a for a, b in itertools.pairwise(found))
    return Evidence(
        falling, 0.0, "largest step of the exponent of C(d+g, g) as n grows", {"exponents, n = 2^20 to 2^640": found}
    )


def near_linear_large() -> Evidence:
    """The same with entries in proportion to the threshold, R = 2 log n: the exponent does not fall."""
    found = []
    for power in (20, 40, 80):
        logs = power * math.log(2)
        g = least_degree(2 * logs, 2.0**-power)
        found.append(math.log(math.comb(g + power, g)) / logs)
    return Evidence(max(b - a for a, b in itertools.pairwise(found)), 0.0, "largest step of the exponent, R = 2 log n")


SOURCE = "Alman and Song, arXiv 2302.13214 and 2310.04064 (abstracts were read, the theorems are recalled)"
CLAIMS = [
    Claim(
        "bounded-degree",
        "exp on [-R, R] within a relative error e needs degree Theta(max(R, log(1/e)/log(log(1/e)/R)))",
        SOURCE,
        degree,
        degree_by_bound,
        ("R > 0", "0 < e < 1"),
    ),
    Claim(
        "bounded-rank",
        "A polynomial of degree g of q·k has rank C(d+g, g): that many features, not C(2(g+d), 2g)",
        "derived here; the larger number is recalled from 2302.13214",
        rank,
        rank_recalled,
        ("n > C(d+g, g)",),
    ),
    Claim(
        "bounded-near-linear",
        "Entries of o(sqrt(log n)), d = O(log n): time n^(1+o(1)), slowly; larger entries have no such algorithm",
        SOURCE,
        near_linear,
        near_linear_large,
        ("R = o(log n)",),
        SETH,
    ),
]
