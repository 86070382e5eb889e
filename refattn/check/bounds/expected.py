"""What a kernel is compared with: the exact answer, what is allowed, what is predicted; made once for each case."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FORMATS
from ...errors import UnsupportedProblem
from ...exact.answer import Answer
from ...exact.driver import enclose, evaluate
from ...exact.enclosure import Enclosure
from ...exact.heads import heads
from ...exact.stream import STREAMED
from ...norms import has_norms
from ...problem import Problem
from ...variants import Steps, variant_of
from ..inputs.families import Case
from ..model import Model
from .choices import Either, either
from .forward import forward
from .gradients import gradient_bounds
from .predict import predict
from .truth import made_by

__all__ = [
    "Expected",
    "Key",
    "exact",
    "expected",
    "forget",
    "keep",
    "kept",
    "made",
    "of_answer",
    "of_case",
    "unbounded",
]

Float = NDArray[np.float64]
LARGE = 2**14
MEBIBYTE = 2**20


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
        narrowed, or written after they were turned, their errors are common to all rows, as is that of 1 / (1 - p) at
        the largest weight, and where nothing is narrower than the accumulator all is inner.
        """
        call = self.answer.call
        turned = (call.rotary is not None or has_norms(call)) and self.model.loss(self.model.rotated)
        narrow = self.model.operands or self.model.forward_only or turned or call.dropout_mask is not None
        if narrow or self.either is not None or self.model.loss(dtype) == 0:
            return None
        return lambda: _inner(self)[name]


def exact(problem: Problem, dout: Any = None, dlse: Any = None) -> Answer:
    """Return the exact answer, its enclosures far narrower than any bound."""
    # faster than balls where no gradient needs an exact decision, or where there are many scores
    rounding = "float64" if dout is None or _large(problem) else None
    name = "dstate_out" if isinstance(variant_of(problem.variant).shape, Steps) else "dlse"
    found = made_by(evaluate, problem, dout, rounding=rounding, **{name: dlse})
    if any((np.isnan(e.mid) & (e.radius > 0)).any() for e in found.enclosures.values()):  # an overflow there
        found = made_by(evaluate, problem, dout, rounding="float64", **{name: dlse})
    return replace(found, balls={})


def _large(problem: Problem) -> bool:
    return problem.n_q * problem.n_k > LARGE


def _quick(problem: Problem, dout: Any) -> Answer | None:
    """Return an answer from one run in certified floating point; None where :func:`exact` is as soon there."""
    definition = variant_of(problem.variant)
    if _large(problem) or (dout is not None and isinstance(definition.shape, Steps)):
        return None
    found = made_by(enclose, problem, dout, level=3 if problem.dtype == "float64" else 2)
    if dout is None or definition.fused != STREAMED:
        return found
    hidden = np.ones((*problem.key.shape[:3], 1), bool)
    for one in heads(found.call):
        hidden[one.batch, one.head_kv, one.keys, 0] &= ~np.asarray(one.allowed).any(0)
    enclosures = dict(found.enclosures)
    for n in ("dk", "dv"):  # weighed 0 in every row; the sums that say so have a radius
        e = enclosures[n]
        enclosures[n] = Enclosure(e.mid, e.tail, np.where(hidden & (e.mid == 0) & (e.tail == 0), 0.0, e.radius))
    return replace(found, enclosures=enclosures)


def _narrow(quick: Answer | None, model: Model, dout: Any) -> Expected | None:
    """Return what an answer allows, where no radius takes more than a millionth of it: gradients of 0 may have some."""
    if quick is None:
        return None
    known = of_answer(quick, model, dout)
    for n, allowed in known.allowed.items():
        e = quick.enclosures[n]
        if not ((e.radius == 0) | (e.radius <= allowed * 2.0**-20)).all():  # NaN that is proven has radius 0
            return None
    return known


def expected(problem: Problem, model: Model, dout: Any = None, dlse: Any = None) -> Expected:
    """Return what to compare a call with: out and lse, or with an arriving gradient its gradients; made once."""

    def make() -> Expected:
        quick = _quick(problem, dout) if dlse is None else None
        return _narrow(quick, model, dout) or of_answer(exact(problem, dout, dlse), model, dout, dlse)

    if sum(np.asarray(x).nbytes for x in problem.arrays().values()) > MEBIBYTE:  # it is written out in its key
        return make()
    try:
        definition = variant_of(problem.variant)
        key = (id(definition), model, *map(_content, (*vars(problem).values(), dout, dlse)))
        # with its definition: another could have its id later
        found, _ = _CALLS.get_or_make(key, lambda: (make(), definition), lambda x: _bytes(x[0]))
    except TypeError:  # a rule or an array of another kind has no hash
        return make()
    checked: Expected = found
    return checked


def _content(x: Any) -> Any:
    """Return what is equal where an argument of a call is the same, to the bit."""
    if isinstance(x, np.ndarray):
        return x.dtype, x.shape, x.tobytes()
    if isinstance(x, Mapping):
        return tuple((name, _content(value)) for name, value in x.items())
    return (type(x), repr(x)) if isinstance(x, int | float) else x


