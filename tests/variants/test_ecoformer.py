"""Attention on codes against fractions, the linear function beside it, and itself written as sums."""

from fractions import Fraction

import numpy as np
import pytest

from refattn import Problem, UnsupportedProblem, evaluate
from refattn.exact import agree
from refattn.exact.agree import differing_form
from refattn.functions.hashing import code_attention


def call(n_q=4, n_k=6, bits=5, d_v=3, **more):
    rng = np.random.default_rng(0)
    q, k = (rng.choice([-1.0, 0.0, 1.0], (1, h, n, bits)) for h, n in ((2, n_q), (1, n_k)))
    v = rng.integers(-9, 10, (1, 1, n_k, d_v)).astype(float)
    return Problem(q, k, v, variant="ecoformer", **more)


def written_out(p, h, i, allowed=None):
    """Return one row by fractions."""
    q, k, v = p.query[0, h, i], p.key[0, 0], p.value[0, 0]
    seen = range(p.n_k) if allowed is None else np.nonzero(allowed)[0]
    w = {j: Fraction(int((q * k[j]).sum())) + p.d_k + 1 for j in seen}
    assert min(w.values()) >= 1
    return [sum(w[j] * int(v[j, c]) for j in w) / sum(w.values()) for c in range(p.d_v)]


def test_it_is_what_fractions_are():
    p = call()
    mask = np.random.default_rng(1).random((1, 1, p.n_q, p.n_k)) < 0.5
    mask[..., 0], mask[0, 0, 2] = True, False
    for given, rows in ((None, None), (mask, mask[0, 0])):
        out = evaluate(p.replace(allowed=given), rounding="float64").out
        for h, i in np.ndindex(2, p.n_q):
            if rows is not None and not rows[i].any():
                assert (out[0, h, i] == 0).all()
                continue
            exact = written_out(p, h, i, None if rows is None else rows[i])
            assert out[0, h, i].tolist() == [float(x) for x in exact]


def test_it_is_what_the_linear_function_computes():
    """That adds up n_k weights of at most 2 bits + 1, exactly, and divides sums of whole numbers once."""
    p = call()
    found = code_attention(p.query, np.repeat(p.key, 2, 1), np.repeat(p.value, 2, 1))
    assert (found == evaluate(p, rounding="float64").out).all()
    released = code_attention(p.query[:, :, :4], p.query[:, :, :4], p.query[:, :, :4], mode="released")
    square = Problem(*(p.query[:, :, :4],) * 3, variant="ecoformer")
    assert (released != evaluate(square, rounding="float64").out).any()


def test_its_sums_agree_in_the_field(monkeypatch):
    monkeypatch.setattr(agree, "FEW", 10**6)
    p = call(scale=0.5)
    mask = np.random.default_rng(1).random((1, 1, p.n_q, p.n_k)) < 0.5
    assert differing_form(p) == ""
    assert differing_form(p.replace(allowed=mask)) == ""


def test_opposite_codes_weigh_one_and_equal_ones_the_most():
    code = np.array([1.0, -1.0, 1.0])
    p = Problem(code[None, None, None], np.stack([code, -code])[None, None], np.eye(2)[None, None], variant="ecoformer")
    assert evaluate(p, rounding="float64").out.ravel().tolist() == [7 / 8, 1 / 8]


def test_gradients_by_codes_are_those_of_the_quotient():
    """One query, two keys: out = (w_0 v_0 + w_1 v_1) / (w_0 + w_1), dw_j / dq = k_j."""
    q, k, v = np.array([[1.0, 1]]), np.array([[1.0, -1], [1, 1]]), np.array([[2.0], [5.0]])
    p = Problem(*(x[None, None] for x in (q, k, v)), variant="ecoformer")
    a = evaluate(p, rounding="float64", gradients=np.ones((1, 1, 1, 1)))
    w = [Fraction(3), Fraction(5)]
    out = (w[0] * 2 + w[1] * 5) / 8
    by_w = [(2 - out) / 8, (5 - out) / 8]
    assert a.dq[0, 0, 0].tolist() == [float(sum(g * int(k[j, c]) for j, g in enumerate(by_w))) for c in range(2)]
    assert a.dk[0, 0].tolist() == [[float(g)] * 2 for g in by_w]
    assert a.dv[0, 0, :, 0].tolist() == [3 / 8, 5 / 8]


def test_what_it_does_not_have_is_named():
    with pytest.raises(UnsupportedProblem, match="causal: ecoformer attention does not have it; it has allowed"):
        evaluate(call(4, 4, causal="bottom_right"))
