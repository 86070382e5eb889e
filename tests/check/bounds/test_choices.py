"""Rows whose choice rounding can turn are judged by either; recurrences by what their state loses."""

import importlib
from dataclasses import replace

import numpy as np
import pytest

from refattn import VARIANTS, Capabilities, Problem, UnsupportedProblem, assert_close, check_kernel, evaluate
from refattn.check.bounds.choices import either, score_errors
from refattn.check.bounds.expected import expected
from refattn.check.bounds.forward import bounds, forward
from refattn.check.bounds.losses import Losses
from refattn.check.bounds.operands import Operands
from refattn.check.compare import compare
from refattn.check.kernels.sparse import sparse
from refattn.check.model import Model, flash
from refattn.exact.choosing import candidates, scores_of
from refattn.exact.heads import heads

from ...conftest import tensor

module = importlib.import_module("refattn.check.bounds.choices")


def near_tie(gap):
    """A call of MoBA whose last block's rows choose between two blocks with scores that differ by about `gap`."""
    rng = np.random.default_rng(0)
    q, k, v = (tensor(rng, (1, 1, 9, 8)) for _ in range(3))
    k[:, :, 3:6] = k[:, :, 0:3]
    k[:, :, 3:6] *= np.float32(1 + gap)
    options = {"block_size": 3, "topk": 2}
    return Problem(q, k, v, causal="bottom_right", variant="moba", options=options)


def chosen_otherwise(p):
    """Return what a kernel gives that takes the other of the two blocks in the last block's rows."""
    core = evaluate(p).core
    allowed = core.allowed.copy()
    allowed[0, 0, 6:, :3], allowed[0, 0, 6:, 3:6] = core.allowed[0, 0, 6:, 3:6], core.allowed[0, 0, 6:, :3]
    return evaluate(core.replace(allowed=allowed), rounding="float32").out


def judged(p, got):
    known = expected(p, flash("float32")).for_result({"out": got})
    return compare("out", got, known.answer, known.allowed["out"], "float32", known.variance["out"])


@pytest.mark.parametrize("gap", [0.0, 2.0**-22])
def test_a_choice_that_rounding_can_turn_is_judged_by_both(gap):
    p = near_tie(gap)
    other = either(evaluate(p), flash("float32"))
    assert (other.rows[0, 0] == [0] * 6 + [1] * 3).all()
    assert judged(p, evaluate(p, rounding="float32").out).passed
    assert judged(p, chosen_otherwise(p)).passed


def test_a_choice_that_rounding_cannot_turn_is_judged_by_the_exact_one():
    p = near_tie(0.25)
    assert either(evaluate(p), flash("float32")) is None
    assert judged(p, evaluate(p, rounding="float32").out).passed
    assert not judged(p, chosen_otherwise(p)).passed


def test_one_choice_in_out_and_the_other_in_lse_is_a_failure():
    """Both blocks with equal values give the same out: their lse tells them apart."""
    p = near_tie(2.0**-22)
    p.value[:, :, 3:6] = p.value[:, :, 0:3]
    known = expected(p, flash("float32"))
    got = {n: np.array(getattr(evaluate(p, rounding="float32"), n)) for n in ("out", "lse")}
    assert compare_lse(known, got)
    got["lse"] += np.float32(0.5)
    assert not compare_lse(known, got)


def compare_lse(known, got):
    found = known.for_result(got)
    return compare("lse", got["lse"], found.answer, found.allowed["lse"], "float32").passed


def test_a_row_that_sees_its_sink_alone_may_round_its_lse():
    sink = np.array([0.7, -3.3])
    rng = np.random.default_rng(0)
    p = Problem(*(tensor(rng, (1, 2, 5, 4)) for _ in range(3)), allowed=np.zeros((1, 1, 5, 5), bool), sink=sink)
    limit = bounds(evaluate(p), flash("float32"))["lse"]
    rounded = (sink.astype("f4") * np.float32(np.log2(np.e))).astype("f4") * np.float32(np.log(2))
    assert (np.abs(rounded - sink) <= limit[0, :, 0]).all()
    assert (limit[0, :, 0] <= 2.0**-20 * np.abs(sink)).all()


