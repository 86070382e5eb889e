"""Operators that are another operator's call: masks written out, and choices made exactly."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidProblem
from ..masks import block
from ..problem import VARIANT, Problem
from ..scales import dequantised
from ..variants import Choices, Lowered, Selected, Shape, variant_of
from .arithmetics import Balls
from .field import Field
from .heads import Head, heads, matrix_of
from .levels import Level

__all__ = ["Lowering", "candidates", "choosers", "keys_of", "lower", "scores_of"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
LADDER = (256, 1024, 4096)  # bits at which scores that enclosures cannot tell apart are looked at again


@dataclass(frozen=True)
class Lowering:
    """The call that is evaluated, and each row's margin where keys were chosen by scores, (b, h_q, n_q)."""

    problem: Problem
    margins: Float | None = None


def lower(problem: Problem, shape: Shape | None = None) -> Lowering:
    """Return the call that an operator is another way of writing: itself for a definition of rows or steps.

    Parameters
    ----------
    problem : Problem
        The call.
    shape : Shape, optional
        Another definition than the operator's own.

    Raises
    ------
    InvalidProblem, UnsupportedProblem
        The call does not fit its operator.
    """
    if problem.typed and (plain := dequantised(problem)) is not problem:
        return lower(plain, shape)
    variant = variant_of(problem.variant)
    settings, shape = variant.settings(problem), shape or variant.shape
    if isinstance(shape, Lowered):
        p = problem.to("numpy")
        core = shape.lower(p, SimpleNamespace(**settings))
        kept = ("query", "key", "value")
        if not isinstance(core, Problem) or any(getattr(core, n) is not getattr(p, n) for n in kept):
            raise InvalidProblem("lower: must return a Problem with the call's own query, key and value")
        if core.variant == problem.variant:
            raise InvalidProblem(f"lower: must return another operator's call, got {core.variant} again")
        return lower(core)
    return _selected(problem, shape) if isinstance(shape, Selected) else Lowering(problem)


def _selected(problem: Problem, shape: Selected) -> Lowering:
    p = problem.to("numpy")
    full = (*p.out_shape[:3], p.n_k)
    seen, margins = np.zeros(full, bool), np.full(full[:3], np.inf)
    for ones in choosers(p, shape):
        c = candidates(ones[0], shape)
        taken, margin = _chosen(ones, shape, c)
        for one in ones:
            margins[one.batch, one.head, one.rows] = margin
            seen[one.batch, one.head, one.rows, one.keys] = keys_of(one, c, taken)
    return Lowering(p.replace(variant=VARIANT, options={}, allowed=seen), margins)


def choosers(problem: Problem, shape: Selected) -> Iterator[tuple[Head, ...]]:
    """Yield the heads of a call, those together that add up their scores."""
    together = shape.together(SimpleNamespace(**variant_of(problem.variant).settings(problem)))
    if not together:
        yield from ((one,) for one in heads(problem))
        return

    def by_key_head(x: Head) -> tuple[int, int, int]:
        return x.batch, x.head_kv, x.rows.start

    for _, ones in groupby(sorted(heads(problem), key=by_key_head), by_key_head):
        yield tuple(ones)


def candidates(one: Head, shape: Selected) -> Choices:
    """Return what the rows of one head choose among, checked.

    Raises
    ------
    InvalidProblem
        The operator's choices do not fit the call.
    """
    n_q, n_k = len(one.q), len(one.k)
    own = variant_of(one.problem.variant).settings(one.problem)
    c = shape.choices(n_q, n_k, SimpleNamespace(**own))
    m = len(c.members)
    if c.members.shape != (m, n_k) or any(x is not None and x.shape != (n_q, m) for x in (c.may, c.must, c.seen)):
        raise InvalidProblem(
            f"choices: got members {c.members.shape}, may {c.may.shape} and must {c.must.shape}, expected "
            f"({m}, {n_k}), ({n_q}, {m}) twice"
        )
    if c.count < 0 or (c.may & c.must).any() or not c.members.any(1).all():
        raise InvalidProblem("choices: count is below 0, a candidate is both chosen from and taken, or one has no key")
    in_sight = one.allowed @ c.members.T  # a candidate all of whose keys are hidden is none
    seen = c.seen if c.seen is None else c.seen & in_sight
    return replace(c, may=c.may & in_sight, must=c.must & in_sight, seen=seen)


