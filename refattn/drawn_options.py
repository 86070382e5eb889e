"""Options that Hypothesis draws for calls, beside those of ``strategies.py``: lengths, offsets, types and pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .arrays import from_float64
from .dtypes import FORMATS
from .errors import InvalidProblem
from .norms import NORMS
from .pages import in_pages
from .positions import POSITIONS, STYLES
from .problem import Problem
from .validation import ALIGNMENTS

__all__ = [
    "APART",
    "FURTHER_ON",
    "NEEDS",
    "PAGED",
    "TYPES",
    "dropped",
    "lengths",
    "norms",
    "paged",
    "positioned",
    "typed",
]

FURTHER_ON = (
    "lengths_k", "lengths_q", "offset", "alignment", "negative_window", "d_k_zero",
    "rotary_half", "rotary_interleaved", "rotary_partial", "alibi_slopes", "positions",
    "dropout_mask", "dropout_bits", "philox_flash", "philox_efficient",
)  # fmt: skip
APART = ("causal", "rotary", "philox_layout", *FURTHER_ON)
"""Options that are no features of the same name, and those further on."""
TYPES = (
    "scales", "scales_by_head", "scales_by_token", "scales_by_channel", "scales_by_block",
    "out_scale", "out_dtype", "types_differ",
)  # fmt: skip
PAGED = ("paged_nhd", "paged_hnd", "appending")
NEEDS = {"negative_window": "window", "d_k_zero": "lengths_k", "positions": "alibi_slopes"}
NEEDS |= dict.fromkeys(("rotary_half", "rotary_interleaved", "rotary_partial"), "rotary")
NEEDS |= {"dropout_bits": "dropout_mask", "philox_flash": "philox_layout", "philox_efficient": "philox_layout"}
"""What an operator has that takes a feature without an option of its own."""


def lengths(draw: st.DrawFn, on: set[str], more: dict[str, Any], sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Draw how much of each batch item or sequence is used, and where the diagonal lies."""
    found: dict[str, Any] = {}
    for axis, n in zip("qk", sizes[1:], strict=True):
        if f"lengths_{axis}" in on:
            ends = more.get(f"cu_seqlens_{axis}")
            room = [n] * sizes[0] if ends is None else np.diff(ends).tolist()
            found[f"lengths_{axis}"] = np.array([draw(st.integers(0, m)) for m in room], np.int32)
    if "offset" in on:
        many, one = sizes[0], st.integers(-max(sizes), max(sizes))
        many = len(more["cu_seqlens_q"]) - 1 if "cu_seqlens_q" in more else many
        found["offset"] = draw(one | st.lists(one, min_size=many, max_size=many).map(np.array))
    if "alignment" in on and more["causal"] is None:
        found["alignment"] = draw(st.sampled_from(ALIGNMENTS))
    return found


