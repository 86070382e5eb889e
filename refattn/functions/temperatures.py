"""Factors of a query's scores that grow with its position, and rotary tables that have them behind a norm.

Llama 4's factor and Qwen's log n are as released code has them (transformers' modeling_llama4.py, Qwen's
modeling_qwen.py: passages read). They multiply queries that are normed and turned already, so a `query_scale`, which
comes before the norm, does not stand for them beside one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import from_float64, like, to_float64, to_numpy
from ..dtypes import FORMATS
from ..errors import InvalidInput
from .arguments import axes, integers, namespace, real, whole

__all__ = ["llama4_factors", "log_n_factors", "tempered"]

MOST = 2**53
"""Positions lie below it, so that float64 has them all."""


def llama4_factors(positions: Any, *, floor_scale: int = 8192, attn_scale: float = 0.1) -> NDArray[np.float64]:
    r"""Return Llama 4's factors: attn_scale log(floor((p + 1) / floor_scale) + 1) + 1 at position p.

    Parameters
    ----------
    positions : (n,) integers of at least 0
        Where queries stand.
    floor_scale : int
        Positions with one factor; the first floor_scale - 1 have 1.
    attn_scale : float
        At least 0.

    Returns
    -------
    (n,) float64 array
        Within a few roundings of the formula.

    Raises
    ------
    InvalidInput
        Positions that are none, a floor_scale below 1, a negative attn_scale.
    """
    # a step past all positions is as good as any larger one, which an array of integers does not hold
    at, step = _places(positions), min(whole("floor_scale", floor_scale, 1), MOST + 1)
    return np.asarray(np.log((at + 1) // step + 1) * float(real("attn_scale", attn_scale, 0)) + 1)


def log_n_factors(positions: Any, length: int) -> NDArray[np.float64]:
    """Return log n factors: log(p + 1) / log(length) at position p, and 1 below `length`.

    Parameters
    ----------
    positions : (n,) integers of at least 0
        Where queries stand.
    length : int
        That a model was trained with, at least 2.

    Returns
    -------
    (n,) float64 array
        Within a few roundings of the formula.

    Raises
    ------
    InvalidInput
        Positions that are none, a length below 2.
    """
    at, base = _places(positions), whole("length", length, 2)
    return np.where(at + 1 > min(base, MOST), np.log(at + 1) / math.log(base), 1.0)


def tempered(cos: Any, sin: Any, factors: Any) -> tuple[Any, Any]:
    """Return tables of 2m rows: those given, for keys, and below them the same times a factor each, for queries.

    A query at position p then has ``positions_q`` m + p: norm, turn and factor are one call's, in this order. All
    columns must turn, as those that do not have no factor; a layer without rotary positions has cosines 1 and sines 0.

    Parameters
    ----------
    cos, sin : (m, d / 2) float arrays
        Of NumPy, PyTorch, CuPy or JAX.
    factors : (m,) float array
        By position.

    Returns
    -------
    cos, sin : (2m, d / 2) arrays
        Of the kind and type given, each product rounded once.

    Raises
    ------
    InvalidInput
        Arrays of several libraries, tables of unlike shapes, another number of factors, factors that are not finite.
    """
    namespace(cos=cos, sin=sin)
    axes("cos", cos, "positions", "pairs")
    axes("sin", sin, *cos.shape)
    by = _factors(factors)
    if by.shape != (cos.shape[0],) or not np.isfinite(by).all():
        raise InvalidInput(f"factors: got shape {by.shape}, expected ({cos.shape[0]},) finite numbers, one a position")
    found = []
    for name, x in (("cos", cos), ("sin", sin)):
        table = to_numpy(x, name)
        if table.dtype.name not in FORMATS:
            raise InvalidInput(f"{name}: got dtype {table.dtype.name}, expected one of {', '.join(FORMATS)}; cast it")
        form = FORMATS[table.dtype.name]
        scaled = from_float64(form.round_array(to_float64(table) * by[:, None]), form.name)
        found.append(like(np.concatenate([table, scaled]), x))
    return found[0], found[1]


def _factors(factors: Any) -> NDArray[np.float64]:
    try:
        x = np.asarray(factors) if isinstance(factors, list) else to_numpy(factors, "factors")
    except ValueError as e:
        raise InvalidInput(f"factors: got {type(factors).__name__}, expected an array of numbers ({e})") from e
    if x.dtype.kind not in "iuf" and x.dtype.name not in FORMATS:
        raise InvalidInput(f"factors: got dtype {x.dtype.name}, expected real numbers of float64")
    return x.astype(np.float64)


def _places(positions: Any) -> NDArray[np.int64]:
    x = integers("positions", positions)
    if x.ndim != 1 or (x.size and (int(x.min()) < 0 or int(x.max()) >= MOST)):
        raise InvalidInput(f"positions: got shape {x.shape}, expected whole numbers of 0 to 2**53 - 1 on one axis")
    return x.astype(np.int64)
