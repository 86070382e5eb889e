"""The mask of one head by rules, which is made where it is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .spans import EMPTY, FULL, PARTIAL, UNSURE, Spans, Truth

if TYPE_CHECKING:
    from .rule import Rule

__all__ = ["View", "edges"]

Mask = NDArray[np.bool_]
Codes = NDArray[np.int8]
CHUNK = 2**20
"""Truth values that are made at a time."""
TOGETHER = 2**14
"""Pairs of a query and a key that cost about as much as one more group of rows."""
COARSE = 512
"""Rows and keys of the tiles that are asked first."""


class View:
    """The mask of one head of one sequence by rules, (n_q, n_k): indexed as an array is, made where it is indexed.

    Parameters
    ----------
    parts : list of (rule, first row, first key, call)
        What must hold together: a rule, where the sequence begins in its call, and that call's batch, head, n_q, n_k.
    shape : (int, int)
        Queries and keys of the sequence.
    """

    dtype = np.dtype(bool)
    ndim = 2

    def __init__(self, parts: list[tuple[Rule, int, int, tuple[int, int, int, int]]], shape: tuple[int, int]) -> None:
        self.parts, self.shape = parts, shape
        self._seeing: Mask | None = None
        self._coarse: Codes | None = None

    @classmethod
    def of(cls, rule: Rule, n_q: int, n_k: int, batch: int = 0, head: int = 0) -> View:
        """Return the mask of one head of a call."""
        return cls([(rule, 0, 0, (batch, head, n_q, n_k))], (n_q, n_k))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        rows, keys = index if isinstance(index, tuple) else (index, slice(None))
        places = [_places(i, n) for i, n in zip((rows, keys), self.shape, strict=True)]
        found = np.ones(tuple(map(len, places)), bool)
        for rule, row, key, (batch, head, n_q, n_k) in self.parts:
            found &= rule.block(places[0] + row, places[1] + key, n_q, n_k, batch, head)
        return found[tuple(0 if isinstance(i, int | np.integer) else slice(None) for i in (rows, keys))]

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[Any]:
        found = np.empty(self.shape, bool)
        for rows in self.chunks():
            found[rows] = self[rows]
        return found if dtype is None else found.astype(dtype)

    def chunks(self) -> Iterator[slice]:
        """Yield rows, few enough to hold what they see."""
        step = max(1, CHUNK // max(self.shape[1], 1))
        for i in range(0, self.shape[0], step):
            yield slice(i, min(i + step, self.shape[0]))

    def states(self, rows: NDArray[np.int64], keys: NDArray[np.int64], settle: bool = True) -> Codes:
        """Tell what tiles with such edges are: EMPTY, PARTIAL, FULL; UNSURE too where nothing is to be settled."""
        codes = self._codes((rows[:-1], rows[1:] - 1), keys)
        for i in np.nonzero((codes == UNSURE).any(1))[0].tolist() if settle else ():
            for j in np.nonzero(codes[i] == UNSURE)[0].tolist():
                seen = self[rows[i] : rows[i + 1], keys[j] : keys[j + 1]]
                codes[i, j] = FULL if seen.all() else PARTIAL if seen.any() else EMPTY
        return codes

    def by_row(self, rows: NDArray[np.int64], keys: NDArray[np.int64]) -> Codes:
        """Tell of each of some rows what the keys between edges are to it; UNSURE where ranges do not say."""
        step = max(1, TOGETHER * 16 // max(len(keys) - 1, 1))  # so that their integers stay in cache
        parts = [rows[i : i + step] for i in range(0, max(len(rows), 1), step)]
        return np.concatenate([self._codes((x, x), keys) for x in parts])

    def around(self, rows: NDArray[np.int64], keys: NDArray[np.int64]) -> int:
        """Tell what the keys between two edges are to all rows from the first to the last of some."""
        return int(self._codes((rows[:1], rows[-1:]), keys)[0, 0])

    def _codes(self, rows: tuple[NDArray[np.int64], NDArray[np.int64]], keys: NDArray[np.int64]) -> Codes:
        whole = Truth(np.full((len(rows[0]), len(keys) - 1), FULL, np.int8))
        if not whole.codes.size:
            return whole.codes
        for rule, row, key, call in self.parts:
            places = Spans((rows[0] + row, rows[1] + row), (keys[:-1] + key, keys[1:] - 1 + key), *call)
            whole = whole & rule.at(places)
        return whole.codes

    def cuts(self) -> NDArray[np.int64] | None:
        """Return where blocks of keys begin, if a rule has any."""
        if any(key for _, _, key, _ in self.parts):
            return None
        found = [rule.cuts(self.shape[1]) for rule, *_ in self.parts]
        return next((x for x in found if x is not None), None)

    def ranges(self, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return ranges of keys outside which some rows see none, (rows, ranges, 2), if a rule lists them."""
        for rule, row, key, call in self.parts:
            if (found := rule.ranges(rows + row, call)) is not None:
                return np.clip(found - key, 0, self.shape[1])
        return None

    @property
    def lists(self) -> bool:
        """Tell whether a rule lists the keys that a row sees."""
        return self.ranges(np.arange(0)) is not None

    def listed(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield rows, some at a time, and the keys outside which these see none: where rules list them."""
        start, size = 0, 1
        while start < len(rows):
            some = rows[start : start + size]
            found = self.ranges(some)
            assert found is not None
            many = np.maximum(found[..., 1] - found[..., 0], 0).sum(1)
            # a group of r rows looks at r times the keys of one: r² for what a group costs beside
            most = max(1, int((TOGETHER / max(float(many.mean()), 1.0)) ** 0.5))
            if len(some) > most:
                some, found = some[:most], found[:most]
            marks = np.zeros(self.shape[1] + 1, np.int64)
            low, high = found[..., 0].ravel(), found[..., 1].ravel()
            np.add.at(marks, low[high > low], 1)
            np.add.at(marks, high[high > low], -1)
            yield some, np.nonzero(np.cumsum(marks[:-1]))[0]
            start, size = start + len(some), most

    def touches(self, keys: NDArray[np.int64]) -> Mask:
        """Tell whether a row sees a key between two edges, (n_q, edges - 1)."""
        found, rows = np.zeros((self.shape[0], len(keys) - 1), bool), edges(self.shape[0], COARSE)
        coarse = self.states(rows, keys, settle=False)
        for i in range(len(rows) - 1):
            found[rows[i] : rows[i + 1]] = coarse[i] == FULL
        open_ = (coarse == PARTIAL) | (coarse == UNSURE)
        for i, j in zip(*np.nonzero(open_), strict=True):
            part = np.arange(rows[i], rows[i + 1])
            found[part, j] = self._some(part, keys[j : j + 2])
        return found

    def any(self, axis: int | None = None) -> Any:
        """Tell whether a key is seen: at all, by column (0) or by row (1)."""
        if axis == 1:
            if self._seeing is None:
                self._seeing = self._rows_with_a_key()
            return self._seeing.copy()
        if axis is None:
            return bool(self.any(1).any())
        found = np.zeros(self.shape[1], bool)
        for rows in self.chunks():
            found |= self[rows].any(0)
        return found

    def _rows_with_a_key(self) -> Mask:
        if self.lists:
            parts = [self[rows, keys].any(1) for rows, keys in self.listed(np.arange(self.shape[0]))]
            return np.concatenate([np.zeros(0, bool), *parts])
        rows, keys = edges(self.shape[0], COARSE), edges(self.shape[1], COARSE)
        found, coarse = np.zeros(self.shape[0], bool), self.coarse()
        for i in range(len(rows) - 1):
            left = np.arange(rows[i], rows[i + 1])
            # full ones first, then from the last: there a causal row has its own key
            for j in sorted(np.nonzero(coarse[i] != EMPTY)[0].tolist(), key=lambda j: (coarse[i, j] != FULL, -j)):
                seen = self._some(left, keys[j : j + 2]) if coarse[i, j] != FULL else np.ones(len(left), bool)
                found[left[seen]], left = True, left[~seen]
                if not left.size:
                    break
        return found

    def _some(self, rows: NDArray[np.int64], keys: NDArray[np.int64]) -> Mask:
        """Tell whether some rows see a key between two edges."""
        codes = self.by_row(rows, keys)[:, 0]
        found: Mask = (codes == FULL) | (codes == PARTIAL)
        open_ = np.nonzero(codes == UNSURE)[0]
        if open_.size:
            found[open_] = self[rows[open_], keys[0] : keys[1]].any(1)
        return found

    def all(self) -> bool:
        """Tell whether every key is seen by every query."""
        return bool((self.coarse() == FULL).all())

    def coarse(self) -> Codes:
        """Tell what large tiles are, UNSURE where ranges do not say: asked more than once, made once."""
        if self._coarse is None:
            rows, keys = (edges(n, COARSE) for n in self.shape)
            self._coarse = self.states(rows, keys, settle=False)
        return self._coarse

    def sum(self, axis: int = 1, keepdims: bool = False) -> NDArray[np.int64]:
        """Return how many keys each row sees (axis 1), or by how many rows each key is seen (0)."""
        parts = [self[rows].sum(axis) for rows in self.chunks()]
        empty = np.zeros(self.shape[1 - axis], np.int64)
        found = np.asarray(np.concatenate([empty[:0], *parts]) if axis == 1 else sum(parts, empty))
        return found[:, None] if keepdims and axis == 1 else found[None] if keepdims else found


def edges(n: int, size: int) -> NDArray[np.int64]:
    """Return where tiles of a size begin, and where the last ends."""
    return np.append(np.arange(0, n, size), n) if n else np.zeros(1, np.int64)


def _places(index: Any, n: int) -> NDArray[np.int64]:
    if isinstance(index, slice):
        return np.arange(n)[index]
    found = np.asarray(index)
    found = np.nonzero(found)[0] if found.dtype == bool else found
    return np.where(found < 0, found + n, found).ravel().astype(np.int64)
