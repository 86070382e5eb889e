"""Bounds of a linear recurrence that a kernel takes token by token or by chunks, forward and backward.

A piece is a token, or a chunk of a form that leaves its state (``Rows.cuts``). What each piece loses by itself is
followed through the later ones, of gradients through the earlier ones, with its signs (``followed.py``). Of a chunk
this goes on inside: what errors of the states do to a token's gradients is what they do by the definition's own step,
from where they stand at that token, and not what the sizes of all numbers of the chunk make of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidInput
from ...exact.arithmetics import Floats
from ...exact.heads import Head, matrix_of
from ...exact.tape import Tape, gradients
from ...variants import Rows, Steps, variant_of
from ..model import Model, flash
from .cumulated import ratios_lost
from .followed import Followed, own_losses
from .losses import Losses
from .operands import Operands

__all__ = ["chunks_of", "gradients_of", "ways_of"]

Float = NDArray[np.float64]
BLOCK = 64
"""Tokens from one kept state to the next."""
EXACT = flash("float64")
"""Next to nothing is lost: what is left are the errors that are put in."""


def chunks_of(one: Head) -> list[Rows]:
    """Return the forms by chunks of a head's operator where it is a linear recurrence."""
    v = variant_of(one.problem.variant)
    linear = isinstance(v.shape, Steps) and v.shape.linear
    return [x for x in v.forms.values() if isinstance(x, Rows) and x.cuts] if linear else []


def ways_of(one: Head, model: Model) -> list[Pieces]:
    """Return how a kernel may take the head of a linear recurrence by chunks: none where it is no such operator."""
    shape, forms = variant_of(one.problem.variant).shape, chunks_of(one)
    trace = Trace(one, shape) if forms and isinstance(shape, Steps) else None
    found = []
    for x in forms:
        sizes = sorted({*x.cuts, model.cumulated or x.cuts[0]})
        # one chunk of all tokens is the same whatever its size, but for how it has decays
        some = [n for n in sizes if n in (sizes[0], model.cumulated) or max(m for m in sizes if m < n) < len(one.q)]
        found += [Pieces(trace, x, model, n) for n in some if trace is not None]
    return found


def gradients_of(
    ways: list[Pieces], dout: Float, lost_dout: Any, of_state: Float | None
) -> dict[str, tuple[Float, Float]]:
    """Return the sizes and the largest errors of gradients, by tokens or by chunks, in all but their own roundings.

    Parameters
    ----------
    ways : list of Pieces
        What :func:`ways_of` returned, at least one.
    dout : (n_q, d_v) array
        The gradient arriving at out.
    lost_dout : array
        What it loses before it is multiplied.
    of_state : (d_k, d_v) array or None
        The gradient arriving at the last state.
    """
    trace, model = ways[0].trace, ways[0].model
    tokens = Pieces(trace, trace.shape, model)
    found, _ = tokens.backward(dout, lost_dout, of_state, tokens.forward(keep=True)[2])
    own, before, after = [], [], []
    for way in ways:
        before.append(way.forward(keep=True)[2])
        lost, errors = way.backward(dout, lost_dout, of_state, before[-1])
        own.append(lost)
        after.append(errors)
    errors = [np.maximum.reduce([np.asarray(x) for x in each]) for each in (before, after)]
    moved, _ = Pieces(trace, trace.shape, EXACT).backward(dout, 0.0, of_state, *map(list, errors))
    for n, (size, error) in found.items():
        by_chunks = np.maximum.reduce([x[n][1] for x in own]) + (moved[n][1] if n != "dstate" else 0.0)
        found[n] = size, np.maximum(error, by_chunks)
    return found


