"""Softmax under perturbation: what an error of scores does to weights and outputs, and how layers collapse rank."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, judged, needs, same
from .fields import Q, balls, exp, meet, over, precise, rational, rationals

__all__ = ["CLAIMS", "dobrushin", "total_variation"]

Array = NDArray[Any]


def total_variation(p: Array, q: Array) -> Any:
    """Return half the sum of abs(p - q): the most that the weight of any set of keys changes.

    Parameters
    ----------
    p, q : (n,) arrays
        Weights of sum 1.
    """
    return abs(p - q).sum() / 2


def _softmax(s: Array) -> Array:
    e = exp(s)
    return np.asarray(e / e.sum())


def _cases() -> list[tuple[Array, Array, Array]]:
    """Return scores, their errors and values."""
    return [(balls(rationals(s, 7)) * 3, balls(rationals(s + 20, 7)), balls(rationals(s + 40, 7))) for s in range(5)]


def _worst_cases() -> list[tuple[Array, Array, Array]]:
    """Return the same where half the weight is moved by the whole error: from 1 : exp(size/2) to exp(size/2) : 1."""
    sizes = (Q(1, 10), Q(1), Q(5))
    return [(balls([-s / 2, Q(0)]), balls([s, Q(0)]), balls([Q(1), Q(-1)])) for s in sizes]


def _bound(d: Array, share: int) -> Any:
    """Return tanh(osc/share), osc being how far apart errors of scores are."""
    return ((max(d, key=float) - min(d, key=float)) / share).tanh()


@precise()
def _moved(share: int, what: str) -> Evidence:
    found: list[Any] = []
    ratios = []
    given = [*((case, False) for case in _cases()), *((case, True) for case in _worst_cases())]
    for (s, d, v), attained in given:
        p, q, bound = _softmax(s), _softmax(s + d), _bound(d, share)
        apart = max(v, key=float) - min(v, key=float)
        pairs = [(total_variation(p, q), bound), (abs((q - p) @ v), bound * apart)]
        found += [over(*pair) for pair in pairs]
        found += [same(meet(*pair), True) for pair in pairs if attained]
        ratios.append(float(total_variation(p, q) / bound))
    return judged(found, what, {"total variation over its bound": ratios})


def moved() -> Evidence:
    """Total variation against tanh(osc/4), outputs against that times the values' range; the last cases attain it."""
    return _moved(4, "total variation over tanh(osc/4), outputs over that times the values' range")


def moved_half() -> Evidence:
    """tanh(osc/8), as if errors of both signs cancelled."""
    return _moved(8, "total variation over tanh(osc/8)")


def dobrushin(p: Array) -> Any:
    """Return the largest total variation between two rows of a stochastic matrix.

    Parameters
    ----------
    p : (n, n) array
        Rows of sum 1.
    """
    return max((total_variation(a, b) for a, b in itertools.combinations(p, 2)), key=float)


def _matrix(seed: int, n: int) -> Array:
    w = rationals(seed, n, n, least=1, most=30)
    return np.asarray(w / w.sum(1, keepdims=True))


def _osc(x: Array) -> Any:
    return max(x.max(0) - x.min(0))


def _collapse(residual: bool, what: str, layers: int = 5) -> Evidence:
    """Compare how far tokens are apart after layers X -> P X, or X + P X, with the product of the coefficients."""
    pairs, curve, due = [], [], []
    for n, attained in ((2, True), (4, False)):
        x = rationals(7, n, 2)
        start, factor = _osc(x), Q(1)
        for i in range(layers):
            p = _matrix(i, n)
            x = x * residual + p @ x
            factor *= dobrushin(p)
            far, most = _osc(x), factor * start
            pairs += [(far, most), (most, far)] if attained else [(far, most)]
            curve.append(float(_osc(x) / start))
            due.append(float(factor))
    at = list(range(1, layers + 1))
    return judged(pairs, what, {"layer": at, "apart": curve[layers:], "bound": due[layers:]})


def collapse(layers: int = 5) -> Evidence:
    """Attention alone: after L layers tokens differ by at most the product of the coefficients; two, by just it."""
    needs(layers >= 1, "at least one layer")
    return _collapse(False, "distance of tokens over the product of the coefficients", layers)


def residual() -> Evidence:
    """With residuals: they do not collapse so."""
    return _collapse(True, "distance of tokens over the product of the coefficients, with residuals")


def _scores() -> list[Array]:
    """Return scores, drawn ones and 1, 0 and 0, 1, whose rows are as unlike as their bound allows."""
    return [*(balls(rationals(i, 4, 5)) * 2 for i in range(4)), balls(rational(np.eye(2)))]


@precise()
def _by_scores(share: int, what: str) -> Evidence:
    """Compare Dobrushin's coefficient of a softmax with tanh of how unlike its rows of scores are."""
    found: list[Any] = []
    for s in _scores():
        p = np.array([_softmax(row) for row in s])
        bound = max((_bound(a - b, share) for a, b in itertools.combinations(s, 2)), key=float)
        found.append(over(dobrushin(p), bound))
    found.append(same(meet(dobrushin(p), bound), True))
    return judged(found, what)


def by_scores() -> Evidence:
    """The coefficient against tanh(osc/4) of the differences of rows of scores; scores 1, 0 and 0, 1 attain it."""
    return _by_scores(4, "Dobrushin's coefficient over tanh(osc/4)")


def by_scores_half() -> Evidence:
    """tanh(osc/8)."""
    return _by_scores(8, "Dobrushin's coefficient over tanh(osc/8)")


DONG = "Dong, Cordonnier and Loukas, arXiv 2103.03404 (recalled); the coefficient is Dobrushin's, derived here"
CLAIMS = [
    Claim(
        "softmax-perturbation",
        "Errors of scores that are osc apart move softmax by tanh(osc/4) in total variation at most, some by as much",
        "derived here",
        moved,
        moved_half,
    ),
    Claim(
        "rank-collapse",
        "Without residuals tokens come together at least as the product of Dobrushin's coefficients of the layers",
        DONG,
        collapse,
        residual,
        ("at least one layer",),
    ),
    Claim(
        "rank-collapse-scores",
        "Dobrushin's coefficient of softmax is at most tanh(osc/4) of the differences of its rows of scores",
        DONG,
        by_scores,
        by_scores_half,
    ),
]
