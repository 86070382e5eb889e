"""Expanded seeds: the stream by hashlib, and what SEAL expands, also where words are left out."""

import hashlib
import struct

import numpy as np
import pytest

from refattn.he.device.chain import Chain, is_prime
from refattn.he.device.seeds import START, _compressed, expanded, first_rejected, stream

from ..forge import body

SEED = bytes(range(64))


def test_the_compression_is_blake2bs():
    message = bytes(range(200)) + bytes(56)  # two blocks, of which 200 bytes count
    state = [np.array([x], np.uint64) for x in START]
    state[0] = state[0] ^ np.uint64(64 | 1 << 16 | 1 << 24)
    for taken, last in ((128, False), (200, True)):
        block = message[128 * last : 128 * last + 128]
        state = _compressed(state, [np.array([x], np.uint64) for x in struct.unpack("<16Q", block)], taken, last)
    assert np.concatenate(state).tobytes() == hashlib.blake2b(message[:200]).digest()


def test_a_stream_may_be_read_from_anywhere():
    whole = stream(SEED, 0, 5)
    assert np.array_equal(stream(SEED, 3, 2), whole[3 * 512 :])
    assert len(set(whole.tolist())) == len(whole)


def rejecting():
    """Return primes for which many words are left out: between a power of two and the next."""
    found = []
    for start in (2**59 + 2**58, 2**60 // 5 * 4, 2**59 + 2**57):
        q = start // 16384 * 16384 + 1
        while not is_prime(q):
            q += 16384
        found.append(q)
    return found


def test_what_is_left_out_is_replaced_in_seals_order(tmp_path):
    s = pytest.importorskip("tenseal.sealapi")
    from refattn.he.seal import to_bytes

    primes = rejecting()
    given = s.EncryptionParameters(s.SCHEME_TYPE.CKKS)
    given.set_poly_modulus_degree(8192)
    given.set_coeff_modulus([s.Modulus(q) for q in primes])
    made = s.SEALContext(given, True, s.SEC_LEVEL_TYPE.NONE)
    generator, public, plain, loaded = s.KeyGenerator(made), s.PublicKey(), s.Plaintext(), s.Ciphertext()
    generator.create_public_key(public)
    s.CKKSEncoder(made).encode(0.5, 2.0**40, plain)
    saved = to_bytes(s.Encryptor(made, public, generator.secret_key()).encrypt_symmetric(plain))
    (tmp_path / "x").write_bytes(saved)
    loaded.load(made, str(tmp_path / "x"))
    chain, size = Chain(8192, primes), 8 * 2 * 8192
    seed = body(saved)[-64:]
    theirs = np.frombuffer(body(to_bytes(loaded))[-size:], np.uint64).reshape(2, 8192)
    most = [np.uint64(first_rejected(q)) for q in primes[:2]]
    words = stream(seed, 0, 2 * 8192 // 512).reshape(2, 8192)
    assert sum(int((w >= m).sum()) for w, m in zip(words, most, strict=True)) > 100
    assert np.array_equal(expanded(seed, chain, 2), theirs)


def test_the_first_word_that_is_left_out():
    # SEAL: words below 2**64 - 1 less that modulo q, less one more
    assert first_rejected(5) == 2**64 - 2
    assert first_rejected(7) == 2**64 - 1 - (2**64 - 1) % 7 - 1
