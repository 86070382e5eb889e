"""Arithmetic modulo primes below 2**61 on arrays of 64-bit words: what the kernels compute, in NumPy.

Products of words are 128 bits wide; `high` is their upper word. A factor w that is used often comes with
floor(w·2**64/q), which makes a product modulo q two multiplications (Shoup). Other products are reduced by
floor(2**128/q), in two words (Barrett).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "below", "high", "reduced", "reduced_wide", "scaled"]

Words = NDArray[np.uint64]
LOW, HALF = np.uint64(2**32 - 1), np.uint64(32)


def high(a: Words, b: Words | np.uint64) -> Words:
    """Return the upper 64 bits of products."""
    a0, a1, b0, b1 = a & LOW, a >> HALF, b & LOW, b >> HALF
    middle = a1 * b0 + ((a0 * b0) >> HALF)
    low = a0 * b1 + (middle & LOW)
    return np.asarray(a1 * b1 + (middle >> HALF) + (low >> HALF))


def below(x: Words, m: Words | np.uint64) -> Words:
    """Return x, less m where x is not below it: of x below 2m, x modulo m."""
    return np.asarray(np.minimum(x, x - m))  # what wraps around is the larger one


def scaled(x: Words, w: Words, w_shifted: Words, q: Words) -> Words:
    """Return x·w modulo q, or q more, of any word x; w_shifted is floor(w·2**64/q)."""
    return np.asarray(x * w - high(w_shifted, x) * q)


def reduced(x: Words, q: Words, ratio: Words) -> Words:
    """Return words modulo q; ratio is floor(2**64/q)."""
    return below(x - high(x, ratio) * q, q)


def reduced_wide(upper: Words, lower: Words, q: Words, ratio: tuple[Words, Words]) -> Words:
    """Return (upper·2**64 + lower) modulo q; ratio is floor(2**128/q), its upper word first."""
    r1, r0 = ratio
    t = lower * r1
    s = t + high(lower, r0)
    carry = high(lower, r1) + (s < t)
    t = upper * r0
    s = s + t
    quotient = upper * r1 + carry + high(upper, r0) + (s < t)
    return below(lower - quotient * q, q)
