"""Codebooks in fractions, HyperAttention's weights, Spark's gate: operators beside the functions that compute them."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from refattn import VARIANTS, InvalidProblem, Problem, allowed_error, evaluate
from refattn.exact.agree import differing_form, under
from refattn.functions.hyper import angular_hash, hyper_attention, hyper_weight
from refattn.functions.statistical import spark_attention
from refattn.variants import Rows
from refattn.variants.hyper import turned

CODES = (3, 0, 3, 3, 0, 7)


def call(variant, n_q=5, n_k=6, d=4, h=2, h_kv=1, options=None, dtype=np.float64, **more):
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(-3, 4, (1, *s, d)).astype(dtype) for s in ((h, n_q), (h_kv, n_k), (h_kv, n_k)))
    return Problem(q, k, v, variant=variant, options=options or {}, **more)


def test_a_codebook_of_equal_scores_is_the_mean_of_all_values():
    """With a scale of 0 all weights are n_c over n, in fractions; out and dv are the plain means."""
    p = call("codebook", options={"codes": (CODES,)}, scale=0.0)
    dout = np.ones(p.out_shape)
    a = evaluate(p, rounding="float64", gradients=dout)
    for c in range(4):
        assert (a.out[..., c] == float(sum(Fraction(int(x)) for x in p.value[0, 0, :, c]) / 6)).all()
    assert (a.values["dv"] == float(Fraction(2 * 5, 6))).all()
    assert (a.lse == np.log(6)).all()


def test_a_codebook_is_softmax_over_means_that_are_numbers_and_its_gradient_goes_through_them():
    """Four equal-sized codes of two keys: means are whole halves, and dk of both is half of the mean's."""
    p = call("codebook", n_k=8, options={"codes": ((0, 1, 2, 3, 3, 2, 1, 0),)})
    dout = np.random.default_rng(1).standard_normal(p.out_shape)
    a = evaluate(p, rounding="float64", gradients=dout)
    means, values = ((x[:, :, :4] + x[:, :, :3:-1]) / 2 for x in (p.key, p.value))
    b = evaluate(Problem(p.query, means, values), rounding="float64", gradients=dout)
    np.testing.assert_array_equal(a.out, b.out)
    for name in ("dk", "dv"):  # halves of numbers that are rounded correctly are rounded correctly
        np.testing.assert_array_equal(a.values[name][:, :, :4], b.values[name] / 2)
        np.testing.assert_array_equal(a.values[name][:, :, :3:-1], b.values[name] / 2)
    np.testing.assert_array_equal(a.values["dq"], b.values["dq"])


def test_names_of_codes_change_nothing_and_codes_of_their_own_are_softmax():
    p = call("codebook", options={"codes": (CODES, (0, 1, 2, 3, 4, 5))})
    out = evaluate(p, rounding="float64").out
    other = p.replace(options={"codes": (tuple(9 - x for x in CODES), (5, 4, 3, 2, 1, 0))})
    np.testing.assert_array_equal(out, evaluate(other, rounding="float64").out)
    dense = evaluate(p.replace(variant="softmax", options={}), rounding="float64").out
    np.testing.assert_array_equal(out[:, 1], dense[:, 1])
    assert (out[:, 0] != dense[:, 0]).any()


def sorted_call(mode):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 2, 40, 8))
    planes, drawn = rng.standard_normal((8, 4)), (3, 39, 3, 17, 20, 8, 8, 8)
    orders = [
        tuple(tuple(x.tolist()) for x in angular_hash(y[0], planes, mode=mode).argsort(kind="stable")) for y in (q, k)
    ]
    options = {"order_q": orders[0], "order_k": orders[1], "drawn": (drawn,), "block_size": 10, "mode": mode}
    p = Problem(q, k, v, variant="hyper", options=options)
    return p, (planes, lambda n: np.array(drawn)), {"block_size": 10, "min_length": 1, "mode": mode}


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_hyper_is_softmax_with_the_weights_of_the_function(mode):
    p, given, options = sorted_call(mode)
    a = evaluate(p, rounding="float64")
    weight = hyper_weight(p.query, p.key, *given, **options)  # 40 keys, 8 draws: whole numbers
    b = evaluate(p.replace(variant="softmax", options={}, weight=weight), rounding="float64")
    np.testing.assert_array_equal(a.out, b.out)
    np.testing.assert_array_equal(a.lse, b.lse)
    out, lse = hyper_attention(p.query, p.key, p.value, *given, **options)
    limit = allowed_error(p)
    assert (abs(out - a.out) <= limit["out"]).all()
    assert (abs(lse - a.lse) <= limit["lse"]).all()


