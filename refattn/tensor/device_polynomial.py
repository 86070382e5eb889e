"""Tensor attention by polynomials on a GPU: features by products of gathered rows, sums as products of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ..arrays import dtype_name, kind_of
from ..errors import InvalidProblem, UnsupportedProblem
from ..gpu.views import device_of, library
from .forms import scale_of
from .polynomial import Certified, Sums, bound_of, chosen, coefficients_of, monomials, weights

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
    xp = array_namespace(query)
    most_key: Any = 1.0
    for k in keys:
        most_key = most_key * xp.max(xp.abs(xp.astype(k, xp.float64)), axis=2, keepdims=True)
    found = xp.sum(xp.abs(xp.astype(query, xp.float64)) * most_key, axis=3) * abs(by) * (1 + 1e-12)
    most: Any = 1.0
    for v in values:
        most = most * xp.max(xp.abs(xp.astype(v, xp.float64)), axis=(2, 3))
    sizes, largest = _host(found), _host(most)[..., None]
    if not np.isfinite(sizes).all():
        raise InvalidProblem("tensor.polynomial: the numbers are not finite, or their products are not")
    sums = Sums.of(query, keys)
    kind, degree = chosen(sums, sizes, largest, tolerance, degree, kind)
    weight = weights(sums.d, coefficients_of(kind, degree, float(sizes.max())), by).astype(sums.dtype)
    on_device = _like(weight[:, None], query)
    moments: Any = 1.0
    for k, v in zip(keys, values, strict=True):
        wide = xp.concat([v, xp.ones((*v.shape[:3], 1), dtype=v.dtype, device=v.device)], axis=3)
        parts = (slice(i, i + ROWS) for i in range(0, k.shape[2], ROWS))
        moments = moments * sum(_features(xp, k[:, :, i], degree) @ wide[:, :, i] for i in parts)
    moments = on_device * moments
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
        up, feature = (_like(a[now], x) for a in (parents, of))
        more = xp.take(found, up, axis=2) * xp.take(columns, feature, axis=2)
        found = xp.concat([found, more], axis=2)
    return found


def _check(query: Any, keys: Sequence[Any], values: Sequence[Any], scale: float | None) -> float:
    if len(keys) < 1 or len(keys) != len(values):
        raise InvalidProblem(f"keys: got {len(keys)} kinds and {len(values)} of values, expected as many, at least 1")
    number, dtype = device_of(query, "query"), dtype_name(query)
    if kind_of(query) not in ("torch", "cupy") or dtype not in ("float32", "float64"):
        raise UnsupportedProblem(f"tensor.polynomial: takes float32 and float64 of PyTorch or CuPy, got {dtype}")
    if (
        kind_of(query) == "torch"
        and dtype == "float32"
        and library("torch").get_float32_matmul_precision() != "highest"
    ):
        raise UnsupportedProblem("tensor.polynomial: the bound needs torch.set_float32_matmul_precision('highest')")
    b, h, _, d = query.shape
    for t, (k, v) in enumerate(zip(keys, values, strict=True), 1):
        for name, x, shape in (
            (f"k{t}", k, (b, h, k.shape[2], d)),
            (f"v{t}", v, (b, h, k.shape[2], values[0].shape[3])),
        ):
            if kind_of(x) != kind_of(query) or dtype_name(x) != dtype or device_of(x, name) != number:
                raise InvalidProblem(f"{name}: is not of query's library, type and device")
            if tuple(x.shape) != shape:
                raise InvalidProblem(f"{name}: got shape {tuple(x.shape)}, expected {shape}")
    return scale_of(scale, d)


def _host(x: Any) -> NDArray[np.float64]:
    return np.asarray(x.cpu() if kind_of(x) == "torch" else x.get(), np.float64)


def _like(x: NDArray[Any], like: Any) -> Any:
    if kind_of(like) == "torch":
        return library("torch").from_numpy(np.ascontiguousarray(x)).to(like.device)
    return library("cupy").asarray(x)
