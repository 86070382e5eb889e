"""Which kernel computes a call, and why: decided from shapes, types and the GPU's capability, before any launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from ..arrays import dtype_name, kind_of
from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from ..problem import Problem
from . import mma, simt, sm90

__all__ = ["ACCURACIES", "IMPLS", "MODULES", "Call", "Plan", "check_block_mask", "choose", "configured", "plan"]

MODULES = {"sm90": sm90, "mma": mma, "simt": simt}
IMPLS = tuple(MODULES)
"""The kernels, in the order in which they are tried: Hopper's wgmma, mma.sync, the CUDA cores."""
ACCURACIES = ("fast", "high")
"""P rounded to the input's type, or kept in two parts of it: then the error is the output's own rounding."""


@dataclass(frozen=True)
class Call:
    """All that the choice of a kernel depends on.

    Attributes
    ----------
    dtype : str
        The arrays' format.
    n_q, n_k, d_k, d_v : int
        Lengths and head dims.
    causal, window, softcap, sink, bias, allowed, packed
        Whether an option is in use; causal, window and bias (its format) as they are given.
    blocks : (block_q, block_k) or None
        Rows and keys of a block of the block mask.
    positive_scale, aligned, mapped : bool
        Whether the scale is above 0; whether all rows begin at multiples of 16 bytes; whether tensor maps can describe
        the arrays (strides above 0, too).
    accuracy : str
        Out of ``ACCURACIES``.
    """

    dtype: str
    n_q: int
    n_k: int
    d_k: int
    d_v: int
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

    @classmethod
    def of(
        cls,
        p: Problem,
        accuracy: str,
        blocks: tuple[int, int] | None,
        *,
        packed: bool = False,
        aligned: bool = True,
        mapped: bool = True,
    ) -> Call:
        """Return what a problem asks for; `packed` where its cu_seqlens are kept apart."""
        if p.variant != "softmax":
            raise UnsupportedProblem(f"gpu: computes variant 'softmax', got {p.variant!r}")
        return cls(
            dtype=p.dtype,
            n_q=p.n_q,
            n_k=p.n_k,
            d_k=p.d_k,
            d_v=p.d_v,
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
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """What will run.

    Attributes
    ----------
    impl : str
        Out of ``IMPLS``.
    why : str
        Why this kernel, and what is in the way of those before it.
    macros : mapping
        What it is compiled with.
    shared_bytes : int
        The dynamic shared memory of a block.
    """

    impl: str
    why: str
    macros: Mapping[str, Any]
    shared_bytes: int


def plan(
    problem: Problem,
    *,
    block_mask: Any = None,
    accuracy: str = "fast",
    impl: str | None = None,
    capability: tuple[int, int] = (9, 0),
) -> Plan:
    """Return which kernel computes a call, and why.

    Parameters
    ----------
    problem : Problem
        Of any library; only its shapes, types and options count, and it need not be on a GPU.
    block_mask, accuracy, impl
        As in :func:`refattn.gpu.attention`.
    capability : tuple of two int
        The GPU's compute capability.

    Raises
    ------
    InvalidInput
        An unknown accuracy or kernel.
    UnsupportedProblem
        No kernel computes it; the text says what is in the way.
    """
    blocks = None if block_mask is None else check_block_mask(problem, block_mask)
    return choose(Call.of(problem, accuracy, blocks), impl, capability)


@lru_cache(maxsize=4096)
def choose(call: Call, impl: str | None, capability: tuple[int, int]) -> Plan:
    """Return the plan for a call: the kernel that was asked for, or the first that computes it."""
    if call.accuracy not in ACCURACIES:
        raise InvalidInput(f"accuracy: got {call.accuracy!r}, expected one of {', '.join(ACCURACIES)}")
    if impl is not None and impl not in IMPLS:
        raise InvalidInput(f"impl: got {impl!r}, expected one of {', '.join(IMPLS)}")
    obstacles: list[str] = []
    for name in (impl,) if impl else IMPLS:
        obstacle = MODULES[name].obstacle(call, capability)
        if not obstacle:
            return configured(name, call, tuple(obstacles))
        obstacles.append(f"the kernel {name} {obstacle}")
    raise UnsupportedProblem(f"gpu: {'; '.join(obstacles)}")


@lru_cache(maxsize=4096)
def configured(impl: str, call: Call, obstacles: tuple[str, ...] = ()) -> Plan:
    """Return the plan of a kernel that computes a call."""
    module = MODULES[impl]
    macros = module.macros(call)
    why = "; ".join((module.why(call), *obstacles))
    return Plan(impl, why, MappingProxyType(macros), module.shared_bytes(macros))


def check_block_mask(p: Problem, mask: Any) -> tuple[int, int]:
    """Return the rows and keys of a block; refuse a block mask that does not fit the problem.

    Raises
    ------
    InvalidProblem
        No triple of an array and two sizes, another library or type, or a shape that does not fit.
    """
    try:
        blocks, *sizes = mask
        block_q, block_k = (int(n) for n in sizes)
    except (TypeError, ValueError) as e:
        raise InvalidProblem("block_mask: expected (blocks, block_q, block_k)") from e
    if kind_of(blocks) != p.kind:
        raise InvalidProblem(f"block_mask: is of {kind_of(blocks)} and query of {p.kind}; pass arrays of one library")
    if dtype_name(blocks) != "bool":
        raise InvalidProblem(f"block_mask: got dtype {dtype_name(blocks)}, expected bool")
    if min(block_q, block_k) < 1:
        raise InvalidProblem(f"block_mask: got blocks of {block_q} rows and {block_k} keys, expected at least 1")
    full = (p.batch, p.heads, -(-p.n_q // block_q), -(-p.n_k // block_k))
    shape = tuple(blocks.shape)
    if len(shape) != 4 or shape[2:] != full[2:] or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
        raise InvalidProblem(f"block_mask: got shape {shape}, expected {full}, or 1 in place of its first two axes")
    return block_q, block_k
