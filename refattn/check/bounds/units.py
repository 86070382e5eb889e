r"""What matrix units lose that add several products at once: aligned to the largest, cut off below, and not rounded.

A unit takes the running sum c and L products, finds the largest exponent E among them, cuts each off (toward zero) to
a multiple of q = 2^(E - F), adds exactly, and cuts the sum off to F + 1 bits, at most the accumulator's. E is the sum
of the factors' exponents, so q is at most 2^-F of the largest term. With S the sum of the terms' sizes, each term is
off by less than 2^-F S, the sum before and after each step by less than 2^-F S and 2^(1 - kept) S: n terms in s steps
lose at most

    ((n + s) 2^-F + s 2^(1 - kept)) S.

Where the sum goes over to one in the accumulator's type after N products, n and s are those of N: the parts' sizes add
up to S.

What is expected: a term that is a multiple of t < q loses 0, t, 2t, ... or q - t toward zero, so its error has a mean
of (q - t)/2 and a variance of (q^2 - t^2)/12; where it is known to be an odd multiple, q/2 and (q^2 - 4 t^2)/12. One
below q is lost whole. Means add up.

Source: Xie et al., arXiv 2511.10909, "T-FDPA", as its authors' program has it (microsoft/MMA-Sim, commit 0cb78465:
``arithmetic/fdpa.py``, ``nv_ptx/sim.py``): F is 23 on Volta, 24 on Turing, Ampere and Ada, 25 on Hopper and Blackwell,
13 for float8 on Ada and Hopper, whose sums keep 14 bits; L is 16 for 16 bits and 32 for 8 bits on Hopper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model import Model, inside_type

__all__ = ["Unit", "exponents", "last_places"]

Float = NDArray[np.float64]
ALIVE = 2**20
"""Products alive at a time."""


def exponents(x: Float) -> NDArray[np.int64]:
    """Return floor(log2(abs(x))), and far below any number for 0."""
    return np.asarray(np.where(x == 0, -(2**20), np.frexp(x)[1] - 1), np.int64)


def last_places(x: Float, bits: int) -> Float:
    """Return the exponents of the last places of numbers rounded to so many bits; fewer where a number needs fewer."""
    whole = np.abs(np.frexp(x)[0] * 2.0**53).astype(np.int64)
    own = np.frexp((whole & -whole).astype(np.float64))[1] - 1 + exponents(x) - 52
    return np.where(x == 0, 0, np.maximum(own, exponents(x) - bits + 1)).astype(np.float64)


@dataclass(frozen=True)
class Unit:
    """The matrix unit of a model.

    Attributes
    ----------
    bits : int
        F: bits kept below the largest exponent.
    fused : int
        L: products added at once.
    promoted : int
        N, 0 where the sum stays in the unit.
    kept : int
        Bits of a step's sum.
    """

    bits: int
    fused: int
    promoted: int
    kept: int

    @classmethod
    def of(cls, model: Model) -> Unit | None:
        """Return a model's unit, None where each addition is rounded."""
        if not model.aligned_bits:
            return None
        kept = min(model.aligned_bits + 1, inside_type(model.accumulator).precision)
        return cls(model.aligned_bits, model.fused, model.promoted, kept)

    def joins(self, n: int) -> int:
        """Return how many parts of a sum of n products are added in the accumulator's type."""
        return -(-n // self.promoted) if self.promoted and n > self.promoted else 0

    def cut(self, seen: Any, n: int) -> Any:
        """Return the largest error of a sum of n products, of which some are seen and the others 0, over their sizes.

        Parameters
        ----------
        seen : number or array
            How many are not 0, at most.
        n : int
            All of them.
        """
        most = min(n, self.promoted or n)
        terms = np.minimum(seen, most)
        steps = np.minimum(terms, -(-most // self.fused))
        return (terms + steps) * 2.0**-self.bits + steps * 2.0 ** (1 - self.kept)

    def squares(self, x: Float, y: Float, bits: tuple[int, int]) -> Float:
        """Return the mean square of what x @ y loses, factor by factor of so many bits."""
        found = np.zeros((x.shape[0], y.shape[1]))
        size = max(1, ALIVE // max(1, self.fused * y.shape[1]))
        for start in range(0, x.shape[0], size):
            rows = slice(start, start + size)
            found[rows] = self._squares(x[rows], y, bits)
        return found

    def _squares(self, x: Float, y: Float, bits: tuple[int, int]) -> Float:
        n, shape = x.shape[1], (x.shape[0], y.shape[1])
        mean, var, total = (np.zeros(shape) for _ in range(3))
        ex, ey, last_x, last_y = exponents(x), exponents(y), last_places(x, bits[0]), last_places(y, bits[1])
        odd_x, odd_y = (z == last_places(a, 53) for z, a in ((last_x, x), (last_y, y)))
        last = np.full(shape, np.inf)  # the finest place that anything in the running sum has
        for start in range(0, n, self.fused):
            if self.promoted and start % self.promoted == 0:
                total, last = np.zeros(shape), np.full(shape, np.inf)
            at = slice(start, start + self.fused)
            t = x[:, at, None] * y[None, at]
            e, ec = ex[:, at, None] + ey[None, at], exponents(total)
            top = np.maximum(e.max(1), ec).astype(np.float64)
            q = np.where(top > -(2**19), np.exp2(np.maximum(top - self.bits, -1000.0)), 0.0)
            places = np.where(t == 0, np.inf, np.exp2(last_x[:, at, None] + last_y[None, at]))
            lost = _lost(t, places, q[:, None], odd_x[:, at, None] & odd_y[None, at])
            mean, var = mean + lost[0].sum(1), var + lost[1].sum(1)
            lost = _lost(total, last, q)
            mean, var, total = mean + lost[0], var + lost[1], total + t.sum(1)
            fine = np.maximum(np.minimum(last, places.min(1)), q)
            last = np.maximum(fine, np.exp2(np.maximum(exponents(total) - self.kept + 1, -1000).astype(np.float64)))
            kept, fine = (np.where(np.isfinite(last), z, 0.0) for z in (last, fine))
            mean, var = mean - np.sign(total) * (kept - fine) / 2, var + (kept**2 - fine**2) / 12
        return np.asarray(mean * mean + var)


def _lost(t: Float, last: Float, q: Float, odd: Any = False) -> tuple[Float, Float]:
    """Return the mean and the variance of what terms lose that are cut off to multiples of q."""
    whole, rest = np.abs(t) < q, np.minimum(last, q)
    mean = np.where(whole, t, np.where(odd & (rest < q), np.sign(t) * q, np.sign(t) * (q - rest)) / 2)
    part = np.where(odd, np.minimum(2 * rest, q), rest)
    return -mean, np.where(whole, 0.0, (q * q - part * part) / 12)
