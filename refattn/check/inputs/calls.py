"""Calls as models make them: head widths, groups and lengths of real use, crossed with every option.

Every two values of the axes meet in some call, and every three of the masks' (covering arrays); lengths lie at the
edges of tiles. A seed draws the calls; the same seed draws the same.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from allpairspy import AllPairs, pairs_storage
from numpy.typing import NDArray

from ...dtypes import FORMATS
from ...masks import visible
from ...problem import Problem
from ...variants import variant_of
from ..model import Capabilities
from .draw import Draw
from .dropped import bits, dropout, philox
from .layouts import LAYOUTS, laid
from .sample import separate

__all__ = ["Call", "drawn"]

WIDTHS = (
    (64, 64),  # GPT-2, Whisper, Llama 3.2 1B
    (128, 128),  # Llama 3, Qwen, Mistral
    (80, 80),  # Phi-2, ViT-H
    (96, 96),  # Phi-3
    (256, 256),  # Gemma
    (40, 40),  # Stable Diffusion
    (72, 72),  # SigLIP
    (192, 128),  # DeepSeek-V3, prefill
    (576, 512),  # DeepSeek-V3, decoding
    (192, 192),
    (160, 160),  # Stable Diffusion, the inner layers
    (33, 33),  # what no vector of 2 or more divides
)
"""(d_k, d_v) of models in use."""
GROUPS = (1, 4, 8, 2, 6, 7, 3, 5, 16, 64)
"""Query heads to a key head of models in use."""
NUMBERS = ("normal", "jump", "needles", "faint", "sharp", "matched")
"""Normal; a late jump; few keys that hold the weight; many that hold little; rows that look at keys of their own;
values of the signs that rounding the scores to 16 bits would have."""
KINDS = ("prefill", "decode", "chunk", "few", "packed", "batches", "cross")
TILES = (64, 128, 16, 32, 80, 96, 176, 192, 256)
MOST = {"quick": 2**22, "ci": 2**25, "nightly": 2**28}
"""Products of two numbers that the scores and the output of one call take, at most."""
LONGEST = {"quick": 2**11, "ci": 2**12, "nightly": 2**15}


@dataclass(frozen=True)
class Call:
    """One call: what it takes to build it."""

    kind: str
    b: int
    h: int
    h_kv: int
    lengths: tuple[tuple[int, int], ...]
    d: int
    d_v: int
    numbers: str = "normal"
    layout: str = "plain"
    hidden: str = ""
    causal: str | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    sink: bool = False
    bias: str = ""
    allowed: str = ""
    wide_bias: bool = False
    weight: str = ""
    faint_dout: bool = False
    used: str = ""
    offset: int | None = None
    alignment: str | None = None
    dropout: str = ""

    def __call__(self, d: Draw) -> Problem:
        """Build it."""
        n_q, n_k = (sum(x) for x in zip(*self.lengths, strict=True))
        q, k, v = _numbers(d, self, n_q, n_k)
        more: dict[str, Any] = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        if len(self.lengths) > 1:
            ends = np.cumsum([(0, 0), *self.lengths], axis=0).astype(np.int32)
            more |= {"cu_seqlens_q": ends[:, 0].copy(), "cu_seqlens_k": ends[:, 1].copy()}
        if self.sink:
            more["sink"] = 2 * d.normal(self.h)
        full = (self.b, self.h, n_q, n_k)
        if self.bias:
            more["bias"] = 2 * d.normal(*_spread(full, self.bias)) + (100 if self.wide_bias else 0)
        if self.allowed:
            more["allowed"] = _mask(d, _spread(full, self.allowed), self.hidden)
        if self.weight:
            more["weight"] = np.exp(d.normal(*_spread(full, self.weight)))
        if self.used:
            more |= _used(d, self)
        more |= {n: getattr(self, n) for n in ("offset", "alignment") if getattr(self, n) is not None}
        more |= _dropped(d, self.dropout, full)
        options = variant_of(d.variant).fitted({}, self.h)
        p = d.problem(n_q, n_k, q=q, k=k, v=v, scale=self.scale, options=options, **more)
        if self.wide_bias and d.form.precision < 24:  # in float32 beside 16-bit queries
            p = p.replace(bias=more["bias"].astype(np.float32))
        return laid(_poisoned(p, self.hidden), self.layout)


def _spread(full: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Return the shape of a bias or a mask that is spread along some axes."""
    b, h, n_q, n_k = full
    return {
        "full": full,
        "heads": (b, 1, n_q, n_k),
        "batches": (1, h, n_q, n_k),
        "all": (1, 1, n_q, n_k),
        "rows": (b, h, 1, n_k),
        "padding": (b, 1, 1, n_k),
        "keys": (1, h, n_q, 1),
        "row": (b, 1, n_q, 1),
        "column": (1, 1, 1, n_k),
        "heads-columns": (1, h, 1, n_k),
    }[kind]


