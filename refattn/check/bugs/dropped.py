"""What kernels get wrong that drop weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ... import masks
from ...dropout import drawn
from ...problem import Problem
from ..kernels.tiled import tiled

__all__ = ["DROPOUT_BUGS", "SEED_BUGS", "lse_of_kept"]


def _of_kept(p: Problem) -> Problem:
    """Drop keys before the softmax: the denominator is that of what is kept."""
    if p.dropout_mask is None:
        return p
    allowed = masks.both(p.allowed, p.dropout_mask)
    return p.replace(allowed=allowed, dropout_p=None, dropout_mask=None)


def _moved(axis: int, by: int) -> Callable[[Problem], Problem]:
    """Take the mask of the weights so far on."""

    def before(p: Problem) -> Problem:
        return p if p.dropout_mask is None else p.replace(dropout_mask=np.roll(p.dropout_mask, -by, axis))

    return before


def _changed(**changes: Any) -> Callable[[Problem], Problem]:
    def before(p: Problem) -> Problem:
        return p if p.dropout_mask is None else p.replace(**changes)

    return before


def _offset_by_warp(p: Problem) -> Problem:
    """Draw from an offset past the 32 lanes of a warp."""
    return p if p.philox_seed is None else p.replace(philox_offset=((p.philox_offset or 0) + 32) % 2**64)


def _low_seed(p: Problem) -> Problem:
    """Draw by the lower half of the seed."""
    return p if p.philox_seed is None else p.replace(philox_seed=p.philox_seed % 2**32)


def _turned(p: Problem) -> Problem:
    """Count the bits of a byte from the highest."""
    if p.dropout_mask is None or p.dropout_mask.dtype != np.uint8:
        return p
    return p.replace(dropout_mask=np.packbits(np.unpackbits(p.dropout_mask, axis=3, bitorder="little"), axis=3))


def lse_of_kept(p: Problem, out: Any, lse: Any) -> tuple[Any, Any]:
    """Return the lse of what is kept."""
    p = drawn(p)
    return (out, lse) if p.dropout_mask is None or lse is None else (out, tiled(_of_kept(p))[1])


DROPOUT_BUGS: dict[str, Callable[[Problem], Problem]] = {
    "dropout_ignored": _changed(dropout_p=None, dropout_mask=None),
    "dropout_unscaled": _changed(dropout_p=0.0),
    "dropout_before_softmax": _of_kept,
    "dropout_of_next_head": _moved(1, 1),
    "dropout_of_next_warp": _moved(2, 16),
    "dropout_of_next_lane": _moved(3, 2),
    "dropout_inverted": lambda p: p if p.dropout_mask is None else p.replace(dropout_mask=~p.dropout_mask),
}
"""Edits of the problem that the kernel is given, by name."""
SEED_BUGS: dict[str, Callable[[Problem], Problem]] = {
    "philox_offset_by_warp": _offset_by_warp,
    "philox_seed_halved": _low_seed,
    "dropout_bits_turned": _turned,
}
"""Edits of a call whose mask is not drawn yet."""
