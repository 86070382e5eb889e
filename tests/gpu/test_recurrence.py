"""The recurrences' kernels: their text run on the CPU beside the definition, what they take, how they compile."""

import shutil
from contextlib import nullcontext

import numpy as np
import pytest

from refattn import InvalidProblem, Problem, UnsupportedProblem, check_kernel, check_problem, evaluate
from refattn.check.bounds.forward import bounds
from refattn.check.bounds.gradients import gradient_bounds
from refattn.check.inputs.draw import Draw
from refattn.check.kernel import Kernel
from refattn.check.kernels import KERNELS
from refattn.check.model import flash
from refattn.dtypes import FORMATS
from refattn.gpu import gated_delta, lightning, lightning_backward, lightning_mma, recurrence, recurrence_backward
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
    ("lightning", 16, {"n": 200, "d": 8, "d_v": 66, "state": True, "options": {"decay": (0.01,)}, **ENDS}),
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


@GXX
def test_keys_that_come_again(tmp_path):
    """The state says of them what the value is: what is left is small beside both, and shows what they lose."""
    made, n = libraries(tmp_path), 70
    p = call("gated_delta", n, "bfloat16", d=8, d_v=8, beta=True, state=True)
    key = p.key.astype(np.float64)
    key = (key / np.linalg.norm(key, axis=3, keepdims=True)).astype(p.key.dtype)
    for count, beta in ((1, 1.0), (2, 1.9)):
        again = {name: np.repeat(x[:, :, :count], n // count, 2) for name, x in (("key", key), ("value", p.value))}
        same = p.replace(**again, beta=np.full((1, 1, n, 1), beta, np.float32))
        report = check_problem(lambda x: on_warps(made, x), same, "host")
        assert report.passed, (count, report.describe(report.checks[0]))


def by_host(made, monkeypatch):
    """Return a kernel with gradients whose recurrences run on the CPU: on warps in bfloat16, else in plain float32."""

    def forward(x):
        return on_warps(made[0], x) if x.dtype == "bfloat16" else run(made[1], x)

    def run_on(entry, given, scale, state, cu, options, back=False):
        step = -1 if back else 1
        given, state = {n: x[:, :, ::step] for n, x in given.items()}, None if state is None else state.copy()
        more = {"scale": scale, "state": state, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "options": options}
        out, last = forward(Problem(**given, causal="bottom_right", variant=entry, **more))
        return out[:, :, ::step], last

    def gradients(x, dout, dstate_out=None):
        more = {"decay": x.options["decay"], "scale": x.scale, "state": x.state, "cu_seqlens": x.cu_seqlens_q}
        dout = dout.astype(x.query.dtype)
        found = lightning_backward(x.query, x.key, x.value, dout, dstate_out=dstate_out, **more)
        return {n: y for n, y in zip(("dq", "dk", "dv", "dstate"), found, strict=True) if y is not None}

    monkeypatch.setattr(recurrence, "run", run_on)
    monkeypatch.setattr(recurrence_backward, "_numbers", lambda like, x: np.array(x, np.float32))
    monkeypatch.setattr(recurrence_backward, "cast", lambda x, dtype, name: x.astype(FORMATS[dtype].dtype))
    kernel = Kernel.of(forward, name="warps")
    kernel.call.gradients = gradients
    return kernel


@GXX
def test_gradients_are_the_same_kernels_with_other_roles(tmp_path, monkeypatch):
    kernel = by_host((libraries(tmp_path), library(tmp_path, 64, 0)), monkeypatch)
    ends = np.array([0, 1, 1, 66, 80], np.int32)
    packs = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    p = call("lightning", 80, "bfloat16", d=66, d_v=66, state=True, scale=0.3, **packs)
    grouped = call("lightning", 40, "bfloat16", d=16, d_v=24, h=4, h_kv=2, scale=0.3)
    for x in (p, grouped):
        dout = np.random.default_rng(1).standard_normal(x.out_shape).astype(x.query.dtype)
        report = check_problem(kernel, x, "host", gradients=dout)
        assert report.passed, [report.describe(c) for c in report.failures]
        assert not report.unasked


@GXX
@pytest.mark.parametrize("pack", [False, True])
def test_what_arrives_at_the_last_state_goes_on_to_keys_values_and_the_first(tmp_path, monkeypatch, pack):
    ends = np.array([0, 1, 1, 21, 30], np.int32)
    more = {"cu_seqlens_q": ends, "cu_seqlens_k": ends} if pack else {"h": 2, "h_kv": 1}
    p = call("lightning", 30, d=64, d_v=24, state=True, scale=0.3, **more)
    kernel = by_host((None, library(tmp_path, 64, 0)), monkeypatch)
    rng = np.random.default_rng(2)
    dout, end = (rng.standard_normal(s).astype(np.float32) for s in (p.out_shape, p.state_shape))
    answer = evaluate(p, gradients=dout, dstate_out=end)
    limit = gradient_bounds(answer, flash("float32"), dout, bounds(answer, flash("float32")), end)
    for n, x in kernel.call.gradients(p, dout, end).items():
        assert (answer.enclosures[n].error(x.astype(float)) <= limit[n]).all(), n


def test_an_array_is_turned_without_a_copy():
    x = np.zeros((2, 3, 5, 8), np.float32)[:, 1:]
    back, found = x[:, :, ::-1], recurrence._turned(View(x.ctypes.data, x.shape, (120, 40, 8, 1), "float32", 0))
    assert found.pointer == back.ctypes.data
    assert tuple(4 * s for s in found.strides) == back.strides


def test_what_gradients_do_not_take_is_named():
    x = np.zeros((1, 2, 4, 8), np.float32)
    wide = np.zeros((1, 2, 4, 136), np.float32)
    with pytest.raises(InvalidProblem, match=r"dstate_out: got shape \(1, 2, 4, 8\), expected \(1, 2, 8, 8\)"):
        lightning_backward(x, x, x, x, decay=(0.1, 0.2), dstate_out=x)
    with pytest.raises(UnsupportedProblem, match="gradients of lightning take values of up to 128 columns, got 136"):
        lightning_backward(x, x, wide, wide, decay=(0.1, 0.2))


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


def test_it_runs_on_a_gpu_alone():
    torch = pytest.importorskip("torch")
    x = torch.ones(1, 1, 4, 8)
    for y in (x, x.clone().requires_grad_()):
        with pytest.raises(InvalidProblem, match="query: is on device cpu, expected a GPU"):
            gated_delta(x, x, y, beta=x[..., :1])


def test_pytorchs_graph_gets_gradients(monkeypatch):
    """Without a GPU: what the graph's function passes on, forward and backward."""
    torch = pytest.importorskip("torch")
    seen = []

    def run_on(entry, given, scale, state, cu, options, back=False):
        seen.append((back, scale, options["decay"], state is None))
        q, v = given["query"], given["value"]
        return torch.full((*q.shape[:3], v.shape[3]), 2.0), torch.ones(1, 1, q.shape[3], v.shape[3])

    monkeypatch.setattr(recurrence, "run", run_on)
    q, k, v, state = (torch.ones(1, 1, *s, requires_grad=True) for s in ((4, 8), (4, 8), (4, 6), (8, 6)))
    monkeypatch.setattr(recurrence_backward, "_numbers", lambda like, x: torch.tensor(x))
    monkeypatch.setattr(recurrence_backward, "cast", lambda x, dtype, name: x.to(getattr(torch, dtype)))
    out, last = lightning(q, k, v, decay=(0.5,), scale=3.0, state=state)
    found = torch.autograd.grad(out.sum(), (q, k, v, state), retain_graph=True)
    assert [x.shape for x in found] == [x.shape for x in (q, k, v, state)]
    assert seen == [(back, 3.0, (0.5,), none) for back, none in ((0, 0), (0, 0), (1, 1), (1, 1))]
    assert np.float32(found[3][0, 0, 0, 0]) == np.float32(3.0 * np.exp(-0.5))
    _, by_key, _, by_state = torch.autograd.grad(last, (q, k, v, state), 5 * torch.ones_like(last))
    assert abs(by_key[0, 0, :, 0] - 2 - 30 * torch.exp(-0.5 * torch.arange(3, -1, -1))).max() <= 2.0**-18
    assert abs(by_state - 3 * np.exp(-0.5) - 5 * np.exp(-2)).max() <= 2.0**-20


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
    assert ENTRY.capabilities.gradients >= {"dq", "dk", "dv", "dalpha", "dbeta", "dstate"}
    assert ENTRY.capabilities.dstate_out
