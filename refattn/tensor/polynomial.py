"""Tensor attention by polynomials: near-linear in n for small logits, any order, each row with a proven bound.

exp(s) on [-R, R] is replaced by a polynomial of degree g. As s_i = sum_l q_il k1_jl k2_kl ..., its powers are sums over
monomials a of degree up to g: C(d+g, g) of them, each a product of one feature of the query and of every key. So the
sums over all tuples of keys are products of sums over each kind of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ..arrays import dtype_name, kind_of, to_numpy
from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from .forms import scale_of

__all__ = ["Certified", "polynomial"]

Array = NDArray[Any]
KINDS = ("taylor", "chebyshev")
KIND_NAMES = {"numpy": "NumPy", "torch": "PyTorch", "cupy": "CuPy"}
MOST_DEGREE, MOST_FEATURES = 24, 1 << 16
ROWS = 2048  # whose features fit the caches
MOST_STEPS = 1 << 16  # numbers of running sums that are held at once


@dataclass(frozen=True)
class Certified:
    """An approximation and what is proven of it.

    Attributes
    ----------
    out : (b, h, n_q, d_v) array
        The result.
    bound : (b, h, n_q) float64 array
        For each row, a bound on the error of every element: of the polynomial and of its rounding. 0 for a row that was
        computed exactly, up to that arithmetic's own rounding.
    degree : int
        The polynomial's; -1 where no row took it.
    kind : str
        "taylor" or "chebyshev".
    share : float
        The part of rows that took the polynomial.
    predicted_seconds : float or None
        Of one core, where a method was chosen by it.
    """

    out: Array
    bound: NDArray[np.float64]
    degree: int
    kind: str
    share: float
    predicted_seconds: float | None = None


def polynomial(
    query: Array, keys: Sequence[Array], values: Sequence[Array], *, scale: float | None = None,
    causal: bool = False, tolerance: float = 1e-6, degree: int | None = None, kind: str | None = None,
) -> Certified:  # fmt: skip
    """Return tensor attention of any order by a polynomial, with a bound for each row.

    s = scale · sum_l q_il · prod_t k_t,l; the value of a tuple of keys is the product of its values.

    Parameters
    ----------
    query : (b, h, n_q, d) float32 or float64 array
        The queries.
    keys, values : sequences of (b, h, n_t, d) and (b, h, n_t, d_v) arrays
        As many kinds of keys as the order asks for: 1 is pairwise attention, 2 triple-wise.
    scale : float, optional
        1/d by default.
    causal : bool
        Row i sees keys up to its own place, all n equal: a recurrence whose state does not grow.
    tolerance : float
        The largest bound wanted; the degree is the least that gives it.
    degree : int, optional
        A degree instead of a tolerance.
    kind : {"taylor", "chebyshev"}, optional
        By default the one with the smaller bound.

    Raises
    ------
    InvalidProblem
        Shapes or types that do not fit together.
    UnsupportedProblem
        No degree gives the tolerance, or the features would overflow or be more than fit: the text says which.
    """
    plan = prepared(query, keys, values, scale, causal, tolerance, degree, kind)
    coefficients = coefficients_of(plan.kind, plan.degree, float(plan.sizes.max()))
    out = np.empty((*query.shape[:3], values[0].shape[3]), query.dtype)
    for b, h in np.ndindex(*query.shape[:2]):
        given = query[b, h], [k[b, h] for k in keys], [v[b, h] for v in values]
        out[b, h] = head(*given, coefficients, plan.scale, causal)
    bound = bound_of(plan.kind, plan.degree, plan.sizes, Sums.of(query, keys), largest_of(values))
    return Certified(out, bound, plan.degree, plan.kind, 1.0)


@dataclass(frozen=True)
class Prepared:
    """What a checked call takes: the scale, the bounds of its logits (b, h, n_q), the polynomial."""

    scale: float
    sizes: NDArray[np.float64]
    kind: str
    degree: int


def prepared(
    query: Array, keys: Sequence[Array], values: Sequence[Array], scale: float | None, causal: bool, tolerance: float,
    degree: int | None, kind: str | None,
) -> Prepared:  # fmt: skip
    """Check a call of `polynomial`, and choose its polynomial."""
    by = check_arrays(query, keys, values, scale, causal)
    sizes = sizes_of(query, keys, by, causal)
    kind, degree = chosen(Sums.of(query, keys), sizes, largest_of(values), tolerance, degree, kind)
    return Prepared(by, sizes, kind, degree)


def check_arrays(
    query: Any, keys: Sequence[Any], values: Sequence[Any], scale: float | None, causal: bool,
    kinds: Sequence[str] = ("numpy",),
) -> float:  # fmt: skip
    """Return the scale of a call whose arrays, all of one of some kinds, fit together."""
    if len(keys) < 1 or len(keys) != len(values):
        raise InvalidProblem(f"keys: got {len(keys)} kinds and {len(values)} of values, expected as many, at least 1")
    arrays = {"query": query}
    arrays |= {f"k{t + 1}": x for t, x in enumerate(keys)} | {f"v{t + 1}": x for t, x in enumerate(values)}
    for name, x in arrays.items():
        if kind_of(x) not in kinds or kind_of(x) != kind_of(query) or len(x.shape) != 4 or min(x.shape) < 1:
            kind = " or ".join(KIND_NAMES[k] for k in kinds)
            raise InvalidProblem(f"{name}: expected a {kind} array of four axes of at least 1: (b, h, n, d)")
        if dtype_name(x) != dtype_name(query):
            raise InvalidProblem(f"{name}: is {dtype_name(x)} and query {dtype_name(query)}")
    if dtype_name(query) not in ("float32", "float64"):
        raise UnsupportedProblem(
            f"tensor.polynomial: takes float32 and float64, got {dtype_name(query)}, whose features would overflow"
        )
    b, h, n, d = query.shape
    for t, (k, v) in enumerate(zip(keys, values, strict=True), 1):
        of_k, of_v, wanted = tuple(k.shape), tuple(v.shape), (b, h, k.shape[2], values[0].shape[3])
        if of_k[:2] != (b, h) or of_k[3] != d or (causal and of_k[2] != n):
            raise InvalidProblem(f"k{t}: got shape {of_k}, expected {(b, h, n if causal else 'n', d)}")
        if of_v != wanted:
            raise InvalidProblem(f"v{t}: got shape {of_v}, expected {wanted}")
    return scale_of(scale, d)


def sizes_of(query: Any, keys: Sequence[Any], by: float, causal: bool = False) -> NDArray[np.float64]:
    """Return R_i, a bound on |scale·s| of each row, a little enlarged for its own rounding; computed where they are."""
    xp = array_namespace(query)
    each: Any = xp.abs(xp.astype(query, xp.float64))
    for k in keys:
        sizes = xp.abs(xp.astype(k, xp.float64))
        # of the keys up to its own place, which NumPy alone can say (and causal calls are on the CPU)
        each = each * (np.maximum.accumulate(sizes, axis=2) if causal else xp.max(sizes, axis=2, keepdims=True))
    found = to_numpy(xp.sum(each, axis=3) * abs(by) * (1 + 1e-12))
    if not np.isfinite(found).all():
        raise InvalidProblem("tensor.polynomial: the numbers are not finite, or their products are not")
    return found


def relative_error(kind: str, degree: int, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a bound on |p(s)·exp(-s) - 1| for |s| up to each size."""
    with np.errstate(over="ignore"):
        if kind == "taylor":  # Lagrange's remainder: at most |s|**(g+1)/(g+1)! below 0, times exp(s) above
            logs = (degree + 1) * np.log(np.maximum(sizes, 1e-300)) - math.lgamma(degree + 2) + sizes
            return np.asarray(np.exp(logs) * (1 + 1e-12))
        largest = float(sizes.max())
        # the coefficients that are left away, each at most 2·I_m(R) <= 2·(R/2)**m/m! · exp(R**2/(4·(m + 1)))
        tail = 2 * math.fsum(
            math.exp(min(m * math.log(max(largest, 1e-300) / 2) - math.lgamma(m + 1) + largest**2 / (4 * m + 4), 700.0))
            for m in range(degree + 1, degree + 200)
        )
        return np.full(sizes.shape, (tail * (1 + 1e-9) + 1e-300) * np.exp(largest))


