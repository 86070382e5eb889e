"""Whole polynomials: their slots in double-double, their words in SEAL's plaintexts, and the mask of a refresh."""

import mpmath
import numpy as np
import pytest

from refattn.errors import InvalidInput
from refattn.he import embedding, integers
from refattn.he.noise import Ring

RING = Ring(8192, 52, 40, 60, 1)


def whole(seed=0, degree=8192, bits=92):
    """Return Python integers of so many bits, and the same as a pair."""
    rng = np.random.default_rng(seed)
    p = [
        int(a) * 2**40 + int(b) >> (92 - bits) for a, b in zip(*rng.integers(-(2**51), 2**51, (2, degree)), strict=True)
    ]
    return p, as_pair(p)


def as_pair(p):
    high = [float(x) for x in p]
    return np.array(high), np.array([float(x - int(h)) for x, h in zip(p, high, strict=True)])


def exact(pair):
    return [int(a) + int(b) for a, b in zip(*pair, strict=True)]


def test_slots_are_values_at_roots():
    p, pair = whole(bits=92)
    z = embedding.slots(pair)
    norm = float(sum(x * x for x in p) * 4096) ** 0.5  # of all slots
    bound = embedding.error(8192)
    with mpmath.workprec(200):
        for j in (0, 1, 2, 77, 4095):
            root = mpmath.expjpi(mpmath.mpf(pow(3, j, 16384)) / 8192)
            value = mpmath.polyval([mpmath.mpf(x) for x in p[::-1]], root)
            found = mpmath.mpc(*(mpmath.mpf(float(x)) for x in (z[0][j].real, z[0][j].imag)))
            found += mpmath.mpc(*(mpmath.mpf(float(x)) for x in (z[1][j].real, z[1][j].imag)))
            assert abs(found - value) <= bound * norm
            assert abs(mpmath.mpc(complex(z[0][j])) - value) > bound * norm  # float64 is not enough


def test_coefficients_undo_slots():
    p, pair = whole(bits=92)
    assert exact(embedding.coefficients(embedding.slots(pair))) == p


def test_rounding_is_the_only_error_of_coefficients():
    """Of two encodings the difference is the encoding of the difference, but for a half each."""
    p, pair = whole(bits=92)
    q, _ = whole(1, bits=40)
    z = embedding.slots(pair)
    factor = 0.7
    sums = embedding.slots(as_pair([x + y for x, y in zip(p, q, strict=True)]))
    a, b = (exact(embedding.coefficients(embedding.scaled(x, factor))) for x in (sums, z))
    # 3 transforms and a product each, relative to numbers of 92 bits: below 2**-97.6·6·2**(91 + 6.5) in all
    slack = 6 * embedding.error(8192) * 2.0**91 * np.sqrt(8192)
    assert slack < 16
    for x, y, c in zip(a, b, q, strict=True):
        assert abs((x - y) - factor * c) <= 1 + slack
    assert max(abs((x - y) - factor * c) for x, y, c in zip(a, b, q, strict=True)) < 1.2


def test_what_slots_do_not_exceed():
    bound = embedding.spread(64, 2**20)
    rng = np.random.default_rng(0)
    largest = 0
    for _ in range(200):
        p = rng.integers(-(2**19), 2**19, 64).astype(float)
        largest = max(largest, np.abs(embedding.slots((p, 0 * p))[0]).max())
    assert bound / 6 < largest <= bound


def test_residues_and_back():
    moduli = [2**52 - 47, 2**40 - 87]
    p, pair = whole(bits=90)
    words = integers.residues(pair, [*moduli, 2**60 - 93])
    assert [[x % q for x in p] for q in [*moduli, 2**60 - 93]] == words.tolist()
    assert exact(integers.composed(words[:2], moduli)) == p


def test_composed_is_each_number_once():
    moduli = [5, 7]
    every = np.arange(35)
    found = exact(integers.composed(np.array([every % 5, every % 7], np.uint64), moduli))
    assert sorted(found) == list(range(-15, 20))
    assert [x % 35 for x in found] == every.tolist()


