"""What a kernel is compared with: the exact answer, what is allowed, what is predicted; made once for each case."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...exact.driver import Answer, evaluate
from ...exact.stream import STREAMED
from ...problem import Problem
from ...variants import variant_of
from ..inputs.families import Case
from ..model import Model
from .choices import Either, either
from .forward import forward
from .gradients import gradient_bounds
from .predict import predict

__all__ = ["Expected", "exact", "expected", "of_case"]

Float = NDArray[np.float64]
LARGE = 2**14


@dataclass(frozen=True)
class Expected:
    """The exact answer of a call, and by array the allowed errors and the predicted variances (where there are any)."""

    answer: Answer
    allowed: dict[str, Float]
    variance: dict[str, Float]
    either: Either | None = None

    def for_result(self, got: dict[str, Any]) -> Expected:
        """Return what to compare a kernel's result with: each row by the choice that it is nearest to."""
        if self.either is None:
            return self
        wide = {n: np.asarray(x).astype(np.float64) for n, x in got.items()}
        return Expected(*self.either.nearest(wide, self.answer, self.allowed, self.variance), self.either)


def exact(problem: Problem, dout: Any = None) -> Answer:
    """Return the exact answer, its enclosures far narrower than any bound."""
    large = problem.n_q * problem.n_k > LARGE
    # faster than balls where no gradient needs an exact decision, or where there are many scores
    rounding = "float64" if dout is None or large else None
    return replace(evaluate(problem, gradients=dout, rounding=rounding), balls={})


def expected(problem: Problem, model: Model, dout: Any = None) -> Expected:
    """Return what to compare a call with: out and lse, or with an arriving gradient its gradients."""
    return _with(exact(problem, dout), model, dout)


def _with(answer: Answer, model: Model, dout: Any) -> Expected:
    allowed, variance = forward(answer, model)
    if dout is None:
        return Expected(answer, allowed, variance, either(answer, model))
    limit = gradient_bounds(answer, model, dout, allowed)
    known = variant_of(answer.call.variant).fused == STREAMED
    return Expected(answer, limit, predict(answer, model, dout, variance) if known else {})


@lru_cache(maxsize=4096)
def of_case(case: Case, dtype: str, model: Model, backward: bool) -> Expected:
    """Return what is expected of a case, made once."""
    return _with(_answer(case, dtype, backward), model, case.arriving(dtype) if backward else None)


@lru_cache(maxsize=4096)
def _answer(case: Case, dtype: str, backward: bool) -> Answer:
    return exact(case.problem(dtype), case.arriving(dtype) if backward else None)
