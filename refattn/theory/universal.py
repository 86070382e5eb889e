"""One attention layer and a ReLU network approximate any continuous map of sequences, if positions are told."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS"]

Float = NDArray[np.float64]
N = 3
# output i = sum of c · (a·x)², a different quadratic map for every place
TERMS = [
    [(0.5, (1.0, -0.5, 0.3)), (-0.4, (0.2, 0.8, 0.1))],
    [(0.7, (0.3, 0.3, -0.9))],
    [(-0.6, (1.0, 0.0, 0.5)), (0.3, (0.0, 1.0, 1.0))],
]


def _target(x: Float) -> Float:
    return np.stack([sum(c * (x @ np.array(a)) ** 2 for c, a in terms) for terms in TERMS], 1)


def _copied(x: Float, beta: float) -> Float:
    """Return what N heads with one-hot keys of positions read: all tokens, in every place; (batch, place, token)."""
    p = np.exp(beta * np.eye(N))
    p /= p.sum(1, keepdims=True)
    return np.repeat((x @ p.T)[:, None], N, 1)


def _interpolated(t: Float, knots: int, size: float) -> Float:
    """Return t² between knots on [-size, size], as a sum of ReLUs."""
    at = np.linspace(-size, size, knots + 1)
    slopes = (at[1:] ** 2 - at[:-1] ** 2) / np.diff(at)
    out = at[0] ** 2 + slopes[0] * (t - at[0])
    for knot, change in zip(at[1:-1], np.diff(slopes), strict=True):
        out = out + change * np.maximum(t - knot, 0)
    return np.asarray(out)


def _net(x: Float, knots: int, beta: float) -> Float:
    read = _copied(x, beta)
    out = np.zeros((len(x), N))
    for place, terms in enumerate(TERMS):  # the position gates which units are on
        for c, a in terms:
            size = float(np.abs(a).sum()) * (1 + 1e-6)
            out[:, place] += c * _interpolated(read[:, place] @ np.array(a), knots, size)
    return out


def _bound(knots: int, beta: float) -> float:
    worst = 0.0
    for terms in TERMS:
        total = 0.0
        for c, a in terms:
            size = float(np.abs(a).sum())
            step = 2 * size * (1 + 1e-6) / knots
            # between knots: step²/8 times the second derivative, 2; tokens are off by at most 2(n - 1)exp(-beta)
            total += abs(c) * (step**2 / 4 + 2 * size * size * 2 * (N - 1) * math.exp(-beta))
        worst = max(worst, total)
    return worst


def universal(
    knots: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128), beta: float = 30.0, positions: bool = True
) -> Evidence:
    """The sup error over a grid and random points on [-1, 1]³, within the bound at every width."""
    needs(positions, "positions are told: without them a layer commutes with permutations, and most maps do not")
    grid = np.array(list(itertools.product(np.linspace(-1, 1, 15), repeat=N)))
    x = np.concatenate([grid, np.random.default_rng(0).uniform(-1, 1, (20000, N))])
    errors = [float(np.abs(_net(x, m, beta) - _target(x)).max()) for m in knots]
    ratio = max(e / _bound(m, beta) for e, m in zip(errors, knots, strict=True))
    return Evidence(ratio, 1.0, "sup error over its bound", {"knots": list(knots), "errors": errors})


def equivariant() -> Evidence:
    """Without positions: equal tokens get equal outputs, so the error is at least half the target's spread there."""
    x = np.repeat(np.linspace(-1, 1, 101)[:, None], N, 1)
    least = float(np.ptp(_target(x), axis=1).max() / 2)
    return Evidence(least, _bound(128, 30.0), "least error of any equivariant map")


def _averages(delta: float, n: int) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Return the least gap of Boltzmann averages of n of 7 values that are delta apart, and the claimed one."""
    with mpmath.workdps(60):
        values = [mpmath.mpf(delta) * i for i in range(-3, 4)]
        found = []
        for chosen in itertools.combinations(values, n):
            e = [mpmath.exp(t) for t in chosen]
            found.append(sum(t * w for t, w in zip(chosen, e, strict=True)) / sum(e))
        found.sort()
        gap = min(b - a for a, b in itertools.pairwise(found))
        return gap, mpmath.log(n) ** 2 * mpmath.exp(-2 * max(map(abs, values)))


def contextual(delta: float = 6.0, n: int = 4) -> Evidence:
    """Softmax averages of different sets differ by more than (log n)² exp(-2r), at 60 digits."""
    needs(delta > 2 * math.log(n) + 3, f"values more than 2·log n + 3 = {2 * math.log(n) + 3:.3g} apart, got {delta}")
    gap, claimed = _averages(delta, n)
    return Evidence(float(claimed / gap), 1.0, "claimed gap over the least one found", {"gap": float(gap)})


def contextual_in_float32() -> Evidence:
    """The same gap beside float32's resolution: no float32 layer keeps the sets apart."""
    gap, _ = _averages(6.0, 4)
    return Evidence(float(2.0**-24 * 18 / gap), 1.0, "float32's rounding of a value over the gap")


CLAIMS = [
    Claim(
        "single-layer-universal",
        "One attention layer and a ReLU network approximate any continuous map of sequences on a compact set",
        "arXiv 2507.10581 (abstract read; corrected here: positions are needed; the construction is ours)",
        universal,
        equivariant,
        ("positions are told", "a compact set"),
    ),
    Claim(
        "boltzmann-gap",
        "Boltzmann averages of different sets of values are more than (log n)² exp(-2r) apart",
        "Kajitsuka and Sato, arXiv 2307.14023 (its abstract was read, the gap is recalled)",
        contextual,
        contextual_in_float32,
        ("values more than 2 log n + 3 apart",),
    ),
]
