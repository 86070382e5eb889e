"""Compiling a kernel for Hopper GPUs, and what its assembler must say of it."""

import re
import shutil
import subprocess

import pytest

from ..conftest import NIGHTLY

__all__ = ["NVCC", "check_compiles", "core"]

NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
APART = ("WIDTH", "WIDTH_K", "WIDTH_V", "D_K", "D_V", "HEAD_DIM", "GRADIENT", "QUERY")
"""Macros that say which pass a text is and how many columns a thread holds: what registers go by, so each is
compiled with all others' values."""

COMMAND = ("nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v", "-o")


def check_compiles(path, text, name="", arch="90a"):
    """Compile a text for sm_90a, or another: without spills and without a warning."""
    path.write_text(text)
    command = [x.replace("90a", arch) for x in COMMAND]
    done = subprocess.run([*command, f"{path}bin", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (name, done.stderr)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", done.stderr)
    assert set(frames) == {("0", "0", "0")}, (name, done.stderr)
    # products that wait for each other, or a register budget that is not respected
    assert not re.search(r"C75\d\d|warning", done.stderr), (name, done.stderr)


def core(texts):
    """Return of {name: text} what to compile: each file's each macro's value at each width and pass; nightly all.

    What has most of those that are missing is taken next, so many options come together.
    """
    if NIGHTLY:
        return texts
    missing = {name: _values(text) for name, text in texts.items()}
    chosen = {}
    while any(missing.values()):
        name = max(missing, key=lambda n: len(missing[n]))
        chosen[name], found = texts[name], missing[name]
        missing = {n: values - found for n, values in missing.items()}
    return chosen


def _values(text):
    """Return (the file, what stands apart, a macro and its value) for each macro that comes before a file's title."""
    defines, _, rest = text.partition("//")
    macros = dict(line.split(maxsplit=2)[1:] for line in defines.splitlines())
    apart = tuple(macros.get(name) for name in APART)
    return {(rest.partition("\n")[0], apart, *m) for m in (macros or {"": ""}).items()}
