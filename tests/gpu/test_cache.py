"""Keys and values in a cache: what fits, what is launched, and on a GPU the same bits as over each sequence's keys."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem, check_problem
from refattn.check.kernels import KERNELS
from refattn.gpu import cache
from refattn.gpu.arguments import arguments_of
from refattn.gpu.decode import KERNEL, UNITS, most_units, shared_bytes, with_cache
from refattn.gpu.views import View

from ..conftest import tensor
from .compiled import NVCC, check_compiles
from .test_build import MOST, PLAIN
from .test_launch import driver, members  # noqa: F401

gpu = pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")
SM90 = (9, 0)
KINDS = [(1, 0, 0), (2, 1, 0), (1, 1, 1), (2, 1, 2)]
COMPILED = [
    replace(PLAIN, n_q=1, n_k=5000, d_k=d, d_v=d, group=group, softcap=d == 64, dtype=dtype, causal=causal)
    for d, group, dtype, causal in (
        (32, 64, "bfloat16", None),
        (64, 32, "float16", "bottom_right"),
        (96, 1, "bfloat16", None),
        (128, 16, "bfloat16", "bottom_right"),
        (128, 1, "float16", None),
    )
]


@NVCC
@pytest.mark.parametrize("i", range(len(COMPILED)), ids=[f"{c.dtype} d={c.d_k} group={c.group}" for c in COMPILED])
def test_it_compiles_without_spills(tmp_path, i):
    call = COMPILED[i]
    for pages, narrow, scales in KINDS[i % 2 :: 2]:
        macros = with_cache(KERNEL.macros(call), pages == 2, bool(narrow), scales)
        assert (macros["CACHE"], macros["KV8"], macros["SCALES"]) == (pages, narrow, scales)
        assert shared_bytes(macros) <= MOST
        check_compiles(tmp_path / "kernel.cu", KERNEL.source(macros))


def test_the_most_parts_of_a_sequence():
    for n in (0, 1, 256, 257, 4095, 4096, 20000, 70000):
        units = (-(-m // next(u for least, u in UNITS if m >= least)) for m in range(n + 1))
        assert most_units(n) == max(units)


def place(pointer, shape, dtype="bfloat16"):
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return View(pointer, tuple(shape), strides, dtype, 0)


def paged(dtype="float8_e4m3fn", **more):
    """Return the places of a call: 3 sequences, 8 heads on 2, pages of 16 rows."""
    arrays = {
        "query": place(16, (3, 8, 1, 64)),
        "key": place(32, (40, 2, 16, 64), dtype),
        "value": place(48, (40, 2, 16, 64), dtype),
        "lengths": place(64, (3,), "int32"),
        "page_table": place(80, (3, 10), "int32"),
    }
    return arrays | more


def problem(dtype="bfloat16", **more):
    q, k = (tensor(np.random.default_rng(0), (3, h, 1, 64), dtype) for h in (8, 2))
    return Problem(q, k, k, **more)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"key": place(32, (40, 2, 16), "bfloat16")}, "key: got shape (40, 2, 16), expected four axes"),
        ({"key": place(32, (40, 2, 16, 32))}, "key: got shape (40, 2, 16, 32), expected (40, 2, 16, 64)"),
        ({"value": place(32, (40, 2, 8, 64))}, "value: got shape (40, 2, 8, 64), expected (40, 2, 16, 64)"),
        ({"lengths": place(32, (4,), "int32")}, "lengths: got shape (4,), expected (3,)"),
        ({"page_table": place(32, (2, 10), "int32")}, "page_table: got shape (2, 10), expected (3, pages)"),
    ],
)
def test_shapes_that_do_not_fit(change, text):
    cache._check_shapes(paged())
    with pytest.raises(InvalidProblem) as e:
        cache._check_shapes(paged(**change))
    assert str(e.value) == text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"key": View(32, (40, 2, 16, 64), (2048, 1024, 1, 16), "bfloat16", 0)},
            "gpu: takes a contiguous last axis, got strides (2048, 1024, 1, 16); copy the array",
        ),
        (
            {"page_table": View(32, (3, 10), (1, 3), "int32", 0)},
            "page_table: takes a contiguous last axis, got strides (1, 3)",
        ),
        ({"lengths": View(32, (3,), (2,), "int32", 0)}, "lengths: takes a contiguous array, got strides (2,)"),
    ],
)
def test_layouts_that_are_not_supported(change, text):
    with pytest.raises(UnsupportedProblem) as e:
        cache._check_shapes(paged(**change))
    assert str(e.value) == text


@pytest.mark.parametrize(
    ("change", "numbers", "text"),
    [
        (
            {"value": place(48, (40, 2, 16, 64))},
            {},
            "key, value: got dtypes float8_e4m3fn and bfloat16, expected both bfloat16, as query is, or both "
            "float8_e4m3fn",
        ),
        (
            {n: place(48, (40, 2, 16, 64)) for n in ("key", "value")},
            {"key_scale": 2.0},
            "key_scale: is for keys and values in float8_e4m3fn, got bfloat16",
        ),
        ({}, {"value_scale": math.nan}, "value_scale: got nan, expected a finite number"),
        (
            {"key_scale": place(9, (40, 2), "float32")},
            {},
            "key_scale: got shape (40, 2), expected (40, 2, 16), or 1 in place of an axis",
        ),
    ],
)
def test_types_that_do_not_fit(change, numbers, text):
    cache._check_types(paged(), {"key_scale": 0.5})
    with pytest.raises(InvalidProblem) as e:
        cache._check_types(paged(**change), numbers)
    assert str(e.value) == text


def test_what_is_compiled():
    def macros(arrays, p=None):
        m = cache._plan(p or problem(), arrays, "fast", SM90)[1].macros
        return m["CACHE"], m["KV8"], m["SCALES"]

    one, token = place(9, (1, 2, 1), "float32"), place(9, (40, 2, 16), "float32")
    assert macros(paged("bfloat16")) == (2, 0, 0)
    assert macros(paged()) == (2, 1, 0)
    assert macros(paged(key_scale=one)) == (2, 1, 1)
    assert macros(paged(key_scale=token)) == (2, 1, 2)
    assert macros(paged(key_scale=place(9, (40, 1, 1), "float32"))) == (2, 1, 2)  # by page
    without = {n: x for n, x in paged().items() if n != "page_table"}
    assert macros(without) == (1, 1, 0)
    assert macros(without | {"value_scale": place(9, (40, 2, 1), "float32")}) == (1, 1, 1)  # by sequence and head
    assert macros(paged(key_scale=token), problem("float16")) == (2, 1, 2)
    with pytest.raises(UnsupportedProblem, match="value_scale: takes one by token with bfloat16 queries, got float16"):
        macros(paged(value_scale=token), problem("float16"))
    with pytest.raises(UnsupportedProblem, match=r"attention_with_cache: needs compute capability 9 or 10, got 8\.0"):
        cache._plan(problem(), paged(), "fast", (8, 0))
    with pytest.raises(UnsupportedProblem, match=r"takes sequences of less than 2\*\*30 keys, got room for 1073741824"):
        cache._plan(problem(), paged(page_table=place(8, (3, 2**26), "int32")), "fast", SM90)
    with pytest.raises(InvalidInput, match="accuracy: got 'low', expected one of fast, high"):
        cache._plan(problem(), paged(), "low", SM90)


def test_three_launches(driver, monkeypatch):  # noqa: F811
    arrays = paged(key_scale=place(96, (40, 1, 16), "float32"), out=place(112, (3, 8, 1, 64)))
    arrays["lse"] = place(128, (3, 8, 1), "float32")
    call, plan = cache._plan(problem(causal="bottom_right"), arrays, "fast", SM90)
    monkeypatch.setattr(cache, "empty", lambda like, shape, dtype: (None, View(1 << 20, shape, (1,), dtype, 0)))
    monkeypatch.setattr(cache, "kernel_of", lambda plan, device, entry, shared: (entry, None))
    monkeypatch.setattr(cache, "attribute", lambda device, name: 5)
    names = ("starts", "decode_cache", "merge_cache")
    driver.takes = [arguments_of("decode.cu", n) for n in names]
    options = {"scale": 0.5, "causal": "bottom_right", "window": None, "softcap": None}
    cache._launch(call, plan, None, arrays, options, {"value_scale": 3.0}, 7)
    assert [x[0] for x in driver.launches] == list(names)
    assert [x[1:3] for x in driver.launches] == [(1, 1024), (5, 256), (3 * 8, 512)]
    assert {x[4] for x in driver.launches} == {7}
    given = driver.launches[1][5]
    assert driver.launches[0][5] == given == driver.launches[2][5]
    parts, rows = 3 * 2 * 1, 4  # sequences and key heads of one part each: there is room for 160 keys
    stats = (1 << 20) + 4 * parts * rows * 64
    assert members(given, "s")["stats"] == stats
    assert members(given, "c") == {
        **{"table": 80, "lengths": 64, "starts": stats + 8 * parts * rows, "k_scale": 96, "v_scale": 0},
        **{"table_b": 10, "ks_b": 16, "ks_h": 0, "ks_n": 1, "vs_b": 0, "vs_h": 0, "vs_n": 0, "k_by": 1.0, "v_by": 3.0},
        **{"page": 16, "pages": 40, "most": 160},
    }
    found = members(given, "p")
    assert [found[n] for n in ("k_b", "k_h", "k_n", "h", "h_kv", "d_k")] == [2048, 1024, 64, 8, 2, 64]


def test_gradients_are_refused():
    torch = pytest.importorskip("torch")
    x = torch.zeros(1, 1, 1, 8, requires_grad=True)
    with pytest.raises(UnsupportedProblem, match="attention_with_cache: has no gradient; pass tensors without"):
        cache.attention_with_cache(x, x, x, lengths=torch.ones(1))


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def in_pages(torch, x, size, table, pages, rows_first):
    """Return keys (b, h, n, d) in pages; what belongs to no sequence is NaN."""
    b, h, n, d = x.shape
    shape = (pages, size, h, d) if rows_first else (pages, h, size, d)
    whole = torch.full(shape, math.nan, device="cuda", dtype=torch.float32).to(x.dtype)
    held = whole.transpose(1, 2) if rows_first else whole
    for i in range(b):
        for j in range(-(-n // size)):
            part = x[i, :, j * size : (j + 1) * size]
            held[int(table[i, j]), :, : part.shape[1]] = part
    return held


OPTIONS = [
    {},
    {"causal": "bottom_right", "accuracy": "high"},
    {"window": (300, None), "causal": "bottom_right", "softcap": 20.0},
    {"causal": "top_left", "scale": -0.1},
]


@gpu
@pytest.mark.parametrize(("size", "rows_first"), [(1, False), (16, True), (40, False), (256, True)])
@pytest.mark.parametrize("options", OPTIONS)
def test_pages_give_the_bits_of_each_sequence(torch, size, rows_first, options):
    from refattn.gpu import attention, attention_with_cache

    torch.manual_seed(0)
    lengths = [0, 5, 1000, 4500, 257]
    most = max(lengths)
    for d, dtype, heads, n_q in ((64, torch.bfloat16, (8, 2), 3), (128, torch.float16, (4, 4), 1)):
        q = torch.randn(5, heads[0], n_q, d, device="cuda", dtype=dtype)
        k, v = (torch.randn(5, heads[1], most, d, device="cuda", dtype=dtype) for _ in range(2))
        for i, n in enumerate(lengths):
            k[i, :, n:] = v[i, :, n:] = math.nan
        each = -(-most // size)
        table = torch.randperm(5 * each + 3, device="cuda")[: 5 * each].reshape(5, each)
        pages = [in_pages(torch, x, size, table, 5 * each + 3, rows_first) for x in (k, v)]
        sink = torch.randn(heads[0], device="cuda")
        more = options | {"sink": sink, "return_lse": True}
        of = torch.tensor(lengths, device="cuda")
        found = attention_with_cache(q, *pages, lengths=of, page_table=table, **more)
        plain = attention_with_cache(q, k, v, lengths=of.int(), **more)
        for i, n in enumerate(lengths):
            one = attention(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n], impl="decode", **more)
            for x, y, z in zip(found, plain, one, strict=True):
                assert torch.equal(x[i : i + 1], z)
                assert torch.equal(y[i : i + 1], z)


@gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("by", ["none", "number", "head", "token"])
def test_float8_is_within_its_bound(torch, dtype, by):
    from refattn.gpu import attention_with_cache

    rng = np.random.default_rng(0)
    model = KERNELS["refattn-gpu-decode"].model(dtype)
    if by != "token":  # P is float16 beside values that become float16
        model = replace(model, weights="float16")
    for d, size, group, wide_query in ((64, 16, 4, False), (96, 7, 1, True), (128, 64, 8, True), (32, 16, 40, False)):
        q, k, v = (tensor(rng, s, "float8_e4m3fn") for s in ((2, 2 * group, 1, d), (2, 2, 600, d), (2, 2, 600, d)))
        shape = {"head": (2, 2, 1), "token": (2, 2, 600)}.get(by, (1, 1, 1))
        query = q.astype(np.float64)
        if wide_query and dtype == "bfloat16":  # no power of two brings a row into float16
            query *= 2.0 ** rng.choice([-60, 0], query.shape)
        scales = [2.0 ** rng.integers(-2, 3, shape) for _ in range(2)]  # powers of two: the products are exact
        if by == "none":
            scales = [np.ones(shape)] * 2
        if dtype == "float16" and by == "token":
            scales[1] = np.ones(shape)  # not supported
        wide = (x.astype(np.float64) * s[..., None] for x, s in zip((k, v), scales, strict=True))
        p = Problem(*(to(x, dtype) for x in (query, *wide)), causal="bottom_right")

        def kernel(p, k=k, v=v, size=size, scales=scales):
            narrow = [torch.as_tensor(x.view(np.uint8)).cuda().view(torch.float8_e4m3fn) for x in (k, v)]
            query = torch.as_tensor(p.query.astype(np.float32)).cuda().to(getattr(torch, dtype))
            more = {"lengths": torch.full((2,), 600, device="cuda"), "causal": "bottom_right", "return_lse": True}
            if by == "head":
                both = (torch.as_tensor(s).float().cuda() for s in scales)
                return attention_with_cache(
                    query, *narrow, **more, **dict(zip(("key_scale", "value_scale"), both, strict=True))
                )
            table = torch.arange(2 * -(-600 // size), device="cuda").reshape(2, -1)
            pages = [in_pages(torch, x, size, table, table.numel(), False) for x in narrow]
            given = {}
            for n, s in zip(("key_scale", "value_scale"), scales, strict=True):
                if by == "number":
                    given[n] = float(s.flat[0])
                elif by != "none" and not (dtype == "float16" and by == "token" and n == "value_scale"):
                    given[n] = scales_in_pages(torch, s, size, table)
            return attention_with_cache(query, *pages, page_table=table, **more, **given)

        report = check_problem(kernel, p, "float8", model=model)
        assert report.passed, [report.describe(c) for c in report.failures]


def to(x, dtype):
    from refattn.arrays import from_float64

    return from_float64(x, dtype)


def scales_in_pages(torch, s, size, table):
    """Return scales (b, h, rows or 1) by page; what belongs to no sequence is NaN."""
    whole = torch.full((table.numel(), s.shape[1], size), math.nan, device="cuda")
    spread = torch.as_tensor(np.broadcast_to(s, (*s.shape[:2], 600)).copy()).float().cuda()
    for i in range(s.shape[0]):
        for j in range(table.shape[1]):
            part = spread[i, :, j * size : (j + 1) * size]
            whole[int(table[i, j]), :, : part.shape[1]] = part
    return whole


@gpu
def test_a_graph_takes_new_lengths_and_wrong_pages_read_nothing(torch):
    from refattn.gpu import attention_with_cache

    q = torch.randn(3, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(50, 2, 16, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randint(0, 50, (3, 12), device="cuda", dtype=torch.int32)
    lengths = torch.tensor([5, 100, 192], device="cuda", dtype=torch.int32)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attention_with_cache(q, k, v, lengths=lengths, page_table=table)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = attention_with_cache(q, k, v, lengths=lengths, page_table=table)
    lengths.copy_(torch.tensor([191, 0, 64], device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, attention_with_cache(q, k, v, lengths=lengths, page_table=table))
    assert (out[1] == 0).all()
    table[0, 0], table[2, 1] = -1, 10**6
    lengths[0] = 2**31 - 1  # all that there is room for
    assert attention_with_cache(q, k, v, lengths=lengths, page_table=table).isfinite().all()


SNIPPETS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/gpu.md").read_text(), re.DOTALL)
(PAGE,) = [x for x in SNIPPETS if "attention_with_cache(" in x]


def test_the_docs_call_is_python():
    compile(PAGE, "docs/gpu.md", "exec")


@gpu
def test_the_docs_call_runs(torch):
    names = {}
    exec(PAGE, names)
    assert names["out"].shape == (4, 32, 1, 128)
