"""Softmax attention of one head by tiles of keys, in enclosures: the definition over a tier, in O(n d) memory.

The running maximum is an integer power of two, so rescaling is exact. The weights of a tile are cut into heads and tail
as they are made; products are those of ``tiers.py``. The numerator's and the denominator's radii are bounded here
(docs/proofs/streaming.md); division, logarithm and sink are operators of the tier.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from . import elementwise
from .doubledouble import EXP2_ERROR, EXP2_FLOOR, U, fast_two_sum
from .slabs import Slab
from .tiers import ETA, UP, Bounded, Tier, gamma, head_bits

__all__ = ["Forward", "Right", "each_tile", "stream", "streams", "tile_sizes"]

Float = NDArray[np.float64]
ROWS, KEYS = 256, 512  # what suits the compiled steps
PLAIN_ROWS, PLAIN_KEYS = 128, 256  # NumPy's steps make temporaries: keep them in cache
SLACK = 1 + 2.0**-12
"""More than what a head's rounding adds to the bounds of heads and tails, whose width is at least 20 bits."""
LOWEST = -(2.0**60)


@lru_cache(maxsize=1)
def steps() -> Any:
    """Return the elementwise steps: compiled where numba is here, NumPy's otherwise."""
    try:
        from . import compiled
    except ImportError:
        return elementwise
    return compiled


def tile_sizes() -> tuple[int, int]:
    """Return how many rows and keys a tile has."""
    return (min(ROWS, PLAIN_ROWS), min(KEYS, PLAIN_KEYS)) if steps() is elementwise else (ROWS, KEYS)


def streams(slab: Slab) -> bool:
    """Tell whether this path knows a call: softmax attention without a softcap."""
    return slab.problem.variant == "softmax" and slab.problem.softcap is None


class Right:
    """A right operand B (k, w), cut along its columns: what each level of a product needs."""

    def __init__(self, turned: Any, f: Tier, b: int) -> None:
        level = f.level
        turned = turned if isinstance(turned, Bounded) else f.array(turned)
        heads, tails = turned._cut(b, level)
        heads, tails = ([np.ascontiguousarray(x.T) for x in part] for part in (heads, tails))
        self.k = turned.shape[1]
        self.heads = np.concatenate(heads[::-1], 0) if level else np.zeros((0, turned.shape[0]))
        self.lead = next((t for t in range(level + 1) if tails[level - t].any()), level)
        self.tails = np.concatenate(tails[::-1], 0)[self.lead * self.k :]
        self.most = np.array([np.abs(t).max(0, initial=0.0) for t in tails])  # of each column, by tail

    def levels(self, left: Float, level: int, out: list[Float]) -> None:
        """Write the products of left = [A_0 .. A_{L-1} A_{>=L}] by level; the last is the rounded one."""
        for t in range(level):
            np.matmul(left[:, : (t + 1) * self.k], self.heads[(level - 1 - t) * self.k :], out=out[t])
        np.matmul(left[:, self.lead * self.k :], self.tails, out=out[level])


def stream(
    slab: Slab, f: Tier, rows: NDArray[np.intp], unit: int, threads: int, into: tuple[Float, Float] | None = None
) -> tuple[Float, Float]:
    """Return out (n, d_v, 3) and lse (n, 3) of some rows as h, l, r.

    Parameters
    ----------
    slab : Slab
        One head; its values are taken times 2**-unit.
    f : Tier
        The level.
    rows : integer array
        The rows to compute, each with at least one key.
    unit : int
        See `slab`.
    threads : int
        Tiles of rows to work on at a time.
    into : two arrays, optional
        Where to write them.
    """
    work = Forward(slab, f, rows, unit, into)
    each_tile(len(rows), work.tile, threads)
    return work.out, work.lse


def each_tile(rows: int, work: Callable[[slice], None], threads: int) -> None:
    """Call ``work`` on every tile of rows, by threads of which each has BLAS for itself."""
    size = tile_sizes()[0]
    tiles = [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
    with threadpool_limits(1 if threads > 1 else None, user_api="blas"):
        if threads > 1 and len(tiles) > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, tiles[::-1]))
        else:
            for tile in tiles:
                work(tile)


