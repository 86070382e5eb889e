"""How far weights repeat: equal weights are rounded alike, so that errors of many rows add up like one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...arrays import to_float64
from ...dtypes import Format
from ...exact.arithmetics import Floats
from ...exact.run import run
from ...problem import Problem
from ...variants import Rows, variant_of
from ..inputs.sample import separate

__all__ = ["common_errors", "independent_share"]

KEYS = 1024
"""Most keys that are all looked at; of more, `SOME` are."""
SOME = 64
FINER = 3
"""Bits beyond the format's: weights that agree in them are rounded alike."""


def independent_share(problem: Problem, precision: int) -> float:
    """Return which share of a call's rows have roundings of weights that do not depend on each other's.

    Weights that agree make the same relative error; weights that are exact make none. It reaches the output times the
    value: of keys with the same values, in whatever batch or head, errors that are equal add up. What is returned is
    the variance of a sum of the errors, if all were independent, over that of the sum in which equal ones are equal.
    Kernels round weights over the largest of a row, over their sum, over that of them and the sink, or over the largest
    or the sum of the keys that they have seen so far, from either end: the least share counts.

    Parameters
    ----------
    problem : Problem
        A call with NumPy arrays.
    precision : int
        Of the format that weights are rounded to, in bits.

    Returns
    -------
    float
        Above 0, at most 1; 1 where the call has no weights that stand alone.
    """
    p = problem
    if not separate(p.variant, p.options) or 0 in (p.batch, p.n_q, p.n_k):
        return 1.0
    keys = np.arange(p.n_k) if p.n_k <= KEYS else np.linspace(0, p.n_k - 1, SOME).astype(int)
    with np.errstate(all="ignore"):
        weights = np.abs(_weights(p, keys))
        alike = np.repeat(_alike(p.value[:, :, keys]), p.heads // p.heads_kv, 1)[:, :, None]
        group = np.broadcast_to(alike, weights.shape)
        return min(_share(weights, weights / np.where(x > 0, x, 1), group, precision) for x in _units(weights))


def common_errors(problem: Problem, form: Format) -> list[NDArray[np.float64]]:
    """Return how far out is off where weights are rounded after an operator's options have changed them.

    The largest exponential of a row is 1, which no format rounds; times a gain it is that gain, whose rounding is the
    same in every row. What comes of it leans one way, and is known: one array (b, h_q, n_q, d_v) for each number over
    which kernels round. There are none where the operator has no exponentials or the call no options.
    """
    p, v = problem, variant_of(problem.variant)
    alone = isinstance(v.shape, Rows) and v.has_lse
    if not alone or not p.options or 0 in (p.batch, p.n_q, p.n_k) or p.n_k > KEYS:
        return []
    with np.errstate(all="ignore"):
        weights, plain = (_weights(x, np.arange(p.n_k)) for x in (p, p.replace(options={})))
        value = np.repeat(np.nan_to_num(to_float64(p.value), posinf=0.0, neginf=0.0), p.heads // p.heads_kv, 1)
        units = [np.where(x > 0, x, 1) for x in _units(plain)]
        return [(form.round_array(weights / x) * x - weights) @ value for x in units]


def _weights(p: Problem, keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what some keys' values are weighed with, (b, h_q, n_q, keys), in float64."""
    value = np.zeros((p.batch, p.heads_kv, p.n_k, len(keys)), p.value.dtype)
    value[:, :, keys, np.arange(len(keys))] = 1
    return np.nan_to_num(run(p.replace(value=value), Floats(np.float64))["out"], posinf=0.0, neginf=0.0)


def _units(weights: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield what kernels divide weights by before they round them."""
    yield from (weights.max(3, keepdims=True), weights.sum(3, keepdims=True), np.ones(1))
    for so_far in (np.maximum.accumulate, np.add.accumulate):
        yield so_far(weights, 3)
        yield so_far(weights[..., ::-1], 3)[..., ::-1]


def _alike(value: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return numbers (b, h_kv, n) that are the same where keys have the same values."""
    rows = np.ascontiguousarray(value).view(np.uint8).reshape(-1, max(1, value.shape[3] * value.dtype.itemsize))
    _, number = np.unique(rows, axis=0, return_inverse=True)
    return np.asarray(number.reshape(value.shape[:3]), np.int64)


def _share(
    weights: NDArray[np.float64], rounded: NDArray[np.float64], group: NDArray[np.int64], precision: int
) -> float:
    """Return the share for weights that are rounded over some unit, of keys in groups of the same values."""
    part, power = np.frexp(rounded)
    near = np.round(np.ldexp(part, precision + FINER)).astype(np.int64)
    inexact = (weights > 0) & (np.ldexp(part, precision) % 1 != 0)
    if not inexact.any():
        return 1.0
    _, place = np.unique([x[inexact] for x in (group, power.astype(np.int64), near)], axis=1, return_inverse=True)
    some = weights[inexact]
    return float(np.square(some).sum() / np.square(np.bincount(place.ravel(), some)).sum())
