"""What every operation of the arithmetic of losses notes, against the proof written out for small matrices."""

import numpy as np

from refattn.check.bounds.losses import Losses, variance_of
from refattn.check.model import C, flash

from .coarse import CU, DEPTH, EXP, SEEN, TILES, TINY, TINY_W, S, U, W, alike, arithmetic, leaf, scores, times, walk


def test_a_product_over_features():
    f = arithmetic()
    q = leaf(f, [[1, -2, 4]], ("q", "d"), [[0.5, 0.25, 0]], [[1, 2, 3]])
    k = leaf(f, [[3, 1], [-1, 0], [2, 1]], ("d", "k"), [[0.125, 0], [0, 0.5], [0.25, 1]], [[1, 0], [2, 1], [0, 5]])
    n = (q @ k).node
    (a, e), (b, d) = ((np.abs(x.a), x.node.err) for x in (q, k))
    assert n.a.tolist() == [[13, 5]]
    assert alike(n.err, times(5) * ((a + e) @ (b + d)), e @ d)
    assert alike(n.span, n.err, e @ b, a @ d)
    for j in (0, 1):
        terms = q.a[0] * k.a[:, j]
        assert alike(n.var[0, j], CU * (3 * walk(terms) + np.sum(terms**2)))
    assert alike(variance_of(n), n.var, q.node.var @ b**2, a**2 @ k.node.var)
    assert (n.axes, n.marks, n.cast, f.weights) == (("q", "k"), {"raw"}, None, None)
    q.node.seen = np.array([[True, False, True]])
    assert (q @ k).node.seen is q.node.seen
    assert alike(n.relative, times(5))


def weighed(f, err, marks=("positive", "shifted")):
    """Weights of which a row sees four keys; values with errors, or without."""
    w = leaf(f, [[1, 0.5, 0, 2, 0, 2.0**-12]], ("q", "k"), [[0.25, 0, 0, 0.5, 0, 0]], 0.0, marks, SEEN)
    v = leaf(f, np.arange(12).reshape(6, 2) - 4, ("k", "v"), np.full((6, 2), err), 0.0, marks)
    return w, v


def test_weights_meet_values():
    for err in (0.0, 0.5):
        f = arithmetic()
        w, v = weighed(f, err)
        n, passes = (w @ v).node, DEPTH + TILES + 3
        (a, e), (b, d) = ((np.abs(x.a), x.node.err) for x in (w, v))
        size, reached, lost = (a + e) @ (b + d), SEEN @ (b + d), W * (a + e) + TINY_W * SEEN
        own = times(passes) * size + passes * TINY + e @ d
        assert alike(n.err, own, lost @ d)
        assert alike(n.span, own, e @ b, a @ d, W * size, TINY_W * reached)
        assert alike(n.relative, times(passes))
        assert alike(n.cast[0], lost)
        assert alike(n.cast[1], C * W**2 * a**2, TINY_W**2 / 3 * SEEN)
        assert alike(n.under[0], TINY_W * reached, passes * TINY)
        assert alike(n.under[1], TINY_W**2 / 3 * (SEEN @ b**2), passes * TINY**2 / 3)
        for c in (0, 1):
            terms = w.a[0] * v.a[:, c]
            moved = DEPTH * walk(terms) + np.sum(terms**2) + (TILES + 1**2) * walk(terms)  # the last tile is idle
            assert alike(n.var[0, c], CU * moved, (DEPTH + TILES) * TINY**2 / 3)
        assert n.marks == {"positive", "product"}
        assert f.weights is w
        assert n.seen is None


def test_weights_that_no_maximum_shifts_are_not_rescaled():
    f = arithmetic()
    w, v = weighed(f, 0.0, ())
    n = (w @ v).node
    size = (np.abs(w.a) + w.node.err) @ np.abs(v.a)
    assert alike(n.err, times(DEPTH + 3) * size, (DEPTH + 3) * TINY)
    assert n.marks == {"product"}
    w.node.seen = None  # six keys, of which two are added up before they join the sum: five additions
    assert alike((w @ v).node.relative, times(5 + 3))
    assert alike((w @ v).node.cast[0], W * (np.abs(w.a) + w.node.err) + TINY_W)


