"""Our own tiled kernel: online softmax in NumPy, float32 inside, P rounded to the input's type.

The running output is kept normalised, so no sum can leave the range of the values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import from_float64
from ...dtypes import FORMATS
from ...errors import UnsupportedProblem
from ...exact.slabs import Slab, slabs
from ...problem import Problem

__all__ = ["tiled"]

TILE = 64


def tiled(problem: Problem, tile: int = TILE) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return softmax attention by tiles of keys, as flash kernels do, and its lse.

    Parameters
    ----------
    problem : Problem
        Any softmax call.
    tile : int
        Keys to a tile.

    Returns
    -------
    out : (b, h_q, n_q, d_v), of the problem's type
    lse : (b, h_q, n_q) float32 (float64 for float64)
    """
    if problem.variant != "softmax":
        raise UnsupportedProblem(f"variant: the tiled kernel computes softmax, not {problem.variant}")
    kind = np.dtype(np.float64 if problem.dtype == "float64" else np.float32)
    out = np.zeros(problem.out_shape, kind)
    lse = np.full(problem.out_shape[:3], -np.inf, kind)
    for slab in slabs(problem):
        at = (slab.batch, slab.head, slab.rows)
        with np.errstate(all="ignore"):
            out[at], lse[at] = _head(slab, kind, tile, problem.dtype)
    return from_float64(FORMATS[problem.dtype].round_array(out), problem.dtype), lse


def _head(slab: Slab, kind: np.dtype[Any], tile: int, dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
    p = slab.problem
    scale = kind.type(p.scale if p.scale is not None else 1 / np.sqrt(p.d_k))
    q, k, v = slab.q.astype(kind) * scale, slab.k.astype(kind), slab.v.astype(kind)
    n_q, n_k = slab.allowed.shape
    m = np.full((n_q, 1), -np.inf, kind)
    z, o = np.zeros((n_q, 1), kind), np.zeros((n_q, v.shape[1]), kind)
    for start in range(0, n_k, tile):
        keys = slice(start, start + tile)
        s = q @ k[keys].T
        if p.softcap is not None:
            s = np.tanh(s / kind.type(p.softcap)) * kind.type(p.softcap)
        if slab.bias is not None:
            s = s + slab.bias[:, keys].astype(kind)
        s = np.where(slab.allowed[:, keys], s, -np.inf).astype(kind)
        top = np.maximum(m, s.max(1, keepdims=True))
        shift = np.where(np.isneginf(top), 0, top).astype(kind)
        weights = np.exp(s - shift)
        kept = z * np.exp(m - shift)
        z = kept + weights.sum(1, keepdims=True)
        share = np.where(z > 0, weights / z, 0)
        rounded = FORMATS[dtype].round_array(share).astype(kind) if kind == np.float32 else share
        o = np.where(z > 0, o * (kept / z), 0) + rounded @ v[keys]
        m = top
    if slab.sink is not None:
        sink = kind.type(slab.sink)
        top = np.maximum(m, sink)
        kept = z * np.exp(m - top)
        whole = kept + np.exp(sink - top)
        o, z, m = o * (kept / whole), whole, top
    lse = (np.where(np.isneginf(m), 0, m) + np.log(z))[:, 0]
    _overlay(slab, o, lse)
    return o, lse


def _overlay(slab: Slab, o: NDArray[Any], lse: NDArray[Any]) -> None:
    """Let NaN and inf reach the rows that see them, and no others."""
    for j in np.nonzero(~np.isfinite(slab.values).all(1))[0]:
        bad = ~np.isfinite(slab.values[j])
        o[np.ix_(slab.allowed[:, j], bad)] += slab.values[j][bad]
    o[slab.spoilt], lse[slab.spoilt] = np.nan, np.nan
