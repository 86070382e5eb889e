"""Bounds and variances of a recurrence token by token, written out for one feature and one value column."""

from dataclasses import replace
from math import exp, expm1

import numpy as np
import pytest

from refattn import VARIANTS, Problem, evaluate
from refattn.check.bounds.forward import forward
from refattn.check.bounds.operands import Operands
from refattn.check.bounds.stepped import stepped
from refattn.check.model import C, Model, flash
from refattn.exact.agree import under
from refattn.exact.heads import heads

from .coarse import CU, EXP, TINY, TINY_W, S, U, W, times

QUERIES, KEYS, VALUES, START = (1.0, -3.0, 0.5, 2.0), (2.0, 1.0, -0.25, 3.0), (0.5, 4.0, 1.0, -1.0), 1.5
DECAY, SCALE = 0.25, -0.5
MODELS = {o: Model("float16", "float8_e5m2", "bfloat16", exp_ulps=EXP, tile=2, operands=o) for o in ("", "bfloat16")}


def call(start):
    q, k, v = (np.array(x, np.float16).reshape(1, 1, 4, 1) for x in (QUERIES, KEYS, VALUES))
    more = {"causal": "bottom_right", "variant": "lightning", "options": {"decay": (DECAY,)}, "scale": SCALE}
    return Problem(q, k, v, **more, state=np.full((1, 1, 1, 1), START) if start else None)


def fading():
    """The decay's exponential of one token: its size, largest error and variance."""
    y, e = exp(-DECAY), times(1) * DECAY + TINY
    moved = y * expm1(e)
    own = ((U * EXP) ** 2 / 3 + CU) * y**2 + TINY**2 / 3
    return y, times(EXP + 1) * (y + moved) + TINY + moved, own + y**2 * CU * DECAY**2


def plain(fade, start):
    """What a decay gives: out of each token, and the last state."""
    state, out = start, []
    for q, k, v in zip(QUERIES, KEYS, VALUES, strict=True):
        state = state * fade + k * v
        out.append(q * SCALE * state)
    return np.array(out), state


def written_out(start, lost):
    """By token out's error and variance, and the last state's, apart from the decay's own."""
    (fade, off, _), state, e, var, found = fading(), start, 0.0, 0.0, []
    for t, (q, k, v) in enumerate(zip(QUERIES, KEYS, VALUES, strict=True)):
        e_q, e_k, e_v, var_q, var_k, var_v = (x[t, 0] for x in lost)
        faded, meet, moved = state * fade, e * off, fade * e + abs(state) * off
        e = times(1) * (abs(faded) + meet + moved) + TINY + meet + moved
        var = CU * faded**2 + fade**2 * var
        size, new = (abs(k) + e_k) * (abs(v) + e_v), k * v
        brought = times(4) * size + 4 * TINY + e_k * e_v + e_k * abs(v) + abs(k) * e_v
        brought += W * size + TINY_W * (abs(v) + e_v)  # both stand for weights' product: k is rounded to their type
        var += 2 * CU * new**2 + TINY**2 / 3 + v**2 * var_k + k**2 * var_v + C * W**2 * new**2 + TINY_W**2 / 3 * v**2
        state = faded + new
        e, var = times(1) * (abs(state) + e + brought) + TINY + e + brought, CU * state**2 + var
        scaled, moved = q * SCALE, e_q * abs(SCALE)
        e_q = (times(1) + S * (1 + times(1))) * (abs(scaled) + moved) + TINY + moved
        var_q = (CU + C * S**2) * scaled**2 + SCALE**2 * var_q
        own = times(3) * (abs(scaled) + e_q) * (abs(state) + e) + e_q * e + e_q * abs(state) + abs(scaled) * e
        found.append((own, 2 * CU * (scaled * state) ** 2 + state**2 * var_q + scaled**2 * var))
    return np.array(found).T, (e, var)


@pytest.mark.parametrize("operands", MODELS)
@pytest.mark.parametrize("start", [0.0, START])
def test_every_token_loses_what_the_proof_says(operands, start):
    p, model = call(start), MODELS[operands]
    (one,) = heads(p)
    lost = Operands.of(one, model)
    (out, last), (y, _, var) = (
        written_out(start, (lost.q, lost.k, lost.v, lost.var_q, lost.var_k, lost.var_v)), fading()
    )  # fmt: skip
    there, here = plain(y + np.sqrt(var), start), plain(y, start)
    moved = [np.square(a - b) for a, b in zip(there, here, strict=True)]
    found = stepped(one, VARIANTS["lightning"].shape, model)
    for (span, variance), (e, v), by in zip(found, (out, last), moved, strict=True):
        # errors are of 2**10 operations at most; the standard deviation moves out by 2**-11, to 2**-53 of its size
        assert (np.abs(span[:, 0] - e) <= 2.0**-43 * e).all()
        assert (np.abs(variance[:, 0] - v - by) <= 2.0**-36 * (v + by)).all()