def test_a_row_is_added_up():
    f = arithmetic()
    w, _ = weighed(f, 0.0)
    w.node.log = np.array([[0.5, 0.125, 0, 0.25, 0, 0]])
    n, passes, size = w.sum().node, DEPTH + TILES + 3, 3.5 + 2.0**-12 + 0.75
    assert alike(n.a, 3.5 + 2.0**-12)
    assert alike(n.err, times(passes) * size, passes * TINY)
    assert alike(n.span, n.err, 0.75)
    terms = w.a[0]
    assert alike(n.var, CU * (DEPTH * walk(terms) + np.sum(terms**2) + TILES * walk(terms)))
    assert alike(n.relative, times(passes))
    # 1 - x near 1 is rounded to 2**-53 where its logarithm is about 2**-7
    assert abs(n.log.item() - 0.5 + np.log1p(-(times(passes) + passes * TINY / n.a.item()))) <= 2.0**-52
    assert (n.axes, n.marks) == (("q", "1"), {"positive", "shifted", "sum"})
    two = leaf(f, [[1, 2], [1, 2]], ("q", "k"))
    two.node.log = np.array([[1.0, 2.0], [4.0, 3.0]])
    assert np.diff(two.sum().node.log, axis=0).tolist() == [[2.0]]


def test_what_scores_go_through_is_stored_in_their_type():
    """One rounding of the result's size and one of storing it; queries and keys alone, or features, are stored."""
    for axes, stored in ((("q", "k"), S), (("q", "d"), S), (("q", "v"), 0.0), (("q", "1"), 0.0)):
        f = arithmetic()
        x = leaf(f, [[1.0, -2.0]], axes, [[0.5, 0.25]], [[2.0**-9, 2.0**-8]])
        n = (x * 4.0).node
        own = (times(1) + stored * (1 + times(1))) * (4 * np.abs(x.a) + 4 * x.node.err) + TINY
        assert alike(n.err, own)
        assert alike(n.span, own, 4 * x.node.err)
        assert alike(n.var, (CU + C * stored**2) * 16 * x.a**2)
        assert alike(variance_of(n), n.var, 16 * x.node.var)
        assert n.axes == axes


def both(f):
    """A matrix and a column, each with errors."""
    x = leaf(f, [[1.0, -2.0], [4.0, 8.0]], ("q", "v"), [[0.5, 0.25], [0, 1]], 0.0, {"positive"})
    return x, leaf(f, [[2.0], [-4.0]], ("q", "1"), [[0.125], [0.5]], 0.0, {"positive"})


def test_sums_differences_and_products_of_two():
    f = arithmetic()
    x, y = both(f)
    e, d = x.node.err, y.node.err
    for found, value, moved, meet in (
        (x + y, x.a + y.a, e + d, 0.0),
        (x - y, x.a - y.a, e + d, 0.0),
        (x * y, x.a * y.a, np.abs(y.a) * e + np.abs(x.a) * d, e * d),
    ):
        n = found.node
        assert (n.a == value).all()
        assert alike(n.err, times(1) * (np.abs(value) + meet + moved), TINY, meet)
        assert alike(n.span, n.err, moved)
        assert alike(n.var, CU * value**2)
        assert n.axes == ("q", "v")
    n = (-x).node
    assert (n.a == -x.a).all()
    assert (n.err, n.var) == (0.0, 0.0)
    assert (n.span == e).all()
    n = x.T.node
    assert (n.a == x.a.T).all()
    assert (n.span == e.T).all()
    assert (n.axes, n.marks) == (("v", "q"), {"positive"})


def test_what_cannot_be_negative():
    f = arithmetic()
    x, y = both(f)
    wanted = (
        (x + y, 1),
        (x + 0.0, 1),
        (x + -1.0, 0),
        (x - y, 0),
        (x * y, 1),
        (x * 0.0, 1),
        (x * -1.0, 0),
        (x / 2.0, 1),
    )
    assert [("positive" in z.node.marks) for z, _ in wanted] == [bool(z) for _, z in wanted]
    assert "positive" not in (x / -2.0).node.marks
    x.node.marks = frozenset({"shifted"})
    assert [(z.node.marks) for z in (x + y, x * y, x * 2.0, x / 2.0)] == [set(), *[{"shifted"}] * 3]


