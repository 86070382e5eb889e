"""Wide heads, as latent attention has them: tiles, parts, launches; the kernel against exact answers on a GPU."""

import math
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import Problem, UnsupportedProblem, check_kernel, check_problem
from refattn.check.kernels import KERNELS
from refattn.gpu import latent, request
from refattn.gpu import launch as launches
from refattn.gpu.arguments import arguments_of
from refattn.gpu.latent import KERNEL, shared, splits_of
from refattn.gpu.plan import choose
from refattn.gpu.views import View

from ..conftest import tensor
from .compiled import NVCC, check_compiles, core
from .test_build import MOST, PLAIN
from .test_launch import driver, members  # noqa: F401

gpu = pytest.mark.skipif(not KERNELS["refattn-gpu-latent"].here, reason="needs an NVIDIA GPU and CuPy")
LATENT = replace(PLAIN, d_k=576, d_v=512, group=128, n_q=300, n_k=4000)
FEW = replace(LATENT, n_q=1)
OPTIONS = (
    {},
    {"causal": "bottom_right", "dtype": "float16"},
    {"window": (9, None), "softcap": True, "sink": True},
    {"window": (9, 9), "positive_scale": False, "dtype": "float16", "d_k": 328, "d_v": 264},
)
CALLS = [replace(c, shared=one, **options) for c in (LATENT, FEW) for one in (False, True) for options in OPTIONS]
COMPILED = core({str(c): KERNEL.source(KERNEL.macros(c)) for c in CALLS})


@NVCC
@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_without_spills(tmp_path, name):
    check_compiles(tmp_path / "kernel.cu", COMPILED[name])


def test_shared_memory_suffices():
    assert {KERNEL.shared_bytes(KERNEL.macros(c)) <= MOST for c in CALLS} == {True}


def test_when_it_is_chosen():
    for call in (LATENT, FEW, replace(LATENT, d_k=264, d_v=8), replace(LATENT, d_k=8, d_v=264)):
        plan = choose(call, None, (9, 0))
        assert plan.impl == "latent"
        assert plan.why.startswith(
            f"bfloat16 on Hopper's tensor cores, head dims {call.d_k} and {call.d_v}; the kernel"
        )
    assert "512, values copied with keys; " in choose(replace(LATENT, shared=True), None, (9, 0)).why
    assert choose(replace(LATENT, d_k=256, d_v=256), None, (9, 0)).impl == "sm90"
    asked = [KERNEL.macros(c) for c in (FEW, replace(FEW, shared=True), replace(FEW, batch_invariant=True), LATENT)]
    assert [(m["BLOCK_N"], m["SPLIT"]) for m in asked] == [(32, 1), (64, 1), (32, 0), (32, 0)]
    assert KERNEL.macros(replace(FEW, n_k=1023))["SPLIT"] == 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"d_k": 584}, "takes head dims of which one is above 256, up to 576 and 512, got 584 and 512"),
        ({"d_v": 520}, "takes head dims of which one is above 256, up to 576 and 512, got 576 and 520"),
        ({"d_k": 256, "d_v": 64}, "takes head dims of which one is above 256, up to 576 and 512, got 256 and 64"),
        ({"d_k": 570}, "takes head dims that are multiples of 8, got 570 and 512"),
        ({"d_k": 0}, "takes head dims that are multiples of 8, got 0 and 512"),
        ({"dtype": "float32"}, "takes float16 and bfloat16, got float32"),
        ({"mapped": False}, "takes rows that begin at multiples of 16 bytes, at strides above 0"),
        ({"allowed": True, "bias": "float32"}, "does not take allowed, bias"),
        ({"packed": True, "accuracy": "high"}, "does not take cu_seqlens, accuracy='high'"),
        ({"blocks": (64, 64)}, "does not take block_mask"),
        ({"n_k": 2**30}, "takes fewer than 2**30 rows and keys, got 300 and 1073741824"),
    ],
)
def test_what_it_does_not_take(given, text):
    assert KERNEL.obstacle(replace(LATENT, **given), (9, 0)) == text
    with pytest.raises(UnsupportedProblem, match="gpu: the kernel latent "):
        choose(replace(LATENT, **given), "latent", (9, 0))


