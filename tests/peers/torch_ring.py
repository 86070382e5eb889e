"""PyTorch's context parallel as functions of a shard: context_parallel itself, and the ring that it is made of."""

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import _attention, context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as rings

from refattn import UnsupportedProblem

aten = torch.ops.aten


def whole(shard):
    """context_parallel around scaled_dot_product_attention; it makes the shards itself, so it gets the whole call."""
    if shard.layout != "zigzag" or set(shard.options) != {"causal"} or shard.n_q != shard.n_k:
        raise UnsupportedProblem(f"{shard.layout}: context_parallel balances causal rows zigzag, and takes no options")
    mesh = init_device_mesh(shard.query.device.type, (shard.world_size,))
    n = shard.n_q
    q, k, v = (x.new_zeros(*x.shape[:2], n, x.shape[3]) for x in (shard.query, shard.key, shard.value))
    for x, part in ((q, shard.query), (k, shard.key), (v, shard.value)):
        x[:, :, shard.rows] = part
        torch.distributed.all_reduce(x)
    with context_parallel(mesh, buffers=(q, k, v), buffer_seq_dims=(2, 2, 2)):
        return {"out": F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).clone()}


def ring(shard, rotate="allgather"):
    """The ring of PyTorch's context_parallel, forward and backward, around its flash operator for CPUs."""
    if shard.layout == "striped" or set(shard.options) - {"causal", "scale"}:
        raise UnsupportedProblem(f"{shard.layout}: PyTorch's ring takes contiguous and zigzag, causal and scale")
    group, causal = torch.distributed.group.WORLD, shard.options.get("causal") is not None
    if shard.layout == "zigzag" and not causal:
        raise UnsupportedProblem("causal: PyTorch's ring balances causal rows only")
    if causal and shard.query.shape[2] != shard.key.shape[2]:
        raise UnsupportedProblem("seq: PyTorch's ring takes as many keys as queries where it is causal")
    _attention._cp_options.enable_load_balance = shard.layout == "zigzag"
    _attention.set_rotate_method(rotate)
    heads = shard.query.shape[1] // shard.key.shape[1]
    k, v = (x.repeat_interleave(heads, 1) for x in (shard.key, shard.value))
    scale = shard.options.get("scale")
    out, lse = rings._templated_ring_attention(
        group, 2, flash, shard.query, k, v, is_causal=causal, dropout_p=0.0, scale=scale
    )
    dq, dk, dv = rings._templated_ring_attention_backward(
        group,
        2,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        grad_out=shard.dout,
        grad_out_name="grad_out",
        query=shard.query,
        key=k,
        value=v,
        out=out,
        logsumexp=lse,
        is_causal=causal,
        dropout_p=0.0,
        scale=scale,
    )
    dk, dv = (x.unflatten(1, (-1, heads)).sum(2) for x in (dk, dv))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def ring_by_all_to_all(shard):
    return ring(shard, "alltoall")


def flash(query, key, value, is_causal, dropout_p, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, scale=scale)