def test_logarithms_of_sums_take_the_larger_error():
    f = arithmetic()
    x, y = both(f)
    x.node.log, y.node.log = np.array([[0.5, 0.25], [0, 0.125]]), np.array([[0.375], [0.25]])
    assert alike((x + y).node.log, [[0.5, 0.375], [0.25, 0.25]], -np.log1p(-U))
    assert alike((x + 1.0).node.log, x.node.log, -np.log1p(-U))
    y.node.log = None
    assert (x + y).node.log is None


def test_a_sum_and_one_more_term_is_rounded_once_more():
    f = arithmetic()
    total = leaf(f, [[3.0]], ("q", "1"), marks={"sum", "positive"})
    total.node.relative = times(5)
    n = (total + 2.0).node
    assert n.marks == {"positive", "sum", "more"}
    assert alike(n.relative, times(5), times(1))
    n = (total + -2.0).node
    assert (n.marks, n.relative) == (set(), 0.0)


def test_the_maximum_is_taken_off_and_put_back():
    f = arithmetic()
    s = scores(f)
    m = s.shift(SEEN)
    assert (m.a, m.node.err, m.node.span, m.node.marks, m.node.axes) == (4.0, 0.0, 0.0, {"shift"}, ("q", "1"))
    assert s.shift(SEEN & (np.arange(6) < 2)).a == 1.0
    assert s.shift(SEEN, leaf(f, [[7.0]], ("1", "1"))).a == 7.0
    assert s.shift(~SEEN & SEEN).a == 0.0
    n, y, e = (s - m).node, s.a - 4, s.node.err
    size = 2 * np.abs(y) + np.abs(s.a) + 3 * e
    assert alike(n.err, (U + S * (1 + U)) * size, TINY)
    assert alike(n.span, n.err, e)
    assert alike(n.var, (CU + C * S**2) * size**2)
    assert (n.axes, n.marks) == (("q", "k"), {"shifted"})
    top = leaf(f, [[4.0]], ("q", "1"), marks={"shift"})
    lse = leaf(f, [[0.5]], ("q", "1"), 0.25)
    n = (top + lse).node
    assert alike(n.err, times(1) * (4.5 + 0.25), TINY, 4 * U * 4)
    assert alike(n.span, n.err, 0.25)
    assert alike(n.var, CU * (4.5**2 + 4**2))


def test_a_quotient_grows_by_what_its_denominator_may_lack():
    f = arithmetic()
    x, z = both(f)
    e, d, size = x.node.err, z.node.err, np.abs(z.a)
    n, y = (x / z).node, x.a / z.a
    by = 1 / (1 - d / size) / size
    moved = by * e + np.abs(y) * by * d
    assert alike(n.err, times(1) * (np.abs(y) + moved), TINY)
    assert alike(n.span, n.err, moved)
    assert n.marks == {"quotient"}
    z.node.log = np.full((2, 1), 2.0**-7)  # less than what 1/8 and 1/16 say
    by = np.exp(2.0**-7) / size
    assert alike(
        (x / z).node.span, times(1) * (np.abs(y) + by * e + np.abs(y) * by * d), TINY, by * e, np.abs(y) * by * d
    )
    n = (x / 4.0).node
    assert alike(n.span, times(1) * (np.abs(x.a) + e) / 4, TINY, e / 4)


def test_a_quotient_by_nothing_may_be_anything():
    """And NumPy has nothing to say of it."""
    f = arithmetic()
    x, z = both(f)
    z.a[1] = 0.0
    assert (x / z).node.span.tolist()[1] == [np.inf] * 2


