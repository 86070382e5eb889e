"""Gradients on a GPU against the exact ones: the judge, every option, layouts; without a GPU the kernels compile."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem, check_kernel, check_problem
from refattn.check.kernels import KERNELS as ENTRIES
from refattn.gpu.backward_kernels import KERNELS, SIMT, hopper_plan, pass_of, support
from refattn.gpu.plan import pick

from ..conftest import tensor
from .calls import any_call
from .compiled import NVCC, check_compiles, core
from .test_build import MOST, PLAIN

gpu = pytest.mark.skipif(not ENTRIES["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")
OURS = ["refattn-gpu", "refattn-gpu-mma", "refattn-gpu-simt"]
OPTIONS = (
    {},
    {"softcap": True, "aligned": False},
    {"allowed": True},
    {"bias": "own"},
    {"blocks": (40, 40), "allowed": True, "bias": "own", "softcap": True},
)


def passes():
    """Return (name, text, shared bytes) of every pass: types, widths, options."""
    for name, dtypes, widths in (("mma", ("float16", "bfloat16"), (64, 128)), ("simt", None, (64, 128, 256))):
        for i, (d, options) in enumerate((d, o) for d in widths for o in OPTIONS):
            for dtype in (dtypes[i % 2],) if dtypes else ("float32", "float64", "bfloat16"):
                own = {"bias": dtype} if options.get("bias") else {}
                call = replace(PLAIN, dtype=dtype, d_k=d, d_v=d, **options | own)
                for which in (0, 1, 2) if name == "simt" and call.bias else (0, 1):
                    plan = pass_of(KERNELS[name], call, which, name == "mma" and which == 0 and bool(call.bias))
                    yield f"{name} {dtype} {d} {which} {options}", KERNELS[name].source(plan.macros), plan.shared_bytes


def hopper():
    """Return (name, text, shared bytes) of Hopper's kernel: types, widths, orders of sums."""
    for i, (d, causal, ordered) in enumerate(product((64, 128, 256), (None, "top_left"), (0, 1))):
        call = replace(PLAIN, dtype=("float16", "bfloat16")[i % 2], d_k=d, d_v=d, causal=causal, softcap=i % 4 > 1)
        plan = hopper_plan(call, bool(ordered))
        yield f"sm90 {d} {causal} {ordered}", plan.kernel.source(plan.macros), plan.shared_bytes


PASSES = [*passes(), *hopper()]
PASSES += [(f"support {t}", support(t, t, t), 0) for t in ("float16", "bfloat16", "float32", "float64")]
COMPILED = core({name: text for name, text, _ in PASSES})


@NVCC
@pytest.mark.parametrize("name", COMPILED)
def test_every_pass_compiles_without_spills(tmp_path, name):
    check_compiles(tmp_path / "kernel.cu", COMPILED[name])


def test_shared_memory_suffices():
    assert [name for name, _, shared in PASSES if shared > MOST] == []


def test_which_kernel_runs():
    assert pick(KERNELS, PLAIN, None, (9, 0))[0] == "sm90"
    assert pick(KERNELS, replace(PLAIN, window=(3, None), sink=True, causal="top_left"), None, (9, 0))[0] == "sm90"
    assert pick(KERNELS, replace(PLAIN, softcap=True, packed=True), None, (9, 0))[0] == "sm90"
    assert pick(KERNELS, PLAIN, None, (8, 0))[0] == "mma"
    for changed, text in (
        ({"allowed": True, "blocks": (4, 4)}, "does not take allowed, block_mask backward"),
        ({"d_k": 60}, "takes head dims that are multiples of 8 up to 256 backward, got 60 and 64"),
        ({"mapped": False}, "takes rows that begin at multiples of 16 bytes, at strides above 0"),
        ({"n_k": 0}, r"takes 1 to 2\*\*29 - 1 rows and keys backward, got 128 and 0"),
        ({"dtype": "float32"}, "takes float16 and bfloat16, got float32"),
    ):
        with pytest.raises(UnsupportedProblem, match=f"gpu: the kernel sm90 {text}"):
            pick(KERNELS, replace(PLAIN, **changed), "sm90", (9, 0))
    assert pick(KERNELS, replace(PLAIN, dtype="float32"), None, (9, 0))[0] == "simt"
    assert pick(KERNELS, replace(PLAIN, d_k=136), None, (9, 0))[0] == "sm90"
    assert pick(KERNELS, replace(PLAIN, d_k=136), None, (8, 0))[0] == "simt"
    with pytest.raises(UnsupportedProblem, match="gpu: the kernel mma takes head dims up to 128 backward, got 136 and"):
        pick(KERNELS, replace(PLAIN, d_k=136), "mma", (9, 0))
    with pytest.raises(
        UnsupportedProblem, match="gpu: the kernel mma takes a block mask or packed sequences, got both"
    ):
        pick(KERNELS, replace(PLAIN, blocks=(4, 4), packed=True), "mma", (9, 0))
    with pytest.raises(InvalidInput, match="impl: got 'sm80', expected one of sm90, mma, simt"):
        pick(KERNELS, PLAIN, "sm80", (9, 0))
    assert SIMT.obstacle(PLAIN, (9, 0)) == ""


