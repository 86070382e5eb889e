"""A kernel with a usual mistake: `refattn check` shows on it what a failure looks like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...problem import Problem

__all__ = ["no_rescale"]

TILE = 32


def no_rescale(problem: Problem) -> Any:
    """Return out by tiles of keys, where the sums are not rescaled when the largest score grows: wrong on purpose."""
    q, k, v = problem.query, problem.key, problem.value
    scale = np.float32(1 / math.sqrt(q.shape[-1]) if problem.scale is None else problem.scale)
    top, total, out = np.float32(-np.inf), np.float32(0), np.float32(0)
    for j in range(0, k.shape[2], TILE):
        s = q @ k[:, :, j : j + TILE].swapaxes(2, 3) * scale
        top = np.maximum(top, s.max(3, keepdims=True))
        p = np.exp(s - top)
        total = total + p.sum(3, keepdims=True)
        out = out + p @ v[:, :, j : j + TILE]
    return out / total
