"""Gradients of softmax attention of one head by tiles, in enclosures: the tape over a level, in O(n d) memory.

With weights w_ij = 2**(t_ij - m_i), z_i their sum, X_ij = dout_i·v_j - dout_i·out_i, and
G_ij = w_ij X_ij / e_i with e_i a power of two above |X_ij|:

    dq_i = scale (e_i / z_i) sum_j G_ij k_j
    dk_j = scale sum_i G_ij (e_i q_i / z_i)
    dv_j = sum_i w_ij (dout_i / z_i)

A gradient that arrives at lse is taken off dout_i·out_i. With a softcap G_ij comes times its slope in dq and dk. The
forward pass gives m, z and out. The bounds are those of ``stream.py`` (docs/proofs/streaming.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rules import View
from . import elementwise, stream, tiles
from .anywhere import beside, largest
from .doubledouble import EXP2_FLOOR, U
from .heads import Head, numbers_of
from .keys import Arriving, Rows, column
from .levels import ETA, UP, Bounded, Level, gamma, head_bits
from .right import Right
from .row import Row
from .stream import SLACK, Forward, each, each_tile, forward_pass

__all__ = ["AT_A_TIME", "Backward", "Held", "KeySums", "backward", "gain_of"]

Float = NDArray[np.float64]
AT_A_TIME = 2**13
"""Keys whose gradients are finished at a time: the steps' temporary arrays are of so many."""


def backward(
    one: Head,
    f: Level,
    rows: NDArray[np.intp],
    arriving: Arriving,
    threads: int,
    dbias: Callable[[slice, slice, Bounded], None] | None = None,
    forward: Forward | None = None,
) -> tuple[dict[str, Any], Rows]:
    """Return out, lse, dq, dk, dv and dsink of some rows as enclosures, and what these rows know.

    Parameters
    ----------
    one : Head
        One head.
    f : Level
        The level.
    rows : integer array
        The rows to count, each with at least one key.
    arriving : Arriving
        The gradients arriving at these rows.
    threads : int
        Tiles of rows to work on at a time.
    dbias : callable, optional
        Takes the gradient by the scores, tile by tile: which of the rows, which keys, and the numbers.
    forward : Forward, optional
        The forward pass of these rows, where it is there already.
    """
    if f.device is not None:
        there: tuple[dict[str, Any], Rows] = f.device.backward(one, f, rows, arriving, dbias, forward)
        return there
    work = Backward(forward or forward_pass(one, f, rows, threads), arriving, dbias, threads)
    if work.pieces:
        each(work.gathered, tiles.groups(len(rows)), threads)
    else:
        each_tile(len(rows), work.tile, threads)
    with np.errstate(all="ignore"):
        return work.finish(), Rows(rows, column(f, work.forward.lse), column(f, work.d))


class KeySums:
    """One thread's part of dk and dv, transposed, and what their radii need."""

    def __init__(self, d: int, d_v: int, n_k: int, apart: int = 1, xp: Any = np) -> None:
        self.dk, self.dk_low, self.dv, self.dv_low = (xp.zeros((w, n_k)) for w in (d, d, d_v, d_v))
        self.weights, self.products = xp.zeros((n_k, 3)), xp.zeros(n_k)
        # by column, of all keys or of each tile apart; and how many pieces of rows each tile had
        self.lost_k, self.lost_v, self.pieces = xp.zeros((apart, d)), xp.zeros((apart, d_v)), np.zeros(apart)
        self.most_k, self.most_v = xp.zeros((2, d)), xp.zeros((2, d_v))


@dataclass
class Held(tiles.Kept):
    """What rows have so far: dq and the sums of G as two numbers each, the sums of |G|, and the tiles added."""

    dq: Float
    dq_low: Float
    left: Float
    left_low: Float
    size: Float
    done: Float

    @classmethod
    def of(cls, r: int, d: int, xp: Any = np) -> Held:
        """Return those of rows that have seen no key."""
        return cls(xp.zeros((r, d)), xp.zeros((r, d)), *(xp.zeros(r) for _ in range(4)))