def keys_of(one: Head, c: Choices, taken: Mask, rows: Any = slice(None)) -> Mask:
    """Return which keys rows see by what they take and the call's own ``allowed``, (n_q, n_k)."""
    p = one.problem
    own = True if p.allowed is None else block(p.allowed, one.batch, one.head, one.rows, one.keys)[rows]
    return np.asarray((taken @ c.members) & own)


def scores_of(ones: tuple[Head, ...], shape: Selected, c: Choices, f: Any, given: Any = None) -> Any:
    """Return the scores of all candidates over an arithmetic, (n_q, m): the sum of those of heads that choose together.

    Parameters
    ----------
    ones : tuple of Head
        Out of :func:`choosers`.
    shape, c
        The operator's shape, and what there is to choose from.
    f : arithmetic
        What to count in.
    given : list of (q, k), optional
        The heads' operands in that arithmetic, where they are more than numbers.
    """
    given = given or [(matrix_of(f, x.q), matrix_of(f, x.k)) for x in ones]
    with np.errstate(all="ignore"):
        return reduce(operator.add, (_scores(x, shape, c, f, *qk) for x, qk in zip(ones, given, strict=True)))


def _scores(one: Head, shape: Selected, c: Choices, f: Any, q: Any, k: Any) -> Any:
    o = one.options(f)
    o.members = matrix_of(f, c.members.astype(np.float64))
    o.sizes = matrix_of(f, c.members.sum(1, keepdims=True).astype(np.float64))
    o.seen = c.may | c.must if c.seen is None else c.seen
    o.unseen = matrix_of(f, np.where(o.seen.any(1, keepdims=True), 0.0, 1.0))
    return shape.scores(q, k, o)


def _chosen(ones: tuple[Head, ...], shape: Selected, c: Choices) -> tuple[Mask, Float]:
    """Return what each row takes, (n_q, m), and its margin."""
    s = scores_of(ones, shape, c, Level(1))
    mid, radius = np.where(c.may, s.h, -np.inf), np.broadcast_to(np.abs(s.l) + s.r, s.h.shape)
    taken, margins = c.must.copy(), np.full(len(mid), np.inf)
    order = np.argsort(-mid, axis=1, kind="stable")
    free = c.may.sum(1) > c.count
    taken |= c.may & ~free[:, None]
    if c.count == 0 or not free.any():
        return taken if c.count else c.must.copy(), margins
    rows = np.nonzero(free)[0]
    for i in rows.tolist():
        inside, outside = order[i, : c.count], order[i, c.count : c.may[i].sum()]
        low, high = (mid[i] - radius[i])[inside].min(), (mid[i] + radius[i])[outside].max()
        if not low > high:
            inside, margins[i] = _decided(ones, shape, c, i)
        else:
            margins[i] = mid[i, inside].min() - mid[i, outside].max()
        taken[i, inside] = True
    return taken, margins


def _decided(ones: tuple[Head, ...], shape: Selected, c: Choices, row: int) -> tuple[NDArray[np.intp], float]:
    """Choose for one row whose scores lie close: by more bits, and by the prime field where they are equal."""
    at = np.nonzero(c.may[row])[0]
    image = scores_of(ones, shape, c, Field(ones[0].q.shape[1])).image[row]
    for bits in LADDER:
        balls = Balls(bits)
        with balls.working():
            s = scores_of(ones, shape, c, balls).a[row]
            order = sorted(at, key=lambda j: (-float(s[j].mid()), j))
            order = _sorted_exactly(order, s)
            last, first = order[c.count - 1], order[c.count]
            tied = [j for j in at if image[j] == image[last]]
            apart = all(not s[j].overlaps(s[last]) for j in at if j not in tied)
            if apart:
                above = [j for j in at if j not in tied and s[j] > s[last]]
                inside = above + sorted(tied)[: c.count - len(above)]
                margin = 0.0 if image[first] == image[last] else float((s[last] - s[first]).mid())
                return np.array(inside), margin
    raise InvalidProblem(f"scores: two candidates of row {row} differ by less than {LADDER[-1]} bits can tell")


def _sorted_exactly(order: list[Any], s: Any) -> list[Any]:
    """Sort by the midpoints themselves, which float64 may round together; equal ones by index."""
    from functools import cmp_to_key

    def compare(i: Any, j: Any) -> int:
        gap = s[i].mid() - s[j].mid()
        return -1 if gap > 0 else 1 if gap < 0 else int(i) - int(j)

    return sorted(order, key=cmp_to_key(compare))
