"""What a GPU does in one kernel where the CPU has many small steps: sizes of a matrix, the end of a tile, rounding.

The formulas are those of ``stream.py``, ``levels.py`` and ``enclosure.py``, with their constants (``finish.cu``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import Format
from ..anywhere import on_host
from ..doubledouble import EXP2_ERROR, EXP2_FLOOR, U
from ..enclosure import Enclosure
from ..levels import ETA, UP, Level, gamma
from ..right import SQUARED
from ..stream import SLACK, Forward
from ..tiles import Sums
from .card import text_of

__all__ = ["KERNELS", "OnCard", "finish", "places", "radii", "sizes", "text_finish"]

SHORT_ERROR = 2.0**-52
"""What a weight of level 0 is off by, of itself, for the score that it is made of (``short_exp2_of``)."""
KERNELS = (
    "sizes_across", "sizes_down", "sizes_joined", "places", "radii", "close_rows", "divide", "settle", "widen",
    "narrow",
)  # fmt: skip
CONSTANTS = {
    "U": U, "UP": UP, "ETA": ETA, "SLACK": SLACK, "SQUARED": SQUARED, "EXP2_ERROR": EXP2_ERROR,
    "SHORT_ERROR": SHORT_ERROR, "BELOW": 2.0 ** (EXP2_FLOOR + 1),
}  # fmt: skip
PARTS, SHORTEST = 2**10, 2**6
"""Parts of columns that lie along a row at most, and the fewest columns of one."""


def text_finish(level: int) -> str:
    """Return the kernels' whole text for a level: after what comes before the kernels of ``kernels.cu``."""
    steps = text_of(level).partition('extern "C"')[0]
    constants = "".join(f"constexpr double {name} = {x.hex()};\n" for name, x in CONSTANTS.items())
    return steps + constants + (Path(__file__).parent / "finish.cu").read_text(encoding="utf-8")


