"""What kernels get wrong about norms over heads, T5's buckets of distances, and where queries and keys stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ...arrays import from_float64, to_float64
from ...dtypes import FORMATS
from ...norms import NORMS
from ...positions import POSITIONS
from ...problem import Problem
from ..inputs.positioned import FARTHEST, t5_bucket, t5_distances

__all__ = ["POSITION_BUGS"]

Float = NDArray[np.float64]


def _norm_over(p: Problem, queries: int, keys: int, divisor: int = 0) -> Problem:
    """Take means over so many heads side by side, 0 for all of them; over `divisor` times a head's width if given."""
    found = {}
    for name, norm, heads in (("query", NORMS[0], queries), ("key", NORMS[1], keys)):
        weight = getattr(p, norm)
        if weight is None:
            continue
        x = to_float64(getattr(p, name))
        b, h, n, d = x.shape
        heads = heads or h
        squares = (x * x).reshape(b, h // heads, heads, n, d).sum((2, 4)) / ((divisor or heads) * d)
        root = np.sqrt(squares.repeat(heads, 1)[..., None] + p.norm_eps)
        found[name] = from_float64(FORMATS[p.dtype].round_array(x / root * to_float64(weight)), p.dtype)
    return p.replace(**found, **dict.fromkeys((*NORMS, "norm_eps"))) if found else p


def _over_all_heads(p: Problem) -> Problem:
    """Take the mean over all heads, as OLMo 2 does: another operator."""
    return _norm_over(p, 0, 0)


def _keys_over_all_heads(p: Problem) -> Problem:
    return _norm_over(p, 1, 0)


def _over_a_group(p: Problem) -> Problem:
    """Take the mean over the query heads that share a key head."""
    return _norm_over(p, p.heads // p.heads_kv, 1)


def _over_all_by_one(p: Problem) -> Problem:
    """Add up the squares of all heads, and divide by the width of one."""
    return _norm_over(p, 0, 0, 1)


def _t5(p: Problem, change: Callable[[NDArray[np.int64], bool], NDArray[np.int64]]) -> Problem:
    """Make a bias that goes by T5's buckets anew, with other buckets; another bias stays as it is."""
    if p.bias is None or p.bias.shape[2:] != (p.n_q, p.n_k) or p.cu_seqlens_q is not None or not p.bias.size:
        return p
    ahead, both = t5_distances(p.n_q, p.n_k), p.causal is None
    right, wrong, bias = t5_bucket(ahead, both), change(ahead, both), p.bias.copy()
    for bucket in np.unique(right):
        values = p.bias[:, :, right == bucket]
        if (values != values[:, :, :1]).any():
            return p
        bias[:, :, wrong == bucket] = values[:, :, :1]
    return p.replace(bias=bias)


def _last_unreached(ahead: NDArray[np.int64], both: bool) -> NDArray[np.int64]:
    """Give the farthest distances the last bucket but one."""
    found, (most, least) = t5_bucket(ahead, both), (FARTHEST, -FARTHEST)
    for end in (most, least) if both else (least,):
        last = t5_bucket(np.array([end]), both)
        found = np.where(found == last, last - 1, found)
    return found


def _m(p: Problem) -> int:
    """Return how many positions have rows of keys in tables that have rows of queries behind them, else 0."""
    if p.rotary is None or p.positions_q is None or not p.n_q:
        return 0
    half = p.rotary_cos.shape[0] // 2
    return half if p.rotary_cos.shape[0] == 2 * half and bool((p.positions_q >= half).all()) else 0


def _tempered(p: Problem, change: Callable[[Float], Float]) -> Problem:
    """Change the factors by position of queries."""
    m = _m(p)
    if not m:
        return p
    cos, sin = (to_float64(x) for x in (p.rotary_cos, p.rotary_sin))
    sizes = (cos * cos + sin * sin).sum(1)
    factors = change(np.sqrt(sizes[m:] / sizes[:m]))[:, None]
    wide = p.rotary_cos.dtype
    tables = [np.concatenate([x[:m], x[:m] * factors]).astype(wide) for x in (cos, sin)]
    return p.replace(rotary_cos=tables[0], rotary_sin=tables[1])


def _on_keys(p: Problem) -> Problem:
    """Multiply keys by the factors of their positions, too."""
    m = _m(p)
    at = np.arange(p.n_k) if p.positions_k is None else p.positions_k
    return p.replace(positions_k=at + m) if m else p


def _own_tables(p: Problem) -> Problem:
    """Make angles by the usual formula, whatever tables are given."""
    if p.rotary is None:
        return p
    m, pairs = p.rotary_cos.shape
    angle = np.arange(m)[:, None] * 10000.0 ** (-np.arange(pairs) / pairs)
    made = {"rotary_cos": np.cos(angle), "rotary_sin": np.sin(angle)}
    return p.replace(**{n: x.astype(p.rotary_cos.dtype) for n, x in made.items()})


def _in_bfloat16(p: Problem) -> Problem:
    """Hold positions in bfloat16: past 256 some are others."""
    at = {n: getattr(p, n) for n in POSITIONS if getattr(p, n) is not None}
    most = None if p.rotary is None else p.rotary_cos.shape[0] - 1
    held = {n: np.clip(to_float64(from_float64(x.astype(np.float64), "bfloat16")), None, most) for n, x in at.items()}
    return p.replace(**{n: x.astype(at[n].dtype) for n, x in held.items()})


def _level_for_none(p: Problem) -> Problem:
    """Take slopes of 0 for none given, and make the usual ones."""
    if p.alibi_slopes is None or np.any(p.alibi_slopes):
        return p
    made = 2.0 ** (-8 * np.arange(1, p.heads + 1) / p.heads)
    return p.replace(alibi_slopes=made.astype(p.alibi_slopes.dtype))


POSITION_BUGS: dict[str, Callable[[Problem], Problem]] = {
    "norm_over_all_heads": _over_all_heads,
    "norm_of_keys_over_all_heads": _keys_over_all_heads,
    "norm_over_a_group": _over_a_group,
    "norm_over_all_heads_by_one_width": _over_all_by_one,
    "t5_both_ways_for_one": partial(_t5, change=lambda ahead, both: t5_bucket(ahead, True)),
    "t5_one_way_for_both": partial(_t5, change=lambda ahead, both: t5_bucket(ahead, False)),
    "t5_query_less_key": partial(_t5, change=lambda ahead, both: t5_bucket(-ahead, both)),
    "t5_other_base": partial(_t5, change=lambda ahead, both: t5_bucket(ahead, both, farthest=2 * FARTHEST)),
    "t5_last_unreached": partial(_t5, change=_last_unreached),
    "temperature_ignored": partial(_tempered, change=np.ones_like),
    "temperature_of_next_position": partial(_tempered, change=lambda f: np.append(f[1:], f[-1:])),
    "temperature_of_last_query": partial(_tempered, change=lambda f: np.full_like(f, f[-1])),
    "temperature_on_keys": _on_keys,
    "rotary_own_tables": _own_tables,
    "positions_in_bfloat16": _in_bfloat16,
    "alibi_of_zero_made": _level_for_none,
}
"""An edit of the problem that a right kernel is given, by name."""
