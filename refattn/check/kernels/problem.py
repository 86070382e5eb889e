"""A kernel on one call of the caller's own."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ...arrays import to_numpy
from ...errors import expect
from ...exact.driver import check_arriving
from ...problem import Problem
from ..bounds.expected import expected
from ..call import Function
from ..kernel import Kernel
from ..model import Model, ModelFor
from ..report.report import Report
from ..runner import guarded, judged, judged_gradients
from ..settle import Notes
from . import find

__all__ = ["check_problem"]


def check_problem(
    kernel: Function | Kernel | str,
    problem: Problem,
    label: str,
    *,
    gradients: Any = None,
    model: Model | ModelFor | None = None,
    name: str | None = None,
) -> Report:
    """Check a kernel on one problem of the caller's own.

    Parameters
    ----------
    kernel : callable or str
        As in :func:`check_kernel`, or a name that ``refattn check`` takes.
    problem : Problem
        The call.
    label : str
        What to call the check, at least one character.
    gradients : (b, h_q, n_q, d_v) array, optional
        The gradient arriving at out: checks the gradients, too. Where they cannot be judged the verdict says so.
    model, name
        As in :func:`check_kernel`.

    Raises
    ------
    InvalidInput, InvalidProblem
        What is wrong with an argument; `gradients` of another shape than out, say.
    """
    expect(isinstance(problem, Problem), "problem", problem, "a Problem")
    expect(isinstance(label, str) and label != "", "label", label, "a string, what to call the check")
    if gradients is not None:
        check_arriving(problem, gradients)
    if isinstance(kernel, str):
        kernel = find(kernel)[0].kernel()
    asked, plain = Kernel.of(kernel, model=model, name=name), problem.to("numpy").with_bias()
    chosen, called = asked.model(problem.out_type), asked.call
    lse = asked.declared and asked.capabilities.lse
    notes = Notes()
    name_of = f"{label}[{problem.out_type}]"
    found = guarded(name_of, lambda: judged(called, plain, partial(expected, plain, chosen), chosen, lse, notes))
    checks = [replace(found, either=notes.either)]
    if gradients is not None:
        dout = to_numpy(gradients)
        wanted = asked.capabilities.gradients if asked.declared else frozenset()
        name_of = f"{label}/gradients[{problem.out_type}]"
        exact = partial(expected, plain, chosen, dout)
        checks.append(guarded(name_of, lambda: judged_gradients(called, plain, dout, exact, wanted, Notes())))
    models = {problem.out_type: asdict(chosen)}
    missed = ("gradients",) if checks[-1].verdict == "unsupported" and len(checks) > 1 else ()
    return Report(asked.name, problem.variant, tuple(checks), models=models, unasked=missed)
