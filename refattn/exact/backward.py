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
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import elementwise, stream, tiles
from .anywhere import beside, largest
from .doubledouble import EXP2_FLOOR, U, two_sum
from .heads import Head
from .keys import Rows, column
from .levels import ETA, UP, Bounded, Level, gamma, head_bits
from .stream import SLACK, Forward, Right, each, each_tile, forward_pass, norms, product_sizes

__all__ = ["Backward", "KeySums", "Row", "backward"]

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
    if f.device is not None:
        there: tuple[dict[str, Any], Rows] = f.device.backward(one, f, rows, dout, dbias, forward)
        return there
    work = Backward(forward or forward_pass(one, f, rows, threads), dout, dbias, threads)
    each_tile(len(rows), work.tile, threads)
    with np.errstate(all="ignore"):
        return work.finish(), Rows(rows, column(f, work.forward.lse), column(f, work.d))


def _full(x: Bounded) -> Float:
    return np.broadcast_to(x.r, x.h.shape)


class KeySums:
    """One thread's part of dk and dv, transposed, and what their radii need."""

    def __init__(self, d: int, d_v: int, n_k: int, xp: Any = np) -> None:
        self.dk, self.dk_low, self.dv, self.dv_low = (xp.zeros((w, n_k)) for w in (d, d, d_v, d_v))
        self.weights, self.products = xp.zeros((n_k, 3)), xp.zeros(n_k)
        self.lost_k, self.lost_v = xp.zeros(d), xp.zeros(d_v)
        self.most_k, self.most_v = xp.zeros((2, d)), xp.zeros((2, d_v))


