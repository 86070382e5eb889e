"""What JAX traces: attention and its gradients under jit and grad, as one call of XLA each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.experimental.buffer_callback import buffer_callback

from ..errors import UnsupportedProblem
from ..problem import Problem
from ..validation import check_offsets
from .backward import SOURCES, gradients
from .forward import forward
from .kernel import Call
from .launch import capability
from .plan import check_block_mask, choose
from .request import CU_SEQLENS, parts_of
from .views import library, on

__all__ = ["attention"]

ARRAYS = ("query", "key", "value", "sink", "bias", "allowed")
GRADIENTS = {source: n for n, source in SOURCES.items()}


@dataclass(frozen=True)
class _Asked:
    """What does not change from run to run: which arrays there are, and the options."""

    names: tuple[str, ...]
    by_value: tuple[tuple[str, Any], ...]
    blocks: tuple[int, int] | None
    accuracy: str
    impl: str | None
    batch_invariant: bool

    def options(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Return the options of the functions, the arrays among them put back."""
        found = dict(self.by_value) | {n: arrays.get(n) for n in ARRAYS[3:]}
        found["block_mask"] = (arrays["blocks"], *self.blocks) if self.blocks else None
        found["cu_seqlens"] = (arrays["cu_q"], arrays["cu_k"]) if "cu_q" in arrays else None
        return found


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Wanted:
    names: tuple[str, ...]


def attention(
    query: Any, key: Any, value: Any, options: dict[str, Any], accuracy: str, impl: str | None, batch_invariant: bool
) -> tuple[Any, Any]:
    """Return out and lse of a call that JAX traces; `options` are those of :func:`refattn.gpu.attention`.

    Raises
    ------
    InvalidProblem, UnsupportedProblem
        As that function does, while JAX traces.
    """
    if jax.default_backend() != "gpu":
        where = jax.default_backend()
        raise UnsupportedProblem(f"query: is traced by JAX for its backend {where!r}, expected 'gpu'; use jax[cuda13]")
    tensors = {"query": query, "key": key, "value": value} | {n: options[n] for n in ARRAYS[3:]}
    window = options["window"]
    by_value = {n: options[n] for n in ("scale", "causal", "softcap")}
    by_value["window"] = tuple(window) if isinstance(window, list) else window
    problem = Problem(**tensors, **by_value)
    blocks = None if options["block_mask"] is None else check_block_mask(problem, options["block_mask"])
    if blocks:
        tensors["blocks"] = options["block_mask"][0]
    if options["cu_seqlens"] is not None:
        tensors["cu_q"], tensors["cu_k"] = parts_of(options["cu_seqlens"], "cu_seqlens", CU_SEQLENS)
        check_offsets(problem, tensors["cu_q"], tensors["cu_k"])
    aligned = not (problem.d_k % 8 or problem.d_v % 8)
    call = Call.of(problem, accuracy, blocks, packed="cu_q" in tensors, aligned=aligned, mapped=aligned)
    choose(call, impl, capability(0))
    given = {n: x for n, x in tensors.items() if x is not None}
    asked = _Asked(tuple(given), tuple(by_value.items()), blocks, accuracy, impl, bool(batch_invariant))
    found: tuple[Any, Any] = _attention(asked, *given.values())
    return found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(asked: _Asked, *arrays: Any) -> Any:
    q, v = arrays[0], arrays[2]
    wide = "float64" if q.dtype == "float64" else "float32"
    out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
    return buffer_callback(partial(_forward, asked), (out, jax.ShapeDtypeStruct(q.shape[:3], wide)))(*arrays)


def _keep(asked: _Asked, *arrays: Any) -> tuple[Any, Any]:
    """Return the results, and what the gradients need: which are wanted is known while JAX traces."""
    wanted = [GRADIENTS[n] for n, x in zip(asked.names, arrays, strict=True) if x.perturbed and n in GRADIENTS]
    values = tuple(x.value for x in arrays)
    results = _attention(asked, *values)
    return results, (values, results, _Wanted(tuple(wanted)))


def _gradients(asked: _Asked, kept: Any, arriving: Any) -> tuple[Any, ...]:
    values, results, wanted = kept
    given = dict(zip(asked.names, values, strict=True))
    zero = [isinstance(x, jax.custom_derivatives.SymbolicZero) for x in arriving]
    if all(zero) or not wanted.names:
        return (None,) * len(values)
    dout = jax.numpy.zeros(results[0].shape, results[0].dtype) if zero[0] else arriving[0]
    more = () if zero[1] else (arriving[1],)
    sources = [given[SOURCES[n]] for n in wanted.names]
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sources)
    found = buffer_callback(partial(_backward, asked, wanted.names), shapes)(*values, *results, dout, *more)
    by_name = dict(zip(wanted.names, found, strict=True))
    return tuple(by_name.get(GRADIENTS.get(n, "")) for n in asked.names)


_attention.defvjp(_keep, _gradients, symbolic_zeros=True)


def _forward(asked: _Asked, ctx: Any, results: Any, *buffers: Any) -> None:
    """Queue the forward kernels on XLA's stream."""
    arrays = dict(zip(asked.names, map(_array, buffers), strict=True))
    q = arrays["query"]
    with on(q.device.id), library("cupy").cuda.ExternalStream(ctx.stream, q.device.id):
        forward(
            q, arrays["key"], arrays["value"], **asked.options(arrays), accuracy=asked.accuracy, impl=asked.impl,
            batch_invariant=asked.batch_invariant, into=tuple(map(_array, results)),
        )  # fmt: skip


def _backward(asked: _Asked, wanted: tuple[str, ...], ctx: Any, results: Any, *buffers: Any) -> None:
    """Queue the backward kernels on XLA's stream."""
    views = [_array(x) for x in buffers]
    count = len(asked.names)
    arrays = dict(zip(asked.names, views[:count], strict=True))
    out, lse, dout, *dlse = views[count:]
    impl = "simt" if asked.impl == "simt" else None  # the forward's kernels have no backward of their own
    into = dict(zip(wanted, map(_array, results), strict=True))
    q = arrays["query"]
    with on(q.device.id), library("cupy").cuda.ExternalStream(ctx.stream, q.device.id):
        gradients(
            q, arrays["key"], arrays["value"], out, lse, dout, **asked.options(arrays), impl=impl,
            dlse=dlse[0] if dlse else None, wanted=wanted, deterministic=True, into=into,
        )  # fmt: skip


def _array(buffer: Any) -> Any:
    """Return a buffer of XLA's as an array of CuPy's over the same memory."""
    return library("cupy").from_dlpack(buffer)
