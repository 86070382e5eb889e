"""What a launch passes to the driver, without a GPU: a stand-in for CuPy reads arguments where the driver would."""

import ctypes
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from refattn.gpu import backward_launch, mma, recorded, simt, sm90, views
from refattn.gpu import launch as module
from refattn.gpu.arguments import arguments_of
from refattn.gpu.launch import launch
from refattn.gpu.plan import choose
from refattn.gpu.views import View

from .test_build import PLAIN


class Driver:
    """Copies each argument of a launch at once, as the driver does."""

    def __init__(self):
        self.launches = []
        self.takes = []

    def launchKernel(self, kernel, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, 0)
        takes = self.takes.pop(0)
        offsets = takes.offsets
        pointers = list((ctypes.c_void_p * len(offsets)).from_address(parameters))
        assert [p - pointers[0] for p in pointers] == list(offsets)
        arguments = takes.unpack(ctypes.string_at(pointers[0], len(takes)))
        self.launches.append((kernel, gx, bx, shared, stream, arguments))


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(recorded, "library", lambda _: SimpleNamespace(cuda=SimpleNamespace(driver=found)))
    monkeypatch.setattr(module, "kernel_of", lambda plan, device: (f"kernel {plan.impl}", None))
    monkeypatch.setattr(module, "attribute", lambda device, name: 5)
    monkeypatch.setattr(
        module, "zeros", lambda *call: View(7000 if call[-1] == "redo" else 8000, (1,), (1,), "int32", 0)
    )
    monkeypatch.setattr(sm90, "key_map", lambda x, rows, name: struct.pack("16Q", x.pointer, rows, *[0] * 14))
    return found


def members(arguments, name):
    """Return a struct's members."""
    return {n.removeprefix(f"{name}."): x for n, x in arguments.items() if n.startswith(f"{name}.")}


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
    driver.takes = [sm90.KERNEL.takes, simt.KERNEL.takes]
    options = {"scale": 0.5, "causal": "bottom_right", "window": None, "softcap": None}
    launch(call, choose(call, None, (9, 0)), None, arrays(), options, 99)
    (kernel, grid, threads, shared, stream, a), (repair, *_, b) = driver.launches
    macros = choose(call, None, (9, 0)).macros
    assert (kernel, grid, threads, stream) == ("kernel sm90", 5, 512, 99)  # 8 tiles of 192 rows, 5 multiprocessors
    assert shared == sm90.shared_bytes(macros)
    assert [struct.unpack_from("2Q", a[f"map_{x}"]) for x in "qkv"] == [(1, 192), (2, 128), (3, 128)]
    assert [a[n] for n in ("out", "lse", "counter", "redo", "scale")] == [4, 5, 8000, 7000, 0.5]
    together = (16 << 20) * 4 // (4 * 300 * 64)
    sizes = {"batch": 2, "heads": 4, "group": 4, "n_q": 128, "n_k": 300, "d": 64}
    assert members(a, "shape") == {**sizes, "head_group": min(8, together), "tiles": 8}
    assert members(a, "stride") == {"batch": 4 * 128 * 64, "head": 128 * 64, "row": 64}
    assert members(a, "mask") == {"bits": 0, "batch": 0, "head": 0, "row": 0, "block_q": 1, "block_k": 1}
    assert repair == "kernel simt"
    found = members(b, "p")
    pointers = {"q": 1, "k": 2, "v": 3, "out": 4, "lse": 5, "redo": 7000}
    absent = dict.fromkeys(("bias", "sink", "mask", "blocks", "cu_q", "cu_k"), 0)
    assert {n: found[n] for n in pointers | absent} == pointers | absent
    assert [found[n] for n in ("q_b", "q_h", "q_n")] == [4 * 128 * 64, 128 * 64, 64]
    assert [found[n] for n in ("b", "h", "h_kv", "n_q", "n_k", "d_k", "d_v")] == [2, 4, 1, 128, 300, 64, 64]
    assert [found[n] for n in ("scale", "softcap", "causal", "left", "right")] == [0.5, 0.0, 2, -1, -1]
    assert [found[n] for n in ("block_q", "block_k", "sequences")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("window", "together"),
    [
        ((1023, 0), 16),  # 16 MiB hold what 28 heads' windows leave to a tile: 32 heads in two groups of one size
        ((100, 0), 32),
        ((8000, None), 4),  # 16 MiB hold the keys and values of 4 heads
        (None, 4),
    ],
)
def test_heads_whose_tiles_are_taken_together(monkeypatch, window, together):
    monkeypatch.setattr(sm90, "key_map", lambda x, rows, name: bytes(128))
    x = View(1 << 20, (2, 16, 8192, 128), (1 << 24, 1 << 20, 128, 1), "bfloat16", 0)
    given = dict.fromkeys(("query", "key", "value", "out"), x) | {"lse": View(1, x.shape[:3], (1,), "float32", 0)}
    call = replace(PLAIN, n_q=8192, n_k=8192, d_k=128, d_v=128, causal="bottom_right", window=window)
    options = {"scale": 0.5, "causal": "bottom_right", "window": window, "softcap": None}
    _, found = sm90.arguments(choose(call, "sm90", (9, 0)).macros, given, options, None, 1, 2, 132)
    assert found["shape"]["head_group"] == together


