"""A kernel that takes arrays of PyTorch, CuPy or JAX: it must answer in that library, where its inputs are."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as api
import numpy as np
from numpy.typing import NDArray

from ..arrays import kind_of, to_kind, to_numpy
from ..errors import KernelError
from ..problem import Problem
from .call import Function, unchanged
from .model import Capabilities
from .reading import plain

__all__ = ["lost", "native"]


def lost(able: Capabilities) -> bool:
    """Tell whether the device of a kernel's arrays takes and gives no array: some errors end a GPU for a process."""
    try:
        to_numpy(to_kind(np.zeros(1, np.float32), able.arrays, able.device or None))
    except Exception:
        return True
    return False


def native(kernel: Function, able: Capabilities) -> Function:
    """Return a kernel as one that takes NumPy arrays.

    Parameters
    ----------
    kernel : callable
        Of arrays of ``able.arrays`` on ``able.device``.
    able : Capabilities
        What it says it can do.
    """
    if able.arrays == "numpy" or getattr(kernel, "native", False):
        return kernel
    return _Native(kernel, able)


class _Native:
    native = True

    def __init__(self, kernel: Function, able: Capabilities) -> None:
        self.kernel, self.able = kernel, able
        self.__name__ = str(getattr(kernel, "__name__", type(kernel).__name__))
        for name in ("model", "capabilities"):
            if hasattr(kernel, name):
                setattr(self, name, getattr(kernel, name))
        if hasattr(kernel, "gradients"):
            self.gradients = self._gradients

    def __call__(self, problem: Problem) -> Any:
        there = problem.to(self.able.arrays, self.able.device or None)
        result = self.kernel(there)
        parts = result if isinstance(result, tuple | list) else (result,)
        for name, x in zip(("out", "lse"), parts, strict=False):
            self._is_there(name, x, there)
        if problem.new_key is not None:  # call_kernel looks at what was written
            problem.key[...], problem.value[...] = to_numpy(there.key), to_numpy(there.value)
        _unchanged(problem, there)
        return result

    def _gradients(self, problem: Problem, *arriving: NDArray[Any]) -> Any:
        there = problem.to(self.able.arrays, self.able.device or None)
        given = [to_kind(x, self.able.arrays, self.able.device or None) for x in arriving]
        result = self.kernel.gradients(there, *given)  # type: ignore[attr-defined]
        if hasattr(result, "items"):
            for name, x in result.items():
                self._is_there(str(name), x, there)
        _unchanged(problem, there)
        names = ("dout", "dlse")[: len(given)]
        unchanged(dict(zip(names, map(to_numpy, given), strict=True)), dict(zip(names, arriving, strict=True)))
        return result

    def _is_there(self, name: str, x: Any, there: Problem) -> None:
        kind = kind_of(x)
        if kind is None:
            return  # call_kernel says what it got
        if kind != self.able.arrays:
            raise KernelError(f"{name}: got an array of {kind}, expected {self.able.arrays} as the inputs are")
        got, expected = (str(api.device(a)) for a in (x, there.query))
        if got != expected:
            raise KernelError(f"{name}: is on device {got}, expected {expected} as the inputs are")
        for source, a in plain(there).arrays().items():
            if math.prod(a.shape) and _memory(x) == _memory(a):
                raise KernelError(f"{name}: shares memory with the input {source}; return an array of its own")


def _unchanged(problem: Problem, there: Problem) -> None:
    unchanged({n: to_numpy(x) for n, x in plain(there).arrays().items()}, plain(problem).arrays())


def _memory(x: Any) -> Any:
    """Return where an array's memory begins."""
    kind = kind_of(x)
    if kind == "torch":
        return x.untyped_storage().data_ptr()
    return x.data.mem.ptr if kind == "cupy" else x.unsafe_buffer_pointer()
