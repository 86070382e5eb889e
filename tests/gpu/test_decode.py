"""Few queries over many keys: the parts of the keys, the kernel against exact answers on a GPU."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import Problem, check_problem
from refattn.check.kernels import KERNELS
from refattn.gpu import launch as launches
from refattn.gpu.arguments import arguments_of
from refattn.gpu.decode import KERNEL, Split, split_of
from refattn.gpu.plan import choose

from ..conftest import tensor
from .compiled import NVCC, check_compiles, core
from .test_build import MOST, PLAIN
from .test_launch import arrays, driver, members  # noqa: F401

gpu = pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")
FEW = replace(PLAIN, n_q=1, n_k=5000)
OPTIONS = (
    {},
    {"accuracy": "high", "causal": "top_left"},
    {"softcap": True, "aligned": False, "window": (3, 4)},
    {"dtype": "float16", "causal": "bottom_right"},
)
CALLS = [
    replace(FEW, d_k=d, d_v=d, group=group, **options)
    for d in (32, 64, 96, 128)
    for group in (4, 32, 64)
    for options in OPTIONS
]
CALLS = [c for c in CALLS if not KERNEL.obstacle(c, (9, 0))]
COMPILED = core({str(c): KERNEL.source(KERNEL.macros(c)) for c in CALLS})


@NVCC
@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_without_spills(tmp_path, name):
    check_compiles(tmp_path / "kernel.cu", COMPILED[name])


def test_shared_memory_suffices():
    assert all(KERNEL.shared_bytes(KERNEL.macros(c)) <= MOST for c in CALLS)


def test_the_parts_of_the_keys():
    assert split_of(FEW) == Split(0, 5000, 512, 10)
    assert split_of(replace(FEW, n_k=100, n_q=4)) == Split(0, 100, 256, 1)
    assert split_of(replace(FEW, n_k=65536, group=8)) == Split(0, 65536, 2048, 32)
    assert split_of(replace(FEW, n_q=4, window=(1000, None))) == Split(3996, 1004, 512, 2)
    assert split_of(replace(FEW, n_q=4, causal="top_left")) == Split(0, 4, 512, 1)
    assert split_of(replace(FEW, n_q=4, causal="top_left", window=(0, 9))) == Split(0, 4, 512, 1)
    assert split_of(replace(FEW, n_k=3, n_q=9, causal="bottom_right")) == Split(0, 3, 256, 1)
    assert split_of(replace(FEW, n_k=0)).units == 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"n_q": 17}, "takes 1 to 16 queries, got 17"),
        ({"n_q": 16, "group": 4}, "takes up to 32 queries of a key head's group, got 64"),
        ({"packed": True, "bias": "bfloat16"}, "does not take bias, cu_seqlens"),
        ({"d_v": 136}, "takes head dims up to 128, got 64 and 136"),
        ({"dtype": "float32"}, "takes float16 and bfloat16, got float32"),
    ],
)
def test_what_it_does_not_take(given, text):
    assert KERNEL.obstacle(replace(FEW, **given), (9, 0)) == text


def test_when_it_is_chosen():
    assert choose(FEW, None, (9, 0)).impl == "decode"
    short = choose(replace(FEW, n_k=1000), None, (9, 0))
    assert short.impl == "sm90"
    assert "the kernel decode is chosen from 1024 keys on, got 1000" in short.why
    assert choose(replace(FEW, n_k=10), "decode", (9, 0)).impl == "decode"
    assert choose(FEW, None, (8, 0)).impl == "mma"
    invariant = choose(replace(FEW, batch_invariant=True), None, (9, 0))
    assert invariant.impl == "sm90"
    assert "the kernel decode gives rows other bits than the kernels for many queries do" in invariant.why


def test_two_launches(driver, monkeypatch):  # noqa: F811
    call = replace(PLAIN, n_q=8, n_k=300, group=4)
    given = arrays() | {"query": replace(arrays()["query"], shape=(2, 4, 8, 64))}
    monkeypatch.setattr(launches, "empty", lambda like, shape, dtype: (None, replace(given["lse"], pointer=1 << 20)))
    monkeypatch.setattr(launches, "kernel_of", lambda plan, device, entry="", shared=None: (entry or "decode", None))
    driver.takes = [KERNEL.takes, arguments_of("decode.cu", "merge")]
    options = {"scale": 0.5, "causal": None, "window": None, "softcap": None}
    launches.launch(call, choose(call, "decode", (9, 0)), None, given, options, 7)
    (first, grid, threads, *_, a), (second, rows, _, shared, stream, b) = driver.launches
    assert (first, grid, threads) == ("decode", 4, 256)  # 2 batches of 1 key head of 2 parts
    assert (second, rows, shared, stream) == ("merge", 2 * 4 * 8, 0, 7)
    assert a == b
    width = 64
    cut = {"first_key": 0, "keys": 300, "unit": 256, "units": 2, "workers": 4}
    assert members(a, "s") == {"parts": 1 << 20, "stats": (1 << 20) + 4 * 4 * 32 * width, **cut}


@gpu
@given(data=st.data())
def test_any_call_is_within_its_bound(data):
    e = KERNELS["refattn-gpu-decode"]
    group, n_q = data.draw(st.sampled_from([(1, 16), (4, 1), (3, 5), (8, 2), (16, 1), (1, 1)]))
    n_k = data.draw(st.one_of(st.integers(0, 40), st.integers(100, 1500)))
    d = data.draw(st.sampled_from([8, 17, 64, 72, 96, 128]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from(["float16", "bfloat16"]))
    q, k, v = (tensor(rng, s, dtype) for s in ((2, 2 * group, n_q, d), (2, 2, n_k, d), (2, 2, n_k, d)))
    side = st.one_of(st.none(), st.integers(0, 300))
    p = Problem(
        *(q, k, v),
        causal=data.draw(st.sampled_from([None, "bottom_right", "top_left"])),
        window=data.draw(st.one_of(st.none(), st.tuples(side, side))),
        softcap=data.draw(st.sampled_from([None, 2.0])),
        sink=data.draw(st.sampled_from([None, tensor(rng, (2 * group,))])),
        scale=data.draw(st.sampled_from([None, -0.3])),
    )
    report = check_problem(e.kernel(), p, "any", model=e.model, name=e.name)
    assert report.passed, [report.describe(c) for c in report.failures]


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@gpu
@pytest.mark.parametrize("accuracy", ["fast", "high"])
def test_long_calls_and_the_same_bits_for_any_batch(torch, accuracy):
    from refattn.gpu import attention

    torch.manual_seed(0)
    q, k, v = (
        torch.randn(3, h, n, 128, device="cuda", dtype=torch.bfloat16) for h, n in ((8, 2), (2, 70001), (2, 70001))
    )
    out, lse = attention(q, k, v, causal="bottom_right", return_lse=True, accuracy=accuracy)
    s = q.double() @ k.double().repeat_interleave(4, 1).transpose(2, 3) / math.sqrt(128)
    s[:, :, 0, -1] = -math.inf
    torch.testing.assert_close(lse, torch.logsumexp(s, 3).float(), rtol=1e-6, atol=1e-5)
    exact = torch.softmax(s, 3) @ v.double().repeat_interleave(4, 1)
    assert (out.double() - exact).norm() < 4e-3 * exact.norm()
    for i in range(3):
        one = attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], causal="bottom_right", accuracy=accuracy)
        assert torch.equal(one, out[i : i + 1])


@gpu
def test_a_nan_that_some_rows_see_reaches_only_them(torch):
    from refattn.gpu import attention

    q, k, v = (torch.randn(1, 2, n, 64, device="cuda", dtype=torch.float16) for n in (5, 2000, 2000))
    options = {"causal": "bottom_right", "window": (700, None), "impl": "decode"}
    clean = attention(q, k, v, **options)
    v[0, 0, 1998, 3] = math.nan  # rows 3 and 4 see it
    v[0, 1, 1000] = math.nan  # no row does
    out = attention(q, k, v, **options)
    assert out[0, 0, 3:, 3].isnan().all()
    out[0, 0, 3:, 3] = clean[0, 0, 3:, 3] = 0
    torch.testing.assert_close(out, clean, atol=1e-2, rtol=1e-2)
    assert torch.equal(out[0, 1], clean[0, 1])