class Backward:
    """One head's operands and results."""

    def __init__(self, forward: Forward, arriving: Arriving, dbias: Any, threads: int) -> None:
        self.head, self.f, self.rows = one, f, rows = forward.head, forward.f, forward.rows
        level, xp, k = f.level, f.xp, one.k
        self.forward, self.dout, self.dbias = forward, xp.asarray(arriving.out), dbias
        self.dlse = None if arriving.lse is None else xp.asarray(arriving.lse)
        self.gain = None if forward.cap is None else gain_of(forward)
        self.by_tails = 2 * U * (1 if self.gain is None else 2)  # with a softcap a product is cut, so rounded, twice
        self.tiles = self.forward.tiles
        self.pieces = f.device is None and isinstance(one.allowed, View) and dbias is None
        here = tiles.MOST_ROWS if self.pieces else stream.tile_sizes()[0]
        self.rows_at_a_time = here if f.device is None else f.device.keys
        self.width = head_bits(max(min(forward.wide, len(k)), self.rows_at_a_time), level)
        self.sigma = np.array([1.5 * 2.0 ** (52 - self.width - s * (self.width + 1)) for s in range(level)])
        self.across = head_bits(one.v.shape[1], level)
        self.of_values, of_keys = self.operands(threads)
        self.norm_v = max(x.norm[0] for x in self.of_values)
        self.most_k = np.max(np.stack([x.most for x in of_keys]), 0)
        self.sums_k = np.sum(np.stack([x.sums for x in of_keys]), 0) * (1 + 2.0**-30)
        # bounds of a weight's heads and tail, and of a product's
        steps = (2.0 ** -(self.width + s * (self.width + 1) + 1) for s in range(level))
        self.steps = [x * SLACK for x in (1.0, *steps)]
        scale = one.options(Level(level), slice(0, 1)).scale
        self.scale = Bounded(f, *map(xp.asarray, (scale.h, scale.l, scale.r)))
        self.dq, self.d, self.e = (xp.zeros((len(rows), *x)) for x in ((k.shape[1], 3), (3,), ()))
        self.local = threading.local()
        self.all: list[KeySums] = []
        self.lock = threading.Lock()

    def operands(self, threads: int) -> tuple[list[Right], list[Right]]:
        """Cut values and keys by tiles; return those that bounds are made of."""
        k, v, f = self.head.k, self.head.v, self.f
        self.values = each(lambda t: Right(v[t], f, self.across), self.tiles, threads)
        self.keys = each(lambda t: Right(k[t].T, f, self.width), self.tiles, threads)
        return self.values, self.keys

    def terms(self, rows: int) -> int:
        """Return how many roundings a sum over rows goes through in one product, at most."""
        return rows

    def _sums(self) -> KeySums:
        if not hasattr(self.local, "sums"):
            apart = len(self.tiles) if self.pieces else 1
            self.local.sums = KeySums(self.head.k.shape[1], self.head.v.shape[1], len(self.head.k), apart)
            with self.lock:
                self.all.append(self.local.sums)
        sums: KeySums = self.local.sums
        return sums

    def tile(self, at: slice) -> None:
        """Compute one tile of rows."""
        with np.errstate(all="ignore"):
            row = Row(self, at)
            self._tile(at, row, self._sums())

    def _tile(self, at: slice, row: Row, sums: KeySums) -> None:
        rows, by_z = self.rows[at], np.zeros(len(self.head.k))
        held = Held.of(len(rows), self.head.k.shape[1])
        for n, seen in enumerate(tiles.seen(self.head.allowed, rows, self.tiles, self.forward.whole)):
            if seen is None or seen.any():
                self._add_tile(n, row, seen, held, sums, by_z)
        sums.weights[:, 1] += self.finish_rows(row, held) * by_z * UP
        self.loses(row, sums)

    def gathered(self, at: slice) -> None:
        """Compute a group of rows by what a rule says: of each tile of keys, the rows that see some of it."""
        sums, by_z, first = self._sums(), np.zeros(len(self.head.k)), at.start
        held = Held.of(at.stop - first, self.head.k.shape[1])
        parts = [np.arange(i, min(i + tiles.ROWS, at.stop)) for i in range(first, at.stop, tiles.ROWS)]
        with np.errstate(all="ignore"):
            for part in parts:
                row = Row(self, part)
                self.d[part], self.e[part] = numbers_of(row.d)[:, 0], row.e
            for n in range(len(self.tiles)):
                for lines, seen in self.forward.seeing(n, at):
                    row, mine = Row(self, first + lines, known=True), held.some(lines)
                    self._add_tile(n, row, seen, mine, sums, by_z)
                    held.put(lines, mine)
                    self.loses(row, sums, n)
                    sums.pieces[n] += 1
            off = [self.finish_rows(Row(self, part, known=True), held.some(part - first)) for part in parts]
            sums.weights[:, 1] += max(off) * by_z * UP

    def finish_rows(self, row: Row, held: Held) -> Any:
        """Write dq and a better dout·out of some rows; return how far off that was that is in their sums, at most."""
        self.d[row.at], off = row.better_d(held.left, held.left_low, held.size, held.done)
        self.dq[row.at] = row.dq(held.dq, held.dq_low, held.size, off, held.done)
        return largest(off, 0)

    def _room(self, r: int, w: int) -> tuple[list[Float], list[Float], Float, Float]:
        """Return memory for the numbers of a tile, kept while its size stays."""
        level, d = self.f.level, self.head.k.shape[1]
        if getattr(self.local, "size", None) != (r, w):
            planes = [np.empty((r, level + 1, w)) for _ in range(2)]
            wide, narrow = (
                [np.empty((r, w)) for _ in range(2 * level + (6 if self.gain is None else 8))],
                [np.empty((r, d)) for _ in range(level + 1)],
            )
            self.local.size, self.local.room = (r, w), (wide, narrow, *planes)
        return self.local.room  # type: ignore[no-any-return]

    def _add_tile(self, n: int, row: Row, seen: Any, held: Held, sums: KeySums, by_z: Float) -> None:
        """Add a tile of keys to the sums of some rows, and these rows to the sums of its keys."""
        fw, step, level, keys, at = self.forward, elementwise.steps(), self.f.level, self.tiles[n], row.at
        r = len(held.dq)
        room, part, weights, products = self._room(r, keys.stop - keys.start)
        c, g_levels = room[: level + 1], room[level + 1 : 2 * level + 2]
        h, low, g, g_low, *gain = room[2 * level + 2 :]
        fw.scores(n, at, seen, c, h, low, None if self.gain is None else (self.gain[0], *gain))
        self.values[n].levels(row.left, level, g_levels)
        step.scores(g_levels, 1.0, 0.0, g, g_low)
        d = (row.d.h[:, 0], row.d.l[:, 0])
        step.gradient_weights(h, low, fw.shift[at], g, g_low, *d, 1 / row.e, self.sigma, weights, products)
        row_sums = np.empty((r, level + 1))
        step.row_sums(products, row_sums)
        for s in range(level + 1):
            elementwise.accumulate(held.left, held.left_low, row_sums[:, s])
        held.done += 1
        columns = weights[:, 0].T @ row.omega + 2.0**-self.width * row.omega.sum(0)
        sums.weights[keys] += columns[:, :3]
        by_z[keys] += columns[:, 3]
        np.abs(products[:, 0], out=h)
        held.size += h.sum(1)
        sums.products[keys] += h.T @ row.relative_g + 2.0**-self.width * row.relative_g.sum()
        if self.dbias is not None:
            self.dbias(at, keys, row.by_score(weights, products).where(seen))
        if self.gain is not None:
            step.damped(products, *gain, self.sigma)
        self.keys[n].levels(products.reshape(r, -1), level, part)
        for x in part:
            step.accumulate(held.dq, held.dq_low, x)
        self._by_keys(row, weights, products, keys, sums, step)

    def _by_keys(self, row: Row, weights: Float, products: Float, keys: slice, sums: KeySums, step: Any) -> None:
        """Add what these rows give to dk and dv of some keys, level by level."""
        level = self.f.level
        for (heads, tails), planes, total, total_low in (
            (row.q, products, sums.dk, sums.dk_low),
            (row.dout, weights, sums.dv, sums.dv_low),
        ):
            for t in range(level + 1):
                if t < level:
                    pairs = [(heads[s], t - s) for s in range(t + 1)]
                else:
                    pairs = [(tails[level - s], s) for s in range(level + 1)]
                _product(pairs, planes, total[:, keys], total_low[:, keys], step)

    def loses(self, row: Row, sums: KeySums, n: int = 0) -> None:
        """Add what the rounded level loses over these rows, to that of all keys or of one tile.

        That is by column, and of all but the first plane, which goes by key.
        """
        level, r = self.f.level, len(row.e)
        for (_, tails), lost, most in (
            (row.q, sums.lost_k, sums.most_k),
            (row.dout, sums.lost_v, sums.most_v),
        ):
            one = [np.abs(t).sum(1) * (1 + 2.0**-30) for t in tails]
            for s in range(1, level + 1):
                lost[n] += gamma(self.terms(r) + 2 * level + 6) * self.steps[s] * one[level - s] * UP
            if level:
                lost[n] += self.by_tails * self.steps[level] * one[0] * UP
            np.maximum(most, np.stack([largest(np.abs(t), 1) for t in (tails[0], tails[level])]), out=most)

    @property
    def additions(self) -> int:
        """How often something is added to dk and dv of a key, at most."""
        times = len(self.rows) // self.rows_at_a_time
        if self.pieces:
            times = int(np.sum([s.pieces for s in self.all], 0).max(initial=0))
        return 2 * (len(self.all) - 1) + (times + 2) * (self.f.level + 1)

    def _lost(self, name: str) -> Any:
        """Return what the rounded level loses, one row for all keys or one for each."""
        lost: Any = sum(getattr(s, f"lost_{name[1]}") for s in self.all)
        if not self.pieces:
            return lost
        by_key = np.zeros((len(self.head.k), lost.shape[1]))
        for keys, x in zip(self.tiles, lost, strict=True):
            by_key[keys] = x
        return by_key

    def finish(self) -> dict[str, Any]:
        """Add up the threads' parts."""
        f, fw, one, step = self.f, self.forward, self.head, elementwise.steps()
        first, *others = self.all
        for x in others:
            for name in ("dk", "dv"):
                for part in (name, f"{name}_low"):
                    step.accumulate(getattr(first, name), getattr(first, f"{name}_low"), getattr(x, part))
        adds = 4 * self.additions * U * U
        y: Any = sum(s.weights for s in self.all) * SLACK
        y[:, 1] += sum(s.products for s in self.all) * SLACK
        rounding = gamma(self.terms(self.rows_at_a_time) + 2 * f.level + 6) + (0 if f.level else self.by_tails)
        results: dict[str, Any] = {}
        own = {
            "dk": largest(np.abs(f.array(one.q[beside(one.q, self.rows)]).h), 0),
            "dv": largest(np.abs(self.dout), 0),
        }
        for name, at in (("dk", 1), ("dv", 0)):
            lost = self._lost(name)
            most, tail = reduce(np.maximum, (getattr(s, f"most_{name[1]}") for s in self.all))
            floor = len(self.rows) * 2.0 ** (EXP2_FLOOR + 1)
            found = []
            for start in range(0, max(len(y), 1), AT_A_TIME):
                some = slice(start, start + AT_A_TIME)
                r = np.outer(y[some, at], own[name]) + np.outer(y[some, 2], rounding * tail + 2 * adds * most)
                r = (r + floor * most + (lost[some] if len(lost) == len(y) else lost)) * UP + ETA
                h, low = (getattr(first, name + part)[:, some].T for part in ("", "_low"))
                few = Bounded(f, h, low, np.where(own[name] == 0, 0.0, r))
                found.append(few * self.scale if name == "dk" else few)
            whole = (np.concatenate([getattr(part, number) for part in found]) for number in ("h", "l", "r"))
            results[name] = found[0] if len(found) == 1 else Bounded(f, *whole)
        results["dq"], results["out"], results["lse"] = self.dq, fw.out, fw.lse
        if one.sink is not None:
            s = f.number(one.sink) * f.log2e
            p = ((s - f.array(fw.shift[:, None])) * fw.ln2).exp() / column(f, fw.sums)
            results["dsink"] = -(p * column(f, self.d)).T.sum()
        return results


def gain_of(forward: Forward) -> tuple[tuple[float, float], Float]:
    """Return 1 / softcap in base 2 as two numbers, and what the softcap's slopes are off by, one a row.

    A slope is 1 - y**2 of y = tanh, which is off by a score's radius over the cap (docs/proofs/streaming.md).
    """
    host = Level(forward.f.level)
    per = host.number(1) / (host.number(forward.head.problem.softcap) * host.log2e)
    h, low, r = (float(np.ravel(x)[0]) for x in (per.h, per.l, per.r))
    off = forward.radius * (h * UP)
    return (h, low), (off * (2 + off) + 2 * r / h + 128 * U * U) * UP


def _product(pairs: list[tuple[Float, int]], planes: Float, h: Float, low: Float, step: Any) -> None:
    """Add the products of one level, each with one plane of the weights, to a double-double in place."""
    (first, s), *rest = pairs
    x = first @ planes[:, s]
    for a, s in rest:
        x += a @ planes[:, s]
    step.accumulate(h, low, x)
