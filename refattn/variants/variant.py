"""What one row of the table VARIANTS holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidProblem, UnsupportedProblem
from ..problem import Problem

__all__ = [
    "Option",
    "Variant",
    "above_zero",
    "at_least_zero",
    "boolean",
    "even",
    "finite",
    "one_of",
    "per_head",
]

Array = NDArray[np.float64]

COMMON_LAWS = (
    "determinism",
    "key_permutation",
    "masked_keys_unread",
    "grouped_heads",
    "batch_independence",
    "batch_invariance",
    "past_31_bits",
    "values_doubled",
    "layout",
)
COMMON_BUGS = (
    "zeroed_head",
    "own_key_dropped",
    "last_key_dropped",
    "tail_tile_dropped",
    "wrong_scale",
    "causal_off_by_one",
    "causal_ignored",
    "causal_corner_swapped",
    "window_off_by_one",
    "window_ignored",
    "allowed_ignored",
    "heads_tiled",
    "sequences_joined",
    "value_of_next_key",
    "empty_row_nan",
    "neighbour_row",
    "output_too_narrow",
    "masked_value_read",
)
COMMON_FAMILIES = ("gaussian", "peaked", "probe", "sparse", "drift", "empty", "poison", "ragged")


@dataclass(frozen=True)
class Option:
    """One of an operator's own options: its default, its meaning, and what its value must be.

    ``check(value, heads)`` returns what was expected, or None where the value is good.
    """

    default: Any
    meaning: str
    check: Callable[[Any, int], str | None]


@dataclass(frozen=True)
class Variant:
    """One operator.

    Attributes
    ----------
    name : str
        The operator's name.
    define : callable
        The definition for one head, ``define(q, k, v, o) -> (out, lse or None)``, over any arithmetic's matrices.
    formula : str
        The definition as a formula.
    unit : str
        The error unit: what one rounding costs an output element.
    source : str
        Paper and equation, and what of it was read.
    uses : frozenset of str
        The options of Problem that mean something here; another one raises UnsupportedProblem.
    options : mapping
        The operator's own options.
    laws, bugs, families : tuple of str
        Names of the laws that hold, the planted bugs that must be caught, the input families that apply.
    contract : tuple of str
        What holds at the edges, a sentence each.
    default_scale : str
        "rsqrt" (scale None is 1/sqrt(d_k)) or "one".
    """

    name: str
    define: Callable[..., Any]
    formula: str
    unit: str
    source: str
    uses: frozenset[str]
    options: Mapping[str, Option] = field(default_factory=dict)
    laws: tuple[str, ...] = ()
    bugs: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    contract: tuple[str, ...] = ()
    default_scale: str = "rsqrt"

    @property
    def has_lse(self) -> bool:
        """Tell whether the operator has a log-sum-exp."""
        return self.name == "softmax"

    def settings(self, problem: Problem) -> dict[str, Any]:
        """Return the operator's options for a call, defaults filled in, after checking that the call fits.

        Raises
        ------
        UnsupportedProblem
            The call sets an option of Problem that means nothing here.
        InvalidProblem
            The call sets an option that the operator does not have, or to a value that it cannot take.
        """
        masks = ("causal", "window", "softcap", "sink", "bias", "allowed")
        for name in masks:
            if getattr(problem, name) is not None and name not in self.uses:
                raise UnsupportedProblem(
                    f"{name}: {self.name} attention does not have it; it has {', '.join(sorted(self.uses))}"
                )
        unknown = sorted(set(problem.options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise InvalidProblem(f"options: {self.name} attention has no {unknown[0]!r}; it has {known}")
        values = {name: problem.options.get(name, option.default) for name, option in self.options.items()}
        for name, value in values.items():
            wrong = self.options[name].check(value, problem.heads)
            if wrong:
                raise InvalidProblem(f"{name}: got {value!r}, expected {wrong}")
        if values.get("decay") is not None and problem.causal is None:
            raise InvalidProblem("decay: needs causal; set causal='bottom_right' or 'top_left'")
        return values


def _number(value: Any) -> bool:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return real and math.isfinite(value)


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


def even(value: Any, heads: int) -> str | None:
    """Check for a positive even integer."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % 2 == 0
    return None if ok else "a positive even integer"


def one_of(*names: str) -> Callable[[Any, int], str | None]:
    """Check for one of some names."""
    return lambda value, heads: None if value in names else f"one of {', '.join(names)}"


def per_head(value: Any, heads: int) -> str | None:
    """Check for None or a tuple with a finite number of at least 0 for each query head."""
    if value is None:
        return None
    ok = isinstance(value, tuple) and len(value) == heads and all(_number(x) and x >= 0 for x in value)
    return None if ok else f"None or a tuple of {heads} finite numbers of at least 0, one for each query head"
