"""Bounded entries of attention over k - 1 kinds of keys: the threshold of near-linear polynomials is (log n)^(1/k)."""

from __future__ import annotations

import itertools
import math
from functools import reduce
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..tensor.polynomial import monomials
from .bounded_entries import BITS, FAR, _log_choose, _need, _powers, _predicted, _tail
from .claim import SETH, Claim, Differs, Evidence, judged, needs, same
from .fields import Q, precise, rationals, unequal

__all__ = ["CLAIMS", "exponents"]

Array = NDArray[Any]
FOLDS = (2, 3, 4)
POWERS = (20, 40)
"""Of 2, the n at which degrees are certified; those of FAR are Debye's."""


def _products(matrices: list[Array]) -> Array:
    """Return the products, feature by feature, of every tuple of rows, one from each matrix."""
    return reduce(lambda x, y: (x[:, None] * y).reshape(-1, x.shape[1]), matrices)


def _scores(k: int, d: int, most: Any) -> Differs:
    """Return whether B^k is the largest mean over features of products of k entries up to B."""
    drawn = [rationals(i, 3, d) * most for i in range(k)]
    for x in drawn:
        x[0] = most
    return same(abs(_products(drawn).sum(1) / d).max(), most**k)


def _ranks(k: int, d: int, g: int, n: int) -> list[Any]:
    """Return whether sum s^m/m! up to g, unfolded to n rows, has rank C(d + g, g), and whether monomials give it."""
    q, *keys = (rationals(k + i, n if i == 0 else max(2, math.ceil(n ** (1 / (k - 1)))), d) for i in range(k))
    together, (exponents, _, _) = _products(keys), monomials(d, g)
    scale = np.array([Q(1, math.prod(map(math.factorial, e))) for e in exponents.tolist()])
    p: Any = sum((q @ together.T) ** m / math.factorial(m) for m in range(g + 1))
    factored = (_powers(q, exponents) * scale) @ _powers(together, exponents).T
    return [same(flint.fmpq_mat(p.tolist()).rank(), math.comb(d + g, g)), same(unequal(factored, p), 0)]


def exponents(k: int, share: float) -> tuple[list[float], int]:
    """Return the e of ranks n^e for entries up to (log n)^(share/k), as n grows, and how many degrees are wrong.

    Parameters
    ----------
    k : int
        How many entries a score's products have; d = log2 n, and the error is 1/n of the smallest exponential.
    share : float
        Of 1/k: below 1 for entries below the threshold.

    Returns
    -------
    exponents : list of float
        At n = 2^20 and 2^40, and far beyond.
    wrong : int
        Of degrees at the first two, those below what polynomials need or above what is enough.
    """
    found, wrong = [], 0
    for power in (*POWERS, *FAR):
        logs = power * math.log(2)
        r = (logs ** (share / k)) ** k
        g = _predicted(r, logs)
        if power in POWERS:
            most = flint.arb(2) ** -power * (-flint.arb(r)).exp()
            wrong += not _need(g, r) <= most < _tail(g - 1, r)
        found.append(float(_log_choose(power, g)) / logs)
    return found, wrong


BELOW, ABOVE = 0.75, 1.25


@precise(BITS)
def threshold(below: float = BELOW) -> Evidence:
    """Exponents that fall for entries below (log n)^(1/k) and rise above; scores, and ranks of unfolded polynomials.

    Scores are within B^k and reach it, so that a degree is asked for on [-B^k, B^k], whatever k is: it is that of
    scores up to R = B^k. By `bounded_entries` their exponent settles where R is in proportion to log n.
    """
    needs(below < 1, "entries that grow more slowly than (log n)^(1/k)")
    found: list[Any] = []
    curves: dict[str, list[Any]] = {"log2 n": [*POWERS, *FAR]}
    for k in FOLDS:
        (falls, wrong), (rises, wrong_too) = exponents(k, below), exponents(k, ABOVE)
        found += [(b, a) for a, b in itertools.pairwise(falls)] + [(a, b) for a, b in itertools.pairwise(rises)]
        found += [same(wrong, 0), same(wrong_too, 0), _scores(k, 3, Q(3, 2)), *_ranks(k, 2, 2, 8), *_ranks(k, 1, 4, 8)]
        curves |= {f"e below, k = {k}": falls, f"e above, k = {k}": rises}
    return judged(
        found, "exponent at a larger n over that before, below the threshold, and the other way above", curves
    )


@precise(BITS)
def threshold_of_pairs() -> Evidence:
    """The threshold of pairs, (log n)^(1/2), taken for triples: entries up to (log n)^(2/5) are held to be below it."""
    falls, _ = exponents(3, 6 / 5)
    return judged(((b, a) for a, b in itertools.pairwise(falls)), "exponent at a larger n over that before, k = 3")


CLAIMS = [
    Claim(
        "bounded-folds",
        "Scores of k-fold products of entries up to B are within B^k: with d = log2 n and an error of 1/n polynomials"
        " of them have rank n^e whose e falls for B below (log n)^(1/k) and rises above; by the paper no algorithm"
        " does much better than n^k there",
        "Alman and Song, arXiv 2310.04064 (its abstract was read, which has k = 3 and that larger k allow less; the"
        " threshold for any k is recalled); degrees and ranks are derived here",
        threshold,
        threshold_of_pairs,
        ("entries that grow more slowly than (log n)^(1/k)",),
        SETH,
    ),
]
