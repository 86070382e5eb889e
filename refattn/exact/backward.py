"""Gradients of softmax attention of one head by tiles, in enclosures: the tape over a level, in O(n d) memory.

With weights w_ij = 2**(t_ij - m_i), z_i their sum, X_ij = dout_i·v_j - dout_i·out_i, and
G_ij = w_ij X_ij / e_i with e_i a power of two above |X_ij|:

    dq_i = scale (e_i / z_i) sum_j G_ij k_j
    dk_j = scale sum_i G_ij (e_i q_i / z_i)
    dv_j = sum_i w_ij (dout_i / z_i)

The forward pass gives m, z and out. The bounds are those of ``stream.py`` (docs/proofs/streaming.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rules import View
from . import elementwise, stream, tiles
from .doubledouble import EXP2_FLOOR, U, two_sum
from .heads import Head, numbers_of
from .keys import Rows, column
from .levels import ETA, UP, Bounded, Level, gamma, head_bits
from .stream import SLACK, Forward, Right, each, each_tile, forward_pass, norms, product_sizes

__all__ = ["backward"]

Float = NDArray[np.float64]


def backward(
    one: Head,
    f: Level,
    rows: NDArray[np.intp],
    dout: Float,
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
    dout : (len(rows), d_v) float64
        The gradient arriving at these rows.
    threads : int
        Tiles of rows to work on at a time.
    dbias : callable, optional
        Takes the gradient by the scores, tile by tile: which of the rows, which keys, and the numbers.
    forward : Forward, optional
        The forward pass of these rows, where it is there already.
    """
    work = _Backward(forward or forward_pass(one, f, rows, threads), dout, dbias, threads)
    if work.pieces:
        each(work.gathered, tiles.groups(len(rows)), threads)
    else:
        each_tile(len(rows), work.tile, threads)
    with np.errstate(all="ignore"):
        return work.finish(), Rows(rows, column(f, work.forward.lse), column(f, work.d))


def _full(x: Bounded) -> Float:
    return np.broadcast_to(x.r, x.h.shape)


class _Sums:
    """One thread's part of dk and dv, transposed, and what their radii need."""

    def __init__(self, d: int, d_v: int, n_k: int, n_tiles: int) -> None:
        self.dk, self.dk_low, self.dv, self.dv_low = (np.zeros((w, n_k)) for w in (d, d, d_v, d_v))
        self.weights, self.products = np.zeros((n_k, 3)), np.zeros(n_k)
        self.lost_k, self.lost_v, self.pieces = np.zeros((n_tiles, d)), np.zeros((n_tiles, d_v)), np.zeros(n_tiles)
        self.most_k, self.most_v = np.zeros((2, d)), np.zeros((2, d_v))


@dataclass
class _Held(tiles.Kept):
    """What rows have so far: dq and the sums of G as two numbers each, the sums of |G|, and the tiles added."""

    dq: Float
    dq_low: Float
    left: Float
    left_low: Float
    size: Float
    done: Float

    @classmethod
    def of(cls, r: int, d: int) -> _Held:
        """Return those of rows that have seen no key."""
        return cls(np.zeros((r, d)), np.zeros((r, d)), *(np.zeros(r) for _ in range(4)))


