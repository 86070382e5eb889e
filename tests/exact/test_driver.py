"""evaluate: radii, correct rounding, ties, zeros, the contract's fixed values, gradients."""

from fractions import Fraction

import flint
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem, evaluate, reference
from refattn.arrays import from_float64, to_float64
from refattn.dtypes import FORMATS
from refattn.exact import driver
from refattn.exact.arithmetics import Balls
from refattn.exact.run import run


def brute(problem, form, name="out", bits=900):
    """Correct rounding by one evaluation at many bits, each end rounded exactly."""
    f = Balls(bits)
    with f.working():
        values = run(problem, f, None)[name]
        out = np.empty(values.shape)
        for index, x in np.ndenumerate(values):
            if isinstance(x, float):
                out[index] = x
                continue
            ends = [Fraction(int(e.man_exp()[0])) * Fraction(2) ** int(e.man_exp()[1]) for e in (x.lower(), x.upper())]
            low, high = (form.round(e) for e in ends)
            assert low == high
            out[index] = low
    return out


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_is_that_of_many_bits(make, name, dtype):
    p = make(6, 9, 12, dtype=dtype, causal="bottom_right", sink=np.ones(2, np.float32))
    a = evaluate(p, rounding=name)
    form = FORMATS[name]
    assert a.undecided == {"out": 0, "lse": 0}
    assert a.out.dtype == form.dtype
    assert (to_float64(a.out) == brute(p, form)).all()
    assert (to_float64(a.lse) == brute(p, form, "lse")).all()
    assert (a.radius() <= form.ulp_array(to_float64(a.out)) / 2).all()


def test_radius_is_proven_and_small(make):
    p = make(8, 16, 8)
    a, b = evaluate(p, 64), evaluate(p, 500)
    with flint.ctx.workprec(600):
        for x, y in zip(a.balls["out"].ravel(), b.balls["out"].ravel(), strict=True):
            assert x.overlaps(y)
        for low, tail, r, y in zip(
            *(getattr(a.enclosures["out"], n).ravel() for n in ("mid", "tail", "radius")),
            b.balls["out"].ravel(),
            strict=True,
        ):
            assert abs(flint.arb(low) + flint.arb(tail) - y) <= flint.arb(r)
    assert a.enclosures["out"].radius.max() < 2.0**-55
    assert b.enclosures["out"].radius.max() < 2.0**-100


def test_scale_none_is_the_exact_root(make):
    """With d = 2 the float 1/sqrt(2) is off by 2**-55 or so, and scores near 2**40 show it."""
    x = np.array([2.0**20, 0]).reshape(1, 1, 1, 2)
    k = np.array([[2.0**20, 0], [2.0**20 - 2.0**-20, 0]]).reshape(1, 1, 2, 2)
    v = np.array([1.0, 0.0]).reshape(1, 1, 2, 1)
    exact = evaluate(Problem(x, k, v)).lse.item()
    rounded = evaluate(Problem(x, k, v, scale=float(np.sqrt(0.5)))).lse.item()
    with flint.ctx.workprec(200):
        top = flint.arb(2) ** 40 / flint.arb(2).sqrt()
        want = top + (1 + (-(1 / flint.arb(2).sqrt())).exp()).log()
        assert exact == float(want)
    assert rounded != exact


# exact ties and zeros ------------------------------------------------------------------------------------------------


def three_keys(values, scores, **more):
    q = np.ones((1, 1, 1, 1))
    k = np.array(scores, np.float64).reshape(1, 1, -1, 1)
    return Problem(q, k, np.array(values, np.float64).reshape(1, 1, -1, 1), scale=1.0, **more)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_identical_values_at_a_midpoint_are_a_tie(softcap):
    for v, want in ((1 + 2.0**-8, 1.0), (1 + 3 * 2.0**-8, 1 + 2.0**-6)):
        a = evaluate(three_keys([v] * 3, [0.1, 0.7, -3.0], softcap=softcap), rounding="bfloat16")
        assert float(a.out.item()) == want
        assert a.undecided["out"] == 0


def test_equal_scores_whose_mean_is_a_midpoint():
    a = evaluate(three_keys([1.0, 1 + 2.0**-7], [0.3, 0.3]), rounding="bfloat16")
    assert float(a.out.item()) == 1.0
    b = evaluate(three_keys([1.0, 1 + 2.0**-7, 1 + 2.0**-8], [0.3, 0.3, -1.0]), rounding="bfloat16")
    assert float(b.out.item()) == 1.0
    assert a.undecided["out"] == b.undecided["out"] == 0


