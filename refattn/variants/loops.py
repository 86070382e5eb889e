"""Second forms of operators that choose keys: plain loops over rows, on Python's integers and decimals.

They share nothing with the certified choice: no enclosures, no balls, no prime field. A product of floats is an integer
over a power of two. Sums of exponentials are compared in decimals, and where these are close, term by term: different
algebraic exponents have exponentials that are linearly independent over the algebraic numbers (Lindemann and
Weierstrass), so two such sums are equal iff their terms are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from functools import cmp_to_key
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_float64
from ..errors import InvalidProblem, UnsupportedProblem
from ..problem import Problem
from .shapes import parted

__all__ = ["chosen", "first", "first_weights", "integers", "products", "sees"]

DIGITS = 60
CLOSE = Decimal(10) ** -40
"""Sums of weights below 1 that are further apart differ: their decimals are off by far less."""
Whole = NDArray[np.object_]


def integers(x: Any) -> tuple[Whole, int]:
    """Return integers and the one denominator that all of them have; what is no number counts as 0."""
    x = np.asarray(to_float64(x))
    ratios = [y.as_integer_ratio() if math.isfinite(y) else (0, 1) for y in x.ravel().tolist()]
    below = max((m for _, m in ratios), default=1)  # each is a power of two
    return np.array([n * (below // m) for n, m in ratios], object).reshape(x.shape), below


def products(p: Problem, columns: int | None = None) -> tuple[Whole, int]:
    """Return all products of queries' and keys' first columns, (b, h_q, n_q, n_k), as integers over one denominator."""
    (q, below), (k, more) = integers(p.query[..., :columns]), integers(p.key[..., :columns])
    heads = range(p.heads)
    found = [[q[b, h] @ k[b, h // (p.heads // p.heads_kv)].T for h in heads] for b in range(p.batch)]
    return np.array(found, object).reshape(*p.out_shape[:3], p.n_k), below * more


def sees(p: Problem) -> NDArray[np.bool_]:
    """Return which keys rows see before any choice, (b, h_q, n_q, n_k): up to their own, of a weight above 0."""
    causal = np.arange(p.n_k) <= np.arange(p.n_q)[:, None] + p.n_k - p.n_q
    weight = np.ones((1, 1, 1, 1)) if p.weight is None else to_float64(p.weight)
    return np.asarray(np.broadcast_to(causal & (weight > 0), (*p.out_shape[:3], p.n_k)))


def chosen(p: Problem, take: Callable[..., Iterator[int]], together: bool, scores: Whole | None = None) -> Problem:
    """Write a choice out as a mask.

    Parameters
    ----------
    p : Problem
        The call.
    take : callable
        ``take(products, sees, at)`` yields the keys of one row from the products of its heads, (heads, n_k), what it
        sees, (n_k,), and the key at which it stands.
    together : bool
        Whether the query heads of a key head choose the same.
    scores : (b, h_q, n_q, n_k) integers, optional
        What stands in place of the products.

    Raises
    ------
    InvalidProblem
        Heads that choose the same do not see the same keys.
    """
    s = products(p)[0] if scores is None else scores
    seen, group = sees(p), p.heads // p.heads_kv if together else 1
    taken = np.zeros(seen.shape, bool)
    for b, h, i in np.ndindex(p.batch, p.heads // group, p.n_q):
        heads = slice(h * group, (h + 1) * group)
        if (unlike := (seen[b, heads, i] != seen[b, h * group, i]).any(1)).any():
            raise InvalidProblem(parted(p, h * group, h * group + int(unlike.argmax())))
        for j in take(s[b, heads, i], seen[b, h * group, i], i + p.n_k - p.n_q):
            taken[b, heads, i, j] = True
    return p.replace(variant="softmax", options={}, allowed=taken)


def first(scores: dict[int, int], count: int, ties: bool = False) -> list[int]:
    """Return the candidates of the largest scores, the lower one at a tie; with `ties`, a mistake, all at the last."""
    best = sorted(scores, key=lambda x: (-scores[x], x))[: max(count, 0)]
    return [x for x in scores if scores[x] >= scores[best[-1]]] if ties and best else best


def first_weights(
    exponents: list[list[int]], unit: Decimal, among: list[int], count: int, ties: bool = False
) -> list[int]:
    """Return the candidates of the largest sum over heads of softmax weights, the lower one at a tie.

    Parameters
    ----------
    exponents : list of lists of int
        By head and candidate that is weighed, in units of `unit`, an algebraic number that is rounded here.
    unit : Decimal
        To 60 digits.
    among : list of int
        Which of them are to be chosen from.
    count : int
        How many.
    ties : bool
        Whether all are returned that tie with the last: a mistake.
    """
    with localcontext() as context:
        context.prec = DIGITS
        weights = []
        for row in exponents:
            most = max(x * unit for x in row)
            e = [(x * unit - most).exp() for x in row]
            weights.append([x / sum(e) for x in e])
        total = [sum(x) for x in zip(*weights, strict=True)]

        def order(a: int, b: int) -> int:
            gap = total[a] - total[b]
            if abs(gap) > CLOSE:
                return -1 if gap > 0 else 1
            if unit and _terms(exponents, a) != _terms(exponents, b):
                raise UnsupportedProblem(f"scores: candidates {a} and {b} differ by less than {CLOSE}")
            return 0

        best = sorted(sorted(among), key=cmp_to_key(order))[: max(count, 0)]  # sorting keeps the lower one first
        return [x for x in among if order(x, best[-1]) <= 0] if ties and best else best


def _terms(exponents: list[list[int]], at: int) -> Counter[int]:
    """Return how often each exponential stands in a candidate's sum of weights times the denominators of all heads."""
    found: Counter[int] = Counter()
    for h, row in enumerate(exponents):
        for others in product(*(exponents[:h] + exponents[h + 1 :])):
            found[row[at] + sum(others)] += 1
    return found
