"""Rounding in log-sum-exp and softmax: largest errors in closed form, float32 runs, and what biased rounding does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import flint
import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from .claim import Claim, Evidence, judged, needs, same, total
from .fields import balls, meet, over, precise, rational
from .tracing import Traced, U, modelled

__all__ = ["CLAIMS"]

Numbers = NDArray[np.float32]


class Float32:
    """A float32 number whose exponential and logarithm are those of float64, rounded."""

    def __init__(self, value: Any) -> None:
        self.value = np.float32(value)

    def __add__(self, other: Float32) -> Float32:
        return Float32(self.value + other.value)

    def __sub__(self, other: Float32) -> Float32:
        return Float32(self.value - other.value)

    def __mul__(self, other: Float32) -> Float32:
        return Float32(self.value * other.value)

    def __truediv__(self, other: Float32) -> Float32:
        return Float32(self.value / other.value)

    def exp(self) -> Float32:
        return Float32(np.exp(np.float64(self.value)))

    def log(self) -> Float32:
        return Float32(np.log(np.float64(self.value)))


def _inputs(spread: float) -> list[Numbers]:
    """Return float32 vectors whose elements are at most `spread` apart: drawn, ordered, and chosen to lose the most."""
    found = []
    for seed, n in enumerate((1, 2, 3, 7, 12)):
        rng = np.random.default_rng(seed)
        for x in (rng.standard_normal(n), np.linspace(0, 1, n), np.linspace(1, 0, n), rng.choice([0.0, 1.0], n)):
            x = (x - x.min()) / max(float(np.ptp(x)), 2.0**-9) * spread * rng.uniform(0.1, 1) + rng.uniform(
                -spread, spread
            )
            found.append(x.astype(np.float32))
    # one large element, then some that are lost one by one; a maximum that grows while the first sum stays the most
    found.append(np.array([0, *[np.log(0.99 * 2.0**-24)] * 11], np.float32))
    found.append(np.array([20, *(20 + 2.0**-18 * np.arange(1, 9))], np.float32))
    return found


def _shifted(x: list[Any]) -> tuple[Any, list[Any], Any]:
    """Return the maximum, the exponentials of the elements less it, and their sum, one by one."""
    top = max(x, key=lambda a: a.value)
    parts = [(a - top).exp() for a in x]
    return top, parts, reduce(lambda a, b: a + b, parts)


def _lse(x: list[Any]) -> Any:
    top, _, total = _shifted(x)
    return top + total.log()


def _softmax(x: list[Any]) -> Any:
    _, parts, total = _shifted(x)
    return parts[0] / total


def _parts(x: Numbers) -> tuple[Any, Any, Any, Any]:
    """Return distances to the maximum, weights, partial sums over the sum, and the sum, in balls."""
    away = balls(rational(x.max()) - rational(x))
    e = np.array([(-a).exp() for a in away])
    sums = np.cumsum(e)
    return away, e / sums[-1], sums / sums[-1], sums[-1]


def _lse_error(x: Numbers) -> Any:
    """Return the largest first-order error of log-sum-exp over u: differences, exponentials, additions, log, sum."""
    away, p, sums, total = _parts(x)
    y = rational(x.max())[()] + total.log()
    return (p * away).sum() + p[away != 0].sum() + sums[1:].sum() + abs(total.log()) + abs(y)


def _softmax_error(x: Numbers) -> Any:
    """Return the largest first-order relative error of softmax's first element over u."""
    away, p, sums, _ = _parts(x)
    share = p.copy()
    share[0] = 1 - p[0]
    return (share * away).sum() + share[away != 0].sum() + sums[1:].sum() + 1


Form = Callable[[Numbers], Any]
Program = Callable[[list[Any]], Any]


def _held(program: Program, error: Form, most: Form, relative: bool, inputs: list[Numbers], what: str) -> Evidence:
    """Compare a program's largest first-order error with a closed form and a short bound, and float32 runs."""
    found: list[Any] = modelled()
    for x in inputs:
        traced, form = program([Traced(a) for a in rational(x)]), error(x)
        largest = traced.error / abs(traced.value) if relative else traced.error
        ran = flint.arb(float(program([Float32(a) for a in x]).value))
        found += [same(meet(largest, form), True), same(meet(traced.may, ran), True)]
        found.append((largest, most(x)))
    shares = [float(x[0] / x[1]) for x in found if isinstance(x, tuple)]
    return judged(found, what, {"largest error over the short bound": shares})


def _largest(program: Program, most: Form, relative: bool, inputs: list[Numbers], what: str) -> Evidence:
    """Compare a program's largest first-order error with a short bound."""
    traced = [program([Traced(a) for a in rational(x)]) for x in inputs]
    errors = [t.error / abs(t.value) if relative else t.error for t in traced]
    return judged(((e, most(x)) for e, x in zip(errors, inputs, strict=True)), what)


