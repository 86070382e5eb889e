"""How a kernel carries its gradients: a function attribute ``gradients(problem, dout)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from numpy.typing import NDArray

from ...problem import Problem

__all__ = ["Gradients", "by_name", "with_gradients"]

Gradients = Callable[..., dict[str, NDArray[Any]]]
"""Takes a Problem and the gradient that arrives at out, of out's shape (b, h_q, n_q, d_v) and query's type. Returns
"dq", "dk", "dv" and, where there is a bias that the kernel differentiates, "dbias", each of the shape and type of what
it is by. Raises UnsupportedProblem where the kernel does."""


def with_gradients(gradients: Gradients) -> Callable[[Any], Any]:
    """Return a decorator that gives a kernel its gradients."""

    def attach(kernel: Any) -> Any:
        kernel.gradients = gradients
        return kernel

    return attach


def by_name(problem: Problem, gradients: Iterable[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the gradients by query, key, value and, if it is there, bias by name, each in the type of its tensor."""
    p = problem.to("numpy")
    of = {"dq": p.query, "dk": p.key, "dv": p.value, "dbias": p.bias}
    return {n: g.astype(of[n].dtype, copy=False) for n, g in zip(of, gradients, strict=False)}
