"""Candidates whose keys are neighbours: sums of their keys without the zeros of all others, over any arithmetic."""

from __future__ import annotations

from copy import copy
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .field import FieldMatrix
from .levels import Bounded, Level
from .matrix import Matrix
from .whole import WholeMatrix

__all__ = ["Runs"]

Mask = NDArray[np.bool_]


class Runs:
    """Runs of keys, one a candidate.

    Attributes
    ----------
    starts, ends : (m,) integer arrays
        The first key of each, and the one behind its last.
    """

    def __init__(self, starts: NDArray[np.intp], ends: NDArray[np.intp]) -> None:
        self.starts, self.ends, self.sizes = starts, ends, ends - starts
        self._levels: dict[int, _Sums] = {}  # some rows go up a level, and the next ones begin at the first again
        self._last: dict[int, _Sums] = {}
        self._making = Lock()
        self.single = bool((self.sizes == 1).all())

    @classmethod
    def of(cls, members: NDArray[Any], m: int) -> Runs | None:
        """Return those of masks (m, n_k) or of keys' numbers (n_k,); None where a candidate has no key, or keys apart.

        Those of masks may overlap.
        """
        if members.ndim == 1:
            at = np.nonzero(members >= 0)[0]
            starts, ends = np.full(m, len(members)), np.zeros(m, np.intp)
            np.minimum.at(starts, members[at], at)
            np.maximum.at(ends, members[at], at + 1)
            counts = np.bincount(members[at], minlength=m)
        elif not members.any(1).all():
            return None
        else:
            starts, ends = members.argmax(1), members.shape[1] - members[:, ::-1].argmax(1)
            counts = members.sum(1)
        return cls(starts, ends) if (counts == ends - starts).all() and (counts > 0).all() else None

    @property
    def apart(self) -> bool:
        """Tell whether no key belongs to two, and they stand in order."""
        return bool((self.starts[1:] >= self.ends[:-1]).all())

    def edges(self, n_k: int) -> NDArray[np.int64]:
        """Return where keys must be cut so that every run is some pieces."""
        return np.unique(np.concatenate([[0, n_k], self.starts, self.ends])).astype(np.int64)

    def pick(self, touched: Mask) -> Mask:
        """Return by run whether a row touches it, from which of the pieces between :meth:`edges` it touches."""
        n_k = int(self.ends.max(initial=0))
        edges = self.edges(n_k)
        return self._any(touched, np.searchsorted(edges, self.starts), np.searchsorted(edges, self.ends))

    def any(self, seen: Mask) -> Mask:
        """Return by run whether a row sees one of its keys."""
        return self._any(seen, self.starts, self.ends)

    def _any(self, x: Mask, starts: Any, ends: Any) -> Mask:
        if not len(starts):
            return np.zeros((len(x), 0), bool)
        return np.logical_or.reduceat(np.insert(x, x.shape[1], False, 1), _cut(starts, ends), axis=1)[:, ::2]

    def over(self, f: Any, m: int) -> _Sums:
        """Return the first m as a matrix (m, n_k) of 0 and 1 to multiply keys by, over an arithmetic."""
        kept = self._levels if isinstance(f, Level) else self._last
        with self._making:
            if id(f) not in kept:
                self._last.clear()
                kept[id(f)] = _Sums(self, f)
            found = copy(kept[id(f)])  # another thread may want another m
        found.m = m
        return found


class _Sums:
    """A matrix of 0 and 1 whose product with keys is sums of neighbours; an arithmetic's are made once for all."""

    def __init__(self, runs: Runs, f: Any) -> None:
        self.runs, self.f, self.m = runs, f, len(runs.starts)
        self._kept: dict[int, tuple[Any, Any]] = {}  # by operand, which it keeps alive
        self._first: dict[int, tuple[int, Any]] = {}
        self._making = Lock()

    def __matmul__(self, k: Any) -> Any:
        with self._making:  # threads begin together: one makes the sums, the others wait for them
            if id(k) not in self._kept:
                self._kept[id(k)] = k, self._sums(k)
        found = self._kept[id(k)][1]
        if self.m == len(self.runs.starts):
            return found
        m, first = self._first.get(id(k), (0, None))
        if m != self.m:
            first = found.T.columns(np.arange(self.m)).T
            self._first[id(k)] = self.m, first
        return first

    def _sums(self, k: Any) -> Any:
        runs = self.runs
        if runs.single:
            return k.T.columns(runs.starts).T
        if isinstance(k, Matrix):
            return Matrix(_added(k.a, runs), k.f)
        if isinstance(k, WholeMatrix):
            return WholeMatrix(_added(k.a, runs), k.unit)
        if isinstance(k, FieldMatrix):
            exact = None if k.exact is None else tuple(_added(x, runs) for x in k.exact)
            return FieldMatrix(k.f, _added(k.image, runs) % k.f.p, exact)  # type: ignore[arg-type]
        low, r = (np.broadcast_to(x, k.h.shape) for x in (k.l, k.r))
        rows = []
        for a, b in zip(runs.starts.tolist(), runs.ends.tolist(), strict=True):
            x = self.f.array(np.ones((1, b - a))) @ Bounded(self.f, k.h[a:b], low[a:b], r[a:b])
            rows.append([np.broadcast_to(y, x.h.shape) for y in (x.h, x.l, x.r)])
        return Bounded(self.f, *map(np.concatenate, zip(*rows, strict=True)))


def _cut(starts: Any, ends: Any) -> Any:
    return np.stack([starts, ends], 1).ravel()


def _added(x: NDArray[Any], runs: Runs) -> NDArray[Any]:
    return np.stack([x[a:b].sum(0) for a, b in zip(runs.starts, runs.ends, strict=True)])
