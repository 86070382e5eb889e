"""The arithmetic that rounds, at its limits: every operation off by all that its model allows, one way."""

from dataclasses import replace

import numpy as np
import pytest

from refattn import VARIANTS, Problem
from refattn.check.bounds.rounded import HOWS, Rounded, Rounding, simulate, simulate_scores, simulate_steps
from refattn.check.model import Model, inside_type
from refattn.dtypes import FORMATS
from refattn.exact.choosing import candidates
from refattn.exact.heads import heads

U, TINY, S, W = 2.0**-11, 2.0**-25, 2.0**-8, 2.0**-3
MODEL = Model("float16", "float8_e5m2", "bfloat16", exp_ulps=3, tile=2, chain=2)
UP = {"up": 1.0, "down": -1.0}


def arithmetic(how="up", model=MODEL, n_k=6):
    return Rounding(model, how, np.random.default_rng(0), n_k)


def off(x, sign, u=U, tiny=TINY):
    """Numbers off by u of their size, or by half the smallest number; 0 and signs stay."""
    y = np.where(x == 0, 0.0, x + sign * np.maximum(u * np.abs(x), tiny))
    return np.where(np.signbit(y) == np.signbit(x), y, 0.0)


def stored(x, sign):
    return off(off(x, sign), sign, S, 2.0**-134)


X = np.array([[1.0, -3.0, 0.5, 2.0, 0.0, 2.0**-24], [4.0, 1.0, -1.0, 0.25, 8.0, -(2.0**-26)]])


def test_where_errors_lie():
    for how, wanted in (("up", {1.0}), ("down", {-1.0}), ("alternating", {-1.0, 1.0})):
        assert set(arithmetic(how).spread((8, 8)).ravel().tolist()) == wanted
    x = arithmetic("random").spread((64, 64))
    assert (np.abs(x) <= 1).all()
    assert x.min() < -0.5 < 0.5 < x.max()
    assert {"nearest", "random", "alternating", "up", "down"} == set(HOWS)


@pytest.mark.parametrize(("how", "sign"), UP.items())
def test_a_rounding_goes_to_its_limit(how, sign):
    f = arithmetic(how)
    assert (f.rounded(X) == off(X, sign)).all()
    assert (f.rounded(X, times=3.0) == off(X, sign, 3 * U)).all()
    assert (f.rounded(X, FORMATS["float32"]) == off(X, sign, 2.0**-24, 2.0**-150)).all()
    assert (f.stored(X, "bfloat16") == off(X, sign, S, 2.0**-134)).all()
    assert (f.stored(X, "float16") == X).all()


def test_to_nearest():
    f, x = arithmetic("nearest"), X + 2.0**-13
    assert (f.rounded(x) == x.astype(np.float16)).all()
    assert (f.rounded(x, times=2.0) != x.astype(np.float16)).any()
    assert (f.rounded(x, inside_type("tf32")) == x).all()
    assert (f.added(x, x.T, 3) == (x @ x.T).astype(np.float16)).all()


@pytest.mark.parametrize(("how", "sign"), UP.items())
def test_sums_round_every_product_and_every_addition(how, sign):
    f, y = arithmetic(how), X.T[:, :1]
    assert (f.added(X, y, 3) == ((X[:, :, None] * y) * (1 + sign * 4 * U)).sum(1)).all()
    by_row = np.array([[3], [5]])
    assert (f.added(X, y, by_row) == ((X[:, :, None] * y) * (1 + sign * (by_row[:, :, None] + 1) * U)).sum(1)).all()


SEEN = np.array([[True] * 4 + [False] * 2, [True] * 6])


@pytest.mark.parametrize(("how", "sign"), UP.items())
def test_products_and_sums_of_weights(how, sign):
    """Four keys and six: four and five additions, of a running sum three rescales more."""
    f, values = arithmetic(how), Rounded(arithmetic(how), np.arange(12.0).reshape(6, 2), "value")
    steps, ones = np.array([[4], [5]]), np.ones((6, 1))
    for shifted, rescales in ((True, 3), (False, 0)):
        w = Rounded(f, X, None, SEEN, shifted)
        found = w @ values
        assert (found.a == f.added(off(X, sign, W, 2.0**-17), values.a, steps + rescales)).all()
        assert found.kind == "value"
        assert (w.sum().a == f.added(X, ones, steps + rescales)).all()
        assert w.sum().kind == "column"
    bare = Rounded(f, X, None)
    assert (bare.sum().a == f.added(X, ones, 5)).all()
    assert ((bare @ values).a == f.added(off(X, sign, W, 2.0**-17), values.a, 5)).all()
    features = bare @ Rounded(f, X.T, None)
    assert (features.a == f.added(X, X.T, 6)).all()
    assert (features.kind, (bare @ Rounded(f, X.T, "state")).kind) == (None, "value")


