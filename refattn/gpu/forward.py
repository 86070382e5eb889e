"""A forward call on a GPU: read, planned once for its kind, launched."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

from .kernel import Call, Plan
from .launch import capability, launch
from .plan import choose
from .recorded import recording, replay
from .request import Kept, read
from .views import capturing, device_of, finish, on, placed, stream_of

__all__ = ["forward"]


def forward(
    query: Any, key: Any, value: Any, *, scale: float | None, causal: str | None, window: Any, softcap: float | None,
    sink: Any, bias: Any, allowed: Any, block_mask: Any, cu_seqlens: Any, accuracy: str, impl: str | None,
    batch_invariant: bool, into: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Return out and lse of :func:`refattn.gpu.attention`, without gradients; `into` are arrays to be filled."""
    device = device_of(query, "query")
    with on(device):
        tensors = {"query": query, "key": key, "value": value, "bias": bias, "allowed": allowed}
        options = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
        asked = read(tensors, sink, block_mask, cu_seqlens, options, accuracy, impl, bool(batch_invariant))
        known = _KNOWN.find(asked.signature)
        if known is None:
            call = asked.call(accuracy, bool(batch_invariant))
            known = _KNOWN[asked.signature] = (call, choose(call, impl, capability(device)))
        arrays, wide = asked.arrays, "float64" if asked.arrays["query"].dtype == "float64" else "float32"
        shape = (*arrays["query"].shape[:3], arrays["value"].shape[3])
        out, arrays["out"] = placed(into and into[0], query, shape, arrays["query"].dtype)
        lse, arrays["lse"] = placed(into and into[1], query, shape[:3], wide)
        if min(shape):
            stream = stream_of(query, device)
            graph = capturing(stream)
            if graph or not replay((asked.signature, stream), arrays):
                by = 1 / math.sqrt(arrays["query"].shape[3]) if scale is None else float(scale)
                call, plan = known
                # what is made in between, packed masks and parts of keys, has other addresses each time
                parts = plan.impl == "decode" or plan.macros.get("SPLIT")
                again = not (graph or call.allowed or call.blocks or parts)
                with recording((asked.signature, stream)) if again else nullcontext():
                    launch(call, plan, query, arrays, asked.options | {"scale": by}, stream)
        out, lse = finish(query, [out, lse], list(arrays.values()))
    return out, lse


_KNOWN: Kept[tuple[Call, Plan]] = Kept()
"""Calls that were checked and planned, by all that the checks and the choice of a kernel depend on."""
