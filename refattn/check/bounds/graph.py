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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .nodes import Left, Node, in_order

__all__ = ["Graph"]

Float = NDArray[np.float64]
WILD = 1 / 16
"""The variance of an exponential's argument from which on errors do not follow roundings: nothing is predicted."""


class Graph:
    """All that a definition gives for some rows, its joints found."""

    def __init__(self, outputs: list[Node]) -> None:
        self._order = in_order(outputs)
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
