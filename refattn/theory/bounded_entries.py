"""Bounded entries: the degree and the rank that approximate exp(QKᵀ), and what is conditional."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import flint
import numpy as np

from ..tensor.polynomial import monomials
from .claim import SETH, Claim, Evidence, judged, needs, same, total
from .fields import Q, meet, precise, rationals, unequal

__all__ = ["CLAIMS", "degrees", "exponent"]

BITS = 400
"""Of a ball: coefficients fall below 2^-300 at the degrees asked for here."""


def _coefficient(m: int, bound: float) -> Any:
    """Return the Chebyshev coefficient of exp on [-bound, bound], 2·I_m(bound); all are positive."""
    return 2 * flint.arb(bound).bessel_i(flint.arb(m))


def _tail(g: int, bound: float) -> Any:
    """Return the sum of coefficients after g: the error of the series of degree g, at s = bound."""
    first, total, m = _coefficient(g + 1, bound), flint.arb(0), g + 1
    while True:
        term = _coefficient(m, bound)
        total += term
        if m > bound and term < first * flint.arb(2) ** -BITS:
            return total
        m += 1


def _least(bound: float, most: Any, error_of: Any) -> int:
    """Return the least g with error_of(g) <= most, errors falling with g."""
    high = 1
    while not error_of(high, bound) <= most:
        high *= 2
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if error_of(middle, bound) <= most else (middle + 1, high)
    return low


def _need(g: int, bound: float) -> Any:
    """Return what no polynomial of degree g is below: pi/4 of the coefficient g + 1, (pi/2)·I_{g+1}(bound)."""
    return flint.arb.pi() / 4 * _coefficient(g + 1, bound)


@precise(BITS)
def degrees(bound: float, error: float) -> tuple[int, int]:
    """Return the degree that ``|p(s) - exp(s)| <= error · exp(-bound)`` on [-bound, bound] needs, and one that does.

    Parameters
    ----------
    bound : float
        R, the largest ``|s|``.
    error : float
        Relative to the smallest exponential.

    Returns
    -------
    needed, enough : int
        The least degrees with (pi/2)·I_{g+1}(R), and with the sum of 2·I_m(R) over m > g, at most that.
    """
    most = flint.arb(error) * (-flint.arb(bound)).exp()
    return _least(bound, most, _need), _least(bound, most, _tail)


def _levelled(g: int, bound: float) -> Any:
    """Return the least error of degree g on the g + 2 extrema of T_{g+1}: no more than that on the whole interval.

    With alternating errors ±h the divided difference of order g + 1 of f and of ±h agree.
    """
    at = [flint.arb(bound) * (flint.arb.pi() * i / (g + 1)).cos() for i in range(g + 2)]
    weights = [1 / math.prod((x - y for y in at if y is not x), start=flint.arb(1)) for x in at]
    difference = sum(w * x.exp() for w, x in zip(weights, at, strict=True))
    return abs(difference) / sum(map(abs, weights))


def _tail_another_way(g: int, bound: float) -> Any:
    """Return the error of the series of degree g at s = bound: exp(R) less the terms up to g, each T_m being 1."""
    r = flint.arb(bound)
    return r.exp() - r.bessel_i(flint.arb(0)) - sum(_coefficient(m, bound) for m in range(1, g + 1))


def _ratio(g: int, r: float) -> Any:
    """Return what I_{g+2}/I_{g+1} is below: its inverse is (2g + 4)/R and I_{g+3}/I_{g+2}."""
    return flint.arb(r) / (2 * g + 4)


def _debye(m: float, r: float) -> float:
    """Return log 2·I_m(r) by Debye's expansion, its first term."""
    root = math.hypot(m, r)
    return root - m * math.asinh(m / r) + math.log(2 / math.sqrt(2 * math.pi * root))


def _asides(places: tuple[tuple[float, int], ...]) -> list[Any]:
    """Return ratios of what `degree` and `_curve` use to what is known otherwise."""
    found: list[Any] = [same(meet(_tail(g, r), _tail_another_way(g, r)), True) for r, g in places]
    for r, g in places:
        first, second, third = (_coefficient(m, r) for m in range(g + 1, g + 4))
        found.append(same(meet(first / second, 1 / _ratio(g, r) + third / second), True))
    # Debye's next term is at most 1/(12 m) in size, which is Stirling's as r falls to 0
    found += [(abs(_debye(g + 1, r) - _coefficient(g + 1, r).log()), Q(1, 12 * (g + 1))) for r, g in places]
    asked = range(10)
    found.append(same([_least(0, 0, lambda g, _, due=due: due - g) for due in asked], list(asked)))
    found += [same(meet(_log_choose(d, g).exp(), math.comb(d + g, g)), True) for d in asked for g in asked]
    return found


