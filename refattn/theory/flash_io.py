"""Accesses of tiled attention to slow memory, counted by loops that compute it in a fast memory of limited size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..check.bounds.expected import expected
from ..check.model import flash as flash_model
from ..functions.costs import (
    block_sparse_io,
    flash_io,
    flash_tile,
    hbm_bytes,
    square_tiles_io,
    standard_io,
    triple_io,
    triple_tile,
)
from ..problem import Problem
from ..tensor import as_pairs
from .claim import Claim, Differs, Evidence, judged, needs, same, worst
from .io_loops import flash, scores_in_slow_memory, tile_of, triple

__all__ = ["CLAIMS", "counted"]

Float = NDArray[np.float64]
Blocks = NDArray[np.bool_]
GRID = tuple(
    (n, d, m)
    for n, d in ((30, 8), (36, 16), (25, 5))
    for m in (5 * d + 4, d * d + 9 * d, 5 * d * d, d * (5 * d + 4) - 1, d * (5 * d + 4), d * (5 * d + 10))
)
"""(N, d, M), with M below and above d²."""


def counted(
    q: Float, k: Float, v: Float, memory: int, blocks: Blocks | None = None
) -> tuple[Float, int, tuple[int, int]]:
    """Return attention by FlashAttention's loop, the words that it moved, and its tile (rows, keys).

    Parameters
    ----------
    q, k, v : (N, d) arrays
        One head; scale 1.
    memory : int
        M, words of fast memory; the tile is the largest that fits.
    blocks : bool array, optional
        (row tiles, key tiles): which are computed.
    """
    out, fast, tile = flash(q, k, v, memory, blocks)
    return out, fast.words, tile


def _names(grid: tuple[tuple[int, int, int], ...]) -> list[str]:
    return [f"N = {n}, d = {d}" for n, d, _ in grid]


def _inputs(n: int, d: int, count: int = 3) -> list[Float]:
    return list(np.random.default_rng(n + d).standard_normal((count, n, d)) / d**0.25)


def _off(found: Float, problem: Problem, tile: int = 1, name: str = "out") -> float:
    """Return the largest error of a result over what a float64 kernel may lose, element by element."""
    # one addition after another, as often rescaled as there are tiles
    model = replace(flash_model("float64"), tile=tile, chain=problem.n_k)
    right = expected(problem, model)
    error = np.abs(found - getattr(right.answer, name)[0, 0])
    pairs = zip(error.flat, (right.allowed[name][0, 0] + TINY).flat, strict=True)
    return float(worst(pairs))


def _right(found: Float, problem: Problem, tile: int = 1, name: str = "out") -> Differs:
    """Return whether a result is wrong: an element is off by more than `expected` allows."""
    return same(_off(found, problem, tile, name) <= 1, True)


def _both(words: int, form: int) -> list[tuple[int, int]]:
    """Return the ratio of words to their closed form, and the other way round."""
    return [(words, form), (form, words)]


TINY = 2.0**-1074
"""The smallest float64 number: where nothing may be lost, it is too much."""


def _problem(q: Float, k: Float, v: Float, allowed: Any = None) -> Problem:
    return Problem(
        q[None, None], k[None, None], v[None, None], 1.0, allowed=None if allowed is None else allowed[None, None]
    )


def check(grid: tuple[tuple[int, int, int], ...] = GRID) -> Evidence:
    """Compare tile and count with their closed forms, exactly, and the output; the words go with N²d²/M."""
    found: list[Any] = []
    constants = []
    for n, d, m in grid:
        needs(5 * d + 4 <= m <= 5 * n * d, f"M from 5·d + 4 to 5·N·d, got M = {m}, N = {n}, d = {d}")
        q, k, v = _inputs(n, d)
        out, fast, (rows, columns) = flash(q, k, v, m)
        found += [_right(out, _problem(q, k, v), columns), same((rows, columns), flash_tile(d, m, rule="fits"))]
        found += [*_both(fast.words, flash_io(n, d, m, rule="fits").forward), same(fast.peak <= m, True)]
        constants.append(fast.words * m / (n * d) ** 2)
    detail = {"M over d²": [m / d / d for _, d, m in grid], "constant of N²d²/M": constants, "series": _names(grid)}
    return judged(found, "words over 2Nd + ceil(N/c)·N·(3d + 4), and that over the words", detail)


def loses() -> Evidence:
    """The wish that tiles always move fewer words than attention with its scores in slow memory."""
    n, d = 64, 16
    q, k, v = _inputs(n, d)
    pairs = [(counted(q, k, v, m)[1], standard_io(n, d).forward) for m in (6 * d, d * d, 16 * d * d)]
    return judged(pairs, "words over those of standard attention, M from 6d")


def _small(places: tuple[tuple[int, int, int], ...], what: str) -> Evidence:
    found: list[Any] = []
    for n, d, m in places:
        q, k, v = _inputs(n, d)
        out, fast = scores_in_slow_memory(q, k, v, m)
        found += [(fast.words, flash(q, k, v, m)[1].words), _right(out, _problem(q, k, v))]
        found += [same(fast.words, square_tiles_io(n, d, m)), same(fast.peak <= m, True)]
    return judged(found, what)


SMALL = ((40, 32, 161), (50, 27, 160))
"""M of just seven rows a tile, and of a word less."""


def small() -> Evidence:
    """Scores in slow memory, products by square tiles, against FlashAttention's loop for M well below d²."""
    return _small(SMALL, "words over FlashAttention's, M below d²/4")


