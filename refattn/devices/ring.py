"""Ring attention in PyTorch, forward and backward: a right implementation to check others' against.

Every rank keeps its queries. Keys and values go round, from each rank to the next, and with them their places in the
sequence. Backward their gradients go along, and are back with their owner after the last step. Source: Ring Attention
(arXiv 2310.01889); recalled.
"""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedProblem
from .ranks import Shard

__all__ = ["expect_taken", "repeated", "ring", "scores", "summed"]

TAKEN = ("causal", "scale", "offset", "alignment", "window", "softcap")


def ring(shard: Shard) -> dict[str, Any]:
    """Return out, lse, dq, dk and dv of one rank's shard, in any layout.

    Parameters
    ----------
    shard : Shard
        With float32 or float64 tensors.

    Returns
    -------
    dict
        "out", "lse", "dq" of the rank's rows, "dk", "dv" of its keys.

    Raises
    ------
    UnsupportedProblem
        An option that it does not take, or another type.
    """
    import torch

    expect_taken("ring", shard)
    q, dout, rows = shard.query, shard.dout, shard.rows
    out, lse = torch.zeros_like(dout), torch.full_like(dout[..., 0], -torch.inf)
    k, v, at = shard.key, shard.value, shard.keys
    for _ in range(shard.world_size):
        s = scores(shard, q, k, rows, at)[0]
        part = torch.logsumexp(s, 3)
        both = torch.logaddexp(lse, part)
        kept, new = (torch.exp(x - both).nan_to_num(0.0)[..., None] for x in (lse, part))
        out = kept * out + new * (torch.softmax(s, 3).nan_to_num(0.0) @ repeated(shard, v))
        lse = both
        k, v, at = _passed_on(shard, k, v, at)

    delta = (dout * out).sum(3, keepdim=True)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for _ in range(shard.world_size):
        s, slope = scores(shard, q, k, rows, at)
        p = torch.exp(s - lse[..., None]).nan_to_num(0.0)
        ds = p * (dout @ repeated(shard, v).mT - delta) * slope
        dq = dq + ds @ repeated(shard, k)
        dk = dk + summed(shard, ds.mT @ q)
        dv = dv + summed(shard, p.mT @ dout)
        k, v, at, dk, dv = _passed_on(shard, k, v, at, dk, dv)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def expect_taken(name: str, shard: Shard) -> None:
    """Refuse a shard with options or a type that a function here does not take."""
    import torch

    for option in shard.options:
        if option not in TAKEN:
            raise UnsupportedProblem(f"{option}: the {name} takes {', '.join(TAKEN)}")
    if shard.query.dtype not in (torch.float32, torch.float64):
        raise UnsupportedProblem(f"query: the {name} takes float32 and float64, got {shard.query.dtype}")


def scores(shard: Shard, q: Any, k: Any, rows: Any, at: Any) -> tuple[Any, Any]:
    """Return the scores of rows to keys, by their places in the whole call, and their slope by the products q k^T."""
    options, scale = shard.options, shard.options.get("scale")
    slope: Any = float(q.shape[3] ** -0.5 if scale is None else scale)
    s, cap = q @ repeated(shard, k).mT * slope, options.get("softcap")
    if cap is not None:
        t = (s / cap).tanh()
        s, slope = cap * t, slope * (1 - t * t)
    causal, (left, right) = options.get("causal"), options.get("window") or (None, None)
    corner = causal or options.get("alignment") or "bottom_right"
    first = options.get("offset", 0) + (shard.n_k - shard.n_q if corner == "bottom_right" else 0)
    if causal is not None:
        s = s.masked_fill(at > rows[:, None] + first, float("-inf"))
    if left is not None:
        s = s.masked_fill(at < rows[:, None] + first - left, float("-inf"))
    if right is not None:
        s = s.masked_fill(at > rows[:, None] + first + right, float("-inf"))
    return s, slope


def repeated(shard: Shard, x: Any) -> Any:
    """Return keys or values for each query head."""
    return x.repeat_interleave(shard.query.shape[1] // x.shape[1], 1)


def summed(shard: Shard, x: Any) -> Any:
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
