"""PyTorch: scaled_dot_product_attention by backend, and flex_attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import masks
from ...arrays import to_kind, to_numpy
from ...errors import UnsupportedProblem
from ...problem import Problem
from ...scores import score_mod
from .gradients import Gradients, by_name, with_gradients

__all__ = ["additive", "attention_mask", "flex", "flex_compiled", "sdpa", "sdpa_flash", "sdpa_math"]


def _by_autograd(backend: str, *tensors: str) -> Gradients:
    """Return the gradients of a backend by those of the named tensors that a call has."""

    def gradients(problem: Problem, dout: NDArray[Any]) -> dict[str, NDArray[Any]]:
        import torch

        p = problem.to("torch")
        leaves = {n: x.detach().requires_grad_() for n, x in p.arrays().items() if n in tensors}
        out = sdpa(p.replace(**leaves), backend)
        found = torch.autograd.grad(out, list(leaves.values()), to_kind(dout, "torch"))
        return by_name(problem, map(to_numpy, found))

    return gradients


def attention_mask(problem: Problem) -> Any:
    """Return the attn_mask argument: the boolean mask, or the bias with -inf where the mask is False.

    Beside one of the two it has the causal mask, too: scaled_dot_product_attention takes is_causal or attn_mask.
    """
    import torch

    p = problem.to("torch")
    if p.causal is not None and not (p.bias is None and p.allowed is None):
        corner = torch.ones(p.n_q, p.n_k, dtype=torch.bool, device=p.query.device).tril()
        p = p.replace(allowed=corner[None, None] if p.allowed is None else corner & p.allowed)
    if p.bias is None:
        return p.allowed
    # scaled_dot_product_attention demands the query's type, or float32
    bias = p.bias if p.bias.dtype == torch.float32 else p.bias.to(p.query.dtype)
    hidden = torch.tensor(-torch.inf, dtype=bias.dtype, device=bias.device)
    return bias if p.allowed is None else torch.where(p.allowed, bias, hidden)


def additive(mask: Any, like: Any) -> Any:
    """Return a mask as scaled_dot_product_attention converts it for its operators: numbers of another tensor's type."""
    import torch

    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, -torch.inf)


def side_by_side(*tensors: Any) -> tuple[Any, ...]:
    """Return tensors whose last axes have no gaps, which all fused backends refuse."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def sdpa(problem: Problem, backend: str) -> Any:
    """Return what a backend gives, on the device of the problem's tensors."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    p, mask = problem.to("torch"), attention_mask(problem)
    if p.dropout_mask is not None:  # what the public function calls takes a mask, and it does not
        return _dropped(p, mask)
    with sdpa_kernel(getattr(SDPBackend, backend)), seeded(p):
        q, k, v = side_by_side(p.query, p.key, p.value)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            dropout_p=(p.dropout_p or 0.0) if p.philox_seed is not None else 0.0,
            is_causal=p.causal is not None and mask is None,
            scale=p.scale,
            enable_gqa=p.heads != p.heads_kv,
        )


@contextmanager
def seeded(p: Problem) -> Iterator[None]:
    """Have PyTorch's generator of a GPU draw from a call's seed and offset; it is as it was afterwards."""
    if p.philox_seed is None:
        yield
        return
    import torch

    seed, offset, device = p.philox_seed, p.philox_offset or 0, p.query.device
    if device.type != "cuda" or offset % 4:
        raise UnsupportedProblem("philox_offset: PyTorch draws from a multiple of 4, on a GPU")
    generator, before = torch.cuda.default_generators[device.index], torch.cuda.get_rng_state(device)
    try:
        generator.manual_seed(seed)
        generator.set_offset(offset)
        yield
    finally:
        torch.cuda.set_rng_state(before, device)


def _dropped(p: Problem, mask: Any) -> Any:
    """Return what the math backend gives with a given dropout mask."""
    import torch

    math = torch.ops.aten._scaled_dot_product_attention_math
    first = p.causal is not None and mask is None
    gqa, extra = p.heads != p.heads_kv, additive(mask, p.query)
    more = {"dropout_mask": p.dropout_mask, "scale": p.scale, "enable_gqa": gqa}
    return math(p.query, p.key, p.value, extra, p.dropout_p, first, **more)[0]


# it refuses a mask that needs a gradient
@with_gradients(_by_autograd("FLASH_ATTENTION", "query", "key", "value"))
def sdpa_flash(problem: Problem) -> Any:
    """Return what the CPU flash backend gives, with the lse of the operator that it dispatches to."""
    import torch

    out = sdpa(problem, "FLASH_ATTENTION")
    p, mask = problem.to("torch"), attention_mask(problem)
    group = p.heads // p.heads_kv
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (p.key, p.value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if 0 in (p.n_q, p.n_k):
        wide = torch.float64 if p.query.dtype == torch.float64 else torch.float32
        return out, torch.full(problem.out_shape[:3], -torch.inf, dtype=wide)
    whole, extra = side_by_side(p.query, k, v), additive(mask, p.query)
    _, lse = flash(*whole, 0.0, p.causal is not None and mask is None, attn_mask=extra, scale=p.scale)
    return out, lse


@with_gradients(_by_autograd("MATH", "query", "key", "value", "bias"))
def sdpa_math(problem: Problem) -> Any:
    """Return what the math backend gives."""
    return sdpa(problem, "MATH")


def _flex(problem: Problem, call: Any) -> Any:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    p = problem.to("torch")
    plain = problem.to("numpy")
    if 0 in (p.n_q, p.n_k):
        raise UnsupportedProblem("seq: flex_attention refuses an axis of length 0")
    seen = np.ones((1, 1, p.n_q, p.n_k), bool)
    if p.causal is not None or p.window is not None or p.cu_seqlens_q is not None:
        rule = plain.replace(bias=None, allowed=None)
        seen[...] = False
        for rows, keys in rule.segments():
            seen[0, 0, rows, keys] = masks.visible(rule, 0, 0, rows, keys)
    mask = torch.from_numpy(
        np.broadcast_to(
            seen if plain.allowed is None else seen & plain.allowed, (p.batch, p.heads, p.n_q, p.n_k)
        ).copy()
    )
    blocks = create_block_mask(lambda b, h, i, j: mask[b, h, i, j], p.batch, p.heads, p.n_q, p.n_k, device="cpu")
    with torch.no_grad():  # flex_attention has no backward on a CPU
        return call(
            p.query,
            p.key,
            p.value,
            score_mod=score_mod(p),
            block_mask=blocks,
            scale=p.scale,
            enable_gqa=p.heads != p.heads_kv,
        )


def flex(problem: Problem) -> Any:
    """Return what flex_attention gives without compilation."""
    import warnings

    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it is not compiled
        return _flex(problem, flex_attention)


def flex_compiled(problem: Problem) -> Any:
    """Return what torch.compile(flex_attention) gives; it compiles anew for each shape."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return _flex(problem, torch.compile(flex_attention, dynamic=False))
