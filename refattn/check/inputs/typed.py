"""Calls whose query, key, value and out have types of their own, and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...problem import Problem
from ...scales import quantised
from .draw import Draw
from .positioned import rotary

__all__ = ["ONE", "TYPED", "WIDE", "typed"]

Blocks = tuple[int, int, int, int]
ONE = (1, 1, 1, 1)
WIDE = ("float32", "float16", "bfloat16")


def typed(
    draw: Draw,
    elements: str,
    query: Blocks | None,
    key: Blocks | None,
    value: Blocks | None,
    scales: str = "float32",
    **more: Any,
) -> Problem:
    """Return a call whose tensors are stored in a type, with so many scales along each axis; None leaves one as it is.

    Heads and rows are of very different size, so that one's scale is no other's.
    """
    sizes: dict[str, Any] = {"n_q": 32, "n_k": 64, "b": 2, "h": 4, "h_kv": 2, "d": 32} | more
    p = draw.problem(**sizes)
    found: dict[str, Any] = {}
    for name, blocks in (("query", query), ("key", key), ("value", value)):
        if blocks is None:
            continue
        x = getattr(p, name).astype(np.float64)
        if name != "query" and blocks[1] == sizes["h_kv"]:
            blocks = (blocks[0], p.heads_kv, *blocks[2:])
        if name != "query":
            x = (
                x
                * np.exp2(draw.rng.integers(-3, 2, (*x.shape[:2], 1, 1)))
                * np.exp2(draw.rng.integers(-1, 2, x.shape[2:]))
            )
        found[name], found[f"{name}_scale"] = quantised(x, elements, blocks, scales)
    return p.replace(**found, out_dtype=p.dtype)


def _nvfp4(d: Draw) -> Problem:
    """Return a call in NVFP4: a scale for each 16 elements in float8, times a number for each tensor."""
    p = typed(d, "float4_e2m1fn", (2, 4, 32, 2), (2, 2, 64, 2), (2, 2, 4, 32), "float8_e4m3fn")
    more = {n: (getattr(p, n).astype(np.float64) * 0.75).astype(np.float32) for n in ("key_scale", "value_scale")}
    return p.replace(**more)


def _out_float8(d: Draw) -> Problem:
    p = typed(d, "float8_e4m3fn", ONE, ONE, ONE, causal="bottom_right")
    by = np.array([0.01, 0.5, 0.03, 0.0078125], np.float32).reshape(1, 4, 1, 1)
    return p.replace(out_dtype="float8_e4m3fn", out_scale=by)


def _mixed(d: Draw) -> Problem:
    p = d.problem(b=2, h=4, h_kv=2)
    key = p.key.astype(np.float32).astype(np.float16)
    return p.replace(key=key, value=p.value.astype(np.float32), out_dtype=p.dtype)


def _rotary(d: Draw) -> Problem:
    """Return a call whose keys are scaled by channel: turned before they are scaled they are other keys."""
    p = typed(d, "int8", None, (1, 2, 1, 32), None, b=1, h=2, h_kv=2)
    return p.replace(**rotary(d, "half", 16))


def _entry(build: Callable[[Draw], Problem], dtypes: tuple[str, ...] = WIDE) -> tuple[Any, tuple[str, ...]]:
    return build, dtypes


TYPED: dict[str, tuple[Callable[[Draw], Problem], tuple[str, ...]]] = {
    "float8-by-tensor": _entry(lambda d: typed(d, "float8_e4m3fn", ONE, ONE, ONE)),
    # a scale of the neighbour's head: of the query's, where the key's is meant, in grouped heads
    "float8-by-head": _entry(lambda d: typed(d, "float8_e4m3fn", (2, 4, 1, 1), (2, 2, 1, 1), (2, 2, 1, 1))),
    "float8-e5m2": _entry(lambda d: typed(d, "float8_e5m2", ONE, (1, 2, 1, 1), ONE, causal="bottom_right")),
    "float8-of-keys": _entry(lambda d: typed(d, "float8_e4m3fn", None, (1, 2, 1, 1), (1, 2, 1, 1))),
    "int8-by-token-and-channel": _entry(lambda d: typed(d, "int8", (2, 4, 32, 1), (2, 2, 64, 1), (1, 2, 1, 32))),
    "int8-by-block": _entry(lambda d: typed(d, "int8", (2, 4, 2, 1), (2, 2, 4, 1), None)),
    "mxfp8": _entry(
        lambda d: typed(d, "float8_e4m3fn", (1, 4, 32, 2), (1, 2, 64, 2), (1, 2, 2, 64), "float8_e8m0fnu", b=1, d=64)
    ),
    "mxfp4": _entry(
        lambda d: typed(d, "float4_e2m1fn", (1, 4, 32, 2), (1, 2, 64, 2), (1, 2, 2, 64), "float8_e8m0fnu", b=1, d=64)
    ),
    "nvfp4": _entry(_nvfp4),
    "out-float8": _entry(_out_float8, ("float32",)),
    "types-differ": _entry(_mixed),
    "rotary-by-channel": _entry(_rotary),
}
"""Calls by label, and the formats of out that they are made in."""
