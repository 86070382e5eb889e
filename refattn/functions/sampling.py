"""Kinetics' random selector: the first and the nearest keys, and drawn ones that stand for all between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .arguments import function, whole

__all__ = ["sampled_weight"]


def sampled_weight(
    n_q: int,
    n_k: int,
    draw: Callable[[int], Any],
    *,
    sink: int = 4,
    local: int = 8,
    mode: str = "paper",
) -> NDArray[np.float64]:
    """Return how often each key counts for each query where keys are drawn: 1, or n/m for each of m draws among n.

    Parameters
    ----------
    n_q, n_k : int
        Queries and keys; the last query stands at the last key.
    draw : callable
        ``draw(n)`` returns m of the n keys between the first and the nearest, (m,), with replacement. It is asked once
        for each query that has such keys: ``lambda n: rng.integers(n, size=64)``.
    sink : int
        First keys, which count once.
    local : int
        Nearest keys, which count once, the query's own among them.
    mode : {"paper", "released"}
        The release counts a key once that was drawn more than once.

    Returns
    -------
    (n_q, n_k) array
        The ``weight`` of a :class:`refattn.Problem`. Its mean over all draws is 1 for each key that a query sees; that
        of the released mode is below. A query with at most m keys between counts all of them once.

    Raises
    ------
    InvalidInput
        Fewer keys than queries, more than 2**31 weights, counts below what is said, what `draw` gives is no place.

    Notes
    -----
    Source: Sadhukhan et al., Kinetics (arXiv 2506.05333), and sparsity_utils.py of its release, which was read: it adds
    log(n/m) to the scores of the keys drawn, each once. By keys of the highest scores, one by one or in blocks, it is
    the operator ``topk``.
    """
    n_q, sink, local = whole("n_q", n_q, 0), whole("sink", sink, 0), whole("local", local, 1)
    n_k = whole("n_k", n_k, n_q)
    if n_q * n_k > 2**31:
        raise InvalidInput(f"n_q, n_k: got {n_q} and {n_k}, expected at most 2**31 weights in all")
    function("draw", draw)
    if mode not in ("paper", "released"):
        raise InvalidInput(f"mode: got {mode!r}, expected 'paper' or 'released'")
    weight = np.zeros((n_q, n_k))
    for row, at in zip(weight, range(n_k - n_q, n_k), strict=True):
        row[: min(sink, at + 1)] = row[max(at - local + 1, 0) : at + 1] = 1
        between = row[sink : max(at - local + 1, 0)]
        n = len(between)
        if n == 0:
            continue
        drawn = np.asarray(draw(n))
        if drawn.dtype.kind not in "iu" or drawn.ndim != 1 or len(drawn) == 0:
            got = f"{drawn.dtype} of shape {drawn.shape}"
            raise InvalidInput(f"draw: draw({n}) gave {got}, expected whole numbers of shape (m,)")
        if drawn.min() < 0 or drawn.max() >= n:
            given = f"{drawn.min()} to {drawn.max()}"
            raise InvalidInput(f"draw: draw({n}) gave {given}, expected places from 0 to {n - 1}")
        counts = np.bincount(drawn, minlength=n)
        times = counts if mode == "paper" else counts > 0
        between[:] = 1 if len(drawn) >= n else times * (n / len(drawn))
    return weight
