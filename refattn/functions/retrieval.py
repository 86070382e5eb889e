"""Attention to the first keys, the latest, and those that an index retrieves; the rest estimated by clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import like, to_numpy
from ..errors import InvalidInput
from .arguments import axes, function, instance, integers, namespace, places, whole
from .clusters import kmeans, nearest_mean
from .indexes import Index
from .parts import attend, merge, numbers, rounded

__all__ = ["build_indexes", "clustered_attention", "retrieval_attention", "segment_labels", "summaries"]

Array = NDArray[Any]
Indexes = Sequence[Sequence[Index]]


def build_indexes(
    key: Any, build: Callable[[Array], Index], *, sinks: int = 128, local: int = 512
) -> list[list[Index]]:
    """Return an index of every batch's and head's keys between the first and the latest.

    Parameters
    ----------
    key : (b, h_kv, n, d) array
    build : callable
        Makes an index of (m, d) float64 keys, such as :class:`refattn.functions.indexes.FlatIndex`.
    sinks, local : int
        How many first and latest keys are left out.

    Raises
    ------
    InvalidInput
        No keys are left between.
    """
    keys = numbers("key", key)
    axes("key", keys, "batch", "heads", "keys", "features")
    first, last = _some_between(keys.shape[2], sinks, local)
    function("build", build)
    found = [[build(head[first:last]) for head in batch] for batch in keys]
    if not hasattr(found[0][0], "search"):
        raise InvalidInput(f"build: gave {type(found[0][0]).__name__}, expected an index with a function search")
    return found


def _between(n: int, sinks: int, local: int) -> tuple[int, int]:
    """Return where the keys between begin and end."""
    first = min(whole("sinks", sinks, 0), n)
    return first, max(n - whole("local", local, 0), first)


def _some_between(n: int, sinks: int, local: int) -> tuple[int, int]:
    """Return where the keys between begin and end, and refuse that there are none."""
    first, last = _between(n, sinks, local)
    if first == last:
        raise InvalidInput(f"sinks, local: {sinks} and {local} leave none of {n} keys between")
    return first, last


def _call(query: Any, key: Any, value: Any) -> tuple[Array, Array, Array]:
    namespace(query=query, key=key, value=value)
    axes("query", query, "batch", "heads", "queries", "features")
    axes("key", key, query.shape[0], "heads", "keys", query.shape[3])
    axes("value", value, query.shape[0], key.shape[1], key.shape[2], "features")
    if query.shape[1] % key.shape[1]:
        raise InvalidInput(f"key: axis heads is {key.shape[1]} and must divide query's {query.shape[1]}")
    return numbers("query", query), numbers("key", key), numbers("value", value)


def retrieval_attention(
    query: Any,
    key: Any,
    value: Any,
    indexes: Indexes,
    *,
    sinks: int = 128,
    local: int = 512,
    retrieved: int = 2000,
    scale: float | None = None,
    allowed: Any = None,
) -> tuple[Any, Any, Any]:
    """Return attention to the first and the latest keys and to those that an index finds, merged through lse.

    Parameters
    ----------
    query : (b, h_q, n_q, d) float array
        Of NumPy, PyTorch, CuPy or JAX; each row sees all keys, as the one token that is decoded does.
    key, value : (b, h_kv, n, d), (b, h_kv, n, d_v) arrays
    indexes : b sequences of h_kv objects
        Of the keys between (:func:`build_indexes`), each with ``search((m, d) queries, k) -> (m, k) places`` among
        them, -1 where it found fewer.
    sinks, local : int
        The first and the latest keys, which every query sees.
    retrieved : int
        Keys to ask the index for; as many as there are where there are fewer.
    scale : float, optional
        None is 1/sqrt(d).
    allowed : (b, n) boolean array, optional
        False hides a key, padding say. An index must not return it.

    Returns
    -------
    out : (b, h_q, n_q, d_v) array
    lse : (b, h_q, n_q) array
        Natural log; float32 where query's type is narrower.
    seen : (b, h_q, n_q, n) boolean array
        The keys that each row attended to.

    Raises
    ------
    InvalidInput
        An argument; an index that returns other shapes, a place out of range, a key twice, or a hidden one.

    Notes
    -----
    Each part is correctly rounded to float64, the merge is float64 and its result is rounded to query's type. Source:
    Liu et al., RetrievalAttention (arXiv 2409.10516); its public code in MInference was read.
    """
    q, k, v = _call(query, key, value)
    (b, h, n_q, _), (_, h_kv, n, _) = q.shape, k.shape
    first, last = _between(n, sinks, local)
    retrieved = min(whole("retrieved", retrieved, 0), last - first)
    may = np.ones((b, n), bool)
    if allowed is not None:
        namespace(key=key, allowed=allowed)
        axes("allowed", allowed, b, n)
        may = to_numpy(allowed, "allowed").astype(bool)
    steady = np.ones(n, bool)
    steady[first:last] = False
    found = np.zeros((b, h, n_q, n), bool)
    if retrieved:
        if not isinstance(indexes, tuple | list) or len(indexes) != b or any(len(x) != h_kv for x in indexes):
            raise InvalidInput(f"indexes: expected {b} sequences of {h_kv}, one for each batch and key head")
        for at in np.ndindex(b, h):
            group = at[1] // (h // h_kv)
            hits = np.asarray(indexes[at[0]][group].search(q[at], retrieved))
            found[at][:, first:last] = _marked(
                hits, (n_q, retrieved), may[at[0], first:last], f"indexes[{at[0]}][{group}]"
            )
    parts = [
        attend(q, k, v, scale=scale, allowed=(steady & may)[:, None, None]),
        attend(q, k, v, scale=scale, allowed=found),
    ]
    out, lse = merge(parts)
    return rounded(out, query), rounded(lse, query, wide=True), like(found | (steady & may)[:, None, None], query)


def _marked(hits: Array, shape: tuple[int, int], may: Array, name: str) -> Array:
    """Return which keys the hits of an index are, after checking them."""
    if hits.shape != shape or not np.issubdtype(hits.dtype, np.integer):
        raise InvalidInput(f"{name}: search gave {hits.dtype} of shape {hits.shape}, expected integers of {shape}")
    marked = np.zeros((shape[0], len(may)), bool)
    for row, found in zip(marked, hits, strict=True):
        found = found[found != -1]
        if len(wrong := found[(found < 0) | (found >= len(may))]):
            raise InvalidInput(f"{name}: search gave the key {wrong[0]}, which is out of range of {len(may)} keys")
        if len(np.unique(found)) < len(found):
            raise InvalidInput(f"{name}: search gave the key {_twice(found)} twice; a key counts once")
        if len(wrong := found[~may[found]]):
            raise InvalidInput(f"{name}: search gave the key {wrong[0]}, which allowed hides")
        row[found] = True
    return marked


def _twice(places: Array) -> int:
    found, count = np.unique(places, return_counts=True)
    return int(found[count > 1][0])


def summaries(keys: Any, values: Any, labels: Any, clusters: int) -> tuple[Any, Any, Any]:
    """Return each cluster's mean key, mean value and size.

    Parameters
    ----------
    keys, values : (..., n, d), (..., n, d_v) arrays
    labels : (..., n) integer array
        The cluster of each key, from 0.
    clusters : int
        How many.

    Returns
    -------
    centroids : (..., c, d), means : (..., c, d_v), sizes : (..., c)
        0 for an empty cluster.

    Raises
    ------
    InvalidInput
        Other shapes; a label out of range.
    """
    xp = namespace(keys=keys, values=values, labels=labels)
    clusters = whole("clusters", clusters, 1)
    for name, x in (("keys", keys), ("values", values)):
        if x.ndim < 2 or tuple(x.shape[:-1]) != tuple(labels.shape):
            raise InvalidInput(f"labels: shape is {tuple(labels.shape)}, expected that of {name} without its last axis")
    places("labels", labels, clusters)
    own = xp.stack([xp.astype(labels == c, keys.dtype) for c in range(clusters)], axis=-2)
    sizes = xp.sum(own, axis=-1)
    some = xp.where(sizes == 0, xp.ones_like(sizes), sizes)[..., None]
    return xp.matmul(own, keys) / some, xp.matmul(own, values) / some, sizes


def segment_labels(
    key: Any, generator: np.random.Generator, *, segment: int = 8192, size: int = 16, iterations: int = 10
) -> Any:
    """Return clusters of keys, segment by segment, by spherical k-means of the keys less their segment's mean.

    Parameters
    ----------
    key : (b, h, n, d) float array
    generator : numpy.random.Generator
        Draws the keys that k-means starts from.
    segment, size, iterations : int
        Keys of a segment, keys of a cluster in the mean, steps: as the release has them.

    Returns
    -------
    (b, h, n) integer array
        From 0; later segments have later clusters. A cluster may be empty.
    """
    keys = numbers("key", key)
    axes("key", keys, "batch", "heads", "keys", "features")
    segment, size = whole("segment", segment, 1), whole("size", size, 1)
    instance("generator", generator, np.random.Generator, "use numpy.random.default_rng(seed)")
    labels, used = [], 0
    for start in range(0, keys.shape[2], segment):
        x = keys[:, :, start : start + segment]
        x = x - x.mean(2, keepdims=True)
        flat = x.reshape(1, -1, *x.shape[2:])  # batches are clustered apart
        count = -(-x.shape[2] // size)
        own = kmeans(flat, flat[0][:, generator.permutation(x.shape[2])[:count]], iterations=iterations)
        labels.append(nearest_mean(flat, own).reshape(x.shape[:3]) + used)
        used += count
    return like(np.concatenate(labels, axis=2), key)


def clustered_attention(
    query: Any,
    key: Any,
    value: Any,
    labels: Any,
    *,
    retrieved: int,
    estimated: int,
    sinks: int = 4,
    local: int = 64,
    scale: float | None = None,
) -> tuple[Any, Any]:
    """Return attention to steady keys and the best clusters' keys, and an estimate from the next best clusters.

    A query ranks clusters by ``q·centroid``. The best `retrieved` are read key by key. Each of the next
    `estimated` stands for its keys with weight ``size·exp(scale·q·centroid)`` and its mean value. Others are left out.

    Parameters
    ----------
    query : (b, h_q, n_q, d) float array
        Of NumPy, PyTorch, CuPy or JAX; each row sees all keys.
    key, value : (b, h_kv, n, d), (b, h_kv, n, d_v) arrays
    labels : (b, h_kv, m) integer array
        Clusters of the m keys between the first `sinks` and the latest `local`, from 0.
    retrieved, estimated : int
        Clusters in each zone; the release takes 1.8% and 23.2% of them.
    sinks, local : int
        The steady zone.
    scale : float, optional
        None is 1/sqrt(d).

    Returns
    -------
    out : (b, h_q, n_q, d_v) array
    lse : (b, h_q, n_q) array
        At most the lse over the keys of the three zones: the exponential is convex.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: Chen et al., RetroInfer (arXiv 2505.02922); public code was read.
    """
    q, k, v = _call(query, key, value)
    (b, h), (h_kv, n) = q.shape[:2], k.shape[1:3]
    first, last = _some_between(n, sinks, local)
    namespace(key=key, labels=labels)
    axes("labels", labels, b, h_kv, last - first)
    own = integers("labels", labels)
    places("labels", own, n)
    clusters = max(int(own.max()), 0) + 1
    retrieved = whole("retrieved", retrieved, 0, clusters)
    estimated = whole("estimated", estimated, 0, clusters - retrieved)
    centroids, means, sizes = summaries(k[:, :, first:last], v[:, :, first:last], own, clusters)
    group = h // h_kv
    scores = q @ np.repeat(np.swapaxes(centroids, -1, -2), group, 1)
    scores = np.where(np.repeat(sizes, group, 1)[:, :, None] > 0, scores, -np.inf)
    rank = np.argsort(np.argsort(-scores, axis=-1, kind="stable"), axis=-1, kind="stable")
    exact = np.ones((*scores.shape[:3], n), bool)
    place = np.broadcast_to(np.repeat(own, group, 1)[:, :, None], (*scores.shape[:3], last - first))
    exact[..., first:last] = np.take_along_axis(rank < retrieved, place, -1)
    weight = np.repeat(sizes, group, 1)[:, :, None] * ((rank >= retrieved) & (rank < retrieved + estimated))
    read = attend(q, k, v, scale=scale, allowed=exact)
    out, lse = merge([read, attend(q, centroids, means, scale=scale, weight=weight)])
    return rounded(out, query), rounded(lse, query, wide=True)
