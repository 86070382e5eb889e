"""The few things that NumPy's own functions do not do alike for arrays of NumPy and of CuPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import from_float64
from ..dtypes import Format

__all__ = ["beside", "largest", "narrowed", "on_host", "power_above", "product", "scaled", "two_to", "within"]


def beside(x: Any, y: NDArray[Any]) -> Any:
    """Return a NumPy array where x is: itself, or a copy on x's device."""
    return np.asarray(y, like=x) if hasattr(x, "__cuda_array_interface__") else y


def on_host(x: Any) -> Any:
    """Return an array as NumPy's: itself, or a copy of what is on a device."""
    return x.get() if hasattr(x, "__cuda_array_interface__") else x


def largest(x: Any, axis: int) -> Any:
    """Return the largest of sizes along an axis, 0 where there are none (CuPy's max takes no ``initial``)."""
    return x.max(axis) if x.shape[axis] else x.sum(axis)


def narrowed(x: Any, form: Format, device: Any) -> NDArray[Any]:
    """Return numbers of a format in its own type, as NumPy's: what comes from a device is narrow already."""
    if not hasattr(x, "__cuda_array_interface__"):
        return from_float64(x, form.name)
    return np.asarray(device.returned(x, form))


def power_above(x: Any) -> Any:
    """Return powers of two above sizes; 1 where these are 0 or no number."""
    return np.where(x > 0, np.ldexp(np.ones_like(x), np.frexp(np.where(np.isfinite(x), x, 1.0))[1]), 1.0)


def product(device: Any, a: Any, b: Any) -> Any:
    """Return the product of two float64 matrices: NumPy's, or the one that a device is trusted for."""
    if device is None:
        return a @ b
    out = device.xp.empty((a.shape[0], b.shape[1]))
    device.matmul(a, b, out)
    return out


def within(x: Any, index: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return an index with its arrays where x is."""
    return tuple(beside(x, i) if isinstance(i, np.ndarray) else i for i in index)


def scaled(x: Any, e: int) -> Any:
    """Return x * 2**e, rounded once."""
    return np.ldexp(x, np.full_like(x, e, np.int32)) if e else x


def two_to(x: Any) -> Any:
    """Return 2**x of whole numbers from -1074, exactly: a device's exp2 may be off by a last place."""
    return np.ldexp(np.ones_like(x), x.astype(np.int32))
