"""Numbers that are stored in fewer bits: elements times a scale, for all, a head, a token, a channel or a block.

A scale's axes divide its tensor's: element i of an axis of N has number i // (N / m) of the m scales along it.
MXFP8 and MXFP4 (OCP Microscaling 1.0) are float8 and float4 elements with a float8_e8m0fnu scale for each 32 along an
axis; NVFP4 is float4 elements with a float8_e4m3fn scale for each 16, and a number for all, which is multiplied into
the scales (exactly, in float32 or float64). Formats recalled, not read again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import dtype_name, from_float64, to_float64, to_numpy
from .dtypes import ELEMENTS, FLOAT4, FORMATS, HELD
from .errors import InvalidInput, InvalidProblem, expect
from .pages import gathered
from .problem import Problem

__all__ = ["dequantised", "quantised", "spread", "values"]

Float = NDArray[np.float64]
NARROW = 4
"""Bits of the types that are scaled to their largest number; wider ones are scaled to 1."""
PAIRS = (("query", "query_scale"), ("key", "key_scale"), ("value", "value_scale"))


def dequantised(problem: Problem) -> Problem:
    """Return the same call with the values that its bytes mean, in float64, exactly; itself where that is so already.

    A scale that was there is 1 then, and keys in pages are side by side.

    Raises
    ------
    InvalidProblem
        An element times its scale is no float64 number.
    """
    problem = gathered(problem)
    if not problem.typed or _done(problem):
        return problem
    p = problem.to("numpy")
    changed: dict[str, Any] = {n: values(p, n) for n, _ in PAIRS}
    changed |= {s: None if getattr(p, s) is None else 1.0 for _, s in PAIRS}
    return p.replace(**changed, out_dtype=p.out_type)


def _done(problem: Problem) -> bool:
    scales = [getattr(problem, s) for _, s in PAIRS]
    known = all(x is None or (isinstance(x, float) and x == 1) for x in scales)
    return known and all(dtype_name(getattr(problem, n)) == "float64" for n, _ in PAIRS)


def values(problem: Problem, name: str) -> Float:
    """Return the values of query, key or value that the bytes mean, exactly.

    Parameters
    ----------
    problem : Problem
        With arrays of any library.
    name : {"query", "key", "value"}
        Which.

    Raises
    ------
    InvalidProblem
        An element times its scale is no float64 number.
    """
    x, scale = to_float64(to_numpy(getattr(problem, name))), getattr(problem, f"{name}_scale")
    if scale is None:
        return x
    by = np.asarray(scale if isinstance(scale, float) else to_float64(to_numpy(scale)), np.float64)
    bits, own = _bits(by), ELEMENTS[dtype_name(getattr(problem, name))]
    if bits > 1 and bits + own > 53:
        raise InvalidProblem(
            f"{name}_scale: has {bits} bits, {name}'s elements {own}, and float64 holds no product of these; "
            "round the scale, e.g. float(numpy.float32(scale))"
        )
    of = spread(by, x.shape)
    with np.errstate(all="ignore"):
        product = np.asarray(x * of)
        lost = np.isfinite(x) & (product / of != x)  # an exact product gives its factor back
    if lost.any():
        at = tuple(int(i) for i in np.argwhere(lost)[0])
        raise InvalidProblem(
            f"{name}_scale: {name} at {at} is {x[at]:.3g}, and times its scale {np.broadcast_to(of, x.shape)[at]:.3g} "
            "it leaves float64's range; scale both by a power of two"
        )
    return product


def spread(scale: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the scale of each element of a tensor, (b, h, n, d)."""
    for axis, n in enumerate(shape if scale.ndim else ()):
        m = scale.shape[axis]
        scale = np.repeat(scale, n // m, axis) if m > 1 else scale
    return scale


def _bits(x: Float) -> int:
    """Return how many significant bits the numbers of an array have, at most."""
    whole = (np.frexp(x)[0] * 2.0**53).astype(np.int64)
    low = whole & -whole
    return 54 - int(np.frexp(low.astype(np.float64))[1].min(initial=54))


def quantised(
    x: Float, elements: str, blocks: tuple[int, int, int, int], scales: str = "float32"
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return elements and scales of a tensor, by its largest number in each block.

    Parameters
    ----------
    x : (b, h, n, d) float64 array
        The tensor.
    elements : str
        Out of ``refattn.dtypes.ELEMENTS``.
    blocks : four integers
        How many scales there are along each axis; each divides it.
    scales : str
        The scales' format, ``"float8_e8m0fnu"`` for powers of two.

    Returns
    -------
    elements, scale : arrays
        What ``key=`` and ``key_scale=`` take, say.
    """
    if len(blocks) != 4 or any(m < 1 or n % m for n, m in zip(x.shape, blocks, strict=True)):
        raise InvalidInput(f"blocks: got {blocks}, expected four integers that divide the axes of {x.shape}")
    expect(elements in ELEMENTS, "elements", elements, "one of " + ", ".join(ELEMENTS))
    expect(scales in FORMATS or scales in HELD, "scales", scales, "one of " + ", ".join([*FORMATS, *HELD]))
    if not np.isfinite(x).all():
        raise InvalidInput("x: has numbers that are not finite, and no scale holds them")
    b, h, n, d = blocks
    parts = x.reshape(b, x.shape[0] // b, h, x.shape[1] // h, n, x.shape[2] // n, d, x.shape[3] // d)
    top = np.abs(parts).max((1, 3, 5, 7))
    form = FLOAT4 if elements == FLOAT4.name else FORMATS.get(elements)
    most = 127.0 if form is None else form.largest if form.precision <= NARROW else 1.0
    with np.errstate(divide="ignore"):
        by = np.where(top > 0, top / most, 1.0)
        exponent = np.floor(np.log2(np.where(top > 0, top, 1.0))) - np.floor(np.log2(most))
    if scales == "float8_e8m0fnu":
        by = np.exp2(np.clip(exponent, -127, 127))
        scale: NDArray[Any] = by.astype(np.float32).astype(HELD[scales])
    else:
        rounded = FORMATS[scales].round_array(by)
        scale = from_float64(np.where(rounded > 0, rounded, FORMATS[scales].smallest_subnormal), scales)
    q = x / spread(scale.astype(np.float64), x.shape)
    if form is None:
        return np.clip(np.rint(q), -127, 127).astype(np.int8), scale
    held = form.round_array(np.clip(q, -most, most))
    return held.astype(np.float32).astype(form.dtype) if form is FLOAT4 else from_float64(held, form.name), scale
