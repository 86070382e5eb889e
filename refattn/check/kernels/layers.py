"""xFormers' memory_efficient_attention, Transformer Engine's DotProductAttention and SageAttention."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import UnsupportedProblem
from ...problem import Problem
from .flash_attn import gradients_of, rows

LSE = "memory_efficient_attention_forward_requires_grad"
__all__ = ["sageattention", "transformer_engine", "xformers_attention"]


def _alone(p: Problem, name: str, *others: str) -> None:
    """Refuse a call that has something beside what takes the only argument of a package for both."""
    found = [n for n in others if getattr(p, n) is not None]
    if getattr(p, name) is not None and found:
        raise UnsupportedProblem(f"{found[0]}: beside {name} the package has no argument for it")


def _bias(p: Problem, batch: int) -> Any:
    """Return the bias written out, of query's type, which both packages demand."""
    if p.bias.dtype != p.query.dtype:
        raise UnsupportedProblem(f"bias: is {p.bias.dtype}, the package takes query's {p.query.dtype}")
    return p.bias.expand(batch, p.heads, p.n_q, p.n_k).contiguous()


def xformers_attention(p: Problem) -> Any:
    """Return what xFormers gives, and its lse: (b, n, h, d), grouped heads as (b, n, h_kv, group, d).

    Masks are objects: two triangles, a window from the bottom right corner with both sides included, packed sequences.
    """
    fmha = importlib.import_module("xformers.ops").fmha
    group, many = p.heads // p.heads_kv, p.heads_kv
    query, key, value = (rows(x) for x in (p.query, p.key, p.value))
    if group > 1:
        query = query.unflatten(2, (many, group))
        key, value = (x[:, :, :, None].expand(*x.shape[:3], group, x.shape[3]) for x in (key, value))
    bias = _xformers_bias(p, fmha.attn_bias)
    wanted = "memory_efficient_attention" if p.query.requires_grad else LSE
    try:
        found = getattr(fmha, wanted)(query, key, value, attn_bias=bias, scale=p.scale)
    except NotImplementedError as e:
        raise UnsupportedProblem(f"xformers: {str(e).splitlines()[0]}") from e
    out, lse = (found, None) if p.query.requires_grad else found
    out = rows(out.flatten(2, 3) if group > 1 else out)
    return out if lse is None else (out, _xformers_lse(p, lse.flatten(1, 2) if group > 1 else lse))


def _xformers_lse(p: Problem, lse: Any) -> Any:
    """Return lse without what pads it: of packed sequences it is one row, or a row for each."""
    import torch

    if p.cu_seqlens_q is None or lse.shape[0] == 1:
        return lse[..., : p.n_q].contiguous()
    each = [lse[t : t + 1, :, : rows.stop - rows.start] for t, (rows, _) in enumerate(p.segments())]
    return torch.cat(each, -1)


def _xformers_bias(p: Problem, masks: Any) -> Any:
    _alone(p, "bias", "causal", "window", "cu_seqlens_q")
    _alone(p, "cu_seqlens_q", "window")
    if p.bias is not None:
        return _bias(p, p.batch)
    if p.cu_seqlens_q is not None:
        lengths = [(x[1:] - x[:-1]).tolist() for x in (p.cu_seqlens_q, p.cu_seqlens_k)]
        packed = masks.BlockDiagonalMask.from_seqlens(*lengths)
        if p.causal is None:
            return packed
        return packed.make_causal() if p.causal == "top_left" else packed.make_causal_from_bottomright()
    if p.window is not None:
        if p.causal == "top_left":
            raise UnsupportedProblem("window: xFormers counts it from the bottom right")
        left, right = (p.n_q + p.n_k if side is None else side for side in p.window)
        return masks.LocalAttentionFromBottomRightMask(window_left=left, window_right=0 if p.causal else right)
    if p.causal is None:
        return None
    return masks.LowerTriangularMask() if p.causal == "top_left" else masks.LowerTriangularFromBottomRightMask()


def transformer_engine(p: Problem) -> Any:
    """Return what DotProductAttention gives, without lse: (b, n, h d) of (b, n, h, d); a mask is True where hidden.

    A window counts from the bottom right corner beside "no_mask" and "causal_bottom_right", from the top left one
    beside "causal"; a side of -1 is none.
    """
    module = importlib.import_module("transformer_engine.pytorch")
    _alone(p, "allowed", "causal", "window", "cu_seqlens_q")
    _alone(p, "bias", "cu_seqlens_q")
    packed = p.cu_seqlens_q is not None
    kind = {None: "", "top_left": "causal", "bottom_right": "causal_bottom_right"}[p.causal]
    mask = "arbitrary" if p.allowed is not None else kind or "no_mask"
    if packed:
        mask = f"padding_{kind}" if kind else "padding"
    left, right = (-1 if side is None else side for side in p.window or (None, None))
    layer = module.DotProductAttention(
        p.heads,
        (p.d_k, p.d_v),
        num_gqa_groups=p.heads_kv,
        attention_dropout=0.0,
        qkv_format="thd" if packed else "bshd",
        attn_mask_type=mask,
        window_size=(left, 0 if p.causal else right),
        attention_type="self" if p.n_q == p.n_k else "cross",
        softmax_scale=p.scale,
    )
    more: dict[str, Any] = {}
    if p.allowed is not None:
        more["attention_mask"] = ~p.allowed
    if p.bias is not None:
        if p.bias.shape[0] > 1:
            raise UnsupportedProblem("bias: Transformer Engine takes one for all batches")
        more |= {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": _bias(p, 1)}
    tensors = [rows(x) for x in (p.query, p.key, p.value)]
    if packed:
        tensors = [x[0] for x in tensors]
        for name, given in (("q", p.cu_seqlens_q), ("kv", p.cu_seqlens_k)):
            starts = given.int()
            more |= {f"cu_seqlens_{name}": starts, f"max_seqlen_{name}": int((starts[1:] - starts[:-1]).max())}
    out = layer(*tensors, **more)
    return rows(out.reshape(p.batch, p.n_q, p.heads, p.d_v))


def sageattention(p: Problem) -> Any:
    """Return what sageattn gives, and its natural lse; causal only where there are as many keys as queries."""
    sageattn = importlib.import_module("sageattention").sageattn
    if p.causal is not None and p.n_q != p.n_k:
        raise UnsupportedProblem("causal: SageAttention takes it where there are as many keys as queries")
    more = {"tensor_layout": "HND", "is_causal": p.causal is not None, "sm_scale": p.scale, "return_lse": True}
    out, lse = sageattn(p.query, p.key, p.value, **more)
    return out, lse


xformers_attention.gradients = gradients_of(xformers_attention)  # type: ignore[attr-defined]
transformer_engine.gradients = gradients_of(transformer_engine)  # type: ignore[attr-defined]
