"""Calls with dropout: small problems in which a mask of another head, row or moment shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...problem import Problem
from .draw import Draw

__all__ = ["DROPPED", "bits", "dropout", "philox", "philox_case"]


def dropout(d: Draw, p: float, *shape: int) -> dict[str, Any]:
    """Return a probability and a mask of so many weights, none of which is alike for two heads or rows."""
    return {"dropout_p": p, "dropout_mask": d.rng.random(shape) >= p}


def bits(d: Draw, p: float, *shape: int) -> dict[str, Any]:
    """Return the same with 8 keys to a byte, and ones in the bits past the last key."""
    found = dropout(d, p, *shape)
    rest = ((0, 0),) * 3 + ((0, -shape[3] % 8),)
    kept = np.pad(found["dropout_mask"], rest, constant_values=True)
    return found | {"dropout_mask": np.packbits(kept, axis=3, bitorder="little")}


def philox(d: Draw, p: float, *layouts: str) -> dict[str, Any]:
    """Return a probability and a seed of the first layout that calls may have, else of the first."""
    seed, offset = (int(d.rng.integers(2**63)), 4 * int(d.rng.integers(2**30)))
    return {
        "dropout_p": p, "philox_layout": d.one_of(*layouts, of="philox"), "philox_seed": seed, "philox_offset": offset
    }  # fmt: skip


def _plain(d: Draw) -> Problem:
    return d.problem(20, 70, b=2, h=4, h_kv=2, **dropout(d, 0.25, 2, 4, 20, 70))


def _options(d: Draw) -> Problem:
    """Return a call of which nine weights in ten are dropped, of some rows all; a sink counts, and is never dropped."""
    more: dict[str, Any] = {"bias": d.normal(1, 2, 37, 67), "sink": d.normal(2), "causal": "bottom_right"}
    more |= dropout(d, 0.9, 1, 2, 37, 67)
    more["dropout_mask"][:, :, 5::9] = False
    return d.problem(softcap=5.0, **more)


def _decoded(d: Draw) -> Problem:
    """Return one query for each cache, with a mask that all batch items and heads share."""
    return d.problem(1, 200, b=3, h=4, h_kv=1, **dropout(d, 0.5, 1, 1, 1, 200))


def _square(d: Draw) -> Problem:
    """Return as many rows as keys, past two tiles of 64, with more than four heads and a mask of the keys seen, too.

    16-bit types round a p of 0.1, and no byte is drawn above it as often.
    """
    n = 130
    return d.problem(n, n, h=6, h_kv=2, allowed=d.mask(1, 1, n, n), **dropout(d, 0.1, 1, 6, n, n))


def _spread(d: Draw) -> Problem:
    """Return keys past 256, with a mask of each head that all rows and batch items share."""
    return d.problem(5, 300, b=2, h=2, **dropout(d, 0.3, 1, 2, 1, 300))


def _packed(d: Draw) -> Problem:
    """Return sequences whose weights lie along the diagonal of the mask."""
    ends = {"q": [0, 5, 5, 40], "k": [0, 20, 22, 70]}
    more: dict[str, Any] = {f"cu_seqlens_{x}": np.array(e, np.int32) for x, e in ends.items()}
    return d.problem(40, 70, **more, **dropout(d, 0.2, 1, 2, 40, 70))


def _bits(d: Draw) -> Problem:
    return d.problem(20, 70, b=2, h=2, **bits(d, 0.25, 2, 2, 20, 70))


def _philox(d: Draw) -> Problem:
    """Return a call that names a mask by its seed, with more heads than key heads and a tail in both axes."""
    return d.problem(37, 70, b=2, h=4, h_kv=2, **philox(d, 0.25, "flash", "efficient"))


def _efficient(d: Draw) -> Problem:
    return d.problem(20, 33, b=2, h=2, causal="top_left", **philox(d, 0.1, "efficient", "flash"))


def philox_case(d: Draw) -> Problem:
    """Return three heads, of which the first can be left out."""
    return d.problem(20, 33, h=3, **philox(d, 0.25, "flash", "efficient"))


Entry = tuple[Callable[[Draw], Problem], tuple[str, ...]]
DROPPED: dict[str, Entry] = {
    # a scale that is missing, a denominator of what is kept, the mask of the next head or row
    "plain": (_plain, ("dropout_mask",)),
    # rows of which nothing is kept: out is 0, lse is not
    "options": (_options, ("dropout_mask", "bias", "sink", "softcap", "causal")),
    "decoding": (_decoded, ("dropout_mask",)),
    # the mask of the first tile or of four heads for all, transposed, lost beside another mask; a p that is rounded
    "square": (_square, ("dropout_mask", "allowed")),
    # the mask of the first keys for all, a mask with one row ignored
    "spread": (_spread, ("dropout_mask",)),
    # the mask's first rows and keys for each sequence
    "packed": (_packed, ("dropout_mask",)),
    # the highest bit first, the last byte of a row
    "bits": (_bits, ("dropout_mask",)),
    # an offset by a warp, counters of rows and keys the other way round, a seed of 32 bits
    "philox": (_philox, ("philox_layout",)),
    # counters of a row that end elsewhere
    "philox-efficient": (_efficient, ("philox_layout", "causal")),
}
"""Calls by label, and the options that an operator must have for them."""
