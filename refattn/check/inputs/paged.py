"""Calls whose keys and values lie in pages of a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...pages import in_pages
from ...problem import Problem
from ...scales import quantised
from .draw import Draw
from .positioned import rotary, slopes
from .typed import WIDE, typed

__all__ = ["PAGED", "paged"]

LAYOUTS = ("NHD", "HND")

LENGTHS = (64, 33, 47)
ROOM = 80
"""Keys that a table has room for: more than any item uses."""


def paged(
    draw: Draw,
    page_size: int,
    layout: str,
    lengths: tuple[int, ...] | None = LENGTHS,
    *,
    new: int = 0,
    fill: float = 8.0,
    **more: Any,
) -> Problem:
    """Return a call whose items use so many of their keys, in pages of a cache.

    Items and heads are of their own size, so that another's page shows; what nobody owns is large. Without lengths
    three items use all that there is room for.
    """
    sizes: dict[str, Any] = {"n_q": 5, "n_k": ROOM, "h": 4, "h_kv": 2, "b": 3} | more
    if lengths is not None:
        sizes |= {"b": len(lengths), "lengths_k": np.array(lengths, np.int32)}
    if draw.able is not None and draw.able.page_multiple > 1:  # pages and room for whole ones
        page_size = -(-page_size // draw.able.page_multiple) * draw.able.page_multiple
        sizes["n_k"] = -(-sizes["n_k"] // page_size) * page_size
    layout, new = draw.one_of(layout, *LAYOUTS, of="paged"), new if draw.has("appending") else 0
    p = draw.problem(**sizes)
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
    p = paged(d, 16, "HND", None)
    both = np.stack([p.key, p.value], 1)
    return p.replace(key=both[:, 0], value=both[:, 1])


def _packed(d: Draw) -> Problem:
    """Return a prefill, a chunk and a decoding step in one call, each of which brings its keys if it may."""
    rows = (9, 4, 1)
    p = paged(d, 4, "NHD", (9, 30, 64), n_q=9, causal="bottom_right")
    ends = np.cumsum([0, *rows]).astype(np.int32)
    query = np.concatenate([x[:, :n] for x, n in zip(p.query, rows, strict=True)], 1)[None]
    shapes = [(1, p.heads_kv, int(ends[-1]), n) for n in (p.d_k, p.d_v)]
    new_key, new_value = (d.tensor(d.normal(*s)) for s in shapes)
    new = {"new_key": new_key, "new_value": new_value} if d.has("appending") else {}
    return p.replace(query=query, cu_seqlens_q=ends, **new)


def _float8(d: Draw) -> Problem:
    """Return a call whose keys have a scale for each head, and whose values one for each slot of each page."""
    layout, lengths = d.one_of("NHD", "HND", of="paged"), np.array(LENGTHS, np.int32)
    p = typed(d, "float8_e4m3fn", None, (1, 2, 1, 1), None, n_q=5, n_k=ROOM, b=3, lengths_k=lengths)
    x: Problem = in_pages(p, 16, layout, d.rng, fill=8.0)
    pages, heads = x.key.shape[0], x.heads_kv
    by = np.exp2(d.rng.integers(-3, 3, (pages, 16, 1, 1)))
    one = (pages, 16, 1, 1) if d.has("scales_by_token") else (1, 1, heads, 1)
    if layout == "HND":
        by, one = by.swapaxes(1, 2), (one[0], one[2], one[1], 1)
    value, scale = quantised(x.value.astype(np.float64) * by, "float8_e4m3fn", one)
    return x.replace(value=value, value_scale=scale)


def _single(d: Draw) -> Problem:
    """Return a call with more pages than a byte counts, an item without keys, and every second entry of a table."""
    p = paged(d, 1, "HND", (600, 33, 0), n_k=610, n_q=1)
    return p.replace(block_table=np.repeat(p.block_table, 2, 1)[:, ::2])


def _options(d: Draw) -> Problem:
    """Return a call with every option but rotary positions: what is by key counts an item's keys, not a cache's."""
    more: dict[str, Any] = {"bias": d.normal(1, 4, 5, ROOM), "allowed": d.mask(3, 1, 5, ROOM), "sink": d.normal(4)}
    more |= {"window": (17, 3), "softcap": 4.0, "scale": 0.3, "alibi_slopes": slopes(d, 4) / 8}
    more |= {"weight": np.exp(d.normal(3, 1, 1, ROOM)), "lengths_q": np.array([5, 2, 4], np.int32)}
    return paged(d, 8, "NHD", causal="bottom_right", **more)


def _rotary(d: Draw) -> Problem:
    """Return a call whose queries stand anywhere, and whose keys at their places in their items."""
    more: dict[str, Any] = {"positions_q": d.rng.integers(0, 90, 5), **rotary(d, "interleaved", 12, 90, 500.0)}
    return paged(d, 4, "HND", new=3, causal="bottom_right", **more)


PAGED: dict[str, tuple[Callable[[Draw], Problem], tuple[str, ...]]] = {
    "shared": (_shared, ()),
    # the stride of a page is not that of an array of pages
    "in-one-array": (_in_one, ()),
    # flashinfer's smallest page, and a size that is no power of two
    "page-of-one": (_single, ()),
    # new keys that reach over two edges of pages, one of which was empty
    "appended": (lambda d: paged(d, 3, "HND", (60, 7, 12), new=5, n_k=63, d_v=24, causal="bottom_right"), ()),
    "appended-packed": (_packed, ()),
    "float8": (_float8, WIDE),
    "unowned-nan": (lambda d: paged(d, 8, "HND", fill=np.nan, new=2), ()),
    # an option that the paged path alone leaves out
    "options": (_options, ()),
    # old keys and new ones are turned, by where they stand in their item
    "rotary": (_rotary, ()),
}
"""Calls by label, and the formats that they are made in; () is all."""
