"""Compiling a kernel for Hopper GPUs, and what its assembler must say of it."""

import os
import re
import shutil
import subprocess

import pytest

__all__ = ["EVERY", "NVCC", "check_compiles"]

NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
EVERY = os.environ.get("REFATTN_PROFILE") == "refattn-nightly"
"""Whether every combination is compiled, or every other one, in which each value of each axis is."""

COMMAND = ("nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v", "-o")


def check_compiles(path, text, name=""):
    """Compile a text for sm_90a: without spills and without a warning."""
    path.write_text(text)
    done = subprocess.run([*COMMAND, f"{path}bin", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (name, done.stderr)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", done.stderr)
    assert set(frames) == {("0", "0", "0")}, (name, done.stderr)
    # products that wait for each other, or a register budget that is not respected
    assert not re.search(r"C75\d\d|warning", done.stderr), (name, done.stderr)
