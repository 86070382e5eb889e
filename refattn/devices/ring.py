"""Ring attention in PyTorch, forward and backward: a right implementation to check others' against.

Every rank keeps its queries. Keys and values go round, from each rank to the next, and with them their places in the
sequence. Backward their gradients go along, and are back with their owner after the last step. Source: Ring Attention
(arXiv 2310.01889); recalled.
"""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedProblem
from .ranks import Shard

__all__ = ["ring"]

TAKEN = ("causal", "scale", "offset")


def ring(shard: Shard) -> dict[str, Any]:
    """Return out, lse, dq, dk and dv of one rank's shard, in any layout.

    Parameters
    ----------
    shard : Shard
        With float32 or float64 tensors, and causal, scale and offset alone.

    Returns
    -------
    dict
        "out", "lse", "dq" of the rank's rows, "dk", "dv" of its keys.

    Raises
    ------
    UnsupportedProblem
        Another option, or another type.
    """
    import torch

    for name in shard.options:
        if name not in TAKEN:
            raise UnsupportedProblem(f"{name}: the ring takes {', '.join(TAKEN)}")
    if shard.query.dtype not in (torch.float32, torch.float64):
        raise UnsupportedProblem(f"query: the ring takes float32 and float64, got {shard.query.dtype}")
    q, dout, rows = shard.query, shard.dout, shard.rows
    out, lse = torch.zeros_like(dout), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    k, v, at = shard.key, shard.value, shard.keys
    for _ in range(shard.world_size):
        s = _scores(shard, q, k, rows, at)
        part = torch.logsumexp(s, 3)
        both = torch.logaddexp(lse, part)
        kept, new = (torch.exp(x - both).nan_to_num(0.0)[..., None] for x in (lse, part))
        out = kept * out + new * (torch.softmax(s, 3).nan_to_num(0.0) @ _repeated(shard, v))
        lse = both
        k, v, at = _passed_on(shard, k, v, at)

    delta = (dout * out).sum(3, keepdim=True)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for _ in range(shard.world_size):
        p = torch.exp(_scores(shard, q, k, rows, at) - lse[..., None]).nan_to_num(0.0)
        ds = p * (dout @ _repeated(shard, v).mT - delta) * _scale(shard)
        dq = dq + ds @ _repeated(shard, k)
        dk = dk + _summed(shard, ds.mT @ q)
        dv = dv + _summed(shard, p.mT @ dout)
        k, v, at, dk, dv = _passed_on(shard, k, v, at, dk, dv)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def _scale(shard: Shard) -> float:
    given = shard.options.get("scale")
    return float(shard.query.shape[3] ** -0.5 if given is None else given)


def _scores(shard: Shard, q: Any, k: Any, rows: Any, at: Any) -> Any:
    """Return the scores of rows to keys, by their places in the whole call."""
    s = q @ _repeated(shard, k).mT * _scale(shard)
    causal = shard.options.get("causal")
    if causal is None:
        return s
    first = shard.options.get("offset", 0) + (shard.n_k - shard.n_q if causal == "bottom_right" else 0)
    return s.masked_fill(at > rows[:, None] + first, float("-inf"))


def _repeated(shard: Shard, x: Any) -> Any:
    return x.repeat_interleave(shard.query.shape[1] // x.shape[1], 1)


def _summed(shard: Shard, x: Any) -> Any:
    """Return what the query heads of each group give, added up."""
    return x.unflatten(1, (shard.key.shape[1], -1)).sum(2)


def _passed_on(shard: Shard, *tensors: Any) -> tuple[Any, ...]:
    """Return the tensors of the rank before this one, which gets them from the one before it."""
    import torch
    from torch.distributed import P2POp, batch_isend_irecv, irecv, isend

    if shard.world_size == 1:
        return tensors
    after, before = (shard.rank + 1) % shard.world_size, (shard.rank - 1) % shard.world_size
    got = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
    sends = [P2POp(isend, x.contiguous(), after) for x in tensors]
    for work in batch_isend_irecv(sends + [P2POp(irecv, x, before) for x in got]):
        work.wait()
    return got