@pytest.fixture
def given():
    return arrays() | {
        "bias": View(6, (1, 4, 128, 300), (9, 38400, 300, 1), "float32", 0),
        "sink": View(7, (4,), (1,), "float32", 0),
    }


def test_options_reach_the_hopper_kernel(driver, given):
    call = replace(
        PLAIN, n_q=128, n_k=300, causal="top_left", window=(3, None), softcap=True, sink=True, bias="float32"
    )
    driver.takes = [sm90.KERNEL.takes, simt.KERNEL.takes]
    options = {"scale": -0.5, "causal": "top_left", "window": (3, None), "softcap": 20.0}
    launch(call, choose(call, None, (9, 0)), None, given, options, 0)
    (kernel, *_, a), (repair, *_) = driver.launches
    assert (kernel, repair, a["scale"], a["redo"]) == ("kernel sm90", "kernel simt", -0.5, 7000)
    absent = dict.fromkeys(("mask", "cu_q", "cu_k", "mask_b", "mask_h", "mask_q", "sequences", "bias_b"), 0)
    strides = {"bias_h": 38400, "bias_q": 300, "bias_k": 1}
    asked = {"softcap": 20.0, "top_left": 1, "left": 3, "right": 0}
    assert members(a, "options") == {"sink": 7, "bias": 6, **absent, **strides, **asked}


def test_options_reach_the_other_kernels(driver, given):
    call = replace(PLAIN, n_q=128, n_k=300, window=(3, None), softcap=True, sink=True, bias="float32")
    driver.takes = [mma.KERNEL.takes]
    options = {"scale": -0.5, "causal": None, "window": (3, None), "softcap": 20.0}
    launch(call, choose(call, None, (8, 0)), None, given, options, 0)
    ((kernel, grid, threads, _, stream, a),) = driver.launches
    assert (kernel, grid, threads, stream) == ("kernel mma", 2 * 4 * 1, 128, 0)
    found = members(a, "p")
    assert [found[n] for n in ("q", "k", "v", "out", "lse", "bias", "sink", "mask", "redo")] == [*range(1, 8), 0, 0]
    assert [found[n] for n in ("bias_b", "bias_h", "bias_q", "bias_k")] == [0, 38400, 300, 1]
    assert [found[n] for n in ("scale", "softcap", "causal", "left", "right")] == [-0.5, 20.0, 0, 3, -1]


@pytest.mark.parametrize("wanted", [("dq",), ("dq", "dk", "dv")])
def test_a_pass_that_is_not_wanted_marks_nothing(driver, monkeypatch, wanted):
    for n in ("queue", "attribute"):
        monkeypatch.setattr(backward_launch, n, getattr(module, n))
    places = {"redo 0": 7000, "redo 1": 7500, "turns": 9}
    stand_ins = {
        "kernel_of": lambda plan, device, entry="", shared=0: (entry or plan.impl, None),
        "zeros": lambda *call: View(places[call[-1]], (1,), (1,), "int32", 0),
        "empty": lambda like, shape, dtype: (None, View(80, shape, (1,) * len(shape), dtype, 0)),
    }
    for n, x in stand_ins.items():
        monkeypatch.setattr(backward_launch, n, x)
    given = arrays() | {"dout": arrays()["out"], "delta": View(81, (2, 4, 128), (512, 128, 1), "float32", 0)}
    given |= {"dq": given["query"], "dk": given["key"], "dv": given["value"]}
    given = {n: x for n, x in given.items() if n not in ("dq", "dk", "dv") or n in wanted}
    call = replace(PLAIN, n_q=128, n_k=300, causal="bottom_right")
    backward_launch.prepare(call, backward_launch.hopper.KERNEL, None, {}, given, True)
    work = backward_launch._Work(
        call, given, {"scale": 0.5, "causal": "bottom_right", "window": None, "softcap": None}, 0
    )
    small, simt_takes = arguments_of("sm90_backward.cu", "statistics"), arguments_of("simt_backward.cu", "backward")
    driver.takes = [small, backward_launch.hopper.KERNEL.takes, small, *[simt_takes] * 2]
    backward_launch._together(work, None, True)
    names, marks = [x[0] for x in driver.launches], driver.launches[1][-1]
    both = "dk" in wanted
    assert names == ["statistics", "sm90", "convert", *["simt"] * (1 + both)]
    assert (marks["z.redo_rows"], marks["z.redo_keys"]) == (7000, 7500 * both)


