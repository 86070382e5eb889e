"""The first of many candidates, found in tiles: only what may be among them is kept, each with its enclosure.

A candidate is left out once so many earlier ones are proven to score as high or higher: a tie goes to the lower one.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..rules import EMPTY, FULL
from ..rules.view import edges
from ..variants import Selected
from .blas import one_thread
from .doubledouble import U
from .heads import Head, matrix_of
from .levels import Bounded, Level
from .ranking import Scorer, of_row, rivals, scored
from .runs import Runs

if TYPE_CHECKING:
    from .choosing import Sight

__all__ = ["Contenders", "by_tiles"]

Float = NDArray[np.float64]
Places = NDArray[np.intp]
Mask = NDArray[np.bool_]
WIDE, TALL = 2048, 512
"""Candidates and rows of a tile."""
FIRST = 256
"""Candidates of the first tile, which all are kept at first."""
SPARE = 64
"""Candidates that a row keeps beside twice those that it may choose."""
ROOM = 2**21
"""Candidates that the rows of a tile keep, where one keeps many."""


def by_tiles(ones: tuple[Head, ...], shape: Selected, sight: Sight, put: Any) -> Float:
    """Choose as ``choosing.choose`` does, among candidates whose scores depend on their own keys, which lie apart."""
    n_q = len(ones[0].q)
    margins, work = np.full(n_q, np.inf), _Tiled(ones, shape, sight)
    tall = min(TALL, max(32, ROOM // (2 * sight.c.count + SPARE)))

    def some(start: int) -> None:
        rows = np.arange(start, min(start + tall, n_q))
        taken, margins[rows] = work.choose(rows)
        put(rows, taken)

    with one_thread(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(some, range(0, n_q, tall)))
    return margins


class _Tiled:
    """Scores of a head's candidates in tiles, in plain float64 with a certificate."""

    def __init__(self, ones: tuple[Head, ...], shape: Selected, sight: Sight) -> None:
        assert sight.runs is not None
        self.ones, self.shape, self.sight, self.runs, self.f = ones, shape, sight, sight.runs, Level(0)
        self.finer = Scorer(ones, shape, sight, Level(1))
        self.cuts = np.unique(np.append(edges(sight.m, WIDE), min(FIRST, sight.m)))
        self.parts = [self._part(a, b) for a, b in zip(self.cuts[:-1], self.cuts[1:], strict=True)]

    def _part(self, a: int, b: int) -> tuple[list[Any], Any, Places]:
        first, end = self.runs.starts[a], self.runs.ends[b - 1]
        own = Runs(self.runs.starts[a:b] - first, self.runs.ends[a:b] - first)
        return [matrix_of(self.f, x.k[first:end]) for x in self.ones], own.over(self.f, b - a), own.sizes

    def choose(self, rows: Places) -> tuple[Mask, Float]:
        """Return which candidates neighbouring rows take, and their margins."""
        count, taken = self.sight.c.count, self.sight.must(rows)
        q = [matrix_of(self.f, x.q[rows]) for x in self.ones]
        best = Contenders(len(rows), count + 1, self)
        for i, code in enumerate(self.sight.codes(rows, self.cuts)):
            if code == EMPTY:
                continue
            part, (keys, members, sizes) = slice(self.cuts[i], self.cuts[i + 1]), self.parts[i]
            seen = np.broadcast_to(True, (len(rows), len(sizes)))
            given = list(zip(q, keys, strict=True))
            s = scored(self.ones, self.shape, self.f, given, rows, members, sizes, seen)
            best.take(part.start, s, None if code == FULL else self.sight.may(rows, part))
        best.narrow(np.arange(len(best.many)))
        margins = np.full(len(rows), np.inf)
        first, margin, sure = best.first(count)
        free = best.many > count
        margins[free] = margin[free]
        row, at = np.nonzero(first)
        taken[row, best.at[row, at]] = True
        for n in np.nonzero(free & ~sure)[0].tolist():
            at = best.at[n, : best.many[n]]
            inside, margins[n] = self._alike(best, n) or self._closer(int(rows[n]), at)
            taken[n, at] = False
            taken[n, inside] = True
        return taken, margins

    def _alike(self, best: Contenders, n: int) -> tuple[Places, float] | None:
        """Choose for a row where all whose scores lie close have the same keys."""
        at, kinds, count = best.at[n, : best.many[n]], self.finer.kinds, self.sight.c.count
        sure, near = rivals((best.mid[n, : len(at)], 0.0, best.radius[n, : len(at)]), count)
        if kinds is None or (kinds[at[near]] != kinds[at[near[0]]]).any():
            return None
        return at[np.concatenate([sure, near[: count - len(sure)]])], 0.0

    def _closer(self, row: int, at: Places) -> tuple[Places, float]:
        """Choose for a row among few, by more bits."""
        count, s = self.sight.c.count, self.finer.of(row, at, self.finer.f)
        best = Contenders(1, count + 1)  # their numbers are places in `at`
        best.take(0, s, None)
        best.narrow(np.arange(len(best.many)))
        first, margin, sure = best.first(count)
        if sure[0]:
            return at[best.at[0, first[0]]], float(margin[0])
        left = best.at[0, : best.many[0]]
        parts = [np.broadcast_to(x, s.h.shape)[0, left] for x in (s.h, s.l, s.r)]
        return of_row(self.finer, row, at[left], parts)


