"""Tensors in memory as models hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import LINE, from_float64
from ...dtypes import FORMATS
from ...problem import Problem

__all__ = ["LAYOUTS", "laid"]

LAYOUTS = ("plain", "bshd", "fused", "spread", "cache", "columns", "views")
NAMES = ("query", "key", "value")


def laid(p: Problem, layout: str) -> Problem:
    """Return the same call with its tensors in memory as models hold them."""
    if layout == "bshd":  # a projection's output
        turned = {n: np.ascontiguousarray(getattr(p, n).swapaxes(1, 2)).swapaxes(1, 2) for n in NAMES}
        return p.replace(**turned)
    if layout == "fused":  # slices of one projection's output
        parts = [getattr(p, n).swapaxes(1, 2).reshape(p.batch, -1, _width(p, n)) for n in NAMES]
        names = list(NAMES) if p.n_q == p.n_k else list(NAMES[1:])
        whole = np.concatenate(parts[-len(names) :], axis=2)
        found, start = {}, 0
        for n in names:
            x, width = getattr(p, n), _width(p, n)
            view = whole[:, :, start : start + width]
            found[n] = view.reshape(p.batch, x.shape[2], x.shape[1], x.shape[3]).swapaxes(1, 2)
            start += width
        return p.replace(**found)
    if layout == "spread":  # one key head, or the keys of one batch, for all
        axis = 0 if p.batch > 1 else 1
        one = (slice(0, 1),) if axis == 0 else (slice(None), slice(0, 1))
        found = {n: np.broadcast_to(getattr(p, n)[one], getattr(p, n).shape) for n in NAMES[1:]}
        return p.replace(**found)
    if layout == "columns":  # keys by column, as decoding kernels hold them, beside values by row
        return p.replace(key=np.ascontiguousarray(p.key.swapaxes(2, 3)).swapaxes(2, 3))
    if layout == "turned":  # queries and values by column
        turned = {n: np.ascontiguousarray(getattr(p, n).swapaxes(2, 3)).swapaxes(2, 3) for n in ("query", "value")}
        return p.replace(**turned)
    if layout == "views":
        return _views(p)
    if layout == "odd":  # parts of a buffer that holds something else before them
        return p.replace(**{n: _odd(getattr(p, n)) for n in NAMES})
    if layout == "cache":  # the first rows of a cache that nothing was written to behind them
        return p.replace(**{n: _cached(getattr(p, n)) for n in NAMES[1:]})
    return p


def _views(p: Problem) -> Problem:
    """Return a call whose masks and biases are views with gaps, spread where they can be, and whose sink is narrow."""
    found: dict[str, Any] = {}
    for name in ("bias", "allowed"):
        x = getattr(p, name)
        if x is not None:
            found[name] = np.stack([x, x], 4)[..., 0]
            if x.shape[0] < p.batch:  # one for every batch
                found[name] = np.broadcast_to(found[name], (p.batch, *x.shape[1:]))
    if p.sink is not None and FORMATS[p.dtype].infinities:
        found["sink"] = from_float64(FORMATS[p.dtype].round_array(p.sink.astype(np.float64)), p.dtype)
    if p.cu_seqlens_q is not None:
        found |= {n: getattr(p, n).astype(np.int64) for n in ("cu_seqlens_q", "cu_seqlens_k")}
    value = np.concatenate([p.value, np.full_like(p.value, np.nan)], 3)[..., : p.d_v]
    return p.replace(value=value, **found)


def _cached(x: NDArray[Any]) -> NDArray[Any]:
    n = x.shape[2]
    room = np.full((*x.shape[:2], (n // 128 + 1) * 128, x.shape[3]), np.nan).astype(x.dtype)
    room[:, :, :n] = x
    return room[:, :, :n]


def _odd(x: NDArray[Any]) -> NDArray[Any]:
    """Return an array that begins one element past a multiple of 16 bytes."""
    step, room = x.dtype.itemsize, np.empty(x.size + 2 * LINE, x.dtype)
    first = -room.__array_interface__["data"][0] % LINE // step + 1
    found = room[first : first + x.size].reshape(x.shape)
    found[...] = x
    return found


def _width(p: Problem, name: str) -> int:
    x = getattr(p, name)
    return int(x.shape[1] * x.shape[3])
