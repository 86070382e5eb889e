"""SGLang's attention in plain PyTorch (``--attention-backend torch_native``), the reference of its other backends.

Its layout is (rows of all requests, heads, dim); keys lie in a pool of tokens, (tokens, heads, dim), and a table says
where each request's are, so pages are any. A request's queries are its last tokens: the causal diagonal meets the
bottom right corner. A window has a left side alone, which includes its end, and is causal. There is no lse.
"""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import UnsupportedProblem
from ...problem import Problem

__all__ = ["extend"]


def extend(p: Problem) -> Any:
    """Return what its ``_run_sdpa_forward_extend`` gives."""
    import torch

    module = importlib.import_module("sglang.srt.layers.attention.torch_native_backend")
    left = _left(p)
    segments = [x for b in range(p.batch) for x in p.segments(b)]
    many = [(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in segments]
    if any(n > m for n, m in many):
        raise UnsupportedProblem("seq: SGLang's queries are the last of a request's tokens, here are more of them")
    pool, table = _pool(p, [keys for _, keys in segments])
    query = torch.cat([p.query[i if p.batch > 1 else 0].transpose(0, 1)[rows] for i, (rows, _) in enumerate(segments)])
    out = torch.zeros(*query.shape[:2], p.d_v, dtype=query.dtype, device=query.device)
    n_q, n_k = (torch.tensor(x, device=query.device) for x in zip(*many, strict=True))
    backend = object.__new__(module.TorchNativeAttnBackend)  # what it would be made of is not read here
    backend._run_sdpa_forward_extend(
        query, out, *pool, table, torch.arange(len(many), device=query.device), n_k, n_k - n_q, n_q,
        scaling=p.scale, enable_gqa=p.heads != p.heads_kv, causal=p.causal is not None, sliding_window_size=left,
    )  # fmt: skip
    found = torch.zeros(p.batch, p.n_q, p.heads, p.d_v, dtype=query.dtype, device=query.device)
    for i, ((rows, _), part) in enumerate(zip(segments, out.split([n for n, _ in many]), strict=True)):
        found[i if p.batch > 1 else 0, rows] = part
    return found.transpose(1, 2)


def _left(p: Problem) -> int | None:
    """Return the left side of a window, which there is beside causal alone."""
    if p.window is None:
        return None
    left, right = p.window
    if p.causal is None or (right is not None and right < 0):
        raise UnsupportedProblem("window: SGLang has a left side beside causal alone")
    return left


def _pool(p: Problem, each: list[slice]) -> tuple[list[Any], Any]:
    """Return keys and values as pools of tokens, and where each request's tokens lie."""
    import torch

    device, longest = p.query.device, max((x.stop - x.start for x in each), default=0)
    table = torch.zeros(len(each), longest, dtype=torch.int64, device=device)
    if p.block_table is not None:
        pool = [x.flatten(0, 1) for x in (p.key, p.value)]
        at = torch.arange(longest, device=device)
        pages = p.block_table.long()[:, at // p.page_size] * p.page_size + at % p.page_size
        return pool, pages.clamp(0, len(pool[0]) - 1)
    pool = [x.transpose(1, 2).flatten(0, 1) for x in (p.key, p.value)]
    for i, keys in enumerate(each):
        first = keys.start + (i * p.n_k if p.batch > 1 else 0)
        table[i, : keys.stop - keys.start] = torch.arange(first, first + keys.stop - keys.start, device=device)
    return pool, table
