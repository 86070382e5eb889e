"""One head by the streaming path, written into a call's arrays: out and lse, gradients, those of a few keys."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rules import View
from .anywhere import largest, scaled, within
from .backward import backward
from .gather import joined, parts, seeing
from .heads import Head, numbers_of
from .keys import FEW, Arriving, Rows, few_keys, rows_by_definition, rows_of
from .levels import Bounded, Level
from .results import Raw, add, add_dbias
from .stream import Forward, each, forward_pass, stream

__all__ = [
    "TILE",
    "RowsByHead",
    "head_gradients",
    "in_units",
    "near_one",
    "open_keys",
    "place",
    "streamed_head",
    "unit_of",
]

TILE = 2**18  # scores alive at a time: rows are taken in tiles, so memory stays O(n d)
RowsByHead = dict[tuple[int, int, int], Rows]
"""What the rows of a head know, by batch, head and first row."""


def streamed_head(one: Head, f: Level, lines: NDArray[np.intp], raw: Raw, threads: int) -> None:
    """Run softmax over a level by tiles of keys, into the result itself where every row is wanted."""
    unit = unit_of(one.v)
    whole = unit == 0 and len(lines) == one.rows.stop - one.rows.start and one.lines is None
    at = (one.batch, one.head, one.rows if whole else one.places(lines))
    into = (raw["out"][at], raw["lse"][at]) if whole else None  # views: nothing is copied
    out, lse = stream(one, f, lines, unit, threads, into)
    if one.out_scale is not None:
        out[...] = _divided(one, f, out)
    if not whole:
        some = f.xp.asarray(at[2])
        raw["out"][at[:2]][some], raw["lse"][at[:2]][some] = in_units(out, unit), lse


def head_gradients(
    one: Head,
    f: Level,
    lines: NDArray[np.intp],
    raw: Raw,
    arriving: Arriving,
    threads: int,
    sums: bool,
    forward: Forward | None,
    lock: Any,
) -> Rows:
    """Write out, lse and the gradients of some rows of a head; return what these know."""
    at = place(one, lines)

    def dbias(rows: slice, columns: slice, g: Bounded) -> None:
        with lock:
            add_dbias(one, (one.batch, one.head, at[2][rows]), columns, _over(one, f, g), raw)

    result, rows = backward(
        one, f, lines, arriving[at], threads, None if one.bias is None else dbias, forward and forward.some(lines)
    )
    for name in ("out", "lse", "dq"):
        raw[name][within(raw[name], at)] = result[name] if name == "lse" else _divided(one, f, result[name])
    with lock:
        for x in ("dk", "dv") if sums else ():
            add(raw[x], (one.batch, one.head_kv, one.keys), numbers_of(_over(one, f, result[x])))
        if "dsink" in result:
            add(raw["dsink"], (one.head,), numbers_of(_over(one, f, result["dsink"]))[0, 0])
    return rows


def open_keys(
    one: Head,
    f: Any,
    raw: Raw,
    arriving: Arriving,
    threads: int,
    keys: NDArray[np.bool_],
    known: RowsByHead,
) -> Forward | None:
    """Add dk and dv of the keys that are wanted; return the forward pass if a level had to make one."""
    name, live, forward = (one.batch, one.head, one.rows.start), np.nonzero(one.live)[0], None
    wanted = np.nonzero(keys[one.batch, one.head_kv, one.keys])[0]
    if not (wanted.size and live.size):
        return None  # nothing is wanted, or no row sees a key: dk and dv stay 0
    if name not in known:
        lists = isinstance(one.allowed, View) and one.allowed.lists
        if isinstance(f, Level) and not lists:
            forward = forward_pass(one, f, live, threads)
            known[name] = rows_of(forward, arriving[place(one, live)], threads)
        else:
            live = seeing(one, live, wanted)
            if not live.size:
                return None
            known[name] = _known(one, f, live, arriving, threads)
    dout = arriving.out[place(one, known[name].index)]
    for i in range(0, len(wanted), FEW):
        some = wanted[i : i + FEW]
        for x, g in zip(("dk", "dv"), few_keys(one, f, dout, some, known[name], threads), strict=True):
            add(raw[x], (one.batch, one.head_kv, one.keys.start + some), numbers_of(_over(one, f, g)))
    return forward


def _known(one: Head, f: Any, rows: NDArray[np.intp], arriving: Arriving, threads: int) -> Rows:
    """Return what some rows know, by parts of the head where each row sees few keys."""

    def of(x: Head, lines: NDArray[np.intp]) -> Rows:
        mine = arriving[place(x, lines)]
        if isinstance(f, Level):
            return rows_of(forward_pass(x, f, lines, 1), mine, 1)
        return rows_by_definition(x, f, lines, mine, max(1, TILE // len(x.k)))

    some = parts(one, f, rows)
    if some is None:
        return of(one, rows)
    return joined(each(lambda x: of(x, np.arange(len(x.q))), some, threads if isinstance(f, Level) else 1), rows)


def _over(one: Head, f: Any, x: Any) -> Any:
    """Return what a head's output is divided by taken out of a matrix: its gradients are in proportion."""
    return x if one.out_scale is None else x / f.number(one.out_scale)


def _divided(one: Head, f: Level, x: Any) -> Any:
    return x if one.out_scale is None else numbers_of(_over(one, f, Bounded(f, *np.moveaxis(x, -1, 0))))


def place(one: Head, rows: NDArray[np.intp]) -> tuple[Any, ...]:
    """Return where some rows of a head stand in a call's arrays."""
    return one.batch, one.head, one.places(rows)


def near_one(one: Head, arriving: Arriving) -> bool:
    """Tell whether all of a head's numbers lie near enough to 1."""
    here = arriving[one.batch, one.head]
    numbers = (one.v, one.q, one.k, here.out, *([] if here.lse is None else [here.lse]))
    return all(unit_of(x) == 0 for x in numbers)


def unit_of(v: NDArray[np.float64]) -> int:
    """Return the exponent to take off the values where they lie far from 1: outputs are linear in them."""
    e = int(np.frexp(float(largest(np.abs(v).reshape(-1), 0)))[1])
    return e if abs(e) > 200 else 0


def in_units(x: NDArray[Any], unit: int) -> NDArray[Any]:
    """Return a result times 2**unit; nothing is proven of what comes too near the edge of float64's range."""
    if unit == 0:
        return x
    out: Any = scaled(x, unit)
    lost = (np.abs(out[..., 0]) < 2.0**-950) | ~np.isfinite(out[..., 0])  # too near the edge to be a power of two apart
    out[..., 2] = np.where(lost, np.inf, out[..., 2])
    return out  # type: ignore[no-any-return]
