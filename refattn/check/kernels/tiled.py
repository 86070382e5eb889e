"""Our own tiled kernel in NumPy, forward and backward, written as flash kernels are: bugs are planted in it.

Float32 inside (float64 for float64), P and dS rounded to the input's type. Keys are taken in splits, whose answers are
merged through their lse, and within a split in tiles. The running output is kept normalised, so no sum leaves the range
of the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import from_float64, to_float64
from ...dropout import drawn
from ...dtypes import FORMATS
from ...errors import UnsupportedProblem
from ...masks import unused
from ...norms import NORMS, has_norms
from ...pages import append, gathered
from ...problem import VARIANT, Problem
from ...scales import spread
from ..model import Model, flash
from .normed import normed, unnormed

__all__ = ["gradients", "model", "tiled"]

Array = NDArray[Any]
ROWS, KEYS, SPLIT = 16, 32, 64


def tiled(problem: Problem, keys: int = KEYS) -> tuple[Array, Array]:
    """Return softmax attention by tiles of keys, as flash kernels do, and its lse.

    Parameters
    ----------
    problem : Problem
        Any softmax call.
    keys : int
        Keys to a tile.

    Returns
    -------
    out : (b, h_q, n_q, d_v), of the problem's type
    lse : (b, h_q, n_q) float32 (float64 for float64)
    """
    if problem.new_key is not None:
        append(problem)
    if problem.rotary is not None or has_norms(problem):
        problem = gathered(problem)  # keys are turned by where they stand, which a page does not know
    c = _Call(problem, keys)
    out, lse = np.zeros(problem.out_shape, c.kind), np.full(problem.out_shape[:3], -np.inf, c.kind)
    with np.errstate(all="ignore"):
        for b, h, i, seq in c.row_tiles():
            out[b, h, i], lse[b, h, i] = _forward(c, b, h, i, seq)
    if c.out_scale is not None:
        out = out / c.out_scale
    return from_float64(FORMATS[problem.out_type].round_array(out.astype(np.float64)), problem.out_type), lse


def gradients(problem: Problem, dout: Array, dlse: Array | None = None, keys: int = KEYS) -> dict[str, Array]:
    """Return dq, dk, dv, and dbias and dsink where the call has them, of their inputs' shapes and types.

    Parameters
    ----------
    problem : Problem
        Any softmax call.
    dout : (b, h_q, n_q, d_v) array
        The gradient arriving at out.
    dlse : (b, h_q, n_q) array, optional
        The gradient arriving at lse.
    keys : int
        Keys to a tile.
    """
    if problem.block_table is not None:
        raise UnsupportedProblem("block_table: the tiled kernel has no gradients of keys in pages")
    c = _Call(problem, keys)
    out, lse = tiled(problem, keys)
    arriving = to_float64(dout).astype(c.kind)
    total = {"dq": np.zeros_like(c.q), "dk": np.zeros_like(c.k), "dv": np.zeros_like(c.v)}
    if c.bias is not None:
        total["dbias"] = np.zeros_like(c.bias)
    if c.sink is not None:
        total["dsink"] = np.zeros_like(c.sink)
    if c.slopes is not None:
        total["dalibi_slopes"] = np.zeros(c.problem.alibi_slopes.shape, c.kind)
    with np.errstate(all="ignore"):
        delta = (arriving * to_float64(out).astype(c.kind)).sum(-1)
        if dlse is not None:
            delta = delta - to_float64(dlse).astype(c.kind)
        for b, h, i, seq in c.row_tiles():
            _backward(c, b, h, i, seq, arriving[b, h, i], lse[b, h, i], delta[b, h, i], total)
    if c.problem.rotary is not None:
        for which, name in enumerate(("dq", "dk")):
            total[name] = c.turned(c.rounded(total[name]), which, -1)
    for which, name in enumerate(("dq", "dk")):
        if getattr(c.problem, NORMS[which]) is not None:
            back = unnormed(c.problem, c.raw[which], c.rounded(total[name]), which)
            total[name], total[f"d{NORMS[which]}"] = back
    names = {"dq": "query", "dk": "key", "dv": "value"}
    given = {n: getattr(problem.to("numpy"), names.get(n, n[1:])) for n in total}
    form = {n: "float64" if x.dtype == np.float64 else x.dtype.name for n, x in given.items()}
    return {n: from_float64(FORMATS[form[n]].round_array(x.astype(np.float64)), form[n]) for n, x in total.items()}


def _forward(c: _Call, b: int, h: int, i: slice, seq: tuple[slice, slice]) -> tuple[Array, Array]:
    """Return out and lse of one tile of rows: the splits' answers, merged through their lse, then the sink."""
    r = i.stop - i.start
    out, lse = np.zeros((r, c.v.shape[3]), c.kind), np.full(r, -np.inf, c.kind)
    for split in c.splits(seq):
        part, part_lse = _split(c, b, h, i, split, seq)
        both = np.logaddexp(lse, part_lse)
        shift = np.where(np.isneginf(both), 0, both)
        out = out * np.exp(lse - shift)[:, None] + part * np.exp(part_lse - shift)[:, None]
        lse = both
    if c.sink is not None:
        whole = np.logaddexp(lse, c.sink[h])
        out, lse = out * np.exp(lse - np.where(np.isneginf(whole), 0, whole))[:, None], whole
    for j, seen in _unusual(c.values, c, b, h, i, seq):
        x = c.values[b, c.head_kv(h), j]
        out[np.ix_(seen, ~np.isfinite(x))] += x[~np.isfinite(x)]  # NaN and inf reach the rows that see them
    for _, seen in _unusual(c.k, c, b, h, i, seq):
        out[seen], lse[seen] = np.nan, np.nan  # so do those of a key
    if c.sink is not None and not c.sink[h] < np.inf:
        out[:], lse[:] = np.nan, np.nan
    return out, lse


