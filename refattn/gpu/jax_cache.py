"""Attention over a cache for JAX: one call of XLA, under jit and outside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.experimental.buffer_callback import buffer_callback

from ..arrays import dtype_name
from ..errors import UnsupportedProblem
from . import cache
from .launch import capability
from .views import View, library, on, view

__all__ = ["attention_with_cache"]


@dataclass(frozen=True)
class _Asked:
    """What does not change from run to run: which arrays there are, and what is given by value."""

    names: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    numbers: tuple[tuple[str, float], ...]
    accuracy: str


def attention_with_cache(
    given: dict[str, Any], options: dict[str, Any], numbers: dict[str, float], accuracy: str
) -> tuple[Any, Any]:
    """Return out and lse of :func:`refattn.gpu.attention_with_cache` for arrays of JAX, traced or not.

    Raises
    ------
    InvalidProblem, UnsupportedProblem
        As that function does, while JAX traces.
    """
    if jax.default_backend() != "gpu":
        where = jax.default_backend()
        raise UnsupportedProblem(f"query: is of JAX with its backend {where!r}, expected 'gpu'; use jax[cuda13]")
    window = options["window"]
    by_value = options | {"window": tuple(window) if isinstance(window, list) else window}
    asked = _Asked(tuple(given), tuple(by_value.items()), tuple(numbers.items()), accuracy)
    try:
        hash(asked)
    except TypeError:  # an option that is none: the checks say which
        return tuple(_traced(asked, *given.values()))
    found: tuple[Any, Any] = _compiled(asked, *given.values())
    return found


def _traced(asked: _Asked, *arrays: Any) -> Any:
    given = dict(zip(asked.names, arrays, strict=True))
    for n, x in given.items():
        cache.check_whole(n, dtype_name(x))
    given |= {n: given[n].astype(to) for n, to in cache.CAST.items() if n in given}
    views = {n: _place(x) for n, x in given.items()}
    options, numbers = dict(asked.options), dict(asked.numbers)
    sink = given.get("sink")
    cache.checked(given["query"], jax.numpy.zeros, views, options, numbers, sink, asked.accuracy, capability(0))
    q, v = given["query"], given["value"]
    out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
    lse = jax.ShapeDtypeStruct(q.shape[:3], "float32")
    narrow = tuple(n for n, x in given.items() if dtype_name(x) == cache.NARROW)
    # CuPy has no such type
    given |= {n: jax.lax.bitcast_convert_type(given[n], "uint8") for n in narrow}
    return buffer_callback(partial(_queued, asked, narrow), (out, lse))(*given.values())


_compiled = jax.jit(_traced, static_argnums=0)


def _place(x: Any) -> View:
    """Return where an array of XLA's would be: without gaps, somewhere aligned."""
    strides = [1]
    for n in x.shape[:0:-1]:
        strides.insert(0, strides[0] * n)
    return View(0, tuple(x.shape), tuple(strides), dtype_name(x), 0)


def _queued(asked: _Asked, narrow: tuple[str, ...], ctx: Any, results: Any, *buffers: Any) -> None:
    """Queue the kernels on XLA's stream."""
    cupy = library("cupy")
    arrays = dict(zip(asked.names, map(cupy.from_dlpack, buffers), strict=True))
    q = arrays["query"]
    with on(q.device.id), cupy.cuda.ExternalStream(ctx.stream, q.device.id):
        views = {n: view(x, n) for n, x in arrays.items()}
        views |= {n: replace(views[n], dtype=cache.NARROW) for n in narrow}
        into = tuple(map(cupy.from_dlpack, results))
        options, numbers = dict(asked.options), dict(asked.numbers)
        cache.computed(q, views, options, numbers, arrays.get("sink"), asked.accuracy, into)
