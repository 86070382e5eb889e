"""The layer against a loop over nodes and edges, and attention as stacks of it."""

import re
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.virtual_node import virtual_node_layer

EDGES = np.array([[0, 1], [2, 1], [1, 2], [3, 3], [0, 1]])
"""Node 0 has no incoming edge, node 3 is its own neighbour, one edge is there twice."""
NONE = np.zeros((0, 2), int)


def add(messages):
    return messages.sum(0)


def functions(most):
    return {
        "to_virtual": lambda v, x: x * v[:1] + v[1:],
        "from_virtual": lambda x, v: x - v[1:],
        "along_edges": lambda of, other: of * other - other,
        "update_virtual": lambda v, m: v * 2 + m[:2],
        "update": lambda x, told, near: x + told * near,
        "aggregate_virtual": most,
        "aggregate": add,
    }


def by_loop(x, v, edges, most):
    """Return the layer in integers of Python."""
    n, d = len(x), len(x[0])
    messages = [[x[j][c] * v[0] + v[1] for c in range(d)] for j in range(n)]
    seen = [most(m[c] for m in messages) for c in range(d)]
    out = []
    for i in range(n):
        near = [sum(x[i][c] * x[j][c] - x[j][c] for j, t in edges if t == i) for c in range(d)]
        out.append([x[i][c] + (x[i][c] - v[1]) * near[c] for c in range(d)])
    return out, [2 * v[c] + seen[c] for c in range(2)]


@pytest.mark.parametrize("kind", [np.asarray, torch.asarray, jnp.asarray])
@pytest.mark.parametrize("edges", [EDGES, NONE])
def test_a_layer_is_the_loop_over_nodes_and_edges(kind, edges):
    """In small integers, of which no float rounds any."""
    x, v = np.random.default_rng(0).integers(-9, 9, (4, 2)).astype(np.float32), np.array([3, -2], np.float32)
    largest = {np.asarray: np.max, torch.asarray: torch.amax, jnp.asarray: jnp.max}[kind]
    for ours, pythons in ((add, sum), (lambda m: largest(m, 0), max)):
        found = virtual_node_layer(kind(x), kind(v), kind(edges), **functions(ours))
        due = by_loop(x.astype(int).tolist(), v.astype(int).tolist(), edges.tolist(), pythons)
        assert [np.asarray(f).tolist() for f in found] == [np.array(d, float).tolist() for d in due]
        assert all(type(f) is type(kind(x)) for f in found)


def test_another_numbering_of_nodes_gives_the_same_nodes():
    x, v = np.random.default_rng(1).integers(-9, 9, (4, 2)), np.array([3, -2])
    order = np.array([2, 0, 3, 1])
    place = np.argsort(order)
    out, virtual = virtual_node_layer(x, v, EDGES, **functions(add))
    moved, other = virtual_node_layer(x[order], v, place[EDGES], **functions(add))
    assert (moved == out[order]).all()
    assert (virtual == other).all()


def quiet(**others):
    """Return functions of a layer without edges that changes nothing, but for others."""
    return {
        "to_virtual": lambda v, x: x,
        "from_virtual": lambda x, v: x,
        "along_edges": lambda of, other: of,
        "update_virtual": lambda v, m: v,
        "update": lambda x, told, near: x,
        "aggregate_virtual": add,
        "aggregate": add,
    } | others


def test_two_layers_are_linear_attention():
    """The virtual node sums features of keys times values and ones, and is read in the next layer; in fractions."""
    rng = np.random.default_rng(2)
    q, k, v = np.vectorize(Fraction)(rng.integers(1, 9, (3, 5, 2)))
    x = np.concatenate([q, k, v], 1)
    square = np.square  # a feature map, positive

    def pack(_, x):
        ones = np.concatenate([x[:, 4:], 0 * x[:, :1] + 1], 1)
        return square(x[:, 2:4])[:, :, None] * ones[:, None]

    def read(x, virtual):
        found = np.array([f @ virtual for f in square(x[:, :2])])
        return found[:, :-1] / found[:, -1:]

    x, virtual = virtual_node_layer(
        x, np.zeros((2, 3), object), NONE, **quiet(to_virtual=pack, update_virtual=lambda v, m: v + m)
    )
    out, _ = virtual_node_layer(x, virtual, NONE, **quiet(from_virtual=read, update=lambda x, told, near: told))
    a = square(q) @ square(k).T
    assert (out == (a @ v) / a.sum(1, keepdims=True)).all()


def test_n_rounds_are_attention_where_the_virtual_node_can_pick_nodes():
    """A selector of great sharpness picks a node: the layers then add up exp(q·k) (v, 1), key by key."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 2))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    state = np.concatenate([x, np.zeros((4, 3))], 1)  # [node | numerator | denominator]

    def tell(state, virtual):
        w = np.exp(state[:, :2] @ virtual)
        return np.concatenate([0 * state[:, :2], w[:, None] * virtual, w[:, None]], 1)

    for i in range(4):
        pick = quiet(aggregate_virtual=lambda m, i=i: m[np.argmax(m[:, :2] @ x[i]), :2], update_virtual=lambda v, m: m)
        _, virtual = virtual_node_layer(state, np.zeros(2), NONE, **pick)
        state, _ = virtual_node_layer(
            state, virtual, NONE, **quiet(from_virtual=tell, update=lambda s, told, near: s + told)
        )
    numerator, denominator = np.zeros((4, 2)), np.zeros(4)
    for i in range(4):  # the same sums in the same order, so that no bit differs
        w = np.exp(x @ x[i])
        numerator, denominator = numerator + w[:, None] * x[i], denominator + w
    assert (state[:, 2:4] == numerator).all()
    assert (state[:, 4] == denominator).all()


def test_errors():
    x, v, f = np.ones((3, 2)), np.ones(2), functions(add)
    said = "edges: are float64 of shape (1, 2), expected integers, (e, 2)"
    with pytest.raises(InvalidInput, match=re.escape(said)):
        virtual_node_layer(x, v, np.ones((1, 2)), **f)
    with pytest.raises(InvalidInput, match=re.escape("edges: are int64 of shape (2,), expected integers, (e, 2)")):
        virtual_node_layer(x, v, np.array([0, 1]), **f)
    for wrong in (3, -1):
        said = "edges: a node is out of range, expected 0 to 2, as x has 3 rows"
        with pytest.raises(InvalidInput, match=re.escape(said)):
            virtual_node_layer(x, v, np.array([[0, wrong]]), **f)
    with pytest.raises(InvalidInput, match=re.escape("x: shape is (3,), expected (n, d)")):
        virtual_node_layer(x[:, 0], v, NONE, **f)
    for name, rows in (("to_virtual", 3), ("from_virtual", 3), ("along_edges", 1)):
        said = f"{name}: returned shape (2,), expected {rows} rows, one a message"
        with pytest.raises(InvalidInput, match=re.escape(said)):
            virtual_node_layer(x, v, EDGES[:1], **{**f, name: lambda *_: v})
