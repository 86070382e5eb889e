r"""Gradients of the tables that a call's term looks up: what is exact, and what a right kernel may be off by.

A table's element T_e is in the numbers B of the term (``refattn.rules.terms``), and these are added to scores, so

    dT_e = \sum_bhij dB_bhij (\partial B_bhij / \partial T_e)

over the exact dB, whose factors are numbers of the call. What is allowed is what dB's elements may be off by, times
the sizes of the factors, and the additions of a sum in the accumulator's type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import kind_of, to_float64, to_numpy
from ..errors import InvalidInput, MismatchError, expect
from ..problem import Problem
from ..rules import Term
from .bounds.expected import expected
from .model import Model, flash, inside_type

__all__ = ["Table", "assert_tables", "table_gradients"]

Float = NDArray[np.float64]
U = 2.0**-53


@dataclass(frozen=True)
class Table:
    """The gradient of one table.

    Attributes
    ----------
    value : float64 array
        Of the table's shape, ``term.tables()``: its exact gradient, but for `radius`.
    radius : float64 array
        What `value` is off by, at most.
    allowed : float64 array
        What a right kernel's gradient is off from the exact one, at most.
    """

    value: Float
    radius: Float
    allowed: Float


def table_gradients(problem: Problem, dout: Any, model: Model | None = None) -> dict[str, Table]:
    """Return the gradients of the tables of a call's term, by the names of ``problem.bias.tables()``.

    Parameters
    ----------
    problem : Problem
        A call with a term in `bias`.
    dout : (b, h_q, n_q, d_v) array
        The gradient that arrives at out.
    model : Model, optional
        How the kernel rounds; by default a flash kernel's. Tables' gradients are added in its accumulator's type.

    Raises
    ------
    InvalidInput
        No Problem, or one without a term; arrays that do not fit.
    """
    expect(isinstance(problem, Problem), "problem", problem, "a Problem")
    term = problem.bias
    expect(isinstance(term, Term), "problem: bias", term, "a term of refattn.rules.terms, whose tables have gradients")
    expect(isinstance(model, Model | None), "model", model, "a Model, such as refattn.check.model.flash('float16')")
    model = flash(problem.out_type) if model is None else model
    known = expected(problem.to("numpy").with_bias(), model, to_numpy(dout, "dout"))
    exact, sizes = known.answer.enclosures["dbias"], (problem.n_q, problem.n_k)
    whole = np.abs(exact.mid) + np.abs(exact.tail)
    values = term.gradients(exact.mid, *sizes)
    most = term.gradients(whole, *sizes, of="sizes")
    spread = term.gradients(exact.radius + np.abs(exact.tail), *sizes, of="sizes")
    lost = term.gradients(known.allowed["dbias"], *sizes, of="sizes")
    many = term.gradients(whole, *sizes, of="count")
    inside, found = inside_type(model.accumulator).unit_roundoff, {}
    for name, value in values.items():
        factors = 8  # roundings of the factors of a summand, of which terms have few
        radius = spread[name] + (many[name] + factors) * U * most[name]
        depth = model.depth(many[name]) + factors
        found[name] = Table(value, radius, lost[name] + depth * inside * most[name])
    return found


def assert_tables(gradients: Mapping[str, Any], problem: Problem, dout: Any, *, model: Model | None = None) -> None:
    """Raise where gradients of a term's tables are further from the exact ones than their arithmetic must lose.

    Parameters
    ----------
    gradients : mapping
        From names of ``problem.bias.tables()``, all or some, to arrays of their shapes.
    problem, dout, model
        As in :func:`table_gradients`.

    Raises
    ------
    MismatchError
        The worst element of the first table that is wrong.
    InvalidInput
        As :func:`table_gradients`; a name that the term has not, or an array of another shape.
    """
    expect(isinstance(gradients, Mapping) and len(gradients) > 0, "gradients", gradients, "arrays by name")
    known = table_gradients(problem, dout, model)
    for name, given in gradients.items():
        if name not in known:
            raise InvalidInput(f"gradients: got {name!r}, expected some of {', '.join(known) or 'none: no table'}")
        if kind_of(given) is None or tuple(given.shape) != known[name].value.shape:
            got = tuple(getattr(given, "shape", ())) or type(given).__name__
            raise InvalidInput(f"gradients: {name} is {got}, expected an array of shape {known[name].value.shape}")
        _compare(name, to_float64(to_numpy(given, name)), known[name])


def _compare(name: str, got: Float, table: Table) -> None:
    limit = table.allowed + table.radius
    with np.errstate(divide="ignore", invalid="ignore"):
        off = np.abs(got - table.value)
        ratio = np.where(off == 0, 0.0, off / limit)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    at = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    if ratio[at] > 1:
        where = ", ".join(map(str, map(int, at)))
        raise MismatchError(
            f"{name}[{where}]: got {got[at]:g}, exact {table.value[at]:g}, allowed {limit[at]:g}; "
            f"{int((ratio > 1).sum())} of {ratio.size} elements are wrong"
        )