def test_threads_and_graphs_have_their_own_zeros(monkeypatch):
    made, cleared = [], []

    def place(*_):
        made.append(View(64 * len(made), (4,), (1,), "int32", 0))
        return made[-1]

    runtime = SimpleNamespace(streamIsCapturing=lambda s: s == 9, memsetAsync=lambda *a: cleared.append(a))
    stream = SimpleNamespace(null=nullcontext(), from_external=lambda _: nullcontext())
    cupy = SimpleNamespace(zeros=place, cuda=SimpleNamespace(runtime=runtime, Stream=stream))
    for where in (module, views):
        monkeypatch.setattr(where, "library", lambda _: cupy)
    monkeypatch.setattr(module, "view", lambda x, _: x)
    monkeypatch.setattr(module, "empty", lambda *_: (None, place()))
    monkeypatch.setattr(module, "_THREAD", module._Thread())
    monkeypatch.setattr(module, "_CAPTURED", [])
    ask = partial(module.zeros, None, 0)
    first, again = ask(7, 16, "redo"), ask(7, 16, "redo")
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ask, 7, 16, "redo").result()
    assert first is again is not other
    graphs = [ask(9, 16, "redo") for _ in range(2)]
    assert graphs == made[2:] == module._CAPTURED
    assert cleared == [(x.pointer, 0, 16, 9) for x in graphs]
    assert {ask(0, 4, "counter").pointer, ask(7, 4, "counter").pointer, ask(7, 16, "turns").pointer} == {256, 320, 384}


def test_a_tensor_map_keeps_no_tensor(monkeypatch):
    seen = []
    monkeypatch.setattr(sm90, "_encoded", lambda x, *rest: seen.append(x) or b"")
    sm90.tensor_map(replace(arrays()["query"], owner="a tensor"), (3, 2, 1, 0), (64, 64, 1, 1), "query")
    assert [x.owner for x in seen] == [None]


def test_axes_of_one_element_are_spread():
    assert View(0, (1, 4, 1, 300), (9, 5, 7, 1), "bool", 0).spread() == (0, 5, 0, 1)
    assert views.LIBRARIES == ("cupy", "torch", "jax")


@pytest.mark.parametrize(
    ("ordered", "uneven", "shape", "heads_kv", "sequences", "expected"),
    [
        (1, 0, (8, 32, 2048, 64), 32, 0, 16),  # a head's rows and sums are a MiB, 16 of them stay in the cache
        (1, 1, (8, 32, 2048, 64), 8, 0, 4),
        (1, 0, (1, 4, 2048, 64), 4, 0, 4),
        (1, 0, (1, 32, 1 << 20, 64), 32, 0, 1),
        (1, 0, (1, 32, 16384, 64), 32, 8, 16),
        (0, 0, (8, 32, 2048, 64), 32, 0, 1),
        (0, 1, (8, 32, 2048, 64), 32, 0, 16),
        (0, 1, (1, 32, 16384, 64), 32, 0, 4),
    ],
)
def test_heads_take_turns(ordered, uneven, shape, heads_kv, sequences, expected):
    b, _, n, d = shape
    given = {"query": View(0, shape, (1,) * 4, "bfloat16", 0), "key": View(0, (b, heads_kv, n, d), (1,) * 4, "", 0)}
    if sequences:
        given["cu_q"] = View(0, (sequences + 1,), (1,), "int32", 0)
    assert backward_launch.hopper.together({"ORDERED": ordered, "WIDTH": d}, given, uneven) == expected
