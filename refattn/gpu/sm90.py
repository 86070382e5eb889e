"""The kernel for Hopper (sm90.cu): wgmma, bulk tensor copies, specialised warps; its source and arguments."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from ..errors import UnsupportedProblem
from .build import text_of
from .kernel import Call, Kernel
from .views import View, library

__all__ = ["KERNEL", "WIDTHS", "arguments", "key_map", "source", "tensor_map", "unfit", "wgmma"]

FILE = "sm90.cu"
WIDTHS = (64, 96, 128, 192, 256)
"""Head dims that it is compiled for; smaller ones are filled up with zeros."""
ROWS_BLOCK_MASK = 128
"""Query rows of a block where there is a block mask, whose blocks must be multiples of it."""
BLOCK_MASK_KEYS = {64: 128, 128: 128, 256: 64}
"""Keys of a tile by width where there is a block mask."""
SHARED = 232448
"""Bytes of shared memory that a block may have."""
FASTEST = {(64, 0, 0): (3, 128, 3, 2), (64, 1, 0): (3, 128, 3, 2), (64, 0, 1): (3, 96, 3, 2)}
FASTEST |= {(96, 0, 0): (3, 96, 2, 2), (96, 1, 0): (2, 176, 2, 1)}
"""By width, RIGHT, HIGH: what was faster than the rule for other calls."""
SHORT = {(64, 1, 0): ((2, 128, 3, 2), 513, 1024)}
"""Likewise, tiles that do not take turns, and from how many to how many keys they were faster."""
REGISTERS = 204
"""What S, O, P and a tile's bias may take of the 232 registers of a thread of two consumer warpgroups."""
NO_LIMIT = 2**30 - 1
"""A window's side that limits nothing: sums with lengths stay below 2**31."""


def unfit(call: Call, capability: tuple[int, int], widest: int, when: str = "") -> str:
    """Return what no kernel of Hopper's takes: other GPUs, types, head dims or layouts; "" where there is nothing."""
    if capability != (9, 0):
        return f"needs compute capability 9.0, got {capability[0]}.{capability[1]}"
    if call.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16, got {call.dtype}"
    if call.d_k % 8 or call.d_v % 8 or not 0 < max(call.d_k, call.d_v) <= widest:
        return f"takes head dims that are multiples of 8 up to {widest}{when}, got {call.d_k} and {call.d_v}"
    if not call.mapped:
        return "takes rows that begin at multiples of 16 bytes, at strides above 0"
    return ""


def obstacle(call: Call, capability: tuple[int, int]) -> str:
    """Return why the kernel cannot compute a call, "" where it can."""
    if text := unfit(call, capability, WIDTHS[-1]):
        return text
    if call.bias not in (None, call.dtype, "float32"):
        return f"takes a bias of {call.dtype} or float32, got {call.bias}"
    indexed = [n for n in ("bias", "allowed") if getattr(call, n)]
    if call.packed and indexed:
        return f"takes cu_seqlens without {' and '.join(indexed)}"
    if max(call.n_q, call.n_k) >= 2**30:
        return f"takes fewer than 2**30 rows and keys, got {call.n_q} and {call.n_k}"
    if not call.n_k:
        return "needs at least one key"
    if call.blocks:
        return _obstacle_of_blocks(call)
    if _tiles(*_widths(call), _options(call)) is None:
        return f"has too few registers for so many options with head dims {call.d_k} and {call.d_v}"
    return ""


def _obstacle_of_blocks(call: Call) -> str:
    options = {"packed": "cu_seqlens", "tiles": "bits of blocks"}
    names = ("window", "softcap", "sink", "bias", "allowed", *options)
    given = [options.get(n, n) for n in names if getattr(call, n)]
    if given or not call.positive_scale:
        return f"takes block masks without {', '.join(given) or 'a scale up to 0'}"
    width_k, width_v = _widths(call)
    keys = BLOCK_MASK_KEYS.get(width_k) if width_k == width_v else None
    if keys is None:
        return f"takes block masks with equal head dims in tiles of 64, 128 or 256, got {call.d_k} and {call.d_v}"
    block_q, block_k = call.blocks or (0, 0)
    if block_q % ROWS_BLOCK_MASK or block_k % keys:
        multiples = f"{ROWS_BLOCK_MASK} rows and {keys} keys"
        return f"takes block masks of multiples of {multiples}, got {block_q} and {block_k}"
    return ""


