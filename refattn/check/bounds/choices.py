"""Rows whose choice a kernel's own rounding can turn: they are judged by every choice that it may make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, islice
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...exact.answer import Answer
from ...exact.choosing import candidates, choosers, keys_of, scores_of
from ...exact.driver import evaluate
from ...exact.enclosure import Enclosure
from ...exact.heads import Head
from ...exact.levels import Level
from ...problem import Problem
from ...rules import Rule, View
from ...rules.atoms import changed
from ...variants import Choices, Selected, variant_of
from ..model import Model
from .forward import forward
from .losses import Losses
from .operands import Operands

__all__ = ["Either", "either", "score_errors"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
MOST = 64
"""Choices of one row that are tried; a row with more of them is judged by these."""


@dataclass(frozen=True)
class Either:
    """The answers of a call under other choices than the exact one.

    Attributes
    ----------
    rows : (b, h_q, n_q) integer array
        How many other choices a kernel may make in each row.
    answers : tuple of (Answer, bounds, variances)
        The first other choice of all rows that have one, the second, and so on.
    """

    rows: NDArray[np.int64]
    answers: tuple[tuple[Answer, dict[str, Float], dict[str, Float]], ...]

    def nearest(
        self, got: dict[str, Float], answer: Answer, allowed: dict[str, Float], variance: dict[str, Float]
    ) -> tuple[Answer, dict[str, Float], dict[str, Float]]:
        """Return the exact answer, bounds and variances with each row by the choice that a kernel's row is nearest to.

        Parameters
        ----------
        got : dict
            The kernel's "out" and, where it returns one, "lse", as float64.
        answer, allowed, variance
            By the exact choice.
        """
        found = {n: Enclosure(*(x.copy() for x in (e.mid, e.tail, e.radius))) for n, e in answer.enclosures.items()}
        allowed, variance = ({n: x.copy() for n, x in y.items()} for y in (allowed, variance))
        best = _distance(got, answer, allowed)
        for i, (other, limit, spread) in enumerate(self.answers):
            ratio = _distance(got, other, limit)
            nearer = (self.rows > i) & (ratio < best)
            best = np.where(nearer, ratio, best)
            for n in set(found) & set(limit):
                for part in ("mid", "tail", "radius"):
                    getattr(found[n], part)[nearer] = getattr(other.enclosures[n], part)[nearer]
                allowed[n][nearer] = limit[n][nearer]
                if n in variance and n in spread:
                    variance[n][nearer] = spread[n][nearer]
        return replace(answer, enclosures=found), allowed, variance


def _distance(got: dict[str, Float], answer: Answer, limit: dict[str, Float]) -> Float:
    """Return by row how far what was returned is from an answer, in units of what is allowed: out and lse together."""
    worst = np.zeros(answer.call.out_shape[:3])
    for name in set(got) & set(limit):
        with np.errstate(all="ignore"):
            error = answer.enclosures[name].error(got[name])
            ratio = np.where(error == 0, 0.0, error / limit[name])
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        worst = np.maximum(worst, ratio.max(-1, initial=0.0) if ratio.ndim == 4 else ratio)
    return worst


def either(answer: Answer, model: Model) -> Either | None:
    """Return what else a kernel of a model may choose; None where its rounding can turn no choice.

    Parameters
    ----------
    answer : Answer
        Of an operator of the shape ``Selected``.
    model : Model
        How the kernel rounds: its scores are off by what the arithmetic of losses says of their text.
    """
    shape, core = variant_of(answer.problem.variant).shape, answer.core
    if not isinstance(shape, Selected) or core is None:
        return None
    rows = np.zeros(answer.problem.out_shape[:3], np.int64)
    others: list[dict[tuple[int, int, int], Mask]] = []
    for ones in choosers(answer.problem, shape):
        c = candidates(ones[0], shape)
        for i, choices in _unsure(ones, shape, c, model):
            for one in ones:
                at = (one.batch, one.head, one.rows.start + i)
                exact = _row(core, at)
                masks = [keys_of(one, c, c.must[i] | taken, i) for taken in choices]
                masks = [m for m in masks if (m != exact).any()]
                rows[at] = len(masks)
                for k, mask in enumerate(masks):
                    if k == len(others):
                        others.append({})
                    others[k][at] = mask
    if not others:
        return None
    found = []
    for rest in others:
        other = evaluate(core.replace(allowed=_changed(core, rest)), rounding="float64")
        found.append((other, *forward(other, model)))
    return Either(rows, tuple(found))


def _row(core: Problem, at: tuple[int, int, int]) -> Mask:
    """Return which keys a row of a call may see by its ``allowed``."""
    if isinstance(core.allowed, Rule):
        return np.asarray(View.of(core.allowed, core.n_q, core.n_k, *at[:2])[at[2]])
    return np.asarray(core.allowed[at])


def _changed(core: Problem, rows: dict[tuple[int, int, int], Mask]) -> Any:
    """Return ``allowed`` with other masks for some rows."""
    if isinstance(core.allowed, Rule):
        return changed(core.allowed, core.out_shape[:3], rows)
    found = np.array(core.allowed, copy=True)
    for at, mask in rows.items():
        found[at] = mask
    return found


def score_errors(ones: tuple[Head, ...], shape: Selected, c: Choices, model: Model) -> tuple[Float, Float]:
    """Return the scores by which heads choose, (n_q, m), and what a kernel's own may be off by."""
    f = Losses(model, len(ones[0].k))
    given = []
    for one in ones:
        lost = Operands.of(one, model)
        given.append((f.leaf(one.q, ("q", "d"), lost.q), f.leaf(one.k, ("k", "d"), lost.k)))
    node: Any = scores_of(ones, shape, c, f, given).node
    s = scores_of(ones, shape, c, Level(1)).h
    e = np.broadcast_to(node.span, s.shape)
    # and they are stored; products over features may leave the range below, which no softmax would notice
    stored = f.u_scores * (np.abs(s) + e) if f.u_scores else 0.0  # a span may be inf
    return s, e + stored + len(ones) * (2 * ones[0].q.shape[1] + 2) * f.floor


def _unsure(ones: tuple[Head, ...], shape: Selected, c: Choices, model: Model) -> list[tuple[int, list[Mask]]]:
    """Return the rows in which errors can turn the choice, each with the choices that it may make."""
    s, e = score_errors(ones, shape, c, model)
    found = []
    for i in np.nonzero(np.any([x.live for x in ones], 0) & (c.may.sum(1) > c.count))[0].tolist():
        at = np.nonzero(c.may[i])[0]
        low, high = s[i, at] - e[i, at], s[i, at] + e[i, at]
        above = (high[None, :] >= low[:, None]).sum(1) - 1  # how many others may be ahead
        surely_above = (low[None, :] > high[:, None]).sum(1)
        sure, out = above < c.count, surely_above >= c.count
        open_ = at[~sure & ~out]
        take = c.count - int(sure.sum())
        if not 0 < take < len(open_) or comb(len(open_), take) < 2:
            continue
        masks = []
        for chosen in islice(combinations(open_, take), MOST):
            mask = np.zeros(len(c.members), bool)
            mask[at[sure]] = True
            mask[list(chosen)] = True
            masks.append(mask)
        found.append((i, masks))
    return found
