"""Keys and ciphertexts that are drawn, as bytes and words: the arithmetic is the same as on encryptions."""

import hashlib
import struct

import numpy as np

from refattn.he.device.chain import chain_of
from refattn.he.device.format import _object, ciphertext_bytes, read_ciphertext, whole
from refattn.he.device.seeds import expanded
from refattn.he.seal import galois_elements

__all__ = ["Drawn"]


class Drawn:
    """What a client of a plan would send; `keys` and `parts` are bytes, `key_words` and `part_words` arrays."""

    def __init__(self, plan, seed):
        self.plan, self.chain, self.scale = plan, chain_of(plan.ring), 2.0**plan.ring.middle
        self.seeded = plan.upload != "whole"
        elements = galois_elements(plan.ring, plan.rotations)
        primes = len(self.chain.primes)
        self.key_words = {
            e: np.stack([self._words(f"{seed}/key{e}/{j}", primes)[0] for j in range(primes - 1)])
            for e in (0, *elements)
        }
        self.keys = (self._keys([0]), self._keys(elements))
        self.draw(seed)

    def draw(self, seed, stage=0):
        """Draw another query; of a later block of an encoder an answer, and `masks`."""
        limbs, n = self.plan.part_limbs(*[stage] if stage else []), self.chain.degree
        rng = np.random.default_rng([seed, stage])
        upper = rng.integers(0, 2**48, (len(limbs), n), dtype=np.uint64) | rng.integers(
            0, 2, (len(limbs), n), dtype=np.uint64
        ) << np.uint64(63)
        lower = rng.integers(0, 2**64, (len(limbs), n), dtype=np.uint64)
        self.masks = list(np.stack([lower, upper], 1)) if stage else []
        found = [self._words(f"{seed}/{stage}/part{i}", limbs) for i, limbs in enumerate(limbs)]
        self.part_words = [words for words, _ in found]
        self.parts = [self._bytes(words, self.scale, name if self.seeded else b"") for words, name in found]

    def words(self, parts, outs):
        """Return the words of a reply."""
        return [
            whole(read_ciphertext(x, self.chain, o.limbs, o.scale, False), self.chain)
            for x, o in zip(parts, outs, strict=True)
        ]

    def _words(self, name, limbs):
        seed = hashlib.sha512(name.encode()).digest()
        rng = np.random.default_rng(list(seed))
        size = (2, self.chain.degree)
        words = np.stack([rng.integers(0, q, size, dtype=np.uint64) for q in self.chain.primes[:limbs]], 1)
        if self.seeded and "key" not in name:
            words[1] = expanded(seed, self.chain, limbs)
        return words, seed

    def _bytes(self, words, scale, seed=b""):
        saved = ciphertext_bytes(words[:1] if seed else words, self.chain, scale)
        if not seed:
            return saved
        body = bytearray(saved[16:])
        struct.pack_into("<Q", body, 33, 2)
        return _object(bytes(body), _object(b"\x01", seed))

    def _keys(self, elements):
        primes, parts = len(self.chain.primes), []
        count = 1 if elements == [0] else self.chain.degree
        at = {(e - 1) // 2 if e else 0: e for e in elements}
        for index in range(count):
            digits = self.key_words[at[index]] if index in at else ()
            parts += [struct.pack("<Q", len(digits)), *(self._bytes(x, 1.0) for x in digits)]
        return _object(self.chain.name(primes), struct.pack("<Q", count), *parts)
