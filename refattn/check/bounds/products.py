"""Products and sums in the arithmetic of losses: what adding up loses, and the rounding of the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedProblem
from ..model import C
from .features import Features
from .nodes import Left, Node, Right, Summed
from .rules import in_logarithm

__all__ = ["Products"]

Float = NDArray[np.float64]


class Products(Features):
    """What a matrix of losses does with whole rows and columns."""

    __slots__ = ()
    f: Any
    node: Node

    def _new(self, node: Node) -> Any:
        cls: Any = type(self)
        return cls(self.f, node)

    def __matmul__(self, o: Any) -> Any:
        f, a, b = self.f, self.node, o.node
        y, size = a.a @ b.a, (np.abs(a.a) + a.span) @ (np.abs(b.a) + b.span)  # it rounds what it is given
        walk, squares = f.walk(a.a, b.a)
        over_features = a.axes[1] not in ("q", "k")
        n = a.a.shape[1]
        steps, tiles = (n, 0) if over_features else self._steps()
        if over_features:
            relative, own = self._added(n, 2, y, walk, squares)
            err, var = relative * size, own
        else:
            values = b.axes == ("k", "v") and a.axes[0] == "q"
            u, tiny = (f.u_sums, f.floor_sums) if values else (f.u, f.floor)
            relative, own = self._added(steps, tiles + 3, y, walk, squares, u)
            err = relative * size + (steps + tiles + 3) * tiny
            again = f.idle(a.a) if tiles else 0
            var = own + C * u * u * (tiles + again**2) * walk + (steps + tiles) * tiny**2 / 3
        if f.unit is not None and not (over_features and f.whole):
            cut, lost = self._cut(o)
            kept = size if over_features else size * (1 + f.u_weights) + f.floor_weights * np.abs(b.a).sum(0)
            err, relative, var = err + cut * (1 + relative) * kept, relative + cut * (1 + f.u_weights), var + lost
        meet = _both(a.span, b.span, a.a.shape, b.a.shape)
        axes = (a.axes[0], b.axes[1])
        marks = a.marks & b.marks & {"positive"} | ({"raw"} if over_features else set())
        found = Node(y, axes, err + meet, var, Left(a, b.a), Right(b, a.a), marks=marks)
        found.relative, found.seen = relative, a.seen if b.axes[1] == "k" else None
        if not over_features:  # weights and their gradients are rounded to their type before they are multiplied
            # a mask of other columns says nothing of these
            seen = np.ones(a.a.shape) if a.seen is None or a.seen.shape[1] != n else a.seen
            tiny, reached = f.floor_weights, seen @ (np.abs(b.a) + b.span)
            rounded = (f.u_weights * size if f.u_weights else 0.0) + tiny * reached
            found.span = found.span + rounded
            if axes[0] != "q":  # nothing takes it on later, as what `cast` says is
                found.err = found.err + rounded
                found.var = found.var + f.stored.variance * squares + tiny**2 / 3 * (seen @ (b.a * b.a))
        if b.axes == ("k", "v") and axes[0] == "q":
            f.weights = self
            tiny_sum = (steps + tiles + 3) * f.floor
            lost = f.u_weights * (np.abs(a.a) + a.span) + tiny * seen
            found.cast = (lost, *f.stored.expected(a.a, seen))
            tiny = f.stored.under()
            found.under = (tiny * reached + tiny_sum, (tiny**2 * (seen @ (b.a * b.a)) + tiny_sum * f.floor) / 3)
            if f.model.weights_scale and ("shifted" not in a.marks or np.any(a.a > 1)):
                raise UnsupportedProblem("model: weights_scale is of weights that are at most 1, below a row's maximum")
            if np.any(b.span):
                found.err = found.err + lost @ np.broadcast_to(b.span, b.a.shape)
            found.marks |= {"product"}
        return self._new(found)

    def _added(
        self, steps: Any, more: Any, y: Float, walk: Float, squares: Float, u: float | None = None
    ) -> tuple[Any, Any]:
        """Return what adding loses over the terms' sizes, `more` roundings included, and its variance without these."""
        f, n = self.f, self.node.a.shape[1]
        if f.unit is None or (self.node.axes[1] not in ("q", "k") and f.whole):
            depth = f.model.depth(n) if self.node.axes[1] not in ("q", "k") else steps
            if u is not None and u != f.u:
                return np.expm1((steps + more) * np.log1p(u)), C * u * u * (depth * walk + squares)
            return f.times(steps + more), f.cu * (depth * walk + squares)
        joins = f.unit.joins(n)
        return f.times(joins + more), f.cu * (joins * walk + y * y)

    def _cut(self, o: Any) -> tuple[Any, Any]:
        """Return what a matrix unit cuts off: at most, over the terms' sizes, and its mean square."""
        f, a, b = self.f, self.node, o.node
        n, seen = a.a.shape[1], a.seen
        count = n if seen is None else np.asarray(seen).sum(1, keepdims=True)
        bits = (f.bits, f.bits) if a.axes[1] not in ("q", "k") else (f.bits_weights, f.bits_values)
        return f.unit.cut(count, n), f.unit.squares(a.a, b.a, bits)

    def _steps(self) -> tuple[Any, int]:
        """Return how many additions a term of a row's sum passes through, and how many rescales."""
        n = self.node
        count = n.a.shape[1] if n.seen is None else n.seen.sum(1, keepdims=True)
        return self.f.model.depth(count), self.f.tiles if "shifted" in n.marks else 0

    def sum(self) -> Any:
        """Sum of each row, (n, 1)."""
        f, n = self.f, self.node
        steps, tiles = self._steps()
        ones = np.ones((n.a.shape[1], 1))
        walk, squares = f.walk(n.a, ones)
        size = (np.abs(n.a) + n.span).sum(1, keepdims=True)
        err = f.times(steps + tiles + 3) * size + (steps + tiles + 3) * f.floor
        var = f.cu * (steps * walk + squares + tiles * walk)
        y = n.a.sum(1, keepdims=True)
        found = Node(y, (n.axes[0], "1"), err, var, Summed(n), marks=n.marks & {"positive", "shifted"} | {"sum"})
        found.relative = f.times(steps + tiles + 3)
        if n.log is not None:  # a sum moves by no larger a factor than its terms
            with np.errstate(all="ignore"):
                low = found.relative + (steps + tiles + 3) * f.floor / y
            found.log = np.max(n.log, axis=1, initial=0.0, keepdims=True) + in_logarithm(low)
        return self._new(found)


def _both(x: Any, y: Any, left: tuple[int, ...], right: tuple[int, ...]) -> Any:
    """Return the product of both operands' errors."""
    if not np.any(x) or not np.any(y):
        return 0.0
    return np.broadcast_to(x, left) @ np.broadcast_to(y, right)
