"""Some query rows of a call, as a call of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import kind_of, like, to_numpy
from ..dropout import drawn
from ..errors import InvalidInput, UnsupportedProblem
from ..masks import visible
from ..positions import places
from ..problem import Problem
from ..rules import Rule, View
from ..variants import variant_of
from .parts import by_rows

__all__ = ["query_rows"]


def query_rows(problem: Problem, start: int, stop: int) -> Problem:
    """Return the call of some query rows alone, which sees the keys that they see.

    Each row's out, lse and dq are those that it has in the whole call. The gradients of keys, values, bias and sinks
    are sums over rows, so those of the part are only what these rows add.

    Parameters
    ----------
    problem : Problem
        The call; query (b, h_q, n_q, d_k).
    start, stop : int
        The first row, and the row after the last: 0 <= start < stop <= n_q.

    Returns
    -------
    Problem
        With query (b, h_q, stop - start, d_k) and all keys.

    Raises
    ------
    InvalidInput
        There are no such rows.
    UnsupportedProblem
        Packed sequences, lengths_q, a scale for each query, or an operator whose rows do not stand alone.
    """
    p: Problem = drawn(problem)
    if not all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in (start, stop)) or not (
        0 <= start < stop <= p.n_q
    ):
        raise InvalidInput(f"rows: got {start}:{stop}, expected 0 <= start < stop <= {p.n_q}, the queries of the call")
    _check(p)
    rows = slice(int(start), int(stop))
    cut: dict[str, Any] = {"query": p.query[:, :, rows]}
    cut |= {n: _of_rows(getattr(p, n), rows) for n in ("bias", "weight", "dropout_mask")}
    cut["allowed"] = _written(p, rows) if isinstance(p.allowed, Rule) else _of_rows(p.allowed, rows)
    if p.causal or p.window:
        cut |= _aligned(p, rows, cut["allowed"])
    if p.rotary is not None or p.alibi_slopes is not None:
        cut["positions_q"], cut["positions_k"] = _places(p, rows)
    return p.replace(**cut)


def _check(p: Problem) -> None:
    if not by_rows(p):
        raise UnsupportedProblem(f"rows: a row of {p.variant} does not stand alone; evaluate the whole call")
    if p.cu_seqlens_q is not None or p.lengths_q is not None:
        raise UnsupportedProblem("rows: those of packed sequences or with lengths_q cannot be cut; give each its call")
    scale = p.query_scale
    if kind_of(scale) is not None and scale.ndim and scale.shape[2] > 1:
        raise UnsupportedProblem("rows: a query_scale for each query cannot be cut; evaluate the whole call")


def _of_rows(x: Any, rows: slice) -> Any:
    return x if x is None or x.shape[2] == 1 else x[:, :, rows]


def _aligned(p: Problem, rows: slice, allowed: Any) -> dict[str, Any]:
    """Return what puts row 0 of the part where the first of `rows` stands in the whole."""
    uses = variant_of(p.variant).uses
    if "offset" in uses:
        corner = p.causal or p.alignment or "bottom_right"
        moved = rows.stop - p.n_q if corner == "bottom_right" else rows.start
        return {"offset": moved if p.offset is None else p.offset + moved}
    if "allowed" not in uses:
        raise UnsupportedProblem(f"rows: {p.variant} has neither an offset nor a mask; evaluate the whole call")
    whole = p.replace(bias=None, allowed=None).to("numpy")
    mask = visible(whole, 0, 0, slice(0, p.n_q), slice(0, p.n_k))[rows][None, None]
    seen = mask if allowed is None else np.logical_and(mask, to_numpy(allowed))
    return {"causal": None, "window": None, "allowed": like(seen, p.query)}


def _written(p: Problem, rows: slice) -> Any:
    """Return a rule's rows as booleans: it counts queries from the first."""
    rule = p.allowed
    seen = [[View.of(rule, p.n_q, p.n_k, b, h)[rows] for h in range(rule.heads)] for b in range(rule.batches)]
    return like(np.array(seen), p.query)


def _places(p: Problem, rows: slice) -> tuple[Any, Any]:
    """Return the positions (b, rows) of some queries, and (b, n_k) of all keys."""
    queries, keys = np.zeros((p.batch, p.n_q), np.int64), np.zeros((p.batch, p.n_k), np.int64)
    for b in range(p.batch):
        for some, seen in p.segments(b):
            queries[b, some], keys[b, seen] = places(p, b, some, seen)
    return like(queries[:, rows], p.query), like(keys, p.query)
