"""What is known so far of an answer that is being rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Format
from .anywhere import beside, on_host, within
from .enclosure import Enclosure

__all__ = ["State"]

BY_KEY = ("dk", "dv")


class State:
    """Rounded values, which of them are decided, and the enclosures that decide them, by array.

    Values and enclosures stay where they were computed, on a device too; what is decided is kept on the CPU.
    """

    def __init__(self, form: Format, lse_form: Format, by_row: tuple[str, ...] = ("out", "lse", "dq")) -> None:
        self.by_row = by_row  # the others sum over rows
        self.forms = {"lse": lse_form}
        self.default = form
        self.values: dict[str, NDArray[np.float64]] = {}
        self.decided: dict[str, NDArray[np.bool_]] = {}
        self.enclosures: dict[str, Enclosure] = {}
        self.stats: dict[str, dict[str, float]] = {}
        self._before = 0

    def form(self, name: str) -> Format:
        """Return the format that an array is rounded to."""
        return self.forms.get(name, self.default)

    @property
    def done(self) -> bool:
        """Tell whether every element is decided."""
        return all(bool(d.all()) for d in self.decided.values())

    def take(
        self,
        raw: dict[str, NDArray[Any]],
        need: NDArray[np.bool_],
        keys: NDArray[np.bool_] | None,
        enclose: Callable[[Any], Enclosure],
    ) -> None:
        """Take in what an arithmetic gave for the needed rows and keys, and round what it decides."""
        for name, x in raw.items():
            if name not in self.values:
                self.enclosures[name] = first = enclose(x)
                self.values[name], decided = first.settle(self.form(name))
                self.decided[name] = on_host(decided)
                continue
            by_key = name in BY_KEY and keys is not None
            if name not in self.by_row and not by_key and not need.all():
                continue
            at = self._fresh(name, need, keys if by_key else None)
            there = within(self.values[name], at)
            better = enclose(x[at if isinstance(x, np.ndarray) else there])
            value, decided = better.settle(self.form(name))
            pairs = [(getattr(self.enclosures[name], n), getattr(better, n)) for n in ("mid", "tail", "radius")]
            for to, new in [*pairs, (self.values[name], value)]:  # on a device also where the CPU goes on
                to[there] = beside(to, new) if isinstance(new, np.ndarray) else new
            self.decided[name][at] = on_host(decided)

    def _fresh(self, name: str, need: NDArray[np.bool_], keys: NDArray[np.bool_] | None) -> tuple[Any, ...]:
        """Return the places of an array that are not decided, of the needed rows or of the keys that are given."""
        decided = self.decided[name]
        if name not in self.by_row:
            open_ = ~decided if keys is None else ~decided & keys[..., None]
            return np.unravel_index(np.flatnonzero(open_), open_.shape)
        rows = np.nonzero(need)  # few of many, mostly
        i, *column = np.nonzero(~decided[rows])
        return (*(x[i] for x in rows), *column)

    def open_keys(self) -> NDArray[np.bool_]:
        """Return the keys with a gradient that is not decided, (b, h_kv, n_k)."""
        sure = [np.asarray(self.decided[name].all(-1)) for name in BY_KEY]
        return ~(sure[0] & sure[1])

    def open_columns(self) -> NDArray[np.intp] | None:
        """Return the columns of out that are not decided, one at least, where these are few; else None."""
        if "out" not in self.decided:
            return None
        open_ = ~self.decided["out"].all((0, 1, 2))
        found = np.nonzero(open_)[0]
        return (found if found.size else np.arange(1)) if 2 * found.size < open_.size else None

    @property
    def sums_open(self) -> bool:
        """Tell whether anything that sums over rows, dk and dv apart, is not decided."""
        return any(not d.all() for n, d in self.decided.items() if n not in (*self.by_row, *BY_KEY))

    def open_rows(self, keys_apart: bool = False) -> NDArray[np.bool_]:
        """Return the rows to compute again, (b, h_q, n_q): all for an open sum, unless dk and dv go apart."""
        own = [d if n == "lse" else d.all(-1) for n, d in self.decided.items() if n in self.by_row]
        rows: NDArray[np.bool_] = ~np.logical_and.reduce(own)
        dk_open = not keys_apart and any(not self.decided[n].all() for n in BY_KEY if n in self.decided)
        return rows | (dk_open or self.sums_open)

    def settle(self, name: str, index: tuple[int, ...], value: float) -> None:
        """Decide one element."""
        there = self.values[name]
        # CuPy fills with a number, and with an array without an axis, by bytes of 0 where it is 0: -0.0 would become 0
        there[index] = value if isinstance(there, np.ndarray) else beside(there, np.array([value]))
        self.decided[name][index] = True

    def open(self, *skip: str) -> list[tuple[str, tuple[int, ...]]]:
        """Return the places that are not decided."""
        return [
            (name, index)
            for name, d in self.decided.items()
            if name not in skip
            for index in zip(*np.nonzero(~d), strict=True)
        ]

    def count(self, level: str, seconds: float) -> None:
        """Note what a level decided."""
        now = sum(int(np.count_nonzero(d)) for d in self.decided.values())
        self.stats[level] = {"decided": now - self._before, "seconds": seconds}
        self._before = now
