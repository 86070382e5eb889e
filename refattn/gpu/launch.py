"""Launches: the arguments of simt.cu and mma.cu, the queue's counters, the bit masks, the repair of marked tiles."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from ..arrays import kind_of
from . import latent, simt, sm90
from .arguments import Arguments, arguments_of
from .build import compiled, text_of
from .decode import split_of
from .kernel import Call, Plan
from .plan import configured
from .recorded import Launch, Maps, note
from .views import View, capturing, empty, library, view

__all__ = ["attribute", "capability", "kernel_of", "launch", "pack", "params", "queue", "sizes_and_options", "zeros"]

POINTERS = {
    "q": "query", "k": "key", "v": "value", "out": "out", "lse": "lse", "bias": "bias", "sink": "sink",
    "mask": "allowed", "blocks": "blocks", "cu_q": "cu_q", "cu_k": "cu_k",
}  # fmt: skip
"""Arrays by what struct Params of params.cuh calls them."""
PLACES = {f"p.{member}": array for member, array in POINTERS.items()}
CAUSAL = {None: 0, "top_left": 1, "bottom_right": 2}


def launch(call: Call, plan: Plan, like: Any, arrays: dict[str, View], options: Mapping[str, Any], stream: int) -> None:
    """Queue a call's kernels on a stream of the current device; nothing is waited for.

    Parameters
    ----------
    call : Call
        What is computed.
    plan : Plan
        The kernel.
    like : array
        What is allocated comes from its library.
    arrays : dict of str to View
        The values of ``POINTERS`` that are there.
    options : mapping
        scale (a number), causal, window, softcap.
    stream : int
        The stream's handle.
    """
    if plan.impl == "decode":
        _launch_split(plan, call, like, arrays, options, stream)
        return
    if plan.impl == "latent":
        _launch_latent(plan, call, like, arrays, options, stream)
        return
    device = arrays["query"].device
    if "allowed" in arrays:
        arrays["allowed"] = pack(arrays["allowed"], call.n_k, like, stream)
    if plan.macros["BLOCKS"] == 1 and plan.impl != "simt":
        arrays["block_bits"] = pack(arrays["blocks"], arrays["blocks"].shape[3], like, stream)
    if plan.impl != "sm90":
        _launch_params(plan, call, arrays, options, stream, redo=0)
        return
    b, h, n_q, _ = arrays["query"].shape
    # hidden keys are multiplied in, by 0
    repair = any((call.causal, call.window, call.allowed, call.packed))
    slots = -(-n_q // 64) + (arrays["cu_q"].shape[0] - 1 if call.packed else 0)
    redo = zeros(like, device, stream, max(16, 1 << (b * h * slots - 1).bit_length()), "redo") if repair else None
    counter = zeros(like, device, stream, 4, "counter")
    multiprocessors, at = attribute(device, "MultiProcessorCount"), redo.pointer if redo else 0
    grid, values = sm90.arguments(plan.macros, arrays, options, call.blocks, counter.pointer, at, multiprocessors)
    threads, shared = plan.kernel.threads(plan.macros), plan.shared_bytes
    places, maps = sm90.PLACES, sm90.maps(plan.macros)
    queue(kernel_of(plan, device), grid, threads, shared, stream, plan.kernel.takes, values, places, maps)
    if repair:
        _launch_params(configured("simt", call), call, arrays, options, stream, redo=at)


def _launch_params(
    plan: Plan, call: Call, arrays: Mapping[str, View], options: Mapping[str, Any], stream: int, redo: int
) -> None:
    """Queue simt.cu or mma.cu."""
    (b, h, n_q, _), device = arrays["query"].shape, arrays["query"].device
    values = {"p": params(plan, call, arrays, options, redo)}
    sequences = arrays["cu_q"].shape[0] - 1 if "cu_q" in arrays else 0
    rows, threads = plan.kernel.block_rows(plan.macros), plan.kernel.threads(plan.macros)
    tiles = n_q // rows + sequences if plan.impl == "mma" and sequences else -(-n_q // rows) + sequences
    grid = min(tiles * h * b, attribute(device, "MultiProcessorCount")) if redo else tiles * h * b
    queue(kernel_of(plan, device), grid, threads, plan.shared_bytes, stream, plan.kernel.takes, values, PLACES)


def _launch_split(
    plan: Plan, call: Call, like: Any, arrays: Mapping[str, View], options: Mapping[str, Any], stream: int
) -> None:
    """Queue decode.cu: the parts of the keys, and their merge."""
    (b, h, n_q, _), device, m = arrays["query"].shape, arrays["query"].device, plan.macros
    split = split_of(call)
    parts = b * (h // call.group) * split.units
    rows, width = call.group * n_q, m["WIDTH_V"]
    _, kept = empty(like, (parts * rows * (width + 2),), "float32")
    multiprocessors = attribute(device, "MultiProcessorCount")
    stats, grid = kept.pointer + 4 * parts * rows * width, min(parts, multiprocessors)
    takes = plan.kernel.takes
    cut = {"first_key": split.first_key, "keys": split.keys, "unit": split.unit, "units": split.units, "workers": grid}
    values = {
        "p": params(plan, call, arrays, options, 0),
        "s": {"parts": kept.pointer, "stats": stats, **cut},
    }
    if parts:
        queue(kernel_of(plan, device), grid, plan.kernel.threads(m), plan.shared_bytes, stream, takes, values)
    queue(kernel_of(plan, device, "merge", 0), b * h * n_q, 512, 0, stream, takes, values)


def _launch_latent(
    plan: Plan, call: Call, like: Any, arrays: Mapping[str, View], options: Mapping[str, Any], stream: int
) -> None:
    """Queue latent.cu: the kernel, the merge where keys are cut into parts, the repair where keys are hidden."""
    (b, h, n_q, _), device, m = arrays["query"].shape, arrays["query"].device, plan.macros
    multiprocessors = attribute(device, "MultiProcessorCount")
    grid, values = latent.arguments(m, arrays, options, multiprocessors)
    rows, splits = b * h * n_q, values["shape"]["splits"]
    hidden = m["RIGHT"] or m["LEFT"]
    redo = zeros(like, device, stream, max(16, 1 << (rows - 1).bit_length()), "redo").pointer if hidden else 0
    parts = {"out": 0, "stats": 0}
    if splits > 1:
        size = splits * rows * latent.WIDEST_V
        _, kept = empty(like, (size + 2 * splits * rows,), "float32")
        parts = {"out": kept.pointer, "stats": kept.pointer + 4 * size}
    values |= {"redo": redo, "parts": parts, "inputs": latent.inputs(arrays)}

    def start(entry: str, grid: int, threads: int, bytes_: int, maps: Maps = MappingProxyType({})) -> None:
        takes = arguments_of(latent.FILE, entry)
        given = {n: values[n] for n in takes.parameters.members}
        places = {to: n for to, n in (latent.PLACES | latent.REPAIRED).items() if to in takes.places}
        queue(kernel_of(plan, device, entry, bytes_), grid, threads, bytes_, stream, takes, given, places, maps)

    maps = latent.maps(m, call.group, n_q)
    start(plan.kernel.entry, grid, plan.kernel.threads(m), plan.shared_bytes, maps)
    if splits > 1:
        start("merge", rows, 128, 0)
    if hidden:
        start("repair", min(multiprocessors, -(-rows // 1024)), 256, 0)


def params(plan: Plan, call: Call, arrays: Mapping[str, View], options: Mapping[str, Any], redo: int) -> dict[str, Any]:
    """Return struct Params of params.cuh."""
    arrays = dict(arrays)
    if plan.impl == "mma" and plan.macros["BLOCKS"] == 1:
        arrays["blocks"] = arrays["block_bits"]
    if call.tiles:
        arrays["allowed"] = arrays["bits"]
    spread = {n: arrays[n].spread() if n in arrays else (0,) * 4 for n in ("bias", "allowed", "blocks")}
    return {
        **{to: arrays[n].pointer if n in arrays else 0 for to, n in POINTERS.items()},
        "redo": redo,
        **_along("q", "bhn", arrays["query"].strides),
        **_along("k", "bhn", arrays["key"].strides),
        **_along("v", "bhn", arrays["value"].strides),
        **_along("o", "bhn", arrays["out"].strides),
        **_along("lse", "bh", arrays["lse"].strides),
        **_along("bias", "bhqk", spread["bias"]),
        **_along("mask", "bhq", spread["allowed"]),
        **_along("blocks", "bhq", spread["blocks"]),
        **sizes_and_options(call, arrays, options),
    }


def sizes_and_options(call: Call, arrays: Mapping[str, View], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what struct Params has forward and backward: the scale and softcap, lengths, masks and blocks."""
    (b, h, n_q, d_k), (_, h_kv, n_k, d_v) = arrays["query"].shape, arrays["value"].shape
    left, right = (-1 if w is None else min(w, 2**31 - 1) for w in options["window"] or (None, None))
    block_q, block_k = call.blocks or (1, 1)
    return {
        **{"scale": options["scale"], "softcap": options["softcap"] or 0.0},
        **{"b": b, "h": h, "h_kv": h_kv, "n_q": n_q, "n_k": n_k, "d_k": d_k, "d_v": d_v},
        **{"causal": CAUSAL[options["causal"]], "left": left, "right": right, "block_q": block_q, "block_k": block_k},
        "sequences": arrays["cu_q"].shape[0] - 1 if "cu_q" in arrays else 0,
    }


