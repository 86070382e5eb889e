"""What a Model lets one rounding lose, in the numbers that the arithmetic of losses counts with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import Format, format_of
from ..model import INTEGERS, C, Model, inside_type
from .stores import Stored
from .units import Unit

__all__ = ["SCORES", "Rules", "by_chance", "floor", "in_logarithm", "logistic", "moves", "slope_of_tanh", "tanh"]

Float = NDArray[np.float64]
PLACES = 8
"""Where partial sums are looked at."""
SCORES = (("q", "k"), ("q", "q"), ("k", "k"))
"""Axes of scores of keys, of candidates, whose axis has the label of rows that are made from keys, and between keys."""


def floor(form: Format, model: Model) -> float:
    """Return what underflow can cost one rounding."""
    if not model.subnormals:
        return form.smallest_normal
    return 0.5 * form.smallest_subnormal or form.smallest_subnormal  # half of float64's would be 0


def by_chance(form: Format, model: Model) -> int:
    """Return how many times as far a rounding to a type goes, and scatters, as one to nearest."""
    return model.times if form.precision < inside_type(model.accumulator).precision else 1


def precision(model: Model, name: str) -> int:
    """Return how many bits a factor of a product has at most."""
    inside = inside_type(model.accumulator).precision
    return min(inside_type(name).precision, inside) if name not in ("", "input") else inside


class Rules:
    """The numbers of one Model for calls of some number of keys; chance: whether variances are asked for."""

    def __init__(self, model: Model, n_k: int, chance: bool = True) -> None:
        inside = format_of(model.accumulator)
        self.chance = chance
        self.model, self.u = model, inside.unit_roundoff
        self.u_scores, self.var_scores = model.loss(model.scores), model.scatter(model.scores)
        self.cu, self.exp = C * self.u**2, model.exp_ulps
        self.tiles = math.ceil(n_k / model.tile)
        self.floor, self.unit = floor(inside, model), Unit.of(model)
        self.stored = Stored.of(model, floor(inside_type(model.weights), model))
        self.whole = model.operands in INTEGERS  # sums of integers are exact
        self.bits, self.bits_values = (precision(model, n) for n in (model.operands, model.values or model.operands))
        self.bits_weights = precision(model, model.weights)
        self.u_weights, self.floor_weights = self.stored.relative, self.stored.floor + self.stored.least
        sums = format_of(model.value_sums or model.accumulator)
        self.u_sums, self.floor_sums = sums.unit_roundoff, floor(sums, model)

    def number(self, x: Any) -> float:
        """Take in a number."""
        return float(x)

    def rsqrt(self, n: int) -> float:
        """Return 1/sqrt(n)."""
        return 1 / math.sqrt(n)

    def times(self, n: Any) -> Any:
        """Return the largest relative error of n roundings one after another."""
        return np.expm1(np.asarray(n) * math.log1p(self.u))

    def walk(self, x: Float, y: Float) -> tuple[Float, Float]:
        """Return the mean square of the partial sums of x @ y, and that of the terms; 0 where chance is not asked."""
        if not self.chance:
            return np.zeros(()), np.zeros(())
        total, walk = np.zeros((2, x.shape[0], y.shape[1]))
        for part in np.array_split(np.arange(x.shape[1]), PLACES):
            at = slice(int(part[0]), int(part[-1]) + 1) if len(part) else slice(0)
            total = total + x[:, at] @ y[at]
            walk = walk + total * total * (len(part) / max(1, x.shape[1]))
        squares = (x * x) @ (y * y)
        return np.maximum(walk, total * total / 3 + squares / 6), squares

    def idle(self, weights: Float) -> Float:
        """Return how many tiles add nothing to a row's sum, (n_q, 1).

        A kernel that divides by the sum in each tile loses the same there every time.
        """
        if not weights.size:
            return np.zeros((weights.shape[0], 1))
        starts = np.arange(0, weights.shape[1], self.model.tile)
        with np.errstate(all="ignore"):
            share = np.maximum.reduceat(weights, starts, axis=1) / weights.sum(1, keepdims=True)
        return np.asarray((share < self.u).sum(1, keepdims=True), np.float64)


def in_logarithm(x: Any) -> Any:
    """Return how far a logarithm moves by a relative error of at most x."""
    with np.errstate(all="ignore"):
        return np.where(np.asarray(x) < 1, -np.log1p(-np.minimum(x, 1 - 2.0**-53)), np.inf)


def logistic(x: Float) -> Float:
    """Return 1 / (1 + exp(-x)), without a large exponential."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, e) / (1 + e))


def slope_of_tanh(y: Float) -> Float:
    """Return the slope of tanh where its value is y."""
    return np.asarray(1 - y * y, np.float64)


def tanh(x: Float) -> Float:
    """Return the hyperbolic tangent."""
    return np.asarray(np.tanh(x), np.float64)


def moves(function: Callable[[Float], Float], x: Float, span: Any) -> Float:
    """Return how far a growing function moves by an error of at most span, rounded up."""
    y = function(x)
    return np.asarray(np.maximum(function(x + span) - y, y - function(x - span)) + 4 * 2.0**-53 * np.abs(y))