@pytest.mark.parametrize(("how", "sign"), UP.items())
def test_what_scores_go_through(how, sign):
    f = arithmetic(how)
    s, c = Rounded(f, X, None, SEEN, True), Rounded(f, X[:, :1], "column")
    for found, exact in (
        (s + 2.0, X + 2),
        (s + c, X + X[:, :1]),
        (s - 2.0, X - 2),
        (s * -0.5, X * -0.5),
        (s * c, X * X[:, :1]),
    ):
        assert (found.a == stored(exact, sign)).all()
        assert (found.kind, found.seen is SEEN, found.shifted) == (None, True, True)
    assert ((s / 4.0).a == stored(X / 4, sign)).all()
    assert (s.tanh().a == off(off(np.tanh(X), sign, 2 * U), sign, S, 2.0**-134)).all()
    assert ((-s).a == -X).all()
    assert ((-s).seen is SEEN, s.zeros().seen is SEEN, (s.zeros().a == 0).all()) == (True, True, True)
    two = Rounded(f, X[:, :2], None)
    assert ((two * 2.0).a == stored(2 * two.a, sign)).all()
    assert (two - Rounded(f, X[:, :1], "shift")).shifted
    assert ((c * 2.0).a == off(2 * c.a, sign)).all()  # a column is no score
    assert ((Rounded(f, X, "value") * 2.0).a == off(2 * X, sign)).all()
    assert ((Rounded(f, X, "state") * 2.0).a == off(2 * X, sign)).all()
    assert (Rounded(f, X, None) * s).seen is SEEN
    assert s.T.a.tolist() == X.T.tolist()
    assert (s.shape, s.number(3)) == ((2, 6), 3.0)
    assert s.zeros().f is f
    assert (s.positive() == (X > 0)).all()


@pytest.mark.parametrize(("how", "sign"), UP.items())
def test_the_maximum_is_taken_off_and_put_back(how, sign):
    f = arithmetic(how)
    s = Rounded(f, X, None, SEEN)
    m = s.shift(SEEN)
    assert m.a.tolist() == [[2.0], [8.0]]
    assert s.shift(SEEN, Rounded(f, np.array([[5.0]]), None)).a.tolist() == [[5.0], [8.0]]
    assert s.shift(~SEEN & SEEN).a.tolist() == [[0.0], [0.0]]
    found = s - m
    assert (found.a == off(off(off(X, sign) - m.a, sign), sign, S, 2.0**-134)).all()
    assert (found.seen is SEEN, found.shifted, found.kind) == (True, True, None)
    one = Rounded(f, X[:, :1], "column")
    assert ((one - m).a == off(off(X[:, :1], sign) - m.a, sign)).all()
    assert not (one - m).shifted
    nearest = arithmetic("nearest")  # reads stored scores, takes the maximum off inside
    found = Rounded(nearest, X + 2.0**-9, None) - Rounded(nearest, m.a, "shift")
    assert (found.a == ((X + 2.0**-9).astype(np.float16) - m.a).astype(np.float16)).all()
    assert (m.kind, (m + one).kind, (one + m).kind) == ("shift", "column", "column")
    assert s.absmax(SEEN).a.tolist() == [[3.0], [8.0]]
    assert s.absmax(SEEN).kind == "column"
    assert (s * 0.125).absmax(SEEN & (X == 1)).a.tolist() == [[(s * 0.125).a[0, 0]], [(s * 0.125).a[1, 1]]]


@pytest.mark.parametrize(("how", "sign"), UP.items())
def test_functions_are_off_by_their_ulps_and_a_rounding(how, sign):
    f = arithmetic(how)
    for shifted, ulps in ((False, 3), (True, 3 + 3 * 4)):
        found = Rounded(f, X, None, None, shifted).exp(SEEN)
        assert (found.a == np.where(SEEN, off(np.exp(X) * (1 + sign * ulps * U), sign), 0)).all()
    s = Rounded(f, X, None, SEEN)
    y = np.where(X >= 0, 1.0, np.exp(-np.abs(X))) / (1 + np.exp(-np.abs(X)))
    assert (s.sigmoid().a == off(y * (1 + sign * 5 * U), sign)).all()
    assert (s.power(3).a == off(X**3 * (1 + sign * 2 * U), sign)).all()
    positive = np.abs(X) + 1
    assert (Rounded(f, positive, None).log().a == off(np.log(positive) * (1 + sign * 3 * U), sign)).all()
    assert (s.relu().a == np.maximum(X, 0)).all()
    assert s.exp().seen is SEEN
    assert (Rounded(arithmetic("nearest"), X, None).exp().a == np.exp(X).astype(np.float16)).all()


