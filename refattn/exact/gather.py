"""Parts of a head: some rows with the keys that these see, where each sees few; any arithmetic takes them as heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..norms import has_norms
from ..rules import View
from ..variants import variant_of
from .arithmetics import Balls
from .field import Field
from .heads import Head
from .keys import Rows
from .levels import Bounded, Level
from .stream import STREAMED

__all__ = ["joined", "parts", "seeing"]

Lines = NDArray[np.intp]
FEWER = 2
"""Where rows see fewer than one of so many keys, balls and the prime field take each with its own."""
FROM = 64
"""Keys: fewer are faster whole."""
CHUNK = 2**20


def parts(one: Head, f: Any, lines: Lines) -> Iterator[Head] | None:
    """Return parts that together hold some rows, or None where the head is to be taken whole.

    Softmax over the keys that a row sees is softmax over all: the others' weights are 0.

    Parameters
    ----------
    one : Head
        The head.
    f : arithmetic
        For a level rows go together whose keys a rule lists. Balls and the prime field take rows one by one.
    lines : integer array
        Its rows.
    """
    p, view = one.problem, one.allowed
    if variant_of(p.variant).fused != STREAMED or p.rotary is not None or p.alibi_slopes is not None or has_norms(p):
        return None
    lists = isinstance(view, View) and view.lists
    if isinstance(f, Level):
        lists = lists and f.device is None  # a head's part is cut on the CPU
        return (one.part(rows, keys) for rows, keys in view.listed(lines)) if lists else None  # type: ignore[attr-defined]
    if not isinstance(f, Balls | Field) or len(one.k) < FROM or not lines.size:
        return None
    if lists:
        return _one_by_one(one, lines)
    if FEWER * sum(int(view[x].sum()) for x in _chunks(lines, len(one.k))) > len(lines) * len(one.k):
        return None
    return (one.part(lines[i : i + 1], np.nonzero(view[lines[i]])[0]) for i in range(len(lines)))


def _one_by_one(one: Head, lines: Lines) -> Iterator[Head]:
    assert isinstance(one.allowed, View)
    for rows, keys in one.allowed.listed(lines):
        for i in range(len(rows)):
            row = rows[i : i + 1]
            yield one.part(row, keys[one.allowed[row, keys][0]])


def seeing(one: Head, rows: Lines, keys: Lines) -> Lines:
    """Return which of some rows see one of some keys."""
    found = [x[one.allowed[np.ix_(x, keys)].any(1)] for x in _chunks(rows, len(keys))]
    return np.concatenate([rows[:0], *found])


def joined(known: list[Rows], lines: Lines) -> Rows:
    """Return what rows of parts know, together."""

    def together(columns: list[Any]) -> Any:
        f = columns[0].f
        if isinstance(f, Level):
            each = ([np.broadcast_to(x, c.h.shape) for x in (c.h, c.l, c.r)] for c in columns)
            return Bounded(f, *map(np.concatenate, zip(*each, strict=True)))
        return type(columns[0])(np.concatenate([c.a for c in columns]), f)

    return Rows(lines, together([x.lse for x in known]), together([x.d for x in known]))


def _chunks(rows: Lines, n_k: int) -> Iterator[Lines]:
    step = max(1, CHUNK // max(n_k, 1))
    return (rows[i : i + step] for i in range(0, len(rows), step))
