"""What a kernel is compared with: the exact answer, what is allowed, what is predicted; made once for each case."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...exact.driver import Answer, enclose, evaluate
from ...exact.stream import STREAMED
from ...problem import Problem
from ...variants import variant_of
from ..inputs.families import Case
from ..model import Model
from .choices import Either, either
from .forward import forward
from .gradients import gradient_bounds
from .predict import predict

__all__ = ["Expected", "exact", "expected", "forget", "of_answer", "of_case"]

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
    return of_answer(exact(problem, dout), model, dout)


def of_answer(answer: Answer, model: Model, dout: Any = None) -> Expected:
    """Return what to compare a call with whose exact answer is there."""
    allowed, variance = forward(answer, model)
    if dout is None:
        return Expected(answer, allowed, variance, either(answer, model))
    limit = gradient_bounds(answer, model, dout, allowed)
    known = variant_of(answer.call.variant).fused == STREAMED
    return Expected(answer, limit, predict(answer, model, dout, variance) if known else {})


KEPT = 2**28
"""Bytes of large calls' answers that are kept."""
_KEPT: OrderedDict[Any, Expected] = OrderedDict()


def of_case(case: Case, dtype: str, model: Model, backward: bool) -> Expected:
    """Return what is expected of a case, of the rows that are compared, made once; of large calls the last few."""
    if not case.sampled:
        return _of_case(case, dtype, model, backward)
    name = (case, dtype, model, backward)
    if name not in _KEPT:
        _KEPT[name] = _of_case.__wrapped__(case, dtype, model, backward)
        while len(_KEPT) > 1 and sum(map(_bytes, _KEPT.values())) > KEPT:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(name)
    return _KEPT[name]


def forget() -> None:
    """Drop what is kept, for those who measure."""
    _KEPT.clear()
    _of_case.cache_clear()
    _answer_kept.cache_clear()


@lru_cache(maxsize=4096)
def _of_case(case: Case, dtype: str, model: Model, backward: bool) -> Expected:
    return of_answer(_answer(case, dtype, backward), model, _arriving(case, dtype) if backward else None)


@lru_cache(maxsize=4096)
def _answer_kept(case: Case, dtype: str, backward: bool) -> Answer:
    return exact(case.problem(dtype), case.arriving(dtype) if backward else None)


def _answer(case: Case, dtype: str, backward: bool) -> Answer:
    if not case.sampled:
        return _answer_kept(case, dtype, backward)
    problem = case.problem(dtype)
    sample = case.sample(problem)
    dout = _arriving(case, dtype) if backward else None
    return enclose(problem if sample is None else sample.of(problem), gradients=dout)


def _arriving(case: Case, dtype: str) -> Any:
    sample, dout = case.sample(case.problem(dtype)), case.arriving(dtype)
    return dout if sample is None else sample.take("dq", dout)


def _bytes(x: Expected) -> int:
    arrays = [*x.allowed.values(), *x.variance.values(), *x.answer.call.arrays().values()]
    arrays += [a for e in x.answer.enclosures.values() for a in (e.mid, e.tail, e.radius)]
    return sum(int(np.asarray(a).nbytes) for a in arrays)
