"""How a kernel adds products up: one after another, each rounded, or several at once on a matrix unit.

Written from the kernels' side, apart from the loss rules, which are tested with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .model import Model

__all__ = ["Adder"]

Float = NDArray[np.float64]
ALIVE = 2**20
"""Products alive at a time."""


@dataclass(frozen=True)
class Adder:
    """How a Model adds.

    Attributes
    ----------
    model : Model
        How the kernel rounds.
    rounded : callable
        Rounds an array to the accumulator's type.
    """

    model: Model
    rounded: Callable[[Float], Float]

    @property
    def part(self) -> int:
        """How many products are added before a part joins the whole sum."""
        if self.model.aligned_bits:
            return self.model.promoted or 2**62
        return self.model.chain

    def run(self, total: Float, x: Float, y: Float, whole: bool = False) -> Float:
        """Return total + x @ y, by products in their order.

        Parameters
        ----------
        total : (n, m) array
            The running sum.
        x, y : (n, k), (k, m) arrays
            Factors as they are multiplied.
        whole : bool
            Whether products are integers, which are added exactly, and their sum is rounded once.
        """
        if whole:
            return self.rounded(total + x @ y)
        if self.model.aligned_bits:
            return self._aligned(total, x, y)
        if self.model.accumulator == "float32" and self.model.subnormals:
            return _in_float32(total, x, y)
        for j in range(x.shape[1]):
            total = self.rounded(total + self.rounded(x[:, j : j + 1] * y[j]))
        return total

    def _aligned(self, total: Float, x: Float, y: Float) -> Float:
        fused, found = self.model.fused, np.empty(total.shape)
        size = max(1, ALIVE // max(1, fused * y.shape[1]))
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            c = total[rows]
            for j in range(0, x.shape[1], fused):
                c = self._step(c, x[rows, j : j + fused], y[j : j + fused])
            found[rows] = c
        return found

    def _step(self, c: Float, x: Float, y: Float) -> Float:
        """Return what a matrix unit makes of the running sum and its products."""
        terms = np.concatenate([x[:, :, None] * y[None], c[:, None]], 1)
        (_, ex), (_, ey), (_, ec) = (np.frexp(a) for a in (x, y, c))
        places = np.concatenate([ex[:, :, None] + ey[None] - 2, ec[:, None] - 1], 1)
        top = np.where(terms == 0, -4000, places).max(1)
        step = np.maximum(top - self.model.aligned_bits, -1000)
        total = np.ldexp(np.trunc(np.ldexp(terms, -step[:, None])).sum(1), step)
        kept = min(self.model.aligned_bits + 1, 24)
        place = np.maximum(np.frexp(total)[1], -125) - kept
        return np.asarray(np.ldexp(np.trunc(np.ldexp(total, -place)), place))


def _in_float32(total: Float, x: Float, y: Float) -> Float:
    c, a, b = (z.astype(np.float32) for z in (total, x, y))
    with np.errstate(all="ignore"):
        for j in range(a.shape[1]):
            c = c + a[:, j : j + 1] * b[j]
    return c.astype(np.float64)