def of_answer(answer: Answer, model: Model, dout: Any = None, dlse: Any = None) -> Expected:
    """Return what to compare a call with whose exact answer is there."""
    allowed, variance = forward(answer, model)
    if dout is None:
        return Expected(answer, allowed, variance, model, None, either(answer, model))
    limit = gradient_bounds(answer, model, dout, allowed, dlse)
    call = answer.call
    known = variant_of(call.variant).fused == STREAMED
    return Expected(answer, limit, predict(answer, model, dout, variance, dlse) if known else {}, model, dout)


def _inner(known: Expected) -> dict[str, Float]:
    """Return the bounds of a kernel that rounds neither the weights nor its results to a narrower type."""
    wide = replace(known.model, weights=known.model.accumulator)
    final = FORMATS[known.answer.call.out_type].unit_roundoff

    def without(found: dict[str, Float]) -> dict[str, Float]:
        mid = {n: np.nan_to_num(known.answer.enclosures[n].mid, posinf=0, neginf=0) for n in found}
        return {n: x if n == "lse" else np.maximum(x - final * np.abs(mid[n]), 0.0) for n, x in found.items()}

    limit = without(forward(known.answer, wide)[0])
    return limit if known.dout is None else without(gradient_bounds(known.answer, wide, known.dout, limit))


class UnboundedError(Exception):
    """A model has no bound of a call: that is no word of the kernel's."""


def unbounded(problem: Problem, model: Model) -> str:
    """Return why a model says nothing of a call; "" where it has bounds."""
    try:
        if model.smoothed or model.weights_scale:
            forward(exact(problem), model)
    except UnsupportedProblem as e:
        return str(e)
    return ""


Key = tuple[Case, str, Model, bool]
"""A case, a format, a kernel's model, and whether the gradients are asked for."""
KEPT = 2**28
"""Bytes of what is kept of small cases, of their answers, of large cases, of calls: of each the last so many."""


class _Store(OrderedDict[Any, Any]):
    """What was used last, as many bytes of it as `KEPT`, but one at least."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[Any, int] = {}

    def get_or_make(self, key: Any, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """Return what is kept under a key, else make it and keep it."""
        if key not in self:
            self.put(key, make(), size)
        self.move_to_end(key)
        return self[key]

    def put(self, key: Any, found: Any, size: Callable[[Any], int]) -> None:
        """Keep something, instead of what was not used for the longest time."""
        self[key], self._sizes[key] = found, size(found)
        while len(self) > 1 and sum(self._sizes.values()) > KEPT:
            gone, _ = self.popitem(last=False)
            del self._sizes[gone]

    def clear(self) -> None:
        """Keep nothing."""
        super().clear()
        self._sizes.clear()


_LARGE, _SMALL, _ANSWERS, _CALLS = _Store(), _Store(), _Store(), _Store()


def of_case(case: Case, dtype: str, model: Model, backward: bool) -> Expected:
    """Return what is expected of a case, of the rows that are compared, made once."""
    key = (case, dtype, model, backward)
    found: Expected = (_LARGE if case.sampled else _SMALL).get_or_make(key, lambda: made(*key), _bytes)
    return found


def keep(key: Key, found: Expected) -> None:
    """Have what is expected of a case at hand."""
    (_LARGE if key[0].sampled else _SMALL).put(key, found, _bytes)


def kept(key: Key) -> bool:
    """Tell whether it is at hand."""
    return key in (_LARGE if key[0].sampled else _SMALL)


def bounded(case: Case, dtype: str, model: Model) -> Expected:
    """Return what a case's out and lse are compared with.

    Raises
    ------
    UnboundedError
        The model says nothing of it.
    """
    try:
        return of_case(case, dtype, model, backward=False)
    except UnsupportedProblem as e:
        raise UnboundedError(str(e)) from e


def made(case: Case, dtype: str, model: Model, backward: bool) -> Expected:
    """Return what is expected of a case."""
    if not case.sampled:
        dout = case.arriving(dtype) if backward else None
        key = (case, dtype, backward, "quick")
        quick = _ANSWERS.get_or_make(key, lambda: _quick(case.problem(dtype), dout), lambda x: _held(x) if x else 0)
        if (found := _narrow(quick, model, dout)) is not None:
            return found
    return of_answer(_answer(case, dtype, backward), model, _arriving(case, dtype) if backward else None)


def forget() -> None:
    """Drop what is kept, for those who measure."""
    for store in (_LARGE, _SMALL, _ANSWERS, _CALLS):
        store.clear()


def _answer(case: Case, dtype: str, backward: bool) -> Answer:
    if not case.sampled:
        dout = case.arriving(dtype) if backward else None
        found: Answer = _ANSWERS.get_or_make((case, dtype, backward), lambda: exact(case.problem(dtype), dout), _held)
        return found
    problem = case.problem(dtype)
    sample = case.sample(problem)
    dout = _arriving(case, dtype) if backward else None
    return made_by(enclose, problem if sample is None else sample.of(problem), dout)


def _arriving(case: Case, dtype: str) -> Any:
    sample, dout = case.sample(case.problem(dtype)), case.arriving(dtype)
    return dout if sample is None else sample.take("dq", dout)


def _bytes(x: Expected) -> int:
    return _held(x.answer) + sum(int(np.asarray(a).nbytes) for a in (*x.allowed.values(), *x.variance.values()))


def _held(x: Answer) -> int:
    arrays = [*x.call.arrays().values(), *(a for e in x.enclosures.values() for a in (e.mid, e.tail, e.radius))]
    return sum(int(np.asarray(a).nbytes) for a in arrays)
