"""Arrays of NumPy, PyTorch, CuPy and JAX in; the same kind, type and device out.

A kind is a library's import name. Nothing here imports a library that the caller has not imported already, except
:func:`to_kind` and :func:`cupy_with_gpu`, which are asked for one by name.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import array_api_compat as api
import numpy as np
from numpy.typing import NDArray

from .dtypes import HELD, format_of, no_format
from .errors import InvalidInput, InvalidProblem, UnsupportedProblem

__all__ = [
    "KINDS",
    "LINE",
    "cupy_with_gpu",
    "dtype_name",
    "kind_of",
    "like",
    "memory_of",
    "native",
    "overlapping",
    "to_kind",
    "to_numpy",
    "why_unusable",
]

KINDS = ("numpy", "torch", "cupy", "jax")


def kind_of(x: Any) -> str | None:
    """Return ``"numpy"``, ``"torch"``, ``"cupy"`` or ``"jax"``, or None for anything else."""
    known = _KINDS_OF_TYPES.get(type(x))
    if known is None:
        known = _kind_of(x)
        if known in ("torch", "cupy"):  # of JAX some arrays are NumPy's by type
            _KINDS_OF_TYPES[type(x)] = known
    return known


_KINDS_OF_TYPES: dict[type, str] = {}


def _kind_of(x: Any) -> str | None:
    if api.is_numpy_array(x):
        return "numpy"
    if api.is_torch_array(x):
        return "torch"
    if api.is_cupy_array(x):
        return "cupy"
    if api.is_jax_array(x):
        return "jax"
    return None


def dtype_name(x: Any) -> str:
    """Return the name of an array's element type, the same for every kind: ``"bfloat16"``, ``"bool"``, ``"int32"``."""
    return _name_of(x.dtype)


@lru_cache(maxsize=256)
def _name_of(dtype: Any) -> str:
    name = getattr(dtype, "name", None) or str(dtype)
    return str(name).rsplit(".", 1)[-1]


def to_numpy(x: Any, name: str = "array") -> NDArray[Any]:
    """Return an array's elements as a NumPy array on the host, bit for bit, in this machine's byte order.

    Parameters
    ----------
    x : array of NumPy, PyTorch, CuPy or JAX
        bfloat16 and float8 arrive as the types of ml_dtypes.
    name : str
        What to call it in an error.

    Raises
    ------
    InvalidProblem
        `x` is no array of a known kind, or its numbers are not there.
    """
    kind = kind_of(x)
    if (why := why_unusable(x)) is not None:
        raise InvalidProblem(f"{name}: {why}")
    if kind == "numpy":
        return native(np.asarray(x))
    if kind == "torch":
        import torch

        x = x.detach().cpu().resolve_conj().resolve_neg().contiguous()
        dtype = dtype_name(x)
        if dtype in HELD and not isinstance(HELD[dtype].type(0), np.floating):
            bits = torch.int16 if HELD[dtype].itemsize == 2 else torch.uint8
            return np.asarray(x.view(bits).numpy()).view(HELD[dtype])
        return np.asarray(x.numpy())
    if kind == "cupy":
        return np.asarray(x.get())
    if kind == "jax":
        try:
            return np.asarray(x)
        except (TypeError, RuntimeError) as e:  # traced, or deleted
            raise InvalidProblem(
                f"{name}: JAX does not give its numbers ({type(e).__name__}); pass it outside jit, vmap and grad, and "
                "before it is donated or deleted"
            ) from e
    raise InvalidProblem(
        f"{name}: got {type(x).__name__}, expected an array of {', '.join(KINDS)}; wrap it first, "
        "e.g. numpy.asarray(x, dtype=numpy.float32)"
    )


