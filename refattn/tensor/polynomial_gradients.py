"""Gradients of tensor attention by polynomials: of the approximation itself, in time near-linear in n."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidProblem
from .polynomial import ROWS, coefficients_of, features, monomials, prepared, running, weights, widened

__all__ = ["polynomial_backward"]

Array = NDArray[Any]


def polynomial_backward(
    query: Array, keys: Sequence[Array], values: Sequence[Array], dout: Array, *, scale: float | None = None,
    causal: bool = False, tolerance: float = 1e-6, degree: int | None = None, kind: str | None = None,
) -> tuple[Array, list[Array], list[Array]]:  # fmt: skip
    """Return the gradients of sum(out·dout), out that of :func:`refattn.tensor.polynomial` with the same arguments.

    Parameters
    ----------
    query, keys, values, scale, causal, tolerance, degree, kind
        As in `polynomial`.
    dout : (b, h, n_q, d_v) array
        The gradient that arrives at out.

    Returns
    -------
    dquery : array like query
        Its gradient.
    dkeys, dvalues : lists of arrays
        Those of each kind of keys and of values.

    Raises
    ------
    InvalidProblem, UnsupportedProblem
        As in `polynomial`.
    """
    plan = prepared(query, keys, values, scale, causal, tolerance, degree, kind)
    if np.shape(dout) != (*query.shape[:3], values[0].shape[3]):
        raise InvalidProblem(f"dout: got shape {np.shape(dout)}, expected {(*query.shape[:3], values[0].shape[3])}")
    coefficients = coefficients_of(plan.kind, plan.degree, float(plan.sizes.max()))
    grads = np.zeros_like(query), [np.zeros_like(k) for k in keys], [np.zeros_like(v) for v in values]
    for b, h in np.ndindex(*query.shape[:2]):
        given = query[b, h], [k[b, h] for k in keys], [v[b, h] for v in values]
        dq, dks, dvs = (_causal_head if causal else _head)(
            *given, np.asarray(dout[b, h], query.dtype), coefficients, plan.scale
        )
        grads[0][b, h] = dq
        for t, (dk, dv) in enumerate(zip(dks, dvs, strict=True)):
            grads[1][t][b, h], grads[2][t][b, h] = dk, dv
    return grads


def _parts(x: Array) -> list[slice]:
    return [slice(i, i + ROWS) for i in range(0, len(x), ROWS)]


def _head(
    q: Array, keys: Sequence[Array], values: Sequence[Array], g: Array, coefficients: tuple[float, ...], by: float
) -> tuple[Array, list[Array], list[Array]]:
    """Return the gradients of a head."""
    degree = len(coefficients) - 1
    weight = weights(q.shape[1], coefficients, by).astype(q.dtype)[:, None]
    wide = widened(values)
    sums = [sum(features(k[i], degree) @ w[i] for i in _parts(k)) for k, w in zip(keys, wide, strict=True)]
    moments = math.prod(sums[1:], start=sums[0]) * weight
    arrived, dq = np.zeros_like(moments), np.empty_like(q)
    for i in _parts(q):
        f = features(q[i], degree)
        found = f.T @ moments
        total = found[:, -1:]
        out = found[:, :-1] / total
        at_sums = np.concatenate([g[i], -(g[i] * out).sum(1, keepdims=True)], 1) / total
        arrived += f @ at_sums
        dq[i] = _by_rows(q[i], f, moments @ at_sums.T, degree)
    arrived *= weight
    dks, dvs = [], []
    for t, (k, w) in enumerate(zip(keys, wide, strict=True)):
        own = math.prod((s for u, s in enumerate(sums) if u != t), start=arrived)
        dk, dw = np.empty_like(k), np.empty_like(w)
        for i in _parts(k):
            f = features(k[i], degree)
            dw[i] = f.T @ own
            dk[i] = _by_rows(k[i], f, own @ w[i].T, degree)
        dks.append(dk)
        dvs.append(dw[:, :-1])
    return dq, dks, dvs


def _causal_head(
    q: Array, keys: Sequence[Array], values: Sequence[Array], g: Array, coefficients: tuple[float, ...], by: float
) -> tuple[Array, list[Array], list[Array]]:
    """Return the gradients of a head whose rows see the keys up to their own: parts of the rows, from the last."""
    degree = len(coefficients) - 1
    weight = weights(q.shape[1], coefficients, by).astype(q.dtype)
    wide = widened(values)
    zero = [np.zeros((w.shape[1], len(weight)), w.dtype) for w in wide]
    starts, parts = [zero], []
    for part, sums, _ in running(keys, wide, degree):
        parts.append(part)
        starts.append([s[-1].copy() for s in sums])
    dq, dks, dws = np.empty_like(q), [np.empty_like(k) for k in keys], [np.empty_like(w) for w in wide]
    later = [np.zeros_like(z) for z in zero]
    for part, start in zip(reversed(parts), reversed(starts[:-1]), strict=True):
        ((_, sums, of_keys),) = running([k[part] for k in keys], [w[part] for w in wide], degree, start)
        f = features(q[part], degree)
        moments = math.prod(sums[1:], start=sums[0]) * weight
        found = (moments @ f.T[:, :, None])[:, :, 0]
        out, total = found[:, :-1] / found[:, -1:], found[:, -1:]
        at_sums = np.concatenate([g[part], -(g[part] * out).sum(1, keepdims=True)], 1) / total
        dq[part] = _by_rows(q[part], f, (at_sums[:, None] @ moments)[:, 0].T.copy(), degree)
        arrived = (f.T * weight)[:, None] * at_sums[:, :, None]
        for t, (k, w) in enumerate(zip(keys, wide, strict=True)):
            own = math.prod((s for u, s in enumerate(sums) if u != t), start=arrived) + 0
            # a key reaches its own row and all behind it
            own[-1] += later[t]
            for after, here in pairwise(own[::-1]):
                here += after
            later[t] = own[0].copy()
            dws[t][part] = (own @ of_keys[t].T[:, :, None])[:, :, 0]
            dks[t][part] = _by_rows(k[part], of_keys[t], (w[part, None] @ own)[:, 0].T.copy(), degree)
    return dq, dks, [dw[:, :-1] for dw in dws]


def _by_rows(x: Array, f: Array, df: Array, degree: int) -> Array:
    """Return the gradient by rows from that by their features, which is used up."""
    _, parents, of = monomials(x.shape[1], degree)
    dx = np.zeros_like(x.T)
    for t in range(len(f) - 1, 0, -1):
        dx[of[t]] += df[t] * f[parents[t]]
        df[parents[t]] += df[t] * x[:, of[t]]
    return np.asarray(dx.T)
