"""What scores choose: candidates in sight, their scores, the choice by enclosures, balls and the prime field."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidProblem
from ..masks import band, block
from ..problem import Problem
from ..rules import EMPTY, FULL, Rule, View
from ..rules.spans import UNSURE
from ..variants import Choices, Selected, variant_of
from ..variants.shapes import hidden_by_head, parted
from .blas import one_thread
from .firsts import by_tiles
from .heads import Head, heads, matrix_of
from .levels import Level
from .ranking import Scorer, decided, ranked, scored, some
from .runs import Runs

__all__ = ["Sight", "candidates", "choose", "choosers", "keys_of", "scores_of"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
SCORES = 2**18
"""Scores that are made at a time in long calls."""
ROWS = 128
"""The fewest rows that are scored at a time."""
MANY = 2048
"""Of so many candidates the first are found in tiles, where a row chooses fewer than one of eight."""


def choosers(problem: Problem, shape: Selected) -> Iterator[tuple[Head, ...]]:
    """Yield the heads of a call, those together that add up their scores.

    Raises
    ------
    InvalidProblem
        Heads that choose together do not see the same keys.
    """
    together = shape.together(SimpleNamespace(**variant_of(problem.variant).settings(problem)))
    if not together:
        yield from ((one,) for one in heads(problem, by_rules=True))
        return

    def by_key_head(x: Head) -> tuple[int, int, int]:
        return x.batch, x.head_kv, x.rows.start

    apart = bool(hidden_by_head(problem))
    for _, ones in groupby(sorted(heads(problem, by_rules=True), key=by_key_head), by_key_head):
        first, *others = group = tuple(ones)
        for x in others if apart else ():
            if any((x.allowed[rows] != first.allowed[rows]).any() for rows in _chunks(first.allowed)):
                raise InvalidProblem(parted(problem, first.head, x.head))
        yield group


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
        c, every = self.c, slice(0, self.m)
        may, must = self.may(rows, every), self.must(rows)
        return may, must, may | must if c.seen is None else c.seen[rows] & self._seeing(rows, every)

    def may(self, rows: NDArray[np.intp], part: slice) -> Mask:
        """Return which of some candidates some rows may take, (rows, part)."""
        if isinstance(self.c.may, Rule):
            may = self.c.may.block(rows, np.arange(part.start, part.stop), len(self.one.q), max(self.m, 1))
        else:
            may = self.c.may[rows, part]
        return np.asarray(may & self._seeing(rows, part))

    def must(self, rows: NDArray[np.intp]) -> Mask:
        """Return which candidates some rows must take, (rows, m)."""
        if self.c.must is None:
            return np.zeros((len(rows), self.m), bool)
        return np.asarray(self.c.must[rows] & self._seeing(rows, slice(0, self.m)))

    def codes(self, rows: NDArray[np.intp], cuts: NDArray[np.int64]) -> NDArray[np.int8]:
        """Tell of the candidates between cuts whether rows that are neighbours may take none (EMPTY), or all (FULL)."""
        found, last = np.full(len(cuts) - 1, UNSURE, np.int8), np.array([rows[0], rows[-1] + 1])
        if isinstance(self.c.may, Rule):
            found = View.of(self.c.may, len(self.one.q), self.m).states(last, cuts, settle=False)[0]
        if self._band is None or self.runs is None:
            return np.where(found == FULL, UNSURE, found)
        first, end = (x[rows] for x in self._band)
        starts, ends = self.runs.starts, self.runs.ends
        inside = (starts[cuts[1:] - 1] < end.min()) & (ends[cuts[:-1]] > first.max()) & (first < end).all()
        outside = (starts[cuts[:-1]] >= end.max()) | (ends[cuts[1:] - 1] <= first.min())
        return np.where(outside, EMPTY, np.where(inside | (found == EMPTY), found, UNSURE))

    def _seeing(self, rows: NDArray[np.intp], part: slice) -> Mask:
        """Return which of some candidates have a key that some rows see, (rows, part)."""
        if self._sight is not None:
            return self._sight[rows, part]
        assert self._band is not None
        assert self.runs is not None
        first, end = (x[rows, None] for x in self._band)
        return np.asarray((self.runs.starts[part] < end) & (self.runs.ends[part] > first) & (first < end))


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
    return scored(ones, shape, f, given, rows, matrix_of(f, members), members.sum(1), seen)


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
    if long and shape.alone and sight.runs is not None and sight.runs.apart and 0 < 8 * count < sight.m >= MANY:
        return by_tiles(ones, shape, sight, put)
    step = max(ROWS, SCORES // max(sight.m, 1)) if long else max(n_q, 1)
    levels = [Scorer(ones, shape, sight, Level(n)) for n in ((0, 1) if long else (1,))]
    margins = np.full(n_q, np.inf)

    def some_rows(start: int) -> None:
        rows = np.arange(start, min(start + step, n_q))
        taken, margins[rows] = _choice(levels, rows)
        put(rows, taken)

    if n_q <= step:
        some_rows(0)
        return margins
    with one_thread(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(some_rows, range(0, n_q, step)))
    return margins


def _choice(levels: list[Scorer], rows: NDArray[np.intp]) -> tuple[Mask, Float]:
    """Return which candidates some rows take, and their margins."""
    sight, count = levels[0].sight, levels[0].sight.c.count
    may, must, seen = sight.some(rows)
    free, margins = may.sum(1) > count, np.full(len(rows), np.inf)
    taken = must | (may & ~free[:, None]) if count else must
    close = np.nonzero(free)[0] if count else np.zeros(0, np.intp)
    for scorer in levels if close.size else ():
        s, m = scorer.scores(rows[close], may[close], seen[close])
        apart, first, margin = ranked(s, may[close, :m], count)
        taken[close[apart], :m] |= first[apart]
        margins[close[apart]] = margin[apart]
        close, s = close[~apart], some(s, ~apart)
        if not close.size:
            return taken, margins
    if close.size:
        choices = decided(levels[-1], rows[close], may[close], seen[close], s)
        for j, (inside, gap) in zip(close.tolist(), choices, strict=True):
            taken[j, inside], margins[j] = True, gap
    return taken, margins
