"""Samples of neighbourhoods, their context and their readout, beside dense matrices, balls and sums in 40 digits."""

import re

import mpmath
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.neighbours import hop_context, neighbour_lists, neighbour_tokens, readout

from .test_parts import KINDS

U = 2.0**-53


def rows_of(dense):
    """A matrix of zeros and ones in compressed rows."""
    return np.concatenate([[0], np.cumsum(dense.sum(1))]).astype(int), np.nonzero(dense)[1]


def path(n):
    return np.eye(n, k=1, dtype=int) + np.eye(n, k=-1, dtype=int)


def karate():
    networkx = pytest.importorskip("networkx")
    return (networkx.to_numpy_array(networkx.karate_club_graph()) > 0).astype(int)


def directed(n=9):
    return (np.random.default_rng(3).random((n, n)) < 0.25).astype(int)


def test_lists_of_karate():
    dense = karate()
    lists = neighbour_lists(*rows_of(dense))
    assert len(lists[0]) == 40
    assert len(set(lists[0])) == 26
    assert 0 in lists[0]
    for i, found in enumerate(lists):
        assert sorted(found) == sorted([*np.flatnonzero(dense[i]), *np.flatnonzero((dense @ dense)[i])])


def test_tokens_are_drawn_without_replacement_from_the_lists():
    graph = rows_of(karate())
    lists = neighbour_lists(*graph)
    for length in (2, 11, 60):
        tokens = neighbour_tokens(*graph, length, np.random.default_rng(0))
        assert tokens.shape == (34, length)
        assert (tokens[:, 0] == np.arange(34)).all()
        for row, pool in zip(tokens, lists, strict=True):
            counts, most = (np.bincount(x, minlength=34) for x in (row[1:], pool))
            if len(pool) < length - 1:
                assert row[1:].tolist() == (pool.tolist() * length)[: length - 1]
            else:
                assert (counts <= most).all()
    again = neighbour_tokens(*graph, 11, np.random.default_rng(0))
    other = neighbour_tokens(*graph, 11, np.random.default_rng(1))
    assert (again == neighbour_tokens(*graph, 11, np.random.default_rng(0))).all()
    assert (again != other).any()


def test_a_node_that_is_neighbour_and_end_is_drawn_twice_as_often():
    triangle = rows_of(np.ones((3, 3), int) - np.eye(3, dtype=int))
    assert neighbour_lists(*triangle)[0].tolist() == [1, 2, 0, 1, 2]
    drawn = [neighbour_tokens(*triangle, 2, np.random.default_rng(s))[0, 1] for s in range(500)]
    counts = np.bincount(drawn, minlength=3)
    # 500 draws of probability 1/5, 2/5, 2/5 (seeds are fixed): five standard deviations
    assert (np.abs(counts - 500 * np.array([0.2, 0.4, 0.4])) < 5 * np.sqrt(500 * 0.24)).all()
    assert counts[0] < min(counts[1:])


def test_a_node_without_neighbours_draws_from_all():
    dense = np.zeros((5, 5), int)
    dense[0, 1] = 1
    tokens = neighbour_tokens(*rows_of(dense), 5, np.random.default_rng(0))
    assert tokens[0].tolist() == [0, 1, 1, 1, 1]  # node 1 leads nowhere
    assert all(len(set(row[1:])) == 4 for row in tokens[1:].tolist())
    with pytest.raises(InvalidInput, match="length: node 1 has no neighbours, and 5 nodes are fewer than 6 to draw"):
        neighbour_tokens(*rows_of(dense), 7, np.random.default_rng(0))


@pytest.mark.parametrize("make", [karate, directed, lambda: path(6)])
def test_context_by_dense_matrices(make):
    dense = make()
    n = len(dense)
    x = np.random.default_rng(0).standard_normal((n, 3))
    hat = dense + np.eye(n)
    hat = hat / np.sqrt(hat.sum(0))[:, None] / np.sqrt(hat.sum(1))[None]
    want, size = x, np.abs(x)
    for got in hop_context(*rows_of(dense), x, hops=3):
        want, size = hat @ want, hat @ size
        assert (np.abs(got - want) <= 3 * 2 * (n + 6) * U * size).all()  # sums of n terms of three factors, three hops


