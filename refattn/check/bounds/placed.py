r"""Predicted variances of gradients where queries and keys are normed or turned before they are multiplied.

With q and k as they are multiplied, T_ij what the gradient by the product of q_i and k_j moves one element of a result
by, that element is the sum of dS_ij T_ij: over a row for dq, a column for dk, all of a call for a norm's weights. Its
variance is that of dS, of D, which is common to a row, of what is lost where q and k are written, and of what the
gradient loses on its way back (docs/proofs/bounds.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import to_float64
from ...norms import NORMS
from ...positions import partners, places, tables
from ..model import C, inside_type
from .graph import WILD
from .parts import Parts, dot
from .rules import floor

__all__ = ["placed"]

Float = NDArray[np.float64]
ALIVE = 2**20
"""Elements of (columns, queries, keys) alive at a time."""


def placed(s: Parts, total: Any) -> None:
    """Add the variances of dq, dk, dv and the norms' weights' gradients of one head."""
    one, lost = s.one, _Lost(s)
    at = (one.batch, one.head, one.rows), (one.batch, one.head_kv, one.keys)
    for which, name in enumerate(("dq", "dk")):
        way = _Way(s, which)
        for c, v, b in way.inputs(s.weights.size):
            found = lost.by_row(b) if which == 0 else lost.by_key(b)
            total[name][at[which]][:, c] += (found + way.back(c, v, b)).T
        norm = f"d{NORMS[which]}"
        if norm in total:
            for c, v, b in way.weights(s.weights.size):
                total[norm][c] += lost.whole(b, which) + way.sums(v, b)
    for c in _columns(s.dout.shape[1], s.weights.size):
        total["dv"][at[1]][:, c] += lost.values(c).T
    total["dq"][at[0]][lost.wild] = np.nan
    if lost.wild.any():  # too large to foresee: what a row enters
        total["dk"][at[1]], total["dv"][at[1]] = np.nan, np.nan
        for n in NORMS:
            if f"d{n}" in total:
                total[f"d{n}"][:] = np.nan


def _columns(n: int, size: int) -> Iterator[NDArray[np.intp]]:
    yield from np.array_split(np.arange(n), max(1, min(n, n * size // ALIVE)))


class _Lost:
    """What is lost till dS meets keys, or queries, taken on to the results: T's are (columns, n_q, n_k)."""

    def __init__(self, s: Parts) -> None:
        self.s, self.scale, self.ds, w = s, s.scale, s.ds, s.weights
        seen, cap = np.asarray(s.one.allowed) * 1.0, s.one.problem.softcap
        self.own = self.scale**2 * (s.own() + max(s.tiny_w, s.tiny) * seen) + s.tiny * seen
        self.var_q, self.var_k = (x * x * v for x, v in zip((s.q, s.k), _written(s), strict=True))
        self.many = _times_there(s.q)[:, None], _times_there(s.k)
        self.slope = np.broadcast_to(s.slope, w.shape)
        self.p, self.curve = w * self.slope, np.zeros(w.shape)
        if cap is not None:  # the softcap's slope changes with a score, too
            self.curve = -2 * np.tanh(s.q @ s.k.T * self.scale / cap) / cap * self.ds
        mean = self.p @ s.k
        by_query = self.var_q @ (s.k * s.k).T - 2 * (self.var_q * mean) @ s.k.T
        by_query = by_query + (self.var_q * mean * mean).sum(1, keepdims=True)
        self.by_keys = self.scale**2 * (s.q * s.q) @ self.var_k.T
        spread = self.scale**2 * np.maximum(by_query, 0.0) + self.by_keys
        self.wild = s.wild[:, 0] | ((spread > WILD) & (w > 0)).any(1)
        # of a score less its row's mean, the error of its own key apart
        self.apart = self.scale**2 * np.maximum(by_query, 0.0) + (w * w * self.by_keys).sum(1, keepdims=True)

    def _followed(self, t: Float, many: Any) -> tuple[Float, Float]:
        """Return the variance of each row's sum of dS T by what is no key's or query's, and its slope by scores.

        Errors of dS that are `many` times the same add up by their sum's square, which is at most so often theirs.
        """
        s, w = self.s, self.s.weights
        sums, means = (self.ds * t).sum(2, keepdims=True), (self.p * t).sum(2, keepdims=True)
        of_row = s.var_d * means**2 + s.cu * (2 * s.lse**2 + 4) * sums**2
        slopes = self.slope * w * (s.x * (self.slope * t) - sums - means * (s.x - s.dlse)) + self.curve * t
        return (self.own * many * t * t).sum(2) + self.scale**2 * of_row[:, :, 0], slopes

    def by_row(self, b: Float) -> Float:
        """Return the variances of dq's columns, (columns, n_q), whose gradient by q is `b`."""
        s, t = self.s, b @ self.s.k.T
        found, slopes = self._followed(t, self.many[1])
        by_query = (self.var_q * (slopes @ s.k) ** 2).sum(2)
        by_key = (slopes * slopes * self.by_keys + self.ds**2 * (b * b @ self.var_k.T)).sum(2)
        return np.asarray(found + self.scale**2 * (self.scale**2 * by_query + by_key))

    def by_key(self, b: Float) -> Float:
        """Return the variances of dk's columns, (columns, n_k), whose gradient by k is `b`."""
        s, t = self.s, _met(self.s.q, b)
        moved = (self.ds * self.slope) ** 2 + self.curve**2
        found = (t * t * (self.own * self.many[0] + self.scale**2 * (self.p**2 * s.var_d + moved * self.apart))).sum(1)
        near = self.ds * self.slope * (1 - 2 * s.weights) + self.curve
        own_key = self.scale**2 * (self.var_k * ((t * near).swapaxes(1, 2) @ s.q) ** 2).sum(2)
        by_query = ((b * b @ self.var_q.T) * self.ds.T**2).sum(2)
        return np.asarray(found + self.scale**2 * (own_key + by_query))

    def whole(self, b: Float, which: int) -> Float:
        """Return the variances of sums over all rows, (columns,), whose gradient by q (0) or k (1) is `b`."""
        s = self.s
        found, slopes = self._followed(b @ s.k.T if which == 0 else _met(s.q, b), self.many[0] * self.many[1])
        to_q, to_k = self.scale * slopes @ s.k, self.scale * slopes.swapaxes(1, 2) @ s.q
        if which == 0:
            to_k = to_k + self.ds.T @ b
        else:
            to_q = to_q + self.ds @ b
        more = (self.var_q * to_q**2).sum((1, 2)) + (self.var_k * to_k**2).sum((1, 2))
        return np.asarray(found.sum(1) + self.scale**2 * more)

    def values(self, c: NDArray[np.intp]) -> Float:
        """Return the variances of dv's columns, (columns, n_k)."""
        s, g = self.s, self.s.dout[:, c]
        by, rows = s.kept * s.weights, s.rows_of_a_key
        each = by * by * (s.var_p + C * s.model.loss(s.model.weights) ** 2 + self.slope**2 * self.apart)
        found = (each * self.many[0]).T @ (g * g) + s.cu * dot(s.losses.f, rows, by.T, g)
        found = found + max(s.tiny_w, s.tiny) * (np.asarray(s.one.allowed).T @ (g * g)) + s.tiny * rows
        near = (by * self.slope * (1 - s.weights)).T * g.T[:, None]
        return np.asarray(found.T + self.scale**2 * (self.var_k * (near @ s.q) ** 2).sum(2))


