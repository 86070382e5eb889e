"""What a server knows in slots, encoded as SEAL encodes it: the same floating-point operations, so the same words."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedProblem
from ..fast import compiled
from ..noise import Ring
from .chain import bits_reversed, chain_of
from .modular import Words
from .trace import Plain
from .words import Evaluator

__all__ = ["encoded", "nearest", "whole_numbers"]

Float = NDArray[np.float64]


@cache
def _places(degree: int) -> NDArray[np.int64]:
    """Return where each slot's number goes, and its conjugate: powers of 3 in bit-reversed order."""
    powers = np.array([pow(3, i, 2 * degree) for i in range(degree // 2)])
    points = np.concatenate([(powers - 1) // 2, (2 * degree - powers - 1) // 2])
    return np.asarray(bits_reversed(degree)[points])


@cache
def _roots(degree: int) -> tuple[Float, Float]:
    """Return the real and imaginary parts of the inverse roots, in the order of their use."""
    order = 2 * degree
    eighth = [(math.cos(2 * math.pi * i / order), math.sin(2 * math.pi * i / order)) for i in range(order // 8 + 1)]

    def root(i: int) -> tuple[float, float]:
        if i <= order // 8:
            return eighth[i]
        if i <= order // 4:
            a, b = eighth[order // 4 - i]
            return b, a
        a, b = root(order // 2 - i)  # here i is at most the degree
        return -a, b

    found = np.array([root(int(i) + 1) for i in bits_reversed(degree)[: degree - 1]])
    return found[:, 0], -found[:, 1]


def _coefficients(slots: NDArray[np.complex128], degree: int, factor: float) -> Float:
    """Return a polynomial's coefficients times the degree and a factor, by an inverse transform of its slots."""
    places, (root_re, root_im) = _places(degree), _roots(degree)
    re, im = np.zeros((2, degree))
    re[places], im[places] = np.tile(slots.real, 2), np.concatenate([slots.imag, -slots.imag])
    if (fast := compiled()) is not None:
        fast.inverse(re, im, root_re, root_im, factor)
        return re
    used, gap, m = 0, 1, degree // 2
    while m >= 1:
        w_re, w_im = (x[used : used + m, None] for x in (root_re, root_im))
        a_re, a_im, b_re, b_im = (x.reshape(m, 2, gap)[:, k] for k in (0, 1) for x in (re, im))
        sum_re, sum_im, rest_re, rest_im = a_re + b_re, a_im + b_im, a_re - b_re, a_im - b_im
        if m == 1:
            w_re, w_im, sum_re, sum_im = (x * factor for x in (w_re, w_im, sum_re, sum_im))
        re = np.stack([sum_re, rest_re * w_re - rest_im * w_im], 1).reshape(-1)
        im = np.stack([sum_im, rest_re * w_im + rest_im * w_re], 1).reshape(-1)
        used, gap, m = used + m, 2 * gap, m // 2
    return re


def encoded(plain: Plain, ring: Ring) -> Words:
    """Return the words of numbers in slots, (primes, N); errors as of `whole_numbers`."""
    return Evaluator(chain_of(ring)).transformed(whole_numbers(plain, ring), plain.limbs)


def nearest(slots: NDArray[np.complex128], degree: int, scale: float) -> Float:
    """Return the coefficients of numbers in slots as whole numbers; halves go away from zero."""
    found = _coefficients(slots, degree, scale / degree)
    whole = np.floor(np.abs(found))
    whole += np.abs(found) - whole >= 0.5
    return np.copysign(whole, found)


def whole_numbers(plain: Plain, ring: Ring) -> Words:
    """Return the coefficients of numbers in slots, (2, N), as `refattn.he.integers.wide` has whole numbers.

    Raises
    ------
    UnsupportedProblem
        They are too large for the primes that are left.
    """
    chain = chain_of(ring)
    found = nearest(plain.of.slots, ring.degree, plain.scale)
    whole = np.abs(found)
    if math.ceil(math.log2(max(whole.max(), 1.0))) + 1 >= math.prod(chain.primes[: plain.limbs]).bit_length():
        raise UnsupportedProblem(f"he: numbers of a scale of {plain.scale:.6g} do not fit {plain.limbs} primes")
    upper = np.floor(whole * 2.0**-64)
    if upper.max() >= 2.0**63:
        raise UnsupportedProblem(f"he: numbers of a scale of {plain.scale:.6g} do not fit 127 bits")
    sign = (found < 0).astype(np.uint64) << np.uint64(63)
    return np.stack([(whole - upper * 2.0**64).astype(np.uint64), upper.astype(np.uint64) | sign])
