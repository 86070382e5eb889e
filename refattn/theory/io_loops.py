"""Loops of attention over a slow and a small fast memory, which count every word that they move."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .claim import needs
from .counting import Memory, Slow

__all__ = [
    "fits",
    "flash",
    "scores_in_slow_memory",
    "sums_by_rows",
    "sums_by_squares",
    "tile_of",
    "triple",
    "triple_tile",
]

Float = NDArray[np.float64]
Blocks = NDArray[np.bool_]


def _spans(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _most(fit: Callable[[int], bool]) -> int:
    """Return the most rows up to which all fit."""
    return len(list(itertools.takewhile(fit, itertools.count(1))))


def fits(rows: int, columns: int, d: int, memory: int) -> bool:
    """Return whether a tile's q and out, k and v, scores and four numbers a row fit."""
    return 2 * rows * d + 2 * columns * d + rows * columns + 4 * rows <= memory


def tile_of(d: int, memory: int) -> tuple[int, int]:
    """Return FlashAttention's tile: the most keys that fit with as many rows, but no more than d of them."""
    columns = _most(lambda c: fits(min(c, d), c, d, memory))
    needs(columns > 0, f"M of at least 5·d + 4 words, got M = {memory}, d = {d}")
    return min(columns, d), columns


def flash(
    q: Float, k: Float, v: Float, memory: int, blocks: Blocks | None = None, tile: tuple[int, int] | None = None
) -> tuple[Float, Memory, tuple[int, int]]:
    """Return attention by FlashAttention's first loop (keys outside), the memory that counted, and its tile.

    What is written to out is normalised every time, so that nothing is computed but in fast memory.

    Parameters
    ----------
    q, k, v : (N, d) arrays
        One head; scale 1.
    memory : int
        M, words of fast memory; more are never held.
    blocks : bool array, optional
        (row tiles, key tiles): which are computed.
    tile : (int, int), optional
        Rows and keys; the largest that fits by default.
    """
    n, d = q.shape
    fast, (rows, columns) = Memory(memory), tile or tile_of(d, memory)
    q_, k_, v_, out, total, top = map(Slow, (q, k, v, 0 * v, np.zeros(n), np.full(n, -np.inf)))
    for b, js in enumerate(_spans(n, columns)):
        if blocks is not None and not blocks[:, b].any():
            continue
        kj, vj = fast.load(k_, js), fast.load(v_, js)
        for a, at in enumerate(_spans(n, rows)):
            if blocks is not None and not blocks[a, b]:
                continue
            qi, o, z, m = (fast.load(x, at) for x in (q_, out, total, top))
            s, most, shrink = fast.new(len(qi), len(kj)), fast.new(len(qi)), fast.new(len(qi))
            s[:] = qi @ kj.T
            most[:] = np.maximum(m, s.max(1))
            s[:] = np.exp(s - most[:, None])
            shrink[:] = z * np.exp(m - most)  # what is left of the sum so far
            z[:] = shrink + s.sum(1)
            o[:] = (o * shrink[:, None] + s @ vj) / z[:, None]
            for x, part in ((total, z), (out, o), (top, most)):
                fast.store(x, at, part)
            fast.free(qi, o, z, m, s, most, shrink)
        fast.free(kj, vj)
    return out.data, fast, (rows, columns)


def _products(fast: Memory, b: int, a: Any, c: Any, to: Slow, turn: bool) -> None:
    """Multiply in square tiles of b: to = a @ c, or a @ cᵀ; a is a slow array, or a function that loads a tile."""
    inner = a.data.shape[1] if isinstance(a, Slow) else len(c.data)
    for i, j in itertools.product(_spans(len(to.data), b), _spans(to.data.shape[1], b)):
        sums = fast.new(i.stop - i.start, j.stop - j.start)
        for at in _spans(inner, b):
            x = fast.load(a, (i, at)) if isinstance(a, Slow) else a(i, at)
            y = fast.load(c, (j, at) if turn else (at, j))
            sums += x @ (y.T if turn else y)
            fast.free(x, y)
        fast.store(to, (i, j), sums)
        fast.free(sums)


def scores_in_slow_memory(q: Float, k: Float, v: Float, memory: int) -> tuple[Float, Memory]:
    """Return attention with its scores in slow memory, products by square tiles of three in fast memory.

    Parameters
    ----------
    q, k, v : (N, d) arrays
        One head; scale 1.
    memory : int
        M, words of fast memory.
    """
    b, n = _most(lambda b: 3 * b**2 + 2 * b <= memory), len(q)
    needs(b > 0, f"M of at least 5 words, got {memory}")
    fast, s, top, total, out = Memory(memory), *map(Slow, (np.zeros((n, n)), np.zeros(n), np.zeros(n), 0 * v))
    q_, k_, v_ = map(Slow, (q, k, v))
    _products(fast, b, q_, k_, s, turn=True)
    for i in _spans(n, b):  # a pass for the rows' maxima and sums
        most, sums = fast.new(i.stop - i.start, fill=-np.inf), fast.new(i.stop - i.start)
        for j in _spans(n, b):
            part = fast.load(s, (i, j))
            after = np.maximum(most, part.max(1))
            sums[:] = sums * np.exp(most - after) + np.exp(part - after[:, None]).sum(1)
            most[:] = after
            fast.free(part)
        fast.store(top, i, most)
        fast.store(total, i, sums)
        fast.free(most, sums)

    def weights(i: slice, j: slice) -> Float:
        part, most, sums = fast.load(s, (i, j)), fast.load(top, i), fast.load(total, i)
        part[:] = np.exp(part - most[:, None]) / sums[:, None]
        fast.free(most, sums)
        return part

    _products(fast, b, weights, v_, out, turn=False)
    return out.data, fast


