"""The kernel for Hopper (sm90.cu): wgmma, bulk tensor copies, specialised warps; its source and arguments."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ..errors import UnsupportedProblem
from .build import text_of
from .kernel import Call, Kernel
from .views import View, library

__all__ = ["KERNEL", "WIDTHS", "arguments", "key_map", "source", "tensor_map", "wgmma"]

FILE = "sm90.cu"
WIDTHS = (64, 128, 256)
"""Head dims that it is compiled for; smaller ones are filled up with zeros."""
ROWS_BLOCK_MASK = 128
"""Query rows of a block where there is a block mask, whose blocks must be multiples of it."""


def _tiles(consumers: int, keys: int, stages: int, query_stages: int, l2: int = 16) -> dict[str, int]:
    return {
        "CONSUMERS": consumers,
        "BLOCK_N": keys,
        "STAGES": stages,
        "Q_STAGES": query_stages,
        "L2_MIB": l2,
        "CONSUMER_REGISTERS": 232 if consumers == 2 else 160,
        "PRODUCER_REGISTERS": 40 if consumers == 2 else 32,
    }


CONFIGURATIONS: dict[tuple[int, bool, str], dict[str, int]] = {
    (64, False, "fast"): _tiles(3, 128, 3, 2),
    (64, True, "fast"): _tiles(3, 128, 3, 2),
    (64, False, "high"): _tiles(3, 96, 3, 2),
    (64, True, "high"): _tiles(2, 128, 3, 2),
    (128, False, "fast"): _tiles(2, 128, 2, 2),
    (128, True, "fast"): _tiles(2, 128, 2, 2),
    (128, False, "high"): _tiles(2, 128, 2, 2),
    (128, True, "high"): _tiles(2, 112, 2, 2),
    (256, False, "fast"): _tiles(2, 80, 2, 1),
    (256, True, "fast"): _tiles(2, 80, 2, 1, 32),
    (256, False, "high"): _tiles(2, 64, 2, 1),
    (256, True, "high"): _tiles(2, 64, 2, 1),
}
"""Tiles by (width, causal, accuracy): what was fastest of those that do not spill."""
BLOCK_MASK_KEYS = {64: 128, 128: 128, 256: 64}
"""Keys of a tile by width where there is a block mask."""


def obstacle(call: Call, capability: tuple[int, int]) -> str:
    """Return why the kernel cannot compute a call, "" where it can."""
    if capability != (9, 0):
        return f"needs compute capability 9.0, got {capability[0]}.{capability[1]}"
    if call.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16, got {call.dtype}"
    if call.d_k != call.d_v or call.d_k % 8 or not 0 < call.d_k <= WIDTHS[-1]:
        return f"takes equal head dims, multiples of 8 up to {WIDTHS[-1]}, got {call.d_k} and {call.d_v}"
    if not call.mapped:
        return "takes rows that begin at multiples of 16 bytes, at strides above 0"
    options = ("window", "softcap", "sink", "bias", "allowed", "packed")
    given = [n.replace("packed", "cu_seqlens") for n in options if getattr(call, n)]
    if given:
        return f"does not take {', '.join(given)}"
    if not call.positive_scale:
        return "takes a scale above 0"
    if call.causal == "top_left" and call.n_q != call.n_k:
        return f"takes causal='top_left' only with n_q = n_k, got {call.n_q} and {call.n_k}"
    if max(call.n_q, call.n_k) >= 2**30:
        return f"takes fewer than 2**30 rows and keys, got {call.n_q} and {call.n_k}"
    if not call.n_k:
        return "needs at least one key"
    if call.blocks and (call.blocks[0] % ROWS_BLOCK_MASK or call.blocks[1] % BLOCK_MASK_KEYS[_width(call)]):
        multiples = f"{ROWS_BLOCK_MASK} rows and {BLOCK_MASK_KEYS[_width(call)]} keys"
        return f"takes block masks of multiples of {multiples}, got {call.blocks[0]} and {call.blocks[1]}"
    return ""


def _width(call: Call) -> int:
    return min(w for w in WIDTHS if w >= call.d_k)


def why(call: Call) -> str:
    """Return what the kernel is for."""
    return f"{call.dtype} on Hopper's tensor cores, head dim {call.d_k} in tiles of {_width(call)}"


def macros(call: Call) -> dict[str, Any]:
    """Return what the kernel is compiled with."""
    width, causal, high = _width(call), call.causal is not None, call.accuracy == "high"
    tiles = CONFIGURATIONS[width, causal, call.accuracy]
    if call.blocks:
        keys = BLOCK_MASK_KEYS[width] if not (high and causal) else 64
        tiles = _tiles(2, keys, 3 if width == 64 else 2, 1 if width == 256 else 2)
    return {
        "HEAD_DIM": width,
        "BF16": int(call.dtype == "bfloat16"),
        "CAUSAL": int(causal),
        "HIGH": int(high),
        "BLOCKS": int(call.blocks is not None),
        "PINGPONG": 1,
        **tiles,
    }


def block_rows(m: Mapping[str, Any]) -> int:
    """Return the query rows of a block."""
    return int(64 * m["CONSUMERS"])


def threads(m: Mapping[str, Any]) -> int:
    """Return the threads of a block."""
    return int(128 * (m["CONSUMERS"] + 1))


def shared_bytes(m: Mapping[str, Any]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    rows = block_rows(m) * m["Q_STAGES"] + 2 * m["STAGES"] * m["BLOCK_N"]
    return int(1024 + 2 * m["HEAD_DIM"] * rows + 32 * m["Q_STAGES"] + 36 * m["STAGES"])


def target(capability: tuple[int, int]) -> str:
    """Return the architecture to compile for: with `a`, or there is no wgmma."""
    return "sm_90a"


def source(m: Mapping[str, Any]) -> str:
    """Return the kernel's text for some macros: its #defines, and the wgmma wrappers of its tiles."""
    kind = "bf16" if m["BF16"] else "f16"
    wrappers = (
        wgmma("qk_first", m["BLOCK_N"], kind, first=True, from_registers=False),
        wgmma("qk_next", m["BLOCK_N"], kind, first=False, from_registers=False),
        wgmma("pv", m["HEAD_DIM"], kind, first=False, from_registers=True, rows=True),
    )
    return text_of(FILE, m).replace("// (wgmma wrappers)", "".join(wrappers))