@pytest.mark.parametrize(("third", "want"), [(5.0, 1 + 2.0**-7), (-5.0, 1.0)])
@pytest.mark.parametrize("score", [-40.0, -1000.0, -100000.0])
def test_a_tie_broken_by_a_vanishing_weight(third, want, score):
    a = evaluate(three_keys([1.0, 1 + 2.0**-7, third], [0.0, 0.0, score]), rounding="bfloat16")
    assert float(a.out.item()) == want
    assert a.undecided["out"] == 0


def test_exact_zero_is_plus_zero_and_a_vanishing_one_keeps_its_sign():
    a = evaluate(three_keys([1.0, -1.0], [0.5, 0.5]), rounding="float32")
    assert a.out.item() == 0
    assert not np.signbit(a.out.item())
    b = evaluate(three_keys([1.0, -1.0, -1.0], [0.5, 0.5, -900.0]), rounding="float32")
    assert b.out.item() == 0
    assert np.signbit(b.out.item())
    assert a.undecided["out"] == b.undecided["out"] == 0


def test_surd_scores_tie_too():
    """d = 3: scores carry 1/sqrt(3), and two keys with the same products have exactly the same score."""
    q = np.array([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)
    k = np.array([[3.0, 0, 0], [0, 0, 1.0], [1.0, 1, 0]]).reshape(1, 1, 3, 3)
    v = np.array([1.0, 1 + 2.0**-7, 1 + 2.0**-8]).reshape(1, 1, 3, 1)
    a = evaluate(Problem(q, k, v), rounding="bfloat16")
    assert float(a.out.item()) == 1.0
    assert a.undecided == {"out": 0, "lse": 0}


def test_lse_of_one_key_is_the_score():
    score = 1 + 2.0**-8  # a bfloat16 midpoint
    a = evaluate(three_keys([1.0], [score]), rounding="bfloat16")
    assert float(a.lse.item()) == 1.0
    assert a.undecided["lse"] == 0
    x = np.ones((1, 1, 1, 2), np.float32)
    surd = evaluate(Problem(x, x, x), rounding="bfloat16")  # sqrt(2): no tie
    assert surd.undecided["lse"] == 0
    assert float(surd.lse.item()) == FORMATS["bfloat16"].round(2**0.5)
    bias = np.full((1, 1, 1, 1), 0.5, np.float32)
    assert evaluate(Problem(x, x, x, scale=0.0, bias=bias), rounding="float64").lse.item() == 0.5


@given(st.integers(0, 10**6))
def test_small_integers_are_full_of_ties_and_always_decided(seed):
    rng = np.random.default_rng(seed)
    q, k = (rng.integers(-1, 2, (1, 1, n, 2)).astype(float) for n in (2, 4))
    v = rng.integers(-2, 3, (1, 1, 4, 2)) * 2.0**-9 + 1
    p = Problem(q, k, v, scale=0.0 if seed % 3 == 0 else None)
    a = evaluate(p, rounding="bfloat16")
    assert a.undecided == {"out": 0, "lse": 0}
    f = Balls(2000)
    with f.working():
        for x, got in zip(run(p, f, None)["out"].ravel(), a.out.ravel(), strict=True):
            assert abs(float(x) - float(got)) <= FORMATS["bfloat16"].ulp(float(got)) / 2


# the contract --------------------------------------------------------------------------------------------------------


def test_rows_without_keys(make):
    allowed = np.ones((1, 1, 5, 7), bool)
    allowed[..., 2, :] = False
    for p in (make(allowed=allowed), make(bias=np.where(allowed, 0, -np.inf).astype(np.float32))):
        for a in (evaluate(p), evaluate(p, rounding="float32")):
            assert (a.out[:, :, 2] == 0).all()
            assert np.isneginf(a.lse[:, :, 2]).all()
            assert np.isfinite(a.lse[:, :, [0, 1, 3, 4]]).all()
        assert (reference(p)["out"][:, :, 2] == 0).all()


def test_a_row_with_only_a_sink(make):
    sink = np.array([0.5, -np.inf], np.float32)
    a = evaluate(make(3, 0, sink=sink), rounding="float32")
    assert (a.out == 0).all()
    assert (a.lse[0, 0] == 0.5).all()
    assert np.isneginf(a.lse[0, 1]).all()


def test_no_keys_and_no_queries(make):
    a = evaluate(make(4, 0), rounding="bfloat16")
    assert a.out.shape == (1, 2, 4, 8)
    assert (to_float64(a.out) == 0).all()
    assert np.isneginf(a.lse).all()
    assert evaluate(make(0, 4)).out.shape == (1, 2, 0, 8)
    assert evaluate(make(0, 0)).lse.shape == (1, 2, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_masked_is_never_read(make, bad):
    allowed = np.ones((1, 1, 5, 7), bool)
    allowed[..., 3] = False
    p = make(allowed=allowed)
    key, value = p.key.copy(), p.value.copy()
    key[:, :, 3], value[:, :, 3] = bad, bad
    poisoned = p.replace(key=key, value=value)
    for rounding in (None, "float32"):
        x, y = evaluate(p, rounding=rounding), evaluate(poisoned, rounding=rounding)
        assert (x.out == y.out).all()
        assert (x.lse == y.lse).all()
    assert (reference(p)["out"] == reference(poisoned)["out"]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_inputs_reach_the_rows_that_see_them(make, bad):
    p = make(7, 7, causal="top_left", h=1)
    clean = evaluate(p, rounding="float32")
    key = p.key.copy()
    key[0, 0, 4, 1] = bad
    a = evaluate(p.replace(key=key), rounding="float32")
    assert np.isnan(a.out[0, 0, 4:]).all()
    assert np.isnan(a.lse[0, 0, 4:]).all()
    assert (a.out[0, 0, :4] == clean.out[0, 0, :4]).all()
    query = p.query.copy()
    query[0, 0, 2, 0] = bad
    b = evaluate(p.replace(query=query), rounding="float32")
    assert np.isnan(b.out[0, 0, 2]).all()
    assert (np.delete(b.out, 2, 2) == np.delete(clean.out, 2, 2)).all()
    value = p.value.copy()
    value[0, 0, 5, 3] = bad
    c = evaluate(p.replace(value=value), rounding="float32")
    want = np.nan if np.isnan(bad) else np.inf
    assert np.array_equal(c.out[0, 0, 5:, 3], [want] * 2, equal_nan=True)
    rest = np.ones_like(c.out, bool)
    rest[0, 0, 5:, 3] = False
    assert (c.out[rest] == clean.out[rest]).all()
    assert (c.lse == clean.lse).all()


def test_both_infinities_make_no_number(make):
    p = make(2, 4, h=1)
    value = p.value.copy()
    value[0, 0, 0, 0], value[0, 0, 2, 0], value[0, 0, 1, 1] = np.inf, -np.inf, -np.inf
    a = evaluate(p.replace(value=value))
    assert np.isnan(a.out[0, 0, :, 0]).all()
    assert np.isneginf(a.out[0, 0, :, 1]).all()


def test_plus_infinite_bias_or_sink_spoils_the_row(make):
    bias = np.zeros((1, 1, 5, 7), np.float32)
    bias[..., 1, 2] = np.inf
    a = evaluate(make(bias=bias))
    assert np.isnan(a.out[:, :, 1]).all()
    assert np.isfinite(a.out[:, :, [0, 2, 3, 4]]).all()
    b = evaluate(make(sink=np.array([np.inf, 0], np.float32)))
    assert np.isnan(b.out[:, 0]).all()
    assert np.isfinite(b.out[:, 1]).all()


def test_packed_sequences_are_separate_calls(make):
    p = make(9, 11, causal="bottom_right", cu_seqlens_q=np.array([0, 4, 4, 9]), cu_seqlens_k=np.array([0, 5, 6, 11]))
    whole = evaluate(p, rounding="float32")
    for rows, keys in ((slice(0, 4), slice(0, 5)), (slice(4, 9), slice(6, 11))):
        part = Problem(p.query[:, :, rows], p.key[:, :, keys], p.value[:, :, keys], causal="bottom_right")
        assert (evaluate(part, rounding="float32").out == whole.out[:, :, rows]).all()


def test_grouped_heads_are_repeated_ones(make):
    p = make(h=6, h_kv=2)
    wide = p.replace(key=np.repeat(p.key, 3, 1), value=np.repeat(p.value, 3, 1))
    assert (evaluate(p, rounding="float32").out == evaluate(wide, rounding="float32").out).all()


def test_huge_and_tiny_numbers():
    top = np.float64(1.7e308)
    x = np.ones((1, 1, 2, 4))
    a = evaluate(Problem(x, x, np.full((1, 1, 2, 3), top)), rounding="float64")
    assert (a.out == top).all()
    q = np.full((1, 1, 1, 2), 1e200)
    k = np.stack([np.full(2, 1e200), np.full(2, -1e200)]).reshape(1, 1, 2, 2)
    b = evaluate(Problem(q, k, np.array([3.0, 5.0]).reshape(1, 1, 2, 1)), rounding="float64")
    assert b.out.item() == 3.0
    assert np.isposinf(b.lse.item())  # 1.4e400 overflows float64
    c = evaluate(Problem(x, x, np.full((1, 1, 2, 3), 5e-324)), rounding="float64")
    assert (c.out == 5e-324).all()


# gradients -----------------------------------------------------------------------------------------------------------


def torch_gradients(p, dout):
    t, names = p.to("torch"), ("query", "key", "value", "bias", "sink")
    leaves = {n: getattr(t, n).double().requires_grad_() for n in names if getattr(t, n) is not None}
    group = p.heads // p.heads_kv
    k, v = (leaves[n].repeat_interleave(group, 1) for n in ("key", "value"))
    s = leaves["query"] @ k.transpose(-1, -2) * (p.scale if p.scale is not None else p.d_k**-0.5)
    if p.softcap is not None:
        s = torch.tanh(s / p.softcap) * p.softcap
    if "bias" in leaves:
        s = s + leaves["bias"]
    if p.causal:
        mask = torch.ones(p.n_q, p.n_k, dtype=torch.bool).tril(p.n_k - p.n_q if p.causal == "bottom_right" else 0)
        s = s.masked_fill(~mask, -torch.inf)
    if "sink" in leaves:
        s = torch.cat([s, leaves["sink"][None, :, None, None].expand(*s.shape[:3], 1)], -1)
    w = s.softmax(-1)[..., : p.n_k]
    (w @ v * torch.from_numpy(dout)).sum().backward()
    names = {"query": "dq", "key": "dk", "value": "dv", "bias": "dbias", "sink": "dsink"}
    return {names[n]: x.grad.numpy() for n, x in leaves.items()}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"causal": "bottom_right"},
        {"softcap": 1.5, "scale": -0.7},
        {"sink": np.array([0.3, -2.0, 0.0, 1.0], np.float32)},
        {"bias": np.random.default_rng(1).standard_normal((1, 4, 5, 7)).astype(np.float32)},
        {"bias": np.random.default_rng(1).standard_normal((1, 1, 1, 7)).astype(np.float32), "causal": "bottom_right"},
        {"bias": np.random.default_rng(1).standard_normal((1, 4, 5, 1)).astype(np.float32), "softcap": 2.0},
    ],
    ids=lambda m: "-".join(m) or "plain",
)
def test_gradients_agree_with_autograd(make, more):
    p = make(h=4, h_kv=2, b=2 if "bias" in more else 1, d_v=6, **more)
    dout = np.random.default_rng(3).standard_normal(p.out_shape)
    a = evaluate(p, gradients=dout)
    want = torch_gradients(p, dout)
    assert set(want) == set(a.values) - {"out", "lse"}
    for name, w in want.items():
        got = getattr(a, name)
        assert got.shape == w.shape
        assert np.allclose(got, w, rtol=1e-11, atol=1e-12), name


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("linear", {}),
        ("linear", {"feature": "relu"}),
        ("linear", {"feature": "exp", "normalize": False}),
        ("power", {"p": 4}),
        ("power", {"form": "mean", "p": 2}),
        ("sigmoid", {}),
    ],
)
def test_gradients_are_directional_derivatives(make, variant, options):
    p = make(dtype="float64", variant=variant, options=options, causal="bottom_right")
    rng = np.random.default_rng(5)
    dout = rng.standard_normal(p.out_shape)
    a = evaluate(p, gradients=dout)
    for name, tensor in (("dq", "query"), ("dk", "key"), ("dv", "value")):
        step = rng.standard_normal(getattr(p, tensor).shape) * 2.0**-20
        sides = [(evaluate(p.replace(**{tensor: getattr(p, tensor) + s * step})).out * dout).sum() for s in (1, -1)]
        lost = 8 * 2.0**-53 * sum(np.abs(evaluate(p).out * dout).sum() for _ in sides)
        assert abs((sides[0] - sides[1]) / 2 - (getattr(a, name) * step).sum()) < lost


