"""The probabilities of softmax attention in an array's own arithmetic: what selectors score keys and blocks by."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as api

from ..arrays import dtype_name
from ..dtypes import is_float
from ..errors import InvalidInput
from .arguments import axes, factor, namespace
from .dense import masked_softmax

__all__ = ["attended", "causal_mask", "probabilities", "rank", "scored"]


def attended(query: Any, key: Any, value: Any = None) -> Any:
    """Return the library of arrays after checking a call's tensors.

    Parameters
    ----------
    query, key, value : (b, h_q, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d_v) float arrays
        `value` may be None.

    Raises
    ------
    InvalidInput
        Another library, shape or type; heads that do not divide; more queries than keys.
    """
    given = {"query": query, "key": key} | ({} if value is None else {"value": value})
    xp = namespace(**given)
    for name, x in given.items():
        if not is_float(dtype_name(x)):
            raise InvalidInput(f"{name}: has type {dtype_name(x)}, expected floats; convert it")
    axes("query", query, "batch", "heads", "queries", "dim")
    axes("key", key, query.shape[0], "heads", "keys", query.shape[3])
    if query.shape[1] % key.shape[1]:
        raise InvalidInput(
            f"key: axis heads is {key.shape[1]} and must divide query's {query.shape[1]} (grouped-query attention); "
            "repeat or slice the key heads"
        )
    if query.shape[2] > key.shape[2]:
        raise InvalidInput(
            f"query: has {query.shape[2]} queries, more than the {key.shape[2]} keys; queries are the last places"
        )
    if value is not None:
        axes("value", value, *key.shape[:3], "dim")
    return xp


def causal_mask(xp: Any, n_q: int, n_k: int, like: Any) -> Any:
    """Return the causal mask (n_q, n_k) by the bottom-right corner, on the device of `like`."""
    place = {"device": api.device(like)}
    return xp.arange(n_k, **place)[None, :] <= xp.arange(n_q, **place)[:, None] + (n_k - n_q)


def probabilities(xp: Any, query: Any, key: Any, scale: float | None, seen: Any) -> Any:
    """Return ``softmax_j(scale q_i·k_j)`` over the keys that are seen; a row that sees none is 0.

    Parameters
    ----------
    query, key : (b, h_q, n_q, d), (b, h_kv, n_k, d)
        Of the library `xp`, checked by :func:`attended`.
    scale : float, optional
        None is 1/sqrt(d).
    seen : bool array that broadcasts to (b, h_kv, h_q/h_kv, n_q, n_k)

    Returns
    -------
    (b, h_kv, h_q/h_kv, n_q, n_k) array
        In query's type: give float32 or wider.
    """
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else factor("scale", scale)
    return masked_softmax(scored(xp, query, key, scale), seen)[0]


def scored(xp: Any, query: Any, key: Any, scale: float) -> Any:
    """Return ``scale q_i·k_j``, (b, h_kv, h_q/h_kv, n_q, n_k)."""
    b, heads, n_q, d = query.shape
    grouped = xp.reshape(query * scale, (b, key.shape[1], heads // key.shape[1], n_q, d))
    return xp.matmul(grouped, xp.matrix_transpose(key)[:, :, None])


def rank(xp: Any, scores: Any) -> Any:
    """Return each score's place in falling order, from 0; among equal ones the lower index comes first."""
    return xp.argsort(xp.argsort(-scores, axis=-1, stable=True), axis=-1, stable=True)
