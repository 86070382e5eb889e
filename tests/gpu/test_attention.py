"""The kernel on a GPU: the judge, and calls that the judge does not make. Without a GPU they do not run."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refattn import Problem, UnsupportedProblem, check_kernel, check_problem
from refattn.check.kernels import KERNELS

from ..conftest import tensor

pytestmark = [
    pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy"),
    pytest.mark.filterwarnings("ignore:ExternalStream is deprecated:DeprecationWarning"),
]
KNOWN = {
    "poison/value-seen-by-some[float16]",  # a causal row reads the values of its tile, also those that it does not see
    "poison/value-seen-by-some[bfloat16]",
    "extreme/huge-values[bfloat16]",  # sums of values near the largest float32, before they are divided
    "extreme/huge-products[bfloat16]",  # products of queries and keys past float32
}
HIGH = {"probe/faint-key[float16]"}  # P's second part is below float16's smallest numbers


@pytest.mark.parametrize("name", ["refattn-gpu", "refattn-gpu-high"])
def test_the_judge(name):
    e = KERNELS[name]
    report = check_kernel(e.kernel(), capabilities=e.capabilities, model=e.model, name=name)
    expected = KNOWN | (HIGH if name == "refattn-gpu-high" else set())
    assert {c.name for c in report.failures} == expected, [report.describe(c) for c in report.failures]
    assert report.count("passed") > 80


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_call_is_within_its_bound(data):
    e = KERNELS[data.draw(st.sampled_from(["refattn-gpu", "refattn-gpu-high"]))]
    size = st.integers(1, 300)
    h_kv, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    n_q, n_k, d = data.draw(size), data.draw(size), 8 * data.draw(st.integers(1, 32))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from(["float16", "bfloat16"]))
    shapes = ((2, h_kv * group, n_q, d), (2, h_kv, n_k, d), (2, h_kv, n_k, d))
    q, k, v = (tensor(rng, s, dtype) for s in shapes)
    p = Problem(q, k, v, causal=data.draw(st.sampled_from([None, "bottom_right"])))
    report = check_problem(e.kernel(), p, "any", model=e.model, name=e.name)
    assert report.passed, [report.describe(c) for c in report.failures]


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


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
    out, lse = attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    with pytest.raises(UnsupportedProblem, match=r"key: got strides .* rows that begin at multiples of 16 bytes"):
        attention(q[..., :64], k[..., 1:65], v[..., :64])


def test_cupy_arrays(torch):
    import cupy

    from refattn.gpu import attention

    q, k, v = (torch.randn(1, 2, 65, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    out, lse = attention(*(cupy.from_dlpack(x) for x in (q, k, v)), return_lse=True)
    assert isinstance(out, cupy.ndarray)
    assert torch.equal(torch.from_dlpack(out), attention(q, k, v))
    assert lse.dtype == cupy.float32


def test_a_cuda_graph_replays(torch):
    from refattn.gpu import attention

    q, k, v = (torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    expected = attention(q, k, v)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attention(q, k, v)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = attention(q, k, v)
    for _ in range(3):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
