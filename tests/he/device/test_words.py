"""Every operation at every level of a small ring: the words that SEAL gives."""

import numpy as np
import pytest

from refattn import UnsupportedProblem
from refattn.he.device.chain import Chain, chain_of
from refattn.he.device.words import Evaluator
from refattn.he.linear import Plain as Slots

from .every import RINGS
from .exchange import SMALL, setup

pytest.importorskip("tenseal")


def operations(m, evaluator, keys, a, b, elements):
    """Return operations by name: by SEAL's arithmetic and on words."""
    turn, conjugate = elements
    return {
        "add": (lambda x, y: m.add(x, y), lambda x, y: evaluator.add(x, y)),
        "negate": (lambda x, y: m.negate(x), lambda x, y: evaluator.negate(x)),
        "rotate": (lambda x, y: m.rotate(x, 5), lambda x, y: evaluator.galois(x, turn, keys[turn])),
        "conjugate": (lambda x, y: m.conjugate(x), lambda x, y: evaluator.galois(x, conjugate, keys[conjugate])),
        "multiply": (lambda x, y: m.mul(x, y), lambda x, y: evaluator.dot([x], [y])),
        "square": (lambda x, y: m.square(x), lambda x, y: evaluator.dot([x], [x])),
    }


@pytest.mark.parametrize("limbs", [1, 2, 3])
def test_operations(limbs):
    s = setup()
    evaluator, m = Evaluator(s.chain), s.seal
    a, b = s.encrypted(limbs, limbs), s.encrypted(-limbs + 10, limbs)
    x, y = s.words(a), s.words(b)
    elements = pow(3, 5, 2 * SMALL.degree), 2 * SMALL.degree - 1
    for name, (theirs, ours) in operations(m, evaluator, s.keys, a, b, elements).items():
        if limbs > 1 or name not in ("multiply", "square"):  # SEAL refuses scales that do not fit
            assert np.array_equal(ours(x, y), s.words(theirs(a, b))), name
    if limbs == 1:
        return
    product = m.mul(a, b)
    words = evaluator.dot([x], [y])
    assert np.array_equal(evaluator.rescale(words), s.words(m.rescale(product)))
    product, words = m.relinearize(product), evaluator.relinearize(words, s.keys[0])
    assert np.array_equal(words, s.words(product))
    assert np.array_equal(evaluator.rescale(words), s.words(m.rescale(product)))
    total = evaluator.dot([x, y, x], [y, y, x])
    theirs = m.dot([a, b, a], [b, b, a])
    assert np.array_equal(evaluator.rescale(evaluator.relinearize(total, s.keys[0])), s.words(theirs))


def test_the_transform_by_its_definition():
    """Points are values at odd powers of the root, in bit-reversed order: a small ring's, by a sum of powers."""
    chain = Chain(8, [97, 113])
    evaluator = Evaluator(chain)
    x = np.arange(1, 17, dtype=np.uint64).reshape(2, 8)
    found = evaluator.forward(x, [0, 1])
    for k, q in enumerate(chain.primes):
        root = int(chain.roots[k, 4, 0])
        points = [pow(root, 2 * int(f"{i:03b}"[::-1], 2) + 1, q) for i in range(8)]
        assert found[k].tolist() == [sum(int(c) * pow(p, i, q) for i, c in enumerate(x[k])) % q for p in points]
    assert np.array_equal(evaluator.inverse(found, [0, 1]), x)


def test_a_negative_zero_is_zero():
    chain = chain_of(SMALL)
    assert not Evaluator(chain).negate(np.zeros((2, 1, 8), np.uint64)).any()


def test_plaintexts_are_encoded_as_seal_does():
    from refattn.he.device.encode import encoded
    from refattn.he.device.trace import Plain

    s = setup()
    rng = np.random.default_rng(2)
    slots = Slots(rng.standard_normal(SMALL.slots) + 1j * rng.standard_normal(SMALL.slots))
    a = s.encrypted(3, 3)
    evaluator = Evaluator(s.chain)
    words = encoded(Plain(slots, 3, a.scale), SMALL)
    assert np.array_equal(evaluator.times(s.words(a), words), s.words(s.seal.times(a, slots)))
    assert np.array_equal(evaluator.plus(s.words(a), words), s.words(s.seal.plus(a, slots)))
    b = s.seal.times(a, slots)  # a scale of 60 bits
    words = encoded(Plain(slots, 3, b.scale), SMALL)
    assert np.array_equal(evaluator.plus(s.words(b), words), s.words(s.seal.plus(b, slots)))


def test_whole_numbers_have_both_words_and_a_sign():
    """By Python's integers, of coefficients of 64 bits and more; past 127 they are refused."""
    from refattn.he.device.encode import _coefficients, whole_numbers
    from refattn.he.device.trace import Plain

    ring = RINGS[32768]
    slots = np.zeros(ring.slots, complex)
    slots[:9] = np.arange(1, 10) - 3j
    for scale in (2.0**30, 2.0**90, 2.0**120):
        lower, upper = whole_numbers(Plain(Slots(slots), 4, scale), ring)
        both = zip(lower, upper, strict=True)
        found = [(-1 if int(u) >> 63 else 1) * (int(u) % 2**63 << 64 | int(v)) for v, u in both]
        exact = _coefficients(slots, ring.degree, scale / ring.degree)
        assert found == [round(abs(x)) * (-1 if x < 0 else 1) for x in map(float, exact)]
        assert min(found) < 0 < max(found)
    with pytest.raises(UnsupportedProblem, match=r"numbers of a scale of 1.3938e\+42 do not fit 127 bits"):
        whole_numbers(Plain(Slots(slots), 4, 2.0**140), ring)
    with pytest.raises(UnsupportedProblem, match=r"numbers of a scale of 1.32923e\+36 do not fit 2 primes"):
        whole_numbers(Plain(Slots(slots), 2, 2.0**120), ring)
