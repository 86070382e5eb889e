"""Accesses of tiled attention to slow memory, counted by a tile loop that computes it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS", "counted", "hbm_bytes", "standard", "triple_wise"]

Float = NDArray[np.float64]
GRID = [(n, d, m) for n in (256, 512) for d in (16, 32) for m in (2 * d * d, 4 * d * d)]


def counted(
    q: Float, k: Float, v: Float, memory: int, blocks: NDArray[np.bool_] | None = None
) -> tuple[Float, int, tuple[int, int]]:
    """Return attention by FlashAttention's loop, the words that it moved, and its tile (rows, keys).

    Parameters
    ----------
    q, k, v : (N, d) arrays
        One head; scale 1.
    memory : int
        M, words of fast memory; tiles are ceil(M / 4d) keys and min of that and d rows.
    blocks : bool array, optional
        (row tiles, key tiles): which are computed.
    """
    n, d = q.shape
    columns = math.ceil(memory / (4 * d))
    rows, words = min(columns, d), 0
    out, total, top = np.zeros_like(v), np.zeros(n), np.full(n, -np.inf)
    for b, j in enumerate(range(0, n, columns)):
        js = slice(j, min(j + columns, n))
        words += 2 * d * (js.stop - j)  # a tile of k and v
        for a, i in enumerate(range(0, n, rows)):
            if blocks is not None and not blocks[a, b]:
                continue
            at = slice(i, min(i + rows, n))
            words += (at.stop - i) * (3 * d + 4)  # q and out in, out out; total and top in and out
            s = q[at] @ k[js].T
            most = np.maximum(top[at], s.max(1))
            shrink, p = np.exp(top[at] - most), np.exp(s - most[:, None])
            total[at] = total[at] * shrink + p.sum(1)
            out[at] = out[at] * shrink[:, None] + p @ v[js]
            top[at] = most
    return out / np.where(total > 0, total, 1)[:, None], words, (rows, columns)


def standard(n: int, d: int) -> int:
    """Return the words that attention with all scores in slow memory moves."""
    return 4 * n * d + 4 * n * n


def hbm_bytes(batch: int, heads: int, heads_kv: int, n_q: int, n_k: int, d: int, item: int = 2) -> int:
    """Return the bytes that an attention kernel moves which reads its inputs once: q, k, v, out and float32 lse."""
    return batch * (item * d * (2 * heads * n_q + 2 * heads_kv * n_k) + 4 * heads * n_q)


def triple_wise(n: int, d: int, memory: int) -> int:
    """Return the words of triple-wise attention with b rows and b keys k1 in fast memory while k2 and v2 stream by."""
    b = math.isqrt(max(9 * d * d + memory - 2 * d, 0)) - 3 * d  # 6bd + b² + 2d words: rows, keys, scores, a key k2
    needs(b > 0, f"memory of {memory} words holds no tile of d = {d}")
    pairs = math.ceil(n / b) ** 2
    return 2 * n * d + math.ceil(n / b) * 2 * n * d + pairs * 2 * n * d


def _inputs(n: int, d: int) -> tuple[Float, Float, Float]:
    rng = np.random.default_rng(n + d)
    q, k, v = rng.standard_normal((3, n, d)) / d**0.25
    return q, k, v


def check(memory: int | None = None) -> Evidence:
    """Compare the count with 12·N²d²/M from below and (4Nd/M + 1)(3Nd + 4N) + 2Nd from above, and the output."""
    worst, constants, error = 0.0, [], 0.0
    for n, d, m in GRID:
        m = memory or m
        needs(d <= m <= n * d, f"M from d to N·d, got M = {m}, N = {n}, d = {d}")
        q, k, v = _inputs(n, d)
        out, words, _ = counted(q, k, v, m)
        least, most = 12 * n * n * d * d / (m + 4 * d), (4 * n * d / m + 1) * (3 * n * d + 4 * n) + 2 * n * d
        worst = max(worst, words / most, least / words)
        constants.append(words * m / (n * d) ** 2)
        p = np.exp(q @ k.T)
        error = max(error, float(np.abs(out - p @ v / p.sum(1, keepdims=True)).max()))
    detail = {"constant of N²d²/M": constants, "largest error of the loop": error}
    return Evidence(worst if error < 1e-12 else math.inf, 1.0, "counted words over the bounds", detail)


def loses() -> Evidence:
    """The wish that tiles always move fewer words than standard attention: false for a small fast memory."""
    n, d = 256, 32
    worst = max(counted(*_inputs(n, d), m)[1] / standard(n, d) for m in (4 * d, d * d, 16 * d * d))
    return Evidence(worst, 1.0, "words over those of standard attention, M from 4d")


def sparse(seed: int = 0) -> Evidence:
    """Words beyond those of k and v are those of the computed blocks, exactly in proportion to them."""
    n, d, m = 512, 16, 2048
    q, k, v = _inputs(n, d)
    _, _, (rows, columns) = counted(q, k, v, m)
    shape = math.ceil(n / rows), math.ceil(n / columns)
    rng, worst, densities = np.random.default_rng(seed), 0.0, []
    for density in (0.1, 0.25, 0.5, 1.0):
        blocks = rng.random(shape) < density
        words = counted(q, k, v, m, blocks)[1] - 2 * n * d
        worst = max(worst, abs(words / (blocks.sum() * rows * (3 * d + 4)) - 1))
        densities.append(float(blocks.mean()))
    return Evidence(worst, 0.0, "deviation from proportion", {"densities": densities})


def sparse_by_entries() -> Evidence:
    """The wish for words in proportion to single entries: one entry a block costs the whole block."""
    n, d, m = 512, 16, 2048
    q, k, v = _inputs(n, d)
    _, dense, (rows, columns) = counted(q, k, v, m)
    blocks = np.ones((math.ceil(n / rows), math.ceil(n / columns)), bool)
    ratio = counted(q, k, v, m, blocks)[1] / dense
    return Evidence(ratio, 2 / (rows * columns), "share of the words at one entry a block, over twice its density")


def _exponents(d: int, lengths: tuple[int, ...], memories: tuple[int, ...], what: str) -> Evidence:
    """Fit the powers of N and M in the words of triple-wise attention, and compare them with 3 and -1."""
    sizes = [(n, m) for n in lengths for m in memories]
    rows = np.array([[1, math.log(n), math.log(m)] for n, m in sizes])
    fit = np.linalg.lstsq(rows, np.log([triple_wise(n, d, m) for n, m in sizes]), rcond=None)[0]
    return Evidence(float(np.abs(fit[1:] - [3, -1]).max()), 0.1, what, {"fit": fit.tolist()})


def triple() -> Evidence:
    """Exponents of the words of triple-wise attention: 3 in N and -1 in M, where tiles of scores fill the memory."""
    return _exponents(8, (2**18, 2**20, 2**22), (2**20, 2**22, 2**24), "distance of the exponents")


def triple_small() -> Evidence:
    """The same exponents where d rules the tiles, M below d²: the power of M is then -2."""
    return _exponents(256, (2**14, 2**16, 2**18), (2**13, 2**14, 2**15), "distance of the exponents, M < d²")


# (batch, heads, n, d) of bfloat16 calls, and the bytes read and written that Nsight Compute measured on an H100:
# benchmarks/results/gpu-profile-h100.json; the third is causal
MEASURED = [
    ((4, 32, 4096, 64), 201361408 + 62903296),
    ((4, 16, 4096, 128), 201687296 + 61435392),
    ((4, 16, 4096, 128), 215489280 + 61088768),
    ((4, 8, 4096, 256), 223396096 + 57575680),
]


def _bytes(scores: bool, what: str) -> Evidence:
    ratios = [(hbm_bytes(b, h, h, n, n, d) + 4 * b * h * n * n * scores) / found for (b, h, n, d), found in MEASURED]
    return Evidence(max(abs(r - 1) for r in ratios), 0.1, what, {"ratios": ratios})


def hbm() -> Evidence:
    """Compare `hbm_bytes` with what was measured of this package's kernels."""
    return _bytes(False, "distance of predicted from measured bytes")


def hbm_scores() -> Evidence:
    """The bytes of a kernel that writes its scores, beside the same measurements."""
    return _bytes(True, "distance, with the scores in slow memory")


SOURCE = "Dao et al., FlashAttention (arXiv 2205.14135; its abstract and code were read, the theorem is recalled)"
CLAIMS = [
    Claim(
        "flash-io",
        "FlashAttention moves Theta(N² d² / M) words, with constants between 12 and 12 + 16/d and lower terms",
        SOURCE,
        check,
        loses,
        ("d <= M <= N·d",),
    ),
    Claim(
        "flash-io-block-sparse",
        "Words beyond reading k and v are in proportion to the blocks that are computed",
        SOURCE,
        sparse,
        sparse_by_entries,
    ),
    Claim(
        "flash-hbm",
        "refattn.gpu's kernels move each input and result through device memory once, within 10 %",
        "measured here",
        hbm,
        hbm_scores,
    ),
    Claim(
        "triple-io",
        "Triple-wise attention by tiles of b × b pairs (row, k1) moves O(N³ d / M) words for M > d²",
        "derived here from the loop",
        triple,
        triple_small,
        ("M > d²",),
    ),
]