def test_a_mean_keeps_what_its_sums_lose():
    f = arithmetic()
    w, v = weighed(f, 0.0)
    top, z = w @ v, w.sum()
    n, y = (top / z).node, top.a / z.a
    assert n.marks == {"mean", "quotient"}
    assert alike(n.err, U * np.abs(y), TINY, top.node.under[0])
    assert alike(n.amplify, 1 / (1 - z.node.span / z.a))
    assert alike(n.relative, top.node.relative, z.node.relative)
    assert alike(n.var, CU * y**2, top.node.under[1])
    assert "more" in (top / (z + 1.0)).node.marks
    z.node.marks = frozenset({"sum"})
    assert (top / z).node.marks == {"quotient"}


def test_an_exponential():
    for marks, rescales in (((), 0), (("shifted",), TILES)):
        f = arithmetic()
        s = scores(f, marks=marks)
        n, y, e = s.exp(SEEN).node, np.where(SEEN, np.exp(s.a), 0), s.node.err
        passes = times((1 + rescales) * (EXP + 1))
        assert alike(n.a, y)
        assert alike(n.curve[0], y * np.expm1(e))
        assert alike(n.curve[1], y * (np.expm1(e) - e))
        assert alike(n.err, passes * (y + y * np.expm1(e)), TINY * SEEN)
        assert alike(n.span, n.err, n.curve[0])
        assert alike(n.var, ((U * EXP) ** 2 / 3 + (1 + rescales) * CU) * y**2, TINY**2 / 3 * SEEN)
        assert alike(n.log, np.where(SEEN, e - np.log1p(-passes - TINY / np.exp(s.a)), 0))
        assert n.marks == {"positive", "exp", *marks}
        assert (n.seen == SEEN).all()
    assert scores(arithmetic()).exp().node.seen is None


def test_scores_of_an_exponential_that_nothing_rounded_are_stored_first():
    f = arithmetic()
    plain, raw = (scores(f, marks=m).exp().node for m in ((), ("raw",)))
    s = np.abs(scores(f).a)
    assert alike(raw.err, plain.err, S * raw.a * s)
    assert alike(raw.var, plain.var, C * (S * raw.a * s) ** 2)


def test_features_are_stored():
    f = arithmetic()
    plain, stored = (leaf(f, [[0.5, -1.0]], axes).exp().node for axes in (("q", "v"), ("q", "d")))
    assert alike(stored.err, plain.err, S * plain.a)
    assert alike(stored.var, plain.var, C * (S * plain.a) ** 2)
    assert leaf(f, [[0.5, -1.0]], ("q", "d")).relu().node.err.tolist() == [[0.0, 0.0]]  # which rounds nothing


def test_a_sigmoid():
    f = arithmetic()
    s = scores(f)
    e, x = s.node.err, s.a
    y = 1 / (1 + np.exp(-x))
    n = s.sigmoid().node
    # sums of positive numbers less others of the size: 2**-50 of y
    whole = np.maximum(1 / (1 + np.exp(-x - e)) - y, y - 1 / (1 + np.exp(-x + e)))
    assert (np.abs(n.curve[0] - whole) <= 2.0**-50 * y).all()
    assert (np.abs(n.curve[1] - y * (1 - y) * (np.expm1(e) - e)) <= 2.0**-50 * y).all()
    assert alike(n.err, times(EXP + 3) * (y + n.curve[0]), TINY)
    assert alike(n.var, ((U * EXP) ** 2 / 3 + 3 * CU) * y**2, TINY**2 / 3)
    assert (np.abs(variance_of(n) - n.var - (y * (1 - y)) ** 2 * s.node.var) <= 2.0**-50 * y).all()
    assert n.marks == {"positive"}
    assert (s.sigmoid(SEEN).a == np.where(SEEN, n.a, 0)).all()


def test_a_tanh():
    f = arithmetic()
    s = scores(f)
    n, y, e = s.tanh().node, np.tanh(s.a), s.node.err
    whole = np.maximum(np.tanh(s.a + e) - y, y - np.tanh(s.a - e))
    assert (np.abs(n.curve[0] - whole) <= 2.0**-50).all()
    assert alike(n.curve[1], (1 - y * y) * (np.expm1(2 * e) - 2 * e) / 2)
    assert alike(n.err, (times(2) + S * (1 + times(2))) * (np.abs(y) + n.curve[0]), TINY)
    assert alike(n.var, (2 * CU + C * S**2) * y**2)
    assert alike(variance_of(n), n.var, (1 - y * y) ** 2 * s.node.var)
    assert n.marks == set()


