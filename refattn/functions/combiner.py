"""Combiner: attention to single tokens and to groups of tokens at once, with full support at sub-quadratic cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .arguments import factor, flag, whole
from .dense import as_index, check_call, masked_softmax

__all__ = ["Regions", "combiner_attention", "combiner_regions"]

PATTERNS = ("fixed", "logsparse", "axial")
POOLS = ("max", "mean", "sum")
MODES = ("paper", "released")
ALIGNMENTS = (None, "bottom_right", "top_left")
Places = tuple[int, ...]


@dataclass(frozen=True)
class Regions:
    """Groups of tokens, and what each query attends to.

    Attributes
    ----------
    members : tuple of (r, size) integer arrays
        The tokens of each region, regions of one size together.
    seen : (n, most) integer array
        What each query attends to: token j is j, the r-th region is n + r; -1 is nothing.
    """

    members: tuple[NDArray[np.int64], ...]
    seen: NDArray[np.int64]

    @property
    def work(self) -> int:
        """How many scores are computed: those of queries, and those of tokens within regions."""
        return int((self.seen >= 0).sum()) + sum(x.size for x in self.members)


def combiner_regions(
    n: int, pattern: str, *, block: int | None = None, causal: str | None = None, mode: str = "paper"
) -> Regions:
    """Return which tokens and which regions each query of n attends to.

    Parameters
    ----------
    n : int
        Tokens.
    pattern : {"fixed", "logsparse", "axial"}
        See `combiner_attention`.
    block : int, optional
        Tokens of a block ("fixed") or of a row of the grid ("axial"); "logsparse" has none.
    causal : {None, "bottom_right", "top_left"}
        Both are the same: there are as many keys as queries.
    mode : {"paper", "released"}
        See `combiner_attention`.

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: as `combiner_attention`.
    """
    whole("n", n, 1)
    for name, x, known in (("pattern", pattern, PATTERNS), ("causal", causal, ALIGNMENTS), ("mode", mode, MODES)):
        if x not in known or isinstance(x, bool):
            raise InvalidInput(f"{name}: got {x!r}, expected one of {', '.join(map(str, known))}")
    if pattern == "logsparse":
        if block is not None:
            raise InvalidInput(f"block: got {block!r}, expected None for 'logsparse', whose spans are powers of two")
    else:
        whole("block", block, 1)
    if mode == "released" and (pattern, causal is None) != ("logsparse", False):
        raise InvalidInput("mode: got 'released', expected 'paper': only causal 'logsparse' is released otherwise")
    return _regions(n, pattern, block or 1, causal is not None, mode)


def combiner_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    pattern: str = "fixed",
    block: int | None = None,
    pool: str = "max",
    causal: str | None = None,
    scale: float | None = None,
    return_weights: bool = False,
    mode: str = "paper",
) -> Any:
    """Return Combiner's attention: ``out_i = sum_j p(j|i) v_j``, ``p(j|i) = sum_r p(r|i) p(j|r)``.

    A query chooses among single tokens and regions r by one softmax of ``scale·q_i·k_j`` and ``scale·q_i·pool(K_r)``;
    within a region ``p(j|r) = softmax_j(scale·pool(Q_r)·k_j)``, whichever query asks.

    Parameters
    ----------
    query, key, value : (..., n, d), (..., n, d), (..., n, d_v) float arrays
        Of one library and type.
    pattern : {"fixed", "logsparse", "axial"}
        "fixed": single tokens of the own block; every other block is a region. "logsparse": the own token; what is
        before it in spans of powers of two, from the longest to the shortest, as the bits of its place say. "axial":
        tokens in a grid, row by row; the own column and the own row singly; of the rest, the part of each other column
        above the own row, and of each row above the parts left and right of the own column, are regions (each token
        in two of them, a mixture).
        Without `causal` what comes later is treated likewise, mirrored: of "logsparse" and "axial" that is ours.
    block : int, optional
        Tokens of a block or of a row; the last one may be shorter. "logsparse" has none.
    pool : {"max", "mean", "sum"}
        Of the features of a region's queries and keys, each feature by itself.
    causal : {None, "bottom_right", "top_left"}
        Both are the same: there are as many keys as queries.
    scale : float, optional
        None is 1/sqrt(d).
    return_weights : bool
        Also return the (..., n, n) weights p(j|i), from which nothing above is computed.
    mode : {"paper", "released"}
        The released causal "logsparse" has spans of up to ``2^(ceil(log2(n - 1)) - 1)`` tokens: of n = 2^k + 1 tokens
        the last does not see any other.

    Returns
    -------
    out : (..., n, d_v)
    weights : (..., n, n)
        Only with `return_weights`.

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Scores computed: :attr:`Regions.work`, of order n^1.5 for blocks or rows of sqrt(n) and n log n for "logsparse".
    Source: Ren et al., Combiner (arXiv 2107.05768; recalled; the released JAX code was read). Nothing is added for a
    region's size.
    """
    xp = check_call(query, key, value)
    n, d = key.shape[-2], key.shape[-1]
    if query.shape[-2] != n:
        raise InvalidInput(f"query: has {query.shape[-2]} tokens, expected key's {n}; regions are of both")
    if pool not in POOLS:
        raise InvalidInput(f"pool: got {pool!r}, expected one of {', '.join(POOLS)}")
    flag("return_weights", return_weights)
    regions = combiner_regions(n, pattern, block=block, causal=causal, mode=mode)
    query = query * (1 / math.sqrt(d) if scale is None else factor("scale", scale))

    keys, values, inner = [key], [value], []
    for members in regions.members:
        of_q, of_k, of_v = (_taken(xp, x, members) for x in (query, key, value))
        p, _ = masked_softmax((of_k @ _pooled(xp, of_q, pool)[..., None])[..., 0])
        keys.append(_pooled(xp, of_k, pool))
        values.append((p[..., None, :] @ of_v)[..., 0, :])
        inner.append(p)
    keys, values = (xp.concat(x, axis=-2) for x in (keys, values))

    some, seen = regions.seen >= 0, np.maximum(regions.seen, 0)
    scores = (_taken(xp, keys, seen) @ query[..., None])[..., 0]
    p, _ = masked_softmax(scores, as_index(some, query))
    out = (p[..., None, :] @ _taken(xp, values, seen))[..., 0, :]
    return (out, _weights(xp, p, inner, regions)) if return_weights else out


def _taken(xp: Any, x: Any, places: NDArray[np.int64]) -> Any:
    """Return rows of (..., n, d) at (a, b) places: (..., a, b, d)."""
    rows = xp.take(x, as_index(places.ravel(), x), axis=-2)
    return xp.reshape(rows, (*x.shape[:-2], *places.shape, x.shape[-1]))


def _pooled(xp: Any, x: Any, pool: str) -> Any:
    return getattr(xp, pool)(x, axis=-2)


def _weights(xp: Any, p: Any, inner: list[Any], regions: Regions) -> Any:
    """Return p(j|i) as a product of dense matrices: of what queries choose, and of what is within a choice."""
    n, items = len(regions.seen), len(regions.seen) + sum(len(x) for x in regions.members)
    outer = _scattered(xp, p, regions.seen, items)
    within = [_scattered(xp, one, members, n) for one, members in zip(inner, regions.members, strict=True)]
    single = xp.astype(as_index(np.eye(n, dtype=bool), p), p.dtype)
    lead = p.shape[:-2]
    return outer @ xp.concat([xp.broadcast_to(single, (*lead, n, n)), *within], axis=-2)


def _scattered(xp: Any, p: Any, places: NDArray[np.int64], n: int) -> Any:
    """Return (..., a, n) with elements of (..., a, b) at their places, 0 elsewhere."""
    there = as_index(places[..., None] == np.arange(n), p)
    return (p[..., None, :] @ xp.astype(there, p.dtype))[..., 0, :]


@lru_cache(maxsize=16)
def _regions(n: int, pattern: str, block: int, causal: bool, mode: str) -> Regions:
    singles, grouped = {
        "fixed": lambda: _fixed(n, block, causal),
        "logsparse": lambda: _logsparse(n, causal, mode),
        "axial": lambda: _axial(n, block, causal),
    }[pattern]()
    unique = sorted({r for row in grouped for r in row}, key=lambda r: (len(r), r))
    number = {r: n + at for at, r in enumerate(unique)}
    rows = [[*single, *(number[r] for r in row)] for single, row in zip(singles, grouped, strict=True)]
    seen = np.full((n, max(map(len, rows))), -1, np.int64)
    for row, items in zip(seen, rows, strict=True):
        row[: len(items)] = items
    sizes = sorted({len(r) for r in unique})
    return Regions(tuple(np.array([r for r in unique if len(r) == size], np.int64) for size in sizes), seen)


def _fixed(n: int, block: int, causal: bool) -> tuple[list[Places], list[list[Places]]]:
    blocks = [tuple(range(at, min(at + block, n))) for at in range(0, n, block)]
    singles, grouped = [], []
    for i in range(n):
        own = blocks[i // block]
        singles.append(tuple(j for j in own if j <= i or not causal))
        grouped.append([b for b in blocks if b is not own and (b[-1] < i or not causal)])
    return singles, grouped


def _spans(i: int, longest: int) -> list[range]:
    """Return 0 to i - 1 in spans, one for each bit of i, those longer than 2^longest left out."""
    spans, start = [], 0
    for level in range(i.bit_length() - 1, -1, -1):
        if i >> level & 1:
            if level <= longest:
                spans.append(range(start, start + (1 << level)))
            start += 1 << level
    return spans


def _logsparse(n: int, causal: bool, mode: str) -> tuple[list[Places], list[list[Places]]]:
    longest = n.bit_length() if mode == "paper" else math.ceil(math.log2(max(n - 1, 1))) - 1
    grouped = [[tuple(s) for s in _spans(i, longest)] for i in range(n)]
    if not causal:
        for i, row in enumerate(grouped):  # the same, read from the end
            row.extend(tuple(n - 1 - j for j in reversed(s)) for s in _spans(n - 1 - i, longest))
    return [(i,) for i in range(n)], grouped


def _axial(n: int, block: int, causal: bool) -> tuple[list[Places], list[list[Places]]]:
    rows = [tuple(range(at, min(at + block, n))) for at in range(0, n, block)]
    columns = [tuple(range(at, n, block)) for at in range(min(block, n))]
    singles, grouped = [], []
    for i in range(n):
        row, column = divmod(i, block)
        own = {*rows[row], *columns[column]}
        singles.append(tuple(sorted(j for j in own if j <= i or not causal)))
        parts = []
        for at, c in enumerate(columns):
            if at != column:
                parts += [c[:row]] if causal else [c[:row], c[row + 1 :]]
        for at, r in enumerate(rows):
            if at < row or (at > row and not causal):
                parts += [r[:column], r[column + 1 :]]
        grouped.append([part for part in parts if part])
    return singles, grouped
