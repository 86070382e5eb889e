"""SEAL's bytes: read and written as SEAL does, and everything that it refuses is refused, with what a plan says."""

import re
import struct

import numpy as np
import pytest

from refattn import InvalidInput
from refattn.he import seal
from refattn.he.device.format import ciphertext_bytes, read_ciphertext, read_keys, whole

from ..forge import body, saved_as
from .exchange import SMALL, setup

pytest.importorskip("tenseal")
SCALE = 2.0**SMALL.middle
WORDS = 73 + 16 + 8  # where a ciphertext's words begin in its body


@pytest.fixture(scope="module")
def saved():
    """Return a ciphertext's bytes: compressed with a seed, and whole."""
    s = setup()
    plain = seal.encode(s.encoder, np.ones(SMALL.slots, complex), SMALL, 3)
    seeded = seal.to_bytes(s.encryptor.encrypt_symmetric(plain))
    return {True: seeded, False: seal.whole_bytes(s.encryptor, plain)}


def read(data, seeded, limbs=3, scale=SCALE):
    return read_ciphertext(data, setup().chain, limbs, scale, seeded)


@pytest.mark.parametrize("seeded", [True, False])
def test_words_are_seals(saved, seeded):
    s = setup()
    loaded = seal.from_bytes("Ciphertext", SMALL, saved[seeded])
    words = whole(read(saved[seeded], seeded), s.chain)
    assert np.array_equal(words, s.words(loaded))
    written = ciphertext_bytes(words, s.chain, SCALE)
    again = seal.from_bytes("Ciphertext", SMALL, written)
    assert np.array_equal(s.words(again), words)
    assert again.scale == SCALE
    assert body(seal.to_bytes(again)) == body(written)


@pytest.mark.parametrize("name", ["RelinKeys", "GaloisKeys"])
def test_keys_are_seals_too_where_they_are_whole(name):
    s = setup()
    seeded = read_keys(name, s.saved[name], s.chain, s.indices[name])
    assert all(x.seed for digits in seeded.values() for x in digits)
    again = seal.to_bytes(seal.from_bytes(name, SMALL, s.saved[name]))  # SEAL writes both polynomials
    found = read_keys(name, again, s.chain, s.indices[name])
    assert not any(x.seed for digits in found.values() for x in digits)
    for i, digits in seeded.items():
        for a, b in zip(digits, found[i], strict=True):
            assert np.array_equal(whole(a, s.chain), b.words)


def put(at, form, value):
    def change(data):
        made = bytearray(data)
        struct.pack_into(form, made, at, value)
        return bytes(made)

    return change


def prime(k):
    return setup().chain.primes[k]


FIELDS = {
    "its level": put(0, "<B", 7),
    "form for products: got 0": put(32, "<B", 0),
    "form for products: got 2": put(32, "<B", 2),
    "polynomials: got 3": put(33, "<Q", 3),
    "polynomials: got 1": put(33, "<Q", 1),
    "polynomials: got 18446744073709551615": put(33, "<Q", 2**64 - 1),
    "coefficients: got 16384": put(41, "<Q", 16384),
    "primes: got 2": put(49, "<Q", 2),
    "scale: got 1.0": put(57, "<d", 1.0),
    "scale: got nan": put(57, "<d", float("nan")),
    "scale: got inf": put(57, "<d", float("inf")),
    "scale: got -": put(57, "<d", -SCALE),
    "its factor: got 2": put(65, "<Q", 2),
    "its magic number": put(73, "<H", 0xA15D),
    "its header's size": put(75, "<B", 17),
    "its version is 3.4": put(76, "<H", 0x0403),
    "its version is 4.4": put(76, "<H", 0x0404),
    "its version is 5.0": put(76, "<H", 0x0005),
    "the compression of a part": put(78, "<B", 1),
    "what its header has left": put(79, "<H", 1),
    "the size of a part": put(81, "<Q", 24),
    "it says that it has 3 bytes": put(81, "<Q", 3),
    "its words: got 5": put(89, "<Q", 5),
    "a word is not below its prime": put(WORDS, "<Q", 2**64 - 1),
}


@pytest.mark.parametrize("text", FIELDS)
@pytest.mark.parametrize("seeded", [True, False])
def test_each_field_is_checked(saved, text, seeded):
    changed = saved_as(saved[seeded], FIELDS[text](body(saved[seeded])))
    with pytest.raises(InvalidInput, match=f"no Ciphertext of this plan: .*{re.escape(text)}"):
        read(changed, seeded)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_least_word_that_is_too_large(saved, k):
    data = body(saved[False])
    for polynomial in (0, 1):
        at = WORDS + 8 * ((polynomial * 3 + k + 1) * SMALL.degree - 1)  # the last of its limb
        read(saved_as(saved[False], put(at, "<Q", prime(k) - 1)(data)), False)
        with pytest.raises(InvalidInput, match="a word is not below its prime"):
            read(saved_as(saved[False], put(at, "<Q", prime(k))(data)), False)


