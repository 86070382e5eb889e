"""Gradients of a definition, derived from its own text: the same operators, each remembering how it was made.

A :class:`Tape` wraps the matrices of any arithmetic, so what :func:`gradients` returns is as exact as that arithmetic:
balls in Arb, elements of a prime field in the exactness test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from ..errors import UnsupportedProblem
from .matrix import Mask, Reflected

__all__ = ["Tape", "gradients", "parents_first"]

Node = TypeVar("Node")


class Tape(Reflected):
    """A matrix that remembers its parents and, for each, the map from its own gradient to theirs."""

    __slots__ = ("grad", "parents", "value")

    def __init__(self, value: Any, *parents: tuple[Tape, Callable[[Any], Any]]) -> None:
        self.value, self.parents, self.grad = value, parents, None

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, m)."""
        return tuple(self.value.shape)

    @property
    def T(self) -> Tape:
        """The transpose."""
        return Tape(self.value.T, (self, lambda g: g.T))

    def columns(self, at: Any) -> Tape:
        """Return the columns of those numbers, each at most once: the others' gradient is 0."""
        there, back = np.zeros(self.value.shape, bool), np.zeros(self.value.shape[1], np.intp)
        there[:, at], back[at] = True, np.arange(len(at))
        return Tape(self.value.columns(at), (self, lambda g: g.columns(back).where(None if there.all() else there)))

    def written(self, moved: Mask) -> Tape:
        """Return what a kernel may round to its inputs' type."""
        return Tape(self.value.written(moved), (self, lambda g: g))

    def __matmul__(self, o: Tape) -> Tape:
        a, b = self.value, o.value
        return Tape(a @ b, (self, lambda g: g @ b.T), (o, lambda g: a.T @ g))

    def __add__(self, o: Any) -> Tape:
        if not isinstance(o, Tape):
            return Tape(self.value + o, (self, lambda g: g))
        y = self.value + o.value
        return Tape(y, (self, lambda g: _fold(g, self)), (o, lambda g: _fold(g, o)))

    def __sub__(self, o: Any) -> Tape:
        if not isinstance(o, Tape):
            return Tape(self.value - o, (self, lambda g: g))
        y = self.value - o.value
        return Tape(y, (self, lambda g: _fold(g, self)), (o, lambda g: _fold(-g, o)))

    def __mul__(self, o: Any) -> Tape:
        if not isinstance(o, Tape):
            return Tape(self.value * o, (self, lambda g: g * o))
        a, b = self.value, o.value
        return Tape(a * b, (self, lambda g: _fold(g * b, self)), (o, lambda g: _fold(g * a, o)))

    def __truediv__(self, o: Any) -> Tape:
        if not isinstance(o, Tape):
            return Tape(self.value / o, (self, lambda g: g / o))
        b = o.value
        y = self.value / b
        return Tape(y, (self, lambda g: _fold(g / b, self)), (o, lambda g: _fold(-(g * y) / b, o)))

    def __neg__(self) -> Tape:
        return Tape(-self.value, (self, lambda g: -g))

    def zeros(self) -> Tape:
        """Return exact zeros of the same shape."""
        return Tape(self.value.zeros())

    def where(self, mask: Mask | None) -> Tape:
        """Keep the elements where `mask` holds; the others become 0."""
        return Tape(self.value.where(mask), (self, lambda g: g.where(mask)))

    def exp(self, where: Mask | None = None) -> Tape:
        """Exponential."""
        y = self.value.exp(where)
        return Tape(y, (self, lambda g: g * y))

    def sigmoid(self, where: Mask | None = None) -> Tape:
        """1 / (1 + exp(-x))."""
        y = self.value.sigmoid(where)
        return Tape(y, (self, lambda g: g * (y - y * y)))

    def log(self) -> Tape:
        """Natural logarithm."""
        x = self.value
        return Tape(x.log(), (self, lambda g: g / x))

    def tanh(self) -> Tape:
        """Hyperbolic tangent."""
        y = self.value.tanh()
        return Tape(y, (self, lambda g: g - g * (y * y)))

    def rsqrt(self) -> Tape:
        """1 / sqrt(x)."""
        x = self.value
        y = x.rsqrt()
        return Tape(y, (self, lambda g: -(g * y) / (x + x)))

    def geometric(self, reach: int) -> Tape:
        """Return the inverse of I - a; a's gradient by it is y^T g y^T."""
        y = self.value.geometric(reach)
        return Tape(y, (self, lambda g: y.T @ g @ y.T))

    def positive(self) -> Mask:
        """Tell where an element is above 0."""
        found: Mask = self.value.positive()
        return found

    def relu(self) -> Tape:
        """max(x, 0); its slope at 0 is 0."""
        x = self.value
        return Tape(x.relu(), (self, x.gated))

    def power(self, p: int, where: Mask | None = None) -> Tape:
        """x**p for p >= 2."""
        x = self.value
        slope = x.power(p - 1, where) * x.number(p)
        return Tape(x.power(p, where), (self, lambda g: g * slope))

    def sum(self) -> Tape:
        """Sum of each row, (n, 1)."""
        x = self.value
        return Tape(x.sum(), (self, lambda g: x.zeros() + g))

    def shift(self, where: Mask, also: Any = None) -> Any:
        """Return the row's shift as a constant: it cancels, and so does its gradient."""
        return Tape(self.value.shift(where, also.value if isinstance(also, Tape) else also))

    def absmax(self, where: Mask) -> Any:
        """Refuse: where two elements tie, the largest has no gradient."""
        raise UnsupportedProblem(
            "gradients: absmax has none where two elements share the largest size; write the definition without it "
            "(of power attention: form='plain')"
        )


def _fold(g: Any, to: Tape) -> Any:
    """Sum a gradient over the axes along which its operand was spread."""
    if g.shape[1] != to.shape[1]:
        g = g.sum()
    return g.T.sum().T if g.shape[0] != to.shape[0] else g


def gradients(outputs: list[Tape], seeds: list[Any], leaves: list[Tape]) -> list[Any]:
    """Return the gradient of sum(output * seed) with respect to each leaf, as matrices of the leaves' arithmetic.

    Parameters
    ----------
    outputs : list of Tape
        What a definition returned for leaves wrapped in Tape; a recurrence returns one for each token.
    seeds : list of Matrix
        The gradient arriving at each output, of its shape.
    leaves : list of Tape
        Those to differentiate by; one that the output does not depend on gets zeros.
    """
    order = parents_first(outputs, lambda node: [parent for parent, _ in node.parents])
    for output, seed in zip(outputs, seeds, strict=True):
        output.grad = seed
    for node in reversed(order):
        if node.grad is None:  # a later token's state, which no output reads
            continue
        for parent, pull in node.parents:
            g = pull(node.grad)
            parent.grad = g if parent.grad is None else parent.grad + g
        if node.parents:
            node.grad = None  # not needed again: keep memory at a few matrices
    return [leaf.value.zeros() if leaf.grad is None else leaf.grad for leaf in leaves]


def parents_first(outputs: list[Node], parents_of: Callable[[Node], list[Node]]) -> list[Node]:
    """Return all nodes that outputs are made of, each once and after its parents."""
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(x, False) for x in outputs]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent in parents_of(node))
    return order
