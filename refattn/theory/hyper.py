"""HyperAttention's sampled normaliser and product: exact means and variances, and alpha and kappa of a call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from ..functions.hyper import angular_hash
from .claim import Claim, Evidence, judged, needs, same, total
from .fields import Q, rationals, unequal

__all__ = ["CLAIMS", "sort_lsh", "spread"]

Array = NDArray[Any]


def spread(query: Any, key: Any, scale: float) -> tuple[float, float]:
    """Return alpha and kappa of a head: how unlike uniform the columns of softmax are, and how unlike its row sums.

    Parameters
    ----------
    query, key : (n, d) arrays
        One head.
    scale : float
        Of the scores.

    Returns
    -------
    alpha : float
        n · max over columns of the sum of squares of D⁻¹A.
    kappa : float
        The largest over the smallest row sum of A = exp(scale · QKᵀ).
    """
    q, k = np.asarray(query, np.float64), np.asarray(key, np.float64)
    if q.ndim != 2 or k.ndim != 2 or q.shape[1] != k.shape[1]:
        raise InvalidInput(f"spread: got shapes {q.shape} and {k.shape}, expected (n, d) and (m, d)")
    s = scale * q @ k.T
    logs = np.log(np.exp(s - s.max(1, keepdims=True)).sum(1)) + s.max(1)
    return len(k) * float((np.exp(s - logs[:, None]) ** 2).sum(0).max()), float(np.exp(np.ptp(logs)))


def _call(n: int = 6, d: int = 2) -> tuple[Array, Array]:
    """Return positive weights A and values, rational."""
    return rationals(0, n, n, least=1, most=16), rationals(1, n, d)


def _samples(shares: Array, m: int) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield every way to draw m places one after another, with its probability."""
    for drawn in itertools.product(range(len(shares)), repeat=m):
        yield drawn, math.prod((shares[i] for i in drawn), start=Q(1))


def _sums(drawn: tuple[int, ...], block: int, own: bool) -> Array:
    """Return row sums of A: a block of keys exactly, the rest from samples of the other keys, or of all."""
    a, _ = _call()
    others = np.arange(block if own else 0, len(a))
    return np.asarray(a[:, :block].sum(1) + a[:, others[list(drawn)]].sum(1) * len(others) / len(drawn))


def _bias(own: bool, what: str, m: int, block: int = 2) -> Evidence:
    """Compare the mean of estimated row sums over all samples, and their variance, with the exact ones."""
    a, _ = _call()
    n = len(a) - block * own
    found = [(_sums(drawn, block, own), chance) for drawn, chance in _samples(np.full(n, Q(1, n)), m)]
    mean = sum(x * chance for x, chance in found)
    variance = sum((x - mean) ** 2 * chance for x, chance in found)
    rest = a[:, block:]
    due = ((rest**2).sum(1) * rest.shape[1] - rest.sum(1) ** 2) / m
    return Evidence(total(unequal(mean, a.sum(1)), unequal(variance, due)), 0, what)


def unbiased(m: int = 2) -> Evidence:
    """Over all samples, the mean of the estimated row sums is the row sum, and their variance falls as 1/m."""
    needs(m >= 1, "at least one sample")
    return _bias(True, "row sums whose mean or variance is not the one due", m)


def counted_twice() -> Evidence:
    """The block also in the sampling, as where a block mask is ignored: it counts twice."""
    return _bias(False, "row sums whose mean or variance is not the one due, the block sampled too", 2)


def _norm(x: Array) -> Any:
    return (x * x).sum()


def _error(m: int, by_norm: bool, a: Array, v: Array) -> tuple[Any, Any]:
    """Return the mean squared error of the product D⁻¹A V from m sampled keys, over all samples, and the due one."""
    p = a / a.sum(1, keepdims=True)
    norms = (v * v).sum(1)
    shares = norms / norms.sum() if by_norm else np.full(len(v), Q(1, len(v)))
    found = Q(0)
    for drawn, chance in _samples(shares, m):
        at = list(drawn)
        found += chance * _norm((p[:, at] / shares[at]) @ v[at] / m - p @ v)
    return found, (_norm(p) * _norm(v) - _norm(p @ v)) / m


def _rate(by_norm: bool, what: str, sizes: tuple[int, ...] = (1, 2, 3)) -> Evidence:
    pairs = [_error(m, by_norm, *_call()) for m in sizes]
    detail = {"m": list(sizes), "mean squared error": [float(e) for e, _ in pairs]}
    return Evidence(max(abs(e - due) for e, due in pairs), 0, what, detail)


def rate(sizes: tuple[int, ...] = (1, 2, 3)) -> Evidence:
    """The mean squared error over all samples, against (|D⁻¹A|² |V|² - |D⁻¹A V|²)/m in norms of Frobenius."""
    needs(min(sizes) >= 1, "at least one sample")
    return _rate(True, "mean squared error from the one due", sizes)


def uniform() -> Evidence:
    """The same with keys sampled alike, not by the norms of their values."""
    return _rate(False, "mean squared error from the one due, keys sampled alike")


