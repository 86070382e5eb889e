"""Instruments: scalars that count operations, a slow memory that counts words, and how many numbers are held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fields import each

__all__ = ["Counted", "Memory", "Ranged", "Slow", "counted", "held", "plain", "working"]


class Counted:
    """A number that notes in a tally what is done with it: "add" (and subtract), "multiply", "divide", "compare".

    A product with a number that is known to be 1 or -1 is noted as "sign": it needs no multiplier.
    """

    def __init__(self, value: Any, tally: Counter[str], sign: bool = False) -> None:
        self.value, self.tally, self.sign = value, tally, sign

    def _noted(self, name: str, value: Any) -> Counted:
        self.tally[name] += 1
        return Counted(value, self.tally)

    def __add__(self, other: Any) -> Counted:
        return self._noted("add", self.value + plain(other))

    def __sub__(self, other: Any) -> Counted:
        return self._noted("add", self.value - plain(other))

    def __mul__(self, other: Any) -> Counted:
        sign = self.sign or (isinstance(other, Counted) and other.sign)
        return self._noted("sign" if sign else "multiply", self.value * plain(other))

    def __rmul__(self, other: Any) -> Counted:
        return self.__mul__(other)

    def __truediv__(self, other: Any) -> Counted:
        return self._noted("divide", self.value / plain(other))

    def __gt__(self, other: Any) -> bool:
        self.tally["compare"] += 1
        return bool(self.value > plain(other))

    def __ge__(self, other: Any) -> bool:
        self.tally["compare"] += 1
        return bool(self.value >= plain(other))


class Ranged:
    """A positive number that notes what is computed from it, and a quotient what it was divided by.

    Parameters
    ----------
    value : number
        Noted, too.
    noted : list
        Of all values.
    by : number, optional
        What it was divided by.
    """

    def __init__(self, value: Any, noted: list[Any], by: Any = None) -> None:
        self.value, self.noted, self.by = value, noted, by
        noted.append(value)

    def __add__(self, other: Ranged) -> Ranged:
        return Ranged(self.value + other.value, self.noted)

    def __mul__(self, other: Ranged) -> Ranged:
        return Ranged(self.value * other.value, self.noted)

    def __truediv__(self, other: Ranged) -> Ranged:
        inverse = Ranged(1 / other.value, self.noted)  # there is no division under encryption
        return Ranged(self.value * inverse.value, self.noted, other.value)


def working() -> int:
    """Return how many of a counted number's differences and comparisons are wrong or are not noted."""
    tally: Counter[str] = Counter()
    a, b = Counted(3, tally), Counted(5, tally)
    wrong = [(a - b).value != 3 - 5, a > b, a >= b, tally != {"add": 1, "compare": 2}]
    return sum(map(int, wrong))


def plain(x: Any) -> Any:
    """Return a counted number's value; others as they are."""
    return x.value if isinstance(x, Counted) else x


def counted(x: Any, tally: Counter[str], sign: bool = False) -> NDArray[Any]:
    """Return an array's numbers as counted ones, known to be 1 or -1 or not."""
    return each(lambda a: Counted(a, tally, sign), x)


class Memory:
    """A fast memory of some words beside a slow one: what is loaded and stored is counted, what is held is limited.

    Parameters
    ----------
    capacity : int
        Words that may be held at once.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.words, self.held, self.peak = capacity, 0, 0, 0

    def new(self, *shape: int, fill: float = 0.0) -> NDArray[Any]:
        """Return an array in fast memory."""
        return self._hold(np.full(shape, fill))

    def load(self, x: Slow, at: Any) -> NDArray[Any]:
        """Return a copy in fast memory of a part of a slow array."""
        part = np.array(x.data[at])
        self.words += part.size
        return self._hold(part)

    def store(self, x: Slow, at: Any, part: NDArray[Any]) -> None:
        """Write a part of a slow array; the fast copy is still held."""
        self.words += part.size
        x.data[at] = part

    def free(self, *parts: NDArray[Any]) -> None:
        """Give up arrays of fast memory."""
        self.held -= sum(p.size for p in parts)

    def _hold(self, x: NDArray[Any]) -> NDArray[Any]:
        self.held += x.size
        self.peak = max(self.peak, self.held)
        if self.held > self.capacity:
            raise MemoryError(f"{self.held} words are held, {self.capacity} fit")
        return x


class Slow:
    """An array in slow memory: only a Memory reads and writes it."""

    def __init__(self, data: Any) -> None:
        self.data = np.array(data)


def held(x: Any) -> int:
    """Return how many numbers a state holds: of arrays, and of tuples, lists and dicts of them."""
    if isinstance(x, dict):
        return held(list(x.values()))
    if isinstance(x, Iterable) and not isinstance(x, np.ndarray):
        return sum(map(held, x))
    return int(np.size(x))
