"""Encoders on a device that is emulated: messages are SEAL's, masks are used once, and nothing of them is left."""

import os
import re

import numpy as np
import pytest

from refattn import InvalidInput, he
from refattn.he import refresh, sessions, wire
from refattn.he.device import masks
from refattn.he.device.chain import chain_of
from refattn.he.device.session import ROOM, bytes_of
from refattn.he.device.words import Evaluator
from refattn.he.embedding import scaled
from refattn.he.integers import residues, wide
from refattn.he.seal import from_bytes, to_bytes

from .. import forge
from ..relay import RING, Relay
from ..test_refresh import ANSWERS, MOST, X, masked_words
from .emulated import GXX, Emulated
from .gate import same
from .rounds import renamed, same_rounds

pytest.importorskip("tenseal")
pytestmark = GXX


class Devices(list):
    """The devices that servers were given."""


@pytest.fixture(scope="module")
def devices(folder):
    made = Devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "Card", lambda degree: made.append(Emulated(degree, folder)) or made[-1])
        yield made


@pytest.fixture(scope="module")
def session(devices):
    program = Relay()
    client = he.Client(program.plan)
    keys = client.evaluation_keys()
    with he.Server(program, keys, device="cuda") as server:
        yield program, client, keys, server


def asked(session):
    """Return a query's masked result, and the client's answer."""
    _, client, _, server = session
    masked = server.attend(client.encrypt(X))
    return masked, client.refresh(masked)


@pytest.mark.parametrize("program", [Relay(3), Relay(2, "whole", 2)], ids=["three", "whole, parts"])
def test_messages_are_seals(devices, program):
    found, out = same_rounds(program, X)
    assert found == [True] * program.plan.rounds
    assert np.abs(out - program.simulate(X)).max() < 1e-5
    assert devices[-1].ended
    assert devices[-1].whole  # nobody wrote beside what was given out


def off_by_one(z):
    found = wide(z)
    found[0, 7] ^= 1
    return found


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("wide", off_by_one, [True, False]),
        ("scaled", lambda z, factor: scaled(z, 2 * factor), [True, False]),
        ("add", lambda a, b, moduli: a, [False, True]),  # nothing is added to a result
    ],
)
def test_wrong_masks_are_seen(devices, monkeypatch, name, value, expected):
    monkeypatch.setattr(masks, name, value)
    found, out = same_rounds(Relay(), X)
    assert found == expected
    assert (np.abs(out - Relay().simulate(X)).max() > 1) == (name == "scaled")  # one in 2**40 is below the noise


def test_blocks_share_keys_and_memory(devices, session):
    worker = session[3]._worker
    assert len(worker.schedules) == 2
    device = next(x for x in devices if x is worker.device)
    assert sum(x.nbytes - 512 for x in device.given) <= bytes_of(*worker.schedules) + ROOM
    both, each = bytes_of(*worker.schedules), [bytes_of(x) for x in worker.schedules]
    assert max(each) <= both < sum(each)


def test_later_blocks_are_the_executors(folder):
    """Masks of 112 bits and both signs, ciphertexts and keys that are drawn."""
    device = Emulated(8192, folder, order=1)
    assert same(Relay(), device)
    assert device.whole


def test_whole_numbers_are_their_residues():
    """By Python's integers, and as the CPU's server has them: both signs, and every size that a mask may have."""
    rng = np.random.default_rng(0)
    size = 2.0 ** rng.integers(0, 112, 8192)
    high = np.rint(rng.standard_normal(8192).clip(-1, 1) * size)
    low = np.rint(rng.uniform(-1, 1, 8192) * np.minimum(2.0**59, np.spacing(high) / 2))
    high[:6], low[:6] = [0, 0, -(2.0**64), 2.0**64, -(2.0**111), 0], [0, -1, 1, -1, 2.0**59, 2.0**59]
    words = wide((high, low))
    exact = [int(a) + int(b) for a, b in zip(high, low, strict=True)]
    found = [(-1 if int(u) >> 63 else 1) * ((int(u) % 2**63 << 64) + int(v)) for v, u in words.T]
    assert found == exact
    chain, moduli = chain_of(RING), chain_of(RING).primes[:3]
    back = Evaluator(chain).inverse(Evaluator(chain).transformed(words, 3), range(3))
    assert np.array_equal(back, residues((high, low), moduli))
    assert [[int(x) for x in row[:64]] for row in back] == [[x % q for x in exact[:64]] for q in moduli]


