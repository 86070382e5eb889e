"""Launches: the arguments of simt.cu and mma.cu, the queue's counters, the bit masks, the repair of marked tiles."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from . import mma, simt, sm90
from .build import compiled, text_of
from .plan import Call, Plan, configured
from .views import View, empty, library

__all__ = ["launch", "pack"]

MODULES = {"simt": simt, "mma": mma, "sm90": sm90}
POINTERS = ("query", "key", "value", "out", "lse", "bias", "sink", "allowed", "blocks", "cu_q", "cu_k")
PARAMS = struct.Struct("@12Q24q2d13i4x")  # params.cuh
CAUSAL = {None: 0, "top_left": 1, "bottom_right": 2}
PACK = struct.Struct("@2Q4q4i")


def launch(
    plan: Plan, call: Call, like: Any, arrays: Mapping[str, View], scale: float, options: Mapping[str, Any]
) -> None:
    """Launch a kernel on the current device and stream of CuPy; nothing is waited for.

    Parameters
    ----------
    plan : Plan
        The kernel.
    call : Call
        What it is planned for.
    like : array
        What is allocated comes from its library.
    arrays : mapping of str to View
        Those of ``POINTERS`` that are there; allowed as ``pack`` leaves it.
    scale : float
        Multiplies the scores.
    options : mapping
        causal, window, softcap.
    """
    device = arrays["query"].device
    if plan.macros["BLOCKS"] == 1 and plan.impl != "simt":
        arrays = {**arrays, "block_bits": pack(arrays["blocks"], arrays["blocks"].shape[3], like)}
    if plan.impl != "sm90":
        _launch_params(plan, arrays, scale, call.blocks, options, redo=0)
        return
    stream = library("cupy").cuda.get_current_stream().ptr
    repair = call.causal is not None
    tiles = arrays["query"].shape[0] * arrays["query"].shape[1] * -(-arrays["query"].shape[2] // 64)
    redo = _zeros(device, stream, 1 << (tiles - 1).bit_length() if repair else 1, "redo")
    counter = _zeros(device, stream, 4, "counter")
    grid, given = sm90.arguments(
        plan.macros, arrays, scale, call.blocks, counter, redo, _attribute(device, "MultiProcessorCount")
    )
    _kernel(plan, device)((grid,), (sm90.threads(plan.macros),), given, shared_mem=plan.shared_bytes)
    if repair:
        _launch_params(configured("simt", call), arrays, scale, call.blocks, options, redo=redo)


def _launch_params(
    plan: Plan, arrays: Mapping[str, View], scale: float, blocks: Any, options: Mapping[str, Any], redo: int
) -> None:
    """Launch simt.cu or mma.cu."""
    module = MODULES[plan.impl]
    q, k, v, out, lse = (arrays[n] for n in ("query", "key", "value", "out", "lse"))
    (b, h, n_q, d_k), (_, h_kv, n_k, _), d_v = q.shape, k.shape, v.shape[3]
    names = [*POINTERS]
    if plan.impl == "mma" and plan.macros["BLOCKS"] == 1:
        names[names.index("blocks")] = "block_bits"
    bias, allowed, table = (arrays[n].spread() if n in arrays else (0,) * 4 for n in (names[5], *names[7:9]))
    sequences = arrays["cu_q"].shape[0] - 1 if "cu_q" in arrays else 0
    left, right = (-1 if w is None else min(w, 2**31 - 1) for w in options["window"] or (None, None))
    packed = PARAMS.pack(
        *(arrays[n].pointer if n in arrays else 0 for n in names),
        redo,
        *(s for x in (q, k, v, out) for s in x.strides[:3]),
        *lse.strides[:2],
        *bias,
        *allowed[:3],
        *table[:3],
        scale,
        options["softcap"] or 0.0,
        *(b, h, h_kv, n_q, n_k, d_k, d_v, CAUSAL[options["causal"]], left, right),
        *(blocks or (1, 1)),
        sequences,
    )
    rows = module.block_rows(plan.macros)
    tiles = n_q // rows + sequences if plan.impl == "mma" and sequences else -(-n_q // rows) + sequences
    argument = np.frombuffer(packed, f"V{PARAMS.size}")  # one element of void type: CuPy passes it by value
    _kernel(plan, q.device)((tiles * h * b,), (module.threads(plan.macros),), (argument,), shared_mem=plan.shared_bytes)


def pack(allowed: View, n_k: int, like: Any) -> View:
    """Return a boolean mask as bits: key j of a row is bit j % 32 of its word j / 32."""
    b, h, n_q, _ = allowed.shape
    _, found = empty(like, (b, h, n_q, -(-n_k // 32)), "int32")
    size = math.prod(found.shape)
    if size:
        argument = PACK.pack(allowed.pointer, found.pointer, *allowed.spread(), b, h, n_q, n_k)
        kernel = compiled(text_of("pack.cu", {}), "pack", 0, simt.target(capability(allowed.device)), allowed.device)
        grid = min(-(-size // 8), 16 * _attribute(allowed.device, "MultiProcessorCount"))
        kernel((grid,), (256,), (np.frombuffer(argument, f"V{PACK.size}"),))
    return found


@lru_cache(maxsize=1024)
def _kernel(plan: Plan, device: int) -> Any:
    """Return a plan's compiled kernel."""
    module = MODULES[plan.impl]
    entry = "attention_forward" if plan.impl == "sm90" else "attention"
    text = sm90.source(plan.macros) if plan.impl == "sm90" else text_of(module.FILE, plan.macros)
    return compiled(text, entry, plan.shared_bytes, module.target(capability(device)), device)


@lru_cache(maxsize=64)
def capability(device: int) -> tuple[int, int]:
    """Return a GPU's compute capability."""
    text = str(library("cupy").cuda.Device(device).compute_capability)
    return int(text[:-1]), int(text[-1])


@lru_cache(maxsize=64)
def _attribute(device: int, name: str) -> int:
    return int(library("cupy").cuda.Device(device).attributes[name])


_ZEROS: dict[tuple[int, int, int, str], Any] = {}


def _zeros(device: int, stream: int, size: int, what: str) -> int:
    """Return the address of zeros that every launch leaves zeros; a stream has its own, kept for CUDA graphs."""
    key = (device, stream, size, what)
    found = _ZEROS.get(key)
    if found is None:
        found = _ZEROS[key] = library("cupy").zeros(size, np.uint8)
    return int(found.data.ptr)
