"""Softmax attention of one head by tiles of keys, in enclosures: the definition over a level, in O(n d) memory.

The running maximum is an integer power of two, so rescaling is exact. The weights of a tile are cut into heads and tail
as they are made; products are those of ``levels.py``. The numerator's and the denominator's radii are bounded here
(docs/proofs/streaming.md); division, logarithm and sink are operators of the level.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..norms import has_norms
from ..rules import FULL, PARTIAL, View
from ..rules.spans import UNSURE
from ..variants import variant_of
from . import elementwise
from .anywhere import beside, scaled, two_to
from .blas import one_thread
from .doubledouble import EXP2_ERROR, EXP2_FLOOR, U, two_prod
from .heads import Head
from .levels import ETA, UP, Bounded, Level, gamma, head_bits
from .right import Right, product_sizes, sizes_of
from .tiles import ROWS, Room, Sums, TilesOfRows, groups, pieces, tiles_of

__all__ = [
    "Forward",
    "each",
    "each_tile",
    "forward_pass",
    "stream",
    "streams",
    "tile_sizes",
]

Float = NDArray[np.float64]
STREAMED = "softmax"
"""The definition that this file is a fast implementation of (``Variant.fused``)."""
T = TypeVar("T")
R = TypeVar("R")
KEYS = 512  # what suits the compiled steps, with ROWS
PLAIN_ROWS, PLAIN_KEYS = 128, 256  # NumPy's steps make temporaries: keep them in cache
SLACK = 1 + 2.0**-12
"""More than what a head's rounding adds to the bounds of heads and tails, whose width is at least 20 bits."""
AHEAD = 16
"""Items for each thread that are made at a time."""
MOST_CAP = 2.0**10
"""A softcap's error is in proportion to it: larger ones, and their inverses, are left to the operators."""


def tile_sizes() -> tuple[int, int]:
    """Return how many rows and keys a tile has."""
    return (min(ROWS, PLAIN_ROWS), min(KEYS, PLAIN_KEYS)) if elementwise.steps() is elementwise else (ROWS, KEYS)


def streams(one: Head) -> bool:
    """Tell whether this path knows a call: plain softmax, by scores of given columns."""
    p = one.problem
    fused, cap = variant_of(p.variant).fused, p.softcap
    known = cap is None or 1 / MOST_CAP <= cap <= MOST_CAP
    plain = one.weight is None and one.kept is None and p.rotary is None and p.alibi_slopes is None
    plain = plain and not has_norms(p)
    return fused == STREAMED and known and plain


def stream(
    one: Head, f: Level, rows: NDArray[np.intp], unit: int, threads: int, into: tuple[Float, Float] | None = None
) -> tuple[Float, Float]:
    """Return out (n, d_v, 3) and lse (n, 3) of some rows as h, l, r.

    Parameters
    ----------
    one : Head
        One head; its values are taken times 2**-unit.
    f : Level
        The level.
    rows : integer array
        The rows to compute, each with at least one key.
    unit : int
        See `one`.
    threads : int
        Tiles of rows to work on at a time.
    into : two arrays, optional
        Where to write them.
    """
    work = forward_pass(one, f, rows, threads, unit, into)
    return work.out, work.lse


def forward_pass(
    one: Head,
    f: Level,
    rows: NDArray[np.intp],
    threads: int,
    unit: int = 0,
    into: tuple[Float, Float] | None = None,
) -> Forward:
    """Do what :func:`stream` does, and return all that a gradient needs of it."""
    if f.device is not None:
        on_device: Forward = f.device.forward(one, f, rows, unit, into)
        return on_device
    work = Forward(one, f, rows, unit, into, threads)
    if isinstance(one.allowed, View):
        each(work.gathered, groups(len(rows)), threads)
    else:
        each_tile(len(rows), work.tile, threads)
    return work


def each_tile(rows: int, work: Callable[[slice], None], threads: int) -> None:
    """Call ``work`` on every tile of rows, by threads of which each has BLAS for itself."""
    size = tile_sizes()[0]
    each(work, [slice(i, min(i + size, rows)) for i in range(0, rows, size)][::-1], threads)


