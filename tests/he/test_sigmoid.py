"""Sigmoid attention on ciphertexts: polynomial, bounds, masks, messages, and refusals."""

import json

import mpmath
import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem, he
from refattn.he.arithmetic import Numbers
from refattn.he.device.encode import encoded
from refattn.he.device.executor import execute
from refattn.he.device.schedule import schedule_of
from refattn.he.polynomials import sigmoids
from refattn.he.saved import plan_from_json, plan_to_json
from refattn.masks import visible

from .device.exchange import Exchange, exchange
from .make_sigmoid import call, planned

ROUNDING = 2.0**-40
"""float64's, of some hundred operations of 2**-53 on numbers below 8."""


@pytest.mark.parametrize("interval", [(-4.0, 4.0), (-12.0, 1.5), (0.0, 0.5)])
def test_the_certified_error_is_above_what_mpmath_finds(interval):
    low, high = interval
    for p in sigmoids(low, high, 0.02, 2):
        constant, factors = p.factors()
        worst = mpmath.mpf(0)
        for x in np.linspace(low, high, 801):
            w, of = (2 * mpmath.mpf(x) - low - high) / (mpmath.mpf(high) - low), mpmath.mpf(constant)
            for factor in factors:
                of *= mpmath.polyval([mpmath.mpf(c) for c in reversed(factor)], w)
            worst = max(worst, abs(of - 1 / (1 + mpmath.exp(-x))))
        assert worst <= p.error <= 0.02
        assert p.error <= 1.02 * float(worst) + 2**-30  # 800 points of a smooth error miss little of its largest
    few, more = sigmoids(-4.0, 4.0, 0.02, 2)
    assert (more.degree - few.degree, more.error < few.error) == (2, True)


