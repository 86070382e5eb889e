"""One head of one sequence at a time: the float64 pieces of a Problem that a definition runs on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_float64, to_numpy
from ..masks import block, distance, visible
from ..problem import Problem
from ..variants import variant_of
from .matrix import Matrix

__all__ = ["Slab", "matrix_of", "slabs"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


def matrix_of(f: Any, x: Float) -> Any:
    """Take a float64 matrix into an arithmetic, exactly."""
    taken = f.array(x)
    return Matrix(taken, f) if isinstance(taken, np.ndarray) else taken  # a field and a tier have their own


@dataclass(frozen=True)
class Slab:
    """One query head of one packed sequence, in float64 (exact), non-finite inputs set aside.

    Attributes
    ----------
    batch, head, head_kv : int
        Where it comes from.
    rows, keys : slice
        Its queries and keys.
    q, k, v : (n_q, d_k), (n_k, d_k), (n_k, d_v)
        With 0 in place of NaN and inf.
    bias : (n_q, n_k) or None
        With 0 in place of -inf, NaN and inf.
    allowed : (n_q, n_k) bool
        Every mask combined.
    sink : float or None
        None also where it is -inf.
    live : (n_q,) bool
        Rows that the definition must be asked for: they see a key and nothing non-finite decides them.
    spoilt : (n_q,) bool
        Rows whose out and lse are NaN by the contract.
    values : (n_k, d_v)
        The values as they came, NaN and inf included.
    """

    problem: Problem
    batch: int
    head: int
    head_kv: int
    rows: slice
    keys: slice
    q: Float
    k: Float
    v: Float
    bias: Float | None
    allowed: Mask
    sink: float | None
    live: Mask
    spoilt: Mask
    values: Float

    def options(self, f: Any, rows: Any = slice(None)) -> SimpleNamespace:
        """Return what a definition calls ``o``: the options in the arithmetic, for some rows."""
        p, variant = self.problem, variant_of(self.problem.variant)
        allowed = self.allowed[rows]
        if p.scale is not None:
            scale = f.number(p.scale)
        else:
            scale = f.rsqrt(p.d_k) if variant.default_scale == "rsqrt" else f.number(1)
        o = SimpleNamespace(
            scale=scale,
            softcap=None if p.softcap is None else f.number(p.softcap),
            bias=None if self.bias is None else matrix_of(f, self.bias[rows]),
            sink=None if self.sink is None else matrix_of(f, np.array([[self.sink]])),
            allowed=allowed,
            count=matrix_of(f, allowed.sum(1, keepdims=True).astype(np.float64)),
            length=matrix_of(f, np.array([[float(self.k.shape[0])]])),
        )
        for name, value in variant.settings(p).items():
            x = value[self.head] if isinstance(value, tuple) else value
            setattr(
                o, name, f.number(x) if isinstance(variant.options[name].default, float) or isinstance(x, float) else x
            )
        if getattr(o, "decay", None) is not None:
            steps = distance(self.q.shape[0], self.k.shape[0], p.causal or "bottom_right")[rows]
            o.distance = matrix_of(f, steps.astype(np.float64))
        return o

    def plain(self, rows: Any = slice(None)) -> SimpleNamespace:
        """Return the options as float64 NumPy arrays and numbers."""
        from .arithmetics import Floats

        o = self.options(Floats(), rows)
        return SimpleNamespace(
            **{n: x.a if isinstance(x, Matrix) else x for n, x in vars(o).items()}
            | {"sink": self.sink, "length": float(self.k.shape[0])}
        )


def slabs(problem: Problem) -> Iterator[Slab]:
    """Yield the heads of a call, batch by batch, query heads of one key head together."""
    p = problem.to("numpy")
    q, k, v = (to_float64(to_numpy(x)) for x in (p.query, p.key, p.value))
    sink = None if p.sink is None else to_float64(p.sink)
    group = p.heads // p.heads_kv
    for b in range(p.batch):
        for h in range(p.heads):
            for rows, keys in p.segments():
                allowed = visible(p, b, h, rows, keys)
                bias = None if p.bias is None else to_float64(block(p.bias, b, h, rows, keys))
                s = None if sink is None or np.isneginf(sink[h]) else float(sink[h])
                parts = (q[b, h, rows], k[b, h // group, keys], v[b, h // group, keys])
                bad = _spoilt(parts[0], parts[1], bias, s, allowed)
                live = allowed.any(1) & ~bad
                clean = [x if np.isfinite(x).all() else np.where(np.isfinite(x), x, 0.0) for x in parts]
                if bias is not None:
                    bias = np.where(np.isfinite(bias), bias, 0.0)
                if s is not None and not np.isfinite(s):
                    s = None
                yield Slab(
                    p, b, h, h // group, rows, keys, clean[0], clean[1], clean[2], bias, allowed, s, live, bad, parts[2]
                )


def _spoilt(q: Float, k: Float, bias: Float | None, sink: float | None, allowed: Mask) -> Mask:
    """Return the rows that are NaN by the contract: a non-finite query, key in sight, bias above -inf, or sink."""
    lost: Mask = np.asarray((~np.isfinite(k)).any(1))
    bad: Mask = np.asarray(allowed[:, lost].any(1))
    bad |= ~np.isfinite(q).all(1) & allowed.any(1)
    if bias is not None:
        bad |= (allowed & ~np.isfinite(bias)).any(1)
    if sink is not None and not np.isfinite(sink):
        bad[...] = True
    return bad
