"""Gradients of softmax attention of one head on a GPU, by tiles of rows and of keys.

Operands, radii and what rows and keys are finished with are those of ``exact/backward.py``; the steps of a tile are
kernels of ``backward.cu``. Sums over rows go by parts of as many rows as a tile has keys: so a head keeps its bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedProblem
from ..backward import AT_A_TIME, Backward, Held, KeySums
from ..heads import Head
from ..keys import Arriving, Rows, column
from ..levels import UP, Level
from ..right import Right
from ..row import Row
from ..stream import Forward, forward_pass
from .card import text_of
from .forward import FEWEST, WIDEST

__all__ = ["KERNELS", "OnDevice", "backward", "bytes_needed", "text_back"]

Float = NDArray[np.float64]
KERNELS = ("slope", "damp", "by_key", "add_all")
ROWS = 2**13
"""Query rows of a tile, where there is memory for them."""
PAIRS = 2**28
"""Rows of a tile times keys of a head: of a long head a tile has fewer rows, and so no more of its memory."""
AT_THE_END = 64
"""More matrices (rows, d) than are alive while a tile of rows is begun or finished, and of keys at the end."""
EACH = 128
"""Rows whose part of a key's radius one thread adds up."""


def text_back(level: int) -> str:
    """Return the kernels' whole text for a level: after what comes before the kernels of ``kernels.cu``."""
    steps = text_of(level).partition('extern "C"')[0]
    return steps + (Path(__file__).parent / "backward.cu").read_text(encoding="utf-8")