class Backward:
    """One head's operands and results."""

    def __init__(self, forward: Forward, dout: Float, dbias: Any, threads: int) -> None:
        self.head, self.f, self.rows = one, f, rows = forward.head, forward.f, forward.rows
        self.forward, self.dout, self.dbias = forward, f.xp.asarray(dout), dbias
        level, xp, k = f.level, f.xp, one.k
        self.tiles = self.forward.tiles
        self.rows_at_a_time = stream.tile_sizes()[0] if f.device is None else f.device.keys
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
        self.dq, self.d = xp.zeros((len(rows), k.shape[1], 3)), xp.zeros((len(rows), 3))
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
            self.local.sums = KeySums(self.head.k.shape[1], self.head.v.shape[1], len(self.head.k))
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
        one, fw, step, level = self.head, self.forward, elementwise.steps(), self.f.level
        rows = self.rows[at]
        r = len(rows)
        dq, dq_low = np.zeros((r, one.k.shape[1])), np.zeros((r, one.k.shape[1]))
        part = [np.empty((r, one.k.shape[1])) for _ in range(level + 1)]
        left_over, left_over_low, row_sums = np.zeros(r), np.zeros(r), np.empty((r, level + 1))
        by_z, g_size = np.zeros(len(one.k)), np.zeros(r)
        done, wide, known = 0, 0, tiles.seen(one.allowed, rows, self.tiles, fw.whole)
        for n, (keys, seen) in enumerate(zip(self.tiles, known, strict=True)):
            if seen is not None and not seen.any():
                continue
            w, done = keys.stop - keys.start, done + 1
            if w != wide:
                wide, room = w, [np.empty((r, w)) for _ in range(2 * level + 6)]
                weights, products = np.empty((r, level + 1, w)), np.empty((r, level + 1, w))
            c, g_levels = room[: level + 1], room[level + 1 : 2 * level + 2]
            h, low, g, g_low = room[2 * level + 2 :]
            fw.scores(n, at, seen, c, h, low)
            self.values[n].levels(row.left, level, g_levels)
            step.scores(g_levels, 1.0, 0.0, g, g_low)
            d = (row.d.h[:, 0], row.d.l[:, 0])
            step.gradient_weights(h, low, fw.shift[at], g, g_low, *d, 1 / row.e, self.sigma, weights, products)
            self.keys[n].levels(products.reshape(r, -1), level, part)
            for x in part:
                step.accumulate(dq, dq_low, x)
            step.row_sums(products, row_sums)
            for s in range(level + 1):
                elementwise.accumulate(left_over, left_over_low, row_sums[:, s])
            self._by_keys(row, weights, products, keys, sums, step)
            columns = weights[:, 0].T @ row.omega + 2.0**-self.width * row.omega.sum(0)
            sums.weights[keys] += columns[:, :3]
            by_z[keys] = columns[:, 3]
            np.abs(products[:, 0], out=h)
            g_size += h.sum(1)
            sums.products[keys] += h.T @ row.relative_g + 2.0**-self.width * row.relative_g.sum()
            if self.dbias is not None:
                self.dbias(at, keys, row.by_score(weights, products).where(seen))
        self.d[at], off = row.better_d(left_over, left_over_low, g_size, done)
        self.dq[at] = row.dq(dq, dq_low, g_size, off, done)
        self.loses(row, sums, r, off, by_z)

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

    def loses(self, row: Row, sums: KeySums, r: int, off: Any, by_z: Any) -> None:
        """Add what d's error costs each key, and what the rounded level loses over these rows.

        That is by column, and of all but the first plane, which goes by key.
        """
        level = self.f.level
        sums.weights[:, 1] += largest(off, 0) * by_z * UP
        for (_, tails), lost, most in (
            (row.q, sums.lost_k, sums.most_k),
            (row.dout, sums.lost_v, sums.most_v),
        ):
            one = [np.abs(t).sum(1) * (1 + 2.0**-30) for t in tails]
            for s in range(1, level + 1):
                lost += gamma(self.terms(r) + 2 * level + 6) * self.steps[s] * one[level - s] * UP
            if level:
                lost += 2 * U * self.steps[level] * one[0] * UP
            np.maximum(most, np.stack([largest(np.abs(t), 1) for t in (tails[0], tails[level])]), out=most)

    @property
    def additions(self) -> int:
        """How often something is added to dk and dv of a key, at most."""
        return 2 * (len(self.all) - 1) + (len(self.rows) // self.rows_at_a_time + 2) * (self.f.level + 1)

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
        rounding = gamma(self.terms(self.rows_at_a_time) + 2 * f.level + 6) + (0 if f.level else 2 * U)
        results: dict[str, Any] = {}
        own = {
            "dk": largest(np.abs(f.array(one.q[beside(one.q, self.rows)]).h), 0),
            "dv": largest(np.abs(self.dout), 0),
        }
        for name, at in (("dk", 1), ("dv", 0)):
            lost = sum(getattr(s, f"lost_{name[1]}") for s in self.all)
            most, tail = reduce(np.maximum, (getattr(s, f"most_{name[1]}") for s in self.all))
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


class Row:
    """What one tile of rows needs beside its scores, and what it loses."""

    def __init__(self, work: Backward, at: slice) -> None:
        self.work, f, fw, level = work, work.f, work.forward, work.f.level
        dout = work.dout[at]
        self.arriving = dout.any(1)
        out = Bounded(f, *np.moveaxis(fw.out[at], -1, 0))
        z = column(f, fw.sums[at])
        self.z = np.abs(z.h[:, 0]) * (1 + 2.0**-30)
        self.d = (f.array(dout) * out).sum()
        heads, tails = f.array(dout)._cut(work.across, level)
        self.left = np.concatenate([*heads, tails[level]], 1)
        lost = product_sizes([*heads, tails[level]], work.of_values)
        lost = gamma(dout.shape[1] * (level + 1) + level + 4) * lost
        self.size = (norms(dout) * work.norm_v + np.abs(self.d.h[:, 0])) * UP + ETA
        self.e = np.ldexp(np.ones_like(self.size), np.frexp(self.size)[1])
        # the shift may be the sink's, and then larger than the scores
        self.weight = fw.relative[at] + 8 * U * U * (np.abs(fw.shift[at]) + 2 * fw.size[at])
        # the error of X for the d that is used
        self.lost_x = (lost + (2.0**-98 + 64 * U * U) * self.size) * UP
        self.inverse = inverse = f.number(1) / z
        relative = self.weight + inverse.r[:, 0] / np.abs(inverse.h[:, 0]) + 2.0**-98
        per_z = np.abs(inverse.h[:, 0]) * UP
        self.omega = np.stack([relative * per_z, self.lost_x * per_z, np.ones_like(per_z), per_z], 1) * UP
        self.relative_g = relative * self.e * per_z * UP
        self.q = self._turned(f.array(work.head.q[beside(work.head.q, work.rows[at])]).h * self.e[:, None])
        self.dout = self._turned(dout)

    def _turned(self, x: Float) -> tuple[list[Float], list[Float]]:
        """Return heads and tails of x / z, cut along its columns and transposed."""
        f = self.work.f
        return (f.array(x) * self.inverse).T._cut(self.work.width, f.level)

    def _scaled(self, some: slice = slice(None)) -> Bounded:
        """Return e / z of some rows, (r, 1)."""
        e, x = self.e[some, None], self.inverse
        return Bounded(self.work.f, x.h[some] * e, x.l[some] * e, x.r[some] * e)

    def _size(self, s: int) -> Float:
        """Return a bound of the sum over keys of a plane of the products, one a row."""
        n_k, steps = len(self.work.head.k), self.work.steps
        if s:
            return np.minimum(self.z * SLACK, n_k * steps[s])
        return np.minimum(self.z * UP + (n_k * steps[1] if len(steps) > 1 else 0.0), float(n_k))

    def _adds(self, done: int) -> float:
        return 4 * done * (self.work.f.level + 1) * U * U

    def _off(self, g_size: Float) -> Float:
        """Return what the sums of w X are off by, for the d that is used, from the sums of |G|."""
        sizes = np.minimum(g_size * SLACK + len(self.work.head.k) * 2.0**-self.work.width, self.z * SLACK)
        off: Float = self.weight * self.e * sizes + self.lost_x * self.z
        return off

    def dq(self, h: Float, low: Float, g_size: Float, off: Float, done: int) -> Float:
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
        r = np.where(self.arriving[:, None] & (work.most_k[0] > 0)[None], r, 0.0)
        x = Bounded(f, h, low, r) * self._scaled() * work.scale
        return np.stack([x.h, *(np.broadcast_to(v, x.h.shape) for v in (x.l, x.r))], -1)

    def better_d(self, h: Float, low: Float, g_size: Float, done: int) -> tuple[Float, Float]:
        """Return dout·out from the rows' sums of G, which would be 0 for the true one, and how far off it was."""
        work, f, fw, level, d = self.work, self.work.f, self.work.forward, self.work.f.level, self.d
        off = _full(d)
        if work.head.sink is None:
            r = self._off(g_size) / self.e + self._adds(done) * self.z + len(work.head.k) * 2.0 ** (EXP2_FLOOR + 1)
            r = r + (f.steps.row_sum_error(fw.wide) + 2 * U) * self._size(level)
            more = Bounded(f, h[:, None], low[:, None], r[:, None] * SLACK * UP + ETA) * self._scaled()
            d, off = Bounded(f, d.h, d.l, f.xp.zeros((1, 1))) + more, (np.abs(more.h) + more.r) * SLACK
        return np.concatenate([d.h, d.l, _full(d)], 1), off[:, 0]

    def by_score(self, weights: Float, products: Float, some: slice = slice(None)) -> Bounded:
        """Return dS of a tile of keys and of some of the rows."""
        f, level = self.work.f, self.work.f.level
        h, low = products[:, 0], np.zeros_like(products[:, 0])
        for s in range(1, level + 1):
            h, e = two_sum(h, products[:, s])
            low = low + e
        h, low = two_sum(h, low)
        size = weights[:, 0] + self.work.steps[1] if level else weights[:, 0]
        lost_x = ((self.lost_x + _full(self.d)[:, 0]) / self.e)[some, None]
        r = (np.abs(h) * self.weight[some, None] + size * lost_x) * SLACK + 2.0 ** (EXP2_FLOOR + 1)
        r = r + 4 * U * self.work.steps[level]
        return Bounded(f, h, low, r) * self._scaled(some)


def _product(pairs: list[tuple[Float, int]], planes: Float, h: Float, low: Float, step: Any) -> None:
    """Add the products of one level, each with one plane of the weights, to a double-double in place."""
    (first, s), *rest = pairs
    x = first @ planes[:, s]
    for a, s in rest:
        x += a @ planes[:, s]
    step.accumulate(h, low, x)