@pytest.mark.parametrize("r", [1, 2, 3])
def test_spark_is_the_function(r):
    p = call("spark", n_k=9, options={"predictor": r}, scale=0.5, causal="bottom_right")
    out = spark_attention(p.query, p.key, p.value, r=r, k=9, scale=0.5)
    assert (abs(out - evaluate(p, rounding="float64").out) <= allowed_error(p)["out"]).all()
    assert differing_form(p.replace(query=p.query[:, :, -3:])) == ""


def test_a_gradient_of_sparks_softmax_is_one_of_its_columns():
    """Where all keys gate alike the gate is a number: what arrives at the other columns is softmax's, times it."""
    p = call("spark", options={"predictor": 2}, scale=1.0)
    key = np.array(p.key)
    key[..., 2:] = 0
    dout = np.random.default_rng(1).standard_normal(p.out_shape)
    a = evaluate(p.replace(key=key), gradients=dout)
    b = evaluate(Problem(p.query[..., :2], key[..., :2], p.value, scale=1.0), gradients=dout)
    gate = np.log(2.0)
    for name, at in (("dq", slice(2)), ("dk", slice(2)), ("dv", slice(None))):
        got, want = a.values[name][..., at], gate * b.values[name]
        assert (abs(got - want) <= 4 * 2.0**-53 * abs(want)).all()  # three roundings: two of answers, one product
    assert (a.values["dq"][..., 2:] == 0).all()
    assert (a.values["dk"][..., 2:] != 0).any()


@pytest.mark.parametrize("variant", ["codebook", "hyper", "spark"])
def test_mistakes_are_none_of_their_forms(variant):
    v = VARIANTS[variant]
    rows = {n: d if isinstance(d, Rows) else Rows(d) for n, (_, d) in v.wrong.items()}
    p = call(variant, options={
        "codebook": {"codes": (CODES,)}, "spark": {},
        "hyper": {"block_size": 4, "order_q": (turned(5, 2, 1),), "order_k": (turned(6, 5),), "drawn": ((1, 1, 4),)},
    }[variant], dtype=np.float32)  # fmt: skip
    for name, wrong in rows.items():
        with under(replace(v, name="other", forms={"wrong": wrong})):
            assert differing_form(p.replace(variant="other")).startswith("form 'wrong' differs in out at"), name


@pytest.mark.parametrize(
    ("variant", "options", "text"),
    [
        ("codebook", {"codes": CODES}, r"codes: got \(3, .*, expected None or a tuple of one tuple of codes from 0 on"),
        ("codebook", {"codes": ((0, -1, 0, 0, 0, 0),)}, "codes: got .*, expected None or a tuple of one tuple"),
        ("codebook", {"codes": ((0, 1),)}, "codes: got 2 codes, expected one for each of 6 keys"),
        ("hyper", {"block_size": 0}, "block_size: got 0, expected an integer of at least 1"),
        ("hyper", {"order_k": ((0, 0, 1, 2, 3, 4),)}, "order_k: got .*, expected None or a tuple of one permutation"),
        ("hyper", {"order_q": ((1, 0),)}, "order_q: got 2 places, expected one for each of 5 queries"),
        ("hyper", {"order_k": ((1, 0),)}, "order_k: got 2 places, expected one for each of 6 keys"),
        ("hyper", {"drawn": ((),)}, "drawn: got .*, expected None or a tuple of one tuple of places from 0 on"),
        ("hyper", {"drawn": ((2, 6),)}, "drawn: got the place 6, expected at most 5, that of the last of 6 sorted"),
        ("hyper", {"mode": "both"}, "mode: got 'both', expected one of paper, released"),
        ("spark", {"predictor": 0}, "predictor: got 0, expected None or an integer of at least 1"),
        ("spark", {"predictor": 4}, "predictor: got 4, expected at most 3 of 4 features: the others gate"),
    ],
)
def test_options_that_cannot_be_are_named(variant, options, text):
    with pytest.raises(InvalidProblem, match=f"^{text}"):
        evaluate(call(variant, options=options))


def test_calls_that_cannot_be_are_named():
    with pytest.raises(InvalidProblem, match=r"^query: axis dim is 1, expected at least 2: some features choose"):
        evaluate(call("spark", d=1))
    ends = {"cu_seqlens_q": np.array([0, 2, 5], np.int32), "cu_seqlens_k": np.array([0, 3, 6], np.int32)}
    for variant, what in (("codebook", "codes"), ("hyper", "blocks")):
        with pytest.raises(InvalidProblem, match=f"^cu_seqlens_q: {what} of packed sequences are not defined"):
            evaluate(call(variant, **ends))
