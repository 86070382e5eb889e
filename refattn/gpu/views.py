"""GPU arrays of CuPy and PyTorch as pointers, shapes and strides; results of the same kind, on the current stream."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..arrays import dtype_name, kind_of
from ..errors import InvalidProblem, UnsupportedProblem

__all__ = ["View", "current_stream", "empty", "view"]

LIBRARIES = ("cupy", "torch")


@dataclass(frozen=True)
class View:
    """An array's place: nothing is copied.

    Attributes
    ----------
    pointer : int
        Address of its first element on the device.
    shape, strides : tuple of int
        Strides in elements.
    dtype : str
        The format's name.
    device : int
        The GPU's number.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int


def view(x: Any, name: str) -> View:
    """Return the place of a GPU array.

    Raises
    ------
    InvalidProblem
        No array, or one that is not on a GPU.
    UnsupportedProblem
        An array of another library.
    """
    kind = kind_of(x)
    if kind is None:
        raise InvalidProblem(f"{name}: got {type(x).__name__}, expected an array of {' or '.join(LIBRARIES)} on a GPU")
    if kind not in LIBRARIES:
        raise UnsupportedProblem(f"{name}: got an array of {kind}, expected one of {' or '.join(LIBRARIES)} on a GPU")
    shape = tuple(int(n) for n in x.shape)
    if kind == "torch":
        if x.device.type != "cuda":
            raise InvalidProblem(f"{name}: is on device {x.device}, expected a GPU; move it with {name}.cuda()")
        return View(x.data_ptr(), shape, tuple(x.stride()), dtype_name(x), x.device.index)
    strides = tuple(s // x.itemsize for s in x.strides)
    return View(x.data.ptr, shape, strides, dtype_name(x), x.device.id)


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Return a new array of `like`'s library and device, its elements not set."""
    if kind_of(like) == "torch":
        torch = importlib.import_module("torch")
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    cupy = importlib.import_module("cupy")
    return cupy.empty(shape, like.dtype if dtype == dtype_name(like) else dtype)


def current_stream(like: Any) -> AbstractContextManager[Any]:
    """Return the caller's current stream on `like`'s device, as a context in which CuPy launches on it."""
    cupy = importlib.import_module("cupy")
    if kind_of(like) == "torch":
        torch = importlib.import_module("torch")
        handle = torch.cuda.current_stream(like.device).cuda_stream
        return _Both(cupy.cuda.Device(like.device.index), cupy.cuda.ExternalStream(handle, like.device.index))
    return _Both(like.device, cupy.cuda.get_current_stream(like.device.id))


class _Both(AbstractContextManager[Any]):
    """A device and a stream on it."""

    def __init__(self, device: Any, stream: Any) -> None:
        self.device, self.stream = device, stream

    def __enter__(self) -> Any:
        self.device.__enter__()
        self.stream.__enter__()
        return self.stream

    def __exit__(self, *error: Any) -> None:
        self.stream.__exit__(*error)
        self.device.__exit__(*error)
