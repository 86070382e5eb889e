"""What calls with positions are given: tables of rotary positions, ALiBi's slopes, T5's buckets.

Recalled, not read again: RoPE (Su et al., arXiv 2104.09864, eq. 34), ALiBi (Press et al., arXiv 2108.12409), T5 (Raffel
et al., arXiv 1910.10683), YaRN (Peng et al., arXiv 2309.00071), Llama 3's scaling and Qwen2-VL's sections as in the
configurations of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..arrays import from_float64, like, to_numpy
from ..dtypes import format_of
from ..errors import InvalidInput, expect
from ..exact.precision import precision
from .arguments import integers, namespace, real, whole
from .toeplitz import _exact_sum, _of_bias

__all__ = ["alibi_slopes", "lightning_slopes", "rotary_tables", "t5_bias", "t5_bias_gradient", "t5_buckets"]

BITS = 320
"""Working precision: angles of positions below 2**63, and 200 bits of their cosines."""
LARGEST = 2**63 - 1
SCALINGS: dict[str, dict[str, float | None]] = {
    "default": {},
    "linear": {"factor": None},
    "ntk": {"factor": None},
    "yarn": {"factor": None, "original_max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0},
    "llama3": {
        "factor": None, "original_max_position_embeddings": None, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip
"""What each scaling is told, and its default; None must be given."""


def rotary_tables(
    positions: Any,
    dim: int,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    sections: Sequence[int] | None = None,
    dtype: str = "float32",
) -> tuple[NDArray[Any], NDArray[Any]]:
    r"""Return cosines and sines of rotary positions, each correctly rounded: cos(p base^(-2i/dim)) for pair i.

    Kernels are often given tables that were made in float32, whose angles are off by up to p 2**-24: to judge such a
    kernel pass what it gets. These tables are for judging the tables.

    Parameters
    ----------
    positions : int, (n,) or (axes, n) integer array
        How many positions from 0 on, or which; with `sections` one row an axis (time, height, width).
    dim : int
        Columns that are turned, even: twice the pairs.
    base : float
        Above 1.
    scaling : mapping, optional
        As in a model's configuration: ``rope_type`` is "linear" (positions over ``factor``), "ntk" (base times
        factor^(dim / (dim - 2))), "yarn" or "llama3"; the others are that scaling's numbers. YaRN's tables are
        multiplied by 0.1 log(factor) + 1.
    sections : sequence of int, optional
        How many pairs follow each axis of `positions`, the first pairs the first axis; they add up to dim / 2.
    dtype : str
        A format of ``refattn.dtypes.FORMATS``.

    Returns
    -------
    cos, sin : (n, dim / 2) NumPy arrays
        Row r belongs to ``positions[r]``: give a call ``positions_q`` and ``positions_k`` that are rows.

    Raises
    ------
    InvalidInput
        An odd dim, an unknown scaling, one without its numbers or whose two bounds are in the wrong order, positions
        that are no integers below 2**63, sections that do not add up.
    """
    if whole("dim", dim, 2) % 2:
        raise InvalidInput(f"dim: got {dim}, expected an even number; columns turn in pairs")
    if real("base", base, 1) == 1:
        raise InvalidInput("base: got 1, expected a number above 1")
    expect(scaling is None or isinstance(scaling, Mapping), "scaling", scaling, "a mapping with 'rope_type', or None")
    where = _positions(positions, sections)
    axis = _axes(sections, dim // 2, len(where))
    form = format_of(dtype)
    found = np.empty((2, where.shape[1], dim // 2))
    with precision(BITS):
        angles, by = _frequencies(dim, base, scaling or {})
        for i, turn in enumerate(angles):
            for row, p in enumerate(where[axis[i]].tolist()):
                sin, cos = (turn * p).sin_cos()
                found[:, row, i] = _nearest(cos * by, form.precision), _nearest(sin * by, form.precision)
    cos, sin = (from_float64(form.round_array(x), form.name) for x in found)
    return cos, sin


def _positions(positions: Any, sections: Sequence[int] | None) -> NDArray[np.int64]:
    if isinstance(positions, int | np.integer) and not isinstance(positions, bool):
        positions = np.arange(whole("positions", positions, 1))
    x = integers("positions", positions)
    if x.ndim != (1 if sections is None else 2):
        want = "integers on one axis" if sections is None else "integers, a row for each axis, with sections"
        raise InvalidInput(f"positions: got {x.dtype} of shape {x.shape}, expected {want}")
    if x.size and int(x.max()) > LARGEST:
        raise InvalidInput(f"positions: got {x.max()}, expected numbers below 2**63")
    return np.atleast_2d(x.astype(np.int64))


def _axes(sections: Sequence[int] | None, pairs: int, axes: int) -> list[int]:
    if sections is None:
        return [0] * pairs
    good = isinstance(sections, Sequence | np.ndarray) and not isinstance(sections, str)
    expect(good, "sections", sections, "a sequence of integers, how many pairs follow each axis")
    counts = [whole("sections", n, 0) for n in sections]
    if len(counts) != axes or sum(counts) != pairs:
        raise InvalidInput(
            f"sections: got {tuple(counts)}, expected {axes} numbers, one for each axis of positions, that add up to "
            f"{pairs}, half of dim"
        )
    return [a for a, n in enumerate(counts) for _ in range(n)]


def _nearest(x: Any, bits: int) -> float:
    """Return a ball's number for rounding to so many bits: in float64, rounded to odd where fewer are wanted."""
    h = float(x.mid())
    rest = float((x - flint.arb(h)).mid())
    if bits < 53 and rest and not int(np.frexp(h)[0] * 2.0**53) & 1:
        return float(np.nextafter(h, np.inf if rest > 0 else -np.inf))
    return h


