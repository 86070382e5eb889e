"""A ring's primes as SEAL takes them, its names of levels, and tables of roots of unity."""

from __future__ import annotations

import hashlib
import struct
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedProblem
from ..noise import Ring
from .modular import Words, high, reduced_wide

__all__ = ["Chain", "bits_reversed", "chain_of", "is_prime", "level_name"]

WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
"""Miller and Rabin's test with these bases is right below 3.3e24 (Sorenson and Webster, 2015). Recalled."""
CKKS = 2
"""SEAL's number of the scheme."""


def is_prime(n: int) -> bool:
    """Tell whether a number below 2**64 is prime."""
    if n < 2 or any(n % p == 0 for p in WITNESSES):
        return n in WITNESSES
    twos = (n - 1 & 1 - n).bit_length() - 1
    for base in WITNESSES:
        x = pow(base, n - 1 >> twos, n)
        if x != 1 and not any(pow(x, 1 << k, n) == n - 1 for k in range(twos)):
            return False
    return True


def _primes(ring: Ring) -> list[int]:
    """Return the chain's primes; of those of one size the least comes first, as SEAL hands them out.

    Raises
    ------
    UnsupportedProblem
        There are too few primes of a size.
    """
    step = 2 * ring.degree
    found: dict[int, list[int]] = {}
    for bits in set(ring.bits):
        value = ((1 << bits) - 1) // step * step + 1
        primes: list[int] = []
        while len(primes) < ring.bits.count(bits):
            if value <= 1 << (bits - 1):
                raise UnsupportedProblem(f"he: there are too few primes of {bits} bits for degree {ring.degree}")
            if is_prime(value):
                primes.append(value)
            value -= step
        found[bits] = primes
    return [found[bits].pop() for bits in ring.bits]


def level_name(degree: int, primes: list[int]) -> bytes:
    """Return SEAL's parms_id: BLAKE2b-256 of the scheme, the degree, the primes and a plain modulus of 0."""
    words = [CKKS, degree, *primes, 0]
    return hashlib.blake2b(struct.pack(f"<{len(words)}Q", *words), digest_size=32).digest()


def _root(q: int, order: int) -> int:
    """Return the least primitive root of unity of an order, a power of 2."""
    g = 2
    while pow(g, (q - 1) // 2, q) == 1:
        g += 1
    x = pow(g, (q - 1) // order, q)
    square, least = x * x % q, x
    for _ in range(order // 2):
        least = min(least, x)
        x = x * square % q
    return least


def bits_reversed(n: int) -> NDArray[np.int64]:
    """Return the numbers below n, a power of 2, with their bits in reverse order."""
    found = np.zeros(1, np.int64)
    while len(found) < n:
        found = np.concatenate([2 * found, 2 * found + 1])
    return found


class Chain:
    """A ring's primes and tables; the special prime, for key switching, is the last.

    Attributes
    ----------
    degree : int
        N.
    primes : list of int
        Below 2**61.
    q, ratio : (primes,) and (2, primes) arrays
        The primes, and floor(2**128/q), its upper word first.
    """

    def __init__(self, degree: int, primes: list[int]) -> None:
        self.degree, self.primes = degree, primes
        self.q = np.array(primes, np.uint64)
        ratios = [(1 << 128) // q for q in primes]
        self.ratio = np.array([[r >> 64 for r in ratios], [r % 2**64 for r in ratios]], np.uint64)

    @property
    def special(self) -> int:
        """The number of the special prime, and of the others."""
        return len(self.primes) - 1

    @cache  # noqa: B019 (a chain lives as long as the process)
    def name(self, limbs: int) -> bytes:
        """Return SEAL's name of the level with some primes left; with all of them, of the keys' level."""
        return level_name(self.degree, self.primes[:limbs])

    @cached_property
    def roots(self) -> Words:
        """(primes, N, 2): powers of the root in bit-reversed order, each with its quotient for Shoup's product."""
        return np.stack([self._powers(k, _root(q, 2 * self.degree)) for k, q in enumerate(self.primes)])

    @cached_property
    def inverse_roots(self) -> Words:
        """(primes, N, 2): their inverses, at the same places."""
        roots = (int(x) for x in self.roots[:, self.degree // 2, 0])  # the first powers
        return np.stack([self._powers(k, pow(x, -1, self.primes[k])) for k, x in enumerate(roots)])

    def _powers(self, k: int, root: int) -> Words:
        q, ratio = self.q[k], (self.ratio[0, k], self.ratio[1, k])
        powers = np.ones(1, np.uint64)
        while len(powers) < self.degree:
            x = np.uint64(pow(root, len(powers), self.primes[k]))
            powers = np.concatenate([powers, reduced_wide(high(powers, x), powers * x, q, ratio)])
        powers = powers[bits_reversed(self.degree)]
        shifted = powers * ratio[0] + high(powers, ratio[1])  # floor(powers·2**64/q), or one less
        return np.stack([powers, shifted + (np.uint64(0) - shifted * q >= q)], 1)

    @cached_property
    def scale_back(self) -> Words:
        """(primes, 2): 1/N with its quotient."""
        return np.array([_with_quotient(pow(self.degree, -1, q), q) for q in self.primes], np.uint64)

    @cached_property
    def dropping(self) -> Words:
        """(dropped, kept, 3): 1/dropped modulo kept, its quotient, and kept less half of dropped modulo kept."""
        count = len(self.primes)
        found = np.zeros((count, count, 3), np.uint64)
        for d, p in enumerate(self.primes):
            for k, q in enumerate(self.primes):
                if p != q:
                    found[d, k] = (*_with_quotient(pow(p, -1, q), q), q - p // 2 % q)
        return found

    @cache  # noqa: B019
    def permutation(self, element: int) -> NDArray[np.uint32]:
        """Return where each point of x -> x**element comes from, in the transform's order."""
        odd = bits_reversed(2 * self.degree)[self.degree :]
        return bits_reversed(self.degree)[element * odd // 2 % self.degree].astype(np.uint32)


def _with_quotient(w: int, q: int) -> tuple[int, int]:
    return w, (w << 64) // q


@cache
def chain_of(ring: Ring) -> Chain:
    """Return a ring's chain."""
    return Chain(ring.degree, _primes(ring))
