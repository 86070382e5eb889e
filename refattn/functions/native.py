"""Native sparse attention: blocks' means, chosen blocks and a window, each times a gate; DeepSeek's indexer."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as api

from ..errors import InvalidInput
from .arguments import axes, factor, namespace, ordered, whole
from .dense import check_floats, masked_softmax
from .probabilities import attended, causal_mask, rank, scored

__all__ = ["compressed_attention", "indexer_scores", "indexer_select", "native_sparse_attention", "select_blocks"]


def _blocks(xp: Any, x: Any, size: int) -> Any:
    """Return the mean of each whole block of tokens, (b, h, n // size, d)."""
    b, h, n, d = x.shape
    return xp.mean(xp.reshape(x[:, :, : n // size * size], (b, h, n // size, size, d)), axis=3)


def _places(xp: Any, query: Any, key: Any) -> Any:
    """Return the key at which each query stands, (n_q, 1)."""
    n_q, n_k = query.shape[2], key.shape[2]
    return xp.arange(n_q, device=api.device(key))[:, None] + (n_k - n_q)


def _weights(xp: Any, query: Any, key: Any, size: int, scale: float | None) -> tuple[Any, Any]:
    """Return the softmax of a query over the means of blocks that end at or before it, and its log-sum-exp."""
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else factor("scale", scale)
    ends = xp.arange(1, key.shape[2] // size + 1, device=api.device(key)) * size - 1
    return masked_softmax(scored(xp, query, _blocks(xp, key, size), scale), ends <= _places(xp, query, key))


def _joined(xp: Any, p: Any, value: Any) -> Any:
    """Return weighted sums of values, (b, h_q, n_q, d_v), from weights (b, h_kv, group, n_q, n)."""
    out = xp.matmul(p, value[:, :, None])
    return xp.reshape(out, (out.shape[0], out.shape[1] * out.shape[2], *out.shape[3:]))


def compressed_attention(
    query: Any, key: Any, value: Any, *, block_size: int = 16, scale: float | None = None
) -> tuple[Any, Any]:
    """Return attention to the means of blocks of keys and values: ``softmax_c(scale q_i·mean(K_c))`` of whole blocks.

    A query sees the blocks that end at or before its own key, which is key i + n_k - n_q.

    Parameters
    ----------
    query, key, value : (b, h_q, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d_v) float arrays
    block_size : int
        Keys of a block; a last shorter one is none.
    scale : float, optional
        None is 1/sqrt(d).

    Returns
    -------
    out : (b, h_q, n_q, d_v)
        0 where no block ends yet.
    lse : (b, h_q, n_q)
        -inf there.

    Raises
    ------
    InvalidInput
        Arrays that do not fit together, a block without keys.

    Notes
    -----
    Source: Yuan et al., Native Sparse Attention (arXiv 2502.11089, section 3.3, recalled), with the mean in place of
    its learned compression, as in the released code of SSA, which was read.
    """
    xp = attended(query, key, value)
    namespace(query=query, value=value)
    size = whole("block_size", block_size, 1)
    p, lse = _weights(xp, query, key, size, scale)
    return _joined(xp, p, _blocks(xp, value, size)), xp.reshape(lse, query.shape[:3])


def select_blocks(query: Any, key: Any, *, block_size: int = 16, topk: int = 16, scale: float | None = None) -> Any:
    """Return which blocks of keys queries read: their own, and the topk - 1 earlier ones of the largest weight.

    The weights of :func:`compressed_attention`, added up over the query heads of a key head, which choose the same.
    Ties go to the lower block.

    Parameters
    ----------
    query, key : (b, h_q, n_q, d), (b, h_kv, n_k, d) float arrays
    block_size, topk : int
        Keys of a block, and blocks of a query, its own counted.
    scale : float, optional
        None is 1/sqrt(d).

    Returns
    -------
    (b, h_kv, n_q, ceil(n_k / block_size)) bool array

    Raises
    ------
    InvalidInput
        Arrays that do not fit together, no keys or blocks.
    """
    xp = attended(query, key)
    size, topk = whole("block_size", block_size, 1), whole("topk", topk, 1)
    weights = xp.sum(_weights(xp, query, key, size, scale)[0], axis=2)
    count, mine = -(-key.shape[2] // size), _places(xp, query, key) // size
    if count > weights.shape[-1]:  # the last block is no whole one, and nobody's earlier one
        none = xp.zeros((*weights.shape[:-1], 1), dtype=weights.dtype, device=api.device(weights))
        weights = xp.concat([weights, none], axis=-1)
    blocks = xp.arange(count, device=api.device(key))
    ordered("query, key", weights, blocks < mine)
    weights = xp.where(blocks < mine, weights, -math.inf)
    return ((rank(xp, weights) < topk - 1) & (blocks < mine)) | (blocks == mine)


def native_sparse_attention(
    query: Any,
    key: Any,
    value: Any,
    gates: Any,
    *,
    block_size: int = 16,
    topk: int = 16,
    window: int = 128,
    scale: float | None = None,
) -> Any:
    """Return NSA: ``g_1 compressed + g_2 selected + g_3 window``, each softmax attention of its own.

    Parameters
    ----------
    query, key, value : (b, h_q, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d_v) float arrays
    gates : (b, h_q, n_q, 3) array
        In the model sigmoids of a linear map.
    block_size, topk, window : int
        Keys of a block, blocks of a query (its own counted), keys of the window (its own counted).
    scale : float, optional
        None is 1/sqrt(d).

    Returns
    -------
    (b, h_q, n_q, d_v) array

    Raises
    ------
    InvalidInput
        Arrays that do not fit together, no blocks or window.

    Notes
    -----
    The selected part is an operator of its own, exact and judged (``refattn list``); the sum is linear in the parts.
    """
    xp = attended(query, key, value)
    namespace(query=query, value=value, gates=gates)
    axes("gates", gates, *query.shape[:3], 3)
    window = whole("window", window, 1)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else factor("scale", scale)
    s, causal = scored(xp, query, key, scale), causal_mask(xp, query.shape[2], key.shape[2], key)
    at, keys = _places(xp, query, key), xp.arange(key.shape[2], device=api.device(key))
    chosen = xp.take(
        select_blocks(query, key, block_size=block_size, topk=topk, scale=scale), keys // block_size, axis=-1
    )
    selected = _joined(xp, masked_softmax(s, chosen[:, :, None] & causal)[0], value)
    near = _joined(xp, masked_softmax(s, causal & (keys > at - window))[0], value)
    means = compressed_attention(query, key, value, block_size=block_size, scale=scale)[0]
    return gates[..., 0:1] * means + gates[..., 1:2] * selected + gates[..., 2:3] * near


def indexer_scores(query: Any, key: Any, weights: Any) -> Any:
    """Return DeepSeek sparse attention's index scores: ``I_ij = sum_h w_ih relu(q_ih·k_j)``.

    Parameters
    ----------
    query : (b, h, n_q, d) array
        The indexer's own queries.
    key : (b, n_k, d) array
        Its one key for all its heads.
    weights : (b, n_q, h) array
        Weights of the heads.

    Returns
    -------
    (b, n_q, n_k) array

    Raises
    ------
    InvalidInput
        Arrays that do not fit together.

    Notes
    -----
    Source: DeepSeek-V3.2-Exp's report, recalled.
    """
    xp = check_floats(query=query, key=key, weights=weights)
    axes("query", query, "batch", "heads", "queries", "dim")
    axes("key", key, query.shape[0], "keys", query.shape[3])
    axes("weights", weights, query.shape[0], query.shape[2], query.shape[1])
    s = xp.matmul(query, xp.matrix_transpose(key)[:, None])
    s = xp.where(s < 0, xp.zeros_like(s), s)  # NaN stays
    return xp.sum(xp.matrix_transpose(weights)[..., None] * s, axis=1)


def indexer_select(scores: Any, *, topk: int = 2048) -> Any:
    """Return the keys that each query reads: of those up to its own the topk of the largest scores.

    Ties go to the lower key; a query with fewer keys takes all of them. Pass the mask as ``allowed``, with heads as an
    axis of 1, to :class:`refattn.Problem`: all heads read the same keys.

    Parameters
    ----------
    scores : (b, n_q, n_k) array
        The last query stands at the last key.
    topk : int
        Keys of a query.

    Returns
    -------
    (b, n_q, n_k) bool array

    Raises
    ------
    InvalidInput
        Another shape, NaN in a score, more queries than keys, no keys.
    """
    xp = check_floats(scores=scores)
    axes("scores", scores, "batch", "queries", "keys")
    topk = whole("topk", topk, 1)
    _, n_q, n_k = scores.shape
    if n_q > n_k:
        raise InvalidInput(f"scores: has {n_q} queries and {n_k} keys; each query stands at a key of its own")
    ordered("scores", scores)
    seen = causal_mask(xp, n_q, n_k, scores)
    return seen & (rank(xp, xp.where(seen, scores, -math.inf)) < topk)
