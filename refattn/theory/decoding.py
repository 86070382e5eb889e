"""Errors that add up in decoding: a state's by its decay, an evicted cache's; Power-Softmax's distance to softmax."""

from __future__ import annotations

import itertools
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, judged, needs, same
from .fields import Q, balls, exp, meet, over, precise, rationals
from .perturbation import total_variation

__all__ = ["CLAIMS"]

Array = NDArray[Any]


def _errors(decay: Any, steps: int, signs: Array) -> list[Any]:
    """Return how far a state h = decay·h + x is off after each step, each step adding an error of size eps = 1/100."""
    exact = wrong = Q(0)
    found = []
    for x, sign in zip(rationals(0, steps), signs, strict=True):
        exact, wrong = decay * exact + x, decay * wrong + x + sign * Q(1, 100)
        found.append(abs(wrong - exact))
    return found


def _recurrence(decay: Any, held_to: Any, what: str, steps: int = 30) -> Evidence:
    """Compare errors with eps·(1 - decay^t)/(1 - decay), which errors of one sign attain."""
    rng = np.random.default_rng(1)
    due = [Q(1, 100) * (1 - held_to**t) / (1 - held_to) for t in range(1, steps + 1)]
    all_up = _errors(decay, steps, np.full(steps, 1))
    drawn = _errors(decay, steps, rng.choice([-1, 1], steps))
    pairs = [*zip(all_up, due, strict=True), *zip(due, all_up, strict=True), *zip(drawn, due, strict=True)]
    detail = {"step": list(range(1, steps + 1)), "error": [float(e) for e in all_up], "bound": [float(d) for d in due]}
    return judged(pairs, what, detail)


DECAY = Q(9, 10)


def recurrence(decay: Any = DECAY) -> Evidence:
    """A state with a decay below 1: errors stay below eps/(1 - decay), however long it runs."""
    needs(0 < decay < 1, f"a decay in (0, 1), got {decay}")
    return _recurrence(decay, decay, "error over eps·(1 - decay^t)/(1 - decay), and that over errors of one sign")


def no_decay() -> Evidence:
    """No decay, held to the bound of 9/10: errors add up without end."""
    return _recurrence(Q(1), DECAY, "error without decay over the bound of 9/10")


def _evicted(budget: int, evict: Any, alike: bool = True, n: int = 14) -> list[tuple[Any, Any, Any, Any]]:
    """Return errors of a decoding loop that keeps some keys, beside its dropped weight and share, times the range.

    And whether an error is the dropped weight times how far the mean of what is gone is from that of what is kept.
    """
    k, found = rationals(3, n), []
    v = rationals(4, n) if alike else np.array([Q(int(a == k.max())) for a in k])
    cache: list[int] = []
    for t in range(n):
        cache.append(t)
        w = (k[: t + 1] + 2) ** 2  # positive weights of row t
        if len(cache) > budget:
            cache.remove(evict(cache, key=lambda j, w=w: w[j]))
        kept, seen = np.array(cache), v[: t + 1]
        mean = (w[kept] @ v[kept]) / w[kept].sum()
        off, share = abs(mean - (w @ seen) / w.sum()), 1 - w[kept].sum() / w.sum()
        gone = np.delete(np.arange(len(w)), kept)
        exact = share * abs((w[gone] @ v[gone]) / w[gone].sum() - mean) if len(gone) else share
        apart = seen.max() - seen.min()
        found.append((off, share * apart, (1 - Q(len(cache), len(w))) * apart, same(off, exact)))
    return found


def eviction(budgets: tuple[int, ...] = (1, 3, 6)) -> Evidence:
    """A cache that evicts its least weighty key for good: each step's error is that of its own dropped weight."""
    needs(min(budgets) >= 1, "a budget of at least one key")
    found = [_evicted(budget, min) for budget in budgets]
    exact = [off for budget, steps in zip(budgets, found, strict=True) for off, *_ in steps[:budget]]
    pairs = [(off, by_weight) for steps in found for off, by_weight, *_ in steps if by_weight]
    known = [one for steps in found for *_, one in steps]
    what = "error over the dropped weight times the values' range"
    return judged([*pairs, *known, *(same(off, 0) for off in exact)], what)


