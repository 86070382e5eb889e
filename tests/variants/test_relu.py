"""ReLU attention and the signs that its gradients need: of enclosures, of balls, of a prime field."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from refattn import VARIANTS, InvalidProblem, Problem, UnsupportedProblem, evaluate
from refattn.exact.agree import differing_form, under
from refattn.exact.driver import enclose
from refattn.exact.field import Field
from refattn.functions.in_context import relu_attention
from refattn.operators.vetting import vet


def call(d=4, **more):
    """Return integers so small that many scores are exactly 0."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(-1, 2, (1, 1, 5, w)).astype(np.float32) for w in (d, d, 3))
    return Problem(q, k, v, **({"variant": "relu"} | more))


def by_hand(p, dout):
    """Return out and its gradients by sums of fractions."""
    q, k, v, g = ([[Fraction(float(y)) for y in row] for row in x[0, 0]] for x in (p.query, p.key, p.value, dout))
    n, seen = len(q), [range(i + 1 if p.causal else len(k)) for i in range(len(q))]
    scale = Fraction(1 if p.scale is None else p.scale)
    out = [[Fraction(0)] * p.d_v for _ in q]
    back = {x: [[Fraction(0)] * len(y) for y in m] for x, m in (("dq", q), ("dk", k), ("dv", v))}
    for i in range(n):
        share = Fraction(1, len(seen[i])) if p.options.get("normalize", "count") == "count" else Fraction(1)
        for j in seen[i]:
            s = scale * sum(a * b for a, b in zip(q[i], k[j], strict=True))
            if s <= 0:
                continue
            through = share * sum(a * b for a, b in zip(g[i], v[j], strict=True))
            for c in range(p.d_v):
                out[i][c] += share * s * v[j][c]
                back["dv"][j][c] += share * s * g[i][c]
            for c in range(p.d_k):
                back["dq"][i][c] += scale * through * k[j][c]
                back["dk"][j][c] += scale * through * q[i][c]
    return {"out": out} | back


@pytest.mark.parametrize("more", [{}, {"causal": "bottom_right"}, {"options": {"normalize": "none"}, "scale": 0.25}])
def test_out_and_gradients_are_sums_of_fractions(more):
    """Some scores are exactly 0: they weigh nothing, and nothing comes back through them."""
    p = call(**more)
    assert (p.query[0, 0] @ p.key[0, 0].T == 0).any()
    dout = np.random.default_rng(1).integers(-2, 3, p.out_shape).astype(np.float32)
    wanted, a = by_hand(p, dout), evaluate(p, rounding="float64", gradients=dout)
    assert not any(a.undecided.values())
    for name, x in wanted.items():  # a fraction rounds to its nearest float64, as the answer does
        assert a.values[name][0, 0].tolist() == [[float(y) for y in row] for row in x]


@pytest.mark.parametrize("more", [{}, {"causal": "bottom_right"}, {"options": {"normalize": "none"}, "scale": 0.25}])
def test_the_form_by_channels_agrees_in_the_field(more):
    """25 scores, some of them exactly 0; the larger cases of test_variants.py are compared by balls."""
    assert differing_form(call(**more)) == ""


def test_forms_that_are_wrong_are_found():
    v = VARIANTS["relu"]
    for name in ("divided_by_the_weights", "sizes_of_scores", "squared_scores", "relu_of_the_output"):
        with under(replace(v, name="other", forms={"wrong": v.wrong[name][1]})):
            assert differing_form(call(variant="other")).startswith("form 'wrong' differs in out at"), name


def test_it_is_the_layer_of_the_paper_without_its_matrices():
    p = call(3, causal="bottom_right")
    h = p.query[0, 0].astype(float)
    p = p.replace(key=p.query, value=p.query)
    eye = np.eye(3)[None]
    layer = relu_attention(h, eye, eye, eye) - h
    # one quotient of integers each, and the residual's sum and difference
    assert (np.abs(evaluate(p).out[0, 0] - layer) <= 4 * 2.0**-53 * (np.abs(h) + np.abs(layer))).all()


def biased(q, k, v, o):
    return (q @ k.T * o.scale + o.bias).relu().where(o.allowed) @ v, None


BIASED = replace(
    VARIANTS["relu"],
    name="biased",
    define=biased,
    uses=frozenset({"causal", "bias"}),
    options={},
    cases={},
    forms={},
    wrong={},
    default_scale="rsqrt",
)


