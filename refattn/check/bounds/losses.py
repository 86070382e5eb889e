r"""The arithmetic of losses: runs a definition and notes what a kernel of a Model may lose at every operation.

With u the accumulator's unit roundoff, u_S and u_P what storing scores and weights in their types loses (0 where those
are as wide), e the exponential's error in u, and T the tiles of a running sum:

=============================  ====================================================================================
operation                      loses at most
=============================  ====================================================================================
product over d features        (d + 2) u |a||b| + u_S of the result's size (any order of summation)
product or sum over n keys     (depth(n) + T + 3) u |w||v|; the weights' rounding u_P |w| each
score + - · / or tanh          u + u_S of the result (tanh: 2 u); taking off the maximum 2 of the result, 1 of the score
exp                            (e + 1) u of the result; below a running maximum T (e + 1) u more, for its rescales
sigmoid, x**p                  (e + 3) u, (p + 1) u of the result
inverse y of I - a             (2 m + 1) u |y| |a| |y|, m the numbers in a row of a
logarithm                      4 u (size + 1)
merging parts through lse      each merge (2 |lse| + e + 4) u of the weights, (|lse| + 2) u of the output
underflow                      half the smallest subnormal number of the type, for each rounding
=============================  ====================================================================================

The variances are those of independent roundings (docs/proofs/bounds.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model import C, Model
from .nodes import Inverted, Node, Scaled, Turned
from .products import Products
from .rules import SCORES, Rules, in_logarithm, logistic, moves, slope_of_tanh, tanh

__all__ = ["Losses", "Lossy", "variance_of"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Losses(Rules):
    """The arithmetic of one Model for some rows of one head."""

    name = "losses"

    def __init__(self, model: Model, n_k: int, chance: bool = True) -> None:
        super().__init__(model, n_k, chance)
        self.ratios: Float | None = None
        """By token what ratios of decays that were multiplied up since a chunk's start are off by, relative; (n, 1)."""

        self.weights: Lossy | None = None
        """What the values were last multiplied with."""

        self.unsure: tuple[Mask, Mask] | None = None
        """Where something was last asked to be above 0, and where that is not sure."""

    def leaf(self, x: Float, axes: tuple[str, str], err: Any = 0.0, var: Any = 0.0) -> Lossy:
        """Take in an operand with what it loses before it is multiplied."""
        return Lossy(self, Node(x, axes, err, var))

    def array(self, x: Any) -> Lossy:
        """Take in an option's matrix: rows are queries and columns keys unless there is one for all."""
        a = np.asarray(x, np.float64)
        return self.leaf(a, ("1" if a.shape[0] == 1 else "q", "1" if a.shape[1] == 1 else "k"))

    def keyed(self, x: Any) -> Lossy:
        """Take in a matrix by which keys are mixed: rows are keys, and columns unless there is one."""
        return self.leaf(np.asarray(x, np.float64), ("k", "1" if np.shape(x)[1] == 1 else "k"))

    def state(self, x: Any) -> Lossy:
        """Take in the state that a recurrence starts from."""
        return self.leaf(np.asarray(x, np.float64), ("d", "v"))

    def gate(self, x: Any) -> Lossy:
        """Take in a recurrence's gate: rows are keys."""
        a = np.asarray(x, np.float64)
        return self.leaf(a, ("1" if a.shape[0] == 1 else "k", "1" if a.shape[1] == 1 else "d"))


