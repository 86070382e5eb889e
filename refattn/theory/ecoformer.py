"""EcoFormer: binary codes make attention linear, exactly; the released bias; energy by counted operations."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..functions.costs import ADD, MULTIPLY, ecoformer_operations, softmax_operations
from ..functions.hashing import code_weights, linear_sums
from .claim import Claim, Evidence, needs, total
from .counting import counted, plain, working
from .fields import each, rational, rationals, unequal

__all__ = ["CLAIMS"]

Array = NDArray[Any]


def _by_codes(n: int, d: int, bits: int) -> Fraction:
    """Return the picojoules of attention by codes whose bits are signs of products with d weights, of q and of k."""
    found: Fraction = ecoformer_operations(n, d, bits, anchors=None, shared=False).energy()
    return found


def _by_softmax(n: int, d: int) -> Fraction:
    found: Fraction = softmax_operations(n, d).energy()
    return found


def _codes(n: int = 20, bits: int = 6, d: int = 3) -> tuple[Array, Array, Array]:
    h, g = np.random.default_rng(0).choice([-1, 1], (2, n, bits))
    return rational(h), rational(g), rationals(1, n, d)


def _dense(h: Array, g: Array, v: Array) -> Array:
    w = code_weights(h, g)
    return np.asarray(w @ v / w.sum(1, keepdims=True))


def linear(size: int = 1) -> Evidence:
    """Weights h_i·h_j + bits + 1 of ±1 codes: by sums over j, against the whole matrix; they are at least 1."""
    h, g, v = _codes()
    h = h * size
    needs(bool((abs(h) == 1).all() and (abs(g) == 1).all()), "codes of +1 and -1: else a weight may be below 1")
    small, other = int((code_weights(h, g) < 1).sum()), int((np.diag(code_weights(h, -h)) != 1).sum())
    wrong = unequal(linear_sums(h, g, v, v.sum(0)), _dense(h, g, v))
    # opposite codes weigh just 1
    return Evidence(total(wrong, small, other), 0, "elements that differ from the whole matrix's, and weights below 1")


def released() -> Evidence:
    """The released code's bias: v_i times bits + 1 instead of the sum of all v_j."""
    h, g, v = _codes()
    return Evidence(unequal(linear_sums(h, g, v, v), _dense(h, g, v)), 0, "elements that differ with the released bias")


def _counted(n: int, d: int, bits: int, hashing: bool = True) -> tuple[Fraction, int]:
    """Return the energy of attention by codes on numbers that count, and how much of the result is wrong."""
    tally: Counter[str] = Counter()
    q, k, v = (counted(x, tally) for x in rationals(2, 3, n, d))
    weights = counted(rationals(3, d, bits), tally)
    h, g = (counted(each(lambda a: 1 if a > 0 else -1, x @ weights), tally, sign=True) for x in (q, k))
    if not hashing:
        tally.clear()
    out = linear_sums(h, g, v, v.sum(0))
    codes, keys = (rational(each(plain, x).astype(int)) for x in (h, g))
    exact = _dense(codes, keys, each(plain, v))
    return tally["multiply"] * MULTIPLY + tally["add"] * ADD, unequal(each(plain, out), exact)


def _against(hashing: bool, what: str) -> Evidence:
    found: list[Any] = []
    for n, d, bits in ((5, 4, 3), (9, 3, 4), (6, 7, 2)):
        picojoules, wrong = _counted(n, d, bits, hashing)
        found += [abs(_by_codes(n, d, bits) - picojoules), wrong]
    found += [abs(_by_softmax(n, d) - _softmax_counted(n, d)) for n, d in ((5, 4), (3, 7))]
    return Evidence(max(*found, working()), 0, what)


def count() -> Evidence:
    """The formula against operations counted by the numbers themselves, hashing included; the result is right."""
    return _against(True, "picojoules from the count")


def without_hashing() -> Evidence:
    """A count that leaves hashing out."""
    return _against(False, "picojoules from a count that leaves hashing out")


def _softmax_counted(n: int, d: int) -> Fraction:
    """Return the energy of QKᵀ and of products with V on numbers that count."""
    tally: Counter[str] = Counter()
    q, k, v = (counted(x, tally) for x in rationals(2, 3, n, d))
    (q @ k.T) @ v
    return tally["multiply"] * MULTIPLY + tally["add"] * ADD


def crossover() -> Evidence:
    """The length from which codes save energy, by the formulas, and on counting numbers just there and before."""
    d, bits = 4, 2
    n = next(n for n in range(1, 1000) if _by_codes(n, d, bits) < _by_softmax(n, d))
    at, before = (_counted(m, d, bits)[0] - _softmax_counted(m, d) for m in (n, n - 1))
    return Evidence(max(at, -before), 0, "picojoules lost at the crossover or won before it", {"crossover": n})


def always() -> Evidence:
    """The wish that codes always save energy: at one token they do not."""
    return Evidence(_by_codes(1, 4, 2), _by_softmax(1, 4), "picojoules at one token, beside softmax's")


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
        "Energy is counted additions and multiplications, hashing included; codes turn products into additions",
        SOURCE,
        count,
        without_hashing,
    ),
    Claim(
        "ecoformer-crossover",
        "Codes save energy from a length on that the counts give, and not before",
        SOURCE,
        crossover,
        always,
    ),
]
