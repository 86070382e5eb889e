"""A kernel may not change the process for those that are judged after it."""

import ctypes
import os
import platform
import sys

import numpy as np
import pytest
import torch

from refattn import check_kernel
from refattn.check.bugs.planted import plain
from refattn.check.kernels.tiled import tiled
from refattn.check.state import restored

UPWARD = {"x86_64": 0x800, "AMD64": 0x800, "aarch64": 0x400000, "arm64": 0x400000}[platform.machine()]
"""C's FE_UPWARD."""


def rounds_up():
    ctypes.CDLL(None).fesetround(UPWARD)


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_flush_denormal(True),
        rounds_up,
        lambda: os.chdir("/"),
        lambda: np.seterr(all="raise"),
    ],
    ids=["flush to zero", "rounding up", "working folder", "NumPy's errors"],
)
def test_what_a_kernel_changes_is_put_back(change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def kernel(p):
        out = plain(p)
        change()
        return out

    before = np.geterr()
    assert check_kernel(kernel, only="gaussian/c*[float32]").passed
    assert os.getcwd() == str(tmp_path)
    assert np.geterr() == before
    assert np.float64(2.0**-1022) * 0.5 == 2.0**-1023
    assert np.float64(1.0) + np.float64(2.0**-60) == 1.0


def test_it_is_put_back_where_a_kernel_raises():
    @restored()
    def kernel():
        np.seterr(over="raise")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kernel()
    assert np.geterr()["over"] != "raise"


@pytest.mark.parametrize("name", ["refattn.check.runner.against", "numpy.exp", "builtins.sum", "math.exp"])
def test_a_kernel_may_not_replace_what_judges_it(name):
    module, _, attribute = name.rpartition(".")
    space = vars(sys.modules[module])
    before = space[attribute]

    def kernel(p):
        out = tiled(p)
        space[attribute] = print
        return out

    check = check_kernel(kernel, only="gaussian/plain[float32]").checks[0]
    assert check.message.startswith(f"the kernel replaced {name}; it must leave")
    assert space[attribute] is before
    assert check_kernel(tiled, only="gaussian/plain[float32]").passed


def test_what_a_kernel_prints_has_a_limit(capsys):
    def kernel(p):
        print("\x1b[2Jsome", "words")
        return tiled(p)

    assert check_kernel(kernel, only="gaussian/plain[float32]").passed
    assert capsys.readouterr().out == "some words\n"

    def loud(p):
        for _ in range(300):
            print(10000 * "x", file=sys.stderr)
        return tiled(p)

    check = check_kernel(loud, only="gaussian/plain[float32]").checks[0]
    assert check.message.startswith("the kernel printed 3000300 characters in one call, expected at most 1048576")
    assert len(capsys.readouterr().err) == 2**20


def test_pytorchs_choice_of_kernels_is_put_back():
    before = torch.backends.cuda.math_sdp_enabled()
    with restored():
        torch.backends.cuda.enable_math_sdp(not before)
    assert torch.backends.cuda.math_sdp_enabled() is before