@gpu
@pytest.mark.parametrize("name", OURS)
def test_the_judge(name):
    e = ENTRIES[name]
    report = check_kernel(e.kernel(), capabilities=e.capabilities, model=e.model, name=name, only="*/gradients[*")
    assert not report.failures, [report.describe(c) for c in report.failures]
    assert report.count("passed") > 10


@gpu
@pytest.mark.parametrize("name", OURS)
@given(data=st.data())
def test_any_call_is_within_its_bound(name, data):
    e = ENTRIES[name]
    p = data.draw(any_call(e, 200, 64))
    rng = np.random.default_rng(0)
    dout = tensor(rng, p.out_shape, p.dtype)
    report = check_problem(e.kernel(), p, "any", model=e.model, name=e.name, gradients=dout)
    assert report.passed, [report.describe(c) for c in report.failures]


@gpu
@given(data=st.data())
def test_any_width_is_within_its_bound(data):
    e = ENTRIES[data.draw(st.sampled_from(OURS))]
    size = st.integers(1, 200)
    n_q, n_k = data.draw(size), data.draw(size)
    d = data.draw(st.sampled_from([1, 17, 56, 64, 96, 104, 128, 136, 256]))
    d = min(d, 128) if e.name == "refattn-gpu-mma" else d
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from(sorted(e.capabilities.dtypes)))
    q, k, v, dout = (tensor(rng, (2, h, n, d), dtype) for h, n in ((6, n_q), (2, n_k), (2, n_k), (6, n_q)))
    p = Problem(q, k, v, causal=data.draw(st.sampled_from([None, "bottom_right", "top_left"])))
    report = check_problem(e.kernel(), p, "any", model=e.model, name=e.name, gradients=dout)
    assert report.passed, [report.describe(c) for c in report.failures]


