"""Modular arithmetic on words against Python's integers, at the ends of ranges and between."""

import numpy as np
import pytest

from refattn.he.device.modular import below, high, reduced, reduced_wide, scaled

PRIMES = (2**60 - 2**14 + 1, 1152921504606584833, 2**30 - 35, 65537)
ENDS = [0, 1, 2, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]


def drawn(*more):
    rng = np.random.default_rng(1)
    return np.concatenate([np.array([*ENDS, *more], np.uint64), rng.integers(0, 2**64, 300, dtype=np.uint64)])


def test_the_upper_word_of_products():
    a = drawn()
    b = a[::-1].copy()
    assert [int(x) for x in high(a[:, None], b[None])[:, 3]] == [int(x) * int(b[3]) >> 64 for x in a]
    assert high(a, b).tolist() == [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("q", PRIMES)
def test_residues(q):
    ratio, word = (1 << 128) // q, np.uint64
    parts = (word(ratio >> 64), word(ratio % 2**64))
    a = drawn(q - 1, q, q + 1, 2 * q - 1)
    b = np.roll(a, 7)
    assert reduced(a, word(q), parts[0]).tolist() == [int(x) % q for x in a]
    wide = [((int(x) << 64) + int(y)) % q for x, y in zip(a, b, strict=True)]
    assert reduced_wide(a, b, word(q), parts).tolist() == wide
    small = a % word(2 * q)
    assert below(small, word(q)).tolist() == [int(x) % q for x in small]
    for w in (0, 1, q - 1, q // 3):
        found = scaled(a, word(w), word((w << 64) // q), word(q))
        assert (found < 2 * q).all()
        assert [int(x) % q for x in found] == [int(x) * w % q for x in a]
