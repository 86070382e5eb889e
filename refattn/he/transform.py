"""Polynomials' words ready for products, without SEAL: its number-theoretic transform on whole numbers.

A product modulo q is taken by a quotient from float64 numbers, which is near, and whole numbers that wrap: what is left
is exact, of either sign, and a few times q in size. It is brought below q at the end only. NumPy leaves Python's lock
while it computes, and so does what numba compiled (`compiled.py`), so several threads transform at once.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .device.chain import chain_of
from .embedding import Pair
from .fast import compiled
from .noise import Ring

__all__ = ["MOST", "add_whole", "forward", "ready", "remainders"]

Whole = NDArray[np.int64]
Float = NDArray[np.float64]
LARGE, MOST = 2**48, 2**55
"""From the first on a factor is brought near 0 before each product; from the second on words do not hold 15 stages.

U = 2**-53. The quotient of b·w is off by at most 1/2 + 3·U·|b| (three roundings, w below q), so what is left is at most
q·(1/2 + 3·U·|b|). Of q below LARGE a word grows to 19·q in 15 stages. Of larger ones |b| is at most q/2 and a little
when it is multiplied, so what is left is below 7·q, and 15 stages add up to 105·q, below 2**62.
"""
TOGETHER = 2
"""Primes that are transformed together: of few words a call takes longer than what it computes."""
_ONE = Lock()


def _rows(degree: int) -> int:
    return 1 << (degree.bit_length() - 1) // 2


def _stages(ring: Ring, rows: int) -> list[tuple[Whole, Float]]:
    with _ONE:  # threads begin together, and the first makes it for all
        return _made(ring, rows)


def _tables(ring: Ring) -> tuple[Any, ...]:
    with _ONE:
        return _flat(ring)


@lru_cache(maxsize=2)
def _flat(ring: Ring) -> tuple[Any, ...]:
    """Return what `compiled.add_whole` wants: primes, 2**60 modulo each, roots, shares, rows, and which are large."""
    chain = chain_of(ring)
    m = rows = _rows(chain.degree)
    roots = chain.roots[:, :, 0].astype(np.int64)
    while m < chain.degree:  # words of all rows are side by side there
        of = roots[:, m : 2 * m]
        of[:] = of.reshape(len(of), rows, -1).transpose(0, 2, 1).reshape(of.shape)
        m *= 2
    q = np.array(chain.primes, np.int64)
    return q, np.array([pow(2, 60, x) for x in chain.primes]), roots, roots / q[:, None], rows, q > LARGE


@lru_cache(maxsize=2)
def _made(ring: Ring, rows: int) -> list[tuple[Whole, Float]]:
    """Return each stage's roots as they meet the words, of all primes: whole, and over the prime."""
    chain, found = chain_of(ring), []
    roots, q = chain.roots[:, :, 0].astype(np.int64), np.array(chain.primes, np.float64)
    m = 1
    while m < ring.degree:
        of = roots[:, m : 2 * m]
        # of the later stages words of all rows are side by side: (primes, groups of a row, 1, rows)
        of = of[..., None] if m < rows else of.reshape(len(of), rows, -1).transpose(0, 2, 1)[:, :, None]
        of = np.ascontiguousarray(of)
        found.append((of, of / q.reshape(-1, *[1] * (of.ndim - 1))))
        m *= 2
    return found


def forward(words: Whole, ring: Ring) -> NDArray[np.uint64]:
    """Return a polynomial's words ready for products, each below its prime.

    Parameters
    ----------
    words : (primes, N) int64 array
        A polynomial modulo the ring's first primes, which are below MOST; of either sign, at most a prime in size.
    ring : Ring
        The chain.
    """
    primes, found = chain_of(ring).primes[: len(words)], np.empty(words.shape, np.uint64)
    small = next((k for k, q in enumerate(primes) if q <= LARGE), len(words))
    cuts = [0, *range(small, len(words), TOGETHER), len(words)]
    for start, stop in pairwise(cuts):
        if start < stop:
            found[start:stop] = _transformed(words[start:stop], ring, start, max(primes[start:stop]) > LARGE)
    return found


