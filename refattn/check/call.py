"""Calling a kernel by its contract: what it may return, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, kind_of, to_numpy
from ..dtypes import FORMATS
from ..errors import InvalidProblem, KernelError, UnsupportedProblem
from ..problem import Problem

__all__ = ["Kernel", "Result", "call_kernel"]

Kernel = Callable[[Problem], Any]


@dataclass(frozen=True)
class Result:
    """What a kernel returned, as NumPy arrays."""

    out: NDArray[Any]
    lse: NDArray[Any] | None


def call_kernel(kernel: Kernel, problem: Problem) -> Result:
    """Call ``kernel(problem)`` on fresh copies of the inputs and hold the result to the contract.

    Parameters
    ----------
    kernel : callable
        Returns out, or (out, lse): out of shape (b, h_q, n_q, d_v) and query's type, lse of shape (b, h_q, n_q) in a
        float format; arrays of NumPy, PyTorch, CuPy or JAX.
    problem : Problem
        With NumPy arrays.

    Raises
    ------
    KernelError
        The kernel raised, changed its inputs, or returned something else.
    UnsupportedProblem
        The kernel raised it: the call is outside what it can do.
    """
    given = {n: np.array(x, copy=True) for n, x in problem.arrays().items()}
    fresh = problem.replace(**given)
    try:
        result = kernel(fresh)
    except UnsupportedProblem:
        raise
    except Exception as e:
        text = (str(e).strip().splitlines() or [""])[0]
        raise KernelError(f"the kernel raised {type(e).__name__}: {text[:200]}") from e
    for name, x in problem.arrays().items():
        if given[name].tobytes() != np.asarray(x).tobytes():
            raise KernelError(f"the kernel changed its input {name}; it must leave its inputs as they are")
    parts = result if isinstance(result, tuple | list) else (result,)
    if len(parts) not in (1, 2) or any(kind_of(x) is None for x in parts if x is not None) or parts[0] is None:
        got = (
            f"{len(parts)} parts of " + ", ".join(type(x).__name__ for x in parts)
            if parts is result
            else type(result).__name__
        )
        raise KernelError(
            f"the kernel returned {got}; expected out or (out, lse), arrays of NumPy, PyTorch, CuPy or JAX"
        )
    out, lse = parts[0], parts[1] if len(parts) == 2 else None
    _expect("out", out, problem.out_shape)
    if dtype_name(out) != problem.dtype:
        raise KernelError(f"out: got dtype {dtype_name(out)}, expected query's {problem.dtype}")
    if lse is not None:
        _expect("lse", lse, problem.out_shape[:3])
        if dtype_name(lse) not in FORMATS:
            raise KernelError(f"lse: got dtype {dtype_name(lse)}, expected one of {', '.join(FORMATS)}")
    try:
        return Result(to_numpy(out), None if lse is None else to_numpy(lse))
    except InvalidProblem as e:
        raise KernelError(str(e)) from e


def _expect(name: str, x: Any, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise KernelError(f"{name}: got shape {tuple(x.shape)}, expected {shape}")
