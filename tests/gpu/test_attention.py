"""The kernels on a GPU: the judge, calls over every option, layouts, streams, libraries; not run without a GPU."""

import math
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import Problem, UnsupportedProblem, check_kernel, check_problem
from refattn.check.kernels import KERNELS

from ..conftest import tensor
from .calls import any_call

pytestmark = pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")
APART = ("refattn-gpu-decode", "refattn-gpu-latent")  # tests/gpu/test_decode.py, test_latent.py
OURS = [n for n in KERNELS if n.startswith("refattn-gpu") and n not in APART]


@pytest.mark.parametrize("name", OURS)
def test_the_judge(name):
    e = KERNELS[name]
    report = check_kernel(e.kernel(), capabilities=e.capabilities, model=e.model, name=name, only="!calls/*")
    assert not report.failures, [report.describe(c) for c in report.failures]
    assert report.kept == []
    assert report.count("passed") > 80


@pytest.mark.parametrize("name", ["refattn-gpu", "refattn-gpu-mma", "refattn-gpu-simt"])
def test_the_judge_of_block_masks(name):
    e = KERNELS[name]
    report = check_kernel(
        e.kernel(), "block_sparse", capabilities=e.capabilities, dtypes=["bfloat16"], only="gaussian/*"
    )
    assert not report.failures, [report.describe(c) for c in report.failures]
    assert report.count("passed") > 40


@pytest.mark.parametrize("name", OURS)
@given(data=st.data())
def test_any_call_is_within_its_bound(name, data):
    e = KERNELS[name]
    p = data.draw(any_call(e, 300, 128))
    report = check_problem(e.kernel(), p, "any", model=e.model, name=e.name)
    assert report.passed, [report.describe(c) for c in report.failures]


@given(data=st.data())
def test_any_width_is_within_its_bound(data):
    e = KERNELS[data.draw(st.sampled_from(OURS))]
    size = st.integers(1, 300)
    h_kv, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    n_q, n_k = data.draw(size), data.draw(size)
    d = data.draw(st.sampled_from([1, 8, 17, 56, 64, 96, 104, 128, 136, 192, 256]))
    d = min(d, e.capabilities.d_max)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from(sorted(e.capabilities.dtypes)))
    q, k, v = (tensor(rng, s, dtype) for s in ((2, h_kv * group, n_q, d), (2, h_kv, n_k, d), (2, h_kv, n_k, d)))
    p = Problem(q, k, v, causal=data.draw(st.sampled_from([None, "bottom_right", "top_left"])))
    report = check_problem(e.kernel(), p, "any", model=e.model, name=e.name)
    assert report.passed, [report.describe(c) for c in report.failures]


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


BLOCKS = [(impl, d, c) for impl in ("sm90", "mma", "simt") for d in (64, 128, 256) for c in (None, "bottom_right")]