def test_gradients_are_correctly_rounded_and_zeros_are_exact(make):
    p = make(6, 6, 12, causal="top_left", h_kv=1)
    dout = np.random.default_rng(2).standard_normal(p.out_shape).astype(np.float32)
    for name in ("float32", "float64", "bfloat16"):
        a = evaluate(p, rounding=name, gradients=dout)
        assert not any(a.undecided.values())
        assert (to_float64(a.dq[:, :, 0]) == 0).all()  # the first row sees one key
        fine = evaluate(p, 700, gradients=dout)
        for n in ("dq", "dk", "dv"):
            want = FORMATS[name].round_array(fine.values[n]) if name != "float64" else fine.values[n]
            near = np.abs(to_float64(a.values[n]) - want) <= FORMATS[name].ulp_array(want)
            assert near.all()
            assert (to_float64(a.values[n]) == want).mean() > 0.99


def test_identical_values_have_zero_gradients(make):
    p = make()
    same = p.replace(value=np.broadcast_to(p.value[:, :, :1], p.value.shape).copy())
    a = evaluate(same, rounding="float32", gradients=np.ones(p.out_shape, np.float32))
    assert (a.dq == 0).all()
    assert (a.dk == 0).all()
    assert not any(a.undecided.values())


# bad calls -----------------------------------------------------------------------------------------------------------


