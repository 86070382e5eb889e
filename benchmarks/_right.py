"""Twenty right kernels of different algorithms and types: the judge must not call one of them wrong.

Ours are in NumPy and share how scores are made; they differ in how a row is summed. The others are libraries'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from refattn.arrays import from_float64, to_float64
from refattn.check.kernel import Kernel
from refattn.check.kernels import KERNELS
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, Capabilities, flash
from refattn.dtypes import FORMATS
from refattn.masks import visible
from refattn.problem import Problem

__all__ = ["kernels"]

LIBRARIES = (("torch-sdpa-flash", "float32"), ("torch-sdpa-math", "bfloat16"), ("jax", "float32"))
Row = Callable[..., tuple[Any, Any]]


def _two_passes(s: Any, v: Any, sink: Any, rounded: Any, base: str = "e") -> tuple[Any, Any]:
    """Take the maximum, then the exponentials, sum, divide at the end."""
    m = s.max(1, initial=-np.inf) if sink is None else np.maximum(s.max(1, initial=-np.inf), sink)
    m = np.where(np.isneginf(m), 0, m).astype(s.dtype)
    if base == "2":
        log2e = s.dtype.type(np.log2(np.e))
        e = np.exp2((s - m[:, None]) * log2e)
    else:
        e = np.exp(s - m[:, None])
    z = e.sum(1) if sink is None else e.sum(1) + np.exp(sink - m)
    out = rounded(e) @ v
    return np.where(z[:, None] == 0, 0, out / np.where(z == 0, 1, z)[:, None]), m + np.log(z)


def _normalised(s: Any, v: Any, sink: Any, rounded: Any) -> tuple[Any, Any]:
    """Divide the weights before they meet the values."""
    _, lse = _two_passes(s, v, sink, rounded)
    m = s.max(1, initial=-np.inf) if sink is None else np.maximum(s.max(1, initial=-np.inf), sink)
    m = np.where(np.isneginf(m), 0, m).astype(s.dtype)
    e = np.exp(s - m[:, None])
    z = e.sum(1) if sink is None else e.sum(1) + np.exp(sink - m)
    return rounded(e / np.where(z > 0, z, 1)[:, None]) @ v, lse


def _online(s: Any, v: Any, sink: Any, rounded: Any, tile: int, backward: bool = False) -> tuple[Any, Any]:
    """Go over tiles of keys, from either end, with a running maximum."""
    n = s.shape[1]
    m, z, out = np.full(len(s), -np.inf, s.dtype), np.zeros(len(s), s.dtype), np.zeros((len(s), v.shape[1]), s.dtype)
    for start in range(0, n, tile)[:: -1 if backward else 1]:
        part = s[:, start : start + tile]
        top = np.maximum(m, part.max(1))
        safe = np.where(np.isneginf(top), 0, top).astype(s.dtype)
        p, fade = np.exp(part - safe[:, None]), np.exp(m - safe)
        z = z * fade + p.sum(1)
        out = out * fade[:, None] + rounded(p) @ v[start : start + tile]
        m = top
    if sink is not None:
        top = np.maximum(m, sink)
        fade = np.exp(m - top)
        z, out, m = z * fade + np.exp(sink - top), out * fade[:, None], top
    safe = np.where(np.isneginf(m), 0, m).astype(s.dtype)
    return np.where(z[:, None] == 0, 0, out / np.where(z == 0, 1, z)[:, None]), safe + np.log(z)


def _split(s: Any, v: Any, sink: Any, rounded: Any, keys: int) -> tuple[Any, Any]:
    """Answer for parts of the keys, and merge the answers through their lse."""
    out, lse = np.zeros((len(s), v.shape[1]), s.dtype), np.full(len(s), -np.inf, s.dtype)
    for start in range(0, s.shape[1], keys):
        some, some_lse = _two_passes(s[:, start : start + keys], v[start : start + keys], None, rounded)
        whole = np.logaddexp(lse, some_lse)
        safe = np.where(np.isneginf(whole), 0, whole).astype(s.dtype)
        out = out * np.exp(lse - safe)[:, None] + some * np.exp(some_lse - safe)[:, None]
        lse = whole
    if sink is not None:
        whole = np.logaddexp(lse, sink).astype(s.dtype)
        out, lse = out * np.exp(lse - whole)[:, None], whole
    return out, lse


def _attention(problem: Problem, by_row: Row, inside: Any, weights: str) -> tuple[Any, Any]:
    """Return out and lse, a head and a sequence at a time; scores are in `inside`, weights rounded to a type."""
    p, kind = problem, np.dtype(inside)
    q, k, v = (to_float64(x).astype(kind) for x in (p.query, p.key, p.value))
    form = FORMATS[weights]

    def rounded(x: Any) -> Any:
        return x if form.precision >= np.finfo(kind).nmant + 1 else form.round_array(x.astype(np.float64)).astype(kind)

    out, lse = np.zeros(p.out_shape, kind), np.full(p.out_shape[:3], -np.inf, kind)
    scale = kind.type(p.d_k**-0.5 if p.scale is None else p.scale)
    with np.errstate(all="ignore"):
        for b, h in np.ndindex(p.batch, p.heads):
            g = h * p.heads_kv // p.heads
            for rows, keys in p.segments():
                s = (q[b, h, rows] @ k[b, g, keys].T) * scale
                if p.softcap is not None:
                    s = np.tanh(s / kind.type(p.softcap)) * kind.type(p.softcap)
                if p.bias is not None:
                    s = s + np.broadcast_to(to_float64(p.bias), (p.batch, p.heads, p.n_q, p.n_k))[
                        b, h, rows, keys
                    ].astype(kind)
                s = np.where(visible(p, b, h, rows, keys), s, -np.inf).astype(kind)
                sink = None if p.sink is None else kind.type(to_float64(p.sink)[h])
                if s.shape[1] or sink is not None:
                    out[b, h, rows], lse[b, h, rows] = by_row(s, v[b, g, keys], sink, rounded)
    final = FORMATS[p.dtype].round_array(out.astype(np.float64))
    return from_float64(final, p.dtype), lse.astype(np.float64 if p.dtype == "float64" else np.float32)


def kernels() -> dict[tuple[str, str], Kernel]:
    """Return the kernels by name and format."""
    able = Capabilities(features=FEATURES, lse=True)
    two, base_2 = _two_passes, partial(_two_passes, base="2")
    back, odd, split = partial(_online, tile=33, backward=True), partial(_online, tile=7), partial(_split, keys=48)
    ours: list[tuple[str, str, Row, str, str, dict[str, Any]]] = [
        ("two passes", "float32", two, "float32", "float32", {}),
        ("weights divided first", "float32", _normalised, "float32", "float32", {}),
        ("base 2", "float32", base_2, "float32", "float32", {"exp_ulps": 4.0}),
        ("tiles of 33 from the end", "float32", back, "float32", "float32", {}),
        ("tiles of 7", "float32", odd, "float32", "float32", {"tile": 7}),
        ("parts of 48", "float32", split, "float32", "float32", {"split": 48}),
        ("float64 inside", "float32", two, "float64", "float64", {}),
        ("two passes", "bfloat16", two, "float32", "bfloat16", {}),
        ("weights divided first", "bfloat16", _normalised, "float32", "bfloat16", {}),
        ("tiles of 33 from the end", "bfloat16", back, "float32", "bfloat16", {}),
        ("parts of 48", "bfloat16", split, "float32", "bfloat16", {"split": 48}),
        ("weights not rounded", "bfloat16", two, "float32", "float32", {"weights": "float32"}),
        ("two passes", "float16", two, "float32", "float16", {}),
        ("tiles of 33 from the end", "float16", back, "float32", "float16", {}),
        ("weights not rounded", "float16", two, "float32", "float32", {"weights": "float32"}),
        ("two passes", "float8_e4m3fn", two, "float32", "float8_e4m3fn", {}),
    ]
    found = {}
    for name, dtype, by_row, inside, weights, change in ours:
        kernel = partial(_attention, by_row=by_row, inside=inside, weights=weights)
        model = replace(flash(dtype), **change)
        found[name, dtype] = Kernel.of(
            kernel, model=model, capabilities=replace(able, dtypes=frozenset({dtype})), name=name
        )
    own = replace(able, dtypes=frozenset({"bfloat16"}))
    found["refattn-tiled", "bfloat16"] = Kernel.of(tiled, model=replace(flash("bfloat16"), split=64), capabilities=own)
    return found | {(n, d): KERNELS[n].kernel() for n, d in LIBRARIES if KERNELS[n].here}
