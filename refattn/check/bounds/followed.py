r"""Bounds of linear recurrences: each piece's losses, followed through the others with their signs.

A piece is a token, or a chunk of them. To a state it is a matrix: with M
what it multiplies the state before it with, and C what its rows read of that state,

    S' = M S + ...,   out = C S + ...;   backward, with G the gradient by S':   dS = M^T G + C^T dout.

So the error of a state is the sum over pieces of M .. M times the piece's own loss, and the same backward. M shrinks
what it meets: ``I - beta k k^T`` has no singular value above 1 for keys of length 1 and beta up to 2, though the sizes
of its numbers have. A bound that carries sizes on from piece to piece grows exponentially; one that follows each loss
by the matrices themselves does not. A piece's own loss is all that the arithmetic of losses gives, with the state's
whole error in it, less what that error becomes by M or C: products of errors stay in it, so nothing is to first order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...exact.tape import parents_first
from .nodes import Left, Node

__all__ = ["Followed", "own_losses"]

Float = NDArray[np.float64]
ROUND = 2.0**-50
"""What float64 may lose of a bound in taking off a part of it, relative to it."""
KEPT = 64
"""How many pieces' losses have matrices of their own at least; twice as many at most."""


class Followed:
    """Losses of pieces one after another, each with the matrix by which the state has moved since.

    Of pieces long ago the losses of a column of the state are held by one ellipsoid, ``{x: |l·x|² <= l·Q l}`` for all
    l: so memory and the time of a piece stay the same however many there were. To move by M is to take Q to M Q M^T, of
    which nothing is lost. A loss of at most ``own`` in each number is a sum of d segments; that of segments g has the
    ellipsoid ``sum |g| · sum g g^T / |g|``, that of two sums ``(r + s) (Q / r + R / s)`` with r² and s² their traces:
    by Cauchy and Schwarz no l·x is larger, and no other such weights have a smaller trace. Variances add up: theirs are
    exact.

    Parameters
    ----------
    d, width : int
        Rows and columns of the state.
    """

    def __init__(self, d: int, width: int) -> None:
        self.moves = np.zeros((d, 0))  # the pieces' matrices side by side
        self.own, self.var = (np.zeros((0, width)) for _ in range(2))
        self.since = np.eye(d)
        self.old, self.old_var = (np.zeros((width, d, d)) for _ in range(2))

    def largest(self, by: Float) -> Float:
        """Return the largest error of ``by`` times the state."""
        return self._largest(by @ self.moves, by @ self.since)

    def met(self, by: Float) -> tuple[Float, Float]:
        """Return the largest error and the variance of ``by`` times the state."""
        return self._sums(by @ self.moves, by @ self.since)

    def _largest(self, moved: Float, since: Float) -> Float:
        found: Float = np.abs(moved) @ self.own
        return found + np.sqrt(_along(self.old, since)) if self.old.any() else found

    def _sums(self, moved: Float, since: Float) -> tuple[Float, Float]:
        var = moved**2 @ self.var
        return self._largest(moved, since), var + _along(self.old_var, since) if self.old_var.any() else var

    def step(self, by: Float, own: Float, var: Float) -> tuple[Float, Float]:
        """Move all by a piece's matrix, add what the piece loses, and return the state's largest error and variance."""
        shape = len(by), self.own.shape[1]
        self.moves = np.concatenate([by @ self.moves, np.eye(len(by))], 1)
        self.own, self.var = (
            np.concatenate([x, np.broadcast_to(y, shape)]) for x, y in ((self.own, own), (self.var, var))
        )
        self.since = by @ self.since
        found = self._sums(self.moves, self.since)
        if len(self.own) == 2 * KEPT * len(by):
            self._fold()
        return found

    def _fold(self) -> None:
        """Put the older half of the pieces into the ellipsoids."""
        d = len(self.since)
        n = KEPT * d
        segments, own, var = self.moves[:, :n].T, self.own[:n], self.var[:n]  # a row each, for an error of 1
        self.moves, self.own, self.var = self.moves[:, n:], self.own[n:], self.var[n:]
        length = np.sqrt((segments**2).sum(1, keepdims=True))
        unit = np.divide(segments, np.sqrt(length), out=np.zeros_like(segments), where=length > 0)
        new = (own * length).sum(0)[:, None, None] * (unit.T @ (own.T[:, :, None] * unit))
        old = self.since @ self.old @ self.since.T
        r, s = (np.sqrt(np.trace(x, axis1=1, axis2=2))[:, None, None] for x in (old, new))
        self.old = (r + s) * sum(np.divide(x, y, out=np.zeros_like(x), where=y > 0) for x, y in ((old, r), (new, s)))
        room = ROUND * d * np.trace(self.old, axis1=1, axis2=2)  # for what float64 loses in these products
        self.old += room[:, None, None] * np.eye(d)
        self.old_var = self.since @ self.old_var @ self.since.T + segments.T @ (var.T[:, :, None] * segments)
        self.since = np.eye(d)


def _along(shape: Float, rows: Float) -> Float:
    """Return by row l and column l·Q l, of the column's Q."""
    return np.asarray(np.maximum(((rows @ shape) * rows).sum(2).T, 0.0))


def own_losses(sources: list[Node], nodes: list[Node]) -> list[tuple[Float, Float]]:
    """Return by node its largest error and its variance less what of them is the sources' errors taken on."""
    through: dict[int, tuple[Any, Any]] = {}
    variances: dict[int, Any] = {}
    if not sources:
        return [(_at_least_0(n.span, n), np.zeros(n.a.shape)) for n in nodes]
    for n in parents_first(nodes, lambda node: [x.parent for x in node.links]):
        var = n.var
        for x in n.links:
            var = var + x.squares(variances[id(x.parent)])
            if n.cast is not None and isinstance(x, Left):  # rounding the weights, which no later node takes on
                var = var + n.cast[1] @ (x.b * x.b) + (n.cast[2] @ x.b) ** 2
        variances[id(n)] = var
        if any(n is x for x in sources):
            through[id(n)] = n.span, var
            continue
        parts = [(x, through[id(x.parent)]) for x in n.links if id(x.parent) in through]
        if parts:
            signed = _signed(n, sources)
            sizes = sum(x.forward(a - (_signed(x.parent, sources) if x.carried() else 0.0)) for x, (a, _) in parts)
            through[id(n)] = signed + sizes, sum(x.squares(b) for x, (_, b) in parts)
    found = []
    for n in nodes:
        span, var = through.get(id(n), (0.0, 0.0))
        own, rest = n.span - span + ROUND * n.span, variances[id(n)] - var
        found.append((_at_least_0(own, n), _at_least_0(rest, n)))
    return found


def _signed(n: Node, sources: list[Node]) -> Any:
    """Return what the errors of those sources that are followed become in a node at most."""
    return sum((y for state, (_, y) in n.followed.items() if any(state is x for x in sources)), 0.0)


def _at_least_0(x: Any, n: Node) -> Float:
    return np.broadcast_to(np.maximum(x, 0.0), n.a.shape)
