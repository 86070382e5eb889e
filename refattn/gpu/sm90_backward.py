"""The backward kernel for Hopper (sm90_backward.cu): wgmma, bulk tensor copies, dq by copies that add; its launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from . import sm90
from .build import text_of
from .kernel import Call, Kernel
from .views import View

__all__ = ["KERNEL", "half_bytes", "half_tiles", "macros_of", "maps", "padded_rows", "together"]

FILE = "sm90_backward.cu"
WIDTHS = (64, 128, 256)
"""Head dims that it is compiled for; smaller ones are filled up with zeros."""
TILES = {64: (128, 128), 128: (64, 128), 256: (64, 64)}
"""By width: rows of a tile that passes by, keys that a block owns."""
L2_BYTES = 16 << 20
"""Bytes of rows and sums that heads may have together, of an L2 cache of 50 MiB: 16 was faster than 32 or 64."""
LONGEST_FIRST = 16
"""The most heads that take turns where sums have any order and keys that come first are seen by the most rows."""


def obstacle(call: Call, capability: tuple[int, int]) -> str:
    """Return why the kernel cannot compute a call, "" where it can."""
    if text := sm90.unfit(call, capability, WIDTHS[-1], " backward"):
        return text
    given = [n for n in ("bias", "allowed") if getattr(call, n)] + ["block_mask"] * (call.blocks is not None)
    if given:
        return f"does not take {', '.join(given)} backward"
    if not 0 < min(call.n_q, call.n_k) <= max(call.n_q, call.n_k) < 2**29:
        return f"takes 1 to 2**29 - 1 rows and keys backward, got {call.n_q} and {call.n_k}"
    return ""


def why(call: Call) -> str:
    """Return what the kernel is for."""
    return f"{call.dtype} on Hopper's tensor cores"


def macros(call: Call) -> dict[str, Any]:
    """Return what the kernel is compiled with, but for the order of its sums."""
    width = min(w for w in WIDTHS if w >= max(call.d_k, call.d_v))
    options = {"BF16": int(call.dtype == "bfloat16"), "SOFTCAP": int(call.softcap)}
    return {"WIDTH": width, "BLOCK_M": TILES[width][0], "BLOCK_N": TILES[width][1], "STAGES": 2, **options}


def macros_of(call: Call, deterministic: bool) -> dict[str, Any]:
    """Return what the kernel is compiled with."""
    return {**macros(call), "ORDERED": int(deterministic), "LAST_FIRST": int(deterministic and ends(call))}


def ends(call: Call) -> bool:
    """Tell whether the band has a right edge: keys that come first are seen by the most rows."""
    return call.causal is not None or (call.window or (None, None))[1] is not None


def shared_bytes(m: Mapping[str, Any]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    keys, rows = 2 * m["BLOCK_N"] * m["WIDTH"], 2 * m["BLOCK_M"] * m["WIDTH"]
    scores = 2 * m["BLOCK_M"] * m["BLOCK_N"]
    slots = m["STAGES"] * (2 * rows + 8 * m["BLOCK_M"] + 40)
    more = 2 * scores if m["WIDTH"] == 256 else 4 * half_bytes(m)  # P, or dq
    return int(2 * keys + slots + 2 * scores + more + 176)


def half_bytes(m: Mapping[str, Any]) -> int:
    """Return the bytes of float32 sums of half a tile of dq."""
    return int(2 * m["BLOCK_M"] * m["WIDTH"])


def source(m: Mapping[str, Any]) -> str:
    """Return the kernel's text for some macros: its #defines, and the wgmma wrappers of its tiles."""
    kind, memory = "bf16" if m["BF16"] else "f16", {"from_registers": False}
    wide = m["WIDTH"] == 256
    rows, columns = (32, 128) if wide else (m["BLOCK_M"], 64)  # of S and of dq, by one consumer
    wrappers = (
        sm90.wgmma("scores_first", rows, kind, first=True, **memory),
        sm90.wgmma("scores_next", rows, kind, first=False, **memory),
        sm90.wgmma("add_shared", 128, kind, first=False, rows=True, **memory)
        if wide
        else sm90.wgmma("add_rows", m["WIDTH"], kind, first=False, from_registers=True, rows=True),
        sm90.wgmma("query_first", columns, kind, first=True, rows=True, rows_a=True, **memory),
        sm90.wgmma("query_next", columns, kind, first=False, rows=True, rows_a=True, **memory),
    )
    return text_of(FILE, m).replace("// (wgmma wrappers)", "".join(wrappers))


def together(m: Mapping[str, Any], arrays: Mapping[str, View], uneven: bool) -> int:
    """Return how many key heads' blocks take turns: those whose rows and sums stay in the L2 cache, if sums wait.

    Where they do not, and blocks are uneven, the longest of several heads come first: the grid ends with short ones.
    """
    (b, h, n_q, _), h_kv = arrays["query"].shape, arrays["key"].shape[1]
    sequences = arrays["cu_q"].shape[0] - 1 if "cu_q" in arrays else 1
    each = 8 * h // h_kv * -(-n_q // sequences) * m["WIDTH"]
    most = L2_BYTES // each if m["ORDERED"] else min(2 * L2_BYTES // each, LONGEST_FIRST) if uneven else 1
    return max(1, min(b * h_kv, most))


def padded_rows(m: Mapping[str, Any], n_q: int) -> int:
    """Return the rows of a head, filled up to whole tiles."""
    return int(-(-n_q // m["BLOCK_M"]) * m["BLOCK_M"])


def half_tiles(m: Mapping[str, Any], heads: int, n_q: int) -> int:
    """Return how many halves of row tiles there are."""
    return 2 * heads * padded_rows(m, n_q) // int(m["BLOCK_M"])


def maps(m: Mapping[str, Any]) -> dict[str, tuple[str, Callable[[View], bytes]]]:
    """Return by argument the array whose tensor map it is, and what makes one."""
    rows = {"query": m["BLOCK_M"], "key": m["BLOCK_N"], "value": m["BLOCK_N"], "dout": m["BLOCK_M"]}
    names = {"query": "map_q", "key": "map_k", "value": "map_v", "dout": "map_dout"}
    return {to: (n, partial(sm90.key_map, rows=rows[n], name=n)) for n, to in names.items()}


KERNEL = Kernel(
    "sm90", FILE, "backward", obstacle, why, macros, source, lambda m: int(m["BLOCK_M"]), lambda m: 384, shared_bytes,
    sm90.target,
)  # fmt: skip
