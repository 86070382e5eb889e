"""Launches of the backward pass: arguments, what is allocated in between, and the order of the kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..arrays import kind_of
from . import sm90_backward as hopper
from .arguments import arguments_of
from .backward_kernels import SIMT, hopper_plan, pass_of, support
from .build import compiled
from .kernel import Call, Kernel, Plan
from .launch import attribute, capability, kernel_of, pack, queue, sizes_and_options, zeros
from .views import View, empty

__all__ = ["launch"]

SAME = ("out", "dout", "dq", "dk", "dv", "lse", "dlse", "delta", "bias", "dbias", "blocks")
ARRAYS = {"q": "query", "k": "key", "v": "value", "mask": "allowed", **{n: n for n in SAME}}
"""Arrays by what struct Params of backward.cuh calls them."""
GRANULE = 16
"""Rows (or keys) that share an interval of keys (or rows) and a mark."""


@dataclass(frozen=True)
class _Work:
    """What the launches of one call share."""

    call: Call
    arrays: dict[str, View]
    options: Mapping[str, Any]
    stream: int
    ranges: Mapping[str, int]

    @property
    def device(self) -> int:
        return self.arrays["query"].device

    def params(self, redo: int = 0, parts: int = 0, splits: int = 1) -> dict[str, Any]:
        """Return the kernels' struct Params."""
        a = self.arrays
        return {
            **{to: (a[n].pointer, *(*a[n].spread(), 1)[:4]) if n in a else (0,) * 5 for to, n in ARRAYS.items()},
            **{n: a[n].pointer if n in a else 0 for n in ("sink", "dsink", "cu_q", "cu_k")},
            **self.ranges,
            **{"redo": redo, "parts": parts, "splits": splits},
            **sizes_and_options(self.call, a, self.options),
        }

    def support(self, entry: str, grid: int, threads: int, **more: int) -> None:
        """Queue a kernel of backward.cu."""
        sink = self.arrays["dsink"].dtype if "dsink" in self.arrays else None
        text = support(self.call.dtype, self.call.bias, sink)
        kernel = compiled(text, entry, 0, SIMT.target(capability(self.device)), self.device)
        if grid:
            takes = arguments_of("backward.cu", entry)
            queue(kernel, grid, threads, 0, self.stream, takes, {"p": self.params(**more)})

    def run(self, plan: Plan, grid: int, **more: int) -> None:
        """Queue one pass."""
        if grid:
            threads = plan.kernel.threads(plan.macros)
            kernel = kernel_of(plan, self.device)
            values = {"p": self.params(**more)}
            queue(kernel, grid, threads, plan.shared_bytes, self.stream, plan.kernel.takes, values)


