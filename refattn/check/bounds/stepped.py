"""Bounds of recurrences: the arithmetic of losses run token by token, as a kernel that carries its state runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...exact.arithmetics import Floats
from ...exact.heads import Head, gate_of, matrix_of, rows_of
from ...exact.steps import by_steps
from ...variants import Steps, variant_of
from ..model import C, Model
from .cumulated import steps_lost
from .followed import Followed, own_losses
from .losses import Losses, Lossy, variance_of
from .nodes import Node
from .operands import Operands
from .pieces import chunks_of

__all__ = ["at_once", "stepped"]

Float = NDArray[np.float64]


def stepped(one: Head, shape: Steps, model: Model) -> tuple[tuple[Float, Float], tuple[Float, Float]]:
    """Return the largest errors and the variances of one head's out and last state, their own roundings apart.

    Out is (n_q, d_v), the state (d_k, d_v), its matrices one below the other where it has several.

    Parameters
    ----------
    one : Head
        The head.
    shape : Steps
        The recurrence.
    model : Model
        The kernel's rounding model; its accumulator is the state's type.
    """
    f, lost = Losses(model, 1), Operands.of(one, model)
    o = one.options(f)
    state, spans, variances = [f.leaf(x, ("d", "v")) for x in one.start(shape.held)], [], []
    by_ratios = model.cumulated and "alpha" in one.gates and not chunks_of(one)
    decays = steps_lost(one, model) if by_ratios else None
    signed = _Signed(one, shape) if shape.linear else None
    with np.errstate(all="ignore"):
        shape.prepare(o)
        common = _taken_out(f, o)
        for t in range(len(one.q)):
            at = slice(t, t + 1)
            q = f.leaf(one.q[at], ("q", "d"), lost.q[at], lost.var_q[at])
            k = f.leaf(one.k[at], ("k", "d"), lost.k[at], lost.var_k[at])
            v = f.leaf(one.v[at], ("k", "v"), lost.v[at], lost.var_v[at])
            vars(o).update({n: gate_of(f, x[at]) for n, x in one.gates.items()}, token=t)
            if decays is not None:
                o.alpha = f.leaf(one.gates["alpha"][at], ("k", "d"), decays[at], C * decays[at] ** 2)
            before = state
            state, out = shape.take(state, q, k, v, o)
            found = [(x.node.span, variance_of(x.node)) for x in (out, *state)]
            if signed is not None:
                found = signed.step(t, [x.node for x in before], [x.node for x in (out, *state)])
            (span, variance), *own = found
            spans.append(np.broadcast_to(span, out.shape))
            variances.append(np.broadcast_to(variance, out.shape))
            state = [
                f.leaf(x.a, ("d", "v"), lost_state, var_state)  # without the graph behind it
                for x, (lost_state, var_state) in zip(state, own, strict=True)
            ]
            if signed is not None:
                signed.follow(state)
        moved = _moved(one, shape, common)
    none = np.zeros((0, one.v.shape[1]))  # there may be no token
    last = [np.broadcast_to(x, y.shape) for y in state[: one.problem.state_parts] for x in (y.node.span, y.node.var)]
    return (
        (np.concatenate([none, *spans]), np.concatenate([none, *variances]) + moved[0]),
        (np.concatenate(last[::2]), np.concatenate(last[1::2]) + moved[1]),
    )


def at_once(one: Head, model: Model) -> list[tuple[Float, Float]]:
    """Return the largest errors and the variances of out where a form takes all tokens together; else nothing.

    They are taken on from each product to the next: such a form solves for what tokens add, and rows are no sums of
    their own.
    """
    form = rows_of(one) if variant_of(one.problem.variant).rows is not None else None
    if form is None or not form.together or not len(one.q):
        return []
    f, lost = Losses(model, len(one.k)), Operands.of(one, model)
    q = f.leaf(one.q, ("q", "d"), lost.q, lost.var_q)
    k, v = f.leaf(one.k, ("k", "d"), lost.k, lost.var_k), f.leaf(one.v, ("k", "v"), lost.v, lost.var_v)
    with np.errstate(all="ignore"):
        out, _ = form.define(q, k, v, one.options(f))
        return [(np.nan_to_num(out.node.span, nan=np.inf), np.nan_to_num(variance_of(out.node)))]


class _Signed:
    """What each token's own losses have become by later steps, followed with their signs.

    A step of a linear recurrence takes a state's error E to M E, a matrix (d_k, d_k) times it, and to c E in out; of
    several matrices E has one below the other, and M is as many times as wide. The error after token t is the sum over
    tokens s of M_t .. M_(s+1) times the loss of s, at most the sum of the sizes.
    """

    def __init__(self, one: Head, shape: Steps) -> None:
        self.one, self.shape, self.f = one, shape, Floats()
        self.o, self.d, parts = one.options(self.f), one.q.shape[1], len(one.start(shape.held))
        shape.prepare(self.o)
        rows = self.d * parts
        self.unit = [matrix_of(self.f, x) for x in np.split(np.eye(rows), parts)]
        self.zero = matrix_of(self.f, np.zeros((1, rows)))
        self.followed = Followed(rows, one.v.shape[1])

    def step(self, t: int, before: list[Node], made: list[Node]) -> list[tuple[Float, Float]]:
        """Return the largest errors and variances of a token's out and of the state after it, that before included."""
        at, f = slice(t, t + 1), self.f
        vars(self.o).update({n: matrix_of(f, x[at]) for n, x in self.one.gates.items()}, token=t)
        q, k = (matrix_of(f, x[at]) for x in (self.one.q, self.one.k))
        moves, reads = self.shape.take(self.unit, q, k, self.zero, self.o)
        out, *lost = own_losses(before, made)
        met = self.followed.met(reads.a)
        own = [np.concatenate([np.broadcast_to(x[i], (self.d, x[i].shape[1])) for x in lost]) for i in range(2)]
        after = self.followed.step(np.concatenate([x.a for x in moves]), *own)
        parts = len(self.unit)
        states = zip(*(np.split(x, parts) for x in after), strict=True)
        return [(out[0] + met[0], out[1] + met[1]), *states]

    def follow(self, state: list[Lossy]) -> None:
        """Let each matrix of a state know what a number times its error is at most."""
        for i, x in enumerate(state):
            x.node.follow(partial(self._largest, i))

    def _largest(self, i: int, by: Float) -> Float:
        wide = np.zeros((len(by), self.d * len(self.unit)))
        wide[:, i * self.d : (i + 1) * self.d] = by
        return self.followed.largest(wide)


