"""What scores decide: which are proven to be the first, by enclosures, by balls and by the prime field."""

from __future__ import annotations

import math
import operator
from functools import cached_property, cmp_to_key, reduce
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidProblem, UnsupportedProblem
from ..variants import Selected
from .arithmetics import Balls
from .field import Field
from .heads import Head, matrix_of
from .levels import Bounded, Level
from .runs import Runs
from .whole import Whole

if TYPE_CHECKING:
    from .choosing import Sight

__all__ = ["Scorer", "decided", "of_row", "ranked", "rivals", "scored", "some"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
PARTS = 16
"""Lengths at which candidates that no row looks at are left out."""
LARGEST = np.finfo(np.float64).max
EXACT = Level(3)
"""What often counts sums of products without any loss: then equal scores are equal numbers."""
LADDER = (256, 1024, 4096)  # bits at which scores that enclosures cannot tell apart are looked at again


def scored(
    ones: tuple[Head, ...], shape: Selected, f: Any, given: Any, rows: Any, members: Any, sizes: Any, seen: Mask
) -> Any:
    """Return the scores of candidates, members (m, n_k), over an arithmetic: the sum of those of several heads."""
    found = []
    with np.errstate(all="ignore"):
        for one, (q, k) in zip(ones, given, strict=True):
            o = one.options(f, rows)
            o.members, o.sizes, o.seen = members, matrix_of(f, np.asarray(sizes, np.float64)[:, None]), seen
            o.unseen = matrix_of(f, np.where(seen.any(1, keepdims=True), 0.0, 1.0))
            found.append(shape.scores(q, k, o))
        return reduce(operator.add, found)


class Scorer:
    """Scores over one arithmetic: of the candidates up to the last that some rows look at."""

    def __init__(self, ones: tuple[Head, ...], shape: Selected, sight: Sight, f: Any) -> None:
        self.ones, self.shape, self.sight, self.f = ones, shape, sight, f
        self._keys: list[Any] = []
        self._making = Lock()
        members = np.asarray(sight.c.members)
        self.sizes = sight.runs.sizes if sight.runs is not None else members.sum(1)

    @cached_property
    def kinds(self) -> NDArray[np.intp] | None:
        """Equal numbers for candidates of the same keys, whose scores are equal; None where keys are not neighbours."""
        if self.sight.runs is None or not self.shape.alone:
            return None
        keys = np.concatenate([x.k for x in self.ones], 1) + 0.0  # of -0, too, one 0
        known: dict[bytes, int] = {}
        ends = zip(self.sight.runs.starts.tolist(), self.sight.runs.ends.tolist(), strict=True)
        return np.array([known.setdefault(keys[a:b].tobytes(), len(known)) for a, b in ends], np.intp)

    def scores(self, rows: NDArray[np.intp], may: Mask, seen: Mask) -> tuple[Any, int]:
        """Return the scores (rows, m) of the first m candidates, and m: later ones are not looked at."""
        f, runs = self.f, self.sight.runs
        with self._making:  # sums of keys are kept by the keys: made by each thread, they would be summed by each
            self._keys = self._keys or [matrix_of(f, x.k) for x in self.ones]
        last = int(np.nonzero((may | seen).any(0))[0].max(initial=0)) + 1
        part = -(-self.sight.m // PARTS)  # sums of the first candidates are kept from rows to rows
        m = min(-(-last // part) * part, self.sight.m)
        members = runs.over(f, m) if runs is not None else matrix_of(f, np.asarray(self.sight.c.members[:m], float))
        given = [(matrix_of(f, x.q[rows]), k) for x, k in zip(self.ones, self._keys, strict=True)]
        return scored(self.ones, self.shape, f, given, rows, members, self.sizes[:m], seen[:, :m]), m

    def of(self, row: int, at: NDArray[np.intp], f: Any) -> Any:
        """Return the scores of some candidates of a row over another arithmetic, from their keys alone, (1, at)."""
        runs = self.sight.runs
        assert runs is not None
        keys = np.concatenate([np.arange(a, b) for a, b in zip(runs.starts[at], runs.ends[at], strict=True)])
        ends = np.cumsum(self.sizes[at])
        members = Runs(ends - self.sizes[at], ends).over(f, len(at))
        given = [(matrix_of(f, x.q[row : row + 1]), matrix_of(f, x.k[keys])) for x in self.ones]
        seen = np.ones((1, len(at)), bool)
        return scored(self.ones, self.shape, f, given, slice(row, row + 1), members, self.sizes[at], seen)


def ranked(s: Bounded, may: Mask, count: int) -> tuple[Mask, Mask, Float]:
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
    apart = low > high
    tied = np.nonzero(~apart & ((radius == 0) | (~may & (radius.shape[1] > 1))).all(1) & np.isfinite(s.h).all(1))[0]
    if tied.size:  # exact numbers, h + l with l = 0
        order = np.argsort(-mid[tied], axis=1, kind="stable")
        first[tied] = False
        first[tied[:, None], order[:, :count]] = True
        ends = np.take_along_axis(mid[tied], order[:, count - 1 : count + 1], 1)
        margin[tied], apart[tied] = ends[:, 0] - ends[:, 1], True
    return apart, first, margin


def some(s: Bounded, rows: Any) -> Bounded:
    """Return some rows of scores."""
    return Bounded(s.f, *(np.broadcast_to(x, s.h.shape)[rows] for x in (s.h, s.l, s.r)))


def rivals(s: Any, count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return of a row which candidates are surely chosen, and whose scores must be looked at again.

    The scores of the others are proven to be below all of these, and those of the first above.
    """
    radius = np.abs(s[1]) + s[2]
    low, high = (np.where(np.isfinite(radius), s[0] + sign * radius, sign * np.inf) for sign in (-1, 1))
    open_ = (high >= np.sort(low)[-count]) & (low <= np.sort(high)[-count - 1])
    while True:
        least, most = low[open_].min(), high[open_].max()
        wider = (low <= most) & (high >= least)
        if (wider == open_).all():
            return np.nonzero(low > most)[0], np.nonzero(open_)[0]
        open_ = wider


def decided(
    level: Scorer, rows: NDArray[np.intp], may: Mask, seen: Mask, s: Any
) -> list[tuple[NDArray[np.intp], float]]:
    """Choose for rows whose scores lie close: by more bits, and by the prime field where they are equal."""
    ones, sight, count = level.ones, level.sight, level.sight.c.count
    if level.shape.alone and sight.runs is not None:
        at = [np.nonzero(x)[0] for x in may[:, : s.shape[1]]]
        return [of_row(level, int(row), at[n], [x[n, at[n]] for x in (s.h, s.l, s.r)]) for n, row in enumerate(rows)]
    field, found = Field(ones[0].q.shape[1]), dict[int, tuple[NDArray[np.intp], float]]()
    images = Scorer(ones, level.shape, sight, field).scores(rows, may, seen)[0].image
    for bits in LADDER:
        balls = Balls(bits)
        with balls.working():
            left = np.array([n for n in range(len(rows)) if n not in found])
            scores = Scorer(ones, level.shape, sight, balls).scores(rows[left], may[left], seen[left])[0].a
            for n, x in zip(left.tolist(), scores, strict=True):
                choice = _by_balls(np.nonzero(may[n])[0], x, images[n], count)
                if choice is not None:
                    found[n] = choice
        if len(found) == len(rows):
            return [found[n] for n in range(len(rows))]
    raise _too_close(next(int(rows[n]) for n in range(len(rows)) if n not in found))


def of_row(level: Scorer, row: int, at: NDArray[np.intp], s: Any) -> tuple[NDArray[np.intp], float]:
    """Choose for one row among candidates with such scores h, l, r: those that lie close are made again, alone.

    Of those with the same keys one is made.
    """
    sure, open_ = rivals(s, level.sight.c.count)
    count, of, which = level.sight.c.count - len(sure), np.arange(len(open_)), at[open_]
    if level.kinds is not None:
        _, one, of = np.unique(level.kinds[at[open_]], return_index=True, return_inverse=True)
        if len(one) == 1:
            return at[np.concatenate([sure, open_[:count]])], 0.0
        which = at[open_[one]]
    exact = level.of(row, which, EXACT)
    if not exact.r.any() and np.isfinite(exact.h).all():  # h is h + l rounded, so that pairs stand as their sums do
        h, low = (np.broadcast_to(x, exact.h.shape)[0, of] for x in (exact.h, exact.l))
        order = np.lexsort((-low, -h))  # which is stable
        last, first = order[count - 1], order[count]
        margin = float((h[last] - h[first]) + (low[last] - low[first]))
        return at[np.concatenate([sure, np.sort(open_[order[:count]])])], margin
    try:
        whole = level.of(row, which, Whole())
    except UnsupportedProblem:  # roots, exponentials and the like
        pass
    else:
        numbers = [whole.a[0, x] * whole.unit for x in of]
        ranks = sorted(range(len(of)), key=lambda x: (-numbers[x], x))
        gap = numbers[ranks[count - 1]] - numbers[ranks[count]]
        margin = float(gap) if gap <= LARGEST else math.inf
        return at[np.concatenate([sure, np.sort(open_[ranks[:count]])])], margin
    image = level.of(row, which, Field(level.ones[0].q.shape[1])).image[0][of]
    for bits in LADDER:
        balls = Balls(bits)
        with balls.working():
            x = level.of(row, which, balls).a[0][of]
            choice = _by_balls(np.arange(len(open_)), x, image, count)
        if choice is not None:
            return at[np.concatenate([sure, open_[choice[0]]])], choice[1]
    raise _too_close(row)


def _too_close(row: int) -> InvalidProblem:
    return InvalidProblem(f"scores: two candidates of row {row} differ by less than {LADDER[-1]} bits can tell")


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
