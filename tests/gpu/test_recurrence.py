"""The recurrences' kernels: their text run on the CPU beside the definition, what they take, how they compile."""

import shutil
from contextlib import nullcontext

import numpy as np
import pytest

from refattn import InvalidProblem, UnsupportedProblem, check_kernel, check_problem
from refattn.check.inputs.draw import Draw
from refattn.check.kernels import KERNELS
from refattn.dtypes import FORMATS
from refattn.gpu import gated_delta, lightning, lightning_mma, recurrence
from refattn.gpu.views import View

from .recurrence_host import library, run
from .recurrence_warps import libraries
from .recurrence_warps import run as on_warps

GXX = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
PACK = {f"cu_seqlens_{x}": np.array([0, 1, 1, 35, 38], np.int32) for x in "qk"}
CALLS = {
    "lightning": (
        {"n": 36, "d": 64, "d_v": 16, "h": 4, "h_kv": 2, "state": True, "scale": 0.3},
        {"n": 38, "d": 64, "d_v": 24, "state": True, **PACK},
    ),
    "gated_delta": (
        {"n": 34, "d": 56, "d_v": 40, "h": 2, "h_kv": 2, "alpha": "strong", "beta": True, "state": True, "scale": 0.3},
        {"n": 38, "d": 64, "d_v": 24, "alpha": True, "beta": True, "state": True, **PACK},
        {"n": 34, "d": 64, "d_v": 8, "alpha": "strong channels", "beta": True, "state": True},
    ),
}


def call(variant, n, dtype="float32", **more):
    d = Draw(FORMATS[dtype], np.random.default_rng(0), variant)
    given = {
        "h": 1,
        "options": {"decay": (0.1, 0.9, 0.0, 0.4)[: more.get("h", 1)]} if variant == "lightning" else {},
    } | more
    return d.problem(n, n, causal="bottom_right", **given)


@GXX
@pytest.mark.parametrize("variant", CALLS)
def test_the_text_computes_the_definition(tmp_path, variant):
    made = {}
    for given in CALLS[variant]:
        p = call(variant, **given)
        gate = 0 if p.alpha is None else 1 if p.alpha.shape[3] == 1 else 2
        if gate not in made:
            made[gate] = library(tmp_path, 64, gate)
        report = check_problem(lambda x, gate=gate: run(made[gate], x), p, "host")
        assert report.passed, (given, report.describe(report.checks[0]))


ENDS = {f"cu_seqlens_{x}": np.array([0, 1, 1, 65, 200], np.int32) for x in "qk"}
TENSOR_CORES = (
    ("lightning", 1, {"n": 100, "d": 56, "d_v": 72, "h": 2, "h_kv": 1, "state": True, "scale": 0.3}),
    ("lightning", 16, {"n": 200, "d": 8, "d_v": 66, "state": True, **ENDS}),
    ("gated_delta", 1, {"n": 200, "d": 16, "d_v": 13, "alpha": "strong", "beta": True, "state": True, **ENDS}),
    ("gated_delta", 1, {"n": 70, "d": 56, "d_v": 40, "h": 2, "h_kv": 1, "alpha": True, "beta": "large"}),
)
"""Operator, blocks that parts of a sequence may fill, and the call."""


@GXX
def test_the_text_for_tensor_cores_computes_the_definition(tmp_path, monkeypatch):
    monkeypatch.setattr(lightning_mma, "FEWEST", 1)  # so that 200 tokens are four parts
    made = libraries(tmp_path)
    for variant, room, given in TENSOR_CORES:
        p = call(variant, dtype="bfloat16", **given)
        report = check_problem(lambda x, room=room: on_warps(made, x, room), p, "host")
        assert report.passed, (given, report.describe(report.checks[0]))


def test_parts_cover_a_sequence():
    for n in (0, 1, 64, 65, 1000, 8192, 10**6):
        for blocks in (1, 2, 32, 263, 264, 1000):
            parts, length = lightning_mma.cut(n, blocks, 264)
            assert length % lightning_mma.CHUNK == 0
            assert (parts - 1) * length < max(n, 1) <= parts * length
            assert parts == 1 or (blocks * parts <= 264 and length >= 4 * lightning_mma.CHUNK)
    assert lightning_mma.cut(8192, 32, 264) == (8, 1024)


def test_arrays_that_are_on_no_gpu_are_named():
    p = call("gated_delta", 4, d=8, alpha=True, beta=True)
    with pytest.raises(UnsupportedProblem, match="query: got an array of numpy, expected one of cupy, torch or jax"):
        gated_delta(p.query, p.key, p.value, alpha=p.alpha, beta=p.beta)
    with pytest.raises(InvalidProblem, match="query: got float, expected an array of cupy, torch or jax on a GPU"):
        lightning(0.0, p.key, p.value, decay=(0.1,))


