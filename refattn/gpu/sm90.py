"""Source, tensor maps and launch of the Hopper kernel (sm90.cu)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BuildError, UnsupportedProblem
from .views import View

__all__ = ["launch", "shared_bytes", "source"]

OPTIONS = ("-std=c++17", "-arch=sm_90a")
NOT_MACROS = ("L2_MIB",)


def source(macros: Mapping[str, int]) -> str:
    """Return the kernel's text for some macros: its #defines, and the wgmma wrappers of its tiles."""
    defines = "".join(f"#define {n} {v}\n" for n, v in macros.items() if n not in NOT_MACROS)
    kind = "bf16" if macros["BF16"] else "f16"
    wrappers = (
        _wgmma("qk_first", macros["BLOCK_N"], kind, first=True, from_registers=False),
        _wgmma("qk_next", macros["BLOCK_N"], kind, first=False, from_registers=False),
        _wgmma("pv", macros["HEAD_DIM"], kind, first=False, from_registers=True),
    )
    text = (Path(__file__).parent / "sm90.cu").read_text(encoding="utf-8")
    return defines + text.replace("// (wgmma wrappers)", "".join(wrappers))


def _wgmma(name: str, n: int, kind: str, *, first: bool, from_registers: bool) -> str:
    """Return a wrapper of wgmma m64 n<n> k16: float32 accumulators (set, or added to), A from memory or registers."""
    count = n // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    results = ", ".join(f'"{"=" if first else "+"}f"(d[{i}])' for i in range(count))
    if from_registers:
        a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        b, last = f"%{count + 4}", "p, 1, 1, 1"  # the last 1: B is transposed
        given, arguments = '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)', "u32 a0, u32 a1, u32 a2, u32 a3, u64 b"
    else:
        a, b, last = f"%{count}", f"%{count + 1}", "p, 1, 1, 0, 0"
        given, arguments = '"l"(a), "l"(b)', "u64 a, u64 b"
    return (
        f"DEVICE void {name}(float (&d)[{count}], {arguments}) {{\n"
        f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {0 if first else 1}, 0;\\n"\n'
        f'                 "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} '
        f'{{{accumulators}}}, {a}, {b}, {last};\\n}}"\n'
        f"                 : {results}\n                 : {given});\n}}\n"
    )


def shared_bytes(macros: Mapping[str, int]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    rows = 64 * macros["CONSUMERS"] * macros["Q_STAGES"] + 2 * macros["STAGES"] * macros["BLOCK_N"]
    return 1024 + 2 * macros["HEAD_DIM"] * rows + 32 * (macros["Q_STAGES"] + macros["STAGES"])


def launch(macros: Mapping[str, int], q: View, k: View, v: View, out: View, lse: View, scale: float) -> None:
    """Launch the kernel on the current device and stream of CuPy; nothing is waited for."""
    cupy = importlib.import_module("cupy")
    (b, h, n_q, d), n_k, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    block_rows = 64 * macros["CONSUMERS"]
    maps = (_map(q, block_rows, "query"), _map(k, macros["BLOCK_N"], "key"), _map(v, macros["BLOCK_N"], "value"))
    tiles = -(-n_q // block_rows) * b * h
    # causal tiles are taken longest first within as many heads as have their keys and values in the L2 cache together
    together = (macros["L2_MIB"] << 20) * group // max(1, 4 * n_k * d)
    head_group = max(group, min(b * h, together)) if macros["CAUSAL"] else 1
    stream = cupy.cuda.get_current_stream()
    counter = _counter(q.device, stream.ptr)
    shape = np.array([b, h, group, n_q, n_k, d, head_group, tiles], np.int32).view("V32")
    strides = np.array(out.strides[:3], np.int64).view("V24")
    pointers = (np.uint64(out.pointer), np.uint64(lse.pointer), np.uint64(counter.data.ptr))
    kernel = _kernel(tuple(sorted(macros.items())), q.device)
    threads = 128 * (macros["CONSUMERS"] + 1)
    arguments = (*maps, *pointers, shape, strides, np.float32(scale))
    kernel((min(tiles, _multiprocessors(q.device)),), (threads,), arguments, shared_mem=shared_bytes(macros))


@lru_cache(maxsize=256)
def _kernel(macros: tuple[tuple[str, int], ...], device: int) -> Any:
    """Return the compiled kernel; CuPy keeps the machine code on disk, written to a temporary name and renamed."""
    cupy = importlib.import_module("cupy")
    chosen = dict(macros)
    module = cupy.RawModule(code=source(chosen), options=OPTIONS, backend="nvrtc")
    try:
        kernel = module.get_function("attention_forward")
    except Exception as e:
        raise BuildError(f"gpu: compiling the kernel sm90 failed with {type(e).__name__}: {e}") from e
    kernel.max_dynamic_shared_size_bytes = shared_bytes(chosen)
    return kernel


@lru_cache(maxsize=64)
def _counter(device: int, stream: int) -> Any:
    """Return the queue's counter of a stream: 0, as every launch leaves it; launches of other streams have others."""
    return importlib.import_module("cupy").zeros(1, np.int32)


@lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    return int(importlib.import_module("cupy").cuda.Device(device).attributes["MultiProcessorCount"])


@lru_cache(maxsize=1024)
def _map(x: View, rows: int, name: str) -> Any:
    """Return the tensor map of a tensor: boxes of `rows` x 64 columns, 128-byte swizzle."""
    cu = importlib.import_module("cuda.bindings.driver")
    b, h, n, d = x.shape
    # a stride along an axis of one element is never used, but must be a legal one
    strides = [2 * s if size > 1 else 16 for s, size in zip(x.strides[:3], x.shape[:3], strict=True)]
    if x.strides[3] != 1 or x.pointer % 16 or any(s % 16 or not 0 < s < 2**40 for s in strides):
        raise UnsupportedProblem(
            f"{name}: got strides {x.strides} at address {x.pointer:#x}; the kernel sm90 takes a contiguous last axis "
            "and rows that begin at multiples of 16 bytes"
        )
    kinds, u64, u32 = cu.CUtensorMapDataType, cu.cuuint64_t, cu.cuuint32_t
    kind = "BFLOAT16" if x.dtype == "bfloat16" else "FLOAT16"
    status, found = cu.cuTensorMapEncodeTiled(
        getattr(kinds, f"CU_TENSOR_MAP_DATA_TYPE_{kind}"),
        4,
        x.pointer,
        [u64(size) for size in (d, n, h, b)],
        [u64(s) for s in (strides[2], strides[1], strides[0])],
        [u32(size) for size in (64, rows, 1, 1)],
        [u32(1)] * 4,
        cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        cu.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(status) != 0:
        raise UnsupportedProblem(f"{name}: cuTensorMapEncodeTiled answered {status} for strides {x.strides}")
    return np.frombuffer(np.array([int(w) for w in found.opaque], np.uint64).tobytes(), "V128")
