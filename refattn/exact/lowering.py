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
from ..masks import WRITTEN, block, both
from ..problem import VARIANT, Problem
from ..rules import Rule, View
from ..rules.atoms import labelled
from ..scales import dequantised
from ..variants import Choices, Lowered, Selected, Shape, variant_of
from .arithmetics import Balls
from .field import Field
from .heads import Head, heads, matrix_of
from .levels import Bounded, Level

__all__ = ["Lowering", "candidates", "choosers", "keys_of", "lower", "scores_of"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
SCORES = 2**18
"""Scores that are made at a time in long calls."""
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
    if (plain := dequantised(problem)) is not problem:
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
        small = isinstance(core.allowed, Rule) and core.n_q * core.n_k <= WRITTEN
        return lower(core.written_out() if small else core)
    return _selected(problem, shape) if isinstance(shape, Selected) else Lowering(problem)


def _selected(problem: Problem, shape: Selected) -> Lowering:
    p = problem.to("numpy")
    full = (*p.out_shape[:3], p.n_k)
    margins, found = np.full(full[:3], np.inf), []
    for ones in choosers(p, shape):
        c = candidates(ones[0], shape)
        taken, margin = _chosen(ones, shape, c)
        for one in ones:
            margins[one.batch, one.head, one.rows] = margin
            found.append((one, c, taken))
    core = p.replace(variant=VARIANT, options={})
    long = found and p.n_q * p.n_k > WRITTEN and p.cu_seqlens_q is None
    labels = labels_of(found[0][1].members) if long else None
    if labels is not None:
        return Lowering(core.replace(allowed=both(p.allowed, _rule(p, found, labels))), margins)
    seen = np.zeros(full, bool)
    for one, c, taken in found:
        seen[one.batch, one.head, one.rows, one.keys] = keys_of(one, c, taken)
    return Lowering(core.replace(allowed=seen), margins)


def _rule(p: Problem, found: list[tuple[Head, Choices, Mask]], labels: NDArray[np.int64]) -> Rule:
    """Return what rows take as a rule: each candidate has keys of its own."""
    c = found[0][1]
    taken = np.zeros((*p.out_shape[:3], len(c.members) + 1), bool)  # the last is of keys that no candidate has
    for one, _, mine in found:
        taken[one.batch, one.head, :, :-1] = mine
    return labelled(taken, None, labels)


def labels_of(members: Mask) -> NDArray[np.int64] | None:
    """Return whose each key is, their number for those of none; None where a key belongs to several."""
    if (members.sum(0, dtype=np.int64) > 1).any():
        return None
    return np.where(members.any(0), members.argmax(0), len(members))


def choosers(problem: Problem, shape: Selected) -> Iterator[tuple[Head, ...]]:
    """Yield the heads of a call, those together that add up their scores."""
    together = shape.together(SimpleNamespace(**variant_of(problem.variant).settings(problem)))
    if not together:
        yield from ((one,) for one in heads(problem, by_rules=True))
        return

    def by_key_head(x: Head) -> tuple[int, int, int]:
        return x.batch, x.head_kv, x.rows.start

    for _, ones in groupby(sorted(heads(problem, by_rules=True), key=by_key_head), by_key_head):
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
    in_sight = _in_sight(one.allowed, c.members)  # a candidate all of whose keys are hidden is none
    seen = c.seen if c.seen is None else c.seen & in_sight
    return replace(c, may=c.may & in_sight, must=c.must & in_sight, seen=seen)


def _in_sight(allowed: Any, members: Mask) -> Mask:
    """Tell which candidates have a key that a row sees, (n_q, m)."""
    if not isinstance(allowed, View):
        return np.asarray(allowed @ members.T)
    labels = labels_of(members)
    if labels is None:
        return np.concatenate([allowed[rows] @ members.T for rows in allowed.chunks()])
    starts = np.append(0, np.nonzero(np.diff(labels))[0] + 1)
    found, touched = np.zeros((len(allowed), len(members) + 1), bool), allowed.touches(np.append(starts, len(labels)))
    for i, label in enumerate(labels[starts].tolist()):
        found[:, label] |= touched[:, i]
    return found[:, :-1]


def keys_of(one: Head, c: Choices, taken: Mask, rows: Any = slice(None)) -> Mask:
    """Return which keys rows see by what they take and the call's own ``allowed``, (n_q, n_k)."""
    p = one.problem
    seen = taken @ c.members
    if isinstance(p.allowed, Rule):
        places = one.rows.start + np.arange(len(one.q))[rows]
        return np.asarray(seen & View.of(p.allowed, p.n_q, p.n_k, one.batch, one.head)[places])
    own = True if p.allowed is None else block(p.allowed, one.batch, one.head, one.rows, one.keys)[rows]
    return np.asarray(seen & own)


def scores_of(
    ones: tuple[Head, ...],
    shape: Selected,
    c: Choices,
    f: Any,
    given: Any = None,
    rows: Any = slice(None),
    members: Any = None,
) -> Any:
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
    rows : index
        Whose scores.
    members : matrix, optional
        The candidates' keys, where more than their numbers of 0 and 1 is known of them.
    """
    given = given or [(matrix_of(f, x.q[rows]), matrix_of(f, x.k)) for x in ones]
    with np.errstate(all="ignore"):
        return reduce(
            operator.add, (_scores(x, shape, c, f, rows, members, *qk) for x, qk in zip(ones, given, strict=True))
        )


def _scores(one: Head, shape: Selected, c: Choices, f: Any, rows: Any, members: Any, q: Any, k: Any) -> Any:
    o = one.options(f, rows)
    o.members = members or matrix_of(f, c.members.astype(np.float64))
    o.sizes = matrix_of(f, c.members.sum(1, keepdims=True).astype(np.float64))
    o.seen = (c.may | c.must if c.seen is None else c.seen)[rows]
    o.unseen = matrix_of(f, np.where(o.seen.any(1, keepdims=True), 0.0, 1.0))
    return shape.scores(q, k, o)


def _chosen(ones: tuple[Head, ...], shape: Selected, c: Choices) -> tuple[Mask, Float]:
    """Return what each row takes, (n_q, m), and its margin."""
    n_q, m = c.may.shape
    margins, free = np.full(n_q, np.inf), c.may.sum(1) > c.count
    if c.count == 0:
        return c.must.copy(), margins
    taken = c.must | (c.may & ~free[:, None])
    if not free.any():
        return taken, margins
    long, close = isinstance(ones[0].allowed, View), np.nonzero(free)[0]
    for f in (Level(0), Level(1)) if long else (Level(1),):
        members, step = (_Runs.of(f, c.members), max(1, SCORES // m)) if long else (None, n_q)
        keys, left = [matrix_of(f, x.k) for x in ones], []
        for i in range(0, len(close), step):
            rows = close[i : i + step]
            part = rows if long else slice(None)
            given = [(matrix_of(f, x.q[part]), k) for x, k in zip(ones, keys, strict=True)]
            s = scores_of(ones, shape, c, f, given, part, members)
            s = s if long else _some(s, rows)
            apart, first, margin = _ranked(s, c.may[rows], c.count)
            taken[rows[apart]] |= first[apart]
            margins[rows[apart]] = margin[apart]
            left += rows[~apart].tolist()
        close = np.array(left, np.intp)
    for i, (inside, gap) in zip(close.tolist(), _decided(ones, shape, c, close), strict=True):
        taken[i, inside], margins[i] = True, gap
    return taken, margins


def _some(s: Bounded, rows: NDArray[np.intp]) -> Bounded:
    return Bounded(s.f, *(np.broadcast_to(x, s.h.shape)[rows] for x in (s.h, s.l, s.r)))


def _ranked(s: Bounded, may: Mask, count: int) -> tuple[Mask, Mask, Float]:
    """Return which rows' first scores are proven to be the first, which these are, and the margins."""
    mid, radius = np.where(may, s.h, -np.inf), np.abs(s.l) + s.r
    first = np.zeros(may.shape, bool)
    np.put_along_axis(first, np.argpartition(-mid, count - 1, axis=1)[:, :count], True, 1)
    outside = may & ~first
    with np.errstate(invalid="ignore"):
        low = np.where(first, mid - radius, np.inf).min(1)
        high = np.where(outside, mid + radius, -np.inf).max(1)
        margin = np.where(first, mid, np.inf).min(1) - np.where(outside, mid, -np.inf).max(1)
    return low > high, first, margin


class _Runs:
    """Candidates whose keys are neighbours, for a level: sums of their keys without the zeros of all others."""

    def __init__(self, f: Level, ends: list[tuple[int, int]]) -> None:
        self._f, self._ends = f, ends
        self._kept: dict[int, tuple[Any, Any]] = {}  # by operand, which it keeps alive

    @classmethod
    def of(cls, f: Level, members: Mask) -> _Runs | None:
        """Return None where a candidate has keys apart."""
        first, last = members.argmax(1), members.shape[1] - members[:, ::-1].argmax(1)
        return (
            cls(f, [*zip(first.tolist(), last.tolist(), strict=True)])
            if (members.sum(1) == last - first).all()
            else None
        )

    def __matmul__(self, k: Bounded) -> Any:
        if id(k) not in self._kept:
            low, r = (np.broadcast_to(x, k.h.shape) for x in (k.l, k.r))
            rows = []
            for a, b in self._ends:
                x = self._f.array(np.ones((1, b - a))) @ Bounded(self._f, k.h[a:b], low[a:b], r[a:b])
                rows.append([np.broadcast_to(y, x.h.shape) for y in (x.h, x.l, x.r)])
            self._kept[id(k)] = k, Bounded(self._f, *map(np.concatenate, zip(*rows, strict=True)))
        return self._kept[id(k)][1]


def _decided(
    ones: tuple[Head, ...], shape: Selected, c: Choices, rows: NDArray[np.intp]
) -> list[tuple[NDArray[np.intp], float]]:
    """Choose for rows whose scores lie close: by more bits, and by the prime field where they are equal."""
    if not rows.size:
        return []
    found: dict[int, tuple[NDArray[np.intp], float]] = {}
    images = scores_of(ones, shape, c, Field(ones[0].q.shape[1]), rows=rows).image
    for bits in LADDER:
        balls = Balls(bits)
        with balls.working():
            left = np.array([n for n in range(len(rows)) if n not in found])
            scores = scores_of(ones, shape, c, balls, rows=rows[left]).a
            for n, s in zip(left.tolist(), scores, strict=True):
                choice = _by_balls(np.nonzero(c.may[rows[n]])[0], s, images[n], c.count)
                if choice is not None:
                    found[n] = choice
        if len(found) == len(rows):
            return [found[n] for n in range(len(rows))]
    row = next(int(rows[n]) for n in range(len(rows)) if n not in found)
    raise InvalidProblem(f"scores: two candidates of row {row} differ by less than {LADDER[-1]} bits can tell")


def _by_balls(at: NDArray[np.intp], s: Any, image: Any, count: int) -> tuple[NDArray[np.intp], float] | None:
    """Choose by balls and images of scores; None where the balls are too wide."""
    order = _sorted_exactly(sorted(at, key=lambda j: (-float(s[j].mid()), j)), s)
    last, first = order[count - 1], order[count]
    tied = [j for j in at if image[j] == image[last]]
    if any(s[j].overlaps(s[last]) for j in at if j not in tied):
        return None
    above = [j for j in at if j not in tied and s[j] > s[last]]
    inside = above + sorted(tied)[: count - len(above)]
    margin = 0.0 if image[first] == image[last] else float((s[last] - s[first]).mid())
    return np.array(inside), margin


def _sorted_exactly(order: list[Any], s: Any) -> list[Any]:
    """Sort by the midpoints themselves, which float64 may round together; equal ones by index."""
    from functools import cmp_to_key

    def compare(i: Any, j: Any) -> int:
        gap = s[i].mid() - s[j].mid()
        return -1 if gap > 0 else 1 if gap < 0 else int(i) - int(j)

    return sorted(order, key=cmp_to_key(compare))