def test_other_gpus():
    assert KERNEL.obstacle(LATENT, (10, 0)) == "needs compute capability 9.0, got 10.0"


def test_a_tile_has_the_heads_that_make_fewest_tiles():
    found = {(128, 1): 64, (128, 4096): 64, (1, 4096): 1, (3, 4096): 1, (16, 1): 64, (16, 4): 16, (96, 2): 32}
    assert {x: latent._tile_heads(*x) for x in found} == found


def test_parts_fill_the_gpu_but_are_not_short():
    assert [splits_of(*x) for x in ((2, 64, 132), (2, 4000, 132), (100, 64, 132), (256, 64, 132), (1, 0, 132))] == [
        16, 66, 1, 1, 1
    ]  # fmt: skip


def view(pointer, *shape, strides=None):
    return View(pointer, shape, strides or tuple(math.prod(shape[i + 1 :]) for i in range(4)), "bfloat16", 0)


def test_values_that_are_the_keys_first_columns():
    key = view(64, 2, 1, 100, 576)
    first = replace(key, shape=(2, 1, 100, 512))
    assert shared(key, first)
    assert shared(key, key)
    assert shared(key, replace(first, strides=(57600, 7, 576, 1)))  # along one head nothing is added
    for other in (
        replace(first, pointer=128),  # later columns
        replace(first, strides=(57600, 57600, 512, 1)),
        replace(first, shape=(2, 1, 99, 512)),
        replace(first, shape=(2, 1, 100, 584)),
    ):
        assert not shared(key, other)


