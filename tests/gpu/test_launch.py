"""What a launch passes to the driver, without a GPU: a stand-in for CuPy reads arguments where the driver would."""

import ctypes
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest

from refattn.gpu import launch as module
from refattn.gpu import sm90, views
from refattn.gpu.launch import launch
from refattn.gpu.plan import choose
from refattn.gpu.views import View

from .test_build import PLAIN


class Driver:
    """Copies each argument of a launch at once, as the driver does."""

    def __init__(self):
        self.launches = []
        self.sizes = []

    def launchKernel(self, kernel, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, 0)
        sizes = self.sizes.pop(0)
        pointers = (ctypes.c_void_p * len(sizes)).from_address(parameters)
        arguments = [ctypes.string_at(p, n) for p, n in zip(pointers, sizes, strict=True)]
        self.launches.append((kernel, gx, bx, shared, stream, arguments))


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(module, "library", lambda _: SimpleNamespace(cuda=SimpleNamespace(driver=found)))
    monkeypatch.setattr(module, "kernel_of", lambda plan, device: (f"kernel {plan.impl}", None))
    monkeypatch.setattr(module, "attribute", lambda device, name: 5)
    monkeypatch.setattr(module, "zeros", lambda device, stream, size, what: 7000 if what == "redo" else 8000)
    monkeypatch.setattr(sm90, "key_map", lambda x, rows, name: struct.pack("16Q", x.pointer, rows, *[0] * 14))
    return found


def arrays(dtype="bfloat16"):
    def make(pointer, *shape):
        strides = [1]
        for n in shape[:0:-1]:
            strides.insert(0, strides[0] * n)
        return View(pointer, shape, tuple(strides), dtype, 0)

    names = {
        "query": (1, 2, 4, 128, 64),
        "key": (2, 2, 1, 300, 64),
        "value": (3, 2, 1, 300, 64),
        "out": (4, 2, 4, 128, 64),
    }
    return {n: make(*x) for n, x in names.items()} | {"lse": make(5, 2, 4, 128)}


def test_the_hopper_kernel_and_its_repair(driver):
    call = replace(PLAIN, n_q=128, n_k=300, causal="bottom_right")
    driver.sizes = [[128] * 3 + [8] * 4 + [32, 24, 40, 4], [module.PARAMS.size]]
    options = {"scale": 0.5, "causal": "bottom_right", "window": None, "softcap": None}
    launch(call, choose(call, None, (9, 0)), None, arrays(), options, 99)
    (kernel, grid, threads, shared, stream, a), (repair, *_, b) = driver.launches
    macros = choose(call, None, (9, 0)).macros
    assert (kernel, grid, threads, stream) == ("kernel sm90", 5, 512, 99)  # 8 tiles of 192 rows, 5 multiprocessors
    assert shared == sm90.shared_bytes(macros)
    assert [struct.unpack_from("2Q", x) for x in a[:3]] == [(1, 192), (2, 128), (3, 128)]
    assert [struct.unpack("Q", x)[0] for x in a[3:7]] == [4, 5, 8000, 7000]
    together = (16 << 20) * 4 // (4 * 300 * 64)
    assert struct.unpack("8i", a[7]) == (2, 4, 4, 128, 300, 64, min(8, together), 8)
    assert struct.unpack("3q", a[8]) == (4 * 128 * 64, 128 * 64, 64)
    assert struct.unpack("4q2i", a[9]) == (0, 0, 0, 0, 1, 1)
    assert struct.unpack("f", a[10]) == (0.5,)
    assert repair == "kernel simt"
    found = module.PARAMS.unpack(b[0])
    assert found[:12] == (1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 7000)
    assert found[12:15] == (4 * 128 * 64, 128 * 64, 64)
    assert found[36:38] == (0.5, 0.0)
    assert found[38:] == (2, 4, 1, 128, 300, 64, 64, 2, -1, -1, 1, 1, 0)


def test_options_reach_the_other_kernels(driver):
    call = replace(PLAIN, n_q=128, n_k=300, window=(3, None), softcap=True, sink=True, bias="float32")
    driver.sizes = [[module.PARAMS.size]]
    given = arrays() | {
        "bias": View(6, (1, 4, 128, 300), (9, 38400, 300, 1), "float32", 0),
        "sink": View(7, (4,), (1,), "float32", 0),
    }
    options = {"scale": -0.5, "causal": None, "window": (3, None), "softcap": 20.0}
    launch(call, choose(call, None, (9, 0)), None, given, options, 0)
    ((kernel, grid, threads, _, stream, (a,)),) = driver.launches
    assert (kernel, grid, threads, stream) == ("kernel mma", 2 * 4 * 1, 128, 0)
    found = module.PARAMS.unpack(a)
    assert found[:12] == (1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0)
    assert found[26:30] == (0, 38400, 300, 1)
    assert found[36:] == (-0.5, 20.0, 2, 4, 1, 128, 300, 64, 64, 0, 3, -1, 1, 1, 0)


def test_axes_of_one_element_are_spread():
    assert View(0, (1, 4, 1, 300), (9, 5, 7, 1), "bool", 0).spread() == (0, 5, 0, 1)
    assert views.LIBRARIES == ("cupy", "torch", "jax")