def _widths(call: Call) -> tuple[int, int]:
    width_k, width_v = (min(w for w in WIDTHS if w >= d) for d in (call.d_k, call.d_v))
    return width_k, width_v


def why(call: Call) -> str:
    """Return what the kernel is for."""
    width_k, width_v = _widths(call)
    widths = f"{width_k}" if width_k == width_v else f"{width_k} and {width_v}"
    return f"{call.dtype} on Hopper's tensor cores, head dims {call.d_k} and {call.d_v} in tiles of {widths}"


def macros(call: Call) -> dict[str, Any]:
    """Return what the kernel is compiled with."""
    (width_k, width_v), options = _widths(call), _options(call)
    tiles, short = _tiles(width_k, width_v, options), _short(width_k, width_v, options, call.n_k)
    return {
        "WIDTH_K": width_k,
        "WIDTH_V": width_v,
        "STEPS_K": -(-call.d_k // 16),
        "STEPS_V": -(-call.d_v // 16),
        "BF16": int(call.dtype == "bfloat16"),
        # of a window, tiles are short, and taking turns cost more than it gave
        "PINGPONG": int(not options["LEFT"] and short is None),
        **options,
        **(short or tiles or {}),
    }


def _options(call: Call) -> dict[str, int]:
    left, right = call.window or (None, None)
    return {
        "RIGHT": int(call.causal is not None or right is not None),
        "LEFT": int(left is not None),
        "SINK": int(call.sink),
        "SOFTCAP": int(call.softcap),
        "MASK": int(call.allowed),
        "PACKED": int(call.packed),
        "BIAS": 0 if call.bias is None else 2 if call.bias == "float32" else 1,
        "PRESCALE": int(not call.positive_scale),
        "HIGH": int(call.accuracy == "high"),
        "BLOCKS": int(call.blocks is not None),
    }


def _tiles(width_k: int, width_v: int, options: Mapping[str, int]) -> dict[str, int] | None:
    """Return the tiles: what was fastest of those that do not spill, or the largest that fit; None where none do."""
    right, high = options["RIGHT"], options["HIGH"]
    if (kind := _plain(width_k, width_v, options)) in FASTEST:
        return _tile(*FASTEST[kind])
    if options["BLOCKS"]:
        keys = BLOCK_MASK_KEYS[width_k] if not (high and right) else 64
        return _tile(2, keys, 3 if width_k == 64 else 2, 1 if width_k == 256 else 2)
    step = 32 if options["MASK"] else 16
    for keys in range(128, 0, -step):
        for tile in (_tile(2, keys, *rings) for rings in ((3, 2), (2, 2), (2, 1))):
            bytes_ = shared_bytes(tile | {"WIDTH_K": width_k, "WIDTH_V": width_v})
            if _registers(width_v, options, keys) <= REGISTERS and bytes_ <= SHARED:
                return tile
    return None


def _plain(width_k: int, width_v: int, options: Mapping[str, int]) -> tuple[int, int, int] | None:
    """Return a call's key in FASTEST and SHORT; None where it has other options than those know."""
    extra = {n for n, on in options.items() if on} - {"RIGHT", "HIGH", "SINK"}
    return None if extra or width_k != width_v else (width_k, options["RIGHT"], options["HIGH"])


def _short(width_k: int, width_v: int, options: Mapping[str, int], n_k: int) -> dict[str, int] | None:
    """Return the tiles of a short call, where others are faster for it."""
    kind = _plain(width_k, width_v, options)
    if kind not in SHORT:
        return None
    tile, least, most = SHORT[kind]
    return _tile(*tile) if least <= n_k <= most else None


def _tile(consumers: int, keys: int, stages: int, query_stages: int) -> dict[str, int]:
    return {
        "CONSUMERS": consumers,
        "BLOCK_N": keys,
        "STAGES": stages,
        "Q_STAGES": query_stages,
        "CONSUMER_REGISTERS": 232 if consumers == 2 else 160,
        "PRODUCER_REGISTERS": 40 if consumers == 2 else 32,
    }


def _registers(width_v: int, options: Mapping[str, int], keys: int) -> int:
    """Return the registers of a thread that hold S, O, P and the bias of a tile."""
    return keys // 2 + width_v // 2 + keys // 4 * (1 + options["HIGH"]) + (0, keys // 4, keys // 2)[options["BIAS"]]


def block_rows(m: Mapping[str, Any]) -> int:
    """Return the query rows of a block."""
    return int(64 * m["CONSUMERS"])


def threads(m: Mapping[str, Any]) -> int:
    """Return the threads of a block."""
    return int(128 * (m["CONSUMERS"] + 1))


def shared_bytes(m: Mapping[str, Any]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    boxes_k, boxes_v = (-(-m[n] // 64) for n in ("WIDTH_K", "WIDTH_V"))
    keys = m["STAGES"] * m["BLOCK_N"] * (boxes_k + boxes_v)
    return int(1024 + 128 * (block_rows(m) * m["Q_STAGES"] * boxes_k + keys) + 48 * m["Q_STAGES"] + 36 * m["STAGES"])


def target(capability: tuple[int, int]) -> str:
    """Return the architecture to compile for: with `a`, or there is no wgmma."""
    return "sm_90a"


def source(m: Mapping[str, Any]) -> str:
    """Return the kernel's text for some macros: its #defines, and the wgmma wrappers of its tiles."""
    kind = "bf16" if m["BF16"] else "f16"
    wrappers = (
        wgmma("qk_first", m["BLOCK_N"], kind, first=True, from_registers=False),
        wgmma("qk_next", m["BLOCK_N"], kind, first=False, from_registers=False),
        wgmma("pv", 16 * m["STEPS_V"], kind, first=None, from_registers=True, rows=True),
    )
    return text_of(FILE, m).replace("// (wgmma wrappers)", "".join(wrappers))


def wgmma(
    name: str, n: int, kind: str, *, first: bool | None, from_registers: bool, rows: bool = False, rows_a: bool = False
) -> str:
    """Return a wrapper of wgmma m64 n<n> k16: float32 accumulators (set, or added to), A from memory or registers.

    first: whether they are set; None: where the wrapper's last argument, ``keep``, is 0.
    rows: B has its 16 rows along the contraction (V), else its n rows are contracted with (K). rows_a: so has A.
    """
    count = n // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    results = ", ".join(f'"{"=" if first else "+"}f"(d[{i}])' for i in range(count))
    if from_registers:
        a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        b, last = f"%{count + 4}", f"p, 1, 1, {int(rows)}"
        given, parameters = '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)', "u32 a0, u32 a1, u32 a2, u32 a3, u64 b"
    else:
        a, b, last = f"%{count}", f"%{count + 1}", f"p, 1, 1, {int(rows_a)}, {int(rows)}"
        given, parameters = '"l"(a), "l"(b)', "u64 a, u64 b"
    keep = "0" if first else "1"
    if first is None:
        keep, given, parameters = (
            f"%{count + (5 if from_registers else 2)}",
            f'{given}, "r"(keep)',
            f"{parameters}, int keep",
        )
    return (
        f"DEVICE void {name}(float (&d)[{count}], {parameters}) {{\n"
        f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {keep}, 0;\\n"\n'
        f'                 "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} '
        f'{{{accumulators}}}, {a}, {b}, {last};\\n}}"\n'
        f"                 : {results}\n                 : {given});\n}}\n"
    )


def arguments(
    m: Mapping[str, Any],
    arrays: Mapping[str, View],
    options: Mapping[str, Any],
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
        query, key, value, out, lse, and what there is of sink, bias, allowed (bits), cu_q, cu_k and block_bits.
    options : mapping
        scale (a number), causal, window, softcap.
    blocks : (block_q, block_k) or None
        Rows and keys of a block of the block mask.
    counter, redo : int
        Addresses of the queue's counter, and of the marks of tiles to repair.
    multiprocessors : int
        Of the GPU.
    """
    q, k, v, out = (arrays[n] for n in ("query", "key", "value", "out"))
    (b, h, n_q, _), n_k, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    sequences = arrays["cu_q"].shape[0] - 1 if "cu_q" in arrays else 0
    rows = n_q // block_rows(m) + sequences if sequences else -(-n_q // block_rows(m))
    tiles = rows * b * h
    # tiles whose rows differ in length are taken longest first within as many heads as have their keys and values in
    # the L2 cache together: all of them, or what a window leaves to a tile; groups of one size, so that the last ends
    # with short tiles, too
    asked = _asked(arrays, options, sequences)
    keys = min(n_k, asked["left"] + block_rows(m)) if m["LEFT"] else n_k
    together = ((32 if m["WIDTH_K"] == 256 else 16) << 20) * group // max(1, 2 * keys * (k.shape[3] + v.shape[3]))
    head_group = max(group, min(b * h, together)) if m["RIGHT"] else 1
    if m["LEFT"]:
        head_group = -(-b * h // -(-b * h // head_group))
    mask = arrays.get("block_bits")
    table, spread = (0, (0, 0, 0)) if mask is None else (mask.pointer, mask.spread()[:3])
    return min(tiles, multiprocessors), {
        **{to: make(arrays[n]) for to, (n, make) in maps(m).items()},
        **{"out": out.pointer, "lse": arrays["lse"].pointer, "counter": counter, "redo": redo},
        "shape": {
            "batch": b, "heads": h, "group": group, "n_q": n_q, "n_k": n_k, "d": v.shape[3], "head_group": head_group,
            "tiles": tiles,
        },
        "stride": out.strides[:3],
        "mask": (table, *spread, *(blocks or (1, 1))),
        "options": asked,
        "scale": options["scale"],
    }  # fmt: skip


def _asked(arrays: Mapping[str, View], options: Mapping[str, Any], sequences: int) -> dict[str, Any]:
    """Return struct Options of sm90.cu."""
    left, right = (NO_LIMIT if w is None else min(w, NO_LIMIT) for w in options["window"] or (None, None))
    places = {n: arrays[n].pointer if n in arrays else 0 for n in ("sink", "bias", "cu_q", "cu_k")}
    spread = {n: arrays[n].spread() if n in arrays else (0,) * 4 for n in ("bias", "allowed")}
    return {
        **places,
        "mask": arrays["allowed"].pointer if "allowed" in arrays else 0,
        **{f"bias_{a}": s for a, s in zip("bhqk", spread["bias"], strict=True)},
        **{f"mask_{a}": s for a, s in zip("bhq", spread["allowed"], strict=False)},
        "softcap": options["softcap"] or 0.0,
        "top_left": int(options["causal"] == "top_left"),
        "left": left,
        "right": min(right, 0) if options["causal"] else right,
        "sequences": sequences,
    }


PLACES = {"out": "out", "lse": "lse"} | {f"options.{n}": n for n in ("sink", "bias", "cu_q", "cu_k")}
"""By argument, the array whose address it is."""


def maps(m: Mapping[str, Any]) -> dict[str, tuple[str, Callable[[View], bytes]]]:
    """Return by argument the array whose tensor map it is, and what makes one."""
    rows = {"query": block_rows(m), "key": m["BLOCK_N"], "value": m["BLOCK_N"]}
    return {f"map_{n[0]}": (n, partial(key_map, rows=size, name=n)) for n, size in rows.items()}


def key_map(x: View, rows: int, name: str) -> bytes:
    """Return the tensor map of a (b, h, n, d) tensor: boxes of `rows` x 64 columns."""
    return tensor_map(x, (3, 2, 1, 0), (64, rows, 1, 1), name)


def tensor_map(x: View, axes: tuple[int, ...], box: tuple[int, ...], name: str) -> bytes:
    """Return the tensor map of a 16-bit tensor, 128-byte swizzle; axes and box from the contiguous axis on."""
    return _encoded(replace(x, owner=None), axes, box, name)


@lru_cache(maxsize=4096)  # of places alone: what is kept here must not keep a tensor's memory
def _encoded(x: View, axes: tuple[int, ...], box: tuple[int, ...], name: str) -> bytes:
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
