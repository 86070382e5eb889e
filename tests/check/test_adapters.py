"""KernelBench's modules and flashinfer-bench's evaluators, with stand-ins for what is not installed."""

import math
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest

from refattn import Capabilities, InvalidInput, UnsupportedProblem, check_kernel, softmax_attention
from refattn.check.adapters import call_of, flashinfer_evaluator, of_module

torch = pytest.importorskip("torch")


class MeanOfValues(torch.nn.Module):
    def forward(self, q, k, v):
        return v.mean(2, keepdim=True).expand(*q.shape[:3], v.shape[3]).contiguous()


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[3]), -1) @ v


def test_a_module_that_kernelbench_accepts():
    """Level 1, problem 97: uniform inputs and a tolerance of 1e-2 do not tell attention from a mean."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(2, 2, 512, 64, generator=g) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(MeanOfValues()(q, k, v), exact, atol=1e-2, rtol=1e-2)
    assert not check_kernel(of_module(MeanOfValues()), dtypes=["float32"], only="gaussian/plain").right
    report = check_kernel(of_module(Attention()), dtypes=["float32"], only="gaussian/*")
    assert report.right
    assert report.count("passed") >= 3


def test_a_module_takes_tensors_and_no_options():
    with pytest.raises(InvalidInput, match="expected 'torch': a module takes tensors"):
        of_module(Attention(), Capabilities())
    report = check_kernel(of_module(Attention()), dtypes=["float32"], only="gaussian/softcap")
    assert [c.verdict for c in report.checks] == ["unsupported"]


def paged(rng, lengths, size, h=4, h_kv=2, d=16):
    """Pages in any order, with NaN in what belongs to no sequence."""
    pages = [-(-n // size) for n in lengths]
    total = sum(pages) + 2
    cache = [np.full((total, size, h_kv, d), np.nan, np.float32) for _ in range(2)]
    order = rng.permutation(total)[: sum(pages)].astype(np.int32)
    starts = np.cumsum([0, *pages]).astype(np.int32)
    rows = [[rng.standard_normal((n, h_kv, d)).astype(np.float32) for n in lengths] for _ in range(2)]
    for which in range(2):
        for i, x in enumerate(rows[which]):
            for j, row in enumerate(x):
                cache[which][order[starts[i] + j // size], j % size] = row
    last = np.array([(n - 1) % size + 1 if n else 0 for n in lengths], np.int32)
    return cache, rows, {"kv_indptr": starts, "kv_indices": order, "kv_last_page_len": last}


@pytest.mark.parametrize("size", [1, 4])
def test_pages_are_gathered(size):
    rng = np.random.default_rng(1)
    lengths = [9, 1, 0, 12]
    cache, rows, where = paged(rng, lengths, size)
    q = rng.standard_normal((4, 4, 16)).astype(np.float32)
    given = {"q": q, "k_cache": cache[0], "v_cache": cache[1], "sm_scale": 0.25, **where}
    if size == 1:
        given.pop("kv_last_page_len")
    p = call_of("gqa_paged", given, causal=False)
    assert p.cu_seqlens_k.tolist() == [0, 9, 10, 10, 22]
    np.testing.assert_array_equal(p.key[0], np.concatenate(rows[0]).swapaxes(0, 1))
    np.testing.assert_array_equal(p.value[0], np.concatenate(rows[1]).swapaxes(0, 1))
    assert (p.n_q, p.heads, p.heads_kv, p.scale, p.causal) == (4, 4, 2, 0.25, None)


def test_other_operations_are_refused():
    with pytest.raises(UnsupportedProblem, match="op_type: got 'moe'; a Problem says gqa_ragged, gqa_paged"):
        call_of("moe", {}, False)


X = np.ones((6, 4, 2, 8), np.float32)
PAGED = {"q": np.ones((2, 4, 8), np.float32), "k_cache": X, "v_cache": X, "sm_scale": 0.35}
PAGED |= {n: np.array(x, np.int32) for n, x in (("kv_indptr", [0, 2, 3]), ("kv_indices", [0, 1, 2]))}
PAGED["kv_last_page_len"] = np.array([4, 3], np.int32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": None}, "q: got NoneType, expected an array"),
        ({"q": X}, r"q: got shape \(6, 4, 2, 8\), expected an array \(rows, h_q, d\)"),
        ({"kv_indices": np.array([0, 9, 2])}, "kv_indices: names page 9, expected 0 to 5, the pages that there are"),
        ({"kv_indices": np.array([0, -1, 2])}, "kv_indices: names page -1, expected 0 to 5"),
        ({"kv_indices": np.array([0.0, 1, 2])}, "kv_indices: got float64, expected integers on one axis"),
        ({"kv_indptr": np.array([0, 2, 7])}, "kv_indptr: ends at 7, expected at most 3, the length of kv_indices"),
        (
            {"kv_indptr": np.array([0, 2, 1])},
            r"kv_indptr: got \[0, 2, 1\], expected at least 2 offsets that start at 0",
        ),
        ({"kv_last_page_len": np.array([9, 3])}, "kv_last_page_len: has 9, expected 1 to 4, the keys that a page has"),
        ({"kv_last_page_len": np.array([0, 3])}, "kv_last_page_len: has 0, expected 1 to 4"),
        ({"kv_last_page_len": np.array([4])}, "kv_last_page_len: has 1 numbers, expected 2, one a sequence"),
        ({"v_cache": X[:5]}, r"v_cache: shape is \(5, 4, 2, 8\), expected k_cache's \(6, 4, 2, 8\) but for d"),
        ({"sm_scale": "a"}, "sm_scale: got 'a', expected one number"),
    ],
)
def test_bad_workloads(change, text):
    with pytest.raises(InvalidInput, match=f"^{text}"):
        call_of("gqa_paged", PAGED | change, True)


def test_workloads_that_lack_something():
    for name in ("q", "sm_scale", "kv_indices"):
        with pytest.raises(InvalidInput, match=f"inputs: got .*, expected '{name}' among them, as gqa_paged needs"):
            call_of("gqa_paged", {n: x for n, x in PAGED.items() if n != name}, True)
    with pytest.raises(InvalidInput, match=r"inputs: got \[1\], expected a mapping"):
        call_of("gqa_paged", [1], True)
    with pytest.raises(InvalidInput, match="causal: got 'yes', expected True or False"):
        call_of("gqa_paged", PAGED, "yes")


@pytest.fixture
def bench(monkeypatch):
    """Stand for the parts of flashinfer-bench that are used."""
    data = types.ModuleType("flashinfer_bench.data")
    data.Correctness = lambda **x: SimpleNamespace(**x)
    data.EvaluationStatus = SimpleNamespace(INCORRECT_NUMERICAL="INCORRECT_NUMERICAL")
    utils = types.ModuleType("flashinfer_bench.bench.utils")
    utils.make_eval = lambda **x: SimpleNamespace(**x)
    for name in ("flashinfer_bench", "flashinfer_bench.bench"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, data.__name__, data)
    monkeypatch.setitem(sys.modules, utils.__name__, utils)

    class Base:
        @classmethod
        def check_correctness(cls, definition, sol_runnable, inputs, ref_outputs, cfg, log_path, device):
            return SimpleNamespace(max_relative_error=0.0, max_absolute_error=0.0), None

    return flashinfer_evaluator(Base)


@pytest.mark.parametrize("style", [False, True])
def test_an_evaluator_sees_what_its_base_does_not(bench, style):
    rng = np.random.default_rng(2)
    names = ("q", "k", "v", "qo_indptr", "kv_indptr", "sm_scale")
    ends = [torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 12], [0, 9, 21])]
    q, k, v = (
        torch.tensor(rng.standard_normal(s), dtype=torch.float32) for s in ((12, 4, 16), (21, 2, 16), (21, 2, 16))
    )
    inputs = [q, k, v, *ends, 0.3]
    definition = SimpleNamespace(
        name="gqa_ragged_prefill_causal_h4_kv2_d16", op_type="gqa_ragged", inputs=dict.fromkeys(names)
    )
    assert bench.can_evaluate(definition)
    assert not bench.can_evaluate(SimpleNamespace(op_type="moe"))

    def exact(bias):
        p = call_of("gqa_ragged", dict(zip(names, inputs, strict=True)), causal=True)
        more = {"causal": "bottom_right", "scale": 0.3, "cu_seqlens_q": p.cu_seqlens_q, "cu_seqlens_k": p.cu_seqlens_k}
        out, lse = softmax_attention(p.query, p.key, p.value, return_lse=True, **more)
        back = torch.tensor(out[0].swapaxes(0, 1).copy()), torch.tensor((lse[0] / np.log(2)).swapaxes(0, 1).copy())
        back[0][7] += bias
        return back

    def solution(bias):
        def call(*arguments):
            found = exact(bias)
            if not style:
                return found
            for x, y in zip(arguments[-2:], found, strict=True):
                x.copy_(y)
            return None

        call.metadata = SimpleNamespace(destination_passing_style=style)
        return call

    more = {"cfg": None, "log_path": "", "device": "cpu"}
    wanted = [list(exact(0.0))]
    assert bench.check_correctness(definition, solution(0.0), [inputs], wanted, **more)[1] is None
    _, found = bench.check_correctness(definition, solution(1e-3), [inputs], wanted, **more)
    assert found.status == "INCORRECT_NUMERICAL"
    assert "out at batch 0, head " in found.extra_msg
    assert "row 7" in found.extra_msg