def _met(q: Float, b: Float) -> Float:
    """Return the products of queries with what is there for each key, (columns, n_q, n_k)."""
    return np.asarray(q @ b.swapaxes(1, 2))


def _times_there(x: Float) -> Float:
    """Return how often each row is there, (n,): what is computed of rows that are alike is rounded alike."""
    _, at, count = np.unique(x, axis=0, return_inverse=True, return_counts=True)
    return np.asarray(count[at.reshape(-1)], np.float64)


def _written(s: Parts) -> tuple[float, float]:
    """Return the relative variances of queries and keys as they are multiplied: each step may be written out."""
    p, one = s.one.problem, s.model.scatter(s.model.rotated)
    turns = int(p.rotary is not None)
    q, k = (one * (turns + (getattr(p, n) is not None)) + 8 * s.cu for n in NORMS)
    return q, k


class _Way:
    """The way of one head's gradient by queries (0) or keys (1), from what is multiplied back to what was given."""

    def __init__(self, s: Parts, which: int) -> None:
        one, model, p = s.one, s.model, s.one.problem
        self.x, self.turned, d = (one.q, one.k)[which], p.rotary is not None, s.q.shape[1]
        self.weight = getattr(p, NORMS[which])
        self.u, self.scatter = s.cu, model.scatter(model.rotated)
        self.depth, self.rows = model.depth(d), model.depth(len(self.x))
        if self.weight is not None:
            self.w = to_float64(self.weight)
            self.r = 1 / np.sqrt((self.x * self.x).mean(1, keepdims=True) + p.norm_eps)
        if self.turned:
            self.cos, self.sin = tables(p, places(p, one.batch, one.rows, one.keys)[which])
            self.partner = partners(p)
        n = one.allowed.sum(1, keepdims=True) + np.ceil(len(s.k) / model.tile) if which == 0 else s.rows_of_a_key
        left, right = (s.ds, s.k) if which == 0 else (s.ds.T, s.q)
        g = s.scale * left @ right
        step = floor(inside_type(model.rotated), model) ** 2 / 3 if self.scatter else s.tiny
        self.lost = s.cu * s.scale**2 * dot(s.losses.f, n, left, right) + s.tiny * n
        self.lost = self.lost + (self.scatter * g * g + step if self.turned else 0.0)
        self.g, self.lost_before = g, np.zeros(g.shape)
        if self.turned:
            first, second = g * self.cos, (g * self.sin)[:, self.partner]
            self.g, self.lost_before = first + second, 4 * s.cu * (first**2 + second**2)
        if self.weight is not None:
            self.lost_before = self.lost_before + self.scatter * self.g**2 + step

    def _turn(self, v: Float) -> Float:
        return v * self.cos + v[:, :, self.partner] * self.sin if self.turned else v

    def inputs(self, size: int) -> Iterator[tuple[Any, Float, Float]]:
        """Yield columns of dq or dk, and what they are of the gradient before it is turned back, and behind."""
        n, d = self.x.shape
        for c in _columns(d, size):
            v = np.broadcast_to(np.eye(d)[c][:, None], (len(c), n, d))
            if self.weight is not None:
                x = self.x * self.r
                v = self.r * (self.w * v - x.T[c][:, :, None] * (x * self.w) / d)
            yield c, v, self._turn(v)

    def back(self, c: NDArray[np.intp], v: Float, b: Float) -> Float:
        """Return the variances of what is lost on the way, (columns, n)."""
        found = (b * b * self.lost + v * v * self.lost_before).sum(2)
        if self.weight is None:
            return np.asarray(found)
        x, g = self.x * self.r, self.w * self.g
        means = (x * g / x.shape[1]).sum(1, keepdims=True) ** 2 + ((x * g / x.shape[1]) ** 2).sum(1, keepdims=True)
        return np.asarray(found + (self.depth / 3 + 12) * self.u * (self.r**2 * (g * g + x * x * means)).T[c])

    def weights(self, size: int) -> Iterator[tuple[Any, Float, Float]]:
        """Yield columns of the gradient by the norm's weights, and the same of them."""
        d = self.x.shape[1]
        for c in _columns(d, size):
            v = np.eye(d)[c][:, None] * (self.x * self.r)
            yield c, v, self._turn(v)

    def sums(self, v: Float, b: Float) -> Float:
        """Return the variances of what is lost on the way and in the sum over rows, (columns,)."""
        terms = (v * self.g).sum(2)
        each = (self.scatter + self.u * (self.depth / 12 + 6)) * (terms * terms).sum(1)
        sums = self.u * (self.rows / 6) * ((terms * terms).sum(1) + terms.sum(1) ** 2)
        return np.asarray((b * b * self.lost + v * v * self.lost_before).sum((1, 2)) + each + sums)
