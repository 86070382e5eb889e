"""Gradients by the tape, written out for one weight; and what heads of a group add up to."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from refattn import VARIANTS, Problem, evaluate
from refattn.arrays import to_float64
from refattn.check.bounds import taped
from refattn.check.bounds.forward import bounds
from refattn.check.bounds.gradients import gradient_bounds
from refattn.check.bounds.operands import Operands, lost
from refattn.check.bounds.taped import head_gradients
from refattn.check.model import Model, flash
from refattn.exact.agree import under
from refattn.exact.heads import heads
from refattn.variants import Steps
from refattn.variants.lightning import prepare, step

from ...conftest import tensor
from .coarse import TINY, TINY_W, S, U, W, times

MODEL = Model("float16", "float8_e5m2", "bfloat16", tile=2, chain=2)
SCALED = replace(MODEL, group_sum="bfloat16", operands="bfloat16", scales="tensor")


def over_keys(size, moved, reached):
    """A product over one key: four passes, what errors move, and its left operand in the weights' type."""
    return times(4) * size + 4 * TINY + moved + W * size + TINY_W * reached


def over_features(size, moved):
    return times(3) * size + moved


def stored(size):
    """A rounding of a score, and storing it."""
    return (times(1) + S * (1 + times(1))) * size + TINY


@pytest.mark.parametrize("operands", ["", "bfloat16"])
def test_one_weights_gradients(operands):
    """The weight is 2 times 3, the value 5, what arrives 7."""
    model = replace(MODEL, operands=operands)
    q, k, v = (np.full((1, 1, 1, 1), x, np.float16) for x in (2.0, 3.0, 5.0))
    p = Problem(q, k, v, variant="linear", options={"feature": "identity", "normalize": False})
    (one,) = heads(p)
    g = np.full((1, 1), 7.0)
    found = head_gradients(one, model, g, np.full((1, 1, 1, 1), 7.0), np.zeros((1, 1)))
    off = Operands.of(one, model)
    e_q, e_k, e_v, e_g = (x.item() for x in (off.q, off.k, off.v, lost(g, g, model)))
    e = over_features((2 + e_q) * (3 + e_k), e_q * e_k + e_q * 3 + 2 * e_k)
    e = stored(6 + e) + e
    dv = over_keys((6 + e) * (7 + e_g), e * e_g + e * 7 + 6 * e_g, 7 + e_g)
    e = over_features((7 + e_g) * (5 + e_v), e_g * e_v + e_g * 5 + 7 * e_v)
    e = stored(35 + e) + e
    dq = over_keys((35 + e) * (3 + e_k), e * e_k + e * 3 + 35 * e_k, 3 + e_k)
    dk = over_keys((35 + e) * (2 + e_q), e * e_q + e * 2 + 35 * e_q, 35 + e)  # queries by dS
    assert [found[n][0].item() for n in ("dq", "dk", "dv")] == [105.0, 70.0, 42.0]
    for n, wanted in (("dq", dq), ("dk", dk), ("dv", dv)):
        assert abs(found[n][1].item() - wanted) <= 2.0**-43 * wanted, n  # fewer than 2**10 operations
    assert set(found) == {"dq", "dk", "dv"}


def test_what_out_may_be_off_by_counts():
    """A weight divided by itself: its gradients are nothing but what the stored output leaves of them."""
    one = np.ones((1, 1, 1, 1), np.float16)
    (head,) = heads(Problem(one, one, one, variant="linear", options={"feature": "identity"}))
    g = np.ones((1, 1))
    less, more = (head_gradients(head, Model(), g, one, np.full((1, 1), x)) for x in (0.0, 2.0**-8))
    assert more["dq"][0].item() == 0.0
    assert more["dq"][1].item() - less["dq"][1].item() >= 2.0**-8
    unknown = head_gradients(head, Model(), g, one, np.full((1, 1), np.nan))
    assert unknown["dq"][1].item() == np.inf


def test_heads_of_a_group_and_rows_of_a_bias_add_up(make):
    rng = np.random.default_rng(1)
    bias = tensor(rng, (1, 4, 1, 7), "float16")
    p = make(5, 7, 4, b=2, h=4, h_kv=2, dtype="float16", variant="sigmoid", bias=bias)
    dout = tensor(rng, p.out_shape, "float16")
    answer, arriving, model = evaluate(p, gradients=dout), to_float64(dout), SCALED
    limit = bounds(answer, model)
    total = {n: np.zeros(answer.enclosures[n].mid.shape) for n in ("dq", "dk", "dv", "dbias")}
    for one in heads(p):
        at, kv = (one.batch, one.head), (one.batch, one.head_kv)
        found = head_gradients(one, model, arriving[at], arriving, limit["out"][at])
        total["dq"][at] = found["dq"][1]
        for n in ("dk", "dv"):
            total[n][kv] += found[n][1] + 4 * S * found[n][0]
        # ten scores, two added at a time: seven additions
        size, off = found["dbias"]
        total["dbias"][0, one.head] += (off + 7 * U * size).sum(0, keepdims=True)
    got = gradient_bounds(answer, model, dout, limit)
    assert got.keys() == total.keys()
    for n, x in total.items():
        wanted = x * (1 + U) + U * np.abs(answer.enclosures[n].mid) + TINY
        assert (np.abs(got[n] - wanted) <= 2.0**-43 * wanted).all(), n


def test_a_running_sum_is_rescaled_once_for_each_tile_of_keys(make):
    p = make(5, 8, 16)
    (one, _) = heads(p)
    g = np.ones((5, 16))
    found = [head_gradients(one, Model(tile=n), g, g, np.zeros_like(g))["dv"][1] for n in (7, 8, 100)]
    assert (found[0] > found[1]).all()
    assert (found[1] == found[2]).all()


def test_a_recurrence_may_fade_token_by_token(monkeypatch):
    """From a state alone: each step rounds the decay again, which decays by distance do not."""
    n, u = 64, 2.0**-24
    one = np.ones((1, 1, n, 1), np.float32)
    options = {"decay": (0.001,)}
    state = np.ones((1, 1, 1, 1), np.float32)
    p = Problem(one, 0 * one, 0 * one, causal="bottom_right", variant="lightning", options=options, state=state)
    dout = np.zeros_like(one)
    dout[0, 0, -1] = 1
    found = gradient_bounds(evaluate(p, gradients=dout), flash("float32"), dout, {"out": np.zeros(one.shape)})
    least = (np.exp(-0.001) * (1 - u) ** 2) ** n  # the decay is rounded once, and each product with it
    lost = np.exp(-0.001 * n) - least
    assert found["dstate"].item() > lost
    with under(replace(VARIANTS["lightning"], name="dense", define=Steps(step, prepare, linear=True))):
        p = p.replace(variant="dense")
        found = gradient_bounds(evaluate(p, gradients=dout), flash("float32"), dout, {"out": np.zeros(one.shape)})
        assert found["dstate"].item() > lost
        monkeypatch.setattr(taped, "_stepped", lambda *given: defaultdict(float))
        found = gradient_bounds(evaluate(p, gradients=dout), flash("float32"), dout, {"out": np.zeros(one.shape)})
    assert found["dstate"].item() < lost  # what a form of all tokens alone would allow
