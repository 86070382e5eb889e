"""Tensor attention by polynomials on a GPU: features by products of gathered rows, sums as products of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace

from ..arrays import dtype_name, kind_of, like
from ..errors import InvalidProblem, UnsupportedProblem
from ..gpu.views import device_of, library
from .polynomial import (
    Certified,
    Sums,
    bound_of,
    check_arrays,
    chosen,
    coefficients_of,
    largest_of,
    monomials,
    sizes_of,
    weights,
)

__all__ = ["polynomial"]

ROWS = 1 << 16
"""Rows whose features are in memory at once."""


def polynomial(
    query: Any, keys: Sequence[Any], values: Sequence[Any], *, scale: float | None = None, tolerance: float = 1e-6,
    degree: int | None = None, kind: str | None = None,
) -> Certified:  # fmt: skip
    """Return tensor attention of any order by a polynomial, on the arrays' GPU, with a bound for each row.

    Parameters
    ----------
    query, keys, values, scale, tolerance, degree, kind
        As in :func:`refattn.tensor.polynomial`, not causal; arrays of PyTorch or CuPy.

    Returns
    -------
    Certified
        out in query's library; the bounds in NumPy. To choose the degree, the sizes of logits and values are waited
        for.

    Raises
    ------
    InvalidProblem, UnsupportedProblem
        As in `polynomial`; and where PyTorch may round products of float32 matrices to fewer bits (TF32).
    """
    by = _check(query, keys, values, scale)
    xp, sums = array_namespace(query), Sums.of(query, keys)
    sizes, largest = sizes_of(query, keys, by), largest_of(values)
    kind, degree = chosen(sums, sizes, largest, tolerance, degree, kind)
    weight = weights(sums.d, coefficients_of(kind, degree, float(sizes.max())), by).astype(sums.dtype)
    moments: Any = 1.0
    for k, v in zip(keys, values, strict=True):
        wide = xp.concat([v, xp.ones((*v.shape[:3], 1), dtype=v.dtype, device=v.device)], axis=3)
        parts = (slice(i, i + ROWS) for i in range(0, k.shape[2], ROWS))
        moments = moments * sum(_features(xp, k[:, :, i], degree) @ wide[:, :, i] for i in parts)
    moments = like(weight[:, None], query) * moments
    rows = (slice(i, i + ROWS) for i in range(0, query.shape[2], ROWS))
    made = [xp.matrix_transpose(_features(xp, query[:, :, i], degree)) @ moments for i in rows]
    total = xp.concat(made, axis=2)
    out = total[..., :-1] / total[..., -1:]
    return Certified(out, bound_of(kind, degree, sizes, sums, largest), degree, kind, 1.0)


def _features(xp: Any, x: Any, degree: int) -> Any:
    """Return all monomials of each row, (b, h, features, rows)."""
    exponents, parents, of = monomials(x.shape[3], degree)
    columns, total = xp.matrix_transpose(x), exponents.sum(1)
    found = xp.ones((*x.shape[:2], 1, x.shape[2]), dtype=x.dtype, device=x.device)
    for g in range(1, degree + 1):  # those of degree g, from those of degree g - 1
        now = total == g
        up, feature = (like(a[now], x) for a in (parents, of))
        more = xp.take(found, up, axis=2) * xp.take(columns, feature, axis=2)
        found = xp.concat([found, more], axis=2)
    return found


def _check(query: Any, keys: Sequence[Any], values: Sequence[Any], scale: float | None) -> float:
    number, kind, dtype = device_of(query, "query"), kind_of(query), dtype_name(query)
    if kind not in ("torch", "cupy") or dtype not in ("float32", "float64"):
        raise UnsupportedProblem(f"tensor.polynomial: takes float32 and float64 of PyTorch or CuPy, got {dtype}")
    if kind == "torch" and dtype == "float32" and library("torch").get_float32_matmul_precision() != "highest":
        raise UnsupportedProblem("tensor.polynomial: the bound needs torch.set_float32_matmul_precision('highest')")
    by = check_arrays(query, keys, values, scale, False, (kind,))
    for letter, arrays in (("k", keys), ("v", values)):
        for t, x in enumerate(arrays, 1):
            if device_of(x, f"{letter}{t}") != number:
                raise InvalidProblem(f"{letter}{t}: is on another GPU than query, {number}; move one of them")
    return by