def test_queries_that_wait_keep_their_masks(session):
    """Two at a time, answered the other way round, each with its own numbers."""
    program, client, _, server = session
    first, second = (server.attend(client.encrypt(x)) for x in (X, X / 2))
    late, early = client.refresh(first), client.refresh(second)
    for answer, x in ((early, X / 2), (late, X)):
        assert np.abs(client.decrypt(server.attend(answer)) - program.simulate(x)).max() < 1e-5


def test_an_answer_to_another_result_is_no_result(session):
    """Masks of two results differ: an answer under the other's name gives random numbers."""
    program, client, _, server = session
    (a, fresh), (b, _) = asked(session), asked(session)
    reply = server.attend(renamed(program.plan, fresh, b))
    m = wire.unpack(reply, wire.REPLY, program.plan.digest, MOST)
    waits = wire.unpack(a, wire.MASKED, program.plan.digest, MOST).query
    out = client.decrypt(wire.pack(wire.Message(m.kind, m.plan, m.client, waits, m.parts)))
    assert np.abs(out - program.simulate(X)).max() > 1


def test_each_mask_is_used_once(session):
    _, client, _, server = session
    _, answer = asked(session)
    reply = server.attend(answer)
    with pytest.raises(InvalidInput, match="got an answer to no masked result that waits for one"):
        server.attend(answer)
    assert client.decrypt(reply).shape == (3, 5)


def test_what_a_client_sees_is_uniform_and_another_each_time(session):
    program, client, _, server = session
    query = client.encrypt(X)
    one, two = (server.attend(query) for _ in range(2))
    size = chain_of(RING).primes[0] * chain_of(RING).primes[1]
    for masked in (one, two):
        found = np.concatenate([h for h, _ in masked_words(client, masked, program.plan)])
        counts, _ = np.histogram(found / size, 64, (-0.5 - 2**-30, 0.5 + 2**-30))
        # 63 degrees of freedom: above 200 has a chance below 1e-15
        assert ((counts - len(found) / 64) ** 2).sum() / (len(found) / 64) < 200
    a, b = (wire.unpack(x, wire.MASKED, program.plan.digest, MOST).parts for x in (one, two))
    for x, y in zip(a[1:], b[1:], strict=True):
        u, v = (np.frombuffer(forge.body(bytes(z))[97:], np.uint64) for z in (x, y))
        assert (u == v).mean() < 1e-3  # of the second polynomial, too


@pytest.mark.parametrize("name", [n for n in ANSWERS if not n.startswith("another")])
def test_an_answer_of_another_structure_is_refused(session, name):
    program, _, _, server = session
    _, answer = asked(session)
    change, text = ANSWERS[name]
    bad = forge.repacked(answer, wire.FRESH, program.plan, change(forge.parts_of(answer, wire.FRESH, program.plan)))
    with pytest.raises(InvalidInput, match=f"^he: .*({text})"):
        server.attend(bad)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda parts: [*parts[:-3], parts[-1], *parts[-2:]], "its body's size: got .*, expected"),
        (
            lambda parts: [*parts[:-3], forge.with_fields(parts[-3], times=1 - 1e-6), *parts[-2:]],
            "scale: got .*, expected",
        ),
        (
            lambda parts: [*parts[:-3], forge.with_fields(parts[-3], ntt=False), *parts[-2:]],
            "form for products: got 0, expected 1",
        ),
    ],
)
def test_an_answer_of_another_level_or_scale_reaches_no_kernel(session, monkeypatch, change, text):
    """The residual's: it has the fewest primes, and is read first."""
    program, _, _, server = session
    masked, answer = asked(session)
    taken = server._masks._waiting[bytes(wire.unpack(masked, wire.MASKED, program.plan.digest, MOST).parts[0])][2]
    bad = forge.repacked(answer, wire.FRESH, program.plan, change(forge.parts_of(answer, wire.FRESH, program.plan)))
    monkeypatch.setattr(server._worker.device, "_launch", lambda *given: pytest.fail("a kernel ran"))
    with pytest.raises(InvalidInput, match=text):
        server.attend(bad)
    assert not any(x.any() for x in taken)  # and its mask is of no use any more
    with pytest.raises(InvalidInput, match="no masked result that waits for one"):
        server.attend(answer)