def test_a_logarithm():
    f = arithmetic()
    z = leaf(f, [[4.0], [2.0]], ("q", "1"), [[1.0], [4.0]], [[2.0**-9], [0]], {"positive"})
    n, y = z.log().node, np.log(z.a)
    assert alike(n.curve[0][0], -np.log1p(-0.25))
    assert alike(n.curve[1][0], -np.log1p(-0.25) - 0.25)
    assert n.curve[0][1] == n.curve[1][1] == np.inf
    assert alike(n.err[0], times(4) * (y[0] - np.log1p(-0.25) + 1))
    assert alike(n.var, CU * (1 + y * y), (U * EXP) ** 2)
    assert alike(variance_of(n)[0], n.var[0], 2.0**-9 / 16)
    z.node.log = np.array([[0.125], [0.5]])
    assert z.log().node.curve[0].tolist() == [[0.125], [0.5]]
    assert z.log().node.curve[1].tolist() == [[0.0], [0.0]]
    z.node.marks = frozenset()
    assert alike(z.log().node.var, CU * (1 + y * y))


def test_a_power():
    f = arithmetic()
    s = scores(f)
    x, e = np.abs(s.a), s.node.err
    for p in (3, 4):
        n, y = s.power(p, SEEN).node, np.where(SEEN, s.a**p, 0)
        whole = np.where(SEEN, (x + e) ** p - x**p, 0)
        # the difference of two numbers of the size of (x + e)**p
        off = 2.0**-50 * (x + e) ** p
        assert alike(n.a, y)
        assert (np.abs(n.curve[0] - whole) <= off).all()
        assert (np.abs(n.curve[1] - np.where(SEEN, whole - p * x ** (p - 1) * e, 0)) <= off).all()
        assert alike(n.err, times(p + 1) * (np.abs(y) + n.curve[0]), TINY * SEEN)
        assert alike(n.var, (p + 1) * CU * y**2)
        assert alike(variance_of(n), n.var, np.where(SEEN, (p * x ** (p - 1)) ** 2 * s.node.var, 0))
        assert n.marks == ({"positive"} if p == 4 else set())


def test_relu_and_what_it_may_mistake():
    f = arithmetic()
    x = leaf(f, [[2.0, -1.0, -1.0, 0.0]], ("q", "d"), [[0.5, 3.0, 0.5, 0.25]], 2.0**-9)
    n = x.relu().node
    assert n.a.tolist() == [[2, 0, 0, 0]]
    assert n.curve[0].tolist() == [[0.5, 2, 0, 0.25]]
    assert n.curve[1].tolist() == [[0, 2, 0, 0.25]]
    assert (n.err == 0).all()
    assert variance_of(n).tolist() == [[2.0**-9, 0, 0, 0]]
    assert n.marks == {"positive"}
    above = x.positive()
    assert above.tolist() == [[True, False, False, False]]
    g = leaf(f, [[4.0, 5.0, 6.0, -7.0]], ("q", "d"), 0.5, marks={"positive", "shifted", "sum"})
    n = g.where(above).node
    assert n.err.tolist() == [[0, 5.5, 0, 7.5]]  # where the error reaches 0, the slope may be either
    assert n.span.tolist() == [[0.5, 5.5, 0, 7.5]]
    assert n.marks == {"positive", "shifted"}
    assert g.where(np.array(above)).node.span.tolist() == [[0.5, 0, 0, 0]]  # another mask is sure


def test_where_keeps_what_is_seen():
    f = arithmetic()
    s = scores(f)
    assert s.where(None) is s
    n = s.where(SEEN).node
    assert (n.a == np.where(SEEN, s.a, 0)).all()
    assert (n.span == np.where(SEEN, s.node.err, 0)).all()
    assert (variance_of(n) == np.where(SEEN, s.node.var, 0)).all()
    assert (n.err, n.var) == (0.0, 0.0)
    assert (n.seen == SEEN).all()
    assert (s.where(SEEN).T.node.seen == SEEN.T).all()
    none = s.zeros().node
    assert (none.a == 0).all()
    assert (none.a.shape, none.axes, none.err, none.var, none.span) == ((1, 6), ("q", "k"), 0.0, 0.0, 0.0)