def test_operands_and_numbers():
    f = arithmetic("up", replace(MODEL, operands="float8_e5m2"))
    q, k, v = (np.array(x, np.float16).reshape(1, 1, 3, 1) for x in ((1, 2, 3), (4, 5, 6), (1.5, 2.5, 7)))
    (one,) = heads(Problem(q, k, v))
    found = f.operands(one, slice(1, 3))
    tiny = 2.0**-17
    for x, exact, kind in zip(found, (q[0, 0, 1:], k[0, 0], v[0, 0]), (None, None, "value"), strict=True):
        assert (x.a == exact.astype(float) + (W * exact.astype(float) + tiny)).all()
        assert x.kind == kind
    assert (f.number(2), f.rsqrt(16), f.tiles) == (2.0, 0.25, 3)
    assert (f.array([[1]]).kind, f.state([[1]]).kind) == (None, "state")


@pytest.mark.parametrize(("how", "sign"), UP.items())
def test_a_kernel_of_one_weight_is_known(make, how, sign):
    """Its product of queries and keys, its scale, its product with the values, and the output's own rounding."""
    options = {"feature": "identity", "normalize": False}
    p = make(2, 1, 1, h=2, h_kv=1, b=2, dtype="float16", variant="linear", options=options)
    q, k, v = (x.astype(float) for x in (p.query, p.key, p.value))
    u, tiny = 2.0**-24, 2.0**-150
    weight = off(q * k * (1 + sign * 2 * u), sign, u, tiny)
    assert (simulate(p, Model(), how)["out"] == off(weight * v * (1 + sign * 2 * u), sign)).all()


def test_rows_without_keys_give_nothing(make):
    allowed = np.ones((1, 1, 5, 7), bool)
    allowed[..., 1, :] = False
    p = make(allowed=allowed)
    found = simulate(p, Model(lse="float16"))
    assert (found["out"][:, :, 1] == 0).all()
    assert np.isneginf(found["lse"][:, :, 1]).all()
    rest = found["lse"][:, :, [0, 2, 3, 4]]
    assert (rest == rest.astype(np.float16)).all()
    assert set(simulate(p.replace(variant="sigmoid"), Model())) == {"out"}
    drawn = [
        simulate(p, Model(), "random", r)["out"] for r in (None, np.random.default_rng(0), np.random.default_rng(1))
    ]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    none = simulate(make(2, 3, allowed=np.zeros((1, 1, 2, 3), bool)), Model())
    assert (none["out"] == 0).all()


def test_one_token_of_a_recurrence_is_known():
    """To nearest in half floats: 3 times 5 and 0.5 of the state, then the query."""
    q, k, v = (np.full((1, 1, 2, 1), x, np.float16) for x in (3.0, 1.0, 5.0))
    more = {"causal": "bottom_right", "variant": "lightning", "options": {"decay": (0.0,)}}
    p = Problem(q, k, v, **more, state=np.full((1, 1, 1, 1), 2.0))
    shape, model, rng = VARIANTS["lightning"].shape, Model("float16", "float16", "float16"), np.random.default_rng(0)
    found = simulate_steps(p, shape, model, "nearest", rng)
    assert found["out"].ravel().tolist() == [21.0, 36.0]
    assert found["state"].ravel().tolist() == [12.0]
    assert simulate_steps(p.replace(state=None), shape, model, "nearest", rng)["state"].ravel().tolist() == [10.0]


def test_scores_to_nearest_are_stored():
    key = np.array([1.0, 3.0, 6.0, 8.0, 0.0, 0.0], np.float16).reshape(1, 1, 6, 1) + np.float16(2.0**-7)
    options = {"block_size": 2, "topk": 2}
    p = Problem(np.ones_like(key), key, key, causal="bottom_right", variant="moba", options=options)
    (one,) = heads(p)
    shape, rng = VARIANTS["moba"].shape, np.random.default_rng(0)
    c, f = candidates(one, shape), FORMATS["bfloat16"]
    exact = np.broadcast_to(key.astype(float).reshape(3, 2).mean(1), (6, 3))
    found = simulate_scores((one,), shape, c, Model("float16", "float16", "bfloat16"), "nearest", rng)
    assert (found == f.round_array(f.round_array(exact.astype(np.float16).astype(float)))).all()
    assert (simulate_scores((one,), shape, c, Model(), "nearest", rng) == exact).all()


def test_what_leaves_the_numbers_says_nothing():
    """Each would be a warning, and so an error of the test."""
    f = arithmetic("nearest")
    assert Rounded(f, np.array([[1000.0]]), None).exp().a == np.inf
    assert (Rounded(f, np.ones((1, 1)), None) / Rounded(f, np.zeros((1, 1)), None)).a == np.inf
    large = np.full((1, 1, 1, 1), 2.0**400)
    p = Problem(large, large, large, variant="linear", scale=2.0**400, options={"feature": "identity"})
    assert np.isnan(simulate(p, Model("float64", "float64", "float64", lse="float64"))["out"]).all()
