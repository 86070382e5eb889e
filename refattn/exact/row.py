"""What rows need for gradients of softmax attention beside their scores, and what they lose (``backward.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .anywhere import beside
from .doubledouble import EXP2_FLOOR, U, two_sum
from .keys import at_lse, column
from .levels import ETA, UP, Bounded, gamma
from .right import norms, product_sizes
from .stream import SLACK

if TYPE_CHECKING:
    from .backward import Backward

__all__ = ["Row"]

Float = NDArray[np.float64]


def _full(x: Bounded) -> Float:
    return np.broadcast_to(x.r, x.h.shape)


class Row:
    """What one tile of rows needs beside its scores, and what it loses."""

    def __init__(self, work: Backward, at: Any, known: bool = False) -> None:
        self.work, self.at, f, fw, level = work, at, work.f, work.forward, work.f.level
        dout = work.dout[at]
        dlse = None if work.dlse is None else work.dlse[at]
        self.arriving = dout.any(1) if dlse is None else dout.any(1) | (dlse != 0)
        self.at_lse = None if dlse is None else at_lse(work.head, f, dlse)
        out = Bounded(f, *np.moveaxis(fw.out[at], -1, 0))
        z = column(f, fw.sums[at])
        self.z = np.abs(z.h[:, 0]) * (1 + 2.0**-30)
        self.d = column(f, work.d[at]) if known else self._less_lse((f.array(dout) * out).sum())
        heads, tails = f.array(dout)._cut(work.across, level)
        self.left = np.concatenate([*heads, tails[level]], 1)
        lost = product_sizes([*heads, tails[level]], work.of_values)
        lost = gamma(dout.shape[1] * (level + 1) + level + 4) * lost
        self.size = (norms(dout) * work.norm_v + np.abs(self.d.h[:, 0])) * UP + ETA
        self.e = work.e[at] if known else np.ldexp(np.ones_like(self.size), np.frexp(self.size)[1])
        # the shift may be the sink's, and then larger than the scores
        self.weight = fw.relative[at] + 8 * U * U * (np.abs(fw.shift[at]) + 2 * fw.size[at])
        # what a softcap's slopes are off by, at a score that has its radius
        self.gain: Any = 0.0 if work.gain is None else work.gain[1][at]
        # the error of X for the d that is used
        self.lost_x = (lost + (2.0**-98 + 64 * U * U) * self.size) * UP
        self.inverse = inverse = f.number(1) / z
        relative = self.weight + inverse.r[:, 0] / np.abs(inverse.h[:, 0]) + 2.0**-98
        per_z = np.abs(inverse.h[:, 0]) * UP
        self.omega = np.stack([relative * per_z, self.lost_x * per_z, np.ones_like(per_z), per_z], 1) * UP
        self.relative_g = (relative + self.gain) * self.e * per_z * UP
        self.q = self._turned(f.array(work.head.q[beside(work.head.q, work.rows[at])]).h * self.e[:, None])
        self.dout = self._turned(dout)

    def _less_lse(self, x: Bounded) -> Bounded:
        """Return x without the gradient arriving at lse, which a score's gradient has beside dout·v."""
        return x if self.at_lse is None else x - self.at_lse

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

    def _adds(self, done: Float) -> Float:
        return 4 * done * (self.work.f.level + 1) * U * U

    def _off(self, g_size: Float, gain: Any = 0.0) -> Float:
        """Return what the sums of w X are off by, for the d that is used, from the sums of |G|; of w X times `gain`."""
        sizes = np.minimum(g_size * SLACK + len(self.work.head.k) * 2.0**-self.work.width, self.z * SLACK)
        off: Float = (self.weight + gain) * self.e * sizes + self.lost_x * self.z
        return off

    def dq(self, h: Float, low: Float, g_size: Float, off: Float, done: Float) -> Float:
        """Return the rows' dq with its radius; d is off by `off`."""
        work, f, level, n_k = self.work, self.work.f, self.work.f.level, len(self.work.head.k)
        weight = (self._off(g_size, self.gain) + off * self.z) / self.e + 2 * self._adds(done) * self.z
        weight = weight + n_k * 2.0 ** (EXP2_FLOOR + 1)

        def lost(s: int, tail: int) -> Float:
            by_row = np.outer(self._size(s), work.most_k[tail])
            return np.minimum(by_row, work.steps[s] * work.sums_k[tail]) if s else by_row

        rounded = sum(lost(s, level - s) for s in range(level + 1))
        r = np.outer(weight, work.most_k[0]) + work.by_tails * lost(level, 0)
        r = (r + gamma(work.forward.wide * (level + 1) + level + 4) * rounded) * SLACK * UP + ETA
        r = np.where(self.arriving[:, None] & (work.most_k[0] > 0)[None], r, 0.0)
        x = Bounded(f, h, low, r) * self._scaled() * work.scale
        return np.stack([x.h, *(np.broadcast_to(v, x.h.shape) for v in (x.l, x.r))], -1)

    def better_d(self, h: Float, low: Float, g_size: Float, done: Float) -> tuple[Float, Float]:
        """Return d from the rows' sums of G, which the true dout·out would make 0, and how far off it was."""
        work, f, fw, level, d = self.work, self.work.f, self.work.forward, self.work.f.level, self.d
        off = _full(d)
        if work.head.sink is None:
            r = self._off(g_size) / self.e + self._adds(done) * self.z + len(work.head.k) * 2.0 ** (EXP2_FLOOR + 1)
            r = r + (f.steps.row_sum_error(fw.wide) + 2 * U) * self._size(level)
            more = Bounded(f, h[:, None], low[:, None], r[:, None] * SLACK * UP + ETA) * self._scaled()
            more = self._less_lse(more)
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