class Trace:
    """A head of a linear recurrence in float64: states, and what each token reads of the one before and moves it by.

    One state in ``BLOCK`` is kept; those between, and what tokens read and move, are made again where they are asked
    for, a block at a time.

    Attributes
    ----------
    states : sequence of (d_k, d_v) arrays
        Before each token, and after the last.
    reads : sequence of (1, d_k) arrays
    moves : sequence of (d_k, d_k) arrays
    """

    def __init__(self, one: Head, shape: Steps) -> None:
        self.one, self.shape, self.f = one, shape, Floats()
        n, d = one.q.shape
        self._kept = [np.zeros((d, one.v.shape[1])) if one.state is None else one.state]
        self._made: tuple[int, tuple[list[Float], ...]] = (-1, ([], [], []))
        for i in range(n // BLOCK):
            self._kept.append(self._block(i)[0][-1])
        self.states, self.reads, self.moves = Again(self, 0, n + 1), Again(self, 1, n), Again(self, 2, n)

    def token(self, kind: int, t: int) -> Float:
        """Return the state before a token (0), what it reads of it (1), or what it moves it by (2)."""
        return self._block(t // BLOCK)[kind][t % BLOCK]

    def _block(self, i: int) -> tuple[list[Float], ...]:
        """Return the states, reads and moves of a block of tokens; the latest one's are kept."""
        if self._made[0] != i:
            states, reads, moves = [self._kept[i]], [], []
            part, d = _part(self.one, slice(BLOCK * i, min(BLOCK * (i + 1), len(self.one.q)))), self.one.q.shape[1]
            o = part.options(self.f)
            self.shape.prepare(o)
            unit, zero = matrix_of(self.f, np.eye(d)), matrix_of(self.f, np.zeros((1, d)))
            with np.errstate(all="ignore"):
                for t, ((q, k, v), gates) in enumerate(part.tokens(self.f), BLOCK * i):
                    vars(o).update(gates, token=t)
                    states.append(self.shape.step(matrix_of(self.f, states[-1]), q, k, v, o)[0].a)
                    move, read = self.shape.step(unit, q, k, zero, o)
                    moves.append(move.a)
                    reads.append(read.a)
            self._made = i, (states, reads, moves)
        return self._made[1]

    def along(self, at: slice) -> list[Float]:
        """Return by token of a chunk the product of the moves before it, and that of all."""
        found = [np.eye(self.one.q.shape[1])]
        for move in self.moves[at]:
            found.append(move @ found[-1])
        return found

    def back(self, at: slice) -> list[Float]:
        """Return by token of a chunk what a gradient is multiplied with on its way back to the state after it."""
        found = [np.eye(self.one.q.shape[1])]
        for move in reversed(self.moves[at][1:]):
            found.append(move.T @ found[-1])
        return found[::-1]


class Again(Sequence[Float]):
    """What a trace makes again where it is asked for, one of a kind for each token."""

    def __init__(self, trace: Trace, kind: int, n: int) -> None:
        self.trace, self.kind, self.n = trace, kind, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self.trace.token(self.kind, t) for t in range(*at.indices(self.n))]
        return self.trace.token(self.kind, range(self.n)[at])


@dataclass(frozen=True)
class Piece:
    """One piece over the arithmetic of losses: its operands, out of its rows and the state after it."""

    leaves: dict[str, Any]
    out: Any
    last: Any


class Pieces:
    """One head of a linear recurrence in pieces.

    Parameters
    ----------
    trace : Trace
        The head.
    shape : Steps or Rows
        The definition's own step, or a form that goes by chunks.
    model : Model
        The kernel's rounding model.
    size : int
        How many tokens a piece has; 1 of a step.
    """

    def __init__(self, trace: Trace, shape: Steps | Rows, model: Model, size: int = 1) -> None:
        self.trace, self.one, self.shape, self.model, self.size = trace, trace.one, shape, model, size
        self.state, n = trace.states[0].shape, len(trace.one.q)
        self.cuts = [slice(i, min(i + size, n)) for i in range(0, n, size)]
        self.lost = Operands.of(self.one, model)
        cumulated = size == model.cumulated and "alpha" in self.one.gates
        self.ratios = ratios_lost(self.one, model) if cumulated else None

    def _run(self, f: Losses, at: slice, state: Any, wrap: Any = lambda x: x) -> Piece:
        """Run one piece over the arithmetic of losses from a state."""
        part = _part(self.one, at)
        o = part.options(f, wrap=wrap)
        leaves = {}
        for name, x, axes in (("q", part.q, ("q", "d")), ("k", part.k, ("k", "d")), ("v", part.v, ("k", "v"))):
            off, var = (getattr(self.lost, n + name)[at] for n in ("", "var_"))
            var = np.zeros_like(var) if name == "q" and isinstance(self.shape, Rows) else var  # see _of_queries
            leaves[name] = wrap(f.leaf(x, axes, off, var))
        if self.ratios is not None:
            f.ratios = self.ratios[at].max(1, keepdims=True)
        leaves |= {n: getattr(o, n) for n in self.one.gates}
        o.state = state
        if isinstance(self.shape, Rows):
            out, _ = self.shape.define(leaves["q"], leaves["k"], leaves["v"], o, size=self.size)
            if "last" not in vars(o):
                raise InvalidInput(
                    f"{part.problem.variant}: has a form with cuts={self.shape.cuts} that leaves no state; set o.last "
                    "to the state after the last token, or leave cuts out"
                )
            return Piece(leaves, out, o.last)
        self.shape.prepare(o)
        o.token = at.start
        last, out = self.shape.step(state, leaves["q"], leaves["k"], leaves["v"], o)
        return Piece(leaves, out, last)

    def forward(self, keep: bool = False) -> tuple[tuple[Float, Float], tuple[Float, Float], list[Float]]:
        """Return errors and variances of out and of the last state, their roundings apart, and errors before tokens.

        Out is (n_q, d_v), a state (d_k, d_v); of the states before each token only the largest errors are returned,
        and these only where they are to be kept.
        """
        followed, zero = Followed(*self.state), np.zeros(self.state)
        error, var, found, before = zero, zero, [(np.zeros((0, self.state[1])),) * 2], []
        for at in self.cuts:
            f, along = Losses(self.model, at.stop - at.start), self.trace.along(at)
            before += [error, *(followed.largest(by) for by in along[1:-1])] if keep else []
            reads = np.concatenate([r @ by for r, by in zip(self.trace.reads[at], along[:-1], strict=True)])
            with np.errstate(all="ignore"):
                start = f.leaf(self.trace.states[at.start], ("d", "v"), error, var)
                start.node.follow(followed.largest)
                piece = self._run(f, at, start)
                (own, spread), (lost, scatter) = own_losses([start.node], [piece.out.node, piece.last.node])
                met, met_var = followed.met(reads)
                found.append((own + met, spread + met_var))
                error, var = followed.step(along[-1], lost, scatter)
        out, of_out = (np.concatenate(x) for x in zip(*found, strict=True))
        return (out, of_out + self._of_queries()), (error, var), before

    def _of_queries(self) -> Any:
        """Return the variance of out by what queries lose: a form reads them twice, and both meet again."""
        if isinstance(self.shape, Steps) or not self.lost.var_q.any():
            return 0.0
        scale, states = float(self.one.plain().scale), self.trace.states
        return np.concatenate([scale**2 * x[None] @ states[t + 1] ** 2 for t, x in enumerate(self.lost.var_q)])

    def backward(
        self, dout: Float, lost_dout: Any, of_state: Float | None, before: list[Float], after: list[Float] | None = None
    ) -> tuple[dict[str, tuple[Float, Float]], list[Float]]:
        """Return the sizes and errors of the gradients, and the errors of that by the state after each token.

        Those of a chunk are its own losses alone: the errors of the states before and after are taken off.

        Parameters
        ----------
        dout, lost_dout, of_state
            As :func:`gradients_of` takes them.
        before : list of (d_k, d_v) arrays
            What the state before each token may be off by.
        after : list of (d_k, d_v) arrays, optional
            What the gradient by the state after each token may be off by, where it is not followed.
        """
        followed, error = Followed(*self.state), np.zeros(self.state)
        arriving, found = error if of_state is None else of_state, []
        errors: list[Float] = []
        lost_dout = np.broadcast_to(lost_dout, dout.shape)
        for at in reversed(self.cuts):
            f, back = Losses(self.model, at.stop - at.start, chance=False), self.trace.back(at)
            error = error if after is None else after[at.start]
            errors += [error, *(followed.largest(by) for by in back[-2::-1])]  # the last token's first
            with np.errstate(all="ignore"):
                start = Tape(f.leaf(self.trace.states[at.start], ("d", "v"), before[at.start]))
                start.value.node.follow(partial(_sizes, before[at.start]))
                piece = self._run(f, at, start, Tape)
                seeds = [f.leaf(dout[at], ("q", "v"), lost_dout[at]), f.leaf(arriving, ("d", "v"), error)]
                seeds[1].node.follow(followed.largest if after is None else partial(_sizes, error))
                *grads, of_start = gradients([piece.out, piece.last], seeds, [*piece.leaves.values(), start])
                if after is None:
                    ((lost, _),) = own_losses([seeds[1].node], [of_start.node])
                    error, _ = followed.step(self.trace.moves[at.start].T @ back[0], lost, np.zeros(()))
                taken = [start.value.node, seeds[1].node] if self.size > 1 else []
                own = own_losses(taken, [g.node for g in grads])
            found.append([(np.abs(g.a), x) for g, (x, _) in zip(grads, own, strict=True)])
            arriving = of_start.a
        return self._joined(found[::-1]) | {"dstate": (np.abs(arriving), _known(error))}, errors[::-1]

    def _joined(self, found: list[list[tuple[Float, Float]]]) -> dict[str, tuple[Float, Float]]:
        """Return by gradient what was found by piece, one after another."""
        wide = {"q": self.one.q, "k": self.one.k, "v": self.one.v} | self.one.gates
        joined = {}
        for i, (n, x) in enumerate(wide.items()):
            none = np.zeros((0, x.shape[1]))
            size, error = (np.concatenate([none, *(piece[i][j] for piece in found)]) for j in range(2))
            joined[f"d{n}"] = size, _known(error)
        return joined


def _sizes(error: Float, by: Float) -> Float:
    """Return what a matrix times a state may be off by, where its numbers' largest errors are known alone."""
    return np.asarray(np.abs(by) @ error)


def _known(x: Float) -> Float:
    return np.asarray(np.nan_to_num(x, nan=np.inf))


def _part(one: Head, at: slice) -> Head:
    """Return some of a head's tokens, which start from a state of their own."""
    n, start = at.stop - at.start, one.rows.start
    rows = slice(start + at.start, start + at.stop)
    return replace(
        one, rows=rows, keys=slice(one.keys.start + at.start, one.keys.start + at.stop), q=one.q[at], k=one.k[at],
        v=one.v[at], values=one.values[at], live=one.live[at], spoilt=one.spoilt[at],
        allowed=np.tril(np.ones((n, n), bool)), gates={g: x[at] for g, x in one.gates.items()}, state=None,
    )  # fmt: skip