def _within(bound: Callable[[Array, Array, int], Any], what: str) -> Evidence:
    """Compare the mean squared error with a bound, for weights drawn, and both ways for uniform ones.

    These have values that cancel.
    """
    cancel = np.full((4, 4), Q(1, 8)), np.array([[Q(1)], [Q(-1)], [Q(1)], [Q(-1)]])
    pairs: list[Any] = []
    for (a, v), attained in ((_call(), False), (cancel, True)):
        p = a / a.sum(1, keepdims=True)
        found = [(_error(m, True, a, v)[0], bound(p, v, m)) for m in (1, 2)]
        pairs += [*found, *((most, error) for error, most in found if attained)]
        pairs.append(same(_alpha(p, 1), len(p) * max(_norm(column) for column in p.T)))
    return judged(pairs, what)


def _alpha(p: Array, m: int) -> Any:
    """Return alpha/m of weights."""
    return len(p) * (p * p).sum(0).max() / m


def by_alpha() -> Evidence:
    """The mean squared error over alpha |V|²/m, which uniform weights of values that cancel attain."""
    return _within(lambda p, v, m: _alpha(p, m) * _norm(v), "mean squared error over alpha·|V|²/m")


def by_column() -> Evidence:
    """The same with the largest column alone, alpha without its factor n."""
    return _within(
        lambda p, v, m: (p * p).sum(0).max() * _norm(v) / m, "mean squared error over the largest column's |V|²/m"
    )


def _planted(found: int) -> tuple[Array, NDArray[np.bool_]]:
    """Return weights with a heavy entry a row, in some order, and a mask of as many of these as hashing found."""
    a, n = _call()[0], 6
    heavy = np.random.default_rng(4).permutation(n)
    a[np.arange(n), heavy] *= 100
    mask = np.zeros((n, n), bool)
    mask[np.arange(found), heavy[:found]] = True
    return a, mask


def _normaliser(m: int, found: int, judged: int) -> tuple[Any, Any, int]:
    """Return the mean relative variance of row sums, found entries exact and the rest sampled, alpha/m, and one more.

    The last is 0 where the variance is that of a sum of m places: n times its squares less the square of its sum.

    Parameters
    ----------
    m : int
        Samples, of all keys; what is computed exactly counts 0 in them.
    found, judged : int
        Heavy entries that are computed exactly, and that alpha is told of.
    """
    a, mask = _planted(found)
    n, rest = len(a), np.where(mask, Q(0), a)
    sums = [(np.where(mask, a, Q(0)).sum(1) + rest[:, list(drawn)].sum(1) * n / m, chance)
            for drawn, chance in _samples(np.full(n, Q(1, n)), m)]  # fmt: skip
    variance = sum(((x / a.sum(1) - 1) ** 2 * chance for x, chance in sums), start=0 * a[0])
    left = np.where(_planted(judged)[1], Q(0), a) / a.sum(1, keepdims=True)
    sampled = rest / a.sum(1, keepdims=True)
    due = (n * (sampled**2).sum(1) - sampled.sum(1) ** 2) / m
    return variance.sum() / n, _alpha(left, m), total(unequal(variance, due))


def _recalled(what: str, lost: int = 0) -> Evidence:
    found_ = [_normaliser(m, found, min(found + lost, 6)) for m in (1, 2) for found in (0, 3, 6)]
    pairs = [(variance, most) for variance, most, _ in found_]
    detail = {"recall": [0.0, 0.5, 1.0], "mean relative variance, one sample": [float(v) for v, _ in pairs[:3]]}
    detail["alpha of what is sampled"] = [float(b) for _, b in pairs[:3]]
    return judged([*pairs, *(same(wrong, 0) for *_, wrong in found_)], what, detail)


def recalled() -> Evidence:
    """The normaliser's mean relative variance over all samples, against alpha/m of the entries that are sampled."""
    return _recalled("mean relative variance over alpha/m")


def recall_overstated() -> Evidence:
    """Alpha of a hashing that finds more heavy entries than it does."""
    return _recalled("mean relative variance over alpha/m, alpha as if all heavy entries were found", lost=6)