def wgmma(name: str, n: int, kind: str, *, first: bool, from_registers: bool, rows: bool = False) -> str:
    """Return a wrapper of wgmma m64 n<n> k16: float32 accumulators (set, or added to), A from memory or registers.

    rows: B has its 16 rows along the contraction (V), else its n rows are contracted with (K).
    """
    count = n // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    results = ", ".join(f'"{"=" if first else "+"}f"(d[{i}])' for i in range(count))
    if from_registers:
        a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        b, last = f"%{count + 4}", f"p, 1, 1, {int(rows)}"
        given, parameters = '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)', "u32 a0, u32 a1, u32 a2, u32 a3, u64 b"
    else:
        a, b, last = f"%{count}", f"%{count + 1}", f"p, 1, 1, 0, {int(rows)}"
        given, parameters = '"l"(a), "l"(b)', "u64 a, u64 b"
    return (
        f"DEVICE void {name}(float (&d)[{count}], {parameters}) {{\n"
        f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {0 if first else 1}, 0;\\n"\n'
        f'                 "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} '
        f'{{{accumulators}}}, {a}, {b}, {last};\\n}}"\n'
        f"                 : {results}\n                 : {given});\n}}\n"
    )


def arguments(
    m: Mapping[str, Any],
    arrays: Mapping[str, View],
    scale: float,
    blocks: tuple[int, int] | None,
    counter: int,
    redo: int,
    multiprocessors: int,
) -> tuple[int, dict[str, Any]]:
    """Return the grid, and the kernel's arguments by name.

    Parameters
    ----------
    m : mapping
        Macros.
    arrays : mapping of str to View
        query, key, value, out, lse, and block_bits where there is a block mask.
    scale : float
        Multiplies the scores.
    blocks : (block_q, block_k) or None
        Rows and keys of a block of the block mask.
    counter, redo : int
        Addresses of the queue's counter, and of the marks of tiles to repair.
    multiprocessors : int
        Of the GPU.
    """
    q, k, v, out = (arrays[n] for n in ("query", "key", "value", "out"))
    (b, h, n_q, d), n_k, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    maps = (key_map(q, block_rows(m), "query"), key_map(k, m["BLOCK_N"], "key"), key_map(v, m["BLOCK_N"], "value"))
    tiles = -(-n_q // block_rows(m)) * b * h
    # causal tiles are taken longest first within as many heads as have their keys and values in the L2 cache together
    together = (m["L2_MIB"] << 20) * group // max(1, 4 * n_k * d)
    head_group = max(group, min(b * h, together)) if m["CAUSAL"] else 1
    mask = arrays.get("block_bits")
    table, spread = (0, (0, 0, 0)) if mask is None else (mask.pointer, mask.spread()[:3])
    return min(tiles, multiprocessors), {
        **{"map_q": maps[0], "map_k": maps[1], "map_v": maps[2]},
        **{"out": out.pointer, "lse": arrays["lse"].pointer, "counter": counter, "redo": redo},
        "shape": {
            "batch": b, "heads": h, "group": group, "n_q": n_q, "n_k": n_k, "d": d, "head_group": head_group,
            "tiles": tiles,
        },
        "stride": out.strides[:3],
        "mask": (table, *spread, *(blocks or (1, 1))),
        "scale": scale,
    }  # fmt: skip


def key_map(x: View, rows: int, name: str) -> bytes:
    """Return the tensor map of a (b, h, n, d) tensor: boxes of `rows` x 64 columns."""
    return tensor_map(x, (3, 2, 1, 0), (64, rows, 1, 1), name)


@lru_cache(maxsize=4096)
def tensor_map(x: View, axes: tuple[int, ...], box: tuple[int, ...], name: str) -> bytes:
    """Return the tensor map of a 16-bit tensor, 128-byte swizzle; axes and box from the contiguous axis on."""
    cu = library("cuda.bindings.driver")
    # a stride along an axis of one element is never used, but must be a legal one
    strides = [2 * x.strides[a] if x.shape[a] > 1 else 16 for a in axes[1:]]
    kinds, u64, u32 = cu.CUtensorMapDataType, cu.cuuint64_t, cu.cuuint32_t
    kind = "BFLOAT16" if x.dtype == "bfloat16" else "FLOAT16"
    status, found = cu.cuTensorMapEncodeTiled(
        getattr(kinds, f"CU_TENSOR_MAP_DATA_TYPE_{kind}"),
        len(axes),
        x.pointer,
        [u64(x.shape[a]) for a in axes],
        [u64(s) for s in strides],
        [u32(size) for size in box],
        [u32(1)] * len(axes),
        cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        cu.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(status) != 0:
        raise UnsupportedProblem(f"{name}: cuTensorMapEncodeTiled answered {status} for strides {x.strides}")
    return struct.pack("16Q", *(int(w) for w in found.opaque))


KERNEL = Kernel(
    "sm90", FILE, "attention_forward", obstacle, why, macros, source, block_rows, threads, shared_bytes, target
)
