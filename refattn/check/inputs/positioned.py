"""Calls in which positions count: rotary positions, ALiBi slopes, and positions that are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...norms import NORMS
from ...positions import STYLES
from ...problem import Problem
from .draw import Draw

__all__ = ["FARTHEST", "POSITIONED", "norm_case", "norms", "rotary", "slopes", "t5_bucket", "t5_distances"]

BUCKETS = 16
FARTHEST = 32
"""Of T5's bias: its table's length, and the distance from which on all share a bucket."""


def rotary(d: Draw, style: str, pairs: int, longest: int = 80, base: float = 10000.0) -> dict[str, Any]:
    """Return arguments of rotary positions: cosines and sines in float32 (float64 for float64), as kernels get them.

    Where calls may not have the style they get the other, where some columns may not be left all are turned.
    """
    style = d.one_of(style, *STYLES, of="rotary")
    if not d.has(f"rotary_{style}"):
        return {}
    pairs = d.width(32) // 2 if pairs == 16 or not d.has("rotary_partial") else pairs
    angle = np.arange(longest)[:, None] * base ** (-np.arange(pairs) / pairs)
    wide = np.float64 if d.form.precision == 53 else np.float32
    return {"rotary": style, "rotary_cos": np.cos(angle).astype(wide), "rotary_sin": np.sin(angle).astype(wide)}


def slopes(d: Draw, *shape: int) -> Any:
    """Return ALiBi slopes that differ from head to head."""
    wide = np.float64 if d.form.precision == 53 else np.float32
    n = int(np.prod(shape))
    return (2.0 ** -np.linspace(1, 6, n)).reshape(shape).astype(wide)


def _given(d: Draw) -> Problem:
    """Return a call whose queries and keys stand anywhere, each batch item's elsewhere; some columns are not turned."""
    at: dict[str, Any] = {
        f"positions_{x}": d.rng.integers(0, 200, (2, n), dtype=np.int32) for x, n in (("q", 20), ("k", 40))
    }
    tables = rotary(d, "interleaved", 12, 200)
    if tables:  # numbers of no formula: a kernel that makes its own has others
        x = d.rng.uniform(-1.25, 1.25, (2, *tables["rotary_cos"].shape)).astype(tables["rotary_cos"].dtype)
        tables |= {"rotary_cos": x[0], "rotary_sin": x[1]}
    return d.problem(20, 40, b=2, **tables, **at)


def _decoded(d: Draw) -> Problem:
    """Return four tokens for each of three caches of their own lengths, the rows behind them full of other numbers."""
    lengths: dict[str, Any] = {"lengths_k": np.array([67, 33, 5], np.int32), "alibi_slopes": slopes(d, 4)}
    p = d.problem(4, 67, b=3, h=4, h_kv=2, causal="bottom_right", **lengths, **rotary(d, "half", 12, base=1e6))
    if p.lengths_k is None:
        return p
    key, value = p.key.copy(), p.value.copy()
    for b, n in enumerate((67, 33, 5)):
        key[b, :, n:], value[b, :, n:] = 8, 8
    return p.replace(key=key, value=value)


def _packed(d: Draw) -> Problem:
    """Return sequences whose keys begin elsewhere than their queries and stand anywhere; queries have an offset."""
    ends = {"q": [0, 17, 17, 40], "k": [0, 20, 22, 52]}
    more: dict[str, Any] = {f"cu_seqlens_{x}": np.array(e, np.int32) for x, e in ends.items()}
    more |= {"offset": np.array([2, 0, 3]), "positions_k": d.rng.integers(0, 80, 52), "alibi_slopes": slopes(d, 2)}
    return d.problem(40, 52, causal="bottom_right", **more, **rotary(d, "half", 16))


def _alibi(d: Draw) -> Problem:
    more: dict[str, Any] = {"softcap": 5.0, "bias": d.normal(1, 1, 1, 40), "positions_k": d.rng.integers(0, 40, 40)}
    return d.problem(20, 40, b=2, h=4, h_kv=2, alibi_slopes=slopes(d, 2, 4), **more)


def _half(d: Draw) -> Problem:
    at: dict[str, Any] = {"positions_q": d.rng.integers(0, 80, 20)}
    return d.problem(20, 40, h=4, h_kv=2, causal="bottom_right", **at, **rotary(d, "half", 16, base=500.0))


def norms(d: Draw, width: int = 32) -> dict[str, Any]:
    """Return weights of queries' and keys' norms, unlike for every column, and an epsilon that small rows feel."""
    wide = np.float64 if d.form.precision == 53 else np.float32
    weights = (np.exp(d.normal(d.width(width)) / 2).astype(wide) for _ in NORMS)
    return dict(zip(NORMS, weights, strict=True)) | {"norm_eps": 1e-5}


