"""Softmax attention of one head on a GPU, by tiles of rows and of keys: what each row has seen stays on the device.

Operands, radii and what a row is finished with are those of ``stream.py``; the steps of a tile are two kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedProblem
from ...masks import band
from ...rules import EMPTY, FULL, View
from ...rules.spans import UNSURE
from ..heads import Head
from ..levels import Level
from ..stream import Forward
from ..tiles import Sums
from .card import KEYS, ROWS
from .finish import SHORT_ERROR, finish, radii

__all__ = ["OnDevice", "bytes_needed", "rows_of_a_tile"]

Float = NDArray[np.float64]
FEWEST = 256
"""Rows of the smallest tile that is tried where memory is short."""
AT_THE_END = 8
"""More matrices (rows, d_v) than are alive while a tile of rows is finished."""
WIDEST, LONGEST = 2**12, 2**22
"""Terms of a bound's sum over a row, and over keys, which are added in any order (docs/proofs/streaming.md)."""
UNMASKED = -1
"""In place of a row's line of the mask: it sees all keys from its first to its last."""


def bytes_needed(n_q: int, n_k: int, d: int, d_v: int, level: int, rows: int, more: bool = False) -> int:
    """Return how many bytes of the device a head takes: operands, results, a tile of rows and keys.

    Parameters
    ----------
    n_q, n_k, d, d_v : int
        The head's sizes.
    level : int
        The level.
    rows : int
        Rows of a tile.
    more : bool
        Whether there is a bias or a mask.
    """
    rows, keys = min(rows, n_q), min(KEYS, n_k)
    # keys and values, and once more the larger of them while it is cut
    operands = (2 * level + 3) * n_k * (d + d_v) + (2 * level + 2) * n_k * max(d, d_v) + (3 * level + 4) * n_q * d
    tile = rows * keys * (level + 1 + 2 * more) + rows * d_v * (level + 3 + AT_THE_END)
    return 8 * (operands + 3 * n_q * (d_v + 1) + tile)


def rows_of_a_tile(one: Head, f: Level, rows: int) -> int:
    """Return how many rows a tile has: the most of the level's share of ``ROWS`` and its halves that memory holds.

    Parameters
    ----------
    one : Head
        The head.
    f : Level
        The level, on a device.
    rows : int
        How many rows are asked for.

    Raises
    ------
    UnsupportedProblem
        Even the fewest rows need more memory than there is; it says how much. Or keys are too wide or too many.
    """
    size = ROWS // (1 << f.level.bit_length())
    more = one.bias is not None or not one.allowed.all()
    (n_k, d), d_v = one.k.shape, one.v.shape[1]
    if d >= WIDEST or n_k >= LONGEST:
        raise UnsupportedProblem(
            f"device: got {n_k} keys of {d} numbers; bounds are proven for fewer than {LONGEST} keys of fewer than "
            f"{WIDEST}; use device='cpu'"
        )
    free = f.device.free(2 * bytes_needed(rows, n_k, d, d_v, f.level, size, more))
    while (need := bytes_needed(rows, n_k, d, d_v, f.level, size, more)) > free and size > FEWEST:
        size //= 2
    if need > free:
        raise UnsupportedProblem(
            f"device: a head of {rows} queries and {n_k} keys, d = {d} and {d_v}, needs {need / 1e9:.3g} GB of the "
            f"GPU's memory, {free / 1e9:.3g} GB are free; free some, evaluate fewer rows at a time, or use device='cpu'"
        )
    return size


