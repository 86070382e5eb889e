"""Bounds of a linear recurrence that a kernel takes token by token or by chunks, forward and backward.

A piece is a token, or a chunk of a form that leaves its state (``Rows.cuts``). What each piece loses by itself is
followed through the later ones, of gradients through the earlier ones, with its signs (``followed.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...exact.arithmetics import Floats
from ...exact.heads import Head, gate_of, matrix_of
from ...exact.tape import Tape, gradients
from ...variants import Rows, Steps, variant_of
from ..model import C, Model
from .cumulated import steps_lost
from .followed import Followed, own_losses
from .losses import Losses
from .operands import Operands

__all__ = ["Pieces", "of_recurrence"]

Float = NDArray[np.float64]


def of_recurrence(one: Head, model: Model) -> list[Pieces]:
    """Return the ways by which a kernel may take a linear recurrence's head: none where it is no such operator."""
    v = variant_of(one.problem.variant)
    if not isinstance(v.shape, Steps) or not v.shape.linear:
        return []
    forms = [x for x in v.forms.values() if isinstance(x, Rows)]
    return [Pieces(one, x, model, n) for x in forms for n in x.cuts if n == min(x.cuts) or n <= 2 * len(one.q)]


@dataclass(frozen=True)
class Piece:
    """One piece over an arithmetic: its operands, the state before it, out of its rows and the state after it."""

    leaves: dict[str, Any]
    before: Any
    out: Any
    last: Any