def test_long_strong_decay_keeps_numbers():
    """e**(474 times 1.5), which the keys ahead of the first row would have, is beyond float64."""
    rng = np.random.default_rng(0)
    q, k, v = (tensor(rng, (1, 1, 474, 4)) for _ in range(3))
    p = Problem(q, k, v, causal="bottom_right", variant="lightning", options={"decay": (1.5,)})
    answer = evaluate(p)
    assert np.isfinite(answer.out).all()
    assert all(np.isfinite(x).all() for x in bounds(answer, flash("float32")).values())


def test_neither_choice_is_a_failure():
    p = near_tie(0.0)
    both = (evaluate(p).out + chosen_otherwise(p).astype(np.float64)) / 2
    assert not judged(p, both.astype(np.float32)).passed


def lightning(problem, late=False):
    """Return Lightning attention in float32, token by token, and the last state; with a bug, the decay one late."""
    p = problem.to("numpy")
    if p.cu_seqlens_q is not None:
        raise UnsupportedProblem("cu_seqlens_q: one sequence at a time")
    group = p.heads // p.heads_kv
    k, v = (np.repeat(x, group, 1).astype(np.float32) for x in (p.key, p.value))
    fade = np.exp(-np.asarray(p.options["decay"], np.float32))[None, :, None, None]
    shape = (p.batch, p.heads, p.d_k, p.d_v)
    state = np.zeros(shape, np.float32) if p.state is None else p.state.astype(np.float32)
    q, out = p.query.astype(np.float32) * np.float32(p.scale or 1.0), np.zeros(p.out_shape, np.float32)
    for t in range(p.n_q):
        new = k[:, :, t, :, None] * v[:, :, t, None, :]
        state = (state + new) * fade if late else state * fade + new
        out[:, :, t] = np.einsum("bhd,bhde->bhe", q[:, :, t], state)
    return out.astype(p.query.dtype), state


ABLE = Capabilities({"float32"}, features={"causal_bottom_right", "grouped_heads", "scale", "state", "d_v_differs"})


def test_a_right_recurrence_passes_and_carries_its_state():
    report = check_kernel(lightning, "lightning", capabilities=ABLE)
    assert report.passed, [report.describe(c) for c in report.failures]
    assert "law/state_carried[float32]" in [c.name for c in report.checks if c.verdict == "passed"]
    assert report.worst("float32") > 0.02


def test_wrong_recurrences_fail():
    late = check_kernel(lambda p: lightning(p, late=True), "lightning", capabilities=ABLE, only="gaussian/*")
    assert not late.passed

    def forgets(p):
        return lightning(p.replace(state=None))

    for name in ("law/state_carried[float32]", "gaussian/state[float32]"):
        (check,) = check_kernel(forgets, "lightning", capabilities=ABLE, only=name).failures
        assert check.name == name

    def wrong_state(p):
        out, state = lightning(p)
        return out, state * np.float32(1 + 1e-3)

    assert not check_kernel(wrong_state, "lightning", capabilities=ABLE, only="gaussian/decay*").passed


def toward_zero(x):
    """Return float64 numbers in float32, cut off."""
    y = x.astype(np.float32)
    return np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def test_a_state_that_is_cut_off_at_every_step_is_within_its_bound_and_fails_by_its_rms():
    def cut_off(p):
        out, _ = lightning(p)
        group, fade = p.heads // p.heads_kv, np.exp(-np.float64(p.options["decay"]))[None, :, None, None]
        k, v = (np.repeat(x, group, 1).astype(np.float64) for x in (p.key, p.value))
        state = np.zeros((p.batch, p.heads, p.d_k, p.d_v), np.float32)
        for t in range(p.n_k):
            faded = toward_zero(state * fade)
            state = toward_zero(faded.astype(np.float64) + k[:, :, t, :, None] * v[:, :, t, None, :])
        return out, state

    model = replace(flash("float32"), exp_ulps=0.5)  # np.exp's: the decay's own error would hide it
    report = check_kernel(cut_off, "lightning", capabilities=ABLE, model=model, only="gaussian/decay")
    (failed,) = report.failures
    assert failed.ratio < 1
    assert "state: errors are" in failed.message
    assert "times what the model's roundings give (rms)" in failed.message


