"""The kernel for wide heads on Hopper, as latent attention has them (latent.cu); its source and arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from .build import text_of
from .kernel import Call, Kernel
from .sm90 import NO_LIMIT, key_map, target, tensor_map, wgmma
from .views import View

__all__ = ["KERNEL", "ROWS", "arguments", "inputs", "maps", "shared", "shared_bytes", "splits_of"]

FILE = "latent.cu"
WIDEST_K, WIDEST_V, ROWS, SHARED = 576, 512, 64, 232448
NARROW = 256
"""Up to here other kernels take both head dims."""
SPLIT_ROWS, SPLIT_KEYS = 256, 1024
"""Up to how many rows of a key head, and from how many keys on, a row's keys are shared out among blocks."""
LEAST_TILES = 4
"""Tiles of keys of a part, at least."""


def obstacle(call: Call, capability: tuple[int, int]) -> str:
    """Return why the kernel cannot compute a call, "" where it can."""
    widths = f"got {call.d_k} and {call.d_v}"
    if call.d_k > WIDEST_K or call.d_v > WIDEST_V or max(call.d_k, call.d_v) <= NARROW:
        return f"takes head dims of which one is above {NARROW}, up to {WIDEST_K} and {WIDEST_V}, {widths}"
    if capability != (9, 0):
        return f"needs compute capability 9.0, got {capability[0]}.{capability[1]}"
    if call.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16, got {call.dtype}"
    if call.d_k % 8 or call.d_v % 8 or not min(call.d_k, call.d_v):
        return f"takes head dims that are multiples of 8, {widths}"
    if not call.mapped:
        return "takes rows that begin at multiples of 16 bytes, at strides above 0"
    names = {"allowed": "allowed", "bias": "bias", "packed": "cu_seqlens", "blocks": "block_mask"}
    given = [to for n, to in names.items() if getattr(call, n)] + ["accuracy='high'"] * (call.accuracy == "high")
    if given:
        return f"does not take {', '.join(given)}"
    if max(call.n_q, call.n_k) >= 2**30:
        return f"takes fewer than 2**30 rows and keys, got {call.n_q} and {call.n_k}"
    return ""


def why(call: Call) -> str:
    """Return what the kernel is for."""
    once = ", values copied with keys" if call.shared else ""
    return f"{call.dtype} on Hopper's tensor cores, head dims {call.d_k} and {call.d_v}{once}"


