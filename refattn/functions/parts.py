"""Attention to some of the keys, exactly, with its log-sum-exp; and parts merged by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, from_float64, kind_of, like, to_float64, to_numpy
from ..dtypes import FORMATS, format_of
from ..errors import InvalidInput, UnsupportedProblem, expect
from ..exact.driver import evaluate
from ..problem import Problem
from .arguments import namespace

__all__ = ["attend", "expect_part", "merge", "numbers", "rounded"]

Array = NDArray[np.float64]


def numbers(name: str, x: Any) -> Array:
    """Return a float array's numbers as NumPy's float64, exactly.

    Raises
    ------
    InvalidInput
        It is no array of floats, or holds NaN or an infinity.
    """
    namespace(**{name: x})
    if dtype_name(x) not in FORMATS:
        raise InvalidInput(f"{name}: holds {dtype_name(x)}, expected floats; cast it")
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


def expect_part(name: str, part: Any, first: Any) -> None:
    """Refuse what is no (out, lse) of the first part's shape and library, or has an lse that no keys have.

    Numbers that a library does not give while it traces are not looked at.

    Raises
    ------
    InvalidInput
        Which part, what it got, what was expected.
    """
    pair = isinstance(part, tuple | list) and len(part) == 2
    expect(pair, name, part if kind_of(part) is None else f"{type(part).__name__}", "a pair of out and lse")
    out, lse = part
    xp = namespace(**{"parts[0] out": first[0], f"{name} out": out, f"{name} lse": lse})
    for said, x in ((f"{name} out", out), (f"{name} lse", lse)):
        if dtype_name(x) not in FORMATS:
            raise InvalidInput(f"{said}: got dtype {dtype_name(x)}, expected a float format; cast it")
    shape, rows = tuple(out.shape), tuple(lse.shape)
    if not shape or rows != shape[:-1] or shape != tuple(first[0].shape):
        raise InvalidInput(
            f"{name}: shapes are {shape} and {rows}, expected the first part's out and its shape without the last axis "
            "for lse"
        )
    try:
        good = bool(xp.all(lse < xp.inf))
    except (TypeError, RuntimeError):
        return
    if not good:
        raise InvalidInput(f"{name} lse: holds NaN or infinity, expected finite numbers, or -inf where no key is seen")


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
        No parts, what is no pair of float arrays, arrays of other shapes or libraries than the first part's, or an lse
        of NaN or infinity.

    Notes
    -----
    The merge of FlashAttention's tiles; RetrievalAttention merges its parts so (arXiv 2409.10516; public code was read,
    which does not shift the log-sum-exp of the retrieved part).
    """
    expect(isinstance(parts, Sequence) and not isinstance(parts, str), "parts", parts, "a list of pairs of out and lse")
    if not parts:
        raise InvalidInput("parts: got none, expected at least one pair of out and lse")
    for i, part in enumerate(parts):
        expect_part(f"parts[{i}]", part, parts[0])
    xp = namespace(out=parts[0][0])
    lses = xp.stack([lse for _, lse in parts])
    top = xp.max(lses, axis=0)
    finite = xp.where(top == -xp.inf, xp.zeros_like(top), top)
    weights = xp.exp(lses - finite)
    total = xp.sum(weights, axis=0)
    some = xp.where(total == 0, xp.ones_like(total), total)  # no keys at all: 0 / 1 and -inf
    out = xp.sum(weights[..., None] * xp.stack([out for out, _ in parts]), axis=0) / some[..., None]
    return out, xp.where(total == 0, xp.full_like(total, -xp.inf), finite + xp.log(some))
