"""Arrays of real numbers known up to a proven radius, and their correct rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..dtypes import Format
from .anywhere import on_host

__all__ = ["Enclosure", "Fetched"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Enclosure:
    """Real numbers x with ``|x - (mid + tail)| <= radius``, element by element.

    Attributes
    ----------
    mid, tail : float64 arrays
        An unevaluated sum: tail is what float64 could not hold of the midpoint.
    radius : float64 array
        At least 0; inf where nothing is proven, and then mid says what is known (NaN: no number).
    """

    mid: Float
    tail: Float
    radius: Float

    @classmethod
    def of(cls, values: NDArray[Any]) -> Enclosure:
        """Enclose an array of Arb balls (or plain floats, which stand for themselves)."""
        mid, tail, radius = (np.empty(values.size) for _ in range(3))
        for i, x in enumerate(values.ravel()):
            mid[i], tail[i], radius[i] = _split(x)
        return cls(*(a.reshape(values.shape) for a in (mid, tail, radius)))

    def error(self, x: Float) -> Float:
        """Return an upper bound, to first order in float64's own rounding, on ``|x - exact|``."""
        with np.errstate(invalid="ignore", over="ignore"):
            return np.abs((x - self.mid) - self.tail) + self.radius

    def least_error(self, x: Float) -> Float:
        """Return a lower bound on ``|x - exact|``: what `x` is off by for certain."""
        with np.errstate(invalid="ignore", over="ignore"):
            return np.maximum(np.abs((x - self.mid) - self.tail) - self.radius, 0.0)

    def settle(self, form: Format) -> tuple[Float, Mask]:
        """Round every element to nearest, ties to even, where the enclosure decides it.

        Returns
        -------
        value : float64 array
            The rounded number; where undecided, the rounded midpoint.
        decided : bool array
            True where every real number in the enclosure rounds to `value`.
        """
        with np.errstate(all="ignore"):
            low, high = self._ends(form)
            a, b = form.round_array(low), form.round_array(high)
        same = (a == b) & (np.signbit(a) == np.signbit(b))
        nothing = np.isnan(self.mid) & (self.radius == 0)
        point = (self.mid == 0) & (self.radius == 0) & (self.tail == 0)
        overflow = np.isnan(a) & np.isnan(b) & ~np.isnan(low) & (np.signbit(low) == np.signbit(high))
        value = np.where(same | overflow, a, form.round_array(self.mid))
        return np.where(point, 0.0, value), same | nothing | point | overflow

    def _ends(self, form: Format) -> tuple[Float, Float]:
        """Return float64 numbers whose rounding into the format bounds that of every number in the enclosure."""
        with np.errstate(all="ignore"):
            point = self.radius == 0
            down = np.where(point, self.tail, np.nextafter(self.tail - self.radius, -np.inf))
            up = np.where(point, self.tail, np.nextafter(self.tail + self.radius, np.inf))
            low, high = self.mid + down, self.mid + up
            if form.precision == 53:
                return low, high  # the sum's own rounding is the one asked for
            point &= self.tail == 0
            return (
                np.where(point, self.mid, np.nextafter(low, -np.inf)),
                np.where(point, self.mid, np.nextafter(high, np.inf)),
            )


class Fetched(Mapping[str, Enclosure]):
    """Enclosures by name; those on a device stay there until they are read, which takes longer than all of the rest."""

    def __init__(self, enclosures: dict[str, Enclosure]) -> None:
        self._all = enclosures

    def __getitem__(self, name: str) -> Enclosure:
        e = self._all[name]
        if not isinstance(e.mid, np.ndarray):
            self._all[name] = e = Enclosure(*map(on_host, (e.mid, e.tail, e.radius)))
        return e

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


def _split(x: Any) -> tuple[float, float, float]:
    if isinstance(x, float | int):
        return float(x), 0.0, 0.0
    if not x.is_finite():
        return math.nan, 0.0, math.inf
    mid = float(x)  # of the midpoint
    if not math.isfinite(mid):
        certain = abs(x) >= flint.arb(2) ** 1024
        return mid, 0.0, 0.0 if certain else math.inf
    rest = x - mid
    tail = float(rest)
    left = (rest - tail).abs_upper()
    return mid, tail, 0.0 if left == 0 else math.nextafter(float(left), math.inf)
