"""What scores choose: candidates in sight, their scores, the choice by enclosures, balls and the prime field."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from functools import cmp_to_key, reduce
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidProblem
from ..masks import band, block
from ..problem import Problem
from ..rules import Rule, View
from ..variants import Choices, Selected, variant_of
from .arithmetics import Balls
from .field import Field
from .heads import Head, heads, matrix_of
from .levels import Bounded, Level
from .runs import Runs

__all__ = ["Sight", "candidates", "choose", "choosers", "keys_of", "scores_of"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
SCORES = 2**18
"""Scores that are made at a time in long calls."""
ROWS = 128
"""The fewest rows that are scored at a time."""
PARTS = 16
"""Lengths at which candidates that no row looks at are left out."""
LADDER = (256, 1024, 4096)  # bits at which scores that enclosures cannot tell apart are looked at again


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


class Sight:
    """What the rows of a head choose among and see some key of, made for some rows at a time.

    Parameters
    ----------
    one : Head
        The head, or the first of those that choose together.
    shape : Selected
        The operator's shape.

    Raises
    ------
    InvalidProblem
        The operator's choices do not fit the call.
    """

    def __init__(self, one: Head, shape: Selected) -> None:
        n_q, n_k = len(one.q), len(one.k)
        own = variant_of(one.problem.variant).settings(one.problem)
        self.one, self.c = one, (c := shape.choices(n_q, n_k, SimpleNamespace(**own)))
        labels = c.members.ndim == 1
        self.m = m = int(c.members.max(initial=-1)) + 1 if labels else len(c.members)
        if (
            c.members.shape != ((n_k,) if labels else (m, n_k))
            or any(isinstance(x, np.ndarray) and x.shape != (n_q, m) for x in (c.may, c.must, c.seen))
        ):  # fmt: skip
            shapes = [getattr(x, "shape", None) for x in (c.members, c.may, c.must)]
            raise InvalidProblem(
                f"choices: got members {shapes[0]}, may {shapes[1]} and must {shapes[2]}, expected ({m}, {n_k}), "
                f"({n_q}, {m}) twice"
            )
        self.runs = Runs.of(c.members, m)
        both = isinstance(c.may, np.ndarray) and c.must is not None and (c.may & c.must).any()
        apart = self.runs is None and (labels or not c.members.any(1).all())
        if c.count < 0 or both or apart:
            raise InvalidProblem(
                "choices: count is below 0, a candidate is both chosen from and taken, or one has no key, or keys apart"
            )
        diagonal = band(one.problem, one.batch, one.rows, one.keys)
        self._band = None if self.runs is None else diagonal
        self._sight = None if self._band is not None else _in_sight(one.allowed, self)

    def some(self, rows: NDArray[np.intp]) -> tuple[Mask, Mask, Mask]:
        """Return which candidates some rows may and must take, and which their scores look at, (rows, m) each."""
        c, shape = self.c, (len(rows), self.m)
        sight = self._sight[rows] if self._sight is not None else self._by_band(rows)
        if isinstance(c.may, Rule):
            may = c.may.block(rows, np.arange(self.m), len(self.one.q), max(self.m, 1))
        else:
            may = c.may[rows]
        may, must = may & sight, np.zeros(shape, bool) if c.must is None else c.must[rows] & sight
        return may, must, may | must if c.seen is None else c.seen[rows] & sight

    def _by_band(self, rows: NDArray[np.intp]) -> Mask:
        assert self._band is not None
        assert self.runs is not None
        first, end = (x[rows, None] for x in self._band)
        return np.asarray((self.runs.starts < end) & (self.runs.ends > first) & (first < end))


def _in_sight(allowed: Any, sight: Sight) -> Mask:
    """Tell which candidates have a key that a row sees, (n_q, m)."""
    if sight.runs is None:
        members = sight.c.members
        return np.concatenate([np.zeros((0, sight.m), bool), *(allowed[x] @ members.T for x in _chunks(allowed))])
    if isinstance(allowed, View) and not allowed.lists:
        return sight.runs.pick(allowed.touches(sight.runs.edges(allowed.shape[1])))
    return np.concatenate([np.zeros((0, sight.m), bool), *(sight.runs.any(allowed[x]) for x in _chunks(allowed))])


def _chunks(allowed: Any) -> Iterator[slice]:
    return allowed.chunks() if isinstance(allowed, View) else iter([slice(None)])


def candidates(one: Head, shape: Selected) -> Choices:
    """Return what the rows of one head choose among, checked and written out.

    Raises
    ------
    InvalidProblem
        The operator's choices do not fit the call.
    """
    sight = Sight(one, shape)
    may, must, seen = sight.some(np.arange(len(one.q)))
    members = sight.c.members
    if members.ndim == 1:
        members = members == np.arange(sight.m)[:, None]
    return replace(sight.c, members=members, may=may, must=must, seen=None if sight.c.seen is None else seen)


def keys_of(one: Head, c: Choices, taken: Mask, rows: Any = slice(None)) -> Mask:
    """Return which keys rows see by what they take and the call's own ``allowed``, (n_q, n_k)."""
    p, n_q, n_k = one.problem, len(one.q), len(one.k)
    at = np.arange(n_q)[rows]
    seen = taken @ c.members if c.members.ndim == 2 else np.insert(taken, 0, False, -1)[..., c.members + 1]
    if c.kept is not None:
        kept = c.kept.block(np.atleast_1d(at), np.arange(n_k), n_q, n_k)
        seen = seen | (kept if np.ndim(at) else kept[0])
    if isinstance(p.allowed, Rule):
        return np.asarray(seen & View.of(p.allowed, p.n_q, p.n_k, one.batch, one.head)[one.rows.start + at])
    own = True if p.allowed is None else block(p.allowed, one.batch, one.head, one.rows, one.keys)[rows]
    return np.asarray(seen & own)