def dropped(
    draw: st.DrawFn, on: set[str], full: tuple[int, ...], spread: Callable[..., tuple[int, ...]], more: dict[str, Any]
) -> dict[str, Any]:
    """Draw which weights are kept, or the seed that says so, and the probability that they are divided by.

    A seed of the efficient kernel's is drawn for calls that are whole: without packed sequences, lengths and pages.
    """
    whole = not any(n in more for n in ("cu_seqlens_q", "lengths_q", "lengths_k")) and not on & {*PAGED}
    layouts = ["flash"] * ("philox_flash" in on) + ["efficient"] * ("philox_efficient" in on and whole)
    if not layouts and not on & {"dropout_mask", "dropout_bits"}:
        return {}
    rng = np.random.default_rng(draw(st.integers(0, 255)))
    p = {"dropout_p": draw(st.sampled_from((0.25, 0.0, 0.9)))}
    if layouts:
        seed, offset = (int(x) for x in rng.integers(0, 2**64, 2, np.uint64))
        return p | {"philox_layout": layouts[seed % len(layouts)], "philox_seed": seed, "philox_offset": offset}
    shape = spread(draw, full)
    if "dropout_bits" in on:
        return p | {"dropout_mask": rng.integers(0, 256, (*shape[:3], -(-full[3] // 8)), np.uint8)}
    return p | {"dropout_mask": rng.random(shape) < 0.7}


def norms(draw: st.DrawFn, on: set[str], d_k: int) -> dict[str, Any]:
    """Draw the weights of the norms that are asked for, and what is added to their mean squares."""
    names = [n for n in NORMS if n in on]
    if not names or not d_k:
        return {}
    rng = np.random.default_rng(draw(st.integers(0, 255)))
    return {n: rng.normal(1, 0.5, d_k).astype(np.float32) for n in names} | {"norm_eps": 1e-5}


def positioned(draw: st.DrawFn, p: Problem, on: set[str]) -> Problem:
    """Give a call rotary positions, ALiBi slopes and positions of its own."""
    styles = [s for s in STYLES if f"rotary_{s}" in on]
    partial = "rotary_partial" in on
    pairs = (p.d_k - partial) // 2
    turned = styles and pairs > 0 and (partial or p.d_k == 2 * pairs)
    if not turned and "alibi_slopes" not in on:
        return p
    found: dict[str, Any] = {}
    rng = np.random.default_rng(draw(st.integers(0, 255)))
    wide, longest = np.float64 if p.dtype == "float64" else np.float32, max(p.n_q, p.n_k, 1)
    if "alibi_slopes" in on:
        found["alibi_slopes"] = rng.random(draw(st.sampled_from(((p.heads,), (p.batch, p.heads))))).astype(wide)
    if turned:
        angle = rng.uniform(-4, 4, (longest, pairs))
        found |= {
            "rotary": styles[0],
            "rotary_cos": np.cos(angle).astype(wide),
            "rotary_sin": np.sin(angle).astype(wide),
        }
    if "positions" in on:
        for name, n in zip(POSITIONS, (p.n_q, p.n_k), strict=True):
            shape = draw(st.sampled_from(((n,), (p.batch, n))))
            found[name] = rng.integers(0, longest, shape).astype(np.int32)
    try:
        return p.replace(**found)
    except InvalidProblem:  # the diagonal leads out of the table
        return p


def typed(draw: st.DrawFn, p: Problem, on: set[str]) -> Problem:
    """Give a call scales that are powers of two, and types of its own."""
    found: dict[str, Any] = {}
    rng = np.random.default_rng(draw(st.integers(0, 255)) if on & {*TYPES} else 0)
    if any(n.startswith("scales") for n in on):
        for name in draw(st.sampled_from((("key",), ("value",), ("query", "key", "value")))):
            b, h, n, d = getattr(p, name).shape
            axes = [b, h] if "scales_by_head" in on else [1, 1]
            for size, whole in ((n, "scales_by_token"), (d, "scales_by_channel")):
                part = next((m for m in range(2, size) if size % m == 0), 1) if "scales_by_block" in on else 1
                axes.append(max(size, 1) if whole in on else part)
            # a value and its scale stay within the format's normal numbers: a kernel may multiply them first
            form, sizes = FORMATS[p.dtype], np.abs(getattr(p, name).astype(np.float64))
            sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
            least = 0 if sizes.min(initial=1.0) < 2.0 ** (form.emin + 2) else -2
            most = 0 if sizes.max(initial=1.0) >= 2.0 ** (form.emax - 1) else 2
            powers = rng.integers(least, most + 1, axes)
            found[f"{name}_scale"] = np.exp2(powers).astype(np.float32)
    if "out_scale" in on:
        found["out_scale"] = draw(st.sampled_from((1.0, 0.25, float(np.float32(0.3)))))
    if "out_dtype" in on:
        found["out_dtype"] = draw(st.sampled_from([n for n in ("float32", "bfloat16", "float64") if n != p.dtype]))
    if "types_differ" in on:
        form = FORMATS["float16" if p.dtype != "float16" else "bfloat16"]
        found["key"] = from_float64(form.round_array(p.key.astype(np.float64)), form.name)
        found.setdefault("out_dtype", p.dtype)
    return p.replace(**found) if found else p


def paged(draw: st.DrawFn, p: Problem, on: set[str], fill: float) -> Problem:
    """Put a call's keys into pages, of a size that divides them; what nobody owns is filled."""
    layouts = [n.removeprefix("paged_").upper() for n in PAGED[:2] if n in on]
    by_token = any(max(getattr(s, "shape", (1, 1, 1))[0::2][:2]) > 1 for s in (p.key_scale, p.value_scale))
    if not layouts or by_token or p.cu_seqlens_q is not None:
        return p
    size = draw(st.sampled_from([m for m in range(1, p.n_k + 1) if p.n_k % m == 0] or [1]))
    most = min((p.n_k,) * p.batch if p.lengths_k is None else p.lengths_k.tolist(), default=0)
    new = draw(st.integers(0, most)) if "appending" in on else 0
    rng = np.random.default_rng(draw(st.integers(0, 255)))
    more: dict[str, Any] = {"spare": draw(st.integers(1, 3)), "new": new, "fill": fill}
    found: Problem = in_pages(p, size, draw(st.sampled_from(layouts)), rng, **more)
    return found
