"""Answers of parts of the keys merged through lse: any order, what rounding adds, and equal bits in a batch."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..check.bounds.expected import expected
from ..check.model import Model
from ..problem import Problem
from .claim import Claim, Evidence, judged, needs, same, total, worst
from .fields import balls, exp, meet, precise, rational, rationals, unequal
from .tracing import Traced, U

__all__ = ["CLAIMS", "ORDERS"]

Array = NDArray[Any]
Part = tuple[Any, Any]
Merge = Callable[[Part, Part], Part]


def _tree(parts: list[Part], merge: Merge) -> Part:
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [merge(*p) if len(p) > 1 else p[0] for p in pairs]
    return parts[0]


ORDERS: dict[str, Callable[[list[Part], Merge], Part]] = {
    "in a row": lambda parts, merge: reduce(merge, parts),
    "from the end": lambda parts, merge: reduce(merge, parts[::-1]),
    "a ring's, from the third": lambda parts, merge: reduce(merge, parts[2:] + parts[:2]),
    "tree": _tree,
}
"""Orders in which parts are merged."""


def _by_weight(a: Part, b: Part) -> Part:
    """Return the merged mean and weight of two parts: means count as much as what exp(lse) says."""
    weight = a[1] + b[1]
    return (a[0] * a[1] + b[0] * b[1]) / weight, weight


def _by_count(a: Part, b: Part) -> Part:
    return (a[0] + b[0]) / 2, a[1] + b[1]


def _same(merge: Merge, what: str, sizes: tuple[int, ...] = (1, 2, 3, 7)) -> Evidence:
    """Count the elements, over orders and sizes of parts, that differ from attention over all keys, in rationals."""
    w, v = rationals(0, 11, least=1), rationals(1, 11, 3)
    whole, wrong = (w @ v) / w.sum(), []
    for size, order in itertools.product(sizes, ORDERS.values()):
        parts = [
            ((w[i : i + size] @ v[i : i + size]) / w[i : i + size].sum(), w[i : i + size].sum())
            for i in range(0, 11, size)
        ]
        out, weight = order(parts, merge)
        wrong += [unequal(out, whole), int(weight != w.sum())]
    return Evidence(total(*wrong), 0, what)


def associative(sizes: tuple[int, ...] = (1, 2, 3, 7)) -> Evidence:
    """Parts merged by their weights in a row, backwards, in a ring or a tree: the same as all keys at once."""
    needs(min(sizes) >= 1, "parts of at least one key")
    return _same(_by_weight, "elements that differ from those of all keys at once", sizes)


def by_halves() -> Evidence:
    """Means merged half and half."""
    return _same(_by_count, "elements that differ, parts merged half and half")


def _float32(a: Part, b: Part) -> Part:
    """Merge outputs and lse of two parts in float32."""
    top = np.maximum(a[1], b[1])
    x, y = np.exp(a[1] - top), np.exp(b[1] - top)
    return (a[0] * x[:, None] + b[0] * y[:, None]) / (x + y)[:, None], top + np.log(x + y)


def _part(q: Array, k: Array, v: Array) -> Part:
    """Return output and lse of float32 attention over some keys, scale 1."""
    s = (q[:, None] * k).sum(2)  # not a matrix product, whose order of sums depends on how many rows there are
    top = s.max(1)
    p = np.exp(s - top[:, None])
    z = p.sum(1)
    return (p[:, :, None] * v).sum(1) / z[:, None], top + np.log(z)


def _add(x: Iterable[Any]) -> Any:
    return reduce(operator.add, x)


def _traced_part(q: list[Any], keys: list[list[Any]], v: list[Any]) -> Part:
    """Return `_part` of one row and one column of values, of numbers that trace their roundings."""
    s = [_add(a * b for a, b in zip(q, k, strict=True)) for k in keys]
    top = max(s, key=lambda x: float(x.value))
    p = [(x - top).exp() for x in s]
    z = _add(p)
    return _add(a * b for a, b in zip(p, v, strict=True)) / z, top + z.log()


def _traced_merge(a: Part, b: Part) -> Part:
    """Merge as `_float32` does."""
    top = max(a[1], b[1], key=lambda x: float(x.value))
    x, y = (a[1] - top).exp(), (b[1] - top).exp()
    return (a[0] * x + b[0] * y) / (x + y), top + (x + y).log()


TRACED = ((1, 12, 3.0, 4), (2, 12, 1.0, 6), (8, 12, 1.0, 4))
"""Features, keys, the scale of queries, and keys a part."""


@precise()
def _largest(d: int, n: int, scale: float, size: int) -> list[Any]:
    """Return the largest first-order errors of out and lse of every order, whatever is rounded how, and their bounds.

    And whether out and lse are attention's. A traced exponential is off by one unit roundoff, and within a part nothing
    is rescaled.
    """
    q, k, v = np.random.default_rng(3).standard_normal((3, n, d)).astype(np.float32)
    q, v = q[:1] * np.float32(scale), v[:, :1]
    model = replace(Model("float32", "float32", "float32", exp_ulps=1.0), split=size, chain=size, tile=n)
    allowed = expected(Problem(q[None, None], k[None, None], v[None, None], scale=1.0), model).allowed
    bounds = [float(allowed[name].ravel()[0]) for name in ("out", "lse")]
    row, keys, values = ([[Traced(a) for a in rational(x)] for x in given] for given in (q, k, v.T))
    parts = [_traced_part(row[0], keys[i : i + size], values[0][i : i + size]) for i in range(0, n, size)]
    weights = exp(balls(rational(q) @ rational(k).T))[0]
    exact = (weights @ balls(rational(v[:, 0]))) / weights.sum(), weights.sum().log()
    found: list[Any] = []
    for merged in (order(parts, _traced_merge) for order in ORDERS.values()):
        found += [(x.error * U, bound) for x, bound in zip(merged, bounds, strict=True)]
        found += [same(meet(x.value, right), True) for x, right in zip(merged, exact, strict=True)]
    return found


def _inputs(scale: float) -> Array:
    q, k, v = np.random.default_rng(3).standard_normal((3, 40, 8)).astype(np.float32)
    return np.stack([q * np.float32(scale), k, v])


def _merged(size: int, order: Callable[[list[Part], Merge], Part], given: Any) -> Part:
    q, k, v = given
    return order([_part(q, k[i : i + size], v[i : i + size]) for i in range(0, len(k), size)], _float32)


SCALES, PARTS = (0.5, 3.0), (4, 10, 20)


def _rounding(split_of: Callable[[int], int], what: str) -> Evidence:
    """Compare float32 runs of every order with the bounds of a kernel that splits keys into parts."""
    pairs: list[Any] = []
    curve: dict[str, float] = {}
    for scale, size in itertools.product(SCALES, PARTS):
        given = _inputs(scale)
        problem = Problem(*(x[None, None] for x in given), scale=1.0)  # type: ignore[misc]
        model = replace(Model("float32", "float32", "float32"), split=split_of(size), chain=len(given[0]), tile=1)
        right = expected(problem, model)
        for name, order in ORDERS.items():
            out, lse = _merged(size, order, given)
            off, far = np.abs(out - right.answer.out[0, 0]), np.abs(lse - np.asarray(right.answer.lse)[0, 0])
            by_order = [*zip(off.flat, right.allowed["out"].flat, strict=True)]
            pairs += [*by_order, *zip(far.flat, right.allowed["lse"].flat, strict=True)]
            curve[name] = max(curve.get(name, 0.0), float(worst(by_order)))
    return judged(pairs, what, {"largest error over its bound": curve})


def rounding() -> Evidence:
    """Largest errors of every order, however it rounds, and float32 runs: against bounds of a kernel with parts."""
    ran = _rounding(lambda size: size, "largest error over the bound of a kernel that merges parts")
    return judged([ran.measured, *(one for given in TRACED for one in _largest(*given))], ran.what, ran.detail)


def rounding_of_bfloat16() -> Evidence:
    """The same where lse is rounded to bfloat16 before it weighs the parts."""

    def merge(a: Part, b: Part) -> Part:
        out, lse = _float32(a, b)
        return out, (lse.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    given = _inputs(3.0)
    q, k, v = given
    problem = Problem(*(x[None, None] for x in given), scale=1.0)  # type: ignore[misc]
    right = expected(problem, replace(Model(), split=4, chain=40, tile=1))
    parts = [_part(q, k[i : i + 4], v[i : i + 4]) for i in range(0, 40, 4)]
    off = np.abs(reduce(merge, parts)[0] - right.answer.out[0, 0]) / right.allowed["out"][0, 0]
    return Evidence(float(off.max()), 1, "error over the bound, lse cut to bfloat16")


def _bits(size_of: Callable[[int], int], batches: tuple[int, ...], what: str) -> Evidence:
    """Count the bits of one row's outputs that depend on how many rows are computed with it."""
    q, k, v = _inputs(1.0)
    wrong = []
    for order, row in itertools.product(ORDERS.values(), ROWS):
        found = []
        for batch in batches:
            out, _ = _merged(size_of(batch), order, (q[row : row + batch], k, v))
            found.append(out[0].view(np.uint32))
        wrong += [int((a != b).sum()) for a, b in itertools.pairwise(found)]
    return Evidence(total(*wrong), 0, what)


