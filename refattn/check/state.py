"""What a kernel may change of the process that judges it, put back after each call."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["restored"]

ENVIRONMENT = 256
"""Bytes, at least those of C's fenv_t on every platform."""


@contextmanager
def restored() -> Iterator[None]:
    """Put back, at the end, the working folder, NumPy's error state, the rounding mode and flush-to-zero."""
    library, kept = _library(), ctypes.create_string_buffer(ENVIRONMENT)
    folder = None
    with suppress(FileNotFoundError):  # removed meanwhile: there is none to go back to
        folder = os.getcwd()
    if library is not None:
        library.fegetenv(kept)
    try:
        with np.errstate():
            yield
    finally:
        if library is not None:
            library.fesetenv(kept)
        if folder is not None:
            os.chdir(folder)


@lru_cache(maxsize=1)
def _library() -> Any:
    """Return the C library; None where it has no fegetenv: refattn.exact.trust then refuses changed arithmetic."""
    library: Any = ctypes.CDLL("ucrtbase") if os.name == "nt" else ctypes.CDLL(None)
    return library if hasattr(library, "fegetenv") else None