def _along(name: str, axes: str, strides: Sequence[int]) -> dict[str, int]:
    """Return strides by their members' names, e.g. q_b."""
    return {f"{name}_{a}": s for a, s in zip(axes, strides, strict=False)}


def pack(allowed: View, n_k: int, like: Any, stream: int) -> View:
    """Return a boolean mask as bits: key j of a row is bit j % 32 of its word j / 32."""
    b, h, n_q, _ = allowed.shape
    _, found = empty(like, (b, h, n_q, -(-n_k // 32)), "int32")
    size = math.prod(found.shape)
    if size:
        values = {
            **{"mask": allowed.pointer, "out": found.pointer, "b": b, "h": h, "n_q": n_q, "n_k": n_k},
            **_along("mask", "bhqk", allowed.spread()),
        }
        kernel = compiled(text_of("pack.cu", {}), "pack", 0, simt.target(capability(allowed.device)), allowed.device)
        grid = min(-(-size // 8), 16 * attribute(allowed.device, "MultiProcessorCount"))
        queue(kernel, grid, 256, 0, stream, arguments_of("pack.cu", "pack"), {"p": values})
    return found


def queue(
    kernel: tuple[int, Any],
    grid: int,
    threads: int,
    shared: int,
    stream: int,
    takes: Arguments,
    values: Mapping[str, Any],
    places: Mapping[str, str] = MappingProxyType({}),
    maps: Maps = MappingProxyType({}),
) -> None:
    """Launch a kernel with its arguments by name; the driver copies them. places, maps: see ``recorded.Launch``."""
    made = Launch(kernel, grid, threads, shared, stream, takes, takes.pack(**values), places, maps)
    made.queue({})
    note(made)


@lru_cache(maxsize=1024)
def kernel_of(plan: Plan, device: int, entry: str = "", shared: int | None = None) -> tuple[int, Any]:
    """Return a plan's compiled kernel, or another one of its text."""
    kernel = plan.kernel
    target = kernel.target(capability(device))
    shared = plan.shared_bytes if shared is None else shared
    return compiled(kernel.source(plan.macros), entry or kernel.entry, shared, target, device)


@lru_cache(maxsize=64)
def capability(device: int) -> tuple[int, int]:
    """Return a GPU's compute capability."""
    text = str(library("cupy").cuda.Device(device).compute_capability)
    return int(text[:-1]), int(text[-1])


@lru_cache(maxsize=64)
def attribute(device: int, name: str) -> int:
    """Return an attribute of a GPU."""
    return int(library("cupy").cuda.Device(device).attributes[name])


@dataclass(frozen=True)
class _Handle:
    """CUDA's stream protocol for a handle."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class _Thread(threading.local):
    """A thread's own zeros: another one may queue kernels between those of a call, on the same stream."""

    def __init__(self) -> None:
        self.zeros: dict[tuple[int, int, int, str], View] = {}


_THREAD = _Thread()
_CAPTURED: list[View] = []
"""Zeros of CUDA graphs in CuPy's memory, which keeps none for a graph."""


def zeros(like: Any, device: int, stream: int, size: int, what: str) -> View:
    """Return zeros that every call leaves zeros: a thread's own for a stream; a CUDA graph's own, as two may run."""
    if capturing(stream):
        _, found = empty(like, (size // 4,), "int32")
        library("cupy").cuda.runtime.memsetAsync(found.pointer, 0, size, stream)
        if kind_of(like) != "torch":
            _CAPTURED.append(found)
        return found
    key = (device, stream, size, what)
    if key not in _THREAD.zeros:
        cuda = library("cupy").cuda
        with cuda.Stream.from_external(_Handle(stream)) if stream else cuda.Stream.null:
            _THREAD.zeros[key] = view(library("cupy").zeros(size // 4, np.int32), what)
    return _THREAD.zeros[key]
