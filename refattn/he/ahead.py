"""Encryptions of zero that a client makes ahead, by SEAL, and what is encrypted with them: a sum, by several threads.

SEAL encrypts by an encryption of zero, to whose first polynomial it adds the plaintext. The first takes nearly all of
the time, and depends on nothing that is encrypted.
"""

from __future__ import annotations

import os
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .device.encode import nearest
from .embedding import Pair
from .integers import FIELDS, FRONT, saved
from .noise import Ring
from .seal import HEADER, ZSTD, api, level, saved_body, to_bytes, zstandard
from .transform import add_whole

__all__ = ["Zeros", "from_slots"]

Slots = NDArray[np.complex128]
MOST_THREADS = 16
SCALE = 32 + struct.calcsize(FIELDS.format[:-2])
"""Where a saved ciphertext's scale is."""
PAD = -(HEADER.size + FRONT) % 8
"""Bytes before a saved zero, so that its words are where words can be read."""
WORDS = PAD + HEADER.size + FRONT


class Zeros:
    """Encryptions of zero, each used once. They are as secret as what is encrypted with them.

    Parameters
    ----------
    encryptor : Encryptor
        SEAL's.
    ring : Ring
        The chain; its primes but for the special one must be below `refattn.he.transform.MOST`.
    whole : bool
        Whether the second polynomial is there, or its seed.
    compressed : bool
        Whether ciphertexts from seeds are sent compressed.
    """

    def __init__(self, encryptor: Any, ring: Ring, whole: bool, compressed: bool) -> None:
        self._encryptor, self.ring, self._whole, self._compressed = encryptor, ring, whole, compressed
        self._made: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))

    @property
    def each(self) -> Callable[..., Any]:
        """Maps a function, by threads."""
        return self._threads.map

    def make(self, limbs: int) -> None:
        """Encrypt zero, with some primes left."""
        name = level(self.ring, limbs)
        if self._whole:
            made = api().Ciphertext()
            self._encryptor.encrypt_zero_symmetric(name, made)
        else:
            made = self._encryptor.encrypt_zero_symmetric(name)
        data = saved(saved_body(to_bytes(made)))
        kept = np.empty(PAD + len(data), np.uint8)
        kept[PAD:] = np.frombuffer(data, np.uint8)
        self._made[limbs].append(kept)

    def count(self) -> Counter[int]:
        """Return how many there are, by primes left."""
        return Counter({limbs: len(x) for limbs, x in self._made.items() if x})

    def sealed(self, jobs: Sequence[tuple[Pair | Slots, int]]) -> tuple[bytes | memoryview, ...] | None:
        """Return encryptions of polynomials, as SEAL saves them, or nothing where there are too few zeros.

        Parameters
        ----------
        jobs : sequence of (pair of arrays, or array; int)
            A polynomial's coefficients, times the ring's scale, or numbers in slots; and primes left.
        """
        if Counter(limbs for _, limbs in jobs) - self.count():
            return None
        zeros = [self._made[limbs].pop() for _, limbs in jobs]
        return tuple(self.each(partial(_sum, self.ring, self._compressed and not self._whole), jobs, zeros))


def from_slots(ring: Ring, slots: Slots) -> Pair:
    """Return the coefficients of numbers in slots, times the ring's scale: SEAL's, by its floating-point operations."""
    found = nearest(slots, ring.degree, 2.0**ring.middle)
    return found, np.zeros_like(found)


def _sum(ring: Ring, compressed: bool, job: tuple[Pair | Slots, int], kept: NDArray[np.uint8]) -> bytes | memoryview:
    """Return a ciphertext: the zero, which is written over, and a polynomial."""
    given, limbs = job
    words = kept[WORDS : WORDS + 8 * limbs * ring.degree].view(np.uint64).reshape(limbs, -1)
    add_whole(words, given if isinstance(given, tuple) else from_slots(ring, given), ring)
    data = kept[PAD:].data
    struct.pack_into("<d", data, HEADER.size + SCALE, 2.0**ring.middle)
    if not compressed:
        return data
    return saved(zstandard().ZstdCompressor(level=1).compress(data[HEADER.size :]), ZSTD)