def _frequencies(dim: int, base: float, scaling: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Return each pair's angle by position, and what the tables are multiplied with."""
    kind, given = str(scaling.get("rope_type", "default")), {n: x for n, x in scaling.items() if n != "rope_type"}
    if kind not in SCALINGS:
        raise InvalidInput(f"scaling: got rope_type {kind!r}, expected one of {', '.join(SCALINGS)}")
    known = SCALINGS[kind]
    if unknown := sorted(set(given) - set(known), key=str):
        raise InvalidInput(f"scaling: {kind} has no {unknown[0]!r}; it has {', '.join(known) or 'no numbers'}")
    if missing := [n for n, x in known.items() if x is None and n not in given]:
        raise InvalidInput(f"scaling: {kind} needs {missing[0]!r}")
    n = {name: flint.arb(float(real(f"scaling[{name!r}]", x, 1e-6))) for name, x in {**known, **given}.items()}
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        if low in n and not (n[low] < n[high] or (kind == "yarn" and n[low] == n[high])):
            raise InvalidInput(
                f"scaling[{high!r}]: got {float(n[high]):g}, expected more than {low!r}, {float(n[low]):g}; between "
                "the two it goes from one to the other"
            )
    root, one = flint.arb(float(base)), flint.arb(1)
    if kind == "ntk":
        if dim == 2:
            raise InvalidInput("scaling: ntk has no meaning for dim 2")
        root = root * n["factor"] ** (flint.arb(dim) / (dim - 2))
    plain = [root ** (flint.arb(-2 * i) / dim) for i in range(dim // 2)]
    if kind == "linear":
        return [f / n["factor"] for f in plain], one
    if kind == "yarn":
        return _yarn(plain, dim, root, n)
    return ([_llama3(f, n) for f in plain] if kind == "llama3" else plain), one


def _yarn(plain: list[Any], dim: int, root: Any, n: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return high frequencies as they are, low ones over the factor, those between by a ramp over the pairs."""
    one = flint.arb(1)

    def pair(turns: Any) -> float:
        return float((dim * (n["original_max_position_embeddings"] / (turns * 2 * flint.arb.pi())).log()
                      / (2 * root.log())).mid())  # fmt: skip

    low, high = max(int(np.floor(pair(n["beta_fast"]))), 0), min(int(np.ceil(pair(n["beta_slow"]))), dim - 1)
    width = flint.arb(high - low) if high != low else one / 1000
    ramps = [max(flint.arb(0), min(one, flint.arb(i - low) / width)) for i in range(len(plain))]
    by = n["factor"].log() / 10 + 1 if n["factor"] > 1 else one
    return [f / n["factor"] * r + f * (one - r) for f, r in zip(plain, ramps, strict=True)], by


def _llama3(f: Any, n: dict[str, Any]) -> Any:
    """Return a high frequency as it is, a low one over the factor, and between the two a mean."""
    turns = n["original_max_position_embeddings"] * f / (2 * flint.arb.pi())  # in the original length
    if turns < n["low_freq_factor"]:
        return f / n["factor"]
    if turns > n["high_freq_factor"]:
        return f
    smooth = (turns - n["low_freq_factor"]) / (n["high_freq_factor"] - n["low_freq_factor"])
    return (1 - smooth) * f / n["factor"] + smooth * f


def alibi_slopes(heads: int) -> NDArray[np.float64]:
    """Return ALiBi's slopes: 2^(-8 i / h) for i = 1 .. h; between powers of two every other one of the next is added.

    Parameters
    ----------
    heads : int
        Query heads h.

    Returns
    -------
    (h,) float64 array
        For ``Problem(alibi_slopes=...)``; cast it to what the kernel gets.
    """
    n = whole("heads", heads, 1)
    power = 1 << (n.bit_length() - 1)

    def of(m: int) -> list[float]:
        return [2.0 ** (-8 * i / m) for i in range(1, m + 1)]

    return np.array(of(power) + of(2 * power)[::2][: n - power])


def lightning_slopes(heads: int, layer: int, layers: int) -> NDArray[np.float64]:
    """Return a layer's decay rates of Lightning attention: ALiBi's slopes times 1 - layer / (layers - 1) + 1e-5.

    Each is the slope in float64 times the exact factor, rounded once; the release multiplies in float32.

    Parameters
    ----------
    heads : int
        Query heads.
    layer : int
        Which, from 0 on.
    layers : int
        How many the model has, at least 2.

    Returns
    -------
    (heads,) float64 array
        In 1/position, for the operator's option ``decay``.

    Notes
    -----
    Source: the slopes of `OpenNLPLab/lightning-attention`, whose `tnl_attn.py` was read.
    """
    last = whole("layers", layers, 2) - 1
    by = 1 - Fraction(whole("layer", layer, 0, last), last) + Fraction(1, 10**5)
    return np.array([float(Fraction(x) * by) for x in alibi_slopes(heads).tolist()])


def t5_buckets(
    relative: Any, *, bidirectional: bool = True, buckets: int = 32, max_distance: int = 128
) -> NDArray[np.int64]:
    """Return T5's bucket of each distance, key position less query position, decided in integers.

    Near distances have a bucket each, those up to `max_distance` share the rest by their logarithm. Code that takes
    float32 logarithms may differ by one where a distance lies on an edge.

    Parameters
    ----------
    relative : integer array
        Key position - query position.
    bidirectional : bool
        Whether keys behind and before a query have buckets of their own; else all before it are at distance 0.
    buckets, max_distance : int
        The table's length, and the distance from which on all share the last bucket.

    Raises
    ------
    InvalidInput
        `relative` has no integers; numbers too small to have a bucket by logarithm; a table of more than 2**31 rows.
    """
    x = integers("relative", relative)
    expect(isinstance(bidirectional, bool | np.bool_), "bidirectional", bidirectional, "True or False")
    half = whole("buckets", buckets, 4 if bidirectional else 2, 2**31) // (2 if bidirectional else 1)
    near = half // 2
    most = whole("max_distance", max_distance, near + 1, LARGEST)
    # from max_distance on all distances are one: no type's largest or smallest number wraps
    x = np.clip(np.minimum(x, x.dtype.type(LARGEST)).astype(np.int64) if x.dtype == np.uint64 else x, -most, most)
    x = x.astype(np.int64)
    first = np.where(x > 0, half, 0) if bidirectional else np.zeros_like(x)
    far = np.abs(x) if bidirectional else np.maximum(-x, 0)
    return np.asarray(first + np.where(far < near, far, near + _steps(np.maximum(far, near), near, most, half - near)))


def _steps(far: NDArray[np.int64], near: int, most: int, steps: int) -> NDArray[np.int64]:
    """Return by how many equal steps of the logarithm distances lie above `near`, below `steps`, which `most` has."""
    by = np.log1p((far - near) / near) / np.log1p((most - near) / near) * steps
    found = np.floor(by).astype(np.int64)
    # two logarithms of quotients of integers, each within 3 roundings and 4 ulp, a quotient and a product: at most 26
    # roundings of 2**-53; where so much may hide an edge it is decided exactly
    edge = np.rint(by)
    unsure = np.flatnonzero(np.abs(by - edge) <= 2.0**-48 * by)
    each, back = np.unique(far.flat[unsure], return_inverse=True)
    at = np.zeros(len(each), np.int64)
    at[back] = edge.flat[unsure].astype(np.int64)
    exact = [k if _reaches(n, near, most, k, steps) else k - 1 for n, k in zip(each.tolist(), at.tolist(), strict=True)]
    found.flat[unsure] = np.array(exact, np.int64)[back]
    return np.asarray(np.minimum(found, steps - 1))


def _reaches(n: int, near: int, most: int, k: int, steps: int) -> bool:
    """Decide (n / near)^steps >= (most / near)^k."""
    common = math.gcd(k, steps)
    k, steps = k // common, steps // common
    if steps < 64:
        return bool(n**steps * near**k >= most**k * near**steps)
    # equal ones are powers r^k and r^steps of one fraction, and r^64 has no numerator below 2**63 but 1: none is equal
    bits = 128
    while True:
        with precision(bits):
            gap = steps * (flint.arb(n) / near).log() - k * (flint.arb(most) / near).log()
            if not gap.contains(0):
                return bool(gap > 0)
        bits *= 2


def t5_bias(
    table: Any, n_q: int, n_k: int, *, offset: int = 0, bidirectional: bool = True, max_distance: int = 128
) -> Any:
    """Return T5's bias of a call: the table's number for the bucket of key j - query (i + offset) and the head.

    Parameters
    ----------
    table : (buckets, h) array
        What the model learned.
    n_q, n_k : int
        Queries and keys.
    offset : int
        The position of the first query.
    bidirectional, max_distance
        As in :func:`t5_buckets`.

    Returns
    -------
    (1, h, n_q, n_k) array
        For ``Problem(bias=...)``, of the table's library and type.

    Raises
    ------
    InvalidInput
        A table that is no array (buckets, h), an offset that is no integer, and as :func:`t5_buckets`.
    """
    namespace(table=table)
    x = to_numpy(table, "table")
    if x.ndim != 2:
        raise InvalidInput(f"table: got shape {x.shape}, expected (buckets, heads)")
    whole("table's buckets", len(x), 2)
    first = whole("offset", offset, -(2**62), 2**62)
    rows, keys = np.arange(whole("n_q", n_q, 0)), np.arange(whole("n_k", n_k, 0))
    at = t5_buckets(
        keys[None, :] - (rows + first)[:, None], bidirectional=bidirectional, buckets=len(x), max_distance=max_distance
    )
    return like(np.ascontiguousarray(np.moveaxis(x[at], 2, 0)[None]), table)


def t5_bias_gradient(
    dbias: Any, buckets: int, *, offset: int = 0, bidirectional: bool = True, max_distance: int = 128
) -> NDArray[np.float64]:
    """Return the gradient by T5's table of that by its bias: the sum over all pairs of a bucket, rounded once.

    What is allowed of it, and the radius of an exact one, are the same sums of what is allowed of dbias, and of its
    radius, each element off by one rounding more.

    Parameters
    ----------
    dbias : (1, h, n_q, n_k) array
        The gradient by a bias that all batch items share: ``refattn.evaluate(problem, gradients=dout).dbias``.
    buckets : int
        The table's length.
    offset, bidirectional, max_distance
        As in :func:`t5_bias`.

    Returns
    -------
    (buckets, h) float64 array

    Raises
    ------
    InvalidInput
        A gradient of another shape, and as :func:`t5_bias`.
    """
    x = _of_bias(dbias)
    first = whole("offset", offset, -(2**62), 2**62)
    apart = np.arange(x.shape[2])[None, :] - (np.arange(x.shape[1]) + first)[:, None]
    more: dict[str, Any] = {"bidirectional": bidirectional, "max_distance": max_distance}
    at = np.asarray(t5_buckets(apart, buckets=buckets, **more))
    return np.array([[_exact_sum(one[at == b]) for one in x] for b in range(buckets)])