@pytest.mark.parametrize("d", [36, 6])
def test_a_zero_that_no_precision_shows_is_found_in_the_field(d):
    """q·k/6 - 1 of 36 channels is exactly 0, and 1/6 is in no ball; q·k/√6 is 0 only where q·k is."""
    rng = np.random.default_rng(0)
    q, k, v = (np.ones((1, 1, 3, d), np.float32) for _ in range(3))
    k[0, 0, 0], k[0, 0, 1, : d // 2 + 3] = np.where(np.arange(d) < 6, 1, 0), -1
    k[0, 0, 2] = np.where(np.arange(d) % 2, 1, -1)
    bias = np.array([-1, 9, 0], np.float32).reshape(1, 1, 1, 3)
    dout = rng.standard_normal((1, 1, 3, d)).astype(np.float32)
    with under(BIASED):
        p = Problem(q, k, v, variant="biased", bias=bias)
        s = [Fraction(int(x)) for x in (q[0, 0] @ k[0, 0].T)[0]]
        assert s[0] == 6
        assert s[2] == 0
        for kw in ({"rounding": "float32"}, {"bits": 128}):
            a = evaluate(p, gradients=dout, **kw)
            assert not any(a.undecided.values())
            assert max(e.radius.max() for e in a.enclosures.values()) < 1e-12
            back = a.dbias[0, 0, 0]
            assert (back[0] == 0) == (d == 36)
            assert back[2] == 0
            assert back[1] != 0


def test_a_sign_that_nothing_decides_leaves_a_gradient_between_both():
    """tanh has no image: whether q·k/6 - 1 is above 0 stays open, and its key's gradient may be all or nothing."""

    def bent(q, k, v, o):
        return (q @ k.T * o.scale + o.bias).tanh().relu().where(o.allowed) @ v, None

    with under(replace(BIASED, name="bent", define=bent)):
        q, v = np.ones((1, 1, 1, 36), np.float32), np.full((1, 1, 1, 1), 4, np.float32)
        k = (np.arange(36) < 6).astype(np.float32).reshape(1, 1, 1, 36)
        p = Problem(q, k, v, variant="bent", bias=np.array(-1, np.float32).reshape(1, 1, 1, 1))
        e = evaluate(p, gradients=np.ones((1, 1, 1, 1), np.float32)).enclosures["dbias"]
        # tanh's slope at 0 is 1: all is 4
        assert e.mid.item() - e.radius.item() <= 0
        assert e.mid.item() + e.radius.item() >= 4


def test_signs_in_the_field_are_those_of_surds():
    f = Field(6)
    a, b = (np.array(x, float) for x in ([[1, -1, 1, 0, 2, -2]], [[-2, 3, -3, 0, -5, 5]]))
    x = f.array(a) * f.rsqrt(6) * 6.0 + f.array(b)  # a·√6 + b
    assert x.positive().tolist() == (a * 6**0.5 + b > 0).tolist()
    with pytest.raises(UnsupportedProblem, match="the sign of this number is not known in the field"):
        x.exp().positive()


def test_a_sign_that_is_not_certain_widens_what_it_gives():
    """An enclosure of one run: the gradient lies between with and without the key, and holds what is right."""
    q = np.array([[[[1.0, 1.0]]]], np.float64)
    k = np.array([[[[1.0, -1.0], [1.0, 1.0]]]])
    k[..., 0, 1] += 2.0**-52
    v = np.ones((1, 1, 2, 1))
    p = Problem(q, k, v, variant="relu")
    for level in range(4):
        a = enclose(p, level, gradients=np.ones(p.out_shape))
        e = a.enclosures["dq"]
        for c in range(2):  # both keys' scores are above 0: dq is the mean of the keys
            exact = (Fraction(float(k[0, 0, 0, c])) + Fraction(float(k[0, 0, 1, c]))) / 2
            off = abs(exact - Fraction(float(e.mid[0, 0, 0, c])) - Fraction(float(e.tail[0, 0, 0, c])))
            assert off <= Fraction(float(e.radius[0, 0, 0, c]))


def test_a_definition_that_asks_for_a_sign_gets_more_bits():
    """2**-200 of a score: certified floats do not know its sign, balls do."""

    def step(q, k, v, o):
        s = q @ k.T * o.scale
        return ((s.zeros() + 1.0).where(s.positive() & o.allowed)) @ v, None

    with under(replace(BIASED, name="step", define=step, uses=frozenset(), default_scale="one")):
        q, k = np.ones((1, 1, 1, 3)), np.array([1.0, 2.0**-200, -1.0]).reshape(1, 1, 1, 3)
        p = Problem(q, k, k, variant="step")
        assert (evaluate(p, rounding="float32").out == k.astype(np.float32)).all()
        with pytest.raises(UnsupportedProblem, match="the sign of 1 numbers is not certain in Arb at 32 bits"):
            evaluate(p, 32)


def test_an_operator_with_relu_registers():
    with under(replace(VARIANTS["relu"], name="another")) as v:
        vet(v)


def test_other_ways_to_normalise_are_refused():
    with pytest.raises(InvalidProblem, match="normalize: got 'mean', expected one of count, none"):
        evaluate(call(options={"normalize": "mean"}))
