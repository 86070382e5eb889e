"""The GPU itself: where there is one, words are SEAL's, graphs can run again, and memory is written over."""

import importlib
import importlib.util

import numpy as np
import pytest

from refattn import UnsupportedProblem, he
from refattn.arrays import cupy_with_gpu
from refattn.errors import BuildError
from refattn.he import wire
from refattn.he.device import card
from refattn.he.device.build import KERNELS, geometry
from refattn.he.device.card import Card
from refattn.he.device.schedule import schedule_of

from ..relay import Relay
from .cupys_part import cupys_part
from .emulated import GXX
from .every import RINGS, Every
from .exchange import PLANS, exchange
from .gate import same
from .rounds import same_rounds


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


@pytest.fixture
def cupy(monkeypatch, folder):
    made = cupys_part(folder)
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *at: made if name == "cupy" else real(name, *at))
    card._kernels.cache_clear()
    yield made
    card._kernels.cache_clear()


@GXX
def test_what_cupy_is_asked_for(cupy):
    pytest.importorskip("tenseal")
    e = exchange("the server divides")
    outs = schedule_of(e.program).outs
    with he.Server(e.program, e.keys, device="cuda") as server:
        for _ in range(2):
            found = e.parts(server.attend(e.query), wire.REPLY)
            for a, b in zip(e.replied_words(outs, found), e.replied_words(outs), strict=True):
                assert np.array_equal(a, b)
        assert cupy.seen.graphs == 2 + 1 + len(schedule_of(e.program).elements)  # two phases, and a key each
    assert cupy.seen.pool == 1
    assert not any(x.held.any() for x in cupy.seen.given)


@GXX
def test_an_encoders_messages(cupy):
    pytest.importorskip("tenseal")
    x = np.random.default_rng(0).standard_normal((3, 5)) / 4
    assert same_rounds(Relay(), x)[0] == [True, True]
    # both blocks' phases, and the one key that is used
    assert cupy.seen.graphs == sum(len(schedule_of(Relay(), k).phases) for k in range(2)) + 1
    assert not any(x.held.any() for x in cupy.seen.given)


def test_what_a_gpu_lacks_is_told(cupy, monkeypatch):
    made = Card(8192)
    with pytest.raises(UnsupportedProblem, match=r"the GPU's memory is full .*; end another session first"):
        made.empty(2**35)
    assert made.free() == 2**34
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(UnsupportedProblem, match="device='cuda' finds no GPU; use device='cpu'"):
        Card(8192)

    def fails():
        raise cupy.cuda.runtime.CUDARuntimeError("no driver")

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", fails)
    with pytest.raises(UnsupportedProblem, match=r"finds no GPU \(no driver\); use device='cpu'"):
        Card(8192)


def test_kernels_may_use_the_shared_memory_that_they_need(cupy):
    kernels = card._kernels(32768, 0)
    assert {n: k.max_dynamic_shared_size_bytes for n, k in kernels.items()} == {
        n: geometry(n, 32768)[2] for n in KERNELS
    }
    assert geometry("spread", 32768)[2] > 48 * 1024  # what a kernel may use unasked


def test_a_compiler_that_fails_is_told(cupy, monkeypatch):
    monkeypatch.setattr(cupy.RawModule, "get_function", lambda self, name: 1 / 0)
    with pytest.raises(BuildError, match="compiling inverse_rows for degree 8192 failed with ZeroDivisionError"):
        Card(8192)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_without_cupy_the_package_is_named():
    with pytest.raises(UnsupportedProblem, match="needs the package cupy"):
        Card(8192)
