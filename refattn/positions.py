"""Where queries and keys stand, and what a call makes of it: rotary positions and ALiBi slopes.

Rotary positions (Su et al., arXiv 2104.09864, eq. 34) turn each pair of features of a query and of a key by an angle
that grows with its position. A call carries the cosines and sines that its kernel is given, so that the turned pair is
exact arithmetic of given numbers: (a, b) becomes (a cos - b sin, b cos + a sin). "half" pairs column c with c + r, as
GPT-NeoX and Llama do, "interleaved" 2c with 2c + 1, as GPT-J and the paper do; columns past 2r stay as they are. ALiBi
(Press et al., arXiv 2108.12409) takes slope · |position of query - position of key| off a score: FlashAttention's form.
Formulas recalled, not read again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import dtype_name, kind_of, to_float64, to_numpy
from .dtypes import FORMATS
from .errors import InvalidProblem
from .validation import expect_array, shown

__all__ = [
    "PLACED",
    "POSITIONS",
    "ROTARY",
    "STYLES",
    "check_positions",
    "diagonal",
    "part_of",
    "partners",
    "places",
    "slope_of",
    "tables",
    "turned",
]

Float = NDArray[np.float64]
Places = NDArray[np.int64]
STYLES = ("half", "interleaved")
ROTARY = ("rotary_cos", "rotary_sin")
POSITIONS = ("positions_q", "positions_k")
PLACED = (*ROTARY, "alibi_slopes", *POSITIONS)
"""Arrays of a call in which positions count."""
FARTHEST = 2**52
"""The largest position: distances are exact in float64."""


def diagonal(problem: Any, batch: int, rows: slice, keys: slice) -> int:
    """Return the key, counted from its sequence's first, at which the first query of a sequence stands."""
    first = (keys.stop - keys.start) - (rows.stop - rows.start) if problem.corner == "bottom_right" else 0
    if problem.offset is None or isinstance(problem.offset, int):
        return first + (problem.offset or 0)
    at = batch if problem.cu_seqlens_q is None else problem.segments().index((rows, keys))
    return first + int(to_numpy(problem.offset)[at])


def places(problem: Any, batch: int, rows: slice, keys: slice) -> tuple[Places, Places]:
    """Return the positions of the queries and of the keys of one sequence: those given, else key j is at j.

    A query is then at the key at which it stands on the diagonal.
    """
    first = diagonal(problem, batch, rows, keys)
    found = []
    for name, at, start in (("positions_q", rows, first), ("positions_k", keys, 0)):
        x = getattr(problem, name)
        if x is None:
            found.append(np.arange(start, start + at.stop - at.start, dtype=np.int64))
        else:
            given = to_numpy(x).astype(np.int64)
            found.append((given if given.ndim == 1 else given[batch])[at])
    return found[0], found[1]


def partners(problem: Any) -> NDArray[np.intp]:
    """Return for each column of a query the one that it is turned with, (d_k,); itself where it is not turned."""
    pairs, at = problem.rotary_cos.shape[1], np.arange(problem.d_k)
    two = at[: 2 * pairs]
    at[: 2 * pairs] = (two + pairs) % (2 * pairs) if problem.rotary == "half" else two ^ 1
    return at


def tables(problem: Any, where: Places) -> tuple[Float, Float]:
    """Return what columns and their partners are multiplied with at some positions, (n, d_k) each.

    The signs are those of the sines' place: a turned column is ``x cos + x[partner] sin``.
    """
    cos, sin = (to_float64(to_numpy(getattr(problem, n)))[where] for n in ROTARY)
    n, pairs = cos.shape
    by_cos, by_sin = np.ones((n, problem.d_k)), np.zeros((n, problem.d_k))
    half = problem.rotary == "half"
    first, second = (
        (slice(pairs), slice(pairs, 2 * pairs)) if half else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
    )
    by_cos[:, first] = by_cos[:, second] = cos
    by_sin[:, first], by_sin[:, second] = -sin, sin
    return by_cos, by_sin


def turned(x: Any, cos: Any, sin: Any, o: Any) -> Any:
    """Return queries or keys turned by their positions, in any arithmetic; `o` is a definition's options."""
    return (x * cos + x.columns(o.partner) * sin).written(o.moved)


def slope_of(problem: Any, batch: int, head: int) -> float:
    """Return a head's ALiBi slope."""
    slopes = to_float64(to_numpy(problem.alibi_slopes))
    return float(slopes[head] if slopes.ndim == 1 else slopes[batch, head])


