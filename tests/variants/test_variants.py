"""Every row of the table, whatever rows there are."""

import numpy as np
import pytest

from refattn import VARIANTS, InvalidInput, InvalidProblem, UnsupportedProblem, evaluate, reference
from refattn.check import FAMILIES, LAWS
from refattn.check.bugs.planted import PLANTED
from refattn.exact.arithmetics import Floats
from refattn.exact.slabs import matrix_of, slabs
from refattn.exact.tape import Tape, gradients
from refattn.variants import variant_of

CALLS = {
    "softmax": [
        {},
        {"softcap": 2.0, "causal": "bottom_right"},
        {"sink": np.array([0.5, -1], np.float32), "window": (2, 1)},
    ],
    "linear": [
        {},
        {"options": {"feature": "identity", "normalize": False}},
        {"options": {"feature": "exp"}, "causal": "top_left"},
        {"options": {"feature": "relu"}},
        {"causal": "bottom_right", "options": {"decay": (0.1, 0.5)}},
    ],
    "power": [
        {},
        {"options": {"p": 2, "form": "mean"}, "causal": "top_left"},
        {"options": {"p": 6, "form": "stable", "epsilon": 0.0}},
    ],
    "sigmoid": [{}, {"options": {"offset": 0.5}, "causal": "bottom_right"}],
}
ALL = [(name, i) for name in VARIANTS for i in range(len(CALLS[name]))]


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
    assert len(v.bugs) >= 15
    assert set(v.families) <= set(FAMILIES)
    assert CALLS[name]


@pytest.mark.parametrize(("name", "i"), ALL)
def test_sensitivity_agrees_with_the_definition(make, name, i):
    """Weights over denominator times values is the output; the slope is the definition's own derivative."""
    p = make(variant=name, **CALLS[name][i])
    exact = evaluate(p).out
    for slab in slabs(p):
        s = variant_of(name).sensitivity(slab.q, slab.k, slab.plain())
        z = 1.0 if s.denominator is None else s.denominator[:, None]
        out = s.weights @ slab.v / z
        rows = slab.allowed.any(1)
        assert np.allclose(out[rows], exact[0, slab.head][rows], rtol=1e-12, atol=1e-14)
        if s.lse is not None:
            assert np.allclose(s.lse[rows], evaluate(p).lse[0, slab.head][rows], rtol=1e-13)
        assert (s.products >= 0).all()
        assert (s.roundings >= 0).all()


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "power"])
def test_slope_is_the_derivative_by_the_score(make, name):
    p = make(variant=name, h=1)
    f = Floats()
    slab = next(iter(slabs(p)))
    o = slab.options(f)
    q, k, v = (matrix_of(f, x) for x in (slab.q, slab.k, slab.v))
    s = variant_of(name).sensitivity(slab.q, slab.k, slab.plain())
    z = np.ones(5) if s.denominator is None else s.denominator
    for c in range(2):
        # the derivative by a score, through a bias of its own added to the products
        zero = Tape(matrix_of(f, np.zeros((5, 7))))
        scores = _Shifted(Tape(q), zero, 1 / float(o.scale))
        out, _ = variant_of(name).define(scores, Tape(k), Tape(v), o)
        seed = np.zeros((5, 8))
        seed[:, c] = 1
        (g,) = gradients(out, matrix_of(f, seed), [zero])
        apart = slab.v[None, :, c] - (0 if s.denominator is None else out.value.a[:, c, None])
        assert np.allclose(np.abs(g.a), s.slope * np.abs(apart) / z[:, None], rtol=1e-9, atol=1e-12)


class _Shifted:
    """Queries whose products with the keys get something added, before the scale."""

    def __init__(self, q, extra, factor):
        self.q, self.extra, self.factor = q, extra, factor

    def __matmul__(self, k):
        return self.q @ k + self.extra * np.float64(self.factor)


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
    with pytest.raises(InvalidInput, match="variant: got 'cosine', expected one of softmax, linear, power, sigmoid"):
        evaluate(make(variant="cosine"))


def test_linear_scale_is_one_by_default_and_softmax_is_not(make):
    a = evaluate(make(variant="linear", options={"normalize": False}))
    b = evaluate(make(variant="linear", scale=1.0, options={"normalize": False}))
    assert (a.out == b.out).all()
    assert not (evaluate(make()).out == evaluate(make(scale=1.0)).out).all()


def test_known_values():
    """Two keys with scores 0 and log 3: weights 1/4 and 3/4, and what the others make of the same scores."""
    from refattn import Problem

    q, k = np.ones((1, 1, 1, 1)), np.array([0.0, 3.0]).reshape(1, 1, 2, 1)
    v = np.array([1.0, 5.0]).reshape(1, 1, 2, 1)
    bias = np.log(np.array([1.0, 3.0])).reshape(1, 1, 1, 2)
    assert abs(reference(Problem(q, 0 * k, v, bias=bias))["out"].item() - 4.0) < 1e-15
    assert evaluate(Problem(q, k, v, variant="power", options={"p": 2, "epsilon": 1.0})).out.item() == 4.5
    linear = Problem(q, k, v, variant="linear", options={"feature": "identity"})
    assert evaluate(linear).out.item() == 5.0
    sigmoid = evaluate(Problem(q, 0 * k, v, variant="sigmoid")).out.item()
    assert abs(sigmoid - 6 / 3) < 1e-15  # sigmoid(-log 2) = 1/3


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
