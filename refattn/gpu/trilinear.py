"""The kernel of trilinear (2-simplicial) attention for Hopper (trilinear.cu): its source, arguments and launch."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedProblem
from .build import compiled, text_of
from .launch import attribute, capability, queue
from .sm90 import tensor_map, wgmma
from .views import View, device_of, empty, on, stream_of, view

__all__ = ["forward", "macros", "shared_bytes", "source"]

FILE = "trilinear.cu"
WIDTHS = (64, 128)
ARGUMENTS = struct.Struct("@128s128s128s4Q9q8i6if")
OFFSETS = (0, 128, 256, *(384 + 8 * i for i in range(4)), 416, 440, 464, 488, 544)
"""Where the kernel's arguments lie: maps, k1, v1, out, lse, three strides, shape, scale."""


def macros(d: int, keys: int) -> dict[str, int]:
    """Return what the kernel is compiled with, for head dim d and the k2 that a tile of rows sees."""
    return {
        "HEAD_DIM": min(w for w in WIDTHS if w >= d),
        "HALVES": 2 if keys > 64 else 1,
        "STAGES": 2,
        "BF16": 1,
        "CONSUMER_REGISTERS": 240,
        "PRODUCER_REGISTERS": 24,
    }


def shared_bytes(m: Mapping[str, int]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    rows = 2 * 64 + 2 * m["STAGES"] * 64 * m["HALVES"] + 8 * 2 * (4 if m["HALVES"] == 2 else 8)
    return 1024 + 2 * m["HEAD_DIM"] * rows + 512 * (m["HEAD_DIM"] // 2 + 4) + 32 + 32 * m["STAGES"] + 48 * 256


def source(m: Mapping[str, int]) -> str:
    """Return the kernel's text: its #defines, and the wgmma wrappers of its tiles."""
    pairs = (("first", True), ("next", False))
    wrappers = [wgmma(f"qk_{n}", 64, "bf16", first=f, from_registers=True) for n, f in pairs]
    wrappers += [wgmma(f"pv_{n}", m["HEAD_DIM"], "bf16", first=f, from_registers=True, rows=True) for n, f in pairs]
    return text_of(FILE, m).replace("// (wgmma wrappers)", "".join(wrappers))


def forward(
    query: Any, k1: Any, k2: Any, v1: Any, v2: Any, *, scale: float, causal: str | None,
    window: tuple[int | None, int | None],
) -> tuple[Any, Any]:  # fmt: skip
    """Return out and lse of trilinear attention; shapes and options are those that `tensor.forms.check` has passed.

    Raises
    ------
    UnsupportedProblem
        No Hopper GPU, another type than bfloat16, a head dim or a layout that the kernel does not take.
    """
    device = device_of(query, "query")
    with on(device):
        names = ("query", "k1", "k2", "v1", "v2")
        arrays = {n: view(x, n) for n, x in zip(names, (query, k1, k2, v1, v2), strict=True)}
        _check(arrays, scale, device)
        (b, h, n_q, d), n1, n2 = arrays["query"].shape, k1.shape[2], k2.shape[2]
        out, arrays["out"] = empty(query, (b, h, n_q, d), "bfloat16")
        lse, arrays["lse"] = empty(query, (b, h, n_q), "float32")
        rows = _row_heads(h // k1.shape[1])
        # a block of k2 stays in shared memory while k1 passes by: the more keys are blocks
        span = [min(n, n if w is None else w + 64 // rows - 1) for n, w in zip((n1, n2), window, strict=True)]
        if span[0] > span[1]:
            for x in "kv":
                arrays[x + "1"], arrays[x + "2"] = arrays[x + "2"], arrays[x + "1"]
            window, span = (window[1], window[0]), span[::-1]
        m = macros(d, span[1])
        grid, packed = _arguments(m, arrays, scale, causal, window, attribute(device, "MultiProcessorCount"))
        kernel = compiled(source(m), "trilinear_forward", shared_bytes(m), "sm_90a", device)
        queue(kernel, grid, 384, shared_bytes(m), stream_of(query, device), packed, OFFSETS)
    return out, lse


def _check(arrays: Mapping[str, View], scale: float, device: int) -> None:
    found = capability(device)
    if found != (9, 0):
        raise UnsupportedProblem(f"tensor: the trilinear kernel needs compute capability 9.0, got {found[0]}.{found[1]}")
    query, value = arrays["query"], arrays["v1"]
    if query.dtype != "bfloat16":  # products of float16 may be infinite
        raise UnsupportedProblem(f"tensor: the trilinear kernel takes bfloat16, got {query.dtype}")
    d, d_v = query.shape[3], value.shape[3]
    if d != d_v or d % 8 or d > WIDTHS[-1]:
        raise UnsupportedProblem(
            f"tensor: the trilinear kernel takes equal head dims, multiples of 8 up to {WIDTHS[-1]}, got {d} and {d_v}"
        )
    if not scale > 0:
        raise UnsupportedProblem(f"tensor: the trilinear kernel takes a scale above 0, got {scale}")
    for name, x in arrays.items():
        if x.device != device:
            raise UnsupportedProblem(f"{name}: is on GPU {x.device} and query on GPU {device}; move one of them")
        strides = [s for s, n in zip(x.strides, x.shape, strict=True) if n > 1]
        if x.pointer % 16 or (x.strides[3] != 1 and d > 1) or any(s < 1 or s % 8 for s in strides[:-1]):
            raise UnsupportedProblem(
                f"{name}: the trilinear kernel takes rows that begin at multiples of 16 bytes, the last axis "
                f"contiguous, strides above 0, got strides {x.strides}; copy the array"
            )


def _row_heads(group: int) -> int:
    """Return how many heads of a key head's group a tile takes: the largest power of 2 that divides it, up to 64."""
    return min(group & -group, 64)


def _arguments(
    m: Mapping[str, int], arrays: Mapping[str, View], scale: float, causal: str | None,
    window: tuple[int | None, int | None], multiprocessors: int,
) -> tuple[int, bytes]:  # fmt: skip
    """Return the grid and the kernel's arguments, at ``OFFSETS``."""
    q, k1, k2, v1, v2, out = (arrays[n] for n in ("query", "k1", "k2", "v1", "v2", "out"))
    (b, h, n_q, d), (_, h_kv, n1, _), n2 = q.shape, k1.shape, k2.shape[2]
    group = h // h_kv
    rows, (s_b, s_h, s_n, _) = _row_heads(group), q.strides
    grouped = View(q.pointer, (b, h_kv, group, n_q, d), (s_b, group * s_h, s_h, s_n, 1), q.dtype, q.device)
    keys = 64 * m["HALVES"]
    maps = (
        tensor_map(grouped, (4, 2, 3, 1, 0), (64, rows, 64 // rows, 1, 1), "query"),
        *(tensor_map(x, (3, 2, 1, 0), (64, keys, 1, 1), n) for x, n in ((k2, "k2"), (v2, "v2"))),
    )
    tiles = b * h // rows * -(-n_q // (64 // rows))
    shifts = [n - n_q if causal == "bottom_right" else 0 for n in (n1, n2)]
    windows = [n + n_q if w is None else min(w, n + n_q) for n, w in zip((n1, n2), window, strict=True)]
    packed = ARGUMENTS.pack(
        *maps,
        *(x.pointer for x in (k1, v1, out, arrays["lse"])),
        *(s for x in (k1, v1, out) for s in x.spread()[:3]),
        *(b, h_kv, group, n_q, d, int(causal is not None), rows.bit_length() - 1, tiles),
        *(n1, shifts[0], windows[0], n2, shifts[1], windows[1]),
        scale,
    )
    return min(tiles, multiprocessors), packed
