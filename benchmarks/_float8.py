"""A float8 attention kernel with scales in Triton: queries, keys and values in float8_e4m3fn, P in it under 2**8.

Written to have a kernel of this kind to judge: `refattn check benchmarks/_float8.py:attention --only 'types/*'`. The
matrix unit adds 32 products at 13 bits; after PART of them the sum goes over to float32, as FlashAttention-3 has it.
"""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from refattn import Capabilities, Problem, UnsupportedProblem
from refattn.check.kernels.packages import on_gpu

__all__ = ["attention", "model"]

ROWS, KEYS, PART = 64, 64, 32
TOP = 256.0
FEATURES = "causal_bottom_right causal_top_left grouped_heads lengths_differ scale out_dtype scales scales_by_head"


@triton.jit
def _forward(q, k, v, out, lse, by_scores, by_values, corner, n_q, n_k, pad_q, pad_k, heads, group,
             causal: tl.constexpr, d: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr, part: tl.constexpr,
             top: tl.constexpr):  # fmt: skip
    start, head = tl.program_id(0) * rows, tl.program_id(1)
    head_kv = (head // heads) * (heads // group) + (head % heads) // group
    i, c = start + tl.arange(0, rows), tl.arange(0, d)
    x = tl.load(q + (head * pad_q + i[:, None]) * d + c[None, :])
    factor = tl.load(by_scores + head)
    m = tl.full([rows], float("-inf"), tl.float32)
    z = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, d], tl.float32)
    for j0 in range(0, pad_k, keys):
        j = j0 + tl.arange(0, keys)
        y = tl.load(k + (head_kv * pad_k + j[None, :]) * d + c[:, None])
        s = tl.dot(x, y, max_num_imprecise_acc=part) * factor
        seen = j[None, :] < n_k
        if causal:
            seen = seen & (j[None, :] - i[:, None] - corner <= 0)
        s = tl.where(seen, s, float("-inf"))
        peak = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        p = tl.exp(s - shift[:, None])
        fade = tl.exp(m - shift)
        z = z * fade + tl.sum(p, 1)
        w = tl.load(v + (head_kv * d + c[None, :]) * pad_k + j[:, None])  # values lie with keys side by side
        acc = tl.dot((p * top).to(w.dtype), w, acc * fade[:, None], max_num_imprecise_acc=part)
        m = peak
    acc = tl.where(z[:, None] > 0, acc / z[:, None], 0.0) * (tl.load(by_values + head_kv) / top)
    tl.store(out + (head * n_q + i[:, None]) * d + c[None, :], acc.to(out.dtype.element_ty), mask=i[:, None] < n_q)
    tl.store(lse + head * n_q + i, tl.where(z > 0, m + tl.log(z), float("-inf")), mask=i < n_q)


def _filled(x, n):
    """Return float8 rows filled up with zeros to a multiple of n, side by side."""
    more = -x.shape[2] % n
    return torch.nn.functional.pad(x.contiguous().view(torch.uint8), (0, 0, 0, more)).view(x.dtype)


def _by_head(scale, b, h):
    """Return one scale for each head, in float32."""
    if scale is None or isinstance(scale, float):
        return torch.full((b, h), 1.0 if scale is None else scale, device="cuda")
    return scale.float().expand(b, h, 1, 1).reshape(b, h)


def attention(p: Problem):
    """Return out and lse of a call whose query, key and value are in float8_e4m3fn, scaled by tensor or by head."""
    if any(x.dtype != torch.float8_e4m3fn for x in (p.query, p.key, p.value)):
        raise UnsupportedProblem("query, key, value: expected float8_e4m3fn")
    b, h, many, d = p.batch, p.heads, p.heads_kv, p.d_k
    q, k, v = (_filled(x, n) for x, n in ((p.query, ROWS), (p.key, KEYS), (p.value, KEYS)))
    v = v.view(torch.uint8).transpose(2, 3).contiguous().view(v.dtype)
    kind = torch.float16 if p.out_type == "float16" else torch.bfloat16
    out, lse = torch.empty(p.out_shape, dtype=kind, device="cuda"), torch.empty(p.out_shape[:3], device="cuda")
    scale = p.scale if p.scale is not None else d**-0.5
    of_k = _by_head(p.key_scale, b, many).repeat_interleave(h // many, 1)
    factor = (_by_head(p.query_scale, b, h) * of_k * scale).contiguous()
    by_values = _by_head(p.value_scale, b, many).contiguous()
    corner = p.n_k - p.n_q if p.causal == "bottom_right" else 0
    sizes = (p.n_q, p.n_k, q.shape[2], k.shape[2], h, h // many, p.causal is not None, d, ROWS, KEYS, PART, TOP)
    _forward[(q.shape[2] // ROWS, b * h)](q, k, v, out, lse, factor, by_values, corner, *sizes, num_warps=4)
    return out, lse


def model(dtype: str):
    """Return how it rounds: the operands are what they are, P is stored under 2**8, sums go by 13 bits."""
    unit = {"aligned_bits": 13, "fused": 32, "promoted": PART, "tile": KEYS}
    return replace(on_gpu(dtype), weights="float8_e4m3fn", weights_scale="static", **unit)


attention.model = model
attention.capabilities = Capabilities(
    frozenset({"bfloat16", "float16"}),
    frozenset(FEATURES.split()),
    lse=True,
    arrays="torch",
    device="cuda",
    refuses=True,
    head_dims=frozenset({32, 64, 128}),
    elements=frozenset({"float8_e4m3fn"}),
)