HELD = "largest error over the bound"


def _range(x: Numbers) -> Any:
    return flint.arb(rational(x.max())[()] - rational(x.min())[()])


def _lse_most(x: Numbers) -> Any:
    _, _, _, total = _parts(x)
    y = rational(x.max())[()] + total.log()
    return _range(x) + len(x) + flint.arb(len(x)).log() + abs(y)


@precise()
def log_sum_exp(spread: float = 60.0) -> Evidence:
    """Shifted log-sum-exp: its largest first-order error in closed form, at most (n + range + log n + |y|)·u."""
    _spread(spread)
    return _held(_lse, _lse_error, _lse_most, False, _inputs(spread), HELD)


@precise()
def log_sum_exp_any_length() -> Evidence:
    """The wish that the error does not grow with n: false where one large element makes the sum lose the others."""

    def most(x: Numbers) -> Any:
        return _lse_most(x) - len(x) + 2

    return _largest(_lse, most, False, _inputs(60.0), "largest error over a bound without n")


def _spread(spread: float) -> None:
    needs(0 < spread <= 80, "a range of elements at which no exponential underflows: up to 80")


def _softmax_most(x: Numbers) -> Any:
    return 2 * _range(x) + len(x) + 2


@precise()
def softmax(spread: float = 60.0) -> Evidence:
    """Shifted softmax: its largest first-order relative error in closed form, at most (n + 2 + 2·range)·u."""
    _spread(spread)
    return _held(_softmax, _softmax_error, _softmax_most, True, _inputs(spread), HELD)


@precise()
def softmax_no_division() -> Evidence:
    """exp(x - lse) instead of a division: lse's rounding, u·|lse|, becomes a relative error."""
    inputs = [(x + 5000).astype(np.float32) for x in _inputs(4.0)]

    def program(x: list[Any]) -> Any:
        return (x[0] - _lse(x)).exp()

    return _largest(program, _softmax_most, True, inputs, "largest error over the bound, exp(x - lse) near 5000")


def _online(x: list[Any], block: int) -> Any:
    top: Any = None
    total: Any = None
    for i in range(0, len(x), block):
        if top is None:
            top, _, total = _shifted(x[i : i + block])
            continue
        larger = max([top, *x[i : i + block]], key=lambda a: a.value)
        part = [(a - larger).exp() for a in x[i : i + block]]
        total = total * (top - larger).exp() + reduce(lambda a, b: a + b, part)
        top = larger
    return top + total.log()


def _online_error(x: Numbers, block: int) -> Any:
    """Return the largest first-order error of the online form over u."""
    exact, e = rational(x), balls(rational(x) - rational(x.max()))
    e = np.array([a.exp() for a in e])
    whole, found, top, before = e.sum(), flint.arb(0), None, flint.arb(0)
    for i in range(0, len(x), block):
        part, w = exact[i : i + block], e[i : i + block]
        most = max([*part, *([top] if top is not None else [])])
        away = balls(most - part)
        found += (w * away).sum() + w[away != 0].sum() + np.cumsum(w)[1:].sum()
        if top is not None:  # the old sum: a difference, an exponential, a product where the maximum moved, an addition
            found += before * (most - top) + (2 * before if most != top else 0) + before + w.sum()
        top, before = most, before + w.sum()
    y = rational(x.max())[()] + whole.log()
    return found / whole + abs(whole.log()) + abs(y)


def _online_held(size: int) -> Evidence:
    needs(size >= 1, "blocks of at least one element")

    def most(x: Numbers) -> Any:
        return _lse_most(x) + 2 * len(range(size, len(x), size))

    return _held(lambda x: _online(x, size), lambda x: _online_error(x, size), most, False, _inputs(60.0), HELD)


@precise()
def online(block: int | None = None) -> Evidence:
    """Sums by blocks with a running maximum, of one element too: two roundings more for each block but the first."""
    found = [_online_held(size) for size in ((1, 2, 5) if block is None else (block,))]
    return next((e for e in found if not e.holds), max(found, key=lambda e: float(e.measured)))


@precise()
def online_without_rescale() -> Evidence:
    """The running sum not multiplied with exp(old maximum - new maximum), held to the online form's errors."""

    def program(x: list[Any]) -> Any:
        top, total = x[0], (x[0] - x[0]).exp()
        for a in x[1:]:
            top = max(top, a, key=lambda b: b.value)
            total = total + (a - top).exp()
        return top + total.log()

    x = np.arange(8, dtype=np.float32)
    _, _, _, total = _parts(x)
    y = rational(x.max())[()] + total.log()
    away = abs(flint.arb(float(program([Float32(a) for a in x]).value)) - y)
    return Evidence(away / U, _online_error(x, 1), "error over u beside the largest, nothing rescaled")


