"""What a kernel may change of the process that judges it, put back after each call."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import lru_cache
from io import TextIOBase
from typing import Any

import numpy as np

from ..errors import KernelError, printable
from ..exact.blas import as_before

__all__ = ["restored"]

ENVIRONMENT = 256
"""Bytes, at least those of C's fenv_t on every platform."""
WATCHED = ("builtins", "math", "numpy", "numpy.linalg", "numpy.random")
"""Modules beside refattn's own whose functions a kernel may not replace."""
MOST = 2**20
"""Characters that a call may print."""


@contextmanager
def restored() -> Iterator[None]:
    """Put back, at the end, the working folder, NumPy's error state, the rounding mode, flush-to-zero and PyTorch's
    choice of attention kernels, which is one for the process and no thread's own.

    Raises
    ------
    KernelError
        A function of refattn, NumPy or Python was replaced; it is put back. What is changed inside of objects is not
        seen: a kernel that means to fool its judge belongs into a process without it (``--untrusted``). Or more was
        printed from Python than ``MOST`` characters, of which the first went through, without escape codes.
    """
    names = _names()
    said = [_Said(sys.stdout), _Said(sys.stderr)]
    switches = _torch_switches()
    library, kept = _library(), ctypes.create_string_buffer(ENVIRONMENT)
    folder = None
    with suppress(FileNotFoundError):  # removed meanwhile: there is none to go back to
        folder = os.getcwd()
    if library is not None:
        library.fegetenv(kept)
    try:
        with as_before(), np.errstate(), redirect_stdout(said[0]), redirect_stderr(said[1]):
            yield
    finally:
        if library is not None:
            library.fesetenv(kept)
        if folder is not None:
            os.chdir(folder)
        for name, on in switches.items():
            getattr(sys.modules["torch"].backends.cuda, f"enable_{name}_sdp")(on)
        replaced = _put_back(names)
    if replaced:
        raise KernelError(f"the kernel replaced {replaced[0]}; it must leave the process that judges it as it is")
    if (count := sum(x.count for x in said)) > MOST:
        raise KernelError(f"the kernel printed {count} characters in one call, expected at most {MOST}")


class _Said(TextIOBase):
    """What a kernel prints: passed on up to a limit, without control characters."""

    def __init__(self, to: Any) -> None:
        self.to, self.count = to, 0

    def write(self, text: str) -> int:
        left = MOST - self.count
        self.count += len(text)
        if left > 0 and self.to is not None:
            self.to.write("\n".join(map(printable, text[:left].split("\n"))))
        return len(text)

    def flush(self) -> None:
        if self.to is not None:
            self.to.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return int(self.to.fileno())


def _names() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the names of the modules that judge, and what each means now."""
    return [(space, dict(space)) for space in _spaces(len(sys.modules))]


@lru_cache(maxsize=1)
def _spaces(count: int) -> list[dict[str, Any]]:
    """Return the modules' names: looked up anew where there are other modules than before, by their count."""
    return [vars(m) for n, m in list(sys.modules.items()) if n in WATCHED or n.partition(".")[0] == "refattn"]


def _put_back(names: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """Give every name its meaning again; return those that had another, or none."""
    found = []
    for space, before in names:
        if _same(space, before):
            continue
        for name, x in before.items():
            if space.get(name, names) is not x:  # a list of ours stands for none
                space[name] = x
                found.append(f"{before.get('__name__')}.{name}")
    return found


def _torch_switches() -> dict[str, bool]:
    """Return which attention kernels PyTorch may choose, where it is loaded."""
    cuda = getattr(getattr(sys.modules.get("torch"), "backends", None), "cuda", None)
    names = ("flash", "mem_efficient", "math", "cudnn") if hasattr(cuda, "flash_sdp_enabled") else ()
    return {n: bool(getattr(cuda, f"{n}_sdp_enabled")()) for n in names}


def _same(space: dict[str, Any], before: dict[str, Any]) -> bool:
    """Tell fast whether nothing was touched, as after nearly every call."""
    try:
        return space == before
    except Exception:  # an array beside another
        return False


@lru_cache(maxsize=1)
def _library() -> Any:
    """Return the C library; None where it has no fegetenv: refattn.exact.trust then refuses changed arithmetic."""
    library: Any = ctypes.CDLL("ucrtbase") if os.name == "nt" else ctypes.CDLL(None)
    return library if hasattr(library, "fegetenv") else None