def test_the_bound_of_a_state_grows_with_the_tokens_it_keeps():
    rng = np.random.default_rng(0)
    q, k, v = (np.abs(tensor(rng, (1, 1, 64, 4))) for _ in range(3))

    def limit(n, decay):
        x = (y[:, :, :n] for y in (q, k, v))
        p = Problem(*x, causal="bottom_right", variant="lightning", options={"decay": (decay,)})
        answer = evaluate(p)
        return (bounds(answer, flash("float32"))["state"] / np.abs(answer.state)).max()

    assert limit(64, 0.0) > 4 * limit(4, 0.0)
    assert limit(64, 2.0) < 2 * limit(8, 2.0)  # what fades takes its errors along


def several():
    """Six blocks of one key: the last row takes the first, one of three that are tied, and its own."""
    one = np.ones((1, 1, 6, 1), np.float32)
    p = Problem(
        one, one.copy(), one.copy(), causal="bottom_right", variant="moba", options={"block_size": 1, "topk": 3}
    )
    p.key[0, 0, :, 0], p.value[0, 0, :, 0] = (4, 1, 1, 1, -4, 1), (0, 0, 10, 12, 40, 0)
    return p


def taken(a):
    return [np.nonzero(x)[0].tolist() for x in a.call.allowed[0, 0]]


def test_every_choice_of_what_is_tied_is_an_answer():
    p = several()
    exact, found = evaluate(p), either(evaluate(p), flash("float32"))
    assert found.rows.tolist() == [[[0, 0, 0, 1, 2, 2]]]
    assert taken(exact) == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5]]
    first, second = (taken(a) for a, _, _ in found.answers)
    assert first == [*taken(exact)[:3], [0, 2, 3], [0, 2, 4], [0, 2, 5]]
    assert second == [*taken(exact)[:4], [0, 3, 4], [0, 3, 5]]
    for other, limit, variance in found.answers:
        wanted = forward(other, flash("float32"))
        assert all((x[n] == y[n]).all() for x, y in zip((limit, variance), wanted, strict=True) for n in ("out", "lse"))


