"""The rule of few keys for each query, which are listed: what a choice of single keys gives."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rule import Atom, Rule, remade

__all__ = ["listed"]


@remade
def listed(lists: Any, starts: NDArray[np.integer], ends: NDArray[np.integer], n_k: int) -> Rule:
    """Return the rule of a list of ranges for each query: it sees the keys of those that its list names.

    Parameters
    ----------
    lists : (b or 1, h or 1, n_q, w) integer array
        Numbers of ranges; -1 for none.
    starts, ends : (m,) integer arrays
        The first key of each range, and the one behind its last; the ranges lie apart.
    n_k : int
        How many keys there are.
    """
    table, first, last = np.asarray(lists), np.asarray(starts, np.int64), np.asarray(ends, np.int64)
    of_k = np.full(n_k, -2)
    for i, (a, b) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        of_k[a:b] = i
    text = f"listed(<integers {' by '.join(map(str, table.shape))}>)"

    def misfit(n_q: int, keys: int) -> str | None:
        if (n_q, keys) == (table.shape[2], n_k):
            return None
        return f"{text} is of {table.shape[2]} queries and {n_k} keys, and the call has {n_q} and {keys}"

    def formula(x: Any) -> Any:
        mine = x.table("of_k", of_k, (x.k,))
        seen = [x.look("lists", table[..., c], x.b, x.h, x.q) == mine for c in range(table.shape[3])]
        return reduce(operator.or_, seen) if seen else x.k < 0

    def ranges(rows: Any, call: tuple[int, int, int, int]) -> NDArray[np.int64]:
        b, h = (i if n > 1 else 0 for i, n in zip(call, table.shape[:2], strict=False))
        taken = table[b, h, rows]
        if not first.size:
            return np.zeros((len(rows), 0, 2), np.int64)
        return np.stack([np.where(taken < 0, 0, ends[taken]) for ends in (first, last)], -1)

    return Atom(text, formula, misfit, table.shape[0], table.shape[1], ranges=ranges)
