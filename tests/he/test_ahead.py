"""What is encrypted with a zero made ahead: SEAL's words, each zero once, and nothing where there are too few."""

import numpy as np
import pytest

from refattn import UnsupportedProblem, he
from refattn.he import integers, wire
from refattn.he.ahead import PAD, Zeros, from_slots
from refattn.he.device.chain import chain_of
from refattn.he.device.format import read_ciphertext, whole
from refattn.he.seal import HEADER, NONE, encode, from_bytes, primes

from .make import planned, problem
from .relay import Relay

pytest.importorskip("tenseal")
X = problem(4, 4, 4, epsilon=1.0)
PLAN = planned(X)


@pytest.fixture(scope="module")
def client():
    return he.Client(PLAN)


@pytest.mark.parametrize(("whole", "compressed"), [(False, True), (False, False), (True, True)])
def test_a_ciphertext_is_its_zero_and_seals_plaintext(client, whole, compressed):
    ring, rng = PLAN.ring, np.random.default_rng(0)
    zeros = Zeros(client._encryptor, ring, whole, compressed)
    slots = [rng.standard_normal(ring.slots) + 1j * rng.standard_normal(ring.slots) for _ in range(3)]
    limbs = [4, 2, 4]
    for k in limbs:
        zeros.make(k)
    before = {k: [bytes(z[PAD:]) for z in zeros._made[k]] for k in limbs}
    jobs = list(zip(slots, limbs, strict=True))
    jobs[1] = from_slots(ring, slots[1]), 2  # or as coefficients
    for s, k, data in zip(slots, limbs, zeros.sealed(jobs), strict=True):
        zero = from_bytes("Ciphertext", ring, before[k].pop())
        found = from_bytes("Ciphertext", ring, data)  # SEAL takes it
        (a, c), (b, d) = (integers.words_of(ring, x) for x in (zero, found))
        plain = integers.words_of(ring, encode(client._encoder, s, ring, k))
        assert np.array_equal(b, integers.add(a, plain, primes(ring)[:k]))
        assert np.array_equal(c, d)
        assert found.scale == 2.0**ring.middle
    assert not zeros.count()


def test_a_zero_is_used_once(client):
    zeros = Zeros(client._encryptor, PLAN.ring, False, False)
    zeros.make(2)
    job = np.zeros(PLAN.ring.slots, np.complex128), 2
    assert zeros.sealed([job, job]) is None
    assert zeros.count() == {2: 1}  # those that are not enough are left
    assert len(zeros.sealed([job])) == 1
    assert zeros.sealed([job]) is None


def test_what_fails_takes_its_zero_along(client):
    zeros = Zeros(client._encryptor, PLAN.ring, False, False)
    zeros.make(2)

    with pytest.raises(ValueError, match="broadcast"):
        zeros.sealed([(np.zeros(3, np.complex128), 2)])
    assert not zeros.count()


def test_a_client_that_prepared(client):
    keys = client.evaluation_keys()
    client.prepare()
    client.prepare()  # there are enough
    assert client._zeros.count() == {6: 2, 4: 1}
    with he.Server(PLAN, keys) as server:
        for left in (0, 0):  # prepared, and not
            out = client.decrypt(server.attend(client.encrypt(X)))
            assert client._zeros.count().total() == left
            assert np.abs(out - he.reference(X)).max() <= PLAN.error


def test_an_encoders_client_prepares_for_all_its_messages():
    program, x = Relay(2), np.random.default_rng(0).standard_normal((3, 5)) / 4
    client = he.Client(program.plan, compressed=False)
    client.prepare()
    most = client._zeros.count().total()
    assert most == sum(len(program.plan.part_limbs(k)) for k in range(2))
    with he.Server(program, client.evaluation_keys()) as server:
        out = client.ask(x, server.attend)
    assert not client._zeros.count()
    # as in test_refresh.py
    noise = 200 * 45 * np.sqrt(8192) * 6 / 2**40
    assert np.abs(out - program.simulate(x)).max() <= noise + 200 * program.plan.refresh_error


def test_primes_that_are_too_large_are_refused(monkeypatch):
    client = he.Client(PLAN)
    monkeypatch.setattr(he.sessions, "primes", lambda ring: [2**58])
    with pytest.raises(UnsupportedProblem, match="a prime of more than 55 bits cannot be prepared for"):
        client.prepare()


@pytest.mark.parametrize("prepared", [False, True])
def test_what_is_sent_uncompressed_is_taken_as_well(client, prepared):
    plain = he.Client(PLAN, compressed=False)
    if prepared:
        plain.prepare()
    m = wire.unpack(plain.encrypt(X), wire.QUERY, PLAN.digest, 2**32)
    for part, limbs in zip(m.parts, PLAN.part_limbs(), strict=True):
        assert HEADER.unpack_from(part)[4] == NONE
        assert len(part) > 8 * limbs * PLAN.ring.degree
        received = read_ciphertext(part, chain_of(PLAN.ring), limbs, 2.0**PLAN.ring.middle, True)
        seal = integers.words_of(PLAN.ring, from_bytes("Ciphertext", PLAN.ring, part))
        assert np.array_equal(whole(received, chain_of(PLAN.ring)), seal)
