"""Transforms in NumPy beside SEAL's stages one by one, and beside Python's whole numbers."""

import numpy as np
import pytest

from refattn.he.device.chain import chain_of
from refattn.he.device.words import Evaluator
from refattn.he.noise import Ring
from refattn.he.transform import LARGE, MOST, forward, remainders

RINGS = [Ring(8192, 54, 40, 60, 2), Ring(4096, 49, 48, 60, 5), Ring(32768, 52, 40, 60, 1)]


@pytest.mark.parametrize("ring", RINGS, ids=lambda r: f"{r.degree}, {r.first} bits")
def test_words_are_seals(ring):
    chain, limbs = chain_of(ring), ring.levels + 1
    q, rng = np.array(chain.primes[:limbs])[:, None], np.random.default_rng(0)
    x = rng.integers(-q, q + 1, (limbs, ring.degree))
    x[:, :64] = q  # the ends of what it takes
    x[:, -64:] = -q
    most = np.where(rng.random((limbs, ring.degree)) < 0.5, q, -q)
    for words in (x, most):
        expected = Evaluator(chain).forward((words % q).astype(np.uint64), range(limbs))
        assert np.array_equal(forward(words, ring), expected)


def test_the_largest_primes_that_are_taken():
    """Of 55 bits, all ways through: it is the size of words after 15 stages that counts."""
    ring = Ring(32768, 55, 48, 60, 1)
    chain = chain_of(ring)
    assert LARGE < MOST // 2 < chain.primes[0] < MOST
    assert chain.primes[1] <= LARGE
    q = np.array(chain.primes[:2])[:, None]
    words = np.random.default_rng(1).integers(-q, q + 1, (2, ring.degree))
    expected = Evaluator(chain).forward((words % q).astype(np.uint64), range(2))
    assert np.array_equal(forward(words, ring), expected)


def test_remainders_are_those_of_whole_numbers():
    ring, rng = Ring(4096, 54, 40, 60, 2), np.random.default_rng(2)
    high = np.rint(rng.uniform(-1, 1, 4096) * 2.0 ** rng.integers(0, 112, 4096))
    high[:4] = 2.0**112 * (1 - 2.0**-53), -(2.0**112) * (1 - 2.0**-53), 2.0**60, -(2.0**60)
    low = rng.integers(-(2**53), 2**53, 4096) * 2.0**6
    primes = chain_of(ring).primes[:3]
    found = remainders((high, low), ring, 3)
    for k, q in enumerate(primes):
        assert [int(a) % q for a in found[k]] == [(int(h) + int(s)) % q for h, s in zip(high, low, strict=True)]
        assert np.abs(found[k]).max() <= q
