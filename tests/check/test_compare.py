"""The written table: what passes for which exact value, and what is said of what does not."""

from dataclasses import replace

import numpy as np
import pytest

from refattn import Problem, evaluate
from refattn.arrays import from_float64
from refattn.check import compare, flash
from refattn.check.bounds.expected import expected
from refattn.check.bounds.forward import bounds
from refattn.check.compare import Worst, against, empty_rows
from refattn.check.kernels.tiled import tiled
from refattn.dtypes import FORMATS
from refattn.exact.enclosure import Enclosure

from ..conftest import tensor

NAN, INF = np.nan, np.inf


def without_row_1(n_q=5, n_k=7):
    allowed = np.ones((1, 1, n_q, n_k), bool)
    allowed[..., 1, :] = False
    return allowed


def alike(value, n_q=2, n_k=1, d_v=1, h=1, **more):
    """Return a call whose values are all one number, so that it is out's exact value too."""
    q, k = np.ones((1, h, n_q, 4), np.float32), np.ones((1, h, n_k, 4), np.float32)
    return Problem(q, k, np.full((1, h, n_k, d_v), value, np.float32), **more)


@pytest.fixture
def finite(make):
    a = evaluate(make(allowed=without_row_1()))
    return a, bounds(a, flash("float32"))


@pytest.fixture
def case(make):
    value = make().value.copy()
    value[0, 0, 2, 3] = NAN  # seen by every row but 1
    value[0, 0, 4, 5] = INF
    a = evaluate(make(allowed=without_row_1()).replace(value=value))
    return a, bounds(a, flash("float32"))


def leaning(make, **numbers):
    """Return an answer of 40 rows of 32 columns with numbers of one's own, and out's."""
    a = evaluate(make(20, 3, 32))
    numbers = {"lse": np.arange(40) / 128} | numbers
    shapes = {"lse": (1, 2, 20)}
    middles = {n: x.reshape(shapes.get(n, (1, 2, 20, 32))) for n, x in numbers.items() if x is not None}
    enclosures = {n: Enclosure(x, np.zeros(x.shape), np.zeros(x.shape)) for n, x in middles.items()}
    return replace(a, enclosures=enclosures), middles["out"]


def lean(a, name, by=1, inner=lambda: np.zeros(())):
    """Compare an array whose errors are all as large as predicted, and go one way."""
    mid = a.enclosures[name].mid
    got, bound = mid * (1 + by * 2.0**-10), np.ones(mid.shape)
    return compare(name, got, a, bound, "bfloat16", np.square(mid * 2.0**-10), inner)


def judge(case, changes=None, name="out", variance=None):
    a, limit = case
    got = a.values[name].astype(np.float32)
    for place, value in (changes or {}).items():
        got[place] = value
    return compare(name, got, a, limit[name], "float32", variance)


def test_the_exact_value_passes(case):
    w = judge(case)
    assert w.passed
    assert 0 < w.ratio < 1
    assert (w.failures, w.elements, w.symptoms, w.edges) == (0, 80, (), {})
    assert judge(case, name="lse").passed


@pytest.mark.parametrize(
    ("dtype", "exact", "got", "bound", "ratio"),
    [
        ("float32", 1.0, 1.5, 0.5, 1.0),  # as large as allowed
        ("float32", 1.0, 1.75, 0.5, 1.5),
        ("float32", 1.0, NAN, 0.5, INF),
        ("float32", 1.0, INF, INF, 0.0),
        ("float32", 1.0, NAN, INF, INF),
        ("float32", 1.0, 1.5, NAN, INF),
        ("float32", INF, INF, 0.5, 0.0),
        ("float32", INF, NAN, 0.5, 0.0),
        ("float32", INF, -INF, 0.5, INF),
        ("float32", INF, 1.0, 0.5, INF),
        ("float32", NAN, NAN, 0.5, 0.0),
        ("float32", NAN, INF, 0.5, INF),
        ("float32", NAN, 1.0, 0.5, INF),
        ("float16", 1.0, INF, 65519.0, 0.0),  # value and bound meet where rounding overflows
        ("float16", 1.0, INF, 65518.0, INF),
        ("float16", 1.0, -INF, 65519.0, INF),
        ("float16", -1.0, -INF, 65519.0, 0.0),
        ("float16", 1.0, NAN, 65519.0, INF),
        ("float8_e5m2", 1.0, INF, 61439.0, 0.0),
        ("float8_e5m2", 1.0, NAN, 61439.0, INF),
        ("float8_e4m3fn", 1.0, NAN, 463.0, 0.0),  # it has no infinities: what overflows is NaN
        ("float8_e4m3fn", 1.0, NAN, 462.0, INF),
    ],
)
def test_what_passes_for_which_exact_value(dtype, exact, got, bound, ratio):
    a = evaluate(alike(exact))
    w = compare("out", np.full(a.out.shape, got), a, np.full(a.out.shape, bound), dtype)
    assert (w.ratio, w.failures, w.passed) == (ratio, 2 * (ratio > 1), ratio <= 1)
    np.testing.assert_equal((w.place, w.got, w.exact, w.allowed), ((0, 0, 0, 0), got, exact, bound))


