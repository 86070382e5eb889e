"""How losses go from a matrix to what is made of it and back, by hand."""

import numpy as np
import pytest

from refattn import UnsupportedProblem
from refattn.check.bounds.graph import Graph
from refattn.check.bounds.nodes import Left, Node, Right, Scaled, Summed, Turned


def node(a, axes=("q", "k"), err=0.0, var=0.0, *links, **more):
    return Node(np.array(a, np.float64), axes, err, var, *links, **more)


X, COLUMN = node([[1, 2], [3, 4]]), node([[1], [2]], ("q", "1"))
ERRORS = np.array([[0.5, 1.0], [2.0, 4.0]])


def test_a_slope_scales_errors_and_squares_variances():
    link = Scaled(X, np.array([[-2.0, 3.0]]), (2, 2))
    assert link.forward(ERRORS).tolist() == [[1, 3], [4, 12]]
    assert link.squares(ERRORS).tolist() == [[2, 9], [8, 36]]
    assert not link.spreads
    g = np.arange(8.0).reshape(2, 2, 2)
    assert (link.pull(node([[0, 0]] * 2), g) == g * [-2, 3]).all()
    steep = Scaled(X, np.inf, (2, 2))
    assert steep.forward(np.array([0.0, 1.0])).tolist() == [0.0, np.inf]  # what is exact stays so
    assert steep.squares(np.array([0.0, 1.0])).tolist() == [0.0, np.inf]


def test_a_column_that_enters_many_elements():
    link = Scaled(COLUMN, np.array([[1.0, -2.0], [3.0, 4.0]]), (2, 2))
    assert link.spreads
    g = np.arange(1.0, 9.0).reshape(2, 2, 2)
    assert link.pull(node([[0, 0]] * 2), g).tolist() == [[[1 - 4], [9 + 16]], [[5 - 12], [21 + 32]]]
    same = Scaled(COLUMN, 3.0, (2, 1))
    assert not same.spreads
    assert (same.pull(node([[0], [0]], ("q", "1")), g[:, :, :1]) == 3 * g[:, :, :1]).all()
    # of an output by column each column of the adjoint is the child's own
    out = node([[0, 0]] * 2, ("q", "v"))
    assert out.by_column
    assert not X.by_column
    assert link.pull(out, g[0]).tolist() == [[[1], [9]], [[-4], [16]]]
    values = Scaled(node([[1, 2]] * 2, ("q", "v")), 2.0, (2, 2))
    assert (values.pull(out, g[0]) == 2 * g[0]).all()
    one = Scaled(node([[1], [2]], ("q", "v")), 2.0, (2, 2))
    assert (one.pull(out, g[0]) == 2 * g[0]).all()


def test_products_take_errors_through_the_other_operand():
    b = np.array([[1.0, -2.0, 0.5], [-3.0, 0.0, 2.0]])
    left, right = Left(X, b), Right(node(b, ("k", "v")), X.a)
    assert (left.forward(ERRORS) == ERRORS @ np.abs(b)).all()
    assert (left.squares(ERRORS) == ERRORS @ b**2).all()
    assert (right.forward(np.abs(b)) == np.abs(X.a) @ np.abs(b)).all()
    assert (right.squares(np.abs(b)) == X.a**2 @ np.abs(b)).all()
    assert (left.forward(2.0) == 2 * np.ones((2, 2)) @ np.abs(b)).all()  # one for all
    assert (right.squares(2.0) == X.a**2 @ (2 * np.ones((2, 3)))).all()
    assert (left.forward(0.0), left.squares(np.zeros((2, 2))), right.forward(0.0), right.squares(0.0)) == (0.0,) * 4
    negative = Right(node(b, ("k", "v")), -X.a)
    assert (negative.forward(np.abs(b)) == X.a @ np.abs(b)).all()
    g = np.arange(6.0).reshape(2, 3)
    assert (left.pull(node(b[:, :1]), g) == g @ b.T).all()
    assert left.pull(node(b, ("q", "v")), g).tolist() == [(g[:, c, None] * b[:, c]).tolist() for c in range(3)]
    assert [Left(node([[1]], axes), b).spreads for axes in (("q", "d"), ("q", "k"), ("k", "d"))] == [True, False, False]
    assert not right.spreads


def test_sums_and_transposes():
    total, turned = Summed(X), Turned(X)
    for take in (total.forward, total.squares):
        assert take(ERRORS).tolist() == [[1.5], [6.0]]
        assert take(2.0).tolist() == [[4.0], [4.0]]
    assert total.pull(COLUMN, np.array([[[1.0], [2.0]]])).tolist() == [[[1, 1], [2, 2]]]
    assert (turned.forward(ERRORS) == ERRORS.T).all()
    assert (turned.squares(ERRORS) == ERRORS.T).all()