def _normed(d: Draw) -> Problem:
    """Return rows of sizes from 1/64 to 8, so that a norm that is not taken, or taken of all rows, shows."""
    sizes = 2.0 ** d.rng.integers(-6, 4, (2, 1, 40, 1))
    q, k = d.normal(2, 4, 20, d.width(32)) * sizes[:, :, :20], d.normal(2, 2, 40, d.width(32)) * sizes
    return d.problem(20, 40, b=2, h=4, h_kv=2, q=q, k=k if d.has("grouped_heads") else None, **norms(d))


def _normed_turned(d: Draw) -> Problem:
    return d.problem(20, 40, h=4, h_kv=2, causal="bottom_right", **norms(d), **rotary(d, "half", 16, base=500.0))


def _normed_aligned(d: Draw) -> Problem:
    """Return values that are the keys; where the queries arrive, all rows add to the weights' gradients one way."""
    grouped, width = d.has("grouped_heads"), d.width(32)
    q, k = d.normal(1, 4, 20, width), d.normal(1, 2 if grouped else 4, 40, width)
    return d.problem(20, 40, h=4, h_kv=2, q=q, k=k, v=k, **norms(d))


def t5_distances(n_q: int, n_k: int) -> NDArray[np.int64]:
    """Return by how much each key is ahead of each query, (n_q, n_k): the last query stands at the last key."""
    found: NDArray[np.int64] = np.arange(n_k) - (np.arange(n_q)[:, None] + n_k - n_q)
    return found


def t5_bucket(
    ahead: NDArray[np.int64], both: bool, buckets: int = BUCKETS, farthest: int = FARTHEST
) -> NDArray[np.int64]:
    """Return T5's bucket of distances: near ones have one each, others share the rest by logarithm, to `farthest`.

    ``functions.t5_buckets`` decides edges exactly; here a table only has to be the same wherever it is made.
    """
    half = buckets // 2 if both else buckets
    near, first = half // 2, half * (ahead > 0) if both else 0 * ahead
    far = np.abs(ahead) if both else np.maximum(-ahead, 0)
    steps = np.log(np.maximum(far, near) / near) / np.log(farthest / near) * (half - near)
    return np.asarray(first + np.where(far < near, far, np.minimum(near + steps.astype(np.int64), half - 1)))


def _t5(d: Draw, n_q: int, causal: str | None) -> Problem:
    """Return a call whose bias goes by T5's buckets, some of them past the last."""
    bias = 2 * d.normal(1, 4, BUCKETS)[:, :, t5_bucket(t5_distances(n_q, 40), causal is None)]
    return d.problem(n_q, 40, b=2, h=4, h_kv=2, scale=0.3, causal=causal, bias=bias)


def _tempered(d: Draw) -> Problem:
    """Return queries whose scores grow with their position, in steps of 8; their rows of tables are behind keys'."""
    tables, m = rotary(d, "half", 16, 40, 500.0), 40
    factors = 1 + np.log((np.arange(m) + 1) // 8 + 1)[:, None] / 4
    for name in ("rotary_cos", "rotary_sin") if tables else ():
        x = tables[name]
        tables[name] = np.concatenate([x, (x * factors).astype(x.dtype)])
    at: dict[str, Any] = {"positions_q": m + 20 + np.arange(20)} if tables else {}
    return d.problem(20, 40, h=4, h_kv=2, causal="bottom_right", **at, **tables)


def norm_case(d: Draw) -> Problem:
    """Return a plain call with norms."""
    return d.problem(20, 33, **norms(d))


Entry = tuple[Callable[[Draw], Problem], tuple[str, ...]]
POSITIONED: dict[str, Entry] = {
    # half for interleaved, a position too far, angles the other way round, one of two positions taken for none
    "rotary-half": (_half, ("rotary", "causal")),
    "rotary-given": (_given, ("rotary",)),
    "rotary-decoding": (_decoded, ("rotary", "causal", "lengths_k")),
    "rotary-packed": (_packed, ("rotary", "alibi_slopes", "causal")),
    # a norm that is left out, of one of two, or without weights
    "norm": (_normed, ("query_norm", "key_norm")),
    # gradients by the weights that are a little too large or small: here they are many times their roundings
    "norm-aligned": (_normed_aligned, ("query_norm", "key_norm")),
    # weights that are of the turned columns: rotary positions before the norm
    "norm-rotary": (_normed_turned, ("query_norm", "key_norm", "rotary", "causal")),
    # both directions for one and the other way round, another base of the logarithm, a last bucket that none reaches
    "t5": (lambda d: _t5(d, 30, None), ("bias",)),
    "t5-causal": (lambda d: _t5(d, 20, "bottom_right"), ("bias", "causal")),
    # factors by position left out, of the next position, of the last query for all, on keys too
    "tempered": (_tempered, ("rotary", "causal")),
    # before and behind the query, after softcap, a slope of the neighbour's head or batch
    "alibi-by-batch": (_alibi, ("alibi_slopes", "softcap", "bias")),
}
"""Calls by label, and the options that an operator must have for them."""
