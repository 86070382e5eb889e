"""What the errors of one array look like as a whole: size against prediction, bias, ulps, and where they lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import format_of
from ...exact.enclosure import Enclosure
from ..model import C

__all__ = ["EDGES", "Figures", "bands", "figures", "where"]

Float = NDArray[np.float64]
BANDS = 16
HEADS = 8
EDGES = (0.0, 0.5, *(2.0**k for k in range(21)))
"""Upper ends of the histogram's bins, in ulps; one more bin holds what is larger."""
SIGMAS = 5.0
"""Standard errors above the limit that count as an excess: one right run in 3.5 million, if rows are independent."""
WIDEST = (1 / 3) / C
"""The limit: variance of a rounding whose mantissas are all 1, over the predicted one, whose mantissas are spread."""
FEWEST = 24
TILES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Narrow:
    """What is known of an array that is rounded to a narrower type than the accumulator; found where it is asked for.

    Attributes
    ----------
    inner : callable or None
        Returns what may go one way: the largest error, the roundings to narrower types apart. None if unknown.
    apart : callable
        Returns how many of the lines differ in what is rounded, so that their roundings are independent whatever the
        errors look like.
    common : callable
        Returns errors that roundings to narrower types have in common, of which a right kernel may have one.
    """

    inner: Callable[[], Float] | None
    apart: Callable[[], int]
    common: Callable[[], list[Float]]


@dataclass(frozen=True)
class Figures:
    """One array's errors.

    Attributes
    ----------
    array : str
        "out", "lse" or a gradient's name.
    rms : float
        Root mean square of error over predicted error (1 for a right kernel, less where its types are better than the
        model says); NaN where nothing was predicted.
    excess : bool
        Whether it is above what the model's roundings can give, by ``SIGMAS`` standard errors.
    leans : bool
        Whether the errors go one way, which roundings to nearest do not, by as many standard errors.
    bias : float
        Mean of the error toward larger absolute values, over the predicted error (0 if it rounds to nearest).
    correctly_rounded : float
        Share of elements that equal the correctly rounded value.
    ulps : tuple of two floats
        Median and largest error in units in the last place of the exact value.
    by_head, by_row : tuple of float
        Worst error ÷ allowed by head, and by band of rows (of keys for dk and dv), at most ``BANDS`` of them.
    shape : tuple of int
        Of the array.
    histogram : tuple of int
        How many elements have an error of 0, at most 0.5, 1, 2, 4, ... 2**20 ulps (``EDGES``), and more or none.
    map : tuple of tuples of tuples of float
        Worst error ÷ allowed by band of heads (at most ``HEADS``), of rows and of columns (at most ``BANDS``); empty
        where every element is right, which keeps reports of many checks small.
    """

    array: str
    rms: float
    excess: bool
    leans: bool
    bias: float
    correctly_rounded: float
    ulps: tuple[float, float]
    by_head: tuple[float, ...]
    by_row: tuple[float, ...]
    shape: tuple[int, ...] = ()
    histogram: tuple[int, ...] = ()
    map: tuple[tuple[tuple[float, ...], ...], ...] = ()