def test_only_so_many_choices_of_a_row_are_tried(monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    assert either(evaluate(several()), flash("float32")).rows.tolist() == [[[0, 0, 0, 1, 1, 1]]]


def test_no_other_shape_has_choices(make):
    assert either(evaluate(make(variant="power_blocks", n_q=7)), flash("float32")) is None
    assert either(evaluate(make()), flash("float32")) is None
    lowered = evaluate(several())
    assert either(replace(lowered, core=None), flash("float32")) is None


def test_each_row_is_judged_by_the_answer_nearest_to_it():
    p = several()
    exact, model = evaluate(p), flash("float32")
    limit, variance = forward(exact, model)
    others = either(exact, model)
    first, second = others.answers
    for mixed in ((exact, first, second, exact), (first, second, exact, second)):
        got = {n: np.array(getattr(exact, n)) for n in ("out", "lse")}
        parts = {id(exact): (exact, limit, variance), id(first): first, id(second): second}
        wanted = []
        for i, x in enumerate((exact, exact, *mixed)):
            part = parts[id(x)] if others.rows[0, 0, i] >= (2 if x is second else x is first) else parts[id(exact)]
            wanted.append(part)
            for n in got:
                got[n][0, 0, i] = getattr(part[0], n)[0, 0, i]
        answer, allowed, spread = others.nearest(got, exact, limit, variance)
        for i, (a, most, var) in enumerate(wanted):
            for n in got:
                for part in ("mid", "tail", "radius"):
                    e, w = (getattr(x.enclosures[n], part)[0, 0, i] for x in (answer, a))
                    assert (e == w).all()
                assert (allowed[n][0, 0, i] == most[n][0, 0, i]).all()
                assert (spread[n][0, 0, i] == var[n][0, 0, i]).all()
    assert (limit["out"] == forward(exact, model)[0]["out"]).all()  # what was given stays
    assert answer.problem is exact.problem


def test_what_is_no_number_is_nearest_to_the_exact_choice():
    p = several()
    exact, model = evaluate(p), flash("float32")
    limit, variance = forward(exact, model)
    answer, allowed, _ = either(exact, model).nearest({"out": np.full(p.out_shape, np.nan)}, exact, limit, variance)
    assert (answer.enclosures["out"].mid == exact.enclosures["out"].mid).all()
    assert (allowed["out"] == limit["out"]).all()


def test_how_far_a_row_is_from_an_answer():
    """In units of what is allowed, by its worst element of out or lse; 0 where nothing is wrong or allowed."""
    p = several()
    exact = evaluate(p)
    ones = {"out": np.full(p.out_shape, 0.5), "lse": np.full(p.out_shape[:3], 0.25)}
    got = {n: exact.enclosures[n].mid.copy() for n in ("out", "lse")}
    got["out"][0, 0, 1] += 2.0
    got["lse"][0, 0, 1:3] -= 3.0
    got["lse"][0, 0, 3] = np.nan
    ones["out"][0, 0, 4] = ones["lse"][0, 0, 4] = 0.0
    got["out"][0, 0, 0] = exact.enclosures["out"].mid[0, 0, 0] = 1.0
    found = module._distance(got, exact, ones)
    # errors count the exact numbers' own radius, far below a 2**-40 of these
    assert (np.abs(found[0, 0, 1:3] - 12) <= 12 * 2.0**-40).all()
    assert found[0, 0, 3] == np.inf
    assert (found[0, 0, [0, 5]] <= 2.0**-40).all()
    assert (module._distance({"out": got["out"]}, exact, ones)[0, 0, 1] - 4) <= 4 * 2.0**-40


def test_a_choosing_score_may_be_off_by_what_its_text_loses_and_storing():
    p = near_tie(0.25)
    (one,) = heads(p)
    shape = VARIANTS["moba"].shape
    c = candidates(one, shape)
    plain = Model("float16", "float16", "float16")
    s, e = score_errors((one,), shape, c, plain)
    means = one.k.reshape(3, 3, 8).mean(1)
    assert (np.abs(s - one.q @ means.T) <= 2.0**-50 * (np.abs(one.q) @ np.abs(means).T)).all()
    stored, more = score_errors((one,), shape, c, replace(plain, scores="bfloat16"))
    assert (stored == s).all()
    f = Losses(replace(plain, scores="bfloat16"), 9)
    span = scores_of((one,), shape, c, f, [(f.leaf(one.q, ("q", "d")), f.leaf(one.k, ("k", "d")))]).node.span
    assert (span + (2 * 8 + 2) * f.floor >= e).all()
    below = (2 * 8 + 2) * f.floor  # eight products and their sum
    assert (more == span + 2.0**-8 * (np.abs(s) + span) + below).all()
    narrowed = replace(plain, operands="bfloat16")
    off, f = Operands.of(one, narrowed), Losses(narrowed, 9)
    span = scores_of(
        (one,), shape, c, f, [(f.leaf(one.q, ("q", "d"), off.q), f.leaf(one.k, ("k", "d"), off.k))]
    ).node.span
    assert (score_errors((one,), shape, c, narrowed)[1] == span + below).all()
    assert (span + below > e).all()


@pytest.mark.parametrize(
    ("variant", "options"), [("topk", {"topk": 3, "sink_keys": 0, "local": 1}), ("moba", {"block_size": 4, "topk": 3})]
)
def test_scores_below_the_range_choose_either(make, variant, options):
    """In float32 all products of such numbers are 0, and a kernel cannot tell keys apart."""
    p = make(12, 12, causal="bottom_right", variant=variant, options=options)
    p = p.replace(query=p.query * np.float32(1e-30), key=p.key * np.float32(1e-30))
    assert_close(sparse(p)[0], p)