@pytest.mark.parametrize("make", [karate, lambda: path(20)])
def test_what_a_nodes_tokens_depend_on_is_its_ball_of_four_hops(make):
    """Tokens from two hops, each with its own features and context of two hops: nodes up to distance 4, and no more."""
    dense = make()
    n, graph = len(dense), rows_of(dense)
    steps = np.linalg.matrix_power(dense + np.eye(n, dtype=int), 4) > 0
    tokens = neighbour_tokens(*graph, 1 + max(map(len, neighbour_lists(*graph))), np.random.default_rng(0))
    moved = np.stack([np.concatenate([y, *hop_context(*graph, y)], 1) for y in np.eye(n)[:, :, None]])
    reached = moved.any(-1).T  # what a token depends on: (token, node)
    assert all((reached[row].any(0) == ball).all() for row, ball in zip(tokens, steps, strict=True))
    assert (reached.sum(1) < steps.sum(1)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_gives_the_same(kind):
    graph, x = rows_of(path(5)), np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    got = hop_context(*graph, KINDS[kind](x))
    assert all((np.asarray(a) == b).all() for a, b in zip(got, hop_context(*graph, x), strict=True))
    tokens, w = x[None], np.ones(4, np.float32)
    out = readout(KINDS[kind](tokens), KINDS[kind](w))
    assert type(out) is type(KINDS[kind](x))
    assert (np.asarray(out) == readout(tokens, w)).all()


def test_readout_by_its_formula():
    rng = np.random.default_rng(0)
    o, w = rng.standard_normal((2, 6, 3)), rng.standard_normal(6)
    out = readout(o, w)
    for b in range(2):
        with mpmath.workdps(40):
            pairs = [[*map(float, o[b, 0]), *map(float, o[b, j])] for j in range(1, 6)]
            p = [mpmath.exp(mpmath.fdot(map(float, w), pair) + mpmath.mpf(1.7)) for pair in pairs]
            want = [float(o[b, 0, e]) + mpmath.fdot(p, map(float, o[b, 1:, e])) / mpmath.fsum(p) for e in range(3)]
        # two roundings, of the mean and of the sum
        assert (
            max(abs(float(a - mpmath.mpf(c))) for a, c in zip(want, out[b], strict=True)) <= 2 * U * 2 * np.abs(o).max()
        )


def test_half_of_the_readouts_weights_do_nothing():
    """In the layer of the release too: its gradient by the first half and by the bias is 0 but for rounding."""
    torch.manual_seed(0)
    o, layer = torch.randn(4, 7, 3, dtype=torch.float64), torch.nn.Linear(6, 1).double()
    pairs = torch.cat((o[:, :1].expand(-1, 6, -1), o[:, 1:]), 2)
    out = o[:, 0] + (torch.softmax(layer(pairs), 1) * o[:, 1:]).sum(1)
    out.square().sum().backward()
    grad = layer.weight.grad[0]
    bound = 64 * U * o.abs().max() ** 3 * 4 * 6 * 10  # 24 pairs, products of a few numbers of at most that size
    assert max(grad[:3].abs().max(), layer.bias.grad.abs().max()) <= bound < 1e-3 * grad[3:].abs().min()
    changed = layer.weight.detach()[0].clone()
    changed[:3] += 5
    assert (readout(o, changed) == readout(o, layer.weight.detach()[0])).all()


def test_errors():
    start, nodes = rows_of(path(4))
    x = np.ones((4, 2))
    for graph, text in (
        ((start[:-1], nodes), "indptr: expected offsets that rise from 0 to 6, the number of indices"),
        ((start, nodes + 1), "indices: expected nodes from 0 to 3"),
        ((start * 1.0, nodes), "indptr: got float64 of shape (5,), expected a row of integers"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(text)):
            hop_context(*graph, x)
    with pytest.raises(InvalidInput, match=re.escape("x: shape is (3, 2), expected (4, features), each at least 1")):
        hop_context(start, nodes, x[:3])
    with pytest.raises(InvalidInput, match="length: got 1, expected a whole number from 2 on"):
        neighbour_tokens(start, nodes, 1, np.random.default_rng(0))
    with pytest.raises(InvalidInput, match=re.escape("weight: shape is (3,), expected (4), each at least 1")):
        readout(x[None], np.ones(3))
    with pytest.raises(InvalidInput, match="tokens' number: got 1, expected a whole number from 2 on"):
        readout(x[None, :1], np.ones(4))
