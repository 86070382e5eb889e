"""Attention to some of the keys, exactly, with its log-sum-exp; and parts merged by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, from_float64, like, to_float64, to_numpy
from ..dtypes import FORMATS, format_of
from ..errors import InvalidInput, UnsupportedProblem
from ..exact.driver import evaluate
from ..problem import Problem
from .arguments import namespace

__all__ = ["attend", "merge", "numbers", "rounded"]

Array = NDArray[np.float64]


def numbers(name: str, x: Any) -> Array:
    """Return a float array's numbers as NumPy's float64, exactly.

    Raises
    ------
    InvalidInput
        It is no array of floats, or holds NaN or an infinity.
    """
    namespace(**{name: x})
    found = to_float64(to_numpy(x, name))
    if not np.isfinite(found).all():
        raise InvalidInput(f"{name}: holds NaN or an infinity, expected finite numbers")
    return found


def rounded(x: Array, model: Any, *, wide: bool = False) -> Any:
    """Return float64 numbers rounded to the type of `model`, as an array of its kind, on its device.

    With `wide` to float32 where that is wider, as lse is.
    """
    form = format_of(dtype_name(model))
    form = FORMATS["float32"] if wide and form.precision < 24 else form
    return like(from_float64(form.round_array(x), form.name), model)


def attend(
    query: Any, key: Any, value: Any, *, scale: float | None = None, allowed: Any = None, weight: Any = None
) -> tuple[Array, Array]:
    """Return softmax attention and its log-sum-exp, each correctly rounded to float64.

    Parameters
    ----------
    query, key, value, scale, allowed, weight
        As in :class:`refattn.Problem`.

    Returns
    -------
    out : (b, h_q, n_q, d_v) float64 array
        Of NumPy. A row without keys is 0.
    lse : (b, h_q, n_q) float64 array
        Natural log; -inf where a row has no keys.

    Raises
    ------
    InvalidProblem
        Which argument is wrong, what was expected, what to change.
    UnsupportedProblem
        A result that 262144 bits do not tell from a midpoint of two numbers.
    """
    answer = evaluate(Problem(query, key, value, scale, allowed=allowed, weight=weight), rounding="float64")
    if left := sum(answer.undecided.values()):
        raise UnsupportedProblem(f"attend: {left} results lie nearer to a midpoint of two float64 numbers than told")
    assert answer.lse is not None  # softmax attention has one
    return np.asarray(answer.out), np.asarray(answer.lse)


def merge(parts: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return attention to all keys from attention to parts of them.

    ``lse = log sum_p exp(lse_p)`` and ``out = sum_p exp(lse_p - lse) out_p``, shifted by the largest lse, so that no
    exponential overflows.

    Parameters
    ----------
    parts : sequence of (out, lse)
        out (..., n, d) and lse (..., n), of one library. The parts have no key in common.

    Returns
    -------
    out : (..., n, d) array
        0 where no part has a key.
    lse : (..., n) array
        -inf where no part has a key.

    Raises
    ------
    InvalidInput
        No parts, or arrays of other shapes than the first part's.

    Notes
    -----
    The merge of FlashAttention's tiles; RetrievalAttention merges its parts so (arXiv 2409.10516; public code was read,
    which does not shift the log-sum-exp of the retrieved part).
    """
    if not parts:
        raise InvalidInput("parts: got none, expected at least one pair of out and lse")
    for i, (out, lse) in enumerate(parts):
        namespace(**{f"parts[{i}] out": out, f"parts[{i}] lse": lse})
        shape, rows = tuple(out.shape), tuple(lse.shape)
        if rows != shape[:-1] or shape != tuple(parts[0][0].shape):
            raise InvalidInput(
                f"parts[{i}]: shapes are {shape} and {rows}, expected the first part's out and its shape without the "
                "last axis for lse"
            )
    xp = namespace(out=parts[0][0])
    lses = xp.stack([lse for _, lse in parts])
    top = xp.max(lses, axis=0)
    finite = xp.where(top == -xp.inf, xp.zeros_like(top), top)
    weights = xp.exp(lses - finite)
    total = xp.sum(weights, axis=0)
    some = xp.where(total == 0, xp.ones_like(total), total)  # no keys at all: 0 / 1 and -inf
    out = xp.sum(weights[..., None] * xp.stack([out for out, _ in parts]), axis=0) / some[..., None]
    return out, xp.where(total == 0, xp.full_like(total, -xp.inf), finite + xp.log(some))
