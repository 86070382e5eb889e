"""Queries and keys whose scores tie exactly, or nearly: what operators that choose keys are tried with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...dtypes import Format
from ...errors import InvalidInput

__all__ = ["TIES", "tied"]

Float = NDArray[np.float64]
TIES = ("equal", "ulp")
"""All keys of a head are one; or one of their numbers is an ulp larger in about every other key."""


def tied(
    rng: np.random.Generator, form: Format, ties: str, q: tuple[int, ...], k: tuple[int, ...]
) -> tuple[Float, Float]:
    """Draw queries and keys of ones and twos, of two shapes (b, h, n, d).

    All products and sums of equal keys are small integers, so that a kernel's scores are equal too, in any order. None
    is 0 or below, where an indexer's ReLU would tie what differs.

    Raises
    ------
    InvalidInput
        `ties` is none of ``TIES``.
    """
    if ties not in TIES:
        raise InvalidInput(f"ties: got {ties!r}, expected one of {', '.join(TIES)}")
    query = rng.integers(1, 3, q).astype(float)
    key = np.repeat(rng.integers(1, 3, (*k[:2], 1, k[3])).astype(float), k[2], 2)
    if ties == "ulp":
        key[..., 0] += form.ulp_array(key[..., 0]) * rng.integers(0, 2, k[:3])
    return query, key
