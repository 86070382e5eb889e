r"""How losses reach an output: a graph of matrices, each with what its own operation may lose.

The error of an output is the sum over nodes of adjoint times loss. Two facts keep that cheap and sharp:

- A node that is used once passes its loss on through the operation's slope: nothing can cancel, and one matrix stands
  for all columns of the output (``flow``).
- A node that is used twice (the weights, in numerator and denominator) or spread over an axis is a *joint*: what its
  uses do to the output may cancel, and its adjoint by output column tells by how much.

``span`` is the largest error of a node however its parents' errors meet; products of errors and the curvature of
functions are bounded by it and count as losses of the node where they arise, so the sum holds for errors of any size
and not to first order only. Proof: docs/proofs/bounds.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedProblem
from ...exact.anywhere import beside
from ...exact.tape import parents_first

__all__ = ["Graph", "Inverted", "Left", "Link", "Node", "Right", "Scaled", "Summed", "Turned"]

Float = NDArray[np.float64]
WILD = 1 / 16
"""The variance of an exponential's argument from which on errors do not follow roundings: nothing is predicted."""


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
    """

    __slots__ = (
        "a", "amplify", "axes", "cast", "curve", "direct", "err", "flow", "links", "log", "marks", "relative", "seen",
        "span", "spread", "under", "uses", "var",
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
        self.span: Any = err + (sum(x.forward(x.parent.span) for x in links) if curve is None else curve[0])
        self.cast: tuple[Any, Any, Any] | None = None
        self.amplify: Any = None
        self.log: Any = None
        self.relative: Any = 0.0
        self.under: Any = (0.0, 0.0)
        self.uses, self.spread, self.direct = 0, False, True
        self.flow: tuple[Any, Any] = (0.0, 0.0)

    @property
    def by_column(self) -> bool:
        """Tell whether column c of the output depends on column c alone."""
        return self.axes[1] == "v"

    def above(self, other: Node) -> bool:
        """Tell whether another node is made from this one."""
        return any(node is self for node in _order([other])[:-1])

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


class Graph:
    """All that a definition gives for some rows, its joints found."""

    def __init__(self, outputs: list[Node]) -> None:
        self._order = _order(outputs)
        self._joints = _flows(self._order)
        self._wanted = _leading_to(self._order, self._joints)

    def joints(
        self, output: Node, columns: int, put: Callable[[Float], Any] = np.asarray
    ) -> Iterator[tuple[Node, Any, list[tuple[Node, Any]]]]:
        """Yield each joint with its adjoint; what reaches the output without one is ``output.flow``.

        Parameters
        ----------
        output : Node
            The one that is asked about.
        columns : int
            How many columns it has.
        put : callable
            Puts an array where adjoints are made: on the CPU, or on a GPU.

        Yields
        ------
        joint : Node
        adjoint : (columns, n, m) array
        parts : list of (Node, array)
            For weights: the products with values that they enter, and their adjoint by each alone.
        """
        grads: dict[int, Any] = {id(output): put(np.ones((len(output.a), columns) if output.by_column else (1, 1, 1)))}
        parts: dict[int, list[tuple[Node, Float]]] = {}
        for node in reversed(self._order):
            g = grads.pop(id(node), None)
            if g is None:
                continue
            if id(node) in self._joints and node is not output:
                yield node, g, parts.get(id(node), [])
            for link in node.links:
                if id(link.parent) not in self._wanted:
                    continue
                back = link.pull(node, g)
                if node.cast is not None and isinstance(link, Left):
                    parts.setdefault(id(link.parent), []).append((node, back))
                before = grads.get(id(link.parent))
                grads[id(link.parent)] = back if before is None else before + back


def _order(outputs: list[Node]) -> list[Node]:
    """Return all nodes, parents first, their uses counted."""
    order = parents_first(outputs, lambda node: [link.parent for link in node.links])
    for node in order:
        node.uses, node.spread = 0, False
    for node in order:
        for link in node.links:
            link.parent.uses += 1
            link.parent.spread |= link.spreads
    return order


def _flows(order: list[Node]) -> set[int]:
    """Take losses on through nodes that are used once; return the joints, which keep theirs."""
    joints: set[int] = set()
    for node in order:
        node.direct = all(x.parent.direct and id(x.parent) not in joints for x in node.links)
        err, var = _flow(node, joints)
        node.flow = err, _tamed(node, var) if "exp" in node.marks else var
        rows = "q" in node.axes or node.axes[0] == "1"
        shared = node.uses > 1 or node.spread if node.links else node.spread  # queries that lose something, too
        if rows and shared and (np.any(err) or np.any(var)):
            joints.add(id(node))
    return joints


def _flow(node: Node, joints: set[int]) -> tuple[Any, Any]:
    err, var = node.err, node.var
    if node.curve is not None:
        err = err + node.curve[0 if node.direct else 1]
    for link in node.links:
        if id(link.parent) in joints:
            continue
        flow = link.parent.flow
        var = var + link.squares(flow[1])
        if node.curve is None or not node.direct:
            err = err + link.forward(flow[0])
        if node.cast is not None and isinstance(link, Left):  # weights used once: their rounding is one more
            err, var = err + node.cast[0] @ np.abs(link.b), var + node.cast[1] @ (link.b * link.b)
            var = var + (node.cast[2] @ link.b) ** 2
    return err, var


def _tamed(node: Node, var: Any) -> Any:
    """Give NaN to the rows in which an exponential's argument is too far off to foresee what that does."""
    argument = np.broadcast_to(node.links[0].parent.flow[1], node.a.shape)
    wild = (np.where(node.a > 0, argument, 0.0) > WILD).any(1, keepdims=True)
    return np.where(wild, np.nan, var)


def _leading_to(order: list[Node], joints: set[int]) -> set[int]:
    found: set[int] = set()
    for node in order:
        if id(node) in joints or any(id(x.parent) in found for x in node.links):
            found.add(id(node))
    return found
