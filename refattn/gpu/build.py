"""Kernels from their text: #defines, includes, compilation with NVRTC, and CuPy's cache of machine code on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import BuildError
from .views import library

__all__ = ["compiled", "text_of"]

HERE = Path(__file__).parent


def text_of(name: str, macros: Mapping[str, Any]) -> str:
    """Return a kernel's whole text: its #defines, then the file with its includes put in."""
    defines = "".join(f"#define {n} {v}\n" for n, v in macros.items() if v is not None)
    include = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)
    text = (HERE / name).read_text(encoding="utf-8")
    return defines + include.sub(lambda m: (HERE / m[1]).read_text(encoding="utf-8"), text)


@lru_cache(maxsize=1024)
def compiled(text: str, entry: str, shared: int, target: str, device: int) -> tuple[int, Any]:
    """Return a kernel's handle for the current device, and what keeps it loaded.

    CuPy keeps the machine code on disk by the text's hash, written to a temporary name and renamed, so that two
    processes may build at once.

    Parameters
    ----------
    text : str
        CUDA C++.
    entry : str
        The kernel's name in it.
    shared : int
        The dynamic shared memory that it may use, in bytes.
    target : str
        The architecture, e.g. ``"sm_90a"``.
    device : int
        The current device's number.

    Raises
    ------
    BuildError
        With the compiler's message.
    """
    cupy = library("cupy")
    module = cupy.RawModule(code=text, options=("-std=c++17", f"-arch={target}"), backend="nvrtc")
    try:
        kernel = module.get_function(entry)
        handle = int(kernel.kernel.ptr)
    except Exception as e:
        raise BuildError(f"gpu: compiling {entry} for {target} failed with {type(e).__name__}: {e}") from e
    kernel.max_dynamic_shared_size_bytes = shared
    return handle, kernel