def _summed(top: Float, total: Float, s: Float, after: Float) -> None:
    """Take scores into maxima and sums of exponentials of rows, in the places that are held."""
    after[:] = np.maximum(top, s.max(1))
    total[:] = total * np.exp(top - after) + np.exp(s - after[:, None]).sum(1)
    top[:] = after


def sums_by_rows(q: Float, k: Float, memory: int) -> tuple[Float, Memory]:
    """Return the logs of rows' sums of exponentials, and the memory that counted: rows in fast memory, keys one by one.

    Parameters
    ----------
    q, k : (N, d) arrays
        One head; scale 1.
    memory : int
        M, words of fast memory; what fits is the number of rows.
    """
    (n, d), fast = q.shape, Memory(memory)
    rows = (memory - d) // (d + 4)
    needs(rows > 0, f"M of at least 2·d + 4 words, got M = {memory}, d = {d}")
    q_, k_, out = Slow(q), Slow(k), Slow(np.zeros(n))
    for at in _spans(n, rows):
        x = fast.load(q_, at)
        s, after, total = fast.new(len(x), 1), fast.new(len(x)), fast.new(len(x))
        top = fast.new(len(x), fill=-np.inf)
        for j in _spans(n, 1):
            y = fast.load(k_, j)
            s[:] = x @ y.T
            _summed(top, total, s, after)
            fast.free(y)
        fast.store(out, at, top + np.log(total))
        fast.free(x, s, after, total, top)
    return out.data, fast


def sums_by_squares(q: Float, k: Float, memory: int) -> tuple[Float, Memory]:
    """Return the same with squares of scores in fast memory, to which the features of rows and keys come one by one.

    Parameters
    ----------
    q, k : (N, d) arrays
        One head; scale 1.
    memory : int
        M, words of fast memory.
    """
    n, fast, b = len(q), Memory(memory), _most(lambda b: b * b + 4 * b <= memory)
    needs(b > 0, f"M of at least 5 words, got {memory}")
    q_, k_, out = Slow(q), Slow(k), Slow(np.zeros(n))
    for i in _spans(n, b):
        top, total = fast.new(i.stop - i.start, fill=-np.inf), fast.new(i.stop - i.start)
        for j in _spans(n, b):
            s = fast.new(len(top), j.stop - j.start)
            for at in range(q.shape[1]):
                x, y = fast.load(q_, (i, at)), fast.load(k_, (j, at))
                s += np.multiply.outer(x, y)
                fast.free(x, y)
            after = fast.new(len(top))
            _summed(top, total, s, after)
            fast.free(s, after)
        fast.store(out, i, top + np.log(total))
        fast.free(top, total)
    return out.data, fast


def triple_tile(d: int, memory: int) -> int:
    """Return the b of the largest tile of b rows and b keys k1 that fits: q, out, k1, v1, k2, v2, scores and sums."""
    b = _most(lambda b: 6 * b * d + b**2 + 2 * d + 4 * b <= memory)
    needs(b > 0, f"M of at least 8·d + 5 words, got M = {memory}, d = {d}")
    return b


def _pairs(n: int, b: int) -> Iterator[tuple[slice, list[slice]]]:
    for i in _spans(n, b):
        yield i, _spans(n, b)


def triple(q: Float, keys: tuple[Float, Float], values: tuple[Float, Float], memory: int) -> tuple[Float, Memory, int]:
    """Return triple-wise attention, the memory that counted, and b: rows and keys k1 in tiles, k2 and v2 one by one.

    Parameters
    ----------
    q : (N, d) array
        One head; scale 1, s_ijk = sum of q_i k1_j k2_k over features.
    keys, values : pairs of (N, d) arrays
        k1 and k2, v1 and v2.
    memory : int
        M, words of fast memory.
    """
    n, d = q.shape
    fast, b = Memory(memory), triple_tile(d, memory)
    q_, out, k1, k2, v1, v2 = map(Slow, (q, 0 * q, *keys, *values))
    for at, seconds in _pairs(n, b):
        qi, o = fast.load(q_, at), fast.new(at.stop - at.start, d)
        total, top = fast.new(len(qi)), fast.new(len(qi), fill=-np.inf)
        for js in seconds:
            k1j, v1j = fast.load(k1, js), fast.load(v1, js)
            for t in range(n):
                k2t, v2t = fast.load(k2, t), fast.load(v2, t)
                both, s = fast.new(len(qi), d), fast.new(len(qi), len(k1j))
                most, shrink = fast.new(len(qi)), fast.new(len(qi))
                both[:] = qi * k2t
                s[:] = both @ k1j.T
                most[:] = np.maximum(top, s.max(1))
                shrink[:] = np.exp(top - most)
                s[:] = np.exp(s - most[:, None])
                total[:], top[:] = total * shrink + s.sum(1), most
                both[:] = s @ v1j  # the product's place is free again
                o[:] = o * shrink[:, None] + both * v2t
                fast.free(k2t, v2t, both, s, most, shrink)
            fast.free(k1j, v1j)
        fast.store(out, at, o / total[:, None])
        fast.free(qi, o, total, top)
    return out.data, fast, b
