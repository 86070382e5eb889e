"""Keys and values in pages of a cache: where each key lies, the same call without pages, and new keys written.

A cache is (pages, page_size, h_kv, d), layout "NHD", or (pages, h_kv, page_size, d), layout "HND": both words are
flashinfer's, and vLLM's and FlashAttention's caches are NHD. Row b of the block table names item b's pages: key j lies
in page block_table[b, j // page_size], at place j % page_size. New keys are the last of an item's `lengths_k` keys, and
go to slot page · page_size + place, as vLLM's slot_mapping counts. Read: flashinfer's documentation of
append_paged_kv_cache, and kernels that write by a slot_mapping; FlashAttention's layout is recalled.
"""

from __future__ import annotations

from collections import Counter
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import dtype_name, kind_of, memory_of, overlapping, to_numpy, why_unusable
from .dtypes import FORMATS
from .errors import InvalidInput, InvalidProblem, expect

__all__ = [
    "AXES",
    "PAGES",
    "append",
    "appended",
    "check_layout",
    "check_pages",
    "check_read",
    "gathered",
    "in_pages",
    "slots",
]

PAGES = ("block_table", "new_key", "new_value")
AXES = {
    None: ("batch", "heads", "seq", "dim"),
    "NHD": ("pages", "page", "heads", "dim"),
    "HND": ("pages", "heads", "page", "dim"),
}
"""The names of the axes of key and value, by layout."""
Integers = NDArray[np.int64]


def check_layout(p: Any) -> None:
    """Refuse a table without a layout, and what means nothing without a table."""
    if p.block_table is None:
        for name in ("page_layout", "new_key", "new_value"):
            if getattr(p, name) is not None:
                raise InvalidProblem(f"{name}: means nothing without block_table, which says whose pages are whose")
    elif not isinstance(p.page_layout, str) or p.page_layout not in AXES:
        raise InvalidProblem(
            f"page_layout: got {p.page_layout!r}, expected 'NHD' for caches (pages, page_size, heads, dim) or 'HND' "
            "for (pages, heads, page_size, dim)"
        )


def check_pages(p: Any) -> None:
    """Refuse a table that does not fit the caches, and new keys that do not fit the table."""
    if p.block_table is None:
        return
    x, many = p.block_table, p.batch if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1
    if (why := why_unusable(x)) is not None:
        raise InvalidProblem(f"block_table: {why}")
    whole = kind_of(x) is not None and dtype_name(x).lstrip("u").startswith("int")
    if not whole or len(x.shape) != 2 or x.shape[0] != many:
        got = type(x).__name__ if kind_of(x) is None else f"{dtype_name(x)} of shape {tuple(x.shape)}"
        what = "batch item" if p.cu_seqlens_q is None else "packed sequence"
        raise InvalidProblem(f"block_table: got {got}, expected ({many}, pages) integers, a row for each {what}")
    if kind_of(x) != p.kind:
        raise InvalidProblem(f"block_table: is of {kind_of(x)} and query of {p.kind}; pass arrays of one library")


