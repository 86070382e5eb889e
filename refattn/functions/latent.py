"""Multi-head latent attention: one call written two ways, over the keys and values or over the latent that makes them.

DeepSeek-V2 (arXiv 2405.04434, section 2.1): a token keeps a latent c and a key k^R turned by its position, which all
heads share. Head h has the key (W_uk,h c, k^R) and the value W_uv,h c. As

    q·(W_uk c) = (W_uk^T q)·c        sum_j p_j W_uv c_j = W_uv sum_j p_j c_j

the same attention has one key head, (c, k^R), and the latent itself for value: d_k = 576 and d_v = 512 where c has 512
numbers and k^R 64. Formulas recalled, not read again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, from_float64, to_float64
from ..dtypes import FORMATS
from ..errors import InvalidInput
from ..problem import Problem

__all__ = ["absorbed", "expanded", "projected"]

Array = NDArray[Any]


def absorbed(
    query: Array,
    query_rope: Array,
    latent: Array,
    key_rope: Array,
    w_uk: Array,
    scale: float | None = None,
    **more: Any,
) -> Problem:
    """Return the call over the latent: query (W_uk^T q, q^R), key (c, k^R), value c, one key head.

    Parameters
    ----------
    query : (b, h, n_q, d) array
        The part of the queries that is not turned.
    query_rope : (b, h, n_q, r) array
        The part that is turned, turned.
    latent : (b, n_k, c) array
        What is kept of the tokens.
    key_rope : (b, n_k, r) array
        The keys' turned part, turned.
    w_uk : (h, d, c) array
        What makes a head's keys of the latent.
    scale : float, optional
        None is 1 / sqrt(d + r) in float64, also here, where d_k is c + r.
    more
        Other options of Problem: causal, lengths_k.

    Returns
    -------
    Problem
        Of query's type: W_uk^T q is rounded to it once, as a matrix product's result is; numbers of few bits stay
        exact. Its output is a latent for each head: :func:`projected` makes values of it.

    Raises
    ------
    InvalidInput
        Arrays that do not fit together, or of other libraries than NumPy.
    """
    _check(query, query_rope, latent, key_rope, w_uk=w_uk)
    kind = dtype_name(query)
    inside = _rounded(np.einsum("bhnd,hdc->bhnc", to_float64(query), to_float64(w_uk)), kind)
    key = np.concatenate([latent, key_rope], -1)[:, None]
    q = np.concatenate([inside, query_rope], -1)
    return Problem(q, key, np.ascontiguousarray(latent[:, None]), scale=_scale(query, query_rope, scale), **more)


def expanded(
    query: Array,
    query_rope: Array,
    latent: Array,
    key_rope: Array,
    w_uk: Array,
    w_uv: Array,
    scale: float | None = None,
    **more: Any,
) -> Problem:
    """Return the call over each head's own keys (W_uk c, k^R) and values W_uv c.

    Parameters
    ----------
    query, query_rope, latent, key_rope, w_uk, scale, more
        As in :func:`absorbed`.
    w_uv : (h, d_v, c) array
        What makes a head's values of the latent.

    Returns
    -------
    Problem
        Of query's type, to which keys and values are rounded once.

    Raises
    ------
    InvalidInput
        As :func:`absorbed`.
    """
    _check(query, query_rope, latent, key_rope, w_uk=w_uk, w_uv=w_uv)
    kind, heads = dtype_name(query), query.shape[1]
    made, value = (_rounded(np.einsum("bnc,hdc->bhnd", to_float64(latent), to_float64(w)), kind) for w in (w_uk, w_uv))
    shared = np.broadcast_to(key_rope[:, None], (key_rope.shape[0], heads, *key_rope.shape[1:]))
    key = np.concatenate([made, shared], -1)
    q = np.concatenate([query, query_rope], -1)
    return Problem(q, key, value, scale=_scale(query, query_rope, scale), **more)


def projected(out: Array, w_uv: Array) -> NDArray[np.float64]:
    """Return each head's output W_uv o from the absorbed call's (b, h, n_q, c), in float64: (b, h, n_q, d_v)."""
    if out.ndim != 4 or w_uv.ndim != 3 or out.shape[1] != w_uv.shape[0] or out.shape[3] != w_uv.shape[2]:
        raise InvalidInput(f"w_uv: shape is {w_uv.shape}, expected (h, d_v, c) for out's {out.shape}, (b, h, n_q, c)")
    return np.asarray(np.einsum("bhnc,hdc->bhnd", to_float64(out), to_float64(w_uv)))


def _scale(query: Array, query_rope: Array, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1] + query_rope.shape[-1]) if scale is None else scale


def _rounded(x: NDArray[np.float64], kind: str) -> Array:
    return from_float64(FORMATS[kind].round_array(x), kind)


def _check(query: Array, query_rope: Array, latent: Array, key_rope: Array, **weights: Array) -> None:
    arrays = {"query": query, "query_rope": query_rope, "latent": latent, "key_rope": key_rope, **weights}
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray):
            raise InvalidInput(f"{name}: got {type(x).__name__}, expected a NumPy array")
        if dtype_name(x) != dtype_name(query) or dtype_name(x) not in FORMATS:
            raise InvalidInput(
                f"{name}: got dtype {dtype_name(x)}, expected query's {dtype_name(query)}, a float format"
            )
    if query.ndim != 4 or latent.ndim != 3:
        raise InvalidInput(
            f"query, latent: shapes are {query.shape} and {latent.shape}, expected (b, h, n_q, d) and (b, n_k, c)"
        )
    b, h, n_q, d = query.shape
    n_k, c = latent.shape[1:]
    r = query_rope.shape[-1] if query_rope.ndim else 0
    wanted: dict[str, tuple[Any, ...]] = {
        "query_rope": (b, h, n_q, r), "latent": (b, n_k, c), "key_rope": (b, n_k, r), "w_uk": (h, d, c),
    }  # fmt: skip
    if "w_uv" in weights:
        wanted["w_uv"] = (h, weights["w_uv"].shape[1] if weights["w_uv"].ndim == 3 else "d_v", c)
    for name, shape in wanted.items():
        if tuple(arrays[name].shape) != shape:
            raise InvalidInput(f"{name}: shape is {tuple(arrays[name].shape)}, expected {shape}")
