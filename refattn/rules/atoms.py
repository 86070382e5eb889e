"""The rules that others are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .rule import Atom, Rule, remade

__all__ = [
    "array",
    "band",
    "behind",
    "blocks",
    "causal",
    "changed",
    "chunk",
    "corner_of",
    "dilated",
    "document",
    "extent",
    "labelled",
    "prefix",
    "sinks",
    "tree",
    "whole",
    "window",
    "written",
]

CORNERS = ("bottom_right", "top_left")
WIDEST = 2**62
SHOWN = 8
"""Numbers of a table that are printed; of a longer one its shape is."""


@remade
def causal(corner: str = "bottom_right") -> Rule:
    """Return the causal rule: key j <= i', the query's place on the diagonal.

    Parameters
    ----------
    corner : {"bottom_right", "top_left"}
        Which corner the diagonal meets: i' = i + n_k - n_q, or i' = i.
    """
    return Atom(written("causal", corner=corner_of(corner)), lambda x: x.k <= x.behind(corner))


@remade
def window(left: int | None, right: int | None, corner: str = "bottom_right") -> Rule:
    """Return the window rule: i' - left <= j <= i' + right.

    Parameters
    ----------
    left, right : int or None
        Keys to each side, at least 0; None is no limit.
    corner : {"bottom_right", "top_left"}
        As in :func:`causal`.
    """
    a, b = (None if w is None else whole(n, w, 0) for n, w in (("left", left), ("right", right)))
    return Atom(written("window", a, b, corner=corner_of(corner)), lambda x: _near(x.behind(corner), x.k, a, b))


@remade
def band(first: int, left: int | None, right: int | None) -> Rule:
    """Return the rule of a diagonal: i + first - left <= j <= i + first + right, with sides of any sign."""
    return Atom(f"band({first}, {left}, {right})", lambda x: _near(x.q + first, x.k, left, right))


def _near(place: Any, k: Any, left: int | None, right: int | None) -> Any:
    seen = [place - k <= left] if left is not None else []
    seen += [k - place <= right] if right is not None else []
    return seen[0] & seen[1] if len(seen) == 2 else seen[0] if seen else k >= 0


@remade
def prefix(lengths: int | Sequence[int] | NDArray[np.integer]) -> Rule:
    """Return the rule of the first keys: j < length, one length for all batches or one for each."""
    many = np.ndim(lengths) > 0
    table = _integers("lengths", lengths if many else [lengths], 1, 0)

    def misfit(n_q: int, n_k: int) -> str | None:
        longest = int(table.max())
        return f"{text} needs {longest} keys, and the call has {n_k}" if longest > n_k else None

    text = f"prefix({_shown(table) if many else int(table[0])})"
    return Atom(text, lambda x: x.k < x.look("lengths", table, x.b), misfit, batches=len(table))


@remade
def sinks(count: int) -> Rule:
    """Return the rule of keys that are always kept: the first `count`, or all where there are fewer."""
    count = whole("count", count, 0)
    return Atom(f"sinks({count})", lambda x: x.k < count)


@remade
def document(ids_q: Any, ids_k: Any = None) -> Rule:
    """Return the document rule: query and key carry the same number.

    Parameters
    ----------
    ids_q, ids_k : (n_q,) and (n_k,), or (b, n_q) and (b, n_k) integer arrays
        Document numbers; without `ids_k` those of the queries are the keys', too.
    """
    of_q = _integers("ids_q", ids_q, 2)
    of_k = of_q if ids_k is None else _integers("ids_k", ids_k, 2)
    if 1 not in (len(of_q), len(of_k)) and len(of_q) != len(of_k):
        raise InvalidInput(f"ids_k: got {len(of_k)} batches, expected ids_q's {len(of_q)}, or one for all")
    text = f"document({_shown(of_q)}{'' if ids_k is None else f', {_shown(of_k)}'})"

    def misfit(n_q: int, n_k: int) -> str | None:
        for what, ids, n in (("queries", of_q, n_q), ("keys", of_k, n_k)):
            if ids.shape[1] != n:
                return f"{text} has numbers of {ids.shape[1]} {what}, and the call has {n}"
        return None

    return Atom(
        text,
        lambda x: x.look("ids_q", of_q, x.b, x.q) == x.look("ids_k", of_k, x.b, x.k),
        misfit,
        batches=max(len(of_q), len(of_k)),
    )


@remade
def chunk(size: int, corner: str = "bottom_right") -> Rule:
    """Return the rule of chunks: query and key lie in the same chunk of `size` keys, i' // size = j // size."""
    size = whole("size", size, 1)
    return Atom(written("chunk", size, corner=corner_of(corner)), lambda x: x.behind(corner) // size == x.k // size)


@remade
def dilated(step: int, corner: str = "bottom_right") -> Rule:
    """Return the dilated rule: key and query are a multiple of `step` apart, (i' - j) % step = 0."""
    step = whole("step", step, 1)
    return Atom(written("dilated", step, corner=corner_of(corner)), lambda x: (x.behind(corner) - x.k) % step == 0)


FARTHEST = 2**26
"""The largest distance: a table has a byte for each."""


@remade
def behind(distances: Any, size: int = 1, corner: str = "bottom_right") -> Rule:
    """Return the rule of distances: i' // size - j // size is one of them.

    Parameters
    ----------
    distances : integers
        Of at least 0, in blocks of `size` keys.
    size : int
        Keys of a block.
    corner : {"bottom_right", "top_left"}
        As in :func:`causal`.
    """
    which, size = np.unique(_integers("distances", distances, 1, 0)), whole("size", size, 1)
    if which[-1] > FARTHEST:
        raise InvalidInput(f"distances: got {which[-1]}, expected at most {FARTHEST}")
    held = np.zeros(int(which[-1]) + 3, bool)
    held[which + 1] = True  # an end on each side that is none of them

    def formula(x: Any) -> Any:
        far = x.behind(corner) // size - x.k // size
        return x.look("distances", held, x.clip(far + 1, 0, len(held) - 1))

    return Atom(written("behind", _shown(which), size, corner=corner_of(corner)), formula)


@remade
def tree(parents: Any) -> Rule:
    """Return the tree rule: a query that is a node sees the keys of the nodes on its way to the root, its own counted.

    The nodes are the last queries and the last keys. All keys before them are seen, by every query.

    Parameters
    ----------
    parents : (m,) or (b, m) integer array
        The parent of each node, from 0; -1 for a root, of which there may be several.

    Raises
    ------
    InvalidInput
        A parent that is no node, or a cycle.
    """
    table = _integers("parents", parents, 2, -1)
    spans = np.stack([_tour(x) for x in table])  # (b, 2, m): a node's first place in a walk, and the one after its last
    first, last = spans[:, 0], spans[:, 1]
    m, text = table.shape[1], f"tree({_shown(table)})"

    def misfit(n_q: int, n_k: int) -> str | None:
        what = "queries" if n_q < m else "keys"
        return f"{text} has {m} nodes, and the call has {min(n_q, n_k)} {what}" if min(n_q, n_k) < m else None

    def formula(x: Any) -> Any:
        q, k = x.q - (x.n_q - m), x.k - (x.n_k - m)
        i, j = x.clip(q, 0, m - 1), x.clip(k, 0, m - 1)
        own = x.look("first", first, x.b, i)
        above = (x.look("first", first, x.b, j) <= own) & (own < x.look("last", last, x.b, j))
        return (k < 0) | ((q >= 0) & above)

    return Atom(text, formula, misfit, batches=len(table))


@remade
def blocks(mask: Any, block_q: int = 128, block_k: int = 128) -> Rule:
    """Return the rule of blocks: mask[i // block_q, j // block_k].

    Parameters
    ----------
    mask : (blocks of queries, blocks of keys) bool array
        Or with an axis of query heads before, or of batches and heads; one of length 1 is for all.
    block_q, block_k : int
        Queries and keys of a block; the last may have fewer.
    """
    seen, size_q, size_k = _bools("mask", mask), whole("block_q", block_q, 1), whole("block_k", block_k, 1)
    text = f"blocks({_shape(mask)}, {size_q}, {size_k})"

    def misfit(n_q: int, n_k: int) -> str | None:
        want = (-(-n_q // size_q), -(-n_k // size_k))
        if seen.shape[2:] != want:
            return f"{text} has {seen.shape[2]} by {seen.shape[3]} blocks, and the call has {want[0]} by {want[1]}"
        return None

    return Atom(
        text,
        lambda x: x.look("mask", seen, x.b, x.h, x.q // size_q, x.k // size_k),
        misfit,
        seen.shape[0],
        seen.shape[1],
        lambda n_k: np.arange(0, n_k, size_k),
    )


@remade
def labelled(mask: Any, of_q: NDArray[np.integer] | None, of_k: NDArray[np.integer]) -> Rule:
    """Return the rule of blocks of any places: mask[..., of_q[i], of_k[j]], of the query itself where that is None.

    Parameters
    ----------
    mask : (b or 1, h or 1, blocks of queries, blocks of keys) bool array
        Or without its first axes.
    of_q, of_k : (n_q,) and (n_k,) integer arrays
        In which block a query or a key is.
    """
    seen = _bools("mask", mask)
    of_k = np.asarray(of_k, np.int64)
    text = f"labelled({_shape(mask)})"

    def misfit(n_q: int, n_k: int) -> str | None:
        got = (seen.shape[2] if of_q is None else len(of_q), len(of_k))
        if got == (n_q, n_k):
            return None
        return f"{text} is of {got[0]} queries and {got[1]} keys, and the call has {n_q} and {n_k}"

    def formula(x: Any) -> Any:
        q = x.q if of_q is None else x.table("of_q", of_q, (x.q,))
        k = x.table("of_k", of_k, (x.k,))
        if isinstance(k, np.ndarray) and k.ndim == 2 and k.size and (k == k[0, 0]).all():
            k = k[:1, :1]  # keys of one block are looked up once
        return x.look("mask", seen, x.b, x.h, q, k)

    def cuts(n_k: int) -> NDArray[np.int64]:
        return np.append(0, np.nonzero(np.diff(of_k))[0] + 1)

    return Atom(text, formula, misfit, seen.shape[0], seen.shape[1], cuts)


@remade
def changed(rule: Rule, shape: tuple[int, int, int], rows: Mapping[tuple[int, int, int], NDArray[np.bool_]]) -> Rule:
    """Return a rule with other masks for some rows of a call.

    Parameters
    ----------
    rule : Rule
        What holds for the others.
    shape : (b, h, n_q)
        Of the call.
    rows : mapping
        From batch, head and row to a mask, (n_k,) bool; at least one.
    """
    index, masks = np.full(shape, -1), np.stack([*rows.values()])
    for i, at in enumerate(rows):
        index[at] = i

    def formula(x: Any) -> Any:
        i = x.look("index", index, x.b, x.h, x.q)
        seen = x.look("masks", masks, x.clip(i, 0, len(masks) - 1), x.k)
        return ((i >= 0) & seen) | ((i < 0) & rule.at(x))

    text = f"changed({rule!r}, <{len(masks)} rows>)"
    return Atom(text, formula, rule.misfit, shape[0], shape[1], rule.cuts)


@remade
def array(mask: Any) -> Rule:
    """Return the rule that a boolean array writes out: (n_q, n_k), (h, n_q, n_k) or (b, h, n_q, n_k), 1 for all."""
    seen = _bools("mask", mask)
    text = f"array({_shape(mask)})"

    def misfit(n_q: int, n_k: int) -> str | None:
        ok = all(a in (1, n) for a, n in zip(seen.shape[2:], (n_q, n_k), strict=True))
        return None if ok else f"{text} does not fit the call's {n_q} queries and {n_k} keys"

    return Atom(text, lambda x: x.look("mask", seen, x.b, x.h, x.q, x.k), misfit, *seen.shape[:2])


def _tour(parents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each node's first place in a walk from the roots, and the one after its last descendant's, (2, m)."""
    m = len(parents)
    if (parents >= m).any():
        i = int(np.argmax(parents >= m))
        raise InvalidInput(f"parents: node {i} has parent {parents[i]}, expected -1 or a node from 0 to {m - 1}")
    children: list[list[int]] = [[] for _ in range(m + 1)]
    for i, p in enumerate(parents.tolist()):
        children[p].append(i)  # of a root: the last list
    found, place, walk = np.full((2, m), -1), 0, [(i, False) for i in reversed(children[m])]
    while walk:
        node, left = walk.pop()
        if left:
            found[1, node] = place
            continue
        found[0, node], place = place, place + 1
        walk.append((node, True))
        walk += [(i, False) for i in reversed(children[node])]
    if place < m:
        i = int(np.argmax(found[0] < 0))
        raise InvalidInput(f"parents: node {i} lies on a cycle or below one; a tree's nodes lead to a root (-1)")
    return found


def written(name: str, *given: Any, corner: str) -> str:
    """Return how a call of a function is written; the usual corner is left out."""
    words = [str(x) for x in given] + ([] if corner == CORNERS[0] else [f"corner={corner!r}"])
    return f"{name}({', '.join(words)})"


def corner_of(x: str) -> str:
    """Return a corner, or raise."""
    if x not in CORNERS:
        raise InvalidInput(f"corner: got {x!r}, expected one of {', '.join(CORNERS)}")
    return x


def whole(name: str, x: Any, least: int) -> int:
    """Return a whole number of at least another, or raise."""
    if isinstance(x, bool) or not isinstance(x, int | np.integer) or not least <= x <= WIDEST:
        raise InvalidInput(f"{name}: got {x!r}, expected a whole number from {least} to 2**62")
    return int(x)


def _integers(name: str, x: Any, axes: int, least: int | None = None) -> NDArray[np.int64]:
    """Return a table of integers; with 2 axes the first is of batches, and may be left out."""
    try:
        found = np.asarray(x)
    except ValueError as e:  # rows of different lengths
        raise InvalidInput(f"{name}: got {repr(x)[:200]}, expected integers, as many in each row") from e
    if found.ndim == 1 and axes == 2:
        found = found[None]
    if found.ndim != axes or not found.size or found.dtype.kind not in "iu":
        raise InvalidInput(f"{name}: got {found.dtype} of shape {np.shape(x)}, expected integers, at least one")
    if least is not None and (found < least).any():
        raise InvalidInput(f"{name}: got {int(found.min())}, expected numbers of at least {least}")
    return found.astype(np.int64)


def _bools(name: str, x: Any) -> NDArray[np.bool_]:
    found = np.asarray(x)
    if found.dtype != bool or not 2 <= found.ndim <= 4:
        raise InvalidInput(f"{name}: got {found.dtype} of shape {found.shape}, expected booleans on 2 to 4 axes")
    return found.reshape((1,) * (4 - found.ndim) + found.shape)


def _shown(x: NDArray[np.int64]) -> str:
    x = x[0] if x.ndim == 2 and len(x) == 1 else x
    return str(x.tolist()) if x.size <= SHOWN else f"<integers {extent(x.shape)}>"


def _shape(x: Any) -> str:
    return f"<booleans {extent(np.shape(x))}>"


def extent(shape: tuple[int, ...]) -> str:
    """Return a shape in words."""
    return " by ".join(map(str, shape))