def test_a_mask_hides_all_and_wraps_as_often_as_is_said():
    """Enumerated: whatever the number, what is seen is uniform; the difference is wrong for abs(m) masks of Q."""
    moduli = [5, 7]
    every = np.arange(35)
    mask = np.array([every % 5, every % 7], np.uint64)
    of_mask = np.array(exact(integers.composed(mask, moduli)))
    for m in (-3, 0, 1, 6):
        value = np.array([[m % 5] * 35, [m % 7] * 35], np.uint64)
        seen = np.array(exact(integers.composed(integers.add(value, mask, moduli), moduli)))
        assert sorted(seen) == list(range(-15, 20))
        assert (seen - of_mask != m).sum() == abs(m)


def test_drawn_numbers_are_uniform():
    x = integers.drawn([5, 2**40 - 87], 2**15)
    counts = np.bincount(x[0].astype(int), minlength=5)
    # 4 degrees of freedom: above 60 has a chance of 3e-12
    assert ((counts - 2**15 / 5) ** 2).sum() / (2**15 / 5) < 60
    assert len(set(x[1].tolist())) > 2**15 - 10


@pytest.fixture(scope="module")
def keys():
    pytest.importorskip("tenseal")
    from refattn.he import seal

    s, made = seal.api(), seal.context(RING)
    generator = s.KeyGenerator(made)
    public, secret = s.PublicKey(), generator.secret_key()
    generator.create_public_key(public)
    return s.Encryptor(made, public, secret), s.Decryptor(made, secret)


def test_plaintexts_hold_the_numbers_exactly(keys):
    from refattn.he import seal

    encryptor, decryptor = keys
    p, pair = whole(bits=88)
    plain = seal.from_bytes("Plaintext", RING, integers.plaintext(RING, pair, 2, 2.0**40))
    assert exact(read(plain)) == p
    x, back = seal.api().Ciphertext(), seal.api().Plaintext()
    encryptor.encrypt_symmetric(plain, x)
    decryptor.decrypt(x, back)
    found = exact(read(back))
    assert 0 < max(abs(a - b) for a, b in zip(found, p, strict=True)) <= 21  # SEAL's errors


def read(plain, less=None):
    """Return a plaintext's coefficients, less those of a mask."""
    from refattn.he import seal

    moduli = seal.primes(RING)[:2]
    words = integers.words_of(RING, plain)
    if less is not None:
        words = integers.add(words, np.array(moduli, np.uint64)[:, None] - less, moduli)
    return integers.composed(integers.transformed(RING, words, False), moduli)


def test_a_flooded_ciphertext_decrypts_to_value_and_mask(keys):
    from refattn.he import seal

    encryptor, decryptor = keys
    p, pair = whole(bits=40)
    plain = seal.from_bytes("Plaintext", RING, integers.plaintext(RING, pair, 2, 2.0**40))
    x, back = seal.api().Ciphertext(), seal.api().Plaintext()
    encryptor.encrypt_symmetric(plain, x)
    zero = integers.seeded(RING, seal.to_bytes(encryptor.encrypt_zero_symmetric(seal.level(RING, 2))), 2)
    moduli = seal.primes(RING)[:2]
    mask = integers.drawn(moduli, RING.degree)
    one, two = (integers.flooded(RING, x, zero, mask) for _ in range(2))
    decryptor.decrypt(one, back)
    found = exact(read(back, mask))
    # errors times ternary polynomials: of 8192 terms of 21 at most, near 40·sqrt(8192)
    assert max(abs(a - b) for a, b in zip(found, p, strict=True)) < 2**15
    a, b, c = (integers.words_of(RING, y)[1] for y in (x, one, two))  # the second polynomial is another each time
    assert max((a == b).mean(), (b == c).mean(), (a == c).mean()) < 0.001


def test_an_encryption_of_zero_comes_from_a_seed(keys):
    from refattn.he import seal

    encryptor, _ = keys
    chosen = seal.api().Ciphertext()
    encryptor.encrypt_zero_symmetric(seal.level(RING, 2), chosen)
    good = seal.to_bytes(encryptor.encrypt_zero_symmetric(seal.level(RING, 2)))
    integers.seeded(RING, good, 2)
    for bad in (seal.to_bytes(chosen), b"", b"x" * 5, good[:-9], good[:16], bytes(1000), b"x" * 1000):
        with pytest.raises(InvalidInput, match=r"^he: "):
            integers.seeded(RING, bad, 2)
    with pytest.raises(InvalidInput, match="not made from a seed"):
        integers.seeded(RING, seal.to_bytes(chosen), 2)