def figures(
    name: str,
    got: NDArray[Any],
    enclosure: Enclosure,
    ratio: Float,
    variance: Float | None,
    dtype: str,
    rows: int,
    narrow: Narrow | None = None,
) -> Figures:
    """Describe the errors of one array.

    Parameters
    ----------
    name : str
        Of the array.
    got : array
        What the kernel returned.
    enclosure : Enclosure
        The exact values.
    ratio : float64 array
        Error over what is allowed; infinite where an element is wrong whatever its bound.
    variance : float64 array or None
        What is predicted (None where nothing is).
    dtype : str
        The format of `got`.
    rows : int
        How many query rows there are: what a row's lse loses is common to all its keys.
    narrow : Narrow, optional
        What is known of an array that is rounded to a narrower type than the accumulator.
    """
    x, form = np.asarray(got).astype(np.float64), format_of(dtype)
    exact = enclosure.mid
    value, decided = enclosure.settle(form)
    fine = np.isfinite(x) & np.isfinite(exact)
    with np.errstate(all="ignore"):
        error = np.where(fine, (x - exact) - enclosure.tail, 0.0)
        last = np.abs(error) / form.ulp_array(np.where(fine, exact, 1.0))
    use = fine & decided
    rounded = float((x[use] == value[use]).mean()) if use.any() else 1.0
    rms, excess, leans, bias = np.nan, False, False, np.nan
    counted = np.zeros(x.shape, bool)
    if variance is not None:  # where the exact value is known 32 times better than what is predicted
        with np.errstate(all="ignore"):
            counted = fine & (variance > 0) & (np.square(enclosure.radius) <= variance * 2.0**-10)
    if variance is not None and counted.any():
        with np.errstate(all="ignore"):
            unit = np.where(counted, error / np.sqrt(variance), np.nan)
            own = np.where(counted, ((value - exact) - enclosure.tail) / np.sqrt(variance), np.nan)
        lines = _Lines.of(unit, exact, own)
        rms, bias = float(np.sqrt(lines.square.mean())), float(lines.lean.mean())
        independent = min(rows, _independent(lines.unit))
        excess = lines.large(independent)
        if excess and narrow is not None:  # few columns do not show that lines have their roundings in common
            excess = lines.large(min(independent, narrow.apart()))
        excess = excess or lines.large_in_a_head(unit)
        if not excess and narrow is not None:
            excess, leans = lines.held(
                rows, narrow, counted, variance, partial(_leaning, narrow, counted, variance, exact)
            )
    return Figures(
        name,
        rms,
        excess,
        leans,
        bias,
        rounded,
        (float(np.median(last[fine])), float(last[fine].max())) if fine.any() else (0.0, 0.0),
        _worst(ratio, 1 if ratio.ndim > 1 else 0),
        _worst(ratio, 2) if ratio.ndim > 2 else (),
        ratio.shape,
        _histogram(np.where(fine, last, np.where(ratio > 1, np.inf, 0.0))),
        _map(ratio) if excess or leans or (ratio > 1).any() else (),
    )


@dataclass(frozen=True)
class _Lines:
    """Errors over predicted ones, line by line: of each line their mean square, and how far they lean outward.

    `right` is how far the correctly rounded answer leans: where results lie just inside numbers of the format, as when
    one key has nearly all the weight, they are all rounded outward.
    """

    unit: Float
    square: Float
    lean: Float
    right: float

    @classmethod
    def of(cls, unit: Float, exact: Float, own: Float) -> _Lines:
        lines = unit.reshape(-1, unit.shape[-1])
        some = np.isfinite(lines).any(1)
        signs = np.sign(exact).reshape(lines.shape)[some]
        right = float(np.nanmean(own.reshape(lines.shape)[some] * signs))
        lines = lines[some]
        return cls(lines, np.nanmean(lines * lines, 1), np.nanmean(lines * signs, 1), right)

    def large(self, independent: float) -> bool:
        """Tell whether the mean square is above the limit."""
        return independent >= FEWEST and self._least(independent) > WIDEST

    def _least(self, independent: float) -> float:
        spread = self.square.std(ddof=1) if len(self.square) > 1 else 0.0
        return float(self.square.mean() - SIGMAS * spread / np.sqrt(independent))

    @staticmethod
    def large_in_a_head(unit: Float) -> bool:
        """Tell whether a head's errors are as large as those of one rounding seldom are, however they depend."""
        heads = unit.reshape(int(np.prod(unit.shape[:2])) if unit.ndim > 2 else 1, -1)
        heads = heads[np.isfinite(heads).any(1)]
        with np.errstate(all="ignore"):
            return bool((np.nanmean(heads * heads, 1) > SIGMAS**2 * WIDEST).any())

    def held(
        self, rows: int, narrow: Narrow, counted: NDArray[np.bool_], variance: Float, known: Callable[[], list[float]]
    ) -> tuple[bool, bool]:
        """Tell whether errors are too large, and whether they lean, of lines whose independence is known.

        What the accumulator's roundings may add, all of them one way, is allowed on top. Errors lean only if they still
        do when how far errors in common are `known` to lean is taken off.
        """
        if (
            narrow.inner is None or not rows or not any(self._beyond(rows))
        ):  # with fewer independent lines it is no more
            return False, False
        lines = narrow.apart()
        apart = min(rows, lines)
        if lines < FEWEST or not any(self._beyond(apart)):
            return False, False
        with np.errstate(all="ignore"):
            more = (np.broadcast_to(narrow.inner(), counted.shape) / np.sqrt(variance))[counted]
        top = float(np.sqrt(np.square(more).mean())), float(more.mean())
        large, leans = self._beyond(apart, *top)
        return large, leans and all(self._beyond(apart, *top, common)[1] for common in known())

    def _beyond(self, independent: int, size: float = 0.0, mean: float = 0.0, common: float = 0.0) -> tuple[bool, bool]:
        """Tell whether the rms, and the mean less what is common, are above what is allowed and what comes on top."""
        large = np.sqrt(max(self._least(independent), 0.0)) > np.sqrt(WIDEST) + size
        spread, lean = np.sqrt(np.square(self.lean).mean() / independent), float(self.lean.mean()) - common
        # other errors before the last rounding take its lean away, so that a right kernel's lies between 0 and that
        away = max(lean - max(self.right, 0.0), min(self.right, 0.0) - lean)
        return bool(large), bool(away > SIGMAS * spread + mean)


