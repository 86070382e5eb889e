"""The kernels of the backward pass: Hopper's, by mma.sync (mma_backward.cu), on the CUDA cores (simt_backward.cu)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

from . import simt, sm90_backward
from .build import text_of
from .kernel import Call, Kernel, Plan
from .mma import WIDTHS

__all__ = ["KERNELS", "SIMT", "hopper_plan", "pass_of", "support"]

WIDEST = 128
TILES = {(False, 0): (2, 48, 4), (False, 1): (2, 32, 4), (True, 0): (2, 32, 4), (True, 1): (1, 48, 4)}
"""By (head dims above 64, pass): 16-row tiles of a warp, rows that pass by in a tile, warps."""


def _mma_obstacle(call: Call, capability: tuple[int, int]) -> str:
    if capability < (8, 0):
        return f"needs compute capability 8.0 or later, got {capability[0]}.{capability[1]}"
    if call.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16, got {call.dtype}"
    if max(call.d_k, call.d_v) > WIDEST:
        return f"takes head dims up to {WIDEST} backward, got {call.d_k} and {call.d_v}"
    if call.bias not in (None, call.dtype, "float32"):
        return f"takes a bias of {call.dtype} or float32, got {call.bias}"
    if call.tiles:
        return "takes no bits of blocks; pass allowed"
    if call.blocks and call.packed:
        return "takes a block mask or packed sequences, got both"
    return ""


def _mma_macros(call: Call) -> dict[str, Any]:
    """Return what the kernel is compiled with, but for the pass: tiles that do not spill."""
    wide_k, wide_v = (min(w for w in WIDTHS if w >= d) for d in (call.d_k, call.d_v))
    return {
        "BF16": int(call.dtype == "bfloat16"),
        "WIDTH_K": wide_k,
        "WIDTH_V": wide_v,
        "ALIGNED": int(call.aligned),
        "SOFTCAP": int(call.softcap),
        "MASK": int(call.allowed),
        "BLOCKS": int(call.blocks is not None),
        "BIAS": 0 if call.bias is None else 2 if call.bias == "float32" else 1,
    }


def _mma_pass(m: Mapping[str, Any], which: int, dbias: bool) -> dict[str, Any]:
    wide = max(m["WIDTH_K"], m["WIDTH_V"]) > 64
    tiles, keys, warps = TILES[wide, which]
    if m["MASK"] or m["BLOCKS"] or m["BIAS"] or m["SOFTCAP"] or not m["ALIGNED"]:  # they take registers
        narrow = wide and (m["MASK"] if which == 0 else m["BIAS"])
        tiles, keys, warps = 1, 16 if narrow else 32, 4
    tiling = {"M_TILES": tiles, "BLOCK_N": keys, "WARPS": warps, "MIN_BLOCKS": 8 // warps}
    return {**m, "QUERY": int(which == 0), "DBIAS": int(dbias), **tiling}


def _mma_shared(m: Mapping[str, Any]) -> int:
    wide = m["WIDTH_K"] + m["WIDTH_V"]
    return int(2 * _mma_rows(m) * wide + 2 * (2 * m["BLOCK_N"] * wide + 8 * m["BLOCK_N"]))


def _mma_rows(m: Mapping[str, Any]) -> int:
    return int(16 * m["M_TILES"] * m["WARPS"])


def _simt_obstacle(call: Call, capability: tuple[int, int]) -> str:
    return simt.KERNEL.obstacle(call, capability)


def _simt_macros(call: Call) -> dict[str, Any]:
    """Return what the kernel is compiled with, but for the pass: tiles that fit in shared memory."""
    d_k, d_v = (-(-d // 32) * 32 for d in (call.d_k, call.d_v))
    widest, double = max(d_k, d_v), call.dtype == "float64"
    side = (64 if widest <= 128 else 32) // (2 if double else 1)
    return {
        "T": call.dtype,
        "D_K": d_k,
        "D_V": d_v,
        "WARPS": 8,
        "BLOCK_M": side,
        "BLOCK_N": side,
        "MIN_BLOCKS": 2 if widest <= 64 and not (call.allowed or call.blocks or call.bias or call.softcap) else 1,
        "BITMASK": int(call.allowed),
        "BLOCKS": int(call.blocks is not None),
        "SOFTCAP": int(call.softcap),
        "BIAS": call.bias,
    }


def _simt_pass(m: Mapping[str, Any], which: int, dbias: bool) -> dict[str, Any]:
    blocks = 1 if which == 1 and m["T"] in ("float16", "bfloat16") else m["MIN_BLOCKS"]  # registers
    return {**m, "GRADIENT": which, "MIN_BLOCKS": blocks}


def _simt_shared(m: Mapping[str, Any]) -> int:
    size, rows, keys = 8 if m["T"] == "float64" else 4, m["BLOCK_M"], m["BLOCK_N"]
    pad = 16 // size
    words = (rows + keys) * (m["D_K"] + m["D_V"] + 2 * pad) + (2 if m["GRADIENT"] == 1 else 1) * rows * (keys + pad)
    return int(size * (words + 2 * rows) + 8 * rows)


def _rows(m: Mapping[str, Any]) -> int:
    return int(m["BLOCK_M"])


@lru_cache(maxsize=4096)
def pass_of(kernel: Kernel, call: Call, which: int, dbias: bool = False) -> Plan:
    """Return the plan of a pass: 0 dq (`dbias`: and that of a bias spread along no axis), 1 dk and dv, 2 dbias."""
    macros = (_mma_pass if kernel.name == "mma" else _simt_pass)(kernel.macros(call), which, dbias)
    return Plan(kernel, kernel.why(call), MappingProxyType(macros), kernel.shared_bytes(macros))


@lru_cache(maxsize=4096)
def hopper_plan(call: Call, deterministic: bool) -> Plan:
    """Return the plan of Hopper's kernel, which gives dq, dk and dv together."""
    kernel, macros = sm90_backward.KERNEL, sm90_backward.macros_of(call, deterministic)
    return Plan(kernel, kernel.why(call), MappingProxyType(macros), kernel.shared_bytes(macros))


@lru_cache(maxsize=256)
def support(dtype: str, bias: str | None, sink: str | None) -> str:
    """Return the text of backward.cu for tensors, a bias and sinks of some types."""
    return text_of("backward.cu", {"T": dtype, "WARPS": 8, "BIAS": bias, "SINK": sink})


MMA = Kernel(
    "mma", "mma_backward.cu", "backward", _mma_obstacle, lambda c: f"{c.dtype} on tensor cores by mma.sync",
    _mma_macros, partial(text_of, "mma_backward.cu"), _mma_rows, simt.threads, _mma_shared, simt.target,
)  # fmt: skip
SIMT = Kernel(
    "simt", "simt_backward.cu", "backward", _simt_obstacle, simt.KERNEL.why, _simt_macros,
    partial(text_of, "simt_backward.cu"), _rows, simt.threads, _simt_shared, simt.target,
)  # fmt: skip
KERNELS = {k.name: k for k in (sm90_backward.KERNEL, MMA, SIMT)}
"""The kernels, in the order in which they are tried."""
