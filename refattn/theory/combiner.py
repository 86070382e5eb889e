"""Combiner's factorised attention: a distribution with full support, at sub-quadratic cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..functions.costs import combiner_fixed
from .claim import Claim, Evidence, needs, total
from .counting import Counted, counted
from .fields import balls, disjoint, each, precise, rationals, zeros

__all__ = ["CLAIMS", "factorised"]

Array = NDArray[Any]


def _exp(x: Array) -> Array:
    """Return exponentials of balls, or of numbers that count."""

    def one(a: Any) -> Any:
        return Counted(a.value.exp(), a.tally) if isinstance(a, Counted) else a.exp()

    return each(one, x)


def factorised(q: Array, k: Array, v: Array, block: int) -> Array:
    """Return causal Combiner-fixed attention, scale 1.

    A token attends to its own block token by token, and to each earlier block as one: to the block by its largest
    features, within it by the block's own query.
    """
    n, d = q.shape
    needs(n % block == 0, f"blocks of {block} divide n = {n}")
    of_q, of_k = (x.reshape(n // block, block, d).max(1) for x in (q, k))
    summary = []
    for r in range(n // block - 1):  # the last block is nobody's past
        own = slice(r * block, r * block + block)
        inner = _exp(k[own] @ of_q[r])
        summary.append(inner @ v[own] / inner.sum())
    out = np.empty_like(v)
    for i in range(n):
        r = i // block
        own = slice(r * block, i + 1)
        weights = _exp(np.concatenate([k[own], of_k[:r]]) @ q[i])
        out[i] = (weights @ np.concatenate([v[own], *([summary[:r]] if r else [])])) / weights.sum()
    return out


def _distribution(q: Array, k: Array, block: int, pool: Any = max) -> Array:
    """Return p(j | i) = sum over regions r of p(r | i) p(j | r): a region is a token of the own block or a block."""
    n, d = q.shape
    inside, outside = [], []
    regions = [*([j] for j in range(n)), *(list(range(b, b + block)) for b in range(0, n, block))]
    pooled = [np.array([[pool(x[j, c] for j in region) for c in range(d)] for region in regions]) for x in (q, k)]
    for of_q, region in zip(pooled[0], regions, strict=True):
        within = {j: (of_q @ k[j]).exp() for j in region} if len(region) > 1 else {region[0]: balls(1)[()]}
        inside.append([within[j] / sum(within.values()) if j in within else balls(0)[()] for j in range(n)])
    for i in range(n):
        first = i // block * block
        seen = [first <= r[0] <= i if len(r) == 1 else max(r) < first for r in regions]
        w = [(q[i] @ key).exp() if s else balls(0)[()] for key, s in zip(pooled[1], seen, strict=True)]
        outside.append([a / sum(w) for a in w])
    return np.asarray(np.array(outside) @ np.array(inside))


def _call(n: int = 12, d: int = 3) -> Array:
    return balls(rationals(0, 3, n, d))


def _compared(block: int, pool: Any, what: str) -> Evidence:
    q, k, v = _call()
    found = factorised(q, k, v, block)
    p = _distribution(q, k, block, pool)
    support = each(lambda a: a > 0, p).astype(bool)
    other = int((support != np.tril(np.ones_like(support))).sum())
    sums = disjoint(p.sum(1), balls(zeros(len(q)) + 1))
    return Evidence(total(disjoint(found, p @ v), sums, other), 0, what)


@precise()
def distribution(block: int = 4) -> Evidence:
    """The factorised result against the explicit sum over regions: a distribution over all earlier tokens."""
    return _compared(
        block, max, "elements that differ, rows not of sum 1, weights of the past not above 0 or of the future above it"
    )


@precise()
def smallest() -> Evidence:
    """The sum over regions with the smallest features of a block in place of the largest."""
    return _compared(4, min, "elements that differ, blocks pooled by their smallest features")


def _work(block: int, n: int, d: int) -> int:
    """Return the multiplications of factorised attention on numbers that count."""
    tally: Counter[str] = Counter()
    q, k, v = (counted(x, tally) for x in balls(rationals(1, 3, n, d)))
    factorised(q, k, v, block)
    return tally["multiply"]


@precise()
def work(d: int = 2) -> Evidence:
    """Multiplications counted, against d·(n(b + n/b) + 2(n - b)): order n^1.5 for blocks of sqrt(n)."""
    sizes = [(2, 4), (3, 9), (4, 16), (2, 16), (8, 16), (5, 25)]
    found = [_work(b, n, d) for b, n in sizes]
    away = max(abs(f - combiner_fixed(n, d, b).multiplies) for f, (b, n) in zip(found, sizes, strict=True))
    detail = {
        "n": [n for b, n in sizes if b * b == n],
        "multiplications, blocks of sqrt(n)": [f for f, (b, n) in zip(found, sizes, strict=True) if b * b == n],
    }
    return Evidence(away, 0, "multiplications from the formula", detail)


@precise()
def work_of_one_block() -> Evidence:
    """One block of all tokens: plain causal attention, of order n², held to the work of blocks of sqrt(n)."""
    return Evidence(
        _work(16, 16, 2), combiner_fixed(16, 2, 4).multiplies, "multiplications of one block of 16, beside blocks of 4"
    )


SOURCE = "Ren et al., Combiner (arXiv 2107.05768; recalled)"
CLAIMS = [
    Claim(
        "combiner-support",
        "Combiner's attention is a distribution over all earlier tokens: full support, rows sum to one",
        SOURCE,
        distribution,
        smallest,
        ("blocks divide n",),
    ),
    Claim(
        "combiner-work",
        "Combiner takes d·(n(b + n/b) + 2(n - b)) multiplications with blocks of b: of order n^1.5 at b = sqrt(n)",
        SOURCE,
        work,
        work_of_one_block,
    ),
]
