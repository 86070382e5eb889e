"""The kernel for few queries over many keys (decode.cu): 16-bit types, the keys split over the GPU; its launches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import mma
from .build import text_of
from .kernel import Call, Kernel
from .simt import target, threads

__all__ = ["KERNEL", "MOST_QUERIES", "Split", "most_units", "split_of", "with_cache"]

FILE = "decode.cu"
MOST_QUERIES, WIDEST, WARPS = 16, 128, 8
UNITS = ((65536, 2048), (16384, 1024), (4096, 512), (0, 256))
"""Keys of a part by the fewest keys: few long parts cost little traffic, many short ones fill the GPU."""
SHARED = 210000
"""Bytes of shared memory that a block's rings may take: nearly all that there is beside the sums."""


@dataclass(frozen=True)
class Split:
    """How the keys of one key head are cut.

    Attributes
    ----------
    first_key, keys : int
        The keys that some row sees.
    unit : int
        Keys of a part, by n_k alone.
    units : int
        Parts.
    """

    first_key: int
    keys: int
    unit: int
    units: int


def split_of(call: Call) -> Split:
    """Return how the keys of a call are cut into parts."""
    corner = 0 if call.causal == "top_left" else call.n_k - call.n_q
    left, right = call.window or (None, None)
    right = 0 if call.causal else right
    first = 0 if left is None else min(max(corner - left, 0), call.n_k)
    end = call.n_k if right is None else min(max(call.n_q + corner + right, first), call.n_k)
    unit = next(u for n, u in UNITS if call.n_k >= n)
    return Split(first, end - first, unit, -(-(end - first) // unit))


def most_units(n_k: int) -> int:
    """Return the most parts that a sequence of up to so many keys has."""
    tops = [n_k, *(n - 1 for n, _ in UNITS if 0 < n <= n_k)]
    return max(-(-n // next(u for least, u in UNITS if n >= least)) for n in tops)


def obstacle(call: Call, capability: tuple[int, int]) -> str:
    """Return why the kernel cannot compute a call, "" where it can."""
    if call.batch_invariant:
        return "gives rows other bits than the kernels for many queries do"
    if capability[0] not in (9, 10):  # shared memory
        return f"needs compute capability 9 or 10, got {capability[0]}.{capability[1]}"
    if call.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16, got {call.dtype}"
    if max(call.d_k, call.d_v) > WIDEST:
        return f"takes head dims up to {WIDEST}, got {call.d_k} and {call.d_v}"
    if not 0 < call.n_q <= MOST_QUERIES:
        return f"takes 1 to {MOST_QUERIES} queries, got {call.n_q}"
    most = _most_rows(call)
    if call.group * call.n_q > most:
        return f"takes up to {most} queries of a key head's group, got {call.group * call.n_q}"
    given = [n for n in ("bias", "allowed", "packed", "blocks") if getattr(call, n)]
    if given:
        names = {"packed": "cu_seqlens", "blocks": "block_mask"}
        return f"does not take {', '.join(names.get(n, n) for n in given)}"
    return ""


def _most_rows(call: Call) -> int:
    """Return how many rows a warp has registers for."""
    width = max(call.d_k, call.d_v)
    rows = 64 if width <= 32 else 32 if width <= 96 else 16
    return max(16, rows // 2) if call.accuracy == "high" else rows


def why(call: Call) -> str:
    """Return what the kernel is for."""
    return f"{call.dtype}, {call.n_q} queries of {call.group} heads in a tile, keys in parts of {split_of(call).unit}"


def macros(call: Call) -> dict[str, Any]:
    """Return what the kernel is compiled with."""
    wide_k, wide_v = (min(w for w in mma.WIDTHS if w >= d) for d in (call.d_k, call.d_v))
    tiles = -(-call.group * call.n_q // 8)
    return {
        "BF16": int(call.dtype == "bfloat16"),
        "WIDTH_K": wide_k,
        "WIDTH_V": wide_v,
        "WARPS": WARPS,
        "TILES": 1 << (tiles - 1).bit_length(),
        "BLOCK_N": 16,
        "STAGES": _stages(wide_k + wide_v, 2),
        "ALIGNED": int(call.aligned),
        "ACCURACY_HIGH": int(call.accuracy == "high"),
        "SOFTCAP": int(call.softcap),
        "BAND": int(call.causal is not None or call.window is not None),
        "BIAS": 0,
        "CACHE": 0,
        "KV8": 0,
        "SCALES": 0,
    }


def _stages(widths: int, item_bytes: int) -> int:
    return max(2, min(6, SHARED // (WARPS * 16 * item_bytes * widths)))


def with_cache(m: Mapping[str, Any], pages: bool, narrow: bool, scales: int) -> dict[str, Any]:
    """Return what the kernel is compiled with for keys in a cache: in pages, in float8, with scales (see decode.cu)."""
    stages = _stages(m["WIDTH_K"] + m["WIDTH_V"], 1 if narrow else 2)
    return {**m, "STAGES": stages, "CACHE": 2 if pages else 1, "KV8": int(narrow), "SCALES": scales}


def block_rows(m: Mapping[str, Any]) -> int:
    """Return the rows of a tile."""
    return int(8 * m["TILES"])


def shared_bytes(m: Mapping[str, Any]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    rings = m["WARPS"] * m["STAGES"] * (16 if m["KV8"] else 32) * (m["WIDTH_K"] + m["WIDTH_V"])
    return int(rings + 2 * m["WARPS"] * (16 * m["WIDTH_V"] + 8 * block_rows(m)))


KERNEL = Kernel(
    "decode", FILE, "decode", obstacle, why, macros, partial(text_of, FILE), block_rows, threads, shared_bytes,
    target, least_keys=1024,
)  # fmt: skip
