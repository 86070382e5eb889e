"""Seeds of polynomials, expanded as SEAL does: words of its Blake2xb stream, reduced modulo each prime.

A word that would make the residues uneven is left out, and takes the next one after the polynomial's words.
The stream: for each 4096 bytes a root (BLAKE2b of a counter, keyed by the seed) and 64 leaves of 64 bytes (BLAKE2X).
"""

from __future__ import annotations

import itertools
import struct

import numpy as np

from .chain import Chain
from .modular import Words, reduced

__all__ = ["SEED", "expanded", "first_rejected", "stream"]

SEED = 64
"""Bytes of a seed."""
BLOCK = 512
"""Words that a counter gives."""
START = (
    0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
    0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
)  # fmt: skip
ORDERS = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
    (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4), (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8),
    (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13), (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9),
    (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11), (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10),
    (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5), (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0),
)  # fmt: skip
PLACES = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip


def _turned(x: Words, bits: int) -> Words:
    return np.asarray((x >> np.uint64(bits)) | (x << np.uint64(64 - bits)))


def _compressed(state: list[Words], message: list[Words], taken: int, last: bool) -> list[Words]:
    """Return BLAKE2b's state after a block of 16 words, for many states at once (RFC 7693, section 3.2)."""
    v = [*state, *(np.full_like(state[0], x) for x in START)]
    v[12] = v[12] ^ np.uint64(taken)
    if last:
        v[14] = ~v[14]
    for r in range(12):
        order = ORDERS[r % 10]
        for k, (a, b, c, d) in enumerate(PLACES):
            for word, first, second in ((order[2 * k], 32, 24), (order[2 * k + 1], 16, 63)):
                v[a] = v[a] + v[b] + message[word]
                v[d] = _turned(v[d] ^ v[a], first)
                v[c] = v[c] + v[d]
                v[b] = _turned(v[b] ^ v[c], second)
    return [state[i] ^ v[i] ^ v[i + 8] for i in range(8)]


def stream(seed: bytes, first: int, blocks: int) -> Words:
    """Return blocks `first`, `first` + 1, ... of a seed's stream: 512 words each."""
    zero = np.zeros(blocks, np.uint64)
    state = [zero + np.uint64(x) for x in START]
    state[0] = state[0] ^ np.uint64(SEED | SEED << 8 | 1 << 16 | 1 << 24)  # digest, key, fan-out, depth
    state[1] = state[1] ^ np.uint64(8 * BLOCK << 32)  # bytes in all
    state = _compressed(state, [zero + np.uint64(x) for x in struct.unpack("<8Q", seed)] + [zero] * 8, 128, False)
    state = _compressed(state, [np.arange(first, first + blocks, dtype=np.uint64)] + [zero] * 15, 136, True)
    zero = np.zeros(64 * blocks, np.uint64)
    leaves = [zero + np.uint64(x) for x in START]
    leaves[0] = leaves[0] ^ np.uint64(SEED | 64 << 32)  # digest, bytes of a leaf
    leaves[1] = leaves[1] ^ np.uint64(8 * BLOCK << 32) ^ np.tile(np.arange(64, dtype=np.uint64), blocks)
    leaves[2] = leaves[2] ^ np.uint64(64 << 8)  # bytes inside
    found = _compressed(leaves, [np.repeat(x, 64) for x in state] + [zero] * 8, 64, True)
    return np.stack(found, 1).reshape(-1)


def first_rejected(q: int) -> int:
    """Return the least word that is left out: below it each residue of q comes equally often, as SEAL counts."""
    return 2**64 - 2 - (2**64 - 1) % q


def expanded(seed: bytes, chain: Chain, limbs: int) -> Words:
    """Return the polynomial of a seed with some primes, (limbs, N)."""
    total = chain.degree * limbs
    found = stream(seed, 0, total // BLOCK).reshape(limbs, chain.degree)
    rest = (word for block in itertools.count(total // BLOCK) for word in stream(seed, block, 1))
    for k in range(limbs):
        most = np.uint64(first_rejected(chain.primes[k]))
        for at in np.flatnonzero(found[k] >= most):
            while found[k, at] >= most:
                found[k, at] = next(rest)
    return reduced(found, chain.q[:limbs, None], chain.ratio[0, :limbs, None])
