"""compute-sanitizer finds nothing in small calls of every kernel. Without a GPU they do not run."""

import os
import shutil

import pytest

from refattn.check.kernels import KERNELS

from .sanitized import every_call, under


@pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool):
    clean, ran, printed = under(tool, os.cpu_count() or 1)
    assert clean, printed[-4000:]
    assert ran == len(every_call())