LEAK, OVERFLOW = "NaN or inf behind the mask leaks", "overflow on finite data"
NUMBER, OTHER = "a finite number where NaN or inf must show", "another infinity or NaN than the exact one"
PLAIN, ROW = (0, 1, 4, 7), (0, 0, 1, 0)


@pytest.mark.parametrize(
    ("which", "changes", "place", "symptoms", "edges"),
    [
        ("case", {(0, 0, 0, 0): NAN}, None, [f"{LEAK}: NaN where the exact value is finite"], {"nan-behind-mask": 1}),
        ("case", {(0, 0, 0, 0): INF}, None, [f"{LEAK}: inf where the exact value is finite"], {"nan-behind-mask": 1}),
        ("finite", {(0, 0, 0, 0): NAN}, None, [f"{OVERFLOW}: NaN where the exact value is finite"], {}),
        ("finite", {(0, 0, 0, 0): INF}, None, [f"{OVERFLOW}: inf where the exact value is finite"], {}),
        ("case", {PLAIN: 1e3}, None, ["error above the bound"], {}),
        ("case", {ROW: NAN}, None, ["NaN in a row without keys, must be 0"], {"empty-row": 1}),
        ("case", {ROW: 1e-30}, None, ["a nonzero number in a row without keys, must be 0"], {"empty-row": 1}),
        ("case", {ROW: INF}, None, ["inf in a row without keys, must be 0"], {"empty-row": 1}),
        ("case", {(0, 0, 0, 3): 1.0}, None, [NUMBER], {"nan-in-sight": 1}),
        ("case", {(0, 0, 0, 5): 1.0}, None, [NUMBER], {"nan-in-sight": 1}),
        ("case", {(0, 0, 0, 5): -INF}, None, [OTHER], {"nan-in-sight": 1}),
        # what is plainly wrong comes first, however far off the others are
        (
            "case",
            {ROW: NAN, PLAIN: 1e3},
            PLAIN,
            ["NaN in a row without keys, must be 0", "error above the bound"],
            {"empty-row": 1},
        ),
    ],
)
def test_what_is_wrong_is_found_and_named(request, which, changes, place, symptoms, edges):
    w = judge(request.getfixturevalue(which), changes)
    assert not w.passed
    assert w.place == (place or next(iter(changes)))
    assert w.failures == len(changes)
    assert w.ratio > 1
    assert w.wrong == (len(changes) > sum(edges.values()))
    assert w.edges == edges
    assert [s for s in w.symptoms if not s.startswith("only ")] == [f"{s} (1 of 80)" for s in symptoms]


@pytest.mark.parametrize(
    ("changes", "symptoms"),
    [
        ({(0, 0, 1): NAN}, ["lse of a row without keys is NaN, must be -inf"]),
        ({(0, 0, 1): 0.0}, ["lse of a row without keys is 0, must be -inf"]),
        ({(0, 0, 1): -1e38}, ["lse of a row without keys is -1e+38, must be -inf"]),
        ({(0, 0, 1): INF}, ["lse of a row without keys is inf, must be -inf"]),
        ({(0, 0, 0): NAN}, [f"{LEAK}: NaN where the exact value is finite"]),
        (
            {(0, 0, 0): 50.0, (0, 1, 1): NAN},
            ["lse of a row without keys is NaN, must be -inf", "error above the bound"],
        ),
        ({(0, 0, 0): 50.0, (0, 1, 1): 7.0}, ["lse of a row without keys is 7, must be -inf", "error above the bound"]),
    ],
)
def test_what_is_wrong_in_lse(case, changes, symptoms):
    w = judge(case, changes, "lse")
    assert w.place == next(iter(changes))
    assert w.failures == len(changes)
    assert w.edges.get("empty-lse", 0) == sum(place[2] == 1 for place in changes)
    assert [s for s in w.symptoms if not s.startswith("only ")] == [f"{s} (1 of 10)" for s in symptoms]


