"""Gradients of softmax attention on a GPU: P computed anew from lse; by default the same bits each time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from ..arrays import dtype_name
from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from . import sm90_backward as hopper
from .backward_kernels import KERNELS
from .backward_launch import launch, prepare
from .kernel import Call, Kernel
from .launch import capability
from .plan import pick
from .recorded import recording, replay
from .request import Kept, Request, read, refuse_term
from .views import capturing, device_of, finish, on, placed, side_by_side, stream_of

__all__ = ["attention_backward", "gradients"]

SOURCES = {"dq": "query", "dk": "key", "dv": "value", "dbias": "bias", "dsink": "sink"}
SINKS = ("float16", "bfloat16", "float32", "float64")


def attention_backward(
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    dout: Any,
    *,
    scale: float | None = None,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sink: Any = None,
    bias: Any = None,
    allowed: Any = None,
    block_mask: tuple[Any, int, int] | None = None,
    cu_seqlens: tuple[Any, Any] | None = None,
    dlse: Any = None,
    wanted: Iterable[str] | None = None,
    deterministic: bool = True,
    impl: str | None = None,
) -> dict[str, Any]:
    """Return the gradients of :func:`refattn.gpu.attention`'s out, given what arrives at out.

    Sums are in float32 (float64 for float64 inputs), by default in an order that depends on shapes and GPU alone.
    Nothing is waited for; the kernels are queued on the caller's current stream.

    Parameters
    ----------
    query, key, value : arrays
        As they were given to :func:`refattn.gpu.attention`, like all options below.
    out : (b, h_q, n_q, d_v) array
        What it returned, of query's type.
    lse : (b, h_q, n_q) array
        Likewise; float32 (float64 for float64).
    dout : (b, h_q, n_q, d_v) array
        The gradient that arrives at out, of query's type. One whose last axis is not contiguous, as the single number
        that ``out.sum().backward()`` spreads, is copied.
    scale, causal, window, softcap, sink, bias, allowed, block_mask, cu_seqlens
        As in :func:`refattn.gpu.attention`.
    dlse : (b, h_q, n_q) array, optional
        The gradient that arrives at lse, of its type.
    wanted : iterable of str, optional
        Out of "dq", "dk", "dv", "dbias" and "dsink"; by default the gradients of all that is there.
    deterministic : bool
        The same bits each time. Where False, "sm90" adds the parts of dq in the order in which they come, faster; the
        other kernels have one order anyway.
    impl : str, optional
        "sm90" (Hopper: float16 and bfloat16, every option but biases, boolean and block masks), "mma" (float16 and
        bfloat16, head dims up to 128) or "simt"; by default the first that computes it. The gradient of a bias that is
        spread along an axis always comes from "simt".

    Returns
    -------
    dict of str to array
        By name, each of the shape and type of what it is by. With accuracy="fast" as forward: P and dS are rounded to
        float16 or bfloat16 before they are multiplied.

    Raises
    ------
    InvalidProblem
        Shapes, types or devices that do not fit together.
    InvalidInput
        An unknown kernel, or a gradient of what is not there.
    UnsupportedProblem
        No kernel computes it; raised before any launch.
    """
    refuse_term(bias)
    given = {"scale": scale, "causal": causal, "window": window, "softcap": softcap, "sink": sink, "bias": bias}
    given |= {"allowed": allowed, "block_mask": block_mask, "cu_seqlens": cu_seqlens}
    return gradients(
        query, key, value, out, lse, dout, **given, dlse=dlse, wanted=wanted, deterministic=deterministic, impl=impl
    )


def gradients(
    query: Any, key: Any, value: Any, out: Any, lse: Any, dout: Any, *, scale: float | None, causal: str | None,
    window: Any, softcap: float | None, sink: Any, bias: Any, allowed: Any, block_mask: Any, cu_seqlens: Any, dlse: Any,
    wanted: Iterable[str] | None, deterministic: bool, impl: str | None, into: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return what :func:`attention_backward` does; `into` are arrays to be filled, by the gradients' names."""
    device = device_of(query, "query")
    with on(device):
        tensors = {"query": query, "key": key, "value": value, "bias": bias, "allowed": allowed}
        tensors |= {"out": out, "lse": lse, "dout": dout if dout is None else side_by_side(dout), "dlse": dlse}
        options = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
        asked = read(tensors, sink, block_mask, cu_seqlens, options, "backward", impl)
        call, kernel = _checked(asked, impl, device)
        names = _wanted(wanted, tensors | {"sink": sink})
        found: dict[str, Any] = {}
        for n in names:
            source = tensors.get(SOURCES[n], sink)
            place = into and into[n]
            found[n], asked.arrays[n] = placed(place, query, tuple(source.shape), dtype_name(source))
        by = 1 / math.sqrt(asked.arrays["query"].shape[3]) if scale is None else float(scale)
        by_value, stream, ordered = asked.options | {"scale": by}, stream_of(query, device), bool(deterministic)
        used = prepare(call, kernel, query, found, asked.arrays, ordered)
        kind = (asked.signature, tuple(names), ordered, stream)
        # results of one's own have strides that the signature does not know; others' parts are made in between
        again = kernel is hopper.KERNEL and into is None and not capturing(stream)
        if not (again and replay(kind, asked.arrays)):
            with recording(kind) if again else nullcontext():
                used += launch(call, kernel, query, found, asked.arrays, by_value, stream, ordered)
        results = finish(query, list(found.values()), [*asked.arrays.values(), *used])
    return {n: x for n, x in zip(found, results, strict=True) if n in names}


_KNOWN: Kept[tuple[Call, Kernel]] = Kept()


def _checked(asked: Request, impl: str | None, device: int) -> tuple[Call, Kernel]:
    """Return the call and its kernel; calls that were checked are kept."""
    known = _KNOWN.find(asked.signature)
    if known is None:
        call = asked.call()
        _check_results(asked)
        name, _ = pick(KERNELS, call, impl, capability(device))
        known = _KNOWN[asked.signature] = (call, KERNELS[name])
    return known


def _check_results(asked: Request) -> None:
    """Refuse out, lse, dout and sinks that do not fit."""
    q, v = asked.arrays["query"], asked.arrays["value"]
    wide = "float64" if q.dtype == "float64" else "float32"
    shape = (*q.shape[:3], v.shape[3])
    like = {"out": (shape, q.dtype), "dout": (shape, q.dtype), "lse": (shape[:3], wide), "dlse": (shape[:3], wide)}
    for name, (expected, dtype) in like.items():
        x = asked.arrays.get(name)
        if x is not None and (x.shape, x.dtype) != (expected, dtype):
            raise InvalidProblem(f"{name}: got {x.dtype} of shape {x.shape}, expected {dtype} of shape {expected}")
    for name in ("out", "lse", "dout"):
        if name not in asked.arrays:
            raise InvalidProblem(f"{name}: got None, expected an array")
    if asked.sink is not None and dtype_name(asked.sink) not in SINKS:
        raise UnsupportedProblem(f"sink: takes {', '.join(SINKS)} backward, got {dtype_name(asked.sink)}")


def _wanted(wanted: Iterable[str] | None, tensors: dict[str, Any]) -> list[str]:
    there = [n for n, source in SOURCES.items() if tensors[source] is not None]
    names = there if wanted is None else list(wanted)
    for n in names:
        if n not in there:
            raise InvalidInput(f"wanted: got {n!r}, expected gradients out of {', '.join(there)}")
    return [n for n in there if n in names]