def test_a_definition_that_bounds_cannot_be_made_for_is_refused():
    text = "bounds: a definition must multiply by keys and values from the right, each once"
    with pytest.raises(UnsupportedProblem, match=f"^{text}$"):
        Right(X, X.a).pull(X, X.a)
    with pytest.raises(
        UnsupportedProblem, match=r"^bounds: a definition must not transpose what depends on the queries$"
    ):
        Turned(X).pull(X, X.a)


def test_a_node_takes_on_what_its_parents_lose():
    a, b = node([[1, 2]], err=0.5), node([[3, 4]], err=np.array([[1, 2]]))
    a.seen = np.array([[True, False]])
    n = node([[4, 6]], ("q", "k"), 0.25, 0.0, Scaled(b, 1.0, (1, 2)), Scaled(a, 2.0, (1, 2)), marks=["sum"])
    assert n.span.tolist() == [[2.25, 3.25]]
    assert n.seen is a.seen
    assert (n.marks, n.cast, n.amplify, n.log, n.relative) == ({"sum"}, None, None, None, 0.0)
    assert (n.under, n.flow) == ((0.0, 0.0), (0.0, 0.0))
    bent = node([[4, 6]], ("q", "k"), 0.25, 0.0, Scaled(b, 1.0, (1, 2)), curve=(np.array([[7, 8]]), 0.0))
    assert bent.span.tolist() == [[7.25, 8.25]]
    assert a.above(n)
    assert not n.above(a)
    assert not n.above(n)
    assert [x.lossy for x in (n, X, node([[1]], err=1.0), node([[1]], var=1.0))] == [True, False, True, True]


def mean(marks=("exp",), argument=0.0):
    """A mean of two values with weights 1 and 3: the weights enter above and below."""
    s = node([[0, 1]], ("q", "k"), 0.0, argument)
    w = node([[1, 3]], ("q", "k"), np.array([[0.5, 0.25]]), np.array([[1, 2]]), Scaled(s, 1.0, (1, 2)), marks=marks)
    v = node([[2, 6], [10, -2]], ("k", "v"), 0.125)
    top = node([[32, 0]], ("q", "v"), 0.0, 0.0, Left(w, v.a), Right(v, w.a))
    top.cast = np.array([[0.5, 1.5]]), np.array([[0.25, 0.5]]), np.array([[0.0, 0.0]])
    z = node([[4]], ("q", "1"), 0.0, 0.0, Summed(w))
    y = node([[8, 0]], ("q", "v"), 0.0, 0.0, Scaled(top, 0.25, (1, 2)), Scaled(z, -np.array([[2.0, 0.0]]), (1, 2)))
    return s, w, top, z, y


def test_what_is_used_twice_is_a_joint_whose_adjoint_may_cancel():
    _, w, top, _, y = mean()
    graph = Graph([y])
    found = list(graph.joints(y, 2))
    ((joint, g, parts),) = [x for x in found if x[0] is w]
    assert {id(x[0]) for x in found} == {id(w)}  # the denominator itself loses nothing
    # column 0: v_j / 4 - 2, that is -1.5 and 0.5; column 1: v_j / 4
    assert g.tolist() == [[[-1.5, 0.5]], [[1.5, -0.5]]]
    ((product, alone),) = parts
    assert product is top
    assert alone.tolist() == [[[0.5, 2.5]], [[1.5, -0.5]]]
    assert joint.flow[0].tolist() == [[0.5, 0.25]]
    assert joint.flow[1].tolist() == [[1, 2]]
    assert top.flow[0].tolist() == [[0.5, 0.5]]  # the values' errors, 1 and 3 times 1/8
    assert list(graph.joints(w, 2)) == []


def test_what_is_used_once_hands_its_losses_on():
    _, w, top, _, _ = mean()
    assert list(Graph([top]).joints(top, 2)) == []
    # 1/2 and 1/4 of the weights, 1/2 and 3/2 of their rounding, times values of 2, 6, 10 and 2
    assert top.flow[0].tolist() == [[0.5 + 1 * 2 + 1.75 * 10, 0.5 + 1 * 6 + 1.75 * 2]]
    assert top.flow[1].tolist() == [[1.25 * 4 + 2.5 * 100, 1.25 * 36 + 2.5 * 4]]
    assert (w.uses, w.spread, w.direct) == (1, False, True)


