"""Quantised caches of keys and values in decoding: errors that stay, and those that add up as scales grow."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import format_of
from .claim import Claim, Evidence, judged, needs, same
from .fields import precise
from .quantised import FORMATS, attended, error_bound, largest, rounded_to

__all__ = ["CLAIMS", "Cache"]

Array = NDArray[Any]
Float = NDArray[np.float64]


class Cache:
    """Tokens of which numbers of a format are held, at one scale for all of them or at one for each.

    Where a token does not fit the scale of all, a larger one is taken, and what is held is rounded once more.

    Parameters
    ----------
    name : str
        The format.
    alone : bool
        Whether each token has its own scale.
    once : bool
        Whether `moved`, how far each number may have been moved, counts its last rounding alone.
    """

    def __init__(self, name: str, alone: bool, once: bool = False) -> None:
        self.name, self.alone, self.once, self.scale = name, alone, once, 0.0
        self.held: Float = np.empty((0, 0))
        self.moved: Float = np.empty((0, 0))

    def add(self, token: Float) -> None:
        """Hold one token more, (1, d)."""
        fitting = float(2.0 ** np.ceil(np.log2(np.abs(token).max() / largest(self.name))))
        if not self.alone and self.held.size and fitting > self.scale:
            self.held = rounded_to(self.held, self.name, np.full_like(self.held, fitting))
            self.moved = self._least(fitting) + (0 if self.once else 1) * self.moved
        self.scale = fitting if self.alone else max(fitting, self.scale)
        found = rounded_to(token, self.name, np.full_like(token, self.scale))
        step = np.maximum(self._share() * np.abs(token), self._least(self.scale))
        self.held, self.moved = (
            np.concatenate([old.reshape(-1, token.shape[1]), new])
            for old, new in ((self.held, found), (self.moved, step))
        )

    def _share(self) -> float:
        """Return the share of a number that a first rounding moves it by at most; int8 has none."""
        return 0.0 if self.name == "int8" else format_of(self.name).unit_roundoff

    def _least(self, scale: float) -> float:
        """Return half of the format's least number at a scale: a number of the format is moved by that at most."""
        return scale / 2 if self.name == "int8" else scale * format_of(self.name).smallest_subnormal / 2


def _grown(n: int = 10, d: int = 3) -> tuple[Float, Float, Float]:
    """Return queries, keys and values of few bits, whose differences are exact; later ones are larger: scales grow."""
    q, k, v = np.rint(np.random.default_rng(2).standard_normal((3, n, d)) * 2**12) / 2**12
    sizes = 2.0 ** np.rint(np.linspace(-3, 1, n))[:, None]
    return q / 4, k * sizes, v * sizes


def _flat(n: int = 32) -> tuple[Float, Float, Float]:
    """Return equal weights and values just below 3/2, which int8 rounds to 1 at a scale of 1, then to 0 at one of 2."""
    v = np.stack([np.full(n, 1.5 - 2.0**-10), np.full(n, 127.0)], 1)
    v[-1, 1] *= 2
    return np.zeros((n, 1)), np.ones((n, 1)), v


def _decoded(name: str, alone: bool, given: tuple[Float, Float, Float], once: bool = False) -> list[Any]:
    """Return errors of every decoded row beside their bounds, and whether numbers have moved further than is said."""
    q, k, v = given
    keys, values = Cache(name, alone, once), Cache(name, alone, once)
    found: list[Any] = []
    for t in range(len(q)):
        row, sofar = q[t : t + 1], slice(t + 1)
        keys.add(k[t : t + 1])
        values.add(v[t : t + 1])
        off = abs(attended(row, keys.held, values.held) - attended(row, k[sofar], v[sofar]))[0]
        bound = error_bound(row, k[sofar], v[sofar], (0 * row, keys.moved, values.moved))[0]
        found += [(one, bound) for one in off]
        for cache, exact in ((keys, k), (values, v)):
            found.append(same(bool((np.abs(cache.held - exact[sofar]) <= cache.moved).all()), True))
    return found


def _adds_up() -> list[int]:
    """Return whether a number that was rounded at scales of 1 and 2 may have moved by 1/2 and 1, and a float by less.

    A float of four bits, halved and doubled, is still one: only what is below the least number is rounded again.
    """
    whole, part = Cache("int8", False), Cache("float8_e4m3fn", False)
    for cache, most in ((whole, 127.0), (part, 448.0)):
        cache.add(np.array([[1.25, most]]))
        cache.add(np.array([[1.25, 2 * most]]))
    least = format_of("float8_e4m3fn").smallest_subnormal
    return [
        same(whole.moved[:, 0].tolist(), [1 / 2 + 1, 1.0]),
        same(part.moved[:, 0].tolist(), [1.25 / 16 + least, 1.25 / 16]),
    ]


@precise()
def quantised(formats: tuple[str, ...] = FORMATS) -> Evidence:
    """Every row's error for formats and both kinds of scales; how far each number has moved is looked at, too."""
    needs(set(formats) <= set(FORMATS), f"formats out of {', '.join(FORMATS)}")
    found = [one for name in formats for alone in (True, False) for one in _decoded(name, alone, _grown())]
    return judged([*found, *_decoded("int8", False, _flat()), *_adds_up()], "error of a decoded row over its bound")


@precise()
def rounded_once() -> Evidence:
    """The half step of the last scale alone, for values that were rounded at a smaller one before."""
    return judged(_decoded("int8", False, _flat(), once=True), "error of a decoded row over the last half step")


CLAIMS = [
    Claim(
        "decoding-quantised-cache",
        "A row decoded from a cache of int8 or float8 is off by at most tanh(half the scores' largest move) of the"
        " values' range and their largest move; under one scale for all, which grows, half steps of all sizes add up",
        "derived here, for a scale a token, and for one that grows with the largest token",
        quantised,
        rounded_once,
        ("formats out of int8, float8_e4m3fn, float8_e5m2",),
    ),
]
