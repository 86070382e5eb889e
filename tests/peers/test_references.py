"""refattn beside the plain reference functions of PyTorch, JAX and ONNX, over their own options."""

from pathlib import Path

import numpy as np
import pytest

from refattn import MismatchError

from ..snippets import run
from . import references

NEEDS = {"torch": "torch", "jax": "jax", "onnx": "onnx"}
COUNT = {"torch": 8, "jax": 2, "onnx": 8}
"""Drawn calls: JAX compiles a program for each."""


@pytest.fixture(scope="module")
def cases():
    pytest.importorskip("onnx")
    return references.onnx_cases()


def test_every_case_of_onnx_is_what_it_says(cases):
    """One batch item of each in turns, and the last key head with its query heads. All are in the command."""
    assert len(cases) >= 93
    assert len({c.name for c in cases}) == len(cases)
    for i, case in enumerate(cases):
        case.part(i % case.problem.batch).judge()


def test_the_cases_reach_every_option(cases):
    features = set().union(*(c.problem.features() for c in cases))
    assert {
        "causal_top_left", "window", "offset", "lengths_k", "softcap", "scale", "bias", "allowed", "grouped_heads",
        "d_v_differs", "lengths_differ", "alignment",
    } <= features  # fmt: skip
    assert {c.problem.dtype for c in cases} == {"float32", "float16", "bfloat16"}
    assert sum(c.probabilities is not None for c in cases) >= 5


@pytest.mark.parametrize("peer", NEEDS)
def test_drawn_calls_agree(peer):
    pytest.importorskip(NEEDS[peer])
    assert [(call.name, text) for _, call, text in references.differing(peer, COUNT[peer])] == []


WRONG = {
    "corner": ("test_attention_4d_causal", lambda p: p.replace(causal="bottom_right")),
    "offset of the past": ("test_attention_4d_causal_with_past_and_present", lambda p: p.replace(offset=None)),
    "offset of lengths": ("test_attention_4d_causal_nonpad_continued_prefill", lambda p: p.replace(offset=None)),
    "lengths": ("test_attention_4d_padded_kv_bf16", lambda p: p.replace(lengths_k=None, bias=None)),
    "window by one": ("test_attention_local_window", lambda p: p.replace(window=(1, None))),
    "window's corner": ("test_attention_bidirectional_window", lambda p: p.replace(window=(2, 1))),
    "softcap": ("test_attention_4d_softcap", lambda p: p.replace(softcap=None)),
    "scale": ("test_attention_4d_scaled", lambda p: p.replace(scale=None)),
    "heads": ("test_attention_4d_gqa", lambda p: p.replace(key=p.key[:, ::-1])),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_reading_of_an_option_differs(cases, name):
    case, change = WRONG[name]
    (found,) = [c for c in cases if c.name == case]
    found.problem, kept = change(found.problem), found.problem
    try:
        with pytest.raises(MismatchError):
            found.judge()
    finally:
        found.problem = kept


def test_a_wrong_probability_differs(cases):
    (found,) = [c for c in cases if c.name == "test_attention_4d_with_qk_matmul_softmax"]
    other = found.probabilities.copy()
    other[0, 0, 0, :2] = other[0, 0, 0, 1::-1]
    found.probabilities, kept = other, found.probabilities
    try:
        with pytest.raises(MismatchError):
            found.judge()
    finally:
        found.probabilities = kept


def test_the_page_runs():
    """What is said there of each difference, in lines that show it."""
    pytest.importorskip("jax")
    pytest.importorskip("onnx")
    with np.errstate(all="ignore"):
        run(Path(__file__).parents[2] / "docs" / "peers.md")
