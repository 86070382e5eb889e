"""Tokens of a graph's node, sampled from its two-hop neighbourhood, with context of two hops more (LargeGT)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_numpy
from ..errors import InvalidInput
from .arguments import axes, instance, namespace, whole
from .parts import attend, numbers, rounded

__all__ = ["hop_context", "neighbour_lists", "neighbour_tokens", "readout"]

Array = NDArray[Any]


def _graph(indptr: Any, indices: Any) -> tuple[Array, Array]:
    """Return the rows' offsets and their neighbours, checked."""
    namespace(indptr=indptr, indices=indices)
    first, second = to_numpy(indptr, "indptr"), to_numpy(indices, "indices")
    for name, x in (("indptr", first), ("indices", second)):
        if x.ndim != 1 or not np.issubdtype(x.dtype, np.integer):
            raise InvalidInput(f"{name}: got {x.dtype} of shape {x.shape}, expected a row of integers")
    n = len(first) - 1
    if n < 1 or first[0] != 0 or first[-1] != len(second) or (np.diff(first) < 0).any():
        raise InvalidInput(f"indptr: expected offsets that rise from 0 to {len(second)}, the number of indices")
    if len(second) and (second.min() < 0 or second.max() >= n):
        raise InvalidInput(f"indices: expected nodes from 0 to {n - 1}")
    return first, second


def neighbour_lists(indptr: Any, indices: Any) -> list[Array]:
    """Return what each node's tokens are drawn from: its neighbours, then the ends of walks of two steps.

    An end stands once however many walks lead to it. But a node may be both neighbour and end, and so stand twice, and
    the node itself is an end of its own walks: a multiset, as the release has it.

    Parameters
    ----------
    indptr, indices : (n + 1,), (e,) integer arrays
        The graph in compressed rows: row i's neighbours are ``indices[indptr[i]:indptr[i + 1]]``.

    Returns
    -------
    list of n integer arrays
        Neighbours in the given order, ends in ascending order.

    Raises
    ------
    InvalidInput
        Arrays that are no graph.
    """
    start, nodes = _graph(indptr, indices)
    rows = [nodes[a:b] for a, b in pairwise(start)]
    ends = [np.unique(np.concatenate([rows[j] for j in row])) if len(row) else row for row in rows]
    return [np.concatenate(pair) for pair in zip(rows, ends, strict=True)]


def neighbour_tokens(indptr: Any, indices: Any, length: int, generator: np.random.Generator) -> Array:
    """Return the tokens of every node: itself, then nodes drawn from :func:`neighbour_lists`.

    They are drawn without replacement. A list that is too short is repeated from its start and cut, without a draw. A
    node without neighbours draws from all nodes.

    Parameters
    ----------
    indptr, indices : (n + 1,), (e,) integer arrays
        As in :func:`neighbour_lists`.
    length : int
        Tokens of a node, itself included, at least 2.
    generator : numpy.random.Generator

    Returns
    -------
    (n, length) integer array
        Of NumPy.

    Raises
    ------
    InvalidInput
        Arrays that are no graph; a node without neighbours in a graph of fewer than ``length - 1`` nodes.

    Notes
    -----
    Source: Dwivedi et al., LargeGT (arXiv 2312.11109); public code was read, which draws once before training.
    """
    instance("generator", generator, np.random.Generator, "use numpy.random.default_rng(seed)")
    lists, more = neighbour_lists(indptr, indices), whole("length", length, 2) - 1
    n = len(lists)
    tokens = np.empty((n, length), np.int64)
    tokens[:, 0] = np.arange(n)
    for i, row in enumerate(lists):
        if not len(row) and n < more:
            raise InvalidInput(f"length: node {i} has no neighbours, and {n} nodes are fewer than {more} to draw")
        pool = row if len(row) else np.arange(n)
        tokens[i, 1:] = np.resize(pool, more) if len(pool) < more else generator.choice(pool, more, replace=False)
    return tokens


def hop_context(indptr: Any, indices: Any, x: Any, *, hops: int = 2) -> list[Any]:
    """Return features of neighbourhoods: ``C_h = (D_c^-1/2 (A + I) D_r^-1/2)^h x`` for h from 1 to `hops`.

    D_r and D_c hold the sums of rows and columns of A + I.

    Parameters
    ----------
    indptr, indices : (n + 1,), (e,) integer arrays
        A in compressed rows, every entry 1.
    x : (n, d) float array
    hops : int
        The release computes 3 and uses 2.

    Returns
    -------
    list of (n, d) arrays
        Computed in float64, rounded to x's type.

    Raises
    ------
    InvalidInput
        Arrays that are no graph; other shapes.
    """
    start, nodes = _graph(indptr, indices)
    n = len(start) - 1
    namespace(x=x)
    axes("x", x, n, "features")
    y, found = numbers("x", x), []
    rows = np.repeat(np.arange(n), np.diff(start))
    left = 1 / np.sqrt(1.0 + np.bincount(nodes, minlength=n))
    right = 1 / np.sqrt(1.0 + np.diff(start))
    for _ in range(whole("hops", hops, 1)):
        scaled = y * right[:, None]
        y = scaled.copy()
        np.add.at(y, rows, scaled[nodes])
        y *= left[:, None]
        found.append(rounded(y, x))
    return found


def readout(tokens: Any, weight: Any) -> Any:
    """Return the first token plus attention over the others: ``o_0 + sum_j softmax_j(w·[o_0; o_j]) o_j``, j from 1.

    The first half of w adds the same to every score and a bias would, too: neither changes the result.

    Parameters
    ----------
    tokens : (b, t, d) float array
        At least two tokens.
    weight : (2·d,) array
        Of both tokens of a pair.

    Returns
    -------
    (b, d) array
        The sum over j is correctly rounded to float64; then one addition and one rounding to tokens' type.

    Raises
    ------
    InvalidInput
        Other shapes.
    """
    namespace(tokens=tokens, weight=weight)
    axes("tokens", tokens, "batch", "tokens", "features")
    b, t, d = tokens.shape
    whole("tokens' number", t, 2)
    axes("weight", weight, 2 * d)
    o, w = numbers("tokens", tokens), numbers("weight", weight)
    others = o[:, None, 1:]
    query = np.broadcast_to(w[d:], (b, 1, 1, d))
    return rounded(o[:, 0] + attend(query, others, others, scale=1.0)[0][:, 0, 0], tokens)
