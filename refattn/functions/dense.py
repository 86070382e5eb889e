"""Softmax over part of the scores, layer norm, and what is asked of queries and keys."""

from __future__ import annotations

from typing import Any

import array_api_compat as api
import numpy as np

from ..arrays import dtype_name
from ..dtypes import is_float
from ..errors import InvalidInput
from .arguments import namespace, real

__all__ = ["as_index", "check_call", "check_floats", "layer_norm", "masked_softmax"]


def check_floats(**arrays: Any) -> Any:
    """Return the arrays' library, after checking that all are of one library and one float type.

    Raises
    ------
    InvalidInput
        An argument is no array, of another library, or of another type than the first; or holds no floats.
    """
    xp = namespace(**arrays)
    first, wanted = next((name, dtype_name(x)) for name, x in arrays.items())
    for name, x in arrays.items():
        if not is_float(found := dtype_name(x)):
            raise InvalidInput(f"{name}: holds {found}, expected floats; cast it first")
        if found != wanted:
            raise InvalidInput(f"{name}: holds {found}, expected {wanted}, as {first} does; cast one of them")
    return xp


def check_call(query: Any, key: Any, value: Any) -> Any:
    """Return the library of (..., n_q, d), (..., n_k, d) and (..., n_k, d_v) float arrays, after checking them.

    Raises
    ------
    InvalidInput
        As `check_floats`; or the shapes do not fit.
    """
    xp = check_floats(query=query, key=key, value=value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 2 or 0 in x.shape:
            raise InvalidInput(f"{name}: shape is {tuple(x.shape)}, expected (..., tokens, dim), each at least 1")
        if x.shape[:-2] != query.shape[:-2]:
            raise InvalidInput(
                f"{name}: shape is {tuple(x.shape)}, expected {tuple(query.shape[:-2])} before tokens and dim, "
                "as query has; repeat or slice it"
            )
    if key.shape[-1] != query.shape[-1]:
        raise InvalidInput(f"key: dim is {key.shape[-1]}, expected query's {query.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise InvalidInput(f"value: has {value.shape[-2]} tokens, expected key's {key.shape[-2]}")
    return xp


def _spreads(small: Any, shape: Any) -> bool:
    return len(small) <= len(shape) and all(
        n in (1, m) for n, m in zip(reversed(tuple(small)), reversed(tuple(shape)), strict=False)
    )


def as_index(places: Any, model: Any) -> Any:
    """Return whole numbers or truth values as an array of the library and on the device of another array."""
    return api.array_namespace(model).asarray(np.asarray(places), device=api.device(model))


def masked_softmax(scores: Any, allowed: Any = None) -> tuple[Any, Any]:
    """Return softmax over the last axis and its log-sum-exp, of the scores that are allowed; 0 and -inf of none.

    Parameters
    ----------
    scores : (..., n) float array
    allowed : boolean array of a shape that broadcasts to the scores', optional
        True where a score counts; None is everywhere.
    """
    xp = namespace(scores=scores) if allowed is None else namespace(scores=scores, allowed=allowed)
    if scores.ndim < 1 or (allowed is not None and not _spreads(allowed.shape, scores.shape)):
        other = "" if allowed is None else f", to which allowed's {tuple(allowed.shape)} spreads"
        raise InvalidInput(f"scores: shape is {tuple(scores.shape)}, expected (..., n){other}")
    if allowed is not None:
        scores = xp.where(allowed, scores, -xp.inf)
    top = xp.max(scores, axis=-1, keepdims=True)
    top = xp.where(xp.isinf(top), 0.0 * xp.ones_like(top), top)
    weights = xp.exp(scores - top)
    total = xp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    total = xp.where(some, total, xp.ones_like(total))
    lse = xp.where(some, top + xp.log(total), -xp.inf)
    return weights / total, lse[..., 0]


def layer_norm(x: Any, epsilon: float) -> Any:
    """Return features less their mean, over their deviation: ``(x - m)/sqrt(mean (x - m)² + epsilon)``.

    Parameters
    ----------
    x : (..., d) float array
    epsilon : float
        Added to the variance.
    """
    xp = namespace(x=x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise InvalidInput(f"x: shape is {tuple(x.shape)}, expected (..., features), at least 1")
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    return centred / xp.sqrt(xp.mean(centred**2, axis=-1, keepdims=True) + real("epsilon", epsilon, 0))
