"""Multi-head latent attention: one call written two ways, over the keys and values or over the latent that makes them.

DeepSeek-V2 (arXiv 2405.04434, section 2.1): a token keeps a latent c and a key k^R turned by its position, which all
heads share. Head h has the key (W_uk,h c, k^R) and the value W_uv,h c. As

    q·(W_uk c) = (W_uk^T q)·c        sum_j p_j W_uv c_j = W_uv sum_j p_j c_j

the same attention has one key head, (c, k^R), and the latent itself for value: d_k = 576 and d_v = 512 where c has 512
numbers and k^R 64. Formulas recalled, not read again.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, from_float64, to_float64
from ..dtypes import FORMATS
from ..errors import InvalidInput
from ..problem import Problem

__all__ = ["absorbed", "expanded", "projected"]

Array = NDArray[Any]
SHAPES = {
    "query": ("b", "h", "n_q", "d"),
    "query_rope": ("b", "h", "n_q", "r"),
    "latent": ("b", "n_k", "c"),
    "key_rope": ("b", "n_k", "r"),
    "w_uk": ("h", "d", "c"),
    "w_uv": ("h", "d_v", "c"),
    "out": ("b", "h", "n_q", "c"),
}
"""The axes of each argument: those of one name have one length."""


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
        Arrays that do not fit together, or of other libraries than NumPy; an option that Problem does not have.
    """
    _check(more, query=query, query_rope=query_rope, latent=latent, key_rope=key_rope, w_uk=w_uk)
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
    _check(more, query=query, query_rope=query_rope, latent=latent, key_rope=key_rope, w_uk=w_uk, w_uv=w_uv)
    kind, heads = dtype_name(query), query.shape[1]
    made, value = (_rounded(np.einsum("bnc,hdc->bhnd", to_float64(latent), to_float64(w)), kind) for w in (w_uk, w_uv))
    shared = np.broadcast_to(key_rope[:, None], (key_rope.shape[0], heads, *key_rope.shape[1:]))
    key = np.concatenate([made, shared], -1)
    q = np.concatenate([query, query_rope], -1)
    return Problem(q, key, value, scale=_scale(query, query_rope, scale), **more)


def projected(out: Array, w_uv: Array) -> NDArray[np.float64]:
    """Return each head's output W_uv o from the absorbed call's (b, h, n_q, c), in float64: (b, h, n_q, d_v).

    Raises
    ------
    InvalidInput
        Arrays that do not fit together, or of other libraries than NumPy.
    """
    _check_arrays({"out": out, "w_uv": w_uv})
    return np.asarray(np.einsum("bhnc,hdc->bhnd", to_float64(out), to_float64(w_uv)))


def _scale(query: Array, query_rope: Array, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1] + query_rope.shape[-1]) if scale is None else scale


def _rounded(x: NDArray[np.float64], kind: str) -> Array:
    return from_float64(FORMATS[kind].round_array(x), kind)


def _check(more: dict[str, Any], **arrays: Array) -> None:
    _check_arrays(arrays)
    query = arrays["query"]
    for name, x in arrays.items():
        if dtype_name(x) != dtype_name(query):
            raise InvalidInput(f"{name}: got dtype {dtype_name(x)}, expected query's {dtype_name(query)}; cast it")
    if query.shape[3] + arrays["query_rope"].shape[3] == 0:
        raise InvalidInput("query, query_rope: have no columns, d = r = 0; expected at least one of both together")
    taken, known = ("query", "key", "value", "scale"), [f.name for f in fields(Problem)]
    for name in more:
        if name in taken or name not in known:
            why = "is made here" if name in taken else "is no option of Problem"
            raise InvalidInput(f"{name}: {why}; leave it out")


def _check_arrays(arrays: dict[str, Array]) -> None:
    """Refuse what is no array of a float format, or of other axes, and lengths of an axis that are not one."""
    found: dict[str, dict[str, int]] = {}
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray):
            raise InvalidInput(f"{name}: got {type(x).__name__}, expected a NumPy array")
        if dtype_name(x) not in FORMATS:
            raise InvalidInput(f"{name}: got dtype {dtype_name(x)}, expected one of {', '.join(FORMATS)}; cast it")
        if x.ndim != len(SHAPES[name]):
            raise InvalidInput(f"{name}: shape is {x.shape}, expected ({', '.join(SHAPES[name])})")
        for axis, n in zip(SHAPES[name], x.shape, strict=True):
            found.setdefault(axis, {})[name] = n
            if n < 1 and axis in ("h", "c", "d_v"):
                raise InvalidInput(f"{name}: shape is {x.shape}, expected {axis} of at least 1")
    for axis, lengths in found.items():
        counts = Counter(lengths.values()).most_common()
        if len(counts) == 2 and counts[1][1] == 1 < counts[0][1]:
            odd, as_in = ([name for name, n in lengths.items() if n == m] for m in (counts[1][0], counts[0][0]))
            raise InvalidInput(f"{odd[0]}: {axis} is {counts[1][0]}, expected {counts[0][0]} as in {', '.join(as_in)}")
        if len(counts) > 1:
            said = " and ".join(f"{n} in {name}" for name, n in lengths.items())
            raise InvalidInput(f"{', '.join(lengths)}: {axis} is {said}, expected one length")
