"""Few queries over keys and values in a cache: lengths, pages, float8 with scales; its checks and launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..arrays import dtype_name, kind_of
from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from ..problem import Problem
from . import decode
from .arguments import arguments_of
from .kernel import ACCURACIES, Call, Plan
from .launch import attribute, capability, kernel_of, params, queue
from .request import Kept
from .views import View, cast, check_devices, device_of, empty, layout, on, placed, stream_of, view

__all__ = ["attention_with_cache"]

NARROW = "float8_e4m3fn"


def attention_with_cache(
    query: Any,
    key: Any,
    value: Any,
    *,
    lengths: Any,
    page_table: Any = None,
    key_scale: Any = None,
    value_scale: Any = None,
    scale: float | None = None,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sink: Any = None,
    return_lse: bool = False,
    accuracy: str = "fast",
) -> Any:
    """Return softmax attention of a few queries over the keys and values that a cache holds.

    Sequence i is that of :func:`refattn.gpu.attention` over its first ``lengths[i]`` keys, bit for bit. Nothing is
    waited for, and nothing is copied. What the cache holds past a length, and in pages of no sequence, is not read.
    With JAX it is one call of XLA, under ``jax.jit`` and outside it.

    Parameters
    ----------
    query : (b, h_q, n_q, d_k) array of CuPy, PyTorch or JAX
        float16 or bfloat16; up to 16 queries, head dims up to 128; any strides with a contiguous last axis.
    key : (b, h_kv, rows, d_k) array, or (pages, h_kv, rows, d_k) with a page table
        Of query's type, or float8_e4m3fn. A cache laid out as (pages, rows, h_kv, d_k) is passed with its axes swapped:
        ``cache.transpose(1, 2)``; JAX copies it then.
    value : (b, h_kv, rows, d_v) array, or (pages, h_kv, rows, d_v)
        Of key's type.
    lengths : (b,) integer array
        The keys of each sequence. Values are not checked, which would wait for the GPU; one past what the cache has
        room for stands for all that it has.
    page_table : (b, most) integer array, optional
        The pages of each sequence, in order. A number that is no page stands for keys and values of 0; nothing outside
        the cache is read.
    key_scale, value_scale : number, or (b or pages, h_kv, rows) float32 array, optional
        What float8 keys and values are multiplied by: 1 in place of an axis stands for all along it. By token, values'
        scales need bfloat16 queries.
    scale, causal, window, softcap, sink
        As in :class:`refattn.Problem`, for each sequence by itself.
    return_lse : bool
        Also return the log-sum-exp, (b, h_q, n_q) in float32.
    accuracy : str
        "fast" rounds P to query's type; "high" keeps it in two parts.

    Raises
    ------
    InvalidProblem
        Shapes, types or devices that do not fit together.
    UnsupportedProblem
        What the kernel does not compute, a gradient among it; raised before any launch.
    """
    tensors = {"query": query, "key": key, "value": value, "lengths": lengths, "page_table": page_table, "sink": sink}
    if any(getattr(x, "requires_grad", False) for x in tensors.values()):
        raise UnsupportedProblem("attention_with_cache: has no gradient; pass tensors without requires_grad")
    numbers = {}
    for n, x in (("key_scale", key_scale), ("value_scale", value_scale)):
        if x is None or isinstance(x, int | float):
            numbers[n] = 1.0 if x is None else float(x)
        else:
            tensors[n] = x
    given = {n: x for n, x in tensors.items() if x is not None}
    options = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    if kind_of(query) == "jax":
        from . import jax_cache

        out, lse = jax_cache.attention_with_cache(given, options, numbers, accuracy)
    else:
        with on(device_of(query, "query")):
            for n, x in given.items():
                device_of(x, n)
                check_whole(n, dtype_name(x))
            given |= {n: cast(given[n], to, n) for n, to in CAST.items() if n in given}
            arrays = {n: view(x, n) for n, x in given.items()}
            out, lse = computed(query, arrays, options, numbers, given.get("sink"), accuracy)
    return (out, lse) if return_lse else out


CAST = {"lengths": "int32", "page_table": "int32"} | dict.fromkeys(("sink", "key_scale", "value_scale"), "float32")
"""Arrays that the kernels take in one type, and are brought into it."""


def check_whole(name: str, dtype: str) -> None:
    """Refuse lengths and pages that are no integers."""
    if CAST.get(name) == "int32" and dtype not in ("int32", "int64"):
        raise InvalidProblem(f"{name}: got dtype {dtype}, expected int32 or int64")


def computed(
    query: Any, arrays: dict[str, View], options: dict[str, Any], numbers: dict[str, float], sink: Any, accuracy: str,
    into: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Return out and lse of a cache's arrays, which are in the kernels' types; `into` are arrays to be filled."""
    device = arrays["query"].device
    with on(device):
        call, plan = _planned(query, arrays, options, numbers, sink, accuracy, device)
        (b, h, n_q, d_k), d_v = arrays["query"].shape, arrays["value"].shape[3]
        out, arrays["out"] = placed(into and into[0], query, (b, h, n_q, d_v), call.dtype)
        lse, arrays["lse"] = placed(into and into[1], query, (b, h, n_q), "float32")
        if min(b, h, n_q):
            by = 1 / math.sqrt(d_k) if options["scale"] is None else float(options["scale"])
            _launch(call, plan, query, arrays, options | {"scale": by}, numbers, stream_of(query, device))
    return out, lse


