"""ProxyAttn: block scores from one proxy for a group of heads, and a budget of blocks for each head."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as api

from ..errors import InvalidInput
from .arguments import axes, namespace, ordered, places, whole, within
from .probabilities import attended, causal_mask, probabilities, rank

__all__ = ["block_budget", "proxy_block_mask", "proxy_block_scores"]


def proxy_block_scores(
    query: Any, key: Any, *, groups: int, stride: int, block: int = 128, scale: float | None = None
) -> Any:
    """Return what a group of heads together pays to each block: the largest probability of its mean head there.

    ``A_g = max over a block of softmax(scale mean_{h in g}(q_h) · mean_{h in g}(k_h))``, causal, of the first query and
    key of each `stride`.

    Parameters
    ----------
    query, key : (b, h_q, n, d), (b, h_kv, n, d)
        Of a prefill: as many queries as keys.
    groups : int
        Divides h_kv, so that a group's query heads are those of its key heads.
    stride : int
        Divides `block`.
    block : int
        Queries and keys of a block; the last may be shorter.
    scale : float, optional
        None is 1/sqrt(d).

    Returns
    -------
    (b, groups, blocks, blocks)
        0 for blocks after a row's own.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: ProxyAttn, of which a description was read, and no code. That the proxy is causal is our reading.
    """
    xp = _prefill(query, key)
    b, _, n, d = query.shape
    h_kv = key.shape[1]
    if h_kv % whole("groups", groups, 1, h_kv):
        raise InvalidInput(f"groups: got {groups}, expected a divisor of the {h_kv} key heads")
    if whole("block", block, 1) % whole("stride", stride, 1, block):
        raise InvalidInput(f"stride: got {stride}, expected a divisor of block={block}")
    q, k = (xp.mean(xp.reshape(x, (b, groups, -1, n, d)), axis=2)[:, :, ::stride] for x in (query, key))
    p = probabilities(xp, q, k, scale, causal_mask(xp, q.shape[2], q.shape[2], query))[:, :, 0]
    return _blocks(xp, _blocks(xp, p, block // stride, -1), block // stride, -2)


def block_budget(query: Any, key: Any, *, gamma: float, block: int = 128, scale: float | None = None) -> Any:
    """Return how many blocks each head needs for a part `gamma` of its attention, judged by its last block of queries.

    ``min{k: a_(1) + ... + a_(k) >= gamma}``, where ``a`` is the largest probability that the last block's queries give
    to a key of each block, over the sum of these, in falling order.

    Parameters
    ----------
    query, key : (b, h_q, n, d), (b, h_kv, n, d)
    gamma : float
        In (0, 1]. At 1 it is all blocks, as where the sum of floats stays below `gamma`.
    block : int
        Queries and keys of a block; the last may be shorter.
    scale : float, optional
        None is 1/sqrt(d).

    Returns
    -------
    (b, h_q) integers
        From 1 to the number of blocks.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`proxy_block_scores`. That blocks are pooled by their largest probability is our reading.
    """
    xp = _prefill(query, key)
    within("gamma", gamma, 0, 1, open_low=True)
    b, heads, n, _ = query.shape
    count = -(-n // whole("block", block, 1))
    last = query[:, :, (count - 1) * block :]
    p = probabilities(xp, last, key, scale, causal_mask(xp, last.shape[2], n, query))
    ordered("query, key", p)
    a = xp.reshape(xp.max(_blocks(xp, p, block, -1), axis=-2), (b, heads, count))
    a = xp.sort(a / xp.sum(a, axis=-1, keepdims=True), axis=-1, descending=True)
    below = xp.cumulative_sum(a, axis=-1) < gamma if gamma < 1 else xp.ones_like(a) > 0
    needed = 1 + xp.sum(xp.astype(below, xp.int32), axis=-1)
    return xp.where(needed < count, needed, count)


def proxy_block_mask(scores: Any, budget: Any, *, sink: int = 1) -> Any:
    """Return which blocks of keys each block of queries sees: a head's share of those that its group scores highest.

    The row of block m (from 1) takes ``ceil(budget m / blocks)`` of its m blocks. Its own and the first `sink` ones
    are always taken, and count. Among equal scores the lower block is taken.

    Parameters
    ----------
    scores : (b, groups, blocks, blocks)
        Of :func:`proxy_block_scores`.
    budget : (b, h_q) integers
        Of :func:`block_budget`; the groups divide h_q.
    sink : int
        First blocks that every row takes.

    Returns
    -------
    (b, h_q, blocks, blocks) bool

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`proxy_block_scores`. The rounding up, and what is always taken, are our reading.
    """
    xp = namespace(scores=scores, budget=budget)
    axes("scores", scores, "batch", "groups", "blocks", "blocks")
    b, groups, count, _ = scores.shape
    axes("scores", scores, b, groups, count, count)
    axes("budget", budget, b, "heads")
    heads = budget.shape[1]
    if heads % groups:
        raise InvalidInput(f"budget: axis heads is {heads}, expected a multiple of the {groups} groups of scores")
    places("budget", budget, count + 1)
    whole("sink", sink, 0)
    place = xp.arange(count, device=api.device(scores))
    row, column = place[:, None], place[None, :]
    seen = column <= row
    forced = seen & ((column < sink) | (column == row))
    ordered("scores", scores, seen)
    if bool(xp.any(xp.isinf(scores) & seen)):
        raise InvalidInput(
            "scores: holds inf, expected finite ones: it would come before the blocks that are always taken"
        )
    order = rank(xp, xp.where(forced, math.inf, xp.where(seen, scores, -math.inf)))
    share = (budget[:, :, None] * (place + 1) + (count - 1)) // count
    least = xp.sum(xp.astype(forced, share.dtype), axis=-1)
    share = xp.reshape(xp.where(share > least, share, least), (b, groups, heads // groups, count, 1))
    return xp.reshape(seen & (order[:, :, None] < share), (b, heads, count, count))


def _prefill(query: Any, key: Any) -> Any:
    xp = attended(query, key)
    if query.shape[2] != key.shape[2]:
        raise InvalidInput(
            f"query: has {query.shape[2]} queries, expected one for each of the {key.shape[2]} keys (a prefill)"
        )
    return xp


def _blocks(xp: Any, p: Any, size: int, axis: int) -> Any:
    """Return the largest of each block of the last axis, or the one before it."""
    n = p.shape[axis]
    parts = (slice(at, at + size) for at in range(0, n, size))
    return xp.stack([xp.max(p[..., x] if axis == -1 else p[..., x, :], axis=axis) for x in parts], axis=axis)
