"""An operator's own options: what they mean, what values they take, values to try."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "Option",
    "above_zero",
    "at_least_zero",
    "boolean",
    "even",
    "finite",
    "flags",
    "one_of",
    "per_head",
    "rate_per_head",
    "whole",
    "whole_or_none",
    "wholes",
]

MOST = 2**62
"""Integers stay below: sums and quotients of them are still integers of 64 bits."""
LARGEST = float(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Option:
    """One of an operator's own options.

    Attributes
    ----------
    default : Any
        Its value where a call names none.
    meaning : str
        What it is, in a few words.
    check : callable
        ``check(value, heads)`` returns what was expected, or None where the value is good.
    samples : tuple, or function from the number of query heads to a tuple
        Values that tests draw, the simplest first.
    places : bool
        Whether, where it is set, it counts where rows and keys stand, or which head it is: the call is not cut then.
    by_head : bool
        Whether a tuple has a number for each query head; else it is one value for all.
    needs : str
        An option of Problem without which this one means nothing; "" where there is none.
    """

    default: Any
    meaning: str
    check: Callable[[Any, int], str | None]
    samples: Any = ()
    needs: str = ""
    places: bool = False
    by_head: bool = True

    def draws(self, heads: int) -> tuple[Any, ...]:
        """Return values to try, the default among them."""
        found = tuple(self.samples(heads) if callable(self.samples) else self.samples)
        return found if self.default in found else (self.default, *found)


def _number(value: Any) -> bool:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return real and abs(value) <= LARGEST and math.isfinite(value)  # an int beyond float64 is none


def finite(value: Any, heads: int) -> str | None:
    """Check for a finite number or None."""
    return None if value is None or _number(value) else "a finite number or None"


def at_least_zero(value: Any, heads: int) -> str | None:
    """Check for a finite number of at least 0."""
    return None if _number(value) and value >= 0 else "a finite number of at least 0"


def above_zero(value: Any, heads: int) -> str | None:
    """Check for a finite number above 0."""
    return None if _number(value) and value > 0 else "a finite number above 0"


def boolean(value: Any, heads: int) -> str | None:
    """Check for True or False."""
    return None if isinstance(value, bool) else "True or False"


def whole(least: int) -> Callable[[Any, int], str | None]:
    """Check for an integer of at least `least`."""

    def check(value: Any, heads: int) -> str | None:
        ok = isinstance(value, int | np.integer) and not isinstance(value, bool) and least <= value < MOST
        return None if ok else f"an integer of at least {least}"

    return check


def whole_or_none(least: int) -> Callable[[Any, int], str | None]:
    """Check for None or an integer of at least `least`."""
    return lambda value, heads: (
        None if value is None or whole(least)(value, heads) is None else (f"None or an integer of at least {least}")
    )


def wholes(least: int) -> Callable[[Any, int], str | None]:
    """Check for None or a tuple of integers of at least `least`, by axis."""

    def check(value: Any, heads: int) -> str | None:
        ok = value is None or (
            isinstance(value, tuple) and value and all(whole(least)(x, heads) is None for x in value)
        )
        return None if ok else f"None or a tuple of integers of at least {least}, one for each axis"

    return check


def flags(value: Any, heads: int) -> str | None:
    """Check for None or a tuple of True and False, by axis."""
    ok = value is None or (isinstance(value, tuple) and value and all(isinstance(x, bool) for x in value))
    return None if ok else "None or a tuple of True and False, one for each axis"


def even(value: Any, heads: int) -> str | None:
    """Check for a positive even integer."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % 2 == 0
    return None if ok else "a positive even integer"


def one_of(*names: str) -> Callable[[Any, int], str | None]:
    """Check for one of some names."""
    return lambda value, heads: None if isinstance(value, str) and value in names else f"one of {', '.join(names)}"


def per_head(value: Any, heads: int) -> str | None:
    """Check for None or a tuple with a finite number of at least 0 for each query head."""
    return None if value is None else rate_per_head(value, heads, "None or ")


def rate_per_head(value: Any, heads: int, other: str = "") -> str | None:
    """Check for a tuple with a finite number of at least 0 for each query head."""
    ok = isinstance(value, tuple) and len(value) == heads and all(_number(x) and x >= 0 for x in value)
    if ok:
        return None
    more = "; make it a tuple" if isinstance(value, list | np.ndarray) else ""
    return f"{other}a tuple of {heads} finite numbers of at least 0, one for each query head{more}"