def _moves(x: Numbers) -> Any:
    """Return what one pass loses beyond two over u: two roundings of the old sum wherever the maximum moves.

    Differences lose the same: to the maximum so far, and from there to the last one, is as far as at once. An element
    that is the maximum when it comes is not rounded by its exponential, but was at its own.
    """
    e = np.array([a.exp() for a in balls(rational(x) - rational(x.max()))])
    tops = np.maximum.accumulate(x)
    found = flint.arb(0)
    for t in range(1, len(x)):
        if tops[t] != tops[t - 1]:
            found += 2 * e[:t].sum()
    return (found - e[(tops == x) & (x != x.max())].sum()) / e.sum()


def _passes(more: Callable[[Numbers], Any], what: str) -> Evidence:
    """Compare the largest errors of one pass and of two, and the difference with two roundings a move."""
    found: list[Any] = []
    for x in _inputs(60.0):
        one, two = (f([Traced(a) for a in rational(x)]).error for f in (lambda y: _online(y, 1), _lse))
        found.append(same(meet(one - two, _moves(x)), True))
        found.append(over(one, two + more(x)))
    return judged(found, what)


def _new_maxima(x: Numbers) -> Any:
    return 2 * int((np.diff(np.maximum.accumulate(x)) != 0).sum())


@precise()
def one_pass() -> Evidence:
    """Largest errors of one pass over those of two and two roundings a new maximum; the difference in closed form."""
    found = _passes(_new_maxima, "error of one pass over that of two passes and two roundings a new maximum")
    grown = [[2 for t, a in enumerate(x) if t and a > x[:t].max()] for x in _inputs(60.0)]
    counts = [same(_new_maxima(x), sum(twos)) for x, twos in zip(_inputs(60.0), grown, strict=True)]
    return replace(found, unequal=total(found.unequal, *counts))


@precise()
def one_pass_free() -> Evidence:
    """The wish that one pass loses no more than two."""
    return _passes(lambda x: 0, "error of one pass over that of two passes")


def _mean_error(rounded: Callable[[Numbers], Any], what: str) -> Evidence:
    """Add up the errors of rounding all float32 numbers of two neighbouring bfloat16 cells, in last places."""
    cells = 2**17
    worst_sum = 0
    for start in (0x3F80_0000, 0x3DAA_0000, 0x3F7E_0000):
        bits = np.arange(start, start + cells, dtype=np.uint32)
        after = np.asarray(rounded(bits.view(np.float32))).astype(np.float32).view(np.uint32)
        worst_sum = max(worst_sum, abs(int(after.astype(np.int64).sum()) - int(bits.astype(np.int64).sum())))
    return Evidence(worst_sum, 0, what, {"mean error in units of bfloat16's last place": worst_sum / cells / 2**16})


def unbiased() -> Evidence:
    """Rounding to the nearest bfloat16, ties to even, of all float32 numbers of two cells: the errors cancel."""
    return _mean_error(lambda x: x.astype(bfloat16), "sum of the errors of 2^17 numbers, in float32's last places")


def biased() -> Evidence:
    """Truncation: half a last place each."""
    what = "sum of the errors of 2^17 numbers truncated, in float32's last places"
    return _mean_error(lambda x: (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32), what)


BHH = "Blanchard, Higham and Higham, IMA J. Numer. Anal. 2021 (its abstract was read, bounds are derived here)"
CLAIMS = [
    Claim(
        "log-sum-exp-rounding",
        "Shifted log-sum-exp has a largest first-order error in closed form, at most (n + range + log n + |y|)·u",
        BHH,
        log_sum_exp,
        log_sum_exp_any_length,
        ("no exponential underflows",),
    ),
    Claim(
        "softmax-rounding",
        "Shifted softmax with a division has a largest relative error in closed form, at most (n + 2 + 2·range)·u",
        BHH,
        softmax,
        softmax_no_division,
        ("no exponential underflows",),
    ),
    Claim(
        "online-rescale",
        "The online sum with rescaling adds two roundings a block after the first, and no more of the range",
        "derived here",
        online,
        online_without_rescale,
        ("blocks of at least one element",),
    ),
    Claim(
        "one-pass-rounding",
        "One pass with a running maximum loses two roundings for each new maximum more than two passes, nothing else",
        "derived here",
        one_pass,
        one_pass_free,
    ),
    Claim(
        "biased-rounding",
        "Rounding P to nearest even has no mean error over neighbouring cells; truncation has half a last place, which"
        " rows with similar values add up",
        "arXiv 2510.04212 (a summary was read)",
        unbiased,
        biased,
    ),
]
