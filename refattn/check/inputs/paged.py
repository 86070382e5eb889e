"""Calls whose keys and values lie in pages of a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...pages import in_pages
from ...problem import Problem
from .draw import Draw
from .typed import WIDE, typed

__all__ = ["PAGED", "paged"]

LENGTHS = (64, 33, 47)


def paged(
    draw: Draw,
    page_size: int,
    layout: str,
    lengths: tuple[int, ...] = LENGTHS,
    *,
    new: int = 0,
    fill: float = 8.0,
    **more: Any,
) -> Problem:
    """Return a call whose items use so many of their keys, in pages of a cache.

    Items and heads are of their own size, so that another's page shows; what nobody owns is large.
    """
    sizes: dict[str, Any] = {"n_q": 5, "n_k": 64, "h": 4, "h_kv": 2} | more
    p = draw.problem(b=len(lengths), lengths_k=np.array(lengths, np.int32), **sizes)
    by = np.exp2(np.arange(p.batch)[:, None, None, None] - np.arange(p.heads_kv)[:, None, None])
    p = p.replace(value=draw.tensor(p.value.astype(np.float64) * by))
    found: Problem = in_pages(p, page_size, layout, draw.rng, new=new, fill=fill)
    return found


def _shared(d: Draw) -> Problem:
    """Return a call two of whose items begin with the same pages."""
    p = paged(d, 8, "NHD", causal="bottom_right")
    table, key, value = p.block_table.copy(), p.key.copy(), p.value.copy()
    key[table[2, :3]], value[table[2, :3]] = 8, 8
    table[2, :3] = table[0, :3]
    return p.replace(block_table=table, key=key, value=value)


def _in_one(d: Draw) -> Problem:
    """Return a call whose two caches are parts of one array, (pages, 2, h_kv, page_size, d)."""
    p = paged(d, 16, "HND")
    both = np.stack([p.key, p.value], 1)
    return p.replace(key=both[:, 0], value=both[:, 1])


def _packed(d: Draw) -> Problem:
    """Return a prefill, a chunk and a decoding step in one call, each of which brings its keys."""
    rows = (9, 4, 1)
    p = paged(d, 4, "NHD", (9, 30, 64), n_q=9, causal="bottom_right")
    ends = np.cumsum([0, *rows]).astype(np.int32)
    query = np.concatenate([x[:, :n] for x, n in zip(p.query, rows, strict=True)], 1)[None]
    shapes = [(1, p.heads_kv, int(ends[-1]), n) for n in (p.d_k, p.d_v)]
    new_key, new_value = (d.tensor(d.normal(*s)) for s in shapes)
    return p.replace(query=query, cu_seqlens_q=ends, new_key=new_key, new_value=new_value)


def _float8(d: Draw) -> Problem:
    by_head = (1, 2, 1, 1)
    p = typed(d, "float8_e4m3fn", None, by_head, by_head, n_q=5, b=3, lengths_k=np.array(LENGTHS, np.int32))
    found: Problem = in_pages(p, 16, "NHD", d.rng, fill=8.0)
    return found


PAGED: dict[str, tuple[Callable[[Draw], Problem], tuple[str, ...]]] = {
    "shared": (_shared, ()),
    # the stride of a page is not that of an array of pages
    "in-one-array": (_in_one, ()),
    # flashinfer's smallest page, and a size that is no power of two
    "page-of-one": (lambda d: paged(d, 1, "HND", n_k=64, n_q=1), ()),
    # new keys that reach over two edges of pages, one of which was empty
    "appended": (lambda d: paged(d, 3, "HND", (60, 7, 12), new=5, n_k=60, causal="bottom_right"), ()),
    "appended-packed": (_packed, ()),
    "float8": (_float8, WIDE),
    "unowned-nan": (lambda d: paged(d, 8, "HND", fill=np.nan, new=2), ()),
}
"""Calls by label, and the formats that they are made in; () is all."""
