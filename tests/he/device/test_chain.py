"""Primes and names of levels are SEAL's; tables are what they are said to be."""

import numpy as np
import pytest

from refattn import UnsupportedProblem
from refattn.he.device.chain import _primes, chain_of, is_prime, level_name
from refattn.he.device.words import Evaluator
from refattn.he.noise import Ring

RINGS = [
    Ring(8192, 43, 30, 60, 3), Ring(8192, 60, 30, 60, 2), Ring(8192, 34, 31, 60, 4), Ring(8192, 60, 60, 60, 1),
    Ring(16384, 53, 48, 60, 5), Ring(16384, 48, 48, 60, 6), Ring(32768, 53, 45, 60, 12),
]  # fmt: skip


@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_primes_and_names_are_seals(ring):
    seal = pytest.importorskip("tenseal.sealapi")
    from refattn.he.seal import context

    assert seal
    made = context(ring)
    primes = [int(x.value()) for x in made.key_context_data().parms().coeff_modulus()]
    assert _primes(ring) == primes
    data, limbs = made.first_context_data(), len(primes) - 1
    assert np.array(made.key_parms_id(), np.uint64).tobytes() == level_name(ring.degree, primes)
    while data is not None:
        assert np.array(data.parms_id(), np.uint64).tobytes() == level_name(ring.degree, primes[:limbs])
        data, limbs = data.next_context_data(), limbs - 1
    assert limbs == 0


def test_primality():
    sieve = [n for n in range(2, 3000) if all(n % k for k in range(2, int(n**0.5) + 1))]
    assert [n for n in range(3000) if is_prime(n)] == sieve
    assert not is_prime(3215031751)  # a strong pseudoprime to 2, 3, 5 and 7
    assert not is_prime((2**31 - 1) * (2**31 - 1))
    assert is_prime(2**61 - 1)


def test_too_few_primes_are_told():
    with pytest.raises(UnsupportedProblem, match="too few primes of 15 bits for degree 8192"):
        _primes(Ring(8192, 15, 15, 60, 3))


def test_tables():
    chain = chain_of(RINGS[0])
    for k, q in enumerate(chain.primes):
        root = int(chain.roots[k, chain.degree // 2, 0])
        assert pow(root, chain.degree, q) == q - 1
        for at, power in (
            (0, 0),
            (1, chain.degree // 2),
            (3, 3 * chain.degree // 4),
            (chain.degree - 1, chain.degree - 1),
        ):
            for table, x in ((chain.roots, root), (chain.inverse_roots, pow(root, -1, q))):
                w = pow(x, power, q)
                assert tuple(map(int, table[k, at])) == (w, (w << 64) // q)
        shifted = chain.roots[k, :, 0].astype(object) * 2**64 // q
        assert (shifted == chain.roots[k, :, 1].astype(object)).all()
        w, w_shifted = map(int, chain.scale_back[k])
        assert w * chain.degree % q == 1
        assert w_shifted == (w << 64) // q
    p, q = chain.primes[-1], chain.primes[1]
    inverse, shifted, fix = map(int, chain.dropping[-1, 1])
    assert inverse * p % q == 1
    assert shifted == (inverse << 64) // q
    assert (fix + p // 2) % q == 0
    assert 0 < fix <= q


def test_the_root_is_the_least_one():
    chain = chain_of(RINGS[0])
    q, n = chain.primes[1], chain.degree
    root = int(chain.roots[1, n // 2, 0])
    assert root == min(pow(root, k, q) for k in range(1, 2 * n, 2))


def test_a_permutation_is_a_substitution():
    chain, element = chain_of(RINGS[0]), 3**7 % (2 * 8192)
    evaluator, n, q = Evaluator(chain), chain.degree, chain.primes[0]
    x = np.random.default_rng(0).integers(0, q, (1, n), dtype=np.uint64)
    moved = np.zeros_like(x)
    for i in range(n):  # x**i goes to x**(i·element), and x**n is -1
        to = i * element % (2 * n)
        moved[0, to % n] = x[0, i] if to < n else (q - int(x[0, i])) % q
    points = evaluator.forward(x, [0])[:, chain.permutation(element)]
    assert np.array_equal(points, evaluator.forward(moved, [0]))
