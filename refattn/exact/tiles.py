"""Tiles of rows and keys: where they begin, and what a tile of rows keeps while it goes through the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..rules import EMPTY, FULL, View
from ..rules.spans import UNSURE

__all__ = ["MOST_ROWS", "ROWS", "Kept", "Room", "Sums", "TilesOfRows", "groups", "pieces", "seen", "tiles_of"]

Float = NDArray[np.float64]
ROWS = 256
"""Rows of a tile: what suits the compiled steps."""
MOST_ROWS = 3 * ROWS // 2
"""The most rows of a piece."""
LOWEST = -(2.0**60)
NARROW = 64
"""The fewest keys of a tile that ends where a rule's blocks do."""
GROUPS = (2**11, 2**14)
"""The fewest and the most rows whose tiles of keys are gathered together."""


class Kept:
    """Arrays by row, as attributes."""

    def some(self, lines: Any) -> Self:
        """Return those of some rows."""
        return type(self)(*(x[lines] for x in vars(self).values()))

    def put(self, lines: Any, part: Self) -> None:
        """Take back those of some rows."""
        for name, x in vars(part).items():
            getattr(self, name)[lines] = x


@dataclass
class Sums(Kept):
    """What rows have so far: their shift, numerator and denominator as two numbers each, and the tiles added."""

    m: Float
    num: Float
    num_low: Float
    den: Float
    den_low: Float
    done: Float

    @classmethod
    def of(cls, r: int, d_v: int, xp: Any = np) -> Sums:
        """Return those of rows that have seen no key."""
        return cls(xp.full(r, LOWEST), *xp.zeros((2, r, d_v)), *xp.zeros((3, r)))


class Room:
    """Memory for the numbers of a tile, kept from tile to tile."""

    def __init__(self, level: int, d_v: int) -> None:
        self._level, self._d_v, self._size = level, d_v, (0, 0)

    def scores(self, r: int, w: int) -> list[Float]:
        """Return room for the scores' levels, their sums and tails; that for weights is there, too."""
        if r > self._size[0] or w != self._size[1]:
            r_max = max(r, self._size[0])
            self._size = (r_max, w)
            self._scores = [np.empty((r_max, w)) for _ in range(self._level + 3)]
            self.weights = np.empty((r_max, self._level + 1, w))
            self.part, self.sums = np.empty((self._level + 1, r_max, self._d_v)), np.empty((r_max, self._level + 1))
        return [x[:r] for x in self._scores]


def tiles_of(
    allowed: Any, rows: NDArray[np.intp], n_k: int, wide: int, each: Callable[..., Any] = map
) -> tuple[list[slice], Any]:
    """Return tiles of keys, and of a rule what they are to each row, (rows, tiles).

    They are as wide as may be, or where a rule has blocks, of whole blocks or equal parts of one; those that no row
    sees are left out. `each` calls a function on items, as ``map`` does.
    """
    if not isinstance(allowed, View):
        return [slice(j, min(j + wide, n_k)) for j in range(0, n_k, wide)], None
    cuts, ends, start = allowed.cuts(), [], 0
    for end in [*range(wide, n_k, wide), n_k] if cuts is None else [*cuts[1:].tolist(), n_k]:
        if end - start >= NARROW or end == n_k:
            many = -(-(end - start) // wide)
            ends += [start + (end - start) * i // many for i in range(1, many + 1)]
            start = end
    lines = [rows[i : i + GROUPS[0]] for i in range(0, max(len(rows), 1), GROUPS[0])]
    kinds = np.concatenate(list(each(lambda x: allowed.by_row(x, np.array([0, *ends])), lines)))
    used = (kinds != EMPTY).any(0)
    tiles = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    return [t for t, yes in zip(tiles, used.tolist(), strict=True) if yes], kinds[:, used]


class TilesOfRows(Sequence[Any]):
    """Some rows each of a right operand, copied when they are asked for: together they are as large as all of it."""

    def __init__(self, whole: Any, tiles: list[slice]) -> None:
        self.whole, self.tiles = whole, tiles

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, n: Any) -> Any:
        return self.whole.rows(self.tiles[n])


def groups(rows: int) -> list[slice]:
    """Return groups of rows that are computed at a time, whatever the number of threads."""
    size = min(max(-(-rows // 4), GROUPS[0]), GROUPS[1])
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)][::-1]


def pieces(lines: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Return rows in about equal parts, about as many as a tile has."""
    return np.array_split(lines, max(1, round(len(lines) / ROWS))) if lines.size else []


def seen(allowed: Any, rows: NDArray[np.intp], tiles: list[slice], whole: bool) -> Iterator[Any]:
    """Yield which keys of each tile some rows see, (rows, keys) bool or None for all."""
    known = isinstance(allowed, View) and not whole
    for keys in tiles:
        kind = allowed.around(rows, np.array([keys.start, keys.stop])) if known else UNSURE
        if whole or kind == FULL:
            yield None
        elif kind == EMPTY:
            yield np.zeros((1, 1), bool)
        else:
            yield allowed[rows, keys]
