"""Rotary positions, ALiBi slopes and positions of a call, against loops, and its kernels."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings

from refattn import (
    Capabilities,
    InvalidProblem,
    Problem,
    UnsupportedProblem,
    check_kernel,
    check_problem,
    evaluate,
    load_problem,
    reference,
    save_problem,
    strategies,
)
from refattn.check.bounds.forward import forward
from refattn.check.bounds.rounded import HOWS, simulate
from refattn.check.diagnose.shrink import program
from refattn.check.inputs.families import cases, fitted
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, FURTHER, flash
from refattn.dtypes import ELEMENTS

ABLE = Capabilities({"float32", "bfloat16"}, FEATURES | FURTHER, lse=True, elements=frozenset(ELEMENTS))
DRAWN = [n for n in FURTHER if n.startswith(("rotary", "positions", "alibi", "lengths_k", "offset"))]
DRAWN += [n for n in FEATURES if n.startswith(("causal", "lengths", "grouped", "bias", "softcap", "variable", "scale"))]


def table(n, pairs, seed=0):
    """Numbers of so few bits that queries turned by them are float64 numbers; they need not lie on a circle."""
    x = np.random.default_rng(seed).integers(-8, 9, (2, n, pairs)) / 8
    return {"rotary_cos": x[0].astype(np.float32), "rotary_sin": x[1].astype(np.float32)}


def small(n_q, n_k, seed=1, d=8, **more):
    rng = np.random.default_rng(seed)
    shapes = ((2, 4, n_q, d), (2, 2, n_k, d), (2, 2, n_k, 6))
    q, k, v = (rng.integers(-4, 5, s).astype(np.float32) / 4 for s in shapes)
    return Problem(q, k, v, **more)


def pair(style, pairs, i):
    """The columns of pair i."""
    return (i, i + pairs) if style == "half" else (2 * i, 2 * i + 1)


def turned(x, where, p, way=1):
    """Queries or keys turned, by a loop over every number."""
    found, pairs = x.astype(np.float64).copy(), p.rotary_cos.shape[1]
    for b, h, row in np.ndindex(*x.shape[:3]):
        for i in range(pairs):
            first, second = pair(p.rotary, pairs, i)
            c, s = (float(t[where[b][row], i]) for t in (p.rotary_cos, p.rotary_sin))
            one, two = float(x[b, h, row, first]), float(x[b, h, row, second])
            found[b, h, row, first], found[b, h, row, second] = one * c - way * two * s, two * c + way * one * s
    return found


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("pairs", [4, 3])
def test_the_answer_is_that_of_turned_queries_and_keys(style, pairs):
    """Every bit, and the gradients turned back."""
    rng = np.random.default_rng(5)
    at = [rng.integers(0, 30, (2, n)) for n in (5, 7)]
    p = small(5, 7, rotary=style, **table(30, pairs), positions_q=at[0], positions_k=at[1], softcap=2.0)
    none = dict.fromkeys(("rotary", "rotary_cos", "rotary_sin", "positions_q", "positions_k"))
    q, k = turned(p.query, at[0], p), turned(p.key, at[1], p)
    bare = Problem(q, k, p.value.astype(np.float64), softcap=2.0)
    assert none.keys() <= vars(p).keys()
    dout = rng.standard_normal(p.out_shape)
    one, two = (evaluate(x, rounding="float64", gradients=dout) for x in (p, bare))
    for name in ("out", "lse", "dv"):
        assert one.values[name].tobytes() == two.values[name].tobytes(), name
    for name, where in (("dq", at[0]), ("dk", at[1])):
        g = two.values[name]
        back, size = turned(g, where, p, -1), 2 * np.abs(g).max()
        # three roundings here and two of the values, of numbers of at most twice the largest
        assert (np.abs(one.values[name] - back) <= 5 * 2.0**-53 * size).all()
    balls = evaluate(p, gradients=dout)
    for name, x in one.values.items():
        assert (np.abs(balls.values[name] - x) <= 2.0**-52 * np.abs(x)).all(), name
    plain = reference(p)
    assert (np.abs(plain["out"] - one.out) <= 100 * 2.0**-53).all()  # some dozens of roundings of numbers below 1


def test_usual_tables_against_mpmath():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 3, 4)).astype(np.float32) for _ in range(3))
    angle = np.arange(3)[:, None] * np.array([1.0, 0.01])
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    more = {"rotary": "half", "rotary_cos": cos, "rotary_sin": sin, "alibi_slopes": np.array([0.3], np.float32)}
    out = evaluate(Problem(q, k, v, **more, scale=0.5), rounding="float64").out[0, 0]
    with mpmath.workdps(60):
        mp = mpmath.mpf

        def turn(x, n):
            x = [mp(float(y)) for y in x]
            return [
                x[c] * mp(float(cos[n, c % 2])) + (-x[c + 2] if c < 2 else x[c - 2]) * mp(float(sin[n, c % 2]))
                for c in range(4)
            ]

        for i in range(3):
            w = [
                mpmath.exp(
                    sum(a * b for a, b in zip(turn(q[0, 0, i], i), turn(k[0, 0, j], j), strict=True)) / 2
                    - mp(float(np.float32(0.3))) * abs(i - j)
                )
                for j in range(3)
            ]
            for c in range(4):
                exact = sum(x * mp(float(v[0, 0, j, c])) for j, x in enumerate(w)) / sum(w)
                assert out[i, c] == float(exact)


def test_slopes_are_a_bias_and_positions_those_of_the_diagonal():
    slopes = np.array([[0.5, 0.25, 0.125, 0.375], [1, 0, -0.5, 2]], np.float32)
    for n_q, n_k, more in ((5, 7, {}), (7, 5, {"causal": "top_left"}), (3, 7, {"offset": -1})):
        p = small(n_q, n_k, alibi_slopes=slopes, **more)
        first = (0 if more.get("causal") else n_k - n_q) + more.get("offset", 0)
        far = np.abs(np.arange(n_q)[:, None] + first - np.arange(n_k))
        bias = -(slopes[:, :, None, None] * far).astype(np.float32)
        one, two = (
            evaluate(x, rounding="float64", gradients=np.ones(p.out_shape))
            for x in (p, p.replace(alibi_slopes=None, bias=bias))
        )
        terms = far * two.values["dbias"]
        # each of at most 35 terms, and of as many sums, is off by one rounding
        limit = 70 * 2.0**-53 * np.abs(terms).sum((2, 3))
        assert (np.abs(one.values["dalibi_slopes"] + terms.sum((2, 3))) <= limit).all()
        for name in set(one.values) - {"dalibi_slopes"}:
            assert one.values[name].tobytes() == two.values[name].tobytes(), name
    shared = small(5, 7, alibi_slopes=slopes[0])
    assert (evaluate(shared).out[1] == evaluate(small(5, 7, alibi_slopes=np.repeat(slopes[:1], 2, 0))).out[1]).all()


def test_decoding_is_prefill_and_packed_sequences_start_anew():
    p = small(7, 7, rotary="half", **table(9, 4), alibi_slopes=np.ones(4, np.float32), causal="bottom_right")
    whole = evaluate(p, rounding="float64").out
    last = p.replace(query=p.query[:, :, 5:])
    assert (evaluate(last, rounding="float64").out == whole[:, :, 5:]).all()
    cache = p.replace(query=p.query[:, :, 3:5], lengths_k=np.array([5, 5]))
    assert (evaluate(cache, rounding="float64").out == whole[:, :, 3:5]).all()
    ends = np.array([0, 3, 7])
    one = p.replace(query=p.query[:1], key=p.key[:1], value=p.value[:1])
    packed = evaluate(one.replace(cu_seqlens_q=ends, cu_seqlens_k=ends), rounding="float64").out
    second = one.replace(query=one.query[:, :, 3:], key=one.key[:, :, 3:], value=one.value[:, :, 3:])
    assert (packed[:, :, 3:] == evaluate(second, rounding="float64").out).all()


def test_parts_and_other_libraries_agree(tmp_path):
    p = small(
        5, 7, rotary="interleaved", **table(9, 3), alibi_slopes=np.ones((2, 4), np.float32), causal="bottom_right"
    )
    one = evaluate(p, rounding="float32")
    two = evaluate(p, rounding="float32", checkpoint=tmp_path, progress=lambda done, total: None)
    assert one.out.tobytes() == two.out.tobytes()
    for kind in ("torch", "jax"):
        if kind == "jax":
            pytest.importorskip("jax")
        assert evaluate(p.to(kind), rounding="float32").out.tobytes() == one.out.tobytes()
    save_problem(p, tmp_path / "p.npz")
    again = load_problem(tmp_path / "p.npz")
    assert again.settings() == p.settings()
    assert {n: x.tobytes() for n, x in again.arrays().items()} == {n: x.tobytes() for n, x in p.arrays().items()}
    assert repr(p).endswith("rotary='interleaved' rotary_cos rotary_sin alibi_slopes)")
    scope = {}
    text = program("refattn-tiled", p).split("print")[0]
    exec(text, scope)
    assert evaluate(scope["p"], rounding="float32").out.tobytes() == one.out.tobytes()


def test_an_lse_that_is_a_score_is_known():
    """It lies in the middle of two float32 numbers, and a key of the weight exp(-10**6) puts lse above it."""
    x, two = np.array([[[[1.0, 0.5]]]], np.float32), np.array([[[[0.5, 1.0]] * 2]], np.float32)
    cos, sin = np.array([[1.0], [1.0]], np.float32), np.array([[0.0], [-2.0]], np.float32)
    at = {"positions_q": np.array([0]), "positions_k": np.array([1, 0])}
    slopes, bias = np.array([0.5 - 2.0**-23], np.float32), np.array([[[[0, -1e6]]]], np.float32)
    more = {"rotary": "half", "rotary_cos": cos, "rotary_sin": sin, "alibi_slopes": slopes, "bias": bias}
    p = Problem(x, two, two, scale=1.0, **more, **at)
    one, half = Fraction(1), Fraction(1, 2)
    score = one * (half + one * 2) + half * (one - half * 2) - Fraction(float(slopes[0]))
    assert score == 2 + Fraction(1, 2**23)
    answer = evaluate(p, rounding="float32")
    assert answer.undecided == {"out": 0, "lse": 0}
    assert answer.lse[0, 0, 0] == np.float32(2 + 2.0**-22)


@pytest.mark.parametrize("label", [c.name for c in cases("softmax") if c.family == "positions"])
def test_what_a_model_may_give_lies_within_its_bounds(label):
    case = next(c for c in cases("softmax") if c.name == label)
    p = case.problem("bfloat16")
    answer, model, rng = evaluate(p, rounding="float64"), flash("bfloat16"), np.random.default_rng(0)
    limit, _ = forward(answer, model)
    for how in HOWS:
        got = simulate(p, model, how, rng)
        for name in ("out", "lse"):
            # the exact value is rounded to float64
            off = np.abs(got[name] - answer.values[name])
            assert (off <= limit[name] + 2.0**-53 * np.abs(answer.values[name]))[np.isfinite(got[name])].all(), (
                how,
                name,
            )


def test_a_right_kernel_passes_and_is_predicted():
    able = Capabilities({"bfloat16"}, ABLE.features, lse=True, gradients={"dq", "dk", "dv", "dbias"})
    report = check_kernel(tiled, capabilities=able, dtypes=["bfloat16"], only="positions/*")
    assert report.passed, report.failures
    assert report.count("passed") == 22
    found = [c.arrays[0].figures.rms for c in report.checks if "gradients" not in c.name]
    assert 0.8 < min(found) < max(found) < 1.2


@given(strategies.problems(dtypes=["float32", "bfloat16"], max_rows=9, max_keys=40, max_dim=16, features=DRAWN))
@settings(max_examples=10)
def test_drawn_calls_pass(p):
    report = check_problem(tiled, p, "drawn", model=tiled.model)
    assert report.right, (p, report.failures)


def test_a_wrong_gradient_fails():
    """Turned on instead of back."""
    p = next(c for c in cases("softmax") if c.name == "positions/rotary-half").problem("float32")

    def kernel(p):
        return tiled(p)

    kernel.gradients = lambda p, dout: tiled.gradients(p.replace(rotary_sin=-p.rotary_sin), dout)
    report = check_problem(kernel, p, "x", gradients=np.ones(p.out_shape, np.float32))
    assert [c.verdict for c in report.checks] == ["passed", "failed"]


def without(*names, where=lambda p: True):
    return lambda p: p.replace(**dict.fromkeys(names)) if where(p) else p


def own_tables(p):
    m, r = p.rotary_cos.shape
    angle, kind = np.arange(m)[:, None] * 1e4 ** (-np.arange(r) / r), p.rotary_cos.dtype
    return p.replace(rotary_cos=np.cos(angle).astype(kind), rotary_sin=np.sin(angle).astype(kind))


def half_of_all(p):
    """Pair c with c + d / 2 where fewer columns are turned."""
    r, d = p.rotary_cos.shape[1], p.d_k
    if p.rotary != "half" or 2 * r == d:
        return p
    order = np.r_[0:r, d // 2 : d // 2 + r, r : d // 2, d // 2 + r : d]
    return p.replace(query=p.query[..., order], key=p.key[..., order])


def of_key_heads(p):
    """Slopes counted by key heads."""
    x = p.alibi_slopes
    return p if x.ndim == 2 else p.replace(alibi_slopes=np.repeat(x[: p.heads_kv], p.heads // p.heads_kv))


def offset_ignored(p):
    """In the places of queries alone: the mask keeps it."""
    if p.offset is None:
        return p
    at = np.concatenate([k.stop - k.start - (q.stop - q.start) + np.arange(q.stop - q.start) for q, k in p.segments()])
    return p.replace(positions_q=at)


def from_room(p):
    """The places of queries from what there is room for, not from what is used."""
    if p.positions_q is not None or p.lengths_k is None:
        return p
    first = p.n_k - p.n_q + np.arange(p.n_q)
    return p.replace(positions_q=np.broadcast_to(first, (p.batch, p.n_q)).copy())


BOTH = ("positions_q", "positions_k")
ROTARY, ALIBI = (lambda p: p.rotary is not None), (lambda p: p.alibi_slopes is not None)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (own_tables, ROTARY),
        (half_of_all, ROTARY),
        (of_key_heads, ALIBI),
        (offset_ignored, ALIBI),
        (from_room, ALIBI),
        (without(*BOTH), ALIBI),
        (without(*BOTH, where=lambda p: p.cu_seqlens_q is not None), ROTARY),
        (without(*BOTH, where=lambda p: (p.positions_q is None) != (p.positions_k is None)), ROTARY),
        (
            without(*BOTH, where=lambda p: any(x is not None and x.ndim == 1 for x in (p.positions_q, p.positions_k))),
            ROTARY,
        ),
    ],
)
def test_what_kernels_get_wrong_is_caught(change, where):
    calls = [c.problem("float32") for c in cases("softmax") if c.family == "positions"]
    failed = [check_problem(lambda p: tiled(change(p)), p, "wrong").count("failed") for p in calls if where(p)]
    assert any(failed)


@pytest.mark.parametrize(
    ("more", "lost", "change"),
    [
        ({"rotary_interleaved"}, set(), {"rotary": "half"}),
        ({"rotary_half"}, {"grouped_heads"}, {"rotary": "interleaved"}),
        ({"alibi_slopes"}, {"softcap"}, {"alibi_slopes": None}),
    ],
)
def test_cases_have_what_a_kernel_has(more, lost, change):
    able = Capabilities({"float32"}, FEATURES - lost | more)
    made = [fitted(c, able) for c in cases("softmax") if c.family == "positions"]
    calls = [c.problem("float32") for c in made if c is not None]
    calls = [p for p in calls if not able.missing(p)]
    assert all(check_problem(tiled, p, "right").passed for p in calls)
    assert any(check_problem(lambda p: tiled(p.replace(**change)), p, "wrong").count("failed") for p in calls)


def test_a_kernel_that_knows_no_positions_is_not_asked_for_them():
    def plain(p):
        return tiled(Problem(p.query, p.key, p.value, scale=p.scale, causal=p.causal))

    checks = check_kernel(plain, only="positions/*").checks
    assert {c.verdict for c in checks} <= {"unsupported", "unread"}


def test_other_operators_refuse_them():
    p = small(5, 7, d=6, alibi_slopes=np.ones(4, np.float32), variant="sigmoid")
    with pytest.raises(UnsupportedProblem, match="alibi_slopes: sigmoid attention does not have it"):
        evaluate(p)


GOOD = {"rotary": "half", "rotary_cos": np.ones((9, 4), np.float32), "rotary_sin": np.zeros((9, 4), np.float32)}
NAN = np.full((9, 4), np.nan, np.float32)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            {"rotary_cos": GOOD["rotary_cos"]},
            "rotary_cos: got a table without rotary; say how columns pair: half or int",
        ),
        (
            GOOD | {"rotary": "neox"},
            r"rotary: got 'neox', expected 'half' \(column c turns with c \+ r\) or 'interleaved'",
        ),
        ({"rotary": "half"}, "rotary: got no table alone, expected rotary_cos and rotary_sin"),
        (GOOD | {"rotary_sin": None}, "rotary: got rotary_cos alone, expected rotary_cos and rotary_sin"),
        (GOOD | {"rotary_sin": NAN}, "rotary_sin: has NaN or inf, expected finite numbers"),
        (GOOD | {"rotary_sin": NAN[:5] * 0 + 1}, "rotary_sin: has NaN or inf"),
        (
            GOOD | {"rotary_sin": np.ones((8, 4), np.float32)},
            r"got shapes \(9, 4\) and \(8, 4\), expected \(positions, pa",
        ),
        (GOOD | {"rotary_cos": np.ones((9, 4), int)}, "rotary_cos: got dtype int64, expected one of float64"),
        (GOOD | {"rotary_cos": [[1.0]]}, "rotary_cos: got list, expected an array of"),
        (
            GOOD | {n: np.ones((9, 8), np.float32) for n in ("rotary_cos", "rotary_sin")},
            "rotary_cos: turns 8 pairs of columns, expected at most 4, half of query's 8; a table has one column",
        ),
        (
            GOOD | {"positions_q": np.arange(4)},
            r"positions_q: got int64 of shape \(4,\), expected integers of shape \(5,\)",
        ),
        (
            GOOD | {"positions_k": np.ones(7)},
            r"positions_k: got float64 of shape \(7,\), expected integers of shape \(7,\)",
        ),
        (
            {"positions_k": np.arange(7)},
            "positions_k: nothing in the call reads positions; give rotary or alibi_slopes",
        ),
        (
            GOOD | {"positions_q": np.arange(5) + 5},
            "positions_q: puts a query at 9, expected 0 to 8; give a longer table",
        ),
        (GOOD | {"positions_k": -np.arange(7)}, "positions_k: puts a key at -6, expected 0 to 8; give positions_k"),
        (GOOD | {"offset": -4}, "positions_q: puts a query at -2, expected 0 to 8; give positions_q"),
        (
            {"alibi_slopes": np.ones(2, np.float32)},
            r"alibi_slopes: got shape \(2,\), expected \(4,\) or \(2, 4\), a slope",
        ),
        ({"alibi_slopes": np.array([1, 2, np.inf, 0], np.float32)}, "alibi_slopes: has NaN or inf"),
        ({"alibi_slopes": np.ones(4, np.float32), "offset": 2**60}, "offset: puts a query at .*, expected at most 2"),
    ],
)
def test_errors(more, text):
    with pytest.raises(InvalidProblem, match=text):
        small(5, 7, **more)


def test_unused_rows_may_stand_anywhere():
    at = np.array([[0, 1, 2, -7, 99], [3, 4, 5, 6, 7]])
    p = small(5, 7, **GOOD, positions_q=at, lengths_q=np.array([3, 5]))
    assert np.isfinite(evaluate(p).out).all()
    assert tiled(p)[0].shape == p.out_shape
    with pytest.raises(InvalidProblem, match="positions_q: puts a query at -7"):
        p.replace(lengths_q=None)
