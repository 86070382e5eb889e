"""A rule's formula over tiles: integers become ranges, truth becomes empty, partial, full, or not known."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .places import Places

__all__ = ["EMPTY", "FULL", "PARTIAL", "UNSURE", "Spans", "Truth"]

EMPTY, PARTIAL, FULL, UNSURE = 0, 1, 2, 3
"""What a tile is: no pair in it is seen, some are and some are not, all are; or its ranges alone do not say."""
_AND = np.full((4, 4), UNSURE, np.int8)
_AND[EMPTY, :] = _AND[:, EMPTY] = EMPTY
_AND[FULL, :] = _AND[:, FULL] = np.arange(4)
_NOT = np.array([FULL, PARTIAL, EMPTY, UNSURE], np.int8)
LARGEST = 2**24
"""Elements of a table whose sums are made; of a larger one its tiles are not known."""

Whole = NDArray[np.int64]


class Truth:
    """Codes of tiles, (rows or 1, keys or 1), that combine as booleans do; what is said of them is true."""

    __slots__ = ("codes",)

    def __init__(self, codes: NDArray[np.int8]) -> None:
        self.codes = codes

    @classmethod
    def of(cls, full: Any, empty: Any, known: Any = True) -> Truth:
        """Return FULL and EMPTY where these hold, elsewhere PARTIAL where that is known."""
        rest = np.where(known, PARTIAL, UNSURE)
        return cls(np.where(full, FULL, np.where(empty, EMPTY, rest)).astype(np.int8))

    def __and__(self, o: Truth) -> Truth:
        return Truth(_AND.take((self.codes << 2) | o.codes, mode="clip"))  # a row of four for each code

    def __or__(self, o: Truth) -> Truth:
        return ~(~self & ~o)

    def __invert__(self) -> Truth:
        return Truth(_NOT[self.codes])


class Span:
    """Integers of tiles: the least and the largest, both of which occur, and whether all between them do."""

    __slots__ = ("hi", "lo", "solid")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, lo: Any, hi: Any, solid: Any = True) -> None:
        self.lo, self.hi = lo, hi
        self.solid = solid | (lo == hi)

    def __add__(self, o: Any) -> Span:
        o = _taken(o)
        return Span(self.lo + o.lo, self.hi + o.hi, self.solid & o.solid)

    def __sub__(self, o: Any) -> Span:
        o = _taken(o)
        return Span(self.lo - o.hi, self.hi - o.lo, self.solid & o.solid)

    def __floordiv__(self, o: int) -> Span:
        return Span(self.lo // o, self.hi // o, self.solid)

    def __mod__(self, o: int) -> Span:
        wide, turned = self.hi - self.lo >= o - 1, self.lo // o != self.hi // o
        lo, hi = np.where(wide | turned, 0, self.lo % o), np.where(wide | turned, o - 1, self.hi % o)
        return Span(lo, hi, self.solid & (wide | ~turned))

    def clip(self, least: int, most: int) -> Span:
        """Hold the integers to a range."""
        return Span(np.clip(self.lo, least, most), np.clip(self.hi, least, most), self.solid)

    def __le__(self, o: Any) -> Truth:
        o = _taken(o)
        return Truth.of(self.hi <= o.lo, self.lo > o.hi)

    def __ge__(self, o: Any) -> Truth:
        return _taken(o).__le__(self)

    def __lt__(self, o: Any) -> Truth:
        return ~_taken(o).__le__(self)

    def __gt__(self, o: Any) -> Truth:
        return ~self.__le__(o)

    def __eq__(self, o: object) -> Truth:  # type: ignore[override]
        o = _taken(o)
        apart = (self.lo > o.hi) | (self.hi < o.lo)
        ends = (self.lo == o.lo) | (self.lo == o.hi) | (self.hi == o.lo) | (self.hi == o.hi)
        one = (self.lo == self.hi) & (o.lo == o.hi)
        return Truth.of(one & ~apart, apart, (self.solid & o.solid) | ends)


def _taken(x: Any) -> Span:
    return x if isinstance(x, Span) else Span(np.asarray(x), np.asarray(x))


class Spans(Places):
    """The places of tiles: rows and keys are the least and the largest of each."""

    def __init__(self, rows: tuple[Whole, Whole], keys: tuple[Whole, Whole], *call: int) -> None:
        a, b = (Span(x[:, None], y[:, None]) for x, y in (rows, keys))
        super().__init__(a, Span(b.lo.T, b.hi.T), *call)

    def clip(self, x: Any, least: int, most: int) -> Any:
        """Hold integers to a range."""
        return x.clip(least, most) if isinstance(x, Span) else min(max(x, least), most)

    def table(self, name: str, x: NDArray[Any], at: tuple[Any, ...]) -> Any:
        """Return a table's numbers, or truth, at the places of tiles."""
        fixed = tuple(slice(None) if isinstance(i, Span) else i for i in at)
        x, spans = x[fixed], [i for i in at if isinstance(i, Span)]
        if not spans:
            return Truth.of(*(np.full((1, 1), y) for y in (x, ~x))) if x.dtype == bool else _taken(x)
        if x.dtype != bool:
            return _integers(x, spans[0])
        if len(spans) == 1:
            return _line(x, spans[0])
        return _plane(x, *spans)


def _integers(x: NDArray[Any], at: Span) -> Span:
    """Return the integers of a table whose index is a range of places."""
    cut = np.stack([np.ravel(at.lo), np.ravel(at.hi) + 1], 1).ravel()
    x = x.astype(np.int64)
    padded, steps = np.append(x, x[-1:]), np.diff(x)
    lo, hi = (f.reduceat(padded, cut)[::2].reshape(np.shape(at.lo)) for f in (np.minimum, np.maximum))
    return Span(lo, hi, at.solid & bool(((steps == 0) | (steps == 1)).all()))


def _line(x: NDArray[np.bool_], at: Span) -> Truth:
    """Return the truth of a table with one index."""
    total = np.append(0, np.cumsum(x))
    count = total[at.hi + 1] - total[at.lo]
    return Truth.of(count == at.hi - at.lo + 1, count == 0, at.solid)


def _plane(x: NDArray[np.bool_], a: Span, b: Span) -> Truth:
    """Return the truth of a table with two indices."""
    if (a.lo == a.hi).all() and (b.lo == b.hi).all():
        return Truth(x[a.lo, b.lo].view(np.int8) * np.int8(FULL))
    if x.size > LARGEST:
        return Truth(np.full(np.broadcast_shapes(a.lo.shape, b.lo.shape), UNSURE, np.int8))
    some, every = (_over(f, _over(f, x, a, 0), b, 1) for f in (np.logical_or, np.logical_and))
    return Truth.of(every, ~some, a.solid & b.solid)


def _over(f: np.ufunc, x: NDArray[np.bool_], at: Span, axis: int) -> NDArray[np.bool_]:
    """Return whether some, or all, hold over ranges of places along an axis."""
    if (at.lo == at.hi).all():
        return x.take(np.ravel(at.lo), axis)
    cut = np.stack([np.ravel(at.lo), np.ravel(at.hi) + 1], 1).ravel()
    last = np.zeros_like(x.take([0], axis))  # an end may be one after the last place
    found: NDArray[np.bool_] = f.reduceat(np.concatenate([x, last], axis), cut, axis)
    return found[tuple(slice(None, None, 2 if i == axis else 1) for i in range(2))]
