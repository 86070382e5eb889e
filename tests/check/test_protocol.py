"""Laws between calls: each is broken by a kernel that carries something from one call to the next."""

import itertools
import threading

import numpy as np
import pytest

from refattn import Capabilities, UnsupportedProblem, check_kernel
from refattn.check.kernels.tiled import gradients, tiled
from refattn.check.model import GRADIENTS

ABLE = Capabilities(lse=True)
BOTH = Capabilities(lse=True, gradients=GRADIENTS)


def verdict(kernel, law):
    (check,) = check_kernel(kernel, capabilities=ABLE, only=f"law/{law}[float32]").checks
    return check


def cached(name):
    kept = {}

    def kernel(p):
        x = getattr(p, name)
        if x is None:
            return tiled(p)
        array, copy = kept.setdefault(id(x), (x, x.copy()))
        return tiled(p.replace(**{name: copy if array.shape == x.shape else x}))

    return kernel


def cached_keys():
    return cached("key")


def one_buffer():
    kept = {}

    def kernel(p):
        out, lse = tiled(p)
        buffer = kept.setdefault(out.shape, np.empty_like(out))
        buffer[...] = out
        return buffer, lse

    return kernel


def first_shape():
    shape = []

    def kernel(p):
        shape.append(p.n_k)
        return tiled(p.replace(key=p.key[:, :, : shape[0]], value=p.value[:, :, : shape[0]]))

    return kernel


def first_options():
    kept = {}

    def kernel(p):
        return tiled(p.replace(scale=kept.setdefault(p.out_shape, p.scale)))

    return kernel


def hundredth_call():
    count = itertools.count(1)

    def kernel(p):
        return tiled(p if next(count) % 97 or p.n_k < 100 else p.replace(key=p.key * 0))

    return kernel


def thousandth_call():
    count = itertools.count(1)

    def kernel(p):
        return tiled(p.replace(scale=None) if next(count) > 1000 else p)

    return kernel


def shared_workspace():
    here = {}

    def kernel(p):
        here["call"] = p
        out, lse = tiled(p)
        if here["call"] is not p and here["call"].out_shape == p.out_shape:
            return tiled(here["call"])
        return out, lse

    return kernel


def cached_bias():
    return cached("bias")


def plan_by_lengths():
    kept = {}

    def kernel(p):
        if p.cu_seqlens_q is None:
            return tiled(p)
        ends = kept.setdefault((p.n_q, p.n_k, len(p.cu_seqlens_q)), (p.cu_seqlens_q.copy(), p.cu_seqlens_k.copy()))
        return tiled(p.replace(cu_seqlens_q=ends[0], cu_seqlens_k=ends[1]))

    return kernel


def backward(gradients_of):
    def kernel(p):
        return tiled(p)

    kernel.gradients = gradients_of
    return kernel


def dout_in_memory_order():
    return backward(lambda p, dout: gradients(p, np.ravel(dout, "K").reshape(dout.shape)))


def shared_gradients():
    kept = {}

    def of(p, dout):
        for n, x in gradients(p, dout).items():
            kept.setdefault((n, x.shape), np.empty_like(x))[...] = x
        return {
            n: kept[n, getattr(p, {"dq": "query", "dk": "key", "dv": "value"}[n]).shape] for n in ("dq", "dk", "dv")
        }

    return backward(of)


def saved_by_pointer():
    kept = {}

    def of(p, dout):
        _, query = kept.setdefault(id(p.query), (p.query, p.query.copy()))
        return gradients(p.replace(query=query), dout)

    return backward(of)


def gradients_of_the_last_call():
    here = {}

    def of(p, dout):
        here["call"] = p
        found = gradients(p, dout)
        return found if here["call"] is p else gradients(here["call"], dout)

    return backward(of)


