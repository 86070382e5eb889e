"""Lightning attention on tensor cores (lightning.cu): which calls it takes, how tokens are cut into parts, launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arguments import arguments_of
from .build import compiled, text_of
from .launch import attribute, capability, queue
from .views import View, empty, layout

__all__ = [
    "CHUNK",
    "FILE",
    "WIDTHS",
    "cut",
    "launch",
    "macros",
    "queue_all",
    "shape",
    "shared_bytes",
    "source",
    "takes",
]

FILE = "lightning.cu"
WIDTHS = (64, 128)
CHUNK = 64
FEWEST = 4
"""Chunks of a part: fewer would cost more for their start than they gain."""


PLACES = {
    **{"q.data": "query", "k.data": "key", "v.data": "value", "out.data": "out", "start": "state", "last": "last"},
    **{"alpha.data": "alpha", "beta.data": "beta", "rates": "decay", "cu": "cu_seqlens"},
    **{"states": "kept", "kept": "kept"},
}
"""Arrays by what the recurrences' kernels call them."""


def takes(arrays: Mapping[str, View]) -> bool:
    """Tell whether it computes a call: bfloat16, rows that begin at multiples of 16 bytes."""
    return arrays["query"].dtype == "bfloat16" and layout([arrays[n] for n in ("query", "key", "value")])[0]


def macros(d_k: int, d_v: int) -> dict[str, Any]:
    """Return what the kernels are compiled with."""
    wide_k, wide_v = (min((w for w in WIDTHS if w >= d), default=WIDTHS[-1]) for d in (d_k, d_v))
    return {
        **{"BF16": 1, "WIDTH_K": wide_k, "WIDTH_V": wide_v, "WARPS": 4, "M_TILES": wide_v // 64, "BLOCK_N": CHUNK},
        **{"ALIGNED": 1, "BIAS": 0, "MIN_BLOCKS": 3 if wide_k == wide_v == WIDTHS[0] else 2},
    }


def source(m: Mapping[str, Any]) -> str:
    """Return the kernels' text."""
    return text_of(FILE, m)


def shared_bytes(entry: str, m: Mapping[str, Any]) -> int:
    """Return the dynamic shared memory of a block, in bytes: two stages of tiles, P, and the decays."""
    if entry == "lightning_scan":
        return 0
    whole = entry == "lightning"
    tiles = 2 * (2 if whole else 1) * m["WIDTH_K"] + 2 * m["WIDTH_V"] + (CHUNK if whole else 0)
    return int(2 * CHUNK * tiles + 4 * (CHUNK + 1))


def cut(n: int, blocks: int, room: int) -> tuple[int, int]:
    """Return how many parts a sequence of n tokens has, and the tokens of a part.

    Parameters
    ----------
    n : int
        Tokens, of the longest sequence at most.
    blocks : int
        Blocks of threads if there is one part.
    room : int
        Blocks that run on the GPU at the same time.
    """
    chunks = -(-n // CHUNK)
    parts = max(1, min(room // max(1, blocks), chunks // FEWEST))
    length = -(-chunks // parts)
    return max(1, -(-chunks // max(1, length))), CHUNK * max(1, length)


def shape(
    m: Mapping[str, Any], sizes: tuple[int, int, int], sequences: int, room: int
) -> tuple[dict[str, int], dict[str, int], int]:
    """Return how tokens are cut, the grids by kernel in their order, and how many numbers are kept between them.

    Parameters
    ----------
    m : mapping
        The macros.
    sizes : (h_q, n, d_v)
        Of the call.
    sequences : int
        How many states there are for each head.
    room : int
        As in :func:`cut`.
    """
    h, n, d_v = sizes
    blocks = sequences * h * -(-d_v // m["WIDTH_V"])
    parts, length = cut(n, blocks, room)
    state = m["WIDTH_K"] * m["WIDTH_V"]
    grids = {"lightning_states": blocks * (parts - 1), "lightning_scan": blocks * state // 1024 * (parts > 2)}
    return {"parts": parts, "length": length}, grids | {"lightning": blocks * parts}, blocks * (parts - 1) * state


def launch(like: Any, arrays: dict[str, View], values: Mapping[str, Any], sequences: int, stream: int) -> None:
    """Queue the kernels of a call.

    Parameters
    ----------
    like : array
        What is allocated comes from its library.
    arrays : dict of str to View
        query and value; what is kept between the kernels is added, as kept.
    values : mapping
        The arguments of the kernel for the CUDA cores (recurrence.py).
    sequences : int
        How many states there are for each head.
    stream : int
        The stream's handle.
    """
    (_, h, n, d_k), d_v, device = arrays["query"].shape, arrays["value"].shape[3], arrays["query"].device
    m = macros(d_k, d_v)
    cuts, grids, count = shape(m, (h, n, d_v), sequences, m["MIN_BLOCKS"] * attribute(device, "MultiProcessorCount"))
    if count and "kept" not in arrays:
        arrays["kept"] = empty(like, (count,), "float32")[1]
    given = {**values, "states": arrays["kept"].pointer if count else 0, "z": values["z"] | cuts}
    queue_all(FILE, source(m), grids, {x: shared_bytes(x, m) for x in grids}, given, device, stream)


def queue_all(
    file: str,
    text: str,
    grids: Mapping[str, int],
    shared: Mapping[str, int],
    values: Mapping[str, Any],
    device: int,
    stream: int,
) -> None:
    """Queue kernels of one text one after another, each with those of the values that it takes."""
    target = "sm_{}{}".format(*capability(device))
    for entry, grid in grids.items():
        if grid:
            takes = arguments_of(file, entry)
            kernel = compiled(text, entry, shared[entry], target, device)
            own = {x: values[x] for x in takes.parameters.members}
            places = {to: x for to, x in PLACES.items() if to in takes.places}
            threads = 256 if entry == "lightning_scan" else 128
            queue(kernel, grid, threads, shared[entry], stream, takes, own, places)
