"""The GPU itself: where there is one, words are SEAL's, graphs can run again, and memory is written over."""

import importlib.util

import numpy as np
import pytest

from refattn import UnsupportedProblem, he
from refattn.he import wire
from refattn.he.device.card import Card, cupy_with_gpu
from refattn.he.device.chain import chain_of
from refattn.he.device.executor import execute
from refattn.he.device.schedule import schedule_of
from refattn.he.device.session import Session

from .drawn import Drawn
from .exchange import PLANS, exchange


def missing():
    try:
        cupy_with_gpu()
    except UnsupportedProblem as e:
        return str(e)
    return ""


GPU = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a GPU")


@GPU
@pytest.mark.parametrize("name", PLANS)
def test_replies_are_seals(name):
    pytest.importorskip("tenseal")
    e = exchange(name)
    with he.Server(e.program, e.keys, device="cuda") as server:
        for _ in range(2):
            found = wire.unpack(server.attend(e.query), wire.REPLY, e.plan.digest, 2**40).parts
            outs = schedule_of(e.program).outs
            for a, b in zip(e.replied_words(outs, found), e.replied_words(outs), strict=True):
                assert np.array_equal(a, b)


@GPU
@pytest.mark.parametrize("upload", ["full", "whole"])
@pytest.mark.parametrize("degree", [8192, 16384, 32768])
def test_words_are_numpys(degree, upload):
    """Without SEAL: keys and ciphertexts are drawn, and the reference is the executor."""
    plan = he.plan(
        4, 4, 4, p=2, denominator=(1.0, 4.0) if degree < 32768 else (0.4, 40.0), epsilon=0.3, norms=(2.0, 2.0),
        value_most=1.0, tolerance=1e-1 if degree < 32768 else 1e-4, upload=upload,
        normalize="client" if degree == 8192 else "server",
    )  # fmt: skip
    given = Drawn(plan, 0)
    card = Card(plan.ring.degree)
    session = Session(plan, given.keys, card)
    schedule = session.schedule
    for seed in (0, 1):
        given.draw(seed)
        found = given.words(session.attend(given.parts), schedule.outs)
        expected = execute(schedule, given.key_words, given.part_words)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert chain_of(plan.ring) is schedule.chain
    session.close()


@GPU
def test_memory_is_written_over():
    cupy = cupy_with_gpu()
    card = Card(8192)
    at = card.empty(4096)
    card.put(at, np.full(4096, 7, np.uint8))
    assert (card.get(at, 4096) == 7).all()
    memory = card._given[0][0]
    card.end()
    seen = np.empty(4096, np.uint8)
    cupy.cuda.runtime.memcpy(seen.ctypes.data, memory.ptr, 4096, 2)
    assert not seen.any()


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_without_cupy_the_package_is_named():
    with pytest.raises(UnsupportedProblem, match="needs the package cupy"):
        Card(8192)
