"""What a kernel of a Model would give: the definition's text over an arithmetic that rounds where the Model says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import from_float64, like
from ..dtypes import FORMATS, format_of
from ..errors import UnsupportedProblem, expect
from ..exact.heads import Head, heads, rows_of
from ..exact.lowering import lower
from ..exact.results import specials
from ..problem import Problem
from ..variants import Steps, variant_of
from .bounds.smoothed import mean_of, query_means, smoothed
from .machine import Machine, Machined
from .model import Model

__all__ = ["simulate"]

Float = NDArray[np.float64]
ROWS = 2**19
"""Scores alive at a time."""


def simulate(problem: Problem, model: Model, seed: int = 0) -> Any:
    r"""Return what a kernel of a rounding model would give for a call.

    The operator's definition runs over numbers that are rounded after every operation in the model's types: products
    are added one after another, at most ``model.chain`` before they join the whole sum, or several at once
    (``model.aligned_bits``); exponentials are off by up to ``model.exp_ulps`` unit roundoffs, drawn; weights go by
    tiles of ``model.tile`` keys under a running maximum.

    Parameters
    ----------
    problem : Problem
        The call, of any operator whose rows are given at once.
    model : Model
        How the kernel rounds.
    seed : int
        Of what is drawn: errors of exponentials and, where the model rounds by chance, which way.

    Returns
    -------
    out : array (b, h_q, n_q, d_v)
        Of query's library and of the call's output type.
    lse : array (b, h_q, n_q)
        In ``model.lse``, where the operator has one: (out, lse) is returned then, as a kernel does.

    Raises
    ------
    UnsupportedProblem
        A recurrence; a model with ``split`` or ``from_lse``; a scaled P where weights may be above 1; keys that cannot
        be smoothed.
    """
    expect(isinstance(problem, Problem), "problem", type(problem).__name__, "a Problem")
    expect(isinstance(model, Model), "model", type(model).__name__, "a Model, e.g. refattn.Model()")
    expect(isinstance(seed, int) and seed >= 0, "seed", seed, "an integer of at least 0")
    if isinstance(variant_of(problem.variant).shape, Steps):
        raise UnsupportedProblem(
            f"simulate: {problem.variant} attention goes token by token; its rows are not simulated"
        )
    for name in ("split", "from_lse"):
        if getattr(model, name):
            raise UnsupportedProblem(f"simulate: a model with {name} merges or weighs in ways that are not simulated")
    if model.weights_scale and not (problem.weight is None and problem.dropout_mask is None):
        why = "counts keys" if problem.dropout_mask is None else "divides weights by 1 - dropout_p"
        raise UnsupportedProblem(f"simulate: weights_scale is of weights that are at most 1; the call {why}")
    p = lower(problem).problem.to("numpy")
    variant, rng = variant_of(p.variant), np.random.default_rng(seed)
    found = {"out": np.zeros(p.out_shape)}
    if variant.has_lse:
        found["lse"] = np.full(p.out_shape[:3], -np.inf)
    for one in heads(p):
        live = np.nonzero(one.live)[0]
        size = max(1, ROWS // max(1, one.k.shape[0]))
        for start in range(0, len(live), size):
            _rows(one, live[start : start + size], model, rng, found)
        specials(one, found, None, variant.positive)
    out = like(from_float64(found["out"], p.out_type), problem.query)
    if "lse" not in found:
        return out
    lse = format_of(model.lse).round_array(found["lse"])
    return out, like(from_float64(lse, model.lse), problem.query)


def _rows(one: Head, rows: NDArray[np.intp], model: Model, rng: np.random.Generator, found: dict[str, Float]) -> None:
    """Write what some rows of a head give."""
    f, plain = Machine(model, rng, one.k.shape[0]), one
    if model.smoothed:
        one = _smoothed(f, one, model)
    with np.errstate(all="ignore"):
        out, lse = rows_of(one).define(*f.operands(one, rows), one.options(f, rows))
        y = out.a
        if one.out_scale is not None:
            y = f.rounded(y / one.out_scale)
        at = one.batch, one.head, one.rows.start + rows
        found["out"][at] = f.rounded(y, FORMATS[one.problem.out_type])
        if lse is not None:
            if model.smoothed:
                lse = _put_back(f, lse, plain, rows)
            found["lse"][at] = f.rounded(lse.a, format_of(model.lse))[:, 0]


def _smoothed(f: Machine, one: Head, model: Model) -> Head:
    """Return a head less its means, the mean's product with the keys as a kernel makes it beside the matrix unit."""
    found = smoothed(one)
    if not model.smoothed_queries:
        return found
    mean = f.rounded(query_means(one.q, model.block))
    more = f.rounded(f.plain().product(mean, f.rounded(found.k).T) * float(one.plain(slice(0, 1)).scale))
    return replace(found, q=f.rounded(one.q - mean), bias=more if one.bias is None else f.rounded(one.bias + more))


def _put_back(f: Machine, lse: Any, one: Head, rows: Any) -> Any:
    """Return lse with the mean of the keys put back, which no matrix unit of a narrow type multiplies."""
    mean = f.plain().product(one.q[rows], f.rounded(mean_of(one)).T)
    return lse + Machined(f, f.rounded(mean * float(one.plain(rows).scale)), "column")
