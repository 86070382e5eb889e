"""What an evaluation gives: values, what is proven of them, and how they came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_float64
from ..errors import expect
from ..problem import Problem
from .enclosure import Enclosure
from .run import Raw

__all__ = ["Answer"]


@dataclass(frozen=True)
class Answer:
    """What a definition gives.

    Attributes
    ----------
    problem : Problem
        The call.
    values : dict
        Arrays by name: ``out`` (b, h_q, n_q, d_v), ``lse`` (b, h_q, n_q) where the operator has one; with gradients
        ``dq``, ``dk``, ``dv`` and, where present, ``dbias``, ``dsink``, ``dalpha``, ``dbeta``, ``deta`` and ``dstate``,
        of their inputs' shapes.
        Float64 nearest to the enclosure's middle, or correctly rounded numbers in the asked format.
    enclosures : dict
        An :class:`Enclosure` for each, with a proven radius for every element. After an evaluation on a GPU they stay
        in its memory until they are read.
    rounding : str or None
        The format that the values are correctly rounded to.
    undecided : dict
        How many elements of each could not be decided; their enclosure still holds.
    balls : dict
        The Arb balls themselves (object arrays), where `rounding` is None.
    stats : dict
        By level, how many elements it decided and the seconds it took.
    decided : dict
        Which elements are decided, by array (empty where all parts are put together again).
    core : Problem or None
        The call that the operator is another way of writing: masks and weights written out, choices made.
    margins : (b, h_q, n_q) array or None
        Where keys are chosen by scores: how far the last chosen score lies above the first that was not; 0 for a tie,
        inf where there was nothing to choose.
    """

    problem: Problem
    values: dict[str, NDArray[Any]]
    enclosures: Mapping[str, Enclosure]
    rounding: str | None
    undecided: dict[str, int]
    balls: Raw
    stats: dict[str, dict[str, float]] = field(default_factory=dict)
    decided: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    core: Problem | None = None
    margins: NDArray[np.float64] | None = None

    def __repr__(self) -> str:
        to = "" if self.rounding is None else f", correctly rounded to {self.rounding}"
        parts = [f"{n} {tuple(x.shape)}" for n, x in self.values.items()]
        left = sum(self.undecided.values())
        known = f", {left} undecided" if left else ""
        widest = max((float(e.radius.max(initial=0.0)) for e in self.enclosures.values()), default=0.0)
        return f"Answer({', '.join(parts)}{to}, radius at most {widest:.1g}{known})"

    @property
    def call(self) -> Problem:
        """The call that was evaluated: `core` where there is one, else `problem`."""
        return self.core or self.problem

    @property
    def state(self) -> NDArray[Any] | None:
        """The state after the last token, (b, h_q, d_k, d_v), where the operator is a recurrence."""
        return self.values.get("state")

    @property
    def out(self) -> NDArray[Any]:
        """The output, (b, h_q, n_q, d_v)."""
        return self.values["out"]

    @property
    def lse(self) -> NDArray[Any] | None:
        """The log-sum-exp, (b, h_q, n_q), natural log; None where the operator has none."""
        return self.values.get("lse")

    @property
    def dq(self) -> NDArray[Any] | None:
        """The gradient by query."""
        return self.values.get("dq")

    @property
    def dk(self) -> NDArray[Any] | None:
        """The gradient by key, summed over the query heads of a group."""
        return self.values.get("dk")

    @property
    def dv(self) -> NDArray[Any] | None:
        """The gradient by value, summed over the query heads of a group."""
        return self.values.get("dv")

    @property
    def dbias(self) -> NDArray[Any] | None:
        """The gradient by bias, summed over the axes along which bias was spread."""
        return self.values.get("dbias")

    @property
    def dsink(self) -> NDArray[Any] | None:
        """The gradient by sink."""
        return self.values.get("dsink")

    @property
    def dalpha(self) -> NDArray[Any] | None:
        """The gradient by alpha, where the operator is a recurrence with that gate."""
        return self.values.get("dalpha")

    @property
    def dbeta(self) -> NDArray[Any] | None:
        """The gradient by beta."""
        return self.values.get("dbeta")

    @property
    def deta(self) -> NDArray[Any] | None:
        """The gradient by eta."""
        return self.values.get("deta")

    @property
    def dstate(self) -> NDArray[Any] | None:
        """The gradient by the state that a recurrence starts from, (b, h_q, d_k, d_v)."""
        return self.values.get("dstate")

    def radius(self, name: str = "out") -> NDArray[np.float64]:
        """Return the proven bound on ``|value - exact|`` for every element of an array."""
        expect(name in self.enclosures, "name", name, f"one of {', '.join(self.enclosures)}")
        e = self.enclosures[name]
        return e.error(to_float64(self.values[name]))
