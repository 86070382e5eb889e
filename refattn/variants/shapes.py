"""The four shapes that a definition can have: every operator is one of them, over any arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import VARIANT, Problem
from ..rules import Rule

__all__ = ["Choices", "Lowered", "Rows", "Selected", "Shape", "Steps", "hidden_by_head", "parted"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Rows:
    """One head's rows: ``define(q, k, v, o) -> (out, lse or None)``.

    Attributes
    ----------
    define : callable
        Over an arithmetic's matrices q (n_q, d_k), k (n_k, d_k), v (n_k, d_v) and the options o.
    together : bool
        Whether a row's output depends on other rows' queries: then a head is never taken in tiles of rows.
    cuts : tuple of int
        Of a form of a recurrence that goes by chunks: how long those of kernels are. The form takes its own as
        ``size`` and leaves the state after the last token as ``o.last``, so that bounds follow what a chunk loses
        through the later ones.
    """

    define: Callable[..., Any]
    together: bool = False
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lowered:
    """Another operator's call: ``lower(problem, o) -> Problem`` with the same tensors, such as a mask or weights more.

    Attributes
    ----------
    lower : callable
        Takes the call and its options (a namespace of the operator's own, defaults filled in).
    """

    lower: Callable[..., Problem]

    def changed(self, **change: Any) -> Lowered:
        """Return it with other arguments after the options: a mistake, say."""
        return replace(self, lower=partial(self.lower, **change))


@dataclass(frozen=True)
class Choices:
    """What a row may choose among.

    Where candidates are nearly as many as keys, write them as numbers of keys and rules: then no call is too long.

    Attributes
    ----------
    members : (m, n_k) bool array or (n_k,) integer array
        Which keys each candidate stands for; or whose each key is, -1 for none, a candidate's keys being neighbours.
    may : (n_q, m) bool array or Rule
        Which candidates a row chooses from; as a rule of queries and candidates, these in place of keys.
    must : (n_q, m) bool array, optional
        Which it takes besides, whatever their scores.
    count : int
        How many it chooses; all of `may` where there are no more.
    seen : (n_q, m) bool array, optional
        Which candidates a row's scores look at, where they are a softmax over them; by default `may` and `must`.
    kept : Rule, optional
        Which keys a row takes besides.
    """

    members: NDArray[Any]
    may: Any
    must: Any
    count: int
    seen: Mask | None = None
    kept: Rule | None = None


@dataclass(frozen=True)
class Selected:
    """A core call over what scores choose.

    The scores run in enclosures and the choice is exact: a tie goes to the lower index, recognised in a prime field.

    Attributes
    ----------
    scores : callable
        ``scores(q, k, o) -> (n_q, m)`` over an arithmetic's matrices; `o` has ``members`` (m, n_k) of 0 and 1,
        ``sizes`` (m, 1), the number of keys of each candidate, ``seen`` (n_q, m) of the choices, and ``unseen``
        (n_q, 1), 1 for a row that looks at none.
    choices : callable
        ``choices(n_q, n_k, o) -> Choices``.
    full : mapping
        Options under which everything is chosen, so that the operator is its core.
    together : callable
        ``together(o)`` tells whether the query heads of a key head add up their scores and choose the same. Heads
        from which other keys are hidden are then refused: no source says among which keys they would choose.
    alone : bool
        Whether a candidate's score depends on its own keys only: of scores that lie close, only those are made again.
    core : str
        The operator that is evaluated, its ``allowed`` the choice; it is given those of the options that it has.
    """

    scores: Callable[..., Any]
    choices: Callable[..., Choices]
    full: Any
    together: Callable[[Any], bool] = lambda o: False
    alone: bool = False
    core: str = VARIANT

    def changed(self, scores: Callable[..., Any] | None = None, **change: Any) -> Selected:
        """Return it with other scores, and other arguments of choices after the options: a mistake, say."""
        return replace(self, scores=scores or self.scores, choices=partial(self.choices, **change))


@dataclass(frozen=True)
class Steps:
    """A recurrence with an explicit state: ``step(state, q, k, v, o) -> (state, out)``, one token after another.

    The call's gates are read as ``o.alpha`` (1, 1 or d_k), ``o.beta`` and ``o.eta`` (1, 1) of the token, None where it
    has none, and the token's number in its sequence as ``o.token``.

    Attributes
    ----------
    step : callable
        Over an arithmetic's matrices: state (d_k, d_v), q and k (1, d_k), v (1, d_v), out (1, d_v).
    prepare : callable
        ``prepare(o)`` sets on the options what does not change from token to token.
    linear : bool
        Whether a step is a matrix (d_k, d_k) times the state and something that does not depend on it: then bounds
        follow a token's losses through later steps with their signs, where errors of a delta rule die out.
    held : int
        How many matrices (d_k, d_v) a step carries besides, with which no call begins or ends: zeros before the first
        token.

    A state of several matrices, with a momentum or what is held, is a tuple of them. The state before the first token
    is the call's ``state``, or zeros. Bounds of gradients need a form of all tokens at once among the operator's
    ``forms``; of an operator with a momentum it leaves the state after the last token as ``o.last``.
    """

    step: Callable[..., Any]
    prepare: Callable[[Any], None] = lambda o: None
    linear: bool = False
    held: int = 0

    def take(self, state: list[Any], q: Any, k: Any, v: Any, o: Any) -> tuple[list[Any], Any]:
        """Take in a token, the state's matrices as a list."""
        if len(state) == 1:
            only, out = self.step(state[0], q, k, v, o)
            return [only], out
        found, out = self.step(tuple(state), q, k, v, o)
        return list(found), out


Shape = Rows | Lowered | Selected | Steps


def hidden_by_head(p: Problem) -> list[str]:
    """Return the arguments that may hide other keys from one query head than from another."""
    given = {n: getattr(p, n) for n in ("allowed", "bias", "weight")}
    return [n for n, x in given.items() if x is not None and (isinstance(x, Rule) or x.shape[1] > 1)]


def parted(p: Problem, one: int, other: int) -> str:
    """Return why two query heads of a key head cannot choose together: they do not see the same keys."""
    return (
        f"{' and '.join(hidden_by_head(p))}: query heads {one} and {other} choose the same keys, expected none that "
        "one of them sees and the other does not; hide the same keys from both, or give each a key head of its own"
    )
