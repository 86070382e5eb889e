"""The kernel for tensor cores by mma.sync (mma.cu): 16-bit types, every option, from compute capability 8.0 on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from .build import text_of
from .kernel import Call, Kernel
from .simt import target, threads

__all__ = ["KERNEL", "WIDTHS"]

FILE = "mma.cu"
WIDTHS = (32, 64, 96, 128, 192, 256)
"""Head dims that it is compiled for; smaller ones are filled up with zeros."""


def _rich(call: Call) -> int:
    """Return how many options are in use that take registers."""
    return sum((call.allowed or call.tiles, call.bias is not None, call.blocks is not None, call.packed))


def obstacle(call: Call, capability: tuple[int, int]) -> str:
    """Return why the kernel cannot compute a call, "" where it can."""
    if capability < (8, 0):
        return f"needs compute capability 8.0 or later, got {capability[0]}.{capability[1]}"
    if call.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16, got {call.dtype}"
    if max(call.d_k, call.d_v) > WIDTHS[-1]:
        return f"takes head dims up to {WIDTHS[-1]}, got {call.d_k} and {call.d_v}"
    if call.bias not in (None, call.dtype, "float32"):
        return f"takes a bias of {call.dtype} or float32, got {call.bias}"
    if call.blocks and call.packed:
        return "takes a block mask or packed sequences, got both"
    if call.tiles and (call.allowed or (call.blocks and (call.blocks[0] % 64 or call.blocks[1] % 32))):
        given = "allowed" if call.allowed else "blocks of {} and {}".format(*call.blocks or ())
        return f"takes bits of blocks of multiples of 64 rows and 32 keys, without allowed, got {given}"
    if call.accuracy == "high" and (_rich(call) or call.window) and max(call.d_k, call.d_v) > 128:
        return (
            "takes accuracy='high' with a bias, masks, a window or packed sequences for head dims up to 128, "
            f"got {call.d_k} and {call.d_v}"
        )
    return ""


def why(call: Call) -> str:
    """Return what the kernel is for."""
    return f"{call.dtype} on tensor cores by mma.sync"


def macros(call: Call) -> dict[str, Any]:
    """Return what the kernel is compiled with: tiles that do not spill."""
    wide_k, wide_v = (min(w for w in WIDTHS if w >= d) for d in (call.d_k, call.d_v))
    high = call.accuracy == "high"
    # 1 query rows tile or 2 a warp, keys, stages: fewer where options or a second part of P take registers
    rich = _rich(call)
    more = rich + high + (not call.aligned) + (call.window is not None) + (rich > 0 and call.softcap)
    more += call.blocks is not None and call.causal is not None
    others = call.bias, call.softcap, call.window, high, not call.aligned, not call.positive_scale
    if call.tiles and not any(others):
        more = 0
    width = max(wide_k, wide_v)
    if width <= 64:
        tiles, keys, stages = 2, 128 if width == 64 and not rich and call.aligned else 64, 2
    elif width <= 128:
        tiles, keys, stages = (2, 64, 2) if not more else (2, 32, 2) if more == 1 else (1, 32, 2)
    else:
        tiles, keys, stages = 1, 32 if more else 64, 1
    blocks = 0
    if call.blocks:  # tiles that divide the blocks are skipped or computed whole
        block_q, block_k = call.blocks
        tiles = tiles if block_q % (64 * tiles) == 0 else 1
        keys = keys if block_k % keys == 0 else 32
        blocks = 3 if call.tiles else 1 if block_q % (64 * tiles) == 0 and block_k % keys == 0 else 2
    return {
        "BF16": int(call.dtype == "bfloat16"),
        "WIDTH_K": wide_k,
        "WIDTH_V": wide_v,
        "WARPS": 4,
        "M_TILES": tiles,
        "BLOCK_N": keys,
        "STAGES": stages,
        "MIN_BLOCKS": 2,
        "ALIGNED": int(call.aligned),
        "ACCURACY_HIGH": int(high),
        "CAUSAL": int(call.causal is not None),
        "WINDOW": int(call.window is not None),
        "SOFTCAP": int(call.softcap),
        "SINK": int(call.sink),
        "MASK": int(call.allowed),
        "PACKED": int(call.packed),
        "BIAS": 0 if call.bias is None else 2 if call.bias == "float32" else 1,
        "BLOCKS": blocks,
        "PRESCALE": int(not call.positive_scale),
    }


def block_rows(m: Mapping[str, Any]) -> int:
    """Return the query rows of a block."""
    return int(16 * m["M_TILES"] * m["WARPS"])


def shared_bytes(m: Mapping[str, Any]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    wide = m["WIDTH_K"] + m["WIDTH_V"]
    return int(2 * block_rows(m) * max(m["WIDTH_K"], m["WIDTH_V"]) + m["STAGES"] * 2 * m["BLOCK_N"] * wide)


KERNEL = Kernel(
    "mma", FILE, "attention", obstacle, why, macros, partial(text_of, FILE), block_rows, threads, shared_bytes, target
)
