"""What a kernel must be able to do for a call, as names of ``Capabilities``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .arrays import dtype_name
from .validation import SCALES

__all__ = ["features_of"]

NAMED = ("rotary", "dropout_mask", "philox_layout")
"""Options whose feature says how they are given."""


def features_of(p: Any, meanings: Sequence[str]) -> frozenset[str]:
    """Return the features of a call.

    Parameters
    ----------
    p : Problem
        The call.
    meanings : sequence of str
        The options that mean something for some operators only: the first is causal, the last alignment.
    """
    found = {name for name in meanings[1:-1] if name not in NAMED and getattr(p, name) is not None}
    plain = {
        "alignment": p.causal is None and p.corner == "top_left",
        "negative_window": p.window is not None and any(side is not None and side < 0 for side in p.window),
        f"causal_{p.causal}": p.causal is not None,
        "variable_lengths": p.cu_seqlens_q is not None,
        "grouped_heads": p.heads != p.heads_kv,
        "d_k_zero": p.d_k == 0,
        "positions": p.positions_q is not None or p.positions_k is not None,
        "d_v_differs": p.d_k != p.d_v,
        "lengths_differ": p.n_q != p.n_k,
        "scale": p.scale is not None,
        "no_rows_or_keys": 0 in (p.batch, p.n_q, p.n_k),
    }
    found |= {name for name, yes in plain.items() if yes}
    if p.rotary is not None:
        found.add(f"rotary_{p.rotary}")
        if 2 * p.rotary_cos.shape[1] < p.d_k:
            found.add("rotary_partial")
    if p.philox_layout is not None:
        found.add(f"philox_{p.philox_layout}")
    if p.dropout_mask is not None:
        found.add("dropout_bits" if dtype_name(p.dropout_mask) == "uint8" else "dropout_mask")
    if p.typed:
        found |= set(_types(p))
    if p.page_layout is not None:
        found |= {f"paged_{p.page_layout.lower()}"} | ({"appending"} if p.new_key is not None else set())
    return frozenset(found)


def _types(p: Any) -> Iterator[str]:
    if any(dtype_name(x) != p.dtype for x in (p.key, p.value)):
        yield "types_differ"
    if p.out_type != p.dtype:
        yield "out_dtype"
    if p.out_scale is not None:
        yield "out_scale"
    for name in SCALES[:3]:
        scale, x = getattr(p, name), getattr(p, name.removesuffix("_scale"))
        if scale is None:
            continue
        yield "scales"
        one, many = (tuple(getattr(a, "shape", (1, 1, 1, 1))) for a in (scale, x))
        if p.page_layout is not None and name != "query_scale":  # a page and a place in it are one axis
            head, place = (2, 1) if p.page_layout == "NHD" else (1, 2)
            one, many = ((1, a[head], a[0] * a[place], a[3]) for a in (one, many))
        yield from ("scales_by_head",) if max(one[:2]) > 1 else ()
        for axis, kind in ((2, "scales_by_token"), (3, "scales_by_channel")):
            if one[axis] > 1:
                yield kind if one[axis] == many[axis] else "scales_by_block"