class Contenders:
    """Candidates of some rows that may be among their first, in the order of their numbers.

    Attributes
    ----------
    at : (rows, width) integer array
        Their numbers.
    many : (rows,) integer array
        How many there are.
    """

    def __init__(self, rows: int, count: int, work: Any = None) -> None:
        self.count, self.work, self.limit = count, work, 2 * count + SPARE
        shape = rows, self.limit
        self.at: Any = np.zeros(shape, np.intp)
        self.mid: Any = np.zeros(shape)
        self.radius: Any = np.zeros(shape)
        self.many = np.zeros(rows, np.intp)
        self.floor = np.full((rows, 1), -np.inf)  # of the lower ends the `count`-th largest
        self.solid = np.zeros((rows, 1), bool)  # whether so many scores are above it, or it exactly

    def take(self, start: int, s: Bounded, may: Mask | None) -> None:
        """Add candidates, numbered from `start` on."""
        mid, radius = s.h, np.abs(s.l) + s.r if s.l.any() else s.r
        if not np.isfinite(radius).all():
            odd = ~np.isfinite(radius)
            mid, radius = np.where(odd, 0.0, mid), np.where(odd, np.inf, radius)
        if radius.shape[1] == 1:
            below = self.floor - radius - 4 * U * (np.abs(self.floor) + radius)
            least = np.where(self.solid, self.floor, np.nextafter(self.floor, -np.inf))
            new = ~(mid <= np.where(radius == 0, least, below))
        else:
            high = mid + radius
            new = ~((high < self.floor) | ((high == self.floor) & (radius == 0) & self.solid))
        if may is not None:
            new &= may
        row, at = np.divmod(np.flatnonzero(new), new.shape[1])
        more = np.bincount(row, minlength=len(new))
        self._widen(int((self.many + more).max()))
        place = self.many[row] + np.arange(len(row)) - (np.cumsum(more) - more)[row]
        radius = np.broadcast_to(radius, mid.shape)
        for kept, x in ((self.at, start + at), (self.mid, mid[row, at]), (self.radius, radius[row, at])):
            kept[row, place] = x
        self.many += more
        if (crowded := np.nonzero(self.many > self.limit)[0]).size:
            self.narrow(crowded)

    def _widen(self, width: int) -> None:
        if width > self.at.shape[1]:
            more = ((0, 0), (0, width - self.at.shape[1]))
            self.at, self.mid, self.radius = (np.pad(x, more) for x in (self.at, self.mid, self.radius))

    def narrow(self, rows: Places) -> None:
        """Leave out of some rows what is proven to come after the first."""
        width = int(self.many[rows].max(initial=0))
        if width < self.count:
            return
        at, mid, radius = (x[rows, :width] for x in (self.at, self.mid, self.radius))
        valid = np.arange(width) < self.many[rows, None]
        # sums are rounded, and a < b of rounded ones is so of the exact ones, too; a = b only where nothing was added
        low, high, exact = np.where(valid, mid - radius, -np.inf), mid + radius, radius == 0
        floor = np.partition(low, -self.count, 1)[:, -self.count, None]
        above = (low > floor) | ((low == floor) & exact)
        late = np.cumsum(above, 1) - above >= self.count
        keep = valid & ~((high < floor) | ((high == floor) & exact & late))
        if np.count_nonzero(keep, axis=1).max() > self.limit // 2:
            self._repeated(at, keep)
        many = np.count_nonzero(keep, axis=1)
        self.limit = max(self.limit, 2 * int(many.max()))
        order = np.argsort(~keep, axis=1, kind="stable")[:, : int(many.max())]
        for kept, x in ((self.at, at), (self.mid, mid), (self.radius, radius)):
            kept[rows, : order.shape[1]] = np.take_along_axis(x, order, 1)
        self.many[rows], self.floor[rows] = many, floor
        self.solid[rows] = np.count_nonzero(above, axis=1, keepdims=True) >= self.count

    def _repeated(self, at: Places, keep: Mask) -> None:
        """Leave out candidates of a key that `count` earlier ones have, too: their scores are the same."""
        kinds = None if self.work is None else self.work.finer.kinds
        if kinds is None:
            return
        kind = np.where(keep, kinds[at], -1)
        order = np.argsort(kind, axis=1, kind="stable")
        run, place = np.take_along_axis(kind, order, 1), np.arange(kind.shape[1])
        begins = np.maximum.accumulate(np.where(np.diff(run, axis=1, prepend=-2) != 0, place, 0), axis=1)
        late = np.empty_like(keep)
        np.put_along_axis(late, order, place - begins >= self.count, 1)
        keep &= ~late

    def first(self, count: int) -> tuple[Mask, Float, Mask]:
        """Return which are the first by their midpoints, the margins, and of which rows that is proven."""
        valid = np.arange(self.at.shape[1]) < self.many[:, None]
        order = np.argsort(np.where(valid, -self.mid, np.inf), axis=1, kind="stable")
        first = np.zeros(valid.shape, bool)
        np.put_along_axis(first, order[:, :count], True, 1)
        first, rest = first & valid, ~first & valid
        low, high = self.mid - self.radius, self.mid + self.radius
        least = np.where(first, low, np.inf).min(1, keepdims=True)
        most = np.where(rest, high, -np.inf).max(1, keepdims=True)
        tied = (first & (low == least)) | (rest & (high == most))
        sure = (least > most) | ((least == most) & ~(tied & (self.radius > 0)).any(1, keepdims=True))
        margin = np.where(first, self.mid, np.inf).min(1) - np.where(rest, self.mid, -np.inf).max(1)
        return first, margin, sure[:, 0]