def test_the_largest_size_of_a_row():
    f = arithmetic()
    n = scores(f).absmax(SEEN).node
    assert (n.a.item(), n.err.item(), n.var.item()) == (4.0, 6 * 2.0**-6, 4 * 2.0**-9)
    assert n.axes == ("q", "1")
    n = scores(f).absmax(SEEN & (np.arange(6) < 3)).node
    assert (n.a.item(), n.err.item(), n.var.item()) == (1.0, 2 * 2.0**-6, 2.0**-9)
    assert scores(f).absmax(SEEN & ~SEEN).a == 0
    none = leaf(f, np.zeros((2, 0)), ("q", "k")).absmax(np.zeros((2, 0), bool)).node  # there may be no key
    assert [x.tolist() for x in (none.a, none.err, none.var)] == [[[0.0], [0.0]]] * 3


def test_operands_and_options_are_exact():
    f = arithmetic()
    shapes = {(1, 1): ("1", "1"), (2, 1): ("q", "1"), (1, 3): ("1", "k"), (2, 3): ("q", "k")}
    assert [f.array(np.ones(s)).node.axes for s in shapes] == list(shapes.values())
    assert f.state(np.ones((2, 3))).node.axes == ("d", "v")
    assert (f.number(3), f.rsqrt(16)) == (3.0, 0.25)
    x = f.array([[1, 2]])
    assert (x.a.dtype, x.shape, x.node.span, x.node.var) == (np.float64, (1, 2), 0.0, 0.0)


def test_an_inverse_is_off_by_what_its_matrix_is():
    """Of numbers above 0 errors of one sign take it furthest: to (I - a - e)^-1, however large they are."""
    a = np.array([[0, 0, 0], [2.0, 0, 0], [1.0, 3.0, 0]])
    e = np.array([[0, 0, 0], [0.5, 0, 0], [0.25, 1.0, 0]])
    f = Losses(flash("float64"), 3)
    y = f.leaf(a, ("k", "k"), e, e).geometric(8)
    unit = np.eye(3)
    assert (y.a == np.linalg.inv(unit - a)).all()
    far = np.linalg.inv(unit - a - e) - y.a
    assert (abs(y.node.span - far) <= 2.0**-48 * abs(far).max()).all()
    first = y.a @ e @ y.a
    assert (abs(y.node.links[0].forward(e) - first) <= 2.0**-48 * first.max()).all()
    assert (y.node.links[0].squares(e) == y.a**2 @ e @ y.a**2).all()


def test_substitution_rounds_each_number_of_a_row():
    """One number: the product and what a block's other product may add, 3 u of it; of two in a row 5 u."""
    f, u, tiny = Losses(flash("float32"), 3), 2.0**-24, 2.0**-150
    y = f.leaf(np.array([[0, 0], [4.0, 0]]), ("k", "k")).geometric(8).node
    wanted = ((1 + u) ** 3 - 1) * 4 + tiny
    assert abs(y.err[1, 0] - wanted) <= 2.0**-48 * wanted
    assert y.err[0, 0] == y.err[0, 1] == 0
    f.ratios = np.array([[0.0], [0.5]])
    y = f.leaf(np.array([[0, 0], [4.0, 0]]), ("k", "k")).geometric(8).node
    assert y.err[1, 0] == wanted + 2
    assert y.err[0, 0] == 0


def test_what_chance_is_not_asked_for_is_not_computed():
    plain, bare = (Losses(flash("float32"), 2, chance=x) for x in (True, False))
    one, two = (f.leaf(np.ones((2, 2)), ("k", "d")) @ f.leaf(np.ones((2, 2)), ("d", "k")) for f in (plain, bare))
    assert (one.node.span == two.node.span).all()
    assert np.all(one.node.var > 0)
    assert not np.any(two.node.var)