def large() -> Evidence:
    """The same for M of 16·d²."""
    return _small(((64, 8, 1024),), "words over FlashAttention's, M = 16·d²")


def sparse(seed: int = 0, n: int = 60, d: int = 6, m: int = 160) -> Evidence:
    """Outputs against the masked answer, and words of computed blocks and of the keys that any of them reads."""
    q, k, v = _inputs(n, d)
    rows, columns = tile_of(d, m)
    needs(n % rows == 0 and n % columns == 0, f"tiles of {rows} and {columns} that divide n = {n}")
    rng, densities = np.random.default_rng(seed), []
    found: list[Any] = []
    for density in (0.1, 0.25, 0.5, 1.0):
        blocks = rng.random((n // rows, n // columns)) < density
        out, words, _ = counted(q, k, v, m, blocks)
        mask = np.kron(blocks, np.ones((rows, columns), bool)).astype(bool)
        found += _both(words, block_sparse_io(blocks, n, d, (rows, columns)).forward)
        found.append(_right(out, _problem(q, k, v, mask), columns))
        densities.append(float(blocks.mean()))
    return judged(found, "words over those of the blocks, and the other way round", {"densities": densities})


def sparse_by_entries() -> Evidence:
    """The wish for words in proportion to single entries: one entry in every block costs all blocks."""
    n, d, m = 60, 6, 160
    q, k, v = _inputs(n, d)
    _, dense, (rows, columns) = counted(q, k, v, m)
    entries = np.zeros((n, n), bool)
    entries[::rows, ::columns] = True
    blocks = np.asarray(entries.reshape(n // rows, rows, n // columns, columns).any((1, 3)))
    words = counted(q, k, v, m, blocks)[1]
    return Evidence(words, dense * entries.mean(), "words at one entry a block, beside the entries' share")


TRIPLE = tuple(
    (n, d, m) for n, d in ((14, 3), (10, 12)) for m in (8 * d + 5, 14 * d + 11, 4 * d * d + 20, 16 * d * d, 30 * d * d)
)


def tripled(grid: tuple[tuple[int, int, int], ...] = TRIPLE) -> Evidence:
    """Words of the loop, 2Nd(1 + N/b + (N/b)²), and b, the root of b² + (6d + 4)b + 2d = M: exactly; the output."""
    found: list[Any] = []
    ratios = []
    for n, d, m in grid:
        given = [x.astype(np.float32) for x in _inputs(n, d, 5)]  # whose products are exact in float64
        q, k1, k2, v1, v2 = (x.astype(np.float64) for x in given)
        out, fast, b = triple(q, (k1, k2), (v1, v2), m)
        # a product of three features is rounded twice: as if there were one more of them
        wider = [np.pad(x, ((0, 0), (0, 1)))[None, None] for x in given[:3]]
        pairs = as_pairs(*wider, *(x[None, None] for x in given[3:]), scale=1.0)
        found += [_right(out, pairs), same(b, triple_tile(d, m))]
        found += [*_both(fast.words, triple_io(n, d, m)), same(fast.peak <= m, True)]
        ratios.append(fast.words * m / (n**3 * d))
    detail = {"M over d²": [m / d / d for _, d, m in grid], "constant of N³d/M": ratios, "series": _names(grid)}
    return judged(found, "words over 2Nd(1 + N/b + (N/b)²), and that over the words", detail)


def triple_small() -> Evidence:
    """The bound 2·N³d/M for M below d², times what it is off above: there tiles are ruled by d, b by M/d."""
    n, d = 24, 12
    q, k1, k2, v1, v2 = _inputs(n, d, 5)
    (small, m), (big, large) = (
        (triple(q, (k1, k2), (v1, v2), m)[1].words * m / (2 * n**3 * d), m) for m in (12 * d, 12 * d * d)
    )
    return Evidence(small, big, f"constant of N³d/M at M = {m}, beside that at M = {large}")


# (batch, heads, n, d) of bfloat16 calls, and the bytes read and written that Nsight Compute measured on an H100:
# benchmarks/results/gpu-profile-h100.json; the third is causal
MEASURED = [
    ((4, 32, 4096, 64), 201361408 + 62903296),
    ((4, 16, 4096, 128), 201687296 + 61435392),
    ((4, 16, 4096, 128), 215489280 + 61088768),
    ((4, 8, 4096, 256), 223396096 + 57575680),
]
CACHE = 50 * 2**20
"""Bytes of an H100's second cache: as many written may still be in it, as many read may be read again after a miss."""


def _bytes(predicted: Callable[[int, int, int, int], int], what: str) -> Evidence:
    away = [predicted(*shape) - found for shape, found in MEASURED]
    # and the prediction is the bytes of the arrays
    query, key = np.zeros((2, 6, 5, 8), np.float16), np.zeros((2, 3, 7, 8), np.float16)
    arrays = 2 * query.nbytes + 2 * key.nbytes + query[..., 0].astype(np.float32).nbytes
    (b, h, n, d), (_, h_kv, n_k, _) = query.shape, key.shape
    held = same(hbm_bytes(b, h, h_kv, n, n_k, d), arrays)
    return judged([*((abs(a), CACHE) for a in away), held], what, {"bytes": away})


def hbm() -> Evidence:
    """Compare `hbm_bytes` with what was measured of this package's kernels: within what the cache may hold."""
    return _bytes(lambda b, h, n, d: hbm_bytes(b, h, h, n, n, d), "bytes from those measured over the cache's")


def hbm_scores() -> Evidence:
    """The bytes of a kernel that writes its scores, beside the same measurements."""
    return _bytes(
        lambda b, h, n, d: hbm_bytes(b, h, h, n, n, d) + 4 * b * h * n * n,
        "bytes from those measured over the cache's, scores written",
    )


SOURCE = "Dao et al., FlashAttention (arXiv 2205.14135; its abstract and code were read, the theorem is recalled)"
SAHA = "Saha and Ye, The I/O complexity of attention (arXiv 2402.07443, recalled; constants are derived here)"
CLAIMS = [
    Claim(
        "flash-io",
        "FlashAttention moves Theta(N² d² / M) words: 2Nd + ceil(N/c)·N·(3d + 4), c the most keys whose tile fits in M",
        SOURCE,
        check,
        loses,
        ("5·d + 4 <= M <= 5·N·d",),
    ),
    Claim(
        "flash-io-small",
        "For M well below d² products by square tiles, scores in slow memory, move fewer words than FlashAttention",
        SAHA,
        small,
        large,
    ),
    Claim(
        "flash-io-block-sparse",
        "With a block mask FlashAttention's loop gives the masked answer and moves words in proportion to the blocks",
        SOURCE,
        sparse,
        sparse_by_entries,
        ("tiles divide n",),
    ),
    Claim(
        "flash-hbm",
        "refattn.gpu's kernels move each input and result through device memory once, up to what its cache holds",
        "measured here",
        hbm,
        hbm_scores,
    ),
    Claim(
        "triple-io",
        "Triple-wise attention by tiles of b × b pairs (row, k1) moves O(N³ d / M) words for M > d²,"
        " O(N³ d³ / M²) below",
        "derived here from the loop",
        tripled,
        triple_small,
        ("M of at least 8·d + 5",),
    ),
]