def _planned(
    query: Any,
    arrays: dict[str, View],
    options: dict[str, Any],
    numbers: dict[str, float],
    sink: Any,
    accuracy: str,
    device: int,
) -> tuple[Call, Plan]:
    """Return the call and its plan; calls that were checked are kept."""
    places = tuple((n, x.shape, x.strides, x.dtype, x.device, x.pointer % 16 == 0) for n, x in arrays.items())
    asked = (places, *options.items(), *map(type, options.values()), *numbers.items(), accuracy)
    known = _KNOWN.find(asked)
    if known is None:
        check_devices(arrays)
        make, able = lambda *x: empty(query, *x)[0], capability(device)
        known = _KNOWN[asked] = checked(query, make, arrays, options, numbers, sink, accuracy, able)
    return known


_KNOWN: Kept[tuple[Call, Plan]] = Kept()


def checked(
    query: Any, make: Callable[[tuple[int, ...], str], Any], arrays: dict[str, View], options: dict[str, Any],
    numbers: dict[str, float], sink: Any, accuracy: str, able: tuple[int, int],
) -> tuple[Call, Plan]:  # fmt: skip
    """Return the call and its plan after all checks; `make` returns an array of query's library of a shape and type."""
    _check_shapes(arrays)
    _check_types(arrays, numbers)
    q, k, v = (arrays[n] for n in ("query", "key", "value"))
    one = [make((1, h, 1, d), q.dtype) for h, d in ((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3]))]
    spread_k, spread_v = (_spread(x, q.shape[0]) for x in one)
    return _plan(Problem(query, spread_k, spread_v, sink=sink, **options), arrays, accuracy, able)


def _spread(x: Any, batch: int) -> Any:
    """Return one key for every sequence, which stands for keys where only options are checked."""
    return x.expand(batch, -1, -1, -1) if hasattr(x, "expand") else x.repeat(batch, 0)


def _check_shapes(arrays: dict[str, View]) -> None:
    q, k, v = (arrays[n] for n in ("query", "key", "value"))
    for name, x in (("query", q), ("key", k), ("value", v)):
        if len(x.shape) != 4:
            raise InvalidProblem(f"{name}: got shape {x.shape}, expected four axes")
    layout([q, k, v])  # it refuses a last axis with gaps
    table = arrays.get("page_table")
    if table is not None and (len(table.shape) != 2 or table.shape[0] != q.shape[0]):
        raise InvalidProblem(f"page_table: got shape {table.shape}, expected ({q.shape[0]}, pages)")
    if table is not None and table.shape[1] > 1 and table.strides[1] != 1:
        raise UnsupportedProblem(f"page_table: takes a contiguous last axis, got strides {table.strides}")
    first = q.shape[0] if table is None else k.shape[0]
    for name, x, expected in (
        ("key", k, (first, *k.shape[1:3], q.shape[3])),
        ("value", v, (*k.shape[:3], v.shape[3])),
        ("lengths", arrays["lengths"], q.shape[:1]),
    ):
        if x.shape != expected:
            raise InvalidProblem(f"{name}: got shape {x.shape}, expected {expected}")
    if arrays["lengths"].strides[0] != 1 and q.shape[0] > 1:
        raise UnsupportedProblem(f"lengths: takes a contiguous array, got strides {arrays['lengths'].strides}")


def _check_types(arrays: dict[str, View], numbers: dict[str, float]) -> None:
    q, k, v = (arrays[n] for n in ("query", "key", "value"))
    if k.dtype != v.dtype or k.dtype not in (q.dtype, NARROW):
        raise InvalidProblem(
            f"key, value: got dtypes {k.dtype} and {v.dtype}, expected both {q.dtype}, as query is, or both {NARROW}"
        )
    for name in ("key_scale", "value_scale"):
        x, number = arrays.get(name), numbers.get(name, 1.0)
        if k.dtype != NARROW and (x is not None or number != 1):
            raise InvalidProblem(f"{name}: is for keys and values in {NARROW}, got {k.dtype}")
        if not math.isfinite(number):
            raise InvalidProblem(f"{name}: got {number}, expected a finite number")
        if x is not None and (
            len(x.shape) != 3 or any(a not in (1, b) for a, b in zip(x.shape, k.shape, strict=False))
        ):
            raise InvalidProblem(f"{name}: got shape {x.shape}, expected {k.shape[:3]}, or 1 in place of an axis")


