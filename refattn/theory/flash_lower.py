"""The fewest words that scores can cost: a lower bound for every order of products, beside loops that come near it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from .claim import Claim, Evidence, judged, needs, same
from .fields import Q
from .flash_io import SAHA, _inputs, _problem, _right
from .io_loops import sums_by_rows, sums_by_squares

__all__ = ["CLAIMS"]


def _phase(d: int, m: int, crossing: bool = True) -> Any:
    """Return the most products that any order does in M accesses which computes each score as a sum of d products.

    At most 2M words are at hand meanwhile: M held before, and M loaded or stored. Scores begun and finished need whole
    rows: with A words of q and B of k, A·B/d products. The sums of others are held before or loaded, or held after or
    stored: C of them, and by Loomis and Whitney sqrt(A·B·C) products. A + B <= 2M and A + B + C <= 3M, so that both
    together are the most where A = B = C = M: M²/d + M·sqrt(M), whose root is rounded up.
    """
    return Q(m * m, d) + crossing * (math.isqrt(m**3 - 1) + 1)


def _enumerated(d: int, m: int) -> int:
    """Return the same by trying every A, B and C, rows and products being whole."""
    pairs = itertools.product(range(2 * m + 1), repeat=2)
    return max((a // d) * (b // d) * d + math.isqrt(a * b * (3 * m - a - b)) for a, b in pairs if a + b <= 2 * m)


def _lower(n: int, d: int, m: int, crossing: bool = True) -> int:
    """Return M words for each time that N²d products take as many accesses, but for the last."""
    return m * (int((n * n * d / _phase(d, m, crossing)).ceil()) - 1)


def _loops(n: int, d: int, m: int) -> Iterator[int]:
    """Yield the words of loops of rows' sums, which need all scores and no values: those that fit."""
    q, k, _ = _inputs(n, d)
    if m >= 2 * d + 4:
        yield sums_by_rows(q, k, m)[1].words
    if m < d * d:
        yield sums_by_squares(q, k, m)[1].words


PHASES = ((1, 9), (4, 16), (3, 36), (3, 9))
"""(d, M) for which M is a square, and a multiple of d: so the most products are whole."""


def _optimal(sizes: tuple[tuple[int, int, int], ...], crossing: bool, what: str) -> Evidence:
    """Hold the fewest words of loops to the bound; with sums that are crossing, what both are computed from, too."""
    found: list[Any] = [(_lower(n, d, m, crossing), min(_loops(n, d, m))) for n, d, m in sizes]
    detail = {"words over the lower bound": [w / max(b, 1) for b, w in found]}
    if crossing:
        found += _sums()
    for d, m in PHASES if crossing else ():
        most = _enumerated(d, m)
        found.append(same(most, _phase(d, m)))
        found += [same(_lower(n, d, m), sum(m for _ in range(most, n * n * d, most))) for n in (9, 12)]
    return judged(found, what, detail)


LOWER = ((96, 8, 64), (96, 8, 128), (1020, 16, 4096), (40, 60, 96), (32, 128, 60))
"""(N, d, M) from far below d² to 16·d²; at the third rows of the loop divide N."""


def _sums() -> list[Any]:
    """Return whether loops of rows' sums compute them, move the words of a closed form, and hold no more than M."""
    found: list[Any] = []
    for n, d, m in ((37, 5, 45), (30, 6, 59)):
        q, k, _ = _inputs(n, d)
        rows, b = (m - d) // (d + 4), math.isqrt(4 + m) - 2
        across = math.ceil(n / b)
        due = n * d * (1 + math.ceil(n / rows)) + n, 2 * across * n * d + n
        for (out, fast), words in zip((sums_by_rows(q, k, m), sums_by_squares(q, k, m)), due, strict=True):
            found += [same(fast.words, words), same(fast.peak <= m, True)]
            found.append(_right(out, _problem(q, k, q), name="lse"))
    return found


def lower(sizes: tuple[tuple[int, int, int], ...] = LOWER) -> Evidence:
    """N²d/(M/d + sqrt(M)) words, less at most M, against the words of loops.

    Slack is to be expected. For M from d² on a loop of rows' sums holds up to M/(d + 4) rows, and reads all keys for
    each such tile: N²d(d + 4)/M words, and N·d for q. That is (1 + d/sqrt(M))·(1 + 4/d)·(1 + M/(N·d)) times the bound,
    about 2 at the third of the sizes, and 4 at M = d² for d = 8, where half as many rows fit. Below d² a loop over
    squares of b scores, b² + 4b <= M, reads 2·N²d/b words: at least twice the bound, for b² products a feature take
    2b words, and the bound grants what M words before and M words read can do together. Loops of attention read values
    and hold results besides, and move several times as many words.
    """
    needs(all(m >= 5 for *_, m in sizes), "M of at least 5 words")
    return _optimal(sizes, True, "lower bound over the fewest words")


def below() -> Evidence:
    """The bound without unfinished sums, N²d²/M, for M far below d²: products by squares pass it."""
    return _optimal(((16, 256, 18),), False, "lower bound over the fewest words, no sum left unfinished")


CLAIMS = [
    Claim(
        "flash-io-lower",
        "No order of products that sums each score moves fewer than N²d/(M/d + sqrt(M)) words, less at most M, whatever"
        " M is; loops of rows' sums move a small multiple of it",
        SAHA,
        lower,
        below,
        ("M of at least 5 words",),
    ),
]
