"""The graph of losses' matrices, and how the error of one moves the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedProblem
from ...exact.anywhere import beside
from ...exact.tape import parents_first

__all__ = ["Inverted", "Left", "Link", "Node", "Right", "Scaled", "Summed", "Turned", "in_order"]

Float = NDArray[np.float64]


class Node:
    """A matrix and what making it may lose.

    Attributes
    ----------
    a : (n, m) float64 array
        Its value.
    axes : tuple of two str
        What its rows and columns are: "q" queries, "k" keys, "d" features, "v" value columns, "1" one for all.
    err, var : arrays that spread over `a`
        Largest loss of the operation that made it, and its variance.
    span : array
        Largest error, its parents' included.
    links : tuple of Link
        Its parents.
    curve : tuple of two arrays, optional
        Of a function: how far its value moves at most, by all of its argument's error; and how far from its tangent.
    cast : tuple of three arrays, optional
        Of a product with values: what rounding the weights to their own type loses at most, its variance, its mean.
    amplify : (n, 1) array, optional
        Of a mean: its denominator over the least that the denominator can be.
    log : array, optional
        Of what cannot be negative: the largest error of its logarithm.
    relative : (n, 1) array
        Of a product or sum: its own largest error over the sum of the terms' sizes.
    under : tuple of two arrays
        Of a product with values: what underflow costs where the weights are divided first, and its variance.
    followed : dict of array and array, by node
        Of what is made from a state whose error is followed (:meth:`follow`): the matrix that takes the state's error
        to this node's, and what that is at most. It is part of the span.
    """

    __slots__ = (
        "a", "amplify", "axes", "cast", "curve", "direct", "err", "flow", "followed", "links", "log", "marks", "met",
        "relative", "seen", "span", "spread", "under", "uses", "var",
    )  # fmt: skip

    def __init__(
        self,
        a: Float,
        axes: tuple[str, str],
        err: Any,
        var: Any,
        *links: Link,
        marks: Any = (),
        curve: tuple[Float, Float] | None = None,
    ) -> None:
        self.a, self.axes, self.links, self.marks = a, axes, links, frozenset(marks)
        self.err, self.var, self.curve = err, var, curve
        self.seen: Any = next((x.parent.seen for x in links if x.parent.seen is not None), None)
        self.met: Callable[[Float], Float] | None = None
        self.followed: dict[Node, tuple[Float, Float]] = {}
        if curve is None:
            self._follow_parents()
            self.span: Any = err + sum(x.forward(x.rest) for x in links) + sum(y for _, y in self.followed.values())
        else:
            self.span = err + curve[0]
        self.cast: tuple[Any, Any, Any] | None = None
        self.amplify: Any = None
        self.log: Any = None
        self.relative: Any = 0.0
        self.under: Any = (0.0, 0.0)
        self.uses, self.spread, self.direct = 0, False, True
        self.flow: tuple[Any, Any] = (0.0, 0.0)

    def follow(self, met: Callable[[Float], Float]) -> None:
        """Make this a state whose error is followed: `met` says what a matrix times it may be off by at most."""
        unit = np.eye(len(self.a))
        self.met, self.followed, self.span = met, {self: (unit, met(unit))}, met(unit)

    def _follow_parents(self) -> None:
        """Add up what the parents' matrices become here: errors of one state that meet again keep their signs."""
        moves: dict[Node, Float] = {}
        for x in self.links:
            for state, by in x.carried().items():
                moves[state] = moves[state] + by if state in moves else by
        for state, by in moves.items():
            assert state.met is not None
            self.followed[state] = by, state.met(by)

    @property
    def by_column(self) -> bool:
        """Tell whether column c of the output depends on column c alone."""
        return self.axes[1] == "v"

    def above(self, other: Node) -> bool:
        """Tell whether another node is made from this one."""
        return any(node is self for node in in_order([other])[:-1])

    @property
    def lossy(self) -> bool:
        """Tell whether anything is lost on the way to it."""
        return bool(np.any(self.span)) or bool(np.any(self.var))


@dataclass(frozen=True)
class Link:
    """How a parent's error moves its child."""

    parent: Node

    def forward(self, x: Any) -> Any:
        """Take largest errors of the parent to the child."""
        raise NotImplementedError

    def squares(self, x: Any) -> Any:
        """Take variances of the parent to the child."""
        raise NotImplementedError

    def pull(self, child: Node, g: Float) -> Float:
        """Take the child's adjoint to the parent."""
        raise NotImplementedError

    def turn(self) -> Callable[[Float], Float] | None:
        """Return what the link multiplies rows with from the left, as a function of these; None if it does not."""
        return None

    def carried(self) -> dict[Node, Float]:
        """Return what the parent's matrices of states whose errors are followed become in the child."""
        if not self.parent.followed or (turn := self.turn()) is None:
            return {}
        return {n: turn(move) for n, (move, _) in self.parent.followed.items()}

    @property
    def rest(self) -> Any:
        """What the parent's error is but for what is carried on with its signs."""
        if not self.parent.followed or self.turn() is None:
            return self.parent.span
        return np.maximum(self.parent.span - sum(y for _, y in self.parent.followed.values()), 0.0)

    @property
    def spreads(self) -> bool:
        """Tell whether one number of the parent enters many of the child, whose errors may meet again."""
        return False