@lru_cache(maxsize=256)
def coefficients_of(kind: str, degree: int, largest: float) -> tuple[float, ...]:
    """Return the polynomial's coefficients, from the constant up."""
    if kind == "taylor":
        return tuple(1 / math.factorial(m) for m in range(degree + 1))
    with mpmath.workdps(60):
        r = mpmath.mpf(largest)
        total = [mpmath.mpf(0)] * (degree + 1)
        before, now = [mpmath.mpf(1)], [mpmath.mpf(0), mpmath.mpf(1)]  # T_0, T_1
        for m in range(degree + 1):
            t = before
            a = mpmath.besseli(m, r) * (1 if m == 0 else 2)
            for power, c in enumerate(t):
                total[power] += a * c
            after = [mpmath.mpf(0)] + [2 * c for c in now]
            for power, c in enumerate(before):
                after[power] -= c
            before, now = now, after
        return tuple(float(c / r**m) if largest else float(m == 0) for m, c in enumerate(total))


def quotient_error(error: Any) -> Any:
    """Return the bound on a quotient whose parts have a relative error: 2e/(1 - e), infinite from 1 on."""
    small = np.minimum(error, 1 - 2.0**-53)
    return np.where(error < 1, 2 * small / (1 - small), np.inf)


@dataclass(frozen=True)
class Sums:
    """What roundings depend on: features d, how many keys of each kind, and the format's name."""

    d: int
    lengths: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, query: Any, keys: Sequence[Any]) -> Sums:
        """Return those of a call."""
        return cls(query.shape[3], tuple(k.shape[2] for k in keys), dtype_name(query))