def _plan(problem: Problem, arrays: dict[str, View], accuracy: str, able: tuple[int, int]) -> tuple[Call, Plan]:
    """Return the call, its keys all that a sequence has room for, and the kernel."""
    if accuracy not in ACCURACIES:
        raise InvalidInput(f"accuracy: got {accuracy!r}, expected one of {', '.join(ACCURACIES)}")
    k, v, table = arrays["key"], arrays["value"], arrays.get("page_table")
    room = k.shape[2] * (1 if table is None else table.shape[1])
    if room >= 2**30:
        raise UnsupportedProblem(f"attention_with_cache: takes sequences of less than 2**30 keys, got room for {room}")
    step = 16 if k.dtype == NARROW else 8
    aligned = layout([k, v])[0] and not (k.shape[3] % step or v.shape[3] % step)
    call = replace(Call.of(problem, accuracy, None, aligned=aligned), n_k=room)
    if text := decode.obstacle(call, able):
        raise UnsupportedProblem(f"attention_with_cache: {text}")
    scales = [arrays[n] for n in ("key_scale", "value_scale") if n in arrays]
    by_token = any(x.shape[2] > 1 or (table is not None and x.shape[0] > 1) for x in scales)
    value_scale = arrays.get("value_scale")
    if by_token and value_scale is not None and call.dtype == "float16":
        raise UnsupportedProblem(
            "value_scale: takes one by token with bfloat16 queries, got float16: weights times scales may overflow"
        )
    base = decode.KERNEL.macros(call)
    macros = decode.with_cache(base, table is not None, k.dtype == NARROW, 2 if by_token else 1 if scales else 0)
    return call, Plan(decode.KERNEL, decode.KERNEL.why(call), macros, decode.shared_bytes(macros))


def _launch(
    call: Call, plan: Plan, like: Any, arrays: dict[str, View], options: dict[str, Any], numbers: dict[str, float],
    stream: int,
) -> None:  # fmt: skip
    """Queue three kernels: where each sequence's parts begin, the parts, and their merge."""
    (b, h, n_q, _), h_kv, device, m = arrays["query"].shape, arrays["key"].shape[1], arrays["query"].device, plan.macros
    rows, width = call.group * n_q, m["WIDTH_V"]
    parts = b * h_kv * decode.most_units(call.n_k)
    _, kept = empty(like, (parts * rows * (width + 2) + b + 1,), "float32")
    stats = kept.pointer + 4 * parts * rows * width
    grid = max(1, min(parts, attribute(device, "MultiProcessorCount")))
    cut = {"first_key": 0, "keys": 0, "unit": 0, "units": 0, "workers": grid}
    values = {
        "p": params(plan, call, arrays, options, 0),
        "s": {"parts": kept.pointer, "stats": stats, **cut},
        "c": _cache(call, arrays, numbers, stats + 8 * parts * rows),
    }
    threads = plan.kernel.threads(m)
    for entry, size, block, shared in (
        ("starts", 1, 1024, 0),
        ("decode_cache", grid, threads, plan.shared_bytes),
        ("merge_cache", b * h * n_q, 512, 0),
    ):
        takes = arguments_of(decode.KERNEL.file, entry)
        queue(kernel_of(plan, device, entry, shared), size, block, shared, stream, takes, values)


def _cache(call: Call, arrays: dict[str, View], numbers: dict[str, float], starts: int) -> dict[str, Any]:
    """Return struct Cache of decode.cu."""
    table = arrays.get("page_table")
    strides: dict[str, int] = {}
    for name, to in (("key_scale", "ks"), ("value_scale", "vs")):
        along = arrays[name].spread() if name in arrays else (0, 0, 0)
        strides |= {f"{to}_{a}": s for a, s in zip("bhn", along, strict=True)}
    return {
        "table": table.pointer if table else 0,
        "lengths": arrays["lengths"].pointer,
        "starts": starts,
        **{f"{n[0]}_scale": arrays[n].pointer if n in arrays else 0 for n in ("key_scale", "value_scale")},
        "table_b": table.strides[0] if table else 0,
        **strides,
        **{f"{n[0]}_by": numbers.get(n, 1.0) for n in ("key_scale", "value_scale")},
        **{"page": arrays["key"].shape[2], "pages": arrays["key"].shape[0], "most": call.n_k},
    }
