"""Operators that choose or mask keys, as options of the GPU's attention: a block mask, and the rest of the mask."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import like
from ..errors import InvalidInput, UnsupportedProblem
from ..exact.lowering import lower
from ..problem import VARIANT, Problem
from ..rules import EMPTY, PARTIAL, Rule, array

__all__ = ["lowered"]

MOST = 2**31
"""Booleans of pairs that are written out."""
TAKEN = ("scale", "causal", "window", "softcap", "sink", "bias")
KEPT = (
    "query",
    "key",
    "value",
    "allowed",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "variant",
    "options",
    "alpha",
    "beta",
    "state",
)
"""What is in the block mask, or is refused with the operator."""


def lowered(problem: Problem, block_q: int = 128, block_k: int = 128) -> dict[str, Any]:
    """Return the options by which :func:`refattn.gpu.attention` computes an operator that is softmax over some keys.

    ``attention(p.query, p.key, p.value, **lowered(p))``. Choices are made exactly, on the CPU.

    Parameters
    ----------
    problem : Problem
        Of an operator that is lowered to softmax attention, or chooses keys: moba, nsa_selected, topk, power_blocks,
        dsa, seer, titans_mac, neighborhood, block_sparse, view_local; or softmax itself.
    block_q, block_k : int
        Queries and keys of a block. Where they are the operator's own, fewer blocks are cut.

    Returns
    -------
    dict
        ``scale``, ``causal``, ``window``, ``softcap``, ``sink`` and ``bias`` of the call; ``block_mask``, which blocks
        have a pair that is seen, with bits of those that are seen in part; ``allowed`` is None. For float32 and
        float64, for tensors that want gradients, and for blocks of other sizes than multiples of 64 queries and 32
        keys, ``block_mask`` has no bits, and ``allowed`` is a boolean mask of n_q n_k pairs for each head that
        differs, unless every block is whole. Arrays are of query's library and device.

    Raises
    ------
    InvalidInput
        Blocks of no queries or keys.
    UnsupportedProblem
        Another core than softmax, an option that the GPU's attention does not have, or more booleans than 2**31.
    """
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidInput(f"{name}: got {size!r}, expected a whole number from 1 on")
    if not isinstance(problem, Problem):
        raise InvalidInput(f"problem: got {type(problem).__name__}, expected a Problem")
    problem = problem.with_bias()
    for name in (f.name for f in fields(problem)):
        if name not in TAKEN + KEPT and getattr(problem, name) is not None:
            raise UnsupportedProblem(f"{name}: gpu.attention has none; leave it out, or use refattn.evaluate")
    core = lower(problem).problem
    if core.variant != VARIANT or core.cu_seqlens_q is not None:
        what = "packed sequences" if core.variant == VARIANT else f"{core.variant} attention"
        raise UnsupportedProblem(f"variant: {what} has no block mask over softmax; use refattn.evaluate")
    model = problem.query
    found = {n: getattr(problem, n) for n in TAKEN}
    found["block_mask"] = found["allowed"] = None
    if core.allowed is None:
        return found
    rule = core.allowed if isinstance(core.allowed, Rule) else array(np.asarray(core.allowed))
    n_q, n_k = problem.n_q, problem.n_k
    tiles = np.array(
        [[rule.tiles(n_q, n_k, block_q, block_k, b, h) for h in range(rule.heads)] for b in range(rule.batches)]
    )
    found["block_mask"] = (like(tiles != EMPTY, model), block_q, block_k)
    if not (tiles == PARTIAL).any():
        return found
    learns = any(getattr(x, "requires_grad", False) for x in (problem.query, problem.key, problem.value))
    if problem.dtype in ("float16", "bfloat16") and not (block_q % 64 or block_k % 32 or learns):
        blocks, bits = _bits(rule, tiles, (n_q, n_k), (block_q, block_k))
        found["block_mask"] = (like(blocks, model), block_q, block_k, like(bits, model))
        return found
    if rule.batches * rule.heads * n_q * n_k > MOST:
        raise UnsupportedProblem(
            f"allowed: needs {rule.batches * rule.heads} times {n_q} by {n_k} booleans; bits of blocks take their "
            "place for float16 and bfloat16 without gradients, with block_q a multiple of 64 and block_k of 32"
        )
    found["allowed"] = like(np.array(rule.written(problem.batch, problem.heads, n_q, n_k)), model)
    return found


def _bits(
    rule: Rule, tiles: NDArray[np.int8], sizes: tuple[int, int], block: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return which blocks are hidden (0), whole (1) or seen by the bits of a tile i (2 + i), and the tiles' bits."""
    blocks = (tiles != EMPTY).astype(np.int32)
    found, many = [np.zeros((0, block[0], block[1] // 8), np.uint8)], 0
    for b, h, i in np.argwhere((tiles == PARTIAL).any(3)).tolist():
        at = np.nonzero(tiles[b, h, i] == PARTIAL)[0]
        rows = np.arange(i * block[0], min((i + 1) * block[0], sizes[0]))
        keys = (at[:, None] * block[1] + np.arange(block[1])).ravel()
        there = keys < sizes[1]
        seen = np.zeros((block[0], len(keys)), bool)
        seen[: len(rows), there] = rule.block(rows, keys[there], *sizes, b, h)
        packed = np.packbits(seen, axis=1, bitorder="little")
        found.append(packed.reshape(block[0], len(at), -1).transpose(1, 0, 2))
        blocks[b, h, i, at] = 2 + many + np.arange(len(at))
        many += len(at)
    return blocks, np.ascontiguousarray(np.concatenate(found)).view("<i4")