@gpu
@pytest.mark.parametrize("impl", ["mma", "simt"])
@pytest.mark.parametrize("shape", [(2, 4, 150, 130), (1, 4, 150, 130), (2, 1, 1, 130), (1, 1, 150, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_bias_spread_along_axes(impl, shape, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (tensor(rng, s, "bfloat16") for s in ((2, 4, 150, 64), (2, 2, 130, 64), (2, 2, 130, 64)))
    bias = tensor(rng, shape, dtype)
    dout = tensor(rng, q.shape, "bfloat16")
    p = Problem(q, k, v, bias=bias, causal="top_left", softcap=3.0)
    e = ENTRIES[f"refattn-gpu-{impl}"]
    report = check_problem(e.kernel(), p, "bias", model=e.model, gradients=dout)
    assert report.passed, [report.describe(c) for c in report.failures]


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@gpu
@pytest.mark.parametrize("impl", ["mma", "simt"])
@pytest.mark.parametrize("size", [128, 40])
def test_block_masks(torch, impl, size):
    from refattn.gpu import attention, attention_backward

    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 3, n, 64, device="cuda", dtype=torch.bfloat16) for n in (300, 500, 500, 300))
    blocks = torch.rand(2, 1, -(-300 // size), -(-500 // size), device="cuda") < 0.4
    allowed = blocks.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :300, :500].contiguous()
    found = []
    for options in ({"block_mask": (blocks, size, size)}, {"allowed": allowed}):
        options |= {"causal": "bottom_right", "impl": impl}
        out, lse = attention(q, k, v, return_lse=True, **options)
        found.append(attention_backward(q, k, v, out, lse, dout, **options))
    for n in ("dq", "dk", "dv"):
        torch.testing.assert_close(found[0][n], found[1][n], atol=0.02, rtol=0.02)  # tiles of other sizes


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_hidden_changes_nothing(torch, dtype):
    from refattn.gpu import attention, attention_backward

    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 200, 64, device="cuda", dtype=getattr(torch, dtype)) for _ in range(4))
    options = {"causal": "bottom_right", "window": (90, 0)}
    out, lse = attention(q, k, v, return_lse=True, **options)
    clean = attention_backward(q, k, v, out, lse, dout, **options)
    at = {"dq": (k, 190), "dk": (q, 5), "dv": (dout, 5)}  # row 5 sees keys to 5; rows from 190 on see key 190
    far = {"dq": slice(0, 190), "dk": slice(6, 200), "dv": slice(6, 200)}
    for name, (x, row) in at.items():
        kept = x[:, :, row].clone()
        x[:, :, row] = math.nan
        for _ in range(2):  # the marks of the first call must be gone
            found = attention_backward(q, k, v, out, lse, dout, **options)[name]
            assert not found[:, :, far[name]].isnan().any()
            torch.testing.assert_close(found[:, :, far[name]], clean[name][:, :, far[name]], atol=0.02, rtol=0.02)
        x[:, :, row] = kept


@gpu
@pytest.mark.parametrize("impl", ["mma", "simt"])
def test_the_same_bits_each_time(torch, impl):
    from refattn.gpu import attention, attention_backward

    torch.manual_seed(0)
    x = torch.randn(2, 700, 4, 4, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v, dout = (x[:, :, i].transpose(1, 2) for i in range(4))  # strided
    bias, sink = torch.randn(1, 4, 1, 700, device="cuda"), torch.randn(4, device="cuda")
    options = {"causal": "top_left", "bias": bias, "sink": sink, "impl": impl}
    out, lse = attention(q, k, v, return_lse=True, **options)
    first = attention_backward(q, k, v, out, lse, dout, **options)
    assert set(first) == {"dq", "dk", "dv", "dbias", "dsink"}
    for _ in range(5):
        again = attention_backward(*(y.contiguous() for y in (q, k, v)), out, lse, dout, **options)
        assert all(torch.equal(first[n], again[n]) for n in first)
    only = attention_backward(q, k, v, out, lse, dout, **options, wanted=["dv"])
    assert list(only) == ["dv"]
    assert torch.equal(only["dv"], first["dv"])


@gpu
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": "bottom_right", "softcap": 5.0},
        {"causal": "top_left", "window": (200, None)},
        {"packed": True, "window": (30, None), "softcap": 5.0},
    ],
)
def test_sums_in_one_order_and_in_any(torch, d, options):
    from refattn.gpu import attention, attention_backward

    torch.manual_seed(0)
    b, options = 1 if "packed" in options else 2, dict(options)
    if options.pop("packed", False):  # keys of a sequence without rows, and others that no row sees
        ends = ((0, 10, 10, 300, 1100), (0, 200, 600, 1000, 1500))
        options["cu_seqlens"] = tuple(torch.tensor(x, device="cuda", dtype=torch.int32) for x in ends)
    q, dout = (torch.randn(b, 4, 1100, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(b, 2, 1500, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, lse = attention(q, k, v, return_lse=True, **options)
    first = attention_backward(q, k, v, out, lse, dout, impl="sm90", **options)
    for _ in range(5):
        again = attention_backward(q, k, v, out, lse, dout, impl="sm90", **options)
        assert all(torch.equal(first[n], again[n]) for n in first)
    for other in (
        attention_backward(q, k, v, out, lse, dout, impl="sm90", deterministic=False, **options),
        attention_backward(q, k, v, out, lse, dout, impl="simt" if d == 256 else "mma", **options),
    ):
        assert all(float((first[n] - other[n]).norm() / other[n].norm()) < 2**-8 for n in first)
    only = attention_backward(q, k, v, out, lse, dout, impl="sm90", wanted=["dq"], **options)
    assert torch.equal(only["dq"], first["dq"])


def step(q):
    """Return the results of a forward and a backward call: of Hopper's kernels, their repairs and ordered sums."""
    from refattn.gpu import attention, attention_backward

    out, lse = attention(q, q, q, return_lse=True, causal="top_left", impl="sm90")
    return [out, lse, *attention_backward(q, q, q, out, lse, out, impl="sm90", causal="top_left").values()]


@gpu
def test_two_threads_on_one_stream(torch):
    inputs = [torch.randn(1, 4, n, 64, device="cuda", dtype=torch.bfloat16) for n in (1000, 1020)]
    inputs[0][:, :, 900:] = math.nan  # rows before them are repaired
    bits = [[x.view(torch.uint8) for x in step(q)] for q in inputs]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = [[x.view(torch.uint8) for x in y] for y in pool.map(step, inputs * 200)]
    finally:
        sys.setswitchinterval(before)
    for i, y in enumerate(found):
        assert all(map(torch.equal, y, bits[i % 2]))


@gpu
def test_two_cuda_graphs_at_once(torch):
    inputs = [torch.randn(1, 4, n, 64, device="cuda", dtype=torch.bfloat16) for n in (1000, 1020)]
    expected = [step(q) for q in inputs]
    graphs = []
    for q in inputs:
        graphs.append((torch.cuda.CUDAGraph(), torch.cuda.Stream()))
        with torch.cuda.graph(graphs[-1][0]):
            graphs[-1] += (step(q),)
    for _ in range(50):
        for graph, stream, _ in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, _, found), y in zip(graphs, expected, strict=True):
        assert all(map(torch.equal, found, y))


@gpu
def test_a_number_that_is_spread_is_taken_for_dout(torch):
    from refattn.gpu import attention, attention_backward

    q, k, v = (torch.randn(2, 3, 70, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, lse = attention(q, k, v, return_lse=True)
    one = torch.ones((), device="cuda", dtype=torch.bfloat16)
    spread, whole = (attention_backward(q, k, v, out, lse, x) for x in (one.expand(out.shape), torch.ones_like(out)))
    assert all(torch.equal(spread[n], whole[n]) for n in whole)


@gpu
def test_what_does_not_fit(torch):
    from refattn.gpu import attention, attention_backward

    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.float16)
    out, lse = attention(q, q, q, return_lse=True)
    with pytest.raises(InvalidProblem, match="lse: got float16 of shape"):
        attention_backward(q, q, q, out, lse.half(), out)
    with pytest.raises(InvalidProblem, match="dout: got float16 of shape"):
        attention_backward(q, q, q, out, lse, out[:, :, :3])
    with pytest.raises(InvalidInput, match="wanted: got 'dbias', expected gradients out of dq, dk, dv"):
        attention_backward(q, q, q, out, lse, out, wanted=["dbias"])


@gpu
def test_a_gradient_that_is_spread_is_copied(torch):
    from refattn.gpu import attention, attention_backward

    q, k, v = (torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    out, lse = attention(q, k, v, return_lse=True)
    spread = torch.ones((), device="cuda", dtype=torch.float16).expand(out.shape)
    found = attention_backward(q, k, v, out, lse, spread)
    expected = attention_backward(q, k, v, out, lse, spread.contiguous())
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@gpu
def test_cupy_and_jax_arrays(torch):
    import cupy

    from refattn.gpu import attention, attention_backward

    jax = pytest.importorskip("jax")
    q, k, v, dout = (torch.randn(1, 2, 65, 64, device="cuda", dtype=torch.float16) for _ in range(4))
    out, lse = attention(q, k, v, return_lse=True)
    expected = attention_backward(q, k, v, out, lse, dout)
    torch.cuda.synchronize()
    given = [cupy.from_dlpack(x) for x in (q, k, v, out, lse, dout)]
    found = attention_backward(*given)
    assert all(torch.equal(torch.from_dlpack(found[n]), x) for n, x in expected.items())
    found = attention_backward(*(jax.dlpack.from_dlpack(x) for x in given))
    assert all(isinstance(x, jax.Array) for x in found.values())
    assert all(np.array_equal(np.asarray(found[n]), x.cpu().numpy()) for n, x in expected.items())