OTHER = {
    "no header": (lambda x: x[:10], "16 bytes are expected where 10 are left"),
    "nothing": (lambda x: b"", "16 bytes are expected where 0 are left"),
    "cut short": (lambda x: x[:-1], "its size"),
    "longer": (lambda x: x + b"0", "its size"),
    "another compression": (put(5, "<B", 1), "its compression: got 1, expected 0 or 2"),
    "compressed that is not": (put(5, "<B", 2), "what is compressed is damaged|its body's size"),
    "another generator": (lambda x: saved_as(x, put(len(body(x)) - 65, "<B", 2)(body(x))), "its generator: got 2"),
    "no generator": (lambda x: saved_as(x, put(len(body(x)) - 65, "<B", 0)(body(x))), "its generator: got 0"),
    "more inside": (lambda x: saved_as(x, body(x) + bytes(8)), "its body's size"),
    "less inside": (lambda x: saved_as(x, body(x)[:-8]), "its body's size"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_bytes_are_refused(saved, name):
    change, text = OTHER[name]
    source = saved[False] if name.startswith("compressed") else saved[True]
    with pytest.raises(InvalidInput, match=f"no Ciphertext of this plan: .*({text})"):
        read(change(source), not name.startswith("compressed"))


def test_a_frame_that_holds_something_else_is_given_up(saved):
    package, inside = seal.zstandard(), body(saved[True])
    head, frame = seal.HEADER.unpack_from(saved[True]), package.compress(inside)
    untold = package.ZstdCompressor(write_content_size=False).compress(inside)
    for data, text in (
        (package.compress(bytes(10**8)), "its body's size: got 100000000"),
        (untold, "its body's size: got -1"),
        (frame[:5], "what is compressed is damaged|its body's size: got -1"),
        (frame + b"1", "what is compressed is damaged"),
        (frame * 2, "what is compressed is damaged"),
        (frame[:-9], "what is compressed is damaged"),
    ):
        made = seal.HEADER.pack(*head[:-1], seal.HEADER.size + len(data)) + data
        with pytest.raises(InvalidInput, match=text):
            read(made, True)


def test_the_form_of_the_plan_is_demanded(saved):
    for data in saved.values():
        with pytest.raises(InvalidInput, match="its body's size"):
            read(data, data is not saved[True])
    with pytest.raises(InvalidInput, match="its body's size"):
        read(saved[True], True, limbs=2)
    with pytest.raises(InvalidInput, match="scale: got"):
        read(saved[True], True, scale=SCALE * (1 + 2**-52))


def test_a_transparent_ciphertext_is_refused(saved):
    data = bytearray(body(saved[False]))
    data[WORDS + 8 * 3 * SMALL.degree :] = bytes(8 * 3 * SMALL.degree)
    with pytest.raises(InvalidInput, match="its second polynomial is zero"):
        read(saved_as(saved[False], bytes(data)), False)
    data[-8] = 1
    read(saved_as(saved[False], bytes(data)), False)


def test_what_seal_refuses_is_refused(saved):
    """Bytes of what is said about the words are changed: SEAL may take some that are refused here, not others."""
    rng, taken = np.random.default_rng(0), 0
    places = [*range(WORDS), *range(len(body(saved[True])) - 81, len(body(saved[True])) - 64)]
    for _ in range(150):
        data = bytearray(body(saved[True]))
        at = int(rng.choice(places))
        data[at] ^= int(rng.integers(1, 256))
        changed = saved_as(saved[True], bytes(data))
        try:
            seal.from_bytes("Ciphertext", SMALL, changed)
        except InvalidInput:
            with pytest.raises(InvalidInput):
                read(changed, True)
        else:
            taken += 1
    assert taken < 150


KEYS = {
    "its level": put(0, "<B", 1),
    "its number of keys: got 2": put(32, "<Q", 2),
    "the digits of key 0: got 1": put(40, "<Q", 1),
    "the digits of key 0: got 0": put(40, "<Q", 0),
    "its magic number": put(48, "<H", 1),
    "the size of a part": put(56, "<Q", 100),
    "polynomials: got 3": put(48 + 16 + 33, "<Q", 3),
    "primes: got 2": put(48 + 16 + 49, "<Q", 2),
    "scale: got 2.0": put(48 + 16 + 57, "<d", 2.0),
    "a word is not below its prime": put(48 + 16 + WORDS, "<Q", 2**63),
}


@pytest.mark.parametrize("text", KEYS)
def test_keys_are_checked(text):
    s = setup()
    saved = s.saved["RelinKeys"]
    with pytest.raises(InvalidInput, match=f"no RelinKeys of this plan: .*{re.escape(text)}"):
        read_keys("RelinKeys", saved_as(saved, KEYS[text](body(saved))), s.chain, [0])


def test_keys_must_be_those_of_the_plan():
    s = setup()
    for name, other in (("RelinKeys", "GaloisKeys"), ("GaloisKeys", "RelinKeys")):
        with pytest.raises(InvalidInput, match="its body's size"):
            read_keys(name, s.saved[other], s.chain, s.indices[name])
    with pytest.raises(InvalidInput, match="its body's size"):
        read_keys("GaloisKeys", s.saved["GaloisKeys"], s.chain, s.indices["GaloisKeys"][1:])
    wrong = [s.indices["GaloisKeys"][0] + 1, *s.indices["GaloisKeys"][1:]]
    with pytest.raises(InvalidInput, match="the digits of key"):
        read_keys("GaloisKeys", s.saved["GaloisKeys"], s.chain, wrong)
