"""Gradients of softmax attention of one head by tiles, in enclosures: the tape over a tier, in O(n d) memory.

With weights w_ij = 2**(t_ij - m_i), z_i their sum, X_ij = dout_i·v_j - dout_i·out_i, and
G_ij = w_ij X_ij / e_i with e_i a power of two above |X_ij|:

    dq_i = scale (e_i / z_i) sum_j G_ij k_j
    dk_j = scale sum_i G_ij (e_i q_i / z_i)
    dv_j = sum_i w_ij (dout_i / z_i)

The forward pass gives m, z and out. The bounds are those of ``stream.py`` (docs/proofs/streaming.md).
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import stream
from .doubledouble import EXP2_FLOOR, U, fast_two_sum
from .slabs import Slab
from .stream import SLACK, Forward, Right, each_tile
from .tiers import ETA, UP, Bounded, Tier, gamma, head_bits

__all__ = ["backward", "goes_back"]

Float = NDArray[np.float64]


def goes_back(slab: Slab) -> bool:
    """Tell whether this path knows a call: softmax attention without softcap and bias."""
    return stream.streams(slab) and slab.bias is None


def backward(
    slab: Slab, f: Tier, rows: NDArray[np.intp], dout: Float, threads: int, keys: NDArray[np.intp] | None = None
) -> dict[str, Any]:
    """Return out, lse, dq, dk, dv and dsink of some rows as :class:`Bounded` matrices.

    Parameters
    ----------
    slab : Slab
        One head.
    f : Tier
        The level.
    rows : integer array
        The rows to count, each with at least one key.
    dout : (len(rows), d_v) float64
        The gradient arriving at these rows.
    threads : int
        Tiles of rows to work on at a time.
    keys : integer array, optional
        The keys whose dk and dv are wanted; dq then counts only them.
    """
    work = _Backward(slab, f, rows, dout, keys)
    each_tile(len(rows), work.forward.tile, threads)
    with np.errstate(all="ignore"):
        work.between()
        each_tile(len(rows), work.tile, threads)
        return work.finish()


class _Sums:
    """One thread's part of dk and dv, transposed, and what their radii need."""

    def __init__(self, d: int, d_v: int, n_k: int) -> None:
        self.dk, self.dk_low, self.dv, self.dv_low = (np.zeros((w, n_k)) for w in (d, d, d_v, d_v))
        self.weights = np.zeros((n_k, 2))
        self.lost_k, self.lost_v = np.zeros(d), np.zeros(d_v)