def test_a_view_of_the_keys_is_another_kind_of_call(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(request, "view", lambda x, _: View(x.data_ptr(), tuple(x.shape), x.stride(), "bfloat16", 0))
    q, k, apart = (torch.ones(1, h, 4, 576, dtype=torch.bfloat16) for h in (2, 1, 1))
    options = {"scale": None, "causal": None, "window": None, "softcap": None}
    one, two = (
        request.read({"query": q, "key": k, "value": x[..., :512]}, None, None, None, options) for x in (k, apart)
    )
    assert one.signature != two.signature
    assert [x.call().shared for x in (one, two)] == [True, False]


@pytest.fixture
def placed(monkeypatch, driver):  # noqa: F811
    monkeypatch.setattr(latent, "tensor_map", lambda x, axes, box, name: struct.pack("16Q", *x.shape, *box, *[0] * 6))
    monkeypatch.setattr(latent, "key_map", lambda x, rows, name: struct.pack("16Q", x.pointer, rows, *[0] * 14))
    monkeypatch.setattr(launches, "empty", lambda like, shape, dtype: (None, View(1 << 20, shape, (1,), dtype, 0)))
    monkeypatch.setattr(launches, "kernel_of", lambda plan, device, entry="", shared=None: (entry, None))
    monkeypatch.setattr(launches, "attribute", lambda device, name: 132)
    return {"key": view(2, 2, 1, 4000, 576), "value": view(2, 2, 1, 4000, 512, strides=(2304000, 2304000, 576, 1))}


def test_one_launch_where_all_keys_are_seen(driver, placed):  # noqa: F811
    call = replace(LATENT, shared=True)
    given = placed | {
        "query": view(1, 2, 128, 300, 576),
        "out": view(4, 2, 128, 300, 512),
        "lse": view(5, 2, 128, 300, 1),
    }
    driver.takes = [KERNEL.takes]
    options = {"scale": 0.5, "causal": None, "window": None, "softcap": None}
    launches.launch(call, choose(call, None, (9, 0)), None, given, options, 7)
    ((name, grid, threads, bytes_, stream, a),) = driver.launches
    assert (name, grid, threads, stream) == ("attention_latent", 2 * 2 * 300, 384, 7)
    assert bytes_ == KERNEL.shared_bytes(KERNEL.macros(call))
    assert struct.unpack_from("10Q", a["map_q"]) == (2, 1, 300, 128, 576, 64, 64, 1, 1, 1)
    assert [struct.unpack_from("2Q", a[f"map_{x}"]) for x in "kv"] == [(2, 64)] * 2
    assert [a[n] for n in ("out", "lse", "redo", "scale", "parts.out", "parts.stats")] == [4, 5, 0, 0.5, 0, 0]
    sizes = {"batch": 2, "heads_kv": 1, "group": 128, "n_q": 300, "n_k": 4000, "d_k": 576, "d": 512}
    tiles = {"tile_heads": 64, "tiles_heads": 2, "tiles_queries": 300, "splits": 1}
    assert members(a, "shape") == sizes | tiles


def test_parts_are_merged_and_hidden_keys_looked_for(driver, placed):  # noqa: F811
    call = replace(FEW, causal="bottom_right", n_q=2, sink=True)
    given = placed | {"query": view(1, 2, 128, 2, 576), "out": view(4, 2, 128, 2, 512), "lse": view(5, 2, 128, 2, 1)}
    given |= {"sink": View(6, (128,), (1,), "float32", 0), "value": view(3, 2, 1, 4000, 512)}
    entries = ("attention_latent", "merge", "repair")
    driver.takes = [arguments_of("latent.cu", x) for x in entries]
    options = {"scale": -0.5, "causal": "bottom_right", "window": (7, None), "softcap": 3.0}
    launches.launch(call, choose(call, None, (9, 0)), None, given, options, 0)
    assert [x[:2] for x in driver.launches] == [("attention_latent", 8 * 16), ("merge", 512), ("repair", 1)]
    a, b, c = (x[-1] for x in driver.launches)
    parts = {"out": 1 << 20, "stats": (1 << 20) + 4 * 16 * 512 * 512}
    asked = {"sink": 6, "softcap": 3.0, "top_left": 0, "left": 7, "right": 0}
    assert members(a, "parts") == members(b, "parts") == parts
    assert [members(x, "options") for x in (a, b, c)] == [asked] * 3
    assert [(x["out"], x["lse"], x["redo"]) for x in (a, b, c)] == [(4, 5, 7000)] * 3
    assert (a["shape.splits"], c["scale"]) == (16, -0.5)
    along = {"q_b": 147456, "q_h": 1152, "q_n": 576, "k_b": 2304000, "k_h": 2304000, "k_n": 576}
    along |= {"v_b": 2048000, "v_h": 2048000, "v_n": 512}
    assert members(c, "inputs") == {"q": 1, "k": 2, "v": 3, **along}


def test_no_keys_need_no_map(driver, placed):  # noqa: F811
    call = replace(LATENT, n_k=0)
    none = {n: replace(x, shape=(2, 1, 0, x.shape[3])) for n, x in placed.items()}
    none |= {"query": view(1, 2, 128, 300, 576), "out": view(4, 2, 128, 300, 512), "lse": view(5, 2, 128, 300, 1)}
    driver.takes = [KERNEL.takes]
    options = {"scale": 0.5, "causal": None, "window": None, "softcap": None}
    launches.launch(call, choose(call, None, (9, 0)), None, none, options, 7)
    assert driver.launches[0][-1]["map_k"] == bytes(128)


def test_a_gradient_is_refused_before_any_launch():
    torch = pytest.importorskip("torch")
    from refattn.gpu import attention

    q, k = torch.ones(1, 2, 3, 576, dtype=torch.bfloat16), torch.ones(1, 1, 3, 576, dtype=torch.bfloat16)
    text = "gpu: has gradients for head dims up to 256, got 576 and 512; pass detached tensors"
    with pytest.raises(UnsupportedProblem, match=text):
        attention(q.requires_grad_(), k, k[..., :512])


@gpu
def test_the_judge():
    e = KERNELS["refattn-gpu-latent"]
    report = check_kernel(e.kernel(), capabilities=e.capabilities, model=e.model, name=e.name)
    assert not report.failures, [report.describe(c) for c in report.failures]
    assert report.count("passed") > 40


@gpu
@given(data=st.data())
def test_any_call_is_within_its_bound(data):
    e = KERNELS["refattn-gpu-latent"]
    group, n_q = data.draw(st.sampled_from([(1, 70), (4, 1), (3, 50), (16, 5), (128, 1), (1, 1)]))
    n_k = data.draw(st.one_of(st.integers(0, 150), st.integers(1000, 1300)))
    d_k, d_v = data.draw(st.sampled_from([(576, 512), (512, 512), (264, 8), (72, 264), (328, 264)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    dtype, one = data.draw(st.sampled_from(["float16", "bfloat16"])), data.draw(st.booleans())
    q, k = (tensor(rng, s, dtype) for s in ((1, 2 * group, n_q, d_k), (1, 2, n_k, d_k)))
    v = k[..., :d_v] if one and d_v <= d_k else tensor(rng, (1, 2, n_k, d_v), dtype)
    side = st.one_of(st.none(), st.integers(0, 300))
    p = Problem(
        *(q, k, v),
        causal=data.draw(st.sampled_from([None, "bottom_right", "top_left"])),
        window=data.draw(st.one_of(st.none(), st.tuples(side, side))),
        softcap=data.draw(st.sampled_from([None, 2.0])),
        sink=data.draw(st.sampled_from([None, np.linspace(-1, 1, 2 * group)])),
        scale=data.draw(st.sampled_from([None, -0.05])),
    )
    report = check_problem(e.kernel(), p, "any", model=e.model, name=e.name)
    assert report.passed, [report.describe(c) for c in report.failures]


@gpu
@pytest.mark.parametrize("n_q", [300, 2])
@pytest.mark.parametrize("one", [True, False])
def test_a_nan_that_some_rows_see_reaches_only_them(n_q, one):
    torch = pytest.importorskip("torch")
    from refattn.gpu import attention

    torch.manual_seed(0)
    q, k = (torch.randn(1, h, n, 576, device="cuda", dtype=torch.bfloat16) for h, n in ((16, n_q), (1, 1300)))
    v = k[..., :512] if one else k[..., :512].clone()
    clean = attention(q, k, v, causal="bottom_right")
    for x in (k, v):
        x[:, :, -1, 3] = math.nan
    for _ in range(2):  # the marks of the first call must be gone
        out = attention(q, k, v, causal="bottom_right")
        assert out[:, :, -1].isnan().all()
        torch.testing.assert_close(out[:, :, :-1], clean[:, :, :-1], atol=2e-2, rtol=1e-2)


@gpu
def test_a_row_has_the_same_bits_whatever_else_is_in_the_call():
    torch = pytest.importorskip("torch")
    from refattn.gpu import attention

    torch.manual_seed(0)
    q, k = (torch.randn(2, h, 2000, 576, device="cuda", dtype=torch.bfloat16) for h in (16, 1))
    more = {"causal": "bottom_right", "batch_invariant": True}
    whole = attention(q, k, k[..., :512], **more)
    for i, j in ((0, 1), (1, 777), (777, 1999), (1999, 2000)):
        part = attention(q[:, :, i:j], k[:, :, :j], k[:, :, :j, :512], **more)
        assert torch.equal(part, whole[:, :, i:j])
    alone = attention(q[1:, :, -1:], k[1:], k[1:, :, :, :512], **more)
    assert torch.equal(alone, whole[1:, :, -1:])