def bound_of(
    kind: str, degree: int, sizes: NDArray[np.float64], sums: Sums, most: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return for each row the bound on the error of its elements."""
    unit = float(np.finfo(sums.dtype).eps) / 2
    coefficients = np.abs(coefficients_of(kind, degree, float(sizes.max())))
    # the longest chain of roundings: sums over each kind of keys and over the features, products of powers
    steps = sum(sums.lengths) + math.comb(sums.d + degree, degree) + (len(sums.lengths) + 1) * degree + 16
    with np.errstate(over="ignore", invalid="ignore"):
        powers = sizes[..., None] ** np.arange(degree + 1)
        rounding = steps * unit / max(1 - steps * unit, 1e-300) * (powers @ coefficients) * np.exp(sizes)
        error = np.nan_to_num(relative_error(kind, degree, sizes) + rounding, nan=np.inf)
    with np.errstate(over="ignore"):
        return np.asarray((quotient_error(error) + 4 * unit) * most)


def largest_of(values: Sequence[Any]) -> NDArray[np.float64]:
    """Return the largest size of a product of values, (b, h, 1)."""
    xp, most = array_namespace(*values), np.ones((*values[0].shape[:2], 1))
    for v in values:
        most = most * to_numpy(xp.max(xp.abs(v), axis=(2, 3)))[..., None].astype(np.float64)
    return most


def chosen(
    sums: Sums, sizes: NDArray[np.float64], most: NDArray[np.float64], tolerance: float, degree: int | None,
    kind: str | None,
) -> tuple[str, int]:  # fmt: skip
    """Return the kind and the least degree within the tolerance."""
    if kind is not None and kind not in KINDS:
        raise InvalidInput(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if not tolerance > 0:
        raise InvalidInput(f"tolerance: got {tolerance}, expected a number above 0")
    if degree is not None and not 1 <= degree <= MOST_DEGREE:
        raise InvalidInput(f"degree: got {degree}, expected from 1 to {MOST_DEGREE}")
    # the bound grows with the size of logits and of values: the worst row decides
    worst, most = sizes.max(keepdims=True), most.max(keepdims=True)
    kinds, d, reached = (kind,) if kind else KINDS, sums.d, math.inf
    for g in (degree,) if degree else range(1, MOST_DEGREE + 1):
        if math.comb(d + g, g) > MOST_FEATURES:
            raise UnsupportedProblem(
                f"tensor.polynomial: degree {g} has {math.comb(d + g, g)} features of d = {d}, more than "
                f"{MOST_FEATURES}; the bound is {reached:.3g} so far. The exact form or `auto` does it"
            )
        least, best = min((float(bound_of(k, g, worst, sums, most)[0, 0, 0]), k) for k in kinds)
        if degree or least <= tolerance:
            return best, g
        reached = min(reached, least)
    raise UnsupportedProblem(
        f"tensor.polynomial: logits of up to {sizes.max():.3g} are too large: the least bound up to degree "
        f"{MOST_DEGREE} is {reached:.3g}, above {tolerance:.3g}. The exact form or `auto` does it"
    )


@lru_cache(maxsize=64)
def monomials(d: int, degree: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return exponents of all monomials up to a degree, and of each which other one times which feature it is."""
    exponents, parents, features, last = [(0,) * d], [0], [0], [0]
    level = [0]
    for _ in range(degree):
        after = []
        for parent in level:
            for c in range(last[parent], d):
                e = list(exponents[parent])
                e[c] += 1
                after.append(len(exponents))
                exponents.append(tuple(e))
                parents.append(parent)
                features.append(c)
                last.append(c)
        level = after
    return np.array(exponents), np.array(parents), np.array(features)


def features(x: Array, degree: int) -> Array:
    """Return all monomials of each row, (features, rows)."""
    exponents, parents, of = monomials(x.shape[1], degree)
    out = np.empty((len(exponents), len(x)), x.dtype)
    out[0] = 1
    columns = np.ascontiguousarray(x.T)
    for t in range(1, len(exponents)):
        np.multiply(out[parents[t]], columns[of[t]], out=out[t])
    return out


def weights(d: int, coefficients: tuple[float, ...], by: float) -> NDArray[np.float64]:
    """Return each monomial's factor: c_m · m!/prod(a!) · scale**m."""
    exponents, _, _ = monomials(d, len(coefficients) - 1)
    degrees = exponents.sum(1)
    factorials = np.array([math.factorial(m) for m in range(len(coefficients))], float)
    return np.asarray(
        np.array(coefficients)[degrees]
        * factorials[degrees]
        / factorials[exponents].prod(1)
        * by ** degrees.astype(float)
    )


def head(
    q: Array, keys: Sequence[Array], values: Sequence[Array], coefficients: tuple[float, ...], by: float,
    causal: bool, places: NDArray[np.int64] | None = None,
) -> Array:  # fmt: skip
    """Return out of a head's rows; causal rows may be some only, at their places."""
    degree = len(coefficients) - 1
    weight = weights(q.shape[1], coefficients, by).astype(q.dtype)[:, None]
    wide = widened(values)
    if not causal:
        moments = np.ones((len(weight), wide[0].shape[1]), q.dtype)
        for k, w in zip(keys, wide, strict=True):
            moments = moments * sum(features(k[i : i + ROWS], degree) @ w[i : i + ROWS] for i in range(0, len(k), ROWS))
        parts = (q[i : i + ROWS] for i in range(0, len(q), ROWS))
        sums = np.concatenate([(features(x, degree) * weight).T @ moments for x in parts])
    else:
        of_q = features(q, degree) * weight
        sums = np.empty((len(q), wide[0].shape[1]), q.dtype)
        places = np.arange(len(q)) if places is None else places
        for part, states, _ in running(keys, wide, degree):
            first, last = np.searchsorted(places, (part.start, part.stop))
            here = places[first:last] - part.start
            moments = math.prod((s[here] for s in states[1:]), start=states[0][here])
            sums[first:last] = (moments @ of_q[:, first:last].T[:, :, None])[:, :, 0]
    return np.asarray(sums[:, :-1] / sums[:, -1:])


def widened(values: Sequence[Array]) -> list[Array]:
    """Return each kind's values with a 1 behind, whose sums are the denominators."""
    return [np.concatenate([v, np.ones((len(v), 1), v.dtype)], 1) for v in values]


def running(
    keys: Sequence[Array], wide: Sequence[Array], degree: int, before: Sequence[Array] | None = None
) -> Iterator[tuple[slice, list[Array], list[Array]]]:
    """Yield parts of the rows, the sums of each kind of keys up to each row, (rows, values, features), and features.

    Parameters
    ----------
    keys, wide : sequences of (n, d) and (n, w) arrays
        A head's keys, and their values as `widened` gives them.
    degree : int
        The features' degree.
    before : sequence of (w, features) arrays, optional
        The sums before the first row: 0 by default.
    """
    count = math.comb(keys[0].shape[1] + degree, degree)
    state = list(before) if before else [np.zeros((w.shape[1], count), w.dtype) for w in wide]
    steps = max(16, min(64, MOST_STEPS // (count * wide[0].shape[1])))
    block = ROWS // steps * steps
    for i in range(0, len(keys[0]), steps):
        part = slice(i, min(i + steps, len(keys[0])))
        if i % block == 0:
            of_block = [features(k[i : i + block], degree) for k in keys]
        of_keys, sums = [f[:, i % block : i % block + steps] for f in of_block], []
        for t, (f, w) in enumerate(zip(of_keys, wide, strict=True)):
            s = np.ascontiguousarray(f.T)[:, None] * w[part, :, None]
            s[0] += state[t]
            for previous, here in pairwise(s):
                here += previous
            sums.append(s)
        yield part, sums, of_keys
        state = [s[-1].copy() for s in sums]
