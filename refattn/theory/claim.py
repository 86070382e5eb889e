"""Claims of papers as code: a statement, what it needs, a check of a bound against a measured error, a control."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import flint

from ..errors import HypothesisViolated

__all__ = ["SETH", "Claim", "Evidence", "Result", "judged", "needs", "run", "same", "total", "worst"]

SETH = (
    "the strong exponential time hypothesis (its refutation has been claimed in 2026-10; the proofs were not checked)"
)


@dataclass(frozen=True)
class Evidence:
    """What a check or a control found.

    Attributes
    ----------
    measured, bound : float, rational or ball
        The claim holds where measured is at most the bound, and fails where it is above; a ball where all of it is.
    what : str
        What was measured, in words, with its unit.
    detail : mapping
        More numbers, or lists of them, for tables and plots.
    unequal : int
        How many exact equalities do not hold of those that the check has looked at besides: a claim needs all.
    """

    measured: Any
    bound: Any
    what: str
    detail: Mapping[str, Any] = field(default_factory=dict)
    unequal: int = 0

    @property
    def finite(self) -> bool:
        """Whether both are numbers: what overflowed is no evidence against a claim."""
        return _finite(self.measured) and _finite(self.bound)

    @property
    def holds(self) -> bool:
        """Whether measured is surely at most the bound, which NaN is not, and all equalities hold."""
        return self.finite and bool(self.measured <= self.bound) and self.unequal == 0

    @property
    def fails(self) -> bool:
        """Whether measured is surely above the bound: not a ball with points on both sides, whatever is unequal."""
        return self.finite and bool(self.measured > self.bound)


def _finite(x: Any) -> bool:
    return bool(x.is_finite()) if hasattr(x, "is_finite") else math.isfinite(float(x))


@dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes
    ----------
    name : str
        For the command line.
    statement : str
        What is claimed.
    source : str
        Whose it is, and what of it was read.
    check, control : callable
        Evidence for the claim, and evidence that must not hold: something near it that is false. Options of `check` are
        its keyword arguments; it raises HypothesisViolated for those that the claim does not speak of.
    hypotheses : tuple of str
        What the claim needs.
    conditional_on : str
        An unproven conjecture that it rests on, or "".
    """

    name: str
    statement: str
    source: str
    check: Callable[..., Evidence]
    control: Callable[[], Evidence]
    hypotheses: tuple[str, ...] = ()
    conditional_on: str = ""


@dataclass(frozen=True)
class Result:
    """What running a claim gave; `violated` is the hypothesis that did not hold, then nothing else is known."""

    name: str
    holds: bool
    control_failed: bool
    measured: float
    bound: float
    what: str
    seconds: float
    violated: str = ""
    control: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON's types; numbers that JSON has not are null."""
        found = asdict(self)
        for name in ("measured", "bound"):
            if not math.isfinite(found[name]):
                found[name] = None
        return found


def run(claim: Claim, **options: Any) -> Result:
    """Run a claim's check and its control.

    Parameters
    ----------
    claim : Claim
        The claim.
    **options
        Of its check.
    """
    start = time.perf_counter()
    try:
        found = claim.check(**options)
    except HypothesisViolated as e:
        return Result(claim.name, False, False, math.nan, math.nan, "", time.perf_counter() - start, violated=str(e))
    wrong = claim.control()
    control = f"{wrong.what}: {float(wrong.measured):.3g}, bound {float(wrong.bound):.3g}"
    seconds = time.perf_counter() - start
    return Result(
        claim.name, found.holds, wrong.fails, float(found.measured), float(found.bound),
        found.what, seconds,
        control=control, detail=found.detail,
    )  # fmt: skip


def worst(found: Iterable[Any]) -> Any:
    """Return the largest ratio, at least 0: of ratios, and of pairs of what was measured and its bound.

    Of balls it is one from the largest lower to the largest upper end. It is NaN where a ratio is not finite or a bound
    is below 0.
    """
    least: Any = 0
    most: Any = 0
    for one in found:
        if isinstance(one, Differs):
            raise TypeError("worst: an equality is no ratio")
        ratio = one[0] / one[1] if isinstance(one, tuple) else one
        below = isinstance(one, tuple) and one[1] < 0  # the ratio would be small, and nothing is within the bound
        if below or not _finite(ratio):  # it is larger than nothing, and must not be lost
            return math.nan
        low, high = (ratio.lower(), ratio.upper()) if hasattr(ratio, "upper") else (ratio, ratio)
        least, most = low if low > least else least, high if high > most else most
    return most if least == most else flint.arb(least).union(flint.arb(most))


class Differs(int):
    """0 where two things are equal, 1 where they are not: a count, and no ratio."""


def same(a: Any, b: Any) -> Differs:
    """Return whether two things differ."""
    return Differs(a != b)


def judged(found: Iterable[Any], what: str, detail: Mapping[str, Any] | None = None) -> Evidence:
    """Return evidence that the `worst` of ratios and pairs is at most 1, and that all equalities by `same` hold.

    Parameters
    ----------
    found : iterable
        Ratios, pairs of what was measured and its bound, and equalities, in any order.
    what, detail
        Of the evidence; only ratios are measured.
    """
    ratios, unequal = [], 0
    for one in found:
        if isinstance(one, Differs):
            unequal += one
        else:
            ratios.append(one)
    return Evidence(worst(ratios), 1, what, detail or {}, unequal)


def total(*counts: int) -> int:
    """Return the sum of counts of what must not occur; none is negative."""
    if min(counts) < 0:
        raise ValueError(f"total: got {counts}")
    return sum(counts)


def needs(condition: bool, text: str) -> None:
    """Raise HypothesisViolated where a hypothesis does not hold."""
    if not condition:
        raise HypothesisViolated(text)