def part_of(problem: Any, batch: int, heads: Any, rows: Any) -> dict[str, Any]:
    """Return the arguments of positions of a call of one batch item, some heads and rows, and all keys."""
    p = problem
    if p.rotary is None and p.alibi_slopes is None:
        return {}
    at: tuple[Places, Places] = np.zeros(p.n_q, np.int64), np.zeros(p.n_k, np.int64)
    for queries, keys in p.segments(batch):
        at[0][queries], at[1][keys] = places(p, batch, queries, keys)
    found: dict[str, Any] = {"positions_q": at[0][rows], "positions_k": at[1]}
    if p.alibi_slopes is not None:
        found["alibi_slopes"] = (p.alibi_slopes if p.alibi_slopes.ndim == 1 else p.alibi_slopes[batch])[heads]
    return found


def check_positions(p: Any) -> None:
    """Refuse tables, slopes and positions that do not fit a call."""
    _check_tables(p)
    if p.alibi_slopes is not None:
        _numbers(p, "alibi_slopes")
        if tuple(p.alibi_slopes.shape) not in ((p.heads,), (p.batch, p.heads)):
            raise InvalidProblem(
                f"alibi_slopes: got shape {tuple(p.alibi_slopes.shape)}, expected ({p.heads},) or "
                f"({p.batch}, {p.heads}), a slope for each query head"
            )
    for name, n in zip(POSITIONS, (p.n_q, p.n_k), strict=True):
        x = getattr(p, name)
        if x is None:
            continue
        if p.rotary is None and p.alibi_slopes is None:
            raise InvalidProblem(f"{name}: nothing in the call reads positions; give rotary or alibi_slopes, too")
        expect_array(name, x)
        _same_library(p, name)
        if tuple(x.shape) not in ((n,), (p.batch, n)) or not dtype_name(x).lstrip("u").startswith("int"):
            raise InvalidProblem(
                f"{name}: got {dtype_name(x)} of shape {tuple(x.shape)}, expected integers of shape ({n},) or "
                f"({p.batch}, {n})"
            )
    if p.rotary is not None or p.alibi_slopes is not None:
        _check_range(p)


def _check_tables(p: Any) -> None:
    given = [n for n in ROTARY if getattr(p, n) is not None]
    if p.rotary is None:
        if given:
            raise InvalidProblem(f"{given[0]}: got a table without rotary; say how columns pair: {' or '.join(STYLES)}")
        return
    if not isinstance(p.rotary, str) or p.rotary not in STYLES:
        raise InvalidProblem(
            f"rotary: got {shown(p.rotary)}, expected 'half' (column c turns with c + r) or 'interleaved' (2c with "
            "2c + 1)"
        )
    if len(given) < 2:
        raise InvalidProblem(
            f"rotary: got {given[0] if given else 'no table'} alone, expected rotary_cos and rotary_sin"
        )
    for name in ROTARY:
        _numbers(p, name)
    shape = tuple(p.rotary_cos.shape)
    if len(shape) != 2 or 0 in shape or tuple(p.rotary_sin.shape) != shape:
        raise InvalidProblem(
            f"rotary_cos, rotary_sin: got shapes {shape} and {tuple(p.rotary_sin.shape)}, expected (positions, pairs) "
            "twice"
        )
    if 2 * shape[1] > p.d_k:
        raise InvalidProblem(
            f"rotary_cos: turns {shape[1]} pairs of columns, expected at most {p.d_k // 2}, half of query's "
            f"{p.d_k}; a table has one column a pair, not two"
        )


def _numbers(p: Any, name: str) -> None:
    x = getattr(p, name)
    expect_array(name, x)
    _same_library(p, name)
    if dtype_name(x) not in FORMATS:
        raise InvalidProblem(f"{name}: got dtype {dtype_name(x)}, expected one of {', '.join(FORMATS)}; cast it")
    if not np.isfinite(to_float64(to_numpy(x, name))).all():
        raise InvalidProblem(f"{name}: has NaN or inf, expected finite numbers")


def _same_library(p: Any, name: str) -> None:
    if kind_of(getattr(p, name)) != p.kind:
        kind = kind_of(getattr(p, name))
        raise InvalidProblem(f"{name}: is of {kind} and query of {p.kind}; pass arrays of one library")


def _check_range(p: Any) -> None:
    """Refuse positions past the table, of rows and keys that are used."""
    low, high = (-FARTHEST, FARTHEST) if p.rotary is None else (0, int(p.rotary_cos.shape[0]) - 1)
    for b in range(p.batch):
        for rows, keys in p.segments(b):
            first = diagonal(p, b, rows, keys)
            if abs(first) > FARTHEST:
                raise InvalidProblem(f"offset: puts a query at {first}, expected at most 2**52 where positions count")
            for name, what, at in zip(POSITIONS, ("query", "key"), places(p, b, rows, keys), strict=True):
                if at.size and not (low <= at.min() and at.max() <= high):
                    wrong = int(at.min() if at.min() < low else at.max())
                    change = "give a longer table" if wrong > high else f"give {name}"
                    raise InvalidProblem(f"{name}: puts a {what} at {wrong}, expected {low} to {high}; {change}")
