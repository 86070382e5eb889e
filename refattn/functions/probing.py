"""Attention that pools the tokens of a frozen model into one vector for a linear classifier."""

from __future__ import annotations

import math
from typing import Any

from ..errors import InvalidInput
from .arguments import axes, whole, within
from .dense import check_floats, layer_norm, masked_softmax

__all__ = ["abmilp_pool", "fold_cross_attention", "multi_query_pool", "simpool"]


def multi_query_pool(x: Any, queries: Any, w_v: Any, d_out: int = 1) -> Any:
    """Return efficient probing's pooled tokens: ``out_m = (softmax(q_m Xᵀ/sqrt(D)) X) W_v[slice m]ᵀ``, side by side.

    Each query pools the tokens by itself and reads its own slice of the values' features; keys are the tokens
    themselves. The values are never made: the product with W_v comes after the pooling, which is the same sum.

    Parameters
    ----------
    x : (..., n, D) float array
        Tokens.
    queries : (M, D) array
        Learned; M divides D/d_out. The code starts them from 0.02 times a normal distribution.
    w_v : (D/d_out, D) array
        The values' projection, as of ``torch.nn.Linear``.
    d_out : int
        How many times fewer features come out; it divides D.

    Returns
    -------
    (..., D/d_out)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    The code has ``num_heads``, which fails for 2 or more; there is no such option here, since queries of several heads
    are more queries: see `fold_cross_attention`.
    Source: Psomas et al., efficient probing (github.com/billpsomas/efficient-probing, ``poolings/ep.py`` was read; the
    paper was not). The repository's text says that outputs of queries are averaged; the code puts them side by side.
    """
    xp = check_floats(x=x, queries=queries, w_v=w_v)
    d = _tokens(x)
    axes("queries", queries, "queries", d)
    if d % whole("d_out", d_out, 1):
        raise InvalidInput(f"d_out: got {d_out}, expected a divisor of D = {d}")
    axes("w_v", w_v, d // d_out, d)
    m = queries.shape[0]
    if (d // d_out) % m:
        raise InvalidInput(f"queries: got {m}, expected a number that divides the {d // d_out} features that come out")
    p, _ = masked_softmax(queries @ xp.matrix_transpose(x) / math.sqrt(d))
    slices = xp.reshape(w_v, (m, w_v.shape[0] // m, d))
    out = (slices @ (p @ x)[..., None])[..., 0]
    return xp.reshape(out, (*x.shape[:-2], w_v.shape[0]))


def fold_cross_attention(query: Any, w_q: Any, w_k: Any, heads: int, b_q: Any = None) -> Any:
    """Return the queries with which `multi_query_pool` is multi-head cross-attention by one learned query.

    ``q_m = sqrt(heads) W_k[slice m]ᵀ (W_q u + b_q)[slice m]``: scores are the same, since
    ``q_m·x/sqrt(D) = (W_q u + b_q)_m·(W_k x)_m/sqrt(D/heads)``. So 2 D² + D numbers become heads·D.

    Parameters
    ----------
    query : (D,) float array
        The learned query u.
    w_q, w_k : (D, D) arrays
        Projections as of ``torch.nn.Linear``.
    heads : int
        It divides D.
    b_q : (D,) array, optional
        The bias of queries.

    Returns
    -------
    (heads, D)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    ``multi_query_pool(x, fold_cross_attention(...), w_v) + b_v`` is then the attention's output before its last
    projection: a bias of keys moves all scores of a head alike and cancels, one of values is added to the mean.
    With identities for w_q and w_k the folded queries are a query's heads.
    Source: derived here.
    """
    xp = check_floats(query=query, w_q=w_q, w_k=w_k, **({} if b_q is None else {"b_q": b_q}))
    axes("query", query, "D")
    d = query.shape[0]
    for name, x in (("w_q", w_q), ("w_k", w_k)):
        axes(name, x, d, d)
    if d % whole("heads", heads, 1):
        raise InvalidInput(f"heads: got {heads}, expected a divisor of D = {d}")
    projected = w_q @ query
    if b_q is not None:
        axes("b_q", b_q, d)
        projected = projected + b_q
    parts = xp.reshape(projected, (heads, 1, d // heads))
    return (parts @ xp.reshape(w_k, (heads, d // heads, d)))[:, 0, :] * math.sqrt(heads)


def simpool(x: Any, w_q: Any, w_k: Any, *, gamma: float | None = None, epsilon: float = 1e-6) -> Any:
    """Return SimPool: the tokens' mean asks, and a power mean of the normalised tokens answers.

    ``p = softmax((W_q mean(X))ᵀ W_k LN(X)ᵀ/sqrt(D))``; out is ``p LN(X)``, or with gamma
    ``(p (LN(X) - min + epsilon)^gamma)^(1/gamma)``.

    Parameters
    ----------
    x : (..., n, D) float array
        Tokens.
    w_q, w_k : (D, D) arrays
        Projections as of ``torch.nn.Linear``.
    gamma : float, optional
        The power, above 0; None is the weighted mean.
    epsilon : float
        Added to the variance in LN, which has no gain and no bias here, and to the values under the power.

    Returns
    -------
    (..., D)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    The minimum is over tokens and features of one example. The code takes it over the whole batch, so that an
    example's result depends on the others beside it.
    Source: Psomas et al., SimPool (arXiv 2309.06891; recalled; ``poolings/simpool.py`` of efficient-probing was read).
    """
    xp = check_floats(x=x, w_q=w_q, w_k=w_k)
    d = _tokens(x)
    for name, w in (("w_q", w_q), ("w_k", w_k)):
        axes(name, w, d, d)
    within("epsilon", epsilon, 0, math.inf, open_low=True)
    if gamma is not None:
        within("gamma", gamma, 0, math.inf, open_low=True)
    asked = xp.mean(x, axis=-2, keepdims=True) @ w_q.T
    normal = layer_norm(x, epsilon)
    p, _ = masked_softmax(asked @ xp.matrix_transpose(normal @ w_k.T) / math.sqrt(d))
    if gamma is None:
        return (p @ normal)[..., 0, :]
    lowest = xp.min(xp.min(normal, axis=-1, keepdims=True), axis=-2, keepdims=True)
    return (p @ (normal - lowest + epsilon) ** gamma)[..., 0, :] ** (1 / gamma)


def abmilp_pool(x: Any, w_hidden: Any, b_hidden: Any, w_score: Any) -> Any:
    """Return attention-based pooling of bags: ``out = sum_i softmax_i(w·tanh(W x_i + b)) x_i``.

    Parameters
    ----------
    x : (..., n, D) float array
        Tokens.
    w_hidden, b_hidden : (h, D), (h,) arrays
        The hidden layer.
    w_score : (h,) array
        What scores; a bias would cancel.

    Returns
    -------
    (..., D)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: Ilse et al., attention-based deep multiple instance learning (arXiv 1802.04712; recalled;
    ``poolings/abmilp.py`` of efficient-probing was read: this is its default, two layers and tanh).
    """
    xp = check_floats(x=x, w_hidden=w_hidden, b_hidden=b_hidden, w_score=w_score)
    d = _tokens(x)
    axes("w_hidden", w_hidden, "hidden", d)
    axes("b_hidden", b_hidden, w_hidden.shape[0])
    axes("w_score", w_score, w_hidden.shape[0])
    p, _ = masked_softmax(xp.tanh(x @ w_hidden.T + b_hidden) @ w_score)
    return (p[..., None, :] @ x)[..., 0, :]


def _tokens(x: Any) -> int:
    """Return D of (..., n, D) tokens."""
    if x.ndim < 2 or 0 in x.shape:
        raise InvalidInput(f"x: shape is {tuple(x.shape)}, expected (..., tokens, D), each at least 1")
    return int(x.shape[-1])
