"""Softmax attention on a GPU: arrays of CuPy, PyTorch or JAX in, the same kind out, on the caller's stream."""

from __future__ import annotations

import math
from typing import Any

from ..dtypes import FORMATS
from ..errors import InvalidProblem, UnsupportedProblem
from ..problem import Problem, check_offsets
from .launch import capability, launch, pack
from .plan import Call, check_block_mask, choose
from .views import View, cast, current_stream, empty, finish, view

__all__ = ["attention"]

ITEM_BYTES = {name: form.dtype.itemsize for name, form in FORMATS.items()}


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
    problem = Problem(query, key, value, scale, causal, window, softcap, sink, bias, allowed)
    given = problem.arrays()
    if sink is not None:
        given["sink"] = cast(sink, "float64" if problem.dtype == "float64" else "float32")
    blocks = None
    if block_mask is not None:
        blocks, given["blocks"] = check_block_mask(problem, block_mask), block_mask[0]
    if cu_seqlens is not None:
        check_offsets(problem, *cu_seqlens)
        given |= {n: cast(x, "int32") for n, x in zip(("cu_q", "cu_k"), cu_seqlens, strict=True)}
    with current_stream(query, "query"):
        arrays = {n: view(x, n) for n, x in given.items()}
        device = arrays["query"].device
        for name, x in arrays.items():
            if x.device != device:
                raise InvalidProblem(f"{name}: is on GPU {x.device} and query on GPU {device}; move one of them")
        aligned, mapped = _layout([arrays[n] for n in ("query", "key", "value")])
        packed = cu_seqlens is not None
        call = Call.of(problem, accuracy, blocks, packed=packed, aligned=aligned, mapped=mapped)
        chosen = choose(call, impl, capability(device))
        found = [empty(query, problem.out_shape, problem.dtype)]
        found.append(empty(query, problem.out_shape[:3], "float64" if problem.dtype == "float64" else "float32"))
        arrays["out"], arrays["lse"] = (x for _, x in found)
        if allowed is not None:
            arrays["allowed"] = pack(arrays["allowed"], problem.n_k, query)
        if math.prod(problem.out_shape):
            by = 1 / math.sqrt(problem.d_k) if scale is None else float(scale)
            launch(chosen, call, query, arrays, by, {"causal": causal, "window": problem.window, "softcap": softcap})
        out, lse = finish(query, [x for x, _ in found], list(arrays.values()))
    return (out, lse) if return_lse else out


def _layout(views: list[View]) -> tuple[bool, bool]:
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
