"""Triton's tutorial and vLLM's reference, with stand-ins of their signatures."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from refattn import InvalidInput, Problem, UnsupportedProblem, check_problem
from refattn.check.kernels.wrapped import of_paged_reference, of_tutorial
from refattn.pages import in_pages

from .stand_ins import attend, band


def tutorial(q, k, v, causal, sm_scale):
    """06-fused-attention.py: (b, h, n, d), the diagonal of a square."""
    assert q.shape == k.shape == v.shape
    assert q.dtype == torch.float16
    seen = band(q.shape[2], q.shape[2], -1, 0 if causal else -1, 0)
    found = [attend(*(x.transpose(0, 1) for x in one), seen, sm_scale)[0] for one in zip(q, k, v, strict=True)]
    return torch.stack(found).transpose(1, 2).to(q.dtype)


def reference(query, key_cache, value_cache, query_lens, kv_lens, block_tables, scale, sliding_window=None,
              soft_cap=None):  # fmt: skip
    """ref_paged_attn: causal always; it scales its queries where they lie."""
    query *= scale
    outs, start = [], 0
    for i, (n, m) in enumerate(zip(query_lens, kv_lens, strict=True)):
        pages = block_tables[i, : -(-m // key_cache.shape[1])].long()
        k, v = (x[pages].flatten(0, 1)[:m] for x in (key_cache, value_cache))
        seen = band(n, m, -1 if sliding_window is None else sliding_window - 1, 0, m - n)
        outs.append(attend(query[start : start + n], k, v, seen, 1.0, soft_cap or 0.0)[0].to(v.dtype))
        start += n
    return torch.cat(outs)


def square(n=128, h=2, h_kv=2, dtype=np.float16, **more):
    rng = np.random.default_rng(0)
    return Problem(*(rng.standard_normal((1, x, n, 32)).astype(dtype) for x in (h, h_kv, h_kv)), **more)


def paged(dtype=np.float32, n_q=3, packed=False, **more):
    rng = np.random.default_rng(0)
    shape = ((1, 4, 5, 16), (1, 2, 40, 16)) if packed else ((2, 4, n_q, 16), (2, 2, 40, 16))
    q, k, v = (rng.standard_normal(s).astype(dtype) for s in (*shape, shape[1]))
    if packed:
        caches = [x.reshape(1, 2, 5, 8, 16)[0].transpose(1, 2, 0, 3).copy() for x in (k, v)]
        table, ends = np.array([[4, 0, 2], [1, 3, 0]]), np.array([0, 2, 5])
        where = {"lengths_k": np.array([20, 9]), "page_layout": "NHD", "block_table": table}
        return Problem(q, *caches, cu_seqlens_q=ends, causal="bottom_right", **where, **more)
    plain = Problem(q, k, v, causal="bottom_right", lengths_k=np.array([33, 7]), **more)
    return in_pages(plain, 8, "NHD", rng, fill=np.nan)


def on_cpu(kernel):
    kernel.capabilities = replace(kernel.capabilities, device="", deterministic=True)
    return kernel


def test_the_tutorial_is_judged_forward_and_backward():
    kernel = on_cpu(of_tutorial(tutorial))
    dout = np.random.default_rng(1).standard_normal((1, 2, 128, 32)).astype(np.float16)
    for more in ({}, {"causal": "top_left"}, {"causal": "bottom_right", "scale": 0.3}):
        report = check_problem(kernel, square(**more), "x", gradients=dout)
        assert [c.verdict for c in report.checks] == ["passed", "passed"], [c.message for c in report.checks]
    wrong = on_cpu(of_tutorial(lambda q, k, v, causal, sm_scale: tutorial(q, k, v, not causal, sm_scale)))
    assert not check_problem(wrong, square(), "x").right


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (square(n=64), "multiples of 128"),
        (square(dtype=ml_dtypes.bfloat16), "bfloat16"),
        (square(h=4), "grouped_heads"),
        (square(softcap=2.0), "softcap"),
    ],
)
def test_what_the_tutorial_has_not_is_refused(p, text):
    with pytest.raises(UnsupportedProblem, match=text):
        on_cpu(of_tutorial(tutorial))(p.to("torch"))


@pytest.mark.parametrize(
    "p",
    [
        paged(),
        paged(window=(4, 0)),
        paged(softcap=2.0, scale=0.3),
        paged(ml_dtypes.bfloat16, n_q=1),
        paged(packed=True),
    ],
)
def test_vllms_reference_is_judged(p):
    report = check_problem(of_paged_reference(reference), p, "x")
    assert report.right, [c.message for c in report.checks]
    wrong = of_paged_reference(lambda *given: reference(*given[:7], 3, *given[8:]))
    assert not check_problem(wrong, p, "x").right


def test_what_vllms_reference_has_not_is_refused():
    kernel = of_paged_reference(reference)
    for p, text in (
        (square(dtype=np.float32), "block_table, causal: vLLM's reference takes causal calls of keys in pages"),
        (paged().replace(causal=None), "block_table, causal: vLLM's reference takes causal calls"),
        (paged().replace(sink=np.zeros(4, np.float32)), "sink"),
    ):
        with pytest.raises(UnsupportedProblem, match=text):
            kernel(p.to("torch"))
    for make in (of_tutorial, of_paged_reference):
        with pytest.raises(InvalidInput, match=r"(attention|reference): got 3, expected"):
            make(3)
