"""What kernels get wrong about scales and packed elements: whose scale, for how many elements, in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import dtype_name, to_float64
from ...dtypes import FLOAT4, FORMATS
from ...problem import Problem
from ...validation import SCALES

__all__ = ["TYPE_BUGS"]

INPUTS = SCALES[:3]
LEAST = 1 / (448 * 512)
"""A scale that kernels which quantise do not go below."""
HALF, WHOLE = 16, 32
"""Elements to a scale in NVFP4, and in MXFP8 and MXFP4."""

Change = Callable[[NDArray[Any], int], NDArray[Any]]


def _axis(p: Problem, name: str) -> int | None:
    """Return the axis along which several elements of a tensor share each of several scales, None where none do."""
    scale, x = getattr(p, name), getattr(p, name.removesuffix("_scale"))
    if scale is None or isinstance(scale, float) or p.block_table is not None:
        return None
    return next((a for a in (2, 3) if 1 < scale.shape[a] < x.shape[a]), None)


def _blocks(p: Problem, change: Change, size: int = 0) -> Problem:
    """Change scales of blocks, or those of blocks of a size, along the blocks."""
    found = {}
    for name in INPUTS:
        axis = _axis(p, name)
        if axis is not None:
            scale, many = getattr(p, name), getattr(p, name.removesuffix("_scale")).shape[axis]
            if size in (0, many // scale.shape[axis]):
                found[name] = change(scale, axis)
    return p.replace(**found)


def _read_as_half(p: Problem) -> Problem:
    """Go on to the next scale after 16 elements where 32 share one, and to the first after the last."""
    return _blocks(p, lambda s, axis: np.concatenate([s, s], axis), WHOLE)


def _read_as_whole(p: Problem) -> Problem:
    """Go on to the next scale after 32 elements where 16 share one."""
    return _blocks(p, lambda s, axis: np.repeat(np.take(s, range(0, s.shape[axis], 2), axis), 2, axis), HALF)


def _first_of_all(p: Problem) -> Problem:
    return _blocks(p, lambda s, axis: np.repeat(np.take(s, [0], axis), s.shape[axis], axis))


def _next_block(p: Problem) -> Problem:
    return _blocks(p, lambda s, axis: np.roll(s, 1, axis))


def _one_for_all(scale: NDArray[Any]) -> float:
    """Return the number that is in all of a tensor's scales beside float8 ones: their common odd part, 0.5 to 1."""
    whole = (np.frexp(to_float64(scale))[0] * 2.0**24).astype(np.int64)
    common = int(np.gcd.reduce(whole, axis=None))
    return float(np.frexp(common)[0])


def _tensor_scale(power: int) -> Callable[[Problem], Problem]:
    """Take the number of a tensor that is stored in NVFP4 not at all, or twice."""

    def before(p: Problem) -> Problem:
        found = {}
        for name in INPUTS:
            scale, x = getattr(p, name), getattr(p, name.removesuffix("_scale"))
            if _axis(p, name) is not None and dtype_name(x) == FLOAT4.name and dtype_name(scale) == "float32":
                found[name] = (scale * np.float32(_one_for_all(scale) ** power)).astype(np.float32)
        return p.replace(**found)

    return before


def _nibbles(name: str, axis: int) -> Callable[[Problem], Problem]:
    """Take the upper four bits of a byte for the lower ones: two neighbours change places."""

    def before(p: Problem) -> Problem:
        x = getattr(p, name)
        if dtype_name(x) != FLOAT4.name or x.shape[axis] % 2:
            return p
        return p.replace(**{name: np.take(x, np.arange(x.shape[axis]) ^ 1, axis)})

    return before


def _exponent_off(p: Problem) -> Problem:
    """Take a bias of 128 for that of float8_e8m0fnu, 127, in the keys' scale."""
    if p.key_scale is None or isinstance(p.key_scale, float) or dtype_name(p.key_scale) in FORMATS:
        return p
    return p.replace(key_scale=(p.key_scale.astype(np.float32) / 2).astype(p.key_scale.dtype))


def _scales(p: Problem, change: Change, names: tuple[str, ...] = INPUTS) -> Problem:
    """Change scales that are arrays."""
    scales = {n: x for n in names if (x := getattr(p, n)) is not None and not isinstance(x, float)}
    return p.replace(**{n: change(x, 1) for n, x in scales.items()})


def _query_ignored(p: Problem) -> Problem:
    return p.replace(query_scale=None)


def _query_of_next_head(p: Problem) -> Problem:
    return _scales(p, lambda s, heads: np.roll(s, 1, heads), INPUTS[:1])


def _query_of_first_in_group(p: Problem) -> Problem:
    """Take the scale of the first query head that shares a key head."""
    group = p.heads // p.heads_kv

    def first(s: NDArray[Any], heads: int) -> NDArray[Any]:
        return np.take(s, np.arange(s.shape[heads]) // group * group, heads) if s.shape[heads] == p.heads else s

    return _scales(p, first, INPUTS[:1])


def _clamped(p: Problem) -> Problem:
    return _scales(p, lambda s, _: np.maximum(to_float64(s), LEAST).astype(s.dtype))


TYPE_BUGS: dict[str, Callable[[Problem], Problem]] = {
    "query_scale_ignored": _query_ignored,
    "query_scale_of_next_head": _query_of_next_head,
    "query_scale_of_first_in_group": _query_of_first_in_group,
    "block_scale_of_next": _next_block,
    "block_scale_of_first": _first_of_all,
    "blocks_of_32_read_as_16": _read_as_half,
    "blocks_of_16_read_as_32": _read_as_whole,
    "tensor_scale_lost": _tensor_scale(-1),
    "tensor_scale_twice": _tensor_scale(1),
    "nibbles_of_keys_swapped": _nibbles("key", 3),
    "nibbles_of_values_swapped": _nibbles("value", 2),
    "scale_exponent_off_by_one": _exponent_off,
    "scale_clamped": _clamped,
}
"""An edit of the problem that a right kernel is given, by name."""
