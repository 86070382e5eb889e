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
from .graph import Left, Node

__all__ = ["Followed", "own_losses"]

Float = NDArray[np.float64]
ROUND = 2.0**-50
"""What float64 may lose of a bound in taking off a part of it, relative to it."""


class Followed:
    """Losses of pieces one after another, each with the matrix by which the state has moved since.

    Parameters
    ----------
    d, width : int
        Rows and columns of the state.
    """

    def __init__(self, d: int, width: int) -> None:
        self.moves, self.own, self.var = (np.zeros((0, d, n)) for n in (d, width, width))

    def met(self, by: Float) -> tuple[Float, Float]:
        """Return the largest error and the variance of ``by`` times the state."""
        return self._sums(by @ self.moves)

    def _sums(self, moved: Float) -> tuple[Float, Float]:
        found = [
            np.einsum("sij,sjc->ic", x, y, optimize=True) for x, y in ((np.abs(moved), self.own), (moved**2, self.var))
        ]
        return found[0], found[1]

    def step(self, by: Float, own: Float, var: Float) -> tuple[Float, Float]:
        """Move all by a piece's matrix, add what the piece loses, and return the state's largest error and variance."""
        moves = np.concatenate([by @ self.moves, np.eye(len(by))[None]])
        self.moves, own, var = moves, np.broadcast_to(own, self.own.shape[1:]), np.broadcast_to(var, self.own.shape[1:])
        self.own, self.var = (np.concatenate([x, y[None]]) for x, y in ((self.own, own), (self.var, var)))
        return self._sums(moves)


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
            through[id(n)] = sum(x.forward(a) for x, (a, _) in parts), sum(x.squares(b) for x, (_, b) in parts)
    found = []
    for n in nodes:
        span, var = through.get(id(n), (0.0, 0.0))
        own, rest = n.span - span + ROUND * n.span, variances[id(n)] - var
        found.append((_at_least_0(own, n), _at_least_0(rest, n)))
    return found


def _at_least_0(x: Any, n: Node) -> Float:
    return np.broadcast_to(np.maximum(x, 0.0), n.a.shape)
