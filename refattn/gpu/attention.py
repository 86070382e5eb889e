"""Softmax attention on a GPU: arrays of CuPy, PyTorch or JAX in, the same kind out, on the caller's stream."""

from __future__ import annotations

import math
from typing import Any

from ..arrays import dtype_name, kind_of
from ..errors import InvalidProblem
from ..problem import Problem, check_offsets
from .kernel import Call, Plan
from .launch import capability, launch
from .plan import check_block_mask, choose
from .views import View, cast, check_devices, device_of, empty, finish, layout, on, stream_of, view

__all__ = ["attention"]


def attention(
    query: Any,
    key: Any,
    value: Any,
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
    return_lse: bool = False,
    accuracy: str = "fast",
    impl: str | None = None,
) -> Any:
    """Return softmax attention, computed on the GPU that the arrays are on.

    Nothing is waited for: the kernels are queued on the caller's current stream (CuPy's for JAX arrays). Inputs are not
    copied, but for a boolean mask, which is packed to bits, and for sinks and offsets of another type.

    Parameters
    ----------
    query : (b, h_q, n_q, d_k) array of CuPy, PyTorch or JAX
        float16, bfloat16, float32 or float64; d_k, d_v from 1 to 256; any strides with a contiguous last axis.
    key : (b, h_kv, n_k, d_k) array
        Of query's library, type and device; h_kv divides h_q.
    value : (b, h_kv, n_k, d_v) array
        Likewise.
    scale, causal, window, softcap, sink, bias, allowed
        As in :class:`refattn.Problem`; the bias of query's type or float32.
    block_mask : (blocks, block_q, block_k), optional
        A boolean array (b or 1, h_q or 1, ceil(n_q / block_q), ceil(n_k / block_k)), True where a block of scores is
        computed. Hidden tiles are never loaded.
    cu_seqlens : (cu_seqlens_q, cu_seqlens_k), optional
        Integer arrays of m + 1 offsets of m sequences packed along the sequence axes, as in :class:`refattn.Problem`.
        Their values are not checked, which would wait for the GPU; nothing outside the arrays is read.
    return_lse : bool
        Also return the log-sum-exp, (b, h_q, n_q) in float32 (float64 for float64): -inf for a row without keys, whose
        out is 0.
    accuracy : str
        "fast" rounds P to the input's type; "high" keeps it in two parts, so that the error is the output's rounding.
    impl : str, optional
        A kernel out of ``refattn.gpu.IMPLS``; by default the one that :func:`refattn.gpu.plan` chooses.

    Raises
    ------
    InvalidProblem
        Shapes, types or devices that do not fit together.
    UnsupportedProblem
        No kernel computes it; raised before any launch.
    """
    given = {"query": query, "key": key, "value": value, "bias": bias, "allowed": allowed}
    device = device_of(query, "query")
    wide = "float64" if dtype_name(query) == "float64" else "float32"
    sizes: Any = None
    if sink is not None:
        given["sink"] = cast(sink, wide, "sink")
    if block_mask is not None:
        given["blocks"], sizes = _parts(block_mask, "block_mask", ("blocks", "block_q", "block_k"))
    if cu_seqlens is not None:
        given["cu_q"], (given["cu_k"],) = _parts(cu_seqlens, "cu_seqlens", ("cu_seqlens_q", "cu_seqlens_k"))
        given |= {n: cast(given[n], "int32", f"{n[:2]}_seqlens{n[2:]}") for n in ("cu_q", "cu_k")}
    with on(device):
        arrays = {n: view(x, n) for n, x in given.items() if x is not None}
        window = tuple(window) if isinstance(window, list) else window
        options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
        cast_from = tuple(dtype_name(x) for x in (sink, *(cu_seqlens or ())) if x is not None)
        asked = (*options.values(), type(scale), type(softcap), accuracy, impl, sizes, cast_from)
        layout = tuple(
            (n, kind_of(given[n]), x.shape, x.strides, x.dtype, x.device, x.pointer % 16 == 0)
            for n, x in arrays.items()
        )
        known = _known((asked, layout))
        if known is None:
            problem = Problem(query, key, value, sink=sink, bias=bias, allowed=allowed, **options)
            if cu_seqlens is not None:
                check_offsets(problem, *cu_seqlens)
            blocks = None if block_mask is None else check_block_mask(problem, block_mask)
            call = _call(problem, arrays, accuracy, blocks)
            known = _KNOWN[asked, layout] = (call, choose(call, impl, capability(device)))
        shape = (*arrays["query"].shape[:3], arrays["value"].shape[3])
        out, arrays["out"] = empty(query, shape, arrays["query"].dtype)
        lse, arrays["lse"] = empty(query, shape[:3], wide)
        if min(shape):
            by = 1 / math.sqrt(arrays["query"].shape[3]) if scale is None else float(scale)
            launch(*known, query, arrays, options | {"scale": by}, stream_of(query, device))
        out, lse = finish(query, [out, lse], list(arrays.values()))
    return (out, lse) if return_lse else out


_KNOWN: dict[Any, tuple[Call, Plan]] = {}
"""Calls that were checked and planned, by all that the checks and the choice of a kernel depend on."""


def _known(signature: Any) -> tuple[Call, Plan] | None:
    if len(_KNOWN) > 4096:
        _KNOWN.clear()
    try:
        return _KNOWN.get(signature)
    except TypeError:  # an option that cannot be hashed: Problem says what is wrong with it
        return None


def _parts(given: Any, name: str, parts: tuple[str, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Return the first part of a tuple, and the others."""
    if not isinstance(given, tuple | list) or len(given) != len(parts):
        raise InvalidProblem(f"{name}: got {type(given).__name__}, expected a tuple ({', '.join(parts)})")
    return given[0], tuple(given[1:])


def _call(problem: Problem, arrays: dict[str, View], accuracy: str, blocks: tuple[int, int] | None) -> Call:
    """Return what the choice of a kernel depends on."""
    check_devices(arrays)
    aligned, mapped = layout([arrays[n] for n in ("query", "key", "value")])
    return Call.of(problem, accuracy, blocks, packed="cu_q" in arrays, aligned=aligned, mapped=mapped)
