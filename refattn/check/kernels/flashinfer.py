"""flashinfer's functions for one request and its wrappers for caches in pages.

Their layout is (rows, heads, dim), caches are NHD or HND. The causal diagonal meets the bottom right corner; there is a
left side of a window, which includes its end (-1 is none), and no right one. lse is (rows, heads), to base 2.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from ...errors import UnsupportedProblem
from ...problem import Problem

__all__ = ["decode", "prefill"]

WORKSPACE = 128 * 2**20


def _options(p: Problem, decoding: bool = False) -> dict[str, Any]:
    left, right = p.window or (None, None)
    if right is not None and not (right >= 0 and (p.causal is not None or decoding)):
        raise UnsupportedProblem("window: flashinfer has no right side but causal's")
    return {"sm_scale": p.scale, "window_left": -1 if left is None else left, "logits_soft_cap": p.softcap}


def _natural(lse: Any) -> Any:
    return lse * math.log(2)


def _pages(p: Problem) -> tuple[Any, Any, Any]:
    """Return where each item's pages begin, their numbers in a row, and how many keys its last one has."""
    import torch

    table, size = p.block_table, p.page_size
    used = torch.full(table.shape[:1], p.room, device=table.device) if p.lengths_k is None else p.lengths_k
    if bool((used == 0).any()):
        raise UnsupportedProblem("lengths_k: an item without keys has no last page")
    many = -(-used // size)
    starts = torch.cat([torch.zeros_like(many[:1]), many.cumsum(0)])
    numbers = torch.cat([row[:n] for row, n in zip(table, many.tolist(), strict=True)])
    return starts.int(), numbers.int(), (used - (many - 1) * size).int()


def _workspace(p: Problem) -> Any:
    import torch

    return torch.empty(WORKSPACE, dtype=torch.uint8, device=p.query.device)


def _flat(out: Any, lse: Any, b: int, n: int) -> tuple[Any, Any]:
    """Return (b n, h, d) and (b n, h) as (b, h, n, d) and (b, h, n)."""
    out, lse = out.reshape(b, n, *out.shape[1:]), lse.reshape(b, n, -1)
    return out.transpose(1, 2), _natural(lse).transpose(1, 2)


def prefill(p: Problem) -> Any:
    """Return what single_prefill_with_kv_cache gives, item by item, or of pages BatchPrefillWithPagedKVCacheWrapper."""
    import torch

    flashinfer = importlib.import_module("flashinfer")
    causal, more = {"causal": p.causal is not None}, _options(p)
    if p.block_table is None:
        if p.lengths_k is not None:
            raise UnsupportedProblem("lengths_k: flashinfer takes them of keys in pages")
        out = torch.zeros(p.out_shape, dtype=p.query.dtype, device=p.query.device)
        lse = torch.full(p.out_shape[:3], -torch.inf, device=p.query.device)
        for b in range(p.batch):
            for rows, keys in p.segments(b):
                tensors = [x[b, :, at].transpose(0, 1) for x, at in ((p.query, rows), (p.key, keys), (p.value, keys))]
                found = flashinfer.single_prefill_with_kv_cache(*tensors, **causal, **more, return_lse=True)
                out[b, :, rows], lse[b, :, rows] = found[0].transpose(0, 1), _natural(found[1]).transpose(0, 1)
        return out, lse
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(p), p.page_layout)
    each = torch.arange(p.batch + 1, dtype=torch.int32, device=p.query.device) * p.n_q
    starts = each if p.cu_seqlens_q is None else p.cu_seqlens_q.int()
    kind = {"q_data_type": p.query.dtype, "kv_data_type": p.key.dtype}
    wrapper.plan(starts, *_pages(p), p.heads, p.heads_kv, p.d_k, p.page_size, **causal, **more, **kind)
    query = p.query.transpose(1, 2).reshape(-1, p.heads, p.d_k)
    out, lse = wrapper.run(query, (p.key, p.value), return_lse=True)
    return _flat(out, lse, p.batch, p.n_q)


def decode(p: Problem) -> Any:
    """Return what single_decode_with_kv_cache gives, item by item, or of pages BatchDecodeWithPagedKVCacheWrapper."""
    import torch

    flashinfer = importlib.import_module("flashinfer")
    if p.n_q != 1:
        raise UnsupportedProblem(f"query: {p.n_q} rows, decoding takes one")
    more = _options(p, decoding=True)
    if p.block_table is None:
        if p.lengths_k is not None:
            raise UnsupportedProblem("lengths_k: flashinfer takes them of keys in pages")
        found = [
            flashinfer.single_decode_with_kv_cache(
                p.query[b, :, 0], p.key[b].transpose(0, 1), p.value[b].transpose(0, 1), **more, return_lse=True
            )
            for b in range(p.batch)
        ]
        out, lse = (torch.stack(x) for x in zip(*found, strict=True))
    else:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(p), p.page_layout)
        kind = {"q_data_type": p.query.dtype, "kv_data_type": p.key.dtype}
        wrapper.plan(*_pages(p), p.heads, p.heads_kv, p.d_k, p.page_size, **more, **kind)
        out, lse = wrapper.run(p.query[:, :, 0], (p.key, p.value), return_lse=True)
    return _flat(out, lse, p.batch, 1)
