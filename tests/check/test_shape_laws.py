"""Lengths, offsets and corners: what a kernel that gets them wrong fails, and what it may do behind them."""

from dataclasses import replace

import numpy as np
import pytest

from refattn import Capabilities, UnsupportedProblem, check_kernel, evaluate
from refattn.check.bugs.edits import LSE_BUGS, broken
from refattn.check.bugs.planted import planted
from refattn.check.call import result_of
from refattn.check.inputs.families import Case
from refattn.check.inputs.models import MODELS
from refattn.check.kernel import Kernel
from refattn.check.kernels import find
from refattn.check.kernels.tiled import gradients, tiled
from refattn.check.model import FEATURES, FURTHER, GRADIENTS
from refattn.check.probe import _takes
from refattn.check.runner import plan
from refattn.check.suspects import suspects
from refattn.masks import unused

ABLE = Capabilities({"float32"}, FEATURES | FURTHER, lse=True, gradients=GRADIENTS)
NAMES = ("*lengths*", "models/cache-*", "models/packed-gaps*")


def littered(x, gone):
    x.swapaxes(1, 2)[gone] = np.nan
    return x


def untidy(p):
    """The right kernel, which leaves NaN where nobody looks."""
    out, lse = tiled(p)
    gone = unused(p)
    return (out, lse) if gone is None else (littered(out, gone[0]), littered(lse, gone[0]))


def untidy_gradients(p, dout):
    found, gone = gradients(p, dout), unused(p)
    if gone is not None:
        found = {n: littered(x, gone[n != "dq"]) if n in ("dq", "dk", "dv") else x for n, x in found.items()}
    return found


untidy.gradients = untidy_gradients


@pytest.mark.parametrize("only", NAMES)
def test_unused_rows_may_hold_anything(only):
    report = check_kernel(untidy, capabilities=ABLE, only=only)
    assert report.passed, report.failures
    assert report.count("passed") > 1


@pytest.mark.parametrize(
    ("law", "bug"), [("lengths_cut", "lengths_one_more"), ("lengths_cut", "corner_of_unused"),
                     ("offset_of_corner", "offset_ignored")]
)  # fmt: skip
def test_a_law_fails(law, bug):
    (check,) = check_kernel(planted(bug), capabilities=ABLE, only=f"law/{law}").checks
    assert check.verdict == "failed"


@pytest.mark.parametrize(
    "bug",
    ["lengths_ignored", "lengths_one_more", "corner_of_unused", "offset_ignored", "offset_of_first_batch",
     "alignment_ignored"],
)  # fmt: skip
def test_a_bug_is_caught_in_quick(bug):
    checks = plan(planted(bug), capabilities=ABLE, dtypes=["float32"], budget="quick", only="!calls/*")
    assert any(i.run().verdict == "failed" for i in checks)


def with_dlse(change):
    def kernel(p):
        return tiled(p)

    kernel.gradients = lambda p, dout, dlse=None: gradients(p, dout, change(dlse))
    return kernel


@pytest.mark.parametrize("name", LSE_BUGS)
def test_a_gradient_at_lse_is_asked_for_in_quick(name):
    able = replace(ABLE, dtypes={"float32", "bfloat16"}, dlse=True)
    asked = {"only": "law/lse_gradient*", "budget": "quick"}
    assert check_kernel(broken(name), capabilities=able, **asked).count("failed") == 2
    assert check_kernel(tiled, capabilities=able, **asked).count("passed") == 2
    assert check_kernel(broken(name), capabilities=ABLE, **asked).count("unsupported") == 1


def test_init_finds_who_takes_a_gradient_at_lse():
    call = Case("ragged", "x", "softmax", lambda d: d.problem(5, 7)).problem("float32")
    for change, takes in ((lambda x: x, True), (lambda x: None, False)):
        assert _takes(Kernel.of(with_dlse(change)), call, call.out_shape[:3], "dq") is takes
    assert not _takes(Kernel.of(untidy), call, call.out_shape[:3], "dq")


def test_a_kernel_without_lengths_is_not_asked_for_them():
    def kernel(p):
        if p.features() & FURTHER:
            raise UnsupportedProblem("further features")
        return tiled(p)

    checks = check_kernel(kernel, capabilities=Capabilities(lse=True), only="*lengths*").checks
    asked = {c.name for c in checks if c.verdict == "unsupported"}
    assert asked >= {f"ragged/lengths{x}[float32]" for x in ("", "-of-keys", "-packed")}


@pytest.mark.parametrize("label", ["cache-decode", "cache-ragged", "packed-gaps"])
def test_only_used_rows_are_compared_of_a_large_call(label):
    case = Case("models", label, "softmax", MODELS[label][0], sampled=True)
    p = case.problem("float32")
    sample = case.sample(p)
    assert sample is None or not unused(p)[0][sample.batch, list(sample.rows)].any()
    assert unused(p)[1].any()


def test_what_arrives_behind_lengths_is_not_read(make):
    p = make(5, 7, b=2, lengths_q=np.array([5, 2]), lengths_k=np.array([3, 7]))
    dout = np.ones(p.out_shape, np.float32)
    other = dout.copy()
    other[1, :, 2:] = np.nan
    one, two = (evaluate(p, rounding="float64", gradients=x) for x in (dout, other))
    for name, x in one.values.items():
        assert x.tobytes() == two.values[name].tobytes()
    assert (one.out[1, :, 2:] == 0).all()
    assert np.isneginf(one.lse[1, :, 2:]).all()
    assert not one.values["dk"][0, :, 3:].any()


def test_parts_of_a_call_with_lengths_are_the_whole(make):
    p = make(5, 7, b=2, lengths_k=np.array([3, 7]), offset=np.array([1, -1]), causal="bottom_right")
    alone, many = (evaluate(p, rounding="float32", n_jobs=n).out for n in (1, 2))
    assert alone.tobytes() == many.tobytes()


def test_rows_that_look_worst_are_used_ones(make):
    p = make(40, 50, b=1, sink=np.ones(2, np.float32), lengths_q=np.array([2]))
    out, lse = tiled(p)
    found = suspects(p, result_of((out * np.float32(1.5), lse), p))
    assert set(found.rows) <= {0, 1}


@pytest.mark.parametrize("variant", ["gated_delta", "lightning"])
def test_the_gradient_of_another_sequences_state_is_noticed(variant):
    (entry,) = find("refattn-chunked")
    right = entry.kernel().call

    def kernel(p):
        return right(p)

    def gradients_of_another(p, dout, dstate_out=None):
        arriving = None if dstate_out is None else np.roll(np.asarray(dstate_out), 1, 0)
        return right.gradients(p, dout, arriving)

    only = "law/last_state_gradient"
    given = {"capabilities": entry.capabilities, "model": entry.model, "dtypes": ["float32"], "only": only}
    kernel.gradients = right.gradients
    assert check_kernel(kernel, variant, **given).passed
    kernel.gradients = gradients_of_another
    assert not check_kernel(kernel, variant, **given).passed
