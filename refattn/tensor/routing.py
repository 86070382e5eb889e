"""Which rows, and which calls, a polynomial is for: by its own proven bound and by predicted times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .costs import COSTS, Costs
from .polynomial import (
    KINDS,
    MOST_DEGREE,
    MOST_FEATURES,
    Certified,
    Sums,
    bound_of,
    check_arrays,
    coefficients_of,
    head,
    largest_of,
    quotient_error,
    relative_error,
    sizes_of,
)
from .stream import attention

__all__ = ["Crossover", "auto", "crossover"]

Array = NDArray[Any]


def auto(
    query: Array, k1: Array, k2: Array, v1: Array, v2: Array, *, scale: float | None = None, causal: bool = False,
    tolerance: float = 1e-6, costs: Costs = COSTS,
) -> Certified:  # fmt: skip
    """Return triple-wise attention within a tolerance: rows by the polynomial where that is proven, exact otherwise.

    Parameters
    ----------
    query, k1, k2, v1, v2, scale
        As in :func:`refattn.tensor.attention`, h_kv = h.
    causal : bool
        Row i sees keys up to its own place, all n equal.
    tolerance : float
        The largest error of an element that the polynomial may have.
    costs : Costs
        What decides between the two within the tolerance; :func:`refattn.tensor.costs.measure` finds this machine's.

    Raises
    ------
    InvalidProblem
        Shapes or types that do not fit together.
    """
    keys, values = (k1, k2), (v1, v2)
    by = check_arrays(query, keys, values, scale, causal)
    sizes, most = sizes_of(query, keys, by, causal), largest_of(values)
    d, d_v, n1, n2 = query.shape[3], v1.shape[3], k1.shape[2], k2.shape[2]
    heads, rows = query.shape[0] * query.shape[1], query.shape[2]
    pairs = np.arange(1.0, n1 + 1) ** 2 if causal else np.full(rows, float(n1 * n2))
    exact_ns = costs.exact(pairs, d, d_v)  # by row
    best, least = (-1, np.zeros(sizes.shape, bool)), float(exact_ns.sum()) * heads
    for degree in range(1, MOST_DEGREE + 1):
        features = math.comb(d + degree, degree)
        if features > MOST_FEATURES:
            break
        cost = costs.features(rows, n1 + n2, d_v, causal) * features * heads
        if cost >= least:
            break  # more features cost more
        good = bound_of("taylor", degree, sizes, Sums.of(query, keys), most) <= tolerance
        cost += float((exact_ns * ~good).sum())
        if cost < least:
            best, least = (degree, good), cost
    degree, good = best
    out = np.empty((*query.shape[:3], d_v), query.dtype)
    for b, h in np.ndindex(*query.shape[:2]):
        of = good[b, h]
        ks, vs = [k[b, h] for k in keys], [v[b, h] for v in values]
        if of.any():
            coefficients = coefficients_of("taylor", degree, 1.0)
            out[b, h, of] = head(query[b, h, of], ks, vs, coefficients, by, causal, np.flatnonzero(of))
        if not of.all():
            some = (x[b : b + 1, h : h + 1] for x in (k1, k2, v1, v2))
            before = (np.arange(n1) <= np.flatnonzero(~of)[:, None])[None, None] if causal else None
            rest = query[b : b + 1, h : h + 1, ~of]
            out[b, h, ~of] = attention(rest, *some, scale=by, allowed=(before, before))[0, 0]
    bound = np.where(good, bound_of("taylor", degree, sizes, Sums.of(query, keys), most) if degree > 0 else 0.0, 0.0)
    return Certified(out, bound, degree, "taylor", float(good.mean()), least / 1e9)


@dataclass(frozen=True)
class Crossover:
    """Which method is cheapest, and why.

    Attributes
    ----------
    method : str
        "polynomial" or "exact".
    degree : int or None
        The polynomial's, the least within the tolerance; None where there is none.
    features : int
        How many it has.
    polynomial_seconds, exact_seconds : float
        Predicted, of one core.
    why : str
        In words.
    """

    method: str
    degree: int | None
    features: int
    polynomial_seconds: float
    exact_seconds: float
    why: str


def crossover(
    n: int, d: int, bound: float, tolerance: float, d_v: int | None = None, costs: Costs = COSTS
) -> Crossover:
    """Return which method is cheapest for n queries and keys of each kind whose logits are at most `bound` in size.

    Parameters
    ----------
    n, d : int
        Length and features.
    bound : float
        The largest ``|scale · s|``.
    tolerance : float
        The largest error, relative to the largest product of values.
    d_v : int, optional
        Features of a value; d by default.
    costs : Costs
        As in :func:`auto`.

    Raises
    ------
    InvalidInput
        A size, bound or tolerance that has no meaning.
    """
    if min(n, d) < 1 or not (math.isfinite(bound) and bound >= 0) or not tolerance > 0:
        raise InvalidInput(f"crossover: got n {n}, d {d}, bound {bound}, tolerance {tolerance}")
    d_v = d_v or d
    exact = n * costs.exact(n * n, d, d_v) / 1e9
    for degree in range(1, MOST_DEGREE + 1):
        error = min(float(relative_error(k, degree, np.array(bound))) for k in KINDS)
        if quotient_error(error) <= tolerance:
            features = math.comb(d + degree, degree)
            seconds = costs.features(n, 2 * n, d_v) * features / 1e9
            method = "polynomial" if seconds < exact else "exact"
            why = f"degree {degree} has {features} features: {seconds:.2g} s, all triples {exact:.2g} s"
            return Crossover(method, degree, features, seconds, exact, why)
    why = f"no degree up to {MOST_DEGREE} is within {tolerance:g} for logits of {bound:g}"
    return Crossover("exact", None, 0, math.inf, exact, why)