def bytes_needed(
    n_q: int, n_k: int, d: int, d_v: int, level: int, tile: tuple[int, int], more: bool = False, capped: bool = False
) -> int:
    """Return how many bytes of the device a head's gradients take: operands, results, a tile of rows and keys.

    Parameters
    ----------
    n_q, n_k, d, d_v : int
        The head's sizes.
    level : int
        The level.
    tile : (int, int)
        Rows and keys of a tile.
    more : bool
        Whether there is a bias or a mask.
    capped : bool
        Whether there is a softcap.
    """
    rows, keys = min(tile[0], n_q), min(tile[1], n_k)
    widest, pairs = max(d, d_v), _pairs(level) * -(-rows // tile[1])
    # keys and values, cut once for the scores and once for the gradients; sums; the larger while it is cut
    operands = (4 * level + 7) * n_k * (d + d_v) + (2 * level + 2) * n_k * widest
    operands += (level + 8) * n_q * (d + d_v)
    work = rows * keys * (2 * (level + 1 + capped) + 20 * more) + (pairs * keys + (level + 1) * rows) * widest
    return 8 * (operands + max(work + AT_THE_END * rows * widest, AT_THE_END * min(n_k, AT_A_TIME) * widest))


def _pairs(level: int) -> int:
    """Return how many products a part of rows has: of each pair of an exact level, and of the rounded one."""
    return level * (level + 1) // 2 + 1


def rows_of_a_tile(one: Head, f: Level, rows: int) -> int:
    """Return how many rows a tile has: the most of ``ROWS`` and its halves that there is memory for, by ``PAIRS``.

    Raises
    ------
    UnsupportedProblem
        Even the fewest rows need more memory than there is; it says how much. Or values are too wide.
    """
    size, free = ROWS, f.device.free()
    (n_k, d), d_v, more = one.k.shape, one.v.shape[1], one.bias is not None or not one.allowed.all()
    if d_v >= WIDEST:
        raise UnsupportedProblem(
            f"device: gradients of values of {d_v} numbers; bounds are proven for fewer than {WIDEST}; use device='cpu'"
        )

    def need() -> int:
        return bytes_needed(rows, n_k, d, d_v, f.level, (size, f.device.keys), more, one.problem.softcap is not None)

    while (need() > free or size * n_k > PAIRS) and size > FEWEST:
        size //= 2
    if need() > free:
        raise UnsupportedProblem(
            f"device: gradients of a head of {rows} queries and {n_k} keys, d = {d} and {d_v}, need {need() / 1e9:.3g} "
            f"GB of the GPU's memory, {free / 1e9:.3g} GB are free; free some, or use device='cpu'"
        )
    return size


def backward(
    card: Any, one: Head, f: Level, rows: NDArray[np.intp], arriving: Arriving, dbias: Any, forward: Forward | None
) -> tuple[dict[str, Any], Rows]:
    """Return what :func:`refattn.exact.backward.backward` does, computed on a GPU; its arguments, without threads."""
    tall = rows_of_a_tile(one, f, len(rows))
    work = OnDevice(forward or forward_pass(one, f, rows, 1), arriving, dbias, 1)
    work.run(tall)
    work.let_go()
    return work.finish(), Rows(rows, column(f, work.forward.lse), column(f, work.d))


class OnDevice(Backward):
    """One head's operands and results on a device."""

    def operands(self, threads: int) -> tuple[list[Right], list[Right]]:
        """Cut values and keys once for all tiles; return those that bounds are made of."""
        xp, f = self.f.xp, self.f
        self.forward.values = ()  # what out was made of; scores are made once more
        f.device.trim(8 * self.head.k.size)
        values, keys = Right(xp.asarray(self.head.v), f, self.across), Right(xp.asarray(self.head.k).T, f, self.width)
        self.values, self.keys = [values.columns(t) for t in self.tiles], [keys.rows(t) for t in self.tiles]
        self.added: Counter[int] = Counter()
        self.log2e = Level(f.level).log2e
        return [values], [keys]

    def terms(self, rows: int) -> int:
        """Return how many roundings a sum over rows goes through in one product, at most."""
        return min(rows, self.rows_at_a_time) * (self.f.level + 1)

    @property
    def additions(self) -> int:
        """How often something is added to dk and dv of a key, at most."""
        return max(self.added.values(), default=0) + 2

    def let_go(self) -> None:
        """Give back what only tiles need, before what they have left is finished."""
        del self.values, self.keys, self.forward.keys, self.forward.left
        self.f.device.trim(8 * self.head.k.size)

    def run(self, tall: int) -> None:
        """Compute all rows, a tile of them at a time."""
        level, xp, (n_k, d), d_v = self.f.level, self.f.xp, self.head.k.shape, self.head.v.shape[1]
        w, r = max((t.stop - t.start for t in self.tiles), default=0), min(tall, len(self.rows))
        self._planes, self._slopes = (xp.empty(r * (level + 1) * w) for _ in range(2))
        self._gain = xp.empty(2 * r * w if self.gain else 0)
        parts = _pairs(level) * -(-r // self.rows_at_a_time)
        self._for_rows, self._for_keys = xp.empty((level + 1) * r * d), xp.empty(parts * max(d, d_v) * w)
        self.all.append(KeySums(d, d_v, n_k, xp=xp))
        for start in range(0, len(self.rows), tall):
            self._rows(slice(start, min(start + tall, len(self.rows))))
        del self._planes, self._slopes, self._gain, self._for_rows, self._for_keys

    def _rows(self, at: slice) -> None:
        """Compute one tile of rows."""
        xp, r, (n_k, d), (sums,) = self.f.xp, at.stop - at.start, self.head.k.shape, self.all
        row, held, by_z = Row(self, at), Held.of(r, d, xp), xp.zeros(n_k)
        lefts = [(heads, _side_by_side(tails)) for heads, tails in (row.q, row.dout)]
        for n, some, sees, mask in self.forward._seen(at):  # type: ignore[attr-defined]
            held.done += 1
            planes, slopes = self._weigh(n, at, some, sees, mask, row, held)
            self._radii(n, some, planes, slopes, row, by_z, sums)
            if self.dbias is not None:
                self._bias(n, at, some, planes, slopes, row)
            if self.gain is not None:
                self._damp(slopes)
            self._by_row(n, some, slopes, held)
            for (heads, last), x, h, low in (
                (lefts[0], slopes, sums.dk, sums.dk_low),
                (lefts[1], planes, sums.dv, sums.dv_low),
            ):
                self._by_key(n, some, heads, last, x, h, low)
        sums.weights[:, 1] += self.finish_rows(row, held) * by_z * UP
        self.loses(row, sums)

    def _weigh(self, n: int, at: slice, some: slice, sees: Any, mask: Any, row: Row, held: Held) -> tuple[Any, Any]:
        """Return the weights and the products of some rows of a tile with a tile of keys, as heads and tail."""
        f, fw, keys, device = self.f, self.forward, self.tiles[n], self.f.device
        xp, level, r, w = f.xp, f.level, some.stop - some.start, keys.stop - keys.start
        here = slice(at.start + some.start, at.start + some.stop)
        planes, slopes = (x[: r * (level + 1) * w].reshape(r, level + 1, w) for x in (self._planes, self._slopes))
        fw.keys[n].levels(fw.left[here], level, [planes[:, t] for t in range(level + 1)])
        self.values[n].levels(row.left[some], level, [slopes[:, t] for t in range(level + 1)])
        bias = None if self.head.bias is None else xp.asarray(self.head.bias[self.rows[here], keys])
        given = [x if x is None else xp.asarray(x) for x in (bias, sees, mask)]
        pointer = [np.uint64(0) if x is None else x for x in given]
        table, *ln2 = device.table
        log2e = (float(x[0, 0]) for x in (self.log2e.h, self.log2e.l))
        pairs = ((0.0, 0.0),) * 3 if self.gain is None or fw.cap is None else (*fw.cap, self.gain[0])
        by_row = (fw.shift[here], row.d.h[some, 0].copy(), row.d.l[some, 0].copy(), 1 / row.e[some])
        self._launch(
            "slope", r,
            (planes, slopes, np.int32(w), np.float64(fw.c), np.float64(fw.c_low), table, *map(np.float64, ln2),
             np.int32(self.gain is not None), *(np.float64(x) for pair in pairs for x in pair), self._gain,
             pointer[0], *map(np.float64, log2e), pointer[1], pointer[2], *by_row, *self._cuts(),
             held.left[some], held.left_low[some], held.size[some]),
        )  # fmt: skip
        return planes, slopes

    def _cuts(self) -> Iterator[np.float64]:
        return map(np.float64, [*self.sigma.tolist(), 0.0, 0.0, 0.0][:3])

    def _damp(self, slopes: Any) -> None:
        """Multiply products by the softcap's slopes that were noted with them."""
        (r, _, w), threads = slopes.shape, self.f.device.threads
        self._launch(
            "damp", max(1, -(-r * w // threads)), (slopes, np.int32(r), np.int32(w), self._gain, *self._cuts())
        )

    def _by_row(self, n: int, some: slice, slopes: Any, held: Held) -> None:
        """Add what these keys give to dq of some rows."""
        level, r, d = self.f.level, some.stop - some.start, self.head.k.shape[1]
        parts = self._for_rows[: (level + 1) * r * d].reshape(level + 1, r, d)
        self.keys[n].levels(slopes.reshape(r, -1), level, list(parts))
        self._add(parts, level + 1, r, d, d, held.dq[some], held.dq_low[some])

    def _radii(self, n: int, some: slice, planes: Any, slopes: Any, row: Row, by_z: Any, sums: KeySums) -> None:
        """Add to what the radii of some keys need of some rows."""
        xp, (r, _, w), keys = self.f.xp, planes.shape, self.tiles[n]
        omega, relative, threads = row.omega[some], row.relative_g[some], self.f.device.threads
        parts, across = -(-r // EACH), -(-w // threads)
        out = xp.empty((parts, 5, w))
        given = (np.int32(r), np.int32(w), np.int32(across), np.int32(EACH), omega, relative, out)
        self._launch("by_key", parts * across, (planes, slopes, *given))
        # half a place of a head is missing in each
        half = 2.0**-self.width
        columns = out.sum(0).T + half * np.concatenate([omega.sum(0), relative.sum(0)[None]])
        sums.weights[keys] += columns[:, :3]
        by_z[keys] = columns[:, 3]
        sums.products[keys] += columns[:, 4]

    def _by_key(self, n: int, some: slice, heads: Any, last: Any, planes: Any, h: Any, low: Any) -> None:
        """Add what some rows give to dk or dv of some keys: part by part, level by level."""
        level, keys, at_a_time = self.f.level, self.tiles[n], self.rows_at_a_time
        (width, _), (r, _, w) = h.shape, planes.shape
        starts = range(0, r, at_a_time)
        count = _pairs(level) * len(starts)
        parts, k = self._for_keys[: count * width * w].reshape(count, width, w), 0
        for start in starts:
            here = planes[start : start + at_a_time]
            rows = slice(some.start + start, some.start + start + len(here))
            for t in range(level):
                for s in range(t + 1):
                    self.f.device.matmul(heads[s][:, rows], here[:, t - s], parts[k])
                    k += 1
            wide = slice(rows.start * (level + 1), rows.stop * (level + 1))
            self.f.device.matmul(last[:, wide], here.reshape(len(here) * (level + 1), w), parts[k])
            k += 1
        self.added[n] += count if h is self.all[0].dk else 0
        self._add(parts, count, width, w, h.shape[1], h[:, keys], low[:, keys])

    def _add(self, parts: Any, count: int, rows: int, width: int, pitch: int, h: Any, low: Any) -> None:
        blocks, stride = max(1, -(-rows * width // self.f.device.threads)), np.int64(rows * width)
        sizes = (np.int32(count), stride, np.int32(rows), np.int32(width), np.int64(pitch))
        self._launch("add_all", blocks, (parts, *sizes, h, low))

    def _bias(self, n: int, at: slice, some: slice, planes: Any, slopes: Any, row: Row) -> None:
        """Hand on the gradient by the scores of some rows and keys."""
        here, keys = slice(at.start + some.start, at.start + some.stop), self.tiles[n]
        seen = self.f.xp.asarray(np.asarray(self.head.allowed[self.rows[here], keys]))
        self.dbias(here, keys, row.by_score(planes, slopes, some).where(seen))

    def _launch(self, name: str, blocks: int, given: tuple[Any, ...]) -> None:
        self.f.device.launch(self.f.level, name, blocks, given, text_back)


def _side_by_side(tails: Any) -> Any:
    """Return the rounded level's left operand (d, r (L + 1)): by row, the tails that meet a row's planes in turn."""
    wide = np.stack(tails[::-1], -1)
    return wide.reshape(wide.shape[0], -1)