class Forward:
    """One head's operands, prepared, and its results."""

    def __init__(
        self, slab: Slab, f: Tier, rows: NDArray[np.intp], unit: int, into: tuple[Float, Float] | None
    ) -> None:
        self.slab, self.f, self.rows = slab, f, rows
        level, (n_k, d) = f.level, slab.k.shape
        v = np.ldexp(slab.v, -unit) if unit else slab.v
        self.out, self.lse = into or (np.zeros((len(rows), v.shape[1], 3)), np.zeros((len(rows), 3)))
        scale = slab.options(f, slice(0, 1)).scale * f.log2e
        self.c, self.c_low = float(scale.h[0, 0]), float(scale.l[0, 0])
        self.ln2 = f.log2()
        self.whole = bool(slab.allowed.all())
        self.wide = tile_sizes()[1]
        self.tiles = [slice(j, min(j + self.wide, n_k)) for j in range(0, n_k, self.wide)]
        self.shift, self.relative, self.sums = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros((len(rows), 3))
        b, q = head_bits(d, level), f.array(slab.q if len(rows) == len(slab.q) else slab.q[rows])
        heads, tails = q._cut(b, level)
        self.left = np.concatenate([*heads, tails[level]], 1)
        self.keys = [Right(slab.k[t], f, b) for t in self.tiles]
        self.width = head_bits(min(self.wide, n_k), level)
        self.values = [Right(np.ascontiguousarray(v[t].T), f, self.width) for t in self.tiles]
        self.sigma = np.array([1.5 * 2.0 ** (52 - self.width - s * (self.width + 1)) for s in range(level)])
        # the radius of a score in base 2, one a row
        one = np.abs(slab.q[rows]).sum(1) * UP
        most = np.max([x.most.max(1, initial=0.0) for x in self.keys], 0)
        parts = [*(np.abs(h).sum(1) for h in heads), np.abs(tails[level]).sum(1)]
        lost = gamma(d * (level + 1) + level + 4) * sum(p * most[level - s] for s, p in enumerate(parts)) * UP
        size = one * most[0] * UP
        c, rc = abs(self.c) * UP, float(np.ravel(scale.r)[0])
        r = lost + 2.0**-100 * size
        self.radius = (16 * U * U * size * c + (size + r) * rc + c * r) * UP + ETA
        self.size = size * c * UP
        if slab.bias is not None:
            self.size = self.size + 1.5 * np.abs(slab.bias[rows]).max(1)

    def tile(self, at: slice) -> None:
        """Compute one tile of rows."""
        with np.errstate(all="ignore"):
            self._tile(at)

    def _tile(self, at: slice) -> None:
        slab, f, step = self.slab, self.f, steps()
        level, rows = f.level, self.rows[at]
        r, d_v = len(rows), self.out.shape[1]
        m = np.full(r, LOWEST)
        num, num_low = np.zeros((r, d_v)), np.zeros((r, d_v))
        den, den_low = np.zeros(r), np.zeros(r)
        part = np.empty((level + 1, r, d_v))
        sums = np.empty((r, level + 1))
        wide = min(self.wide, slab.k.shape[0])
        room = [np.empty((r, wide)) for _ in range(level + 3)]
        weights = np.empty((r, level + 1, wide))
        done = 0
        for n, keys in enumerate(self.tiles):
            seen = None if self.whole else slab.allowed[rows, keys]
            if seen is not None and not seen.any():
                continue
            w, done = keys.stop - keys.start, done + 1
            if w != wide:
                wide, room = w, [np.empty((r, w)) for _ in range(level + 3)]
                weights = np.empty((r, level + 1, w))
            *c, h, low = room
            self.keys[n].levels(self.left[at], level, c)
            step.scores(c, self.c, self.c_low, h, low)
            if slab.bias is not None:
                self._add_bias(h, low, slab.bias[rows, keys])
            if seen is not None and not seen.all():
                h[~seen] = -np.inf
            top = np.maximum(m, np.ceil(h.max(1)))
            fade = np.exp2(np.maximum(m - top, -1074.0))
            if (fade != 1).any():
                for x in (num, num_low):
                    x *= fade[:, None]
                den, den_low = den * fade, den_low * fade
            m = top
            step.weights(h, low, m, self.sigma, weights)
            step.row_sums(weights, sums)
            for s in range(level + 1):
                elementwise.accumulate(den, den_low, sums[:, s])
            self.values[n].levels(weights.reshape(r, -1), level, list(part))
            for x in part:
                step.accumulate(num, num_low, x)
        self._finish(at, m, (num, num_low), (den, den_low), done)

    def _add_bias(self, h: Float, low: Float, bias: Float) -> None:
        """Add a bias in base 2, in place; what it loses is counted with the shift's rounding."""
        t = Bounded(self.f, h, low, np.zeros((1, 1))) + self.f.array(bias) * self.f.log2e
        h[...], low[...] = t.h, t.l

    def _finish(self, at: slice, m: Float, num: Any, den: Any, done: int) -> None:
        f, level, slab = self.f, self.f.level, self.slab
        n_k = slab.k.shape[0]
        # exp2's argument: the score's radius, the bias's and the shift's rounding (sizes up to 2 size + 1)
        delta = self.radius[at] + 128 * U * U * (2 * self.size[at] + 2)
        relative = EXP2_ERROR + np.where(delta <= 2.0**-10, 0.694 * delta, np.where(delta <= 1, 1.05 * delta, np.inf))
        # bounds of the sums of the weights, of each of their heads, and of their tails
        z = np.abs(den[0]) * (1 + 2.0**-30)
        unit = [2.0 ** -(self.width + s * (self.width + 1) + 1) for s in range(level)]  # half a head's last place
        sizes = [z + (n_k * unit[0] if level else 0.0), *(np.minimum(z, n_k * x) for x in unit)]
        tail = sizes[level]
        adds = 2 * (done * (level + 1) + 2) ** 2 * U * U  # of the double-double sums
        weight = (relative + adds) * z + n_k * 2.0 ** (EXP2_FLOOR + 1)
        r_den = (weight + (gamma(self.wide + 2) + 2 * U) * tail) * SLACK
        most = np.max([x.most for x in self.values], 0)  # (L + 1, d_v)
        rounded = sum(np.outer(x, most[level - s]) for s, x in enumerate(sizes))
        r_num = np.outer(weight + 2 * U * tail, most[0]) + gamma(self.wide * (level + 1) + level + 4) * rounded
        r_num = r_num * SLACK
        top = Bounded(f, *fast_two_sum(*num), r_num * UP + ETA)
        z_high, z_low = (x[:, None] for x in fast_two_sum(*den))
        bottom = Bounded(f, z_high, z_low, r_den[:, None] * UP + ETA)
        shift = f.array(m[:, None])
        if slab.sink is not None:
            s = f.number(slab.sink) * f.log2e
            up = np.maximum(m, np.ceil(s.h[0, 0]))[:, None]
            fade = np.exp2(np.maximum(m[:, None] - up, -1074.0))
            top, bottom = (Bounded(f, x.h * fade, x.l * fade, x.r * fade + ETA) for x in (top, bottom))
            shift = f.array(up)
            bottom = bottom + ((s - shift) * self.ln2).exp()
        out, lse = top / bottom, bottom.log() + shift * self.ln2
        self.shift[at] = shift.h[:, 0]
        self.relative[at] = relative
        self.sums[at] = np.stack([np.broadcast_to(x, bottom.h.shape)[:, 0] for x in (bottom.h, bottom.l, bottom.r)], -1)
        self.out[at] = np.stack([out.h, *(np.broadcast_to(x, out.h.shape) for x in (out.l, out.r))], -1)
        self.lse[at] = np.concatenate([lse.h, lse.l, np.broadcast_to(lse.r, lse.h.shape)], 1)