class Lossy(Products):
    """A matrix of the arithmetic of losses, with the operators of :class:`refattn.exact.matrix.Matrix`."""

    __slots__ = ("f", "node")

    def __init__(self, f: Losses, node: Node) -> None:
        self.f, self.node = f, node

    @property
    def a(self) -> Float:
        """The value."""
        return self.node.a

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, m)."""
        return tuple(self.node.a.shape)

    @property
    def T(self) -> Lossy:
        """The transpose: nothing is lost."""
        n = self.node
        found = Node(n.a.T, (n.axes[1], n.axes[0]), 0.0, 0.0, Turned(n), marks=n.marks & {"shifted", "positive"})
        found.seen = None if n.seen is None else n.seen.T
        return Lossy(self.f, found)

    def number(self, x: Any) -> float:
        """Take a number into the arithmetic."""
        return float(x)

    # elementwise ---------------------------------------------------------------------------------------------

    def _rounded(self, y: Float, axes: tuple[str, str], size: Float, times: float = 1.0) -> tuple[Any, Any]:
        """Return what one rounding of a result loses, which is at most of that size; scores may be stored narrower."""
        f, stored = self.f, self._stored(axes)
        relative = f.times(times) + stored * (1 + f.times(times))
        return relative * size + f.floor, (times * f.cu + self._scatter(axes)) * y * y

    def _stored(self, axes: tuple[str, str]) -> float:
        """Return what storing a result on the way to a score loses: scores themselves, and features."""
        return self.f.u_scores if axes[1] == "d" or axes in SCORES else 0.0

    def _scatter(self, axes: tuple[str, str]) -> float:
        """Return the variance of that, over the square."""
        return self.f.var_scores if self._stored(axes) else 0.0

    def _with(self, o: Any, y: Float, slopes: tuple[Any, Any], more: Any = 0.0, marks: Any = ()) -> Lossy:
        n = self.node
        links = [Scaled(n, slopes[0], y.shape)]
        axes = n.axes
        if isinstance(o, Lossy):
            links.append(Scaled(o.node, slopes[1], y.shape))
            axes = tuple(x if x != "1" else z for x, z in zip(axes, o.node.axes, strict=True))  # type: ignore[assignment]
        err, var = self._rounded(y, axes, np.abs(y) + more + sum(x.forward(x.parent.span) for x in links))
        return Lossy(self.f, Node(y, axes, err + more, var, *links, marks=marks))

    def __add__(self, o: Any) -> Lossy:
        y = self.a + _value(o)
        marks = self.node.marks & o.node.marks & {"positive"} if isinstance(o, Lossy) else self._kept(_value(o) >= 0)
        more = bool(marks) and "sum" in self.node.marks
        found = self._with(o, y, (1.0, 1.0), marks=marks | ({"sum", "more"} if more else set()))
        found.node.relative = self.node.relative + self.f.times(1) if more else 0.0
        logs = [x for x in (self.node.log, o.node.log if isinstance(o, Lossy) else 0.0) if x is not None]
        if "positive" in marks and len(logs) == 2:
            found.node.log = np.maximum(logs[0], logs[1]) + in_logarithm(self.f.u)
        if isinstance(o, Lossy) and "shift" in self.node.marks:  # the maximum is put back: its own conversions too
            found.node.err = found.node.err + 4 * self.f.u * np.abs(self.a)
            found.node.span = found.node.span + 4 * self.f.u * np.abs(self.a)
            found.node.var = found.node.var + self.f.cu * self.a**2
        return found

    def __sub__(self, o: Any) -> Lossy:
        y = self.a - _value(o)
        if not (isinstance(o, Lossy) and "shift" in o.node.marks):
            return self._with(o, y, (1.0, -1.0))
        # in natural or base-2 units: two roundings of the result's size and one of the score's
        f, size = self.f, 2 * np.abs(y) + np.abs(self.a) + 3 * self.node.span
        axes = ("q", self.node.axes[1])
        stored = self._stored(axes)
        err, var = (f.u + stored * (1 + f.u)) * size + f.floor, (f.cu + self._scatter(axes)) * size**2
        return Lossy(f, Node(y, axes, err, var, Scaled(self.node, 1.0, y.shape), marks={"shifted"}))

    def __neg__(self) -> Lossy:
        return Lossy(self.f, Node(-self.a, self.node.axes, 0.0, 0.0, Scaled(self.node, -1.0, self.a.shape)))

    def __mul__(self, o: Any) -> Lossy:
        b = _value(o)
        more = self.node.span * o.node.span if isinstance(o, Lossy) else 0.0
        positive = self.node.marks & o.node.marks & {"positive"} if isinstance(o, Lossy) else self._kept(b >= 0)
        kept = self.node.marks & {"shifted"}
        return self._with(o, self.a * b, (b, self.a), more, positive | kept)

    def _kept(self, yes: Any) -> frozenset[str]:
        return self.node.marks & {"positive"} if np.all(yes) else frozenset()

    def __truediv__(self, o: Any) -> Lossy:
        b = _value(o)
        with np.errstate(all="ignore"):
            y = self.a / b
        if not isinstance(o, Lossy):
            kept = self._kept(b > 0) | (self.node.marks & {"shifted"})
            return self._with(o, y, (1 / b, 0.0), marks=kept)
        # (a + da) / (b + db) moves by (da - y db) / (b + db), for errors of any size
        with np.errstate(all="ignore"):
            left = 1 - np.broadcast_to(o.node.span, b.shape) / np.abs(b)
            amplify = np.where(left > 0, 1 / left, np.inf)
            amplify = amplify if o.node.log is None else np.minimum(amplify, np.exp(np.minimum(o.node.log, 700.0)))
            if "product" in self.node.marks and {"sum", "positive"} <= o.node.marks and self._mean(o.node):
                found = self._with(o, y, (1 / b, -y / b), marks={"mean", "quotient", *(o.node.marks & {"more"})})
                found.node.amplify = amplify
                # a kernel may divide the weights first: then products underflow at the output's size
                found.node.err = self.f.u * np.abs(y) + self.f.floor + self.node.under[0]
                found.node.var = found.node.var + self.node.under[1]
                found.node.relative = self.node.relative + o.node.relative
                return found
            by = np.minimum(amplify, 1e100) / b
        found = self._with(o, y, (by, -y * by), marks={"quotient"})
        if "product" in self.node.marks:  # as above
            found.node.err, found.node.var = found.node.err + self.node.under[0], found.node.var + self.node.under[1]
        return found

    def _mean(self, sum_of: Node) -> bool:
        """Tell whether a product's weights are those that a sum, or a sum and something more, adds up."""
        while "more" in sum_of.marks:
            sum_of = sum_of.links[0].parent
        return self.f.weights is not None and sum_of.links[0].parent is self.f.weights.node

    def where(self, mask: Mask | None) -> Lossy:
        """Keep the elements where `mask` holds; the others become 0."""
        if mask is None:
            return self
        n = self.node
        keep = np.broadcast_to(mask, n.a.shape)
        marks = n.marks & {"positive", "shifted"}
        found = Node(
            np.where(keep, n.a, 0.0), n.axes, 0.0, 0.0, Scaled(n, keep.astype(np.float64), n.a.shape), marks=marks
        )
        found.seen = keep if n.axes[1] == "k" else None
        if self.f.unsure is not None and mask is self.f.unsure[0]:
            found.err = np.where(self.f.unsure[1], np.abs(n.a) + n.span, 0.0)
            found.span = found.span + found.err
        return Lossy(self.f, found)

    def zeros(self) -> Lossy:
        """Return exact zeros of the same shape."""
        return Lossy(self.f, Node(np.zeros(self.shape), self.node.axes, 0.0, 0.0))

    def positive(self) -> Mask:
        """Tell where an element is above 0; what is kept there may be wrong where its error reaches 0."""
        above = np.asarray(self.a > 0)
        span = np.broadcast_to(self.node.span, self.shape)
        self.f.unsure = above, (span >= np.abs(self.a)) & (span > 0)
        return above

    def _function(
        self, y: Float, slope: Float, curve: tuple[Any, Any], own: tuple[Any, Any], where: Mask | None, marks: Any = ()
    ) -> Lossy:
        """Apply a function: its slope, its curve (:class:`Node`), its own roundings; 0 where `where` does not hold."""
        n, f = self.node, self.f
        keep = 1.0 if where is None else np.broadcast_to(where, n.a.shape)
        err, var = own
        if "raw" in n.marks and n.axes in SCORES:  # scores that nothing else rounds are stored all the same
            err, var = err + f.u_scores * np.abs(slope * n.a), var + f.var_scores * (slope * n.a) ** 2
        stored = self._stored(n.axes) if n.axes[1] == "d" and np.any(err) else 0.0
        err, var = err + stored * np.abs(y), var + (f.var_scores if stored else 0.0) * y * y
        with np.errstate(all="ignore"):
            y, slope, whole, rest, err, var = (np.where(keep, x, 0.0) for x in (y, slope, *curve, err, var))
        found = Node(y, n.axes, err, var, Scaled(n, slope, y.shape), marks=marks, curve=(whole, rest))
        if where is not None and n.axes[1] == "k":
            found.seen = np.asarray(keep, bool)
        return Lossy(f, found)

    def exp(self, where: Mask | None = None) -> Lossy:
        """Exponential; 0 where `where` does not hold."""
        f, x = self.f, self.a
        shifted = "shifted" in self.node.marks
        with np.errstate(all="ignore"):
            y = np.exp(x if where is None else np.where(where, x, -np.inf))
            span = np.minimum(self.node.span, 700.0)
            curve = y * np.expm1(span), y * (np.expm1(span) - span)
        rescales = f.tiles if shifted and self.node.axes[1] == "k" else 0
        passes = f.times(f.exp + 1 + rescales * (f.exp + 1))
        var = ((f.u * f.exp) ** 2 / 3 + (1 + rescales) * f.cu) * y * y + f.floor**2 / 3
        kept = {"positive", "exp", *(("shifted",) if shifted else ())}
        found = self._function(y, y, curve, (passes * (y + curve[0]) + f.floor, var), where, kept)
        with np.errstate(all="ignore"):
            moved = span + in_logarithm(passes + f.floor / y)
        found.node.log = np.where(found.a > 0, moved, 0.0)
        return found

    def sigmoid(self, where: Mask | None = None) -> Lossy:
        """1 / (1 + exp(-x)); 0 where `where` does not hold."""
        f, x, span = self.f, self.a, np.minimum(self.node.span, 700.0)
        y, slope = logistic(x), logistic(x) * logistic(-x)
        rest = slope * (np.expm1(span) - span)  # the slope grows by a factor of at most exp(span)
        var = ((f.u * f.exp) ** 2 / 3 + 3 * f.cu) * y * y + f.floor**2 / 3
        whole = moves(logistic, x, span)
        own = f.times(f.exp + 3) * (y + whole) + f.floor, var
        return self._function(y, slope, (whole, rest), own, where, {"positive"})

    def tanh(self) -> Lossy:
        """Hyperbolic tangent."""
        y, span = tanh(self.a), np.minimum(self.node.span, 300.0)
        slope = slope_of_tanh(y)
        rest = slope * (np.expm1(2 * span) - 2 * span) / 2
        whole = moves(tanh, self.a, span)
        own = self._rounded(y, self.node.axes, np.abs(y) + whole, 2.0)
        return self._function(y, slope, (whole, rest), own, None)

    def rsqrt(self) -> Lossy:
        """1 / sqrt(x) of numbers above 0."""
        f, x, span = self.f, self.a, np.broadcast_to(self.node.span, self.shape)
        with np.errstate(all="ignore"):
            y = 1 / np.sqrt(x)
            whole = np.where(span < x, 1 / np.sqrt(np.maximum(x - span, 0.0)) - y, np.inf)
        slope = -y / (2 * x)
        own = f.times(3) * (y + whole), 3 * f.cu * y * y
        return self._function(y, slope, (whole, np.maximum(whole + slope * span, 0.0)), own, None)

    def log(self) -> Lossy:
        """Natural logarithm."""
        f, x = self.f, self.a
        with np.errstate(all="ignore"):
            y, share = np.log(x), np.broadcast_to(self.node.span, x.shape) / x
            whole = np.where(share < 1, -np.log1p(-np.minimum(share, 1 - 1e-16)), np.inf)
            whole = whole if self.node.log is None else np.fmin(whole, self.node.log)
        # all exponentials may be off the same way
        var = f.cu * (1 + y * y) + ((f.u * f.exp) ** 2 if "positive" in self.node.marks else 0.0)
        own = f.times(4) * (np.abs(y) + np.minimum(whole, 1e300) + 1), var
        return self._function(y, 1 / x, (whole, np.maximum(whole - share, 0.0)), own, None)

    def relu(self) -> Lossy:
        """max(x, 0)."""
        up, span = self.a > 0, np.broadcast_to(self.node.span, self.shape)
        rest = np.maximum(span - np.abs(self.a), 0.0)  # the other side of 0
        own = np.zeros(self.shape), np.zeros(self.shape)
        curve = np.where(up, span, rest), rest
        return self._function(np.maximum(self.a, 0.0), up.astype(np.float64), curve, own, None, {"positive"})

    def power(self, p: int, where: Mask | None = None) -> Lossy:
        """x**p for p >= 1; 0 where `where` does not hold."""
        f, x = self.f, np.abs(self.a)
        with np.errstate(all="ignore"):
            y, slope, span = self.a**p, p * self.a ** (p - 1), np.broadcast_to(self.node.span, x.shape)
            whole = (x + span) ** p - np.abs(y)
            rest = np.maximum(whole - np.abs(slope) * span, 0.0)
        own = f.times(p + 1) * (np.abs(y) + whole) + f.floor, (p + 1) * f.cu * y * y
        return self._function(y, slope, (whole, rest), own, where, {"positive"} if p % 2 == 0 else ())

    def geometric(self, reach: int) -> Lossy:
        """Return y = (I - a)^-1, a with 0 on and above its diagonal, as substitution gives it.

        Substitution solves exactly with a row of a off by m u |a| at most, m the numbers in it, in any order; inverses
        by blocks go through two such products: (2 m + 1) u. That and a's own error make E, and y' - y = y E y' gives
        |y' - y| <= (I - |y| E)^-1 |y| E |y|, for errors of any size.
        """
        f, n, a = self.f, self.node, self.a
        unit = np.eye(len(a))
        y = _substituted(a, unit)
        reached = (np.abs(a) + n.span) > 0
        own = f.times(2 * reached.sum(1, keepdims=True) + 1) * (np.abs(a) + n.span) + f.floor * np.tri(len(a), k=-1)
        size = np.abs(y)
        link = Inverted(n, y)
        span = _substituted(size @ (n.span + own), size @ (n.span + own) @ size)
        walk = np.square(y) @ (f.cu * a * a) @ np.square(y)
        err, var = np.maximum(span - link.forward(n.span), 0.0), walk + f.cu * y * y
        if f.ratios is not None and not np.tril(a, -2).any():  # products of decays, from one token to the next
            err, var = err + f.ratios * np.abs(y - unit), var + C * np.square(f.ratios * (y - unit))
        return Lossy(f, Node(y, n.axes, err, var, link))

    # rows ----------------------------------------------------------------------------------------------------

    def shift(self, where: Mask, also: Lossy | None = None) -> Lossy:
        """Return each row's maximum as a constant: it cancels."""
        top = np.where(where, self.a, -np.inf).max(1, initial=-np.inf if also is None else also.a.item(), keepdims=True)
        return Lossy(self.f, Node(np.where(np.isneginf(top), 0.0, top), ("q", "1"), 0.0, 0.0, marks={"shift"}))

    def absmax(self, where: Mask) -> Lossy:
        """Return each row's largest absolute value: nothing is lost, and the error is at most the largest one."""
        n = self.node
        span = np.where(where, np.broadcast_to(n.span, n.a.shape), 0.0).max(1, initial=0.0, keepdims=True)
        y = np.where(where, np.abs(n.a), 0.0).max(1, initial=0.0, keepdims=True)
        top = np.where(where & (np.abs(n.a) == y), np.broadcast_to(variance_of(n), n.a.shape), 0.0)
        return Lossy(self.f, Node(y, (n.axes[0], "1"), span, top.max(1, initial=0.0, keepdims=True)))


def _value(o: Any) -> Any:
    return o.a if isinstance(o, Lossy) else o


def _substituted(a: Float, b: Float) -> Float:
    """Return (I - a)^-1 b of a triangle with less than 1 on its diagonal, inf where that has more."""
    y = np.zeros_like(b)
    for i in range(len(a)):
        y[i] = (b[i] + a[i, :i] @ y[:i]) / np.maximum(1 - a[i, i], 0.0)
    return y


def variance_of(n: Node) -> Any:
    """Return a node's variance, its parents' included."""
    return n.var + sum(link.squares(variance_of(link.parent)) for link in n.links)