def test_the_first_of_several_rows_without_keys_is_told(make):
    a = evaluate(make(allowed=without_row_1(), sink=np.array([0.5, 1.5], np.float32)))
    w = judge((a, bounds(a, flash("float32"))), {(0, 0, 1): 7.0, (0, 1, 1): 8.0}, "lse")
    assert w.symptoms == ("lse of a row without keys is 7, must be 0.5 (2 of 10)", "only in row 1 of 5")


def test_rows_without_keys_are_those_of_their_batch_and_head(make):
    allowed = np.random.default_rng(0).random((2, 2, 5, 3)) < 0.3
    empty = empty_rows(evaluate(make(5, 3, b=2, allowed=allowed)))
    assert 0 < empty.sum() < empty.size
    assert (empty == ~allowed.any(3)).all()


def test_the_mean_of_the_values_is_recognised(make):
    p = make(5, 7, h=4, h_kv=2, allowed=without_row_1())
    a = evaluate(p)
    got = a.out.astype(np.float32)
    got[:, :, 1] = p.value.mean(2).repeat(2, 1)
    w = compare("out", got, a, bounds(a, flash("float32"))["out"], "float32")
    assert w.symptoms == ("the mean of all values in a row without keys, must be 0 (32 of 160)", "only in row 1 of 5")


@pytest.mark.parametrize(
    ("row", "filling"),
    [
        ([2 + 2.0**-5] * 10, "the mean of all values"),
        ([2 + 2.0**-5 + 2.0**-20] * 10, "a nonzero number"),
        ([2.0] * 9 + [1.0], "a nonzero number"),  # more than nine tenths must be
    ],
)
def test_how_near_to_the_mean_it_must_be(row, filling):
    a = evaluate(alike(2.0, n_k=3, d_v=10, allowed=without_row_1(2, 3)))
    got = a.out.astype(np.float32)
    got[0, 0, 1] = row
    w = compare("out", got, a, bounds(a, flash("float32"))["out"], "float32")
    assert w.symptoms == (f"{filling} in a row without keys, must be 0 (10 of 20)", "only in row 1 of 2")


def test_without_any_key_there_is_no_mean():
    a = evaluate(alike(2.0, n_k=0))
    w = compare("out", np.ones(a.out.shape), a, np.zeros(a.out.shape), "float32")
    assert w.symptoms == ("a nonzero number in a row without keys, must be 0 (2 of 2)",)


def test_keys_that_weigh_too_little_are_named(make):
    p = make(20, 12, 16)
    allowed = np.ones((1, 1, 1, 12), bool)
    allowed[..., 4:8] = False
    a = evaluate(p)
    got = tiled(p.replace(allowed=allowed))[0]
    w = compare("out", got, a, bounds(a, flash("float32"))["out"], "float32")
    assert w.symptoms[-1] == "as if the weights of keys 4 to 7 were 100% too small"


def test_a_key_is_named_where_a_gradient_is_wrong(make):
    p = make()
    a = evaluate(p, gradients=np.ones(p.out_shape, np.float32))
    got = a.dk.copy()
    got[0, 1, 3, 2] += 1
    w = compare("dk", got, a, np.full(got.shape, 1e-3), "float32")
    assert w.symptoms == (
        "error above the bound (1 of 112)",
        "only in head 1 of 2",
        "only in key 3 of 7",
        "only in column 2 of 8",
    )


def test_a_share_of_dout_that_all_values_get_comes_from_rows_without_keys(make):
    p = make(allowed=without_row_1())
    a = evaluate(p, gradients=np.ones(p.out_shape, np.float32))
    got = a.dv + 1 / 7
    assert compare("dv", got, a, np.full(got.shape, 1e-3), "float32").edges == {"empty-row": 112}
    got[0, 0, 0, 0] += 1  # one value's error is its own, and takes its column's with it
    assert compare("dv", got, a, np.full(got.shape, 1e-3), "float32").edges == {"empty-row": 105}


@pytest.mark.parametrize(("dtype", "edges"), [("float32", {"subnormal": 2}), ("float64", {})])
def test_what_is_subnormal_is_so_in_its_format(dtype, edges):
    a = evaluate(alike(1e-40))
    w = compare("out", np.zeros(a.out.shape), a, np.full(a.out.shape, 1e-43), dtype)
    assert (w.failures, w.edges) == (2, edges)


def test_what_breaks_a_contract_says_nothing_of_roundings(case):
    variance = np.full(case[0].out.shape, 1e-14)
    for changes, counted in (({}, True), ({ROW: NAN}, False), ({ROW: NAN, PLAIN: 1e3}, True), ({PLAIN: 1e3}, True)):
        assert np.isfinite(judge(case, changes, variance=variance).figures.rms) == counted


