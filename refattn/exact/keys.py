"""The gradients of a few keys alone, from what each row knows: one text for every arithmetic.

    dk_j = scale sum_i P_ij (dout_i·v_j - d_i) q_i        dv_j = sum_i P_ij dout_i

with P_ij = exp(s_ij - lse_i) and d_i = dout_i·out_i - dlse_i; a softcap's slope comes beside scale. Where a few
elements of many are not decided, this costs next to nothing beside a whole backward pass. What out is divided by in the
end (``out_scale``) is left to the end here, too: dlse counts times it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..variants import Rows as RowsShape
from ..variants import variant_of
from .anywhere import beside
from .heads import Head, matrix_of
from .levels import Bounded, Level
from .matrix import Matrix
from .stream import Forward, each

__all__ = ["FEW", "Arriving", "Rows", "at_lse", "few_keys", "rows_by_definition", "rows_of"]

Float = NDArray[np.float64]
FEW = 64
"""Keys that :func:`few_keys` takes at a time: so many columns of a level keep a radius for each element."""
ROWS, ROWS_THERE = 2**9, 2**13
"""Rows at a time, on the CPU and on a device, where each step costs its start."""


@dataclass(frozen=True)
class Arriving:
    """The gradients that arrive at rows.

    Attributes
    ----------
    out : (..., d_v) float64
        At out.
    lse : (...) float64 or None
        At lse.
    """

    out: Float
    lse: Float | None = None

    def __getitem__(self, at: Any) -> Arriving:
        return Arriving(self.out[at], None if self.lse is None else self.lse[at])


@dataclass(frozen=True)
class Rows:
    """What the gradient of a key needs of each row.

    Attributes
    ----------
    index : (n,) integer array
        The rows: all that see a key.
    lse, d : matrices (n, 1) of an arithmetic
        Log-sum-exp, and dout·out - dlse, out being what is not yet divided by ``out_scale`` and dlse times it.
    """

    index: NDArray[np.intp]
    lse: Any
    d: Any


def rows_of(forward: Forward, arriving: Arriving, threads: int) -> Rows:
    """Return what rows know from a level's forward pass."""
    f = forward.f

    def part(at: slice) -> Float:
        with np.errstate(all="ignore"):
            d = (f.array(arriving.out[at]) * Bounded(f, *np.moveaxis(forward.out[at], -1, 0))).sum()
            d = d if arriving.lse is None else d - at_lse(forward.head, f, arriving.lse[at])
        return np.concatenate([d.h, d.l, np.broadcast_to(d.r, d.h.shape)], 1)

    d = np.concatenate(each(part, _slices(len(forward.rows), f), threads))
    return Rows(forward.rows, column(f, forward.lse), column(f, d))


def rows_by_definition(one: Head, f: Any, rows: NDArray[np.intp], arriving: Arriving, size: int) -> Rows:
    """Return what rows know in any arithmetic, from the definition, `size` rows at a time."""
    shape = variant_of(one.problem.variant).shape
    assert isinstance(shape, RowsShape)
    k, v = matrix_of(f, one.k), matrix_of(f, one.v)
    parts = []
    for i in range(0, len(rows), size):
        at = rows[i : i + size]
        out, lse = shape.define(matrix_of(f, one.q[at]), k, v, one.options(f, at))
        some = arriving[i : i + size]
        d = (matrix_of(f, some.out) * out).sum()
        parts.append((lse.a, (d if some.lse is None else d - at_lse(one, f, some.lse)).a))
    lse, d = (Matrix(np.concatenate(x), f) for x in zip(*parts, strict=True))
    return Rows(rows, lse, d)


def at_lse(one: Head, f: Any, x: Float) -> Any:
    """Return the gradients (n,) arriving at lse as a column, times what all gradients of a head are divided by last."""
    given = matrix_of(f, x[:, None])
    return given if one.out_scale is None else given * f.number(one.out_scale)


def few_keys(one: Head, f: Any, dout: Float, keys: NDArray[np.intp], known: Rows, threads: int) -> tuple[Any, Any]:
    """Return dk and dv of some keys, by the arithmetic's operators.

    Parameters
    ----------
    one : Head
        One head of softmax attention.
    f : arithmetic
        What to count in; the rows' numbers may come from a lower level.
    dout : (len(known.index), d_v) float64
        The gradient arriving at the rows.
    keys : integer array
        At most ``FEW`` of them.
    known : Rows
        All rows that see a key, at least one.
    threads : int
        Tiles of rows to work on at a time.
    """
    k, v = (matrix_of(f, x[beside(x, keys)]) for x in (one.k, one.v))

    def part(at: slice) -> tuple[Any, Any]:
        rows = known.index[at]
        o = one.options(f, rows[:1])
        q, g = matrix_of(f, one.q[rows]), matrix_of(f, dout[at])
        with np.errstate(all="ignore"):
            s, gain = q @ k.T * o.scale, None
            if o.softcap is not None:
                t = (s / o.softcap).tanh()
                s, gain = t * o.softcap, t * t
            if one.bias is not None:
                s = s + matrix_of(f, one.bias[np.ix_(rows, keys)])
            seen = one.allowed[np.ix_(rows, keys)]
            seen = f.xp.asarray(seen) if isinstance(f, Level) else seen
            p = (s - _part(known.lse, at)).exp(seen)
            by_score = p * (g @ v.T - _part(known.d, at))
            by_score = by_score if gain is None else by_score - by_score * gain
            return by_score.T @ q * o.scale, p.T @ g

    (dk, dv), *others = each(part, _slices(len(known.index), f), threads if isinstance(f, Level) else 1)
    for x, y in others:
        dk, dv = dk + x, dv + y
    return dk, dv


def column(f: Level, x: Float) -> Bounded:
    """Take (n, 3) numbers of a level as a column."""
    return Bounded(f, *(part[:, None] for part in x.T))


def _slices(n: int, f: Any) -> list[slice]:
    size = ROWS if getattr(f, "device", None) is None else ROWS_THERE
    return [slice(i, i + size) for i in range(0, n, size)]


def _part(x: Any, at: slice) -> Any:
    if isinstance(x, Matrix):
        return Matrix(x.a[at], x.f)
    return Bounded(x.f, x.h[at], x.l[at], np.broadcast_to(x.r, x.h.shape)[at])