def sizes(card: Any, x: Any, into: Any = None) -> Any:
    """Return each row's largest size, its sum of sizes, and a bound of its 2-norm, as ``right.norms`` has it, (3, n).

    Parameters
    ----------
    card : Card
        The GPU.
    x : (n, m) float64 array
        Neighbours in memory are columns, or rows.
    into : (3, n) float64 array, optional
        Where to write them.
    """
    xp, (rows, columns), (down, right) = card.xp, x.shape, (s // 8 for s in x.strides)
    found = xp.empty((3, rows)) if into is None else into
    if not rows * columns:
        found[:2], found[2] = 0.0, SQUARED
    elif right == 1 or columns == 1:
        blocks, numbers = -(-rows // (card.threads // 32)), map(np.int64, (rows, columns, down))
        card.launch(0, "sizes_across", blocks, (x, *numbers, found), text_finish)
    else:
        across, each = -(-rows // card.threads), max(SHORTEST, -(-columns // PARTS))
        parts = -(-columns // each)
        out = xp.empty((3, parts, rows))
        numbers = map(np.int64, (rows, columns, right))
        given = (x, *numbers, np.int32(across), np.int32(parts), np.int64(each), out)
        card.launch(0, "sizes_down", across * parts, given, text_finish)
        card.launch(0, "sizes_joined", across, (np.int64(rows), np.int32(parts), out, found), text_finish)
    return found


def places(card: Any, x: Any, b: int, level: int) -> Any:
    """Return what :func:`refattn.exact.elementwise.places` does, of a matrix on a GPU."""
    rows = len(x)
    sigma = card.xp.empty((level, rows))
    if rows * level:
        powers = np.float64(1.5 * 2.0 ** (52 - b)), np.float64(2.0 ** -(b + 1))
        given = (np.int64(rows), np.int32(level), *powers, sizes(card, x), sigma)
        card.launch(0, "places", -(-rows // card.threads), given, text_finish)
    return sigma


def radii(work: Forward, q: Any, parts: list[Any], keys: Any, rc: float) -> tuple[Any, Any]:
    """Return the radius of a score and a bound of its size, one a row, as ``Forward._radii`` does.

    Parameters
    ----------
    work : Forward
        The head's operands.
    q : (n, d) float64 array
        The queries.
    parts : list of (n, d) arrays
        Their heads and their tail.
    keys : Right
        All keys.
    rc : float
        The scale's radius.
    """
    f, card, (rows, d) = work.f, work.f.device, q.shape
    level, each = f.level, f.xp.empty((f.level + 2, 3, rows))
    for s, part in enumerate([*parts, q]):
        sizes(card, part, each[s])
    found = f.xp.empty((2, rows))
    ends = [*keys.top.tolist(), 0.0, 0.0, 0.0][:4], [*keys.norm.tolist(), 0.0, 0.0, 0.0][:4]
    numbers = gamma(d * (level + 1) + level + 4), abs(work.c) * UP, rc, *ends[0], *ends[1]
    if rows:
        blocks = -(-rows // card.threads)
        card.launch(level, "radii", blocks, (np.int64(rows), *map(np.float64, numbers), each, found), text_finish)
    return found[0], found[1]


def finish(work: Forward, at: slice, sums: Sums) -> None:
    """Write what a tile of rows ends with, as ``Forward._finish`` does.

    Parameters
    ----------
    work : Forward
        The head's operands and results.
    at : slice
        The rows.
    sums : Sums
        What they have seen.
    """
    f, card, one, (r, width) = work.f, work.f.device, work.head, sums.num.shape
    level, host = f.level, Level(f.level)
    table, *ln2 = card.table
    half = [2.0 ** -(work.width + s * (work.width + 1) + 1) for s in range(3)]
    numbers = [host.log2e, host.log2(), host.number(one.sink or 0.0) * host.log2e]
    e, two, sink = ([float(np.ravel(x)[0]) for x in (n.h, n.l, n.r)] for n in numbers)
    by_row = f.xp.empty((r, level + 3))

    def doubles(*some: float) -> Any:
        return map(np.float64, some)

    sums_of, lse, out = work.sums[at], work.lse[at], work.out[at]
    card.launch(
        level, "close_rows", max(1, -(-r // card.threads)),
        (np.int32(r), *doubles(len(one.k), *half, f.steps.row_sum_error(work.wide) + 2 * U), table,
         *doubles(*ln2, *e, *two), np.int32(one.sink is not None), *doubles(*sink), sums.m, sums.den, sums.den_low,
         sums.done, work.radius[at], work.size[at], work.shift[at], work.relative[at], sums_of, lse, by_row),
        text_finish,
    )  # fmt: skip
    rounding = gamma(work.wide * (level + 1) + level + 4)
    card.launch(
        level, "divide", max(1, -(-r * width // card.threads)),
        (np.int32(r), np.int32(width), *doubles(*half, rounding), sums.num, sums.num_low, by_row, work.most_v,
         work.sums_v, sums_of, out),
        text_finish,
    )  # fmt: skip


class OnCard(Enclosure):
    """Numbers of a level where they lie on a GPU, (..., 3), and their rounding there."""

    def __init__(self, card: Any, x: Any) -> None:
        super().__init__(x[..., 0], x[..., 1], x[..., 2])
        object.__setattr__(self, "_there", (card, x))

    def settle(self, form: Format) -> tuple[Any, NDArray[np.bool_]]:
        """Round every element, as :meth:`Enclosure.settle` does; what is decided is told on the CPU."""
        card, x = self._there  # type: ignore[attr-defined]
        xp, shape = card.xp, x.shape[:-1]
        value, decided, count = xp.empty(shape), xp.empty(shape, np.uint8), x.size // 3
        numbers = np.int32(form.precision), np.int32(form.emin), np.float64(form.largest), np.int32(form.infinities)
        if count:
            given = (x, np.int64(count), *numbers, value, decided)
            card.launch(0, "settle", -(-count // card.threads), given, text_finish)
        all_of_it = not count or bool(decided.all())  # then it is not copied
        return value, np.ones(shape, bool) if all_of_it else on_host(decided).view(bool)
