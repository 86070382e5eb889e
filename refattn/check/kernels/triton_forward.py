"""A forward kernel in Triton, from the algorithm: online softmax over tiles of keys, one tile of rows a program."""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["forward"]

KEYS = 64


@triton.jit
def _forward(q, k, v, out, lse, scale, corner, n_q, n_k, d, heads, group, causal: tl.constexpr, width: tl.constexpr,
             rows: tl.constexpr, keys: tl.constexpr):  # fmt: skip
    start, head = tl.program_id(0) * rows, tl.program_id(1)
    batch, h = head // heads, head % heads
    head_kv = batch.to(tl.int64) * (heads // group) + h // group
    i, c = start + tl.arange(0, rows), tl.arange(0, width)
    at = head.to(tl.int64) * n_q * d + i[:, None].to(tl.int64) * d + c[None, :]
    x = tl.load(q + at, mask=(i[:, None] < n_q) & (c[None, :] < d), other=0.0)
    m = tl.full([rows], float("-inf"), tl.float32)
    z = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, width], tl.float32)
    end = n_k
    if causal:
        end = tl.minimum(n_k, start + rows + corner)
    for j0 in range(0, end, keys):
        j = j0 + tl.arange(0, keys)
        there = (j[:, None] < n_k) & (c[None, :] < d)
        offset = head_kv * n_k * d + j[:, None].to(tl.int64) * d + c[None, :]
        s = tl.dot(x, tl.trans(tl.load(k + offset, mask=there, other=0.0)), input_precision="ieee") * scale
        seen = j[None, :] < n_k
        if causal:
            seen = seen & (j[None, :] - i[:, None] - corner <= 0)
        s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp(s - shift[:, None])
        fade = tl.exp(m - shift)
        z = z * fade + tl.sum(p, 1)
        y = tl.load(v + offset, mask=there, other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(y.dtype), y, input_precision="ieee")
        m = top
    acc = tl.where(z[:, None] > 0, acc / z[:, None], 0.0)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(i[:, None] < n_q) & (c[None, :] < d))
    tl.store(lse + head.to(tl.int64) * n_q + i, tl.where(z > 0, m + tl.log(z), float("-inf")), mask=i < n_q)


def forward(q, k, v, scale, causal, group):
    """Return out and lse of (b, h, n, d) CUDA tensors; causal is None, "bottom_right" or "top_left"."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    out = torch.empty_like(q)
    lse = torch.empty((b, h, n_q), dtype=torch.float32, device=q.device)
    width = max(16, triton.next_power_of_2(d))
    corner = n_k - n_q if causal == "bottom_right" else 0
    rows = 128 if width <= 128 and q.element_size() == 2 else 64
    grid = (triton.cdiv(n_q, rows), b * h)
    size = (width, rows, KEYS)
    _forward[grid](
        q, k, v, out, lse, scale, corner, n_q, n_k, d, h, group, causal is not None, *size, num_warps=rows // 16
    )
    return out, lse
