"""Rows whose choice rounding can turn are judged by either; recurrences by what their state loses."""

from dataclasses import replace

import numpy as np
import pytest

from refattn import Capabilities, Problem, check_kernel, evaluate
from refattn.check.bounds.choices import either
from refattn.check.bounds.expected import expected
from refattn.check.bounds.forward import bounds
from refattn.check.compare import compare
from refattn.check.model import flash

from ...conftest import tensor


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
    assert not check_kernel(lambda p: lightning(p, late=True), "lightning", capabilities=ABLE).passed

    def forgets(p):
        return lightning(p.replace(state=None))

    report = check_kernel(forgets, "lightning", capabilities=ABLE)
    assert {"law/state_carried[float32]", "gaussian/state[float32]"} <= {c.name for c in report.failures}

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