class _Backward:
    """One head's operands and results."""

    def __init__(self, forward: Forward, dout: Float, dbias: Any, threads: int) -> None:
        self.forward, self.dout, self.dbias = forward, dout, dbias
        self.head, self.f, self.rows = one, f, rows = forward.head, forward.f, forward.rows
        level, k, v = f.level, one.k, one.v
        self.tiles = self.forward.tiles
        self.pieces = isinstance(one.allowed, View) and dbias is None
        self.most_rows = tiles.MOST_ROWS if self.pieces else stream.tile_sizes()[0]
        self.width = head_bits(max(min(stream.tile_sizes()[1], len(k)), self.most_rows), level)
        self.sigma = np.array([1.5 * 2.0 ** (52 - self.width - s * (self.width + 1)) for s in range(level)])
        self.across = head_bits(v.shape[1], level)
        self.values = each(lambda t: Right(v[t], f, self.across), self.tiles, threads)
        self.keys = each(lambda t: Right(k[t].T, f, self.width), self.tiles, threads)
        self.norm_v = max(x.norm[0] for x in self.values)
        self.most_k, self.sums_k = np.max([x.most for x in self.keys], 0), np.sum([x.sums for x in self.keys], 0) * UP
        # bounds of a weight's heads and tail, and of a product's
        steps = (2.0 ** -(self.width + s * (self.width + 1) + 1) for s in range(level))
        self.steps = np.array([1.0, *steps]) * SLACK
        self.scale = one.options(f, slice(0, 1)).scale
        self.dq, self.d, self.e = np.zeros((len(rows), k.shape[1], 3)), np.zeros((len(rows), 3)), np.zeros(len(rows))
        self.local = threading.local()
        self.all: list[_Sums] = []
        self.lock = threading.Lock()

    def _sums(self) -> _Sums:
        if not hasattr(self.local, "sums"):
            self.local.sums = _Sums(self.head.k.shape[1], self.head.v.shape[1], len(self.head.k), len(self.tiles))
            with self.lock:
                self.all.append(self.local.sums)
        sums: _Sums = self.local.sums
        return sums

    def tile(self, at: slice) -> None:
        """Compute one tile of rows."""
        with np.errstate(all="ignore"):
            row = _Row(self, at)
            self._tile(at, row, self._sums())

    def _tile(self, at: slice, row: _Row, sums: _Sums) -> None:
        rows, by_z = self.rows[at], np.zeros(len(self.head.k))
        held = _Held.of(len(rows), self.head.k.shape[1])
        for n, seen in enumerate(tiles.seen(self.head.allowed, rows, self.tiles, self.forward.whole)):
            if seen is None or seen.any():
                self._add(n, row, seen, held, sums, by_z)
        sums.weights[:, 1] += self._finish(row, held) * by_z * UP
        self._loses(row, sums, slice(None))

    def gathered(self, at: slice) -> None:
        """Compute a group of rows by what a rule says: of each tile of keys, the rows that see some of it."""
        sums, by_z, first = self._sums(), np.zeros(len(self.head.k)), at.start
        held = _Held.of(at.stop - first, self.head.k.shape[1])
        parts = [np.arange(i, min(i + tiles.ROWS, at.stop)) for i in range(first, at.stop, tiles.ROWS)]
        with np.errstate(all="ignore"):
            for part in parts:
                row = _Row(self, part)
                self.d[part], self.e[part] = numbers_of(row.d)[:, 0], row.e
            for n in range(len(self.tiles)):
                for lines, seen in self.forward.seeing(n, at):
                    row, mine = _Row(self, first + lines, known=True), held.some(lines)
                    self._add(n, row, seen, mine, sums, by_z)
                    held.put(lines, mine)
                    self._loses(row, sums, n)
                    sums.pieces[n] += 1
            off = [self._finish(_Row(self, part, known=True), held.some(part - first)) for part in parts]
            sums.weights[:, 1] += max(off) * by_z * UP

    def _finish(self, row: _Row, held: _Held) -> float:
        """Write dq and a better dout·out of some rows; return how far off that was that is in their sums, at most."""
        self.d[row.at], off = row.better_d(held.left, held.left_low, held.size, held.done)
        self.dq[row.at] = row.dq(held.dq, held.dq_low, held.size, off, held.done)
        return float(off.max(initial=0.0))

    def _room(self, r: int, w: int) -> tuple[list[Float], list[Float], Float, Float]:
        """Return memory for the numbers of a tile, kept while its size stays."""
        level, d = self.f.level, self.head.k.shape[1]
        if getattr(self.local, "size", None) != (r, w):
            planes = [np.empty((r, level + 1, w)) for _ in range(2)]
            wide, narrow = (
                [np.empty((r, w)) for _ in range(2 * level + 6)],
                [np.empty((r, d)) for _ in range(level + 1)],
            )
            self.local.size, self.local.room = (r, w), (wide, narrow, *planes)
        return self.local.room  # type: ignore[no-any-return]

    def _add(self, n: int, row: _Row, seen: Any, held: _Held, sums: _Sums, by_z: Float) -> None:
        """Add a tile of keys to the sums of some rows, and these rows to the sums of its keys."""
        fw, step, level, keys, at = self.forward, elementwise.steps(), self.f.level, self.tiles[n], row.at
        r = len(held.dq)
        room, part, weights, products = self._room(r, keys.stop - keys.start)
        c, g_levels = room[: level + 1], room[level + 1 : 2 * level + 2]
        h, low, g, g_low = room[2 * level + 2 :]
        fw.scores(n, at, seen, c, h, low)
        self.values[n].levels(row.left, level, g_levels)
        step.scores(g_levels, 1.0, 0.0, g, g_low)
        d = (row.d.h[:, 0], row.d.l[:, 0])
        step.gradient_weights(h, low, fw.shift[at], g, g_low, *d, 1 / row.e, self.sigma, weights, products)
        self.keys[n].levels(products.reshape(r, -1), level, part)
        for x in part:
            step.accumulate(held.dq, held.dq_low, x)
        row_sums = np.empty((r, level + 1))
        step.row_sums(products, row_sums)
        for s in range(level + 1):
            elementwise.accumulate(held.left, held.left_low, row_sums[:, s])
        held.done += 1
        self._by_keys(row, weights, products, keys, sums, step)
        columns = weights[:, 0].T @ row.omega + 2.0**-self.width * row.omega.sum(0)
        sums.weights[keys] += columns[:, :3]
        by_z[keys] += columns[:, 3]
        np.abs(products[:, 0], out=h)
        held.size += h.sum(1)
        sums.products[keys] += h.T @ row.relative_g + 2.0**-self.width * row.relative_g.sum()
        if self.dbias is not None:
            self.dbias(at, keys, row.by_score(weights, products).where(seen))

    def _by_keys(self, row: _Row, weights: Float, products: Float, keys: slice, sums: _Sums, step: Any) -> None:
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

    def _loses(self, row: _Row, sums: _Sums, n: int | slice) -> None:
        """Add what the rounded level loses over rows, by column, in a tile or all: but the first plane, by key."""
        level, r = self.f.level, len(row.e)
        for (_, tails), lost, most in (
            (row.q, sums.lost_k, sums.most_k),
            (row.dout, sums.lost_v, sums.most_v),
        ):
            one = [np.abs(t).sum(1) * UP for t in tails]
            for s in range(1, level + 1):
                lost[n] += gamma(r + 2 * level + 6) * self.steps[s] * one[level - s] * UP
            if level:
                lost[n] += 2 * U * self.steps[level] * one[0] * UP
            np.maximum(most, [np.abs(t).max(1, initial=0.0) for t in (tails[0], tails[level])], out=most)

    def finish(self) -> dict[str, Any]:
        """Add up the threads' parts."""
        f, fw, one, step = self.f, self.forward, self.head, elementwise.steps()
        first, *others = self.all
        for x in others:
            for name in ("dk", "dv"):
                for part in (name, f"{name}_low"):
                    step.accumulate(getattr(first, name), getattr(first, f"{name}_low"), getattr(x, part))
        times = (
            np.sum([s.pieces for s in self.all], 0).max(initial=0) if self.pieces else len(self.rows) // self.most_rows
        )
        adds = 4 * (2 * len(others) + (times + 2) * (f.level + 1)) * U * U
        y = np.sum([s.weights for s in self.all], axis=0) * SLACK
        y[:, 1] += np.sum([s.products for s in self.all], axis=0) * SLACK
        rounding = gamma(self.most_rows + 2 * f.level + 6) + (0 if f.level else 2 * U)
        results: dict[str, Any] = {}
        own = {"dk": np.abs(one.q[self.rows]).max(0), "dv": np.abs(self.dout).max(0)}
        for name, at in (("dk", 1), ("dv", 0)):
            lost = np.zeros((len(one.k), len(own[name])))
            for keys, x in zip(self.tiles, np.sum([getattr(s, f"lost_{name[1]}") for s in self.all], 0), strict=True):
                lost[keys] = x
            most, tail = np.max([getattr(s, f"most_{name[1]}") for s in self.all], 0)
            floor = len(self.rows) * 2.0 ** (EXP2_FLOOR + 1)
            r = np.outer(y[:, at], own[name]) + np.outer(y[:, 2], rounding * tail + 2 * adds * most) + floor * most
            r = np.where(own[name] == 0, 0.0, (r + lost) * UP + ETA)
            results[name] = Bounded(f, getattr(first, name).T, getattr(first, f"{name}_low").T, r)
        results["dk"] = results["dk"] * self.scale
        results["dq"], results["out"], results["lse"] = self.dq, fw.out, fw.lse
        if one.sink is not None:
            s = f.number(one.sink) * f.log2e
            p = ((s - f.array(fw.shift[:, None])) * fw.ln2).exp() / column(f, fw.sums)
            results["dsink"] = -(p * column(f, self.d)).T.sum()
        return results