@pytest.mark.parametrize(("impl", "d", "causal"), BLOCKS)
@pytest.mark.parametrize("size", [128, 40])
def test_block_masks(torch, impl, d, causal, size):
    from refattn.gpu import attention

    if impl == "sm90" and size % 128:
        return  # tests/gpu/test_plan.py: not supported
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, d, device="cuda", dtype=torch.bfloat16) for n in (300, 700, 700))
    blocks = torch.rand(2, 1, -(-300 // size), -(-700 // size), device="cuda") < 0.4
    allowed = blocks.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :300, :700]
    v[:, :, ~allowed.any(2)[0, 0]] = math.nan  # keys that no row of a batch sees: never read
    v[:, :, 650] = math.nan if size == 40 else 1.0
    names = {"causal": causal, "block_mask": (blocks, size, size), "return_lse": True}
    for accuracy in ("fast", "high"):
        if impl == "mma" and d == 256 and accuracy == "high":
            continue
        out, lse = attention(q, k, v, accuracy=accuracy, impl=impl, **names)
        other, other_lse = attention(q, k, v, causal=causal, allowed=allowed, impl="simt", return_lse=True)
        assert torch.equal(out.isnan(), other.isnan())
        torch.testing.assert_close(lse, other_lse, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(out.nan_to_num(), other.nan_to_num(), atol=0.05, rtol=0.05)
        model = KERNELS["refattn-gpu"].model("bfloat16")

        def kernel(p, accuracy=accuracy):
            x = [torch.as_tensor(y.astype(np.float32)).to("cuda", torch.bfloat16) for y in (p.query, p.key, p.value)]
            mask = (blocks[:1], size, size)
            return attention(*x, causal=causal, block_mask=mask, return_lse=True, accuracy=accuracy, impl=impl)

        rng = np.random.default_rng(1)
        host = [tensor(rng, (1, 3, n, d), "bfloat16") for n in (300, 700, 700)]
        p = Problem(*host, causal=causal, allowed=allowed[:1].cpu().numpy())
        report = check_problem(kernel, p, "blocks", model=model)
        assert report.passed, [report.describe(c) for c in report.failures]


def test_strides_streams_and_empty_calls(torch):
    from refattn.gpu import attention

    x = torch.randn(2, 300, 3, 4, 128, device="cuda", dtype=torch.bfloat16)  # (b, n, qkv, h, d)
    q, k, v = (x[:, :, i].transpose(1, 2) for i in range(3))
    whole = attention(*(y.contiguous() for y in (q, k, v)))
    assert torch.equal(attention(q, k, v), whole)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other = attention(q, k, v)
    side.synchronize()
    assert torch.equal(other, whole)
    for impl in (None, "mma", "simt"):
        out, lse = attention(q, k[:, :, :0], v[:, :, :0], return_lse=True, impl=impl)
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        assert attention(q[:, :, :0], k, v, impl=impl).shape == (2, 4, 0, 128)
    with pytest.raises(UnsupportedProblem, match="the kernel sm90 takes rows that begin at multiples of 16 bytes"):
        attention(q[..., :64], k[..., 1:65], v[..., :64], impl="sm90")
    shifted = attention(q[..., :64], k[..., 1:65], v[..., :64])
    aligned = attention(q[..., :64], k[..., 1:65].contiguous(), v[..., :64], impl="mma")
    torch.testing.assert_close(shifted, aligned, atol=1e-2, rtol=1e-2)  # in tiles of other sizes
    with pytest.raises(UnsupportedProblem, match="takes a contiguous last axis, got strides"):
        attention(q[..., ::2], k[..., ::2], v[..., ::2])


@pytest.mark.parametrize("impl", ["sm90", "mma", "simt"])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("accuracy", ["fast", "high"])
def test_a_row_has_the_same_bits_whatever_else_is_in_the_call(torch, impl, d, accuracy):
    from refattn.gpu import attention

    torch.manual_seed(0)
    q = torch.randn(3, 8, 3000, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(3, 2, 3000, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    names = {"causal": "bottom_right", "batch_invariant": True, "accuracy": accuracy, "impl": impl}
    whole = attention(q, k, v, **names)
    ends = [0, 1, 64, 777, 1500, 2999, 3000]  # a prefill in chunks, its last token as in decoding
    for i, j in pairwise(ends):
        assert torch.equal(attention(q[:, :, i:j], k[:, :, :j], v[:, :, :j], **names), whole[:, :, i:j])
    alone = attention(q[1:2, 4:8, 2500:2501], k[1:2, 1:, :2501], v[1:2, 1:, :2501], **names)
    assert torch.equal(alone, whole[1:2, 4:8, 2500:2501])


def test_a_nan_that_some_rows_see_reaches_only_them(torch):
    from refattn.gpu import attention

    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = (torch.randn(2, 4, 1000, 64, device="cuda", dtype=dtype) for _ in range(3))
        clean = attention(q, k, v, causal="bottom_right")
        v[:, 1, 700, 3] = math.nan
        for _ in range(2):  # the marks of the first call must be gone
            out = attention(q, k, v, causal="bottom_right")
            assert out[:, 1, 700:, 3].isnan().all()
            out[:, 1, 700:, 3] = clean[:, 1, 700:, 3] = 0
            torch.testing.assert_close(out, clean, atol=2e-2, rtol=1e-2)
            assert torch.equal(out[:, 0], clean[:, 0])


def test_offsets_that_are_wrong_read_nothing_outside(torch):
    from refattn.gpu import attention

    q = torch.randn(1, 2, 100, 64, device="cuda", dtype=torch.float16)
    for wrong in ([0, 500, 100], [50, 20, 10], [-7, 60, 2**31 - 1]):
        cu = torch.tensor(wrong, device="cuda", dtype=torch.int64)
        for impl in ("mma", "simt"):
            attention(q, q, q, cu_seqlens=(cu, cu), impl=impl)
            torch.cuda.synchronize()


def test_cupy_arrays(torch):
    import cupy

    from refattn.gpu import attention

    q, k, v = (torch.randn(1, 2, 65, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    out, lse = attention(*(cupy.from_dlpack(x) for x in (q, k, v)), return_lse=True)
    assert isinstance(out, cupy.ndarray)
    assert torch.equal(torch.from_dlpack(out), attention(q, k, v))
    assert lse.dtype == cupy.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jax_arrays(dtype):
    jax = pytest.importorskip("jax")
    from refattn.gpu import attention

    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(x, (1, 2, 300, 64), dtype) for x in keys)
    out, lse = attention(q, k, v, causal="bottom_right", sink=jax.numpy.ones(2), return_lse=True)
    assert isinstance(out, jax.Array)
    assert (out.dtype, lse.dtype, out.device) == (q.dtype, np.float32, q.device)
    e = KERNELS["refattn-gpu"]
    p = Problem(*(np.asarray(x) for x in (q, k, v)), causal="bottom_right", sink=np.ones(2, np.float32))
    report = check_problem(lambda _: (np.asarray(out), np.asarray(lse)), p, "jax", model=e.model)
    assert report.passed, [report.describe(c) for c in report.failures]


@pytest.mark.parametrize("causal", [None, "bottom_right"])
def test_a_cuda_graph_replays(torch, causal):
    from refattn.gpu import attention

    q, k, v = (torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    expected = attention(q, k, v, causal=causal)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attention(q, k, v, causal=causal)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = attention(q, k, v, causal=causal)
    for _ in range(3):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_waits_for_the_gpu(torch):
    from refattn.gpu import attention

    q = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.float16)
    cu = torch.tensor([0, 100, 256], device="cuda", dtype=torch.int32)
    seen = torch.ones(1, 1, 256, 256, device="cuda", dtype=torch.bool)
    calls = ({}, {"cu_seqlens": (cu, cu)}, {"allowed": seen}, {"impl": "simt"})
    for options in calls:
        attention(q, q, q, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy = torch.cuda.Event()
        torch.cuda._sleep(int(3e9))  # a second or more
        for options in calls:
            attention(q, q, q, **options)
        busy.record()
        assert not busy.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_processes_may_build_at_once(torch, tmp_path):
    code = (
        "import torch; from refattn.gpu import attention; "
        "q = torch.ones(1, 1, 8, 8, device='cuda', dtype=torch.float16); print(float(attention(q, q, q).sum()))"
    )
    environment = os.environ | {"CUPY_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [p.communicate()[0].strip() for p in running] == ["64.0", "64.0"]
    assert any(tmp_path.iterdir())


def test_the_compilers_message_is_shown(torch):
    from refattn.errors import BuildError
    from refattn.gpu.build import compiled

    with pytest.raises(BuildError, match=r"gpu: compiling wrong for sm_90 failed with CompileException: .*nonsense"):
        compiled('extern "C" __global__ void wrong() { nonsense; }', "wrong", 0, "sm_90", 0)