def drawn(n_q, n_k, **more):
    rng = np.random.default_rng(4)
    q, k, v, dout = (rng.standard_normal((1, 1, n, 4)) for n in (n_q, n_k, n_k, n_q))
    return Problem(q, k, v, **more), dout


@pytest.mark.parametrize("n", [20, 300])
@pytest.mark.parametrize("name", ["causal", "bias", "dropout", "softcap", "scaled"])
def test_a_row_with_one_key_has_a_gradient_of_0_without_balls(n, name):
    rng = np.random.default_rng(5)
    more = {
        "bias": {"bias": rng.standard_normal((1, 1, n, n))},
        "dropout": {"dropout_p": 0.25, "dropout_mask": rng.random((1, 1, n, n)) >= 0.25},
        "softcap": {"softcap": 2.0},
        "scaled": {"out_scale": 3.0, "weight": np.full((1, 1, 1, n), 2.0)},
    }.get(name, {})
    p, dout = drawn(n, n, causal="bottom_right", **more)
    a = evaluate(p, rounding="float32", gradients=dout)
    assert set(a.undecided.values()) == {0}
    # a short call's dbias of masked scores is 0 within a radius
    assert (n, name) == (20, "bias") or not any("Arb" in x for x in a.stats)
    for x in ("dq", "dbias") if name == "bias" else ("dq",):
        first = a.values[x][0, 0, 0]
        np.testing.assert_array_equal(first.view(np.uint32), 0)  # +0
        assert a.values[x][0, 0, 1].any()


