"""Every row of the table, whatever rows there are."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from refattn import VARIANTS, InvalidInput, InvalidProblem, Problem, UnsupportedProblem, evaluate, reference
from refattn.check import FAMILIES, LAWS
from refattn.check.bounds.forward import bounds
from refattn.check.bugs.planted import PLANTED
from refattn.check.inputs.families import cases
from refattn.check.model import flash
from refattn.exact.agree import differing_form, under


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_is_complete(name):
    v = VARIANTS[name]
    assert v.name == name
    assert v.formula
    assert "arXiv" in v.source
    assert v.unit.startswith("u ·")
    assert v.contract
    assert set(v.laws) <= set(LAWS)
    assert len(v.laws) >= 4
    assert set(v.bugs) <= set(PLANTED)
    assert len(v.bugs) >= 4
    assert set(v.families) <= set(FAMILIES)
    assert v.quick <= {c.name for c in cases(name)}
    import_module("refattn.operators.register")._settings(v)  # every option is set in a case of its own


SMALL = [
    (name, c.label)
    for name in VARIANTS
    for c in cases(name)
    if c.family == "gaussian" and c.label in VARIANTS[name].cases and c.problem("float32").n_k <= 67
]


@pytest.mark.parametrize("name", ["linear", "lightning"])
def test_decays_to_try_have_heads_that_forget_nothing_and_heads_that_do(name):
    for drawn in VARIANTS[name].options["decay"].draws(3):
        assert not drawn or min(drawn) == 0.0 < max(drawn)


@pytest.mark.parametrize(("name", "label"), [x for x in SMALL if VARIANTS[x[0]].forms])
def test_forms_agree(name, label):
    """By images in a prime field and by balls: no tolerance."""
    (case,) = [c for c in cases(name) if c.name == f"gaussian/{label}"]
    assert differing_form(case.problem("float32")) == ""


def test_every_operator_with_another_form_is_compared():
    assert {name for name, v in VARIANTS.items() if v.forms} <= {name for name, _ in SMALL}


def test_a_form_that_differs_is_found(make):
    """The decay one token late, a block too many: both are noticed, and where."""

    def late(q, k, v, o):
        w = (q @ k.T * o.scale) * ((o.distance + o.one) * -o.decay).exp()
        return w.where(o.allowed) @ v, None

    wrong = replace(VARIANTS["lightning"], name="late", forms={"late": late})
    with under(wrong):
        p = make(5, 5, 4, causal="bottom_right", variant="late", options={"decay": (0.1, 0.3)})
        assert differing_form(p) == "form 'late' differs in out at (0, 0, 0, 0) (40 of 40 elements)"


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("power", {"p": 3}, "p: got 3, expected a positive even integer"),
        ("power", {"p": 2.0}, "p: got 2.0"),
        ("power", {"epsilon": -1}, "epsilon: got -1, expected a finite number of at least 0"),
        ("power", {"form": "fast"}, "form: got 'fast', expected one of plain, stable, mean"),
        ("power", {"delta": 0.0}, "delta: got 0.0, expected a finite number above 0"),
        ("power", {"q": 1}, "options: power attention has no 'q'; it has p, epsilon, form, delta"),
        ("softmax", {"p": 2}, "options: softmax attention has no 'p'; it has none"),
        ("linear", {"feature": "cos"}, "feature: got 'cos', expected one of identity, relu, elu1, exp"),
        ("linear", {"normalize": 1}, "normalize: got 1, expected True or False"),
        ("linear", {"decay": (0.1,)}, "decay: got .* expected None or a tuple of 2 finite numbers"),
        ("linear", {"decay": [0.1, 0.2]}, "decay: got .* expected None or a tuple of 2 .*; make it a tuple"),
        ("linear", {"decay": np.array([0.1, 0.2])}, "decay: got array.*; make it a tuple"),
        ("linear", {"decay": (0.1, 0.2)}, "decay: needs causal"),
        ("sigmoid", {"offset": float("inf")}, "offset: got inf, expected a finite number or None"),
    ],
)
def test_an_option_that_cannot_be_is_named(make, name, options, text):
    for run in (evaluate, lambda p: evaluate(p, rounding="float32")):
        with pytest.raises(InvalidProblem, match=text):
            run(make(variant=name, options=options))


def test_an_option_of_problem_that_means_nothing_is_refused(make):
    with pytest.raises(UnsupportedProblem, match="softcap: power attention does not have it; it has allowed, causal"):
        evaluate(make(variant="power", softcap=1.0))
    with pytest.raises(InvalidInput, match="variant: got 'cosine', expected one of softmax, linear, power, sigmoid, "):
        evaluate(make(variant="cosine"))


def test_linear_scale_is_one_by_default_and_softmax_is_not(make):
    a = evaluate(make(variant="linear", options={"normalize": False}))
    b = evaluate(make(variant="linear", scale=1.0, options={"normalize": False}))
    assert (a.out == b.out).all()
    assert not (evaluate(make()).out == evaluate(make(scale=1.0)).out).all()


def test_known_values():
    """Two keys with scores 0 and log 3: weights 1/4 and 3/4, and what the others make of the same scores."""
    q, k = np.ones((1, 1, 1, 1)), np.array([0.0, 3.0]).reshape(1, 1, 2, 1)
    v = np.array([1.0, 5.0]).reshape(1, 1, 2, 1)
    bias = np.log(np.array([1.0, 3.0])).reshape(1, 1, 1, 2)
    assert abs(reference(Problem(q, 0 * k, v, bias=bias))["out"].item() - 4.0) < 1e-15
    assert evaluate(Problem(q, k, v, variant="power", options={"p": 2, "epsilon": 1.0})).out.item() == 4.5
    linear = Problem(q, k, v, variant="linear", options={"feature": "identity"})
    assert evaluate(linear).out.item() == 5.0
    sigmoid = evaluate(Problem(q, 0 * k, v, variant="sigmoid")).out.item()
    assert abs(sigmoid - 6 / 3) < 1e-15  # sigmoid(-log 2) = 1/3


def test_a_sink_far_above_all_scores_is_the_largest_of_its_row(make):
    """Less the largest score, its exponential would be beyond all numbers."""
    p = make(sink=np.full(2, 1000.0))
    assert all(np.isfinite(x).all() for x in bounds(evaluate(p), flash("float32")).values())


def test_keys_ahead_of_a_row_are_not_decayed():
    """e**(1.5 times 599), which the last key would have in the first row, is beyond float64."""
    one = np.ones((1, 1, 600, 1), np.float32)
    options = {"feature": "identity", "normalize": False, "decay": (1.5,)}
    p = Problem(one, one, one, causal="bottom_right", variant="linear", options=options)
    assert np.isfinite(bounds(evaluate(p), flash("float32"))["out"]).all()


def test_the_mean_form_ignores_masked_padding(make):
    allowed = np.ones((1, 1, 5, 7), bool)
    allowed[..., 4:] = False
    p = make(variant="power", options={"form": "mean"})
    short = p.replace(key=p.key[:, :, :4], value=p.value[:, :, :4])
    assert (evaluate(p.replace(allowed=allowed)).out == evaluate(short).out).all()


def test_a_denominator_of_exactly_zero_is_no_number(make):
    p = make(variant="power", options={"epsilon": 0.0}, scale=0.0)
    a = evaluate(p, rounding="float32")
    assert np.isnan(a.out).all()
    assert a.undecided == {"out": 0}
