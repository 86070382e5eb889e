"""What triple-wise attention costs on one core: nanoseconds by triple and by feature; a table, or measured here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InvalidInput
from .polynomial import polynomial
from .stream import attention

__all__ = ["COSTS", "Costs", "measure"]


@dataclass(frozen=True)
class Costs:
    """Nanoseconds of one core.

    Attributes
    ----------
    triple : (float, float)
        A triple in `attention`, and more for each of d + d_v.
    feature : (float, float)
        A row's feature, and more for each of its values and their 1.
    causal : float
        A row's feature, for each of its values and their 1, in causal sums.
    """

    triple: tuple[float, float]
    feature: tuple[float, float]
    causal: float

    def exact(self, pairs: Any, d: int, d_v: int) -> Any:
        """Return the nanoseconds of a row that sees so many pairs of keys."""
        return pairs * (self.triple[0] + self.triple[1] * (d + d_v))

    def features(self, rows: int, keys: int, d_v: int, causal: bool = False) -> float:
        """Return the nanoseconds of each feature of a head, of so many rows and keys of all kinds."""
        if causal:
            return self.causal * (d_v + 1) * rows
        return (self.feature[0] + self.feature[1] * (d_v + 1)) * (rows + keys)


COSTS = Costs((2.2, 0.05), (4.2, 0.05), 10.0)
"""One core of an AMD EPYC (Zen 5) at 2.6 GHz, float64."""


def measure(seconds: float = 3.0) -> Costs:
    """Return the costs on this machine, in float64, with the threads that NumPy has now, for about some seconds.

    Raises
    ------
    InvalidInput
        A time that is not above 0.
    """
    if not seconds > 0:
        raise InvalidInput(f"costs: got {seconds} seconds, expected more than 0")
    narrow, wide = 4, 64
    triples = [_ns(_exact(160, d), seconds / 5) / 160**3 for d in (narrow, wide)]
    n, degree = 4096, 6
    by = 3 * n * math.comb(4 + degree, degree)
    features = [_ns(_sums(n, d_v, degree, False), seconds / 5) / by for d_v in (narrow, wide)]
    n, causal_by = n // 4, n // 4 * math.comb(4 + degree, degree) * (narrow + 1)
    causal = _ns(_sums(n, narrow, degree, True), seconds / 5) / causal_by
    return Costs(_line(2 * narrow, 2 * wide, *triples), _line(narrow + 1, wide + 1, *features), causal)


def _line(x: float, z: float, at_x: float, at_z: float) -> tuple[float, float]:
    """Return (a, b) of a + b·x through two points, none below 0."""
    slope = max(0.0, (at_z - at_x) / (z - x))
    return max(0.0, at_x - slope * x), slope


def _ns(call: Callable[[], Any], seconds: float) -> float:
    """Return the median nanoseconds of a call, after one to warm up."""
    times: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e9


def _arrays(n: int, d: int, d_v: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.uniform(-0.5, 0.5, (1, 1, n, w)) for w in (d, d, d, d_v, d_v)]


def _exact(n: int, d: int) -> Callable[[], Any]:
    given = _arrays(n, d, d)
    return lambda: attention(*given)


def _sums(n: int, d_v: int, degree: int, causal: bool) -> Callable[[], Any]:
    q, k1, k2, v1, v2 = _arrays(n, 4, d_v)
    return lambda: polynomial(q, (k1, k2), (v1, v2), degree=degree, causal=causal)
