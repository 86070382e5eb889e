"""Message passing on a graph with a virtual node that is joined to all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat as api

from ..errors import InvalidInput
from .arguments import axes, function, namespace

__all__ = ["virtual_node_layer"]

Function = Callable[..., Any]


def virtual_node_layer(
    x: Any, virtual: Any, edges: Any, *,
    to_virtual: Function, from_virtual: Function, along_edges: Function,
    update_virtual: Function, update: Function, aggregate_virtual: Function, aggregate: Function,
) -> tuple[Any, Any]:  # fmt: skip
    """Return nodes and the virtual node after a layer of message passing.

    ``virtual' = update_virtual(virtual, aggregate_virtual_j to_virtual(virtual, x_j))`` and
    ``x'_i = update(x_i, from_virtual(x_i, virtual), aggregate_{j->i} along_edges(x_i, x_j))``: both read what the
    other was before the layer.

    Parameters
    ----------
    x : (n, d) array
        The nodes.
    virtual : (...) array
        The virtual node, of any shape that the functions take.
    edges : (e, 2) integer array
        Source j and target i of each directed edge; e may be 0.
    to_virtual, from_virtual : callable
        Of ``(virtual, x)`` and ``(x, virtual)``, rows of x being nodes; they return a message a row.
    along_edges : callable
        Of two (e, d) arrays, targets and sources; it returns a message a row.
    update_virtual : callable
        Of the virtual node and what was aggregated for it.
    update : callable
        Of the nodes, the (n, ...) messages from the virtual node, and the (n, ...) aggregates of neighbours.
    aggregate_virtual, aggregate : callable
        Of a (k, ...) array of messages, in no order that matters; they return one row, a sum for example. Nodes
        without an incoming edge get 0 and do not call it.

    Returns
    -------
    x : (n, ...)
        The nodes.
    virtual : (...)
        The virtual node.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together, edges between nodes that there are not, or a function that does not return a
        row for each row.

    Notes
    -----
    Source: the heterogeneous layer of Cai et al., MPNN and Graph Transformer, arXiv 2301.11956 (recalled; its
    released code has experiments only). What attention such layers compute is in :mod:`refattn.theory.virtual_node`.
    """
    xp = namespace(x=x, virtual=virtual, edges=edges)
    axes("x", x, "n", "d")
    n = x.shape[0]
    if edges.ndim != 2 or edges.shape[1] != 2 or not xp.isdtype(edges.dtype, "integral"):
        raise InvalidInput(f"edges: are {edges.dtype} of shape {tuple(edges.shape)}, expected integers, (e, 2)")
    if not bool(xp.all((edges >= 0) & (edges < n))):
        raise InvalidInput(f"edges: a node is out of range, expected 0 to {n - 1}, as x has {n} rows")
    source, target = edges[:, 0], edges[:, 1]

    given = {
        "to_virtual": to_virtual,
        "from_virtual": from_virtual,
        "along_edges": along_edges,
        "update_virtual": update_virtual,
        "update": update,
        "aggregate_virtual": aggregate_virtual,
        "aggregate": aggregate,
    }
    for name, f in given.items():
        function(name, f)

    def one(name: str, found: Any) -> Any:
        namespace(x=x, **{f"what {name} returns": found})
        return found

    def rows(name: str, messages: Any, count: int) -> Any:
        one(name, messages)
        if messages.shape[:1] != (count,):
            raise InvalidInput(f"{name}: returned shape {tuple(messages.shape)}, expected {count} rows, one a message")
        return messages

    near = rows("along_edges", along_edges(xp.take(x, target, axis=0), xp.take(x, source, axis=0)), edges.shape[0])
    nothing = xp.zeros(near.shape[1:], dtype=near.dtype, device=api.device(near))
    incoming = [near[target == i] for i in range(n)]
    gathered = xp.stack([one("aggregate", aggregate(m)) if m.shape[0] else nothing for m in incoming], axis=0)
    told = rows("from_virtual", from_virtual(x, virtual), n)
    seen = one("aggregate_virtual", aggregate_virtual(rows("to_virtual", to_virtual(virtual, x), n)))
    return one("update", update(x, told, gathered)), one("update_virtual", update_virtual(virtual, seen))