def test_a_spread_operand_is_a_joint_only_where_it_loses_something():
    for err, var, joints in ((0.0, 0.0, 0), (0.5, 0.0, 1), (0.0, 0.5, 1)):
        q = node([[1, 2]], ("q", "d"), err, var)
        s = node([[3, 5]], ("q", "k"), 0.0, 0.0, Left(q, np.array([[1.0, 1.0], [1.0, 2.0]])))
        out = node([[8, 0]], ("q", "v"), 0.0, 0.0, Left(s, np.ones((2, 2))))
        found = list(Graph([out]).joints(out, 2))
        assert len(found) == joints
        assert all((x.tolist(), y) == ([[[2, 3]]] * 2, []) for _, x, y in found)
        assert q.spread
        assert s.uses == 1


@pytest.mark.parametrize("first", [0, 1])
def test_an_operand_is_spread_by_any_of_its_uses(first):
    q = node([[1, 2]], ("q", "d"), 0.5)
    s = node([[3, 5]], ("q", "k"), 0.0, 0.0, Left(q, np.array([[1.0, 1.0], [1.0, 2.0]])))
    double = node([[2, 4]], ("q", "k"), 0.0, 0.0, Scaled(q, 2.0, (1, 2)))
    links = [Scaled(x, 1.0, (1, 2)) for x in ((s, double) if first else (double, s))]
    total = node([[5, 9]], ("q", "k"), 0.0, 0.0, *links)
    out = node([[14]], ("q", "1"), 0.0, 0.0, Summed(total))
    ((joint, g, _),) = Graph([out]).joints(out, 1)
    assert joint is q
    assert q.spread
    assert g.tolist() == [[[1 + 1 + 2, 1 + 2 + 2]]]


@pytest.mark.parametrize(("axes", "joints"), [(("1", "1"), 1), (("q", "1"), 1), (("1", "q"), 1), (("k", "1"), 0)])
def test_what_all_queries_share_is_a_joint_too(axes, joints):
    """What keys share is not: their losses are taken on."""
    one = node([[3]], axes, 0.5)
    s = node([[3, 6]], ("q", "k"), 0.0, 0.0, Scaled(one, np.array([[1.0, 2.0]]), (1, 2)))
    out = node([[9]], ("q", "1"), 0.0, 0.0, Summed(s))
    assert len(list(Graph([out]).joints(out, 1))) == joints
    assert np.all(out.flow[0] == (0.0 if joints else 0.5 + 2 * 0.5))


def test_a_curve_counts_whole_where_nothing_was_left_behind():
    """By all of its argument's error; behind a joint the tangent is the joint's, and the rest is added."""
    s = node([[1, 2]], err=0.5)
    curve = np.array([[4.0, 5.0]]), np.array([[1.0, 2.0]])
    f = node([[1, 4]], ("q", "k"), 0.25, 0.0, Scaled(s, 2.0, (1, 2)), curve=curve)
    Graph([f])
    assert f.flow[0].tolist() == [[4.25, 5.25]]
    assert f.direct
    once = node([[1, 2]], ("q", "k"), 0.5, 0.0, Scaled(s, 1.0, (1, 2)))
    behind = node([[1, 2]], ("q", "k"), 0.125, 0.0, Scaled(once, 1.0, (1, 2)))
    f = node([[1, 4]], ("q", "k"), 0.25, 0.0, Scaled(behind, 2.0, (1, 2)), curve=curve)
    both = node([[2, 6]], ("q", "k"), 0.0, 0.0, Scaled(f, 1.0, (1, 2)), Scaled(once, 1.0, (1, 2)))
    graph = Graph([both])
    assert (behind.direct, f.direct, once.uses) == (False, False, 2)
    assert f.flow[0].tolist() == both.flow[0].tolist() == [[1 + 0.25 + 2 * 0.125, 2 + 0.25 + 2 * 0.125]]
    ((joint, g, parts),) = graph.joints(both, 1)
    assert joint is once
    assert (np.broadcast_to(g, (1, 1, 2)) == 3).all()
    assert parts == []


@pytest.mark.parametrize(("argument", "wild"), [([[1 / 16, 1 / 16]], False), ([[0, 0.07]], True), ([[0.07, 0]], True)])
def test_rows_whose_exponential_cannot_be_foreseen_have_no_variance(argument, wild):
    for marks in (("exp",), ()):
        _, w, _, _, y = mean(marks, np.array(argument))
        Graph([y])
        assert np.isnan(w.flow[1]).all() == np.isnan(w.flow[1]).any() == (wild and bool(marks))
    _, w, _, _, y = mean(("exp",), np.array([[0, 1.0]]))
    w.a = np.array([[1.0, 0.0]])  # a key that is not seen
    Graph([y])
    assert not np.isnan(w.flow[1]).any()