@pytest.mark.parametrize("n", [2, 300])
@pytest.mark.parametrize("name", ["sink", "dlse", "another key"])
def test_a_gradient_that_is_nearly_0_is_not_0(n, name):
    """Against the formula: dS_j = P_j (dout·v_j - sum_i P_i dout·v_i + dlse), which has e^-200 or dlse as a factor."""
    seen, bias = 1 + (name == "another key"), np.zeros((1, 1, 1, n))
    bias[..., 1] = -200.0
    sink, dlse = (np.array([-200.0]), 0.0) if name == "sink" else (None, 1e-40 if name == "dlse" else 0.0)
    p, dout = drawn(1, n, bias=bias, allowed=(np.arange(n) < seen)[None, None, None], sink=sink, scale=0.5)
    more = {"dlse": np.full((1, 1, 1), dlse)} if dlse else {}
    got = evaluate(p, rounding="float64", gradients=dout, **more).values["dq"][0, 0, 0]
    with mpmath.workprec(900):
        q, k, v, g = (mpmath.matrix(x[0, 0].tolist()) for x in (p.query, p.key, p.value, dout))
        w = [mpmath.exp((q[0, :] * k[j, :].T)[0] / 2 + bias[0, 0, 0, j]) for j in range(seen)]
        z = sum(w) + (mpmath.exp(-200) if sink is not None else 0)
        at_p = [(g[0, :] * v[j, :].T)[0] for j in range(seen)]
        d = sum(x / z * y for x, y in zip(w, at_p, strict=True))
        by_score = [x / z * (y - d + dlse) for x, y in zip(w, at_p, strict=True)]
        want = [float(sum(by_score[j] * k[j, c] for j in range(seen)) / 2) for c in range(4)]
    assert 0 not in want
    np.testing.assert_array_equal(got, want)


