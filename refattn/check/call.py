"""Calling a kernel by its contract: what it may return, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, kind_of, laid_out, to_numpy
from ..dtypes import FORMATS
from ..errors import InvalidProblem, KernelError, UnsupportedProblem, printable
from ..masks import unused
from ..norms import NORMS
from ..pages import AXES, appended, slots
from ..problem import Problem
from ..variants import Steps, variant_of
from .reading import watched
from .state import restored

__all__ = [
    "SOURCES",
    "Function",
    "Result",
    "call_gradients",
    "call_kernel",
    "guarded",
    "result_of",
    "unchanged",
    "used",
]

Function = Callable[[Problem], Any]


@dataclass(frozen=True)
class Result:
    """What a kernel returned, as NumPy arrays, and the options of the call that it read."""

    out: NDArray[Any]
    lse: NDArray[Any] | None = None
    state: NDArray[Any] | None = None
    read: frozenset[str] = frozenset()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all that came, by name."""
        return {"out": self.out} | self.more()

    def more(self) -> dict[str, NDArray[Any]]:
        """Return what came with out, by name."""
        return {n: x for n, x in (("lse", self.lse), ("state", self.state)) if x is not None}


def call_kernel(kernel: Function, problem: Problem) -> Result:
    """Call ``kernel(problem)`` on fresh copies of the inputs and hold the result to the contract.

    Parameters
    ----------
    kernel : callable
        Returns out, or (out, lse): out of shape (b, h_q, n_q, d_v) and query's type, lse of shape (b, h_q, n_q) in a
        float format; of a recurrence (out, state), state of ``problem.state_shape``; arrays of NumPy, PyTorch, CuPy or
        JAX.
    problem : Problem
        With NumPy arrays.

    Raises
    ------
    KernelError
        The kernel raised, changed its inputs, or returned a view of them or something else.
    UnsupportedProblem
        The kernel raised it: the call is outside what it can do.
    """
    result, given, read = _on_copies(kernel, problem)
    found = replace(result_of(result, problem), read=read)
    _own(given, out=found.out, **found.more())
    return found


def result_of(result: Any, problem: Problem) -> Result:
    """Hold what a kernel returned to the contract; what is raised is as in :func:`call_kernel`."""
    parts = result if isinstance(result, tuple | list) else (result,)
    if len(parts) not in (1, 2) or any(kind_of(x) is None for x in parts if x is not None) or parts[0] is None:
        got = (
            f"{len(parts)} parts of " + ", ".join(printable(type(x).__name__) for x in parts)
            if parts is result
            else printable(type(result).__name__)
        )
        raise KernelError(
            f"the kernel returned {got}; expected out or (out, lse), arrays of NumPy, PyTorch, CuPy or JAX"
        )
    out, more = parts[0], parts[1] if len(parts) == 2 else None
    name = "state" if isinstance(variant_of(problem.variant).shape, Steps) else "lse"
    _expect("out", out, problem.out_shape)
    if dtype_name(out) != problem.out_type:
        whose = "query's" if problem.out_dtype is None else "out_dtype"
        raise KernelError(f"out: got dtype {dtype_name(out)}, expected {whose} {problem.out_type}")
    if more is not None:
        _expect(name, more, problem.out_shape[:3] if name == "lse" else problem.state_shape)
        if dtype_name(more) not in FORMATS:
            raise KernelError(f"{name}: got dtype {dtype_name(more)}, expected one of {', '.join(FORMATS)}")
    rest: dict[str, Any] = {} if more is None else {name: _numpy(more)}
    found: dict[str, Any] = used(problem, {"out": _numpy(out), **rest})
    return Result(**found)