def macros(call: Call) -> dict[str, Any]:
    """Return what the kernel is compiled with."""
    left, right = call.window or (None, None)
    few = call.n_q * call.group <= SPLIT_ROWS and call.n_k >= SPLIT_KEYS
    return {
        "STEPS_K": -(-call.d_k // 16),
        "BF16": int(call.dtype == "bfloat16"),
        "SHARED": int(call.shared),
        "RIGHT": int(call.causal is not None or right is not None),
        "LEFT": int(left is not None),
        "SINK": int(call.sink),
        "SOFTCAP": int(call.softcap),
        "SPLIT": int(few and not call.batch_invariant),
        "PRESCALE": int(not call.positive_scale),
        "BLOCK_N": 64 if call.shared else 32,
    }


def source(m: Mapping[str, Any]) -> str:
    """Return the kernel's text for some macros: its #defines, and the wgmma wrappers of its tiles."""
    kind = "bf16" if m["BF16"] else "f16"
    wrappers = (
        wgmma("qk_first", m["BLOCK_N"], kind, first=True, from_registers=False),
        wgmma("qk_next", m["BLOCK_N"], kind, first=False, from_registers=False),
        wgmma("pv", WIDEST_V // 2, kind, first=False, from_registers=True, rows=True),
        wgmma("pv_shared", WIDEST_V // 2, kind, first=False, from_registers=False, rows=True),
    )
    return text_of(FILE, m).replace("// (wgmma wrappers)", "".join(wrappers))


def block_rows(m: Mapping[str, Any]) -> int:
    """Return the rows of a tile, of queries and heads."""
    return ROWS


def threads(m: Mapping[str, Any]) -> int:
    """Return the threads of a block."""
    return 384


def shared_bytes(m: Mapping[str, Any]) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    boxes = WIDEST_K // 64 + (0 if m["SHARED"] else WIDEST_V // 64)
    rows = ROWS * (WIDEST_K // 64 + 1) + 2 * m["BLOCK_N"] * boxes  # Q and P, and two slots
    return int(1024 + 128 * rows + 4 * 4 * ROWS + 8 * 13)


def shared(key: View, value: View) -> bool:
    """Tell whether values are the first columns of keys in memory."""
    return (
        (key.pointer, key.spread()[:3], key.shape[:3]) == (value.pointer, value.spread()[:3], value.shape[:3])
        and value.shape[3] <= key.shape[3]
    )  # fmt: skip


def _tile_heads(group: int, n_q: int) -> int:
    """Return how many heads of a group a tile of 64 rows has: what makes fewest tiles, of these the most."""
    powers = [1 << i for i in range(ROWS.bit_length())]
    return min(powers, key=lambda h: (-(-group // h) * -(-n_q // (ROWS // h)), -h))


def splits_of(tiles: int, blocks_of_keys: int, multiprocessors: int) -> int:
    """Return in how many parts keys go, so that tiles of rows fill the GPU."""
    return max(1, min(multiprocessors // tiles, blocks_of_keys // LEAST_TILES))


def maps(m: Mapping[str, Any], group: int, n_q: int) -> Mapping[str, tuple[str, Callable[[View], bytes]]]:
    """Return by argument the array whose tensor map it is, and what makes one."""
    keys = {f"map_{n[0]}": (n, partial(_key_map, rows=m["BLOCK_N"], name=n)) for n in ("key", "value")}
    return {"map_q": ("query", partial(_query_map, group=group, heads=_tile_heads(group, n_q)))} | keys


def _query_map(x: View, group: int, heads: int) -> bytes:
    """Return the tensor map of queries as (b, h_kv, n_q, group, d_k): boxes of `heads` heads by as many queries."""
    (b, h, n, d), (along_b, along_h, along_n, one) = x.shape, x.strides
    apart = replace(
        x, shape=(b, h // group, n, group, d), strides=(along_b, group * along_h, along_n, along_h, one), owner=None
    )
    return tensor_map(apart, (4, 3, 2, 1, 0), (64, heads, ROWS // heads, 1, 1), "query")


def _key_map(x: View, rows: int, name: str) -> bytes:
    """Return the tensor map of keys or values; of none at all, bytes that nothing reads."""
    return key_map(x, rows, name) if x.shape[2] else bytes(128)


def arguments(
    m: Mapping[str, Any], arrays: Mapping[str, View], options: Mapping[str, Any], multiprocessors: int
) -> tuple[int, dict[str, Any]]:
    """Return the grid, and by name what the kernels of latent.cu take but for marks and parts.

    Parameters
    ----------
    m : mapping
        Macros.
    arrays : mapping of str to View
        query, key, value, out, lse, and sink where there is one.
    options : mapping
        scale (a number), causal, window, softcap.
    multiprocessors : int
        Of the GPU.
    """
    (b, h, n_q, d_k), (_, h_kv, n_k, d_v) = arrays["query"].shape, arrays["value"].shape
    group = h // h_kv
    heads = _tile_heads(group, n_q)
    of_heads, of_queries = -(-group // heads), -(-n_q // (ROWS // heads))
    tiles = of_heads * of_queries * h_kv * b
    splits = splits_of(tiles, -(-n_k // m["BLOCK_N"]), multiprocessors) if m["SPLIT"] else 1
    left, right = (NO_LIMIT if w is None else min(w, NO_LIMIT) for w in options["window"] or (None, None))
    places = {n: arrays[n].pointer for n in ("out", "lse")}
    return tiles * splits, {
        **{to: make(arrays[n]) for to, (n, make) in maps(m, group, n_q).items()},
        **places,
        "shape": {
            "batch": b, "heads_kv": h_kv, "group": group, "n_q": n_q, "n_k": n_k, "d_k": d_k, "d": d_v,
            "tile_heads": heads, "tiles_heads": of_heads, "tiles_queries": of_queries, "splits": splits,
        },
        "stride": arrays["out"].strides[:3],
        "options": {
            "sink": arrays["sink"].pointer if "sink" in arrays else 0,
            "softcap": options["softcap"] or 0.0,
            "top_left": int(options["causal"] == "top_left"),
            "left": left,
            "right": min(right, 0) if options["causal"] else right,
        },
        "scale": options["scale"],
    }  # fmt: skip


def inputs(arrays: Mapping[str, View]) -> dict[str, int]:
    """Return struct Inputs of latent.cu."""
    names = {"q": "query", "k": "key", "v": "value"}
    along = {f"{to}_{a}": s for to, n in names.items() for a, s in zip("bhn", arrays[n].strides, strict=False)}
    return {to: arrays[n].pointer for to, n in names.items()} | along


PLACES = {"out": "out", "lse": "lse", "options.sink": "sink"}
"""By argument of every kernel, the array whose address it is."""
REPAIRED = {f"inputs.{n[0]}": n for n in ("query", "key", "value")}
"""Likewise, of the kernel that repairs."""

KERNEL = Kernel(
    "latent", FILE, "attention_latent", obstacle, why, macros, source, block_rows, threads, shared_bytes, target
)
