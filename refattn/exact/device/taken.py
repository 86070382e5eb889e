"""Queries, keys and values of a call on a GPU: copied there in their own type, made float64 there."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import to_float64
from ...problem import Problem
from ..heads import Head, heads

__all__ = ["heads_on", "taken"]

PART = 1 / 8
"""Of the free memory: what queries, keys and values of all heads may take before a head is computed."""


def heads_on(card: Any, problem: Problem) -> list[Head] | None:
    """Return the heads of a call with their numbers on a GPU, where these take little of its memory, else None."""
    numbers = sum(x.size for x in (problem.query, problem.key, problem.value))
    if 8 * numbers > PART * card.free():
        return None
    return list(heads(problem, by_rules=True, take=partial(taken, card)))


def taken(card: Any, x: NDArray[Any]) -> Any:
    """Return an array of the host as float64 on a GPU, exactly.

    Parameters
    ----------
    card : Card
        The GPU.
    x : array
        Numbers of a format of ``refattn.dtypes``.
    """
    xp = card.xp
    if x.dtype.name == "bfloat16":  # the first half of a float32
        bits = xp.asarray(np.ascontiguousarray(x).view(np.uint16)).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    if x.dtype.name in ("float16", "float32"):
        return xp.asarray(x).astype(np.float64)
    return xp.asarray(to_float64(x))
