"""Which keys a query may attend to: the masks that a Problem carries, and makers of common ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidInput
from .positions import diagonal
from .problem import Problem
from .rules import Rule, View, atoms
from .validation import ALIGNMENTS

__all__ = [
    "WRITTEN",
    "band",
    "both",
    "causal",
    "diagonal",
    "document",
    "padding",
    "sliding_window",
    "unused",
    "visible",
]

Mask = NDArray[np.bool_]
WRITTEN = 2**22
"""Pairs of a query and a key up to which a rule's mask of one head is written out: arrays are faster there."""


def both(allowed: Any, mask: Any) -> Any:
    """Return what a call's ``allowed``, if it has one, and another mask let through: a rule if one of them is."""
    if allowed is None:
        return mask
    if isinstance(allowed, Rule) or isinstance(mask, Rule):
        a, b = (x if isinstance(x, Rule) else atoms.array(x) for x in (mask, allowed))
        return a & b
    return mask & allowed


def causal(n_q: int, n_k: int, alignment: str = "bottom_right") -> Mask:
    """Return the causal mask: True where key j <= query i, counted from the aligned corner.

    Parameters
    ----------
    n_q, n_k : int
        Numbers of queries and keys.
    alignment : {"bottom_right", "top_left"}
        "bottom_right" lets the last query see every key; "top_left" lets the first query see the first key.

    Returns
    -------
    (n_q, n_k) bool array
    """
    return _band(n_q, n_k, None, 0, _corner(n_q, n_k, alignment)).copy()


def sliding_window(n_q: int, n_k: int, left: int | None, right: int | None, alignment: str = "bottom_right") -> Mask:
    """Return the window mask: True where -left <= j - i' <= right, i' the query's place on the diagonal.

    Parameters
    ----------
    n_q, n_k : int
        Numbers of queries and keys.
    left, right : int or None
        Keys to each side, the diagonal not counted; None is no limit.
    alignment : {"bottom_right", "top_left"}
        As in :func:`causal`.

    Returns
    -------
    (n_q, n_k) bool array
    """
    return _band(n_q, n_k, left, right, _corner(n_q, n_k, alignment)).copy()


def document(ids_q: Sequence[int] | NDArray[np.integer], ids_k: Sequence[int] | NDArray[np.integer]) -> Mask:
    """Return the document mask: True where query and key carry the same document number, (n_q, n_k) bool."""
    same: Mask = np.equal.outer(np.asarray(ids_q), np.asarray(ids_k))
    return same


def padding(lengths: Sequence[int] | NDArray[np.integer], n_k: int) -> Mask:
    """Return the key-padding mask of each batch, (b, 1, 1, n_k) bool: True for the first `lengths[b]` keys."""
    counts = np.asarray(lengths)
    if counts.ndim != 1 or (counts < 0).any() or (counts > n_k).any():
        raise InvalidInput(f"lengths: got {counts.tolist()}, expected one axis of numbers from 0 to n_k={n_k}")
    return (np.arange(n_k)[None, :] < counts[:, None])[:, None, None, :]


def visible(problem: Problem, batch: int, head: int, rows: slice, keys: slice, by_rules: bool = False) -> Mask:
    """Return which keys each query of one packed sequence may attend to, every option of the problem counted.

    Parameters
    ----------
    problem : Problem
        With NumPy arrays.
    batch, head : int
        Indices of the batch and the query head.
    rows, keys : slice
        The sequence, as ``problem.segments(batch)`` gives it.
    by_rules : bool
        Whether a long mask is a view also where `allowed` is no rule.

    Returns
    -------
    (rows, keys) bool array
        False also where bias is -inf or a weight is 0: such a key is absent. A view in O(n) memory without masks.
        Where `allowed` is a rule, of more pairs than `WRITTEN` a :class:`refattn.rules.View`, which is indexed alike.
    """
    n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
    if isinstance(problem.allowed, Rule) or (by_rules and n_q * n_k > WRITTEN):
        view = _by_rules(problem, batch, head, rows, keys)
        return np.asarray(view) if n_q * n_k <= WRITTEN else cast(Mask, view)
    mask = _band(n_q, n_k, *_sides(problem), diagonal(problem, batch, rows, keys))
    if problem.allowed is not None:
        mask = np.logical_and(mask, block(problem.allowed, batch, head, rows, keys))
    if problem.bias is not None:
        mask = mask & ~np.isneginf(block(problem.bias, batch, head, rows, keys).astype(np.float64))
    if problem.weight is not None:
        mask = mask & (block(problem.weight, batch, head, rows, keys).astype(np.float64) != 0)
    return mask