def each(work: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """Call ``work`` on every item, by threads of which each has BLAS for itself."""
    if threads == 1 or (isinstance(items, list) and len(items) == 1):
        return [work(x) for x in items]
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        if isinstance(items, list):
            return list(pool.map(work, items))
        found: list[R] = []  # items are made as they are worked on
        left = iter(items)
        while some := list(islice(left, AHEAD * threads)):
            found += pool.map(work, some)
        return found


class Forward:
    """One head's operands, prepared, and its results."""

    exp2_error = EXP2_ERROR
    """What a weight is off by, of itself, for the score that it is made of."""

    def __init__(
        self, one: Head, f: Level, rows: NDArray[np.intp], unit: int, into: tuple[Float, Float] | None, threads: int
    ) -> None:
        self.head, self.f, self.rows, host, xp = one, f, rows, Level(f.level), f.xp
        level, (n_k, d) = f.level, one.k.shape
        k, v = xp.asarray(one.k), xp.asarray(scaled(one.v, -unit))
        self.out: Any
        self.lse: Any
        self.out, self.lse = into or (xp.zeros((len(rows), v.shape[1], 3)), xp.zeros((len(rows), 3)))
        scale = one.options(host, slice(0, 1)).scale * host.log2e
        self.c, self.c_low = float(scale.h[0, 0]), float(scale.l[0, 0])
        self.whole = bool(one.allowed.all())
        self.wide = tile_sizes()[1] if f.device is None else f.device.keys
        self.tiles, self.kinds = self._tiles(threads)
        self.shift, self.relative, self.sums = xp.empty(len(rows)), xp.empty(len(rows)), xp.empty((len(rows), 3))
        b, self.width = head_bits(d, level), head_bits(min(self.wide, n_k), level)
        if f.device is None:
            self.values: Sequence[Right]
            self.keys = of_keys = each(lambda t: Right(k[t], f, b), self.tiles, threads)
            self.values = of_values = each(lambda t: Right(v[t].T, f, self.width), self.tiles, threads)
        else:  # one cut for all keys: there a tile's would cost its launches
            of_keys, of_values = [Right(k, f, b)], [Right(v.T, f, self.width)]
            self.keys = [of_keys[0].columns(t) for t in self.tiles]
            self.values = TilesOfRows(of_values[0], self.tiles)
        q = f.array(one.q if len(rows) == len(one.q) else one.q[beside(one.q, rows)])
        heads, tails = q._cut(b, level)
        self.left = np.concatenate([*heads, tails[level]], 1)
        self.sigma = np.array([1.5 * 2.0 ** (52 - self.width - s * (self.width + 1)) for s in range(level)])
        self.most_v = np.max(np.stack([x.most for x in of_values]), 0)  # (L + 1, d_v)
        self.sums_v = np.sum(np.stack([x.sums for x in of_values]), 0) * (1 + 2.0**-30)
        self.radius, self.size = self._radii(q.h, [*heads, tails[level]], of_keys, float(np.ravel(scale.r)[0]))
        self.cap: tuple[tuple[float, float], tuple[float, float]] | None = None
        if one.problem.softcap is not None:
            self._capped(one.problem.softcap)
        if one.bias is not None:
            self.size = self.size + xp.asarray(1.5 * np.abs(one.bias[rows]).max(1))

    def _tiles(self, threads: int) -> tuple[list[slice], Any]:
        """Return the tiles of keys, and what a rule says of each and each row."""
        return tiles_of(self.head.allowed, self.rows, len(self.head.k), self.wide, partial(each, threads=threads))

    def _radii(self, q: Float, parts: list[Float], keys: list[Right], rc: float) -> tuple[Float, Float]:
        """Return the radius of a score in base 2 and a bound of its size, one a row; rc is the scale's radius."""
        f, level, c = self.f, self.f.level, abs(self.c) * UP
        lost = gamma(q.shape[1] * (level + 1) + level + 4) * product_sizes(parts, keys) * UP
        size = sizes_of(f, q)[2] * max(x.norm[0] for x in keys) * UP
        r = lost + 2.0**-100 * size
        return (16 * U * U * size * c + (size + r) * rc + c * r) * UP + ETA, size * c * UP

    def _capped(self, cap: float) -> None:
        """Note what a softcap needs, and what it does to the scores' radius: its slope is at most 1."""
        host, k = Level(self.f.level), 2.0 / cap
        most = host.number(cap) * host.log2e
        p, e = two_prod(np.float64(k), np.float64(cap))
        self.cap = (k, float(((2.0 - p) - e) / cap)), (float(most.h[0, 0]), float(most.l[0, 0]))
        top = self.cap[1][0] * UP
        self.radius = (self.radius + top * elementwise.CAPPED_ERROR + float(np.ravel(most.r)[0])) * UP
        self.size = np.minimum(self.size, top)

    @cached_property
    def ln2(self) -> Bounded:
        """log(2)."""
        return self.f.log2()

    def some(self, rows: NDArray[np.intp]) -> Forward:
        """Return what is known of some of the rows."""
        part, index = copy.copy(self), np.searchsorted(self.rows, rows)
        for name in ("rows", "left", "shift", "relative", "sums", "radius", "size", "out", "lse"):
            x = getattr(self, name)
            setattr(part, name, x[beside(x, index)])
        part.kinds = None if self.kinds is None else self.kinds[index]
        return part

    def tile(self, at: slice) -> None:
        """Compute one tile of rows."""
        with np.errstate(all="ignore"):
            self._tile(at)

    def _tile(self, at: slice) -> None:
        one, rows = self.head, self.rows[at]
        sums, room = Sums.of(len(rows), self.out.shape[1]), Room(self.f.level, self.out.shape[1])
        for n, keys in enumerate(self.tiles):
            seen = None if self.whole else one.allowed[rows, keys]
            if seen is None or seen.any():
                self._add(n, at, seen, sums, room)
        self._finish(at, sums)

    def gathered(self, at: slice) -> None:
        """Compute rows by what a rule says: of each tile of keys, the rows that see some of it, gathered."""
        rows = self.rows[at]
        sums, room = Sums.of(len(rows), self.out.shape[1]), Room(self.f.level, self.out.shape[1])
        with np.errstate(all="ignore"):
            for n in range(len(self.tiles)):
                for lines, seen in self.seeing(n, at):
                    part = sums.some(lines)
                    self._add(n, at.start + lines, seen, part, room)
                    sums.put(lines, part)
            for i in range(0, len(rows), ROWS):
                here = slice(i, min(i + ROWS, len(rows)))
                self._finish(slice(at.start + here.start, at.start + here.stop), sums.some(here))

    def seeing(self, n: int, at: slice) -> Iterator[tuple[NDArray[np.intp], Any]]:
        """Yield of a group of rows, piece by piece, those that see a tile's keys, and which; None for all."""
        view, rows, kinds = self.head.allowed, self.rows[at], self.kinds[at][:, n]
        for lines in pieces(np.nonzero(kinds == FULL)[0]):
            yield lines, None
        for lines in pieces(np.nonzero((kinds == PARTIAL) | (kinds == UNSURE))[0]):
            seen = view[rows[lines], self.tiles[n]]
            some = seen.any(1)
            if some.any():
                yield lines[some], seen[some]

    def _add(self, n: int, at: Any, seen: Any, sums: Sums, room: Room) -> None:
        """Add a tile of keys to the sums of some rows."""
        level, step, keys = self.f.level, elementwise.steps(), self.tiles[n]
        r = len(sums.m)
        *c, h, low = room.scores(r, keys.stop - keys.start)
        self.scores(n, at, seen, c, h, low)
        top = np.maximum(sums.m, np.ceil(h.max(1)))
        fade = np.exp2(np.maximum(sums.m - top, -1074.0))
        if (fade != 1).any():
            for x in (sums.num, sums.num_low):
                x *= fade[:, None]
            sums.den, sums.den_low = sums.den * fade, sums.den_low * fade
        sums.m, sums.done = top, sums.done + 1
        weights, by_row, part = room.weights[:r], room.sums[:r], [x[:r] for x in room.part]
        step.weights(h, low, sums.m, self.sigma, weights)
        step.row_sums(weights, by_row)
        for s in range(level + 1):
            elementwise.accumulate(sums.den, sums.den_low, by_row[:, s])
        self.values[n].levels(weights.reshape(r, -1), level, part)
        for x in part:
            step.accumulate(sums.num, sums.num_low, x)

    def scores(self, n: int, at: Any, seen: Any, c: list[Float], h: Float, low: Float, gain: Any = None) -> None:
        """Write the scores of one tile, in base 2, into h and low; c is room for their levels.

        A softcap's slopes are written where `gain` says: 1 / cap in base 2, then where h and low of a slope go.
        """
        self.keys[n].levels(self.left[at], self.f.level, c)
        elementwise.steps().scores(c, self.c, self.c_low, h, low)
        if self.cap is not None:
            elementwise.steps().capped(h, low, *self.cap)
        if gain is not None:
            elementwise.steps().gains(h, low, *gain)
        if self.head.bias is not None:
            self._add_bias(h, low, self.head.bias[self.rows[at], self.tiles[n]])
        if seen is not None and not seen.all():
            np.putmask(h, ~seen, -np.inf)

    def _add_bias(self, h: Float, low: Float, bias: Float) -> None:
        """Add a bias in base 2, in place; what it loses is counted with the shift's rounding."""
        t = Bounded(self.f, h, low, np.zeros((1, 1))) + self.f.array(bias) * self.f.log2e
        h[...], low[...] = t.h, t.l

    def _finish(self, at: slice, sums: Sums) -> None:
        f, level, one = self.f, self.f.level, self.head
        n_k, m, num, den, done = one.k.shape[0], sums.m, (sums.num, sums.num_low), (sums.den, sums.den_low), sums.done
        # exp2's argument: the score's radius, the bias's and the shift's rounding (sizes up to 2 size + 1)
        delta = self.radius[at] + 128 * U * U * (2 * self.size[at] + 2)
        relative = self.exp2_error + np.where(
            delta <= 2.0**-10, 0.694 * delta, np.where(delta <= 1, 1.05 * delta, np.inf)
        )
        # bounds of the sums of the weights, of each of their heads, and of their tails
        z = np.abs(den[0]) * (1 + 2.0**-30)
        unit = [2.0 ** -(self.width + s * (self.width + 1) + 1) for s in range(level)]  # half a head's last place
        sizes = [z + (n_k * unit[0] if level else 0.0), *(np.minimum(z, n_k * x) for x in unit)]
        tail = sizes[level]
        adds = 8 * done * (level + 1) * U * U  # of the double-double sums
        weight = (relative + adds) * z + n_k * 2.0 ** (EXP2_FLOOR + 1)
        r_den = (weight + (f.steps.row_sum_error(self.wide) + 2 * U) * tail) * SLACK

        def lost(s: int, part: int) -> Float:
            by_row = np.outer(sizes[s], self.most_v[part])
            return np.minimum(by_row, unit[s - 1] * self.sums_v[part]) if s else by_row

        rounded = sum(lost(s, level - s) for s in range(level + 1))
        r_num = np.outer(weight, self.most_v[0]) + 2 * U * lost(level, 0)
        r_num = (r_num + gamma(self.wide * (level + 1) + level + 4) * rounded) * SLACK
        top = Bounded(f, num[0], num[1], np.where(self.most_v[0] == 0, 0.0, r_num * UP + ETA))
        bottom = Bounded(f, den[0][:, None], den[1][:, None], r_den[:, None] * UP + ETA)
        shift = f.array(m[:, None])
        if one.sink is not None:
            s = f.number(one.sink) * f.log2e
            up = np.maximum(m, np.ceil(s.h[0, 0]))[:, None]
            fade = two_to(np.maximum(m[:, None] - up, -1074.0))
            top, bottom = (
                Bounded(f, x.h * fade, x.l * fade, np.where(x.r == 0, 0.0, x.r * fade + ETA)) for x in (top, bottom)
            )
            shift = f.array(up)
            bottom = bottom + ((s - shift) * self.ln2).exp()
        out, lse = top / bottom, bottom.log() + shift * self.ln2
        self.shift[at] = shift.h[:, 0]
        self.relative[at] = relative
        self.sums[at] = np.stack([np.broadcast_to(x, bottom.h.shape)[:, 0] for x in (bottom.h, bottom.l, bottom.r)], -1)
        self.out[at] = np.stack([out.h, *(np.broadcast_to(x, out.h.shape) for x in (out.l, out.r))], -1)
        self.lse[at] = np.concatenate([lse.h, lse.l, np.broadcast_to(lse.r, lse.h.shape)], 1)
