r"""What storing the weights P loses: rounded as they are, or under a scale (``Model.weights_scale``).

Below a row's maximum a weight is at most 1. It is multiplied by 1/s, rounded to its type, and the products are
multiplied by s: off by at most ``(u_P + 2 u) w + s eta / 2``, eta the type's smallest number (1 for integers, whose
relative part is 0). With a static scale s is 1 over the largest integer, or over the largest power of two of a float
type; with one for each row or block it is that times the largest weight there, so at most as large. A kernel that
rescales has running maxima below the last one: its steps are finer than these.

What is expected of a weight below half a step is that it is lost, all of it, which is no scatter: sums of such errors
have a mean. What a scale is made for, 1 or the largest weight under it, is a number of the type, and loses nothing.
SageAttention, arXiv 2410.02367, has int8 with s = 1/127; SageAttention2, arXiv 2411.10958, float8_e4m3fn with
s = 1/448; FlashAttention-3 scales by 2^8. The first two recalled, and the second's abstract read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FLOAT4, FORMATS
from ..model import INTEGERS, C, Model, inside_type
from ..rounding import MICRO

__all__ = ["Stored", "largest_of"]

Float = NDArray[np.float64]
SCALE = FORMATS["float8_e4m3fn"]
"""The type of micro scales."""


def largest_of(name: str) -> float:
    """Return what 1 becomes under a scale: the largest integer, or a float type's largest power of two."""
    largest = inside_type(name).largest
    if name == FLOAT4.name:
        return largest / (1 + SCALE.unit_roundoff)  # under a scale that was rounded up
    return largest if name in INTEGERS else 2.0 ** math.floor(math.log2(largest))


@dataclass(frozen=True)
class Stored:
    """How a model stores its weights: the largest relative and absolute error, and the variance over the square."""

    model: Model
    relative: float
    floor: float
    variance: float

    @classmethod
    def of(cls, model: Model, floor: float) -> Stored:
        """Return a model's, from what underflow to its type costs."""
        u, more = inside_type(model.accumulator).unit_roundoff, bool(model.weights_scale)
        floor = floor * (model.times if model.loss(model.weights) or more else 1)
        return cls(
            model,
            model.loss(model.weights) + 2 * u * more,
            floor / largest_of(model.weights) if more else floor,
            model.scatter(model.weights) + 2 * C * u * u * more,
        )

    @property
    def least(self) -> float:
        """What micro scales below their type's normal numbers cost, of a tile's largest weight.

        A scale is off by half of a step, 6 times which a weight may be clipped, in units of the tile's largest over 6
        times the type's largest number.
        """
        return SCALE.smallest_subnormal / 2 / SCALE.largest if self.model.weights_scale == "micro" else 0.0

    def under(self) -> float:
        """Return what underflow costs where weights are divided by their sum first, which no scale is made for."""
        return 0.0 if self.model.weights_scale else self.floor

    def expected(self, w: Float, seen: Float) -> tuple[Float, Float]:
        """Return the variance and the mean of the errors of weights, (n_q, n_k) each."""
        tops = self._tops(np.abs(w))
        tiny = self.floor * tops
        kept = bool(self.model.weights_scale) & (np.abs(w) == tops)
        variance = np.where(kept, 0.0, self.variance * w * w)
        if self.model.stochastic:  # up or down by chance: no mean
            step = np.minimum(np.abs(w), tiny) if self.model.weights in INTEGERS else tiny
            return variance + np.where(kept, 0.0, step * tiny / 6), np.zeros_like(w)
        lost = (np.abs(w) < tiny) & (w != 0)
        if self.model.weights_scale == "micro":  # steps are known: a relative one above the smallest normal number
            form = inside_type(self.model.weights)
            s = np.maximum(tops / form.largest, 1e-300)
            return np.where(lost, 0.0, (form.ulp_array(np.abs(w) / s) * s) ** 2 / 12 * seen), np.where(lost, -w, 0.0)
        return np.where(lost | kept, 0.0, variance + tiny**2 / 3 * seen), np.where(lost, -w, 0.0)

    def _tops(self, w: Float) -> Any:
        """Return the largest weight under each weight's scale, 1 where the scale is static."""
        if self.model.weights_scale not in ("row", "block", "micro") or not w.size:
            return 1.0
        if self.model.weights_scale == "micro":
            top = np.maximum.reduceat(w, np.arange(0, w.shape[1], MICRO), axis=1)
            return top[:, np.arange(w.shape[1]) // MICRO]
        keys, rows = np.arange(0, w.shape[1], self.model.tile), np.arange(0, w.shape[0], self.model.block)
        top = np.maximum.reduceat(w, keys, axis=1)
        if self.model.weights_scale == "block":
            top = np.maximum.reduceat(top, rows, axis=0)[np.arange(w.shape[0]) // self.model.block]
        return top[:, np.arange(w.shape[1]) // self.model.tile]