def used(problem: Problem, found: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return results with 0, and -inf as lse, in rows and keys that lengths leave unused: nobody looks at those."""
    gone = unused(problem)
    if gone is None:
        return found
    rows, keys = gone
    of = {"out": rows, "lse": rows, "dq": rows, "dk": keys, "dv": keys}
    kept = {n: x.copy() if n in of or n == "dbias" else x for n, x in found.items()}
    for n in of.keys() & kept.keys():
        kept[n].swapaxes(1, 2)[of[n]] = -np.inf if n == "lse" else 0
    if "dbias" in kept:
        x = kept["dbias"]
        pair: Any = rows[:, None, :, None] | keys[:, None, None, :]
        for axis in (0, 2, 3):
            pair = pair.all(axis, keepdims=True) if x.shape[axis] == 1 else pair
        kept["dbias"] = np.where(pair, x.dtype.type(0), x)
    return kept


SOURCES = {"dq": "query", "dk": "key", "dv": "value"}
SOURCES |= {f"d{n}": n for n in ("bias", "sink", "alpha", "beta", "eta", "state", "alibi_slopes", *NORMS)}
"""The input that each gradient belongs to."""


def call_gradients(
    kernel: Function, problem: Problem, dout: NDArray[Any], dlse: NDArray[Any] | None = None
) -> tuple[dict[str, NDArray[Any]], frozenset[str]]:
    """Call ``kernel.gradients(problem, dout)`` on fresh copies and hold the result to the contract.

    Parameters
    ----------
    kernel : callable
        With an attribute ``gradients`` that returns a mapping from "dq", "dk", "dv", "dbias", "dsink" to arrays of
        their inputs' shapes and types.
    problem : Problem
        With NumPy arrays.
    dout : (b, h_q, n_q, d_v) NumPy array
        The gradient arriving at out, of query's type.
    dlse : (b, h_q, n_q) NumPy array, optional
        The gradient arriving at lse, or at a recurrence's last state, of its type: the kernel gets it as a third
        argument.

    Returns
    -------
    gradients : dict
        By name, as NumPy arrays.
    read : frozenset of str
        The options of the call that the kernel read.

    Raises
    ------
    KernelError, UnsupportedProblem
        As in :func:`call_kernel`.
    """
    backward = getattr(kernel, "gradients", None)
    if backward is None:
        raise KernelError("the kernel has no attribute gradients; gradients(problem, dout) returns them by name")
    before = {"dout": dout} if dlse is None else {"dout": dout, "dlse": dlse}
    arriving = {n: laid_out(x)[0] for n, x in before.items()}
    result, given, read = _on_copies(lambda p: backward(p, *arriving.values()), problem)
    unchanged(arriving, before)
    if not isinstance(result, Mapping) or not result or set(result) - set(SOURCES):
        got = printable(", ".join(map(str, result)) if isinstance(result, Mapping) else type(result).__name__)
        raise KernelError(f"gradients: got {got}; expected a mapping from some of {', '.join(SOURCES)} to arrays")
    for name, x in result.items():
        source = getattr(problem, SOURCES[name])
        if source is None:
            raise KernelError(f"{name}: the call has no {SOURCES[name]}")
        if kind_of(x) is None:
            raise KernelError(
                f"{name}: got {printable(type(x).__name__)}, expected an array of NumPy, PyTorch, CuPy or JAX"
            )
        _expect(name, x, tuple(source.shape))
        if dtype_name(x) != dtype_name(source):
            raise KernelError(f"{name}: got dtype {dtype_name(x)}, expected {SOURCES[name]}'s {dtype_name(source)}")
    found = {name: _numpy(x) for name, x in result.items()}
    _own(given | arriving, **found)
    return used(problem, found), read


def _on_copies(call: Callable[[Problem], Any], problem: Problem) -> tuple[Any, dict[str, NDArray[Any]], frozenset[str]]:
    """Return what a call gives on copies of the inputs, those copies, which it must have left alone, and what it read.

    A copy lies in memory as its original does: with the same strides, gaps and axes that are spread, and a cache of
    values that is a part of the cache of keys is a part of its copy. A rule comes as the array that it stands for.
    """
    problem = problem.written_out()
    given = {n: laid_out(np.asarray(x))[0] for n, x in problem.arrays().items()}
    if problem.block_table is not None:
        given |= _shared(problem.key, problem.value)
    asked, seen = watched(problem.replace(**given))
    _scrub(problem)
    result = guarded(lambda: call(asked))
    before = problem.arrays()
    if problem.new_key is not None:
        _written(given, problem)
        before = {n: x for n, x in before.items() if n not in ("key", "value")}
    unchanged(given, before)
    return result, given, frozenset(seen)


def _shared(key: NDArray[Any], value: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return copies of two caches where the values lie within the keys, as those of compressed keys do; else none."""
    if not np.shares_memory(key, value) or key.dtype != value.dtype:
        return {}
    copy, block, start = laid_out(key)
    away = value.__array_interface__["data"][0] - key.__array_interface__["data"][0]
    (low, high), (first, last) = np.lib.array_utils.byte_bounds(key), np.lib.array_utils.byte_bounds(value)
    if copy.strides != key.strides or first < low or last > high:
        return {}
    at = start * key.dtype.itemsize + away
    return {"key": copy, "value": np.ndarray(value.shape, value.dtype, block, at, value.strides)}


def guarded(call: Callable[[], Any]) -> Any:
    """Return what a kernel gives; whatever it raises is a KernelError with its name, or UnsupportedProblem."""
    try:
        with restored():
            return call()
    except (UnsupportedProblem, KernelError) as e:
        raise (UnsupportedProblem if isinstance(e, UnsupportedProblem) else KernelError)(_text(e)) from e
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # SystemExit, too: a kernel does not end the run that judges it
        raise KernelError(f"the kernel raised {_raised(e)}") from e


def _scrub(problem: Problem) -> None:
    """Leave NaN in the memory that is free, where a kernel's own arrays are likely to be made next."""
    for n in {problem.out_shape, problem.out_shape[:3]}:
        for kind in (np.float32, np.dtype(FORMATS[problem.out_type].dtype)):
            np.empty(n, kind).view(np.uint8).fill(0xFF)


def _raised(e: BaseException) -> str:
    first = (_text(e, lines=True).splitlines() or [""])[0][:200]
    return f"{printable(type(e).__name__)}: {first}"


def _text(e: BaseException, lines: bool = False) -> str:
    """Return an error's text without control characters; making it may raise anything."""
    try:
        text = str(e).strip()
    except KeyboardInterrupt:
        raise
    except BaseException as again:
        return f"its text raised {printable(type(again).__name__)}"
    return "\n".join(map(printable, text.splitlines())) if lines else printable(text)


def unchanged(given: Mapping[str, NDArray[Any]], before: Mapping[str, Any]) -> None:
    """Refuse a kernel that wrote to what it was given."""
    for name, x in before.items():
        if given[name].tobytes() != np.asarray(x).tobytes():
            raise KernelError(f"the kernel changed its input {name}; it must leave its inputs as they are")


def _written(given: Mapping[str, NDArray[Any]], problem: Problem) -> None:
    """Refuse a kernel that leaves a cache without the new keys, or changes something else in it."""
    new = set(slots(problem).ravel().tolist())
    axis = AXES[problem.page_layout].index("page")
    for name, wanted in appended(problem).items():
        got, must = (np.ascontiguousarray(np.moveaxis(x, axis, 1)) for x in (given[name], wanted))
        off = (got.view(np.uint8) != must.view(np.uint8)).any((2, 3)) if got.size else np.zeros(0, bool)
        if off.any():
            page, place = (int(i) for i in np.argwhere(off)[0])
            what = "is not the new row" if page * problem.page_size + place in new else "is not as it was"
            raise KernelError(
                f"{name}: the cache is wrong in {int(off.sum())} places after the call; page {page}, place {place} "
                f"{what}"
            )


def _own(given: dict[str, NDArray[Any]], **results: Any) -> None:
    """Refuse a result that is a view of an input."""
    for name, x in results.items():
        for source, a in given.items():
            if x is not None and np.shares_memory(x, a):
                raise KernelError(f"{name}: shares memory with the input {source}; return an array of its own")


def _numpy(x: Any) -> NDArray[Any]:
    try:
        return to_numpy(x)
    except InvalidProblem as e:
        raise KernelError(str(e)) from e
    except Exception as e:  # what a GPU's kernel did wrong is often raised by the first copy from there
        raise KernelError(f"reading what the kernel returned raised {_raised(e)}") from e


def _expect(name: str, x: Any, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise KernelError(f"{name}: got shape {tuple(x.shape)}, expected {shape}")