def test_a_gradient_is_not_lost_without_a_word():
    torch = pytest.importorskip("torch")
    x = torch.ones(1, 1, 4, 8)
    with pytest.raises(UnsupportedProblem, match="gpu: lightning has no gradients; detach its arrays"):
        lightning(x, x, x.clone().requires_grad_(), decay=(0.1,))
    with torch.no_grad(), pytest.raises(InvalidProblem, match="query: is on device cpu, expected a GPU"):
        lightning(x, x, x.clone().requires_grad_(), decay=(0.1,))


@pytest.mark.parametrize(("shape", "gate"), [(None, 0), ((1, 1, 4, 1), 1), ((1, 1, 4, 8), 2)])
def test_what_is_launched(monkeypatch, shape, gate):
    """Without a GPU: what the kernel is compiled with, its grid, and where its arguments point."""
    seen = {}
    p = call("gated_delta", 4, d=8, d_v=40, beta=True, state=True)

    def place(x, name):
        return View(x.ctypes.data, x.shape, tuple(s // x.itemsize for s in x.strides), x.dtype.name, 0, x)

    def empty(like, size, dtype):
        x = np.empty(size, dtype)
        return x, place(x, "out")

    def queue(kernel, grid, threads, shared, stream, takes, values, places):
        assert {x.partition(".")[0] for x in places} <= values.keys()
        seen.update(takes.unpack(takes.pack(**values)), grid=grid, kernel=kernel)

    own = {"view": place, "empty": empty, "device_of": lambda x, n: 0, "on": lambda n: nullcontext()}
    own |= {"capability": lambda n: (9, 0), "stream_of": lambda x, n: 0, "cast": lambda x, t, n: x}
    own |= {"_contiguous": lambda x: x, "capturing": lambda x: True}
    for name, stand_in in own.items():
        monkeypatch.setattr(recurrence, name, stand_in)
    monkeypatch.setattr(lightning_mma, "queue", queue)
    monkeypatch.setattr(lightning_mma, "capability", lambda n: (9, 0))
    monkeypatch.setattr(lightning_mma, "compiled", lambda text, entry, *_: (text.partition("//")[0], entry))
    alpha = None if shape is None else np.ones(shape, np.float32)
    out, last = gated_delta(p.query, p.key, p.value, alpha=alpha, beta=p.beta, state=p.state, scale=0.5)
    assert seen["kernel"][1] == "gated_delta"
    assert f"#define GATE {gate}\n" in seen["kernel"][0]
    assert "#define D 64\n" in seen["kernel"][0]
    assert seen["grid"] == 2  # 40 columns
    assert (seen["q.data"], seen["alpha.data"]) == (p.query.ctypes.data, 0 if alpha is None else alpha.ctypes.data)
    assert (seen["start"], seen["last"], seen["cu"]) == (p.state.ctypes.data, last.ctypes.data, 0)
    assert (seen["z.n"], seen["z.d_k"], seen["z.d_v"], seen["scale"]) == (4, 8, 40, 0.5)
    assert seen["beta.row"] == 1
    assert out.shape == p.out_shape
    with pytest.raises(InvalidProblem, match=r"state: got shape \(1, 1, 8, 40\), expected \(2, 1, 8, 40\)"):
        gated_delta(p.query, p.key, p.value, beta=p.beta, state=p.state, cu_seqlens=np.array([0, 1, 4]))
    wide = call("gated_delta", 4, d=136, beta=True)
    with pytest.raises(UnsupportedProblem, match="gpu: gated_delta takes queries and keys of up to 128 columns, got"):
        gated_delta(wide.query, wide.key, wide.value, beta=wide.beta)


ENTRY = KERNELS["refattn-recurrent"]


@pytest.mark.skipif(not ENTRY.here, reason="needs a GPU and CuPy")
@pytest.mark.parametrize("dtype", recurrence.TYPES)
@pytest.mark.parametrize("variant", CALLS)
def test_it_is_right_on_a_gpu(variant, dtype):
    report = check_kernel(ENTRY.kernel(), variant, dtypes=[dtype], budget="quick", only="gaussian/*")
    assert report.right, [report.describe(c) for c in report.failures]
    assert report.count("passed") >= 5


def test_it_is_found_for_recurrences():
    assert ENTRY.variants == set(CALLS)
    assert ENTRY.gpu
    assert not ENTRY.capabilities.gradients
