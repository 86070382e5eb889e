"""The encrypted program on plain numbers with noise drawn as the scheme draws it: what an error will look like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arithmetic import Arithmetic
from .noise import ERROR, Ring

__all__ = ["Sample", "Sampled"]

Complex = NDArray[np.complex128]


@dataclass(frozen=True)
class Sample:
    """A ciphertext's numbers, noise included; what they are multiplied with; the primes left."""

    slots: Complex
    scale: float
    limbs: int


class Sampled(Arithmetic):
    """The arithmetic of samples.

    Parameters
    ----------
    ring : Ring
        The chain.
    seed : int
        Of the noise.
    """

    def __init__(self, ring: Ring, seed: int) -> None:
        self.ring, self._rng = ring, np.random.default_rng(seed)
        exponents = np.empty(ring.slots, np.int64)
        power = 1
        for slot in range(ring.slots):
            exponents[slot], power = power, power * 3 % (2 * ring.degree)
        # SEAL's digits lie between 0 and a prime: half of it times 1 + X + ... + X**(N-1), which is 2/(1 - root)
        self._mean = 1 / np.abs(1 - np.exp(1j * np.pi * exponents / ring.degree)) ** 2

    def _noise(self, variance: Any) -> Complex:
        shape = (2, self.ring.slots)
        real, imaginary = self._rng.standard_normal(shape) * np.sqrt(np.asarray(variance) / 2)
        return np.asarray(real + 1j * imaginary)

    def _rounding(self, scale: float) -> float:
        return self.ring.rounding / scale**2

    def fresh(self, slots: Complex, limbs: int) -> Sample:
        """Return an input as the client encrypts it."""
        scale = 2.0**self.ring.middle
        return Sample(slots + self._noise(self.ring.degree * (ERROR + 1 / 12) / scale**2), scale, limbs)

    def mul(self, a: Sample, b: Sample) -> Sample:
        return Sample(a.slots * b.slots, a.scale * b.scale, min(a.limbs, b.limbs))

    def square(self, a: Sample) -> Sample:
        return self.mul(a, a)

    def add(self, a: Sample, b: Sample) -> Sample:
        return Sample(a.slots + b.slots, a.scale, min(a.limbs, b.limbs))

    def add_constant(self, a: Sample, c: float) -> Sample:
        return replace(a, slots=a.slots + c)

    def negate(self, a: Sample) -> Sample:
        return replace(a, slots=-a.slots)

    def times_constant(self, a: Sample, c: float) -> Sample:
        return Sample(a.slots * (round(c * a.scale) / a.scale), a.scale**2, a.limbs)

    def _encoded(self, scale: float, plain: Any) -> Complex:
        return np.asarray(plain.slots + self._noise(self.ring.degree / 12 / scale**2))

    def times(self, a: Sample, plain: Any) -> Sample:
        scale = plain.scale or a.scale
        return Sample(a.slots * self._encoded(scale, plain), a.scale * scale, a.limbs)

    def plus(self, a: Sample, plain: Any) -> Sample:
        return replace(a, slots=a.slots + self._encoded(a.scale, plain))

    def like(self, a: Sample, b: Sample) -> Sample:
        return Sample(a.slots + self._noise(self._rounding(b.scale)), b.scale, b.limbs)

    def relinearize(self, a: Sample) -> Sample:
        n, ring = self.ring.degree, self.ring
        digits = ring.digits(a.limbs) * (self._mean + n / 12)
        return replace(a, slots=a.slots + self._noise((ERROR * n * digits + ring.rounding) / a.scale**2))

    def rescale(self, a: Sample) -> Sample:
        scale = a.scale / 2.0**self.ring.middle
        return Sample(a.slots + self._noise(self._rounding(scale)), scale, a.limbs - 1)

    def rotate(self, a: Sample, k: int) -> Sample:
        return self.relinearize(replace(a, slots=np.roll(a.slots, -k)))

    def conjugate(self, a: Sample) -> Sample:
        return self.relinearize(replace(a, slots=np.conj(a.slots)))
