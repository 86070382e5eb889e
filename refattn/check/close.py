"""A caller's own results against the exact answer: one call in anybody's test, no kernel to wrap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, kind_of, to_numpy
from ..errors import InvalidInput, MismatchError, expect
from ..exact.driver import enclose
from ..problem import Problem
from .bounds.expected import expected, of_answer
from .call import SOURCES, Result, used
from .compare import Worst, against
from .inputs.sample import Sample, sample_of
from .model import Model, flash
from .report.report import element
from .suspects import suspects

__all__ = ["allowed_error", "assert_close"]


def assert_close(
    out: Any,
    problem: Problem,
    *,
    lse: Any = None,
    gradients: Mapping[str, Any] | None = None,
    dout: Any = None,
    model: Model | None = None,
    seed: int = 0,
) -> None:
    """Raise where a result is further from the exact answer than its arithmetic must lose.

    Parameters
    ----------
    out : (b, h_q, n_q, d_v) array
        Of query's type, or of ``out_dtype``; of NumPy, PyTorch, CuPy or JAX. Of a large call a sample of rows is
        compared, and the rows that differ most from float64.
    problem : Problem
        The call.
    lse : (b, h_q, n_q) array, optional
        Its log-sum-exp.
    gradients : mapping, optional
        From some of "dq", "dk", "dv", "dbias", "dsink" to arrays of their inputs' shapes; all are compared whole.
    dout : (b, h_q, n_q, d_v) array, optional
        The gradient that arrived at out; needed with `gradients`.
    model : Model, optional
        How the kernel rounds; by default a flash kernel's. There is no tolerance to set.
    seed : int
        What draws the sample of rows.

    Raises
    ------
    MismatchError
        The worst element: where it is, what was got, what is exact, what is allowed.
    InvalidInput
        Arrays of other shapes, types or names than the call's; gradients without dout; a call that appends.
    """
    plain, chosen = _call(problem, model)
    expect(isinstance(seed, Integral) and seed >= 0, "seed", seed, "an integer of at least 0")
    if plain.new_key is not None:
        raise InvalidInput(
            "problem: appends, and the caches that a kernel must leave behind are not among the results; use "
            "check_problem, or compare out by refattn.pages.gathered(problem) and the caches with "
            "refattn.pages.appended(problem), both made before the kernel runs"
        )
    if gradients is None and dout is not None:
        raise InvalidInput("dout: belongs to gradients; pass both")
    found = {"out": _array("out", out, plain.out_shape, plain.out_type)}
    if lse is not None:
        found["lse"] = _array("lse", lse, plain.out_shape[:3], None)
    found = used(plain, found)
    some = sample_of(plain, np.random.default_rng(seed))
    _compare(found, plain, chosen, some)
    other = None if some is None else suspects(plain, Result(found["out"], found.get("lse")))
    if other is not None:
        _compare(found, plain, chosen, other)
    if gradients is not None:
        _gradients(gradients, dout, plain, chosen)


def allowed_error(problem: Problem, model: Model | None = None, *, dout: Any = None) -> dict[str, NDArray[np.float64]]:
    """Return the largest error that a right kernel can make, for every element.

    Parameters
    ----------
    problem : Problem
        The call.
    model : Model, optional
        How the kernel rounds; by default a flash kernel's.
    dout : (b, h_q, n_q, d_v) array, optional
        A gradient arriving at out.

    Returns
    -------
    dict
        "out" (b, h_q, n_q, d_v), "lse" (b, h_q, n_q) where the operator has one; with `dout` the gradients instead, of
        their inputs' shapes. In the units of the results.
    """
    plain, chosen = _call(problem, model)
    return expected(plain, chosen, None if dout is None else to_numpy(dout, "dout")).allowed


def _call(problem: Any, model: Any) -> tuple[Problem, Model]:
    """Return a call with NumPy's arrays, and the model that it is judged by."""
    expect(isinstance(problem, Problem), "problem", problem, "a Problem")
    expect(isinstance(model, Model | None), "model", model, "a Model, such as refattn.check.model.flash('bfloat16')")
    return problem.to("numpy").with_bias(), model or flash(problem.out_type)


def _compare(found: dict[str, NDArray[Any]], plain: Problem, model: Model, some: Sample | None) -> None:
    """Raise where results, or some rows of them, are too far from their exact values."""
    asked = plain if some is None else some.of(plain)
    taken = {n: x if some is None else some.take(n, x) for n, x in found.items()}
    known = of_answer(enclose(asked), model).for_result(taken)
    for name, x in taken.items():
        if name not in known.allowed:
            raise InvalidInput(f"{name}: {plain.variant} attention has none")
        worst = against(known, name, x, x.dtype.name)
        if not worst.passed:
            place = worst.place if some is None else some.place(name, worst.place)
            raise MismatchError(_text(worst, place, plain))


def _gradients(gradients: Mapping[str, Any], dout: Any, plain: Problem, model: Model) -> None:
    if dout is None:
        raise InvalidInput("gradients: need dout, the gradient that arrived at out")
    expect(isinstance(gradients, Mapping) and len(gradients) > 0, "gradients", gradients, "arrays by name")
    unknown = [n for n in gradients if n not in SOURCES or getattr(plain, SOURCES[n]) is None]
    if unknown:
        raise InvalidInput(f"gradients: got {unknown[0]!r}, which the call does not have")
    known = expected(plain, model, _array("dout", dout, plain.out_shape, plain.out_type))
    of = {n: getattr(plain, SOURCES[n]) for n in gradients}
    found = {n: _array(n, x, of[n].shape, dtype_name(of[n])) for n, x in gradients.items()}
    for name, x in used(plain, found).items():
        worst = against(known, name, x, dtype_name(of[name]))
        if not worst.passed:
            raise MismatchError(_text(worst, worst.place, plain))


def _array(name: str, x: Any, shape: tuple[int, ...], dtype: str | None) -> NDArray[Any]:
    if kind_of(x) is None:
        raise InvalidInput(f"{name}: got {type(x).__name__}, expected an array of NumPy, PyTorch, CuPy or JAX")
    if tuple(x.shape) != tuple(shape):
        raise InvalidInput(f"{name}: got shape {tuple(x.shape)}, expected {tuple(shape)}")
    if dtype is not None and dtype_name(x) != dtype:
        raise InvalidInput(f"{name}: got dtype {dtype_name(x)}, expected {dtype}")
    return to_numpy(x, name)


def _text(worst: Worst, place: tuple[int, ...], problem: Problem) -> str:
    return f"{element(replace(worst, place=place))}: {'; '.join(worst.symptoms)}\nthe call: {problem!r}"
