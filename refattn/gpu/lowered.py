"""Operators that choose or mask keys, as options of the GPU's attention: a block mask, and the rest of the mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import like
from ..errors import InvalidInput, UnsupportedProblem
from ..exact.lowering import lower
from ..norms import NORMS
from ..problem import VARIANT, Problem
from ..rules import EMPTY, PARTIAL, Rule, array
from ..validation import SCALES

__all__ = ["lowered"]

NEVER = ("weight", *NORMS, "rotary", "alibi_slopes", "lengths_q", "lengths_k", "offset", "alignment", "block_table")
TAKEN = ("scale", "causal", "window", "softcap", "sink", "bias")


def lowered(problem: Problem, block_q: int = 128, block_k: int = 128) -> dict[str, Any]:
    """Return the options by which :func:`refattn.gpu.attention` computes an operator that is softmax over some keys.

    ``attention(p.query, p.key, p.value, **lowered(p))``. Choices are made exactly, on the CPU.

    Parameters
    ----------
    problem : Problem
        Of an operator that is lowered to softmax attention, or chooses keys: moba, nsa_selected, topk, power_blocks,
        titans_mac, neighborhood, block_sparse, view_local; or softmax itself.
    block_q, block_k : int
        Queries and keys of a block. Where they are the operator's own, fewer blocks are cut.

    Returns
    -------
    dict
        ``scale``, ``causal``, ``window``, ``softcap``, ``sink`` and ``bias`` of the call; ``block_mask``, True where a
        block has a pair that is seen; ``allowed``, a boolean mask of n_q n_k pairs for each head that differs, or None
        where every such block is whole. Arrays are of query's library and device.

    Raises
    ------
    InvalidInput
        Blocks of no queries or keys.
    UnsupportedProblem
        Another core than softmax, or an option that the GPU's attention does not have.
    """
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidInput(f"{name}: got {size!r}, expected a whole number from 1 on")
    for name in (*SCALES, *NEVER):
        if getattr(problem, name) is not None:
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
    if (tiles == PARTIAL).any():
        found["allowed"] = like(np.array(rule.written(problem.batch, problem.heads, n_q, n_k)), model)
    return found