def native(x: NDArray[Any]) -> NDArray[Any]:
    """Return an array in this machine's byte order: itself, where it is so."""
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def why_unusable(x: Any) -> str | None:
    """Return why an array of a known kind has no plain numbers and what to do about it, or None where it has."""
    if isinstance(x, np.ma.MaskedArray):
        return "is a masked array; pass x.filled(0) and what is masked in allowed (True where a key may be seen)"
    if kind_of(x) != "torch":
        return None
    if type(x).__name__ == "FakeTensor" or x.is_meta:
        return (
            f"is a {'meta' if x.is_meta else 'fake'} tensor, which has no numbers; make it on a device that keeps them"
        )
    if x.is_nested:
        return "is a nested tensor; pad it (x.to_padded_tensor(0)), or pack it and pass cu_seqlens_q and cu_seqlens_k"
    if not str(x.layout).endswith("strided"):
        return f"is a sparse tensor ({x.layout}); pass x.to_dense()"
    return None


def to_kind(x: NDArray[Any], kind: str, device: Any = None) -> Any:
    """Return a NumPy array as an array of the named kind, its element type kept.

    Parameters
    ----------
    x : numpy.ndarray
        bool, integers, or a float of the table.
    kind : str
        One of ``KINDS``; the library must be installed.
    device : optional
        Where to put it (PyTorch, JAX and CuPy), by default the library's own default.
    """
    if kind == "numpy":
        if device is not None:
            raise InvalidInput(f"device: got {device!r} for numpy, which has none; leave it out")
        return x
    if kind not in KINDS:
        raise InvalidInput(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    x = native(x)
    if device is not None:
        _expect_device(kind, device)
    if kind == "torch":
        import torch

        _, block, start = laid_out(x)
        name = x.dtype.name
        if name in HELD and not isinstance(x.dtype.type(0), np.floating):
            if not hasattr(torch, name):
                raise InvalidInput(f"torch: has no {name} of one element a byte; keep such arrays in numpy or jax")
            bits = np.int16 if x.dtype.itemsize == 2 else np.uint8
            whole = torch.from_numpy(block.view(bits)).view(getattr(torch, name))
        else:
            whole = torch.from_numpy(block)
        steps = [s // x.dtype.itemsize for s in _strides(x)]
        return (whole if device is None else whole.to(device)).as_strided(x.shape, steps, start)
    if kind == "jax":
        x = np.array(x, copy=True, order="C")
        jax = importlib.import_module("jax")
        # a float64 array stays one only where 64-bit types are on; say so and do not narrow it in silence
        if x.dtype == np.float64 and not jax.config.jax_enable_x64:
            raise InvalidInput("jax: float64 needs jax.config.update('jax_enable_x64', True); turn it on or cast first")
        return jax.device_put(x, device)
    cupy = importlib.import_module("cupy")
    with cupy.cuda.Device(device):
        _, block, start = laid_out(x)
        whole = cupy.asarray(block)
        return cupy.ndarray(x.shape, x.dtype, whole[start:].data, strides=_strides(x))


def _expect_device(kind: str, device: Any) -> None:
    """Refuse a device that a library does not have here, before anything is made on it."""
    try:
        if kind == "torch":
            importlib.import_module("torch").empty(0, device=device)
        elif kind == "jax":
            importlib.import_module("jax").device_put(np.zeros(0, np.float32), device)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as e:
        why = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InvalidInput(f"device: got {device!r}, which {kind} does not have here ({why}); name another") from e


def memory_of(x: Any) -> NDArray[Any] | None:
    """Return a NumPy array that lies where an array lies, whose elements must not be read.

    None where it is empty, or its library does not say: arrays of JAX are never written.
    """
    kind = kind_of(x)
    if kind == "numpy":
        return np.asarray(x) if x.size else None
    if kind not in ("torch", "cupy") or 0 in x.shape:
        return None
    if kind == "torch":
        place, size = x.data_ptr(), x.element_size()
        strides = tuple(n * size for n in x.stride())
    else:
        place, size, strides = x.data.ptr, x.itemsize, x.strides
    said = {"version": 3, "data": (place, True), "shape": tuple(x.shape), "strides": strides, "typestr": f"|V{size}"}
    return np.asarray(type("Placed", (), {"__array_interface__": said})())


def overlapping(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Tell whether elements of an array share memory, by its strides in bytes."""
    steps = sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1)
    if 0 in shape or not steps:
        return False
    if steps[0][0] < itemsize:
        return True
    end, nested = itemsize, True
    for step, n in steps:
        nested, end = nested and step >= end, end + step * (n - 1)
    if nested:
        return False
    at = np.zeros(1, np.int64)
    for step, n in steps:  # rows that reach past where the next begin: look at every place
        at = np.add.outer(at, step * np.arange(n)).ravel()
    return bool((np.diff(np.sort(at)) < itemsize).any())


def _strides(x: NDArray[Any]) -> tuple[int, ...]:
    """Return an array's strides in bytes: its own, or of whole rows where those run backwards or it is empty."""
    if x.size and all(s >= 0 and s % x.dtype.itemsize == 0 for s in x.strides):
        return x.strides
    return np.empty(x.shape, x.dtype).strides


BORDER = 2**14
"""Bytes of NaN before and after an array that is laid out."""
LINE = 16
"""Bytes that a GPU loads at once: kernels take another path, or a wrong one, where an array begins between two."""


def laid_out(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Return a copy of an array that lies in memory as it does, the block that it lies in, and where in it it starts.

    It begins as many bytes past a multiple of 16 as the array does. What is before, between and after its elements is
    NaN, so that a read there shows.
    """
    strides, step = _strides(x), x.dtype.itemsize
    spread = tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)  # each number once
    size = step + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) if x.size else 0
    block = _from_a_line((size + 2 * BORDER + LINE) // step, x.dtype)
    block.view(np.uint8).fill(0xFF)
    start = (BORDER + (_place(x) % LINE if x.size else 0)) // step
    copy = np.ndarray(x.shape, x.dtype, block, start * step, strides)
    copy[spread] = x[spread]
    return copy, block, start


def _from_a_line(count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array of so many elements that begins at a multiple of 16 bytes."""
    room = np.empty(count + LINE // dtype.itemsize, dtype)
    first = -_place(room) % LINE // dtype.itemsize
    return room[first : first + count]


def _place(x: NDArray[Any]) -> int:
    return int(x.__array_interface__["data"][0])


def like(x: NDArray[Any], model: Any) -> Any:
    """Return a NumPy array as `model` is: the same kind and device (the element type is `x`'s own)."""
    kind = kind_of(model)
    if kind is None:
        raise InvalidInput(f"like: got {type(model).__name__}, expected an array of {', '.join(KINDS)}")
    return to_kind(x, kind, None if kind == "numpy" else api.device(model))


def to_float64(x: NDArray[Any]) -> NDArray[np.float64]:
    """Return an array of floats or int8 as float64, exactly (every format's numbers are float64 numbers)."""
    if x.dtype.name not in HELD and x.dtype != np.int8:
        raise no_format("dtype", x.dtype.name)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return np.asarray(x).astype(np.float64, copy=False)


def from_float64(x: NDArray[np.float64], dtype: Any) -> NDArray[Any]:
    """Return numbers that `dtype` can hold exactly, in that type."""
    form = format_of(dtype)
    narrow = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):  # through float32 a number of a narrower format is still itself
        return narrow.astype(form.dtype) if form.precision >= 24 else narrow.astype(np.float32).astype(form.dtype)


def cupy_with_gpu() -> Any:
    """Return CuPy.

    Raises
    ------
    UnsupportedProblem
        It is not installed, or finds no GPU.
    """
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as e:  # or a library that it needs is missing
        raise UnsupportedProblem(
            f"device='cuda' needs the package cupy ({e}); pip install '.[cuda12]' or '.[cuda13]' in a clone of "
            "refattn, or use device='cpu'"
        ) from e
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as e:
        raise UnsupportedProblem(f"device='cuda' finds no GPU ({e}); use device='cpu'") from e
    if not count:
        raise UnsupportedProblem("device='cuda' finds no GPU; use device='cpu'")
    return cupy
