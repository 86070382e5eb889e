"""Eviction of keys and tokens by a draft's attention: SpecKV (a cache cut down) and SpecPC (a prompt cut down)."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as api

from ..errors import InvalidInput
from .arguments import axes, namespace, ordered, whole
from .dense import check_floats
from .probabilities import attended, causal_mask, probabilities, rank

__all__ = ["evict", "speckv", "speckv_scores", "specpc_scores", "specpc_select"]


def speckv_scores(
    query: Any, key: Any, *, scale: float | None = None, reduce: str = "max", pooling: str = "max", pool: int = 7
) -> Any:
    """Return SpecKV's importance of each key before the last w: attention that the last w queries pay to it, pooled.

    ``s_j = pool_j(reduce_{h in group, i} p_hij)``, where ``p_hij`` are the causal probabilities of the w queries given.

    Parameters
    ----------
    query : (b, h_q, w, d)
        The last w queries: the window and the drafted tokens.
    key : (b, h_kv, n, d)
        With n > w.
    scale : float, optional
        None is 1/sqrt(d).
    reduce : {"max", "mean"}
        Over a group's query heads and the queries.
    pooling : {"max", "average"}
        Over neighbouring keys; in an average, places beyond the ends count as zeros.
    pool : int
        Odd number of keys of a pool.

    Returns
    -------
    (b, h_kv, n - w)

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: SpecKV in `furiosa-ai/draft-based-approx-llm`, whose `compress_kv` was read; the paper was not.
    """
    xp = attended(query, key)
    w, n = query.shape[2], key.shape[2]
    _one_of("reduce", reduce, "max", "mean")
    _one_of("pooling", pooling, "max", "average")
    if not whole("pool", pool, 1) % 2:
        raise InvalidInput(f"pool: got {pool}, expected an odd number of keys, so that a pool has a middle")
    if w == n:
        raise InvalidInput(f"query: has as many queries as there are keys, {n}, expected fewer; give the last w only")
    p = probabilities(xp, query, key, scale, causal_mask(xp, w, n, query))[..., : n - w]
    ordered("query, key", p)
    found = xp.max(p, axis=(2, 3)) if reduce == "max" else xp.mean(p, axis=(2, 3))
    return _pooled(xp, found, pool // 2, pool // 2, pooling)


def evict(key: Any, value: Any, scores: Any, *, capacity: int) -> tuple[Any, Any, Any]:
    """Return a cache of at most `capacity` keys: those of the largest scores, in falling order, then the window.

    The window is what has no score: the last ``n - scores.shape[2]`` keys. Among equal scores the lower index is kept.

    Parameters
    ----------
    key, value : (b, h_kv, n, d), (b, h_kv, n, d_v)
    scores : (b, h_kv, n - window)
    capacity : int
        At least the window. From n on nothing changes: the order, too, is that of the input.

    Returns
    -------
    key, value : (b, h_kv, min(n, capacity), d or d_v)
    positions : (b, h_kv, min(n, capacity)) integers
        Where each kept key was.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`speckv_scores`. Keys carry their positions already (RoPE), so that their order does not matter.
    """
    xp = namespace(key=key, value=value, scores=scores)
    axes("key", key, "batch", "heads", "keys", "dim")
    axes("value", value, *key.shape[:3], "dim")
    axes("scores", scores, *key.shape[:2], "keys")
    check_floats(scores=scores)
    n, window = key.shape[2], key.shape[2] - scores.shape[2]
    if window < 0:
        raise InvalidInput(f"scores: has {scores.shape[2]} keys, expected at most key's {n}")
    whole("capacity", capacity, max(window, 1))
    all_places = xp.broadcast_to(xp.arange(n, device=api.device(key)), key.shape[:3])
    if n <= capacity:
        return key, value, all_places
    ordered("scores", scores)
    order = xp.argsort(-scores, axis=-1, stable=True)[..., : capacity - window]
    kept = xp.concat([order, all_places[..., n - window :]], axis=-1)
    return _rows(xp, key, kept), _rows(xp, value, kept), kept


def speckv(
    query: Any,
    key: Any,
    value: Any,
    *,
    lookahead: int,
    capacity: int = 256,
    window: int = 32,
    scale: float | None = None,
    reduce: str = "max",
    pooling: str = "max",
    pool: int = 7,
) -> tuple[Any, Any, Any]:
    """Return the cache that SpecKV starts decoding from: scored with a draft's L tokens, which are dropped again.

    Of the n + L keys, ``w = window + L + 1`` score, ``capacity + L + 1`` are kept, and the last ``L + 1`` are dropped:
    the drafted ones, and the prompt's last token, which is decoded first.

    Parameters
    ----------
    query, key, value : (b, h_q, n + L, d), (b, h_kv, n + L, d), (b, h_kv, n + L, d_v)
        The target's, of the prompt and the L drafted tokens.
    lookahead : int
        L, the number of drafted tokens.
    capacity, window : int
        Keys to keep, and how many of these are the prompt's last ones before its very last token.
    scale, reduce, pooling, pool
        As in :func:`speckv_scores`.

    Returns
    -------
    key, value, positions
        As of :func:`evict`: ``min(n - 1, capacity)`` keys of each head.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`speckv_scores`.
    """
    attended(query, key, value)
    extra = whole("lookahead", lookahead, 0) + 1
    w, n = whole("window", window, 1) + extra, key.shape[2]
    whole("capacity", capacity, window)
    if query.shape[2] != n:
        raise InvalidInput(f"query: has {query.shape[2]} queries, expected one for each of the {n} keys")
    if n <= w:
        raise InvalidInput(f"key: has {n} keys, expected more than window + lookahead + 1 = {w}")
    scores = speckv_scores(query[:, :, -w:], key, scale=scale, reduce=reduce, pooling=pooling, pool=pool)
    k, v, positions = evict(key, value, scores, capacity=capacity + extra)
    return k[:, :, :-extra], v[:, :, :-extra], positions[:, :, :-extra]


def specpc_scores(attention: Any, *, reduce: str = "max") -> Any:
    """Return SpecPC's importance of each token: a draft's attention to it from its last w queries, the newest most.

    ``s_j = reduce_{layer, head, i} (i / (w - 1)) p_ij`` for i from 0 (the oldest) to w - 1; one query has weight 1.

    Parameters
    ----------
    attention : (b, layers, heads, w, n)
        A draft's probabilities; the paper's w is 64, its layers are those from the ninth on. Scores of the tokens that
        a draft adds (w = 1 each) are joined with the prompt's by the same reduction.
    reduce : {"max", "sum"}

    Returns
    -------
    (b, n)

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: SpecPC in `furiosa-ai/draft-based-approx-llm`, whose `specpc.py` and `specpc_utils.py` were read; the paper
    was not.
    """
    xp = namespace(attention=attention)
    axes("attention", attention, "batch", "layers", "heads", "queries", "keys")
    _one_of("reduce", reduce, "max", "sum")
    w = attention.shape[3]
    weights = [i / (w - 1) for i in range(w)] if w > 1 else [1.0]
    by_age = xp.asarray(weights, dtype=attention.dtype, device=api.device(attention))
    weighted = attention * by_age[:, None]
    return (xp.max if reduce == "max" else xp.sum)(weighted, axis=(1, 2, 3))


def specpc_select(
    scores: Any, *, capacity: int = 1024, window: int = 64, neighbors: int = 64, pool: int = 64, pooling: str = "max"
) -> Any:
    """Return the tokens of a prompt that SpecPC keeps: the window, then the best ones, each followed by its neighbours.

    Scores are pooled about each token. The best `capacity` tokens are listed in falling order, each replaced by itself
    and its neighbours, the nearest first; the list behind the window's tokens, without repeats, is cut to `capacity`
    and sorted. Among equals the lower index comes first.

    Parameters
    ----------
    scores : (b, n)
    capacity : int
        Tokens to keep, at least the window; from n on all are kept.
    window : int
        Last tokens, which are always kept.
    neighbors, pool : int
        Numbers of tokens about one, itself counted: ``(m - 1) // 2`` before it, the rest behind it.
    pooling : {"max", "average"}
        In an average, places beyond the ends count as zeros.

    Returns
    -------
    (b, min(n, capacity)) integers
        Rising.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`specpc_scores`. The release sorts neighbours at the same distance in no certain order.
    """
    xp = namespace(scores=scores)
    axes("scores", scores, "batch", "tokens")
    _one_of("pooling", pooling, "max", "average")
    check_floats(scores=scores)
    n = scores.shape[1]
    whole("window", window, 0, n)
    whole("capacity", capacity, max(window, 1))
    whole("pool", pool, 1)
    near = sorted(range(-((whole("neighbors", neighbors, 1) - 1) // 2), neighbors // 2 + 1), key=abs)
    places = xp.broadcast_to(xp.arange(n, device=api.device(scores)), scores.shape)
    if n <= capacity:
        return places
    ordered("scores", scores)
    order = rank(xp, _pooled(xp, scores, (pool - 1) // 2, pool // 2, pooling))
    # A token is first listed by the best one near it; a clamped neighbour repeats one that is nearer. Tokens beyond the
    # best `capacity` are listed behind these, and cut off.
    after, before = neighbors // 2, (neighbors - 1) // 2
    steps = [near.index(after - i) for i in range(neighbors)]
    listed = _windows(xp, order, after, before, n) * neighbors + xp.asarray(steps, device=api.device(scores))
    first = xp.min(listed, axis=-1)
    first = xp.where(places >= n - window, -1, first)
    return xp.sort(xp.argsort(first, axis=-1, stable=True)[:, :capacity], axis=-1)


def _one_of(name: str, got: str, *expected: str) -> None:
    if got not in expected:
        raise InvalidInput(f"{name}: got {got!r}, expected {' or '.join(map(repr, expected))}")


def _rows(xp: Any, x: Any, places: Any) -> Any:
    return xp.take_along_axis(x, xp.broadcast_to(places[..., None], (*places.shape, x.shape[-1])), axis=2)


def _windows(xp: Any, x: Any, before: int, after: int, fill: float) -> Any:
    """Return each place's neighbourhood, (..., n, before + 1 + after), with a number for places beyond the ends."""
    n, place = x.shape[-1], {"device": api.device(x)}
    ends = [xp.full((*x.shape[:-1], m), fill, dtype=x.dtype, **place) for m in (before, after)]
    at = xp.arange(n, **place)[:, None] + xp.arange(before + 1 + after, **place)
    found = xp.take(xp.concat([ends[0], x, ends[1]], axis=-1), xp.reshape(at, (-1,)), axis=-1)
    return xp.reshape(found, (*x.shape, before + 1 + after))


def _pooled(xp: Any, x: Any, before: int, after: int, pooling: str) -> Any:
    if pooling == "max":
        return xp.max(_windows(xp, x, before, after, -math.inf), axis=-1)
    return xp.mean(_windows(xp, x, before, after, 0.0), axis=-1)