@dataclass(frozen=True)
class Scaled(Link):
    """Elementwise: the child moves by slope times the parent's error."""

    slope: Any
    shape: tuple[int, ...]

    def forward(self, x: Any) -> Any:
        """Take largest errors on."""
        return _times(np.abs(self.slope), x)

    def squares(self, x: Any) -> Any:
        """Take variances on."""
        return _times(np.square(self.slope), x)

    def pull(self, child: Node, g: Float) -> Float:
        """Take the adjoint back: columns that the parent has but once are summed."""
        g = g * _there(self.slope, g)
        if child.by_column and not self.parent.by_column:
            return g.T.copy()[:, :, None]
        one = self.parent.a.shape[1] == 1 and g.shape[-1] != 1
        return g.sum(-1, keepdims=True) if one and not child.by_column else g

    def turn(self) -> Callable[[Float], Float] | None:
        """Return a product with a number for each row, where all columns have the same."""
        slope = np.atleast_2d(self.slope)
        column = slope[:, :1]
        return None if self.parent.a.shape != self.shape or (slope != column).any() else lambda x: column * x

    @property
    def spreads(self) -> bool:
        """Tell whether the parent is a column or a row of its child."""
        return self.parent.a.shape != self.shape


@dataclass(frozen=True)
class Left(Link):
    """The left operand of a matrix product."""

    b: Float

    def forward(self, x: Any) -> Any:
        """Take largest errors on."""
        return _product(x, np.abs(self.b), self.parent.a.shape)

    def squares(self, x: Any) -> Any:
        """Take variances on."""
        return _product(x, self.b * self.b, self.parent.a.shape)

    def pull(self, child: Node, g: Float) -> Float:
        """Take the adjoint back."""
        b = _there(self.b, g)
        back: Float = g.T[:, :, None] * b.T[:, None, :] if child.by_column else g @ b.T
        return back

    @property
    def spreads(self) -> bool:
        """Features of a query enter all its scores."""
        return self.parent.axes == ("q", "d")


@dataclass(frozen=True)
class Right(Link):
    """The right operand of a matrix product: keys or values, the same for every row."""

    left: Float

    def forward(self, x: Any) -> Any:
        """Take largest errors on."""
        return _product_right(np.abs(self.left), x, self.parent.a.shape)

    def squares(self, x: Any) -> Any:
        """Take variances on."""
        return _product_right(self.left * self.left, x, self.parent.a.shape)

    def turn(self) -> Callable[[Float], Float] | None:
        """Return the product with the left operand."""
        return lambda x: self.left @ x

    def pull(self, child: Node, g: Float) -> Float:
        """Refuse: losses of keys and values are taken on, not back."""
        raise UnsupportedProblem("bounds: a definition must multiply by keys and values from the right, each once")


@dataclass(frozen=True)
class Turned(Link):
    """The transpose."""

    def forward(self, x: Any) -> Any:
        """Take largest errors on."""
        return np.asarray(x).T

    squares = forward

    def pull(self, child: Node, g: Float) -> Float:
        """Refuse: rows of the output must stay rows."""
        raise UnsupportedProblem("bounds: a definition must not transpose what depends on the queries")


@dataclass(frozen=True)
class Inverted(Link):
    """The matrix a of (I - a)^-1, which moves by y da y to first order."""

    y: Float

    def forward(self, x: Any) -> Any:
        """Take largest errors on."""
        return _product(_product_right(np.abs(self.y), x, self.parent.a.shape), np.abs(self.y), self.y.shape)

    def squares(self, x: Any) -> Any:
        """Take variances on."""
        return _product(_product_right(self.y**2, x, self.parent.a.shape), self.y**2, self.y.shape)

    def pull(self, child: Node, g: Float) -> Float:
        """Refuse: it is made of keys, whose losses are taken on."""
        raise UnsupportedProblem("bounds: a definition must not invert what depends on the queries")


@dataclass(frozen=True)
class Summed(Link):
    """The sum of each row."""

    def forward(self, x: Any) -> Any:
        """Take largest errors on."""
        return np.broadcast_to(x, self.parent.a.shape).sum(1, keepdims=True)

    squares = forward

    def pull(self, child: Node, g: Float) -> Float:
        """Take the adjoint back."""
        return np.broadcast_to(g, (*g.shape[:2], self.parent.a.shape[1]))


def _there(x: Any, g: Any) -> Any:
    """Return an array where an adjoint is."""
    return beside(g, x) if isinstance(x, np.ndarray) else x


def _times(slope: Any, x: Any) -> Any:
    with np.errstate(all="ignore"):
        return np.where(np.equal(x, 0), 0.0, slope * x)


def _product(x: Any, b: Float, shape: tuple[int, ...]) -> Any:
    return np.broadcast_to(x, shape) @ b if np.any(x) else 0.0


def _product_right(a: Float, x: Any, shape: tuple[int, ...]) -> Any:
    return a @ np.broadcast_to(x, shape) if np.any(x) else 0.0


def in_order(outputs: list[Node]) -> list[Node]:
    """Return all nodes, parents first, their uses counted."""
    order = parents_first(outputs, lambda node: [link.parent for link in node.links])
    for node in order:
        node.uses, node.spread = 0, False
    for node in order:
        for link in node.links:
            link.parent.uses += 1
            link.parent.spread |= link.spreads
    return order