def test_a_state_may_be_off_by_what_its_steps_lose_and_its_own_rounding():
    p, model = call(START), MODELS[""]
    answer = evaluate(p)
    limit, variance = forward(answer, model)
    (one,) = heads(p)
    _, (state, var) = stepped(one, VARIANTS["lightning"].shape, model)
    allowed = state * (1 + U) + U * np.abs(answer.state[0, 0]) + TINY
    assert (np.abs(limit["state"][0, 0] - allowed) <= 2.0**-50 * allowed).all()
    ulp = np.spacing(np.abs(answer.state[0, 0]).astype(np.float16)).astype(float)
    assert (np.abs(variance["state"][0, 0] - var - ulp**2 / 12) <= 2.0**-50 * var).all()


def test_out_may_be_off_by_what_the_wider_of_both_forms_loses():
    """Of sixteen tokens alike the last ones' states lose more than a sum over all tokens at once."""
    one = np.ones((1, 1, 16, 1), np.float32)
    p = Problem(one, one, one, causal="bottom_right", variant="lightning", options={"decay": (0.0,)})
    model, answer = flash("float32"), evaluate(p)
    limit, variance = (x["out"][0, 0] for x in forward(answer, model))
    options = {"feature": "identity", "normalize": False, "decay": (0.0,)}
    rows, of_rows = (x["out"][0, 0] for x in forward(evaluate(p.replace(variant="linear", options=options)), model))
    (head,) = heads(p)
    (out, var), _ = stepped(head, VARIANTS["lightning"].shape, model)
    u, tiny = 2.0**-24, 2.0**-150
    steps = out * (1 + u) + u * np.abs(answer.out[0, 0]) + tiny
    assert (rows > steps).any()
    assert (rows < steps).any()
    assert (limit == np.maximum(rows, steps)).all()
    ulp = np.spacing(answer.out[0, 0].astype(np.float32)).astype(float)
    wanted = np.maximum(of_rows - ulp**2 / 12, var) + ulp**2 / 12
    assert (np.abs(variance - wanted) <= 2.0**-50 * wanted).all()


def test_rows_that_are_no_numbers_allow_nothing():
    p = call(START)
    p.query[0, 0, 2] = np.nan
    limit = forward(evaluate(p), MODELS[""])[0]["out"][0, 0, :, 0]
    assert (limit == 0).tolist() == [False, False, True, False]


def test_a_variance_beyond_float64_is_no_number():
    """And NumPy has nothing to say of it."""
    q, k = np.ones((1, 1, 1, 1)), np.full((1, 1, 1, 1), 2.0**511)
    p = Problem(q, k, k, causal="bottom_right", variant="lightning", options={"decay": (DECAY,)})
    (one,) = heads(p)
    (out, var_out), (state, var) = stepped(one, VARIANTS["lightning"].shape, flash("float64"))
    assert np.isfinite([out, state]).all()
    assert not np.isfinite([var_out, var]).any()
    x = np.full((1, 1, 2, 1), 2.0**1000)  # out and the state themselves, too
    (one,) = heads(Problem(x, x, x, causal="bottom_right", variant="lightning", options={"decay": (DECAY,)}))
    (_, var_out), (_, var) = stepped(one, VARIANTS["lightning"].shape, flash("float64"))
    assert not np.isfinite([*var_out.flat, *var.flat]).any()


def test_a_recurrence_without_another_form_is_bounded_by_its_steps():
    p, model = call(START), MODELS[""]
    answer = evaluate(p)
    with under(replace(VARIANTS["lightning"], name="alone", forms={})):
        alone = p.replace(variant="alone")
        limit = forward(evaluate(alone), model)[0]
        ((out, _), _) = stepped(next(heads(alone)), VARIANTS["lightning"].shape, model)
    allowed = out * (1 + U) + U * np.abs(answer.out[0, 0]) + TINY
    assert (np.abs(limit["out"][0, 0] - allowed) <= 2.0**-50 * allowed).all()
    assert (limit["state"] == forward(answer, model)[0]["state"]).all()
