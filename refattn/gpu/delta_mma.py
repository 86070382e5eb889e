"""The gated delta rule on tensor cores (delta.cu): which calls it takes, and its launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arguments import arguments_of
from .build import compiled, text_of
from .launch import capability, queue
from .lightning_mma import CHUNK, WIDTHS
from .views import View, empty, layout

__all__ = ["COLUMNS", "KEPT_BYTES", "launch", "macros", "shared_bytes", "source", "takes"]

FILE = "delta.cu"
COLUMNS = 32
TILE = 2 * CHUNK * CHUNK
KEPT_BYTES = 4 * TILE + 8 * CHUNK
"""Of a chunk of a head."""


def takes(arrays: Mapping[str, View]) -> bool:
    """Tell whether it computes a call: bfloat16, rows that begin at multiples of 16 bytes, no alpha by channel."""
    one = "alpha" not in arrays or arrays["alpha"].shape[3] == 1
    return one and arrays["query"].dtype == "bfloat16" and layout([arrays[n] for n in ("query", "key", "value")])[0]


def macros(d_k: int, gate: int) -> dict[str, Any]:
    """Return what the kernels are compiled with; gate: 0 without alpha, 1 with one a token."""
    tiles = {"WIDTH_K": min(w for w in WIDTHS if w >= d_k), "WIDTH_V": COLUMNS, "WARPS": 4, "M_TILES": 1}
    return {"BF16": 1, **tiles, "BLOCK_N": CHUNK, "ALIGNED": 1, "BIAS": 0, "GATE": gate}


def source(m: Mapping[str, Any]) -> str:
    """Return the kernels' text."""
    return text_of(FILE, m)


def shared_bytes(entry: str, m: Mapping[str, Any]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    if entry == "delta_chunks":
        return 4 * TILE + 4 * (CHUNK * (CHUNK + 8) + 4 * CHUNK)
    changes = 2 * 2 * (CHUNK // 16) * 2 * 32 * 16
    return int(2 * CHUNK * (5 * m["WIDTH_K"] + 2 * COLUMNS) + 8 * TILE + changes + 3 * 8 * CHUNK)


def launch(like: Any, arrays: Mapping[str, View], values: Mapping[str, Any], sequences: int, stream: int) -> None:
    """Queue the kernels of a call; the arguments are those of :func:`refattn.gpu.lightning_mma.launch`."""
    (b, h, n, d_k), d_v, device = arrays["query"].shape, arrays["value"].shape[3], arrays["query"].device
    m = macros(d_k, int("alpha" in arrays))
    slots = n // CHUNK + sequences if "cu_seqlens" in arrays else b * -(-n // CHUNK)
    kept = empty(like, (slots * h * KEPT_BYTES // 4,), "float32")[1].pointer
    given = {**values, "kept": kept, "z": values["z"] | {"sequences": sequences}}
    grids = {"delta_chunks": slots * h, "gated_delta": sequences * h * -(-d_v // COLUMNS)}
    text, target = source(m), "sm_{}{}".format(*capability(device))
    for entry, grid in grids.items():
        if grid:
            shared, to = shared_bytes(entry, m), arguments_of(FILE, entry)
            kernel = compiled(text, entry, shared, target, device)
            queue(kernel, grid, 128, shared, stream, to, {x: given[x] for x in to.parameters.members})
