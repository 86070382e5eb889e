from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from refattn import VARIANTS, Capabilities, check_kernel
from refattn.check import LAWS, shape_laws
from refattn.check.bugs.edits import broken
from refattn.check.bugs.planted import plain, planted
from refattn.check.kernels.tiled import gradients, tiled
from refattn.check.model import FEATURES, FURTHER, GRADIENTS
from refattn.check.runner import plan
from refattn.dtypes import ELEMENTS

ABLE = Capabilities(lse=True, gradients=GRADIENTS, batch_invariant=True)
BY_SAYING = {"row_invariance"}  # laws that a kernel is held to where it says that it keeps them


def law(kernel, name, able=ABLE):
    (check,) = check_kernel(kernel, only=f"law/{name}[float32]", capabilities=able).checks
    return check


@pytest.mark.parametrize("name", [n for n in VARIANTS["softmax"].laws if not LAWS[n].named_only])
def test_the_right_kernel_obeys(name):
    able = replace(ABLE, features=FEATURES | FURTHER, dlse=True, elements=ELEMENTS)
    assert law(tiled, name, able).verdict == ("unsupported" if name in BY_SAYING else "passed")


def in_order(parts):
    """Return a kernel that adds weights up one by one, in as many parts as `parts` says of a call; out is a weight."""

    def kernel(p):
        s = p.query[..., :1] * p.key.repeat(p.heads // p.heads_kv, 1)[:, :, None, :, 0]
        s = np.where(np.tri(p.n_q, p.n_k, p.n_k - p.n_q) > 0, s, -np.inf)
        w = np.exp(s - s.max(-1, keepdims=True))
        cuts = np.linspace(0, p.n_k, parts(p) + 1, dtype=int)
        z = sum(w[..., i:j].cumsum(-1)[..., -1:] for i, j in pairwise(cuts) if i < j)
        return w[..., :1] / z * np.ones(p.d_v, np.float32)

    return kernel


def test_rows_that_depend_on_what_else_is_in_the_call():
    able = replace(ABLE, row_invariant=True, lse=False, gradients=frozenset())
    assert law(in_order(lambda p: 1), "row_invariance", able).verdict == "passed"
    check = law(in_order(lambda p: 7 if p.n_q == 1 else 1), "row_invariance", able)
    assert check.verdict == "failed"
    assert "rows 2050 to 2050 alone have other bits than among all 2051" in check.message
    assert law(in_order(lambda p: 1 if p.n_q > 2000 else 7), "row_invariance", able).verdict == "failed"


def backward(name, value):
    """Return the tiled kernel with one gradient changed."""

    def kernel(p):
        return tiled(p)

    def changed(p, dout):
        found = gradients(p, dout)
        return found | {name: value(found[name]).astype(found[name].dtype)}

    kernel.gradients = changed
    return kernel


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_gradients_that_are_not_the_derivative(name, dtype):
    able = replace(ABLE, dtypes=frozenset({dtype}))
    for factor in (1, 0, 2, -1):
        kernel = backward(name, lambda x, by=factor: x * x.dtype.type(by))
        (check,) = check_kernel(kernel, only=f"law/gradient_steps[{dtype}]", capabilities=able).checks
        assert check.verdict == ("passed" if factor == 1 else "failed"), factor
        if factor != 1:
            assert f"{name} is not the derivative of out along a step" in check.message


def test_gradients_that_do_not_sum_to_zero():
    kernel = backward("dk", lambda x: x + np.float32(0.01))
    assert "dk does not sum to 0 over the keys (64 of 64)" in law(kernel, "dk_sums").message
    kernel = backward("dbias", lambda x: x + np.float32(1e-4))
    assert "a row of dbias does not sum to 0 (74 of 74)" in law(kernel, "dbias_sums").message


def test_laws_of_gradients_need_them():
    assert law(plain, "gradient_steps", Capabilities()).message == "not in its capabilities: dq"
    assert law(plain, "dk_sums", Capabilities(gradients={"dq"})).message == "not in its capabilities: dk"


def test_a_split_that_depends_on_the_batch():
    def kernel(p):
        return tiled(p, keys=32 if p.batch > 1 else 16)

    assert law(kernel, "batch_invariance", Capabilities(lse=True)).verdict == "passed"  # within the bound
    assert "a batch alone gives another output than among others" in law(kernel, "batch_invariance").message


def test_subnormal_outputs_may_be_one_place_off():
    """Among subnormal numbers 2·round(x) is not round(2x)."""
    able = replace(ABLE, dtypes=frozenset({"float8_e4m3fn"}))
    (check,) = check_kernel(tiled, only="law/values_doubled[float8_e4m3fn]", capabilities=able).checks
    assert (check.verdict, check.ratio) == ("passed", 1.0)


@pytest.fixture
def past(monkeypatch):
    """Run the law of large offsets with small ones: 3 times 61 heads."""
    monkeypatch.setattr(shape_laws, "PAST", 2 * 61 * 64 * 1024)
    return "past_31_bits"


def test_offsets_past_31_bits(past):
    """A kernel whose head offset wraps."""
    assert law(plain, past).verdict == "passed"

    def wraps(p):
        at = np.arange(p.heads) % 128
        return plain(p.replace(key=p.key[:, at], value=p.value[:, at]))

    assert "heads past 2**31 elements differ from the same heads before" in law(wraps, past).message


def test_offsets_past_31_bits_are_tried_by_name_only():
    assert not any("past_31_bits" in i.name for i in plan(tiled, only="law/*"))
    assert len(plan(tiled, only="law/past_31_bits[float32]")) == 1


def test_nondeterminism():
    calls = []

    def kernel(p):
        calls.append(p)
        out, lse = tiled(p)
        return np.nextafter(out, np.float32(len(calls) % 2)), lse

    check = law(kernel, "determinism")
    assert check.verdict == "failed"
    assert "two runs on the same input differ" in check.message


def test_order_dependence():
    def kernel(p):
        out, lse = tiled(p)
        return out + p.value[:, :, :1] * np.float32(1e-3), lse

    assert "the order of the keys matters" in law(kernel, "key_permutation").message


def test_a_masked_key_that_is_read():
    def kernel(p):
        out, lse = tiled(p)
        return out + np.float32(1e-30) + np.float32(1e-6) * p.key[:, :, 3:4], lse

    assert "a key that no row may see changes the output" in law(kernel, "masked_keys_unread").message


def test_heads_mapped_wrongly():
    def kernel(p):
        at = np.arange(p.heads) % p.heads_kv
        return tiled(p.replace(key=p.key[:, at], value=p.value[:, at]))

    assert "grouped heads differ from repeated ones" in law(kernel, "grouped_heads").message


def test_batches_that_meet():
    def kernel(p):
        out, lse = tiled(p)
        return out + np.float32(1e-6) * p.query[-1:, :, :, :1], lse

    assert "what another batch holds changes the output" in law(kernel, "batch_independence").message


def test_values_that_saturate():
    def kernel(p):
        out, lse = tiled(p)
        return np.clip(out, -0.5, 0.5), lse

    assert "values twice as large do not double the output" in law(kernel, "values_doubled").message


def test_strides_that_are_ignored():
    assert "strides change the output" in law(broken("strides_ignored"), "layout").message


def test_scores_that_are_not_shifted():
    def kernel(p):
        return tiled(p if p.bias is None else p.replace(bias=np.minimum(p.bias, np.float32(3))))

    assert "a constant added to all scores changes the output" in law(kernel, "bias_shifted").message


def test_an_lse_that_does_not_merge():
    def kernel(p):
        out, lse = tiled(p)
        return out, np.where(np.isneginf(lse), 0, lse).astype(np.float32)

    assert "two halves merged through lse differ from the whole" in law(kernel, "split_and_merge").message


def test_a_wrong_mask_is_no_matter_of_empty_rows():
    """A kernel that takes a mask of other strides for none is wrong in rows that have keys, too."""

    def kernel(p):
        mask = p.allowed
        if mask is not None and not mask.flags.c_contiguous:
            mask = np.ones(mask.shape, bool)
        return tiled(p.replace(allowed=mask))

    assert law(kernel, "split_and_merge").verdict == "failed"

    def empty(p):
        out, lse = tiled(p)
        return out, np.where(np.isneginf(lse), np.float32(-1e30), lse)

    found = law(empty, "split_and_merge")
    assert found.verdict in ("passed", "edge"), found.message


def test_no_lse():
    check = law(lambda p: tiled(p)[0], "split_and_merge")
    assert check.verdict == "failed"
    assert "no lse was returned" in check.message
    assert law(plain, "split_and_merge", Capabilities()).message == "not in its capabilities: lse"


def test_a_law_says_where_its_call_is_wrong_by_itself():
    """A kernel that is plainly wrong breaks many laws, of which none is the cause."""
    alone = "its call is wrong by itself, too"
    wrong = check_kernel(planted("zeroed_head"), dtypes=["float32"], only="law/*s_between*").failures
    assert wrong
    assert all(alone in c.message for c in wrong)
    late = check_kernel(broken("scale_of_an_earlier_call"), dtypes=["float32"], only="law/options_between*").failures
    assert late
    assert not any(alone in c.message for c in late)