@pytest.mark.parametrize(("n_q", "excess"), [(2, False), (40, True)])
def test_errors_too_large_as_a_whole_are_told_where_rows_are_many(make, n_q, excess):
    p = make(n_q, 40)
    rng = np.random.default_rng(0)
    a = evaluate(p, gradients=tensor(rng, p.out_shape))
    off = 3e-3 * np.where(rng.random(a.dk.shape) < 0.5, -1, 1)
    parts = (a, np.ones(a.dk.shape), "float64", np.full(a.dk.shape, 1e-6))
    w = compare("dk", a.dk + off, *parts)
    text = f"errors are 3 times what the model's roundings give (rms), mean {w.figures.bias:+.3g} of it"
    assert w.symptoms == ((text,) if excess else ())
    assert (w.failures, w.passed, w.wrong, w.figures.array) == (0, not excess, excess, "dk")
    off[0, 1, 3] = 2
    assert compare("dk", a.dk + off, *parts).symptoms == (
        "error above the bound (8 of 640)",
        "only in head 1 of 2",
        "only in key 3 of 40",
    )


@pytest.mark.parametrize(("by", "where"), [(1, "larger"), (-1, "smaller")])
def test_errors_that_lean_are_told_where_it_is_known_what_may(make, by, where):
    a, mid = leaning(make, out=np.arange(1280) / 128 + 1)
    w = lean(a, "out", by)
    assert w.symptoms == (f"errors lean to {where} values: their mean is {by:+} of what roundings scatter",)
    assert (w.failures, w.passed, w.wrong) == (0, False, True)
    assert (w.figures.leans, w.figures.rms, w.figures.bias) == (True, 1.0, by)
    assert lean(a, "out", by, inner=lambda: np.abs(mid) * 2.0**-10).passed
    assert lean(a, "out", by, inner=None).passed


def nth(k):
    """The k-th number of bfloat16 from 1 on: its own rounding leans nowhere."""
    return np.ldexp(1 + k % 128 / 128, k // 128)


@pytest.mark.parametrize("apart", [20, 30])
@pytest.mark.parametrize("alike", ["results", "a gradient's results", "out of a gradient", "rows", "lse", "no lse"])
def test_lines_that_round_alike_count_once(make, alike, apart):
    i = np.arange(1280)
    many, few = 1 + i / 128, 1 + (i * 17 + i // 32) % apart / 128 + i % 7 * 2.0**-12
    numbers = {
        "results": {"out": few},
        "a gradient's results": {"out": many, "dq": few},
        "out of a gradient": {"out": few, "dq": many},
        "rows": {"out": nth(i // 32 % apart * 32 + i % 32) * (1 + i % 3 * 2.0**-30)},
        "lse": {"out": many, "lse": (1 + i % apart / 128 + i % 3 * 2.0**-30)[:40]},
        "no lse": {"out": many, "lse": None},
    }[alike]
    w = lean(leaning(make, **numbers)[0], "dq" if "dq" in numbers else "out")
    assert w.figures.leans == (apart == 30 or alike == "no lse")


def test_a_result_is_compared_with_what_is_expected_of_its_call(make):
    form = FORMATS["bfloat16"]
    known = expected(make(40, 40, 32, dtype="bfloat16"), flash("bfloat16"))
    step = form.ulp_array(known.answer.out)
    got = from_float64(np.trunc(known.answer.out / step) * step, "bfloat16")
    w = against(known, "out", got, "bfloat16")
    assert w.figures.leans
    assert 0.5 < w.figures.ulps[1] < 1
    parts = ("out", got, known.answer, known.allowed["out"], "bfloat16", known.variance["out"])
    assert w == compare(*parts, known.inner("out", "bfloat16"))


def test_overflow_of_the_format_itself_is_no_error(make):
    p = make(dtype="float16", variant="linear", options={"feature": "identity", "normalize": False}, scale=1e5)
    a = evaluate(p)
    limit = bounds(a, flash("float16"))["out"]
    with np.errstate(over="ignore"):
        got = a.out.astype(np.float16)
    assert np.isinf(got).any()
    assert compare("out", got, a, limit, "float16").passed
    assert not compare("out", -got, a, limit, "float16").passed
    small = np.abs(a.out) < 60000
    got[small] = np.inf
    assert not compare("out", got, a, limit, "float16").passed


def test_nothing_to_compare(make):
    a = evaluate(make(0, 4))
    w = compare("out", a.out, a, a.out, "float32")
    assert w == Worst("out", 0.0, (), 0.0, 0.0, 0.0, 0, 0)
    assert w.passed
