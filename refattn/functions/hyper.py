"""HyperAttention: softmax over the keys that hash alike, and the other keys by a uniform sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..errors import InvalidInput
from .arguments import factor, namespace, ordered, whole
from .dense import as_index, check_call, check_floats, masked_softmax
from .parts import merge

__all__ = ["angular_hash", "hyper_attention", "hyper_weight"]

Draw = Callable[[int], Any]
MODES = ("paper", "released")


def angular_hash(x: Any, planes: Any, *, mode: str = "paper") -> Any:
    """Return buckets of angular hashing: on which sides of planes x lies, as a place in Gray's order.

    ``bit_i = [x · plane_i > 0]``; the bucket is where the code ``sum_i 2^i bit_i`` stands in the order in which
    neighbours differ by one bit, so that neighbouring buckets differ by one plane.

    Parameters
    ----------
    x : (..., d) float array
    planes : (d, bits) array of x's library
        Normals of the planes, at most 31; the paper draws them from a normal distribution.
    mode : {"paper", "released"}
        The released code takes the code's own Gray code, ``c ^ (c >> 1)``, in place of its place in that order, which
        is the inverse. From three planes on, neighbouring buckets then can differ by several planes.

    Returns
    -------
    (...) array of integers

    Raises
    ------
    InvalidInput
        An argument is no array, or of a wrong shape; an unknown mode.

    Notes
    -----
    Source: Han et al., HyperAttention (arXiv 2310.05869; the opening was read, public code too; that neighbouring
    buckets are to be neighbours in space is recalled).
    """
    xp = namespace(x=x, planes=planes)
    _known(mode)
    _check_planes(x, planes)
    ordered("x", x)
    ordered("planes", planes)
    powers = as_index(1 << np.arange(planes.shape[1]), x)
    code = xp.sum(xp.where(x @ planes > 0, powers, xp.zeros_like(powers)), axis=-1)
    if mode == "released":
        return code ^ (code >> 1)
    for shift in (16, 8, 4, 2, 1):
        code = code ^ (code >> shift)
    return code


def hyper_attention(
    query: Any,
    key: Any,
    value: Any,
    planes: Any,
    draw: Draw,
    *,
    block_size: int = 256,
    min_length: int = 4096,
    causal: str | None = None,
    scale: float | None = None,
    mode: str = "paper",
) -> tuple[Any, Any]:
    """Return HyperAttention's estimate of softmax attention, and the logarithm of its estimated normaliser.

    Queries and keys are sorted by `angular_hash` and cut into blocks. A query attends exactly to the keys of its own
    block. Of all n_k keys m are drawn; those outside the own block stand for the rest, each counted n_k/m times:
    ``Z_i = sum_{j in block(i)} e^{s_ij} + (n_k/m) sum_{l drawn, not in block(i)} e^{s_il}``, ``out_i`` likewise over
    ``Z_i``. The mean of Z_i, and of Z_i out_i, over all draws is that of softmax.

    Parameters
    ----------
    query, key, value : (..., n_q, d), (..., n_k, d), (..., n_k, d_v) float arrays
        Of one library and type. Key and value heads are as many as query heads: repeat them for grouped queries.
    planes : (d, bits) array
        What hashes; see `angular_hash`.
    draw : callable
        ``draw(n)`` returns whole numbers from 0 to n - 1, of shape (m,) for all heads or (..., m) for each: places
        among n sorted keys, drawn alike and with replacement. ``lambda n: rng.integers(n, size=256)`` is the paper's.
        With `causal` it is called for the first half, for the second, then for the queries of the second half and the
        keys of the first.
    block_size : int
        The most keys of a block. Lengths need not be multiples: blocks are of nearly equal sizes.
    min_length : int
        Fewer queries than this are computed exactly; so are causal calls up to this length.
    causal : {None, "bottom_right", "top_left"}
        Both are the same, since n_q must be n_k. Halves recurse; the block below the diagonal is estimated.
    scale : float, optional
        Multiplies the products; None is 1/sqrt(d).
    mode : {"paper", "released"}
        The released code also counts drawn keys of the own block (in float32, float64 and on CUDA: its mask is
        dropped there), so that these count twice in the mean; and it hashes otherwise, see `angular_hash`. It pads
        other lengths with keys of zeros that queries see; here these are refused.

    Returns
    -------
    out : (..., n_q, d_v)
    lse : (..., n_q)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: Han et al., HyperAttention (arXiv 2310.05869; the opening was read, public code too). Defaults are the
    code's.
    """
    xp = check_call(query, key, value)
    _check(query, key, planes, draw, block_size, min_length, causal, mode)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else factor("scale", scale)

    def exact(q: Any, k: Any, v: Any, allowed: Any = None) -> tuple[Any, Any]:
        p, lse = masked_softmax(q @ xp.matrix_transpose(k) * scale, allowed)
        return p @ v, lse

    def estimated(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        if q.shape[-2] < min_length:
            return exact(q, k, v)
        return _estimated(xp, q, k, v, planes, draw, block_size, scale, mode)

    def halved(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        n = k.shape[-2]
        if n <= min_length:
            return exact(q, k, v, as_index(np.tri(n, dtype=bool), k))
        a, b = ([x[..., part, :] for x in (q, k, v)] for part in (slice(_half(n)), slice(_half(n), n)))
        first, second = halved(*a), halved(*b)
        below = merge([second, estimated(b[0], a[1], a[2])])
        return xp.concat([first[0], below[0]], axis=-2), xp.concat([first[1], below[1]], axis=-1)

    return (halved if causal else estimated)(query, key, value)


def hyper_weight(
    query: Any,
    key: Any,
    planes: Any,
    draw: Draw,
    *,
    block_size: int = 256,
    min_length: int = 4096,
    causal: str | None = None,
    mode: str = "paper",
) -> Any:
    """Return how often each key counts in `hyper_attention`: 1 in the own block, n_k/m for each time it was drawn.

    Softmax attention with these weights is what `hyper_attention` computes:
    ``refattn.Problem(query, key, value, weight=...)`` has its exact answer.

    Parameters
    ----------
    query, key, planes, draw, block_size, min_length, causal, mode
        As in `hyper_attention`.

    Returns
    -------
    (..., n_q, n_k) array of query's type

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: as `hyper_attention`.
    """
    xp = check_call(query, key, key)
    _check(query, key, planes, draw, block_size, min_length, causal, mode)

    def ones(q: Any, k: Any) -> Any:
        return xp.zeros_like(q @ xp.matrix_transpose(k)) + 1

    def estimated(q: Any, k: Any) -> Any:
        n_q, n_k = q.shape[-2], k.shape[-2]
        if n_q < min_length:
            return ones(q, k)
        rank_q, rank_k = (xp.argsort(order, axis=-1) for order in _orders(xp, q, k, planes, mode))
        count = -(-n_k // block_size)
        if count == 1:
            return ones(q, k)
        own = (rank_q * count // n_q)[..., :, None] == (rank_k * count // n_k)[..., None, :]
        drawn = _drawn(draw, n_k, k)
        each = xp.astype(rank_k[..., :, None] == drawn[..., None, :], q.dtype)
        often = xp.sum(each, axis=-1)[..., None, :] * (n_k / drawn.shape[-1])
        counted = xp.zeros_like(often) if mode == "paper" else often
        return xp.where(own, 1 + counted, often)

    def halved(q: Any, k: Any) -> Any:
        n = k.shape[-2]
        if n <= min_length:
            return ones(q, k) * as_index(np.tri(n, dtype=bool), k)
        a, b = ([x[..., part, :] for x in (q, k)] for part in (slice(_half(n)), slice(_half(n), n)))
        first, second, below = halved(*a), halved(*b), estimated(b[0], a[1])
        right = xp.zeros_like(a[0] @ xp.matrix_transpose(b[1]))
        rows = [xp.concat(row, axis=-1) for row in ([first, right], [below, second])]
        return xp.concat(rows, axis=-2)

    return (halved if causal else estimated)(query, key)


def _known(mode: str) -> None:
    if mode not in MODES:
        raise InvalidInput(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")


def _check_planes(x: Any, planes: Any) -> None:
    if x.ndim < 1:
        raise InvalidInput("x: has no axes, expected (..., dim)")
    if planes.ndim != 2 or planes.shape[0] != x.shape[-1] or not 1 <= planes.shape[1] <= 31:
        raise InvalidInput(f"planes: shape is {tuple(planes.shape)}, expected ({x.shape[-1]}, bits), 1 to 31 bits")


def _half(n: int) -> int:
    """Return the length of the first half: the longer one, as where the code pads by one."""
    return (n + 1) // 2


def _check(
    q: Any, k: Any, planes: Any, draw: Draw, block_size: int, min_length: int, causal: str | None, mode: str
) -> None:
    check_floats(query=q, planes=planes)
    if not callable(draw):
        raise InvalidInput(
            f"draw: got {type(draw).__name__}, expected a function; for given places use lambda n: places"
        )
    whole("block_size", block_size, 1)
    whole("min_length", min_length, 1)
    _known(mode)
    n_q, n_k = q.shape[-2], k.shape[-2]
    if causal not in (None, "bottom_right", "top_left"):
        raise InvalidInput(f"causal: got {causal!r}, expected None, 'bottom_right' or 'top_left'")
    if causal and n_q != n_k:
        raise InvalidInput(f"key: has {n_k} tokens, expected query's {n_q} for a causal call; halves recurse")
    _check_planes(q, planes)
    for a, b in _hashed_lengths(n_q, n_k, bool(causal), min_length) if mode == "released" else ():
        if b % block_size or a % (b // block_size):
            raise InvalidInput(
                f"mode: 'released' pads {a} queries and {b} keys with zeros that are seen; pass lengths that blocks of "
                f"{block_size} divide, or mode='paper'"
            )


def _hashed_lengths(n_q: int, n_k: int, causal: bool, least: int) -> Iterator[tuple[int, int]]:
    """Yield the numbers of queries and keys of the parts that are estimated."""
    if not causal:
        if n_q >= least:
            yield n_q, n_k
    elif n_k > least:
        first = _half(n_k)
        for n in (first, n_k - first):
            yield from _hashed_lengths(n, n, True, least)
        yield from _hashed_lengths(n_k - first, first, False, least)


def _orders(xp: Any, q: Any, k: Any, planes: Any, mode: str) -> list[Any]:
    """Return the orders that sort queries and keys by bucket, equal ones as they come."""
    for name, x in (("query", q), ("key", k)):
        ordered(name, x)
    return [xp.argsort(angular_hash(x, planes, mode=mode), axis=-1, stable=True) for x in (q, k)]


def _drawn(draw: Draw, n: int, model: Any) -> Any:
    """Return what was drawn, checked, as integers of (m,) or (..., m)."""
    drawn = np.asarray(draw(n))
    shapes = ((), tuple(model.shape[:-2]))
    if drawn.dtype.kind not in "iu" or drawn.ndim < 1 or drawn.shape[-1] < 1 or drawn.shape[:-1] not in shapes:
        raise InvalidInput(
            f"draw: draw({n}) gave {drawn.dtype} of shape {drawn.shape}, expected whole numbers of shape (m,) or "
            f"({', '.join(map(str, shapes[1]))}, m)"
        )
    if drawn.min() < 0 or drawn.max() >= n:
        raise InvalidInput(f"draw: draw({n}) gave {drawn.min()} to {drawn.max()}, expected places from 0 to {n - 1}")
    return as_index(drawn.astype(np.int64), model)


def _at(xp: Any, x: Any, places: Any) -> Any:
    """Return tokens of (..., n, d) at (..., m) places."""
    return xp.take_along_axis(x, xp.broadcast_to(places, (*x.shape[:-2], places.shape[-1]))[..., None], axis=-2)


def _blocks(n: int, count: int) -> tuple[Any, Any]:
    """Return (count, widest) places of n tokens cut into blocks, place i in block i·count // n, and which are some."""
    starts = -(-np.arange(count + 1) * n // count)
    lengths = starts[1:] - starts[:-1]
    within = np.arange(lengths.max())
    return np.minimum(starts[:-1, None] + within, n - 1), within < lengths[:, None]


def _estimated(
    xp: Any, q: Any, k: Any, v: Any, planes: Any, draw: Draw, block_size: int, scale: float, mode: str
) -> tuple[Any, Any]:
    """Return (out, lse) of the own block and of the sample, merged."""
    n_q, n_k, lead = q.shape[-2], k.shape[-2], tuple(q.shape[:-2])
    count = -(-n_k // block_size)
    by_query, by_key = _orders(xp, q, k, planes, mode)
    q, k, v = _at(xp, q, by_query), _at(xp, k, by_key), _at(xp, v, by_key)

    (rows, _), (columns, some) = _blocks(n_q, count), _blocks(n_k, count)
    cut = [
        xp.reshape(xp.take(x, as_index(places.ravel(), x), axis=-2), (*lead, *places.shape, x.shape[-1]))
        for x, places in ((q, rows), (k, columns), (v, columns))
    ]
    p, lse = masked_softmax(cut[0] @ xp.matrix_transpose(cut[1]) * scale, as_index(some[:, None, :], k))
    own = np.arange(n_q) * count // n_q
    back = as_index(own * rows.shape[1] + np.arange(n_q) - rows[own, 0], q)
    out = xp.take(xp.reshape(p @ cut[2], (*lead, rows.size, v.shape[-1])), back, axis=-2)
    parts = [(out, xp.take(xp.reshape(lse, (*lead, rows.size)), back, axis=-1))]

    if count > 1:
        drawn = _drawn(draw, n_k, k)
        other = as_index(own[:, None], q) != (drawn * count // n_k)[..., None, :]
        s = q @ xp.matrix_transpose(_at(xp, k, drawn)) * scale
        p, lse = masked_softmax(s, other if mode == "paper" else None)
        parts.append((p @ _at(xp, v, drawn), lse + math.log(n_k / drawn.shape[-1])))
    out, lse = merge(parts)
    order = xp.argsort(by_query, axis=-1)
    return _at(xp, out, order), xp.take_along_axis(lse, order, axis=-1)
