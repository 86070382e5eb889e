r"""Keys less their mean (``Model.smoothed``): the same softmax, of scores that are all lower by q·mean in a row.

What is rounded to a narrow type is then k - mean, whose largest number in a block is smaller where keys lie to one
side. The mean may be rounded, for it cancels; k - mean is off by one rounding of what goes in; lse gets scale q·mean
back: d products, a scale and a sum. Source: SageAttention, arXiv 2410.02367, "smoothing K" (recalled; the README of
its release read).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import to_float64, to_numpy
from ...errors import UnsupportedProblem
from ...exact.heads import Head
from ...exact.stream import STREAMED
from ...variants import variant_of

__all__ = ["mean_of", "mean_size", "put_back", "query_means", "refuse", "seen_keys", "smoothed"]

Float = NDArray[np.float64]


def refuse(problem: Any) -> None:
    """Raise UnsupportedProblem where a constant added to a row's scores changes the answer."""
    why = [n for n in ("softcap", "sink", "rotary", "query_norm", "key_norm") if getattr(problem, n) is not None]
    if variant_of(problem.variant).fused != STREAMED:
        why.append(f"{problem.variant} attention")
    if why:
        raise UnsupportedProblem(
            f"model: smoothed keys do not go with {' and '.join(why)}: the answer changes with a constant in the scores"
        )


def seen_keys(one: Head) -> NDArray[np.bool_]:
    """Return which keys some query sees."""
    return np.asarray(np.asarray(one.allowed).any(0), bool)


def mean_of(one: Head) -> Float:
    """Return the mean of the keys that some query sees, (1, d_k); 0 where there is none."""
    seen = seen_keys(one)
    return one.k[seen].mean(0, keepdims=True) if seen.any() else np.zeros((1, one.k.shape[1]))


def smoothed(one: Head, block: int = 0) -> Head:
    """Return a head with the mean taken off the keys that are seen, and 0 in place of the others.

    With a block, the mean of each so many queries is taken off these, too, and what that leaves out of a score is in
    the bias (SageAttention2, arXiv 2411.10958, "smooth Q"; recalled).
    """
    refuse(one.problem)
    seen = seen_keys(one)
    k = np.where(seen[:, None], one.k - mean_of(one), 0.0)
    if not block:
        return replace(one, k=k)
    mean = query_means(one.q, block)
    more = float(one.plain(slice(0, 1)).scale) * mean @ k.T
    return replace(one, k=k, q=one.q - mean, bias=more if one.bias is None else one.bias + more)


def query_means(q: Float, block: int) -> Float:
    """Return for each query the mean of its block, (n_q, d_k)."""
    if not len(q):
        return q
    starts = np.arange(0, len(q), block)
    size = np.diff(np.append(starts, len(q)))[:, None]
    return np.asarray((np.add.reduceat(q, starts, axis=0) / size)[np.arange(len(q)) // block])


def mean_size(one: Head) -> float:
    """Return the largest number of the mean that was taken off a head's keys."""
    seen = seen_keys(one)
    k = to_float64(to_numpy(one.problem.key))[one.batch, one.head_kv, one.keys]
    if not k.shape[1]:
        return 0.0
    return float(np.abs(np.nan_to_num(k[seen], posinf=0, neginf=0) - one.k[seen]).max(initial=0.0))


def put_back(one: Head, rows: Any, f: Any, value: Float, lse: Float, spread: Any) -> tuple[Float, Float, Any]:
    """Return lse with the mean put back, its largest error and its variance."""
    scale, mean, n = float(one.plain(rows).scale), mean_of(one), one.k.shape[1] + 4
    more, size = (abs(scale) * np.abs(one.q[rows]) @ np.abs(mean).T, np.abs(value))
    value = value + scale * one.q[rows] @ mean.T
    return value, lse + f.times(n) * more + f.u * size, spread + f.cu * (n * more**2 + size**2)