def scores_of(
    ones: tuple[Head, ...],
    shape: Selected,
    c: Choices,
    f: Any,
    given: Any = None,
    rows: Any = slice(None),
) -> Any:
    """Return the scores of all candidates over an arithmetic, (n_q, m): the sum of those of heads that choose together.

    Parameters
    ----------
    ones : tuple of Head
        Out of :func:`choosers`.
    shape, c
        The operator's shape, and what there is to choose from, written out.
    f : arithmetic
        What to count in.
    given : list of (q, k), optional
        The heads' operands in that arithmetic, where they are more than numbers.
    rows : index
        Whose scores.
    """
    given = given or [(matrix_of(f, x.q[rows]), matrix_of(f, x.k)) for x in ones]
    members = np.asarray(c.members, np.float64)
    seen = (c.may | c.must if c.seen is None else c.seen)[rows]
    return _scores(ones, shape, f, given, rows, matrix_of(f, members), members.sum(1), seen)


def _scores(
    ones: tuple[Head, ...], shape: Selected, f: Any, given: Any, rows: Any, members: Any, sizes: Any, seen: Mask
) -> Any:
    found = []
    with np.errstate(all="ignore"):
        for one, (q, k) in zip(ones, given, strict=True):
            o = one.options(f, rows)
            o.members, o.sizes, o.seen = members, matrix_of(f, np.asarray(sizes, np.float64)[:, None]), seen
            o.unseen = matrix_of(f, np.where(seen.any(1, keepdims=True), 0.0, 1.0))
            found.append(shape.scores(q, k, o))
        return reduce(operator.add, found)