def _transformed(words: Whole, ring: Ring, start: int, large: bool) -> Whole:
    count, degree = words.shape
    rows = _rows(degree)
    primes = np.array(chain_of(ring).primes[start : start + count], np.int64)
    x, m = words.copy(), 1
    rest, by = np.empty((2, count, degree // 2), np.int64)
    near = np.empty((count, degree // 2))
    for roots, shares in _stages(ring, rows):
        if m == rows:  # words that meet are next to each other from here on: rows become columns
            x = np.ascontiguousarray(x.reshape(count, rows, -1).transpose(0, 2, 1))
        shape = (count, m, 2, -1) if m < rows else (count, m // rows, 2, degree // (2 * m), rows)
        pairs = x.reshape(shape)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        q = primes.reshape(-1, *[1] * (b.ndim - 1))
        y, t, f = (z.reshape(b.shape) for z in (rest, by, near))
        if large:
            _reduce(b, q, t, f)
        np.multiply(b, shares[start : start + count], out=f)
        np.rint(f, out=f)
        np.copyto(t, f, casting="unsafe")
        np.multiply(b, roots[start : start + count], out=y)
        t *= q
        y -= t
        np.subtract(a, y, out=b)
        a += y
        m *= 2
    x = np.ascontiguousarray(x.reshape(count, -1, rows).transpose(0, 2, 1)).reshape(count, degree)
    _reduce(x, primes[:, None], np.empty_like(x), np.empty(x.shape))
    x += (x >> 63) & primes[:, None]
    return x


def _reduce(x: Whole, q: Any, by: Whole, near: Float) -> None:
    """Take multiples of q from whole numbers, so that they are near 0: at most q/2 in size, but for rounding."""
    np.multiply(x, 1 / q, out=near)
    np.rint(near, out=near)
    np.copyto(by, near, casting="unsafe")
    by *= q
    x -= by


def remainders(p: Pair, ring: Ring, limbs: int) -> Whole:
    """Return whole numbers modulo a ring's first primes, near 0.

    Parameters
    ----------
    p : pair of (N,) float arrays
        Whole numbers, which add up to those that are meant: the first below 2**112, the second below 2**60 in size.
    ring : Ring
        The chain.
    limbs : int
        How many primes, all below MOST.
    """
    high, low = p
    top = np.trunc(high * 2.0**-60)  # of the same sign: what is left is exact
    parts = (high - top * 2.0**60).astype(np.int64), low.astype(np.int64)
    tops, found = top.astype(np.int64), np.empty((limbs, len(high)), np.int64)
    by, near, part = np.empty_like(tops), np.empty(len(high)), np.empty_like(tops)
    for x, q in zip(found, chain_of(ring).primes, strict=False):
        factor = pow(2, 60, q)
        np.multiply(top, factor / q, out=near)
        np.rint(near, out=near)
        np.copyto(by, near, casting="unsafe")
        np.multiply(tops, factor, out=x)  # both wrap, and what is left does not
        by *= q
        x -= by
        for more in parts:
            np.copyto(part, more)
            _reduce(part, q, by, near)
            x += part
        _reduce(x, q, by, near)
    return found


def add_whole(place: NDArray[np.uint64], p: Pair, ring: Ring) -> None:
    """Add a polynomial with whole coefficients to words ready for products, in place.

    Parameters
    ----------
    place : (primes, N) array
        Words below the ring's first primes.
    p : pair of (N,) float arrays
        As :func:`remainders` takes it.
    ring : Ring
        The chain.
    """
    fast, limbs = compiled(), len(place)
    if fast is not None:
        high, low = (np.ascontiguousarray(x, np.float64) for x in p)
        if not high.shape == low.shape == (ring.degree,):
            raise ValueError(f"coefficients of shapes {high.shape} and {low.shape}, expected ({ring.degree},)")
        primes, factors, roots, shares, rows, large = _tables(ring)
        fast.add_whole(place, high, low, primes, factors, roots, shares, rows, large)
        return
    q = np.array(chain_of(ring).primes[:limbs], np.uint64)[:, None]
    place += forward(remainders(p, ring, limbs), ring)
    np.minimum(place, place - q, out=place)  # below q the difference wraps, and is larger


def ready(p: Pair, ring: Ring, limbs: int) -> NDArray[np.uint64]:
    """Return the words ready for products of a polynomial with whole coefficients, as `remainders` takes them."""
    found = np.zeros((limbs, ring.degree), np.uint64)
    add_whole(found, p, ring)
    return found