CALLS = {
    "whole": ({}, {}),
    "causal": ({"n_q": 6, "n_k": 6, "causal": "bottom_right"}, {}),
    "an offset, several heads, few outputs": ({"heads": 3, "d": 4, "d_v": 3, "options": {"offset": -1.5}}, {}),
    "whole ciphertexts, a scale": ({"scale": 0.3}, {"upload": "whole", "tolerance": 1e-3}),
    "a slot an input": ({"n_q": 2, "n_k": 5, "d": 3, "heads": 4}, {"mode": "throughput"}),
    "one key": ({"n_q": 1, "n_k": 1, "d": 1, "heads": 1}, {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_program_is_within_the_polynomials_bound(name):
    sizes, more = CALLS[name]
    x = call(**sizes)
    plan = planned(x, **more)
    exact = he.reference(x)
    out = he.simulate(plan, x)
    assert np.abs(out - exact).max() <= plan.approximation + ROUNDING
    # the same sum in a loop, with the polynomial itself
    q, k, v = (np.asarray(a)[0] for a in (x.query, x.key, x.value))
    seen_by = [visible(x, 0, h, slice(0, x.n_q), slice(0, x.n_k)) for h in range(x.heads)]
    for h, i in np.ndindex(x.heads, x.n_q):
        seen = np.broadcast_to(seen_by[h], (x.n_q, x.n_k))[i]
        terms = [
            plan.polynomial(plan.scale * (q[h, i] @ k[h, j]) + plan.offset) * v[h, j] for j in np.flatnonzero(seen)
        ]
        assert np.abs(out[0, h, i] - sum(terms, np.zeros(x.d_v))).max() <= ROUNDING
    drawn = [np.abs(he.simulate(plan, x, seed=s) - out).max() for s in range(3)]
    assert 0 < max(drawn) <= plan.noise


def test_a_masked_key_weighs_nothing_and_is_not_read():
    allowed = np.random.default_rng(3).random((1, 2, 5, 7)) < 0.6
    allowed[..., 6] = False  # of nobody
    allowed[0, 0, 2] = False  # a row that sees no key
    x = call(allowed=allowed)
    plan = planned(x)
    out = he.simulate(plan, x)
    assert np.abs(out - he.reference(x)).max() <= plan.approximation + ROUNDING
    assert not out[0, 0, 2].any()
    key, value = x.key.copy(), x.value.copy()
    key[:, :, 6], value[:, :, 6] = np.nan, np.inf
    assert np.array_equal(he.simulate(plan, x.replace(key=key, value=value)), out)
    # a value changes nothing for a query that does not see it
    row = np.flatnonzero(~allowed[0, 1, :, 0])[0]
    value = x.value.copy()
    value[0, 1, 0] *= -1
    assert np.array_equal(he.simulate(plan, x.replace(value=value))[0, 1, row], out[0, 1, row])


def test_scores_at_the_ends_stay_within_the_bounds():
    """All scores at one end, all values the largest: nothing is larger."""
    for sign in (1, -1):
        q, k, v = np.full((1, 1, 4, 1), sign * 2.0), np.full((1, 1, 16, 1), 2.0), np.full((1, 1, 16, 1), 3.0)
        x = Problem(q, k, v, variant="sigmoid", options={"offset": 0.0}, scale=1.0)
        plan = he.plan_sigmoid(
            4, 16, 1, scores=(-4.0, 4.0), offset=0.0, scale=1.0, norms=(2.0, 2.0), value_most=3.0, tolerance=0.1
        )
        out = he.simulate(plan, x)
        assert np.abs(out - he.reference(x)).max() <= plan.approximation + ROUNDING
        assert np.abs(he.simulate(plan, x, seed=1) - out).max() <= plan.noise
    assert plan.out_most == 48.0


def lengths(heads=3, n_k=4):
    """Return a call whose heads see their first keys only, each another number of them; one sees none."""
    seen = np.arange(n_k) < np.arange(heads)[:, None, None] + np.zeros((2, 1))
    return call(2, n_k, 3, heads=heads, allowed=seen[None])


def test_inputs_in_slots_may_have_fewer_keys_than_others():
    x = lengths()
    plan = planned(x, mode="throughput", tolerance=0.5)
    out = he.simulate(plan, x)
    assert np.abs(out - he.reference(x)).max() <= plan.approximation + ROUNDING
    assert not out[0, 0].any()
    assert out[0, 1].any()
    with pytest.raises(UnsupportedProblem, match="takes masks that hide a key from all queries of an input"):
        plan.encoded(x.replace(allowed=None, causal="top_left"))
    # keys and values come once for all queries
    assert len(plan.part_limbs()) == len(plan.encoded(x)[1]) == 2 * 4 * 2 + 2 * 2


@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_encrypted_it_is_within_the_bound_and_a_gpus_words_are_seals(mode):
    pytest.importorskip("tenseal")
    e = exchange("sigmoid, several heads, causal")
    if mode == "throughput":
        x = call(1, 2, 2, heads=3)
        e = Exchange(planned(x, mode=mode, tolerance=0.5), x)
    x, plan = e.x, e.plan
    out = e.client.decrypt(e.reply)
    assert np.abs(out - he.reference(x)).max() <= plan.error
    assert np.abs(out - he.simulate(plan, x)).max() <= plan.noise
    schedule = schedule_of(plan)
    keys, parts = e.given_words()
    found = execute(schedule, keys, parts, lambda a: encoded(a, plan.ring))
    assert all(np.array_equal(a, b) for a, b in zip(found, e.replied_words(schedule.outs), strict=True))


def test_a_plan_survives_json_and_says_what_it_is():
    plan = planned(call())
    again = plan_from_json(plan_to_json(plan))
    assert (again.digest, again.report()) == (plan.digest, plan.report())
    assert again.polynomial == plan.polynomial
    assert plan.report()["polynomial_degree"] == plan.polynomial.degree
    assert "error at most" in plan.words()
    for changed in ({"offset": -1.0}, {"mode": "throughput"}):
        other = planned(call(), **changed)
        assert other.digest != plan.digest
        assert plan_from_json(plan_to_json(other)).digest == other.digest
    text = json.loads(plan_to_json(plan))
    with pytest.raises(InvalidInput, match="the plan is not what its digest says"):
        plan_from_json(json.dumps(text | {"plan": text["plan"] | {"tolerance": 1e-3}}))
    with pytest.raises(InvalidInput, match="got what is no plan: TypeError"):
        plan_from_json(json.dumps(text | {"plan": text["plan"] | {"more": 1}}))


def test_inputs_outside_the_plan_are_refused():
    x = call()
    plan = planned(x)
    for other, error, text in (
        (x.replace(query=1.5 * x.query), InvalidProblem, "query: its largest is"),
        (x.replace(value=2 * x.value), InvalidProblem, "value: its largest is"),
        (x.replace(query=x.query * np.nan), InvalidProblem, "query: its largest is nan"),
        (x.replace(options={"offset": 0.25}), InvalidProblem, "offset: got 0.25, expected the plan's"),
        (call(5, 6), InvalidProblem, "n_k: got 6, expected the plan's 7"),
        (x.replace(bias=np.zeros((1, 2, 5, 7))), UnsupportedProblem, "without a bias"),
        (x.replace(variant="power", options={"p": 2}), UnsupportedProblem, "computes variant 'sigmoid', got 'power'"),
        (None, InvalidProblem, "got NoneType, expected a Problem"),
    ):
        with pytest.raises(error, match=text):
            plan.encoded(other)
    narrow = planned(x, scores=(plan.offset - 0.2, plan.offset + 0.2))
    with pytest.raises(InvalidProblem, match=r"scores: head \d, row \d, key \d has .*, outside the plan's"):
        narrow.encoded(x)


GIVEN = {"scores": (-4.0, 4.0), "offset": 0.0, "norms": (2.0, 2.0), "value_most": 1.0}


def test_noise_of_the_scores_is_counted():
    """A fresh ciphertext's noise meets the norms: with a thousand times those it is what most of the bound is of."""
    x = call()
    plan = planned(x)
    wide = planned(x, norms=tuple(1e3 * n for n in plan.norms))
    assert (wide.ring, wide.polynomial) == (plan.ring, plan.polynomial)
    assert wide.noise > 5 * plan.noise


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        (
            {"scores": (1.0, 4.0)},
            InvalidInput,
            r"scores: got \(1, 4\), expected low < high with the offset, 0, between",
        ),
        ({"scores": 5}, InvalidInput, "scores: got 5, expected two finite numbers"),
        ({"offset": "x"}, InvalidInput, "offset: got 'x', expected a finite number"),
        ({"norms": (0.0, 1.0)}, InvalidInput, "norms: got 0"),
        ({"scores": (-1e308, 1e308)}, InvalidInput, r"scores: got -1e\+308, expected from -1e\+100 to 1e\+100"),
        ({"offset": -1e200}, InvalidInput, r"offset: got -1e\+200, expected from"),
        ({"scores": (-52.0, -48.0), "offset": -50.0}, UnsupportedProblem, "too near a constant for a polynomial"),
        (
            {"scores": (48.0, 52.0), "offset": 50.0},
            UnsupportedProblem,
            "factors have products up to 1.9e\\+15, too",
        ),
        ({"upload": "compact"}, UnsupportedProblem, "upload='compact' is not for sigmoid attention; take 'full'"),
        ({"mode": "fast"}, InvalidInput, "mode: got 'fast', expected 'latency' or 'throughput'"),
        ({"tolerance": 1e-12}, UnsupportedProblem, "he: no polynomial up to degree 31 is within"),
        ({"scores": (-4e3, 4e3)}, UnsupportedProblem, "narrow the interval"),
        ({"value_most": 1e11, "tolerance": 1e10}, UnsupportedProblem, "no room at 128 bits of security"),
    ],
)
def test_what_cannot_be_planned_is_refused(changed, error, text):
    with pytest.raises(error, match=text):
        he.plan_sigmoid(4, 4, 4, **GIVEN | changed)


def test_queries_that_do_not_fit_together_are_refused():
    with pytest.raises(UnsupportedProblem, match="do not fit"):
        he.plan_sigmoid(2**14, 16, 4, **GIVEN, tolerance=1.0)


def test_factors_are_the_polynomial():
    (p,) = sigmoids(-6.0, 2.0, 1e-3, 1)
    w = np.linspace(-1, 1, 101)
    product = p.factors()[0] * np.prod([np.broadcast_to(f, w.shape) for f in p.apply(Numbers(), w)], 0)
    assert np.abs(product - p(-2 + 4 * w)).max() <= ROUNDING