def choose(ones: tuple[Head, ...], shape: Selected, sight: Sight, put: Any) -> Float:
    """Choose for every row, and return the margins.

    Parameters
    ----------
    ones : tuple of Head
        Out of :func:`choosers`.
    shape : Selected
        The operator's shape.
    sight : Sight
        What there is to choose from.
    put : callable
        ``put(rows, taken)`` takes which candidates some rows take, (rows, m) bool.
    """
    n_q, long, count = len(ones[0].q), isinstance(ones[0].allowed, View), sight.c.count
    step = max(ROWS, SCORES // max(sight.m, 1)) if long else max(n_q, 1)
    levels = [_Scorer(ones, shape, sight, Level(n)) for n in ((0, 1) if long else (1,))]
    margins = np.full(n_q, np.inf)
    for i in range(0, n_q, step):
        rows = np.arange(i, min(i + step, n_q))
        may, must, seen = sight.some(rows)
        free = may.sum(1) > count
        taken = must | (may & ~free[:, None]) if count else must
        close = np.nonzero(free)[0] if count else np.zeros(0, np.intp)
        for scorer in levels if close.size else ():
            s, m = scorer.scores(rows[close], may[close], seen[close])
            apart, first, margin = _ranked(s, may[close, :m], count)
            taken[close[apart], :m] |= first[apart]
            margins[rows[close[apart]]] = margin[apart]
            close, s = close[~apart], _some(s, ~apart)
            if not close.size:
                break
        if close.size:
            choices = _decided(levels[-1], rows[close], may[close], seen[close], s)
            for j, (inside, gap) in zip(close.tolist(), choices, strict=True):
                taken[j, inside], margins[rows[j]] = True, gap
        put(rows, taken)
    return margins


class _Scorer:
    """Scores over one arithmetic: of the candidates up to the last that some rows look at."""

    def __init__(self, ones: tuple[Head, ...], shape: Selected, sight: Sight, f: Any) -> None:
        self.ones, self.shape, self.sight, self.f = ones, shape, sight, f
        self._keys: list[Any] = []
        members = np.asarray(sight.c.members)
        self.sizes = sight.runs.sizes if sight.runs is not None else members.sum(1)

    def scores(self, rows: NDArray[np.intp], may: Mask, seen: Mask) -> tuple[Any, int]:
        """Return the scores (rows, m) of the first m candidates, and m: later ones are not looked at."""
        f, runs = self.f, self.sight.runs
        self._keys = self._keys or [matrix_of(f, x.k) for x in self.ones]
        last = int(np.nonzero((may | seen).any(0))[0].max(initial=0)) + 1
        part = -(-self.sight.m // PARTS)  # sums of the first candidates are kept from rows to rows
        m = min(-(-last // part) * part, self.sight.m)
        members = runs.over(f, m) if runs is not None else matrix_of(f, np.asarray(self.sight.c.members[:m], float))
        given = [(matrix_of(f, x.q[rows]), k) for x, k in zip(self.ones, self._keys, strict=True)]
        return _scores(self.ones, self.shape, f, given, rows, members, self.sizes[:m], seen[:, :m]), m

    def of(self, row: int, at: NDArray[np.intp], f: Any) -> Any:
        """Return the scores of some candidates of a row over another arithmetic, from their keys alone, (1, at)."""
        runs = self.sight.runs
        assert runs is not None
        keys = np.concatenate([np.arange(a, b) for a, b in zip(runs.starts[at], runs.ends[at], strict=True)])
        whose = np.repeat(np.arange(len(at)), self.sizes[at])
        members = matrix_of(f, np.asarray(whose == np.arange(len(at))[:, None], np.float64))
        given = [(matrix_of(f, x.q[row : row + 1]), matrix_of(f, x.k[keys])) for x in self.ones]
        seen = np.ones((1, len(at)), bool)
        return _scores(self.ones, self.shape, f, given, slice(row, row + 1), members, self.sizes[at], seen)


def _ranked(s: Bounded, may: Mask, count: int) -> tuple[Mask, Mask, Float]:
    """Return which rows' first scores are proven to be the first, which these are, and the margins."""
    mid, radius = np.where(may, s.h, -np.inf), np.abs(s.l) + s.r if s.l.any() else s.r
    first, m = np.zeros(may.shape, bool), may.shape[1]
    order = np.argpartition(mid, (m - count - 1, m - count), axis=1)[:, m - count - 1 :]
    np.put_along_axis(first, order[:, 1:], True, 1)
    with np.errstate(invalid="ignore"):
        if radius.shape[1] == 1:
            ends = np.take_along_axis(mid, order[:, :2], 1)
            margin, low, high = ends[:, 1] - ends[:, 0], ends[:, 1] - radius[:, 0], ends[:, 0] + radius[:, 0]
        else:
            outside = may & ~first
            low = np.where(first, mid - radius, np.inf).min(1)
            high = np.where(outside, mid + radius, -np.inf).max(1)
            margin = np.where(first, mid, np.inf).min(1) - np.where(outside, mid, -np.inf).max(1)
    return low > high, first, margin


def _some(s: Bounded, rows: Any) -> Bounded:
    return Bounded(s.f, *(np.broadcast_to(x, s.h.shape)[rows] for x in (s.h, s.l, s.r)))


def _rivals(s: Any, may: Mask, count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return of a row which candidates are surely chosen, and whose scores must be looked at again.

    The scores of the others are proven to be below all of these, and those of the first above.
    """
    low, high = (np.where(may, s[0] + sign * (np.abs(s[1]) + s[2]), -np.inf) for sign in (-1, 1))
    open_ = may & (high >= np.sort(low)[-count]) & (low <= np.sort(high)[-count - 1])
    while True:
        least, most = low[open_].min(), high[open_].max()
        wider = may & (low <= most) & (high >= least)
        if (wider == open_).all():
            return np.nonzero(may & (low > most))[0], np.nonzero(open_)[0]
        open_ = wider


def _decided(
    level: _Scorer, rows: NDArray[np.intp], may: Mask, seen: Mask, s: Any
) -> list[tuple[NDArray[np.intp], float]]:
    """Choose for rows whose scores lie close: by more bits, and by the prime field where they are equal."""
    ones, sight, alone = level.ones, level.sight, level.shape.alone and level.sight.runs is not None
    field, count = Field(ones[0].q.shape[1]), sight.c.count
    found: dict[int, tuple[NDArray[np.intp], float]] = {}
    if alone:
        parts = [_rivals([x[n] for x in (s.h, s.l, s.r)], may[n, : s.shape[1]], count) for n in range(len(rows))]
        images = [level.of(int(row), at, field).image[0] for row, (_, at) in zip(rows, parts, strict=True)]
    else:
        images = list(_Scorer(ones, level.shape, sight, field).scores(rows, may, seen)[0].image)
    for bits in LADDER:
        balls = Balls(bits)
        with balls.working():
            left = np.array([n for n in range(len(rows)) if n not in found])
            if alone:
                scores = [level.of(int(rows[n]), parts[n][1], balls).a[0] for n in left]
            else:
                scores = _Scorer(ones, level.shape, sight, balls).scores(rows[left], may[left], seen[left])[0].a
            for n, x in zip(left.tolist(), scores, strict=True):
                sure, at = parts[n] if alone else (np.zeros(0, np.intp), np.nonzero(may[n])[0])
                places = np.arange(len(at)) if alone else at
                choice = _by_balls(places, x, images[n], count - len(sure))
                if choice is not None:
                    inside = at[choice[0]] if alone else choice[0]
                    found[n] = np.concatenate([sure, inside]), choice[1]
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

    def compare(i: Any, j: Any) -> int:
        gap = s[i].mid() - s[j].mid()
        return -1 if gap > 0 else 1 if gap < 0 else int(i) - int(j)

    return sorted(order, key=cmp_to_key(compare))
