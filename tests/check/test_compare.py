"""The written table: what passes for which exact value."""

import numpy as np
import pytest

from refattn import evaluate
from refattn.check import compare, flash
from refattn.check.bounds.forward import bounds


@pytest.fixture
def case(make):
    allowed = np.ones((1, 1, 5, 7), bool)
    allowed[..., 1, :] = False
    value = make().value.copy()
    value[0, 0, 2, 3] = np.nan  # seen by every row but 1
    value[0, 0, 4, 5] = np.inf
    a = evaluate(make(allowed=allowed).replace(value=value))
    return a, bounds(a, flash("float32"))


def judge(case, change=None, name="out"):
    a, limit = case
    got = a.values[name].astype(np.float32)
    if change is not None:
        change(got)
    return compare(name, got, a, limit[name], "float32")


def test_the_exact_value_passes(case):
    w = judge(case)
    assert w.passed
    assert 0 < w.ratio < 1
    assert judge(case, name="lse").passed
    assert w.elements == 80


@pytest.mark.parametrize(
    ("place", "value", "symptom"),
    [
        ((0, 0, 0, 0), np.nan, "NaN where the exact value is finite"),
        ((0, 0, 0, 0), np.inf, "inf where the exact value is finite"),
        ((0, 1, 4, 7), 1e3, "error above the bound"),
        ((0, 0, 1, 0), np.nan, "NaN in a row without keys, must be 0"),
        ((0, 0, 1, 0), 1e-30, "a nonzero number in a row without keys, must be 0"),
        ((0, 0, 1, 0), np.inf, "inf in a row without keys, must be 0"),
        ((0, 0, 0, 3), 1.0, "a finite number where NaN or inf must show"),
        ((0, 0, 0, 5), 1.0, "a finite number where NaN or inf must show"),
        ((0, 0, 0, 5), -np.inf, None),
    ],
)
def test_one_wrong_element_is_found_and_named(case, place, value, symptom):
    def change(x):
        x[place] = value

    w = judge(case, change)
    assert not w.passed
    assert w.place == place
    assert w.failures == 1
    assert w.ratio > 1
    if symptom:
        assert any(symptom in s for s in w.symptoms), w.symptoms


def test_nan_passes_for_an_infinity_but_not_for_a_number(case):
    def nan_for_inf(x):
        x[0, 0, :, 5][np.isinf(x[0, 0, :, 5])] = np.nan

    assert judge(case, nan_for_inf).passed


@pytest.mark.parametrize(
    ("value", "symptom"),
    [
        (np.nan, "lse of a row without keys is NaN"),
        (0.0, "lse of a row without keys is 0, must be -inf"),
        (-1e38, "lse of a row without keys is -1e"),
        (np.inf, "lse of a row without keys is inf"),
    ],
)
def test_lse_of_a_row_without_keys(case, value, symptom):
    def change(x):
        x[0, 0, 1] = value

    w = judge(case, change, "lse")
    assert w.place == (0, 0, 1)
    assert any(symptom in s for s in w.symptoms)


def test_the_mean_of_the_values_is_recognised(make):
    allowed = np.ones((1, 1, 5, 7), bool)
    allowed[..., 1, :] = False
    p = make(allowed=allowed)
    a = evaluate(p)
    got = a.out.astype(np.float32)
    got[:, :, 1] = p.value.mean(2)
    w = compare("out", got, a, bounds(a, flash("float32"))["out"], "float32")
    assert w.symptoms == ("the mean of all values in a row without keys, must be 0 (16 of 80)", "only in row 1 of 5")


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


def test_a_bound_that_is_no_number_fails(make):
    a = evaluate(make())
    w = compare("out", a.out + 1e-30, a, np.full(a.out.shape, np.nan), "float64")
    assert not w.passed


def test_nothing_to_compare(make):
    a = evaluate(make(0, 4))
    assert compare("out", a.out, a, a.out, "float32").passed