def _split(c: _Call, b: int, h: int, i: slice, split: slice, seq: tuple[slice, slice]) -> tuple[Array, Array]:
    """Return out and lse of one tile of rows over some of the keys, by online softmax."""
    r = i.stop - i.start
    m = np.full(r, -np.inf, c.kind)
    z = np.zeros(r, c.kind)
    out = np.zeros((r, c.v.shape[3]), c.kind)
    for j in c.key_tiles(split):
        s, _ = c.scores(b, h, i, j, seq)
        top = np.maximum(m, s.max(1))
        shift = np.where(np.isneginf(top), 0, top)
        p = np.exp(s - shift[:, None])
        kept = z * np.exp(m - shift)
        p = c.weighted(p, b, h, i, j)
        z = kept + p.sum(1)
        m = top
        share = np.where(z > 0, 1 / z, 0)
        p = c.dropped(p * share[:, None], b, h, i, j)
        out = out * (kept * share)[:, None] + c.rounded(p) @ c.v[b, c.head_kv(h), j]
    lse = np.where(np.isneginf(m), 0, m) + np.log(z)
    return out, lse


def _backward(
    c: _Call, b: int, h: int, i: slice, seq: tuple[slice, slice], dout: Array, lse: Array, delta: Array, total: Any
) -> None:
    """Add what one tile of rows gives to the gradients."""
    hk = c.head_kv(h)
    q, safe = c.q[b, h, i], np.where(np.isneginf(lse), 0, lse)
    for j in c.key_tiles(seq[1]):
        s, slope = c.scores(b, h, i, j, seq)
        p = np.exp(s - safe[:, None])
        p = c.weighted(p, b, h, i, j)
        dp = c.dropped(dout @ c.v[b, hk, j].T, b, h, i, j)
        ds = p * (dp - delta[:, None])
        total["dv"][b, hk, j] += c.rounded(c.dropped(p, b, h, i, j)).T @ dout
        if c.bias is not None:
            c.add_bias(total["dbias"], b, h, i, j, ds)
        if c.slopes is not None:
            total["dalibi_slopes"][(b, h)[-total["dalibi_slopes"].ndim :]] -= (ds * c.apart(b, i, j)).sum()
        ds = c.rounded(ds * slope) * c.scale
        total["dq"][b, h, i] += ds @ c.finite_k[b, hk, j]
        total["dk"][b, hk, j] += ds.T @ q
    if c.sink is not None:
        total["dsink"][h] -= (np.exp(c.sink[h] - safe) * delta).sum()


