"""The kernel for the CUDA cores (simt.cu): every type, every option; the GPU's own reference."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from .build import text_of
from .kernel import Call, Kernel

__all__ = ["KERNEL", "WIDEST", "target", "threads"]

FILE = "simt.cu"
TYPES = ("float16", "bfloat16", "float32", "float64")
WIDEST = 256


def obstacle(call: Call, capability: tuple[int, int]) -> str:
    """Return why the kernel cannot compute a call, "" where it can."""
    if capability < (7, 0):
        return f"needs compute capability 7.0 or later, got {capability[0]}.{capability[1]}"
    if call.dtype not in TYPES:
        return f"takes {', '.join(TYPES)}, got {call.dtype}"
    if max(call.d_k, call.d_v) > WIDEST:
        return f"takes head dims up to {WIDEST}, got {call.d_k} and {call.d_v}"
    wide = "float64" if call.dtype == "float64" else "float32"
    if call.bias not in (None, call.dtype, wide):
        return f"takes a bias of {call.dtype} or {wide}, got {call.bias}"
    if call.tiles:
        return "takes no bits of blocks; pass allowed"
    if call.blocks and call.packed:
        return "takes a block mask or packed sequences, got both"
    return ""


def why(call: Call) -> str:
    """Return what the kernel is for."""
    return "products and sums " + ("in float64" if call.dtype == "float64" else "in float32")


def macros(call: Call) -> dict[str, Any]:
    """Return what the kernel is compiled with: tiles that do not spill."""
    d_k, d_v = (-(-d // 16) * 16 for d in (call.d_k, call.d_v))
    widest, double, band = max(d_k, d_v), call.dtype == "float64", call.causal is not None or call.window is not None
    given = (band, call.allowed, call.blocks is not None, call.packed, call.softcap, call.bias is not None)
    if double:
        rows, warps, keys, blocks = (4, 4, 32, 2) if widest <= 64 else (4, 4, 32, 1) if widest <= 128 else (2, 4, 32, 1)
    else:
        rows, warps, keys, blocks = (8, 4, 64, 2) if widest <= 64 else (4, 8, 64, 1) if widest <= 128 else (4, 8, 32, 1)
    # options take registers
    narrow = call.dtype in ("float16", "bfloat16")
    if rows == 8 and (sum(given) > 1 or any((*given[1:4], given[5])) or (narrow and band)):
        rows, blocks = 4, 2 if sum(given) > 1 or call.packed or narrow else 3
    elif widest > 128 and sum(given) > 2:
        rows, warps = 1 if double else 2, 8
    return {
        "T": call.dtype,
        "D_K": d_k,
        "D_V": d_v,
        "ROWS": rows,
        "WARPS": warps,
        "BLOCK_N": keys,
        "MIN_BLOCKS": blocks,
        "BAND": int(band),
        "BITMASK": int(call.allowed),
        "BLOCKS": int(call.blocks is not None),
        "PACKED": int(call.packed),
        "SOFTCAP": int(call.softcap),
        "BIAS": call.bias,
    }


def block_rows(m: Mapping[str, Any]) -> int:
    """Return the query rows of a block."""
    return int(4 * m["ROWS"] * m["WARPS"])


def threads(m: Mapping[str, Any]) -> int:
    """Return the threads of a block."""
    return int(32 * m["WARPS"])


def shared_bytes(m: Mapping[str, Any]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    size, rows, keys = 8 if m["T"] == "float64" else 4, block_rows(m), m["BLOCK_N"]
    return int(size * ((rows + keys) * (m["D_K"] + 16 // size) + keys * m["D_V"] + rows * (keys + 8)))


def target(capability: tuple[int, int]) -> str:
    """Return the architecture to compile for."""
    return f"sm_{capability[0]}{capability[1]}"


KERNEL = Kernel(
    "simt", FILE, "attention", obstacle, why, macros, partial(text_of, FILE), block_rows, threads, shared_bytes, target
)