class Pieces:
    """One head of a linear recurrence in pieces.

    Parameters
    ----------
    one : Head
        The head.
    shape : Steps or Rows
        The definition's own step, or a form that goes by chunks.
    model : Model
        The kernel's rounding model.
    size : int
        How many tokens a piece has; 1 of a step.
    """

    def __init__(self, one: Head, shape: Steps | Rows, model: Model, size: int = 1) -> None:
        self.one, self.shape, self.model = one, shape, model
        self.d, self.d_v, n = one.q.shape[1], one.v.shape[1], len(one.q)
        self.cuts, self.size = [slice(i, min(i + size, n)) for i in range(0, n, size)], size
        self.lost = Operands.of(one, model)
        gates = model.cumulated and "alpha" in one.gates
        self.lost_alpha = steps_lost(one, model) if gates else None
        self.states, self.linear = self._exactly()

    def _exactly(self) -> tuple[list[Float], list[tuple[Float, Float]]]:
        """Return in float64 the states before each piece, and what each reads of it and moves it by."""
        f, d = Floats(), self.d
        zero = np.zeros((d, self.d_v))
        states, linear = [zero if self.one.state is None else self.one.state], []
        unit = replace(self.one, v=np.zeros((len(self.one.k), d)))
        for at in self.cuts:
            states.append(self._run(self.one, f, at, matrix_of(f, states[-1])).last.a)
            moved = self._run(unit, f, at, matrix_of(f, np.eye(d)))
            linear.append((np.broadcast_to(moved.out.a, (at.stop - at.start, d)), moved.last.a))
        return states, linear

    def _run(self, one: Head, f: Any, at: slice, state: Any, wrap: Any = lambda x: x) -> Piece:
        """Run one piece over an arithmetic from a state."""
        part = _part(one, at)
        o = part.options(f, wrap=wrap)
        lossy = isinstance(f, Losses)
        leaves = {}
        for name, x, axes in (("q", part.q, ("q", "d")), ("k", part.k, ("k", "d")), ("v", part.v, ("k", "v"))):
            off, var = (getattr(self.lost, n + name)[at] for n in ("", "var_"))
            var = np.zeros_like(var) if name == "q" and isinstance(self.shape, Rows) else var  # see _of_queries
            leaves[name] = wrap(f.leaf(x, axes, off, var) if lossy else matrix_of(f, x))
        if lossy and self.lost_alpha is not None:
            off, axes = self.lost_alpha[at], gate_of(f, part.gates["alpha"]).node.axes
            o.alpha = wrap(f.leaf(part.gates["alpha"], axes, off, C * off**2))
        leaves |= {n: getattr(o, n) for n in one.gates}
        o.state = state
        if isinstance(self.shape, Rows):
            out, _ = self.shape.define(leaves["q"], leaves["k"], leaves["v"], o, size=self.size)
            return Piece(leaves, state, out, o.last)
        self.shape.prepare(o)
        last, out = self.shape.step(state, leaves["q"], leaves["k"], leaves["v"], o)
        return Piece(leaves, state, out, last)

    def forward(self) -> tuple[tuple[Float, Float], tuple[Float, Float], list[Float]]:
        """Return errors and variances of out and of the last state, their roundings apart, and by piece those before.

        Out is (n_q, d_v), a state (d_k, d_v); of the states before each piece only the largest errors are returned.
        """
        followed, zero = Followed(self.d, self.d_v), np.zeros((self.d, self.d_v))
        error, var, found, before = zero, zero, [(np.zeros((0, self.d_v)),) * 2], []
        for at, state, (reads, moves) in zip(self.cuts, self.states[:-1], self.linear, strict=True):
            f = Losses(self.model, at.stop - at.start)
            before.append(error)
            with np.errstate(all="ignore"):
                piece = self._run(self.one, f, at, f.leaf(state, ("d", "v"), error, var))
                (own, spread), (lost, scatter) = own_losses(piece.before.node, [piece.out.node, piece.last.node])
                met, met_var = followed.met(reads)
                found.append((own + met, spread + met_var))
                error, var = followed.step(moves, lost, scatter)
        out, of_out = (np.concatenate(x) for x in zip(*found, strict=True))
        return (out, of_out + self._of_queries()), (error, var), before

    def _of_queries(self) -> Any:
        """Return the variance of out by what queries lose: a form reads them twice, and both meet again."""
        if isinstance(self.shape, Steps) or not self.lost.var_q.any():
            return 0.0
        shape = variant_of(self.one.problem.variant).shape
        assert isinstance(shape, Steps)
        by_token = Pieces(self.one, shape, self.model)
        scale = float(self.one.plain().scale)
        rows = [scale**2 * x[None] @ s**2 for x, s in zip(self.lost.var_q, by_token.states[1:], strict=True)]
        return np.concatenate([np.zeros((0, self.d_v)), *rows])

    def backward(
        self, dout: Float, lost_dout: Any, of_state: Float | None, before: list[Float]
    ) -> dict[str, tuple[Float, Float]]:
        """Return the sizes and the largest errors of the gradients, in all but the results' own roundings.

        Parameters
        ----------
        dout : (n_q, d_v) array
            The gradient arriving at out.
        lost_dout : array
            What it loses before it is multiplied.
        of_state : (d_k, d_v) array or None
            The gradient arriving at the last state.
        before : list of (d_k, d_v) arrays
            What the state before each piece may be off by.
        """
        zero = np.zeros((self.d, self.d_v))
        followed, error, arriving = Followed(self.d, self.d_v), zero, zero if of_state is None else of_state
        parts: dict[str, list[tuple[Float, Float]]] = {n: [] for n in ("q", "k", "v", *self.one.gates)}
        lost_dout = np.broadcast_to(lost_dout, dout.shape)
        for i in reversed(range(len(self.cuts))):
            at = self.cuts[i]
            f = Losses(self.model, at.stop - at.start)
            with np.errstate(all="ignore"):
                state = Tape(f.leaf(self.states[i], ("d", "v"), before[i]))
                piece = self._run(self.one, f, at, state, Tape)
                seeds = [f.leaf(dout[at], ("q", "v"), lost_dout[at]), f.leaf(arriving, ("d", "v"), error)]
                *grads, back = gradients([piece.out, piece.last], seeds, [*piece.leaves.values(), state])
                ((own, _),) = own_losses(seeds[1].node, [back.node])
                error, _ = followed.step(self.linear[i][1].T, own, np.zeros(()))
            for n, g in zip(parts, grads, strict=True):
                parts[n].append((np.abs(g.a), np.broadcast_to(g.node.span, g.a.shape)))
            arriving = back.a
        none = {n: np.zeros((0, x.shape[1])) for n, x in self._operands().items()}
        found = {}
        for n, pairs in parts.items():
            sizes, errors = (np.concatenate([none[n], *(x[i] for x in reversed(pairs))]) for i in range(2))
            found[f"d{n}"] = sizes, np.nan_to_num(errors, nan=np.inf)
        return found | {"dstate": (np.abs(arriving), np.nan_to_num(np.broadcast_to(error, zero.shape), nan=np.inf))}

    def _operands(self) -> dict[str, Float]:
        return {"q": self.one.q, "k": self.one.k, "v": self.one.v} | self.one.gates


def _part(one: Head, at: slice) -> Head:
    """Return some of a head's tokens, which start from a state of their own."""
    n, start = at.stop - at.start, one.rows.start
    rows = slice(start + at.start, start + at.stop)
    return replace(
        one, rows=rows, keys=slice(one.keys.start + at.start, one.keys.start + at.stop), q=one.q[at], k=one.k[at],
        v=one.v[at], values=one.values[at], live=one.live[at], spoilt=one.spoilt[at],
        allowed=np.tril(np.ones((n, n), bool)), gates={g: x[at] for g, x in one.gates.items()}, state=None,
    )  # fmt: skip