def _unusual(x: Array, c: _Call, b: int, h: int, i: slice, seq: tuple[slice, slice]) -> Iterator[tuple[int, Array]]:
    """Yield each key with an element that is no number, and the rows of a tile that see it, if any do."""
    at = np.nonzero(~np.isfinite(x[b, c.head_kv(h), seq[1]]).all(1))[0]
    if at.size:
        seen = c.seen(b, h, i, seq[1], seq)[:, at]
        for n in np.nonzero(seen.any(0))[0]:
            yield int(at[n]) + seq[1].start, seen[:, n]


class _Call:
    """One call's operands in the type that is computed in, and its index arithmetic."""

    def __init__(self, problem: Problem, keys: int) -> None:
        if problem.variant != VARIANT:
            raise UnsupportedProblem(f"variant: the tiled kernel computes {VARIANT}, not {problem.variant}")
        p: Problem = drawn(problem.to("numpy"))
        self.problem = p
        self.kind = np.dtype(np.float64 if "float64" in (p.dtype, p.out_type) else np.float32)
        self.keys = keys
        with np.errstate(divide="ignore"):  # of no columns, where it does not matter
            self.scale = self.kind.type(p.scale if p.scale is not None else 1 / np.sqrt(p.d_k))
        self.q: Array
        self.k: Any
        self.values: Any
        self.q, self.k, self.values = (to_float64(x).astype(self.kind) for x in (p.query, p.key, p.value))
        self.out_scale: Array | None = None
        if p.typed:
            self.take_scales()
        self.slopes: Array | None = None
        self.raw = self.q, self.k
        if has_norms(p):
            self.q, self.k = (self.rounded(normed(p, x, i)) for i, x in enumerate(self.raw))
        if p.rotary is not None or p.alibi_slopes is not None:
            self.take_positions()
        # what no row sees may be anything: it must not meet a weight of 0
        self.v: Any
        self.v, self.finite_k = (np.where(np.isfinite(x), x, 0) for x in (self.values, self.k))
        if p.block_table is not None:
            self.k, self.values, self.v = (_Pages(x, p) for x in (self.k, self.values, self.v))
        extra = (None if x is None else to_float64(x).astype(self.kind) for x in (p.sink, p.bias, p.weight))
        self.sink, self.bias, self.weight = extra

    def number(self, x: Any) -> Array:
        """Return a scale in the type that is computed in."""
        return np.asarray(x if isinstance(x, float) else to_float64(x)).astype(self.kind)

    def take_scales(self) -> None:
        """Multiply elements with their scales, and note that of out."""
        p = self.problem
        for name, scale in (("q", p.query_scale), ("k", p.key_scale), ("values", p.value_scale)):
            if scale is not None:
                x = getattr(self, name)
                setattr(self, name, x * spread(self.number(scale), x.shape))
        self.out_scale = None if p.out_scale is None else self.number(p.out_scale)

    def take_positions(self) -> None:
        """Note where queries and keys stand, and the heads' slopes; turn queries and keys."""
        p = self.problem
        self.at = [np.zeros((p.batch, n), np.int64) for n in (p.n_q, p.n_k)]
        for b in range(p.batch):
            for rows, keys in p.segments(b):
                n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
                corner = self.moved(0 if p.causal == "top_left" else n_k - n_q, b, (rows, keys))
                self.at[0][b, rows] = np.arange(n_q) + corner
                self.at[1][b, keys] = np.arange(n_k)
        for i, given in enumerate((p.positions_q, p.positions_k)):
            if given is not None:
                self.at[i] = np.broadcast_to(given, self.at[i].shape)
        if p.alibi_slopes is not None:
            self.slopes = np.broadcast_to(to_float64(p.alibi_slopes).astype(self.kind), (p.batch, p.heads))
        if p.rotary is not None:
            self.q, self.k = (self.rounded(self.turned(x, i)) for i, x in enumerate((self.q, self.k)))

    def turned(self, x: Array, which: int, way: int = 1) -> Array:
        """Return queries (0) or keys (1) turned by their positions; gradients go the other way, -1."""
        p, at = self.problem, self.at[which]
        gone = unused(p)
        if gone is not None:  # their positions may be anything
            at = np.where(gone[which], 0, at)
        cos, sin = (to_float64(t).astype(self.kind)[at][:, None] for t in (p.rotary_cos, p.rotary_sin))
        pairs = cos.shape[-1]
        half = p.rotary == "half"
        first, second = (
            (np.arange(pairs), np.arange(pairs, 2 * pairs))
            if half
            else (2 * np.arange(pairs), 2 * np.arange(pairs) + 1)
        )
        a, b, found = x[..., first], x[..., second], x.copy()
        found[..., first], found[..., second] = a * cos - way * b * sin, b * cos + way * a * sin
        return found

    def head_kv(self, h: int) -> int:
        """Return the key head of a query head."""
        group = self.problem.heads // self.problem.heads_kv
        return h // group

    def row_tiles(self) -> Iterator[tuple[int, int, slice, tuple[slice, slice]]]:
        """Yield batch, head, rows and the sequence that they belong to."""
        p = self.problem
        for b in range(p.batch):
            for h in range(p.heads):
                for seq in p.segments(b):
                    for start in range(seq[0].start, seq[0].stop, ROWS):
                        yield b, h, slice(start, min(start + ROWS, seq[0].stop)), seq

    def splits(self, seq: tuple[slice, slice]) -> Iterator[slice]:
        """Yield the splits of a sequence's keys."""
        for start in range(seq[1].start, seq[1].stop, SPLIT):
            yield slice(start, min(start + SPLIT, seq[1].stop))

    def key_tiles(self, keys: slice) -> Iterator[slice]:
        """Yield the tiles of some keys."""
        for start in range(keys.start, keys.stop, self.keys):
            yield slice(start, min(start + self.keys, keys.stop))

    def seen(self, b: int, h: int, i: slice, j: slice, seq: tuple[slice, slice]) -> Array:
        """Return which keys of a tile each row may see."""
        p = self.problem
        n_q, n_k = (s.stop - s.start for s in seq)
        row, col = np.arange(i.start, i.stop) - seq[0].start, np.arange(j.start, j.stop) - seq[1].start
        corner = 0 if p.causal == "top_left" else n_k - n_q
        if p.offset is not None or p.alignment is not None:
            corner = self.moved(corner, b, seq)
        ahead = col[None, :] - row[:, None] - corner
        seen = np.ones(ahead.shape, bool)
        if p.causal is not None:
            seen &= ahead <= 0
        left, right = p.window or (None, None)
        if left is not None:
            seen &= ahead >= -left
        if right is not None:
            seen &= ahead <= right
        if p.allowed is not None:
            seen &= self.block(p.allowed, b, h, i, j)
        if self.bias is not None:
            seen &= ~np.isneginf(self.block(self.bias, b, h, i, j))
        if self.weight is not None:
            seen &= self.block(self.weight, b, h, i, j) != 0
        return seen

    def moved(self, corner: int, b: int, seq: tuple[slice, slice]) -> int:
        """Return the key of a sequence at which its first query stands, where more than `causal` says so."""
        p = self.problem
        corner = 0 if p.causal is None and p.alignment == "top_left" else corner
        if p.offset is None or isinstance(p.offset, int):
            return corner + (p.offset or 0)
        return corner + int(p.offset[b if p.cu_seqlens_q is None else p.segments(b).index(seq)])

    def scores(self, b: int, h: int, i: slice, j: slice, seq: tuple[slice, slice]) -> tuple[Array, Array | int]:
        """Return the scores of a tile, -inf where a key is not seen, and the softcap's slope."""
        s = (self.q[b, h, i] * self.scale) @ self.k[b, self.head_kv(h), j].T
        slope: Array | int = 1
        seen = self.seen(b, h, i, j, seq)
        if self.problem.softcap is not None:
            cap = self.kind.type(self.problem.softcap)
            t = np.tanh(s / cap)
            s, slope = t * cap, np.where(seen, 1 - t * t, 0)  # NaN behind the mask must not meet a dS of 0
        if self.slopes is not None:
            s = s - self.slopes[b, h] * self.apart(b, i, j)
        if self.bias is not None:
            s = s + self.block(self.bias, b, h, i, j)
        return np.where(seen, s, -np.inf).astype(self.kind), slope

    def apart(self, b: int, i: slice, j: slice) -> Array:
        """Return the distances of queries and keys in positions."""
        return np.asarray(np.abs(self.at[0][b, i][:, None] - self.at[1][b, j]).astype(self.kind))

    def weighted(self, p: Array, b: int, h: int, i: slice, j: slice) -> Array:
        """Return a tile of exponentials times how often each key counts."""
        return p if self.weight is None else p * self.block(self.weight, b, h, i, j)

    def dropped(self, x: Array, b: int, h: int, i: slice, j: slice) -> Array:
        """Return a tile of weights, or of their gradients, after dropout."""
        p, mask = self.problem.dropout_p, self.problem.dropout_mask
        if p is None or mask is None:
            return x
        by = self.kind.type(1) / (self.kind.type(1) - self.kind.type(p))
        return np.where(self.block(mask, b, h, i, j), x * by, 0)

    def block(self, x: Array, b: int, h: int, i: slice, j: slice) -> Array:
        """Return a tile of an array that broadcasts to (b, h, n_q, n_k)."""
        plane = x[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]
        tile: Array = plane[i if plane.shape[0] > 1 else slice(None), j if plane.shape[1] > 1 else slice(None)]
        return tile

    def add_bias(self, total: Array, b: int, h: int, i: slice, j: slice, ds: Array) -> None:
        """Add a tile of the gradient by the scores to that of the bias, summed where the bias was spread."""
        tile = self.block(total, b, h, i, j)
        for axis in (0, 1):
            if tile.shape[axis] == 1:
                ds = ds.sum(axis, keepdims=True)
        tile += ds

    def rounded(self, x: Array) -> Array:
        """Round P or dS to the input's type."""
        p = self.problem
        if self.kind == np.float64 or p.out_type == "float32" or (p.typed and FORMATS[p.out_type].precision < 8):
            return x
        return FORMATS[p.out_type].round_array(x.astype(np.float64)).astype(self.kind)


class _Pages:
    """A cache that is read as keys (b, h, n, d) are: by batch item, head and keys."""

    def __init__(self, x: Array, p: Problem) -> None:
        self.pages = x if p.page_layout == "NHD" else x.swapaxes(1, 2)
        self.table, self.size, self.room, self.shape = p.block_table, p.page_size, p.room, x.shape

    def __getitem__(self, at: tuple[int, int, Any]) -> Array:
        b, h, j = at
        keys = np.arange(j.start, j.stop) if isinstance(j, slice) else np.asarray(j)
        row, key = (b + keys // self.room, keys % self.room) if self.room else (keys, keys)  # packed: an item each
        found: Array = self.pages[self.table[row, key // self.size], key % self.size, h]
        return found


def model(dtype: str) -> Model:
    """Return how it rounds: parts of ``SPLIT`` keys are merged."""
    return replace(flash(dtype), split=SPLIT)


tiled.gradients, tiled.model = gradients, model  # type: ignore[attr-defined]