SHOWN = ((1.0, 1e-2), (1.0, 1e-8), (4.0, 1e-2), (4.0, 1e-8), (16.0, 1e-2), (16.0, 1e-8))
PLACES = [(r, g) for r in (0.25, 1.0, 4.0, 16.0) for g in (2, 5, 9, 16)]


@precise(BITS)
def degree(places: tuple[tuple[float, int], ...] = tuple(PLACES)) -> Evidence:
    """(pi/2)·I_{g+1}(R) at most the least error on the extrema of T_{g+1}, and that at most the series' error."""
    needs(all(r > 0 and g >= 0 for r, g in places), "R > 0 and a degree of at least 0")
    found = [(_need(g, r), _levelled(g, r), _tail(g, r)) for r, g in places]
    pairs = _asides(places)
    for (r, g), (need, level, tail) in zip(places, found, strict=True):
        ratio, quarter = _ratio(g, r), level * flint.arb.pi() / 4
        pairs += [(need, level), (level, tail), (need, quarter)]
        if r < g:  # the tail is hardly more than its first term, which pi/4 of is needed
            pairs += [(tail, level / (1 - ratio)), (quarter, need / (1 - ratio))]
    steps = {f"R = {r}, error {e}": degrees(r, e) for r, e in SHOWN}
    return judged(pairs, "lower bound over the least error, and that over the upper bound", steps)


@precise(BITS)
def degree_of_series() -> Evidence:
    """The error of the series taken for what is needed."""
    return judged(((_tail(g, r), _levelled(g, r)) for r, g in PLACES), "error of the series over the least")


def _powers(x: Any, exponents: Any) -> Any:
    return np.array([[math.prod(row**e, start=Q(1)) for e in exponents.tolist()] for row in x])


def _ranks(d: int, g: int, n: int, of: Any) -> tuple[int, int]:
    """Return the exact rank of the matrix of sum (q·k)^m/m! up to g, and a number of features, which must give it."""
    q, k = rationals(d + g, 2, n, d)
    exponents, _, _ = monomials(d, g)
    weights = np.array([Q(1, math.prod(map(math.factorial, e))) for e in exponents.tolist()])
    p = sum((q @ k.T) ** m / math.factorial(m) for m in range(g + 1))
    wrong = unequal((_powers(q, exponents) * weights) @ _powers(k, exponents).T, p)
    return total(flint.fmpq_mat(p.tolist()).rank(), wrong), of(d, g)


SHAPES = ((2, 3), (3, 2), (1, 5), (4, 1))


def _rank(of: Any, what: str, n: int = 14) -> Evidence:
    pairs = [_ranks(d, g, n, of) for d, g in SHAPES]
    return Evidence(max(abs(a - b) for a, b in pairs), 0, what, {"ranks": pairs})


def rank(n: int = 14) -> Evidence:
    """The matrix of p(q·k) has rank C(d+g, g), computed in rationals, and the monomials factor it."""
    needs(all(n > math.comb(d + g, g) for d, g in SHAPES), "n > C(d+g, g)")
    return _rank(lambda d, g: math.comb(d + g, g), "ranks from C(d+g, g)", n)


def rank_recalled() -> Evidence:
    """The rank C(2(g+d), 2g) that is often quoted, as if it were needed."""
    return _rank(lambda d, g: math.comb(2 * (g + d), 2 * g), "ranks from C(2(g+d), 2g)")


def _smallest(left: Callable[[float], float], most: float) -> float:
    """Return where a falling function of a degree passes a value."""
    low, high = 0.0, 1.0
    while left(high) > most:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if left(middle) > most else (low, middle)
    return high


def exponent(c: float) -> float:
    """Return the e of a rank of n^e as n grows: entries up to c·log n, d = log2 n, error 1/n.

    Parameters
    ----------
    c : float
        Above 0.
    """
    # the relative error of degree g·log n is n to this power
    g = _smallest(lambda g: math.hypot(g, c) - g * math.asinh(g / c) + c, -1)
    d = 1 / math.log(2)
    return (d + g) * math.log(d + g) - d * math.log(d) - g * math.log(g)