def sort_lsh(q: Array, k: Array, planes: Array, size: int) -> NDArray[np.bool_]:
    """Return which entries sortLSH computes: queries and keys sorted by hash, blocks of some size along the diagonal.

    Parameters
    ----------
    q, k : (n, d) arrays
        One head.
    planes : (d, bits) array
        What hashes.
    size : int
        Of a block; it divides n.
    """
    by_query, by_key = (np.argsort(angular_hash(x, planes), kind="stable") for x in (q, k))
    blocks = np.kron(np.eye(len(q) // size, dtype=bool), np.ones((size, size), bool))
    mask = np.zeros_like(blocks)
    mask[by_query[:, None], by_key] = blocks
    return mask


BLOCK, SAMPLED = 8, (1, 2)


def _lengths(x: Array) -> Array:
    return np.asarray(np.sqrt((x * x).sum(1, keepdims=True)))


def _head(seed: int) -> tuple[Array, Array, Array, Array]:
    """Return queries near a key each, keys, values of one length that nearly are of one line, and planes that hash."""
    rng = np.random.default_rng(seed)
    k, planes, v = rng.standard_normal((64, 8)), rng.standard_normal((8, 8)), rng.standard_normal((64, 4)) / 4
    k, v = 4 * k / _lengths(k), v + rng.choice([-1, 1], (64, 1)) * np.eye(4)[0]
    return k[rng.permutation(64)] + rng.standard_normal((64, 8)) / 8, k, v / _lengths(v), planes


def _spectral(rest: Array, v: Array, m: int) -> float:
    """Return the mean square of |D⁻¹(A - A')V| in operator norm over all ways to sample m keys of what is not found."""
    at = np.array(list(itertools.product(range(len(v)), repeat=m)))
    found = np.einsum("nsm,smd->snd", rest[:, at], v[at]) * len(v) / m - rest @ v
    return float(np.linalg.eigvalsh(found.transpose(0, 2, 1) @ found)[:, -1].mean())


def _left(rest: Array, v: Array, m: int) -> Any:
    """Return n·|R|²·max |v|²/m: the mean square in Frobenius' norm is n/m times the sum of |r|²|v|² over keys, or less.

    The operator norm is at most Frobenius'.
    """
    return len(v) * _norm(rest) * (v * v).sum(1).max() / m


def _hashed(mask_of: Callable[[Array, Array, Array], NDArray[np.bool_]], what: str) -> Evidence:
    """Compare errors of a run that computes a mask's entries with the bound of what sortLSH leaves over."""
    found: list[Any] = []
    shown = []
    for seed in range(3):
        q, k, v, planes = _head(seed)
        a = np.exp(q @ k.T)
        p, mask, told = a / a.sum(1, keepdims=True), mask_of(q, k, planes), sort_lsh(q, k, planes, BLOCK)
        rest, judged_by = (np.where(one, 0, p) for one in (mask, told))
        for m in SAMPLED:
            bound = _left(judged_by, v, m)
            found += [(_spectral(rest, v, m), bound), same(bound <= _alpha(judged_by, m) * _norm(v), True)]
        found += [same(int(count), BLOCK) for axis in (0, 1) for count in mask.sum(axis)]
        shown.append((mask, p, rest, a.sum(1)))
    even, cancel = np.full((4, 4), 1 / 4), np.array([[2.0], [-2.0], [2.0], [-2.0]])
    found += [same(_spectral(even, cancel, m), _left(even, cancel, m)) for m in SAMPLED]  # attained
    detail = {
        "recall": tuple(float(mask[np.arange(64), p.argmax(1)].mean()) for mask, p, *_ in shown),
        "alpha": tuple(float(_alpha(p, 1)) for _, p, *_ in shown),
        "alpha of what is left": tuple(float(_alpha(rest, 1)) for _, _, rest, _ in shown),
        "kappa": tuple(float(sums.max() / sums.min()) for *_, sums in shown),
    }
    return judged(found, what, detail)


def hashed() -> Evidence:
    """Runs of sortLSH on 64 queries near a key each: what they have not found is sampled, over all samples."""
    what = "mean square of |D⁻¹(A - A')V| over n·|R|²·max|v|²/m"
    return _hashed(lambda q, k, planes: sort_lsh(q, k, planes, BLOCK), what)


def hashed_apart() -> Evidence:
    """Queries hashed by other planes than keys: their blocks find little, held to what sortLSH leaves over."""
    what = "mean square of |D⁻¹(A - A')V| over n·|R|²·max|v|²/m, queries hashed by other planes"
    return _hashed(lambda q, k, planes: sort_lsh(q[:, ::-1], k, planes, BLOCK), what)


SOURCE = "Han et al., HyperAttention (arXiv 2310.05869; the opening was read, public code too)"
CLAIMS = [
    Claim(
        "hyper-unbiased",
        "Exact block plus uniform samples of the other keys estimates row sums without bias, its variance as 1/m",
        SOURCE,
        unbiased,
        counted_twice,
        ("at least one sample",),
    ),
    Claim(
        "hyper-rate",
        "Sampling m keys by the norms of values has a mean squared error of (|D⁻¹A|²|V|² - |D⁻¹AV|²)/m",
        SOURCE,
        rate,
        uniform,
        ("at least one sample",),
    ),
    Claim(
        "hyper-alpha",
        "That error is at most alpha·|V|²/m: alpha of a call tells how many samples it needs",
        SOURCE,
        by_alpha,
        by_column,
    ),
    Claim(
        "hyper-recall",
        "The normaliser's mean relative variance is at most alpha/m, alpha of the entries that hashing has not found",
        SOURCE,
        recalled,
        recall_overstated,
    ),
    Claim(
        "hyper-product",
        "With sortLSH's blocks exact and m of the n keys sampled for all other entries R of D⁻¹A, |D⁻¹(A - A')V|² in"
        " operator norm is in the mean at most n·|R|²·max|v|²/m, for values of one length at most alpha(R)·|V|²/m",
        "Han et al., HyperAttention (arXiv 2310.05869; the opening was read); the bound is derived here",
        hashed,
        hashed_apart,
    ),
]