ROWS, BATCHES = (0, 7), (1, 2, 5, 16)


def invariant(batches: tuple[int, ...] = BATCHES) -> Evidence:
    """Parts of ten keys whatever the batch is, each row's sums in one order: equal bits."""
    needs(min(batches) >= 1, "batches of at least one row")
    return _bits(lambda batch: 10, batches, "numbers whose bits depend on the batch")


def split_by_batch() -> Evidence:
    """Parts that depend on the batch, as where a kernel splits keys to keep all processors busy."""
    return _bits(lambda batch: 4 * batch, BATCHES, "numbers whose bits depend on the batch, keys split by it")


CLAIMS = [
    Claim(
        "merge-associative",
        "Parts of the keys merged through lse give the answer of all keys at once, in any order",
        "derived here",
        associative,
        by_halves,
        ("parts of at least one key",),
    ),
    Claim(
        "merge-rounding",
        "In float32 every order stays within the bounds derived for a kernel that splits keys, however it rounds",
        "derived here: refattn.check.bounds",
        rounding,
        rounding_of_bfloat16,
    ),
    Claim(
        "batch-invariance",
        "Bits do not depend on the batch where no order of a row's sums does; with keys split by the batch they do",
        "derived here",
        invariant,
        split_by_batch,
        ("batches of at least one row",),
    ),
]
