"""Power-Softmax under encryption: its Lipschitz constant, and the range of the numbers that squarings go through."""

from __future__ import annotations

import itertools
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, judged, needs, same
from .counting import Ranged
from .fields import Dual, Q, precise, rationals

__all__ = ["CLAIMS", "by_squarings"]

Array = NDArray[Any]
R, POWERS = Q(4), (3, 4, 6)
"""The largest score, and squarings: powers of 8, 16 and 64."""


def by_squarings(shifted: Any, squarings: int) -> Any:
    """Return weights a^p over their sum, p being 2^squarings: products and one inverse, as encryption has them.

    Parameters
    ----------
    shifted : sequence of numbers
        a = 1 + s/p of a row's scores.
    squarings : int
        log2 p.
    """
    powers = list(shifted)
    for _ in range(squarings):
        powers = [a * a for a in powers]
    total = powers[0]
    for a in powers[1:]:
        total = total + a
    return [a / total for a in powers]


def _shifted(scores: Any, p: int) -> list[Any]:
    return [1 + s / p for s in scores]


def _rows(n: int = 5) -> list[Array]:
    """Return rows of scores up to R in size; in the last two all are at an end, where slopes and ranges are largest."""
    return [*(R * rationals(seed, n) for seed in range(4)), np.full(2, R), np.full(2, -R)]


def _slope(scores: Array, along: tuple[int, ...], squarings: int) -> Any:
    """Return how fast weights move in total variation, scores moving along a direction."""
    p = 2**squarings
    given = [Dual(a, Q(sign, p)) for a, sign in zip(_shifted(scores, p), along, strict=True)]
    return sum(abs(w.slope) for w in by_squarings(given, squarings)) / 2


def _steepest(squarings: int, r: Any) -> Any:
    """Return 1/2 over 1 - R/p: logarithms of weights move by at most 1/(1 - R/p) of the scores, half a weight by half.

    Weights move by tanh(2·move/4) in total variation at most.
    """
    return Q(1, 2) / (1 - r / 2**squarings)


def _lipschitz(r: Any, what: str) -> Evidence:
    """Compare slopes along all directions of equal sizes with the constant for scores up to r, in rationals."""
    found: list[Any] = []
    for squarings in POWERS:
        pairs = [
            (_slope(scores, along, squarings), _steepest(squarings, r))
            for scores in _rows()
            for along in itertools.product((-1, 1), repeat=len(scores))
        ]
        found += [*pairs, same(max(slope for slope, _ in pairs), _steepest(squarings, R))]
    return judged(found, what)


def lipschitz(size: Any = R) -> Evidence:
    """Total variation moves by at most 1/2 over 1 - R/p of the scores' largest move; two scores at -R attain it."""
    needs(0 <= size < 2 ** min(POWERS), "scores below p")
    return _lipschitz(size, "slope of the weights over 1/2 over 1 - R/p")


def lipschitz_of_softmax() -> Evidence:
    """Softmax's own constant, a half."""
    return _lipschitz(Q(0), "slope of the weights over softmax's, a half")


def _ranges(squarings: int, n: int, r: Any) -> tuple[Any, Any]:
    """Return the least and the largest sum of n powers."""
    p = 2**squarings
    return n * (1 - r / p) ** p, n * (1 + r / p) ** p


def _plain(squarings: int) -> Any:
    """Return the largest number on the way of |s|^p itself, two scores being R."""
    noted: list[Any] = []
    by_squarings([Ranged(R, noted), Ranged(R, noted)], squarings)
    return max(noted)


def _sums(squarings: int) -> list[tuple[int, Any, Any, Any]]:
    """Return for each row how many scores, their powers' sum, and the least and the largest number that occurs."""
    found = []
    for scores in _rows():
        noted: list[Any] = []
        weights = by_squarings([Ranged(a, noted) for a in _shifted(scores, 2**squarings)], squarings)
        divided = [x.by for x in weights]
        found.append((len(scores), divided[0], min(noted), max(noted)))
    return found


def _largest(low: Any, high: Any) -> Any:
    """Return the largest number: the largest denominator or the least one's inverse; powers and weights are smaller."""
    return max(high, 1 / low)


def ranges(size: Any = R) -> Evidence:
    """Denominators and all numbers on the way, noted by the numbers themselves, against their closed forms."""
    needs(0 <= size < 2 ** min(POWERS), "scores below p")
    found: list[Any] = []
    curves = []
    for squarings in POWERS:
        rows = _sums(squarings)
        for n, denominator, least, most in rows:
            low, high = _ranges(squarings, n, size)
            found += [(low, denominator), (denominator, high)]
            # the least is a power's share of the largest sum, which is above 1
            found += [same(most <= _largest(low, high), True), same(low / (n * high) <= least, True)]
        (n, highest, _, most), (_, lowest, _, more) = rows[-2:]
        found.append(same((lowest, highest), _ranges(squarings, n, size)))  # attained, as the largest number is
        found += [same(max(most, more), _largest(lowest, highest)), same(_plain(squarings), n * size**2**squarings)]
        curves.append((2**squarings, float(max(most, more)), float(_plain(squarings))))
    names = ("p", "largest number, 1 + s/p", "largest number, s")
    detail = {name: list(x) for name, x in zip(names, zip(*curves, strict=True), strict=True)}
    return judged(found, "denominators over n(1 + R/p)^p, and n(1 - R/p)^p over denominators", detail)


@precise()
def ranges_of_softmax() -> Evidence:
    """Softmax's least denominator, n·exp(-R): powers of 1 - R/p are smaller."""
    pairs = [(n * (-flint.arb(R)).exp(), sums) for squarings in POWERS for n, sums, *_ in _sums(squarings)]
    return judged(pairs, "n·exp(-R) over denominators")


SOURCE = "Power-Softmax (arXiv 2410.09457; summaries were read); constants are derived here"
CLAIMS = [
    Claim(
        "power-softmax-lipschitz",
        "Weights (1 + s/p)^p over their sum move in total variation by at most 1/2 over 1 - R/p of the scores' largest"
        " move, for |s| <= R",
        SOURCE,
        lipschitz,
        lipschitz_of_softmax,
        ("scores below p",),
    ),
    Claim(
        "power-softmax-range",
        "By squarings, for |s| <= R, denominators lie between n(1 - R/p)^p and n(1 + R/p)^p, which are attained; no"
        " number on the way is larger than the latter or the former's inverse; without 1 + they go up to n·R^p",
        SOURCE,
        ranges,
        ranges_of_softmax,
        ("scores below p",),
    ),
]