class _Backward:
    """One head's operands and results."""

    def __init__(self, slab: Slab, f: Tier, rows: NDArray[np.intp], dout: Float, keys: NDArray[np.intp] | None) -> None:
        self.slab, self.f, self.rows, self.dout = slab, f, rows, dout
        self.forward = Forward(slab, f, rows, 0, None)
        level, self.which = f.level, keys
        k, v = (slab.k, slab.v) if keys is None else (slab.k[keys], slab.v[keys])
        self.count, (most_rows, most_keys) = len(k), stream.tile_sizes()
        self.tiles = [slice(j, min(j + most_keys, self.count)) for j in range(0, self.count, most_keys)]
        self.width = head_bits(max(min(most_keys, self.count), most_rows), level)
        width = head_bits(k.shape[1], level)
        self.scores = self.forward.keys if keys is None else [Right(k[t], f, width) for t in self.tiles]
        self.sigma = np.array([1.5 * 2.0 ** (52 - self.width - s * (self.width + 1)) for s in range(level)])
        b = head_bits(slab.v.shape[1], level)
        heads, tails = f.array(dout)._cut(b, level)
        self.left = np.concatenate([*heads, tails[level]], 1)
        self.parts = [*(np.abs(x).sum(1) for x in heads), np.abs(tails[level]).sum(1)]
        self.values = [Right(v[t], f, b) for t in self.tiles]
        self.keys = [Right(np.ascontiguousarray(k[t].T), f, self.width) for t in self.tiles]
        self.dq = np.zeros((len(rows), slab.k.shape[1], 3))
        self.local = threading.local()
        self.all: list[_Sums] = []
        self.lock = threading.Lock()

    def between(self) -> None:
        """Work out, from the forward pass, the columns that the second pass needs."""
        f, fw, level = self.f, self.forward, self.f.level
        out = Bounded(f, *np.moveaxis(fw.out, -1, 0))
        self.z = Bounded(f, *(x[:, None] for x in fw.sums.T))
        self.d = (f.array(self.dout) * out).sum()
        most = np.max([x.most.max(1, initial=0.0) for x in self.values], 0)
        one = np.abs(self.dout).sum(1) * UP
        k = self.dout.shape[1]
        lost = gamma(k * (level + 1) + level + 4) * sum(p * most[level - s] for s, p in enumerate(self.parts))
        size = (one * most[0] + np.abs(self.d.h[:, 0])) * UP
        self.size = size + ETA
        self.e = np.ldexp(1.0, np.frexp(self.size)[1])
        r = np.broadcast_to(self.d.r, self.d.h.shape)[:, 0]
        # the error of X, and of w X, over the weight
        z_relative = np.broadcast_to(self.z.r, self.z.h.shape)[:, 0] / self.z.h[:, 0]
        # the shift may be the sink's, and then larger than the scores
        weight = fw.relative + 8 * U * U * (np.abs(fw.shift) + 2 * fw.size)
        relative = weight + z_relative + 2.0**-98
        self.lost_x = (lost + r + (2.0**-98 + 64 * U * U) * self.size) * UP
        self.lost_g = (weight * self.size + self.lost_x) * UP
        per_z = UP / self.z.h[:, 0]
        self.omega = np.stack([relative * per_z, (relative * self.size + self.lost_x) * per_z], 1) * UP
        self.scaled_dout = f.array(self.dout) / self.z
        self.scaled_q = f.array(self.slab.q[self.rows] * self.e[:, None]) / self.z

    def _sums(self) -> _Sums:
        if not hasattr(self.local, "sums"):
            self.local.sums = _Sums(self.slab.k.shape[1], self.slab.v.shape[1], self.count)
            with self.lock:
                self.all.append(self.local.sums)
        sums: _Sums = self.local.sums
        return sums

    def tile(self, at: slice) -> None:
        """Compute one tile of rows."""
        with np.errstate(all="ignore"):
            self._tile(at, self._sums())

    def _tile(self, at: slice, sums: _Sums) -> None:
        slab, f, fw, step = self.slab, self.f, self.forward, stream.steps()
        level, rows = f.level, self.rows[at]
        r = len(rows)
        turned = [self._turned(x, at) for x in (self.scaled_q, self.scaled_dout)]
        dq, dq_low = np.zeros((r, slab.k.shape[1])), np.zeros((r, slab.k.shape[1]))
        part = [np.empty((r, slab.k.shape[1])) for _ in range(level + 1)]
        omega = self.omega[at]
        done, wide = 0, 0
        allowed = None if fw.whole else slab.allowed[rows]
        if allowed is not None and self.which is not None:
            allowed = allowed[:, self.which]
        for n, keys in enumerate(self.tiles):
            seen = None if allowed is None else allowed[:, keys]
            if seen is not None and not seen.any():
                continue
            w, done = keys.stop - keys.start, done + 1
            if w != wide:
                wide, room = w, [np.empty((r, w)) for _ in range(2 * level + 6)]
                weights, products = np.empty((r, level + 1, w)), np.empty((r, level + 1, w))
            c, g_levels = room[: level + 1], room[level + 1 : 2 * level + 2]
            h, low, g, g_low = room[2 * level + 2 :]
            self.scores[n].levels(fw.left[at], level, c)
            step.scores(c, fw.c, fw.c_low, h, low)
            self.values[n].levels(self.left[at], level, g_levels)
            step.scores(g_levels, 1.0, 0.0, g, g_low)
            if seen is not None and not seen.all():
                h[~seen] = -np.inf
            d = (self.d.h[at, 0], self.d.l[at, 0])
            step.gradient_weights(h, low, fw.shift[at], g, g_low, *d, 1 / self.e[at], self.sigma, weights, products)
            self.keys[n].levels(products.reshape(r, -1), level, part)
            for x in part:
                step.accumulate(dq, dq_low, x)
            for (heads, tails), planes, total, total_low in (
                (turned[0], products, sums.dk, sums.dk_low),
                (turned[1], weights, sums.dv, sums.dv_low),
            ):
                for t in range(level + 1):
                    if t < level:
                        pairs = [(heads[s], t - s) for s in range(t + 1)]
                    else:
                        pairs = [(tails[level - s], s) for s in range(level + 1)]
                    _product(pairs, planes, total[:, keys], total_low[:, keys], step)
            sums.weights[keys] += weights[:, 0].T @ omega + 2.0**-self.width * omega.sum(0)
        self._row_results(at, dq, dq_low, done)
        for (_, tails), lost in ((turned[0], sums.lost_k), (turned[1], sums.lost_v)):
            lost += self._rounded(tails, r)

    def _turned(self, x: Bounded, at: slice) -> tuple[list[Float], list[Float]]:
        """Return heads and tails of a tile of rows, cut along its columns and transposed."""
        part = Bounded(self.f, x.h[at], x.l[at], np.zeros((1, 1)))
        heads, tails = part.T._cut(self.width, self.f.level)
        return heads, tails

    def _steps(self) -> Float:
        """Return bounds of a weight's heads and tail, and of a product's."""
        level = self.f.level
        return np.array([1.0, *(2.0 ** -(self.width + s * (self.width + 1) + 1) for s in range(level))]) * SLACK

    def _rounded(self, tails: list[Float], r: int) -> Float:
        """Return what the rounded level of a sum over r rows loses, by column."""
        level, size = self.f.level, self._steps()
        most = [np.abs(t).max(1, initial=0.0) for t in tails]
        lost = gamma(r + 2 * level + 6) * sum(size[s] * most[level - s] for s in range(level + 1))
        return np.asarray((lost + 2 * U * size[level] * most[0]) * r * UP)

    def _row_results(self, at: slice, dq: Float, dq_low: Float, done: int) -> None:
        f, level, n_k = self.f, self.f.level, self.slab.k.shape[0]
        size = self._steps()
        z = np.abs(self.z.h[at, 0]) * (1 + 2.0**-30)
        sizes = [np.minimum(z * UP + n_k * size[1] if level else z, n_k), *(np.minimum(z, n_k * x) for x in size[1:])]
        most = np.max([x.most for x in self.keys], 0)
        adds = 2 * (done * (level + 1) + 2) ** 2 * U * U
        weight = self.lost_g[at] / self.e[at] * z + adds * z + n_k * 2.0 ** (EXP2_FLOOR + 1)
        rounded = sum(np.outer(x, most[level - s]) for s, x in enumerate(sizes))
        lost = np.outer(weight + 2 * U * sizes[level], most[0])
        lost = (lost + gamma(self.forward.wide * (level + 1) + level + 4) * rounded) * SLACK * UP + ETA
        total = Bounded(f, *fast_two_sum(dq, dq_low), lost)
        scale = self.slab.options(f, slice(0, 1)).scale
        column = f.array(self.e[at][:, None]) / Bounded(f, *(x[at] for x in (self.z.h, self.z.l, self.z.r)))
        x = total * column * scale
        self.dq[at] = np.stack([x.h, *(np.broadcast_to(v, x.h.shape) for v in (x.l, x.r))], -1)

    def finish(self) -> dict[str, Any]:
        """Add up the threads' parts."""
        f, fw, slab = self.f, self.forward, self.slab
        adds = 2 * (len(self.all) + (len(self.rows) // stream.tile_sizes()[0] + 2) * (f.level + 2)) ** 2 * U * U
        y = np.sum([s.weights for s in self.all], axis=0) * SLACK
        # a sum over rows of weights, at most 1 each, bounds what double-double additions and the floor lose
        n = float(len(self.rows))
        results: dict[str, Any] = {}
        q, dout = self.scaled_q, self.scaled_dout
        own = {"dk": np.abs(slab.q[self.rows]).max(0), "dv": np.abs(self.dout).max(0)}
        for name, scaled, column in (("dk", q, 1), ("dv", dout, 0)):
            total = Bounded(f, np.zeros(getattr(self.all[0], name).T.shape), np.zeros((1, 1)), np.zeros((1, 1)))
            for part in self.all:
                high, low = fast_two_sum(getattr(part, name).T, getattr(part, f"{name}_low").T)
                total = total + Bounded(f, high, low, np.zeros((1, 1)))
            lost = sum(getattr(s, "lost_k" if name == "dk" else "lost_v") for s in self.all)
            most = np.abs(scaled.h).max(0) * UP
            r = np.outer(y[:, column], own[name]) + lost + n * (adds + 2.0 ** (EXP2_FLOOR + 1)) * most
            results[name] = Bounded(f, total.h, total.l, (total.r + r) * UP + ETA)
        results["dk"] = results["dk"] * slab.options(f, slice(0, 1)).scale
        results["dq"] = Bounded(f, *np.moveaxis(self.dq, -1, 0))
        results["out"], results["lse"] = fw.out, fw.lse
        if slab.sink is not None:
            s = f.number(slab.sink) * f.log2e
            p = ((s - f.array(fw.shift[:, None])) * fw.ln2).exp() / self.z
            results["dsink"] = -(p * self.d).T.sum()
        return results


def _product(pairs: list[tuple[Float, int]], planes: Float, h: Float, low: Float, step: Any) -> None:
    """Add the products of one level, each with one plane of the weights, to a double-double in place."""
    (first, s), *rest = pairs
    x = first @ planes[:, s]
    for a, s in rest:
        x += a @ planes[:, s]
    step.accumulate(h, low, x)