class OnDevice(Forward):
    """One head's operands, prepared on a device, and its results there."""

    def __init__(self, one: Head, f: Level, rows: NDArray[np.intp], unit: int, into: tuple[Any, Any] | None) -> None:
        f.device.trim(8 * one.k.size)
        self.tall, constant = rows_of_a_tile(one, f, len(rows)), Level(f.level).log2e
        self.log2e = float(constant.h[0, 0]), float(constant.l[0, 0])
        super().__init__(one, f, rows, unit, into, threads=1)
        self.exp2_error = self.exp2_error if f.level else SHORT_ERROR

    def run(self) -> None:
        """Compute all rows."""
        size = self.tall
        self.f.device.trim(8 * self.head.k.size)
        level, xp, d_v = self.f.level, self.f.xp, self.out.shape[1]
        r, w = min(size, len(self.rows)), max(t.stop - t.start for t in self.tiles) if self.tiles else 0
        self._planes, self._fade = xp.empty(r * (level + 1) * w), xp.empty(r)
        self._parts, self._given = xp.empty((level + 1, r, d_v)), self._numbers()
        for start in range(0, len(self.rows), size):
            at = slice(start, min(start + size, len(self.rows)))
            sums = Sums.of(at.stop - at.start, d_v, xp)
            for n, some, sees, mask in self._seen(at):
                self._add_some(n, at, some, sees, mask, sums)
            self._finish(at, sums)
        del self._planes, self._parts

    def _tiles(self, threads: int) -> tuple[list[slice], Any]:
        one, n_k = self.head, len(self.head.k)
        self.ends = band(one.problem, one.batch, one.rows, one.keys)
        if self.ends is None or not isinstance(one.allowed, View):
            return super()._tiles(threads)
        # rows see all keys from one to another: what a rule says of each row and tile is not needed
        first, end = (np.clip(x[self.rows], 0, n_k) for x in self.ends)
        first, end = first[first < end] // self.wide, -(-end[first < end] // self.wide)
        count = -(-n_k // self.wide)
        rows = np.cumsum(np.bincount(first, minlength=count + 1) - np.bincount(end, minlength=count + 1))
        return [slice(j * self.wide, min((j + 1) * self.wide, n_k)) for j in np.nonzero(rows)[0].tolist()], None

    def _numbers(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Return the numbers that every tile's weights take, as a kernel takes them."""
        table, *ln2 = self.f.device.table
        cap = [x for pair in self.cap or ((0.0, 0.0), (0.0, 0.0)) for x in pair]
        cuts = [*self.sigma.tolist(), 0.0, 0.0, 0.0][:3]
        scores = [
            np.float64(self.c),
            np.float64(self.c_low),
            table,
            *map(np.float64, ln2),
            np.int32(self.cap is not None),
        ]
        return [*scores, *map(np.float64, cap)], [*map(np.float64, self.log2e)], [*map(np.float64, cuts)]

    def _radii(self, q: Any, parts: list[Any], keys: list[Any], rc: float) -> tuple[Any, Any]:
        return radii(self, q, parts, keys[0], rc)

    def _finish(self, at: slice, sums: Sums) -> None:
        finish(self, at, sums)

    def _seen(self, at: slice) -> Iterator[tuple[int, slice, Any, Any]]:
        """Yield tiles of keys, the rows from the first to the last that see some of it, and what these see.

        That is for each row its first key in the tile, the one behind its last, and its line of a mask or ``UNMASKED``,
        and the mask; None where all rows see all keys.
        """
        rows, allowed = self.rows[at], self.head.allowed
        last, least = (0, 0) if self.ends is None else (self.ends[0][rows].max(), self.ends[1][rows].min())
        for n, keys in enumerate(self.tiles):
            w = keys.stop - keys.start
            if self.whole or (last <= keys.start and keys.stop <= least):
                yield n, slice(0, len(rows)), None, None
                continue
            if self.ends is not None:
                first, end = (np.clip(x[rows] - keys.start, 0, w) for x in self.ends)
                open_ = np.zeros(0, np.intp)
            else:
                kind = self.kinds[at, n] if isinstance(allowed, View) else np.full(len(rows), UNSURE)
                first, end = np.zeros(len(rows), np.int64), np.where(kind == EMPTY, 0, w)
                open_ = np.nonzero((kind != EMPTY) & (kind != FULL))[0]
            lines = np.nonzero(first < end)[0]
            if not lines.size:
                continue
            some = slice(int(lines[0]), int(lines[-1]) + 1)
            if not open_.size and (first[some] == 0).all() and (end[some] == w).all():
                yield n, some, None, None
                continue
            sees = np.stack([first, end, np.full(len(rows), UNMASKED)], 1).astype(np.int32)
            sees[open_, 2] = np.arange(len(open_))
            mask = allowed[rows[open_], keys].astype(np.uint8) if open_.size else None
            yield n, some, np.ascontiguousarray(sees[some]), mask

    def _add_some(self, n: int, at: slice, some: slice, sees: Any, mask: Any, sums: Sums) -> None:
        """Add a tile of keys to the sums of some rows of a tile."""
        level, device, keys = self.f.level, self.f.device, self.tiles[n]
        xp, r, w = self.f.xp, some.stop - some.start, keys.stop - keys.start
        here = slice(at.start + some.start, at.start + some.stop)
        planes = self._planes[: r * (level + 1) * w].reshape(r, level + 1, w)
        parts, part = self._parts[:, :r], sums if r == len(sums.m) else sums.some(some)
        fade = self._fade[:r]
        self.keys[n].levels(self.left[here], level, [planes[:, t] for t in range(level + 1)])
        bias = None if self.head.bias is None else xp.asarray(self.head.bias[self.rows[here], keys])
        given = [x if x is None else xp.asarray(x) for x in (bias, sees, mask)]
        pointer = [np.uint64(0) if x is None else x for x in given]
        scores, base, cuts = self._given
        device.launch(
            level, "weigh", r,
            (planes, np.int32(w), *scores, pointer[0], *base, pointer[1], pointer[2],
             *cuts, part.m, part.den, part.den_low, fade, part.done),
        )  # fmt: skip
        self.values[n].levels(planes.reshape(r, -1), level, list(parts))
        d_v = self.out.shape[1]
        device.launch(
            level, "collect", max(1, -(-r * d_v // device.threads)),
            (parts, np.int64(self._parts.shape[1] * d_v), np.int32(r), np.int32(d_v), fade, part.num, part.num_low),
        )  # fmt: skip
