"""The GPU itself: where there is one, words are SEAL's, graphs can run again, and memory is written over."""

import importlib.util

import numpy as np
import pytest

from refattn import UnsupportedProblem, he
from refattn.he import wire
from refattn.he.device.card import Card, cupy_with_gpu
from refattn.he.device.schedule import schedule_of

from .every import RINGS, Every
from .exchange import PLANS, exchange
from .gate import same


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
@pytest.mark.parametrize("degree", RINGS)
def test_every_operation_is_the_executors(degree, upload):
    """Without SEAL: keys and ciphertexts are drawn."""
    assert same(Every(RINGS[degree], upload), Card(degree))


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
