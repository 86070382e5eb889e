"""What a kernel is compared with: the exact answer, what is allowed, what is predicted; made once for each case."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FORMATS
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

__all__ = ["Expected", "Key", "exact", "expected", "forget", "keep", "kept", "made", "of_answer", "of_case"]

Float = NDArray[np.float64]
LARGE = 2**14


@dataclass(frozen=True)
class Expected:
    """The exact answer of a call, and by array the allowed errors and the predicted variances (where there are any)."""

    answer: Answer
    allowed: dict[str, Float]
    variance: dict[str, Float]
    model: Model
    dout: Any = None
    either: Either | None = None

    def for_result(self, got: dict[str, Any]) -> Expected:
        """Return what to compare a kernel's result with: each row by the choice that it is nearest to."""
        if self.either is None:
            return self
        wide = {n: np.asarray(x).astype(np.float64) for n, x in got.items()}
        answer, allowed, variance = self.either.nearest(wide, self.answer, self.allowed, self.variance)
        return replace(self, answer=answer, allowed=allowed, variance=variance)

    def inner(self, name: str, dtype: str) -> Callable[[], Float] | None:
        """Return what the accumulator's own roundings may add to an array, which may all go one way; None if unknown.

        Roundings to a narrower type, of the weights and of the result, scatter: half go up. Where operands are
        narrowed their errors are common to all rows, and where nothing is narrower than the accumulator all is inner.
        """
        if self.model.operands or self.either is not None or self.model.loss(dtype) == 0:
            return None
        return lambda: _inner(self)[name]


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
        return Expected(answer, allowed, variance, model, None, either(answer, model))
    limit = gradient_bounds(answer, model, dout, allowed)
    known = variant_of(answer.call.variant).fused == STREAMED
    return Expected(answer, limit, predict(answer, model, dout, variance) if known else {}, model, dout)


def _inner(known: Expected) -> dict[str, Float]:
    """Return the bounds of a kernel that rounds neither the weights nor its results to a narrower type."""
    wide = replace(known.model, weights=known.model.accumulator)
    final = FORMATS[known.answer.call.dtype].unit_roundoff

    def without(found: dict[str, Float]) -> dict[str, Float]:
        mid = {n: np.nan_to_num(known.answer.enclosures[n].mid, posinf=0, neginf=0) for n in found}
        return {n: x if n == "lse" else np.maximum(x - final * np.abs(mid[n]), 0.0) for n, x in found.items()}

    limit = without(forward(known.answer, wide)[0])
    return limit if known.dout is None else without(gradient_bounds(known.answer, wide, known.dout, limit))


Key = tuple[Case, str, Model, bool]
"""A case, a format, a kernel's model, and whether the gradients are asked for."""
KEPT = 2**28
"""Bytes of large calls' answers that are kept."""
MANY = 4096
_LARGE: OrderedDict[Key, Expected] = OrderedDict()
_SMALL: OrderedDict[Key, Expected] = OrderedDict()
_SIZES: dict[Key, int] = {}
"""Bytes of what is kept of large calls."""


def of_case(case: Case, dtype: str, model: Model, backward: bool) -> Expected:
    """Return what is expected of a case, of the rows that are compared, made once; of large calls the last few."""
    key = (case, dtype, model, backward)
    there = _LARGE if case.sampled else _SMALL
    if key not in there:
        keep(key, made(*key))
    there.move_to_end(key)
    return there[key]


def keep(key: Key, found: Expected) -> None:
    """Have what is expected of a case at hand."""
    there = _LARGE if key[0].sampled else _SMALL
    there[key] = found
    if there is _LARGE:
        _SIZES[key] = _bytes(found)
    while len(there) > MANY or (there is _LARGE and len(there) > 1 and sum(_SIZES.values()) > KEPT):
        gone, _ = there.popitem(last=False)
        _SIZES.pop(gone, None)


def kept(key: Key) -> bool:
    """Tell whether it is at hand."""
    return key in (_LARGE if key[0].sampled else _SMALL)


def made(case: Case, dtype: str, model: Model, backward: bool) -> Expected:
    """Return what is expected of a case."""
    return of_answer(_answer(case, dtype, backward), model, _arriving(case, dtype) if backward else None)


def forget() -> None:
    """Drop what is kept, for those who measure."""
    _LARGE.clear()
    _SMALL.clear()
    _SIZES.clear()
    _answer_kept.cache_clear()


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
