"""What CKKS noise does to a result: variances through the circuit, for any inputs in the declared range.

A slot's noise is the sum of very many coefficients' roundings and of errors drawn by the scheme, near normal. Each
operation adds what it must (rounding of N coefficients by the rescaling, the key-switching digits' product with their
errors), and passes its operands' noise on by the product rule. The worst case over inputs, for each denominator: one
key holds all of it, and the numerator is the largest value times the denominator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arithmetic import Arithmetic

__all__ = ["Bounds", "Noisy", "Ring", "quantile"]

Float = NDArray[np.float64]
ERROR = 10.5  # variance of an error coefficient (SEAL: the difference of two sums of 21 bits)
SECRET = 2 / 3  # variance of a coefficient of the ternary secret key


@dataclass(frozen=True)
class Ring:
    """A ring and its chain of primes.

    Attributes
    ----------
    degree : int
        N, the polynomials' degree.
    first, middle, special : int
        Bits of the last prime that remains, of those that rescaling takes away, and of the key-switching prime.
    levels : int
        How many primes rescaling can take away.
    """

    degree: int
    first: int
    middle: int
    special: int
    levels: int

    @property
    def bits(self) -> list[int]:
        """Bits of all primes, as SEAL takes them."""
        return [self.first, *[self.middle] * self.levels, self.special]

    def digits(self, limbs: int) -> float:
        """The sum of squares of the digits' primes over the special prime, with some primes left."""
        return 4.0 ** (self.first - self.special) + (limbs - 1) * 4.0 ** (self.middle - self.special)

    @property
    def rounding(self) -> float:
        """The variance in a slot of both polynomials' coefficients rounded, the second times the secret key."""
        return self.degree * (1 + SECRET * self.degree) / 12

    @property
    def slots(self) -> int:
        """Complex numbers in a ciphertext."""
        return self.degree // 2


@dataclass(frozen=True)
class Noisy:
    """A ciphertext's worst value and noise variance, at points of the denominator's range.

    Attributes
    ----------
    value, variance : array
        By point, or one for all; of_keys: in two rows, of a key without weight and of one that has all.
    scale : float
        What numbers are multiplied with before they are rounded.
    limbs : int
        Primes left.
    of_keys : bool
        They are of one key: what a rotation brings is another key, without weight.
    """

    value: Float
    variance: Float
    scale: float
    limbs: int
    of_keys: bool = False


class Bounds(Arithmetic):
    """The arithmetic of noise variances.

    Parameters
    ----------
    ring : Ring
        The chain.
    value_most : float
        The largest value (of a pair, as a complex number's size).
    denominators : array
        Points of the denominator's range without epsilon, as the circuit sees it.
    """

    def __init__(self, ring: Ring, value_most: float, denominators: Float) -> None:
        self.ring, self.value_most, self.denominators = ring, value_most, denominators
        self.denominator_variance: Float = np.zeros(1)

    def fresh(self, value: float) -> Noisy:
        """Return an input as the client encrypts it."""
        scale = 2.0**self.ring.middle
        variance = self.ring.degree * (ERROR + 1 / 12) / scale**2
        return Noisy(np.array([value]), np.array([variance]), scale, self.ring.levels + 1)

    def _rounding(self, scale: float) -> float:
        return self.ring.rounding / scale**2

    def _join(self, a: Noisy, b: Noisy, value: Float, variance: Float, scale: float) -> Noisy:
        return Noisy(value, variance, scale, min(a.limbs, b.limbs), a.of_keys or b.of_keys)

    def mul(self, a: Noisy, b: Noisy) -> Noisy:
        variance = a.value**2 * b.variance + b.value**2 * a.variance + a.variance * b.variance
        return self._join(a, b, a.value * b.value, variance, a.scale * b.scale)

    def square(self, a: Noisy) -> Noisy:
        return replace(a, value=a.value**2, variance=4 * a.value**2 * a.variance + 2 * a.variance**2, scale=a.scale**2)

    def add(self, a: Noisy, b: Noisy) -> Noisy:
        return self._join(a, b, a.value + b.value, a.variance + b.variance, a.scale)

    def add_constant(self, a: Noisy, c: float) -> Noisy:
        return replace(a, value=a.value + c, variance=a.variance + 1 / 12 / a.scale**2)

    def negate(self, a: Noisy) -> Noisy:
        return replace(a, value=-a.value)

    def times_constant(self, a: Noisy, c: float) -> Noisy:
        variance = c**2 * a.variance + a.value**2 / 12 / a.scale**2
        return replace(a, value=a.value * c, variance=variance, scale=a.scale**2)

    def times(self, a: Noisy, plain: Any) -> Noisy:
        most, scale = float(np.abs(plain.slots).max()), plain.scale or a.scale
        rounded = self.ring.degree / 12 / scale**2
        variance = most**2 * a.variance + (a.value**2 + a.variance) * rounded
        return replace(a, value=a.value * most, variance=variance, scale=a.scale * scale)

    def relinearize(self, a: Noisy) -> Noisy:
        n, ring = self.ring.degree, self.ring
        # SEAL's digits lie between 0 and a prime, not about 0: their mean is half a prime times 1 + X + ... + X**(N-1),
        # which is 2/(1 - root) at a slot's root, N·2/pi at slot 0. Errors times digits go through the special prime.
        digits = (n / math.pi) ** 2 * ring.digits(a.limbs)
        return replace(a, variance=a.variance + ERROR * n * digits / a.scale**2 + self._rounding(a.scale))

    def rescale(self, a: Noisy) -> Noisy:
        scale = a.scale / 2.0**self.ring.middle
        return replace(a, variance=a.variance + self._rounding(scale), scale=scale, limbs=a.limbs - 1)

    def rotate(self, a: Noisy, k: int) -> Noisy:
        return self.another(self.relinearize(a))

    def another(self, a: Noisy) -> Noisy:
        if not a.of_keys:
            return a
        value, variance = (np.broadcast_to(x[:1], x.shape) for x in (a.value, a.variance))
        return replace(a, value=value, variance=variance)

    def conjugate(self, a: Noisy) -> Noisy:
        return self.relinearize(a)

    def within(self, a: Noisy, p: int) -> Noisy:
        value = np.stack([np.zeros_like(self.denominators), self.denominators ** (1 / p)])
        return replace(a, value=value, variance=np.full_like(value, a.variance.max()), of_keys=True)

    def quotient(self, n: Noisy, d: Noisy) -> tuple[Noisy, Noisy]:
        # the denominator's noise reaches the quotient by its derivative: see plan.noise_of
        points, self.denominator_variance = self.denominators, d.variance.max(0)
        numerator = replace(n, value=self.value_most * points, variance=n.variance.max(0), of_keys=False)
        return numerator, replace(d, value=points, variance=np.zeros_like(points), of_keys=False)


def quantile(count: int, chance: float = 2.0**-40) -> float:
    """Return how many standard deviations the largest of `count` noises exceeds by a chance only.

    A slot's noise is near a product of two normal numbers (a rounding times the secret key, an error times a digit):
    its tail is sqrt(pi·t)·exp(-2t).
    """
    return (math.log(count / chance) + 3) / 2
