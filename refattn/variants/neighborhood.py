"""Neighborhood attention: queries on a grid of 1 to 3 axes, each with a window of keys around it, axis by axis."""

from __future__ import annotations

import math
from functools import reduce
from itertools import product
from operator import and_
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..masks import both
from ..problem import Problem
from ..rules import Rule
from ..rules.rule import Atom
from .option import Option, flags, wholes
from .shapes import Lowered
from .softmax import attention
from .variant import COMMON_BUGS, COMMON_LAWS, Variant, unplaced

__all__ = ["NEIGHBORHOOD", "grid_mask"]

Mask = NDArray[np.bool_]


def ends(i: NDArray[np.int64], n: Any, window: int, stride: int, causal: bool) -> tuple[Any, Any]:
    """Return the first key of each query's window along an axis of n tokens, and the one after its last.

    The queries of a stride share the window of their leader. At a border the window moves inwards, so that it holds
    as many keys as everywhere; a causal one ends with the query.
    """
    lead = np.minimum(i // stride * stride + (stride - 1 if causal else stride // 2), n - 1)
    if causal:
        return np.maximum(lead - window + 1, 0), i + 1
    before, after = window // 2, window // 2 + window % 2 - 1
    first = np.maximum(lead - before, 0) + np.where(lead + after >= n, n - after - lead - 1, 0)
    return first, first + window


def grid_rule(shape: tuple[int, ...], o: Any, ends: Any = ends, extra: bool = True) -> Rule:
    """Return which tokens of a grid a query sees, rows before columns; of the keys after the grid's all, or none."""
    tokens, axes = math.prod(shape), []
    for axis, (n, w, s, d, causal) in enumerate(zip(shape, *along(shape, o), strict=True)):
        group = np.arange(n) % d
        first, last = ends(np.arange(n) // d, -(-(n - group) // d), w, s, causal)
        axes.append((axis, n, d, group, *(np.broadcast_to(x, n) for x in (first, last))))

    def formula(x: Any) -> Any:
        seen = x.k >= tokens if extra else x.k < 0
        return seen | ((x.k < tokens) & reduce(and_, (near(x, *axis) for axis in axes)))

    def near(x: Any, axis: int, n: int, d: int, group: Any, first: Any, last: Any) -> Any:
        step = math.prod(shape[axis + 1 :])
        q, k = (i // step % n if axis else x.clip(i // step, 0, n - 1) for i in (x.q, x.k))
        inside = (k // d >= x.look("first", first, q)) & (k // d < x.look("last", last, q))
        return inside & (k % d == x.look("group", group, q)) if d > 1 else inside

    return Atom(f"grid({shape})", formula)


def grid_mask(shape: tuple[int, ...], o: Any) -> Mask:
    """Return which tokens of a grid a query sees, (tokens, tokens)."""
    return grid_rule(shape, o).dense(math.prod(shape), math.prod(shape))


def along(shape: tuple[int, ...], o: Any) -> tuple[tuple[Any, ...], ...]:
    """Return window, stride, dilation and causal by axis, defaults filled in: a window of None is the whole axis."""
    usual = (shape, (1,) * len(shape), (1,) * len(shape), (False,) * len(shape))
    return tuple(
        x if y is None else y for x, y in zip(usual, (o.window, o.stride, o.dilation, o.is_causal), strict=True)
    )


def lower(p: Problem, o: Any, ends: Any = ends, extra: bool = True, turned: bool = False) -> Problem:
    """Write the windows as a mask; the keys after those of the grid are seen by all."""
    shape = o.shape or (p.n_q,)
    rule = grid_rule(shape[::-1] if turned else shape, o, ends, extra)
    return p.replace(variant="softmax", options={}, allowed=both(p.allowed, rule))


def by_loops(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Write the same as softmax over a mask that loops over the tokens of the grid make, windows by clipping."""
    shape = o.shape or (q.shape[0],)
    seen = np.zeros((q.shape[0], k.shape[0]), bool)
    seen[:, math.prod(shape) :] = True
    places = list(product(*map(range, shape)))
    for i, at in enumerate(places):
        axes = []
        for x, n, w, s, d, causal in zip(at, shape, *along(shape, o), strict=True):
            mates = range(x % d, n, d)
            own, lead = x // d, x // d // s * s
            low = max(min(lead + s - 1, len(mates) - 1) - w + 1, 0)
            first = low if causal else min(max(min(lead + s // 2, len(mates) - 1) - w // 2, 0), len(mates) - w)
            axes.append(set(mates[first : own + 1 if causal else first + w]))
        seen[i, : len(places)] = [all(y in axis for y, axis in zip(to, axes, strict=True)) for to in places]
    o.allowed = o.allowed & seen
    return attention(q, k, v, o)


def fits(p: Problem) -> str | None:
    """Refuse grids that are not the queries', and windows that do not fit an axis."""
    o = {n: p.options.get(n, x.default) for n, x in OPTIONS.items()}
    shape = o["shape"] or (p.n_q,)
    if text := unplaced(p, "grids"):
        return text
    if math.prod(shape) != p.n_q:
        return f"shape: got {shape} of {math.prod(shape)} tokens, expected as many as queries, {p.n_q}"
    for name in ("window", "stride", "dilation", "is_causal"):
        if o[name] is not None and len(o[name]) != len(shape):
            return f"{name}: got {o[name]}, expected one for each of {len(shape)} axes"
    if o["window"] is None:
        named = next((n for n in ("stride", "dilation") if o[n] is not None), None)
        return f"{named}: needs window; without one a query sees all" if named else None
    for axis, (n, w, s, d, _) in enumerate(zip(shape, *along(shape, SimpleNamespace(**o)), strict=True)):
        if w * d > n:
            return f"window: got {w} with dilation {d} along axis {axis} of {n} tokens, expected at most {n // d}"
        if s > w:
            return f"stride: got {s} along axis {axis}, expected at most window's {w}"
    return None


def tries(n_q: int, n_k: int) -> list[dict[str, Any]]:
    """Return options for a call of some length: one axis, and two where its length is a product."""
    found: list[dict[str, Any]] = [{}]
    for shape in [(n_q,), *((a, n_q // a) for a in range(2, n_q) if n_q % a == 0)]:
        grid: dict[str, Any] = {"shape": shape} if len(shape) > 1 else {}
        half = tuple(max(1, n // 2) for n in shape)
        grid["window"] = tuple(max(1, (n + 1) // 2) for n in shape)
        far = {"window": half, "dilation": tuple(n // m for n, m in zip(shape, half, strict=True))}
        found += [grid, grid | {"is_causal": (True, False)[: len(shape)]}, grid | {"stride": half}, grid | far]
    return found if n_q else [{}]


def by_axis(meaning: str, check: Any, *samples: Any) -> Option:
    """Return an option with a value for each axis of the grid."""
    return Option(None, meaning, check, (None, *samples), by_head=False)


OPTIONS = {
    "shape": by_axis("tokens along each axis of the queries' grid; None is one axis", wholes(1), (8, 6)),
    "window": by_axis("keys of a window along each axis; None is all", wholes(1), (2,), (2, 3)),
    "stride": by_axis("queries along each axis that share a window; None is 1", wholes(1), (2,), (2, 3)),
    "dilation": by_axis("tokens from one key of a window to the next; None is 1", wholes(1), (2,), (2, 2)),
    "is_causal": by_axis("along which axes no later key is seen; None is none", flags, (True,), (True, False)),
}


def shrinks(i: Any, n: Any, window: int, stride: int, causal: bool) -> tuple[Any, Any]:
    """Cut windows at a border."""
    lead = i // stride * stride + (stride - 1 if causal else stride // 2)
    return (lead - window + 1, i + 1) if causal else (lead - window // 2, lead - window // 2 + window)


def leans(i: Any, n: Any, window: int, stride: int, causal: bool) -> tuple[Any, Any]:
    """Give even windows the longer side after the query."""
    first, last = ends(i, n, window, stride, causal)
    moved = 0 if causal or window % 2 else np.where(last < n, 1, 0)
    return first + moved, last + moved


def leads_first(i: Any, n: Any, window: int, stride: int, causal: bool) -> tuple[Any, Any]:
    """Take the first query of a stride for its leader."""
    return ends(i // stride * stride, n, window, 1, causal)


def centred(i: Any, n: Any, window: int, stride: int, causal: bool) -> tuple[Any, Any]:
    """Cut a centred window at the query where it is causal."""
    first, last = ends(i, n, window, stride, False)
    return first, np.minimum(last, i + 1) if causal else last


IMAGE = {"shape": (6, 8), "window": (3, 4)}
DEFINE = Lowered(lower)
NEIGHBORHOOD = Variant(
    name="neighborhood",
    define=DEFINE,
    forms={"by_loops": by_loops},
    formula="softmax attention of a token to the tokens that lie, along every axis of the grid, in its window; and to "
    "the keys after the grid's",
    unit="u · sum_j p_ij |v_jc|",
    source="Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143, dilation of arXiv 2209.15001, "
    "strides of Generalized Neighborhood Attention, arXiv 2504.16922; NATTEN 0.21.7's mask.hpp was read.",
    compared="natten 0.21.7, flex backend: 40 random grids of 1 to 3 axes, the same keys (tests/peers/test_natten.py)",
    uses=frozenset({"softcap", "sink", "bias", "allowed", "weight"}),
    options=OPTIONS,
    laws=tuple(n for n in COMMON_LAWS if n not in ("key_permutation", "past_31_bits", "row_invariance")),
    bugs=tuple(n for n in COMMON_BUGS if not {"causal", "window", "own", "sequences"} & set(n.split("_"))),
    contract=(
        "A window of w keys has w // 2 before the query and the rest from it on; at a border it moves inwards.",
        "Along a causal axis it ends with the query, and is shorter at the first border.",
        "With a dilation of d the tokens of an axis fall into d groups, each an axis of its own.",
        "The queries of a stride share the window of the one in their middle; of the last one along a causal axis.",
        "No row is empty, unless `allowed` makes it so: it gives out 0 and lse -inf.",
    ),
    has_lse=True,
    positive=True,
    cases={
        "line": {"n_q": 67, "n_k": 67, "options": {"window": (7,)}},
        "even-window": {"n_q": 37, "n_k": 37, "options": {"window": (8,)}},
        "image": {"n_q": 48, "n_k": 48, "options": IMAGE},
        "extra-keys": {"n_q": 48, "n_k": 51, "h": 4, "h_kv": 2, "options": IMAGE},
        "dilation": {"n_q": 63, "n_k": 63, "options": {"shape": (9, 7), "window": (3, 2), "dilation": (2, 3)}},
        "stride": {"n_q": 60, "n_k": 60, "options": {"shape": (10, 6), "window": (5, 4), "stride": (4, 3)}},
        "causal-axis": {
            "n_q": 60,
            "n_k": 60,
            "options": {"shape": (10, 6), "window": (4, 3), "is_causal": (True, False)},
        },
        "causal-stride": {
            "n_q": 40,
            "n_k": 40,
            "options": {"window": (6,), "stride": (3,), "dilation": (2,), "is_causal": (True,)},
        },
        "causal-dilation": {
            "n_q": 24,
            "n_k": 27,
            "options": {"window": (4,), "dilation": (2,), "is_causal": (True,)},
        },
        "causal-columns": {
            "n_q": 24,
            "n_k": 24,
            "options": {"shape": (4, 6), "window": (3, 3), "is_causal": (False, True)},
        },
        "all-earlier": {"n_q": 24, "n_k": 24, "options": {"is_causal": (True,)}},
        "volume-in-all": {
            "n_q": 96,
            "n_k": 96,
            "options": {
                "shape": (4, 4, 6),
                "window": (2, 2, 3),
                "dilation": (2, 1, 2),
                "stride": (1, 2, 3),
                "is_causal": (True, False, True),
            },
        },
        "volume": {"n_q": 60, "n_k": 60, "options": {"shape": (3, 4, 5), "window": (2, 3, 3)}},
    },
    wrong={
        "window_cut_at_borders": (
            "a window is cut at a border, where it must move inwards",
            DEFINE.changed(ends=shrinks),
        ),
        "even_window_leans_on": ("of an even window the longer half lies after the query", DEFINE.changed(ends=leans)),
        "first_leads_a_stride": (
            "the first query of a stride leads, not its middle one",
            DEFINE.changed(ends=leads_first),
        ),
        "causal_window_centred": (
            "a causal axis cuts the window that is centred on the query",
            DEFINE.changed(ends=centred),
        ),
        "grid_turned": ("the axes of the grid are swapped", DEFINE.changed(turned=True)),
        "extra_keys_hidden": ("the keys after the grid's are seen by no query", DEFINE.changed(extra=False)),
    },
    fits=fits,
    tries=tries,
    never=frozenset({"variable_lengths", "lengths_differ"}),
)