def _limit(t: float) -> tuple[float, float]:
    """Return c and its exponent another way: by t with g = c·sinh t, so that c(cosh t - t·sinh t + 1) = -1."""
    c = 1 / (t * math.sinh(t) - math.cosh(t) - 1)
    d, g = 1 / math.log(2), c * math.sinh(t)
    return c, d * math.log1p(g / d) + g * math.log1p(d / g)


def _log_choose(d: int, g: int) -> Any:
    """Return log C(d + g, g) as a ball."""
    return flint.arb(d + g + 1).lgamma() - flint.arb(d + 1).lgamma() - flint.arb(g + 1).lgamma()


def _predicted(r: float, logs: float, relative: bool = True) -> int:
    """Return the degree whose next coefficient, by Debye's expansion of I_m, is exp(-R)/n."""
    return math.ceil(_smallest(lambda g: _debye(g + 1, r), -logs - (r if relative else 0)))


POWERS = (20, 40, 80)
ENTRIES = (0.01, 0.03, 0.2, 1.0)
LIMITS = [_limit(i / 64) for i in range(100, 300)]
"""From c of 13 down to c of 0.006; both fall as t grows."""

FAR = (10**3, 10**5, 10**7)


def _far(c: float, power: int) -> float:
    """Return log C(d+g, g)/log n at n = 2^power by Debye's degree."""
    logs = power * math.log(2)
    g = _predicted(c * logs, logs)
    return float(_log_choose(power, g)) / logs


def _curve(entries: tuple[float, ...], relative: bool, what: str) -> Evidence:
    """Compare degrees up to n = 2^80 with Debye's, and log C(d+g, g)/log n with its limit."""
    wrong, last = [], []
    for c in entries:
        found = []
        for power in POWERS:
            logs = power * math.log(2)
            needed, enough = degrees(c * logs, 2.0**-power)
            wrong.append(not needed <= _predicted(c * logs, logs, relative) <= enough)
            wrong.append(enough not in (needed, needed + 1))
            found.append(math.log(math.comb(power + enough, enough)) / logs)
        first, *_, latest = (abs(e - exponent(c)) for e in found)
        wrong.append(latest >= first)
        last.append(found[-1])
        away = [abs(_far(c, power) - exponent(c)) * power for power in FAR]  # of order log log n
        wrong += [b <= a for a, b in itertools.pairwise(away)]
        shrunk = [a / math.sqrt(power) for a, power in zip(away, FAR, strict=True)]
        wrong += [b >= a for a, b in itertools.pairwise(shrunk)]
        limit = exponent(c)  # it rises with c
        below = max((e for x, e in LIMITS if x <= c), default=limit)
        wrong.append(not below <= limit <= min((e for x, e in LIMITS if x >= c), default=limit))
    wrong += [b <= a for a, b in itertools.pairwise(map(exponent, entries))]
    detail = {"c": list(entries), "limit": [exponent(c) for c in entries], "n = 2^80": last}
    return Evidence(total(*wrong), 0, what, detail)


def near_linear(entries: tuple[float, ...] = ENTRIES) -> Evidence:
    """At R = c·log n, d = log2 n and error 1/n: the degrees, and exponents that rise with c and near their limit."""
    needs(min(entries) > 0, "entries c·log n with c > 0")
    return _curve(entries, True, "degrees away from the predicted one, limits that do not rise, exponents further off")


def near_linear_absolute() -> Evidence:
    """Degrees for an error of 1/n of 1, not of the smallest exponential: too few."""
    return _curve(ENTRIES, False, "the same for an error that is not relative")


SOURCE = "Alman and Song, arXiv 2302.13214 and 2310.04064 (abstracts were read, the theorems are recalled)"
CLAIMS = [
    Claim(
        "bounded-degree",
        "The least error of degree g for exp on [-R, R] lies between (pi/2)·I_{g+1}(R) and the sum of 2·I_m(R), m > g",
        "derived here from Chebyshev's series and theorem; the degree itself is the subject of arXiv 2302.13214",
        degree,
        degree_of_series,
        ("R > 0",),
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
        "Entries up to c·log n, d = log2 n, error 1/n: time n^(1 + e(c)), e(c) to 0 with c, and above 1 from"
        " about 0.03 on; larger entries have no near-linear algorithm",
        SOURCE,
        near_linear,
        near_linear_absolute,
        ("entries c·log n with c > 0",),
        SETH,
    ),
]
