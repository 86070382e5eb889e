"""GPU arrays of CuPy, PyTorch and JAX as pointers, shapes and strides; results of the same kind; the stream."""

from __future__ import annotations

import importlib
import sys
import threading
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..arrays import dtype_name, kind_of
from ..dtypes import FORMATS
from ..errors import InvalidProblem, UnsupportedProblem

__all__ = [
    "View",
    "capturing",
    "cast",
    "check_devices",
    "device_of",
    "empty",
    "finish",
    "layout",
    "library",
    "on",
    "placed",
    "side_by_side",
    "stream_of",
    "traced",
    "view",
]

library = cache(importlib.import_module)
"""Import a package once; asking again costs nothing."""
ITEM_BYTES = {name: form.dtype.itemsize for name, form in FORMATS.items()}
LIBRARIES = ("cupy", "torch", "jax")


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
    owner : object
        What keeps the memory.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int
    owner: Any = field(default=None, compare=False, repr=False)

    def spread(self) -> tuple[int, ...]:
        """Return the strides, 0 along the axes of one element: it stands for all."""
        return tuple(0 if n == 1 else s for n, s in zip(self.shape, self.strides, strict=True))


def view(x: Any, name: str) -> View:
    """Return the place of a GPU array; of JAX's, once CuPy's current stream waits until it is computed.

    Raises
    ------
    InvalidProblem
        No array, or one that is not on a GPU.
    UnsupportedProblem
        An array of another library.
    """
    number, dtype = device_of(x, name), dtype_name(x)
    if kind_of(x) == "torch":
        return View(x.data_ptr(), tuple(x.shape), x.stride(), dtype, number, owner=x)
    if kind_of(x) == "jax":
        x = library("cupy").from_dlpack(x)
    strides = tuple(s // x.itemsize for s in x.strides)
    return View(x.data.ptr, tuple(x.shape), strides, dtype, number, owner=x)


def traced(*arrays: Any) -> bool:
    """Tell whether JAX traces an array, or one of a tuple (jit, grad, vmap): it has a shape, but no numbers yet."""
    if "jax" not in sys.modules:
        return False
    tracer = library("jax").core.Tracer
    return any(isinstance(x, tracer) for a in arrays for x in (a if isinstance(a, tuple | list) else (a,)))


def device_of(x: Any, name: str) -> int:
    """Return the number of the GPU that an array is on; refuse others, as `view` does."""
    kind = kind_of(x)
    if kind == "torch":
        if not x.is_cuda:
            raise InvalidProblem(f"{name}: is on device {x.device}, expected a GPU; move it with {name}.cuda()")
        return int(x.get_device())
    if kind == "cupy":
        return int(x.device.id)
    if kind == "jax":
        if traced(x):
            raise UnsupportedProblem(
                f"{name}: is traced by JAX (jit, grad or vmap), expected an array; of refattn.gpu only attention and "
                "attention_with_cache are traced, and attention's gradients through jax.grad"
            )
        (device, *more) = x.devices()
        if device.platform != "gpu" or more:
            where = f"devices {x.devices()}" if more else f"device {device}"
            raise InvalidProblem(f"{name}: is on {where}, expected one GPU; move it with jax.device_put")
        return int(device.local_hardware_id)
    expected = f"of {', '.join(LIBRARIES[:-1])} or {LIBRARIES[-1]} on a GPU"
    if kind is None:
        raise InvalidProblem(f"{name}: got {type(x).__name__}, expected an array {expected}")
    raise UnsupportedProblem(f"{name}: got an array of {kind}, expected one {expected}")


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> tuple[Any, View]:
    """Return a new array of `like`'s device, its elements not set, and its place; `finish` gives it like's library."""
    if kind_of(like) == "torch":
        torch = library("torch")
        out = torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
        return out, View(out.data_ptr(), shape, out.stride(), dtype, like.get_device(), owner=out)
    out = library("cupy").empty(shape, library("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    return out, view(out, "out")


def placed(given: Any, like: Any, shape: tuple[int, ...], dtype: str) -> tuple[Any, View]:
    """Return an array to be filled and its place: the one that is given, or a new one."""
    return empty(like, shape, dtype) if given is None else (given, view(given, "out"))


def finish(like: Any, found: list[Any], given: list[View]) -> list[Any]:
    """Return results in `like`'s library; memory that another library owns is kept until the stream has used it."""
    if kind_of(like) != "jax":
        return found
    cupy, jax = library("cupy"), library("jax")
    event = cupy.cuda.Event(disable_timing=True)
    event.record()
    while _PENDING and _PENDING[0][0].done:
        _PENDING.popleft()
    _PENDING.append((event, given))
    return [jax.dlpack.from_dlpack(x) for x in found]


_PENDING: deque[tuple[Any, list[View]]] = deque()
"""What launches in flight read; JAX frees in the order of its own streams, which know nothing of ours."""


def cast(x: Any, dtype: str, name: str) -> Any:
    """Return a small array in another type, on its device; the same array where it is of that type."""
    device_of(x, name)
    if dtype_name(x) == dtype:
        return x
    return x.to(getattr(library("torch"), dtype)) if kind_of(x) == "torch" else x.astype(dtype)


def side_by_side(x: Any) -> Any:
    """Return an array whose last axis is contiguous: itself where it has one, else a copy."""
    if kind_of(x) == "torch":
        return x if x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()
    if kind_of(x) == "cupy":
        return x if x.ndim == 0 or x.strides[-1] == x.itemsize else library("cupy").ascontiguousarray(x)
    return x


def stream_of(like: Any, device: int) -> int:
    """Return the handle of the caller's current stream: PyTorch's for its tensors, else CuPy's."""
    if kind_of(like) == "torch":
        return int(library("torch")._C._cuda_getCurrentRawStream(device))
    return int(library("cupy").cuda.get_current_stream(device).ptr)


def capturing(stream: int) -> bool:
    """Return whether a CUDA graph is recorded on a stream; the default ones (0 to 2) record none."""
    return stream > 2 and bool(library("cupy").cuda.runtime.streamIsCapturing(stream))


class _Thread(threading.local):
    """What the runtime knows of a thread: the GPUs whose context it has made current there."""

    def __init__(self) -> None:
        self.ready: set[int] = set()


_THREAD = _Thread()


def on(device: int) -> AbstractContextManager[Any]:
    """Return a context in which a GPU is the current one."""
    cuda = library("cupy").cuda
    if device not in _THREAD.ready:  # a thread that has not called the runtime yet, as autograd's, has no context
        cuda.runtime.setDevice(device)
        cuda.runtime.free(0)
        _THREAD.ready.add(device)
    return nullcontext() if cuda.runtime.getDevice() == device else cuda.Device(device)


def check_devices(arrays: dict[str, View]) -> None:
    """Refuse arrays on another GPU than query's."""
    device = arrays["query"].device
    for name, x in arrays.items():
        if x.device != device:
            raise InvalidProblem(f"{name}: is on GPU {x.device} and query on GPU {device}; move one of them")


def layout(views: list[View]) -> tuple[bool, bool]:
    """Return whether all rows begin at multiples of 16 bytes, and whether tensor maps can describe the arrays."""
    aligned = mapped = True
    for x in views:
        size = 16 // ITEM_BYTES[x.dtype]
        if x.strides[3] != 1 and x.shape[3] > 1 and min(x.shape) > 0:
            raise UnsupportedProblem(f"gpu: takes a contiguous last axis, got strides {x.strides}; copy the array")
        for s, n in zip(x.strides[:3], x.shape[:3], strict=True):
            if n > 1:
                aligned, mapped = aligned and s % size == 0, mapped and 0 < s < 2**38
        aligned = aligned and x.pointer % 16 == 0
    return aligned, mapped and aligned
