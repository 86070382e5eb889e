"""SEAL's operations on ciphertexts as arrays of words, in NumPy, word for word: the reference for the kernels.

A ciphertext is (polynomials, primes, N), transformed (points in bit-reversed order), each word below its prime. A key
is (digits, 2, primes, N).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .chain import Chain
from .modular import Words, below, high, reduced, reduced_wide, scaled

__all__ = ["Evaluator"]


class Evaluator:
    """The operations in a ring.

    Parameters
    ----------
    chain : Chain
        The ring's primes and tables.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def _q(self, x: Words) -> Words:
        return self.chain.q[: x.shape[-2], None]

    def _product(self, a: Words, b: Words, start: int = 0) -> Words:
        """Return products modulo primes `start`, `start` + 1, ..."""
        of = slice(start, start + a.shape[-2])
        ratio = self.chain.ratio[:, of, None]
        return reduced_wide(high(a, b), a * b, self.chain.q[of, None], (ratio[0], ratio[1]))

    def forward(self, x: Words, primes: Sequence[int]) -> Words:
        """Return the transform of (..., primes, N) words below four times their primes."""
        return self._transform(x, primes, inverse=False)

    def inverse(self, x: Words, primes: Sequence[int]) -> Words:
        """Return what the transform makes x of, of words below twice their primes."""
        found = self._transform(x, primes, inverse=True)
        w = self.chain.scale_back[list(primes)]
        q = self.chain.q[list(primes)][:, None]
        return below(scaled(found, w[:, :1], w[:, 1:], q), q)

    def _transform(self, x: Words, primes: Sequence[int], inverse: bool) -> Words:
        which, lead, n = list(primes), x.shape[:-1], self.chain.degree
        q = self.chain.q[which][:, None, None]
        twice, stages = q << np.uint64(1), range(n.bit_length() - 1)
        table = self.chain.inverse_roots if inverse else self.chain.roots
        for stage in reversed(stages) if inverse else stages:
            m = 1 << stage
            pairs = x.reshape(*lead, m, 2, n // (2 * m))
            a, b = pairs[..., 0, :], pairs[..., 1, :]
            w, shifted = table[which, m : 2 * m, 0, None], table[which, m : 2 * m, 1, None]
            x = np.empty_like(pairs)
            if inverse:
                x[..., 0, :] = below(a + b, twice)
                x[..., 1, :] = scaled(a + (twice - b), w, shifted, q)
            else:
                a, b = below(a, twice), scaled(b, w, shifted, q)
                x[..., 0, :] = a + b
                x[..., 1, :] = a + (twice - b)
        x = x.reshape(*lead, n)
        return x if inverse else below(below(x, twice[..., 0]), q[..., 0])

    def add(self, a: Words, b: Words) -> Words:
        """Return the sum of polynomials."""
        return below(a + b, self._q(a))

    def negate(self, a: Words) -> Words:
        """Return the negative of polynomials."""
        return np.where(a == 0, a, self._q(a) - a)

    def times(self, a: Words, plain: Words) -> Words:
        """Return polynomials times one, (primes, N) or (primes, 1)."""
        return self._product(a, np.broadcast_to(plain, a.shape))

    def plus(self, a: Words, plain: Words) -> Words:
        """Return a ciphertext with one, (primes, N) or (primes, 1), added to its first polynomial."""
        found = a.copy()
        found[0] = below(a[0] + plain, self._q(a))
        return found

    def transformed(self, whole: Words, limbs: int) -> Words:
        """Return whole numbers, (2, N) as `refattn.he.integers.wide` has them, modulo primes and transformed."""
        sign, ratio = whole[1] >> np.uint64(63), self.chain.ratio[:, :limbs, None]
        upper, q = whole[1] & np.uint64(2**63 - 1), self.chain.q[:limbs, None]
        found = reduced_wide(upper[None], whole[:1], q, (ratio[0], ratio[1]))
        return self.forward(np.where((sign == 1) & (found != 0), q - found, found), range(limbs))

    def unmask(self, a: Words, whole: Words) -> Words:
        """Return a ciphertext with whole numbers subtracted from its first polynomial."""
        mask = self.transformed(whole, a.shape[1])
        return np.stack([below(a[0] + (self._q(a) - mask), self._q(a)), a[1]])

    def dot(self, a: Sequence[Words], b: Sequence[Words]) -> Words:
        """Return the sum of products of ciphertexts, three polynomials: summed in 128 bits, and reduced once.

        The sum of twice as many products of words must be below 2**128 (`Trace.products` sees to it).
        """
        upper, lower = np.zeros((2, 3, *a[0].shape[1:]), np.uint64)
        for x, y in zip(a, b, strict=True):
            for c, i, j in ((0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 1, 1)):
                low = x[i] * y[j]
                lower[c] += low
                upper[c] += high(x[i], y[j]) + (lower[c] < low)
        ratio = self.chain.ratio[:, : lower.shape[-2], None]
        return reduced_wide(upper, lower, self._q(lower), (ratio[0], ratio[1]))

    def rescale(self, a: Words) -> Words:
        """Return a ciphertext divided by its last prime, and rounded."""
        last = a.shape[1] - 1
        return np.stack([self._drop(x[:last], last, x[last]) for x in a])

    def _drop(self, x: Words, dropped: int, last: Words) -> Words:
        """Return x, (kept, N), divided by a prime and rounded; `last` is what x is modulo that prime."""
        chain, kept = self.chain, len(x)
        p = chain.primes[dropped]
        rest = self.inverse(last[None], [dropped])[0]
        rest = below(rest + np.uint64(p >> 1), np.uint64(p))  # rounding to nearest is cutting off after adding half
        of, fix = chain.dropping[dropped, :kept], chain.dropping[dropped, :kept, 2:]
        spread = np.stack([self._brought(rest, dropped, k) for k in range(kept)]) + fix
        q = chain.q[:kept, None]
        return below(scaled(x + (q - self.forward(spread, range(kept))), of[:, :1], of[:, 1:2], q), q)

    def _brought(self, x: Words, source: int, target: int) -> Words:
        """Return words below one prime modulo another, reduced only where SEAL does."""
        q, r = self.chain.q[target], self.chain.ratio[0, target]
        return reduced(x, q, r) if self.chain.primes[source] > self.chain.primes[target] else x

    def _switched(self, target: Words, key: Words) -> Words:
        """Return what key switching makes of a polynomial, two of them."""
        chain, limbs = self.chain, len(target)
        digits = self.inverse(target, range(limbs))
        primes = [*range(limbs), chain.special]
        sums = np.empty((2, limbs + 1, chain.degree), np.uint64)
        for at, k in enumerate(primes):
            others = [j for j in range(limbs) if j != k]
            moved = np.empty_like(target)
            if k < limbs:
                moved[k] = target[k]
            if others:
                moved[others] = self.forward(
                    np.stack([self._brought(digits[j], j, k) for j in others]), [k] * len(others)
                )
            low = moved[:, None] * key[:limbs, :, k]
            upper, lower = np.zeros((2, 2, chain.degree), np.uint64)
            for j in range(limbs):
                lower += low[j]
                upper += high(moved[j], key[j, :, k]) + (lower < low[j])
            sums[:, at] = reduced_wide(upper, lower, chain.q[k], (chain.ratio[0, k], chain.ratio[1, k]))
        return np.stack([self._drop(s[:limbs], chain.special, s[limbs]) for s in sums])

    def relinearize(self, a: Words, key: Words) -> Words:
        """Return two polynomials of a ciphertext's three."""
        return self.add(a[:2], self._switched(a[2], key))

    def galois(self, a: Words, element: int, key: Words) -> Words:
        """Return a ciphertext with x**element in place of x: its slots turned, or conjugate."""
        order = self.chain.permutation(element)
        found = self._switched(a[1][:, order], key)
        found[0] = self.add(a[0][:, order], found[0])
        return found