@pytest.mark.parametrize(
    ("kernel", "law", "says"),
    [
        (dout_in_memory_order, "spread_gradient", "a gradient that lies in memory by rows, then heads, gives another"),
        (shared_gradients, "calls_between", "gradients changed when those of another call were asked for: d"),
        (saved_by_pointer, "calls_between", "numbers that were changed in place give gradients of those before: d"),
        (gradients_of_the_last_call, "two_threads", "gradients asked for from another thread, beside another call"),
    ],
)
def test_what_is_carried_over_backward_shows(kernel, law, says):
    def of(k):
        (check,) = check_kernel(k, capabilities=BOTH, only=f"law/{law}[float32]").checks
        return check

    assert says in of(kernel()).message
    assert of(backward(gradients)).verdict == "passed"


@pytest.mark.parametrize(
    ("kernel", "law", "says"),
    [
        (cached_bias, "changed_in_place", "numbers that were changed in place give the answer of those before"),
        (plan_by_lengths, "options_between", "is wrong, made after one with"),
        (cached_keys, "changed_in_place", "numbers that were changed in place give the answer of those before"),
        (one_buffer, "results_kept", "a result changed when the kernel was called again"),
        (first_shape, "shapes_between", "a call after one of another shape is wrong"),
        (first_options, "options_between", "is wrong, made after one with"),
        (hundredth_call, "many_repeats", "of 200 equal ones is wrong"),
        (thousandth_call, "many_repeats", "with another scale after 1000 calls it is wrong"),
        (shared_workspace, "two_threads", "a call from another thread, beside another call, is wrong"),
    ],
)
def test_what_is_carried_over_shows(kernel, law, says):
    found = verdict(kernel(), law)
    assert found.verdict == "failed"
    assert says in found.message
    assert verdict(tiled, law).verdict == "passed"


def test_a_kernel_with_state_that_raises_in_two_threads_differs_at_an_edge():
    busy = threading.Lock()

    def kernel(p):
        if not busy.acquire(blocking=False):
            raise RuntimeError("busy")
        try:
            return tiled(p)
        finally:
            busy.release()

    found = verdict(kernel, "two_threads")
    assert (found.verdict, found.edges) == ("edge", ("threads",))
    assert "the kernel raised RuntimeError: busy" in found.message


def test_determinism_looks_at_every_array():
    count = itertools.count()

    def kernel(p):
        out, lse = tiled(p)
        return out, lse + np.float32(2.0**-20) * (next(count) % 2)

    found = verdict(kernel, "determinism")
    assert "two runs on the same input differ in lse" in found.message
    able = Capabilities(lse=True, deterministic=False)
    (check,) = check_kernel(kernel, capabilities=able, only="law/determinism").checks
    assert check.verdict == "passed"  # within twice its bound


def test_an_undeclared_kernel_is_not_asked_for_what_it_does_not_read():
    def plain(p):
        s = p.query @ p.key.swapaxes(2, 3) / np.sqrt(p.query.shape[3])
        w = np.exp(s - s.max(-1, keepdims=True))
        return (w @ p.value / w.sum(-1, keepdims=True)).astype(p.query.dtype)

    report = check_kernel(plain, only="law/*")
    assert not report.count("failed"), [c.message for c in report.failures]


@pytest.mark.parametrize("error", [SystemExit(0), RuntimeError("boom")])
@pytest.mark.parametrize("law", ["changed_in_place", "many_repeats", "two_threads"])
def test_what_a_later_call_raises_is_its_failure(error, law):
    count = itertools.count(1)

    def kernel(p):
        if next(count) > 1:
            raise error
        return tiled(p)

    found = verdict(kernel, law)
    assert found.verdict == "failed"
    assert found.message.startswith(f"the kernel raised {type(error).__name__}: ")


def test_a_kernel_that_refuses_every_call_of_a_law_did_not_run_it():
    def kernel(p):
        raise UnsupportedProblem("query: takes at most 16 rows")

    report = check_kernel(kernel, capabilities=Capabilities({"float32"}, refuses=True), only="law/*")
    assert {c.verdict for c in report.checks} == {"unsupported"}
    assert "the kernel refuses every call that this is tried on" in {c.message for c in report.checks}
