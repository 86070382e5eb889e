"""Which kernel computes a call, and why: decided from shapes, types and the GPU's capability, before any launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from ..arrays import dtype_name, kind_of
from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from ..problem import Problem
from . import decode, latent, mma, simt, sm90
from .kernel import ACCURACIES, Call, Kernel, Plan

__all__ = ["IMPLS", "KERNELS", "check_block_mask", "choose", "configured", "pick", "plan"]

KERNELS = {k.name: k for k in (decode.KERNEL, sm90.KERNEL, latent.KERNEL, mma.KERNEL, simt.KERNEL)}
IMPLS = tuple(KERNELS)
"""The kernels, as they are tried: few queries, Hopper's wgmma, its wide heads, mma.sync, the CUDA cores."""


def plan(
    problem: Problem,
    *,
    block_mask: Any = None,
    accuracy: str = "fast",
    impl: str | None = None,
    batch_invariant: bool = False,
    capability: tuple[int, int] = (9, 0),
) -> Plan:
    """Return which kernel computes a call, and why.

    Parameters
    ----------
    problem : Problem
        Of any library; only its shapes, types and options count, and it need not be on a GPU.
    block_mask, accuracy, impl, batch_invariant
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
    call = Call.of(problem, accuracy, blocks, tiles=block_mask is not None and len(block_mask) == 4)
    call = replace(call, batch_invariant=batch_invariant)
    return choose(call, impl, capability)


@lru_cache(maxsize=4096)
def choose(call: Call, impl: str | None, capability: tuple[int, int]) -> Plan:
    """Return the plan for a call: the kernel that was asked for, or the first that computes it."""
    if call.accuracy not in ACCURACIES:
        raise InvalidInput(f"accuracy: got {call.accuracy!r}, expected one of {', '.join(ACCURACIES)}")
    name, obstacles = pick(KERNELS, call, impl, capability)
    return configured(name, call, obstacles)


def pick(
    kernels: Mapping[str, Kernel], call: Call, impl: str | None, capability: tuple[int, int]
) -> tuple[str, tuple[str, ...]]:
    """Return the first kernel that computes a call, or the one that was asked for, and what is in the way of others."""
    if impl is not None and impl not in kernels:
        raise InvalidInput(f"impl: got {impl!r}, expected one of {', '.join(kernels)}")
    obstacles: list[str] = []
    for name in (impl,) if impl else kernels:
        obstacle = kernels[name].obstacle(call, capability)
        if not obstacle and impl is None and call.n_k < kernels[name].least_keys:
            obstacle = f"is chosen from {kernels[name].least_keys} keys on, got {call.n_k}"
        if not obstacle:
            return name, tuple(obstacles)
        obstacles.append(f"the kernel {name} {obstacle}")
    raise UnsupportedProblem(f"gpu: {'; '.join(obstacles)}")


@lru_cache(maxsize=4096)
def configured(impl: str, call: Call, obstacles: tuple[str, ...] = ()) -> Plan:
    """Return the plan of a kernel that computes a call."""
    kernel = KERNELS[impl]
    macros = kernel.macros(call)
    why = "; ".join((kernel.why(call), *obstacles))
    return Plan(kernel, why, MappingProxyType(macros), kernel.shared_bytes(macros))


def check_block_mask(p: Problem, mask: Any) -> tuple[int, int]:
    """Return the rows and keys of a block; refuse a block mask that does not fit the problem.

    Raises
    ------
    InvalidProblem
        No triple of an array and two sizes, another library or type, or a shape that does not fit.
    """
    try:
        blocks, block_q, block_k, *bits = mask
        block_q, block_k = (int(n) for n in (block_q, block_k))
        if len(bits) > 1:
            raise ValueError
    except (TypeError, ValueError) as e:
        raise InvalidProblem("block_mask: expected (blocks, block_q, block_k), or bits of blocks as a fourth") from e
    for x in (blocks, *bits):
        if kind_of(x) != p.kind:
            raise InvalidProblem(f"block_mask: is of {kind_of(x)} and query of {p.kind}; pass arrays of one library")
        if dtype_name(x) != ("int32" if bits else "bool"):
            expected = "int32 with bits of blocks" if bits else "bool"
            raise InvalidProblem(f"block_mask: got dtype {dtype_name(x)}, expected {expected}")
    if min(block_q, block_k) < 1:
        raise InvalidProblem(f"block_mask: got blocks of {block_q} rows and {block_k} keys, expected at least 1")
    full = (p.batch, p.heads, -(-p.n_q // block_q), -(-p.n_k // block_k))
    shape = tuple(blocks.shape)
    if len(shape) != 4 or shape[2:] != full[2:] or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
        raise InvalidProblem(f"block_mask: got shape {shape}, expected {full}, or 1 in place of its first two axes")
    for x in bits:
        size = (block_q, block_k // 32)
        if block_k % 32 or len(x.shape) != 3 or tuple(x.shape[1:]) != size:
            text = f"({', '.join(map(str, ('tiles', *size)))}) for blocks whose keys are a multiple of 32"
            raise InvalidProblem(f"block_mask: got bits of shape {tuple(x.shape)}, expected {text}")
    return block_q, block_k