def _taken_out(f: Losses, o: Any) -> dict[str, Float]:
    """Take the variances of what was prepared once for all tokens off the options, and return those numbers moved.

    One error is then in every token's step: it adds up, where errors of their own would not.
    """
    found = {}
    for n, x in list(vars(o).items()):
        if isinstance(x, Lossy) and (var := np.broadcast_to(variance_of(x.node), x.shape)).any():
            found[n] = x.a + np.sqrt(var)
            setattr(o, n, f.leaf(x.a, x.node.axes, x.node.span))
    return found


def _moved(one: Head, shape: Steps, common: dict[str, Float]) -> tuple[Float, Float]:
    """Return the squares of how far out and the last state go with each common number a standard deviation off."""
    out, state = _plain(one, shape, {})
    squares = np.zeros_like(out), np.zeros_like(state)
    for n, x in common.items():
        for to, a, b in zip(squares, _plain(one, shape, {n: x}), (out, state), strict=True):
            to += np.square(a - b)
    return squares


def _plain(one: Head, shape: Steps, change: dict[str, Float]) -> tuple[Float, Float]:
    """Return out and the last state in float64, with some of what is prepared replaced."""
    f = Floats()

    def prepare(o: Any) -> None:
        shape.prepare(o)
        for n, x in change.items():
            setattr(o, n, matrix_of(f, x))

    found = by_steps(one, f, replace(shape, prepare=prepare), None)
    return found["out"], found["state"]