def launch(
    call: Call, kernel: Kernel, like: Any, found: dict[str, Any], arrays: dict[str, View], options: Mapping[str, Any],
    stream: int, deterministic: bool,
) -> list[View]:  # fmt: skip
    """Queue the kernels of a backward pass on a stream of the current device; nothing is waited for.

    Parameters
    ----------
    call : Call
        What is computed.
    kernel : Kernel
        Out of ``backward_kernels.KERNELS``.
    like : array
        What is allocated comes from its library.
    found : dict of str to array
        The gradients that are wanted, to be filled; one that comes with another is added.
    arrays : dict of str to View
        The inputs, and the places of `found`.
    options : mapping
        scale (a number), causal, window, softcap.
    stream : int
        The stream's handle.
    deterministic : bool
        Whether sums have one order.

    Returns
    -------
    list of View
        What was allocated in between.
    """
    q, k = arrays["query"], arrays["key"]
    (b, h, n_q, _), (_, h_kv, n_k, _) = q.shape, k.shape
    for n, other, source in (("dk", "dv", "value"), ("dv", "dk", "key")):
        if n in arrays and other not in arrays:
            found[other], arrays[other] = empty(like, arrays[source].shape, call.dtype)
    if "allowed" in arrays:
        arrays["allowed"] = pack(arrays["allowed"], call.n_k, like, stream)
    _, arrays["delta"] = empty(like, (b, h, n_q), arrays["lse"].dtype)
    granules = -(-n_q // GRANULE), -(-n_k // GRANULE)
    sizes = {"granule_keys": 4 * granules[0], "granule_rows": 2 * granules[1], "row_keys": 2 * n_q, "key_rows": 2 * n_k}
    _, ranges = empty(like, (sum(sizes.values()),), "int32")
    starts = accumulate(sizes.values(), initial=0)
    places = {n: ranges.pointer + 4 * at for n, at in zip(sizes, starts, strict=False)}
    work = _Work(call, arrays, options, stream, places)
    work.support("keys_of_rows", -(-max(n_q, n_k) // 64), 64)
    used = [arrays["delta"], ranges]
    if kernel is hopper.KERNEL:
        used += _together(work, like, found, deterministic)
    else:
        work.support("row_products", -(-b * h * n_q // 8), 256)
    if "dsink" in arrays:
        work.support("sinks", h, 256)
    if kernel is hopper.KERNEL:
        return used
    direct = "dbias" in arrays and kernel.name == "mma" and arrays["bias"].shape == (b, h, n_q, n_k)
    if direct:
        _clear(found["dbias"])
    if "dq" not in arrays and direct:
        found["dq"], arrays["dq"] = empty(like, q.shape, call.dtype)
    if "dq" in arrays:
        _owned(work, like, kernel, 0, n_q, h, direct)
    if "dk" in arrays:
        _owned(work, like, kernel, 1, n_k, h_kv, False)
    if "dbias" in arrays and not direct:
        used.append(_bias(work, like))
    return used


def _owned(work: _Work, like: Any, kernel: Kernel, which: int, n: int, heads: int, dbias: bool) -> None:
    """Queue the pass of dq, or that of dk and dv, and the repair of what met a hidden NaN."""
    c, b = work.call, work.arrays["query"].shape[0]
    plan = pass_of(kernel, c, which, dbias)
    partial = c.causal or c.window or c.allowed or c.bias or c.blocks or c.packed
    redo = _marks(work, like, b * heads, n, f"redo {which}") if kernel is not SIMT and partial else None
    work.run(plan, -(-n // _rows(plan, which)) * heads * b, redo=redo.pointer if redo else 0)
    if redo:
        _repair(work, which, n, heads, redo)


def _marks(work: _Work, like: Any, heads: int, n: int, what: str) -> View | None:
    """Return a mark for each granule of rows or keys of each head."""
    count = heads * -(-n // GRANULE)
    return zeros(like, work.device, work.stream, max(16, 1 << (count - 1).bit_length()), what) if count else None


def _repair(work: _Work, which: int, n: int, heads: int, redo: View) -> None:
    """Queue what computes marked tiles of a pass anew: few blocks, as most often nothing is marked."""
    plan = pass_of(SIMT, work.call, which)
    tiles = -(-n // _rows(plan, which)) * heads * work.arrays["query"].shape[0]
    work.run(plan, min(tiles, attribute(work.device, "MultiProcessorCount")), redo=redo.pointer)


def _together(work: _Work, like: Any, found: dict[str, Any], deterministic: bool) -> list[View]:
    """Queue Hopper's kernel for dq, dk and dv, what goes before and after it, and the repairs."""
    c, a = work.call, work.arrays
    (b, h, n_q, _), (_, h_kv, n_k, _) = a["query"].shape, a["key"].shape
    plan = hopper_plan(c, deterministic)
    m, takes = plan.macros, plan.kernel.takes
    rows, halves = hopper.padded_rows(m, n_q), hopper.half_tiles(m, b * h, n_q)
    _, stats = empty(like, (2 * b * h * rows,), "float32")
    _, sums = empty(like, (hopper.half_bytes(m) // 4 * halves,), "float32")
    size = 1 << (4 * halves - 1).bit_length()
    turns = zeros(like, work.device, work.stream, size, "turns") if deterministic else None
    partial = c.causal or c.window or c.packed or n_k % m["BLOCK_N"]
    passes = ((n_q, h, True), (n_k, h_kv, "dk" in a))
    # a pass that is not wanted marks nothing: nobody would unmark it
    marks = [
        _marks(work, like, b * heads, n, f"redo {i}") if partial and on else None
        for i, (n, heads, on) in enumerate(passes)
    ]
    if "dq" not in a:
        found["dq"], a["dq"] = empty(like, a["query"].shape, c.dtype)
    places = {"stats": stats.pointer, "sums": sums.pointer, "turns": turns.pointer if turns else 0, "rows": rows}
    places["together"] = hopper.together(m, a)
    redo = {n: x.pointer if x else 0 for n, x in zip(("redo_rows", "redo_keys"), marks, strict=True)}
    values = {"p": work.params(), "z": places | redo}
    most = 8 * attribute(work.device, "MultiProcessorCount")
    small = arguments_of(plan.kernel.file, "statistics")
    queue(kernel_of(plan, work.device, "statistics", 0), min(most, 16 * halves), 256, 0, work.stream, small, values)
    grid = -(-n_k // m["BLOCK_N"]) * h_kv * b
    everything = values | hopper.maps(m, a)
    queue(kernel_of(plan, work.device), grid, 384, plan.shared_bytes, work.stream, takes, everything)
    queue(kernel_of(plan, work.device, "convert", 0), halves, 128, 0, work.stream, small, values)
    for which, ((n, heads, _), marked) in enumerate(zip(passes, marks, strict=True)):
        if marked:
            _repair(work, which, n, heads, marked)
    return [stats, sums]


def _rows(plan: Plan, which: int) -> int:
    """Return the rows, or keys, that a block of a pass owns."""
    return (
        plan.kernel.block_rows(plan.macros)
        if plan.kernel is not SIMT
        else plan.macros["BLOCK_N" if which else "BLOCK_M"]
    )


def _bias(work: _Work, like: Any) -> View:
    """Queue the gradient of a bias, in as many parts as fill the GPU, and their sum."""
    plan = pass_of(SIMT, work.call, 2)
    to, m = work.arrays["dbias"], plan.macros
    full = (*work.arrays["query"].shape[:3], work.arrays["key"].shape[2])
    blocks = [-(-n // size) for n, size in zip(full, (1, 1, m["BLOCK_M"], m["BLOCK_N"]), strict=True)]
    tiles = math.prod(n for n, own in zip(blocks, to.shape, strict=True) if own > 1)
    each = math.prod(n for n, own in zip(blocks, to.shape, strict=True) if own == 1)
    splits = max(1, min(each, -(-2 * attribute(work.device, "MultiProcessorCount") // max(tiles, 1))))
    _, parts = empty(like, (splits * math.prod(to.shape),), work.arrays["lse"].dtype)
    work.run(plan, tiles * splits, parts=parts.pointer, splits=splits)
    work.support("add_parts", min(-(-math.prod(to.shape) // 256), 4096), 256, parts=parts.pointer, splits=splits)
    return parts


def _clear(x: Any) -> None:
    if kind_of(x) == "torch":
        x.zero_()
    else:
        x.fill(0)