def test_an_answer_that_was_changed_on_its_way_may_come_again(session):
    program, client, _, server = session
    _, answer = asked(session)
    rng = np.random.default_rng(0)
    for at in rng.integers(200, len(answer), 10):
        bad = bytearray(answer)
        bad[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(InvalidInput, match="cut short or changed"):
            server.attend(bytes(bad))
    m = wire.unpack(answer, wire.FRESH, program.plan.digest, MOST)
    of_another = wire.pack(wire.Message(m.kind, m.plan, os.urandom(16), m.query, m.parts))
    with pytest.raises(InvalidInput, match="a query of another client than the one whose keys are here"):
        server.attend(of_another)
    assert np.abs(client.decrypt(server.attend(answer)) - program.simulate(X)).max() < 1e-5


def test_keys_bring_an_encryption_of_zero_from_a_seed(devices, session):
    program, _, keys, server = session
    relin, galois, zero = forge.parts_of(keys, wire.KEYS, program.plan)
    chosen = to_bytes(from_bytes("Ciphertext", RING, zero))  # its second polynomial in full
    before = len(devices)
    for bad, text in (
        ([relin, galois], "got evaluation keys of 2 parts, expected 3"),
        ([relin, galois, chosen], "an encryption of zero that is not made from a seed"),
        ([relin, galois, b""], "an encryption of zero that is not made from a seed"),
        ([relin, galois, relin], "an encryption of zero that is not made from a seed"),
    ):
        with pytest.raises(InvalidInput, match=text):
            he.Server(program, forge.repacked(keys, wire.KEYS, program.plan, bad), device="cuda")
    assert len(devices) == before
    with pytest.raises(InvalidInput, match="no RelinKeys of this plan"):
        he.Server(program, forge.repacked(keys, wire.KEYS, program.plan, [galois, relin, zero]), device="cuda")
    assert not devices[-1].given
    with pytest.raises(InvalidInput, match="a query of another client than the one whose keys are here"):
        server.attend(he.Client(program.plan).encrypt(X))


def test_a_client_that_never_answers_is_forgotten(session, monkeypatch):
    monkeypatch.setattr(refresh, "WAITING", 2)
    program, client, _, server = session
    first, answer = asked(session)
    name = bytes(wire.unpack(first, wire.MASKED, program.plan.digest, MOST).parts[0])
    kept = server._masks._waiting[name][2]
    assert all(x.any() for x in kept)
    later = [asked(session)[1] for _ in range(refresh.WAITING)]
    assert len(server._masks._waiting) == refresh.WAITING
    assert not any(x.any() for x in kept)
    with pytest.raises(InvalidInput, match="no masked result that waits for one; encrypt the input anew"):
        server.attend(answer)
    assert np.abs(client.decrypt(server.attend(later[0])) - program.simulate(X)).max() < 1e-5


def test_nothing_is_left_of_a_session_that_is_closed(devices):
    program = Relay()
    client = he.Client(program.plan)
    server = he.Server(program, client.evaluation_keys(), device="cuda")
    answer = client.refresh(server.attend(client.encrypt(X)))
    ready = server._masks._ready[1].result()
    held = [*ready.pads, *ready.subtracted, *(x for _, _, mask in server._masks._waiting.values() for x in mask)]
    assert all(x.any() for x in held)
    device = server._worker.device
    server.close()
    assert not any(x.any() for x in (*held, *device.given, *device.host))
    for message in (answer, client.encrypt(X)):
        with pytest.raises(InvalidInput, match=re.escape("the session on the GPU is closed; make another Server")):
            server.attend(message)
    server.close()


def test_nothing_is_left_of_a_session_that_nobody_closes(devices):
    program = Relay()
    client = he.Client(program.plan)
    server = he.Server(program, client.evaluation_keys(), device="cuda")
    server.attend(client.encrypt(X))
    held = [x for _, _, mask in server._masks._waiting.values() for x in mask]
    server._masks._ready[1].result()
    assert all(x.any() for x in held)
    del server
    assert not any(x.any() for x in held)
    assert devices[-1].ended