class _Row:
    """What one tile of rows needs beside its scores, and what it loses."""

    def __init__(self, work: _Backward, at: Any, known: bool = False) -> None:
        self.work, self.at, f, fw, level = work, at, work.f, work.forward, work.f.level
        dout = work.dout[at]
        self.arriving = dout.any(1)
        out = Bounded(f, *np.moveaxis(fw.out[at], -1, 0))
        z = column(f, fw.sums[at])
        self.z = np.abs(z.h[:, 0]) * (1 + 2.0**-30)
        self.d = column(f, work.d[at]) if known else (f.array(dout) * out).sum()
        heads, tails = f.array(dout)._cut(work.across, level)
        self.left = np.concatenate([*heads, tails[level]], 1)
        lost = product_sizes([*heads, tails[level]], work.values)
        lost = gamma(dout.shape[1] * (level + 1) + level + 4) * lost
        self.size = (norms(dout) * work.norm_v + np.abs(self.d.h[:, 0])) * UP + ETA
        self.e = work.e[at] if known else np.ldexp(1.0, np.frexp(self.size)[1])
        # the shift may be the sink's, and then larger than the scores
        self.weight = fw.relative[at] + 8 * U * U * (np.abs(fw.shift[at]) + 2 * fw.size[at])
        # the error of X for the d that is used
        self.lost_x = (lost + (2.0**-98 + 64 * U * U) * self.size) * UP
        self.inverse = inverse = f.number(1) / z
        relative = self.weight + inverse.r[:, 0] / np.abs(inverse.h[:, 0]) + 2.0**-98
        per_z = np.abs(inverse.h[:, 0]) * UP
        self.omega = np.stack([relative * per_z, self.lost_x * per_z, np.ones(len(dout)), per_z], 1) * UP
        self.relative_g = relative * self.e * per_z * UP
        self.q = self._turned(work.head.q[work.rows[at]] * self.e[:, None])
        self.dout = self._turned(dout)

    def _turned(self, x: Float) -> tuple[list[Float], list[Float]]:
        """Return heads and tails of x / z, cut along its columns and transposed."""
        f = self.work.f
        return (f.array(x) * self.inverse).T._cut(self.work.width, f.level)

    def _scaled(self) -> Bounded:
        """Return e / z, (r, 1)."""
        e, x = self.e[:, None], self.inverse
        return Bounded(self.work.f, x.h * e, x.l * e, x.r * e)

    def _size(self, s: int) -> Float:
        """Return a bound of the sum over keys of a plane of the products, one a row."""
        n_k, steps = len(self.work.head.k), self.work.steps
        if s:
            return np.asarray(np.minimum(self.z * SLACK, n_k * steps[s]))
        return np.asarray(np.minimum(self.z * UP + (n_k * steps[1] if len(steps) > 1 else 0.0), n_k))

    def _adds(self, done: Float) -> Float:
        return 4 * done * (self.work.f.level + 1) * U * U

    def _off(self, g_size: Float) -> Float:
        """Return what the sums of w X are off by, for the d that is used, from the sums of |G|."""
        sizes = np.minimum(g_size * SLACK + len(self.work.head.k) * 2.0**-self.work.width, self.z * SLACK)
        return np.asarray(self.weight * self.e * sizes + self.lost_x * self.z)

    def dq(self, h: Float, low: Float, g_size: Float, off: Float, done: Float) -> Float:
        """Return the rows' dq with its radius; d is off by `off`."""
        work, f, level, n_k = self.work, self.work.f, self.work.f.level, len(self.work.head.k)
        weight = (self._off(g_size) + off * self.z) / self.e + 2 * self._adds(done) * self.z
        weight = weight + n_k * 2.0 ** (EXP2_FLOOR + 1)

        def lost(s: int, tail: int) -> Float:
            by_row = np.outer(self._size(s), work.most_k[tail])
            return np.minimum(by_row, work.steps[s] * work.sums_k[tail]) if s else by_row

        rounded = sum(lost(s, level - s) for s in range(level + 1))
        r = np.outer(weight, work.most_k[0]) + 2 * U * lost(level, 0)
        r = (r + gamma(work.forward.wide * (level + 1) + level + 4) * rounded) * SLACK * UP + ETA
        r = np.where(np.outer(self.arriving, work.most_k[0] > 0), r, 0.0)
        x = Bounded(f, h, low, r) * self._scaled() * work.scale
        return np.stack([x.h, *(np.broadcast_to(v, x.h.shape) for v in (x.l, x.r))], -1)

    def better_d(self, h: Float, low: Float, g_size: Float, done: Float) -> tuple[Float, Float]:
        """Return dout·out from the rows' sums of G, which would be 0 for the true one, and how far off it was."""
        work, f, fw, level, d = self.work, self.work.f, self.work.forward, self.work.f.level, self.d
        off = _full(d)
        if work.head.sink is None:
            r = self._off(g_size) / self.e + self._adds(done) * self.z + len(work.head.k) * 2.0 ** (EXP2_FLOOR + 1)
            r = r + (elementwise.steps().row_sum_error(fw.wide) + 2 * U) * self._size(level)
            more = Bounded(f, h[:, None], low[:, None], r[:, None] * SLACK * UP + ETA) * self._scaled()
            d, off = Bounded(f, d.h, d.l, np.zeros((1, 1))) + more, (np.abs(more.h) + more.r) * SLACK
        return np.concatenate([d.h, d.l, _full(d)], 1), off[:, 0]

    def by_score(self, weights: Float, products: Float) -> Bounded:
        """Return dS of a tile of keys."""
        f, level = self.work.f, self.work.f.level
        h, low = products[:, 0], np.zeros_like(products[:, 0])
        for s in range(1, level + 1):
            h, e = two_sum(h, products[:, s])
            low = low + e
        h, low = two_sum(h, low)
        size = weights[:, 0] + self.work.steps[1] if level else weights[:, 0]
        lost_x = ((self.lost_x + _full(self.d)[:, 0]) / self.e)[:, None]
        r = (np.abs(h) * self.weight[:, None] + size * lost_x) * SLACK + 2.0 ** (EXP2_FLOOR + 1)
        r = r + 4 * U * self.work.steps[level]
        return Bounded(f, h, low, r) * self._scaled()


def _product(pairs: list[tuple[Float, int]], planes: Float, h: Float, low: Float, step: Any) -> None:
    """Add the products of one level, each with one plane of the weights, to a double-double in place."""
    (first, s), *rest = pairs
    x = first @ planes[:, s]
    for a, s in rest:
        x += a @ planes[:, s]
    step.accumulate(h, low, x)
