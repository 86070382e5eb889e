"""Approximations of triple-wise attention without a proof: their error is measured on sampled rows, and said so."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, UnsupportedProblem
from .forms import check, scale_of
from .stream import attention

__all__ = ["Measured", "centroids", "windowed"]

Array = NDArray[Any]
ROWS = 16


@dataclass(frozen=True)
class Measured:
    """An approximation and its error where it was measured; elsewhere nothing is known of it.

    Attributes
    ----------
    out : (b, h, n_q, d_v) array
        The result.
    rows : (m,) int array
        The places that were compared with the exact result, in every head.
    error : float
        The largest difference in those rows.
    relative : float
        Their difference over the exact result, both as lengths (Frobenius).
    """

    out: Array
    rows: NDArray[np.int64]
    error: float
    relative: float


def centroids(
    query: Array, k1: Array, k2: Array, v1: Array, v2: Array, *, clusters: int, scale: float | None = None,
    first_order: bool = True, sample: int = 32, seed: int = 0,
) -> Measured:  # fmt: skip
    """Return trilinear attention with each kind of keys replaced by centroids of clusters; for tightly clustered keys.

    A pair of clusters counts as often as it has pairs. First order: values are corrected by their covariance with the
    keys of their cluster; the weights need no such term, as keys differ from their centroid by 0 on average.

    Parameters
    ----------
    query, k1, k2, v1, v2, scale
        As in :func:`refattn.tensor.attention`.
    clusters : int
        Centroids of each kind, by scikit-learn's k-means.
    first_order : bool
        Correct the values.
    sample : int
        Rows of each head to measure the error on.
    seed : int
        Of the starts and the sample.

    Raises
    ------
    InvalidInput
        No cluster, or more than keys.
    UnsupportedProblem
        scikit-learn is missing.
    """
    shape = check(query, (k1, k2), (v1, v2), "trilinear", None, None)
    if not 1 <= clusters <= min(shape.n1, shape.n2):
        raise InvalidInput(f"clusters: got {clusters}, expected from 1 to {min(shape.n1, shape.n2)}")
    by, rng, group = scale_of(scale, shape.d), np.random.default_rng(seed), shape.heads // shape.heads_kv
    out = np.empty((*query.shape[:3], shape.d_v), query.dtype)
    for b, kv in np.ndindex(shape.batch, shape.heads_kv):
        first, second = (_clustered(k[b, kv], v[b, kv], clusters, rng) for k, v in ((k1, v1), (k2, v2)))
        for h in range(kv * group, (kv + 1) * group):
            for i in range(0, shape.n_q, ROWS):
                rows = slice(i, i + ROWS)
                out[b, h, rows] = _attended(query[b, h, rows] * query.dtype.type(by), first, second, first_order)
    return _measured(out, (query, k1, k2, v1, v2), {"scale": by, "form": "trilinear"}, sample, rng)


def windowed(
    query: Array, k1: Array, k2: Array, v1: Array, v2: Array, *, window: tuple[int, int], causal: str = "bottom_right",
    form: str = "trilinear", scale: float | None = None, sample: int = 32, seed: int = 0,
) -> Measured:  # fmt: skip
    """Return causal attention over the last keys only, as an approximation of that over all; for local attention.

    Parameters
    ----------
    query, k1, k2, v1, v2, window, causal, form, scale
        As in :func:`refattn.tensor.attention`.
    sample : int
        Rows of each head to measure the error on.
    seed : int
        Of the sample.

    Raises
    ------
    UnsupportedProblem
        The tree form.
    """
    if form == "tree":
        raise UnsupportedProblem("tensor.windowed: in the tree form keys see keys; its error is not measured by rows")
    options: dict[str, Any] = {"scale": scale, "causal": causal, "form": form}
    out = attention(query, k1, k2, v1, v2, window=window, **options)
    return _measured(out, (query, k1, k2, v1, v2), options, sample, np.random.default_rng(seed))


def _measured(out: Array, given: tuple[Array, ...], options: dict[str, Any], sample: int, rng: Any) -> Measured:
    if sample < 1:
        raise InvalidInput(f"sample: got {sample}, expected at least 1: without it nothing is known of the error")
    n = out.shape[2]
    rows = np.sort(rng.choice(n, min(sample, n), replace=False))
    query, *others = given
    shape = check(query, others[:2], others[2:], options["form"], options.get("causal"), None)
    ends = np.stack([shape.bounds(axis)[1][rows] for axis in (0, 1)], 1)  # a row sees the keys before these
    exact = np.zeros((*out.shape[:2], len(rows), out.shape[3]), out.dtype)
    for seen in np.unique(ends, axis=0):
        alike = (ends == seen).all(1)
        if seen.min() > 0:
            some = [x[:, :, :n] for x, n in zip(others, (*seen, *seen), strict=True)]
            exact[:, :, alike] = attention(
                query[:, :, rows[alike]], *some, form=options["form"], scale=options["scale"]
            )
    difference = np.abs(out[:, :, rows] - exact)
    relative = float(np.linalg.norm(difference)) / max(float(np.linalg.norm(exact)), 1e-300)
    return Measured(out, rows, float(difference.max()), relative)


@dataclass(frozen=True)
class _Clusters:
    """Of each cluster: its size's logarithm, the means of keys and values, their covariance (clusters, d, d_v)."""

    log_size: Array
    key: Array
    value: Array
    covariance: Array


def _clustered(k: Array, v: Array, count: int, rng: Any) -> _Clusters:
    """Return the clusters of a head's keys."""
    try:
        cluster = importlib.import_module("sklearn.cluster")
    except ModuleNotFoundError as e:
        raise UnsupportedProblem("tensor.centroids: needs scikit-learn; pip install scikit-learn") from e
    near = cluster.KMeans(count, n_init=1, random_state=int(rng.integers(2**31))).fit_predict(k)
    one = (near[:, None] == np.unique(near)).astype(k.dtype)
    size = one.sum(0)
    key, value = one.T @ k / size[:, None], one.T @ v / size[:, None]
    apart, weight = k - one @ key, one / size
    covariance = np.einsum("jg,jd,jc->gdc", weight, apart, v, optimize=True)
    return _Clusters(np.log(size), key, value, covariance)


def _attended(q: Array, a: _Clusters, b: _Clusters, first_order: bool) -> Array:
    """Return out of some rows over pairs of clusters."""
    left, right = q[:, None] * b.key, q[:, None] * a.key
    s = np.einsum("rbd,ad->rab", left, a.key) + a.log_size[:, None] + b.log_size
    p = np.exp(s - s.max((1, 2), keepdims=True))
    x, y = a.value[None, :, None], b.value[None, None]
    if first_order:
        x = x + np.einsum("rbd,adc->rabc", left, a.covariance, optimize=True)
        y = y + np.einsum("rad,bdc->rabc", right, b.covariance, optimize=True)
    found = np.einsum("rab,rabc->rc", p, np.broadcast_to(x * y, (*p.shape, x.shape[-1])))
    return np.asarray(found / p.sum((1, 2))[:, None])
