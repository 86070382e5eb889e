"""Launches of the backward pass: arguments, what is allocated in between, and the order of the kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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

__all__ = ["launch", "prepare"]

SAME = ("out", "dout", "dq", "dk", "dv", "lse", "dlse", "delta", "bias", "dbias", "blocks")
ARRAYS = {"q": "query", "k": "key", "v": "value", "mask": "allowed", **{n: n for n in SAME}}
"""Arrays by what struct Params of backward.cuh calls them."""
RANGES = ("granule_keys", "granule_rows", "row_keys", "key_rows")
"""Which keys rows see, and which rows see keys: see struct Params."""
SINGLE = ("sink", "dsink", "cu_q", "cu_k")
PLACES = {f"p.{to}.data": n for to, n in ARRAYS.items()} | {f"p.{n}": n for n in (*SINGLE, *RANGES)}
"""By argument, the array whose address it is."""
SUMS = PLACES | {"z.stats": "stats", "z.sums": "sums"}
GRANULE = 16
"""Rows (or keys) that share an interval of keys (or rows) and a mark."""


@dataclass(frozen=True)
class _Work:
    """What the launches of one call share."""

    call: Call
    arrays: dict[str, View]
    options: Mapping[str, Any]
    stream: int

    @property
    def device(self) -> int:
        return self.arrays["query"].device

    def params(self, redo: int = 0, parts: int = 0, splits: int = 1) -> dict[str, Any]:
        """Return the kernels' struct Params."""
        a = self.arrays
        return {
            **{to: (a[n].pointer, *(*a[n].spread(), 1)[:4]) if n in a else (0,) * 5 for to, n in ARRAYS.items()},
            **{n: a[n].pointer if n in a else 0 for n in (*SINGLE, *RANGES)},
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
            queue(kernel, grid, threads, 0, self.stream, takes, {"p": self.params(**more)}, PLACES)

    def run(self, plan: Plan, grid: int, **more: int) -> None:
        """Queue one pass."""
        if grid:
            threads = plan.kernel.threads(plan.macros)
            kernel = kernel_of(plan, self.device)
            values = {"p": self.params(**more)}
            queue(kernel, grid, threads, plan.shared_bytes, self.stream, plan.kernel.takes, values, PLACES)


def prepare(
    call: Call, kernel: Kernel, like: Any, found: dict[str, Any], arrays: dict[str, View], deterministic: bool
) -> list[View]:
    """Allocate what a backward pass needs in between, and gradients that come with those that are wanted.

    Parameters
    ----------
    call, kernel, like, found, arrays, deterministic
        As in `launch`; what is allocated is added to `arrays`, gradients to `found`, too.

    Returns
    -------
    list of View
        What was allocated in between.
    """
    q, k = arrays["query"], arrays["key"]
    (b, h, n_q, _), n_k = q.shape, k.shape[2]
    for n, other, source in (("dk", "dv", "value"), ("dv", "dk", "key")):
        if n in arrays and other not in arrays:
            found[other], arrays[other] = empty(like, arrays[source].shape, call.dtype)
    _, arrays["delta"] = empty(like, (b, h, n_q), arrays["lse"].dtype)
    sizes = 4 * -(-n_q // GRANULE), 2 * -(-n_k // GRANULE), 2 * n_q, 2 * n_k
    _, ranges = empty(like, (sum(sizes),), "int32")
    for n, at in zip(RANGES, accumulate(sizes, initial=0), strict=False):
        arrays[n] = replace(ranges, pointer=ranges.pointer + 4 * at)
    if kernel is not hopper.KERNEL:
        return [arrays["delta"], ranges]
    if "dq" not in arrays:
        found["dq"], arrays["dq"] = empty(like, q.shape, call.dtype)
    m = hopper_plan(call, deterministic).macros
    _, arrays["stats"] = empty(like, (2 * b * h * hopper.padded_rows(m, n_q),), "float32")
    _, arrays["sums"] = empty(like, (hopper.half_bytes(m) // 4 * hopper.half_tiles(m, b * h, n_q),), "float32")
    return [arrays["delta"], ranges, arrays["stats"], arrays["sums"]]


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
        The inputs, the places of `found`, and what `prepare` allocated.
    options : mapping
        scale (a number), causal, window, softcap.
    stream : int
        The stream's handle.
    deterministic : bool
        Whether sums have one order.

    Returns
    -------
    list of View
        What was allocated in between, beside what was prepared.
    """
    q, k = arrays["query"], arrays["key"]
    (b, h, n_q, _), (_, h_kv, n_k, _) = q.shape, k.shape
    if "allowed" in arrays:
        arrays["allowed"] = pack(arrays["allowed"], call.n_k, like, stream)
    work = _Work(call, arrays, options, stream)
    work.support("keys_of_rows", -(-max(n_q, n_k) // 64), 64)
    if kernel is hopper.KERNEL:
        _together(work, like, deterministic)
    else:
        work.support("row_products", -(-b * h * n_q // 8), 256)
    if "dsink" in arrays:
        work.support("sinks", h, 256)
    used: list[View] = []
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


def _together(work: _Work, like: Any, deterministic: bool) -> None:
    """Queue Hopper's kernel for dq, dk and dv, what goes before and after it, and the repairs."""
    c, a = work.call, work.arrays
    (b, h, n_q, _), (_, h_kv, n_k, _) = a["query"].shape, a["key"].shape
    plan = hopper_plan(c, deterministic)
    m, takes = plan.macros, plan.kernel.takes
    rows, halves = hopper.padded_rows(m, n_q), hopper.half_tiles(m, b * h, n_q)
    size = 1 << (4 * halves - 1).bit_length()
    turns = zeros(like, work.device, work.stream, size, "turns") if deterministic else None
    partial = c.causal or c.window or c.packed or n_k % m["BLOCK_N"]
    passes = ((n_q, h, True), (n_k, h_kv, "dk" in a))
    # a pass that is not wanted marks nothing: nobody would unmark it
    marks = [
        _marks(work, like, b * heads, n, f"redo {i}") if partial and on else None
        for i, (n, heads, on) in enumerate(passes)
    ]
    places = {"stats": a["stats"].pointer, "sums": a["sums"].pointer, "rows": rows}
    places |= {"turns": turns.pointer if turns else 0, "together": hopper.together(m, a, hopper.ends(c))}
    redo = {n: x.pointer if x else 0 for n, x in zip(("redo_rows", "redo_keys"), marks, strict=True)}
    values = {"p": work.params(), "z": places | redo}
    most = 8 * attribute(work.device, "MultiProcessorCount")
    small = arguments_of(plan.kernel.file, "statistics")
    before, after = (kernel_of(plan, work.device, entry, 0) for entry in ("statistics", "convert"))
    queue(before, min(most, 16 * halves), 256, 0, work.stream, small, values, SUMS)
    grid = -(-n_k // m["BLOCK_N"]) * h_kv * b
    maps = hopper.maps(m)
    everything = values | {to: make(a[n]) for to, (n, make) in maps.items()}
    queue(kernel_of(plan, work.device), grid, 384, plan.shared_bytes, work.stream, takes, everything, SUMS, maps)
    queue(after, halves, 128, 0, work.stream, small, values, SUMS)
    for which, ((n, heads, _), marked) in enumerate(zip(passes, marks, strict=True)):
        if marked:
            _repair(work, which, n, heads, marked)


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