def _used(d: Draw, c: Call) -> dict[str, Any]:
    """Return how much of each batch item or sequence is used: of its keys, or as much less of its rows, too."""
    lengths = np.array(c.lengths if len(c.lengths) > 1 else c.lengths * c.b, np.int32)
    most = np.min(lengths, 1) if c.used == "both" else lengths[:, 1] - lengths[:, 0]
    less = d.rng.integers(0, np.maximum(most, 0) + 1)[:, None]
    left = (lengths - less).astype(np.int32)
    return ({"lengths_q": left[:, 0].copy()} if c.used == "both" else {}) | {"lengths_k": left[:, 1].copy()}


def _dropped(d: Draw, kind: str, full: tuple[int, ...]) -> dict[str, Any]:
    """Return a mask of dropout of all weights, as booleans or bits, or the seed of one."""
    if kind in ("flash", "efficient"):
        return philox(d, 0.1, kind)
    return {} if not kind else (bits if kind == "bits" else dropout)(d, 0.1, *full)


def _mask(d: Draw, shape: tuple[int, ...], hidden: str) -> NDArray[np.bool_]:
    """Return a mask; where numbers stand behind it, it also hides keys from every row."""
    mask = d.rng.random(shape) < 0.8
    if shape[3] > 1:
        if shape[2] == 1:  # padding: a different length in each batch and head
            lengths = d.rng.integers(shape[3] // 2, shape[3] + 1, (*shape[:3], 1))
            mask = np.arange(shape[3]) < np.maximum(lengths, 1)
        if hidden:
            mask[..., shape[3] // 2 + 1 :: 3] = False
        mask[..., :1] = True
    return np.asarray(mask)


def _numbers(d: Draw, c: Call, n_q: int, n_k: int) -> tuple[Any, Any, Any]:
    """Return query, key and value, of one of ``NUMBERS``."""
    q, k = d.normal(c.b, c.h, n_q, c.d), d.normal(c.b, c.h_kv, n_k, c.d)
    v = d.normal(c.b, c.h_kv, n_k, c.d_v)
    if c.numbers == "normal" or not n_k:
        return q, k, v
    by = 1.0 if c.scale is None else np.sqrt(c.d) * c.scale
    if c.numbers == "sharp":  # each row looks at a few keys of its own: rows' errors are independent
        return q * 3 / by, k, v
    if c.numbers == "matched":
        return _matched(d, q, k, v, by)
    q[..., 0], k[..., 0] = 4.0, 0.0
    if c.numbers == "needles":  # wherever a key is lost, it is one of few that count
        at = {0, n_k - 1, n_k // 2, *(t for t in TILES if t < n_k), *(t - 1 for t in TILES if t <= n_k)}
        at |= set(d.rng.integers(n_k, size=4).tolist())
        k[:, :, sorted(at), 0] = 3 * np.sqrt(c.d) / by
    elif (
        c.numbers == "faint"
    ):  # one key holds the weight; the others hold little of it, and their values count for that
        top, bits = int(d.rng.integers(n_k)), min(d.form.emax - 4, 24)
        k[:, :, top, 0] = (bits + 2) * np.log(2) / 4 * np.sqrt(c.d) / by
        v *= np.where(np.arange(n_k) == top, 1.0, 2.0**bits)[:, None]
    else:  # a later tile holds scores that are 100 larger: what was summed before counts no more
        start = int(d.rng.integers(n_k // 2, n_k)) // 16 * 16
        k[:, :, start:, 0] = 25 * np.sqrt(c.d) / by
    return q, k, v


def _matched(d: Draw, q: Any, k: Any, v: Any, by: float) -> tuple[Any, Any, Any]:
    """Return scores in [0.5, 1) of more bits than 16-bit types have, and values of the sign that rounding them has."""
    narrow = d.form if d.form.precision <= 11 else FORMATS["bfloat16"]
    score = d.rng.uniform(0.5, 0.99, k.shape[:3])
    high = narrow.round_array(score)
    q[:], k[:] = 0, 0
    q[..., 0] = q[..., 1] = np.sqrt(q.shape[3]) / by
    k[..., 0], k[..., 1] = high, score - high
    sign, w = np.sign(high - score), np.exp(score)
    mean = (w * sign).sum(2, keepdims=True) / w.sum(2, keepdims=True)
    return q, k, (sign - mean)[..., None] * d.rng.uniform(0.5, 1, v.shape[3])


def _poisoned(p: Problem, hidden: str) -> Problem:
    """Put numbers into keys that no row of a batch may see: NaN, or large ones."""
    if not hidden:
        return p
    seen = np.zeros((p.batch, p.heads_kv, p.n_k), bool)
    group = p.heads // p.heads_kv
    for b in range(p.batch):
        for h in range(p.heads) if p.allowed is not None and p.allowed.shape[1] > 1 else (0,):
            for rows, keys in p.segments(b):
                here = visible(p.replace(bias=None), b, h, rows, keys).any(0)
                at = slice(None) if p.allowed is None or p.allowed.shape[1] == 1 else h // group
                seen[b, at, keys] |= here
    k, v = p.key.copy(), p.value.copy()
    k[~seen], v[~seen] = (np.nan, np.nan) if hidden == "nan" else (8, 128)
    return p.replace(key=k, value=v)


MOST_CALLS = {"quick": 4}
"""How many calls a budget has at most."""


def drawn(variant: str, able: Capabilities, budget: str, seed: int) -> list[Call]:
    """Return calls of an operator that a kernel says it can do, drawn by a seed.

    Parameters
    ----------
    variant : str
        The operator. Of operators whose rows are not defined one by one there are none.
    able : Capabilities
        What the kernel can do: axes have no other values.
    budget : str
        Out of ``refattn.check.inputs.families.BUDGETS``: how long calls may be.
    seed : int
        The same seed draws the same calls.
    """
    return list(_drawn(variant, variant_of(variant).uses, able, budget, seed)) if separate(variant) else []


@lru_cache(maxsize=8)  # half a second each; a run asks twice, and so does whoever judges kernels one after another
def _drawn(variant: str, uses: frozenset[str], able: Capabilities, budget: str, seed: int) -> tuple[Call, ...]:
    rng = random.Random(f"{seed} {variant}")
    axes = _axes(uses, able)
    names = list(axes)
    most = MOST_CALLS.get(budget)
    rows = _covering(rng, axes, names, 2, most)
    often = {"numbers": axes["numbers"], "softcap": [*axes["softcap"][:2], None]}
    masks = [n for n in ("causal", "window", "allowed", "hidden", "kind") if len(axes[n]) > 1]
    if len(masks) > 2 and most is None:
        for three in _covering(rng, axes, masks, 3):
            usual = {n: rng.choice(often.get(n, x[:2])) for n, x in axes.items()}
            rows.append(usual | three)
    return tuple(dict.fromkeys(_call(row, rng, able, budget) for row in rows))


def _covering(
    rng: random.Random, axes: Mapping[str, list[Any]], names: list[str], n: int, most: int | None = None
) -> list[dict[str, Any]]:
    """Return rows of values in which any n axes meet in every combination, or the first of them."""
    rows = AllPairs([rng.sample(axes[a], len(axes[a])) for a in names], n=n)
    found = [dict(zip(names, x, strict=True)) for x in islice(rows, most)]
    pairs_storage.key_cache.clear()  # it holds every combination of every array that was ever made
    return found


def _axes(uses: frozenset[str], able: Capabilities) -> dict[str, list[Any]]:
    """Return the axes and their values, the usual ones first."""
    has = able.features

    def given(feature: str, *values: Any) -> list[Any]:
        return list(values) if feature in has and feature in uses else []

    widths = [w for w in WIDTHS if max(w) <= able.d_max and (w[0] == w[1] or "d_v_differs" in has)]
    if able.head_dims:
        widths = [w for w in widths if set(w) <= able.head_dims] or [(d, d) for d in sorted(able.head_dims)]
    corners = [c for c in ("bottom_right", "top_left") if f"causal_{c}" in has and "causal" in uses]
    kinds = [k for k in KINDS if k in ("prefill", "batches") or "lengths_differ" in has or k == "packed"]
    return {
        "kind": [k for k in kinds if k != "packed" or "variable_lengths" in has],
        "width": widths or [(able.d_max, able.d_max)],
        "group": [g for g in GROUPS if g == 1 or "grouped_heads" in has],
        "causal": [*corners, None] if not able.always & {"causal_bottom_right", "causal_top_left"} else corners,
        "tile": list(TILES),
        "off": [0, 1, -1],
        "window": [None, *given("window", "left", "right", "both", "self")],
        "bias": ["", *given("bias", "full", "heads", "rows", "padding", "batches", "keys")],
        "allowed": ["", *given("allowed", "padding", "full", "heads", "all", "rows", "batches", "row")],
        "hidden": ["", "nan", "large"] if has & {"window", "allowed"} or corners else [""],
        "softcap": [None, *given("softcap", 50.0, 2.0)],
        "sink": [False, *given("sink", True)],
        "scale": [None, *([0.3] if "scale" in has else [])],
        "numbers": list(NUMBERS),
        "layout": [x for x in LAYOUTS if x != "columns" or not able.last_axis_contiguous],
        "wide_bias": [False, *given("bias", True)],
        **_further(uses, has),
    }


def _further(uses: frozenset[str], has: frozenset[str]) -> dict[str, list[Any]]:
    """Return the axes that only kernels have that name their features, so that others' calls stay as they are."""
    used = [x for x, names in (("k", {"lengths_k"}), ("both", {"lengths_q", "lengths_k"})) if names <= has & uses]
    found = {"used": ["", *used]} if used else {}
    if "dropout_mask" in uses:
        kinds = ("dropout_mask", "dropout_bits", "philox_flash", "philox_efficient")
        dropped = [n.partition("_")[2] for n in kinds if n in has]
        found |= {"dropout": ["", *dropped]} if dropped else {}
    return found | ({"offset": [None, 3]} if "offset" in has & uses else {})


def _call(row: dict[str, Any], rng: random.Random, able: Capabilities, budget: str) -> Call:
    """Return a call with the values of a row, as large as the budget allows."""
    (d, d_v), group, kind = row["width"], row["group"], row["kind"]
    several = (2, 3) if kind == "batches" else (1, 2, 4) if kind in ("decode", "few") and group <= 8 else (1,)
    b = rng.choice(several)
    h_kv = 2 if group <= 8 else 1
    most = MOST[budget] // (b * group * h_kv * (d + d_v))
    step = able.seq_multiple
    differ = "lengths_differ" in able.features
    pairs = _pairs(kind, row["tile"], row["off"], most, LONGEST[budget], rng, differ)
    pairs = [(-(-q // step) * step, -(-k // step) * step) for q, k in pairs]
    if kind == "cross" and row["causal"] == "bottom_right":
        pairs = [(k, q) for q, k in pairs]  # as chunks: rows without keys are a contract of their own
    left = rng.choice((7, 40, 130))
    sides = {"left": (left, None), "right": (None, rng.choice((0, 5))), "both": (left, 3), "self": (0, 0)}
    if kind == "cross":  # wider than the call, so that every row sees a key
        n = max(pairs[0])
        sides = {"left": (n, None), "right": (None, n), "both": (n + 3, n), "self": (n, n)}
    window = sides.get(row["window"])
    # keys that one batch or head hides another sees: numbers behind a mask are not shared
    layout = "bshd" if row["layout"] == "spread" and row["hidden"] else row["layout"]
    used, dropped = row.get("used", "") if kind != "cross" else "", row.get("dropout", "")
    return Call(
        kind, b, group * h_kv, h_kv, tuple(pairs), d, d_v, row["numbers"], layout, row["hidden"], row["causal"],
        window, row["softcap"], row["scale"], row["sink"], row["bias"], row["allowed"],
        bool(row["bias"]) and row["wide_bias"],
        used=used, offset=row.get("offset"),
        dropout="" if dropped == "efficient" and (used or kind == "packed") else dropped,
    )  # fmt: skip


def _pairs(
    kind: str, tile: int, off: int, most: int, longest: int, rng: random.Random, differ: bool
) -> list[tuple[int, int]]:
    """Return the lengths of a call's sequences: at an edge of tiles, with at most so many scores."""

    def edge(limit: float) -> int:
        top = max(1, int(min(limit, longest)) // tile)
        return max(1, tile * rng.choice((1, max(1, top // 3), top)) + off)

    if kind in ("decode", "few"):
        n_q = 1 if kind == "decode" else rng.choice((2, 3, 4, 7, 8, 15, 16, 17))
        return [(n_q, edge(most / n_q))]
    n = edge(most**0.5)
    if kind in ("prefill", "batches"):
        return [(n, n)]
    if kind == "chunk":
        n_q = max(1, n // 3)
        return [(n_q, edge(most / n_q))]
    if kind == "cross":
        return [(n, max(1, n // 3 + 1))]
    long = max(2, n // 2)
    lengths = [0, 1, long, max(1, tile // 2 + off), max(1, n // 5)]
    rng.shuffle(lengths)
    more = rng.choice((0, 0, 5, tile)) if differ else 0  # keys that were there before the queries
    return [(x, x + more if x else 0) for x in lengths]
