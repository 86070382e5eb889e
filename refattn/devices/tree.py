"""Attention over a tree of ranks in PyTorch, forward and backward: the other right implementation.

Every rank keeps its keys and values. It has all queries, makes its part of every row, and the parts are merged in
pairs: after log2 of world_size exchanges each rank has the whole. Backward dq is the sum of all ranks' parts, dk and dv
stay where their keys are. Source: Tree Attention (arXiv 2408.04093), which is for decoding; recalled, and the backward
pass is ours.
"""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedProblem
from .ranks import Shard
from .ring import expect_taken, repeated, scores, summed

__all__ = ["tree"]


def tree(shard: Shard) -> dict[str, Any]:
    """Return out, lse, dq, dk and dv of one rank's shard, in any layout.

    Parameters
    ----------
    shard : Shard
        Of a power of two of ranks, with float32 or float64 tensors.

    Returns
    -------
    dict
        "out", "lse", "dq" of the rank's rows, "dk", "dv" of its keys.

    Raises
    ------
    UnsupportedProblem
        Another number of ranks, an option that it does not take, or another type.
    """
    import torch
    from torch import distributed

    expect_taken("tree", shard)
    if shard.world_size & (shard.world_size - 1):
        raise UnsupportedProblem(f"world_size: the tree takes powers of two, got {shard.world_size}")
    q, dout, rows = (_of_all(shard, x, axis) for x, axis in ((shard.query, 2), (shard.dout, 2), (shard.rows, 0)))
    k, v = repeated(shard, shard.key), repeated(shard, shard.value)
    s, slope = scores(shard, q, shard.key, rows, shard.keys)
    lse, out = torch.logsumexp(s, 3), torch.softmax(s, 3).nan_to_num(0.0) @ v
    step = 1
    while step < shard.world_size:
        others_out, others_lse = _swapped(shard.rank ^ step, shard.rank < shard.rank ^ step, out, lse)
        both = torch.logaddexp(lse, others_lse)
        own, other = (torch.exp(x - both).nan_to_num(0.0)[..., None] for x in (lse, others_lse))
        out, lse, step = own * out + other * others_out, both, 2 * step

    p = torch.exp(s - lse[..., None]).nan_to_num(0.0)
    ds = p * (dout @ v.mT - (dout * out).sum(3, keepdim=True)) * slope
    dq = ds @ k
    distributed.all_reduce(dq)
    mine = slice(shard.rank * len(shard.rows), (shard.rank + 1) * len(shard.rows))
    found = {"out": out[:, :, mine], "lse": lse[:, :, mine], "dq": dq[:, :, mine]}
    return found | {"dk": summed(shard, ds.mT @ q), "dv": summed(shard, p.mT @ dout)}


def _of_all(shard: Shard, x: Any, axis: int) -> Any:
    """Return the tensors of all ranks, one behind another."""
    import torch
    from torch import distributed

    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(shard.world_size)]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts, axis)


def _swapped(other: int, first: bool, *tensors: Any) -> tuple[Any, ...]:
    """Return another rank's tensors for one's own."""
    import torch
    from torch.distributed import P2POp, batch_isend_irecv, irecv, isend

    got = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
    sends, receives = [P2POp(isend, x.contiguous(), other) for x in tensors], [P2POp(irecv, x, other) for x in got]
    for work in batch_isend_irecv(sends + receives if first else receives + sends):
        work.wait()
    return got
