"""SeerAttention's choice: against the function's, at exact thresholds, where nothing is chosen, what is refused."""

from fractions import Fraction

import numpy as np
import pytest

from refattn import InvalidProblem, Problem, UnsupportedProblem, evaluate
from refattn.exact import agree
from refattn.exact.agree import differing_form
from refattn.exact.lowering import lower
from refattn.functions.gates import seer_select
from refattn.variants.seer import above, above_in_floats, kept


def call(n=14, h=2, h_kv=1, d=3, **options):
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((1, x, n, d)).astype(np.float32) for x in (h, h_kv, h_kv))
    return Problem(q, k, v, causal="bottom_right", variant="seer", options=options)


def blocks(p, size):
    """Return which blocks of keys each block of queries takes, by their first tokens' rows and keys."""
    return lower(p).problem.allowed[:, :, ::size, ::size]


@pytest.mark.parametrize("rule", [{"threshold": 0.25}, {"threshold": 0.0}, {"ratio": 0.5}, {"ratio": 1.0}])
def test_it_chooses_what_the_function_chooses(rule):
    p = call(24, h_kv=2, block_size=4, **rule)
    x, y = (a.astype(np.float64).reshape(1, 2, 6, 4, 3).mean(3) for a in (p.query, p.key))
    s = np.where(np.tri(6, dtype=bool), x @ y.swapaxes(2, 3), -np.inf)
    gate = np.exp(s - s.max(-1, keepdims=True))
    np.testing.assert_array_equal(blocks(p, 4), seer_select(gate / gate.sum(-1, keepdims=True), **rule))


def test_forms_agree_in_the_field_and_in_balls(monkeypatch):
    monkeypatch.setattr(agree, "_same_call", lambda a, b: False)
    for rule in ({"threshold": 0.25}, {"ratio": 0.5, "gate_dim": 2}):
        assert differing_form(call(7, h=1, block_size=2, **rule)) == ""


def test_a_gate_at_the_threshold_is_not_above_it():
    """Equal scores: a quarter each in the fourth row of blocks, and less below, where nothing is chosen."""
    p = call(10, block_size=2, threshold=0.25)
    p = p.replace(query=np.ones_like(p.query), key=np.ones_like(p.key))
    assert blocks(p, 2)[0, 0].sum(1).tolist() == [1, 2, 3, 0, 0]
    answer = evaluate(p, rounding="float32")
    assert (answer.out[:, :, 6:] == 0).all()
    assert np.isneginf(answer.lse[:, :, 6:]).all()
    below = p.replace(options={"block_size": 2, "threshold": float(np.nextafter(0.25, 0))})
    assert blocks(below, 2)[0, 0].sum(1).tolist() == [1, 2, 3, 4, 0]
    ratio = p.replace(options={"block_size": 2, "ratio": 0.75})  # (1 - 1/2)·5 is 2.5: two, the lower ones
    assert blocks(ratio, 2)[0, 0, -1].tolist() == [True, True, False, False, False]


def test_scores_of_any_size_are_compared():
    """Exponentials of far scores are beyond any number of decimals; such a gate is 0 for every threshold."""
    p = call(6, block_size=2)
    p = p.replace(query=p.query * np.float32(1e18), key=p.key * np.float32(1e18))
    assert blocks(p, 2)[0, 0].sum(1).tolist() == [1, 1, 1]
    assert not above([Fraction(0), Fraction(10) ** 30], 0, Fraction(2) ** -1074)
    assert above([Fraction(0), Fraction(-(10**30))], 0, Fraction(1, 2))


def test_gates_by_hand():
    row = [Fraction(0), Fraction(1)]  # 1 / (1 + e) is 0.2689..., e / (1 + e) 0.7310...
    for test in (above, above_in_floats):
        assert [test(row, 0, Fraction(x)) for x in (0.25, 0.28)] == [True, False]
        assert [test(row, 1, Fraction(x)) for x in (0.73, 0.74, 0)] == [True, False, True]
    assert [kept(8, z) for z in (1e-9, 0.4375, 0.75, 1.0)] == [1, 2, 4, 8]  # 1 - z is 9/16: a root of 3/4
    with pytest.raises(UnsupportedProblem, match=r"^threshold: float64 cannot tell on which side"):
        above_in_floats(row, 0, Fraction(0.26894142136999512))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"options": {"threshold": 1.5}}, r"^threshold: got 1.5, expected a number from 0 to 1$"),
        ({"options": {"threshold": float("nan")}}, r"^threshold: got nan, expected a number from 0 to 1$"),
        ({"options": {"ratio": 0.0}}, r"^ratio: got 0.0, expected None or a number above 0, at most 1$"),
        ({"options": {"ratio": 0.5, "threshold": 0.5}}, r"^ratio: got one, and a threshold; leave one out$"),
        ({"options": {"gate_dim": 4}}, r"^gate_dim: got 4, expected at most query's dim 3$"),
        ({"options": {"gate_dim": 0}}, r"^gate_dim: got 0, expected None or an integer of at least 1$"),
        ({"options": {"block_size": 0}}, r"^block_size: got 0, expected an integer of at least 1$"),
        ({"options": {"gate_scale": None}}, r"^gate_scale: got None, expected a finite number$"),
        ({"causal": None}, r"^causal: a block of queries chooses among earlier blocks; set causal='bottom_right'$"),
        ({"query": np.ones((1, 2, 13, 3), np.float32)}, r"^key: axis seq is 14, expected query's 13: blocks of"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    with pytest.raises(InvalidProblem, match=text):
        evaluate(call().replace(**change))