def _by_rules(p: Problem, batch: int, head: int, rows: slice, keys: slice) -> View:
    """Return the same by rules: the diagonal's count in the sequence, others in the call."""
    shape, sides = (rows.stop - rows.start, keys.stop - keys.start), _sides(p)
    inside = [] if sides == (None, None) else [atoms.band(diagonal(p, batch, rows, keys), *sides)]
    others = [p.allowed] if isinstance(p.allowed, Rule) else [] if p.allowed is None else [atoms.array(p.allowed)]
    if p.bias is not None:
        others.append(atoms.array(~np.isneginf(p.bias.astype(np.float64))))
    if p.weight is not None:
        others.append(atoms.array(p.weight.astype(np.float64) != 0))
    whole = (batch, head, p.n_q, p.n_k)
    return View(
        [(r, rows.start, keys.start, whole) for r in others] + [(r, 0, 0, (0, 0, *shape)) for r in inside], shape
    )


def band(problem: Problem, batch: int, rows: slice, keys: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return the first key that each row sees and the one behind the last; None where more than a diagonal says so.

    Parameters
    ----------
    problem, batch, rows, keys
        As in :func:`visible`.
    """
    if any(x is not None for x in (problem.allowed, problem.bias, problem.weight)):
        return None
    n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
    place, (left, right) = np.arange(n_q) + diagonal(problem, batch, rows, keys), _sides(problem)
    first = np.zeros_like(place) if left is None else place - left
    end = np.full_like(place, n_k) if right is None else place + right + 1
    return np.clip(first, 0, n_k), np.clip(end, 0, n_k)


def _sides(p: Problem) -> tuple[int | None, int | None]:
    """Return how far a query sees to either side of its place."""
    left, right = p.window or (None, None)
    return left, right if p.causal is None else min(0, 0 if right is None else right)


def block(x: NDArray[np.generic], batch: int, head: int, rows: slice, keys: slice) -> NDArray[np.generic]:
    """Return the (rows, keys) block of an array that broadcasts to (b, h_q, n_q, n_k)."""
    plane = x[batch if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]
    plane = plane[rows if plane.shape[0] > 1 else slice(None), keys if plane.shape[1] > 1 else slice(None)]
    return np.broadcast_to(plane, (rows.stop - rows.start, keys.stop - keys.start))


def unused(problem: Problem) -> tuple[Mask, Mask] | None:
    """Return the rows (b, n_q) and the keys (b, n_k) that lengths leave unused; None where all are used."""
    if problem.lengths_q is None and problem.lengths_k is None:
        return None
    q, k = (np.ones((problem.batch, n), bool) for n in (problem.n_q, problem.n_k))
    for b in range(problem.batch):
        for rows, keys in problem.segments(b):
            q[b, rows], k[b, keys] = False, False
    return q, k


def distance(n_q: int, n_k: int, first: int) -> NDArray[np.int64]:
    """Return how far key j lies behind query i, of which the first stands at a key, (n_q, n_k) (negative: ahead)."""
    return np.arange(n_q)[:, None] - np.arange(n_k)[None, :] + first


def _corner(n_q: int, n_k: int, alignment: str) -> int:
    if alignment not in ALIGNMENTS:
        raise InvalidInput(f"alignment: got {alignment!r}, expected one of {', '.join(ALIGNMENTS)}")
    return n_k - n_q if alignment == "bottom_right" else 0


def _band(n_q: int, n_k: int, left: int | None, right: int | None, first: int) -> Mask:
    """Return a window mask as a view of one diagonal's length: it depends on j - i alone."""
    if 0 in (n_q, n_k) or (left is None and right is None):
        return np.broadcast_to(np.True_, (n_q, n_k))
    offset = np.arange(1 - n_q, n_k) - first
    seen = np.ones(len(offset), bool)
    if left is not None:
        seen &= offset >= -left
    if right is not None:
        seen &= offset <= right
    return np.lib.stride_tricks.sliding_window_view(seen, n_k)[::-1]
