"""Sessions on a device that is emulated: words are SEAL's, bad input is refused before a kernel, nothing is left."""

import gc
import importlib

import numpy as np
import pytest

from refattn import InvalidInput, UnsupportedProblem, he
from refattn.he import sessions, wire
from refattn.he.device.session import ROOM, Session, bytes_of

from .. import forge
from .emulated import GUARD, GXX, Emulated
from .every import RINGS, Every
from .exchange import PLANS, exchange
from .gate import same
from .sanitized import seeds_with_words_left_out

pytest.importorskip("tenseal")
pytestmark = GXX


def begun(e, folder, **more):
    device = Emulated(e.plan.ring.degree, folder, **more)
    return device, Session(e.program, e.parts(e.keys, wire.KEYS), device)


def check(e, session):
    found = session.attend(e.parts(e.query, wire.QUERY))
    for ours, theirs in zip(
        e.replied_words(session.schedules[0].outs, found), e.replied_words(session.schedules[0].outs), strict=True
    ):
        assert np.array_equal(ours, theirs)


def test_every_operation_is_the_executors(folder):
    device = Emulated(8192, folder)
    assert same(Every(RINGS[8192], "whole"), device)
    assert device.ends_are_whole()


@pytest.mark.parametrize(("name", "order"), [(n, i % 2) for i, n in enumerate(PLANS)])
def test_words_are_seals(name, order, folder):
    e = exchange(name)
    device, session = begun(e, folder, order=order)
    check(e, session)
    assert sum(x.nbytes - 512 for x in device.given) <= bytes_of(*session.schedules) + ROOM
    assert device.ends_are_whole()
    if order == 0:
        check(e, session)  # nothing of the query before is in the way
    session.close()
    assert not any(x.any() for x in (*device.given, *device.host))
    assert device.ended
    with pytest.raises(InvalidInput, match="the session on the GPU is closed; make another Server"):
        session.attend(e.parts(e.query, wire.QUERY))
    session.close()


def test_words_of_a_seed_that_are_left_out(folder):
    device = Emulated(8192, folder, order=1)
    (found, left_out), (words, count) = seeds_with_words_left_out(device, 8192)
    assert np.array_equal(found, words)
    assert left_out == count > 255
    assert device.ends_are_whole()


def test_a_query_of_several_batches(folder, monkeypatch):
    from refattn.he.device import session as module

    monkeypatch.setattr(module, "BATCH", 1)
    e = exchange("the server divides")
    check(e, begun(e, folder)[1])


def test_a_server_with_a_gpu(folder, monkeypatch):
    e = exchange("the server divides")
    made = []

    def stands_for(degree):
        made.append(Emulated(degree, folder))
        return made[-1]

    monkeypatch.setattr(sessions, "Card", stands_for)
    with he.Server(e.program, e.keys, device="cuda") as server:
        reply = server.attend(e.query)
        changed = forge.repacked(e.query, wire.QUERY, e.plan, [b"", *e.parts(e.query, wire.QUERY)[1:]])
        with pytest.raises(InvalidInput, match="no Ciphertext of this plan"):
            server.attend(changed)
    assert made[0].ended
    out = e.client.decrypt(reply)
    assert np.abs(out - he.reference(e.x)).max() <= e.plan.error


def test_bad_ciphertexts_never_reach_a_kernel(folder, monkeypatch):
    e = exchange("whole, several heads")
    device, session = begun(e, folder)
    parts = [bytes(x) for x in e.parts(e.query, wire.QUERY)]
    monkeypatch.setattr(device, "_launch", lambda *given: pytest.fail("a kernel ran"))
    for changes in ({"zero": True}, {"noise": True}, {"scale": 1.0}, {"ntt": False}, {"size": 3}):
        with pytest.raises(InvalidInput, match="no Ciphertext of this plan"):
            session.attend([forge.with_fields(parts[0], **changes), *parts[1:]])
    with pytest.raises(InvalidInput, match="no Ciphertext of this plan"):
        session.attend([*parts[1:2], *parts[1:-1], parts[0][:-1]])


def test_a_reply_that_is_no_secret_is_not_sent(folder, monkeypatch):
    e = exchange("the server divides")
    device, session = begun(e, folder)
    monkeypatch.setattr(device, "get", lambda address, size: np.zeros(size, np.uint8))
    with pytest.raises(InvalidInput, match="a result's second polynomial is zero"):
        session.attend(e.parts(e.query, wire.QUERY))


def test_a_session_without_room_is_refused(folder):
    e = exchange("the server divides")
    with pytest.raises(UnsupportedProblem, match=r"takes 0.29 GB of the GPU's memory, of which 0.10 are free"):
        begun(e, folder, most=10**8)


def test_keys_are_looked_at_first(folder):
    e = exchange("the server divides")
    device = Emulated(e.plan.ring.degree, folder)
    relin, galois = e.parts(e.keys, wire.KEYS)
    with pytest.raises(InvalidInput, match="no RelinKeys of this plan"):
        Session(e.program, (galois, relin), device)
    assert not device.given


def test_a_session_that_nobody_closes_leaves_nothing(folder):
    device, session = begun(exchange("a slot is an input"), folder)
    assert any(x.any() for x in device.given)
    del session
    gc.collect()
    assert device.ended


def test_what_fails_at_the_start_leaves_nothing(folder, monkeypatch):
    e = exchange("the server divides")
    device = Emulated(e.plan.ring.degree, folder)

    def fails(launches):
        raise MemoryError

    monkeypatch.setattr(device, "recorded", fails)
    with pytest.raises(MemoryError):
        Session(e.program, e.parts(e.keys, wire.KEYS), device)
    assert device.ended
    assert not any(x.any() for x in device.given)


def test_the_guard_sees_a_word_past_an_end(folder):
    device = Emulated(8192, folder)
    at = device.empty(64)
    assert device.ends_are_whole()
    device.put(at + 64, np.zeros(1, np.uint8))
    assert not device.ends_are_whole()
    assert GUARD


def test_devices_that_are_not_there_are_named(monkeypatch):
    e = exchange("the server divides")
    with pytest.raises(InvalidInput, match="device: got 'tpu', expected 'cpu' or 'cuda'"):
        he.Server(e.program, e.keys, device="tpu")
    with pytest.raises(InvalidInput, match="workers: got 2, expected 1 for device='cuda'"):
        he.Server(e.program, e.keys, 2, device="cuda")

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UnsupportedProblem, match=r"device='cuda' needs the package cupy .*; pip install"):
        he.Server(e.program, e.keys, device="cuda")
