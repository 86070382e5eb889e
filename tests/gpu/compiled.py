"""Compiling a kernel for Hopper GPUs, and what its assembler must say of it.

What compiled so once is not compiled again by the same compiler: `compiled.txt` has its digests.
`python -m tests.gpu.compiled` compiles what of it is not known, and writes that file for the texts that there are.
"""

import hashlib
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from ..conftest import NIGHTLY

__all__ = ["NVCC", "check_compiles", "core"]

KEPT = Path(__file__).with_name("compiled.txt")
KNOWN = set() if NIGHTLY else set(KEPT.read_text().split())
"""Digests of what compiled without spills and warnings."""
SEEN: set[str] = set()
"""Those of this run."""

NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
APART = ("WIDTH", "WIDTH_K", "WIDTH_V", "D_K", "D_V", "HEAD_DIM", "GRADIENT", "QUERY")
"""Macros that say which pass a text is and how many columns a thread holds: what registers go by, so each is
compiled with all others' values."""

COMMAND = ("nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v", "-o")


@cache
def _compiler():
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def _command(arch):
    return [x.replace("90a", arch) for x in COMMAND]


def digest(text, arch="90a"):
    """Return what changes where the text, the command or the compiler's version does."""
    return hashlib.sha256("\0".join((_compiler(), *_command(arch), text)).encode()).hexdigest()[:16]


def check_compiles(path, text, name="", arch="90a"):
    """Compile a text for sm_90a, or another, without spills or a warning; one that is known to is left alone."""
    own = digest(text, arch)
    if own in KNOWN:
        SEEN.add(own)
        return
    path.write_text(text)
    done = subprocess.run([*_command(arch), f"{path}bin", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (name, done.stderr)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", done.stderr)
    assert set(frames) == {("0", "0", "0")}, (name, done.stderr)
    # products that wait for each other, or a register budget that is not respected
    assert not re.search(r"C75\d\d|warning", done.stderr), (name, done.stderr)
    KNOWN.add(own)
    SEEN.add(own)


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


def main():
    """Compile what tests compile and is not known, and keep the digests of all of it."""
    from . import compiled  # this module is another one here

    tests = Path(__file__).parents[1]
    places = [str(tests / x) for x in ("gpu", "he/device", "exact/device")]
    if pytest.main(["-q", "-W", "ignore::pytest.PytestAssertRewriteWarning", "-k", "without_spills", *places]):
        raise SystemExit("not written")
    KEPT.write_text("".join(f"{x}\n" for x in sorted(compiled.SEEN)))


if __name__ == "__main__":
    main()
