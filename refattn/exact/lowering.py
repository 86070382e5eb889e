"""Operators that are another operator's call: masks written out, and choices made exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dropout import drawn
from ..errors import InvalidProblem
from ..masks import WRITTEN, both
from ..problem import Problem
from ..rules import Rule
from ..rules.atoms import labelled
from ..rules.lists import listed
from ..scales import dequantised
from ..variants import Lowered, Selected, Shape, variant_of
from .choosing import Sight, choose, choosers, keys_of
from .heads import Head
from .tiles import NARROW

__all__ = ["Lowering", "core_of", "lower"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Lowering:
    """The call that is evaluated, and each row's margin where keys were chosen by scores, (b, h_q, n_q)."""

    problem: Problem
    margins: Float | None = None


def lower(problem: Problem, shape: Shape | None = None) -> Lowering:
    """Return the call that an operator is another way of writing: itself for a definition of rows or steps.

    Parameters
    ----------
    problem : Problem
        The call.
    shape : Shape, optional
        Another definition than the operator's own.

    Raises
    ------
    InvalidProblem, UnsupportedProblem
        The call does not fit its operator.
    """
    if (plain := drawn(dequantised(problem.with_bias()))) is not problem:
        return lower(plain, shape)
    variant = variant_of(problem.variant)
    settings, shape = variant.settings(problem), shape or variant.shape
    if isinstance(shape, Lowered):
        p = problem.to("numpy")
        core = shape.lower(p, SimpleNamespace(**settings))
        kept = ("query", "key", "value")
        if not isinstance(core, Problem) or any(getattr(core, n) is not getattr(p, n) for n in kept):
            raise InvalidProblem("lower: must return a Problem with the call's own query, key and value")
        if core.variant == problem.variant:
            raise InvalidProblem(f"lower: must return another operator's call, got {core.variant} again")
        small = isinstance(core.allowed, Rule) and core.n_q * core.n_k <= WRITTEN
        return lower(core.written_out() if small else core)
    return _selected(problem, shape) if isinstance(shape, Selected) else Lowering(problem)


def core_of(problem: Problem, shape: Selected) -> Problem:
    """Return the call that an operator which chooses keys is where all are chosen."""
    own, core = variant_of(problem.variant).settings(problem), variant_of(shape.core)
    return problem.replace(variant=core.name, options={n: own[n] for n in core.options if n in own})


def _selected(problem: Problem, shape: Selected) -> Lowering:
    p = problem.to("numpy")
    full = (*p.out_shape[:3], p.n_k)
    margins, long = np.full(full[:3], np.inf), p.n_q * p.n_k > WRITTEN and p.cu_seqlens_q is None
    taken: _Written | _Listed | _Labelled | None = None
    for ones in choosers(p, shape):
        sight = Sight(ones[0], shape)
        if taken is None:
            taken = _kind(sight, long)(p, sight)
        margin = choose(ones, shape, sight, partial(taken.put, ones, sight))
        for one in ones:
            margins[one.batch, one.head, one.rows] = margin
    core = core_of(p, shape)
    return Lowering(core.replace(allowed=np.zeros(full, bool) if taken is None else taken.allowed()), margins)


def _kind(sight: Sight, long: bool) -> type[_Written | _Listed | _Labelled]:
    """Return how choices are kept: written out in short calls, as tiles where candidates are wide, else as lists."""
    if not long or sight.runs is None or not sight.runs.apart:
        return _Written
    return _Labelled if sight.runs.sizes.max(initial=0) >= NARROW else _Listed


class _Written:
    """Choices as booleans of all pairs."""

    def __init__(self, p: Problem, sight: Sight) -> None:
        self.seen = np.zeros((*p.out_shape[:3], p.n_k), bool)

    def put(self, ones: tuple[Head, ...], sight: Sight, rows: NDArray[np.intp], taken: Mask) -> None:
        """Keep what some rows of heads take."""
        for one in ones:
            self.seen[one.batch, one.head, one.rows, one.keys][rows] = keys_of(one, sight.c, taken, rows)

    def allowed(self) -> Any:
        """Return the mask."""
        return self.seen


class _Labelled:
    """Choices as booleans of queries and candidates, each of which has keys of its own."""

    def __init__(self, p: Problem, sight: Sight) -> None:
        self.p, self.sight = p, sight
        self.table = np.zeros((*p.out_shape[:3], sight.m + 1), bool)  # the last is of keys that no candidate has

    def put(self, ones: tuple[Head, ...], sight: Sight, rows: NDArray[np.intp], taken: Mask) -> None:
        """Keep what some rows of heads take."""
        for one in ones:
            self.table[one.batch, one.head, rows, :-1] = taken

    def allowed(self) -> Any:
        """Return the rule."""
        runs, labels = self.sight.runs, np.full(self.p.n_k, self.sight.m)
        assert runs is not None
        for i, (a, b) in enumerate(zip(runs.starts.tolist(), runs.ends.tolist(), strict=True)):
            labels[a:b] = i
        return _whole(self.p, self.sight, labelled(self.table, None, labels))


class _Listed:
    """Choices as lists of candidates, each of which has keys of its own."""

    def __init__(self, p: Problem, sight: Sight) -> None:
        must = 0 if sight.c.must is None else int(sight.c.must.sum(1).max(initial=0))
        self.p, self.sight = p, sight
        self.lists = np.full((*p.out_shape[:3], min(sight.c.count + must, sight.m)), -1, np.int32)

    def put(self, ones: tuple[Head, ...], sight: Sight, rows: NDArray[np.intp], taken: Mask) -> None:
        """Keep what some rows of heads take."""
        row, at = np.nonzero(taken)
        place = np.arange(len(row)) - np.searchsorted(row, row)
        for one in ones:
            self.lists[one.batch, one.head, rows[row], place] = at

    def allowed(self) -> Any:
        """Return the rule."""
        runs = self.sight.runs
        assert runs is not None
        return _whole(self.p, self.sight, listed(self.lists, runs.starts, runs.ends, self.p.n_k))


def _whole(p: Problem, sight: Sight, chosen: Rule) -> Any:
    return both(p.allowed, chosen if sight.c.kept is None else chosen | sight.c.kept)