def test_an_answer_prints_itself_in_one_line(make):
    p = make(d_v=4)
    a = evaluate(p)
    widest = max(e.radius.max() for e in a.enclosures.values())
    assert repr(a) == f"Answer(out (1, 2, 5, 4), lse (1, 2, 5), radius at most {widest:.1g})"
    assert repr(evaluate(p, rounding="float16")).startswith(
        "Answer(out (1, 2, 5, 4), lse (1, 2, 5), correctly rounded to float16, radius at most "
    )


def test_bad_calls_are_named(make):
    p = make()
    with pytest.raises(InvalidInput, match=r"problem: got ndarray, expected a Problem; write evaluate\(Problem\("):
        evaluate(np.zeros(2))
    with pytest.raises(InvalidInput, match="name: got 'o', expected one of out, lse"):
        evaluate(p).radius("o")
    with pytest.raises(InvalidInput, match="bits: got 8, expected an integer from 32"):
        evaluate(p, 8)
    with pytest.raises(InvalidInput, match="dtype: got 'float20', expected one of float64"):
        evaluate(p, rounding="float20")
    with pytest.raises(InvalidProblem, match=r"gradients: got \(2, 2\), expected an array of out's shape"):
        evaluate(p, gradients=np.ones((2, 2)))
    for name in ("gradients", "dlse"):
        whole = {"gradients": p.out_shape, "dlse": p.out_shape[:3]}[name]
        with pytest.raises(InvalidProblem, match=f"{name}: got dtype int64, expected one of .*; cast it"):
            evaluate(p, **{name: np.ones(whole, np.int64)})
    with pytest.raises(InvalidProblem, match="gradients: got float"):
        evaluate(p, gradients=1.0)
    with pytest.raises(UnsupportedProblem, match="gradients: NaN or inf in the arriving gradient"):
        evaluate(p, gradients=np.full(p.out_shape, np.nan))
    value = p.value.copy()
    value[0, 0, 0, 0] = np.nan
    with pytest.raises(UnsupportedProblem, match="NaN or inf in sight of a query has no gradient"):
        evaluate(p.replace(value=value), gradients=np.ones(p.out_shape))
    with pytest.raises(UnsupportedProblem, match=r"gradients: absmax has none where .*form='plain'"):
        evaluate(make(variant="power", options={"form": "stable"}), gradients=np.ones(p.out_shape))


def test_inputs_are_taken_as_they_are():
    """bfloat16 and float32 tensors of the same numbers are the same problem."""
    rng = np.random.default_rng(0)
    parts = [FORMATS["bfloat16"].round_array(rng.standard_normal((1, 1, 4, 8))) for _ in range(3)]
    problems = [Problem(*(from_float64(x, n) for x in parts)) for n in ("bfloat16", "float32", "float64")]
    outs = [evaluate(p, rounding="float32").out for p in problems]
    assert (outs[0] == outs[1]).all()
    assert (outs[1] == outs[2]).all()


def test_columns_that_stay_open_are_decided_alone(monkeypatch):
    """Two columns of ties among nine: Arb is asked for these, and all of each."""
    rng, asked = np.random.default_rng(11), []
    q, k, v = (rng.standard_normal((1, 1, n, 9)) for n in (4, 30, 30))
    v[..., 3], v[..., 7] = 257.0, -257.0  # halfway between two numbers of bfloat16
    p, over = Problem(q, k, v), driver._over_balls
    monkeypatch.setattr(driver, "_over_balls", lambda *some: asked.append(some[-1]) or over(*some))
    found = evaluate(p, rounding="bfloat16", lse_rounding="float64")
    assert found.undecided == {"out": 0, "lse": 0}
    assert (found.out.astype(float)[..., [3, 7]] == [256.0, -256.0]).all()
    assert asked
    assert all(x.tolist() == [3, 7] for x in asked)