def eviction_by_share() -> Evidence:
    """The share of the keys that went in place of their weight: the weightiest goes, with a value of its own."""
    pairs = [(off, by_share) for off, _, by_share, _ in _evicted(13, max, alike=False) if by_share]
    return judged(pairs, "error over the share of dropped keys times the values' range")


BUDGETS = (1, 3, 6, 13)


def _by_share(evict: Any, budgets: tuple[int, ...], what: str) -> Evidence:
    """Compare errors with the share of the keys that went, for values drawn, and where the weightiest has its own."""
    found = [one for budget in budgets for alike in (True, False) for one in _evicted(budget, evict, alike)]
    return judged([(off, by_share) for off, _, by_share, _ in found if by_share], what)


def lightest(budgets: tuple[int, ...] = BUDGETS) -> Evidence:
    """The least weighty key goes each time: what is gone weighs no more than its share of the keys."""
    needs(min(budgets) >= 1, "a budget of at least one key")
    return _by_share(min, budgets, "error over the share of dropped keys times the values' range")


def weightiest() -> Evidence:
    """The weightiest key goes each time."""
    what = "error over the share of dropped keys times the values' range, the weightiest key gone"
    return _by_share(max, BUDGETS, what)


def _power(s: Array, p: int) -> Array:
    w = (1 + s / p) ** p
    return np.asarray(w / w.sum())


def _power_bound(r: Any, p: int) -> Any:
    """Return tanh(osc/4) of s - p·log(1 + s/p), which lies between 0 and its value at -r."""
    away = -r - p * (1 - r / p).log()
    return (abs(away) / 4).tanh()


def _two_places(r: Any, p: int) -> Any:
    """Return the total variation where keys at -r weigh, by their number, as much beside one at 0 as moves most."""
    away, power = (-r).exp(), (1 - r / p) ** p
    many = 1 / (away * power).sqrt()
    return abs(many * away / (1 + many * away) - many * power / (1 + many * power))


@precise()
def power(powers: tuple[int, ...] = (8, 16, 32, 64), size: int = 4) -> Evidence:
    """(1 + s/p)^p over its sum against softmax, in total variation, for |s| up to 4; nearer at twice the p."""
    needs(size < min(powers), f"scores below p: 1 + s/p stays positive, got {size} and {min(powers)}")
    r = flint.arb(size)
    found: list[Any] = []
    curve = []
    for p in powers:
        cases = [balls(rationals(s, 9)) * size for s in range(4)]
        found += [(total_variation(_power(s, p), exp(s) / exp(s).sum()), _power_bound(r, p)) for s in cases]
        curve.append(_two_places(r, p))
        found += [over(curve[-1], _power_bound(r, p)), same(meet(curve[-1], _power_bound(r, p)), True)]
    found += [same(b < a, True) for a, b in itertools.pairwise(curve)]
    detail = {"p": list(powers), "distance": [float(c) for c in curve]}
    return judged(found, "total variation over tanh(osc/4)", detail)


@precise()
def power_low() -> Evidence:
    """p = 8 held to the bound of p = 64."""
    s = np.array([flint.arb(0), *[flint.arb(-4)] * 70])
    far = total_variation(_power(s, 8), exp(s) / exp(s).sum())
    return Evidence(far, _power_bound(flint.arb(4), 64), "total variation of p = 8 beside the bound of p = 64")


CLAIMS = [
    Claim(
        "decoding-recurrence",
        "Errors of a state with decay add up to eps·(1 - decay^t)/(1 - decay), attained where they have one sign",
        "derived here",
        recurrence,
        no_decay,
        ("a decay in (0, 1)",),
    ),
    Claim(
        "decoding-eviction",
        "An evicted cache's error at a step is at most the weight that it has dropped times the values' range",
        "derived here",
        eviction,
        eviction_by_share,
        ("a budget of at least one key",),
    ),
    Claim(
        "decoding-eviction-lightest",
        "Where weights do not change and the least weighty key is evicted, the error is at most the share of the keys"
        " that went times the values' range",
        "derived here",
        lightest,
        weightiest,
        ("a budget of at least one key",),
    ),
    Claim(
        "power-softmax",
        "(1 + s/p)^p over its sum is within tanh(osc/4) of softmax, osc = |R + p·log(1 - R/p)| for |s| <= R:"
        " of order R²/8p",
        "Power-Softmax (arXiv 2410.09457; summaries were read); the distance is derived here",
        power,
        power_low,
        ("scores below p",),
    ),
]