def check_read(p: Any) -> None:
    """Refuse a table whose pages are not there where they are read, and keys that two items write."""
    if p.block_table is None:
        return
    table, pages = _table(p), int(p.key.shape[0])
    read = np.arange(table.shape[1]) < -(-_used(p) // p.page_size)[:, None]
    wrong = np.argwhere(read & ((table < 0) | (table >= pages)))
    if wrong.size:
        b, i = wrong[0].tolist()
        raise InvalidProblem(
            f"block_table: item {b} reads page {table[b, i]} (entry {i}), expected 0 to {pages - 1}, the pages that "
            "there are; entries behind lengths_k may be anything"
        )
    if p.new_key is not None or p.new_value is not None:
        _check_new(p, Counter(table[read].tolist()))


def _check_new(p: Any, readers: Counter[int]) -> None:
    n_new = None
    for name, cache in (("new_key", p.key), ("new_value", p.value)):
        x = getattr(p, name)
        if x is None or kind_of(x) != p.kind:
            got = "nothing" if x is None else kind_of(x) or type(x).__name__
            raise InvalidProblem(f"{name}: got {got}, expected an array of {p.kind}; new keys come with new values")
        if dtype_name(x) != dtype_name(cache):
            raise InvalidProblem(
                f"{name}: got dtype {dtype_name(x)}, expected the cache's {dtype_name(cache)}; cast it"
            )
        n_new = p.n_q if p.cu_seqlens_q is not None else x.shape[2] if n_new is None and len(x.shape) == 4 else n_new
        if tuple(x.shape) != (p.batch, p.heads_kv, n_new, cache.shape[3]):
            want = f"({p.batch}, {p.heads_kv}, {'new rows' if n_new is None else n_new}, {cache.shape[3]})"
            raise InvalidProblem(f"{name}: got shape {tuple(x.shape)}, expected {want}")
    if p.cu_seqlens_q is not None and p.lengths_q is not None:
        raise InvalidProblem("new_key: packed sequences with lengths_q have no new keys; leave gaps out of the packing")
    _check_memory(p)
    counts, used = _counts(p), _used(p)
    for b, (n, m) in enumerate(zip(counts.tolist(), used.tolist(), strict=True)):
        if n > m:
            raise InvalidProblem(f"new_key: has {n} rows for item {b}, whose lengths_k is {m}; it counts new keys, too")
    writers: dict[int, int] = {}
    for b, page in zip(np.repeat(np.arange(len(counts)), counts).tolist(), _places(p)[0].ravel().tolist(), strict=True):
        if writers.setdefault(page, b) != b:
            raise InvalidProblem(
                f"block_table: page {page} is written for items {writers[page]} and {b}; copy it first"
            )
    for page, b in writers.items():
        if readers[page] > 1:
            raise InvalidProblem(
                f"block_table: page {page} is written for item {b} and listed {readers[page]} times; a page that is "
                "written is one item's alone: copy it first"
            )


def _check_memory(p: Any) -> None:
    """Refuse caches that are written where something else lies."""
    placed = {n: memory_of(x) for n, x in p.arrays().items()}
    caches = {n: x for n in ("key", "value") if (x := placed.pop(n)) is not None}
    for name, x in caches.items():
        if overlapping(x.shape, x.strides, x.itemsize):
            raise InvalidProblem(f"{name}: its elements share memory, and new_{name} is written there; pass a copy")
    for name, other in placed.items():
        for cache, x in caches.items():
            if other is not None and np.shares_memory(x, other):
                raise InvalidProblem(f"{name}: shares memory with {cache}, where new keys are written; pass a copy")
    if len(caches) == 2 and np.shares_memory(caches["key"], caches["value"]):
        _check_shared(p, caches["key"], caches["value"])


def _check_shared(p: Any, key: NDArray[Any], value: NDArray[Any]) -> None:
    """Allow a value that is columns of key's rows, as of a latent, where the new rows agree in them."""
    steps = zip(key.strides, value.strides, key.shape, value.shape, strict=True)
    same = key.itemsize == value.itemsize and all(s == t or 1 in (m, n) for s, t, m, n in steps)
    step = (key if key.shape[3] > 1 else value).strides[3] or key.itemsize
    gap = value.__array_interface__["data"][0] - key.__array_interface__["data"][0]
    first, rest = divmod(gap, step)  # the column of key at which value begins
    low, high = min(0, first), max(p.d_k, first + p.d_v)
    strides = tuple((key if n > 1 else value).strides[i] for i, n in enumerate(key.shape[:3]))
    if not same or rest or overlapping((*key.shape[:3], high - low), (*strides, step), key.itemsize):
        raise InvalidProblem(
            "value: shares memory with key's other rows, and new keys are written there; pass a copy of it, or columns "
            "of key, key[..., :d_v]"
        )
    a, b = max(0, first), min(p.d_k, first + p.d_v)
    new_key, new_value = to_numpy(p.new_key, "new_key")[..., a:b], to_numpy(p.new_value, "new_value")
    if new_key.tobytes() != new_value[..., a - first : b - first].tobytes():
        raise InvalidProblem(
            f"new_value: differs from new_key in columns {a} to {b - 1} of key, which value shares; give both the same "
            "numbers there, or pass a copy of value"
        )


def _table(p: Any) -> Integers:
    return to_numpy(p.block_table, "block_table").astype(np.int64)


def _used(p: Any) -> Integers:
    """Return how many keys of each row of the table are used."""
    if p.lengths_k is not None:
        return to_numpy(p.lengths_k, "lengths_k").astype(np.int64)
    return np.full(p.block_table.shape[0], p.room)


def _counts(p: Any) -> Integers:
    """Return how many keys are new in each row of the table."""
    if p.cu_seqlens_q is not None:
        ends = to_numpy(p.cu_seqlens_q, "cu_seqlens_q").astype(np.int64)
        return ends[1:] - ends[:-1]
    return np.full(p.batch, p.new_key.shape[2])


def _places(p: Any) -> tuple[Integers, Integers]:
    """Return the page, and the place in it, of each new key: (b, new keys) each."""
    counts, ends = _counts(p), _used(p)
    rows = np.repeat(np.arange(len(counts)), counts)
    after = np.repeat(np.cumsum(counts), counts) - np.arange(counts.sum())
    at = ends[rows] - after
    shape = (p.batch, -1) if p.batch else (0, p.new_key.shape[2])
    return _table(p)[rows, at // p.page_size].reshape(shape), (at % p.page_size).reshape(shape)


def slots(problem: Any) -> Integers:
    """Return where each new key goes, page · page_size + place, as vLLM's slot_mapping.

    Parameters
    ----------
    problem : Problem
        With `new_key`.

    Returns
    -------
    slots : (b, new keys) int64 array

    Raises
    ------
    InvalidInput
        What is no call, or one without new keys.
    """
    _expect_call(problem)
    if problem.new_key is None:
        raise InvalidInput("problem: has no new_key, expected a call in pages that appends; only new keys have slots")
    page, place = _places(problem)
    return page * int(problem.page_size) + place


def append(problem: Any) -> None:
    """Write the new keys and values of a call into its caches, which are NumPy arrays."""
    page, place = _places(problem)
    for cache, new in ((problem.key, problem.new_key), (problem.value, problem.new_value)):
        _by_page(cache, problem.page_layout)[page, place] = new.swapaxes(1, 2)


def appended(problem: Any) -> dict[str, NDArray[Any]]:
    """Return key and value as they must be after a call: copies with the new keys written, and nothing else changed."""
    p = problem.replace(key=problem.key.copy(), value=problem.value.copy())
    append(p)
    return {"key": p.key, "value": p.value}


def _by_page(cache: NDArray[Any], layout: str) -> NDArray[Any]:
    """Return a view of a cache as (pages, page_size, h_kv, d)."""
    return cache if layout == "NHD" else cache.swapaxes(1, 2)


def gathered(problem: Any) -> Any:
    """Return the same call without pages: each item's keys side by side, in NumPy arrays; itself where none are paged.

    Parameters
    ----------
    problem : Problem
        New keys are written first. What is not read, pages that nobody owns among it, is 0 here.

    Raises
    ------
    InvalidInput
        What is no call.
    """
    _expect_call(problem)
    if problem.block_table is None:
        return problem
    p = problem.to("numpy")
    caches = {"key": p.key, "value": p.value} if p.new_key is None else appended(p)
    changed: dict[str, Any] = {n: _rows(p, x, 0) for n, x in caches.items()}
    for name in ("key_scale", "value_scale"):
        x = getattr(p, name)
        if x is not None and not isinstance(x, float):
            changed[name] = _scales(p, x)
    if p.cu_seqlens_q is not None:
        changed["cu_seqlens_k"] = np.arange(p.block_table.shape[0] + 1) * p.room
    return p.replace(**changed, **dict.fromkeys((*PAGES, "page_layout")))


def _rows(p: Any, cache: NDArray[Any], fill: int) -> NDArray[Any]:
    """Return the used keys of a cache, (b, heads, keys, d), the others filled."""
    table, used, size = _table(p), _used(p), p.page_size
    read = np.arange(table.shape[1]) < -(-used // size)[:, None]
    pages = _by_page(cache, p.page_layout)
    found = np.full((*table.shape, *pages.shape[1:]), fill, cache.dtype)
    found[read] = pages[table[read]]
    found = found.reshape(len(table), table.shape[1] * size, *pages.shape[2:])
    found[np.arange(found.shape[1]) >= used[:, None]] = fill
    if p.cu_seqlens_q is not None:
        found = found.reshape(1, -1, *pages.shape[2:])
    return np.ascontiguousarray(found.swapaxes(1, 2))


def _scales(p: Any, x: NDArray[Any]) -> NDArray[Any]:
    """Return a scale of a cache's axes as one of the gathered keys' axes."""
    pages = _by_page(x, p.page_layout)
    if pages.shape[:2] == (1, 1):
        return pages.swapaxes(1, 2)
    for axis, n in enumerate((int(p.key.shape[0]), p.page_size)):
        pages = np.repeat(pages, n // pages.shape[axis], axis)
    return _rows(p, _by_page(pages, p.page_layout), 1)


def in_pages(
    problem: Any,
    page_size: int,
    layout: str,
    rng: np.random.Generator,
    *,
    spare: int = 2,
    new: int = 0,
    fill: float = np.nan,
) -> Any:
    """Return the same call with its keys and values in pages, which lie anywhere in a cache.

    Parameters
    ----------
    problem : Problem
        Without packed sequences, of NumPy arrays, whose scales of key and value are by head or by channel at most.
    page_size : int
        Keys to a page; it divides n_k.
    layout : {"NHD", "HND"}
        The order of a cache's axes.
    rng : numpy.random.Generator
        What draws the places of the pages.
    spare : int
        Pages that nobody owns. One of them stands in the table behind `lengths_k`.
    new : int
        How many of each item's keys are new: the call writes them.
    fill : float
        What stands in pages that nobody owns, behind `lengths_k`, and where new keys go; 1 instead of NaN or infinity
        where the type has none.

    Raises
    ------
    InvalidInput
        Which argument cannot be used, and what was expected.
    """
    p, used = problem, _expect_pages(problem, page_size, layout, rng, spare, new, fill)
    columns = p.n_k // page_size
    owned = np.arange(columns) < -(-used // page_size)[:, None]
    places = rng.permutation(int(owned.sum()) + spare)
    table = np.full((p.batch, columns), places[0] if spare else 0, np.int32)
    table[owned] = places[spare:]
    changed: dict[str, Any] = {}
    keep = np.arange(p.n_k) < (used - new)[:, None]
    for name in ("key", "value"):
        x = getattr(p, name).swapaxes(1, 2)
        nothing = _filling(f"{name}: fill", fill, x.dtype)
        rows = np.where(keep[..., None, None], x, np.array(nothing).astype(x.dtype))
        cache = np.full((len(places), page_size, *x.shape[2:]), nothing, x.dtype)
        cache[table[owned]] = rows.reshape(p.batch, columns, page_size, *x.shape[2:])[owned]
        changed[name] = np.ascontiguousarray(_by_page(cache, layout))
        if new:
            at = (used - new)[:, None] + np.arange(new)
            fresh = np.take_along_axis(x, at[..., None, None], 1)
            changed[f"new_{name}"] = np.ascontiguousarray(fresh.swapaxes(1, 2))
        scale = getattr(p, f"{name}_scale")
        if scale is not None and not isinstance(scale, float):
            if scale.shape[0] > 1 or scale.shape[2] > 1:
                raise InvalidInput(f"{name}_scale: is by batch or token; expected one by head or channel")
            changed[f"{name}_scale"] = scale if layout == "HND" else scale.swapaxes(1, 2)
    return p.replace(**changed, block_table=table, page_layout=layout)


def _expect_call(x: Any) -> None:
    expect(hasattr(x, "block_table") and hasattr(x, "query"), "problem", x, "a Problem")


def _expect_pages(p: Any, page_size: Any, layout: Any, rng: Any, spare: Any, new: Any, fill: Any) -> Integers:
    """Refuse what cannot be put in pages so, and return how many keys of each item are used."""

    def whole(x: Any, low: int) -> bool:
        return isinstance(x, int | np.integer) and not isinstance(x, bool) and bool(x >= low)

    _expect_call(p)
    expect(isinstance(layout, str) and layout in ("NHD", "HND"), "layout", layout, "'NHD' or 'HND'")
    if p.kind != "numpy":
        raise InvalidInput(f"problem: is of {p.kind}, expected arrays of NumPy; pass problem.to('numpy')")
    if p.cu_seqlens_q is not None or p.block_table is not None:
        raise InvalidInput("problem: is packed or in pages already; expected keys (b, h_kv, n_k, d)")
    good = whole(page_size, 1) and not p.n_k % page_size
    expect(good, "page_size", page_size, f"an integer of at least 1 that divides {p.n_k} keys")
    expect(isinstance(rng, np.random.Generator), "rng", rng, "a Generator, numpy.random.default_rng(0)")
    expect(whole(spare, 0), "spare", spare, "an integer of at least 0")
    expect(isinstance(fill, Real) and not isinstance(fill, bool), "fill", fill, "a number, NaN or an infinity")
    used = np.full(p.batch, p.n_k) if p.lengths_k is None else p.lengths_k.astype(np.int64)
    most = min(used.tolist(), default=0)
    expect(whole(new, 0) and new <= most, "new", new, f"an integer from 0 to {most}, the keys that every item has")
    return used


def _filling(name: str, fill: float, dtype: np.dtype[Any]) -> float:
    """Return what fills a cache of a type."""
    if dtype.name in FORMATS or not np.isfinite(fill):
        return fill if dtype.name in FORMATS else 1
    if dtype == np.int8:
        expect(-128 <= fill <= 127 and fill == int(fill), name, fill, "an int8, -128 to 127")
    return fill
