"""The gated delta rule on tensor cores (delta.cu): which calls it takes, and its launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .build import text_of
from .lightning_mma import CHUNK, WIDTHS, queue_all
from .views import View, empty, layout

__all__ = ["FILE", "launch", "macros", "shape", "shared_bytes", "source", "takes"]

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


def shape(
    sizes: tuple[int, int, int], sequences: int, batch: int, packed: bool
) -> tuple[dict[str, int], dict[str, int], int]:
    """Return what struct Sizes has more, the grids by kernel in their order, and how many numbers are kept.

    Parameters
    ----------
    sizes : (h_q, n, d_v)
        Of the call.
    sequences, batch : int
        How many states there are for each head, and batch items.
    packed : bool
        Whether sequences are packed: then each may leave a chunk unfilled.
    """
    h, n, d_v = sizes
    slots = n // CHUNK + sequences if packed else batch * -(-n // CHUNK)
    grids = {"delta_chunks": slots * h, "gated_delta": sequences * h * -(-d_v // COLUMNS)}
    return {"sequences": sequences}, grids, slots * h * KEPT_BYTES // 4


def launch(like: Any, arrays: dict[str, View], values: Mapping[str, Any], sequences: int, stream: int) -> None:
    """Queue the kernels of a call; the arguments are those of :func:`refattn.gpu.lightning_mma.launch`."""
    (b, h, n, d_k), d_v, device = arrays["query"].shape, arrays["value"].shape[3], arrays["query"].device
    m = macros(d_k, int("alpha" in arrays))
    more, grids, count = shape((h, n, d_v), sequences, b, "cu_seqlens" in arrays)
    if count and "kept" not in arrays:
        arrays["kept"] = empty(like, (count,), "float32")[1]
    given = {**values, "kept": arrays["kept"].pointer if count else 0, "z": values["z"] | more}
    queue_all(FILE, source(m), grids, {x: shared_bytes(x, m) for x in grids}, given, device, stream)
