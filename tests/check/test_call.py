"""A kernel that breaks its contract is a named failure, and the run goes on."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refattn import Capabilities, KernelError, UnsupportedProblem, check_kernel
from refattn.check import FEATURES, FURTHER, call_kernel
from refattn.check.kernels.tiled import tiled


def raises(p):
    raise RuntimeError("no such tile\nsecond line")


def mutates(p):
    p.key[...] = 0
    return tiled(p)


def mutates_through_torch(p):
    torch.from_numpy(p.value).zero_()
    return tiled(p)


BROKEN = {
    "raises": (raises, "the kernel raised RuntimeError: no such tile"),
    "mutates": (mutates, "the kernel changed its input key; it must leave its inputs as they are"),
    "mutates-torch": (mutates_through_torch, "the kernel changed its input value"),
    "nothing": (lambda p: None, "the kernel returned NoneType; expected out or"),
    "list": (lambda p: [1, 2, 3], "the kernel returned 3 parts of int, int, int"),
    "wrong-shape": (lambda p: tiled(p)[0][:, :, :1], r"out: got shape \(1, 2, 1, 8\), expected \(1, 2, 5, 8\)"),
    "wrong-dtype": (lambda p: tiled(p)[0].astype(np.float64), "out: got dtype float64, expected query's float32"),
    "lse-shape": (lambda p: (tiled(p)[0], np.zeros(3, np.float32)), r"lse: got shape \(3,\), expected \(1, 2, 5\)"),
    "lse-dtype": (lambda p: (tiled(p)[0], np.zeros((1, 2, 5), int)), "lse: got dtype int64, expected one of"),
    "three": (lambda p: (*tiled(p), 1), "the kernel returned 3 parts of ndarray, ndarray, int"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_breach_is_named(make, name):
    kernel, text = BROKEN[name]
    with pytest.raises(KernelError, match=text):
        call_kernel(kernel, make())


@pytest.mark.parametrize("name", BROKEN)
def test_the_run_goes_on(name):
    report = check_kernel(BROKEN[name][0], only="gaussian/*", capabilities=Capabilities(features=FEATURES | FURTHER))
    assert report.count("failed") == len(report.checks)
    assert all(c.message for c in report.checks)


def test_results_of_every_library_are_taken(make):
    p = make()
    want = tiled(p)[0]
    for wrap in (torch.from_numpy, jnp.asarray):
        result = call_kernel(lambda p, wrap=wrap: tuple(wrap(x) for x in tiled(p)), p)
        assert result.out.tobytes() == want.tobytes()
        assert result.lse is not None
    half = make(dtype="bfloat16")
    assert call_kernel(lambda p: half.to("torch").query, half).out.tobytes() == half.query.tobytes()


def test_unsupported_is_no_failure(make):
    def kernel(p):
        if p.softcap is not None:
            raise UnsupportedProblem("softcap: not here")
        return tiled(p)

    with pytest.raises(UnsupportedProblem):
        call_kernel(kernel, make(softcap=1.0))
    report = check_kernel(
        kernel, only="gaussian/*", capabilities=Capabilities(features=FEATURES | FURTHER, refuses=True)
    )
    assert report.passed
    assert {c.message for c in report.checks if c.verdict == "unsupported"} == {"softcap: not here"}


def test_a_kernel_that_refuses_everything_has_not_passed():
    def kernel(p):
        raise UnsupportedProblem("nothing works")

    report = check_kernel(kernel, only="gaussian/*")
    assert not report.passed
    assert report.count("unsupported") == len(report.checks)


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SystemExit(0), "the kernel raised SystemExit: 0"),
        (GeneratorExit(), "the kernel raised GeneratorExit: "),
        (RuntimeError("\x1b[31merror: ptxas\x1b[0m\x00\x07"), "the kernel raised RuntimeError: error: ptxas"),
        (Unprintable(), "the kernel raised Unprintable: its text raised ValueError"),
    ],
)
def test_whatever_a_kernel_raises_is_its_failure(make, error, text):
    def kernel(p):
        raise error

    with pytest.raises(KernelError) as caught:
        call_kernel(kernel, make())
    assert str(caught.value) == text
    report = check_kernel(kernel, only="gaussian/plain*")
    assert report.failures
    assert all(c.message == text for c in report.failures)


def test_what_a_kernel_says_it_cannot_do_has_no_colours(make):
    def kernel(p):
        raise UnsupportedProblem("\x1b[1mnot\x1b[0m here")

    with pytest.raises(UnsupportedProblem, match=r"^not here$"):
        call_kernel(kernel, make())


def test_an_interrupt_ends_the_run(make):
    def kernel(p):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_kernel(kernel, make())
