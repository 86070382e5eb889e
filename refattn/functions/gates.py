"""SeerAttention: a learned gate that predicts which blocks of keys matter, its target, its loss and its selectors."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as api

from ..arrays import kind_of
from ..errors import InvalidInput
from .arguments import axes, namespace, ordered, whole, within
from .dense import check_floats
from .probabilities import attended, causal_mask, probabilities, rank

__all__ = ["seer_decode", "seer_gate", "seer_gate_loss", "seer_gate_target", "seer_select"]


def seer_gate(query: Any, key: Any, w_q: Any, w_k: Any, *, block: int = 64, base: float = 10000.0) -> Any:
    """Return the logarithm of SeerAttention's gate: for each block of queries, a distribution over blocks of keys.

    ``log softmax_c(R_r(mean(Q_r) W_q) · R_c([max(K_c), min(K_c), mean(K_c)] W_k) / sqrt(g))`` over blocks c <= r, where
    ``R_c`` is RoPE at the place where block c starts.

    Parameters
    ----------
    query, key : (b, h_q, n, d), (b, h_kv, n, d) PyTorch tensors
        Before RoPE.
    w_q, w_k : (h_q, d, g), (h_kv, 3 d, g)
        The gate's weights, with g even.
    block : int
        Tokens of a block; the last may be shorter.
    base : float
        RoPE's.

    Returns
    -------
    (b, h_q, blocks, blocks)
        -inf for blocks after a row's own; its ``exp()`` is what :func:`seer_select` takes.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: SeerAttention, `microsoft/SeerAttention`, whose `attn_gate.py` was read; the paper was not.
    """
    import torch

    xp = _prefill(query, key)
    _weights(query, key, w_q, w_k)
    whole("block", block, 1)
    q = torch.stack([x.mean(2) for x in query.split(block, 2)], 2) @ w_q
    k = _compressed(key, block) @ w_k
    starts = torch.arange(q.shape[2], device=query.device) * block
    q, k = _rotated(q, starts, base), _rotated(k, starts, base)
    k = k.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(w_q.shape[-1])
    seen = causal_mask(xp, q.shape[2], q.shape[2], scores)
    return scores.masked_fill(~seen, -math.inf).log_softmax(-1)


def seer_gate_target(query: Any, key: Any, *, block: int = 64, scale: float | None = None) -> Any:
    """Return what the gate learns: the largest probability of each block, over the sum of these in its row.

    Parameters
    ----------
    query, key : (b, h_q, n, d), (b, h_kv, n, d) PyTorch tensors
        As attention has them, after RoPE.
    block : int
        Tokens of a block; the last may be shorter.
    scale : float, optional
        None is 1/sqrt(d).

    Returns
    -------
    (b, h_q, blocks, blocks)
        Rows sum to 1; no gradient.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`seer_gate`.
    """
    import torch

    xp = _prefill(query, key)
    _is_torch(query)
    whole("block", block, 1)
    n = key.shape[2]
    with torch.no_grad():
        p = probabilities(xp, query, key, scale, causal_mask(xp, n, n, query)).flatten(1, 2)
        columns = torch.stack([x.amax(-1) for x in p.split(block, -1)], -1)
        found = torch.stack([x.amax(-2) for x in columns.split(block, -2)], -2)
        return found / found.sum(-1, keepdim=True)


def seer_gate_loss(log_gate: Any, target: Any) -> Any:
    """Return the gate's loss: ``mean t (log t - log G)`` over all but the first quarter of the rows of blocks.

    Parameters
    ----------
    log_gate, target : (b, h_q, blocks, blocks) PyTorch tensors
        Of :func:`seer_gate` and :func:`seer_gate_target`.

    Returns
    -------
    scalar tensor
        The mean is over every element of the rows left, those after a row's own block too, as PyTorch's `kl_div` has it
        by default; a row's sum is its Kullback-Leibler divergence.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`seer_gate`; the release sums over layers and takes ten times that.
    """
    import torch

    check_floats(log_gate=log_gate, target=target)
    axes("log_gate", log_gate, "batch", "heads", "blocks", "blocks")
    axes("target", target, *log_gate.shape)
    rows = slice(log_gate.shape[2] // 4, None)
    t, g = target[:, :, rows], log_gate[:, :, rows]
    return (torch.xlogy(t, t) - t * g.masked_fill(t == 0, 0.0)).mean()


def seer_select(gate: Any, *, threshold: float | None = None, ratio: float | None = None, dense_rows: int = 0) -> Any:
    """Return which blocks of keys each block of queries sees, by a threshold or by the part of the triangle to keep.

    A threshold keeps ``G > threshold``. A ratio z keeps the ``max(1, floor((1 - sqrt(1 - z)) blocks))`` largest of each
    row: rows with fewer blocks keep all, so that about a part z of the lower triangle is kept.

    Parameters
    ----------
    gate : (b, h_q, blocks, blocks)
        Probabilities: ``seer_gate(...).exp()``.
    threshold : float, optional
        In [0, 1]. Nothing is kept by force: a row whose largest gate is below it keeps no block.
    ratio : float, optional
        In (0, 1]. Among equal ones the lower block is kept.
    dense_rows : int
        Last rows that keep all their blocks; the release may have two.

    Returns
    -------
    (b, h_q, blocks, blocks) bool

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`seer_gate`. At threshold 0 all blocks are kept whose gate did not underflow to 0.
    """
    xp = namespace(gate=gate)
    axes("gate", gate, "batch", "heads", "blocks", "blocks")
    axes("gate", gate, *gate.shape[:2], gate.shape[2], gate.shape[2])
    _one_rule("ratio", threshold, ratio)
    count = gate.shape[2]
    seen = causal_mask(xp, count, count, gate)
    if ratio is None:
        chosen = gate > within("threshold", threshold, 0, 1)
    else:
        ordered("gate", gate, seen)
        kept = max(1, int((1 - math.sqrt(1 - within("ratio", ratio, 0, 1, open_low=True))) * count))
        chosen = rank(xp, xp.where(seen, gate, -math.inf)) < kept
    dense = xp.arange(count, device=api.device(gate)) >= count - whole("dense_rows", dense_rows, 0)
    return seen & (chosen | dense[:, None])


def seer_decode(
    query: Any,
    key: Any,
    w_q: Any,
    w_k: Any,
    *,
    threshold: float | None = None,
    count: int | None = None,
    block: int = 64,
    base: float = 10000.0,
) -> Any:
    """Return which blocks a decoded token sees: whole blocks that the gate picks for its group, and always the last.

    ``G_c = softmax_c(R_{n-1}(sum_{h in group} q_h W_qh) · R_c([max(K_c), min(K_c), mean(K_c)] W_k) / sqrt(g))`` over
    the whole blocks c.

    Parameters
    ----------
    query, key : (b, h_q, 1, d), (b, h_kv, n, d) PyTorch tensors
        Before RoPE; the query is the last key's.
    w_q, w_k : (h_q, d, g), (h_kv, 3 d, g)
        The gate's weights, with g even.
    threshold : float, optional
        In [0, 1]: blocks with a larger gate.
    count : int, optional
        So many blocks with the largest gates; among equal ones the lower block.
    block : int
        Tokens of a block.
    base : float
        RoPE's.

    Returns
    -------
    (b, h_kv, ceil(n / block)) bool
        One choice for all query heads of a group.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: SeerAttention-R in `microsoft/SeerAttention`, whose `decode_sparse/attn_gate_inf.py` was read ("Qproj"
    without normalisation). A last block that is not whole takes no part in the softmax here; in the release its
    compressed key is zeros.
    """
    import torch

    attended(query, key)
    _weights(query, key, w_q, w_k)
    _one_rule("count", threshold, count)
    if query.shape[2] != 1:
        raise InvalidInput(f"query: has {query.shape[2]} queries, expected the one of the token that is decoded")
    b, heads, n, _ = key.shape
    whole_blocks = n // whole("block", block, 1)
    chosen = torch.zeros((b, heads, -(-n // block)), dtype=torch.bool, device=key.device)
    if whole_blocks:
        q = (query @ w_q).unflatten(1, (heads, -1)).sum(2)
        k = _compressed(key[:, :, : whole_blocks * block], block) @ w_k
        places = torch.arange(whole_blocks, device=key.device) * block
        q, k = _rotated(q, places.new_tensor([n - 1]), base), _rotated(k, places, base)
        gate = (q @ k.transpose(-1, -2) / math.sqrt(w_q.shape[-1])).softmax(-1)[:, :, 0]
        ordered("query, key, w_q, w_k", gate)
        if count is None:
            picked = gate > within("threshold", threshold, 0, 1)
        else:
            picked = rank(namespace(gate=gate), gate) < whole("count", count, 0)
        chosen[:, :, :whole_blocks] = picked
    chosen[:, :, -1] = True
    return chosen


def _one_rule(other: str, threshold: float | None, value: float | None) -> None:
    if (threshold is None) == (value is None):
        raise InvalidInput(
            f"threshold: got {threshold!r}, and {other} {value!r}, expected one of the two; leave one out"
        )


def _prefill(query: Any, key: Any) -> Any:
    xp = attended(query, key)
    if query.shape[2] != key.shape[2]:
        raise InvalidInput(f"query: has {query.shape[2]} queries, expected one for each of the {key.shape[2]} keys")
    return xp


def _weights(query: Any, key: Any, w_q: Any, w_k: Any) -> None:
    namespace(query=query, w_q=w_q, w_k=w_k)
    _is_torch(query)
    axes("w_q", w_q, query.shape[1], query.shape[3], "gate")
    axes("w_k", w_k, key.shape[1], 3 * key.shape[3], w_q.shape[2])
    check_floats(query=query, w_q=w_q, w_k=w_k)
    if w_q.shape[2] % 2:
        raise InvalidInput(f"w_q: axis gate is {w_q.shape[2]}, expected an even number, which RoPE turns in pairs")


def _is_torch(query: Any) -> None:
    if (kind := kind_of(query)) != "torch":
        raise InvalidInput(f"query: is an array of {kind}, expected a PyTorch tensor; use torch.from_numpy(x)")


def _compressed(key: Any, block: int) -> Any:
    import torch

    parts = key.split(block, 2)
    pools = [[x.amax(2) for x in parts], [x.amin(2) for x in parts], [x.mean(2) for x in parts]]
    return torch.cat([torch.stack(x, 2) for x in pools], -1)


def _rotated(x: Any, places: Any, base: float) -> Any:
    """Turn feature i with feature i + g/2 by the angle ``place base^(-2 i / g)``."""
    import torch

    half = x.shape[-1] // 2
    rates = within("base", base, 0, math.inf, open_low=True) ** (
        -torch.arange(half, dtype=x.dtype, device=x.device) / half
    )
    angle = places.to(x.dtype)[:, None] * rates
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
