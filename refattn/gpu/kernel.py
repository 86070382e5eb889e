"""A call's properties, a kernel's record, and a plan: what the choice of a kernel and its launch go by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..arrays import dtype_name
from ..errors import UnsupportedProblem
from ..problem import Problem
from .arguments import Arguments, arguments_of

__all__ = ["ACCURACIES", "Call", "Kernel", "Plan"]

ACCURACIES = ("fast", "high")
"""P rounded to the input's type, or kept in two parts of it: then the error is the output's own rounding."""
FURTHER = frozenset({"d_k_zero", "negative_window", "lengths_q", "lengths_k", "offset", "alignment"})
FURTHER |= {"paged_nhd", "paged_hnd", "appending", "rotary_half", "rotary_interleaved", "alibi_slopes"}
FURTHER |= {"dropout_mask", "dropout_bits", "philox_flash", "philox_efficient", "query_norm", "key_norm"}
"""What a Problem can ask for and no kernel here takes."""


@dataclass(frozen=True)
class Call:
    """All that the choice of a kernel depends on.

    Attributes
    ----------
    dtype : str
        The arrays' format.
    n_q, n_k, d_k, d_v, group : int
        Lengths, head dims, and query heads of a key head.
    causal, window, softcap, sink, bias, allowed, packed
        Whether an option is in use; causal, window and bias (its format) as they are given.
    blocks : (block_q, block_k) or None
        Rows and keys of a block of the block mask.
    tiles : bool
        Whether blocks have bits, by which they are seen in part.
    positive_scale, aligned, mapped : bool
        Whether the scale is above 0; whether all rows begin at multiples of 16 bytes; whether tensor maps can describe
        the arrays (strides above 0, too).
    accuracy : str
        Out of ``ACCURACIES``.
    batch_invariant : bool
        Whether a row has the same bits whatever else is in the call.
    shared : bool
        Whether values are the first columns of keys in memory.
    """

    dtype: str
    n_q: int
    n_k: int
    d_k: int
    d_v: int
    group: int
    causal: str | None
    window: tuple[int | None, int | None] | None
    softcap: bool
    sink: bool
    bias: str | None
    allowed: bool
    packed: bool
    blocks: tuple[int, int] | None
    positive_scale: bool
    aligned: bool
    mapped: bool
    accuracy: str
    batch_invariant: bool = False
    tiles: bool = False
    shared: bool = False

    @classmethod
    def of(
        cls,
        p: Problem,
        accuracy: str,
        blocks: tuple[int, int] | None,
        *,
        packed: bool = False,
        tiles: bool = False,
        aligned: bool = True,
        mapped: bool = True,
    ) -> Call:
        """Return what a problem asks for; `packed` where its cu_seqlens are kept apart."""
        if p.variant != "softmax":
            raise UnsupportedProblem(f"gpu: computes variant 'softmax', got {p.variant!r}")
        if further := sorted(p.features() & FURTHER) + ["types or scales"] * p.typed:
            raise UnsupportedProblem(f"gpu: has no {', '.join(further)}; refattn.evaluate computes them")
        return cls(
            dtype=p.dtype,
            n_q=p.n_q,
            n_k=p.n_k,
            d_k=p.d_k,
            d_v=p.d_v,
            group=p.heads // p.heads_kv,
            causal=p.causal,
            window=None if p.window == (None, None) else p.window,
            softcap=p.softcap is not None,
            sink=p.sink is not None,
            bias=None if p.bias is None else dtype_name(p.bias),
            allowed=p.allowed is not None,
            packed=packed or p.cu_seqlens_q is not None,
            blocks=blocks,
            positive_scale=p.scale is None or p.scale > 0,
            aligned=aligned,
            mapped=mapped,
            accuracy=accuracy,
            tiles=tiles,
        )


@dataclass(frozen=True)
class Kernel:
    """A kernel: what it takes, how it is compiled, and the size of its blocks.

    Attributes
    ----------
    name : str
        What ``impl=`` calls it.
    file, entry : str
        The CUDA file that defines it, and the function's name there.
    obstacle : callable
        Takes a call and a compute capability; returns why it cannot be computed, "" where it can.
    why : callable
        Takes a call; returns what the kernel is for.
    macros : callable
        Takes a call; returns what the kernel is compiled with.
    source : callable
        Takes the macros; returns the whole text.
    block_rows, threads, shared_bytes : callable
        Take the macros; return the query rows, the threads and the dynamic shared memory (bytes) of a block.
    target : callable
        Takes a compute capability; returns the architecture to compile for.
    least_keys : int
        The fewest keys for which it is chosen unasked.
    """

    name: str
    file: str
    entry: str
    obstacle: Callable[[Call, tuple[int, int]], str]
    why: Callable[[Call], str]
    macros: Callable[[Call], dict[str, Any]]
    source: Callable[[Mapping[str, Any]], str]
    block_rows: Callable[[Mapping[str, Any]], int]
    threads: Callable[[Mapping[str, Any]], int]
    shared_bytes: Callable[[Mapping[str, Any]], int]
    target: Callable[[tuple[int, int]], str]
    least_keys: int = 0

    @property
    def takes(self) -> Arguments:
        """The arguments, as its file declares them."""
        return arguments_of(self.file, self.entry)


@dataclass(frozen=True, eq=False)
class Plan:
    """What will run.

    Attributes
    ----------
    kernel : Kernel
        The kernel.
    why : str
        Why this kernel, and what is in the way of those before it.
    macros : mapping
        What it is compiled with.
    shared_bytes : int
        The dynamic shared memory of a block.
    """

    kernel: Kernel
    why: str
    macros: Mapping[str, Any]
    shared_bytes: int

    @property
    def impl(self) -> str:
        """The kernel's name, out of ``refattn.gpu.IMPLS``."""
        return self.kernel.name