def _leaning(narrow: Narrow, counted: NDArray[np.bool_], variance: Float, exact: Float) -> list[float]:
    """Return how far each of the errors in common leans outward."""
    with np.errstate(all="ignore"):
        units = [np.where(counted, x / np.sqrt(variance), np.nan) for x in narrow.common()]
    return [float(_Lines.of(x, exact, x).lean.mean()) for x in units]


def bands(n: int, most: int = BANDS) -> list[range]:
    """Return n places as at most `most` bands of nearly equal width."""
    return [range(int(x[0]), int(x[-1]) + 1) for x in np.array_split(np.arange(n), max(1, min(n, most))) if len(x)]


def _banded(x: Float, axis: int, most: int = BANDS) -> Float:
    """Return the largest value of each band along an axis."""
    top: Float = np.maximum.reduceat(x, [b.start for b in bands(x.shape[axis], most)], axis)
    return top


def _independent(lines: Float) -> float:
    """Return how many of the lines of errors are independent: from how they lie in the space of columns.

    For k independent lines of c columns, (sum of squares)^2 over the square of the Gram matrix is k c / (k + c).
    """
    x = np.nan_to_num(lines)
    c, gram = x.shape[1], x.T @ x if len(x) > x.shape[1] else x @ x.T  # both have the same trace and norm
    r = float(np.trace(gram) ** 2 / max(float((gram * gram).sum()), 1e-300))
    return min(float(len(x)), r * c / (c - r)) if r < c else float(len(x))


def _worst(ratio: Float, axis: int) -> tuple[float, ...]:
    if not ratio.size:
        return ()
    along = np.moveaxis(ratio, axis, 0).reshape(ratio.shape[axis], -1).max(1)
    return tuple(float(x) for x in _banded(along, 0))


def _map(ratio: Float) -> tuple[tuple[tuple[float, ...], ...], ...]:
    whole = ratio.reshape((1, -1) if ratio.ndim == 1 else ratio.shape)  # dsink has heads only
    x = whole.reshape(*whole.shape, *(1,) * (4 - whole.ndim)).max(0)
    for axis, most in enumerate((HEADS, BANDS, BANDS)):
        x = _banded(x, axis, most)
    return tuple(tuple(tuple(float(v) for v in row) for row in head) for head in x)


def _histogram(ulps: Float) -> tuple[int, ...]:
    at = np.searchsorted(EDGES, ulps.ravel())  # the first bin whose upper end is not below
    return tuple(int(n) for n in np.bincount(at, minlength=len(EDGES) + 1))


def where(name: str, failing: NDArray[np.bool_]) -> tuple[str, ...]:
    """Say where the failing elements of an array lie, if not everywhere.

    Parameters
    ----------
    name : str
        "out", "lse" or a gradient's name.
    failing : bool array
        Of the array's shape.
    """
    if not failing.any() or failing.ndim == 1:
        return ()
    words = {
        0: "batch",
        1: "head",
        2: "key" if name in ("dk", "dv") else "row",
        3: "key" if name == "dbias" else "column",
    }
    found = []
    for axis in range(failing.ndim):
        other = tuple(i for i in range(failing.ndim) if i != axis)
        at, n = np.nonzero(failing.any(other))[0], failing.shape[axis]
        if len(at) == n or n == 1:
            continue
        word = words[axis]
        if len(at) == 1:
            found.append(f"only in {word} {at[0]} of {n}")
        elif (np.diff(at) == 1).all() and (at[-1] == n - 1 or at[0] == 0):
            start = at[0] if at[-1] == n - 1 else 0
            edge = next((t for t in reversed(TILES) if start and start % t == 0), None)
            past = f", the edge of a tile of {edge}" if edge else ""
            found.append(f"only from {word} {start} of {n} on{past}" if start else f"only up to {word} {at[-1]} of {n}")
        elif len(at) <= n // 2:
            some = ", ".join(map(str, at[:4])) + (", ..." if len(at) > 4 else "")
            found.append(f"only in {len(at)} of {n} {word}s: {some}")
    return tuple(found)
